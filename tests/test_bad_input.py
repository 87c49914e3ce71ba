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
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

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


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No datasets are there; where a new one is needed, the test has seen enough."""
    monkeypatch.setenv("OGBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "collect_pointmaze", Mock(side_effect=Accepted))
    monkeypatch.setattr(common, "download", Mock(side_effect=Accepted))


@pytest.fixture
def start(monkeypatch):
    """start("qflow", "--lr", 1): the main function of a script with this command line."""
    precision = torch.get_float32_matmul_precision()

    def run(script, *words):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        SCRIPTS[script].main()

    yield run
    torch.set_float32_matmul_precision(precision)


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


# --------------------------------------------------------------------------------- command line

WRONG = [  # script, flags, words of the message
    ("qflow", "--lr x", "--lr"),
    ("qflow", "--lr --seed 3", "--lr"),
    ("qflow", "--lr 1 --lr nan", "--lr nan: must be positive"),
    ("qflow", "--batch-size 1.5", "--batch-size"),
    ("qflow", "--hidden", "--hidden"),
    ("qflow", "--hiden 8", "Perhaps you meant: --hidden"),
    ("qflow", "extra", "extra"),
    ("qflow", "--sparse yes", "yes"),
    ("qflow", "--q-agg max", "max"),
    ("qflow", "--time-dim 7", "--time-dim 7: must be even"),
    ("qflow", "--rho 0.5 --q-agg min", "--rho 0.5: needs --q-agg mean"),
    ("qflow", "--env puzzle-3x3-play-v0 --rho 0.5", "--rho 0.5: needs --q-agg mean"),
    ("qflow", f"--env {NAME} --sparse", f"is for scene and puzzle, not for --env {NAME}"),
    ("qflow", "--env puzzel-3x3-play-v0 --sparse", "is for scene and puzzle, not for --env puzzel"),
    ("qflow", "--env antmaze-gaint-navigate-v0", "no such environment; closest: antmaze-giant-"),
    (
        "qflow",
        "--env scene-play-singletask-task2-v0 --task 3",
        "--task 3: this name already has a task",
    ),
    ("qflow", "--task 6", "--task 6: no such environment"),
    ("qflow", "--matmul-precision auto", "auto"),
    ("qflow", "--device gpu", "--device gpu: cannot be used"),
    ("qflow", "--resume nowhere", "nowhere: damaged, or not a run"),
    ("qflow", "--resume x --start-or-resume y", "exclude each other"),
    ("fql", "--lam 1", "--lam"),
    ("fql", "--env pointmaze-x-v0 --online-steps 5", "no such environment"),
    ("fql", "--env antmaze-large-navigate-v0 --rho 0.5 --q-agg min", "--rho 0.5: needs"),
    ("fql", "--env scene-plai-v0 --sparse", "no such environment"),
    ("flow_sac", "--env HalfCheeta-v5", "Did you mean: `HalfCheetah`"),
    ("flow_sac", "--env CartPole-v1", "--env CartPole-v1: requires bounded actions"),
    ("flow_sac", "--online-steps 500", "--learning-starts 1000: must be below --online-steps"),
    (
        "flow_sac",
        f"--env {NAME} --online-steps 5000",
        "--learning-starts 5000: must be below --online-steps",
    ),
    ("flow_sac", "--learning-starts 2 --horizon 5", "--learning-starts 2: must be at least"),
    ("flow_sac", "--env cube-double-v0", "no such environment; closest: cube-double-"),
    ("flow_sac", "--policy-width 3", "--policy-width 3: must be 0 or at least 4"),
    ("flow_sac", "--policy gaussian --noise-std 0.1", "--policy gaussian: needs --noise-std 0"),
    (
        "flow_sac",
        f"--env {NAME} --noise-std 0 --policy gaussian",
        "--noise-std 0 and --offline-steps 0",
    ),
    ("flow_sac", "--env cube-double-play-v0 --task 6", "--task 6: no such environment"),
    ("flow_sac", "--task 2", "--task 2: --env Pendulum-v1 is not an OGBench dataset"),
    ("flow_sac", "--dataset x.npz", "--dataset x.npz: --env Pendulum-v1 is not an OGBench"),
    ("flow_sac", "--offline-steps 5", "--offline-steps 5: --env Pendulum-v1 is not an OGBench"),
]


@pytest.mark.parametrize("script, flags, words", WRONG)
def test_a_mistake_on_the_command_line(script, flags, words, refused):
    refused(script, *flags.split(), says=[words])


@pytest.mark.parametrize(
    "script, flags",
    [
        ("qflow", ""),
        ("qflow", "--rho 0 --seed 0 --lr 100 --discount 1 --tau 1 --hidden 1 --time-dim 2"),
        ("qflow", "--rho 0.5 --q-agg mean --num-critics 10 --offline-steps 0 --online-steps 1"),
        ("qflow", "--start-or-resume nowhere"),
        ("fql", "--env antmaze-large-navigate-v0 --rho 0.5 --q-agg mean --task 5"),
        ("flow_sac", f"--env {NAME} --target-entropy -3.5 --bc-weight 0 --learning-starts 0"),
        ("flow_sac", f"--env {NAME} --noise-std 0.5 --policy-width 4"),
    ],
)
def test_values_that_are_no_mistakes(script, flags, start):
    with pytest.raises(Accepted):
        start(script, *flags.split())


@pytest.mark.parametrize("script", [qflow, fql, flow_sac])
def test_every_number_is_checked(script):
    defaults = script.Args()
    script.check_args(defaults)
    for name, value in vars(defaults).items():
        if type(value) in (int, float) and name != "target_entropy":
            flag = "--" + name.replace("_", "-")
            with pytest.raises(common.UserError, match=f"^{flag} -1: must be "):
                script.check_args(replace(defaults, **{name: -1}))
            if name in ("tau", "flow_steps", "lam", "alpha", "horizon", "eval_interval", "q_lr"):
                with pytest.raises(common.UserError, match=f"^{flag} 0: must be positive"):
                    script.check_args(replace(defaults, **{name: 0}))


def test_sparse_rewards_are_accepted_where_there_are_some():
    for script in (qflow, fql):
        for name in ("scene-play-v0", "puzzle-3x3-noisy-singletask-task2-v0"):
            script.check_args(script.Args(env=name, sparse=True))


def test_the_last_of_a_repeated_flag_counts(monkeypatch):
    monkeypatch.setattr(sys, "argv", "qflow.py --lr nan --lr 2 --hidden 9 9 --hidden 8".split())
    args = qflow.parse_args()
    assert args.lr == 2 and args.hidden == (8,)


@pytest.mark.parametrize("script", SCRIPTS)
def test_compiling_is_tried_before_the_data_are_loaded(script, refused, monkeypatch):
    compiled = Mock(side_effect=RuntimeError("no compiler"))
    monkeypatch.setattr(torch, "compile", Mock(return_value=compiled))
    refused(script, "--device", "cpu", "--compile", says=["--compile: torch cannot compile here"])


# --------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def dataset_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    common.collect_pointmaze(NAME, path, num_episodes=1, workers=1)
    return path


@pytest.fixture(scope="module")
def small_arrays(dataset_file):
    """The first 61 rows of the dataset, one episode."""
    with np.load(dataset_file) as file:
        arrays = {name: array[:61] if array.ndim else array for name, array in file.items()}
    arrays["terminals"][-1] = 1
    return arrays


@pytest.fixture(scope="module")
def finished(dataset_file, tmp_path_factory):
    """The folder of a small run that has ended."""
    runs = tmp_path_factory.mktemp("finished")
    flags = "--offline-steps 4 --eval-interval 2 --log-interval 1 --eval-episodes 2 --hidden 8 8"
    with pytest.MonkeyPatch.context() as patch:
        words = [*flags.split(), "--dataset", str(dataset_file), "--run-dir", str(runs)]
        patch.setattr(sys, "argv", ["qflow.py", *words])
        patch.setattr(common.Run, "plot", lambda run, switch: None)
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
    for name in [*contents, "pickles"]:
        reason = "File is not a zip file" if name in ("empty", "text", "half") else ""
        refused("qflow", "--dataset", name, says=[f"{name}: not a usable dataset: {reason}"])
    assert not Path("exploded").exists()


def test_files_that_cannot_be_read_say_why(refused):
    Path("loop").symlink_to("loop")  # even root cannot read it
    for name, reason in (("nowhere", "No such file"), ("/", "directory"), ("loop", "symbolic")):
        refused("qflow", "--dataset", name, says=[f"{name}: not a usable dataset: ", reason])


def test_a_chunk_longer_than_the_dataset(small_arrays, refused):
    np.savez("small.npz", **small_arrays)
    refused("qflow", "--dataset", "small.npz", "--horizon", 61, says=["--horizon 61: longer"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_is_found_or_does_not_matter(save, small_arrays, tmp_path, monkeypatch):
    data = as_bytes(save, **small_arrays)
    path = tmp_path / "small.npz"
    path.write_bytes(data)
    env_id = common.resolve_task(NAME)[2]
    rng = np.random.default_rng(0)
    num_found = 0
    with common.gymnasium.make(env_id) as env:
        monkeypatch.setattr(common, "make_env", lambda env_id: nullcontext(env))
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
    assert num_found > 240  # of 300: most damage matters


def test_checkpoints_that_are_damaged_or_something_else(finished, refused):
    path = Path(shutil.copytree(finished, "a_run")) / "checkpoint.pt"
    data = path.read_bytes()
    state = torch.load(path)
    contents = [data[: int(len(data) * share)] for share in (0, 0.001, 0.5, 0.99)]
    contents += [np.random.default_rng(0).bytes(999), pickle.dumps(Bomb(), 2)]
    for value in (Bomb(), {}, [], [1], None, torch.ones(3), {**state, "nets": Bomb()}):
        contents.append(as_bytes(lambda file, value=value: torch.save(value, file)))
    for content in contents:
        path.write_bytes(content)
        refused("qflow", "--resume", "a_run", says=["a_run/checkpoint.pt: damaged, or not a check"])
        with pytest.raises(common.UserError, match="a_run/checkpoint.pt: damaged"):
            qflow.load("a_run")
    assert not Path("exploded").exists()


def test_a_run_of_another_script_or_another_version_of_it(finished, refused):
    for script in ("fql", "flow_sac"):
        refused(script, "--resume", finished, says=[finished, "settings unknown to this script"])
    path = Path(shutil.copytree(finished, "a_run")) / "config.json"
    config = json.loads(path.read_text())
    config["args"]["new"] = 3
    path.write_text(json.dumps(config))
    refused("qflow", "--resume", "a_run", says=["settings unknown to this script: {'new'}"])
    with pytest.raises(common.UserError, match="settings unknown to this script: {'new'}"):
        qflow.load("a_run")


def test_a_run_with_weights_only(finished, refused):
    path = Path(shutil.copytree(finished, "a_run")) / "checkpoint.pt"
    state = torch.load(path)
    torch.save({name: state[name] for name in ("step", "sizes", "nets")}, path)
    qflow.load("a_run")
    refused("qflow", "--resume", "a_run", says=["a_run: has weights only"])


@pytest.mark.parametrize("content", [None, "", "{", "[]", "3", "{}", '{"args": 3}'])
def test_a_run_with_a_config_that_is_damaged(content, finished, refused):
    folder = Path(shutil.copytree(finished, "a_run"))
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    for flag in ("--resume", "--start-or-resume"):
        refused("qflow", flag, folder, says=["a_run: damaged, or not a run"])


def test_places_that_cannot_be_written(dataset_file, refused, monkeypatch):
    Path("file").touch()
    for place in ("file", "file/x", "/proc/x", "/dev/null", LONG):
        refused("qflow", "--dataset", dataset_file, "--run-dir", place, says=[place])
    for place in ("file", LONG):
        refused("flow_sac", "--run-dir", place, says=[place])
        refused("flow_sac", "--start-or-resume", place, says=[place])
        monkeypatch.setenv("OGBENCH_DATA", place)
        refused("qflow", says=[place])
        refused("fql", "--env", "pointmaze-medium-stitch-v0", says=[place])


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
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(script, error, code, line, monkeypatch, capsys):
    monkeypatch.setattr(common, "read_config", Mock(side_effect=error))
    with pytest.raises(SystemExit) as exit:
        run_as_main(script, monkeypatch, "--resume", "x")
    assert exit.value.code == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(line.format(script=script)) and printed.err.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_of_ours_shows_its_traceback(script, monkeypatch):
    mistake = NameError("name 'confgi' is not defined")
    monkeypatch.setattr(common, "read_config", Mock(side_effect=mistake))
    with pytest.raises(NameError, match="confgi"):
        run_as_main(script, monkeypatch, "--resume", "x")


@pytest.mark.slow
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


GPU_WITH_AN_OLD_DRIVER = """
import runpy, sys, torch
sys.argv = sys.argv[1:]
def broken(*args, **kwargs):
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).")
torch.cuda.device_count = lambda: 1
torch.cuda.is_available = lambda: False
torch.cuda._lazy_init = broken
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags, code", [([], 0), (["--device", "cuda"], 2)])
def test_a_gpu_that_is_counted_and_cannot_be_used(flags, code, dataset_file, tmp_path):
    words = "qflow.py --offline-steps 2 --eval-episodes 1 --hidden 8 --run-dir".split()
    words += [str(tmp_path / "runs"), "--dataset", str(dataset_file), *flags]
    result = subprocess.run(
        [sys.executable, "-c", GPU_WITH_AN_OLD_DRIVER, *words],
        cwd=Path(common.__file__).parent,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    said = result.stdout if code == 0 else result.stderr
    assert "The NVIDIA driver on your system is too old" in said
    if code == 0:
        assert "so this runs on the CPU" in said and "finished; mean" in said
    else:
        assert said.startswith("qflow.py: error: --device cuda: ") and said.count("\n") == 1
