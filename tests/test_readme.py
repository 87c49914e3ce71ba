"""What the README says is so: names, settings, commands; its snippet runs as it stands."""

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
TEXT = (ROOT / "README.md").read_text()
OFFLINE = {"Q-Flow": qflow, "FQL": fql}
METHODS = {**OFFLINE, "SAC Flow": flow_sac}


def section(title):
    return re.split(r"^## ", TEXT.split(f"\n## {title}\n")[1], flags=re.M)[0]


@pytest.mark.parametrize("title", METHODS)
def test_the_named_functions_exist(title):
    table = section(title).split("| equation |")[1].split("\n\n")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) >= 8
    for name in names:
        assert callable(getattr(METHODS[title], name)), name


@pytest.mark.parametrize("title", OFFLINE)
def test_the_settings_table_is_the_scripts(title):
    module = METHODS[title]
    rows = re.findall(r"^\| (\w+-[\w-]+) \| (.*) \|$", section(title), re.M)
    table = {env: values.split(" | ") for env, values in rows}
    assert set(table) == {env for env in module.SETTINGS if env != "pointmaze"}
    for env, values in table.items():
        assert values == [str(v) for v in module.SETTINGS[env].values()]


def test_the_commands_parse(monkeypatch):
    commands = re.findall(r"^python (\w+)\.py(.*?)(?:#.*)?$", TEXT, re.M)
    assert len(commands) >= 5
    for script, flags in commands:
        if "--help" not in flags and "runs/RUN" not in flags:
            module = importlib.import_module(script)
            monkeypatch.setattr(sys, "argv", [script, *flags.split()])
            args = common.parse_args(module.Args, "", module.SETTINGS)
            if module in OFFLINE.values():
                common.resolve_task(args.env, args.task)
            else:
                module.continuous_env(args.env)


SNIPPETS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)


def run_snippet(snippet, folder):
    (folder / "mine.py").write_text(snippet)
    result = subprocess.run(
        [sys.executable, "mine.py"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_snippet_that_trains_runs_as_it_stands(tmp_path):
    out = run_snippet(SNIPPETS[1] + "\nprint('action', action.shape, abs(action) <= 1)\n", tmp_path)
    assert re.search(r"^action \[-?[01]?\.\d*\]$", out, re.M)
    assert list(tmp_path.glob("runs/Pendulum-v1__qflow__0__*/curve.png"))


def test_the_snippet_that_loads_a_run_runs_as_it_stands(tmp_path):
    assert len(SNIPPETS) == 2
    args = qflow.Args(horizon=5, hidden=(8, 8), flow_steps=2)
    run = common.Run(tmp_path, "run", dict(args=vars(args)))
    nets = qflow.Networks(2, 10, args)
    run.save(dict(nets=nets), step=1, sizes=nets.sizes)
    (tmp_path / "runs").mkdir()
    run.path.rename(tmp_path / "runs/RUN")
    assert re.fullmatch(r"success: [01]\.0\n", run_snippet(SNIPPETS[0], tmp_path))
