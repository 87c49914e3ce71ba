"""Runs that are stopped, killed, or cannot write, and go on: real processes."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import imageio
import numpy as np
import pytest
import torch

import common
import flow_sac
import fql
import qflow

ROOT = Path(__file__).parent.parent
SMALL = "--hidden 16 16 --batch-size 16 --log-interval 7 --eval-episodes 3 --seed 3"
OFFLINE = f"--offline-steps 120 --eval-interval 30 --horizon 2 {SMALL}".split()
ONLINE = f"--online-steps 900 --eval-interval 150 --learning-starts 150 {SMALL}".split()
RUNS = {
    "qflow.py": [*OFFLINE, "--time-dim", "4"],
    "fql.py": OFFLINE,
    "flow_sac.py": [*ONLINE, *"--env Hopper-v5 --num-envs 2 --policy-width 8".split()],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a small dataset in the place of the collected one."""
    home = tmp_path_factory.mktemp("home")
    name = "pointmaze-medium-navigate-v0"
    path = home / ".ogbench/collected" / f"{name}.npz"
    path.parent.mkdir(parents=True)
    common.collect_pointmaze(name, path, episodes=2, workers=1)
    return home


def start(home, script, *flags, **options):
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=home,
        env={**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def finish(process):
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out


def rows(folder, name):
    """The rows of a CSV file, as text, without columns time_*."""
    lines = [line.split(",") for line in (folder / name).read_text().splitlines()]
    kept = [i for i, column in enumerate(lines[0]) if not column.startswith("time_")]
    return [[line[i] for i in kept] for line in lines]


def last_row_at(folder):
    """When the last row of train.csv was written; None while a run that goes on begins it anew."""
    with suppress(FileNotFoundError):
        return (folder / "train.csv").stat().st_mtime_ns


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """Script -> folder of a run that was never interrupted."""
    folders = {}
    for script, flags in RUNS.items():
        root = tmp_path_factory.mktemp("whole")
        finish(start(home, script, *flags, "--run-dir", root))
        (folders[script],) = root.iterdir()
    return folders


@pytest.mark.parametrize(
    "script, signals",
    [
        ("qflow.py", (signal.SIGKILL, signal.SIGTERM)),
        ("fql.py", (signal.SIGINT, signal.SIGKILL)),
        ("flow_sac.py", (signal.SIGKILL, signal.SIGINT, signal.SIGKILL)),
    ],
)
def test_killed_again_and_again_it_computes_the_same(script, signals, home, whole, tmp_path):
    rng = np.random.default_rng()  # another moment each time: any must do
    process = start(home, script, *RUNS[script], "--run-dir", tmp_path)
    while not list(tmp_path.glob("*/checkpoint.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    (folder,) = tmp_path.iterdir()
    moments = []
    for number in signals:
        time.sleep(rng.uniform(0, 0.7))
        # a terminal's Ctrl-C and a cluster's SIGTERM reach the environments' processes too
        (os.kill if number == signal.SIGKILL else os.killpg)(process.pid, number)
        out, err = process.communicate(timeout=100)
        if number != signal.SIGKILL and "mean of the last" not in out:
            assert process.returncode == 130 and err.endswith("\ninterrupted\n"), err
            assert f"--resume {folder}" in err and "Traceback" not in err, err
        moments.append(torch.load(folder / "checkpoint.pt", weights_only=True)["step"])
        before = last_row_at(folder)
        process = start(home, script, "--resume", folder)
        while last_row_at(folder) in (None, before) and process.poll() is None:
            time.sleep(0.01)
    finish(process)
    for name in ("train.csv", "eval.csv"):
        assert rows(folder, name) == rows(whole[script], name), (name, moments)
    state, expected = (
        torch.load(f / "checkpoint.pt", weights_only=True) for f in (folder, whole[script])
    )
    assert state["step"] == expected["step"]
    assert torch.equal(state["generator"], expected["generator"])
    for name, value in expected["nets"].items():
        assert torch.equal(state["nets"][name], value), name
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))


def test_a_checkpoint_every_five_minutes_whatever_the_interval(home, whole, tmp_path):
    hasty = """if True:
        import itertools, os, sys, time
        time.perf_counter = itertools.count(0, 23).__next__
        import common, qflow
        save = common.Run.save
        common.Run.save = lambda *args, **values: (save(*args, **values), os._exit(9))
        sys.argv[0] = "qflow.py"
        common.cli(qflow.main)
    """
    words = sys.executable, "-c", hasty, *RUNS["qflow.py"], "--run-dir", str(tmp_path)
    path = {"HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(words, env={**os.environ, **path}, capture_output=True, timeout=100)
    assert process.returncode == 9, process.stderr
    (folder,) = tmp_path.iterdir()
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
    assert 7 < step < 300 / 23 and not (folder / "eval.csv").exists()
    out = finish(start(home, "qflow.py", "--resume", folder, "--offline-steps", step))
    assert "mean of the last 0 evaluations" in out and "nan" not in out
    finish(start(home, "qflow.py", "--resume", folder, "--offline-steps", 120))
    for name in ("train.csv", "eval.csv"):
        assert rows(folder, name) == rows(whole["qflow.py"], name), name


@pytest.mark.parametrize("script", RUNS)
def test_steps_may_be_added_and_intervals_changed(script, home, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole[script], folder)
    steps = "online-steps" if script == "flow_sac.py" else "offline-steps"
    end = 1100 if script == "flow_sac.py" else 150
    flags = f"--{steps} {end} --eval-interval {end} --log-interval 5".split()
    out = finish(start(home, script, "--resume", folder, *flags))
    assert f"{steps.replace('-', '_')}={end}" in out
    assert rows(folder, "eval.csv")[:-1] == rows(whole[script], "eval.csv")
    assert rows(folder, "eval.csv")[-1][0] == str(end)
    saved = common.json.loads((folder / "config.json").read_text())["args"]
    assert saved[steps.replace("-", "_")] == end and saved["eval_interval"] == end
    before = rows(folder, "eval.csv")
    out = finish(start(home, script, "--resume", folder, f"--{steps}", end // 2))
    assert "mean of the last 3 evaluations" in out and rows(folder, "eval.csv") == before


def test_a_full_disk_leaves_the_last_checkpoint(home, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole["fql.py"], folder)
    before = (folder / "checkpoint.pt").read_bytes()

    def limit():  # no file can grow beyond half of the checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)

    process = start(home, "fql.py", "--resume", folder, "--offline-steps", "130", preexec_fn=limit)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "Traceback" not in err
    hint, error = err.splitlines()[-2:]
    assert "File too large" in error and f"--resume {folder} " in hint
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_row_that_does_not_fit_on_the_disk_is_an_error_not_a_gap(tmp_path, capsys):
    run = common.Run(tmp_path, "x", {})
    run.progress(1, 0, "updates")
    run.save(dict(nets=torch.nn.Linear(1, 1)), step=0)
    (run.path / "train.csv").symlink_to("/dev/full")
    with pytest.raises(common.UserError, match=f"{run.path}: .*No space left"), run:
        run.log("train.csv", step=1, critic_loss=0.5)
    assert f"--resume {run.path} " in capsys.readouterr().err


def test_nan_stops_within_a_log_interval_and_keeps_the_last_good_checkpoint(home, tmp_path):
    flags = *OFFLINE, "--lr", "1e9", "--run-dir", tmp_path  # finite at first, for an update or two
    _, err = (process := start(home, "fql.py", *flags)).communicate(timeout=100)
    assert process.returncode == 2 and "Traceback" not in err
    assert "fql.py: error: step 7: " in err and "_loss is " in err
    (folder,) = tmp_path.iterdir()
    assert not (folder / "checkpoint.pt").exists() and not (folder / "eval.csv").exists()


def test_two_processes_never_write_one_run(home, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole["fql.py"], folder)
    with common.Run(tmp_path, "", common.json.loads((folder / "config.json").read_text()), folder):
        _, err = (process := start(home, "fql.py", "--resume", folder)).communicate(timeout=100)
    assert process.returncode == 2 and f"{folder}: another process writes there" in err
    assert "Traceback" not in err


def test_evaluate_prints_intervals(home, whole):
    flags = "--evaluate", whole["qflow.py"], "--eval-episodes", "3"
    lines = finish(start(home, "qflow.py", *flags)).splitlines()
    assert lines[0].startswith("success 0 (95 %: 0 to 0.56")  # Wilson's for 0 of 3
    assert lines[1:] == ["return -1000 (95 %: -1000 to -1000)", "length 1000 (95 %: 1000 to 1000)"]


def test_without_a_way_to_render_the_figures_come_all_the_same(home, whole, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.delenv("DISPLAY", raising=False)
    flags = "--evaluate", whole["fql.py"], "--eval-episodes", "2", "--video"
    out, err = (process := start(home, "fql.py", *flags)).communicate(timeout=100)
    assert process.returncode == 0 and "length 1000 (95 %: 1000 to 1000)" in out
    assert "--video: cannot render, needs EGL or OSMesa" in err and "Traceback" not in err
    assert not list(whole["fql.py"].glob("*.gif"))


def test_film_is_a_picture_of_every_eighth_step_or_a_line_that_says_why_not(
    home, whole, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    *_, env_id = common.resolve_task("pointmaze-medium-navigate-v0")
    make = lambda **options: common.gymnasium.make(env_id, max_episode_steps=16, **options)
    nets, args = qflow.load(whole["qflow.py"])
    args.evaluate, args.video, args.eval_episodes = tmp_path, True, 4
    policy = lambda obs: qflow.act(nets, obs, args)
    common.report(qflow.evaluate, policy, make, args)
    out, err = capsys.readouterr()
    assert "length 16 (95 %: 16 to 16)" in out
    film = tmp_path / "evaluation.gif"
    if film.exists():
        pictures = imageio.mimread(film)
        assert len(pictures) == 6 and np.std(pictures[0]) > 10  # three episodes
        assert str(film) in out
    else:
        assert "--video: cannot render, needs EGL or OSMesa" in err
    broken = lambda render_mode=None: make() if render_mode is None else 1 / 0
    common.report(qflow.evaluate, policy, broken, args)  # says so and goes on
    assert "cannot render" in capsys.readouterr().err


@pytest.mark.parametrize("module", [qflow, fql, flow_sac])
def test_loaded_networks_act_as_the_trained_ones(module, whole):
    nets, args = module.load(whole[f"{module.__name__}.py"])
    sizes, shape = ((11, 3), (5, 1, 3)) if module is flow_sac else ((2, 4), (5, 2, 2))
    assert args.seed == 3 and args.hidden == (16, 16) and nets.sizes == sizes
    obs = np.random.default_rng(0).normal(size=(5, sizes[0]))
    x0 = torch.randn(5, sizes[1], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module.sample_actions(nets, torch.tensor(obs).float(), x0, args).view(shape)
    first, again, other = (
        module.act(nets, obs, args, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert np.array_equal(first, expected) and np.abs(first).max() <= 1
    assert np.array_equal(first, again) and not np.array_equal(first, other)
