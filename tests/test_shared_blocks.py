"""The method files repeat their common blocks letter for letter; what may differ is named here."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
# Blocks of qflow.py that another file may have in a version of its own, and those that it lacks.
DIFFER = {
    "fql": {"Args", "SETTINGS", "Networks", "Draws", "draw", "sample_actions", "policy_loss"}
    | {"total_loss", "main"},
    "flow_sac": {"Args", "SETTINGS", "EnsembleLinear", "Critic", "Networks", "rollout", "main"}
    | {"sample_actions", "Draws", "draw", "critic_loss", "policy_loss", "act", "train"},
}
ABSENT = {
    "fql": {"Value", "targets", "guidance", "value_loss"},
    "flow_sac": {"EnsembleLayerNorm", "GELU", "MLP", "Velocity", "Value", "aggregate"}
    | {"capture", "targets", "guidance", "value_loss", "total_loss", "make_optimizer", "update"},
}
OWN = {
    "fql": {"OneStep", "flow_loss", "critic_target"},
    "flow_sac": {"lecun_normal_", "Linear", "mlp", "BatchRenorm", "NaiveVelocity", "LogSigma"}
    | {"GatedVelocity", "DecoderLayer", "DecodedVelocity", "Policy", "explore"}
    | {
        "Batch",
        "make_optimizers",
        "update_critic",
        "update_policy",
        "ReplayBuffer",
        "continuous_env",
    },
}
# Flags: how many are declared as in qflow.py, and which have its name but another default or unit.
SHARED = {
    "fql": (24, set()),
    "flow_sac": (
        9,
        {"env", "seed", "batch_size", "hidden", "flow_steps", "eval_interval", "log_interval"},
    ),
}


def blocks(name):
    """Top-level definitions, name -> source, comments above them and decorators included."""
    text = (ROOT / f"{name}.py").read_text()
    lines, found, end = text.splitlines(), {}, 0
    for node in ast.parse(text).body:
        names = [getattr(node, "name", None)]
        if isinstance(node, ast.Assign):
            names = [target.id for target in node.targets]
        if names[0]:
            found[names[0]] = "\n".join(lines[end : node.end_lineno]).strip()
        end = node.end_lineno
    return found


def test_shared_blocks_are_the_same():
    reference = blocks("qflow")
    for method in DIFFER:
        other = blocks(method)
        assert set(reference) - set(other) == ABSENT[method]
        assert set(other) - set(reference) == OWN[method]
        same = [name for name in other if name in reference]
        assert same == [name for name in reference if name in other], "not in the same order"
        differing = {name for name in same if other[name] != reference[name]}
        assert differing == DIFFER[method]


def test_shared_flags_are_declared_the_same():
    def fields(name):
        (args,) = (n for n in ast.parse((ROOT / f"{name}.py").read_text()).body if _is_args(n))
        pairs = zip(args.body[::2], args.body[1::2])
        return {f.target.id: (ast.unparse(f), doc.value.value) for f, doc in pairs}

    reference = fields("qflow")
    for method in DIFFER:
        other = fields(method)
        shared = [name for name in reference if name in other]
        assert shared == [name for name in other if name in reference]
        same = [name for name in shared if reference[name] == other[name]]
        count, differing = SHARED[method]
        assert set(shared) - set(same) == differing
        assert len(same) == count and len(other) <= 28


def _is_args(node):
    return isinstance(node, ast.ClassDef) and node.name == "Args"
