"""The scripts as a user starts them: what they print and what they leave."""

import csv
import json
import math
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import common
import flow_sac
import fql
import qflow

ROOT = Path(__file__).parent.parent
NAME = "pointmaze-medium-navigate-v0"

# Starts a script as `python SCRIPT FLAGS` does; where none is there, it collects a small dataset.
START = """
import functools, runpy, sys
import common
common.collect_pointmaze = functools.partial(common.collect_pointmaze, num_episodes=4)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start(folder, script, *flags):
    """Run a script in a process of its own, outside of the repository."""
    result = subprocess.run(
        [sys.executable, "-c", START, str(ROOT / script), *map(str, flags)],
        cwd=folder,
        env={**os.environ, "OGBENCH_DATA": str(folder / "data"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result


def start_here(monkeypatch, script, *flags):
    """Call a script's main function in this process."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    script.main()
    torch.set_float32_matmul_precision("highest")


def read_rows(path):
    """The rows of a CSV file, column -> text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def dataset_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    common.collect_pointmaze(NAME, path, num_episodes=2, workers=1)
    return path


# ------------------------------------------------------------------------------------- settings


PUBLISHED = {  # Q-Flow: lambda, time_dim, q_agg; FQL: alpha, q_agg; discount of both
    "antmaze-large-navigate": (0.2, 64, "mean", 10, "min", 0.99),
    "antmaze-giant-navigate": (0.2, 64, "min", 10, "min", 0.995),
    "antsoccer-arena-navigate": (0.5, 64, "mean", 10, "mean", 0.995),
    "humanoidmaze-medium-navigate": (1, 64, "mean", 30, "mean", 0.995),
    "humanoidmaze-large-navigate": (1, 64, "mean", 30, "mean", 0.995),
    "cube-single-play": (5, 64, "mean", 300, "mean", 0.99),
    "cube-double-play": (2, 16, "mean", 300, "mean", 0.99),
    "scene-play": (5, 64, "mean", 300, "mean", 0.99),
    "puzzle-3x3-play": (20, 64, "min", 1000, "mean", 0.99),
    "puzzle-4x4-play": (20, 64, "min", 1000, "mean", 0.99),
}


def settings(monkeypatch, script, env):
    monkeypatch.setattr(sys, "argv", ["script.py", "--env", env])
    return script.parse_args()


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_papers(monkeypatch, name):
    q = settings(monkeypatch, qflow, f"{name}-v0")
    f = settings(monkeypatch, fql, f"{name}-v0")
    found = (q.lam, q.time_dim, q.q_agg, f.alpha, f.q_agg, f.discount)
    assert found == PUBLISHED[name] and q.discount == f.discount
    for args in (q, f):
        assert (args.lr, args.batch_size, args.tau, args.flow_steps) == (3e-4, 256, 0.005, 10)
        assert (args.hidden, args.num_critics, args.rho, args.horizon) == ((512,) * 4, 2, 0, 1)
        assert (args.offline_steps, args.eval_interval, args.eval_episodes) == (10**6, 10**5, 50)


def test_settings_of_flow_sac_are_the_authors(monkeypatch):
    both = dict(policy="flow-t", policy_lr=3e-4, discount=0.99, flow_steps=4, tau=0.005)
    both |= dict(online_steps=10**6, target_entropy=0)
    from_scratch = dict(offline_steps=0, learning_starts=50_000, batch_size=512, critic="crossq")
    from_scratch |= dict(q_lr=1e-3, policy_frequency=3, hidden=(1024,) * 2, q_agg="min", horizon=1)
    from_scratch |= dict(both, bc_weight=0, noise_std=0)
    with_data = dict(offline_steps=10**6, learning_starts=5000, batch_size=256, critic="sac")
    with_data |= dict(q_lr=3e-4, policy_frequency=1, hidden=(512,) * 4, q_agg="mean")
    with_data |= dict(both, bc_weight=100, noise_std=0.05)
    for env, expected, width in [
        ("HalfCheetah-v5", from_scratch, 96),
        ("cube-double-play-v0", dict(with_data, horizon=5), 128),
        ("antmaze-giant-navigate-v0", dict(with_data, horizon=1), 128),
    ]:
        args = settings(monkeypatch, flow_sac, env)
        assert expected.items() <= vars(args).items()
        policy = flow_sac.Policy(4, 3, args)
        assert policy.velocity.head.in_features == width
    for name in {dataset for dataset, _ in common.single_tasks().values()}:
        if not name.startswith("visual-"):
            found = [x["horizon"] for key, x in flow_sac.SETTINGS.items() if re.match(key, name)]
            assert found == [1 if "maze" in name or "soccer" in name else 5], name
    assert flow_sac.BatchRenorm(1, 4).warmup == 100_000
    assert flow_sac.FlowG(4, 3, 16).frequencies.shape == (16,)


@pytest.mark.parametrize(
    "script, env, run",
    [
        (qflow, "pointmaze-medium-navigate-v0", "policies/qflow-pointmaze-medium"),
        (fql, "pointmaze-medium-navigate-v0", "policies/fql-pointmaze-medium"),
        (flow_sac, "Pendulum-v1", "pendulum/seed0"),
    ],
)
def test_our_own_settings_are_those_of_the_runs_that_showed_them_to_work(
    script, env, run, monkeypatch
):
    shown = common.read_config(ROOT / "results" / run)["args"]
    (own,) = (values for names, values in script.SETTINGS.items() if re.match(names, env))
    args = vars(settings(monkeypatch, script, env))
    for name in own.keys() - {"eval_episodes"}:
        value = args[name]
        assert shown[name] == (list(value) if isinstance(value, tuple) else value), name


@pytest.mark.parametrize(
    "flags, warning",
    [
        ("--env antsoccer-arena-navigate-v0 --online-steps 9", "--alpha 10.0: the authors use 30"),
        ("--env humanoidmaze-medium-navigate-v0 --task 2 --online-steps 9", "use 100.0 if a run"),
        ("--env antsoccer-arena-navigate-v0 --online-steps 9 --alpha 30", ""),
        ("--env antsoccer-arena-navigate-v0", ""),
        ("--env antmaze-large-navigate-v0 --online-steps 9", ""),
    ],
)
def test_another_alpha_of_online_runs_is_named(flags, warning, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "get_dataset", lambda *args, **kwargs: (range(9), "no data"))
    monkeypatch.setattr(fql, "train", lambda *args: None)
    start_here(monkeypatch, fql, *flags.split(), "--device", "cpu", "--run-dir", tmp_path)
    printed = capsys.readouterr().err
    assert ("the authors use" in printed) == (warning != "")
    assert warning in printed


@pytest.mark.parametrize(
    "script, env, says",
    [
        (fql, "cube-triple-play-v0", "using the defaults\n"),
        (fql, "scene-play-v0", ""),
        (qflow, "cube-triple-play-v0", "using the defaults\n"),
        (qflow, "scene-play-v0", ""),
        (flow_sac, "cube-triple-play-v0", ""),
        (flow_sac, "Pendulum-v1", ""),
        (flow_sac, "scene-play-v0", "using cube-double's\n"),
        (flow_sac, NAME, "using cube-double's, but without chunks\n"),
    ],
)
def test_settings_that_are_not_tuned_are_named(script, env, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "get_dataset", lambda *args, **kwargs: (range(9), "no data"))
    monkeypatch.setattr(script, "train", lambda *args: None)
    start_here(monkeypatch, script, "--env", env, "--device", "cpu", "--run-dir", tmp_path)
    printed = capsys.readouterr().out
    assert ("no tuned settings" in printed) == (says != "") and says in printed


@pytest.mark.parametrize("script", [qflow, fql, flow_sac])
def test_the_task_is_that_of_the_rewards_and_of_both_environments(script, tmp_path, monkeypatch):
    env_id = "pointmaze-medium-singletask-task3-v0"
    with gymnasium.make(env_id) as env:
        goals = np.array([info["goal_xy"] for info in env.unwrapped.task_infos])
    data = dict(observations=goals, actions=np.zeros((5, 2)), terminals=np.arange(5) == 4)
    data = {**data, "qpos": goals, "qvel": 0 * goals}
    common.write_dataset(tmp_path / "goals.npz", "a row at each goal", data)
    seen = []

    def train(args, *rest):
        seen.extend([*rest, torch.get_float32_matmul_precision()])

    monkeypatch.setattr(script, "train", train)
    flags = ["--env", NAME, "--task", 3, "--horizon", 1, "--device", "cpu"]
    flags += ["--matmul-precision", "medium"]
    flags += ["--dataset", tmp_path / "goals.npz", "--run-dir", tmp_path / "runs"]
    start_here(monkeypatch, script, *flags)
    dataset, env, eval_env, _, precision = seen
    assert precision == "medium"
    assert dataset.rewards[dataset.rows].tolist() == [-1, -1, 0, -1]
    assert env.unwrapped.spec.id == eval_env.unwrapped.spec.id == env_id
    assert env.unwrapped is not eval_env.unwrapped


# --------------------------------------------------------------------------------------- --help


@pytest.fixture
def help_text(monkeypatch, capsys):
    """help_text(script, *flags): what --help prints, in one line without tyro's boxes."""

    def run(script, *flags):
        monkeypatch.setattr(sys, "argv", ["script.py", *flags, "--help"])
        with pytest.raises(SystemExit, match="^0$"):
            script.main()
        printed = capsys.readouterr()
        assert printed.err == ""
        return " ".join(printed.out.replace("│", " ").split())

    return run


@pytest.mark.parametrize("script", [qflow, fql, flow_sac])
def test_help_has_all_flags_and_the_method(script, help_text):
    text = help_text(script)
    for name, value in vars(script.Args()).items():
        flag = "--" + name.replace("_", "-")
        shown = f"{flag}, --no-{flag[2:]} " if value is False else f"{flag} "
        assert f" {shown}" in text, flag
    assert " ".join(script.__doc__.split()) in text


def test_help_has_the_defaults_of_the_environment(help_text):
    text = help_text(qflow)
    lam = qflow.SETTINGS["pointmaze"]["lam"]
    assert re.search(rf"--lam FLOAT lambda, [^()]*\(default: {lam}\)", text)
    text = help_text(qflow, "--env", "puzzle-3x3-play-v0")
    assert re.search(r"--lam FLOAT lambda, [^()]*\(default: 20\.0\)", text)
    text = help_text(flow_sac)
    assert re.search(r"--learning-starts INT [^()]*\(default: 1000\)", text)
    assert re.search(
        r"--policy {flow-t,flow-g,naive,gaussian} velocity [^()]*\(default: flow-t\)", text
    )
    assert re.search(r"--target-entropy FLOAT [^()]*gaussian: 0 means SAC's -A", text)


# ----------------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_the_default_runs_and_leaves_its_results(tmp_path):
    flags = "--offline-steps 40 --eval-interval 20 --log-interval 15 --eval-episodes 2".split()
    result = start(tmp_path, "qflow.py", *flags, "--seed", "3")
    assert (tmp_path / f"data/collected/{NAME}.npz").exists()
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("pointmaze-medium-navigate-singletask-v0__qflow__3__")
    assert "mean of the last 2 evaluations: success" in result.stdout
    description = "4000 transitions, 4 episodes, collected by OGBench's protocol, seed 0; not the"
    assert f"{NAME[:-3]}-singletask-v0: {description} official file\n" in result.stdout
    assert f"writing to runs/{folder.name}\n" in result.stdout

    bars = result.stderr.replace("\r", "\n").split("\n")
    assert "40/40" in result.stderr and "Warn" not in result.stderr
    assert len([line for line in bars if "/40 [" in line]) <= 3  # a line a minute in a log file

    config = common.read_config(folder)
    assert config["device"] and config["script"] == "qflow.py"
    assert config["args"]["seed"] == 3 and config["args"]["offline_steps"] == 40
    assert config["args"]["lam"] == qflow.SETTINGS["pointmaze"]["lam"]
    assert config["dataset"].startswith(description)
    rows = read_rows(folder / "train.csv")
    assert [row["step"] for row in rows] == ["15", "20", "30", "40"]  # also where it evaluates
    columns = "step critic_loss q_mean q_min q_max value_loss policy_loss steps_per_s"
    assert list(rows[0]) == columns.split()
    for row in rows:
        for name in ("critic_loss", "value_loss", "policy_loss"):
            assert 0 < float(row[name]) < 1e6
    rows = read_rows(folder / "eval.csv")
    assert list(rows[0]) == ["step", "episodes", "success", "return", "length"]
    assert [(row["step"], row["episodes"]) for row in rows] == [("20", "2"), ("40", "2")]
    assert common.read_checkpoint(folder)["step"] == 40
    assert (folder / "curve.png").stat().st_size > 10_000

    flags = "--offline-steps 20 --log-interval 20 --eval-episodes 1".split()
    result = start(tmp_path, "fql.py", *flags)  # on the data that are there now
    assert "collecting" not in result.stderr and "20/20" in result.stderr
    (folder,) = (tmp_path / "runs").glob("*__fql__0__*")
    (row,) = read_rows(folder / "train.csv")
    columns = "step critic_loss q_mean q_min q_max flow_loss distill_loss q_loss steps_per_s"
    assert list(row) == columns.split() and row["step"] == "20"


@pytest.mark.slow
def test_sac_flow_runs_online(tmp_path):
    flags = "--online-steps 220 --learning-starts 200 --log-interval 10 --eval-interval 110".split()
    result = start(tmp_path, "flow_sac.py", *flags, "--eval-episodes", "2")
    assert "mean of the last 2 evaluations: return -" in result.stdout
    assert "220/220" in result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("Pendulum-v1__flow_sac__0__")
    rows = read_rows(folder / "train.csv")
    assert [row["step"] for row in rows] == ["210", "220"]
    columns = "critic_loss policy_loss velocity_grad_norm temperature entropy steps_per_s"
    assert set(columns.split()) < set(rows[0])
    assert [row["step"] for row in read_rows(folder / "eval.csv")] == ["110", "220"]
    (row,) = read_rows(folder / "episodes.csv")
    assert row["step"] == "200" and float(row["return"]) < 0 and row["success"] == "nan"
    assert (folder / "curve.png").stat().st_size > 10_000


@pytest.mark.slow
def test_antmaze_on_data_collected_with_an_expert(tmp_path, monkeypatch, capsys):
    name = "antmaze-large-navigate-v0"
    start(tmp_path, "results/collect_antmaze.py", name, "--transitions", "1")
    (path,) = tmp_path.iterdir()
    with np.load(path) as data:
        paths = data["observations"][:, :2].reshape(10, 1001, 2)
    walked = np.abs(np.diff(paths[:, ::50], axis=1)).sum((1, 2))  # a cell of the maze is 4 wide
    assert np.median(walked) > 40, walked

    monkeypatch.chdir(tmp_path)
    flags = "--hidden 8 8 --offline-steps 4 --eval-episodes 1".split()
    start_here(monkeypatch, qflow, "--env", name, "--dataset", path.name, *flags)
    printed = capsys.readouterr().out
    assert "10000 transitions, 10 episodes" in printed and "not the official file" in printed


@pytest.mark.slow
def test_scene_on_data_collected_with_the_oracles(tmp_path, monkeypatch, capsys):
    name = "scene-play-v0"
    start(tmp_path, "results/collect_play.py", name, "--episodes", "1")
    (path,) = tmp_path.iterdir()
    with np.load(path) as data:
        assert data["terminals"].tolist() == [False] * 1000 + [True]
        cube, drawer_and_window = data["qpos"][:, 14:17], data["qpos"][:, -2:]
        buttons = data["button_states"]
    assert np.ptp(cube, axis=0).max() > 0.1 and np.ptp(drawer_and_window, axis=0).max() > 0.1
    assert buttons.shape == (1001, 2) and np.ptp(buttons) == 1  # somebody pressed one

    monkeypatch.chdir(tmp_path)
    flags = "--hidden 8 8 --offline-steps 4 --eval-episodes 1".split()
    start_here(monkeypatch, fql, "--env", name, "--dataset", path.name, *flags)
    printed = capsys.readouterr().out
    assert "1000 transitions, 1 episodes" in printed and "not the official file" in printed


@pytest.mark.slow
def test_sparse_rewards_in_the_dataset_online_and_in_evaluations(tmp_path, monkeypatch):
    name, _, env_id = common.resolve_task("puzzle-3x3-play-v0")
    rng = np.random.default_rng(0)
    with gymnasium.make(env_id) as env:
        env.reset(seed=0)
        solved = env.unwrapped._target_button_states
        button_states = rng.integers(0, 2, (41, 9))
        button_states[:, 0] = 1 - solved[0]
        button_states[7] = solved
        data = dict(
            observations=rng.normal(size=(41, *env.observation_space.shape)),
            actions=rng.uniform(-1, 1, (41, 5)),
            terminals=np.arange(41) == 40,
            qpos=np.zeros((41, 1)),
            button_states=button_states,
        )
        _, dense_reward, *_ = env.step(np.zeros(5))
        assert dense_reward < -1
    common.write_dataset(tmp_path / "data.npz", "random numbers", data)
    datasets = []
    original = qflow.train

    def train(args, dataset, *others):
        datasets.append((dataset.rewards.clone(), dataset.masks.clone()))
        return original(args, dataset, *others)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qflow, "train", train)
    flags = "--env puzzle-3x3-play-v0 --dataset data.npz --q-agg mean --num-critics 3 --rho 0.5"
    flags += " --hidden 8 8 --offline-steps 2 --online-steps 3 --eval-episodes 1 --horizon 5"
    start_here(monkeypatch, qflow, *flags.split(), "--sparse")
    ((rewards, masks),) = datasets
    assert rewards[7] == 0 and masks[7] == 0
    assert rewards.sum() == -40 and rewards.min() == -1 and masks.sum() == 40
    (folder,) = (tmp_path / "runs").iterdir()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["collected"]["rewards"][:3].tolist() == [-1, -1, -1]
    for row in read_rows(folder / "eval.csv"):
        assert row["success"] == "0.0" and row["return"] == "-500.0" and row["length"] == "500.0"

    monkeypatch.setattr(sys, "argv", ["export_online.py", str(folder), "online.npz"])
    runpy.run_path(str(ROOT / "results/export_online.py"), run_name="__main__")
    _, source = common.load_dataset(tmp_path / "online.npz", env_id, "cpu")
    assert source == f"collected online in {name}, sparse rewards, seed 0; not the official file"


# ------------------------------------------------------------------------------------- tracking

SMALL = "--hidden 8 8 --offline-steps 4 --eval-interval 2 --log-interval 1 --eval-episodes 1"


def wandb_records(path):
    """The records of a .wandb file: protocol buffers in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data.startswith(b":W&B")
    position = 7
    content = b""
    while position + 7 <= len(data):
        left_in_block = 2**15 - position % 2**15
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        is_last_piece = kind in (1, 4)
        if is_last_piece:
            yield Record.FromString(content)
            content = b""


def tracked(path):
    """What a .wandb file has: {(step, name): value}, and the config."""
    logged = {}
    config = {}
    for record in wandb_records(path):
        for item in record.history.item:
            name = item.key or ".".join(item.nested_key)
            logged[record.history.step.num, name] = json.loads(item.value_json)
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
    return logged, config


def same_number(text, value):
    """Whether the text of a number in a CSV file is this number."""
    return float(text) == value or math.isnan(float(text)) and math.isnan(value)


@pytest.mark.slow
def test_tracked_rows_are_those_of_the_csv_files(dataset_file, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "run"
    flags = [*SMALL.split(), "--dataset", dataset_file, "--start-or-resume", folder]
    start_here(monkeypatch, qflow, *flags, "--track")
    wandb.teardown()
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    logged, config = tracked(path)
    num_values = 0
    for section in ("train", "eval"):
        for row in read_rows(folder / f"{section}.csv"):
            for name, text in row.items():
                value = float(logged[int(row["step"]), f"{section}/{name}"])
                assert same_number(text, value), (row, name)
                num_values += 1
    assert num_values == sum("/" in name for _, name in logged) == 4 * 8 + 2 * 5
    assert config["args"]["offline_steps"] == 4 and config["script"] == "qflow.py"

    wandb_id, _ = common.read_config(folder)["wandb"]
    assert wandb_id != folder.name  # a sweep that starts anew has another run of this name
    start_here(monkeypatch, qflow, "--resume", folder, "--offline-steps", 6, "--no-track")
    start_here(monkeypatch, qflow, "--resume", folder, "--offline-steps", 8, "--track")
    wandb.teardown()
    paths = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime)
    assert [path.stem for path in paths] == 2 * [f"run-{wandb_id}"]
    logged, _ = tracked(paths[-1])
    assert {step for step, name in logged if "/" in name} == {7, 8}

    copied = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("wandb"))
    start_here(monkeypatch, qflow, "--resume", copied, "--offline-steps", 10)
    wandb.teardown()
    (path,) = copied.glob("wandb/offline-run-*/run-*.wandb")
    assert path.stem != f"run-{wandb_id}"  # a run of its own


def test_tracking_without_the_package_is_one_line(dataset_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    flags = [*SMALL.split(), "--dataset", dataset_file, "--run-dir", tmp_path / "runs"]
    with pytest.raises(common.UserError, match="^--track: needs .*: pip install wandb$"):
        start_here(monkeypatch, qflow, *flags, "--track")


@pytest.mark.slow
def test_tracking_without_a_login_is_one_line(dataset_file, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    flags = [*SMALL.split(), "--dataset", dataset_file, "--run-dir", tmp_path / "runs"]
    try:
        with pytest.raises(common.UserError, match="--track: [^\n]*login"):
            start_here(monkeypatch, qflow, *flags, "--track")
    finally:
        wandb.teardown()


# ------------------------------------------------------------------------------------ benchmark


@pytest.mark.slow
@pytest.mark.parametrize("num_critics", [2, 5])
def test_bench_prints_one_line_of_json(num_critics, tmp_path):
    flags = "--hidden 32 32 32 32 --batch-size 64 --flow-steps 4 --seconds 0.2".split()
    if num_critics != 2:  # the default
        flags += ["--num-critics", num_critics]
    result = start(tmp_path, "tests/bench_update.py", *flags)
    line = json.loads(result.stdout)
    assert line["num_critics"] == num_critics
    assert line["updates_per_s"] > 0 and line["ms_p10"] <= line["ms_median"] <= line["ms_p90"]
    assert line["floor_ratio"] == pytest.approx(line["ms_median"] / line["floor_ms"], rel=1e-2)
    assert line["peak_memory_mb"] > 50

    def products(in_dim, out_dim):
        """Multiply-adds per row of one pass through a network, and those of its first layer."""
        return in_dim * 32 + 3 * 32 * 32 + 32 * out_dim, in_dim * 32

    velocity, velocity_first = products(29 + 8 + 1, 8)
    critic, critic_first = products(29 + 8, 1)
    value, value_first = products(29 + 8 + 64, 1)
    rollouts = 2 * 4 * velocity
    targets = 2 * num_critics * critic
    guidance = 2 * num_critics * value
    # Backward: once more for the weights, and for the inputs of all layers but the first.
    learning = 3 * velocity - velocity_first
    learning += num_critics * (3 * critic - critic_first)
    learning += num_critics * (3 * value - value_first)
    multiply_adds = 64 * (rollouts + targets + guidance + learning)
    assert line["gflop"] == pytest.approx(2e-9 * multiply_adds, rel=0.01)


@pytest.mark.slow
def test_bench_of_sac_flow(tmp_path):
    flags = "--method flow_sac --hidden 64 64 --batch-size 64 --policy naive --seconds 0.2".split()
    line = json.loads(start(tmp_path, "tests/bench_update.py", *flags).stdout)
    velocity = (17 + 6 + 1) * 512 + 512 * 512 + 512 * 6  # multiply-adds per row and pass
    log_sigma = (17 + 1) * 512 + 512 * 512 + 512 * 6
    step = velocity + log_sigma
    # Backward, but for the inputs of the first step (x_0 and the state have no gradients), of which
    # the first step has the least, and sigma's none at all.
    inputs = 3 * velocity - 3 * (17 + 1) * 512 + (512 * 512 + 512 * 6)
    inputs += 4 * (512 * 512 + 512 * 6)
    critic = 2 * (23 * 64 + 64 * 64 + 64)
    first = 2 * 23 * 64
    of_critics = 4 * step + 2 * (3 * critic - first)  # s and s' in one batch
    of_policy = 4 * step + 4 * step + inputs + 2 * critic
    multiply_adds = 64 * (of_critics + of_policy / 3)
    assert line["gflop"] == pytest.approx(2e-9 * multiply_adds, rel=0.02)
    assert line["policy"] == "naive" and line["floor_ratio"] > 1
