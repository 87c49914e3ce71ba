"""One picture of the evaluations of several runs.

python results/curves.py results/halfcheetah/* --out results/halfcheetah/returns.png
"""

import csv
from pathlib import Path

import tyro
from matplotlib.figure import Figure


def main(
    folders: tyro.conf.Positional[tuple[Path, ...]],
    out: Path,
    column: str = "return",
    switch: int = 0,
):
    """folders: of runs; out: the picture; column: of eval.csv; switch: a step to mark."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for folder in folders:
        if (folder / "eval.csv").is_file():
            with open(folder / "eval.csv") as file:
                rows = list(csv.DictReader(file))
            steps = [float(row["step"]) for row in rows]
            values = [float(row[column]) for row in rows]
            axes.plot(steps, values, ".-", label=folder.name)
    if switch:
        axes.axvline(switch, color="black", linestyle="--", linewidth=1)
    axes.set(xlabel="step", ylabel=column)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out)


if __name__ == "__main__":
    tyro.cli(main)
