"""Runs that are stopped, killed, or cannot write, and their resumption.

What has to die is a process of its own. The rest calls main() here, with short episodes.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock

import common
import flow_sac
import fql
import qflow

ROOT = Path(__file__).parent.parent
NAME = "pointmaze-medium-navigate-v0"
MODULES = {"qflow": qflow, "fql": fql, "flow_sac": flow_sac}
EPISODE = 20  # steps

OFFLINE = f"""--env {NAME} --device cpu --hidden 16 16 --batch-size 16 --eval-episodes 2 --seed 3
    --offline-steps 40 --eval-interval 20 --log-interval 7 --horizon 2""".split()
FLAGS = {
    "qflow": [*OFFLINE, "--time-dim", "4"],
    "fql": OFFLINE,
    "flow_sac": [
        *OFFLINE,
        *"--policy flow-g --online-steps 0 --learning-starts 0 --policy-width 8".split(),
    ],
}
ONLINE = "--offline-steps 10 --online-steps 60 --eval-interval 1000 --log-interval 15".split()
FROM_SCRATCH = """--env HalfCheetah-v5 --device cpu --hidden 16 16 --policy-width 8 --batch-size 16
    --eval-episodes 1 --learning-starts 20 --online-steps 60 --log-interval 10""".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a small dataset in the place of the collected one."""
    folder = tmp_path_factory.mktemp("data")
    path = folder / "collected" / f"{NAME}.npz"
    path.parent.mkdir()
    common.collect_pointmaze(NAME, path, num_episodes=2, workers=1)
    return folder


@pytest.fixture(scope="module")
def call(data):
    """A function that runs a script's main with these flags, here, without drawing curves."""
    patch = pytest.MonkeyPatch()
    patch.setenv("OGBENCH_DATA", str(data))
    patch.setattr(common.Run, "plot", lambda run, *args, **options: None)
    for module in MODULES.values():
        short = partial(module.make_env, max_episode_steps=EPISODE)
        patch.setattr(module, "make_env", short)

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
    """Script -> folder of an offline run that was never interrupted."""
    root = tmp_path_factory.mktemp("whole")
    for script, flags in FLAGS.items():
        call(script, *flags, "--start-or-resume", root / script)
    return {script: root / script for script in FLAGS}


@pytest.fixture
def copy_of(whole, tmp_path):
    """copy_of(script): the folder of a copy of its run."""
    return lambda script: Path(shutil.copytree(whole[script], tmp_path / "copy"))


def rows(folder, name):
    """The rows of a CSV file, as lists of text without the speed."""
    lines = [line.split(",") for line in (folder / name).read_text().splitlines()]
    kept = [i for i, column in enumerate(lines[0]) if column != "steps_per_s"]
    return [[line[i] for i in kept] for line in lines]


def steps(folder, name):
    return [int(row[0]) for row in rows(folder, name)[1:]]


def settings(folder):
    return common.read_config(folder)["args"]


def assert_same_run(folder, other):
    """The same rows, networks, data and random numbers to come, bit for bit."""
    for name in ("train.csv", "eval.csv"):
        assert rows(folder, name) == rows(other, name), name
    state = common.read_checkpoint(folder)
    expected = common.read_checkpoint(other)
    assert state["step"] == expected["step"]
    assert torch.equal(state["generator"], expected["generator"])
    for kind in ("nets", "collected"):
        assert state[kind].keys() == expected[kind].keys()
        for name, tensor in expected[kind].items():
            assert torch.equal(state[kind][name], tensor), name
    assert not list(folder.glob(".*.tmp"))


class Stopped(BaseException):
    """Like KeyboardInterrupt, it is not an Exception: nothing in the scripts catches it."""


def call_until(call, saves_at, stops_at, *flags):
    """Call a script that saves at one step and is stopped after it has logged a later one."""
    log = common.Run.log

    def log_and_stop(run, name, row):
        log(run, name, row)
        if row["step"] >= stops_at:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(common.Run, "save_is_due", lambda run: run.bar.n == saves_at)
        patch.setattr(common.Run, "log", log_and_stop)
        call(*flags)


# -------------------------------------------------------------------------------------- stopped


@pytest.mark.parametrize(
    "script, again",
    [("qflow", "--resume"), ("fql", "--start-or-resume"), ("flow_sac", "--start-or-resume")],
)
def test_stopped_and_resumed_offline_it_computes_the_same(
    script, again, call, whole, tmp_path, capsys
):
    folder = tmp_path / "run"
    call_until(call, 24, 35, script, *FLAGS[script], "--start-or-resume", folder)
    printed = capsys.readouterr()
    assert f"resume with --resume {folder}" in printed.err and "changed: " not in printed.out
    assert common.read_checkpoint(folder)["step"] == 24
    assert steps(folder, "train.csv")[-2:] == [28, 35]  # to be computed again
    before = (folder / "train.csv").read_text().splitlines()[:5]
    assert before[-1].startswith("21,")
    with open(folder / "train.csv", "a") as file:
        file.write("40,0.1")  # killed while it was writing
    call(script, again, folder, *(FLAGS[script] if again == "--start-or-resume" else []))
    assert "changed: " not in capsys.readouterr().out
    assert_same_run(folder, whole[script])
    assert (folder / "train.csv").read_text().splitlines()[:5] == before  # with their speed


def test_stopped_before_its_first_checkpoint_it_starts_again(call, whole, tmp_path):
    folder = tmp_path / "run"
    call_until(call, None, 20, "fql", *FLAGS["fql"], "--start-or-resume", folder)
    assert not (folder / "checkpoint.pt").exists() and steps(folder, "train.csv")[-1] == 20
    with pytest.raises(common.UserError, match="checkpoint.pt; rerun the command that"):
        call("fql", "--resume", folder)
    call("fql", *FLAGS["fql"], "--start-or-resume", folder)
    assert_same_run(folder, whole["fql"])


@pytest.mark.parametrize("script", MODULES)
def test_stopped_online_it_keeps_what_it_collected(script, call, tmp_path):
    folder = tmp_path / "run"
    flags = [*FLAGS[script], *ONLINE]
    call_until(call, 40, 50, script, *flags, "--start-or-resume", folder)
    before = common.read_checkpoint(folder)
    valids = [1] * 20 + [0] + [1] * 10 + [0]  # an episode, and the start of the next one
    assert before["step"] == 40 and before["collected"]["valids"].tolist() == valids
    assert steps(folder, "episodes.csv") == [30, 50]
    first_rows = {name: rows(folder, name)[:3] for name in ("train.csv", "eval.csv")}
    first_episode = rows(folder, "episodes.csv")[:2]
    call(script, "--resume", folder)
    after = common.read_checkpoint(folder)
    valids += [1] * 20 + [0] + [1] * 10 + [0]  # a new episode after the resume
    assert after["step"] == 70 and after["collected"]["valids"].tolist() == valids
    for name, tensor in before["collected"].items():
        assert torch.equal(after["collected"][name][: len(tensor)], tensor), name
    assert not torch.equal(after["generator"], before["generator"])
    assert steps(folder, "train.csv") == [10, 15, 30, 45, 60, 70]
    assert steps(folder, "eval.csv") == [10, 70] and steps(folder, "episodes.csv") == [30, 60]
    assert rows(folder, "episodes.csv")[0] == ["step", "return", "success"]
    assert rows(folder, "episodes.csv")[:2] == first_episode
    assert -EPISODE <= float(first_episode[1][1]) <= 0 and float(first_episode[1][2]) in (0, 1)
    for name, expected in first_rows.items():
        assert rows(folder, name)[: len(expected) - 1] == expected[:-1]


@pytest.mark.parametrize("script", MODULES)
def test_going_online_later_is_going_online_at_once(script, call, whole, copy_of, tmp_path, capsys):
    at_once = tmp_path / "at_once"
    online = ["--online-steps", 30]
    call(script, *FLAGS[script], *online, "--start-or-resume", at_once)
    later = copy_of(script)
    capsys.readouterr()
    call(script, "--resume", later, *online)
    printed = capsys.readouterr().out
    assert printed.count("changed: ") == 1 and "changed: online_steps 0 -> 30\n" in printed
    assert_same_run(later, at_once)
    assert len(common.read_checkpoint(later)["collected"]["valids"]) == 32
    files = {path.name: path.read_bytes() for path in later.iterdir()}
    capsys.readouterr()
    call(script, "--resume", later, "--online-steps", 20)  # fewer than there are: nothing to do
    assert {path.name: path.read_bytes() for path in later.iterdir()} == files
    assert "finished; mean of the last 2 evaluations: success" in capsys.readouterr().out


def test_from_scratch_evaluating_and_saving_do_not_change_the_training(call, tmp_path):
    folders = {interval: tmp_path / str(interval) for interval in (15, 60)}
    for interval, folder in folders.items():
        flags = [*FROM_SCRATCH, "--eval-interval", interval]
        call("flow_sac", *flags, "--start-or-resume", folder)
        assert steps(folder, "eval.csv") == list(range(interval, 61, interval))
    often, once = (common.read_checkpoint(folder) for folder in folders.values())
    for name, tensor in once["nets"].items():
        assert torch.equal(often["nets"][name], tensor), name
    assert torch.equal(often["generator"], once["generator"])


def test_resumed_from_scratch_between_two_episodes_it_computes_the_same(call, tmp_path):
    folder = tmp_path / "run"
    flags = [*FROM_SCRATCH, *"--learning-starts 30 --eval-interval 20 --log-interval 1".split()]
    call("flow_sac", *flags, "--start-or-resume", tmp_path / "whole")
    call_until(call, None, 31, "flow_sac", *flags, "--start-or-resume", folder)
    assert common.read_checkpoint(folder)["step"] == 20  # the actions to come are uniform
    call("flow_sac", *flags, "--start-or-resume", folder, "--online-steps", 40)
    call("flow_sac", "--resume", folder, "--online-steps", 60)  # the first update: critics only
    assert_same_run(folder, tmp_path / "whole")


def test_a_checkpoint_is_due_after_five_minutes(tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=lambda: clock.now, now=1000.0)
    monkeypatch.setattr(common, "time", clock)
    with common.Run(tmp_path / "run", {}) as run:
        clock.now += 299
        assert not run.save_is_due()
        clock.now += 2
        assert run.save_is_due()
        run.save(step=0, nets={})
        assert not run.save_is_due()


# ------------------------------------------------------------------------------ changed settings


def test_settings_of_a_resumed_run_may_be_changed(call, copy_of, whole, capsys):
    folder = copy_of("qflow")
    capsys.readouterr()
    call("qflow", "--resume", folder, *"--offline-steps 60 --log-interval 5 --lam 3".split())
    changed = [line for line in capsys.readouterr().out.splitlines() if "changed" in line]
    assert sorted(changed) == [
        "changed: lam 4.0 -> 3.0",
        "changed: log_interval 7 -> 5",
        "changed: offline_steps 40 -> 60",
    ]
    assert settings(folder)["lam"] == 3 and settings(folder)["batch_size"] == 16
    assert steps(folder, "eval.csv") == [20, 40, 60]
    assert rows(folder, "eval.csv")[:-1] == rows(whole["qflow"], "eval.csv")
    assert steps(folder, "train.csv")[-5:] == [40, 45, 50, 55, 60]
    call("qflow", "--resume", folder)  # with these settings from now on
    printed = capsys.readouterr().out
    assert "changed: " not in printed and "mean of the last 3 evaluations: success" in printed
    moved = folder.rename(folder.with_name("moved"))
    call("qflow", "--start-or-resume", moved)  # whose config.json names the old place
    assert f"writing to {moved}\n" in capsys.readouterr().out


@pytest.mark.parametrize("script", MODULES)
def test_a_phase_that_is_over_keeps_its_length(script, call, copy_of):
    folder = copy_of(script)  # 40 offline steps are done
    with pytest.raises(common.UserError, match="--offline-steps 30: was 40, and 40 steps are done"):
        call(script, "--resume", folder, "--offline-steps", 30, "--online-steps", 30)
    call(script, "--resume", folder, "--online-steps", 30)
    for steps in (30, 60, 80):
        with pytest.raises(common.UserError, match=f"{steps}: was 40, and 70 steps are done"):
            call(script, "--resume", folder, "--offline-steps", steps)
    assert settings(folder)["offline_steps"] == 40


@pytest.mark.parametrize(
    "script, flags, name",
    [
        ("qflow", ["--lr"], "critic.mlp.0.weight"),
        ("fql", ["--lr"], "critic.mlp.0.weight"),
        ("flow_sac", ["--policy-lr", "--q-lr"], "policy.velocity.candidate.0.weight"),
    ],
)
def test_a_changed_learning_rate_takes_effect(script, flags, name, call, copy_of, tmp_path):
    frozen = copy_of(script)
    learning = Path(shutil.copytree(frozen, tmp_path / "learning"))
    before = common.read_checkpoint(frozen)["nets"][name]
    call(script, "--resume", learning, "--offline-steps", 42)
    assert not torch.equal(common.read_checkpoint(learning)["nets"][name], before)
    values = [word for flag in flags for word in (flag, 1e-30)]
    call(script, "--resume", frozen, "--offline-steps", 42, *values)
    assert torch.equal(common.read_checkpoint(frozen)["nets"][name], before)


def test_another_dataset_is_a_changed_setting(call, copy_of, tmp_path, capsys):
    other = tmp_path / "other.npz"
    common.collect_pointmaze(NAME, other, num_episodes=1, workers=1)
    folder = copy_of("fql")
    call("fql", "--resume", folder, "--dataset", other, "--offline-steps", 41)
    printed = capsys.readouterr().out
    assert f"changed: dataset  -> {other}\n" in printed
    assert "changed: dataset 2000 transitions, " in printed and " -> 1000 transitions" in printed
    assert common.read_checkpoint(folder)["step"] == 41


def test_networks_of_other_sizes_are_one_line_and_change_nothing(call, copy_of):
    folder = copy_of("fql")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    message = "does not fit these networks: critic.mlp.0.weight has shape .* there, .* here"
    with pytest.raises(common.UserError, match=message):
        call("fql", "--resume", folder, "--hidden", 8, 8)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# -------------------------------------------------------------------------------------- trouble


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_row_that_does_not_fit_on_the_disk_is_an_error_not_a_gap(tmp_path, capsys):
    run = common.Run(tmp_path / "run", dict(script="fql.py", args={}))
    run.show_progress(0, 1, "updates")
    run.save(step=0, nets={})
    run.log("train.csv", dict(step=1, critic_loss=0.5))  # now it knows the file's columns
    (run.folder / "train.csv").unlink()
    (run.folder / "train.csv").symlink_to("/dev/full")
    with pytest.raises(common.UserError, match=f"{run.folder}: .*No space left"), run:
        run.log("train.csv", dict(step=2, critic_loss=0.5))
    assert "stopped; start it again to continue" in capsys.readouterr().err


def test_nan_stops_within_a_log_interval(call, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(common.UserError, match="^step 7: .*_loss is "):
        call("fql", *OFFLINE, "--lr", "1e9", "--start-or-resume", folder)  # at first it is finite
    assert not (folder / "checkpoint.pt").exists() and not (folder / "eval.csv").exists()


class Queued:
    """A metric that the device computes only when it is asked for, in a tenth of a second."""

    def item(self):
        common.time.now += 0.1
        return 1.0


@pytest.mark.parametrize("script", MODULES)
def test_the_speed_counts_the_wait_for_logged_metrics_and_no_evaluation(
    script, call, tmp_path, monkeypatch
):
    clock = SimpleNamespace(perf_counter=lambda: clock.now, now=1000.0)

    def evaluate(*args):
        clock.now += 1000
        return {"return": np.zeros(1)}

    monkeypatch.setattr(common, "time", clock)
    monkeypatch.setattr(MODULES[script], "evaluate", evaluate)
    name = "update_policy" if script == "flow_sac" else "update"
    monkeypatch.setattr(MODULES[script], name, lambda *args: dict(policy_loss=Queued()))
    flags = "--offline-steps 4 --log-interval 2 --eval-interval 2 --start-or-resume".split()
    call(script, *FLAGS[script], *flags, tmp_path)
    assert common.read_columns(tmp_path / "train.csv")["steps_per_s"].tolist() == [20, 20]


def test_a_requeued_job_waits_for_the_process_before_it(call, copy_of, monkeypatch, capsys):
    folder = copy_of("fql")
    is_locked = threading.Event()
    may_end = threading.Event()

    def process_before():
        with FileLock(folder / ".lock"):
            is_locked.set()
            may_end.wait(60)

    def end_in_a_moment():
        threading.Timer(3, may_end.set).start()

    thread = threading.Thread(target=process_before)
    thread.start()
    is_locked.wait()
    with pytest.raises(common.UserError, match=f"{folder}: another process writes there"):
        call("fql", "--resume", folder)  # typed by a person, who is told after a second
    monkeypatch.setattr(common, "git_commit", end_in_a_moment)  # called just before it locks
    call("fql", "--start-or-resume", folder, "--offline-steps", 41)
    thread.join()
    assert common.read_checkpoint(folder)["step"] == 41
    assert capsys.readouterr().out.count("waiting for another process, which holds ") == 1


def test_a_mistake_in_a_network_is_not_a_damaged_run(call, whole, monkeypatch):
    def mistaken(self, *sizes, **options):
        return undefined_name  # noqa: F821

    monkeypatch.setattr(qflow.Value, "__init__", mistaken)
    with pytest.raises(NameError, match="undefined_name"):
        call("qflow", "--resume", whole["qflow"])
    with pytest.raises(NameError, match="undefined_name"):
        qflow.load(whole["qflow"])


@pytest.mark.parametrize("script", MODULES)
def test_loaded_networks_act_as_the_trained_ones(script, whole):
    module = MODULES[script]
    nets, args = module.load(whole[script])
    assert args.seed == 3 and args.hidden == (16, 16) and nets.sizes == (2, 4)
    obs = np.random.default_rng(0).normal(size=(5, 2))
    x0 = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module.sample_actions(nets, torch.tensor(obs).float(), x0, args).view(5, 2, 2)
    first, again, other = (
        module.act(nets, obs, args, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert np.array_equal(first, expected) and np.abs(first).max() <= 1
    assert np.array_equal(first, again) and not np.array_equal(first, other)


# --------------------------------------------------------------------------------------- killed


def start(data, script, *flags, **options):
    """The script as a process, in a group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{script}.py"), *map(str, flags)],
        env={**os.environ, "OGBENCH_DATA": str(data), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, signals",
    [("qflow", (signal.SIGKILL, signal.SIGTERM)), ("fql", (signal.SIGINT, signal.SIGKILL))],
)
def test_killed_again_and_again_it_computes_the_same(script, signals, data, tmp_path):
    folder = tmp_path / "run"
    command = [data, script, *FLAGS[script], "--start-or-resume"]
    rng = np.random.default_rng()  # another moment each time: any must do
    for number in signals:
        config = folder / "config.json"
        written = config.stat().st_mtime_ns if config.exists() else None
        process = start(*command, folder)
        while process.poll() is None:
            if config.exists() and config.stat().st_mtime_ns != written:
                break
            time.sleep(0.01)
        moment = rng.uniform(0, 1.5)
        time.sleep(moment)
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)  # as from a terminal or a cluster: to all of them
        out, err = process.communicate(timeout=100)
        has_checkpoint = (folder / "checkpoint.pt").exists()
        print(f"signal {number} after {moment} s, checkpoint: {has_checkpoint}")
        assert "Traceback" not in err, err
        if number != signal.SIGKILL and "mean of the last" not in out:
            assert process.returncode == 130 and err.endswith("interrupted\n"), err
            assert f"--resume {folder}" not in err or has_checkpoint
    process = start(*command, folder)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    process = start(*command, tmp_path / "whole")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert_same_run(folder, tmp_path / "whole")


@pytest.mark.slow
def test_killed_online_it_keeps_what_its_checkpoint_has(data, tmp_path):
    folder = tmp_path / "run"
    flags = [*FLAGS["qflow"], *ONLINE, *"--online-steps 100 --eval-interval 30".split()]
    process = start(data, "qflow", *flags, "--eval-episodes", 1, "--start-or-resume", folder)
    while process.poll() is None:
        if (folder / "checkpoint.pt").exists() and common.read_checkpoint(folder)["step"] >= 30:
            break
        time.sleep(0.05)
    process.kill()
    out, _ = process.communicate(timeout=100)
    assert "writing to" in out  # lines reach a log file at once
    before = common.read_checkpoint(folder)
    assert 30 <= before["step"] < 110
    process = start(data, "qflow", "--resume", folder)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    after = common.read_checkpoint(folder)
    assert after["step"] == 110 and after["collected"]["valids"].sum() == 100
    for name, tensor in before["collected"].items():
        assert torch.equal(after["collected"][name][: len(tensor)], tensor), name


@pytest.mark.slow
def test_killed_while_it_collects_its_workers_end_in_silence(tmp_path):
    process = start(tmp_path, "qflow", "--env", NAME, "--run-dir", tmp_path / "runs")
    lock = tmp_path / "collected" / f".{NAME}.npz.lock"
    while process.poll() is None and not lock.exists():
        time.sleep(0.05)
    time.sleep(3)  # now there are workers
    assert process.poll() is None and not (tmp_path / "collected" / f"{NAME}.npz").exists()
    process.kill()
    _, err = process.communicate(timeout=20)  # returns when the workers have ended, too
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(data, copy_of):
    folder = copy_of("fql")
    before = (folder / "checkpoint.pt").read_bytes()

    def limit():  # no file can grow beyond half of the checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2,) * 2)

    process = start(data, "fql", "--resume", folder, "--offline-steps", 41, preexec_fn=limit)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "Traceback" not in err
    assert "File too large" in err.splitlines()[-1]
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not list(folder.glob(".*.tmp"))
