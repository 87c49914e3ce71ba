"""Flips buttons of a puzzle-3x3 dataset, so that it solves a task more often, or less.

    python results/published/flip_buttons.py DATASET OUT --task 1                   # most often
    python results/published/flip_buttons.py DATASET OUT --task 1 --quantile 0.5    # the median

A press switches the same buttons in every state, and the episodes of a dataset start in random
states. So a dataset with some buttons flipped throughout (on becomes off) is as probable as the
original; it only differs in which states are visited often. This script sorts the 512 states by how
often a press in the data leads to them, takes the state at the quantile, flips the buttons that
turn that state into the task's goal, and prints how often a press leads to the goal before and
after.
"""

import sys
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402

# Numbers of an observation before the buttons, each of which has four: its state one-hot, its
# position and its velocity.
ARM = 19
BITS = 1 << np.arange(9)


def visits(button_states, terminals):
    """How often a press leads to each state: (M, 9), (M,) -> (512,), button n as bit n."""
    index = button_states @ BITS
    is_press = (index[1:] != index[:-1]) & ~terminals[:-1]
    return np.bincount(index[1:][is_press], minlength=512)


def flip(data, is_flipped):
    """The arrays of a dataset with some buttons flipped in every row; is_flipped: (9,) bool."""
    observations = data["observations"].copy()
    buttons = observations[:, ARM:].reshape(len(observations), -1, 4)  # a view
    buttons[:, is_flipped, :2] = buttons[:, is_flipped, 1::-1]
    return {
        **data,
        "observations": observations,
        "button_states": data["button_states"] ^ is_flipped,
    }


def main(
    dataset: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    task: int = 1,
    quantile: float = 1,
):
    """dataset, out: npz files; task: 1 to 5; quantile: 0 to 1, of the states."""
    if not 1 <= task <= 5:
        raise common.UserError(f"--task {task}: must be from 1 to 5")
    if not 0 <= quantile <= 1:
        raise common.UserError(f"--quantile {quantile}: must be from 0 to 1")
    try:
        with np.load(dataset) as file:
            data = dict(file)
    except (OSError, ValueError) as error:
        raise common.UserError(f"{dataset}: not a dataset: {error}") from None
    if data.get("button_states", np.empty(0)).shape[1:] != (9,):
        raise common.UserError(f"{dataset}: not a dataset of puzzle-3x3")
    env = common.make_env("puzzle-3x3-v0")
    goal = env.unwrapped.task_infos[task - 1]["goal_button_states"].astype(bool)
    before = visits(data["button_states"], data["terminals"])
    state = before.argsort(kind="stable")[round(511 * quantile)]
    is_flipped = goal ^ (state & BITS > 0)
    data = flip(data, is_flipped)
    after = visits(data["button_states"], data["terminals"])
    change = f"buttons {np.flatnonzero(is_flipped)} flipped"
    print(f"a press leads to a state {before.mean():.0f} times on average,")
    print(f"to the goal of task {task} {before[goal @ BITS]} times,")
    print(f"and, with {change}, {after[goal @ BITS]} times")
    source = f"{data.pop('source', 'official file')}, {change}"
    with common.disk_errors(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
    common.write_dataset(out, source, data)


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except common.UserError as error:
        print(f"flip_buttons.py: error: {error}", file=sys.stderr)
        sys.exit(2)
