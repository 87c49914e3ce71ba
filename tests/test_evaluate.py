"""results/evaluate.py on the shipped policies, on copies of scripts and on damaged runs."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import imageio
import numpy as np
import pytest
import torch

import common
import flow_sac
import qflow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "results"))
import evaluate  # noqa: E402

RUN = ROOT / "results/policies/qflow-pointmaze-medium"


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*flags): what evaluate.py prints."""

    def call(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--device", "cpu"])
        evaluate.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def run(tmp_path):
    """A copy of the shipped run, to be changed."""
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def name_script(run, name):
    """Let config.json name this script."""
    config = common.read_config(run)
    (run / "config.json").write_text(json.dumps(dict(config, script=name)))


def start(*flags, **environment):
    """evaluate.py as a process, without a display."""
    environment = {**os.environ, **environment}
    environment.pop("DISPLAY", None)
    environment.pop("WAYLAND_DISPLAY", None)
    command = [sys.executable, ROOT / "results/evaluate.py", *map(str, flags)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


# ------------------------------------------------------------------------------------ intervals


def test_intervals(capsys):
    success = np.array([1.0, 1, 1, 0, 1, 1, 1, 1, 1, 1])
    returns = np.array([-1.0, -2, -3, -4])
    evaluate.print_intervals({"success": success, "return": returns})
    # Wilson for 9 of 10; mean +- 1.96 s / sqrt(n) with s^2 = 5 / 3.
    assert capsys.readouterr().out.splitlines() == [
        "success 0.9 (95%: 0.5958 to 0.9821)",
        "return -2.5 (95%: -3.765 to -1.235)",
    ]


def test_intervals_of_one_episode_and_without_success(capsys):
    results = {"success": np.array([math.nan]), "return": np.array([-3.0])}
    evaluate.print_intervals(results)
    evaluate.print_intervals({"success": np.zeros(3)})
    evaluate.print_intervals({"success": np.ones(3)})
    assert capsys.readouterr().out.splitlines() == [
        "return -3 (95%: -inf to inf)",
        "success 0 (95%: 0 to 0.5615)",
        "success 1 (95%: 0.4385 to 1)",
    ]


# --------------------------------------------------------------------------------------- a run


def test_the_shipped_policy_solves_its_maze(call):
    printed = call(RUN, "--episodes", 2)
    success, returns, length = printed.splitlines()
    assert success == "success 1 (95%: 0.3424 to 1)"
    assert returns.startswith("return -") and length.startswith("length ")
    assert call(RUN, "--episodes", 2) == printed
    assert call(RUN, "--episodes", 2, "--seed", 1) != printed


def test_a_copy_of_a_script_in_the_current_folder(call, run, monkeypatch):
    text = (ROOT / "qflow.py").read_text()
    assert "    return actions.view(" in text
    lazy = text.replace("    return actions.view(", "    return 0 * actions.view(")
    (run.parent / "lazy_qflow.py").write_text(lazy)  # its actions are 0
    name_script(run, "lazy_qflow.py")
    with pytest.raises(common.UserError, match="^lazy_qflow.py, the run's script, is neither in"):
        call(run, "--episodes", 1)
    monkeypatch.chdir(run.parent)
    assert "length 1000 " in call("run", "--episodes", 1)


@pytest.mark.slow
def test_sac_flow_and_a_renderer_that_is_missing(call, tmp_path, monkeypatch):
    flags = """--env Pendulum-v1 --device cpu --hidden 8 8 --policy-width 8 --batch-size 16
        --online-steps 3 --learning-starts 2 --eval-episodes 1""".split()
    monkeypatch.setattr(sys, "argv", ["flow_sac.py", *flags, "--start-or-resume", str(tmp_path)])
    flow_sac.main()
    torch.set_float32_matmul_precision("highest")
    lines = call(tmp_path, "--episodes", 2).splitlines()
    assert lines[-1] == "length 200 (95%: 200 to 200)"
    assert not [line for line in lines if line.startswith("success")]
    monkeypatch.setitem(sys.modules, "pygame", None)  # as if it were not installed
    with pytest.raises(common.UserError, match="--video: cannot render .pygame is not installed"):
        call(tmp_path, "--episodes", 1, "--video")


@pytest.mark.slow
def test_a_run_of_a_script_under_results(tmp_path):
    (script,) = ROOT.glob("results/**/bptt.py")
    path = tmp_path / "data.npz"
    common.collect_pointmaze("pointmaze-medium-navigate-v0", path, num_episodes=2, workers=1)
    flags = "--device cpu --hidden 8 --batch-size 16 --offline-steps 2 --eval-episodes 1".split()
    flags += ["--dataset", path, "--start-or-resume", tmp_path / "run"]
    subprocess.run([sys.executable, script, *flags], check=True)
    result = start(tmp_path / "run", "--episodes", 2)
    assert result.returncode == 0 and "length 1000 (95%" in result.stdout, result.stderr


# ------------------------------------------------------------------------------------- mistakes


def damage(run, what):
    config = json.loads((run / "config.json").read_text())
    if what == "no script":
        del config["script"]
    if what == "other sizes":
        config["args"]["hidden"] = [16, 16]
    (run / "config.json").write_text(json.dumps(config))
    if what == "half of config.json":
        (run / "config.json").write_text(json.dumps(config)[:50])
    if what == "half of checkpoint.pt":
        (run / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:50_000])
    if what == "no checkpoint":
        (run / "checkpoint.pt").unlink()
    if what == "a name that Python cannot import":
        (run.parent / "qflow.copy.py").write_text("")
        name_script(run, "qflow.copy.py")


@pytest.mark.parametrize(
    "what, message",
    [
        ("no script", "config.json does not name a script"),
        ("other sizes", "the checkpoint does not fit these networks: "),
        ("half of config.json", "run: damaged, or not a run: "),
        ("half of checkpoint.pt", "checkpoint.pt: damaged, or not a checkpoint: "),
        ("no checkpoint", "run: has no checkpoint.pt"),
        ("a name that Python cannot import", "qflow.copy.py: cannot be imported"),
    ],
)
def test_a_damaged_run_is_one_line(what, message, call, run, monkeypatch):
    damage(run, what)
    monkeypatch.chdir(run.parent)
    with pytest.raises(common.UserError, match=re.escape(message)) as error:
        call(run)
    assert "\n" not in str(error.value)


def test_mistakes_on_the_command_line(call, tmp_path):
    with pytest.raises(common.UserError, match="--episodes 0: must be positive"):
        call(RUN, "--episodes", 0)
    with pytest.raises(common.UserError, match="damaged, or not a run"):
        call(tmp_path / "nothing")


# ---------------------------------------------------------------------------------------- video


class Counter(gymnasium.Env):
    """Episodes of 9, 17 and 25 steps; a frame has the number of steps taken so far."""

    def reset(self, *, seed=None, options=None):
        self.length = 9 + 8 * seed
        self.steps = 0
        return np.zeros(1), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1), 0.0, self.steps == self.length, False, {}

    def render(self):
        return np.full((16, 16, 3), 10 * self.steps, np.uint8)


def test_the_seed_is_that_of_the_episodes_and_of_the_noise(call, monkeypatch):
    seen = []

    def evaluated(policy, env, num_episodes, seed):
        seen.append((num_episodes, seed, policy.keywords["generator"].initial_seed()))
        return {}

    monkeypatch.setattr(qflow, "evaluate", evaluated)
    call(RUN, "--episodes", 7, "--seed", 3)
    assert seen == [(7, 3, 3)]


def test_a_video_has_every_eighth_step_of_three_episodes(tmp_path, capsys):
    path = tmp_path / "evaluation.gif"
    evaluate.record_video(qflow, lambda obs: np.zeros((len(obs), 5, 1)), Counter(), 0, path)
    shades = [int(frame.flat[0]) for frame in imageio.mimread(path)]
    assert shades == [0, 80, 0, 80, 160, 0, 80, 160, 240]
    assert str(path) in capsys.readouterr().out


def test_mujoco_may_fail_when_it_is_imported(call, monkeypatch):
    def make_env(args):  # as PyOpenGL does for MUJOCO_GL=egl where EGL is not installed
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(qflow, "make_env", make_env)
    with pytest.raises(common.UserError, match="--video: cannot render .* libegl1 libgl1-mesa-dri"):
        call(RUN, "--episodes", 1, "--video")


@pytest.mark.slow
def test_where_nothing_can_be_rendered_the_numbers_come_all_the_same(run):
    result = start(run, "--episodes", 1, "--video", MUJOCO_GL="glfw")
    assert result.returncode == 2 and "length " in result.stdout
    assert "evaluate.py: error: --video: cannot render" in result.stderr
    assert "MUJOCO_GL" in result.stderr and "Traceback" not in result.stderr
    assert not list(run.glob("*.gif"))


FILM = f"""
import sys
from pathlib import Path
import evaluate
import qflow

nets, args = qflow.load({str(RUN)!r})
env = qflow.make_env(args, max_episode_steps=16, render_mode="rgb_array")
evaluate.record_video(qflow, lambda obs: qflow.act(nets, obs, args), env, 0,
    Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_maze_is_rendered(tmp_path):
    path = tmp_path / "evaluation.gif"
    folders = f"{ROOT}:{ROOT / 'results'}"
    environment = {**os.environ, "MUJOCO_GL": "egl", "PYTHONPATH": folders}  # read at import
    command = [sys.executable, "-c", FILM, path]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    if result.returncode and re.search("EGL|OpenGL|libGL", result.stderr):
        pytest.skip(f"nothing can be rendered here: {result.stderr.splitlines()[-1]}")
    assert result.returncode == 0, result.stderr
    frames = imageio.mimread(path)
    assert len(frames) == 6 and np.std(frames[0]) > 10


@pytest.mark.parametrize("episodes", range(1, 60))
def test_the_interval_of_a_rate_stays_within_0_and_1(episodes):
    low, high = evaluate.wilson(0.0, episodes)
    assert low == 0 and 0 < high < 1
    assert evaluate.wilson(1.0, episodes) == pytest.approx((1 - high, 1))
