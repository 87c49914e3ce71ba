"""What the method files share stands in each of them letter for letter the same."""

import re
from itertools import combinations
from pathlib import Path

import pytest

SCRIPTS = ("qflow", "fql", "flow_sac")
PAIRS = list(combinations(SCRIPTS, 2))
PLUMBING = (
    "# ------------------------------------------- from here on the same in all three scripts"
)

# Definitions above that line that differ although they have the same name.
OWN = {"Args", "Networks", "sample_actions", "Noise", "sample_noise", "policy_loss", "check_args"}
OWN_OF_FLOW_SAC = {
    "EnsembleLinear",
    "Critic",
    "rollout",
    "critic_loss",
    "train",
    "make_env",
    "main",
}
# What fql.py has in addition for pixels: lines of qflow.py -> lines of fql.py.
ON_PIXELS = {
    "train": {
        """        noise = sample_noise(batch.actions, generator)
""": """        noise = sample_noise(batch.actions, generator)
        if dataset.has_frames:  # pixels
            batch = augment(batch, sample_offsets(batch.actions, generator))
""",
    },
    "make_env": {
        """    env = gymnasium.make(env_id, **options)
""": """    env = common.make_env(env_id, **options)
    if env_id.startswith("visual-"):
        env = common.stack_frames(env)
""",
    },
    "main": {
        """    torch.set_float32_matmul_precision(args.matmul_precision)
""": """    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.backends.cudnn.allow_tf32 = args.matmul_precision != "highest"  # pixels: convolutions
""",
        """        dataset_name, env_id, args.dataset, device, args.sparse
""": """        dataset_name,
        env_id,
        args.dataset,
        device,
        args.sparse,
        frames_on_host=args.device_data == "cpu",
""",
    },
}
DIFFERENT = {
    ("qflow", "fql"): OWN | {"total_loss"} | ON_PIXELS.keys(),
    ("qflow", "flow_sac"): OWN | OWN_OF_FLOW_SAC,
    ("fql", "flow_sac"): OWN | OWN_OF_FLOW_SAC | {"flow_loss"},
}
FLAGS_OF_FLOW_SAC = set(
    "env offline_steps online_steps batch_size hidden flow_steps q_agg eval_interval "
    "log_interval".split()
)
DIFFERENT_FLAGS = {
    ("qflow", "fql"): {"q_agg", "num_critics"},
    ("qflow", "flow_sac"): FLAGS_OF_FLOW_SAC,
    ("fql", "flow_sac"): FLAGS_OF_FLOW_SAC,
}


def read(script):
    """A script's text above the plumbing and below it."""
    text = (Path(__file__).parent.parent / f"{script}.py").read_text()
    method, line, plumbing = text.partition(PLUMBING)
    assert line, f"{script}.py: the line above the plumbing is missing"
    return method, plumbing


def definitions(script):
    """Functions and classes above the plumbing (name -> text), which two empty lines separate."""
    method, _ = read(script)
    found = {}
    for block in method.split("\n\n\n"):
        name = re.search(r"^(?:def|class) (\w+)", block, re.MULTILINE)
        if name:
            found[name[1]] = block
    return found


def flags(script):
    """The fields of Args (name -> declaration and line of help)."""
    field = r'    (\w+): .*\n    """.+"""'
    return {match[1]: match[0] for match in re.finditer(field, definitions(script)["Args"])}


def differing_names(first, second):
    """Names that are in both, in the same order, with different texts."""
    shared = [name for name in first if name in second]
    assert shared == [name for name in second if name in first], "not in the same order"
    return {name for name in shared if first[name] != second[name]}


@pytest.mark.parametrize("pair", PAIRS)
def test_plumbing_is_the_same(pair):
    _, first = read(pair[0])
    _, second = read(pair[1])
    assert first == second
    assert "\nclass CUDAGraph" in first and '\nif __name__ == "__main__":' in first


@pytest.mark.parametrize("pair", PAIRS)
def test_definitions_of_the_same_name_are_the_same(pair):
    first, second = (definitions(script) for script in pair)
    assert differing_names(first, second) == DIFFERENT[pair]
    assert {"EnsembleLayerNorm", "aggregate", "load", "act", "evaluate"} <= first.keys()


@pytest.mark.parametrize("name", ON_PIXELS)
def test_pixels_are_a_few_lines_more(name):
    text = definitions("qflow")[name]
    for line, lines in ON_PIXELS[name].items():
        assert text.count(line) == 1
        text = text.replace(line, lines)
    assert text == definitions("fql")[name]


@pytest.mark.parametrize("pair", PAIRS)
def test_flags_of_the_same_name_are_the_same(pair):
    first, second = (flags(script) for script in pair)
    assert differing_names(first, second) == DIFFERENT_FLAGS[pair]


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_flag_has_a_line_of_help(script):
    declared = re.findall(r"^    (\w+): ", definitions(script)["Args"], re.MULTILINE)
    assert list(flags(script)) == declared and "seed" in declared
