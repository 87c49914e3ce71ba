"""Names, datasets, sampling, collection and run folders."""

import json
import re
from itertools import product
from unittest.mock import Mock

import gymnasium
import numpy as np
import pytest
import torch

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
    common.collect_pointmaze(NAME, path, episodes=3, workers=2)
    return path


# ---------------------------------------------------------------------------------------- names


def test_every_name_of_every_dataset_resolves_to_an_environment():
    parts = ([part.split(",") for part in re.split("[{}]", names)] for names in DATASETS)
    stems = ["".join(choice) for each in parts for choice in product(*each)]
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
            assert spec.kwargs["reward_task_id"] == int(suffix[15:] or 0)
            assert spec.kwargs.get("ob_type") != "pixels"


@pytest.mark.parametrize(
    "env, task, words",
    [
        ("antmaze-gigant-navigate-v0", 0, "closest: antmaze-giant-navigate-singletask-"),
        ("antmaze-giant-explore-v0", 0, "closest"),
        ("visual-antmaze-giant-navigate-v0", 0, "antmaze-giant-navigate-singletask-"),
        ("antmaze-giant-singletask-v0", 0, "antmaze-giant"),
        ("powderworld-easy-play-v0", 0, "powderworld-easy-play-v0: no such"),
        ("", 0, "no such"),
        ("cube-double-play-singletask-task6-v0", 0, "task6"),
        ("cube-double-play-singletask-task0-v0", 0, "task0"),
        ("cube-double-play-v0", 7, "--task 7"),
        ("cube-double-play-v0", -1, "--task -1"),
        ("cube-double-play-singletask-task2-v0", 3, "has a task already"),
    ],
)
def test_wrong_names_are_one_line_with_the_way_out(env, task, words):
    with pytest.raises(common.UserError, match=re.escape(words)) as e:
        common.resolve_task(env, task)
    assert "\n" not in str(e.value)


# ------------------------------------------------------------------------------------- sampling


def random_dataset(rng, lengths=(1, 4, 2, 9, 1)):
    n, ends = sum(lengths), np.cumsum(lengths) - 1
    terminals = np.zeros(n)
    terminals[ends] = 1
    obs = rng.normal(size=(n, 3)).astype(np.float32)
    next_obs = np.concatenate([obs[1:], obs[:1]])
    next_obs[ends] = rng.normal(size=(len(ends), 3))
    actions = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
    masks = (rng.random(n) < 0.8).astype(np.float32)
    return dict(
        observations=obs,
        actions=actions,
        next_observations=next_obs,
        rewards=rng.normal(size=n),
        masks=masks,
        terminals=terminals,
    )


def compact(observations, actions, next_observations, rewards, masks, terminals):
    """Transitions in OGBench's compact layout: a row more per episode, for its last observation."""
    ends = np.flatnonzero([*terminals[:-1], 1]) + 1
    rows = dict(observations=observations, actions=actions, rewards=rewards, masks=masks)
    rows = {k: np.insert(v, ends, 0, axis=0) for k, v in rows.items()}
    rows["valids"] = np.insert(np.ones(len(actions)), ends, 0)
    rows["observations"][rows["valids"] == 0] = next_observations[ends - 1]
    return rows


@pytest.mark.parametrize("horizon", [1, 2, 3, 7])
def test_chunks_against_brute_force(horizon):
    for seed in range(20):
        data = random_dataset(np.random.default_rng(seed))
        dataset = common.Dataset(**compact(**data))
        n, discount = len(data["actions"]), 0.9
        batch = dataset.chunks(torch.arange(n - horizon + 1), horizon, discount)
        for i in range(n - horizon + 1):
            reward, mask, valid, last = 0.0, 1.0, [], None
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


def test_sample_draws_all_starts_equally_and_nothing_else():
    dataset = common.Dataset(**compact(**random_dataset(np.random.default_rng(0))))
    generator = torch.Generator().manual_seed(0)
    batch = dataset.sample(30_000, 3, 0.9, generator)
    firsts = dataset.observations[dataset.rows]
    which = (batch.observations[:, None] == firsts).all(-1).float().argmax(1)
    counts = torch.bincount(which, minlength=len(dataset))
    assert counts[15:].sum() == 0  # 17 transitions, chunks of 3
    assert (counts[:15] - 2000).abs().max() < 5 * 2000**0.5


def test_a_million_antmaze_transitions_fit_in_a_third_of_a_gigabyte():
    n, length = 100_000, 1000
    obs = np.zeros((n, 29), np.float32)
    valids = (np.arange(n) % length != length - 1).astype(np.float32)
    data = common.Dataset(obs, np.zeros((n, 8), np.float32), valids, valids, valids)
    size = sum(t.nbytes for t in vars(data).values() if isinstance(t, torch.Tensor))
    assert size * 10 < 0.35e9
    assert len(data) + data.episodes == n and data.episodes == 100


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(rewards=np.zeros(3)), "rewards has the wrong length"),
        (dict(observations=np.zeros((21, 3))), "observations has the wrong length"),
        (dict(masks=np.full(22, np.nan)), "masks has NaN, infinity"),
        (dict(actions=np.full((22, 2), 1.5)), "actions beyond [-1, 1]"),
        (dict(valids=np.ones(22)), "no end in the last row"),
        (dict(valids=np.zeros(22)), "no transitions"),
        (dict(valids=np.zeros((0,))), "wrong length"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        common.Dataset(**{**compact(**random_dataset(np.random.default_rng(0))), **change})


# ---------------------------------------------------------------------------------------- files


def test_collected_file_follows_the_protocol_whatever_the_workers(collected, tmp_path):
    other = tmp_path / "one_worker.npz"
    common.collect_pointmaze(NAME, other, episodes=3, workers=1)
    with np.load(collected) as a, np.load(other) as b:
        assert set(a) == {"observations", "actions", "terminals", "qpos", "qvel", "source"}
        assert all(np.array_equal(a[k], b[k]) for k in a)
        assert "3 episodes" in str(a["source"]) and "not official" in str(a["source"])
        assert a["observations"].shape == (3003, 2)
        assert np.flatnonzero(a["terminals"]).tolist() == [1000, 2001, 3002]
        assert not np.array_equal(a["observations"][0], a["observations"][1001])
        assert np.abs(a["actions"]).max() == 1
        moved = np.linalg.norm(np.diff(a["observations"][:1001], axis=0), axis=1)
        assert moved.mean() > 0.1  # of 0.2 per step at full speed
    assert list(tmp_path.iterdir()) == [other]  # no temporary file is left


def test_loading_agrees_with_ogbench(collected):
    import ogbench

    with np.load(collected) as file:
        np.savez(collected.with_name(f"{NAME}-val.npz"), **file)  # which OGBench insists on
    env, theirs, _ = ogbench.make_env_and_datasets(
        "pointmaze-medium-navigate-singletask-task2-v0", dataset_path=str(collected)
    )
    env.close()
    dataset, _ = common.load_dataset(collected, common.resolve_task(NAME, 2)[2], "cpu")
    assert len(dataset) == 3000 and dataset.episodes == 3
    batch = dataset.chunks(torch.arange(3000), 1, 0.99)
    for key in ("observations", "next_observations", "rewards", "masks"):
        assert np.array_equal(getattr(batch, key), theirs[key]), key
    assert np.allclose(batch.actions, theirs["actions"], atol=1.1e-5)
    assert batch.actions.abs().max() < 1 and theirs["masks"].min() == 0


def damaged(source, target, damage):
    with np.load(source) as file:
        arrays = dict(file)
    damage(arrays)
    np.savez(target, **arrays)


def test_damaged_files_are_one_line_that_names_file_and_cause(collected, tmp_path):
    def without(key):
        return lambda a: a.pop(key)

    def put(key, value):
        return lambda a: a.update({key: value(a[key])})

    def one_nan(array):
        array = array.copy()
        array[7] = np.nan
        return array

    short, nan_rows = "no end in the last row", "NaN"
    cases = {
        "no_actions": (without("actions"), "has no actions"),
        "no_qpos": (without("qpos"), "has no qpos"),
        "short_actions": (put("actions", lambda a: a[:-5]), "actions has the wrong length"),
        "short_qpos": (put("qpos", lambda a: a[:-5]), "qpos has the wrong length"),
        "cut": (lambda a: a.update({k: v[:-1] for k, v in a.items() if v.ndim}), short),
        "no_end": (put("terminals", lambda a: np.zeros_like(a)), short),
        "all_ends": (put("terminals", lambda a: np.ones_like(a)), ""),
        "flat": (put("observations", lambda a: a.ravel()), "sizes (2,), the environment"),
        "empty": (lambda a: a.update({k: v[:0] for k, v in a.items() if v.ndim}), ""),
        "nan": (put("observations", one_nan), nan_rows),
        "nan_qpos": (put("qpos", one_nan), nan_rows),
        "complex": (put("qpos", lambda a: a.astype(complex)), "no real numbers"),
        "wide": (put("observations", lambda a: np.tile(a, (1, 2))), "(4, 2), the environment"),
        "object": (put("actions", lambda a: a.astype(object)), "bject"),
        "words": (put("actions", lambda a: a.astype(str)[:, :1].repeat(2, 1) + "x"), "convert"),
    }
    for name, (damage, words) in cases.items():
        path = tmp_path / f"{name}.npz"
        damaged(collected, path, damage)
        with pytest.raises(common.UserError) as e:
            common.load_dataset(path, ENV_ID, "cpu")
        assert str(path) in str(e.value) and words in str(e.value), name
        assert "\n" not in str(e.value), name

    whole = collected.read_bytes()
    files = {"half": whole[: len(whole) // 2], "nothing": b"", "html": b"<html>not found</html>"}
    hole = bytearray(whole)
    hole[2000:2400] = bytes(400)
    for name, content in {**files, "hole": bytes(hole)}.items():
        path = tmp_path / f"{name}.npz"
        path.write_bytes(content)
        with pytest.raises(common.UserError, match=re.escape(str(path))) as e:
            common.load_dataset(path, ENV_ID, "cpu")
        assert "damaged" in str(e.value) if name == "hole" else "not a zip" in str(e.value)
    with pytest.raises(common.UserError, match="No such file"):
        common.load_dataset(tmp_path / "absent.npz", ENV_ID, "cpu")
    array = tmp_path / "array.npy"
    np.save(array, np.zeros(3))
    with pytest.raises(common.UserError, match=re.escape(str(array))):
        common.load_dataset(array, ENV_ID, "cpu")


def test_objects_are_never_unpickled(collected, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "unpickled"), "w")

    path = tmp_path / "bomb.npz"
    damaged(collected, path, lambda a: a.update(actions=np.array([Bomb()], object)))
    with pytest.raises(common.UserError):
        common.load_dataset(path, ENV_ID, "cpu")
    damaged(collected, path, lambda a: a.update(source=np.array([Bomb()], object)))
    with pytest.raises(common.UserError):
        common.load_dataset(path, ENV_ID, "cpu")
    assert not (tmp_path / "unpickled").exists()


def test_sources_are_tried_in_order(collected, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    calls = []

    def collect(name, path):
        calls.append(name)
        path.write_bytes(collected.read_bytes())

    monkeypatch.setattr(common, "collect_pointmaze", collect)
    kept = tmp_path / ".ogbench/collected" / f"{NAME}.npz"
    for _ in range(2):  # collected once, used twice
        dataset, source = common.get_dataset(NAME, ENV_ID, None, "", "cpu")
        assert source.startswith("~/.ogbench/collected/") and "not official" in source
    assert calls == [NAME] and len(dataset) == 3000

    official = tmp_path / ".ogbench/data" / f"{NAME}.npz"
    official.parent.mkdir(parents=True)
    damaged(collected, official, lambda a: a.pop("source"))
    assert (
        common.get_dataset(NAME, ENV_ID, None, "", "cpu")[1]
        == f"~/.ogbench/data/{NAME}.npz (official file)"
    )
    stitch, stitch_env = common.resolve_task("pointmaze-medium-stitch-v0")[1:]
    get = Mock(side_effect=common.requests.ConnectionError)  # the oracle does not collect these
    monkeypatch.setattr(common.requests, "get", get)
    monkeypatch.setattr(common.time, "sleep", Mock())
    url = "https://rail.eecs.berkeley.edu/datasets/ogbench/pointmaze-medium-stitch-v0.npz"
    with pytest.raises(common.UserError, match=f"{url}: download failed"):
        common.get_dataset(stitch, stitch_env, None, "", "cpu")
    for path in (official.with_name("absent.npz"), kept.with_name("absent.npz")):
        with pytest.raises(common.UserError, match="No such file"):
            common.get_dataset(NAME, ENV_ID, path, "", "cpu")
    with pytest.raises(common.UserError, match="--horizon 3001"):
        common.get_dataset(NAME, ENV_ID, None, "", "cpu", horizon=3001)
    given = tmp_path / "mine.npz"
    given.write_bytes(official.read_bytes())
    assert (
        common.get_dataset(NAME, ENV_ID, given, "", "cpu")[1] == "~/mine.npz (given by --dataset)"
    )


# ------------------------------------------------------------------------------------ run folder


@pytest.mark.filterwarnings("error")
def test_run_folder(tmp_path):
    config = dict(args=dict(lam=1.0), dataset="somewhere")
    run = common.Run(tmp_path / "runs", "env__method__0", config)
    assert re.fullmatch(r"env__method__0__\d{8}-\d{6}", run.path.name)
    config = json.loads((run.path / "config.json").read_text())
    assert config["args"] == {"lam": 1.0} and config["dataset"] == "somewhere"
    assert config["versions"]["torch"] == torch.__version__ and "commit" in config

    run.log("eval.csv", step=0, **{"success": 0.0, "return": -9.0})
    run.plot()  # there is nothing of a training yet
    for step in (1, 2):
        row = dict(critic_loss=1.0, q_mean=-1.0, q_min=-2.0, q_max=0.0)
        run.log("train.csv", step=step, **row)
        run.log("eval.csv", step=step, **{"success": 0.5, "return": -3.0})
    run.plot()
    run.log("eval.csv", step=3, **{"success": float("nan"), "return": -2.0})
    run.plot()
    text = (run.path / "train.csv").read_text().splitlines()
    assert text == [
        "step,critic_loss,q_mean,q_min,q_max",
        "1,1.0,-1.0,-2.0,0.0",
        "2,1.0,-1.0,-2.0,0.0",
    ]
    assert (run.path / "curve.png").read_bytes().startswith(b"\x89PNG")

    nets = torch.nn.Linear(2, 3)
    run.save(dict(nets=nets, generator=torch.Generator()), step=2, sizes=(2, 3))
    state = torch.load(run.path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and torch.equal(state["nets"]["weight"], nets.weight)
    names = {p.name for p in run.path.iterdir()}
    files = {"config.json", "train.csv", "eval.csv", "curve.png", "checkpoint.pt"}
    assert names == files | {".lock"}


def test_what_is_not_finite_stops_the_run_and_is_never_saved(tmp_path):
    run = common.Run(tmp_path, "x", {})
    parts = dict(nets=torch.nn.Linear(2, 3))
    run.save(parts, step=1)
    with pytest.raises(common.UserError, match="step 7: critic_loss is nan"):
        run.log("train.csv", step=7, q_mean=0.0, critic_loss=float("nan"), policy_loss=1.0)
    with pytest.raises(common.UserError, match="step 8: policy_loss is -inf"):
        run.log("train.csv", step=8, q_mean=0.0, critic_loss=0.0, policy_loss=float("-inf"))
    run.log("eval.csv", step=8, success=float("nan"), train_return=float("nan"))  # not known
    parts["nets"].bias.data[1] = float("nan")
    with pytest.raises(common.UserError, match="step 9: bias is not finite"):
        run.save(parts, step=9)
    assert torch.load(run.path / "checkpoint.pt", weights_only=True)["step"] == 1


def test_warning_when_q_leaves_its_range_comes_once(tmp_path, capsys):
    run = common.Run(tmp_path, "x", {})
    check = lambda step, low, high, rewards=(-1.0, 0.0): run.check_q(
        dict(step=step, q_min=low, q_max=high), torch.tensor(rewards), 0.99
    )
    check(10, -109, 9)
    check(10, -109, 9, (-1.0, -0.5))  # a solved task is worth 0
    check(10, -9, 109, (0.5, 1.0))
    assert capsys.readouterr().err == ""
    check(20, -50, 11)
    check(30, -50, 12)
    err = capsys.readouterr().err
    assert err.count("warning") == 1 and "update 20" in err and "[-100, 0]" in err


# --------------------------------------------------------------------------------- environments


@pytest.mark.parametrize("maze", ["medium", "teleport"])  # a teleport draws its exit in step()
def test_episodes_follow_from_the_seed_alone(maze):
    env_id = f"pointmaze-{maze}-singletask-task4-v0"
    actions = np.random.default_rng(0).uniform(-0.3, 0.3, (600, 2, 2))
    actions[..., 1] -= 0.7  # towards a teleport

    def observe(disturb):
        np.random.seed(disturb)  # what the workers inherit
        envs = common.make_envs(lambda: gymnasium.make(env_id, max_episode_steps=250), 2)
        observations = [envs.reset(seed=[5, 6])[0].copy()]
        observations += [envs.step(a)[0].copy() for a in actions]
        envs.close()
        return np.array(observations)

    first, again = observe(0), observe(1)
    assert np.array_equal(first, again)
    starts = first[[0, 250, 500]].reshape(6, 2)
    assert len(np.unique(starts, axis=0)) == 6
    if maze == "teleport":
        assert np.abs(np.diff(first, axis=0)).max(2)[:249].max() > 3  # somebody was teleported


# ---------------------------------------------------------------------------------------- torch


def test_auto_takes_fast_products_only_where_they_are_float32(monkeypatch):
    plain = torch.Tensor.__matmul__
    try:
        common.pick_device("cpu", "auto")
        x, y = torch.randn(2, 256, 512), torch.randn(2, 512, 256)
        for a, b in ((x, y), (x[0], y[0]), (y.transpose(1, 2), x.transpose(1, 2))):
            exact = a.double() @ b.double()
            assert (a @ b - exact).norm() < 1e-6 * exact.norm()

        def coarse(a, b):  # as where "medium" is bfloat16
            narrow = a.dtype is torch.float32 and torch.get_float32_matmul_precision() == "medium"
            return plain(a.bfloat16(), b.bfloat16()).float() if narrow else plain(a, b)

        monkeypatch.setattr(torch.Tensor, "__matmul__", coarse)
        common.pick_device("cpu", "auto")
        assert torch.get_float32_matmul_precision() == "highest"
        for name in ("medium", "high", "highest"):
            common.pick_device("cpu", name)
            assert torch.get_float32_matmul_precision() == name
    finally:
        torch.set_float32_matmul_precision("highest")
