"""Collects an antmaze-*-navigate dataset by OGBench's protocol, in the layout of its files.

    python results/collect_antmaze.py antmaze-large-navigate-v0

An episode starts in a random cell and goes to one random goal after the other (hallways are not
goals), along the environment's own shortest paths. A SAC expert for online-ant-xy-v0, whose weights
are beside this file, walks in the commanded direction, with Gaussian noise of standard deviation
0.2 on the actions. The result is not the official file: say so beside every number that comes from
it. A million transitions of antmaze-large took 208 s on two cores; an interrupted collection is
lost.
"""

import math
import multiprocessing
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

PART = 10  # episodes that share a seed


@dataclass
class Args:
    name: tyro.conf.Positional[str]
    """antmaze-MAZE-navigate-v0, MAZE medium, large, giant or teleport"""
    out: Path = Path(".")
    """folder for NAME.npz"""
    transitions: int = 1_000_000
    """rounded up to a multiple of 10 episodes (10,000 steps, in giant mazes 20,000)"""
    seed: int = 0
    """of everything random"""


def expert(obs, direction, weights):
    """The mean action of the expert (8,), for an observation (29,) whose x and y do not count."""
    x = np.concatenate([obs[2:], direction]).astype(np.float32)
    for i in range(2):
        x = x @ weights[f"dense{i}/kernel"] + weights[f"dense{i}/bias"]
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return np.tanh(x @ weights["dense2/kernel"] + weights["dense2/bias"])


def collect(job):
    """Ten episodes (Gymnasium id, steps, seed) -> arrays of OGBench's layout."""
    env_id, steps, seed = job
    weights = dict(np.load(Path(__file__).with_name("ant_xy_sac.npz")))
    rng = np.random.default_rng(seed)
    np.random.seed(int(rng.integers(2**31)))  # OGBench's noise at the start of an episode

    def pick(cells):
        return tuple(cells[rng.integers(len(cells))])

    rows = []
    with gymnasium.make(env_id, terminate_at_goal=False, max_episode_steps=steps) as env:
        maze = env.unwrapped
        cells, goals = common.goal_cells(maze.maze_map)
        env.reset(seed=int(rng.integers(2**31)))
        for _ in range(PART):
            task_info = dict(init_ij=pick(cells), goal_ij=pick(goals))
            obs, _ = env.reset(options=dict(task_info=task_info))
            for _ in range(steps):
                subgoal, _ = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)
                direction = subgoal - maze.get_xy()
                direction = direction / (np.linalg.norm(direction) + 1e-6)
                action = expert(obs, direction, weights)
                action = np.clip(action + rng.normal(0, 0.2, action.shape), -1, 1)
                next_obs, _, _, truncated, info = env.step(action)
                rows.append((obs, action, truncated, info["prev_qpos"], info["prev_qvel"]))
                obs = next_obs
                if info["success"]:
                    maze.set_goal(pick(goals))
    observations, actions, terminals, qpos, qvel = zip(*rows)
    return dict(
        observations=np.array(observations, np.float32),
        actions=np.array(actions, np.float32),
        terminals=np.array(terminals, bool),
        qpos=np.array(qpos, np.float32),
        qvel=np.array(qvel, np.float32),
    )


def num_cores():
    """Number of cores this process may use, perhaps few in a SLURM job; None (all) on macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def main():
    args = tyro.cli(Args, description=__doc__)
    if not re.fullmatch("antmaze-(medium|large|giant|teleport)-navigate-v0", args.name):
        sys.exit(f"{args.name}: MAZE is medium, large, giant or teleport")
    if args.transitions < 1:
        sys.exit(f"--transitions {args.transitions}: must be positive")
    if args.seed < 0:
        sys.exit(f"--seed {args.seed}: must be at least 0")
    path = args.out / f"{args.name}.npz"
    if path.exists():
        sys.exit(f"{path}: exists already")
    with common.disk_errors(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    steps = 2001 if "giant" in args.name else 1001
    env_id = args.name.replace("-navigate", "")
    num_parts = max(1, math.ceil(args.transitions / (PART * (steps - 1))))
    jobs = [(env_id, steps, [args.seed, part]) for part in range(num_parts)]
    with multiprocessing.Pool(num_cores(), common.leave_signals_to_main) as pool:
        results = pool.imap(collect, jobs)
        bar = common.progress_bar(results, args.name, num_parts, unit=" parts")
        parts = list(bar)
    data = {}
    for key in parts[0]:
        data[key] = np.concatenate([part[key] for part in parts])
    source = f"collected by OGBench's protocol, {num_parts * PART} episodes, seed {args.seed}"
    common.write_dataset(path, f"{source}; not the official file", data)


if __name__ == "__main__":
    try:
        main()
    except common.UserError as error:
        sys.exit(f"collect_antmaze.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
