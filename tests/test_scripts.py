"""The scripts as a user starts them: real processes, in an empty home."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent


def start(home, *words):
    """Run `python WORDS` outside of the repository, as somebody without any data."""
    script, *flags = words
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=home,
        env={**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--env", "antmaze-gaint-navigate-v0"], "closest: antmaze-giant-navigate-"),
        (["--dataset", "nowhere.npz"], "nowhere.npz: not a usable dataset: [Errno 2] No such file"),
        (["--learning-rate", "3"], "--learning-rate"),
        (["--device", "cuda:99" if torch.cuda.is_available() else "cuda"], "--device cuda"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, flags, words):
    result = start(tmp_path, "qflow.py", *flags)
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("qflow.py: error: "), result.stderr
    assert words in lines[0]
    assert not list(tmp_path.iterdir())  # nothing was made before the mistake was found


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--env", "HalfCheeta-v5"], "Did you mean: `HalfCheetah`"),
        (["--env", "CartPole-v1"], "requires a Box action space"),
        (["--online-steps", "500"], "--learning-starts 1000"),
    ],
)
def test_mistakes_of_online_runs_too(tmp_path, flags, words):
    result = start(tmp_path, "flow_sac.py", *flags)
    assert result.returncode == 2 and result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("flow_sac.py: error: "), result.stderr
    assert words in lines[0]
    assert not list(tmp_path.iterdir())


def test_help_is_the_manual(tmp_path):
    result = start(tmp_path, "qflow.py", "--help")
    assert result.returncode == 0 and result.stderr == ""
    flags = set(re.findall(r"^\W*(--[a-z-]+)", result.stdout, re.M))
    shared = (
        "env task dataset seed device offline-steps batch-size lr discount tau hidden flow-steps "
        "q-agg horizon eval-interval eval-episodes log-interval run-dir compile matmul-precision "
        "dataset-url resume evaluate video"
    )
    assert flags == {f"--{name}" for name in [*shared.split(), "lam", "time-dim"]}
    assert re.search(r"antmaze-giant-navigate .*--q-agg min --discount 0\.995", result.stdout)
    fql = start(tmp_path, "fql.py", "--help").stdout
    own = set(re.findall(r"^\W*(--[a-z-]+)", fql, re.M)) - flags
    assert own == {"--alpha", "--normalize-q-loss"}
    online = start(tmp_path, "flow_sac.py", "--help").stdout
    words = " ".join(online.replace("│", "").split())
    assert re.search(r"--policy {flow-t,flow-g,naive} velocity .*\(default: flow-t\)", words)
    assert re.search(r"Pendulum .*--online-steps", online)
    other = start(tmp_path, "qflow.py", "--env", "puzzle-3x3-play-v0", "--help").stdout
    assert re.search(r"--lam FLOAT.*\(default: 20\.0\)", " ".join(other.split()))


def test_the_default_runs_and_leaves_its_results(tmp_path):
    flags = "--offline-steps 60 --eval-interval 30 --log-interval 20 --eval-episodes 4".split()
    result = start(tmp_path, "qflow.py", *flags, "--seed", "3")
    assert result.returncode == 0, result.stderr
    kept = tmp_path / ".ogbench/collected/pointmaze-medium-navigate-v0.npz"
    assert kept.exists() and not (tmp_path / ".ogbench/data").exists()
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("pointmaze-medium-navigate-singletask-v0__qflow__3__")
    assert "mean of the last 2 evaluations: success" in result.stdout
    assert "~/.ogbench/collected" in result.stdout and "not official" in result.stdout
    assert "60/60" in result.stderr and "Traceback" not in result.stderr

    config = json.loads((folder / "config.json").read_text())
    assert (
        config["device"] in ("cpu", "cuda")
        and config["args"]["seed"] == 3
        and config["args"]["offline_steps"] == 60
    )
    assert "not official" in config["dataset"]
    with open(folder / "train.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["20", "30", "40", "60"]  # also where it evaluates
    losses = "critic_loss", "value_loss", "policy_loss"
    columns = "step critic_loss q_mean q_min q_max value_loss policy_loss time_updates_per_s"
    assert list(rows[0]) == columns.split()
    assert all(0 < float(row[name]) < 1e6 for row in rows for name in losses)
    assert (
        (folder / "eval.csv").read_text().startswith("step,episodes,success,return,length\n30,4,")
    )
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 60
    assert (folder / "curve.png").stat().st_size > 10_000

    result = start(tmp_path, "fql.py", *flags)  # on the data that are there now
    assert result.returncode == 0, result.stderr
    assert "collecting" not in result.stderr and "60/60" in result.stderr
    (folder,) = (tmp_path / "runs").glob("*__fql__0__*")
    header = "step,critic_loss,q_mean,q_min,q_max,flow_loss,distill_loss,q_loss,time_updates_per_s"
    assert (folder / "train.csv").read_text().startswith(f"{header}\n20,")
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 60


def test_antmaze_on_data_collected_with_an_expert(tmp_path):
    name = "antmaze-large-navigate-v0"
    result = start(tmp_path, "results/collect_antmaze.py", name, "--transitions", "1")
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.iterdir()
    with np.load(path) as data:
        paths = data["observations"][:, :2].reshape(10, 1001, 2)
    walked = np.abs(np.diff(paths[:, ::50], axis=1)).sum((1, 2))  # a cell of the maze is 4 wide
    assert np.median(walked) > 40, walked

    flags = "--hidden 8 8 --offline-steps 4 --eval-episodes 1".split()
    result = start(tmp_path, "qflow.py", "--env", name, "--dataset", path.name, *flags)
    assert result.returncode == 0, result.stderr
    assert "10000 transitions, 10 episodes" in result.stdout
    assert "10 episodes, seed 0; not the official file" in result.stdout


def test_sac_flow_runs_online(tmp_path):
    flags = "--online-steps 400 --learning-starts 300 --log-interval 50 --eval-interval 200".split()
    result = start(tmp_path, "flow_sac.py", *flags, "--eval-episodes", "3")
    assert result.returncode == 0, result.stderr
    assert "mean of the last 2 evaluations: return -" in result.stdout
    assert "400/400" in result.stderr and "Traceback" not in result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("Pendulum-v1__flow_sac__0__")
    with open(folder / "train.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["350", "400"]
    columns = "policy_grad_norm grad_x0 grad_x1 grad_x2 grad_x3 grad_x4 temperature entropy"
    assert set(columns.split()) < set(rows[0])
    evaluations = (folder / "eval.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in evaluations] == ["step", "200", "400"]
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 400


def test_bench_prints_one_line_of_json(tmp_path):
    flags = "--method qflow --hidden 32 --batch-size 64 --flow-steps 4 --seconds 0.2".split()
    result = start(tmp_path, "tests/bench_update.py", *flags)
    assert result.returncode == 0, result.stderr
    line = json.loads(result.stdout)
    assert line["updates_per_s"] > 0 and line["ms_p10"] <= line["ms_median"] <= line["ms_p90"]
    assert line["floor_ratio"] == pytest.approx(line["ms_median"] / line["floor_ms"], rel=1e-2)
    assert line["peak_memory_mb"] > 50

    # multiply-adds per row of one pass through each network, times the passes of an update
    velocity, critic, value = (
        sum(a * b for a, b in zip([n, 32, 32, 32, 32], [32, 32, 32, 32, out]))
        for n, out in ((29 + 8 + 1, 8), (29 + 8, 1), (29 + 8 + 64, 1))
    )
    forward = 64 * 2e-9
    rollouts = 2 * 4 * velocity
    targets = 2 * 2 * critic
    # backward: once more for the weights, and for the inputs of all layers but the first
    learn = lambda net, first: 3 * net - first
    trained = learn(velocity, 38 * 32) + 2 * learn(critic, 37 * 32) + 2 * learn(value, 101 * 32)
    guidance = 2 * 2 * value
    expected = forward * (rollouts + targets + trained + guidance)
    assert line["gflop"] == pytest.approx(expected, rel=0.01)
