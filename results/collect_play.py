"""Collects a cube-, scene- or puzzle-*-play dataset by OGBench's protocol, in its files' layout.

    python results/collect_play.py cube-single-play-v0
    python results/collect_play.py visual-cube-single-play-v0 --episodes 10    # pixels: renders

In an episode of 1,001 steps, OGBench's own scripted oracles carry out one random task after the
other, with smooth noise of 0.1 on their plans. The official files have a thousand episodes or, for
the largest environments, more. On pixels, a thousand episodes need 25 GB of memory and 36 core
hours. Nothing is written before the end: an interrupted collection is lost. The result is not the
official file: say so beside every number that comes from it.
"""

import functools
import multiprocessing
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

NAMES = "cube-(single|double|triple|quadruple)|scene|puzzle-(3x3|4x4|4x5|4x6)"

# The probability that a cube is to be put on another one is drawn from this range in each episode.
STACKING = dict(single=(0.0, 0.0), double=(0.0, 0.25), triple=(0.05, 0.35), quadruple=(0.1, 0.5))


@dataclass
class Args:
    name: tyro.conf.Positional[str]
    """cube-single-play-v0, scene-play-v0, visual-puzzle-3x3-play-v0 and the like"""
    out: Path = Path(".")
    """folder for NAME.npz"""
    episodes: int = 1000
    """each has 1,000 transitions"""
    seed: int = 0
    """of everything random"""


@functools.cache
def make(env_id):
    """The environment, and OGBench's oracles for it (kind of task -> oracle)."""
    options = dict(terminate_at_goal=False, mode="data_collection", max_episode_steps=1001)
    env = common.make_env(env_id, **options)
    # Here: they import MuJoCo, and make_env chooses how it renders.
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    noise = dict(env=env, noise=0.1, noise_smoothing=0.5)
    if "puzzle" in env_id:
        return env, dict(button=ButtonPlanOracle(gripper_always_closed=True, **noise))
    oracles = dict(cube=CubePlanOracle(**noise))
    if "scene" in env_id:
        oracles["button"] = ButtonPlanOracle(**noise)
        oracles["drawer"] = DrawerPlanOracle(**noise)
        oracles["window"] = WindowPlanOracle(**noise)
    return env, oracles


def play(env, oracles, rng, env_id):
    """One episode: a list of rows (name -> value) of OGBench's layout."""
    seed = int(rng.integers(2**31))
    np.random.seed(seed)  # environment and oracles draw from NumPy's global generator
    obs, info = env.reset(seed=seed)
    low, high = STACKING.get(env_id.split("-")[-2], (0.5, 0.5))
    p_stack = rng.uniform(low, high)
    oracle = oracles[info["privileged/target_task"]]
    oracle.reset(obs, info)
    rows = []
    done = False
    while not done:
        action = np.clip(oracle.select_action(obs, info), -1, 1)
        next_obs, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if oracle.done:
            task_obs, task_info = env.unwrapped.set_new_target(p_stack=p_stack)
            oracle = oracles[task_info["privileged/target_task"]]
            oracle.reset(task_obs, task_info)
        row = dict(observations=obs, actions=action, terminals=done)
        for name in ("qpos", "qvel", "button_states"):
            if f"prev_{name}" in info:
                row[name] = np.array(info[f"prev_{name}"])
        rows.append(row)
        obs = next_obs
    return rows


def cube_is_hidden(qpos):
    """Whether a scene's cube is ever out of the camera's sight; qpos: (N, ...)."""
    y = qpos[:, 15]
    z = qpos[:, 16]
    in_drawer = (y <= -0.3) & ((z < 0.06) | (z > 0.08))
    return ((y >= 0.29) | in_drawer).any()


def collect(job):
    """One episode (Gymnasium id, seed) -> arrays of OGBench's layout."""
    env_id, seed = job
    env, oracles = make(env_id)
    for attempt in range(100):
        rows = play(env, oracles, np.random.default_rng([*seed, attempt]), env_id)
        arrays = {}
        for name in rows[0]:
            arrays[name] = np.stack([row[name] for row in rows])
            if arrays[name].dtype != np.uint8:  # which pixels are
                arrays[name] = arrays[name].astype(np.float32)
        if not ("scene" in env_id and cube_is_hidden(arrays["qpos"])):
            arrays["terminals"] = arrays["terminals"].astype(bool)
            if "button_states" in arrays:
                arrays["button_states"] = arrays["button_states"].astype(np.int64)
            return arrays
    raise RuntimeError(f"seed {seed}: the cube was hidden in each of 100 attempts")


def num_cores():
    """Number of cores this process may use, perhaps few in a SLURM job; None (all) on macOS."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def main():
    args = tyro.cli(Args, description=__doc__)
    if not re.fullmatch(f"(visual-)?({NAMES})-play-v0", args.name):
        sys.exit(f"{args.name}: must be one of [visual-]({NAMES})-play-v0")
    if args.episodes < 1:
        sys.exit(f"--episodes {args.episodes}: must be positive")
    if args.seed < 0:
        sys.exit(f"--seed {args.seed}: must be at least 0")
    path = args.out / f"{args.name}.npz"
    if path.exists():
        sys.exit(f"{path}: exists already")
    with common.disk_errors(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    env_id = args.name.replace("-play", "")
    jobs = [(env_id, [args.seed, episode]) for episode in range(args.episodes)]
    with multiprocessing.Pool(num_cores(), common.leave_signals_to_main) as pool:
        results = pool.imap(collect, jobs)
        bar = common.progress_bar(results, args.name, args.episodes, unit=" episodes")
        episodes = list(bar)
    data = {}
    for name in episodes[0]:
        data[name] = np.concatenate([episode[name] for episode in episodes])
    source = f"collected by OGBench's protocol, {args.episodes} episodes, seed {args.seed}"
    common.write_dataset(path, f"{source}; not the official file", data)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="glfw|gymnasium")  # no display, float64 spaces
    try:
        main()
    except common.UserError as error:
        sys.exit(f"collect_play.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
