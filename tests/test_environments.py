"""Environments of one's own, and the device."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

import common
import flow_sac
import fql
import qflow


class Own(gymnasium.Env):
    """Five steps, each with reward 1; what is unusual comes from subclasses and from arguments."""

    observation_space = Box(-1, 1, (3,), np.float32)
    action_space = Box(-1, 1, (2,), np.float32)
    time_limit = 5

    def __init__(self, **attributes):
        vars(self).update(attributes)
        self.buffer = np.zeros(3, np.float32)

    def reward(self):
        return 1.0

    def observe(self):
        return np.full(3, self.steps, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.steps += 1
        return self.observe(), self.reward(), False, self.steps == self.time_limit, {}


class RewardInAnArray(Own):
    def reward(self):
        return np.array([1.0], np.float32)


class ReusedBuffer(Own):
    def observe(self):
        self.buffer[:] = self.steps
        return self.buffer


class GlobalRandomState(Own):
    def observe(self):
        return np.array([np.random.rand(), 0, 0], np.float32)


class FourResults(Own):
    def step(self, action):
        obs, reward, done, _, info = super().step(action)
        return obs, reward, done, info


class TwoRewards(Own):
    def reward(self):
        return np.ones(2)


class NotANumber(Own):
    def observe(self):
        return np.full(3, np.nan if self.steps else 0, np.float32)


class OtherShape(Own):
    def observe(self):
        return np.zeros((1, 3), np.float32)


DATASET = common.Dataset.empty(3, 2)  # sizes of an observation and of an action


def check(make_env):
    """common.check_env as `train` calls it."""
    common.check_env(make_env(), DATASET)


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "make_env, words",
    [
        (
            lambda: Own(action_space=Discrete(4)),
            "the action space is Discrete.*require a Box of shape",
        ),
        (
            lambda: Own(action_space=Box(-1, 1, (2,), np.int64)),
            "the action space is .*floating point from -1 to 1: see .*RescaleAction",
        ),
        (
            lambda: Own(action_space=Box(np.float32([-1, 0]), np.float32([1, 1]))),
            "from -1 to 1: see .*RescaleAction",
        ),
        (
            lambda: Own(action_space=Box(np.float32([-1, -1]), np.float32([1, 2]))),
            "from -1 to 1: see .*RescaleAction",
        ),
        (lambda: Own(action_space=Box(-1, 1, (2, 1), np.float32)), r"a Box of shape \(2,\)"),
        (lambda: Own(observation_space=Box(-1, 1, (3, 1), np.float32)), r"a Box of shape \(3,\)"),
        (lambda: Own(observation_space=Discrete(3)), "the observation space is Discrete"),
        (
            lambda: Own(observation_space=Box(-1, 1, (4,), np.float32)),
            r"observation space is a Box of shape \(4,\), the data require a Box of shape \(3,\)",
        ),
        (FourResults, "must return observation, .* and info: not enough values"),
        (TwoRewards, "must return .* reward \\(a number\\), .*: can only convert an array"),
        (NotANumber, "the environment's observation is not finite"),
        (OtherShape, r"observation has shape \(1, 3\), not \(3,\)"),
    ],
)
def test_an_environment_that_cannot_be_trained_in_is_one_line(make_env, words):
    with pytest.raises(common.UserError, match=words) as error:
        check(make_env)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("script", [qflow, fql, flow_sac])
def test_train_checks_both_environments_first(script):
    run = Mock()
    bad = Own(action_space=Box(-2, 2, (2,), np.float32))
    for env, eval_env in ((bad, Own()), (Own(), bad)):
        with pytest.raises(common.UserError, match="from -1 to 1: see .*RescaleAction"):
            script.train(script.Args(), DATASET, env, eval_env, run)
    assert run.mock_calls == []


@pytest.mark.parametrize("script", [qflow, fql, flow_sac])
def test_the_gpu_of_the_data_becomes_torchs(script, monkeypatch):
    monkeypatch.setattr(common, "check_env", Mock())
    chosen = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(torch.cuda, "set_device", chosen)
    data = SimpleNamespace(actions=SimpleNamespace(device=torch.device("cuda:1")))
    with pytest.raises(KeyboardInterrupt):
        script.train(script.Args(), data, None, None, None)
    chosen.assert_called_once_with(torch.device("cuda:1"))


def test_an_environment_without_a_time_limit_is_warned_about(capsys):
    check(lambda: Own(time_limit=None))
    assert "no time limit; if episodes can go on forever" in capsys.readouterr().out
    check(lambda: gymnasium.wrappers.TimeLimit(Own(time_limit=None), 7))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("low, high", [(0, 0), (-np.inf, np.inf), (0, np.inf)])
def test_flow_sac_refuses_actions_that_cannot_be_rescaled(monkeypatch, low, high):
    env = Own(action_space=Box(low, high, (2,), np.float32))
    monkeypatch.setattr(gymnasium, "make", Mock(return_value=env))
    args = flow_sac.Args(env="Own-v0")
    with pytest.raises(common.UserError, match="--env Own-v0: requires bounded actions"):
        flow_sac.make_env(args)
    env.action_space = Box(-3, 5, (2,), np.float32)
    rescaled = flow_sac.make_env(args)
    rescaled.reset()
    rescaled.step(np.ones(2, np.float32))
    assert rescaled.action_space == Box(-1, 1, (2,), np.float32)


@pytest.mark.parametrize("space", [Discrete(4), Dict(goal=Discrete(4)), Box(0, 1, (8, 8, 3))])
def test_flow_sac_refuses_observations_that_are_no_vectors(monkeypatch, space):
    env = Own(observation_space=space)
    monkeypatch.setattr(gymnasium, "make", Mock(return_value=env))
    with pytest.raises(common.UserError, match="--env Own-v0: requires vectors as observations"):
        flow_sac.make_env(flow_sac.Args(env="Own-v0"))


# -------------------------------------------------------------------------------- what works


@pytest.mark.parametrize("make_env", [Own, RewardInAnArray, ReusedBuffer])
def test_an_episode_is_evaluated(make_env):
    observations = []

    def policy(obs):
        observations.append(obs[0].copy())
        return np.zeros((len(obs), 1, 2), np.float32)

    results = qflow.evaluate(policy, make_env(), num_episodes=3, seed=0)
    assert np.array_equal(observations, np.tile(np.arange(5)[:, None].repeat(3, 1), (3, 1)))
    assert results["return"].tolist() == results["length"].tolist() == [5, 5, 5]
    assert np.isnan(results["success"]).all()


@pytest.mark.parametrize("make_env", [RewardInAnArray, ReusedBuffer])
@pytest.mark.parametrize("script", [qflow, fql, flow_sac])
def test_an_episode_is_collected(script, make_env, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "plot", lambda *args, **options: None)
    own = dict(learning_starts=5, policy_width=8) if script is flow_sac else {}
    sizes = dict(hidden=(8,), batch_size=4, eval_episodes=1)
    args = script.Args(offline_steps=0, online_steps=6, **sizes, **own)
    dataset = common.Dataset.empty(3, 2)
    with common.Run(tmp_path / "run", dict(script="x.py", args=vars(args))) as run:
        script.train(args, dataset, make_env(), make_env(), run)
    assert common.read_columns(run.folder / "episodes.csv")["return"].tolist() == [5]
    collected = dataset.collected()
    assert collected["observations"][:6, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert collected["rewards"][:5].tolist() == [1] * 5


@pytest.mark.parametrize("seed", [5, 2**32 + 5])
def test_global_random_numbers_follow_from_the_seed(seed):
    env = GlobalRandomState()

    def observe(state_before):
        np.random.seed(state_before)
        observations = [qflow.reset(env, seed)]
        for _ in range(4):
            observations.append(env.step(np.zeros(2, np.float32))[0])
        return np.array(observations)

    first = observe(0)
    assert np.array_equal(first, observe(1))
    assert len(np.unique(first[:, 0])) == 5


def test_episodes_of_ogbench_follow_from_the_seed_alone():
    env_id = "pointmaze-teleport-singletask-task4-v0"  # a teleport draws its exit in step()
    env = gymnasium.make(env_id, max_episode_steps=250)
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (250, 1, 1, 2))
    actions[..., 1] -= 0.7  # towards a teleport

    def observe(state_before):
        np.random.seed(state_before)
        observations = []
        step = 0

        def policy(obs):
            nonlocal step
            observations.append(obs[0])
            step += 1
            return actions[(step - 1) % 250]

        results = qflow.evaluate(policy, env, 3, seed=5)
        assert results["length"].tolist() == [250] * 3
        return np.array(observations)

    first, again = observe(0), observe(1)
    assert np.array_equal(first, again)
    assert len(np.unique(first[::250], axis=0)) == 3  # starts
    assert np.abs(np.diff(first, axis=0)).max(1)[:249].max() > 3  # somebody was teleported


PLAY = """
import hashlib
import gymnasium
import numpy as np
import ogbench
import qflow

hash = hashlib.sha256()
for name in ("cube-single", "scene", "puzzle-3x3"):
    env = gymnasium.make(f"{name}-singletask-task2-v0")
    for seed in (1, 2):
        hash.update(qflow.reset(env, seed).tobytes())
        for action in np.random.default_rng(seed).uniform(-1, 1, (40, 5)):
            hash.update(env.step(action)[0].tobytes())
print(hash.hexdigest())
"""


@pytest.mark.slow
def test_an_episode_of_a_robot_arm_follows_from_its_seed_in_each_process():
    # OGBench's reset tries random actions that no seed reaches; nothing of them may remain.
    root = Path(__file__).parent.parent
    outputs = {
        subprocess.run([sys.executable, "-c", PLAY], cwd=root, capture_output=True).stdout
        for _ in range(2)
    }
    assert len(outputs) == 1 and len(outputs.pop()) == 65


# ------------------------------------------------------------------------------------- device


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert qflow.choose_device("auto") == qflow.choose_device("cpu") == torch.device("cpu")
    for name in ("", "gpu", "cuda:x"):
        with pytest.raises(common.UserError, match=f"--device {name}: cannot be used: ") as error:
            qflow.choose_device(name)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda n, dtype, device: ones(n))  # a GPU that works
    for name, device in (("auto", "cuda"), ("cuda", "cuda"), ("cuda:1", "cuda:1")):
        assert qflow.choose_device(name) == torch.device(device)
    assert qflow.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("error_type", [RuntimeError, AssertionError])
def test_a_gpu_that_is_counted_and_cannot_be_used(monkeypatch, capsys, error_type):
    reason = "The NVIDIA driver on your system is too old (found version 12040)."
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", Mock(side_effect=error_type(f"{reason}\nPlease update")))
    assert qflow.choose_device("auto") == torch.device("cpu")
    says = f"the GPU cannot be used, so this runs on the CPU: {reason}\n"
    assert capsys.readouterr().out == says
    for name in ("cuda", "cuda:0"):
        with pytest.raises(common.UserError, match="driver on your system is too old") as error:
            qflow.choose_device(name)
        assert str(error.value) == f"--device {name}: cannot be used: {reason}"
