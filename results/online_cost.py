"""What a step of the online phase costs beside an offline update, and where its time goes.

    OMP_NUM_THREADS=1 python results/online_cost.py

Times a thousand online steps of Q-Flow and of FQL, each after an offline update, in the same
process: the environment's step, acting (K Euler steps, or one step of FQL's policy), appending to
the dataset, and the update. Untrained networks, random data of the environment's sizes.
"""

import sys
import time
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import fql  # noqa: E402
import qflow  # noqa: E402


class Timed:
    """A function that notes how long each call took, in ms."""

    def __init__(self, function, device):
        self.function = function
        self.device = device
        self.times = []

    def __call__(self, *args, **kwargs):
        self.synchronize()
        start = time.perf_counter()
        result = self.function(*args, **kwargs)
        self.synchronize()
        self.times.append(1000 * (time.perf_counter() - start))
        return result

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def random_dataset(env, device, num_rows=100_000):
    """One episode of random numbers with the environment's sizes."""
    rng = np.random.default_rng(0)
    valids = np.arange(num_rows) < num_rows - 1
    observations = rng.normal(size=(num_rows, *env.observation_space.shape))
    actions = rng.uniform(-1, 1, (num_rows, *env.action_space.shape))
    return common.Dataset(observations, actions, -1.0 * valids, valids, valids, device)


def measure(method, name, settings, num_steps, device):
    """Mean times per step in ms: part -> time."""
    *_, env_id = common.resolve_task(name)
    args = method.Args(**settings)
    generator = torch.Generator(device).manual_seed(0)
    with method.SeededReset(gymnasium.make(env_id)) as env:
        dataset = random_dataset(env, device)
        dataset.reserve(num_steps)
        obs_dim, action_dim = dataset.observations.shape[1], dataset.actions.shape[1]
        nets = method.Networks(obs_dim, action_dim * args.horizon, args).to(device)
        optimizer = method.make_optimizer(nets, args)

        def policy(obs):
            return method.act(nets, obs, args, generator)

        def sample_and_update():
            batch = dataset.sample(args.batch_size, args.horizon, args.discount, generator)
            draws = method.draw(batch.actions, generator)
            return method.update(nets, optimizer, batch, draws, args)

        def online_step():
            collector.step(seed=0)
            sample_and_update()

        parts = {
            "offline update": Timed(sample_and_update, device),
            "online step": Timed(online_step, device),
            "of it: environment": Timed(env.step, device),
            "resets": Timed(env.reset, device),
            "acting": Timed(policy, device),
            "append": Timed(dataset.append, device),
        }
        env.step = parts["of it: environment"]
        env.reset = parts["resets"]
        dataset.append = parts["append"]
        collector = method.Collector(env, parts["acting"], dataset)
        for _ in range(num_steps):
            parts["offline update"]()
            parts["online step"]()
    return {part: sum(timed.times) / num_steps for part, timed in parts.items()}


def main(steps: int = 1000, device: str = "cpu"):
    """steps: online steps of each row; device: cpu or cuda."""
    qflow.set_matmul_precision("auto", torch.device(device))
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
