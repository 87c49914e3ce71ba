"""What an environment costs: dataset memory per million transitions, time of an evaluation.

    python results/speed/cost.py

Times 1,000 steps under an untrained 4 x 512 Q-Flow policy (K = 10), and scales that to 50 episodes
of full length: an evaluation in which nothing succeeds. And loads a file of
1M transitions of antmaze-giant's sizes, random numbers, as OGBench writes them.
"""

import sys
import tempfile
import time
from pathlib import Path

import gymnasium
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import qflow  # noqa: E402

NAMES = (
    "pointmaze-medium-navigate-v0 antmaze-large-navigate-v0 antmaze-giant-navigate-v0 "
    "antsoccer-arena-navigate-v0 humanoidmaze-medium-navigate-v0 humanoidmaze-large-navigate-v0 "
    "cube-single-play-v0 cube-double-play-v0 scene-play-v0 puzzle-3x3-play-v0 puzzle-4x4-play-v0"
).split()


@torch.no_grad()
def main():
    print("| environment | observation | action | GB per 1M transitions | steps | evaluation |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or NAMES:
        *_, env_id = common.resolve_task(name)
        env = gymnasium.make(env_id, max_episode_steps=2000)
        obs_dim = env.observation_space.shape[0]
        action_dim = env.action_space.shape[0]
        torch.manual_seed(0)
        nets = qflow.Networks(obs_dim, action_dim, qflow.Args())
        obs, _ = env.reset(seed=0)
        start = time.perf_counter()
        for _ in range(1000):
            action = qflow.act(nets, obs[None], qflow.Args())[0, 0]
            obs, _, _, _, _ = env.step(action)
        length = gymnasium.spec(env_id).max_episode_steps
        seconds = (time.perf_counter() - start) / 1000 * length * 50
        env.close()

        n = 10_000
        flags = np.arange(n) < n - 1
        actions = np.zeros((n, action_dim))
        data = common.Dataset(np.zeros((n, obs_dim)), actions, flags, flags, flags)
        size = sum(x.nbytes for x in vars(data).values() if isinstance(x, torch.Tensor)) / n / 1e3
        print(
            f"| {name.removesuffix('-v0')} | {obs_dim} | {action_dim} | {size:.2f} "
            f"| {length} | {seconds:.0f} s |",
            flush=True,
        )

    n = 500 * 2001
    rng = np.random.default_rng(0)
    sizes = dict(observations=29, actions=8, qpos=15, qvel=14)
    arrays = {k: rng.uniform(-1, 1, (n, size)).astype(np.float32) for k, size in sizes.items()}
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        np.savez_compressed(file, terminals=np.arange(n) % 2001 == 2000, **arrays)
        file.flush()
        start = time.perf_counter()
        *_, env_id = common.resolve_task("antmaze-giant-navigate-v0")
        common.load_dataset(file.name, env_id, "cpu")
        print(f"loading 1M transitions: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
