"""Definitions that the method files share stand in each of them letter for letter the same."""

import ast
from itertools import combinations
from pathlib import Path

import pytest

SCRIPTS = ("qflow", "fql", "flow_sac")
PAIRS = list(combinations(SCRIPTS, 2))
IN_ALL_THREE = (
    "EnsembleLayerNorm GELU aggregate saved_args load act evaluate Collector CUDAGraph SeededReset "
    "Envs StaysOpen make_envs MAY_CHANGE_ON_RESUME parse_args choose_device set_matmul_precision "
    "report film evaluate_run __main__"
).split()

# Definitions that differ although they have the same name.
OWN = set("Args check_args SETTINGS Networks sample_actions Draws draw policy_loss".split())
OWN_OF_FLOW_SAC = {"EnsembleLinear", "Critic", "rollout", "critic_loss", "train", "main"}
DIFFERENT_BLOCKS = {
    ("qflow", "fql"): OWN | {"total_loss"},
    ("qflow", "flow_sac"): OWN | OWN_OF_FLOW_SAC,
    ("fql", "flow_sac"): OWN | OWN_OF_FLOW_SAC | {"flow_loss"},
}
FLAGS_OF_FLOW_SAC = set(
    "env offline_steps online_steps batch_size hidden flow_steps q_agg eval_interval "
    "log_interval".split()
)
DIFFERENT_FLAGS = {
    ("qflow", "fql"): set(),
    ("qflow", "flow_sac"): FLAGS_OF_FLOW_SAC,
    ("fql", "flow_sac"): FLAGS_OF_FLOW_SAC,
}


def sources(nodes, lines, first_line):
    """The source of each named node (name -> text), with the comments and decorators above it.

    A string after a node, such as the docstring of a flag, belongs to the node.
    """
    found = {}
    name = None
    end = first_line
    for node in nodes:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        text = "\n".join(lines[end : node.end_lineno]).strip()
        if is_docstring and name:
            found[name] += "\n" + text
        else:
            name = node_name(node)
            if name:
                assert name not in found, f"{name} is defined twice"
                found[name] = text
        end = node.end_lineno
    return found


def node_name(node):
    """The name that a statement defines, __main__ for the last block, else None."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return node.name
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    if isinstance(node, ast.AnnAssign):
        return ast.unparse(node.target)
    if isinstance(node, ast.If):
        return "__main__"
    return None


def read(script):
    """The definitions of a script and the fields of its Args: two dicts, name -> source."""
    text = (Path(__file__).parent.parent / f"{script}.py").read_text()
    nodes = ast.parse(text).body
    (args,) = (node for node in nodes if node_name(node) == "Args")
    lines = text.splitlines()
    return sources(nodes, lines, 0), sources(args.body, lines, args.lineno)


def differing_names(first, second):
    """Names that are in both, in the same order, with a different source."""
    shared = [name for name in first if name in second]
    assert shared == [name for name in second if name in first], "not in the same order"
    return {name for name in shared if first[name] != second[name]}


@pytest.mark.parametrize("pair", PAIRS)
def test_shared_definitions_are_the_same(pair):
    first, second = (read(script)[0] for script in pair)
    assert differing_names(first, second) == DIFFERENT_BLOCKS[pair]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_file_has_the_blocks_that_belong_in_all(script):
    blocks, _ = read(script)
    assert set(IN_ALL_THREE) <= set(blocks)
    assert list(blocks)[-1] == "__main__"


@pytest.mark.parametrize("pair", PAIRS)
def test_shared_flags_are_declared_the_same(pair):
    first, second = (read(script)[1] for script in pair)
    assert differing_names(first, second) == DIFFERENT_FLAGS[pair]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_has_a_line_of_help(script):
    _, flags = read(script)
    assert "seed" in flags
    for source in flags.values():
        declaration, docstring = source.splitlines()
        assert docstring.strip().startswith('"""')
