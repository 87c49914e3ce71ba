"""One picture of the evaluations of several runs, also beside published curves.

    python results/curves.py results/antmaze-large/*-seed0 --column success --out success.png
    python results/curves.py results/halfcheetah/*-seed* --mean --out returns.png
    python results/curves.py runs/* --published qc --method QC-FQL --out published.png

With --mean, runs of different seeds (NAME-seed0; ENV__SCRIPT__0__TIME or __HASH, as the scripts and
sweep.py name them) are drawn as one line, their mean, with a band for its 95% bootstrap interval.
Both are also printed as a table.

With --published, the figure has a panel for each task of the runs: success by step, with the
published curve of --method as a line with a band, and the runs as points with the 95% Wilson
intervals of their episodes. It also prints a table of the steps that a run and the published curve
have in common. results/published/README.md says what the band is.
"""

import csv
import difflib
import math
import re
import sys
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from evaluate import wilson  # noqa: E402
from table import IGNORED, summarise, task_number  # noqa: E402

import common  # noqa: E402

PUBLISHED = Path(__file__).parent / "published"

# The columns of a published file's band, and what they are.
BANDS = {
    ("ci95_low", "ci95_high"): "95% interval of the mean",
    ("lowest", "highest"): "lowest to highest seed",
}


NO_RUNS = "none of the folders has an evaluated run (eval.csv)"


def choose(flag, name, names, path):
    """`name`, if it is one of `names`. Raises UserError."""
    if name not in names:
        closest = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0))
        raise common.UserError(f"{flag} {name}: not in {path}; closest: {closest}")
    return name


def is_evaluated(folder):
    """Whether eval.csv is there and has a row."""
    return len(common.read_columns(folder / "eval.csv")) > 0


def read(folder, column):
    """A column of eval.csv by step: {step: value}. Raises UserError."""
    values = {}
    with open(folder / "eval.csv") as file:
        for row in csv.DictReader(file):
            choose("--column", column, row, file.name)
            values[int(row["step"])] = float(row[column])
    return values


def without_seed(folder):
    """The path of a run without its seed and the time of its start."""
    path = folder.resolve()
    name = re.sub(r"-seed\d+$|__\d+__\d{8}-\d{6}-\d+$", "", path.name)
    return path.with_name(re.sub(r"__\d+__([0-9a-f]{8})$", r"__\1", name))  # of a sweep


def check_seeds(name, folders):
    """Raise UserError if the runs do not differ in their seed, or differ in what table.py shows."""
    runs = [common.read_config(folder)["args"] for folder in folders]
    seeds = [run["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        raise common.UserError(f"--mean: several runs of {name} have the same seed")
    shown = {"env", "task", "dataset", "offline_steps", "online_steps"}
    for setting in sorted(set().union(*runs)):
        values = {str(run.get(setting)) for run in runs}
        if len(values) > 1 and (setting in shown or setting not in IGNORED):
            differ = f"{setting} is {' or '.join(sorted(values))}"
            raise common.UserError(f"--mean: the runs of {name} have several settings: {differ}")


def draw_mean(axes, name, runs):
    """The mean of the runs ({step: value} each) and its interval, at the steps that all have.

    Raises UserError.
    """
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    if not steps:
        raise common.UserError(f"--mean: the runs of {name} have no step in common")
    rows = np.array([summarise([run[step] for run in runs]) for step in steps])
    mean, low, high = rows.T
    axes.plot(steps, mean, ".-", label=f"{name} ({len(runs)} seeds)")
    axes.fill_between(steps, low, high, alpha=0.2)
    for step, (mean, low, high) in zip(steps, rows):
        print(f"| {name} | {step} | {mean:.4g} | {low:.4g} to {high:.4g} |")


def save(figure, out):
    """Write the picture. Raises UserError."""
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:  # ValueError: of a file name's ending
        raise common.UserError(f"--out {out}: {error}") from None


# ------------------------------------------------------------------------ beside published curves


def short_name(task):
    """puzzle-3x3-play-singletask-task1-v0 -> puzzle-3x3-play-task1"""
    return task.removesuffix("-v0").replace("-singletask", "")


def task_of(folder):
    """The short name of a run's task, with the number of a default task. Raises UserError."""
    args = common.read_config(folder)["args"]
    if not common.is_dataset(args["env"]):
        raise common.UserError(f"{folder}: its environment, {args['env']}, is not OGBench's")
    _, dataset_name, _ = common.resolve_task(args["env"], args["task"])
    return f"{short_name(dataset_name)}-task{task_number(args['env'], args['task'])}"


def read_published(path):
    """Curves {(task, method): {step: (mean, low, high)}}, in percent, and what low and high are.

    Raises UserError.
    """
    try:
        with open(path) as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise common.UserError(f"--published {path}: {error.strerror}") from None
    given = set(rows[0]) if rows else set()
    bands = [band for band in BANDS if {"task", "method", "step", "mean", *band} <= given]
    if not bands:
        wanted = " or ".join(" and ".join(band) for band in BANDS)
        columns = f"task, method, step, mean, and {wanted}"
        raise common.UserError(f"--published {path}: its columns must be {columns}")
    low, high = bands[0]
    curves = {}
    for row in rows:
        curve = curves.setdefault((short_name(row["task"]), row["method"]), {})
        curve[int(row["step"])] = (float(row["mean"]), float(row[low]), float(row[high]))
    return curves, BANDS[low, high]


def read_success(folder):
    """A run's success by step: {step: (rate, low, high)}, in percent, with Wilson's interval."""
    success = read(folder, "success")
    episodes = read(folder, "episodes")
    points = {}
    for step, rate in success.items():
        low, high = wilson(rate, episodes[step])
        points[step] = (round(100 * rate, 6), 100 * low, 100 * high)  # 28, not 28.000000000000004
    return points


def print_comparison(task, curves, runs):
    """Rows of a Markdown table: every step of a run that a published curve has too."""
    for method, curve in curves.items():
        for folder, points in runs.items():
            for step in sorted(curve.keys() & points.keys()):
                mean, low, high = curve[step]
                rate, run_low, run_high = points[step]
                inside = "yes" if low <= rate <= high else "no"
                published = f"{method} | {step:,} | {mean:.1f} | {low:.1f} to {high:.1f}"
                ours = f"{folder.name} | {rate:.0f} | {run_low:.0f} to {run_high:.0f}"
                print(f"| {task} | {published} | {ours} | {inside} |")


def draw_panel(axes, task, curves, runs, band):
    """Published curves (method -> {step: (mean, low, high)}) and runs (folder -> the same)."""
    for method, curve in curves.items():
        steps = sorted(curve)
        mean, low, high = np.array([curve[step] for step in steps]).T
        (line,) = axes.plot(steps, mean, ".-", label=f"{method}, published: mean, {band}")
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    for folder, points in runs.items():
        steps = sorted(points)
        rate, low, high = np.array([points[step] for step in steps]).T
        # A run folder's name begins with its task, which the panel's title already shows.
        label = folder.name.split("__", 1)[-1]
        (line,) = axes.plot(steps, rate, "o:", linewidth=1, label=label)
        axes.vlines(steps, low, high, color=line.get_color())
    axes.set(title=task, xlabel="step", ylabel="success in %", ylim=(-3, 103))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if runs:  # the x axis ends at the first published step from the last evaluation on
        last = max(max(points) for points in runs.values())
        behind = [step for curve in curves.values() for step in curve if step >= last]
        axes.set_xlim(0, 1.05 * min(behind, default=last))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize="small")
    axes.grid(alpha=0.3)


def compare(folders, out, published, task, method):
    """Draw the runs beside the published curves. Raises UserError."""
    path = Path(published) if published.endswith(".csv") else PUBLISHED / f"{published}.csv"
    curves, band = read_published(path)
    tasks = sorted({name for name, _ in curves})
    methods = sorted({name for _, name in curves})
    if not method:
        raise common.UserError(f"--published needs --method, one or more of {', '.join(methods)}")
    for name in method:
        choose("--method", name, methods, path)
    panels = {}  # task -> folder -> {step: (rate, low, high)}
    for name in task:
        panels[choose("--task", short_name(name), tasks, path)] = {}
    for folder in folders:
        if is_evaluated(folder):
            name = choose(f"{folder}:", task_of(folder), tasks, path)
            if task and name not in panels:
                raise common.UserError(f"{folder}: its task {name} is not among those of --task")
            panels.setdefault(name, {})[folder] = read_success(folder)
    if not panels:
        raise common.UserError(NO_RUNS)

    rows = math.ceil(len(panels) / 3)
    columns = math.ceil(len(panels) / rows)
    figure = Figure(figsize=(5 * columns, 5 * rows), layout="constrained")
    print(f"| task | published | step | mean | {band} | run | success | 95% | in the band |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for number, (name, runs) in enumerate(sorted(panels.items()), start=1):
        published_here = {key: curves[name, key] for key in method if (name, key) in curves}
        draw_panel(figure.add_subplot(rows, columns, number), name, published_here, runs, band)
        print_comparison(name, published_here, runs)
    save(figure, out)


# ------------------------------------------------------------------------------------------ main


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    out: Path,
    column: str = "return",
    mean: bool = False,
    switch: int = 0,
    published: str = "",
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    method: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
):
    """folders: run folders; out: image file to write.

    Args:
        column: column of eval.csv to plot
        mean: draw runs that differ only in their seed as one line, their mean
        switch: step to mark with a vertical line
        published: qc, qam (files in results/published) or another csv file with the same columns
        task: task in the published file, repeatable; default: the tasks of the runs
        method: method in the published file, repeatable
    """
    if published:
        if mean:
            raise common.UserError("--mean: not with --published, which shows each run")
        compare(folders, out, published, task, method)
        return
    if task or method:
        raise common.UserError("--task and --method need --published")
    groups = {}  # path, with --mean without the seed -> folders
    for folder in folders:
        if is_evaluated(folder):
            path = without_seed(folder) if mean else folder.resolve()
            groups.setdefault(path, []).append(folder)
    if not groups:
        raise common.UserError(NO_RUNS)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    names = [path.name for path in groups]
    for path, group in groups.items():
        is_unique = names.count(path.name) == 1
        name = path.name if is_unique else f"{path.parent.name}/{path.name}"
        runs = [read(folder, column) for folder in group]
        if mean:
            check_seeds(name, group)
            draw_mean(axes, name, runs)
        else:
            axes.plot(runs[0].keys(), runs[0].values(), ".-", label=name)
    if switch:
        axes.axvline(switch, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="step", ylabel=column)
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, out)


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except common.UserError as error:
        print(f"curves.py: error: {error}", file=sys.stderr)
        sys.exit(2)
