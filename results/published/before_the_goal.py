"""What the critic of a puzzle-3x3 run says about the data's chunks shortly before the goal.

    python results/published/before_the_goal.py RUN DATASET

Prints which buttons the task switches and how often the data solve it, then two tables of the mean
Q, 3, 10, 20 and 40 steps before the task is solved. Only solutions after 40 unsolved steps count.
The first table is about the data's own chunks: a row for each set of buttons that the last press
switches, with the number of solutions, and a row for all. Its top row is the correct Q of a policy
that goes on like the data: minus the discounted number of steps to the goal. The second table adds
other chunks from the same states: the mean and the best of 64 samples of the flow (which is
Q-Flow's policy) and of FQL's policy.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import fql  # noqa: E402
import qflow  # noqa: E402

STEPS = (3, 10, 20, 40)
SAMPLES = 64


def button_states(observations):
    """(M, 55) of a puzzle-3x3 -> (M, 9), whether each button is on.

    19 numbers are of the arm; each button has four, its state one-hot, its position and velocity.
    """
    return observations[:, 19:].reshape(len(observations), -1, 4)[:, :, 1] > 0.5


@torch.no_grad()
def print_table(nets, args, data, with_policy=True):
    """Print both tables for these networks. Raises UserError if the data never solve the task."""
    rows = data.rows.numpy()
    states = button_states(data.observations.numpy())
    solved = data.masks.numpy()[rows] == 0
    solutions = np.flatnonzero(solved[1:] & ~solved[:-1]) + 1
    if len(solutions) == 0:
        raise common.UserError(f"the dataset never solves task {args.task}")
    obs, _ = fql.make_env(args).reset(seed=0)
    start, goal = button_states(np.stack([obs, data.observations[rows[solutions[0]] + 1]]))
    print(f"the task switches {np.flatnonzero(start != goal)}; the data solve it", end=" ")
    print(f"{len(solutions)} times\n")
    values = {}  # the buttons switched -> a list of Q, one for each number in STEPS
    others = {}  # the name of a row -> a list of Q, one for each number in STEPS
    generator = torch.Generator().manual_seed(0)
    for i in solutions:
        if i < max(STEPS):
            continue
        is_whole = data.valids[rows[i] - max(STEPS) : rows[i]].all()  # in one episode
        if not is_whole or solved[i - max(STEPS) : i].any():
            continue
        switched = tuple(np.flatnonzero(states[rows[i] - 3] != states[rows[i] + 1]))
        starts = torch.tensor([i - steps for steps in STEPS])
        batch = data.chunks(starts, args.horizon, args.discount)
        q = nets.critic(batch.observations, batch.actions).mean(0)
        values.setdefault(switched, []).append(q.tolist())
        obs = batch.observations.repeat(SAMPLES, 1)
        noise = torch.randn(len(obs), batch.actions.shape[1], generator=generator)
        zeros = torch.zeros(len(obs), 1)
        actions = {"flow": fql.rollout(nets.velocity, obs, noise, zeros, args.flow_steps)}
        if with_policy:
            actions["policy"] = fql.sample_actions(nets, obs, noise, args)
        for name, sampled in actions.items():
            q = nets.critic(obs, sampled).mean(0).view(SAMPLES, len(STEPS))
            others.setdefault(name, []).append(q.mean(0).tolist())
            others.setdefault(f"best of {name}", []).append(q.amax(0).tolist())
    true = [-(1 - args.discount**steps) / (1 - args.discount) for steps in STEPS]
    everything = [row for rows_of_one in values.values() for row in rows_of_one]
    if not everything:
        raise common.UserError(f"the data never solve the task after {max(STEPS)} unsolved steps")
    print_head("buttons | times")
    print_row("right, going on like the data |", true)
    print_row(f"all | {len(everything)}", np.mean(everything, 0))
    for switched, q in sorted(values.items()):
        name = " ".join(str(button) for button in switched)
        print_row(f"{name} | {len(q)}", np.mean(q, 0))
    print()
    print_head("chunk")
    print_row("data", np.mean(everything, 0))
    for name, q in others.items():
        print_row(name, np.mean(q, 0))


def print_head(columns):
    print(f"| {columns} |", " | ".join(f"{steps} before" for steps in STEPS), "|")
    print("| --- " * (columns.count("|") + 1 + len(STEPS)) + "|")


def print_row(name, q):
    print(f"| {name} |", " | ".join(f"{x:.0f}" for x in q), "|")


def main(run: tyro.conf.Positional[Path], dataset: tyro.conf.Positional[Path]):
    """run: a folder with a checkpoint; dataset: the npz file that it was trained on."""
    script = qflow if common.read_config(run)["script"] == "qflow.py" else fql
    nets, args = script.load(run)
    name, _, env_id = common.resolve_task(args.env, args.task)
    if not name.startswith("puzzle-3x3-"):
        raise common.UserError(f"{run}: is not of puzzle-3x3 but of {name}")
    data, _ = common.load_dataset(dataset, env_id, "cpu", args.sparse)
    print_table(nets, args, data, with_policy=hasattr(nets, "one_step"))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="glfw|gymnasium")  # no display, float64 actions
    try:
        tyro.cli(main, description=__doc__)
    except common.UserError as error:
        print(f"before_the_goal.py: error: {error}", file=sys.stderr)
        sys.exit(2)
