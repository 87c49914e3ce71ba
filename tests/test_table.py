"""results/table.py on runs of known scores, on what it has to leave out, and over tasks."""

import csv
import json
import os
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

import common
import flow_sac
import fql
import qflow

sys.path.insert(0, str(Path(__file__).parent.parent / "results"))
import table  # noqa: E402

NAME = "pointmaze-medium-navigate-v0"


def write_run(folder, script, scores, name=None, **settings):
    """A run's config.json and eval.csv; scores: success of each evaluation, or else return.

    name: the script's name in config.json, if it is not the module's.
    """
    folder.mkdir()
    args = {**vars(script.Args()), **settings}
    config = dict(script=name or Path(script.__file__).name, args=args)
    (folder / "config.json").write_text(json.dumps(config))
    last_step = args["offline_steps"] + args["online_steps"]
    rows = ["step,episodes,success,return,length"]
    for number, score in enumerate(scores, start=1):
        step = last_step * number // len(scores)
        has_success = script is not flow_sac
        rows.append(f"{step},50,{score},-1,9" if has_success else f"{step},50,nan,{score},9")
    (folder / "eval.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture
def runs(tmp_path):
    """A folder for runs."""
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


@pytest.fixture
def make_table(runs, capsys):
    """A function without arguments: the rows of the CSV file of these runs, and stderr."""

    def make():
        out = runs.parent / "table.csv"
        table.main(tuple(runs.iterdir()), out)
        with open(out) as file:
            rows = list(csv.DictReader(file))
        printed = capsys.readouterr()
        assert len(printed.out.splitlines()) == 2 + len(rows)
        return rows, printed.err

    return make


def test_the_score_is_that_of_the_last_three_evaluations_and_the_mean_over_seeds(runs, make_table):
    settings = {**qflow.SETTINGS["pointmaze"], "offline_steps": 12_000, "online_steps": 0}
    means = []
    for seed, scores in enumerate([[0, 0.1, 0.9, 0.8], [0, 0.4, 0.4, 0.7], [1, 0.3, 0.3, 0.9]]):
        write_run(runs / f"q{seed}", qflow, scores, **{**settings, "seed": seed})
        means.append(100 * np.mean(scores[1:]))
    write_run(runs / "q9", qflow, [0.5], **{**settings, "seed": 0, "lam": 7.0})
    write_run(runs / "t3", qflow, [0.2], **{**settings, "seed": 0, "task": 3})
    (row, lam, task), errors = make_table()
    assert errors == ""
    assert (row["environment"], row["task"], row["method"]) == (NAME, "1", "Q-Flow")
    assert (row["settings"], row["steps"], row["seeds"]) == ("", "12,000 offline", "3")
    assert np.isclose(float(row["score"]), np.mean(means))
    assert min(means) <= float(row["low"]) < np.mean(means) < float(row["high"]) <= max(means)
    assert (lam["settings"], lam["seeds"], lam["low"]) == ("lam=7.0", "1", "nan")
    assert np.isclose(float(lam["score"]), 50)
    assert (task["task"], task["seeds"]) == ("3", "1")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*table.DEFAULT_TASKS, "antmaze", "humanoidmaze"}))
def test_the_default_task_is_ogbenchs(name):
    names = [full_name for full_name in common.single_tasks() if full_name.startswith(name)]
    full_name = min(full_name for full_name in names if "-task" not in full_name)
    _, env_id = common.single_tasks()[full_name]
    with gymnasium.make(env_id) as env:
        assert table.task_number(full_name, 0) == env.unwrapped._reward_task_id


def test_the_number_of_a_task(runs, make_table):
    assert table.task_number("visual-cube-single-play-v0", 0) == 2
    for env, task in (("scene-play-v0", 3), ("scene-play-singletask-task3-v0", 0)):
        assert table.task_number(env, task) == 3
    for seed, task in enumerate([0, 4]):  # the same task
        settings = dict(env="puzzle-3x3-play-v0", task=task, seed=seed, offline_steps=100)
        write_run(runs / str(task), fql, [0.5], **settings)
    (row,), errors = make_table()
    assert (row["task"], row["seeds"], errors) == ("4", "2", "")


def test_of_a_run_that_went_online_its_online_phase_counts(runs, make_table):
    settings = {**fql.SETTINGS["pointmaze"], "offline_steps": 50, "online_steps": 50}
    write_run(runs / "run", fql, [0.1, 0.1, 0.5, 0.9], **settings)  # at 25, 50, 75, 100
    (row,), _ = make_table()
    assert np.isclose(float(row["score"]), 70)


def test_methods_phases_and_returns_have_rows_of_their_own(runs, make_table):
    pointmaze = {**fql.SETTINGS["pointmaze"], "offline_steps": 6_000}
    write_run(runs / "fql", fql, [0.5], **pointmaze)
    write_run(runs / "online", fql, [0.9], **{**pointmaze, "online_steps": 20_000})
    write_run(runs / "bptt", fql, [0.8], name="bptt.py", **pointmaze)
    write_run(runs / "bptt2", fql, [0.7], name="bptt.py", **{**pointmaze, "alpha": 0.5})
    for policy in ("naive", "flow-t"):
        write_run(runs / policy, flow_sac, [-150], policy=policy, **flow_sac.SETTINGS["Pendulum"])
    rows, errors = make_table()
    assert errors == ""
    found = {(row["method"], row["settings"], row["steps"], float(row["score"])) for row in rows}
    assert found == {
        ("FQL", "", "6,000 offline", 50),
        ("FQL", "", "6,000 offline + 20,000 online", 90),
        ("FBRAC, alpha=16", "", "6,000 offline", 80),  # alpha weighs another loss than FQL's
        ("FBRAC, alpha=0.5", "", "6,000 offline", 70),
        ("SAC Flow, naive", "", "15,000 online", -150),
        ("SAC Flow, flow-t", "", "15,000 online", -150),
    }


def test_the_script_of_an_older_run_is_known_by_its_settings(runs, make_table):
    settings = dict(offline_steps=100, env="Pendulum-v1")
    for script in (qflow, fql, flow_sac):
        write_run(runs / script.__name__, script, [0.5], **settings)
    for path in runs.glob("*/config.json"):
        args = json.loads(path.read_text())["args"]
        path.write_text(json.dumps(dict(args=args)))
    rows, _ = make_table()
    assert {row["method"].split(",")[0] for row in rows} == {"Q-Flow", "FQL", "SAC Flow"}


def test_a_copy_of_a_script_has_rows_of_its_own(runs, make_table):
    settings = {**qflow.SETTINGS["pointmaze"], "offline_steps": 100, "online_steps": 0}
    write_run(runs / "1", qflow, [0.1], **settings)
    write_run(runs / "2", qflow, [0.2], name="qflow_mine.py", **settings)
    own = {**settings, "seed": 1, "tau": 0.5, "width": 7}
    write_run(runs / "3", qflow, [0.3], name="qflow_mine.py", **own)
    settings = {**fql.SETTINGS["pointmaze"], "alpha": 3.0}
    write_run(runs / "4", fql, [0.4], name="mine.py", **settings)
    rows, errors = make_table()
    assert errors == ""
    found = {(row["method"], row["settings"], float(row["score"])) for row in rows}
    assert found == {
        ("Q-Flow", "", 10),
        ("qflow_mine", "", 20),
        ("qflow_mine", "tau=0.5, width=7", 30),
        ("mine", "alpha=3.0", 40),
    }


def test_where_frames_are_kept_is_not_a_setting_of_a_row():
    args = dict(vars(fql.Args()), env="cube-triple-play-v0")
    assert table.changed_settings(args, fql, False) == ""
    assert table.changed_settings({**args, "device_data": "cpu"}, fql, False) == ""
    assert table.changed_settings({**args, "alpha": 3.0}, fql, False) == "alpha=3.0"


def test_a_table_that_cannot_be_written(tmp_path):
    with pytest.raises(common.UserError, match="no: cannot write there: .*table.csv"):
        table.main((), tmp_path / "no/table.csv")


def test_a_row_with_several_datasets_is_named(runs, make_table):
    settings = {**fql.SETTINGS["pointmaze"], "offline_steps": 100}
    for number, dataset in enumerate(["official", "collected", "official"]):
        path = runs / str(number) / "config.json"
        seed = max(0, number - 1)  # 0, 0, 1: the same seed on two datasets is no duplicate
        write_run(path.parent, fql, [0.5], seed=seed, **settings)
        path.write_text(json.dumps(dict(json.loads(path.read_text()), dataset=dataset)))
    (row,), errors = make_table()
    assert row["seeds"] == "3"
    assert errors == f"several datasets: {NAME}, 1, FQL: collected; official\n"


def test_a_row_with_several_evaluations_is_named(runs, make_table):
    settings = {**fql.SETTINGS["pointmaze"], "offline_steps": 100}
    for seed, scores in enumerate([[0.5, 0.6], [0.5, 0.5, 0.5, 0.6]]):
        write_run(runs / str(seed), fql, scores, seed=seed, **settings)
    _, errors = make_table()
    fewer = "50 (50 episodes), 100 (50 episodes)"
    more = "50 (50 episodes), 75 (50 episodes), 100 (50 episodes)"
    assert errors == f"several evaluations: {NAME}, 1, FQL: {fewer}; {more}\n"


def test_what_is_left_out_is_named(runs, make_table):
    settings = {**qflow.SETTINGS["pointmaze"], "offline_steps": 100, "online_steps": 0}
    write_run(runs / "run_a", qflow, [0.2], **settings)
    write_run(runs / "run_b", qflow, [0.6], **settings)
    write_run(runs / "run_c", qflow, [0.4], **settings)
    for name, time in (("run_a", 1000), ("run_b", 3000), ("run_c", 2000)):
        os.utime(runs / name / "eval.csv", (time, time))
    for name in ("unfinished", "cut", "no_args"):
        write_run(runs / name, qflow, [0.6], **{**settings, "seed": 1})
    text = (runs / "unfinished/eval.csv").read_text()
    (runs / "unfinished/eval.csv").write_text(text.replace("100,", "50,", 1))
    (runs / "cut/eval.csv").write_text(text[:-6])
    (runs / "no_args/config.json").write_text('{"script": "qflow.py"}')
    (runs / "nothing").mkdir()
    (row,), errors = make_table()
    assert (row["seeds"], float(row["score"])) == ("1", 60)
    for older in ("run_a", "run_c"):
        newer = f"{runs / 'run_b'}, same settings, seed and dataset, was evaluated later"
        assert f"left out: {runs / older}: {newer}\n" in errors
    assert "unfinished: at step 50 of 100" in errors
    assert "cut: the last row of eval.csv is incomplete" in errors
    assert "no_args: no settings in config.json" in errors
    assert "nothing: No such file or directory" in errors
    assert len(errors.splitlines()) == 6


# ------------------------------------------------------------------------------------- over tasks

# Scores (tasks, seeds), and what rliable 1.2.0 gives for them: aggregate_iqm, and the interval of
# get_interval_estimates with 50,000 resamples (arch 7.2, which imports with pandas 2.3.3 only).
SCORES_1 = [[97, 90, 100], [69, 74, 52], [11, 30, 18], [22, 2, 40], [0, 0, 6], [84, 49, 64]]
SCORES_2 = [
    [91.0, 85.7, 84.4, 71.4, 85.6],
    [58.9, 62.9, 49.9, 58.2, 57.5],
    [25.1, 30.4, 15.0, 10.0, 23.3],
    [35.8, 42.6, 35.3, 29.1, 43.3],
]


@pytest.mark.parametrize(
    "tasks, expected", [(SCORES_1, (42.9, 35.7, 50.3)), (SCORES_2, (47.48, 44.48, 50.21))]
)
def test_over_tasks_is_what_rliable_gives(tasks, expected):
    mean, low, high = table.summarise_tasks(tasks)
    assert np.isclose(mean, expected[0])
    assert np.allclose((low, high), expected[1:], rtol=0, atol=0.25)  # other random draws


def test_the_interquartile_mean_leaves_out_a_quarter_of_all_scores_at_each_end():
    mean, low, high = table.summarise_tasks([[0.0], [10.0], [30.0], [100.0]])
    assert mean == 20
    assert np.isnan(low) and np.isnan(high)  # one seed says nothing about seeds


def test_seeds_are_drawn_within_their_task():
    tasks = [[1.0] * 5, [50.0] * 5, [60.0] * 5, [99.0] * 5]
    assert table.summarise_tasks(tasks) == (55, 55, 55)


def write_tasks(runs, script, scores, name, **settings):
    """Runs of puzzle-3x3; scores: {task: success of each seed}."""
    for task, seeds in scores.items():
        for seed, score in enumerate(seeds):
            own = dict(env="puzzle-3x3-play-v0", task=task, seed=seed, offline_steps=100)
            folder = runs / f"{name}-{task}-{seed}"
            write_run(folder, script, [score], **{**own, **settings})


def test_the_table_over_tasks(runs, capsys):
    scores = {1: [0.97, 0.9, 1.0], 2: [0.69, 0.74, 0.52], 3: [0.11, 0.3, 0.18]}
    write_tasks(runs, qflow, scores, "qflow")
    write_tasks(runs, qflow, {4: [0.22, 0.02, 0.4]}, "lam", lam=3.0)  # tasks may differ in it
    write_tasks(runs, fql, {1: [0.5]}, "one")
    write_run(runs / "returns", flow_sac, [-150], **flow_sac.SETTINGS["Pendulum"])
    table.main(tuple(runs.iterdir()), over_tasks=True)
    printed = capsys.readouterr()
    assert "| 3 | 95.7% | 90.0% to 100.0% |\n" in printed.out  # of three seeds, lowest to highest
    assert "| 1 | -150 |  |\n" in printed.out  # a return, of one seed
    tasks = [[97, 90, 100], [69, 74, 52], [11, 30, 18], [22, 2, 40]]
    middle, low, high = table.summarise_tasks(tasks)
    assert printed.out.split("\n\n")[1].splitlines() == [
        "| method | tasks | seeds | mean | interquartile mean | 95% |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| Q-Flow | 4 | 3 | 50.4% | {middle:.1f}% | {low:.1f}% to {high:.1f}% |",
    ]
    assert printed.err == "left out over tasks: FQL: one task only\n"


def test_what_cannot_be_pooled_is_named(runs, capsys):
    write_tasks(runs, qflow, {1: [0.1, 0.2], 2: [0.3]}, "qflow")
    write_tasks(runs, fql, {1: [0.5], 2: [0.6]}, "fql")
    write_tasks(runs, fql, {2: [0.7]}, "alpha", alpha=3.0)
    table.main(tuple(runs.iterdir()), over_tasks=True)
    reason = "several settings or numbers of steps in puzzle-3x3-play-v0 2: pass the runs of one"
    assert capsys.readouterr().err.splitlines() == [
        f"left out over tasks: FQL: {reason}",
        "left out over tasks: Q-Flow: its tasks have from 1 to 2 seeds",
    ]
