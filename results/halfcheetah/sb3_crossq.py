"""sb3-contrib's CrossQ at the sizes of the `gaussian` runs, to compare with them.

    pip install sb3-contrib
    python results/halfcheetah/sb3_crossq.py --out results/halfcheetah/sb3-crossq-seed0.csv

Its own settings otherwise: both learning rates 1e-3, target entropy -A, and BatchRenorm in the
actor too. A row per evaluation: steps, mean return of the deterministic policy, steps per second
of training.
"""

import csv
import time
from pathlib import Path

import gymnasium
import tyro
from sb3_contrib import CrossQ
from stable_baselines3.common.evaluation import evaluate_policy


def main(
    out: Path,
    env: str = "HalfCheetah-v5",
    seed: int = 0,
    online_steps: int = 30_000,
    learning_starts: int = 5_000,
    eval_interval: int = 10_000,
    eval_episodes: int = 10,
):
    agent = CrossQ(
        "MlpPolicy",
        env,
        batch_size=256,
        learning_starts=learning_starts,
        policy_kwargs=dict(net_arch=dict(pi=[128, 128], qf=[256, 256])),
        seed=seed,
        device="cpu",
    )
    eval_env = gymnasium.make(env)
    eval_env.reset(seed=seed)
    with open(out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "return", "steps_per_s"])
        for step in range(eval_interval, online_steps + 1, eval_interval):
            start = time.perf_counter()
            agent.learn(eval_interval, reset_num_timesteps=False)
            speed = eval_interval / (time.perf_counter() - start)
            mean, _ = evaluate_policy(agent, eval_env, eval_episodes, warn=False)
            writer.writerow([step, mean, round(speed, 1)])
            file.flush()


if __name__ == "__main__":
    tyro.cli(main)
