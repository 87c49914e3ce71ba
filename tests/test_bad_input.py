"""What a user gets wrong ends in one line that names it, and exit code 2; never in a traceback."""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext
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
LONG = "ü½" * 90  # longer than a line, and than a file's name may be; int() shows up to 200


class Accepted(Exception):
    """All checks are passed; what would follow takes long."""


class Bomb:
    __reduce__ = lambda self: (open, ("exploded", "w"))  # makes a file if anybody unpickles it


@pytest.fixture
def check(monkeypatch, capsys, tmp_path):
    """check(script, *words, says=[...]): what the one line must say; None: there is no mistake."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # which is empty
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "collect_pointmaze", Mock(side_effect=Accepted))
    for name in "make_envs report time.sleep signal.signal".split():
        monkeypatch.setattr(f"common.{name}", Mock())

    def run(script, *words, says=()):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        if says is None:
            return common.cli(SCRIPTS[script].main)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="^2$"):
            common.cli(SCRIPTS[script].main)
        text = capsys.readouterr().err
        assert re.fullmatch(rf"{script}.py: error: [^ (].*\n", text), (words, text)
        for each in says:  # without spaces: the parser breaks what is longer than a line
            assert "".join(str(each).split()) in "".join(text.split()), (words, text)

    return run


NUMBER = ["x", "", "nan", "inf", "1e+30", LONG]
COUNT = [*NUMBER, 0, -1, 1.5, 10**30], [1, 10**6]
RATE = [*NUMBER, 0, -1, 1e-30], [1e-6, 100]
CHOICE = ["", "x", "None", LONG]
PLACE = ["nowhere", "/", "/dev/null", "a\nb", LONG]
ENV = ["", "x", "a\nb", LONG, "HalfCheeta-v5", "antmaze-gaint-navigate-v0"]
ROWS = {  # flag -> mistakes, and values that are none
    **dict.fromkeys("offline_steps batch_size hidden flow_steps horizon num_envs".split(), COUNT),
    **dict.fromkeys("eval_interval eval_episodes log_interval buffer_size".split(), COUNT),
    "policy_frequency": COUNT,
    **dict.fromkeys("lr policy_lr q_lr lam alpha init_temperature".split(), RATE),
    **dict.fromkeys("discount tau".split(), ([*RATE[0], 1.0001], [1e-6, 1])),
    **dict.fromkeys("video compile normalize_q_loss".split(), (["yes", "0"], [])),
    **dict.fromkeys("resume evaluate dataset".split(), (PLACE, [])),
    "env": ([*ENV, "cube-double-play-singletask-task6-v0"], [NAME, "scene-play-v0"]),
    "flow_sac env": ([*ENV, "CartPole-v1", "Taxi-v3"], ["Pendulum-v1"]),
    "seed": ([*NUMBER, -1, 1.5, 2**31], [0, 2**31 - 1]),
    "task": ([*NUMBER, -1, 1.5, 6, 100], [0, 5]),
    "device": (["", "gpu", "cuda:99", "-1", "a\nb", LONG], ["auto", "cpu"]),
    "dataset_url": (["x", "ftp://x/y", "http://", "http://[", "a\nb", LONG], []),
    "q_agg": (CHOICE, ["mean", "min"]),
    "time_dim": ([*COUNT[0], 7], [2, 64]),
    **dict.fromkeys("policy critic".split(), (CHOICE, [])),
    "policy_width": ([*NUMBER, -1, 1.5, 10**30], [0, 1]),
    "target_entropy": (NUMBER, [0, -3.5]),
    "online_steps": ([*COUNT[0], 1000], [1001, 10**6]),
    "learning_starts": ([*COUNT[0], 15000], [1, 14999]),
    "run_dir": ([], ["", "x"]),
    "matmul_precision": (CHOICE, ["auto", "highest", "high", "medium"]),
}
FLAGS = [(script, name) for script in SCRIPTS for name in vars(SCRIPTS[script].Args())]


@pytest.mark.parametrize("script, name", FLAGS)
def test_every_flag(script, name, check, monkeypatch):
    wrong, right = ROWS.get(f"{script} {name}") or ROWS[name]
    flag = "--" + name.replace("_", "-")
    for value in wrong:
        check(script, flag, value, says=[value, flag if "nan" in wrong else ""])
    monkeypatch.setattr(common, "download", Mock(side_effect=Accepted))
    monkeypatch.setattr(common, "Run", Mock(side_effect=Accepted))
    for value in right:
        with pytest.raises(Accepted):
            check(script, flag, value, says=None)


def test_command_lines(check, monkeypatch):
    check("qflow", "--lr", "--seed", 3, says=["--lr"])
    check("qflow", "--lr", 1, "--lr", "nan", says=["--lr nan"])
    check("qflow", "--hidden", says=["--hidden"])
    check("qflow", "--hidden", 8, 0, says=["--hidden 8 0: must be from 1 to"])
    check("qflow", "--hiden", 8, says=["--hiden, 8 Perhaps you meant: --hidden"])
    check("qflow", "--video", says=["--video", "--evaluate"])
    check("fql", "--lam", 1, says=["--lam"])
    check("qflow", "--env", "scene-play-singletask-task2-v0", "--task", 3, says=["--task 3"])
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    check("fql", "--device", "cpu", "--compile", says=["--compile: no compiler found"])
    monkeypatch.setattr(sys, "argv", "qflow.py --lr nan --lr 2 --hidden 9 9 --hidden 8".split())
    args = common.parse_args(qflow.Args, "", qflow.SETTINGS)
    assert args.lr == 2 and args.hidden == (8,)  # the last of a repeated flag counts


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a small run that has ended; its dataset is ../../data."""
    base = tmp_path_factory.mktemp("finished")
    common.collect_pointmaze(NAME, base / "data", episodes=2, workers=1)
    flags = "--offline-steps 4 --eval-interval 2 --log-interval 1 --eval-episodes 2 --hidden 8 8"
    words = qflow.__file__, *flags.split(), "--dataset", base / "data", "--run-dir", base / "runs"
    options = dict(cwd=base, env={**os.environ, "HOME": str(base / "home")}, timeout=100)
    subprocess.run([sys.executable, *words], check=True, capture_output=True, **options)
    return next((base / "runs").iterdir())


def saved(save, *args, **arrays):
    """What np.savez or a relative writes, as bytes."""
    save(file := io.BytesIO(), *args, **arrays)
    return file.getvalue()


def test_files_that_are_no_datasets(finished, check):
    data = finished.parents[1] / "data"
    arrays, bomb = dict(np.load(data)), np.array([Bomb()], object)
    files = dict(empty=b"", text=b"<html>", bomb=pickle.dumps(Bomb()), objects=saved(np.save, bomb))
    files.update(half=data.read_bytes()[:9000], array=saved(np.save, arrays["actions"]))
    for name in "observations", "source", "qvel":
        files[name] = saved(np.savez, **{**arrays, name: bomb})
    for name, content in files.items():
        Path(name).write_bytes(content)
    with zipfile.ZipFile("pickles", "w") as file:  # pickles without the header of NumPy's files
        for name in arrays:
            file.writestr(f"{name}.npy", pickle.dumps(Bomb()))
    Path("loop").symlink_to("loop")  # even root cannot read it
    for name in [*files, "pickles", "loop"]:
        check("qflow", "--dataset", name, "--offline-steps", 1, says=[f"{name}: "])
    check("qflow", "--dataset", data, "--horizon", 2001, says=["--horizon 2001"])
    assert not Path("exploded").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damage_is_found_or_does_not_matter(save, finished, tmp_path, monkeypatch):
    arrays = {k: v[:61] if v.ndim else v for k, v in np.load(finished.parents[1] / "data").items()}
    arrays["terminals"][-1] = 1
    data, rng, found = saved(save, **arrays), np.random.default_rng(0), 0
    path, env_id = tmp_path / "small.npz", common.resolve_task(NAME)[2]
    with common.gymnasium.make(env_id) as env:
        monkeypatch.setattr(common.gymnasium, "make", lambda _: nullcontext(env))
        path.write_bytes(data)
        whole = vars(common.load_dataset(path, env_id, "cpu")[0])
        for _ in range(500):
            a, b, c, d = np.sort(rng.integers(0, len(data), 4))
            noise, swap = bytearray(data), [data[c:d], data[b:c], data[a:b]]
            for i in rng.integers(0, len(data), rng.integers(1, 9)):
                noise[i] = rng.integers(256)
            cases = [noise, data[:a] + data[b:], data[:b] + data[a:], data[:a]]
            cases += [data[:a] + b"".join(swap) + data[d:]]
            path.write_bytes(cases[rng.integers(5)])
            try:
                dataset = vars(common.load_dataset(path, env_id, "cpu")[0])
                assert all(np.array_equal(dataset[k], whole[k]) for k in whole)
            except common.UserError as e:
                found += 1
                assert str(path) in str(e) and "\n" not in str(e)
    assert found > 400  # else the damage would be none


def test_runs_that_are_damaged(finished, check):
    path = Path(shutil.copytree(finished, "a_run")) / "checkpoint.pt"
    data, state = path.read_bytes(), torch.load(path)
    contents = [data[: int(len(data) * x)] for x in (0, 0.001, 0.1, 0.5, 0.9, 0.99)]
    contents += [np.random.default_rng(0).bytes(999), pickle.dumps(Bomb(), 2)]
    wide = {k: torch.zeros(*(n + 1 for n in x.shape)) for k, x in state["nets"].items()}
    odd = [{**state, "nets": nets} for nets in (Bomb(), [], {}, wide, dict.fromkeys(wide))]
    odd += [{k: v for k, v in state.items() if k != "nets"}, {}, [], [1], None, torch.ones(3)]
    settings = [dict(lr=x) for x in ("fast", -1, np.nan, [1, 2])] + [dict(env="x"), dict(new=3)]
    settings += [dict(hidden=x) for x in ("x", [], [8, 9])] + [dict(time_dim=x) for x in (7, 62)]
    settings = [{**state["config"]["args"], **each} for each in settings] + [[], Bomb()]
    odd += [{**state, "config": config} for config in ([], {}, *(dict(args=x) for x in settings))]
    contents += [saved(lambda file, each=each: torch.save(each, file)) for each in odd]
    for mode in "--resume", "--evaluate":
        for content in contents:
            path.write_bytes(content)
            check("qflow", mode, "a_run")
        path.unlink()
        check("qflow", mode, "a_run", says=["a_run", "No such file"])
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["config.json", "train.csv", "eval.csv"])
def test_what_is_done_to_a_file_for_the_reader_is_undone(name, finished, check):
    path = Path(shutil.copytree(finished, "a_run")) / name
    check("qflow", "--resume", "a_run", says=None)
    data = path.read_bytes()
    assert data == (finished / name).read_bytes() or name == "config.json"  # which has --resume now
    for content in b"", b"\xff\x00\n", data[:-5], data + b"9,9\n", data.replace(b",", b",x"):
        path.write_bytes(content)
        check("qflow", "--resume", "a_run", says=None)
        assert path.read_bytes() == data
    path.unlink()
    check("qflow", "--resume", "a_run", says=None)
    assert path.read_bytes() == data


def test_what_a_run_may_change(finished, check, monkeypatch):
    free = "offline_steps eval_interval eval_episodes log_interval compile".split()
    args = json.loads((finished / "config.json").read_text())["args"]
    for name in args.keys() - {*free, "resume", "evaluate", "video"}:
        flag, old = "--" + name.replace("_", "-"), args[name]
        new = next(value for value in [*ROWS[name][1], "x/y"] if str(value) not in (old, str(old)))
        was = f"was started with {flag} {' '.join(map(str, old)) if name == 'hidden' else old}"
        check("qflow", "--resume", finished, flag, new, says=[flag, new, finished, was])
    words = "--offline-steps 9 --eval-interval 3 --eval-episodes 1 --log-interval 5 --compile"
    monkeypatch.setattr(sys, "argv", ["qflow.py", "--resume", str(finished), *words.split()])
    changed = vars(common.parse_args(qflow.Args, "", qflow.SETTINGS))
    assert [changed[name] for name in free] == [9, 3, 1, 5, True]
    check("qflow", "--resume", finished, says=None)
    check("qflow", "--evaluate", finished, "--eval-episodes", 1, "--seed", 5, "--video", says=None)
    check("qflow", "--resume", finished, "--offline-steps", 4, says=None)  # it has 4 already
    for flag, new, old in (("--lr", 1.0, 5e-4), ("--offline-steps", 9, 4), ("--hidden", 9, "8 8")):
        check("qflow", "--evaluate", finished, flag, new, says=[f"{flag} {new}", f"{flag} {old}"])
    check("qflow", "--evaluate", finished, "--resume", finished, says=["--evaluate", "--resume"])
    for mode, script in (("--resume", "fql"), ("--evaluate", "fql"), ("--resume", "flow_sac")):
        check(script, mode, finished, says=[finished, f"not a run of {script}.py"])


def test_what_makes_other_numbers_is_a_warning(finished, check, capsys):
    path = Path(shutil.copytree(finished, "a_run")) / "checkpoint.pt"
    state = torch.load(path)
    state["config"].update(threads=99, matmul_precision="low")
    state["config"]["versions"]["torch"] = "1.0"
    torch.save(state, path)
    check("qflow", "--resume", "a_run", says=None)
    err = capsys.readouterr().err
    for words in ("threads was 99, is ", "matmul_precision was low, is ", "'torch': '1.0'"):
        assert words in err and err.count("not the same bit for bit") == 3


def test_places_that_cannot_be_written(finished, check, tmp_path, monkeypatch):
    Path("file").touch(), Path(".ogbench").touch()
    for place in ("file", "file/x", "/proc/x", "/dev/null", "a\nb/" + LONG):
        check("qflow", "--dataset", finished.parents[1] / "data", "--run-dir", place, says=[place])
        check("flow_sac", "--run-dir", place, says=[place])
    for home in (tmp_path, tmp_path / "file", Path("/proc/x"), tmp_path / LONG):
        monkeypatch.setenv("HOME", str(home))
        check("qflow", says=[home / ".ogbench"])
        check("fql", "--env", "scene-play-v0", says=[home / ".ogbench"])


def test_too_much_memory_is_a_line_and_other_errors_are_not_hidden(finished, check, monkeypatch):
    words = "--dataset", finished.parents[1] / "data", "--offline-steps", 1, "--hidden", 10**9
    check("fql", *words, 10**9, says=["allocate"])
    monkeypatch.setattr(common, "report", report := Mock(side_effect=MemoryError()))
    check("qflow", "--evaluate", finished, says=["out of memory"])
    report.side_effect = RuntimeError("a mistake of ours: not allocated")
    with pytest.raises(RuntimeError, match="of ours"):
        check("qflow", "--evaluate", finished, says=None)


@pytest.mark.parametrize("line", ["flow_sac --env HalfCheetah-v2", "qflow --resume nowhere"])
def test_a_process_says_no_more_than_that_line(line, tmp_path):
    script, *words = line.split()
    options = dict(cwd=tmp_path, capture_output=True, text=True, timeout=100)
    result = subprocess.run([sys.executable, SCRIPTS[script].__file__, *words], **options)
    assert (result.returncode, result.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert re.fullmatch(rf"{script}.py: error: .*{words[-1]}.*\n", result.stderr)
