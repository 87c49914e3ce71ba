"""One picture of the evaluations of several runs.

    python results/curves.py results/antmaze-large/*-seed0 --column success --out success.png
    python results/curves.py results/halfcheetah/* --mean --out results/halfcheetah/returns.png

With --mean, runs whose folders differ in -seedN only are one line, their mean, with the 95%
bootstrap interval of the mean around it; a table of both is printed.
"""

import csv
import re
import sys
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))
from table import summarise  # noqa: E402


def read(folder, column):
    """A column of eval.csv by step: {step: value}."""
    with open(folder / "eval.csv") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file)}


def draw_mean(axes, name, runs):
    """The mean of the runs ({step: value} each) and its interval, at the steps that all have."""
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    rows = np.array([summarise([run[step] for run in runs]) for step in steps])
    mean, low, high = rows.T
    axes.plot(steps, mean, ".-", label=f"{name} ({len(runs)} seeds)")
    axes.fill_between(steps, low, high, alpha=0.2)
    for step, (mean, low, high) in zip(steps, rows):
        print(f"| {name} | {step} | {mean:.4g} | {low:.4g} to {high:.4g} |")


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    out: Path,
    column: str = "return",
    mean: bool = False,
    switch: int = 0,
):
    """folders: of runs; out: the picture; column: of eval.csv; switch: a step to mark."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    groups = {}
    for folder in folders:
        if (folder / "eval.csv").is_file():
            name = re.sub(r"-seed\d+$", "", folder.name) if mean else folder.name
            groups.setdefault(name, []).append(read(folder, column))
    for name, runs in groups.items():
        if mean:
            draw_mean(axes, name, runs)
        else:
            axes.plot(runs[0].keys(), runs[0].values(), ".-", label=name)
    if switch:
        axes.axvline(switch, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="step", ylabel=column)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
