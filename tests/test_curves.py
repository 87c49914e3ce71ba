"""results/curves.py beside published curves: tasks, numbers, mistakes; results/published's runs."""

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from matplotlib.axes import Axes
from PIL import Image

import common
import fql

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "results"))
import curves  # noqa: E402

PUZZLE = "puzzle-3x3-play-v0"
SCENE = "scene-play-v0"
ANTMAZE = "antmaze-large-navigate-v0"


@pytest.fixture
def make_run(tmp_path):
    """A function (name, task, {step: success of 50 episodes}) -> folder of a run."""

    def make(name, task, success, env=PUZZLE, seed=0):
        folder = tmp_path / name
        folder.mkdir()
        config = dict(script="fql.py", args=dict(env=env, task=task, seed=seed))
        (folder / "config.json").write_text(json.dumps(config))
        rows = ["step,episodes,success,return,length"]
        rows += [f"{step},50,{rate},-1,9" for step, rate in success.items()]
        (folder / "eval.csv").write_text("\n".join(rows) + "\n")
        return folder

    return make


@pytest.fixture
def call(tmp_path, capsys):
    """A function: curves.py with these words; the rows of the printed table."""

    def run(*words):
        out = tmp_path / "out.png"
        tyro.cli(curves.main, args=["--out", str(out), *map(str, words)])
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]

    return run


def test_a_run_beside_the_published_curve(call, make_run):
    run = make_run("task1", 1, {50_000: 0.5, 100_000: 0.98})
    header, _, row = call("--published", "qc", "--method", "QC-FQL", run)
    assert header[4] == "95% interval of the mean"
    with open(ROOT / "results/published/qc.csv") as file:
        (published,) = [
            line
            for line in csv.DictReader(file)
            if line["task"] == "puzzle-3x3-play-task1"
            and line["method"] == "QC-FQL"
            and line["step"] == "100000"
        ]
    mean, low, high = (float(published[name]) for name in ("mean", "ci95_low", "ci95_high"))
    assert row[:4] == ["puzzle-3x3-play-task1", "QC-FQL", "100,000", f"{mean:.1f}"]
    # 49 of 50, with Wilson's interval as of scipy.stats.binomtest(49, 50).proportion_ci.
    assert row[4:] == [f"{low:.1f} to {high:.1f}", "task1", "98", "90 to 100", "yes"]


@pytest.mark.parametrize("task", [1, 3])
def test_what_is_below_or_above_the_band_is_said_to_be(call, make_run, task):
    run = make_run("run", task, {100_000: 0.5})  # 94 to 100, 0 to 31.5 are published
    _, _, row = call("--published", "qc", "--method", "QC-FQL", run)
    assert row[-1] == "no"


def test_each_task_has_a_panel_and_its_own_numbers(call, make_run, tmp_path):
    runs = [make_run(f"task{task}", task, {50_000: 0.1 * task}) for task in (1, 2, 4)]
    default = make_run("default", 0, {50_000: 0.9})  # task 4
    unevaluated = make_run("unevaluated", 1, {})
    (unevaluated / "eval.csv").unlink()
    restarted = make_run("restarted", 1, {})  # whose only row was cut
    words = ["--published", "qam", "--method", "FQL", "--method", "FBRAC"]
    _, _, *rows = call(*words, *runs, default, unevaluated, restarted)
    found = {(row[0][-1], row[1], row[5]) for row in rows}
    expected = {("4", method, "default") for method in ("FQL", "FBRAC")}
    for task in "124":
        expected |= {(task, method, f"task{task}") for method in ("FQL", "FBRAC")}
    assert found == expected and len(rows) == 8
    three = Image.open(tmp_path / "out.png").size
    call(*words, runs[0])
    one = Image.open(tmp_path / "out.png").size
    assert three == (3 * one[0], one[1])


def test_the_task_may_be_given_as_the_files_or_the_scripts_have_it(call, make_run):
    run = make_run("task2", 2, {100_000: 0.5})
    for task in ("puzzle-3x3-play-task2", "puzzle-3x3-play-singletask-task2-v0"):
        _, _, row = call("--published", "qc", "--task", task, "--method", "FQL", run)
        assert row[0] == "puzzle-3x3-play-task2"
    _, _, *rows = call("--published", "qc", "--task", task, "--method", "FQL")
    assert rows == []  # a picture of the published curve alone


def test_a_run_on_the_edge_of_the_band_is_inside(call, make_run):
    run = make_run("edge", 1, {100_000: 0.28})  # 100 * 0.28 is 28.000000000000004
    _, _, row = call("--published", "qam", "--method", "FQL", run)
    assert row[4] == "4.0 to 28.0" and row[-1] == "yes"


def test_a_method_that_has_not_all_tasks(call, make_run, tmp_path):
    header, one, two = "task,method,step,mean,lowest,highest", "FQL,100,50,40,60", "OWN,100,9,8,10"
    path = tmp_path / "own.csv"
    tasks = [f"puzzle-3x3-play-task{task}" for task in (1, 2)]
    rows = [header, f"{tasks[0]},{one}", f"{tasks[1]},{one}", f"{tasks[1]},{two}"]
    path.write_text("\n".join(rows) + "\n")
    runs = [make_run(f"run{task}", task, {100: 0.5}) for task in (1, 2)]
    _, _, *found = call("--published", path, "--method", "FQL", "--method", "OWN", *runs)
    assert [(row[0], row[1]) for row in found] == [
        (tasks[0], "FQL"),
        (tasks[1], "FQL"),
        (tasks[1], "OWN"),
    ]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "--published qc --method QC-FLQ RUN",
            "^--method QC-FLQ: not in .*qc.csv; closest: QC-FQL",
        ),
        (
            "--published qc --task puzzle-3x3-play-tsk1 --method FQL RUN",
            "^--task puzzle-3x3-play-tsk1: not in .*qc.csv; closest: puzzle-3x3-play-task1, ",
        ),
        ("--published qc RUN", "^--published needs --method, one or more of FQL, IFQL, QC-FQL"),
        ("--published qd --method FQL RUN", "^--published .*qd.csv: No such file or directory"),
        (
            "--published RUN/eval.csv --method FQL RUN",
            "^--published .*: its columns must be task, ",
        ),
        (
            "--published qc --task scene-play-task1 --method FQL RUN",
            "RUN: its task puzzle-3x3-play-task1 is not among those of --task",
        ),
        ("--published qc --method FQL", "^none of the folders has an evaluated run"),
        ("--column success RUNS", "^none of the folders has an evaluated run"),
        ("--column sucess RUN", "^--column sucess: not in .*RUN/eval.csv; closest: success"),
        ("--method FQL RUN", "^--task and --method need --published"),
        ("RUN --out RUN/no/out.png", "^--out .*RUN/no/out.png: .*No such file or directory"),
        ("RUN --out RUN/out.pgn", "^--out .*RUN/out.pgn: Format 'pgn' is not supported"),
    ],
)
def test_a_mistake_is_named_in_one_line(call, make_run, words, message):
    run = make_run("RUN", 1, {100_000: 0.5})
    with pytest.raises(common.UserError, match=message) as caught:
        call(*words.replace("RUN", str(run)).split())
    assert "\n" not in str(caught.value)


def test_a_run_of_another_environment(call, make_run):
    run = make_run("RUN", 1, {100_000: 0.5}, env="pointmaze-medium-navigate-v0")
    message = "RUN: pointmaze-medium-navigate-task1: not in .*; closest: "
    with pytest.raises(common.UserError, match=message):
        call("--published", "qc", "--method", "FQL", run)
    with pytest.raises(common.UserError, match="^--mean: not with --published"):
        call("--published", "qc", "--method", "FQL", "--mean", run)
    run = make_run("RUN2", 0, {100_000: 0.5}, env="Hopper-v5")
    with pytest.raises(common.UserError, match="RUN2: its environment, Hopper-v5, is not OGBench"):
        call("--published", "qc", "--method", "FQL", run)


def test_folders_of_the_same_name_are_lines_of_their_own(call, make_run, tmp_path, monkeypatch):
    for environment, success in (("hopper", 0.2), ("ant", 0.6)):
        (tmp_path / environment).mkdir()
        for seed in (0, 1):
            make_run(f"{environment}/a-seed{seed}", 1, {100: success + 0.1 * seed}, seed=seed)
    drawn = {}
    plot = Axes.plot

    def record(axes, x, y, *args, label):
        drawn[label] = [*y]
        return plot(axes, x, y, *args, label=label)

    monkeypatch.setattr(Axes, "plot", record)
    call("--column", "success", *sorted(tmp_path.glob("*/a-seed0")))
    assert drawn == {"ant/a-seed0": [0.6], "hopper/a-seed0": [0.2]}
    rows = call("--column", "success", "--mean", *sorted(tmp_path.glob("*/a-seed*")))
    assert [row[:3] for row in rows] == [["ant/a", "100", "0.65"], ["hopper/a", "100", "0.25"]]

    make_run("other-seed1", 1, {300: 0.5}, seed=1)
    make_run("other-seed0", 1, {200: 0.5})
    with pytest.raises(common.UserError, match="^--mean: the runs of other have no step in common"):
        call("--mean", *tmp_path.glob("other-seed*"))


@pytest.mark.parametrize(
    "name, label",
    [
        ("{seed}__20261201-11020{seed}-123456", f"{PUZZLE}__fql"),  # of a script
        ("{seed}__0123abcd", f"{PUZZLE}__fql__0123abcd"),  # of a sweep
    ],
)
def test_runs_of_different_seeds_are_one_line(call, make_run, name, label):
    folders = []
    for seed in (0, 1):
        folder = f"{PUZZLE}__fql__{name.format(seed=seed)}"
        folders.append(make_run(folder, 1, {100: 0.5 + 0.2 * seed}, seed=seed))
    (row,) = call("--column", "success", "--mean", *folders)
    assert row[:3] == [label, "100", "0.6"]
    path = folders[0] / "config.json"
    config = common.read_config(folders[0])
    for changed, words in (
        (dict(alpha=3.0), "have several settings: alpha is 3.0 or None"),
        (dict(task=2), "have several settings: task is 1 or 2"),
        (dict(seed=1), "have the same seed"),
    ):
        path.write_text(json.dumps(dict(config, args={**config["args"], **changed})))
        with pytest.raises(common.UserError, match=f"^--mean: .*runs of {label} {words}"):
            call("--mean", *folders)


# ----------------------------------------------------------------------- the runs beside the curves


def test_the_runs_of_the_script(tmp_path, monkeypatch):
    """Every command, recorded by a `python` that does not run it, has the setting of its name."""
    recorder = tmp_path / "bin/python"
    recorder.parent.mkdir()
    recorder.write_text('#!/bin/bash\nprintf "%s\\n" "$*" >> "$RECORD"\n')
    recorder.chmod(0o755)
    environment = {**os.environ, "RECORD": str(tmp_path / "record.txt")}
    environment["PATH"] = f"{recorder.parent}:{environment['PATH']}"
    command = ["bash", ROOT / "results/published/runs.sh", "data and runs"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)

    monkeypatch.chdir(ROOT)
    folder = str(tmp_path / "data and runs")
    runs = {}
    datasets = []
    for line in (tmp_path / "record.txt").read_text().splitlines():
        script, *words = line.replace(folder, "FOLDER").split()
        if script.startswith("results/"):
            tool = importlib.import_module(Path(script).stem)
            args = tyro.cli(tool.Args, args=words)
            datasets.append(str(args.out / f"{args.name}.npz"))
            continue
        module = importlib.import_module(Path(script).stem)
        monkeypatch.setattr(sys, "argv", [script, *words])
        args = module.parse_args()
        assert args.dataset == f"FOLDER/{args.env}.npz" == datasets[-1]
        assert args.batch_size == 256 and args.lr == 3e-4 and args.flow_steps == 10
        assert args.hidden == (512,) * 4 and args.discount == 0.99 and args.compile
        assert (args.eval_interval, args.eval_episodes, args.seed) == (25_000, 50, 0)
        name = args.start_or_resume.removeprefix("FOLDER/")
        strength = args.alpha if module is fql else args.lam
        setting = (args.sparse, args.horizon, args.num_critics, args.q_agg, args.rho)
        runs[name] = (args.env, args.task, args.offline_steps, strength, *setting)

    assert list(dict.fromkeys(datasets)) == [
        f"FOLDER/{env}.npz" for env in (PUZZLE, SCENE, ANTMAZE)
    ]
    chunks = (True, 5, 2, "mean", 0.0)
    expected = {}
    for task in (1, 2):
        expected[f"puzzle-3x3-task{task}-fql"] = (PUZZLE, task, 100_000, 300.0, *chunks)
    for task in (1, 2, 3, 4, 5):
        expected[f"puzzle-3x3-task{task}-fql-alpha100"] = (PUZZLE, task, 100_000, 100.0, *chunks)
    setting = (PUZZLE, 1, 100_000, 100.0, True, 1, 2, "mean", 0.0)
    expected["puzzle-3x3-task1-fql-single"] = setting
    for task in (1, 2, 4):
        setting = (PUZZLE, task, 100_000, 20.0, True, 5, 2, "min", 0.0)
        expected[f"puzzle-3x3-task{task}-qflow"] = setting
    for task in (2, 3):
        expected[f"scene-task{task}-fql"] = (SCENE, task, 100_000, 300.0, *chunks)
    setting = (ANTMAZE, 1, 100_000, 3.0, False, 1, 10, "mean", 0.5)
    expected["antmaze-large-task1-fql"] = setting
    assert list(runs.items()) == list(expected.items())  # in this order

    (tmp_path / "record.txt").unlink()
    environment["MATMUL_PRECISION"] = "medium"
    command_of_one = [*command, "scene-task3-fql"]
    subprocess.run(command_of_one, cwd=tmp_path, env=environment, check=True)
    collected, ran = (tmp_path / "record.txt").read_text().splitlines()
    assert f"{SCENE} --out" in collected
    assert "--task 3" in ran and "--matmul-precision medium" in ran

    result = subprocess.run([*command, "typo"], capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and "no run is named typo" in result.stderr
