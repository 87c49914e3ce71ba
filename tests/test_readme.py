"""What the README says is so: functions, commands, files; its snippet runs as it stands."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import common
import flow_sac
import fql
import qflow

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NAMES = {
    qflow: "targets rollout critic_loss value_loss guidance policy_loss",
    fql: "rollout critic_loss flow_loss policy_loss",
    flow_sac: "rollout FlowT FlowG Naive policy_loss",
}


def section(title):
    return re.split(r"^## ", README.split(f"\n## {title}\n")[1], flags=re.M)[0]


@pytest.mark.parametrize("title, script", [("Q-Flow", qflow), ("FQL", fql), ("SAC Flow", flow_sac)])
def test_the_losses_have_the_names_of_the_functions(title, script):
    snippet = section(title).split("```python\n")[1].split("```")[0]
    for name in NAMES[script].split():
        assert re.search(rf"\b{name}\b", snippet) and callable(getattr(script, name)), name


def test_the_commands_parse(monkeypatch):
    commands = re.findall(r"^(?:\w+=\w+ )?python (\w+)\.py(.*?)(?:#.*)?$", README, re.M)
    assert len(commands) >= 8
    monkeypatch.chdir(ROOT)
    for script, flags in commands:
        if "--help" in flags or " runs/" in flags:
            continue
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
        args = module.parse_args()
        if common.is_dataset(args.env):  # each of these takes a second to make
            common.resolve_task(args.env, args.task)
        else:
            module.make_env(args).close()


@pytest.mark.slow
def test_the_snippet_that_loads_a_policy_runs_as_it_stands():
    snippet = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)[-1]
    numbers = re.findall(r"-?\d\.\d*(?:e[+-]\d+)?", run(["-c", snippet], ROOT))
    assert len(numbers) == 10 and all(-1 <= float(x) <= 1 for x in numbers)  # five actions


def run(words, folder):
    result = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
