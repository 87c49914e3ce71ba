"""A user's mistake is named in a short message, with exit code 2; it never ends in a traceback."""

import io
import json
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import mujoco
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

import common
import flow_sac
import fql
import qflow

SCRIPTS = dict(qflow=qflow, fql=fql, flow_sac=flow_sac)
NAME = "pointmaze-medium-navigate-v0"
LONG = "ü½" * 90  # longer than a line, and than a file's name may be
BOX = str.maketrans("", "", "│─╭╮╰╯")  # tyro draws a box around its messages


class Accepted(Exception):
    """The command line is without mistakes; what would follow takes long."""


class Bomb:
    """Makes a file named exploded when somebody unpickles it."""

    def __reduce__(self):
        return open, ("exploded", "w")


def one_environment(make_env, num_envs):
    """make_envs without processes: the environment must exist, but nothing is played."""
    env = make_env()
    env.close()
    return Mock(
        metadata=dict(autoreset_mode=AutoresetMode.SAME_STEP),
        single_observation_space=env.observation_space,
        single_action_space=env.action_space,
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """An empty home and no waiting; where a new dataset is needed, the test has seen enough."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "collect_pointmaze", Mock(side_effect=Accepted))
    monkeypatch.setattr(common, "time", Mock())
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "make_envs", one_environment)


@pytest.fixture
def start(monkeypatch):
    """start("qflow", "--lr", 1): the main function of a script with this command line."""

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        SCRIPTS[script].main()

    return run


@pytest.fixture
def refused(start, capsys):
    """refused("qflow", "--lr", "x", says=["--lr"]): the message, which contains these words."""

    def run(script, *words, says=()):
        capsys.readouterr()
        with pytest.raises((common.UserError, SystemExit)) as error:
            start(script, *words)
        if error.type is SystemExit:  # tyro has printed a box
            assert error.value.code == 2
            message = capsys.readouterr().err
        else:
            message = str(error.value)
            assert "\n" not in message
        assert message and "Traceback" not in message
        for word in says:
            assert without_spaces(word) in without_spaces(message), (words, message)
        return message

    return run


def without_spaces(text):
    """The text without box and spaces: tyro breaks words that are longer than a line."""
    return "".join(str(text).translate(BOX).split())


# --------------------------------------------------------------------------------- single flags

NUMBER = ["x", "", "nan", "inf", "1e+30", LONG]
COUNT = [*NUMBER, 0, -1, 1.5, 10**30], [1, 10**6]
RATE = [*NUMBER, 0, -1, 1e-30], [1e-6, 100]
FRACTION = [*NUMBER, 0, -1, 1.0001], [1e-6, 1]
SWITCH = ["yes", "0"]
CHOICE = ["", "x", "None", LONG]
PLACE = ["nowhere", "/", "/dev/null", LONG]
ENV = ["", "x", LONG, "HalfCheeta-v5", "antmaze-gaint-navigate-v0"]
URL = ["x", "ftp://x/y", "http://", "http://[", LONG]
VALUES = {  # flag -> (values that are mistakes, values that are none)
    "env": ([*ENV, "cube-double-play-singletask-task6-v0"], [NAME, "pointmaze-large-stitch-v0"]),
    "flow_sac env": ([*ENV, "CartPole-v1", "Taxi-v3"], ["Pendulum-v1"]),
    "task": ([*NUMBER, -1, 1.5, 6, 100], [0, 5]),
    "dataset": (PLACE, []),
    "dataset_url": (URL, []),
    "sparse": (SWITCH, []),
    "seed": ([*NUMBER, -1, 1.5, 2**31], [0, 2**31 - 1]),
    "device": (["", "gpu", "cuda:99", "-1", LONG], ["auto", "cpu"]),
    "offline_steps": COUNT,
    "online_steps": ([*NUMBER, -1, 1.5, 10**30], [0, 10**6]),
    "flow_sac online_steps": ([*COUNT[0], 1000], [1001, 10**6]),
    "flow_sac offline_steps": ([*NUMBER, -1, 1.5, 1, 10**30], [0]),
    "flow_sac task": ([*NUMBER, -1, 1.5, 1, 6], [0]),
    "flow_sac dataset_url": (["x", LONG], []),
    "bc_weight": ([*NUMBER, -1], [0, 100]),
    "noise_std": ([*NUMBER, -1, 0.6], [0]),
    "acting_noise_std": ([*NUMBER, -1, 0.6, 0.1], [0]),
    "learning_starts": ([*NUMBER, -1, 1.5, 15_000], [0, 1, 14_999]),
    "batch_size": COUNT,
    "lr": RATE,
    "policy_lr": RATE,
    "q_lr": RATE,
    "policy": (CHOICE, ["flow-t", "flow-g", "naive"]),
    "policy_width": ([*NUMBER, -1, 1.5, 3, 10**30], [0, 4]),
    "policy_frequency": COUNT,
    "critic": (CHOICE, ["crossq", "sac"]),
    "discount": FRACTION,
    "tau": FRACTION,
    "hidden": ([*NUMBER, 0, -1, 1.5, 10**30], [1, 10_000]),
    "flow_steps": ([*COUNT[0], 1001], [1, 1000]),
    "q_agg": (CHOICE, ["mean", "min"]),
    "num_critics": ([*COUNT[0], 1001], [1, 1000]),
    "rho": ([*NUMBER, -1, 1001, 0.5], [0]),  # pointmaze has --q-agg min
    "horizon": ([*COUNT[0], 1001], [1, 1000]),
    "lam": RATE,
    "alpha": RATE,
    "normalize_q_loss": (SWITCH, []),
    "time_dim": ([*COUNT[0], 7, 1002], [2, 64]),
    "init_temperature": RATE,
    "target_entropy": (NUMBER, [0, -3.5]),
    "eval_interval": COUNT,
    "eval_episodes": COUNT,
    "log_interval": COUNT,
    "run_dir": ([], ["", "x"]),
    "resume": (PLACE, []),
    "evaluate": (PLACE, []),
    "video": (SWITCH, []),
    "track": (SWITCH, []),
    "compile": (SWITCH, []),
    "matmul_precision": (CHOICE, ["auto", "highest", "high", "medium"]),
}
FLAGS = [(script, name) for script in SCRIPTS for name in vars(SCRIPTS[script].Args())]


@pytest.mark.parametrize("script, name", FLAGS)
def test_every_flag(script, name, start, refused, monkeypatch):
    wrong, right = VALUES.get(f"{script} {name}") or VALUES[name]
    flag = "--" + name.replace("_", "-")
    for value in wrong:
        message = refused(script, flag, value, says=[value])
        assert flag in message or wrong in (PLACE, URL, SWITCH)
    monkeypatch.setattr(common, "download", Mock(side_effect=Accepted))
    monkeypatch.setattr(common, "Run", Mock(side_effect=Accepted))
    for value in right:
        with pytest.raises(Accepted):
            start(script, flag, value)


def test_command_lines(refused, monkeypatch):
    refused("qflow", "--lr", "--seed", 3, says=["--lr"])
    refused("qflow", "--lr", 1, "--lr", "nan", says=["--lr nan"])
    refused("qflow", "--hidden", says=["--hidden"])
    refused("qflow", "--hidden", 8, 0, says=["--hidden (8, 0): must be between 1 and 10000"])
    refused("qflow", "--hiden", 8, says=["--hiden, 8", "Perhaps you meant: --hidden"])
    refused("qflow", "--video", says=["--video: needs --evaluate"])
    refused("qflow", "extra", says=["extra"])
    refused("fql", "--offline-steps", 0, says=["--offline-steps 0", "or --online-steps must be"])
    says = ["--env pointmaze-x-v0", "no such environment"]
    refused("fql", "--env", "pointmaze-x-v0", "--online-steps", 5, says=says)
    refused("fql", "--lam", 1, says=["--lam"])
    refused("flow_sac", "--env", "HalfCheeta-v5", says=["Did you mean: `HalfCheetah`"])
    refused("flow_sac", "--env", "CartPole-v1", says=["requires a Box action space"])
    refused("flow_sac", "--online-steps", 500, says=["--learning-starts 1000: must be below"])
    refused("qflow", "--env", "scene-play-singletask-task2-v0", "--task", 3, says=["--task 3"])
    says = ["--rho 0.5: must be 0 unless --q-agg is mean"]
    refused("qflow", "--rho", 0.5, "--q-agg", "min", says=says)
    refused("qflow", "--env", "puzzle-3x3-play-v0", "--rho", 0.5, says=says)
    refused("fql", "--env", "antmaze-large-navigate-v0", "--rho", 0.5, says=says)
    for name in (NAME, "cube-double-play-v0", "puzzel-3x3-play-v0"):
        says = [f"--sparse: is for scene and puzzle, not for --env {name}"]
        refused("qflow", "--env", name, "--sparse", says=says)
    refused("fql", "--env", "scene-plai-v0", "--sparse", says=["no such environment"])
    monkeypatch.setattr(sys, "argv", "qflow.py --lr nan --lr 2 --hidden 9 9 --hidden 8".split())
    args = qflow.parse_args()
    assert args.lr == 2 and args.hidden == (8,)  # the last of a repeated flag counts


def test_flags_of_a_dataset_need_one(refused):
    names = ("Pendulum-v1", "cube-single-singletask-v0")  # the latter is a Gymnasium id
    for flags in (["--task", 2], ["--dataset", "x.npz"], ["--offline-steps", 5]):
        for name in names:
            refused("flow_sac", "--env", name, *flags, says=[f"--env {name} is not an OGBench"])
    says = ["--acting-noise-std 0.02: must be positive with --noise-std, else 0"]
    refused("flow_sac", "--env", NAME, "--noise-std", 0, says=says)
    says = ["--learning-starts 2: must be at least --horizon 5 - 1"]
    refused("flow_sac", "--learning-starts", 2, "--horizon", 5, says=says)
    refused("flow_sac", "--env", "cube-double-play-v0", "--task", 6, says=["--task 6", "closest"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_compiling_without_a_compiler(script, start, refused, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    refused(script, "--device", "cpu", "--compile", says=["--compile: no C++ compiler found"])
    monkeypatch.setenv("CXX", "my-compiler")
    monkeypatch.setattr(common, "Run", Mock(side_effect=Accepted))
    with pytest.raises(Accepted):
        start(script, "--device", "cpu", "--compile")


# --------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def dataset_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    common.collect_pointmaze(NAME, path, num_episodes=2, workers=1)
    return path


@pytest.fixture(scope="module")
def finished(dataset_file, tmp_path_factory):
    """The folder of a small run that has ended."""
    runs = tmp_path_factory.mktemp("finished")
    flags = "--offline-steps 4 --eval-interval 2 --log-interval 1 --eval-episodes 2 --hidden 8 8"
    with pytest.MonkeyPatch.context() as patch:
        words = [*flags.split(), "--dataset", str(dataset_file), "--run-dir", str(runs)]
        patch.setattr(sys, "argv", ["qflow.py", *words])
        qflow.main()
    (folder,) = runs.iterdir()
    return folder


def as_bytes(save, *args, **arrays):
    """What np.savez or a similar function writes."""
    file = io.BytesIO()
    save(file, *args, **arrays)
    return file.getvalue()


def test_files_that_are_no_datasets(dataset_file, refused):
    with np.load(dataset_file) as file:
        arrays = dict(file)
    bomb = np.array([Bomb()], object)
    contents = dict(
        empty=b"",
        text=b"<html>",
        pickle=pickle.dumps(Bomb()),
        objects=as_bytes(np.save, bomb),
        half=dataset_file.read_bytes()[:9000],
        array=as_bytes(np.save, arrays["actions"]),
    )
    for name in ("observations", "source", "qvel"):
        contents[name] = as_bytes(np.savez, **{**arrays, name: bomb})
    for name, content in contents.items():
        Path(name).write_bytes(content)
    with zipfile.ZipFile("pickles", "w") as file:  # pickles without the header of NumPy's files
        for name in arrays:
            file.writestr(f"{name}.npy", pickle.dumps(Bomb()))
    Path("loop").symlink_to("loop")  # even root cannot read it
    for name in [*contents, "pickles", "loop"]:
        refused("qflow", "--dataset", name, says=[f"{name}: not a usable dataset: "])
    assert not Path("exploded").exists()


def test_a_chunk_longer_than_the_dataset(dataset_file, refused, tmp_path):
    with np.load(dataset_file) as file:
        arrays = {name: array[:61] if array.ndim else array for name, array in file.items()}
    arrays["terminals"][-1] = 1
    np.savez("small.npz", **arrays)
    refused("qflow", "--dataset", "small.npz", "--horizon", 61, says=["--horizon 61: longer"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_is_found_or_does_not_matter(save, dataset_file, tmp_path, monkeypatch):
    with np.load(dataset_file) as file:
        arrays = {name: array[:61] if array.ndim else array for name, array in file.items()}
    arrays["terminals"][-1] = 1
    data = as_bytes(save, **arrays)
    path = tmp_path / "small.npz"
    path.write_bytes(data)
    env_id = common.resolve_task(NAME)[2]
    rng = np.random.default_rng(0)
    num_found = 0
    with common.gymnasium.make(env_id) as env:
        monkeypatch.setattr(common.gymnasium, "make", lambda _: nullcontext(env))
        whole = vars(common.load_dataset(path, env_id, "cpu")[0])
        for _ in range(300):
            a, b, c, d = np.sort(rng.integers(0, len(data), 4))
            noisy = bytearray(data)
            for i in rng.integers(0, len(data), rng.integers(1, 9)):
                noisy[i] = rng.integers(256)
            cases = [
                noisy,
                data[:a],
                data[:a] + data[b:],  # something is missing
                data[:b] + data[a:],  # something is repeated
                data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:],  # in another order
            ]
            path.write_bytes(cases[rng.integers(len(cases))])
            try:
                dataset = vars(common.load_dataset(path, env_id, "cpu")[0])
                assert all(np.array_equal(dataset[name], whole[name]) for name in whole)
            except common.UserError as error:
                num_found += 1
                assert str(path) in str(error) and "\n" not in str(error)
    assert num_found > 240  # else the damage would be none


@pytest.mark.parametrize("mode", ["--resume", "--evaluate"])
def test_checkpoints_that_are_damaged_or_something_else(mode, finished, refused):
    path = Path(shutil.copytree(finished, "a_run")) / "checkpoint.pt"
    data = path.read_bytes()
    state = torch.load(path)
    contents = [data[: int(len(data) * share)] for share in (0, 0.001, 0.1, 0.5, 0.9, 0.99)]
    contents += [np.random.default_rng(0).bytes(999), pickle.dumps(Bomb(), 2)]
    for value in (Bomb(), {}, [], [1], None, torch.ones(3), {**state, "nets": Bomb()}):
        contents.append(as_bytes(lambda file, value=value: torch.save(value, file)))
    for config in ([], {}, dict(script=3), dict(script="other.py")):
        content = as_bytes(
            lambda file, config=config: torch.save({**state, "config": config}, file)
        )
        contents.append(content)
    for content in contents:
        path.write_bytes(content)
        refused("qflow", mode, "a_run", says=["a_run: "])
    assert not Path("exploded").exists()


def test_a_run_of_another_version_of_the_script(finished, refused):
    path = Path(shutil.copytree(finished, "a_run")) / "checkpoint.pt"
    state = torch.load(path)
    state["config"]["args"]["new"] = 3
    torch.save(state, path)
    for mode in ("--resume", "--evaluate"):
        refused("qflow", mode, "a_run", says=["settings unknown to this script: {'new'}"])


def test_a_run_with_weights_only(finished, start, refused, monkeypatch, capsys):
    path = Path(shutil.copytree(finished, "a_run")) / "checkpoint.pt"
    state = torch.load(path)
    names = ("config", "step", "sizes", "nets")
    torch.save({name: state[name] for name in names}, path)
    refused("qflow", "--resume", "a_run", says=["a_run: has weights only, for --evaluate"])
    monkeypatch.setattr(qflow, "evaluate", Mock(return_value=dict(length=np.ones(1))))
    start("qflow", "--evaluate", "a_run")
    assert "\nlength 1 (95 %: " in capsys.readouterr().out


def test_a_run_without_a_checkpoint(finished, start, refused):
    folder = Path(shutil.copytree(finished, "a_run"))
    (folder / "checkpoint.pt").unlink()
    refused("qflow", "--evaluate", folder, says=["a_run: has no checkpoint.pt"])
    text = (folder / "config.json").read_text()
    for content in ("", text[: len(text) // 2], "[]", "3", "{}"):
        (folder / "config.json").write_text(content)
        for mode in ("--resume", "--evaluate"):
            refused("qflow", mode, folder, says=["a_run: damaged, or not a run"])
    (folder / "config.json").unlink()
    for mode in ("--resume", "--evaluate"):
        refused("qflow", mode, folder, says=["a_run: damaged, or not a run", "No such file"])


@pytest.mark.parametrize("name", ["config.json", "train.csv", "eval.csv"])
def test_what_is_done_to_a_file_for_the_reader_is_undone(name, finished, start):
    path = Path(shutil.copytree(finished, "a_run")) / name
    start("qflow", "--resume", "a_run")
    data = path.read_bytes()
    if name != "config.json":  # which has --resume now
        assert data == (finished / name).read_bytes()
    for content in (b"", b"\xff\x00\n", data[:-5], data + b"9,9\n", data.replace(b",", b",x")):
        path.write_bytes(content)
        start("qflow", "--resume", "a_run")
        assert path.read_bytes() == data
    path.unlink()
    start("qflow", "--resume", "a_run")
    assert path.read_bytes() == data


def test_what_a_run_may_change(finished, start, refused, monkeypatch):
    free = {"offline_steps", "online_steps", "eval_interval", "eval_episodes", "log_interval"}
    free |= {"compile", "track"}
    other = {"device", "dataset", "dataset_url", "resume", "evaluate", "video"}
    other |= {"sparse", "rho"}  # impossible with this run's environment and q_agg: the next test
    saved = json.loads((finished / "config.json").read_text())["args"]
    for name in saved.keys() - free - other:
        flag = "--" + name.replace("_", "-")
        old = saved[name]
        words = old if name == "hidden" else [old]
        monkeypatch.setattr(sys, "argv", ["qflow.py", "--resume", str(finished)])
        sys.argv += [flag, *map(str, words)]  # the saved value, repeated
        assert json.loads(json.dumps(vars(qflow.parse_args())[name])) == old
        new = next(x for x in [*VALUES[name][1], "x/y"] if str(x) not in map(str, words))
        before = tuple(old) if name == "hidden" else old
        says = [flag, new, f": {finished} was trained with {before}"]
        refused("qflow", "--resume", finished, flag, new, says=says)
    changes = dict(
        offline_steps=9, online_steps=7, eval_interval=3, eval_episodes=1, log_interval=5
    )
    monkeypatch.setattr(sys, "argv", ["qflow.py", "--resume", str(finished), "--compile"])
    for name, value in changes.items():
        sys.argv += ["--" + name.replace("_", "-"), str(value)]
    sys.argv += ["--track", "--dataset", "elsewhere.npz"]
    args = vars(qflow.parse_args())
    changes.update(compile=True, track=True, dataset="elsewhere.npz")
    assert {name: args[name] for name in changes} == changes


def test_a_run_keeps_its_pessimism_and_its_rewards(finished, refused, tmp_path):
    state = torch.load(finished / "checkpoint.pt", weights_only=True)
    changes = dict(env="puzzle-3x3-play-v0", q_agg="mean", rho=0.5, sparse=True)
    state["config"]["args"].update(changes)
    run = tmp_path / "sparse_run"
    run.mkdir()
    torch.save(state, run / "checkpoint.pt")
    for mode in ("--resume", "--evaluate"):
        for flag, old in (("--rho 0.7", 0.5), ("--rho 0.0", 0.5), ("--no-sparse", True)):
            says = [flag.removeprefix("--no-"), f"{run} was trained with {old}"]
            refused("qflow", mode, run, *flag.split(), says=says)


def test_what_an_evaluation_may_change(finished, start, refused, monkeypatch, capsys):
    results = dict(success=np.ones(1), length=np.ones(1))
    evaluate = Mock(return_value=results)
    monkeypatch.setattr(qflow, "evaluate", evaluate)
    start("qflow", "--evaluate", finished, "--eval-episodes", 1, "--seed", 5)
    assert evaluate.call_args.args[2:] == (1, 5)
    assert capsys.readouterr().out.startswith("success 1 (95 %: ")
    lr = qflow.SETTINGS["pointmaze"]["lr"]
    for flag, new, old in (("--lr", 1.0, lr), ("--offline-steps", 9, 4), ("--hidden", 9, (8, 8))):
        says = [flag, new, f"{finished} was trained with {old}"]
        refused("qflow", "--evaluate", finished, flag, new, says=says)
    says = ["--resume and --evaluate exclude each other"]
    refused("qflow", "--evaluate", finished, "--resume", finished, says=says)
    for script, mode in (("fql", "--resume"), ("fql", "--evaluate"), ("flow_sac", "--resume")):
        says = [f"{finished}: a run of qflow.py, not of {script}.py"]
        refused(script, mode, finished, says=says)


def test_a_video_where_nothing_can_be_rendered(finished, refused, monkeypatch):
    monkeypatch.setattr(qflow, "evaluate", Mock(return_value={}))
    monkeypatch.setattr(qflow, "film", Mock(side_effect=mujoco.FatalError("no display")))
    says = ["--video: cannot render (no display)", "MUJOCO_GL"]
    refused("qflow", "--evaluate", finished, "--video", says=says)


def test_places_that_cannot_be_written(dataset_file, refused, tmp_path, monkeypatch):
    Path("file").touch()
    Path(".ogbench").touch()
    for place in ("file", "file/x", "/proc/x", "/dev/null", LONG):
        refused("qflow", "--dataset", dataset_file, "--run-dir", place, says=[place])
        refused("flow_sac", "--run-dir", place, says=[place])
    for home in (tmp_path, tmp_path / "file", Path("/proc/x"), tmp_path / LONG):
        monkeypatch.setenv("HOME", str(home))
        refused("qflow", says=[home / ".ogbench"])
        refused("fql", "--env", "pointmaze-medium-stitch-v0", says=[home / ".ogbench"])


# ----------------------------------------------------------------------------------- processes


def run_as_main(script, monkeypatch, *words):
    """Run a script in this process as `python SCRIPT WORDS` would."""
    monkeypatch.setattr("signal.signal", Mock())
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
    runpy.run_path(SCRIPTS[script].__file__, run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "error, code, line",
    [
        (common.UserError("--x 3: wrong"), 2, "{script}.py: error: --x 3: wrong\n"),
        (MemoryError("Unable to allocate 9 GiB"), 2, "{script}.py: error: Unable to allocate"),
        (torch.OutOfMemoryError("CUDA out of memory"), 2, "{script}.py: error: CUDA out of memory"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(script, error, code, line, monkeypatch, capsys):
    monkeypatch.setattr(common, "read_checkpoint", Mock(side_effect=error))
    with pytest.raises(SystemExit) as exit:
        run_as_main(script, monkeypatch, "--resume", "x")
    assert exit.value.code == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(line.format(script=script)) and printed.err.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_of_ours_shows_its_traceback(script, monkeypatch):
    mistake = NameError("name 'checkpiont' is not defined")
    monkeypatch.setattr(common, "read_checkpoint", Mock(side_effect=mistake))
    with pytest.raises(NameError, match="checkpiont"):
        run_as_main(script, monkeypatch, "--resume", "x")


def test_a_mistake_inside_a_network_shows_its_traceback(finished, start, monkeypatch):
    mistake = NameError("name 'obs_dmi' is not defined")
    monkeypatch.setattr(qflow, "Critic", Mock(side_effect=mistake))
    with pytest.raises(NameError, match="obs_dmi"):
        start("qflow", "--evaluate", finished)


@pytest.mark.parametrize(
    "script, words, message",
    [
        ("flow_sac", "--env HalfCheeta-v5", "flow_sac.py: error: --env HalfCheeta-v5: "),
        ("qflow", "--learning-rate 3", "╭─ Unrecognized options ─"),
    ],
)
def test_a_process_says_no_more_than_that(script, words, message, tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPTS[script].__file__, *words.split()],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 2 and result.stdout == "", result.stderr
    assert result.stderr.startswith(message) and "Traceback" not in result.stderr
    if message.startswith(script):
        assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing was made before the mistake was found
