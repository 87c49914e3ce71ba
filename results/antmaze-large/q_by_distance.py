"""How far from the goal does Q still tell actions apart? Q of runs on a maze, by the distance.

    python results/antmaze-large/q_by_distance.py RUN... --out results/antmaze-large

For runs of qflow.py and fql.py on one maze and task. Transitions of their dataset are grouped by
the number of cells on the shortest way from the ant or point to the goal. Columns, means over a
group:

    q               of the dataset's actions, the mean of the critics
    critics_differ  the standard deviation between the critics
    actions_differ  the standard deviation of q over 16 actions of the flow from the same state:
                    how steep q is among them, not whether it is right
    gradient        the norm of the gradient of q by the action, at the dataset's actions. A policy
                    of fql.py that minimised its loss exactly would be this times A / (2 alpha)
                    away from the flow's action (A: all numbers of a chunk; for a linear q, actions
                    inside [-1, 1], no --normalize-q-loss)

Every step costs 1, so that no return is below -1 / (1 - discount): what is below is no value of any
policy. Writes q_by_distance.csv and q_by_distance.png, in which that bound is dashed.
"""

import csv
import sys
import warnings
from collections import deque
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import fql  # noqa: E402
import qflow  # noqa: E402


def load(folder):
    """Networks and settings of a run of qflow.py or fql.py. Raises UserError."""
    script = common.read_config(folder).get("script")
    if script == "qflow.py":
        return qflow.load(folder)
    if script == "fql.py":
        return fql.load(folder)
    raise common.UserError(f"{folder}: a run of {script}, not of qflow.py or fql.py")


def distances_to_goal(env):
    """Cells on the shortest way from each cell of the maze to the goal, walls -1: (rows, columns).

    Raises UserError for an environment without a maze.
    """
    if not hasattr(env, "maze_map"):
        raise common.UserError(f"{type(env).__name__}: is no maze")
    env.reset()
    goal = env.xy_to_ij(env.cur_goal_xy)
    distances = np.full(env.maze_map.shape, -1)
    distances[goal] = 0
    reached = deque([goal])
    while reached:
        i, j = reached.popleft()
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if env.maze_map[cell] == 0 and distances[cell] < 0:  # walls are all around the maze
                distances[cell] = distances[i, j] + 1
                reached.append(cell)
    return distances


@torch.no_grad()
def q_values(nets, batch, args, num_actions=16):
    """Q, its std between the critics, its std over actions of the flow, its gradient: (B,) each."""

    def total_q(actions):  # summed over the batch: each sample has the gradient of its own value
        return nets.critic(batch.observations, actions).mean(0).sum()

    gradient = torch.func.grad(total_q)(batch.actions).norm(dim=-1)
    q = nets.critic(batch.observations, batch.actions)
    over_actions = []
    for _ in range(num_actions):
        z = torch.randn_like(batch.actions)
        start = torch.zeros_like(z[:, :1])
        actions = fql.rollout(nets.velocity, batch.observations, z, start, args.flow_steps)
        over_actions.append(nets.critic(batch.observations, actions).mean(0))
    actions_differ = torch.stack(over_actions).std(0)
    return q.mean(0), q.std(0, unbiased=False), actions_differ, gradient


def main(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    samples: int = 20_000,
    cells: int = 2,
    out: Path = Path("."),
):
    """runs: folders of runs; samples: transitions of the dataset; cells: how many make a group;
    out: folder to write to"""
    for name, value in (("samples", samples), ("cells", cells)):
        if value < 1:
            raise common.UserError(f"--{name} {value}: must be at least 1")
    if not runs:
        raise common.UserError("needs the folder of at least one run")
    loaded = [load(folder) for folder in runs]
    _, args = loaded[0]
    _, dataset_name, env_id = common.resolve_task(args.env, args.task)
    for folder, (_, other) in zip(runs, loaded):
        if (other.env, other.task) != (args.env, args.task):
            raise common.UserError(
                f"{folder}: has --env {other.env} --task {other.task}, "
                f"{runs[0]} has --env {args.env} --task {args.task}"
            )
    with gymnasium.make(env_id) as env:
        distances = distances_to_goal(env.unwrapped)
        dataset, _ = common.get_dataset(dataset_name, env_id, args.dataset, sparse=args.sparse)
        figure = Figure(figsize=(6, 6), layout="constrained")
        axes = figure.subplots(2, sharex=True)
        rows = []
        for folder, (nets, args) in zip(runs, loaded):
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            batch = dataset.sample(samples, args.horizon, args.discount, generator)
            positions = batch.observations[:, :2].numpy()  # x and y come first
            away = np.array([distances[env.unwrapped.xy_to_ij(xy)] for xy in positions])
            values = q_values(nets, batch, args)
            run_rows = []
            for first in range(0, distances.max() + 1, cells):
                group = torch.as_tensor((away >= first) & (away < first + cells))
                if group.any():
                    means = [f"{x[group].mean().item():.4g}" for x in values]
                    run_rows.append([folder.name, first, group.sum().item(), *means])
            middle = [row[1] + (cells - 1) / 2 for row in run_rows]
            (line,) = axes[0].plot(middle, [float(row[3]) for row in run_rows], ".-")
            color = line.get_color()
            axes[0].axhline(-1 / (1 - args.discount), color=color, linestyle="dashed")
            differ = [float(row[5]) for row in run_rows]
            axes[1].plot(middle, differ, ".-", color=color, label=folder.name)
            rows += run_rows
    axes[0].set_ylabel("Q of the dataset's actions")
    axes[1].set(xlabel="cells to the goal", ylabel="Q's std over actions of the flow")
    axes[1].set_yscale("log")
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "q_by_distance.png", dpi=150)
    with open(out / "q_by_distance.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        columns = ["q", "critics_differ", "actions_differ", "gradient"]
        writer.writerow(["run", "cells", "samples", *columns])
        writer.writerows(rows)
    print((out / "q_by_distance.csv").read_text(), end="")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="glfw|gymnasium")  # no display, float64 spaces
    try:
        tyro.cli(main, description=__doc__)
    except common.UserError as error:
        sys.exit(f"q_by_distance.py: error: {error}")
