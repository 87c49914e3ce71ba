"""Names, datasets, sampling, collection, run folders, checks before training."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import gymnasium
import numpy as np
import ogbench
import pytest
import torch
from filelock import FileLock

import common

NAME = "pointmaze-medium-navigate-v0"
TASK, DATASET, ENV_ID = common.resolve_task(NAME)
DATASETS = (  # that OGBench publishes for environments on states
    "{point,ant}maze-{medium,large,giant,teleport}-{navigate,stitch}",
    "humanoidmaze-{medium,large,giant}-{navigate,stitch}",
    "antmaze-{medium,large,teleport}-explore",
    "antsoccer-{arena,medium}-{navigate,stitch}",
    "cube-{single,double,triple,quadruple}-{play,noisy}",
    "scene-{play,noisy}",
    "puzzle-{3x3,4x4,4x5,4x6}-{play,noisy}",
)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / f"{NAME}.npz"
    common.collect_pointmaze(NAME, path, num_episodes=3, workers=2)
    return path


# ---------------------------------------------------------------------------------------- names


def test_every_name_of_every_dataset_resolves_to_an_environment():
    stems = []
    for pattern in DATASETS:
        alternatives = [part.split(",") for part in re.split("[{}]", pattern)]
        stems += ["".join(choice) for choice in product(*alternatives)]
    assert len(set(stems)) == 47
    for stem in stems:
        name = f"{stem}-v0"
        for env, task, suffix in [
            (name, 0, "singletask"),
            (f"{stem}-singletask-v0", 0, "singletask"),
            (name, 3, "singletask-task3"),
            (f"{stem}-singletask-v0", 5, "singletask-task5"),
            (f"{stem}-singletask-task2-v0", 0, "singletask-task2"),
            (f"{stem}-singletask-task2-v0", 2, "singletask-task2"),
        ]:
            full, dataset, env_id = common.resolve_task(env, task)
            assert (full, dataset) == (f"{stem}-{suffix}-v0", name)
            spec = gymnasium.spec(env_id)  # raises if there is no such environment
            number = suffix.removeprefix("singletask").removeprefix("-task")
            assert spec.kwargs["reward_task_id"] == int(number or 0)
            assert spec.kwargs.get("ob_type") != "pixels"


@pytest.mark.parametrize(
    "env, task, words",
    [
        ("antmaze-gigant-navigate-v0", 0, "closest: antmaze-giant-navigate-singletask-"),
        ("antmaze-giant-explore-v0", 0, "closest"),
        ("visual-antmaze-giant-explore-v0", 0, "visual-antmaze-large-explore-singletask-"),
        ("antmaze-giant-singletask-v0", 0, "antmaze-giant"),
        ("powderworld-easy-play-v0", 0, "powderworld-easy-play-v0: no such"),
        ("", 0, "no such"),
        ("cube-double-play-singletask-task6-v0", 0, "task6"),
        ("cube-double-play-singletask-task0-v0", 0, "task0"),
        ("cube-double-play-v0", 7, "--task 7"),
        ("cube-double-play-v0", -1, "--task -1"),
        ("cube-double-play-singletask-task2-v0", 3, "already has a task"),
    ],
)
def test_wrong_names_are_one_line_with_the_way_out(env, task, words):
    with pytest.raises(common.UserError, match=re.escape(words)) as error:
        common.resolve_task(env, task)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- sampling


def random_transitions(rng, lengths=(1, 4, 2, 9, 1)):
    """Arrays of 17 transitions in episodes of these lengths, each with its own next observation."""
    n = sum(lengths)
    ends = np.cumsum(lengths) - 1
    terminals = np.zeros(n)
    terminals[ends] = 1
    observations = rng.normal(size=(n, 3)).astype(np.float32)
    next_observations = np.concatenate([observations[1:], observations[:1]])
    next_observations[ends] = rng.normal(size=(len(ends), 3))
    return dict(
        observations=observations,
        actions=rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        next_observations=next_observations,
        rewards=rng.normal(size=n),
        masks=(rng.random(n) < 0.8).astype(np.float32),
        terminals=terminals,
    )


def compact(observations, actions, next_observations, rewards, masks, terminals):
    """In OGBench's compact layout: one more row per episode, for its last observation."""
    ends = np.flatnonzero(terminals) + 1
    rows = dict(observations=observations, actions=actions, rewards=rewards, masks=masks)
    rows = {name: np.insert(array, ends, 0, axis=0) for name, array in rows.items()}
    rows["valids"] = np.insert(np.ones(len(actions)), ends, 0)
    rows["observations"][rows["valids"] == 0] = next_observations[ends - 1]
    return rows


def small_dataset():
    """A Dataset of 17 transitions in 5 episodes."""
    return common.Dataset(**compact(**random_transitions(np.random.default_rng(0))))


def start_counts(dataset, batch):
    """How often a batch begins with each transition of the dataset: (N,)."""
    first_rows = dataset.observations[dataset.rows[: len(dataset)]]
    is_start = (batch.observations[:, None] == first_rows).all(-1)
    assert (is_start.sum(1) == 1).all()
    return is_start.sum(0)


def assert_chunks_are_those_of(data, dataset, horizon):
    """All chunks of the dataset against brute force on a list of transitions."""
    assert len(dataset) == dataset.count.item() == len(data["actions"])
    num_starts = len(data["actions"]) - horizon + 1
    discount = 0.9
    batch = dataset.chunks(torch.arange(num_starts), horizon, discount)
    for i in range(num_starts):
        reward = 0.0
        mask = 1.0
        valid = []
        alive = True
        for j in range(horizon):
            valid.append(float(alive))
            if alive:
                reward += discount**j * data["rewards"][i + j]
                mask *= data["masks"][i + j]
                last = i + j
                alive = data["terminals"][i + j] == 0
        assert batch.valid[i].tolist() == valid
        assert batch.rewards[i].item() == pytest.approx(reward, rel=1e-5, abs=1e-6)
        assert batch.masks[i].item() == mask
        assert np.array_equal(batch.next_observations[i], data["next_observations"][last])
        assert np.array_equal(batch.observations[i], data["observations"][i])
        assert np.array_equal(batch.actions[i], data["actions"][i : i + horizon].ravel())


@pytest.mark.parametrize("horizon", [1, 2, 3, 7])
def test_chunks_against_brute_force(horizon):
    for seed in range(20):
        data = random_transitions(np.random.default_rng(seed))
        assert_chunks_are_those_of(data, common.Dataset(**compact(**data)), horizon)


def test_sample_draws_all_starts_equally_and_nothing_else():
    dataset = small_dataset()
    generator = torch.Generator().manual_seed(0)
    counts = start_counts(dataset, dataset.sample(30_000, 3, 0.9, generator))
    assert counts[15:].sum() == 0  # 17 transitions, chunks of 3: the last start is the 15th
    assert (counts[:15] - 2000).abs().max() < 5 * 2000**0.5


def test_sample_draws_equally_from_more_starts_than_float32_can_tell_apart(monkeypatch):
    dataset = small_dataset()
    monkeypatch.setattr(dataset, "chunks", lambda starts, horizon, discount: starts)
    dataset.count.fill_(2**28)
    starts = dataset.sample(16_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(starts % 16)  # a float32 draw times 2^28 is a multiple of 16
    assert len(counts) == 16 and (counts - 1000).abs().max() < 5 * 1000**0.5


def episode(rng, num_steps, terminated):
    """(observation, action, reward, mask, next observation, done) of each step of an episode."""
    observations = rng.normal(size=(num_steps + 1, 3)).astype(np.float32)
    for i in range(num_steps):
        done = i == num_steps - 1
        mask = 0.0 if done and terminated else 1.0
        action = rng.uniform(-1, 1, 2).astype(np.float32)
        yield observations[i], action, rng.normal(), mask, observations[i + 1], done


def with_transitions(data, steps):
    """The list of transitions `data` and these behind it; the last step ends its episode."""
    names = ["observations", "actions", "rewards", "masks", "next_observations", "terminals"]
    columns = dict(zip(names, zip(*steps), strict=True))
    columns["terminals"] = [*columns["terminals"][:-1], True]
    return {name: np.concatenate([data[name], columns[name]]) for name in names}


@pytest.mark.parametrize("horizon", [1, 5])
def test_append_against_brute_force(horizon):
    rng = np.random.default_rng(0)
    data = random_transitions(rng)
    dataset = common.Dataset(**compact(**data))
    num_rows, num_episodes = len(dataset.rewards), dataset.num_episodes
    steps = [
        *episode(rng, 7, terminated=True),
        *episode(rng, 6, terminated=False),  # time is up
        *episode(rng, 1, terminated=True),
        *episode(rng, 8, terminated=False),
    ][:-2]  # the last one is in progress
    dataset.reserve(len(steps))
    for i, step in enumerate(steps):
        dataset.append(*step)
        assert_chunks_are_those_of(with_transitions(data, steps[: i + 1]), dataset, horizon)
    assert dataset.num_episodes == num_episodes + 4
    assert dataset.num_rows == num_rows + len(steps) + 4  # a row per observation
    with pytest.raises(ValueError, match="no room for transition 38"):
        dataset.append(*steps[0])


@pytest.mark.parametrize("horizon", [1, 5])
def test_appended_steps_are_sampled_without_a_number_of_python(horizon):
    rng = np.random.default_rng(1)
    dataset = small_dataset()
    dataset.reserve(9)
    tensors = [getattr(dataset, name) for name in (*dataset.COLUMNS, "rows", "count")]
    generator = torch.Generator().manual_seed(0)
    for step in (*episode(rng, 4, terminated=True), *episode(rng, 5, terminated=False)):
        dataset.append(*step)
        frozen = {name: x for name, x in vars(dataset).items() if type(x) is int}
        vars(dataset).update({name: object() for name in frozen})  # nothing can be done with it
        batch = dataset.sample(4000, horizon, 0.9, generator)
        vars(dataset).update(frozen)
        counts = start_counts(dataset, batch)
        num_starts = len(dataset) - horizon + 1
        assert (counts[:num_starts] > 0).all() and counts[num_starts:].sum() == 0
        if horizon == 1:
            last = torch.as_tensor(step[4])
            assert (batch.next_observations == last).all(1).any()
    assert frozen.keys() >= {"num_transitions", "num_rows"}
    for tensor, name in zip(tensors, (*dataset.COLUMNS, "rows", "count")):
        assert getattr(dataset, name) is tensor  # a captured graph reads from it


def test_what_was_appended_can_be_saved_and_appended_elsewhere():
    rng = np.random.default_rng(0)
    data = random_transitions(rng)
    dataset, other = (common.Dataset(**compact(**data)) for _ in range(2))
    assert all(x.numel() == 0 for x in dataset.collected().values())
    dataset.append_collected(dataset.collected())
    assert_chunks_are_those_of(data, dataset, 5)
    steps = [*episode(rng, 3, terminated=True), *episode(rng, 5, terminated=False)][:-2]
    dataset.reserve(100)
    for step in steps:
        dataset.append(*step)
    collected = dataset.collected()
    assert [len(x) for x in collected.values()] == [8] * 5  # 6 transitions of 2 episodes
    assert collected["observations"].untyped_storage().nbytes() == 8 * 3 * 4  # not all of the data

    other.append_collected(collected)
    other.reserve(2)
    more = list(episode(rng, 2, terminated=True))
    other.append(*more[0])
    steps[-1] = (*steps[-1][:-1], True)  # the episode that was in progress ends there
    for horizon in (1, 5):
        expected = with_transitions(data, [*steps, more[0]])
        assert_chunks_are_those_of(expected, other, horizon)
    assert other.num_episodes == dataset.num_episodes + 1
    other.append(*more[1])
    again = other.collected()
    assert len(again["valids"]) == 8 + 3
    assert all(torch.equal(again[name][:8], x) for name, x in collected.items())


def test_a_package_without_metadata_has_no_version():
    assert common.installed_version("numpy") == np.__version__
    assert common.installed_version("no_such_package") is None


def test_more_online_steps_than_memory_is_one_line():
    dataset = small_dataset()
    dataset.reserve(0)
    assert len(dataset.rows) == len(dataset)
    with pytest.raises(common.UserError, match="no memory for 1000000000000000 online steps"):
        dataset.reserve(10**15)


def test_a_million_antmaze_transitions_fit_in_a_fifth_of_a_gigabyte():
    n, length = 100_000, 1000
    observations = np.zeros((n, 29), np.float32)
    actions = np.zeros((n, 8), np.float32)
    valids = (np.arange(n) % length != length - 1).astype(np.float32)
    dataset = common.Dataset(observations, actions, valids, valids, valids)
    size = sum(x.nbytes for x in vars(dataset).values() if isinstance(x, torch.Tensor))
    assert size * 10 < 0.2e9
    assert len(dataset) + dataset.num_episodes == n
    assert dataset.num_episodes == 100


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(rewards=np.zeros(3)), "rewards has the wrong length"),
        (dict(observations=np.zeros((21, 3))), "observations has the wrong length"),
        (dict(masks=np.full(22, np.nan)), "masks has NaN, infinity"),
        (dict(rewards=np.zeros((22, 1))), "rewards has 2 dimensions, must have 1"),
        (dict(actions=np.zeros((22, 2, 1))), "actions has 3 dimensions, must have 2"),
        (dict(actions=np.full((22, 2), 1.5)), "actions beyond [-1, 1]"),
        (dict(valids=np.ones(22)), "no end of an episode in the last row"),
        (dict(valids=np.zeros(22)), "no transitions"),
        (dict(valids=np.zeros((0,))), "wrong length"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, words):
    arrays = compact(**random_transitions(np.random.default_rng(0)))
    with pytest.raises(ValueError, match=re.escape(words)):
        common.Dataset(**{**arrays, **change})


# ---------------------------------------------------------------------------------------- files


def test_collected_file_follows_the_protocol_whatever_the_workers(collected, tmp_path):
    other = tmp_path / "one_worker.npz"
    common.collect_pointmaze(NAME, other, num_episodes=3, workers=1)
    with np.load(collected) as a, np.load(other) as b:
        assert set(a) == {"observations", "actions", "terminals", "qpos", "qvel", "source"}
        assert all(np.array_equal(a[name], b[name]) for name in a)
        assert "seed 0" in str(a["source"]) and "not the official file" in str(a["source"])
        assert a["observations"].shape == (3003, 2)
        assert np.flatnonzero(a["terminals"]).tolist() == [1000, 2001, 3002]
        assert not np.array_equal(a["observations"][0], a["observations"][1001])
        assert np.abs(a["actions"]).max() == 1
        assert np.array_equal(a["observations"], a["qpos"])  # both of the state before the action
        moved = np.linalg.norm(np.diff(a["observations"][:1001], axis=0), axis=1)
        assert moved.mean() > 0.1  # of 0.2 per step at full speed
        changes = [np.diff(actions, axis=0).std() for actions in np.split(a["actions"], 3)]
        assert 0.55 < np.median(changes) < 0.65  # noise of 0.4 and 0.6 makes 0.51 and 0.70
    assert list(tmp_path.iterdir()) == [other]  # no temporary file is left


def test_the_goals_of_a_maze():
    maze = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 1, 1, 0, 1], [1] * 5])
    cells, goals = common.goal_cells(maze)
    assert cells.tolist() == [[1, 1], [1, 2], [1, 3], [2, 3], [3, 3]]
    assert goals.tolist() == [[1, 1], [1, 3], [3, 3]]  # ends and corners, no straight hallways


@pytest.mark.slow
def test_a_giant_maze_has_longer_episodes(tmp_path):
    path = tmp_path / "giant.npz"
    common.collect_pointmaze("pointmaze-giant-navigate-v0", path, num_episodes=1, workers=1)
    with np.load(path) as file:
        assert file["observations"].shape == (2001, 2)


def test_loading_agrees_with_ogbench(collected):
    with np.load(collected) as file:
        np.savez(collected.with_name(f"{NAME}-val.npz"), **file)  # which OGBench insists on
    env, theirs, _ = ogbench.make_env_and_datasets(
        "pointmaze-medium-navigate-singletask-task2-v0", dataset_path=str(collected)
    )
    env.close()
    dataset, source = common.load_dataset(collected, common.resolve_task(NAME, 2)[2], "cpu")
    assert "not the official file" in source
    assert len(dataset) == 3000 and dataset.num_episodes == 3
    batch = dataset.chunks(torch.arange(3000), 1, 0.99)
    for name in ("observations", "next_observations", "rewards", "masks"):
        assert np.array_equal(getattr(batch, name), theirs[name]), name
    assert np.allclose(batch.actions, theirs["actions"], atol=1.1e-5)
    assert batch.actions.abs().max() < 1 and theirs["masks"].min() == 0


def load_error(path):
    """The message of the UserError that loading this file raises."""
    with pytest.raises(common.UserError) as error:
        common.load_dataset(path, ENV_ID, "cpu")
    message = str(error.value)
    assert message.startswith(f"{path}: not a usable dataset: ") and "\n" not in message
    return message


def one_nan(array):
    array = array.copy()
    array[7] = np.nan
    return array


def as_words(array):
    return (array.astype(str)[:, :1] + "x").repeat(2, axis=1)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("actions", None, "has no actions, only observations, qpos, qvel, source, terminals"),
        ("terminals", None, "has no terminals, only actions, observations, qpos, qvel, source"),
        ("actions", lambda a: 100 * a, "must be in [-1, 1]"),
        ("actions", lambda a: a.astype(np.int64), "actions are int64, must be floating point"),
        ("qpos", None, "has no 'qpos'"),
        ("actions", lambda a: a[:-5], "actions has the wrong length"),
        ("qpos", lambda a: a[:-5], "qpos has the wrong length"),
        ("terminals", np.zeros_like, "no end of an episode in the last row"),
        ("terminals", np.ones_like, ""),
        ("observations", np.ravel, "has the wrong length"),
        (
            "observations",
            lambda a: a[:, 0],
            "sizes (2,); pointmaze-medium-singletask-v0 has (2, 2)",
        ),
        ("observations", lambda a: np.tile(a, (1, 2)), "sizes (4, 2); pointmaze-medium-singleta"),
        ("observations", one_nan, "observations has NaN"),
        ("qpos", one_nan, "qpos has NaN"),
        ("qpos", lambda a: a.astype(complex), "no real numbers"),
        ("actions", lambda a: a.astype(object), "bject"),
        ("actions", as_words, "must be floating point"),
    ],
)
def test_an_array_that_is_wrong_is_named(collected, tmp_path, name, change, words):
    with np.load(collected) as file:
        arrays = dict(file)
    old = arrays.pop(name)
    if change:
        arrays[name] = change(old)
    np.savez(tmp_path / "wrong.npz", **arrays)
    assert words in load_error(tmp_path / "wrong.npz")


@pytest.mark.parametrize("name", ["next_observations", "timeouts"])
def test_another_layout_is_refused(collected, tmp_path, name):
    with np.load(collected) as file:
        arrays = {**file, name: file["observations"]}
    np.savez(tmp_path / "other.npz", **arrays)
    words = f"has {name}, unlike OGBench's compact layout: an episode must have one more row"
    assert words in load_error(tmp_path / "other.npz")


@pytest.mark.parametrize("rows, words", [(-1, "no end of an episode in the last row"), (0, "")])
def test_a_file_without_its_last_row_and_one_without_any(collected, tmp_path, rows, words):
    with np.load(collected) as file:
        arrays = {name: array[:rows] if array.ndim else array for name, array in file.items()}
    np.savez(tmp_path / "cut.npz", **arrays)
    assert words in load_error(tmp_path / "cut.npz")


def test_a_file_with_rewards_keeps_them(collected, tmp_path):
    with np.load(collected) as file:
        arrays = {name: file[name] for name in ("observations", "actions", "terminals")}
    path = tmp_path / "online.npz"
    n = len(arrays["terminals"])
    rewards = np.arange(n, dtype=np.float32)
    common.write_dataset(path, "collected online", dict(arrays, rewards=rewards, masks=rewards > 5))
    dataset, source = common.load_dataset(path, ENV_ID, "cpu")
    assert source == "collected online" and dataset.rewards.tolist() == rewards.tolist()
    assert dataset.masks.tolist() == (rewards > 5).tolist()
    common.write_dataset(path, "collected online", dict(arrays, rewards=rewards))
    with pytest.raises(common.UserError, match=f"{path}: not a usable dataset: has no 'masks'"):
        common.load_dataset(path, ENV_ID, "cpu")
    with np.load(collected) as file:
        arrays["qpos"] = file["qpos"]  # where there are positions, they count
    common.write_dataset(path, "", dict(arrays, rewards=rewards))
    assert common.load_dataset(path, ENV_ID, "cpu")[0].rewards.max() <= 0
    arrays.pop("qpos")
    common.write_dataset(path, "", dict(arrays, rewards=rewards[1:], masks=rewards))
    with pytest.raises(common.UserError, match="rewards has the wrong length"):
        common.load_dataset(path, ENV_ID, "cpu")


def test_actions_out_of_range_are_refused_with_their_range(collected, tmp_path):
    with np.load(collected) as file:
        arrays = dict(file)
    actions = arrays["actions"]
    path = tmp_path / "own.npz"
    low, high = 2.5 * actions.min(), 2.5 * actions.max()
    for factor, words in (
        (2.5, f"actions in [{low:.4g}, {high:.4g}], must be in [-1, 1]"),
        (1.001, "actions in [-1.001, 1.001], must be in [-1, 1]"),
    ):
        np.savez(path, **{**arrays, "actions": factor * actions})
        assert words in load_error(path)
    one = np.clip(actions, -1, 0.5)
    one[7, 1] = -1.5
    np.savez(path, **{**arrays, "actions": one})
    assert "actions in [-1.5, 0.5], must be in [-1, 1]" in load_error(path)
    np.savez(path, **{**arrays, "actions": 1.00001 * actions})  # rounding
    dataset, _ = common.load_dataset(path, ENV_ID, "cpu")
    assert dataset.actions.abs().max() == pytest.approx(1 - 1e-5, abs=1e-7)


def solved_and_unsolved_states(env):
    """Positions and button states of 60 states, in some of which the whole task is solved."""
    inner = env.unwrapped
    rng = np.random.default_rng(0)
    all_qpos = np.tile(inner._data.qpos, (60, 1))
    all_button_states = rng.integers(0, 2, (60, len(inner._target_button_states)))
    all_button_states[20:] = inner._target_button_states
    if "scene" in env.spec.id:  # the cube, then the buttons, the drawer and the window
        moved = rng.integers(0, 2, (60, 1)) * 0.1
        moved[40:] = 0
        all_qpos[:, 14:17] = inner._data.mocap_pos[0] + moved
        all_qpos[:, -2] = inner._target_drawer_pos
        all_qpos[:, -1] = inner._target_window_pos
    return all_qpos, all_button_states


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scene-play-v0", "puzzle-3x3-play-v0"])
def test_sparse_rewards_are_the_same_in_a_file_and_in_the_environment(name, tmp_path):
    *_, env_id = common.resolve_task(name)
    path = tmp_path / "data.npz"
    with gymnasium.make(env_id) as env:
        env.reset(seed=0)
        sparse_env = gymnasium.wrappers.TransformReward(env, common.sparse_reward)
        all_qpos, all_button_states = solved_and_unsolved_states(env)
        in_env = []
        for qpos, button_states in zip(all_qpos, all_button_states):
            env.unwrapped.set_state(qpos, 0 * env.unwrapped._data.qvel, button_states)
            _, reward, *_ = sparse_env.step(np.zeros(5))  # the reward of the state before the step
            in_env.append(reward)
        observations = np.zeros((60, *env.observation_space.shape))
    data = dict(observations=observations, actions=np.zeros((60, 5)), terminals=np.arange(60) == 59)
    common.write_dataset(path, "here", dict(data, qpos=all_qpos, button_states=all_button_states))
    dense, _ = common.load_dataset(path, env_id, "cpu")
    sparse, _ = common.load_dataset(path, env_id, "cpu", sparse=True)
    assert sparse.rewards.tolist() == in_env
    solved = sparse.masks == 0
    assert torch.equal(sparse.rewards, solved.float() - 1) and 19 < solved.sum() < 60
    assert torch.equal(sparse.masks, dense.masks)
    assert len(dense.rewards.unique()) >= 3 and torch.equal(dense.rewards == 0, solved)


def test_a_file_with_rewards_can_be_made_sparse(collected, tmp_path):
    with np.load(collected) as file:
        arrays = {name: file[name] for name in ("observations", "actions", "terminals")}
    path = tmp_path / "online.npz"
    unsolved = np.arange(len(arrays["terminals"])) % 4
    masks = unsolved > 0
    for rewards in (-unsolved, 1 - masks, -1 * masks):  # per part, 1 when solved, sparse already
        content = dict(arrays, rewards=rewards.astype(np.float32), masks=masks)
        common.write_dataset(path, "collected online", content)
        dataset, _ = common.load_dataset(path, ENV_ID, "cpu", sparse=True)
        assert dataset.rewards[:8].tolist() == [0, -1, -1, -1] * 2
        assert torch.equal(dataset.masks, -dataset.rewards)


@pytest.mark.parametrize(
    "source",
    [
        "data/pointmaze-large-navigate-v0.npz",
        "pointmaze-large-stitch-v0.npz",
        "https://host/antmaze-medium-navigate-v0.npz?download=true",
    ],
)
def test_the_file_of_another_environment_is_refused(source):
    message = f"^--dataset {re.escape(source)}: is for another environment, not for {NAME}"
    with pytest.raises(common.UserError, match=message):
        common.get_dataset(NAME, ENV_ID, source)


@pytest.mark.parametrize(
    "name",
    [
        "pointmaze-medium-stitch-v0",
        "pointmaze-medium-navigate",
        "pointmaze-medium-navigate-singletask-task2-v0",
        "data",
    ],
)
def test_the_file_of_another_kind_or_task_is_not_refused(collected, tmp_path, name):
    path = tmp_path / f"{name}.npz"
    path.write_bytes(collected.read_bytes())
    dataset, _ = common.get_dataset(NAME, ENV_ID, str(path))
    assert len(dataset) > 0


def test_a_damaged_file_is_refused(collected, tmp_path):
    path = tmp_path / "data.npz"
    whole = collected.read_bytes()
    path.write_bytes(whole[:2000] + bytes(400) + whole[2400:])
    load_error(path)
    with np.load(collected) as file:
        np.savez(path, **file)
    whole = path.read_bytes()
    somewhere = whole.index(b"actions.npy") + 2000  # among its numbers, which are not compressed
    path.write_bytes(whole[:somewhere] + b"?" + whole[somewhere + 1 :])
    assert "Bad CRC-32 for file 'actions.npy'" in load_error(path)


def test_a_mistake_of_ours_is_not_called_a_damaged_file(collected, monkeypatch):
    mistake = NameError("name 'observation' is unknown")
    make = Mock(side_effect=mistake, COLUMNS=common.Dataset.COLUMNS)
    monkeypatch.setattr(common, "Dataset", make)
    with pytest.raises(NameError, match="observation"):
        common.get_dataset(NAME, ENV_ID, str(collected), "cuda:1", frames_on_host=True)
    options = make.call_args.kwargs
    assert (options["device"], options["frames_on_host"]) == ("cuda:1", True)


def test_data_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("OGBENCH_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.data_folder() == tmp_path / ".ogbench/data"
    monkeypatch.setenv("OGBENCH_DATA", "~/large disk")
    assert common.data_folder() == tmp_path / "large disk"
    monkeypatch.setenv("OGBENCH_DATA", "/scratch/data")
    assert common.data_folder() == Path("/scratch/data")


def test_a_missing_home_directory_is_one_line(monkeypatch):
    monkeypatch.delenv("OGBENCH_DATA", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", Mock(side_effect=KeyError))  # as in some containers
    with pytest.raises(common.UserError, match="^there is no home directory; set OGBENCH_DATA"):
        common.get_dataset(NAME, ENV_ID)
    monkeypatch.setenv("OGBENCH_DATA", "/scratch/data")
    assert common.data_folder() == Path("/scratch/data")


def test_sources_are_tried_in_order(collected, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    monkeypatch.setenv("OGBENCH_DATA", str(folder))
    given = tmp_path / "mine.npz"
    with np.load(collected) as file:
        arrays = {name: array for name, array in file.items() if name != "source"}
    counts = "3000 transitions, 3 episodes"

    def write_collected(name, path):
        assert name == NAME
        path.write_bytes(collected.read_bytes())

    collect = Mock(side_effect=write_collected)
    monkeypatch.setattr(common, "collect_pointmaze", collect)
    download = Mock(side_effect=common.UserError("no network"))
    monkeypatch.setattr(common, "download", download)
    for _ in range(2):  # collected once, used twice
        dataset, description = common.get_dataset(NAME, ENV_ID)
        assert len(dataset) == 3000
        assert description.startswith(f"{counts}, collected by OGBench's protocol")
    assert collect.call_count == 1
    assert (folder / "collected" / f"{NAME}.npz").exists()

    official = f"{counts}, no source stated, as in OGBench files"
    np.savez(folder / f"{NAME}.npz", **arrays)
    assert common.get_dataset(NAME, ENV_ID)[1] == official
    np.savez(given, **arrays)
    assert common.get_dataset(NAME, ENV_ID, str(given))[1] == official
    with pytest.raises(common.UserError, match="absent.npz: .*No such file"):
        common.get_dataset(NAME, ENV_ID, "absent.npz")

    _, stitch, stitch_env = common.resolve_task("pointmaze-medium-stitch-v0")
    assert not download.called
    with pytest.raises(common.UserError, match="no network"):  # only navigate data are collected
        common.get_dataset(stitch, stitch_env)
    urls, path, _ = download.call_args.args
    assert urls == [
        "https://rail.eecs.berkeley.edu/datasets/ogbench/pointmaze-medium-stitch-v0.npz",
        f"{common.MIRROR}/pointmaze-medium-stitch-v0.npz",
    ]
    assert path == folder / "pointmaze-medium-stitch-v0.npz"
    assert collect.call_count == 1


def test_who_waits_for_a_file_says_so_and_names_the_lock(tmp_path, capsys):
    path = tmp_path / "data" / "file.npz"
    path.parent.mkdir()
    lock = FileLock(path.with_name(".file.npz.lock"))
    lock.acquire()
    make = Mock()
    thread = threading.Thread(target=common.make_once, args=(path, make))
    thread.start()
    printed = ""
    deadline = time.monotonic() + 20
    while not printed and time.monotonic() < deadline:
        time.sleep(0.05)
        printed = capsys.readouterr().out
    path.touch()  # the other one is done
    lock.release()
    thread.join(20)
    assert not thread.is_alive() and not make.called
    assert printed.startswith("waiting") and lock.lock_file in printed


def test_after_a_failure_the_lock_is_free(tmp_path):
    with pytest.raises(common.UserError, match="no network") as error:
        common.make_once(tmp_path / "file", Mock(side_effect=common.UserError("no network")))
    with FileLock(tmp_path / ".file.lock", timeout=0):
        assert error  # holds the frames of the failure, and what is in them


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, step):
    path = tmp_path / "config.json"
    rows = b"step,x\n1,2\n"
    path.write_bytes(b"old")
    common.write_file(path, rows)
    assert path.read_bytes() == rows
    monkeypatch.setattr(common.os, step, Mock(side_effect=OSError(28, "No space left")))
    for write in (
        lambda: common.write_file(path, b"newer"),
        lambda: common.write_config(tmp_path, {}),
        lambda: common.write_dataset(path, "somewhere", {}),
        lambda: common.cut_rows(path, 0),
    ):
        with pytest.raises(common.UserError, match=f"{tmp_path}: cannot write there: .*No space"):
            write()
        assert path.read_bytes() == rows and list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_there_needs_no_lock(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(common, "FileLock", None)  # its folder may be read-only
    common.make_once(tmp_path / "file", None)


# ------------------------------------------------------------------------------------ run folder


NETS = torch.nn.Linear(2, 3)


def log_row(run, step, success=0.5):
    """One row of train.csv and one of eval.csv."""
    run.log("train.csv", dict(step=step, critic_loss=1.0, q_mean=-1.0, q_min=-2.0, q_max=0.0))
    run.log("eval.csv", {"step": step, "success": success, "return": -3.0, "length": 9.0})


@pytest.mark.filterwarnings("error")
def test_run_folder(tmp_path, capsys):
    config = dict(script="x.py", args=dict(lam=1.0), dataset="somewhere")
    with common.Run(tmp_path / "runs/x", config) as run:
        assert run.begin(NETS) is None
        config = common.read_config(run.folder)
        assert config["args"] == {"lam": 1.0} and config["dataset"] == "somewhere"
        assert config["versions"]["torch"] == torch.__version__ and "commit" in config

        run.show_progress(0, 3, "updates")
        run.log("eval.csv", {"step": 0, "success": 0.0, "return": -9.0, "length": 9.0})
        run.plot()  # no training yet
        log_row(run, 1)
        log_row(run, 2)
        run.plot()
        log_row(run, 3, success=float("nan"))
        run.plot()
        assert (run.folder / "train.csv").read_text().splitlines() == [
            "step,critic_loss,q_mean,q_min,q_max",
            "1,1.0,-1.0,-2.0,0.0",
            "2,1.0,-1.0,-2.0,0.0",
            "3,1.0,-1.0,-2.0,0.0",
        ]
        assert (run.folder / "curve.png").read_bytes().startswith(b"\x89PNG")

        nets = torch.nn.Linear(2, 3)
        run.save(step=2, nets=nets.state_dict(), generator=torch.Generator().get_state())
        state = common.read_checkpoint(run.folder)
        assert state["step"] == 2 and torch.equal(state["nets"]["weight"], nets.weight)
        run.finish()
        for switch in (0, 1, 2, 3):
            run.finish(switch)
    whole, *after_switch = capsys.readouterr().out.splitlines()
    assert whole == "finished; mean of the last 3 evaluations: return -3, length 9"
    assert after_switch == [
        whole,
        "finished; mean of the last 2 evaluations: return -3, length 9",
        "finished; mean of the last 1 evaluations: return -3, length 9",
        whole,  # it did not go on
    ]
    names = {path.name for path in run.folder.iterdir()}
    files = {"config.json", "train.csv", "eval.csv", "curve.png", "checkpoint.pt"}
    assert names - {".lock"} == files


def test_a_row_that_lacks_a_column_has_nan_there(tmp_path):
    run = common.Run(tmp_path / "run", dict(script="x.py"))
    run.log("train.csv", dict(step=1, q_mean=2.0, policy_loss=3.0))
    run.log("train.csv", dict(policy_loss=4.0, step=2))
    columns = common.read_columns(run.folder / "train.csv")
    assert list(columns) == ["step", "q_mean", "policy_loss"]
    assert columns["policy_loss"].tolist() == [3, 4]
    assert columns["q_mean"][0] == 2 and np.isnan(columns["q_mean"][1])


def test_the_picture_marks_the_switch_where_there_are_rows_after_it(tmp_path, monkeypatch):
    line = Mock()
    drawn = []

    def record(axes, x, y, *style, label, **options):
        drawn.append((label, *x))

    monkeypatch.setattr("matplotlib.axes.Axes.plot", record)
    monkeypatch.setattr("matplotlib.axes.Axes.legend", Mock())
    monkeypatch.setattr("matplotlib.axes.Axes.axvline", line)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", Mock())
    run = common.Run(tmp_path / "run", dict(script="fql.py"))
    for step, switch, lines in ((1000, 0, 0), (2000, 2000, 0), (3000, 2000, 3)):
        run.log("eval.csv", dict(step=step, success=0.5))
        run.plot(switch=switch)
        assert line.call_count == lines
    assert all(call.args == (2,) for call in line.call_args_list)  # thousand
    assert drawn[-1] == ("success", 1, 2, 3)


CONFIG = dict(script="x.py", device="cpu", dataset="5 transitions", args=dict(lam=1.0, hidden=[8]))


def test_rows_are_cut_at_the_checkpoint(tmp_path):
    nets = torch.nn.Linear(2, 3).state_dict()
    with common.Run(tmp_path / "run", CONFIG) as run:
        assert run.begin(NETS) is None
        log_row(run, 1)
        log_row(run, 5)
        run.log("episodes.csv", {"step": 4, "return": -3.0, "success": 1.0})
        run.save(step=5, nets=nets, generator=None)
        (run.folder / "best_of_n.csv").write_text("policy,success\nflow,0.5\n")  # not its own
        names = ("train.csv", "eval.csv", "episodes.csv", "best_of_n.csv")
        as_saved = {name: (run.folder / name).read_bytes() for name in names}
        log_row(run, 6)  # after the checkpoint: will come again
        log_row(run, 10)
        run.log("episodes.csv", {"step": 7, "return": -3.0, "success": 1.0})
    with open(run.folder / "train.csv", "a") as file:
        file.write("5")  # a torn last line; of step 50, say
    with open(run.folder / "eval.csv", "a") as file:
        file.write("11,0.5,-3.0")
    with common.Run(tmp_path / "run", CONFIG, resume=True) as run:
        state = run.begin(NETS)
        assert state["step"] == 5 and torch.equal(state["nets"]["weight"], nets["weight"])
        assert {name: (run.folder / name).read_bytes() for name in names} == as_saved
        log_row(run, 6)
        assert common.read_columns(run.folder / "eval.csv")["step"].tolist() == [1, 5, 6]


def test_what_changes_in_a_resumed_run_is_printed(tmp_path, capsys):
    with common.Run(tmp_path / "run", CONFIG) as run:
        run.begin(NETS)
        run.save(step=1, nets=NETS.state_dict(), generator=None)
    with common.Run(tmp_path / "run", {**CONFIG, "args": dict(lam=1.0, hidden=(8,))}, True) as run:
        run.begin(NETS)
    assert capsys.readouterr().out == ""  # JSON makes lists of tuples
    args = dict(lam=3.0, hidden=[8], new=4)
    other = dict(CONFIG, args=args, device="cuda", dataset="6 transitions")
    with common.Run(tmp_path / "run", other, resume=True) as run:
        run.begin(NETS)
        assert common.read_config(run.folder)["args"] == CONFIG["args"]  # they have done nothing
        assert run.same_settings == ", with the same settings"
        run.save(step=2, nets=NETS.state_dict(), generator=None)
        assert run.same_settings == ""
    assert capsys.readouterr().out.splitlines() == [
        "changed: lam 1.0 -> 3.0",
        "changed: new None -> 4",
        "changed: device cpu -> cuda",
        "changed: dataset 5 transitions -> 6 transitions",
    ]
    assert common.read_config(run.folder)["args"] == args


def test_a_folder_that_was_no_run_keeps_its_csv_files(tmp_path):
    (tmp_path / "own.csv").write_text("step,x\n1,2\n")
    with common.Run(tmp_path, CONFIG, resume=True) as run:
        run.begin(NETS)
    assert (tmp_path / "own.csv").read_text() == "step,x\n1,2\n"


def test_a_run_whose_checkpoint_was_removed_is_not_begun_anew(tmp_path):
    with common.Run(tmp_path / "run", CONFIG) as run:
        run.begin(NETS)
        for step in (1, 2):  # a checkpoint follows each evaluation
            run.log("eval.csv", {"step": step, "success": 1.0, "return": -3.0})
    before = (run.folder / "eval.csv").read_bytes()
    with pytest.raises(common.UserError, match="its checkpoint.pt was removed"):
        common.Run(tmp_path / "run", CONFIG, resume=True).begin(NETS)
    assert (run.folder / "eval.csv").read_bytes() == before


def start_args(**changes):
    """What `start_run` reads of a script's settings."""
    args = dict(seed=3, run_dir="runs", resume="", start_or_resume="", track=False)
    return SimpleNamespace(**{**args, **changes})


def test_start_run_resume_and_start_or_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cpu = torch.device("cpu")

    def start(name=NAME, **changes):
        return common.start_run("/x/fql.py", name, start_args(**changes), "5 transitions", cpu)

    with start("my_project/MyEnv-v0") as run:  # not a folder in a folder
        assert run.folder.parent == Path("runs")
        assert run.folder.name.startswith("my_project-MyEnv-v0__fql__3__")
    with start() as run, start() as other:  # in the same second, that is
        assert re.fullmatch(rf"{NAME}__fql__3__\d{{8}}-\d{{6}}-\d{{6}}", run.folder.name)
        assert other.folder != run.folder
        assert run.folder.parent == Path("runs")
        assert run.begin(NETS) is None and run.config["script"] == "fql.py"
        printed = capsys.readouterr().out
        assert f"{NAME}: 5 transitions\n" in printed and "seed=3, run_dir=runs" in printed
        run.save(step=7, nets=NETS.state_dict(), generator=None)
    monkeypatch.setattr(common, "git_commit", lambda: "other")
    with start(resume=str(run.folder)) as again:
        assert again.folder == run.folder and again.begin(NETS)["step"] == 7
        assert "-> other" in capsys.readouterr().out  # another commit is another program
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU ({device})")
    gpu = torch.device("cuda:1")
    with common.start_run("/x/fql.py", NAME, start_args(), "5 transitions", gpu) as run:
        assert run.config["device"] == "a GPU (cuda:1)"

    for _ in range(2):  # it has no checkpoint yet
        with start(start_or_resume="sweep/job") as run:
            assert run.folder == Path("sweep/job") and run.begin(NETS) is None
            log_row(run, 1)
    run = start(start_or_resume="sweep/job")
    run.save(step=1, nets=NETS.state_dict(), generator=None)
    run.lock.release()
    with start(start_or_resume="sweep/job") as run:
        assert run.begin(NETS)["step"] == 1
        assert common.read_columns(run.folder / "eval.csv")["step"].tolist() == [1]
    assert len(list(Path("sweep").iterdir())) == 1


@pytest.mark.parametrize("cgroups", [1, 2])
@pytest.mark.parametrize("quota, warns", [("100000", True), ("200000", False), (None, False)])
def test_a_container_with_few_cores_is_told_what_to_set(
    monkeypatch, tmp_path, capsys, cgroups, quota, warns
):
    if cgroups == 2:
        (tmp_path / "cpu.max").write_text(f"{quota or 'max'} 100000\n")
    else:
        (tmp_path / "cpu").mkdir()
        (tmp_path / "cpu/cpu.cfs_quota_us").write_text(f"{quota or -1}\n")
        (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    monkeypatch.setattr(common, "Path", lambda name: tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    common.warn_of_cpu_quota()
    assert ("set OMP_NUM_THREADS=1" in capsys.readouterr().out) == warns


def test_weights_of_other_networks_are_refused():
    nets = torch.nn.Linear(2, 3)
    weights = torch.nn.Linear(2, 3).state_dict()
    common.load_weights(nets, weights)
    assert torch.equal(nets.weight, weights["weight"])
    words = "these networks: weight has shape (3, 4) there, (3, 2) here"
    with pytest.raises(common.UserError, match=re.escape(words)):
        common.load_weights(nets, torch.nn.Linear(4, 3).state_dict())
    with pytest.raises(common.UserError, match="these networks: bias has shape None"):
        common.load_weights(nets, dict(weight=weights["weight"]))
    assert torch.equal(nets.weight, weights["weight"])


def test_a_generator_goes_on_or_is_seeded_anew(capsys):
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    expected = torch.rand(3, generator=generator)
    common.restore_generator(generator, state, 5)
    assert torch.equal(torch.rand(3, generator=generator), expected)
    assert capsys.readouterr().out == ""
    of_cuda = torch.zeros(16, dtype=torch.uint8)  # seed and offset
    common.restore_generator(generator, of_cuda, 5)
    assert "another device" in capsys.readouterr().out
    fresh = torch.Generator().manual_seed(5)
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=fresh))


def test_one_process_writes_to_a_run_folder_at_a_time(tmp_path):
    with common.Run(tmp_path / "run", dict(script="x.py")):
        with pytest.raises(common.UserError, match="another process writes there"):
            common.Run(tmp_path / "run", dict(script="x.py"), resume=True)
    common.Run(tmp_path / "run", dict(script="x.py"), resume=True).lock.release()


def test_a_new_run_never_writes_into_a_folder_that_exists(tmp_path):
    config = dict(script="x.py")
    with common.Run(tmp_path / "run", config) as run:
        run.begin(NETS)
    with pytest.raises(common.UserError, match="run: cannot write there: .*File exists"):
        common.Run(tmp_path / "run", config)


def test_what_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    run = common.Run(tmp_path / "run", dict(script="x.py"))
    run.save(step=1, nets=torch.nn.Linear(2, 3).state_dict())
    with pytest.raises(common.UserError, match="step 7: critic_loss is nan.* lower learning rate"):
        run.log("train.csv", dict(step=7, q_mean=0.0, critic_loss=float("nan"), policy_loss=1.0))
    with pytest.raises(common.UserError, match="step 8: policy_loss is -inf"):
        row = dict(step=8, q_mean=0.0, critic_loss=0.0, policy_loss=float("-inf"))
        run.log("train.csv", row)
    run.log("eval.csv", dict(step=8, success=float("nan")))  # the environment has none
    nets = torch.nn.Linear(2, 3)
    nets.bias.data[1] = float("nan")
    with pytest.raises(common.UserError, match="step 9: bias is not finite"):
        run.save(step=9, nets=nets.state_dict())
    assert common.read_checkpoint(run.folder)["step"] == 1


@pytest.mark.parametrize(
    "error, can_resume", [(common.Diverged("nan"), False), (common.UserError("disk"), True)]
)
def test_what_has_diverged_is_not_to_be_resumed(tmp_path, capsys, error, can_resume):
    with pytest.raises(common.UserError), common.Run(tmp_path / "run", dict(script="x.py")) as run:
        run.show_progress(0, 1, "updates")
        run.save(step=1, nets={})
        raise error
    assert ("stopped; start it again to continue" in capsys.readouterr().err) == can_resume
    assert common.read_checkpoint(run.folder)["step"] == 1


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_a_run(tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    assert common.git_commit() is None
    (tmp_path / "common.py").write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    commit = common.git_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "common.py").write_text("changed")
    assert common.git_commit() == f"{commit}+"


# ----------------------------------------------------------------------- checks before training


@pytest.mark.parametrize(
    "given, read",
    [
        ("--offline-steps 1e6 --lr 3e-4 --seed 3", "--offline-steps 1000000 --lr 3e-4 --seed 3"),
        ("--lam 1.5e0 --online-steps=2.5e+5", "--lam 1.5e0 --online-steps=250000"),
        ("--seed=3 --dataset=http://x/y.npz?a=b", "--seed=3 --dataset=http://x/y.npz?a=b"),
    ],
)
def test_large_numbers_on_the_command_line(monkeypatch, given, read):
    monkeypatch.setattr(sys, "argv", ["qflow.py", *given.split()])
    words = common.command_line()
    assert words == read.split()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(lr=0.0), "--lr 0.0: must be positive"),
        (dict(lr=-1.0), "--lr -1.0: must be positive"),
        (dict(lr=np.float64(0)), "--lr 0.0: must be positive"),
        (dict(lr=float("nan")), "--lr nan: must be positive"),
        (dict(batch_size=0), "--batch-size 0: must be positive"),
        (dict(seed=-1), "--seed -1: must be at least 0"),
        (dict(rho=float("nan")), "--rho nan: must be at least 0"),
        (dict(discount=1.01), "--discount 1.01: must be at most 1"),
        (dict(tau=2), "--tau 2: must be at most 1"),
        (dict(discount=0.0), "--discount 0.0: must be positive"),
        (dict(hidden=()), "--hidden (): needs positive widths"),
        (dict(hidden=(8, 0)), "--hidden (8, 0): needs positive widths"),
        (dict(offline_steps=0), "--offline-steps and --online-steps: one must be positive"),
    ],
)
def test_numbers_that_cannot_work(change, words):
    right = dict(lr=1.0, batch_size=1, seed=0, rho=0.0, discount=1.0, tau=1, hidden=(1,))
    right.update(offline_steps=1, online_steps=0, resume="", own=-1.0, sparse=False)
    names = dict(may_be_zero="seed rho offline_steps online_steps", any_sign="own")
    common.check_flags(SimpleNamespace(**right), **names)
    with pytest.raises(common.UserError, match=f"^{re.escape(words)}$"):
        common.check_flags(SimpleNamespace(**{**right, **change}), **names)


def test_the_reason_why_torch_cannot_compile_is_one_line(monkeypatch):
    compiled = Mock(side_effect=RuntimeError("Python.h: No such file\n and more lines"))
    monkeypatch.setattr(torch, "compile", Mock(return_value=compiled))
    words = "^--compile: torch cannot compile here: Python.h: No such file; it needs gcc"
    with pytest.raises(common.UserError, match=words) as error:
        common.check_compiler("cpu")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_compiler_that_is_broken(tmp_path):
    program = "import common; common.check_compiler('cpu'); print('it compiles')"

    def run(compiler, cache):
        env = {**os.environ, "CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache)}
        root = Path(common.__file__).parent
        command = [sys.executable, "-c", program]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)

    broken = run("/bin/false", "broken")
    assert "UserError: --compile: torch cannot compile here: " in broken.stderr
    assert "it compiles" not in broken.stdout
    whole = run("g++", "whole")
    assert whole.stdout == "it compiles\n", whole.stderr
