"""Returns of a SAC Flow run's policy with noise, without, and without noise and drift.

python results/flow-sac-noise/flow_sac_noise.py runs/RUN --episodes 50
"""

import sys
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import flow_sac  # noqa: E402


def main(folder: tyro.conf.Positional[Path], episodes: int = 50):
    """folder: a run of flow_sac.py; episodes: for each of the three."""
    torch.set_num_threads(1)
    nets, args = flow_sac.load(folder)
    env = flow_sac.make_env(args)

    def as_trained(obs, x0, eps):
        actions, _ = flow_sac.sample_with_log_prob(nets.policy, obs, x0, eps)
        return actions

    def as_evaluated(obs, x0, eps):
        return flow_sac.sample_actions(nets, obs, x0, args)

    def neither(obs, x0, eps):  # Euler steps of v alone
        obs = nets.policy.obs_norm(obs)
        x = x0
        for i in range(args.flow_steps):
            t = torch.full_like(x[:, :1], i / args.flow_steps)
            x = x + nets.policy.velocity(obs, x, t) / args.flow_steps
        return x.tanh()

    policies = {
        "noise and drift (as trained)": as_trained,
        "drift (as evaluated)": as_evaluated,
        "neither": neither,
    }
    for name, policy in policies.items():
        generator = torch.Generator().manual_seed(0)
        returns = []
        for episode in range(episodes):
            obs = flow_sac.reset(env, episode)
            returns.append(0.0)
            done = False
            while not done:
                shape = args.flow_steps + 1, 1, *env.action_space.shape
                noise = torch.randn(shape, generator=generator)
                with torch.no_grad():
                    inputs = torch.as_tensor(obs, dtype=torch.float32)[None]
                    action = policy(inputs, noise[0], noise[1:])[0].numpy()
                obs, reward, terminated, truncated, _ = env.step(action)
                returns[-1] += reward
                done = terminated or truncated
        mean, std = np.mean(returns), np.std(returns)
        print(f"{name:30} mean return {mean:.1f}, standard deviation {std:.1f}")


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
