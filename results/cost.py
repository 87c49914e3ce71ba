"""What an environment costs: dataset memory per million transitions, and 50 episodes of evaluation.

    python results/cost.py

Runs untrained 4 x 512 networks, which rarely succeed: episodes have nearly full length.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import common
import qflow

NAMES = (
    "pointmaze-medium-navigate-v0 antmaze-large-navigate-v0 antmaze-giant-navigate-v0 "
    "antsoccer-arena-navigate-v0 humanoidmaze-medium-navigate-v0 humanoidmaze-large-navigate-v0 "
    "cube-single-play-v0 cube-double-play-v0 scene-play-v0 puzzle-3x3-play-v0 puzzle-4x4-play-v0"
).split()


@torch.no_grad()
def main():
    print(
        "| environment | observation | action | GB per 1M transitions | evaluation | mean length |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or NAMES:
        envs = common.make_envs(common.resolve_task(name).env_id, 25)
        obs_dim = envs.single_observation_space.shape[0]
        action_dim = envs.single_action_space.shape[0]
        torch.manual_seed(0)
        nets = qflow.Networks(obs_dim, action_dim, qflow.Args())

        def policy(obs, nets=nets, action_dim=action_dim):
            obs, x0 = torch.as_tensor(obs, dtype=torch.float32), torch.randn(len(obs), action_dim)
            return qflow.sample_actions(nets, obs, x0, qflow.Args())[:, None].numpy()

        start = time.perf_counter()
        length = qflow.evaluate(policy, envs, 50, 1, seed=0)["length"]
        seconds = time.perf_counter() - start
        envs.close()

        n = 10_000
        obs, flags = np.zeros((n, obs_dim)), np.zeros(n)
        data = common.Dataset(obs, np.zeros((n, action_dim)), obs, flags, flags, flags)
        size = sum(x.nbytes for x in vars(data).values() if isinstance(x, torch.Tensor)) / n / 1e3
        print(
            f"| {name.removesuffix('-v0')} | {obs_dim} | {action_dim} | {size:.2f} "
            f"| {seconds:.0f} s | {length:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
