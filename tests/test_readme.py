"""What the README says is so: functions, commands, files; its snippet runs as it stands."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import ogbench
import pytest
import torch

import common
import flow_sac
import fql
import qflow

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
METHODS = {"Q-Flow": qflow, "FQL": fql, "SAC Flow": flow_sac}


def section(title):
    return re.split(r"^## ", README.split(f"\n## {title}\n")[1], flags=re.M)[0]


@pytest.mark.parametrize("title", METHODS)
def test_the_named_functions_exist(title):
    table = section(title).split("| equation |")[1].split("\n\n")[0]
    names = re.findall(r"`(\w+)`", table)
    assert len(names) >= 8
    for name in names:
        assert callable(getattr(METHODS[title], name)), name


def test_the_commands_parse(monkeypatch):
    commands = re.findall(r"^(?:\w+=\w+ )?python (\w+)\.py(.*?)(?:#.*)?$", README, re.M)
    assert len(commands) >= 8
    monkeypatch.chdir(ROOT)
    for script, flags in commands:
        if "--help" in flags or "runs/RUN" in flags:
            continue
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
        args = module.parse_args()
        if module is flow_sac and not common.is_dataset(args.env):
            module.make_env(args.env).close()
        else:
            common.resolve_task(args.env, args.task)


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_linked_files_exist(page):
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text())
    paths = [link for link in links if not link.startswith("https://")]
    assert len(paths) >= 3
    for path in paths:
        assert (folder / path).exists(), path


@pytest.mark.parametrize("method", ["qflow", "fql"])
def test_a_trained_policy_is_here_and_reaches_the_goal(method):
    folder = ROOT / f"results/policies/{method}-pointmaze-medium"
    assert (folder / "checkpoint.pt").stat().st_size < 2e6
    output = run([ROOT / f"{method}.py", "--evaluate", folder, "--eval-episodes", "20"], ROOT)
    assert float(re.match(r"success (\S+) ", output)[1]) >= 0.8


def test_the_snippet_that_loads_a_policy_runs_as_it_stands():
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    numbers = re.findall(r"-?\d\.\d*(?:e[+-]\d+)?", run(["-c", snippet], ROOT))
    assert len(numbers) == 10 and all(-1 <= float(x) <= 1 for x in numbers)  # five actions


def test_what_was_collected_online_can_be_written_and_trained_on(tmp_path, monkeypatch):
    name = "pointmaze-medium-navigate-v0"
    monkeypatch.setenv("HOME", str(tmp_path))
    common.collect_pointmaze(name, tmp_path / "data.npz", num_episodes=2, workers=1)
    train = [ROOT / "fql.py", *"--hidden 16 --batch-size 16 --eval-episodes 1".split()]
    steps = "--dataset data.npz --offline-steps 0 --online-steps 20".split()
    run([*train, *steps], tmp_path)
    (folder,) = (tmp_path / "runs").iterdir()
    folder.rename(tmp_path / "runs/RUN")
    command, flags = re.search(r"`python (results/export_online\.py) (.*?)`", README).groups()
    run([ROOT / command, *flags.split()], tmp_path)

    transitions = ogbench.load_dataset(tmp_path / "online.npz")
    assert transitions["next_observations"].shape == (20, 2)
    assert transitions["terminals"].tolist() == [0] * 19 + [1]
    collected = torch.load(tmp_path / "runs/RUN/checkpoint.pt", weights_only=True)["collected"]
    *_, env_id = common.resolve_task(name)
    dataset, source = common.load_dataset(tmp_path / "online.npz", env_id, "cpu")
    task = "pointmaze-medium-navigate-singletask-v0"
    assert source == f"collected online in {task}, seed 0; not the official file"
    assert len(dataset) == 20
    for column, tensor in collected.items():
        found = getattr(dataset, column)
        assert torch.allclose(found, tensor, rtol=0, atol=1.1e-5), column  # actions are clipped
    run([*train, *"--dataset online.npz --offline-steps 5".split()], tmp_path)


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


def test_training_on_arrays_of_ones_own(tmp_path):
    output = run([ROOT / "results/own_data.py"], tmp_path)
    assert re.search(r"^action \[.*\]$", output, re.M)
    assert list(tmp_path.glob("runs/Pendulum-v1__qflow__0__*/curve.png"))
