"""Training returns on HalfCheetah-v5, ours and those of the authors' scripts, in one picture.

    python results/halfcheetah/authors.py results/halfcheetah/*-seed*

The authors': sac-flow-authors-halfcheetah.csv, whose origin the README beside it names. It has one
seed, ours several: thin lines are runs, thick ones their means. A point is the mean of an
episode of 1,000 steps and the four before it, with the noise of training.
"""

import csv
import re
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

HERE = Path(__file__).parent
COLORS = {
    "flow-t": "tab:blue",
    "flow-g": "tab:orange",
    "naive": "tab:green",
    "gaussian": "tab:red",
}


def read_rows(path):
    """The rows of a CSV file as dictionaries."""
    with open(path) as file:
        return list(csv.DictReader(file))


def our_returns(folder):
    """Step and return of each training episode. Older runs have them in train.csv."""
    if (folder / "episodes.csv").exists():
        rows = [(row["step"], row["return"]) for row in read_rows(folder / "episodes.csv")]
    else:
        rows = [(row["step"], row["train_return"]) for row in read_rows(folder / "train.csv")]
    values = np.array(rows, float)
    values = values[~np.isnan(values[:, 1])]
    return values[values[:, 0] > 5000].T  # before, actions are uniform


def their_returns(policy):
    """The same, of the authors' script for this policy."""
    rows = []
    for row in read_rows(HERE / "sac-flow-authors-halfcheetah.csv"):
        if policy in row["script"] and row["quantity"] == "train_return":
            rows.append((row["step"], row["value"]))
    values = np.array(rows, float)
    return values[values[:, 0] > 5000].T


def smooth(values, width=5):
    """Each value's mean with the ones before it, up to `width` in all."""
    return np.array([values[max(0, i + 1 - width) : i + 1].mean() for i in range(len(values))])


def main(folders: tyro.conf.Positional[tuple[Path, ...]], out: Path = HERE / "authors.png"):
    """folders: our runs, named POLICY-seedN; out: the picture."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    ours, theirs = figure.subplots(1, 2, sharey=True)
    for policy, color in COLORS.items():
        runs = []
        for folder in sorted(folders):
            if re.fullmatch(rf"{policy}-seed\d+", folder.name):
                runs.append(our_returns(folder))
        for steps, returns in runs:
            ours.plot(steps, smooth(returns), color=color, linewidth=0.6, alpha=0.6)
        if runs:
            count = min(len(steps) for steps, _ in runs)
            mean = np.mean([smooth(returns)[:count] for _, returns in runs], 0)
            seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
            ours.plot(runs[0][0][:count], mean, color=color, label=f"{policy} ({seeds})")
        steps, returns = their_returns(policy)
        label = "CrossQ, gaussian" if policy == "gaussian" else policy
        theirs.plot(steps, smooth(returns), color=color, label=f"{label} (1 seed)")
        for name, found in [("ours", runs), ("authors", [(steps, returns)])]:
            late = [returns[-10:].mean() for _, returns in found]
            if late:
                print(f"{policy} {name}: last ten episodes {[round(value) for value in late]}")
    ours.set(title="flow_sac.py", xlabel="step", ylabel="return of training episodes")
    theirs.set(title="the authors' scripts (JAX)", xlabel="step")
    for axes in (ours, theirs):
        axes.set_ylim(-1000, 8500)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", ncols=2)
    figure.savefig(out)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
