"""One table of finished runs: a row for each environment, task, method and settings.

    python results/table.py runs/* --out table.csv
    python results/table.py runs/* --over-tasks

A run's score is the mean of its last three evaluations, as in the papers: the success rate or,
where the environment has no success, the return. (For a run that went online, only evaluations of
its online phase count, even if there are fewer than three.) The interval is the 95% bootstrap
interval of the mean over seeds. "settings" lists only those that differ from the script's defaults
for the environment. Prints Markdown. On stderr, it names what is left out: folders without a run,
unfinished runs and, if two runs have the same settings, seed and dataset, the one that was
evaluated earlier. It also names rows whose runs had different datasets or evaluations.

With --over-tasks, a second table has a row for each method: over all its tasks and seeds, the mean,
which papers on OGBench report for the five tasks of an environment, and the interquartile mean with
its 95% stratified bootstrap interval, as defined by rliable (https://arxiv.org/abs/2108.13264). All
success rates of a method are pooled: pass the runs of one environment for its own mean. A method
needs at least two tasks, all with the same number of seeds. The runs of a task must share their
settings and number of steps; different tasks may differ in both.
"""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import scipy.stats
import tyro

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import minari_data  # noqa: E402

import common  # noqa: E402
import flow_sac  # noqa: E402
import fql  # noqa: E402
import qflow  # noqa: E402

# Settings that "settings" never lists: names, folders, seed, steps, logging, device, precision.
IGNORED = (
    "env task dataset seed device eval_interval eval_episodes log_interval run_dir resume "
    "start_or_resume track compile matmul_precision device_data offline_steps online_steps"
).split()
COLUMNS = "environment task method settings steps seeds score low high".split()


# OGBench's default task of an environment, by the beginning of its name; elsewhere it is task 1.
DEFAULT_TASKS = {
    "cube": 2,
    "scene": 2,
    "puzzle-3x3": 4,
    "puzzle-4x4": 4,
    "puzzle-4x5": 2,
    "puzzle-4x6": 2,
    "antsoccer": 4,
}

# A run's script -> the module with its defaults, and the method's name.
SCRIPTS = {
    "qflow.py": (qflow, "Q-Flow"),
    "fql.py": (fql, "FQL"),
    "flow_sac.py": (flow_sac, "SAC Flow"),
    "bptt.py": (fql, "FBRAC"),
}


def most_similar_script(args):
    """The one of SCRIPTS that has such settings."""
    if "lam" in args:
        return "qflow.py"
    return "fql.py" if "alpha" in args else "flow_sac.py"


def task_number(env, task):
    """The number of the task that --env and --task name; 0 is the default one. Raises UserError."""
    name, dataset_name, _ = common.resolve_task(env, task)
    suffix = name.removesuffix("-v0").partition("-singletask")[2]
    if suffix:
        return int(suffix.removeprefix("-task"))
    for beginning, default in DEFAULT_TASKS.items():
        if dataset_name.removeprefix("visual-").startswith(beginning):
            return default
    return 1


def changed_settings(args, module, is_copy):
    """The settings that are not the script's defaults for the environment, as one string.

    is_copy: the run used a copy of the script; settings that only the copy has are all listed.
    """
    defaults = vars(module.Args())
    if is_copy:
        own = args.keys() - defaults.keys()
        defaults |= dict.fromkeys(sorted(own))
    for names, settings in module.SETTINGS.items():
        if re.match(names, args["env"]):
            defaults |= settings
    changed = []
    for name, default in defaults.items():
        value = args.get(name, default)
        if name == "hidden":
            value = tuple(value)  # JSON has lists only
        if name not in IGNORED and value != default:
            changed.append(f"{name}={value}".replace(", ", " "))
    return ", ".join(changed)


def read_run(folder):
    """A run's row (environment, ...), whether its score is a success rate, seed, dataset, score.

    And the steps of the evaluations in the score. Raises ValueError if there is none.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = (folder / "eval.csv").read_text().split("\n")
    except OSError as error:
        raise ValueError(error.strerror) from None
    if "args" not in config:
        raise ValueError("no settings in config.json")
    rows = list(csv.DictReader(lines))
    if not rows:
        raise ValueError("not evaluated yet")
    if lines[-1]:  # text after the last end of line
        raise ValueError("the last row of eval.csv is incomplete")
    args = config["args"]
    similar = most_similar_script(args)
    script = config.get("script", similar)  # runs of older commits do not have it
    is_copy = script not in SCRIPTS
    if is_copy:
        module, _ = SCRIPTS[similar]
        method = Path(script).stem
    else:
        module, method = SCRIPTS[script]
    offline_steps = args.get("offline_steps", 0)
    online_steps = args.get("online_steps", 0)
    last_step = int(rows[-1]["step"])
    if last_step < offline_steps + online_steps:
        raise ValueError(f"at step {last_step} of {offline_steps + online_steps}")

    environment = args["env"]
    task = ""
    if common.is_dataset(environment):
        task = str(task_number(environment, args["task"]))
        _, environment, _ = common.resolve_task(environment, args["task"])
    settings = dict(args)
    if script == "flow_sac.py":
        method += f", {settings.pop('policy')}"
    if script == "bptt.py":  # fql.py's default is that of another loss
        method += f", alpha={settings.pop('alpha'):g}"
    phases = []
    for steps, phase in ((offline_steps, "offline"), (online_steps, "online")):
        if steps > 0:
            phases.append(f"{steps:,} {phase}")
    changed = changed_settings(settings, module, is_copy)
    key = (environment, task, method, changed, " + ".join(phases))

    if online_steps > 0:
        rows = [row for row in rows if int(row["step"]) > offline_steps]
    has_success = rows[-1]["success"] != "nan"
    column = "success" if has_success else "return"
    score = np.mean([float(row[column]) for row in rows[-3:]])
    if has_success:
        score = 100 * score
    steps = ", ".join(f"{row['step']} ({row['episodes']} episodes)" for row in rows[-3:])
    return key, has_success, args["seed"], config.get("dataset"), score, steps


def summarise(scores):
    """Mean over seeds and its 95% bootstrap interval, (nan, nan) for a single seed."""
    mean = np.mean(scores)
    if len(scores) == 1:
        return mean, np.nan, np.nan
    rng = np.random.default_rng(0)
    result = scipy.stats.bootstrap((scores,), np.mean, method="percentile", rng=rng)
    return mean, *result.confidence_interval


def summarise_tasks(tasks):
    """Interquartile mean of all scores, and its 95% stratified bootstrap interval.

    tasks: an array (seeds,) of scores for each task. The interquartile mean leaves out the lowest
    and the highest quarter of all scores of all tasks. A bootstrap sample redraws each task's
    seeds, with replacement, from the seeds of that task. The interval is (nan, nan) for one seed.
    """
    tasks = np.array(tasks)
    mean = scipy.stats.trim_mean(tasks, 0.25, axis=None)
    num_tasks, num_seeds = tasks.shape
    if num_seeds == 1:
        return mean, np.nan, np.nan
    rng = np.random.default_rng(0)
    seeds = rng.integers(num_seeds, size=(20_000, num_tasks, num_seeds))
    samples = tasks[np.arange(num_tasks)[:, None], seeds].reshape(20_000, -1)
    means = scipy.stats.trim_mean(samples, 0.25, axis=1)
    return mean, *np.percentile(means, [2.5, 97.5])


def print_over_tasks(groups):
    """The table of --over-tasks; groups: see `main`."""
    methods = {}  # method -> (environment, task) -> scores, one array for each settings and steps
    for (environment, task, method, _, _, has_success), runs in groups.items():
        if has_success:
            scores = [score for _, score, _ in runs.values()]
            methods.setdefault(method, {}).setdefault((environment, task), []).append(scores)
    print("\n| method | tasks | seeds | mean | interquartile mean | 95% |")
    print("| --- | --- | --- | --- | --- | --- |")
    for method, tasks in sorted(methods.items()):
        several = [" ".join(name) for name, rows in tasks.items() if len(rows) > 1]
        counts = sorted({len(scores) for rows in tasks.values() for scores in rows})
        if several:
            reason = f"several settings or numbers of steps in {several[0]}: pass the runs of one"
        elif len(counts) > 1:
            reason = f"its tasks have from {counts[0]} to {counts[-1]} seeds"
        elif len(tasks) == 1:
            reason = "one task only"
        else:
            scores = [scores for (scores,) in tasks.values()]
            middle, low, high = summarise_tasks(scores)
            interval = "" if np.isnan(low) else f"{low:.1f}% to {high:.1f}%"
            cells = f"{len(tasks)} | {counts[0]} | {np.mean(scores):.1f}% | {middle:.1f}%"
            print(f"| {method} | {cells} | {interval} |")
            continue
        print(f"left out over tasks: {method}: {reason}", file=sys.stderr)


def evaluated_at(folder):
    """When a run was last evaluated, in seconds."""
    return (folder / "eval.csv").stat().st_mtime


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    out: Path | None = None,
    over_tasks: bool = False,
):
    """folders: of runs.

    Args:
        out: also write the table there, as CSV
        over_tasks: also print a table over the tasks of each method
    """
    groups = {}  # what a row is for -> (seed, dataset) -> (folder, score, steps)
    for folder in sorted(folders, key=lambda folder: folder.name):
        try:
            key, has_success, seed, dataset, score, steps = read_run(folder)
        except ValueError as error:
            print(f"left out: {folder}: {error}", file=sys.stderr)
            continue
        runs = groups.setdefault((*key, has_success), {})
        if (seed, dataset) in runs:
            other, _, _ = runs[seed, dataset]
            older, newer = sorted([other, folder], key=evaluated_at)
            reason = f"{newer}, same settings, seed and dataset, was evaluated later"
            print(f"left out: {older}: {reason}", file=sys.stderr)
            if newer == other:
                continue
        runs[seed, dataset] = (folder, score, steps)

    table = []
    print(f"| {' | '.join(COLUMNS[:-2])} | 95% |")
    print("| --- " * (len(COLUMNS) - 1) + "|")
    for (*key, has_success), runs in sorted(groups.items()):
        scores = [score for _, score, _ in runs.values()]
        several = dict(
            datasets={str(dataset) for _, dataset in runs},
            evaluations={steps for _, _, steps in runs.values()},
        )
        for name, values in several.items():
            if len(values) > 1:
                row = ", ".join(key[:3])
                print(f"several {name}: {row}: {'; '.join(sorted(values))}", file=sys.stderr)
        mean, low, high = summarise(scores)
        table.append([*key, len(scores), mean, low, high])
        form = "{:.1f}%" if has_success else "{:.0f}"
        interval = "" if np.isnan(low) else f"{form.format(low)} to {form.format(high)}"
        cells = [*key, str(len(scores)), form.format(mean), interval]
        print(f"| {' | '.join(cells)} |")
    if any(environment.startswith("D4RL/") for environment, *_ in groups):
        print(f"\n{minari_data.NOTE}")
    if over_tasks:
        print_over_tasks(groups)
    if out:
        with common.disk_errors(out.parent), open(out, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(table)


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except common.UserError as error:
        print(f"table.py: error: {error}", file=sys.stderr)
        sys.exit(2)
