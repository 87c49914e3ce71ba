"""Runs that are stopped, killed, or cannot write, and go on.

What has to die is a process of its own. The rest calls main() here, which spares the imports.
"""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import imageio
import numpy as np
import pytest
import torch

import common
import flow_sac
import fql
import qflow

ROOT = Path(__file__).parent.parent
NAME = "pointmaze-medium-navigate-v0"
SMALL = "--device cpu --hidden 16 16 --batch-size 16 --eval-episodes 2 --seed 3"
OFFLINE = f"{SMALL} --offline-steps 60 --eval-interval 30 --log-interval 7 --horizon 2".split()
ONLINE = f"""{SMALL} --online-steps 400 --eval-interval 100 --log-interval 25 --learning-starts 50
    --env Hopper-v5 --policy-width 8""".split()
BOTH = [*OFFLINE, *"--eval-interval 60 --online-steps 240".split()]  # one phase after the other
BOTH_OF_FLOW_SAC = [*BOTH, *f"--env {NAME} --learning-starts 100 --policy-width 8".split()]
RUNS = {"qflow": [*OFFLINE, "--time-dim", "4"], "fql": OFFLINE, "flow_sac": ONLINE}
POLICIES = [("flow_sac", policy) for policy in ("flow-t", "flow-g", "naive")]
MODULES = {"qflow": qflow, "fql": fql, "flow_sac": flow_sac}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a small dataset in the place of the collected one."""
    home = tmp_path_factory.mktemp("home")
    path = home / ".ogbench/collected" / f"{NAME}.npz"
    path.parent.mkdir(parents=True)
    common.collect_pointmaze(NAME, path, num_episodes=2, workers=1)
    return home


@pytest.fixture(scope="module")
def call(home):
    """A function that runs a script's main with these flags, here."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HOME", str(home))

    def call(script, *flags):
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, flags)])
        try:
            MODULES[script].main()
        finally:
            torch.set_float32_matmul_precision("highest")

    yield call
    patch.undo()


@pytest.fixture(scope="module")
def whole(call, tmp_path_factory):
    """Script -> folder of a run that was never interrupted."""
    folders = {}
    for script, flags in RUNS.items():
        root = tmp_path_factory.mktemp("whole")
        call(script, *flags, "--run-dir", root)
        (folders[script],) = root.iterdir()
    return folders


def start(home, script, *flags, **options):
    """The script as a process, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)],
        cwd=home,
        env={**os.environ, "HOME": str(home), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def wait_for(process, condition):
    """Wait until condition() holds or the process has ended."""
    while not condition() and process.poll() is None:
        time.sleep(0.01)


def rows(folder, name):
    """The rows of a CSV file, as text, without columns time_*."""
    lines = [line.split(",") for line in (folder / name).read_text().splitlines()]
    kept = [i for i, column in enumerate(lines[0]) if not column.startswith("time_")]
    return [[line[i] for i in kept] for line in lines]


def read(folder):
    """What checkpoint.pt holds."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_same_nets(folder, other):
    nets = read(other)["nets"]
    found = read(folder)["nets"]
    assert found.keys() == nets.keys()
    for name, tensor in nets.items():
        assert torch.equal(found[name], tensor), name


def assert_same_run(folder, other):
    """The same rows, networks and random numbers to come, bit for bit."""
    for name in ("train.csv", "eval.csv"):
        assert rows(folder, name) == rows(other, name), name
    assert_same_nets(folder, other)
    state, expected = read(folder), read(other)
    assert state["step"] == expected["step"]
    assert torch.equal(state["generator"], expected["generator"])
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))


class Stopped(BaseException):
    """As KeyboardInterrupt is: not an Exception. Nothing in the scripts catches it."""


def stop_after_save(patch, number=1):
    """The number-th checkpoint from now on is the last thing that a run does."""
    save = common.Run.save
    calls = []

    def save_and_stop(self, **state):
        save(self, **state)
        calls.append(state["step"])
        if len(calls) == number:
            raise Stopped

    patch.setattr(common.Run, "save", save_and_stop)


# --------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize(
    "script, signals",
    [("qflow", (signal.SIGKILL, signal.SIGTERM)), ("fql", (signal.SIGINT,))],
)
def test_killed_again_and_again_it_computes_the_same(script, signals, home, whole, tmp_path):
    rng = np.random.default_rng()  # another moment each time: any must do
    process = start(home, script, *RUNS[script], "--run-dir", tmp_path)
    wait_for(process, lambda: list(tmp_path.glob("*/config.json")))
    (folder,) = tmp_path.iterdir()
    for number in signals:
        moment = rng.uniform(0, 1.5)
        time.sleep(moment)
        # a terminal's Ctrl-C and a cluster's SIGTERM reach the environments' processes too
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=100)
        has_checkpoint = (folder / "checkpoint.pt").exists()
        print(f"signal {number} after {moment} s, checkpoint: {has_checkpoint}")
        if number != signal.SIGKILL and "mean of the last" not in out:
            assert process.returncode == 130 and err.endswith("interrupted\n"), err
            assert "Traceback" not in err, err
            assert f"--resume {folder} " not in err or has_checkpoint
        written = (folder / "config.json").stat().st_mtime_ns
        process = start(home, script, "--resume", folder)
        wait_for(process, lambda t=written: (folder / "config.json").stat().st_mtime_ns != t)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert_same_run(folder, whole[script])


def test_a_killed_run_from_scratch_goes_on_with_what_it_collected(home, call, tmp_path):
    process = start(home, "flow_sac", *RUNS["flow_sac"], "--run-dir", tmp_path)
    wait_for(process, lambda: list(tmp_path.glob("*/checkpoint.pt")))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=100)
    (folder,) = tmp_path.iterdir()
    before = read(folder)
    step = before["step"]
    assert step in (100, 200, 300) and before["collected"]["valids"].sum() == step
    kept = {name: rows(folder, name) for name in ("train.csv", "eval.csv")}
    call("flow_sac", "--resume", folder)
    after = read(folder)
    assert after["step"] == 400 and after["collected"]["valids"].sum() == 400
    for name, tensor in before["collected"].items():
        assert torch.equal(after["collected"][name][: len(tensor)], tensor), name
    for name, interval in (("train.csv", 25), ("eval.csv", 100)):
        found = rows(folder, name)
        logged = [row for row in kept[name][1:] if int(row[0]) <= step]
        assert logged and found[1 : 1 + len(logged)] == logged
        first = {25: 75, 100: 100}[interval]  # learning starts after 50
        assert [int(row[0]) for row in found[1:]] == list(range(first, 401, interval))
    assert not torch.equal(after["generator"], before["generator"])


@pytest.mark.parametrize("script", ["qflow", "fql", "flow_sac"])
def test_killed_in_the_online_phase_it_keeps_what_it_collected(script, home, call, tmp_path):
    flags = BOTH_OF_FLOW_SAC if script == "flow_sac" else BOTH
    process = start(home, script, *flags, "--run-dir", tmp_path)

    def is_online():
        return any(len(rows(path.parent, "eval.csv")) > 3 for path in tmp_path.glob("*/eval.csv"))

    wait_for(process, is_online)  # after step 180
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=100)
    (folder,) = tmp_path.iterdir()
    before = read(folder)
    step = before["step"]
    assert step in (120, 180, 240)
    kept = before["collected"]
    assert kept["valids"].tolist() == [1] * (step - 60) + [0]  # one episode so far
    logged = {name: rows(folder, name) for name in ("train.csv", "eval.csv")}

    with pytest.raises(common.UserError, match="--offline-steps 61: .* was trained with 60"):
        call(script, "--resume", folder, "--offline-steps", 61)
    call(script, "--resume", folder)
    after = read(folder)
    assert after["step"] == 300
    valids = [1] * (step - 60) + [0] + [1] * (300 - step) + [0]  # then another one
    assert after["collected"]["valids"].tolist() == valids
    for name, tensor in kept.items():
        assert torch.equal(after["collected"][name][: len(tensor)], tensor), name
    for name, interval in (("train.csv", 7), ("eval.csv", 60)):
        expected = [row for row in logged[name] if not row[0].isdigit() or int(row[0]) <= step]
        found = rows(folder, name)
        assert found[: len(expected)] == expected
        steps = {*range(interval, 301, interval), *range(60, 301, 60)}
        if script == "flow_sac" and name == "train.csv":
            steps -= {*range(61, 161)}  # it only collects
        assert [int(row[0]) for row in found[1:]] == sorted(steps)
    call(script, "--resume", folder, "--online-steps", 100)  # fewer than there are: nothing to do
    assert after["step"] == read(folder)["step"]


@pytest.mark.parametrize("script, policy", [("qflow", ""), ("fql", ""), *POLICIES])
def test_going_online_later_is_going_online_at_once(script, policy, call, tmp_path):
    flags = BOTH
    if script == "flow_sac":
        flags = [*BOTH_OF_FLOW_SAC, "--learning-starts", 10, "--policy", policy]
    at_once, later = tmp_path / "at_once", tmp_path / "later"
    call(script, *flags, "--online-steps", 40, "--run-dir", at_once)
    call(script, *flags, "--online-steps", 0, "--run-dir", later)
    (at_once,), (later,) = at_once.iterdir(), later.iterdir()
    done = read(later)["step"]
    with pytest.raises(common.UserError, match=f"--offline-steps 1: {done} are done already"):
        call(script, "--resume", later, "--offline-steps", 1, "--online-steps", 40)
    call(script, "--resume", later, "--online-steps", 40)
    assert_same_run(later, at_once)
    collected, expected = read(later)["collected"], read(at_once)["collected"]
    assert len(collected["valids"]) == 41
    assert all(torch.equal(collected[name], expected[name]) for name in expected)


def test_steps_that_were_added_count_although_the_run_is_stopped_at_once(call, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole["qflow"], folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(qflow.Collector, "step", Mock(side_effect=Stopped))
        call("qflow", "--resume", folder, "--online-steps", 7)
    assert read(folder)["step"] == 60
    call("qflow", "--resume", folder)
    assert read(folder)["step"] == 67


@pytest.mark.parametrize("script", ["fql", "flow_sac"])
def test_stopped_before_its_first_checkpoint_it_begins_anew(script, call, whole, tmp_path):
    def stop(self, **state):
        raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(common.Run, "save", stop)
        call(script, *RUNS[script], "--run-dir", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "checkpoint.pt").exists() and len(rows(folder, "eval.csv")) == 2
    call(script, "--resume", folder)
    assert_same_run(folder, whole[script])


# ---------------------------------------------------------------------------- when it is saved


def test_a_checkpoint_every_five_minutes_whatever_the_interval(call, whole, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        minutes = iter(range(1000))
        clock = SimpleNamespace(perf_counter=lambda: 60 * next(minutes))  # one at each look
        patch.setattr(common, "time", clock)
        stop_after_save(patch)
        call("qflow", *RUNS["qflow"], "--run-dir", tmp_path)
    (folder,) = tmp_path.iterdir()
    step = read(folder)["step"]
    assert step == 6 and not (folder / "eval.csv").exists()
    assert f"--resume {folder} " in capsys.readouterr().err
    call("qflow", "--resume", folder, "--offline-steps", step)
    out = capsys.readouterr().out
    assert "mean of the last 0 evaluations" in out and "nan" not in out
    call("qflow", "--resume", folder, "--offline-steps", 60)
    assert_same_run(folder, whole["qflow"])


def test_an_online_checkpoint_comes_in_the_middle_of_an_episode(call, tmp_path):
    flags = """--env HalfCheetah-v5 --online-steps 60 --learning-starts 10 --eval-interval 60
        --policy-width 8""".split()  # its episodes have 1000 steps
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        minutes = iter(range(1000))
        patch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: 60 * next(minutes)))
        stop_after_save(patch, number=3)
        call("flow_sac", *SMALL.split(), *flags, "--run-dir", tmp_path)
    (folder,) = tmp_path.iterdir()
    state = read(folder)
    assert 15 <= state["step"] <= 21 and not (folder / "eval.csv").exists()
    assert state["collected"]["valids"].sum() == state["step"]
    call("flow_sac", "--resume", folder, "--online-steps", 30)
    assert read(folder)["step"] == 30 and rows(folder, "eval.csv")[1][0] == "30"


def test_evaluating_and_saving_do_not_change_an_online_training(call, whole, tmp_path):
    call("flow_sac", *RUNS["flow_sac"], "--eval-interval", 400, "--run-dir", tmp_path)
    (folder,) = tmp_path.iterdir()
    assert len(rows(whole["flow_sac"], "eval.csv")) == 5 and len(rows(folder, "eval.csv")) == 2
    assert rows(folder, "train.csv") == rows(whole["flow_sac"], "train.csv")
    assert_same_nets(folder, whole["flow_sac"])
    assert torch.equal(read(folder)["generator"], read(whole["flow_sac"])["generator"])


# ------------------------------------------------------------------------- what may be changed


@pytest.mark.parametrize("script", ["qflow", "flow_sac"])
def test_steps_may_be_added_and_intervals_changed(script, call, whole, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(whole[script], folder)
    steps = "online_steps" if script == "flow_sac" else "offline_steps"
    flag = "--" + steps.replace("_", "-")
    end = 500 if script == "flow_sac" else 80
    call(script, "--resume", folder, flag, end, "--eval-interval", end, "--log-interval", 5)
    assert f"{steps}={end}" in capsys.readouterr().out
    assert rows(folder, "eval.csv")[:-1] == rows(whole[script], "eval.csv")
    assert rows(folder, "eval.csv")[-1][0] == str(end)
    saved = json.loads((folder / "config.json").read_text())["args"]
    assert saved[steps] == end and saved["eval_interval"] == end
    before = rows(folder, "eval.csv")
    call(script, "--resume", folder, flag, end // 2)
    assert "mean of the last 3 evaluations" in capsys.readouterr().out
    assert rows(folder, "eval.csv") == before


def test_a_dataset_may_move_and_must_be_the_same(home, call, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole["fql"], folder)
    moved = tmp_path / "moved.npz"
    shutil.copy(home / ".ogbench/collected" / f"{NAME}.npz", moved)
    call("fql", "--resume", folder, "--dataset", moved, "--offline-steps", 61)
    assert read(folder)["step"] == 61
    moved.rename(tmp_path / "again.npz")
    call("fql", "--resume", folder, "--dataset", tmp_path / "again.npz", "--offline-steps", 62)
    assert read(folder)["step"] == 62

    other = tmp_path / "other.npz"
    common.collect_pointmaze(NAME, other, num_episodes=1, workers=1)
    with pytest.raises(common.UserError, match="dataset was 2000 .* is 1000 ") as error:
        call("fql", "--resume", folder, "--dataset", other, "--offline-steps", 63)
    assert f"--resume {folder}" in str(error.value) and "\n" not in str(error.value)
    assert read(folder)["step"] == 62 and len(rows(folder, "eval.csv")) == 5


def test_a_dataset_that_does_not_say_where_it_is_from_may_move_too(
    home, call, tmp_path, monkeypatch
):
    with np.load(home / ".ogbench/collected" / f"{NAME}.npz") as file:
        arrays = {name: file[name] for name in file if name != "source"}
    official = tmp_path / ".ogbench/data" / f"{NAME}.npz"
    official.parent.mkdir(parents=True)
    np.savez(official, **arrays)
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = f"{SMALL} --eval-interval 20 --offline-steps 2".split()
    call("fql", *flags, "--dataset-url", "http://localhost:1", "--run-dir", tmp_path / "runs")
    (folder,) = (tmp_path / "runs").iterdir()
    moved = official.rename(tmp_path / "moved.npz")
    call("fql", "--resume", folder, "--dataset", moved, "--offline-steps", 3)
    assert read(folder)["step"] == 3


# ----------------------------------------------------------------------------------- trouble


def test_a_full_disk_leaves_the_last_checkpoint(home, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole["fql"], folder)
    before = (folder / "checkpoint.pt").read_bytes()

    def limit():  # no file can grow beyond half of the checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)

    process = start(home, "fql", "--resume", folder, "--offline-steps", 61, preexec_fn=limit)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "Traceback" not in err
    assert "File too large" in err.splitlines()[-1]
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_row_that_does_not_fit_on_the_disk_is_an_error_not_a_gap(tmp_path, capsys):
    run = common.Run(tmp_path / "run", dict(script="fql.py"))
    run.restore()
    run.show_progress(0, 1, "updates")
    run.save(step=0, nets=torch.nn.Linear(1, 1).state_dict())
    (run.folder / "train.csv").symlink_to("/dev/full")
    with pytest.raises(common.UserError, match=f"{run.folder}: .*No space left"), run:
        run.log("train.csv", dict(step=1, critic_loss=0.5))
    assert f"--resume {run.folder} " in capsys.readouterr().err


def test_nan_stops_within_a_log_interval_and_keeps_the_last_good_checkpoint(call, whole, tmp_path):
    with pytest.raises(common.UserError, match="^step 7: .*_loss is "):
        call("fql", *OFFLINE, "--lr", "1e9", "--run-dir", tmp_path)  # at first it is finite
    (folder,) = tmp_path.iterdir()
    assert not (folder / "checkpoint.pt").exists() and not (folder / "eval.csv").exists()


def test_two_processes_never_write_one_run(call, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole["fql"], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = json.loads((folder / "config.json").read_text())
    with common.Run(folder, config, resume=True):
        with pytest.raises(common.UserError, match=f"{folder}: another process writes there"):
            call("fql", "--resume", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("script, name", [("qflow", "Value"), ("flow_sac", "BatchRenorm")])
def test_a_mistake_in_a_network_is_not_a_damaged_run(script, name, call, whole, monkeypatch):
    def mistaken(self, *sizes, **options):
        return undefined_name  # noqa: F821

    monkeypatch.setattr(getattr(MODULES[script], name), "__init__", mistaken)
    for flag in ("--evaluate", "--resume"):
        with pytest.raises(NameError, match="undefined_name"):
            call(script, flag, whole[script])
    with pytest.raises(NameError, match="undefined_name"):
        MODULES[script].load(whole[script])


# ------------------------------------------------------------------------------- --evaluate


def test_evaluate_prints_intervals(call, whole, capsys):
    call("qflow", "--evaluate", whole["qflow"], "--eval-episodes", 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("success 0 (95 %: 0 to 0.56")  # Wilson's for 0 of 3
    assert lines[1:] == ["return -1000 (95 %: -1000 to -1000)", "length 1000 (95 %: 1000 to 1000)"]


def test_the_interval_of_one_episode_is_infinite(capsys):
    nan = np.array([math.nan])
    qflow.report({"success": nan, "return": np.array([-3.0]), "length": np.array([5.0])})
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["return -3 (95 %: -inf to inf)", "length 5 (95 %: -inf to inf)"]


def test_without_a_way_to_render_the_figures_come_all_the_same(home, whole, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    monkeypatch.delenv("DISPLAY", raising=False)
    process = start(home, "fql", "--evaluate", whole["fql"], "--eval-episodes", 1, "--video")
    out, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "length 1000 (95 %" in out
    assert "fql.py: error: --video: cannot render" in err and "MUJOCO_GL" in err
    assert "Traceback" not in err and not list(whole["fql"].glob("*.gif"))


FILM = f"""
import sys
from pathlib import Path
import gymnasium
import common
import qflow

nets, args = qflow.load(sys.argv[1])
_, _, env_id = common.resolve_task("{NAME}")
env = gymnasium.make(env_id, max_episode_steps=16, render_mode="rgb_array")
with qflow.SeededReset(env) as env:
    qflow.film(lambda obs: qflow.act(nets, obs, args), env, 0, Path(sys.argv[2]))
"""


def test_film_is_a_picture_of_every_eighth_step(whole, tmp_path):
    path = tmp_path / "evaluation.gif"
    environment = {**os.environ, "MUJOCO_GL": "egl", "PYTHONPATH": str(ROOT)}  # read at import
    command = [sys.executable, "-c", FILM, whole["qflow"], path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    if result.returncode and re.search("EGL|OpenGL|libGL", result.stderr):
        pytest.skip(f"nothing can be rendered here: {result.stderr.splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    pictures = imageio.mimread(path)
    assert len(pictures) == 6 and np.std(pictures[0]) > 10  # three episodes
    assert str(path) in result.stdout


@pytest.mark.parametrize("script", RUNS)
def test_loaded_networks_act_as_the_trained_ones(script, whole):
    module = MODULES[script]
    nets, args = module.load(whole[script])
    sizes, shape = ((11, 3), (5, 1, 3)) if script == "flow_sac" else ((2, 4), (5, 2, 2))
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
