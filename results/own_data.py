"""Q-Flow on arrays and an environment of your own: here, random episodes of Pendulum.

python results/own_data.py

The same command resumes an interrupted run. To start anew, as after a change of the data, remove
runs/own-pendulum.
"""

import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import qflow  # noqa: E402

warnings.filterwarnings("ignore", module="gymnasium")  # float64 spaces


def make_env():
    env = gymnasium.make("Pendulum-v1")
    return gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)


# Your episodes, one after the other: here five with random actions. Actions are those of the
# wrapped environment; convert recorded ones to [-1, 1]: 2 * (action - low) / (high - low) - 1.
rows = []  # observation, action, reward, mask (0 if terminated: no future counts), valid
env = make_env()
env.action_space.seed(0)
for episode in range(5):
    obs, _ = env.reset(seed=episode)
    done = False
    while not done:
        action = env.action_space.sample()
        next_obs, reward, terminated, truncated, _ = env.step(action)
        rows.append((np.array(obs), action, float(reward), 1 - terminated, 1))
        obs = next_obs
        done = terminated or truncated
    # The last observation; nothing else of this row is used.
    rows.append((np.array(obs), action, 0.0, 0, 0))

args = qflow.Args(
    env="Pendulum-v1", offline_steps=200, eval_interval=100, eval_episodes=4, hidden=(64, 64)
)
qflow.check_args(args)
torch.set_float32_matmul_precision(args.matmul_precision)
device = qflow.choose_device(args.device)
dataset = common.Dataset(*[np.array(column) for column in zip(*rows)], device=device)

config = dict(script="qflow.py", args=vars(args), dataset=f"{len(dataset)} transitions")
with common.Run("runs/own-pendulum", config, resume=True) as run:
    print("writing to", run.folder)
    nets = qflow.train(args, dataset, env, make_env(), run)
print("action", qflow.act(nets, obs[None], args)[0, 0])
