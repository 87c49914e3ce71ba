"""results/minari_data.py on real Minari datasets, collected here from real environments."""

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import common
import fql
import qflow

pytest.importorskip("jax")  # of minari[create]
minari = pytest.importorskip("minari")
gymnasium_robotics = pytest.importorskip("gymnasium_robotics")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "results"))
import evaluate  # noqa: E402
import minari_data  # noqa: E402
import table  # noqa: E402

TINY = """--device cpu --hidden 8 8 --batch-size 16 --flow-steps 2 --eval-episodes 2
    --offline-steps 6 --eval-interval 3 --log-interval 3""".split()
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


def collect(env, dataset_id, episodes=3, eval_env=None, **options):
    """A dataset of episodes with random actions."""
    env = minari.DataCollector(env)
    env.action_space.seed(0)
    for episode in range(episodes):
        env.reset(seed=episode)
        done = False
        while not done:
            _, _, terminated, truncated, _ = env.step(env.action_space.sample())
            done = terminated or truncated
    env.create_dataset(dataset_id, eval_env=eval_env, **options)
    env.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """$MINARI_DATASETS_PATH with a dataset of each kind."""
    folder = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
        make = gymnasium.make
        collect(make("Pendulum-v1", max_episode_steps=12), "Pendulum/random-v0")
        collect(make("InvertedPendulum-v5"), "InvertedPendulum/random-v0", episodes=4)
        maze = make("PointMaze_UMaze-v3", continuing_task=False, max_episode_steps=12)
        other_map = [[1, 1, 1, 1], [1, "g", "r", 1], [1, 1, 1, 1]]
        eval_maze = make("PointMaze_UMaze-v3", maze_map=other_map, max_episode_steps=9)
        collect(maze, "maze/random-v0", eval_env=eval_maze)
        hand = make("AdroitHandPen-v1", max_episode_steps=12)
        collect(hand, "D4RL/pen/human-v9", ref_min_score=-5.0, ref_max_score=15.0, eval_env=hand)
        ant = make("AntMaze_UMaze-v4", max_episode_steps=12)
        mirrored = [[1, 1, 1, 1, 1], [1, 0, 0, "r", 1], [1, 0, 1, 1, 1]]
        mirrored += [[1, 0, 0, "g", 1], [1, 1, 1, 1, 1]]  # as Minari's is
        eval_ant = make("AntMaze_UMaze-v4", maze_map=mirrored, max_episode_steps=12)
        collect(ant, "D4RL/antmaze/umaze-v9", episodes=2, eval_env=eval_ant)
        collect(make("CartPole-v1"), "CartPole/random-v0", episodes=1)
    return folder


@pytest.fixture(autouse=True)
def no_host(folder, monkeypatch):
    """The datasets of `folder`; nothing is downloaded."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """call(dataset, script, *flags): what the bridge prints; its run is tmp_path / "run"."""

    def call(dataset_id, script, *flags):
        monkeypatch.setattr(common.Run, "plot", lambda run, switch: None)
        for module in (fql, qflow):  # which main changes
            monkeypatch.setattr(module, "evaluate", module.evaluate)
            monkeypatch.setattr(module, "SETTINGS", module.SETTINGS)
        flags = ["--start-or-resume", tmp_path / "run", *flags]
        words = ["minari_data.py", dataset_id, "--script", script, "--", *TINY, *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        minari_data.main()
        torch.set_float32_matmul_precision("highest")
        return capsys.readouterr().out

    return call


def convert(dataset_id):
    """The episodes of a dataset, its environment, and the common.Dataset made of them."""
    data = minari_data.load_data(dataset_id)
    env = minari_data.recover_environment(data)
    dataset, description = minari_data.to_dataset(data, env)
    return list(data), env, dataset, description


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("dataset_id", ["Pendulum/random-v0", "InvertedPendulum/random-v0"])
def test_every_transition_is_that_of_the_episodes(dataset_id):
    episodes, env, dataset, description = convert(dataset_id)
    terminates = dataset_id.startswith("Inverted")
    assert all(episode.terminations[-1] == terminates for episode in episodes)
    assert len(dataset) == sum(len(episode) for episode in episodes)
    assert dataset.num_episodes == len(episodes)
    batch = dataset.chunks(torch.arange(len(dataset) - 1), horizon=1, discount=1.0)

    def expected(steps):
        """One array of the steps of all episodes, but the very last one, which no chunk has."""
        return np.concatenate([steps(episode) for episode in episodes])[:-1]

    def equal(found, steps):
        assert torch.allclose(found, torch.as_tensor(expected(steps), dtype=torch.float32))

    equal(batch.observations, lambda episode: episode.observations[:-1])
    equal(batch.next_observations, lambda episode: episode.observations[1:])
    equal(batch.actions, lambda episode: episode.actions / env.action_space.high)  # 2 or 3
    equal(batch.rewards, lambda episode: episode.rewards)
    equal(batch.masks, lambda episode: 1.0 - episode.terminations)
    assert (batch.masks == 0).sum() == terminates * (len(episodes) - 1)
    assert "clipped" not in description


@pytest.mark.parametrize("dataset_id", ["maze/random-v0", "D4RL/antmaze/umaze-v9"])
def test_goals_and_positions_are_observed_in_the_order_of_the_environment(dataset_id):
    episodes, env, dataset, _ = convert(dataset_id)
    first = {name: values[0] for name, values in episodes[0].observations.items()}
    expected = gymnasium.spaces.flatten(env.observation_space, first)
    assert np.allclose(dataset.observations[0], expected)
    for part in ("achieved_goal", "desired_goal", "observation"):
        assert np.isin(first[part].astype(np.float32), dataset.observations[0]).all()
    wrapped = minari_data.make_env(fql.Args(env=dataset_id))
    assert wrapped.observation_space.shape == tuple(dataset.observations.shape[1:])
    raw, _ = env.reset(seed=5)
    obs, _ = wrapped.reset(seed=5)
    assert np.array_equal(obs, gymnasium.spaces.flatten(env.observation_space, raw))


def test_actions_beyond_the_box_are_clipped_and_counted(folder):
    data = minari_data.load_data("Pendulum/random-v0")
    env = gymnasium.make("Pendulum-v1")
    actions = np.concatenate([episode.actions for episode in data])
    env.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))  # the data's are in [-2, 2]
    dataset, description = minari_data.to_dataset(data, env)
    assert f", {(np.abs(actions) > 1).sum()} actions clipped to" in description
    assert dataset.actions.abs().max() == np.float32(1 - 1e-5)


def test_the_antmaze_reward_is_shifted_in_the_data_only():
    episodes, _, dataset, description = convert("D4RL/antmaze/umaze-v9")
    assert (dataset.rewards[dataset.valids > 0] == -1).all()  # random ants reach no goal
    assert not any(episode.rewards.any() for episode in episodes)
    assert description.endswith(minari_data.NOTE)
    _, _, dataset, description = convert("maze/random-v0")
    assert not (dataset.rewards == -1).any() and "D4RL" not in description


# ---------------------------------------------------------------------------------- environment


def test_actions_are_scaled_to_the_environments_box():
    env = minari_data.make_env(fql.Args(env="Pendulum/random-v0"))
    raw = gymnasium.make("Pendulum-v1")
    env.reset(seed=0)
    raw.reset(seed=0)
    for x in (-1, 0.3, 1):
        obs, reward, *_ = env.step(np.array([x], np.float32))
        raw_obs, raw_reward, *_ = raw.step(np.array([2 * x], np.float32))
        assert np.allclose(obs, raw_obs) and np.isclose(reward, raw_reward)


def test_the_environment_is_that_of_evaluation_with_its_time_limit():
    env = minari_data.make_env(fql.Args(env="maze/random-v0"))
    assert env.unwrapped.maze.maze_map[1] == [1, "g", "r", 1]
    assert env.spec.max_episode_steps == 9


def test_the_umaze_is_that_of_the_data():
    _, env, _, description = convert("D4RL/antmaze/umaze-v9")
    of_data = gymnasium.make("AntMaze_UMaze-v4").unwrapped.maze.maze_map

    def walls(maze_map):
        return [[cell == 1 for cell in row] for row in maze_map]

    assert walls(env.unwrapped.maze.maze_map) == walls(of_data)
    assert "Minari's own is its mirror image; scores are not comparable" in description
    (start,), (goal,) = (
        env.unwrapped.maze.unique_reset_locations,
        env.unwrapped.maze.unique_goal_locations,
    )
    assert start[1] < goal[1]  # from below to above


class Renamed(gymnasium.Wrapper):
    """Says is_success, as Fetch does, which does not run with MuJoCo 4."""

    def step(self, action):
        *results, info = self.env.step(action)
        return *results, {"is_success": np.float32(info["success"])}


@pytest.mark.parametrize("wrapper", [gymnasium.Wrapper, Renamed])
def test_a_success_lasts_until_the_end_of_the_episode(wrapper):
    corridor = [[1, 1, 1, 1, 1, 1], [1, "g", 0, 0, "r", 1], [1, 1, 1, 1, 1, 1]]
    env = gymnasium.make("PointMaze_UMaze-v3", maze_map=corridor, max_episode_steps=400)
    env = minari_data.Success(wrapper(env))
    for seed in (0, 1):
        _, _ = env.reset(seed=seed)
        successes, rewards = [], []
        for step in range(400):
            force = -1.0 if step < 150 else 1.0  # to the goal, and away from it
            _, reward, _, truncated, info = env.step(np.array([force, 0.0], np.float32))
            successes.append(info["success"])
            rewards.append(reward)
        assert truncated and not successes[0] and rewards[-1] == 0
        assert successes == list(np.cumsum(rewards) > 0)


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    "dataset_id, script", [("Pendulum/random-v0", "fql.py"), ("maze/random-v0", "qflow.py")]
)
def test_training_offline_and_online(call, tmp_path, dataset_id, script):
    printed = call(dataset_id, script, "--online-steps", 14, "--eval-interval", 20)
    assert "has no tuned settings" in printed and minari_data.NOTE not in printed
    evaluations = rows(tmp_path / "run/eval.csv")
    assert [row["step"] for row in evaluations] == ["6", "20"]
    is_maze = dataset_id.startswith("maze")
    assert {row["length"] for row in evaluations} == {"9.0" if is_maze else "12.0"}
    assert all(row["success"] == "nan" for row in evaluations) != is_maze
    assert "normalized_score" not in evaluations[0]
    assert rows(tmp_path / "run/episodes.csv")[0]["step"] == ("15" if is_maze else "18")
    state = common.read_checkpoint(tmp_path / "run")
    if not is_maze:  # a pendulum never terminates
        assert state["collected"]["masks"][state["collected"]["valids"] > 0].all()


def test_a_hand_has_its_normalized_score_and_a_word_on_it(call, tmp_path, capsys):
    printed = call("D4RL/pen/human-v9", "fql.py")
    assert printed.count(minari_data.NOTE) == 2  # with the dataset, and after the scores
    config = common.read_config(tmp_path / "run")
    assert config["script"] == "fql.py" and minari_data.NOTE in config["dataset"]
    assert (config["args"]["alpha"], config["args"]["q_agg"]) == (10_000, "min")
    for row in rows(tmp_path / "run/eval.csv"):
        score = (float(row["return"]) + 5) / 20
        assert float(row["normalized_score"]) == pytest.approx(score)
        assert row["success"] != "nan"
    assert f"normalized score of the last evaluation: {score:.4g}" in printed
    table.main((tmp_path / "run",))
    printed = capsys.readouterr().out
    assert printed.splitlines()[2].startswith("| D4RL/pen/human-v9 |  | FQL | ")
    assert printed.splitlines()[-1] == minari_data.NOTE


def test_an_ant_learns_from_the_shifted_reward_and_is_scored_by_its_own(call, tmp_path):
    flags = ["--online-steps", 13, "--eval-interval", 20]
    call("D4RL/antmaze/umaze-v9", "qflow.py", *flags)
    collected = common.read_checkpoint(tmp_path / "run")["collected"]
    assert (collected["rewards"][collected["valids"] > 0] == -1).all()
    assert {row["return"] for row in rows(tmp_path / "run/eval.csv")} == {"0.0"}
    assert common.read_config(tmp_path / "run")["args"]["time_dim"] == 16


def test_the_same_command_resumes(call, tmp_path):
    call("D4RL/pen/human-v9", "qflow.py", "--offline-steps", 3)
    printed = call("D4RL/pen/human-v9", "qflow.py", "--offline-steps", 6)
    assert "changed: offline_steps 3 -> 6" in printed
    (tmp_path / "run").rename(tmp_path / "resumed")
    call("D4RL/pen/human-v9", "qflow.py", "--offline-steps", 6)
    expected, found = (common.read_checkpoint(tmp_path / name) for name in ("run", "resumed"))
    for name, weights in expected["nets"].items():
        assert torch.equal(weights, found["nets"][name]), name
    text = (tmp_path / "run/eval.csv").read_text()
    assert text == (tmp_path / "resumed/eval.csv").read_text()
    assert text.startswith("step,episodes,success,return,length,normalized_score\n3,")


def test_evaluating_a_run(call, tmp_path, monkeypatch, capsys):
    call("maze/random-v0", "fql.py", "--eval-interval", 6)
    words = ["evaluate.py", str(tmp_path / "run"), "--episodes", "3", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    evaluate.main()
    printed = capsys.readouterr().out
    assert printed.startswith("36 transitions, 3 episodes of Minari\nsuccess ")
    assert "\nlength 9 (95%: 9 to 9)" in printed
    table.main((tmp_path / "run",))
    assert minari_data.NOTE not in capsys.readouterr().out


def test_evaluating_a_run_with_reference_returns(call, tmp_path, monkeypatch, capsys):
    script_evaluate = fql.evaluate
    call("D4RL/pen/human-v9", "fql.py", "--eval-interval", 6)
    monkeypatch.setattr(fql, "evaluate", script_evaluate)  # as in another process
    words = ["evaluate.py", str(tmp_path / "run"), "--episodes", "3", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", words)
    evaluate.main()
    printed = capsys.readouterr().out
    result, score = (
        float(re.search(rf"^{name} (\S+) \(95%", printed, re.M)[1])
        for name in ("return", "normalized_score")
    )
    assert score == pytest.approx((result + 5) / 20, rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_as_a_process(tmp_path):
    tool = ROOT / "results/minari_data.py"
    command = [sys.executable, tool, "Pendulum/random-v0", "--script", "fql.py", "--", *TINY]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert "finished; mean of the last " in result.stdout, result.stderr
    assert len(list(tmp_path.glob("runs/Pendulum-random-v0__fql__0__*/curve.png"))) == 1
    command[2] = "Pendulum/random-v1"
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("minari_data.py: error: Pendulum/random-v1: not found in")


# ------------------------------------------------------------------------------------- settings


def defaults(script, dataset_id, online=False):
    """The settings that the script starts with."""
    args = {}
    for names, settings in minari_data.settings(script, online).items():
        if re.match(names, dataset_id):
            args.update(settings)
    return args


def test_the_settings_of_d4rls_tasks():
    mazes = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse".split()
    for maze, alpha, lam in zip(mazes, (10, 10, 10, 10, 3, 3), (0.2, 0.2, 0.5, 0.5, 0.2, 0.2)):
        args = defaults("fql.py", f"D4RL/antmaze/{maze}-v1")
        expected = dict(alpha=alpha, q_agg="mean", discount=0.99, offline_steps=500_000)
        assert args == expected
        online = defaults("fql.py", f"D4RL/antmaze/{maze}-v1", online=True)
        assert online == {**expected, "offline_steps": 10**6, "online_steps": 10**6}
        args = defaults("qflow.py", f"D4RL/antmaze/{maze}-v1")
        assert (args["lam"], args["time_dim"], args["q_agg"]) == (lam, 16, "mean")
        assert args["hidden"] == (256,) * 4
        online = defaults("qflow.py", f"D4RL/antmaze/{maze}-v1", online=True)
        assert online == {**args, "online_steps": 200_000}
    alphas = {
        "pen": (10_000, 10_000, 3_000),
        "door": (30_000, 30_000, 30_000),
        "hammer": (30_000, 10_000, 30_000),
        "relocate": (10_000, 30_000, 30_000),
    }
    for hand, expected in alphas.items():
        for kind, alpha in zip(("human", "cloned", "expert"), expected):
            args = defaults("fql.py", f"D4RL/{hand}/{kind}-v2")
            assert (args["alpha"], args["q_agg"], args["offline_steps"]) == (alpha, "min", 500_000)
        online = defaults("fql.py", f"D4RL/{hand}/cloned-v2", online=True)
        assert online["alpha"] == (10_000 if hand == "relocate" else 1_000)
        assert (online["offline_steps"], online["online_steps"]) == (10**6, 10**6)
    for script, module in (("fql.py", fql), ("qflow.py", qflow)):
        for dataset_id in ("D4RL/antmaze/umaze-v1", "D4RL/pen/human-v2"):
            module.Args(**defaults(script, dataset_id, online=True))  # names of its flags


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "dataset_id, message",
    [
        ("D4RL/pen/human", "D4RL/pen/human: an id ends in a version, such as -v2"),
        ("D4RL/pen/robot-v2", "D4RL/pen/robot-v2: not found in .*, and the download failed: "),
        ("no id-v0", "no id-v0: not found in .*, and the download failed: Malformed dataset ID"),
        ("CartPole/random-v0", r"CartPole/random-v0: requires actions in a box, has Discrete\(2\)"),
    ],
)
def test_datasets_that_cannot_be_used(call, dataset_id, message):
    with pytest.raises(common.UserError, match=f"^{message}") as error:
        call(dataset_id, "fql.py")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(entry_point="no_such_package:Env"), "cannot be made: No module named 'no_such"),
        (dict(kwargs=dict(no_such=1)), "cannot be made: .*no_such"),
        (dict(max_episode_steps=None), "environment has no time limit"),
        (
            dict(entry_point="gymnasium_robotics.envs.fetch.reach:MujocoFetchReachEnv", kwargs={}),
            "cannot be made: .*; if MuJoCo is too new for it: pip install mujoco==3",
        ),
        (
            dict(entry_point="gymnasium_robotics.envs.maze.point_maze:PointMazeEnv", kwargs={}),
            "not a usable dataset: ",  # the data have Pendulum's observations
        ),
        (None, "cannot be made: Environment cannot be recovered when env_spec is None"),
    ],
)
def test_environments_that_cannot_be_used(call, folder, changes, message):
    path = folder / "Pendulum/random-v0/data/metadata.json"
    text = path.read_text()
    metadata = json.loads(text)
    spec = json.loads(metadata.pop("env_spec"))
    if changes is not None:
        metadata["env_spec"] = json.dumps({**spec, **changes})
    try:
        path.write_text(json.dumps(metadata))
        with pytest.raises(common.UserError, match=f"^Pendulum/random-v0: .*{message}") as error:
            call("Pendulum/random-v0", "fql.py")
    finally:
        path.write_text(text)
    assert "\n" not in str(error.value)


def test_an_array_with_nan(call, folder):
    import h5py

    path = folder / "Pendulum/random-v0/data/main_data.hdf5"
    with h5py.File(path, "a") as file:
        reward = file["episode_1/rewards"][3]
        file["episode_1/rewards"][3] = math.nan
    try:
        message = "^Pendulum/random-v0: not a usable dataset: rewards has NaN"
        with pytest.raises(common.UserError, match=message):
            call("Pendulum/random-v0", "fql.py")
    finally:
        with h5py.File(path, "a") as file:
            file["episode_1/rewards"][3] = reward


def test_flags_for_ogbench_and_a_missing_package(call, monkeypatch):
    with pytest.raises(common.UserError, match="^--task and --dataset are for OGBench"):
        call("Pendulum/random-v0", "fql.py", "--task", 2)
    monkeypatch.setitem(sys.modules, "minari", None)  # what Python does where it is missing
    with pytest.raises(common.UserError, match="^needs Minari: pip install"):
        call("Pendulum/random-v0", "fql.py")
