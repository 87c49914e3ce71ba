"""results/table.py on runs of known scores, and on what it has to leave out."""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

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
    (task, row, lam), errors = make_table()
    assert errors == ""
    assert (row["environment"], row["task"], row["method"]) == (NAME, "default", "Q-Flow")
    assert (row["settings"], row["steps"], row["seeds"]) == ("", "12,000 offline", "3")
    assert np.isclose(float(row["score"]), np.mean(means))
    assert min(means) <= float(row["low"]) < np.mean(means) < float(row["high"]) <= max(means)
    assert (lam["settings"], lam["seeds"], lam["low"]) == ("lam=7.0", "1", "nan")
    assert np.isclose(float(lam["score"]), 50)
    assert (task["task"], task["seeds"]) == ("3", "1")


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


def test_a_row_with_several_datasets_is_named(runs, make_table):
    settings = {**fql.SETTINGS["pointmaze"], "offline_steps": 100}
    for seed, dataset in enumerate(["official", "collected", "official"]):
        path = runs / str(seed) / "config.json"
        write_run(path.parent, fql, [0.5], seed=seed, **settings)
        path.write_text(json.dumps(dict(json.loads(path.read_text()), dataset=dataset)))
    (row,), errors = make_table()
    assert row["seeds"] == "3"
    assert errors == f"several datasets: {NAME}, default, FQL: collected; official\n"


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
        newer = f"{runs / 'run_b'}, same settings and seed, was evaluated later"
        assert f"left out: {runs / older}: {newer}\n" in errors
    assert "unfinished: at step 50 of 100" in errors
    assert "cut: the last row of eval.csv is incomplete" in errors
    assert "no_args: no settings in config.json" in errors
    assert "nothing: No such file or directory" in errors
    assert len(errors.splitlines()) == 6
