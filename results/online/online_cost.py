"""What a step of the online phase costs beside an offline update, and where its time goes.

    OMP_NUM_THREADS=1 python results/online/online_cost.py

Times a thousand online steps of Q-Flow and of FQL, each after an offline update, in the same
process: the environment's step, acting (K Euler steps, or one step of FQL's policy), appending to
the dataset, and the update. Untrained networks, random data of the environment's sizes.
"""

import sys
import time
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import fql  # noqa: E402
import qflow  # noqa: E402

PARTS = ("offline update", "online step", "of it: environment", "resets", "acting", "append")


def random_dataset(env, device, num_rows=100_000):
    """One episode of random numbers with the environment's sizes."""
    rng = np.random.default_rng(0)
    valids = np.arange(num_rows) < num_rows - 1
    observations = rng.normal(size=(num_rows, *env.observation_space.shape))
    actions = rng.uniform(-1, 1, (num_rows, *env.action_space.shape))
    return common.Dataset(observations, actions, -1.0 * valids, valids, valids, device)


def measure(method, name, settings, num_steps, device):
    """Mean times per step in ms: part -> time."""
    args = method.Args(env=name, **settings)
    generator = torch.Generator(device).manual_seed(0)
    times = dict.fromkeys(PARTS, 0.0)

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with method.make_env(args) as env:
        dataset = random_dataset(env, device)
        dataset.reserve(num_steps)
        obs_dim, action_dim = dataset.observations.shape[1], dataset.actions.shape[1]
        nets = method.Networks(obs_dim, action_dim * args.horizon, args).to(device)
        optimizer = method.make_optimizer(nets, args)

        def sample_and_update():
            batch = dataset.sample(args.batch_size, args.horizon, args.discount, generator)
            noise = method.sample_noise(batch.actions, generator)
            return method.update(nets, optimizer, batch, noise, args)

        obs = None  # between episodes
        for _ in range(num_steps):
            start = now()
            sample_and_update()
            times["offline update"] += now() - start

            start = now()
            if obs is None:
                obs, _ = env.reset(seed=0)
                chunk = []
            was_reset = now()
            if not chunk:
                chunk = list(method.act(nets, obs[None], args, generator)[0])
            action = chunk.pop(0)
            acted = now()
            next_obs, reward, terminated, truncated, _ = env.step(action)
            stepped = now()
            done = terminated or truncated
            dataset.append(obs, action, reward, 1.0 - terminated, next_obs, done)
            obs = None if done else next_obs
            appended = now()
            sample_and_update()
            times["online step"] += now() - start
            times["of it: environment"] += stepped - acted
            times["resets"] += was_reset - start
            times["acting"] += acted - was_reset
            times["append"] += appended - stepped
    return {part: 1000 * total / num_steps for part, total in times.items()}


def main(
    steps: int = 1000,
    device: str = "cpu",
    matmul_precision: Literal["highest", "high", "medium"] = "high",
):
    """steps: online steps of each row; device: cpu or cuda; matmul_precision: as in the scripts"""
    torch.set_float32_matmul_precision(matmul_precision)
    rows = [
        ("pointmaze-medium-navigate-v0", None),
        ("cube-single-play-v0", (256,) * 4),
        ("antmaze-giant-navigate-v0", (512,) * 4),
    ]
    for name, hidden in rows:
        for method in (qflow, fql):
            settings = dict(hidden=hidden)
            for prefix, own in method.SETTINGS.items():
                if hidden is None and name.startswith(prefix):
                    settings = own
            result = measure(method, name, settings, steps, torch.device(device))
            if name == rows[0][0] and method is qflow:
                print("| environment | networks | method |", " | ".join(result), "|")
                print("| --- " * (3 + len(result)) + "|")
            sizes = f"{len(settings['hidden'])} x {settings['hidden'][0]}"
            times = " | ".join(f"{x:.2f}" for x in result.values())
            print(f"| {name.removesuffix('-v0')} | {sizes} | {method.__name__} | {times} |")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="glfw|gymnasium")  # no display, float64 spaces
    tyro.cli(main)
