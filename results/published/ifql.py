"""IFQL with chunks on a puzzle-3x3: does a critic that needs no policy learn as fast as published?

    python results/published/ifql.py puzzle-3x3-play-v0.npz --task 1

IFQL is IQL with a flow: Q learns from V of the next state, and V is the 0.9 expectile of Q over the
data's chunks, so the critic does not depend on the policy. The policy takes the best of 32 samples
of the flow that imitates the data. Everything else is fql.py's: networks, chunks, optimizer. At
each evaluation, prints the success and what the critic says before the goal, as before_the_goal.py
does.
"""

import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import before_the_goal  # noqa: E402

import common  # noqa: E402
import fql  # noqa: E402

EXPECTILE = 0.9
SAMPLES = 32


@dataclass
class Args:
    dataset: tyro.conf.Positional[str]
    """a puzzle-3x3-play-v0.npz"""
    task: int = 1
    """task of the puzzle"""
    seed: int = 0
    """seed of weights, batches, noise and episodes"""
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    """widths of the hidden layers"""
    steps: int = 100_000
    """number of updates"""
    eval_interval: int = 25_000
    """updates between evaluations"""
    eval_episodes: int = 50
    """episodes per evaluation"""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """as in fql.py"""


def total_loss(nets, batch, noise, args):
    """The losses of value, critic and flow; each trains its own network only."""
    obs = batch.observations
    with torch.no_grad():
        target_q = fql.aggregate(nets.target_critic(obs, batch.actions), args.q_agg)
        next_v = nets.value(batch.next_observations).flatten()
        q_target = batch.rewards + args.discount**args.horizon * batch.masks * next_v
    error = target_q - nets.value(obs).flatten()
    weight = torch.where(error > 0, EXPECTILE, 1 - EXPECTILE)
    value_loss = (batch.valid[:, -1] * weight * error**2).mean()
    td_loss, _ = fql.critic_loss(nets, batch, q_target)
    flow_loss, _ = fql.flow_loss(nets, batch, noise.flow_x0, noise.flow_t)
    return value_loss + td_loss + flow_loss, {}  # nothing to log


@torch.no_grad()
def act(obs, nets, args, generator):
    """The best of the flow's samples: observations (1, O) -> the next h actions (1, h, A)."""
    obs = torch.as_tensor(obs, dtype=torch.float32).repeat(SAMPLES, 1)
    x0 = torch.randn(SAMPLES, nets.sizes[1], generator=generator)
    actions = fql.rollout(nets.velocity, obs, x0, torch.zeros(SAMPLES, 1), args.flow_steps)
    q = fql.aggregate(nets.critic(obs, actions), args.q_agg)
    return actions[q.argmax()].view(1, args.horizon, -1).numpy()


def main(own: Args):
    common.check_compiler("cpu")
    torch.set_float32_matmul_precision(own.matmul_precision)
    args = fql.Args(env="puzzle-3x3-play-v0", task=own.task, sparse=True, horizon=5)
    args.hidden = own.hidden
    _, _, env_id = common.resolve_task(args.env, args.task)
    env = fql.make_env(args)
    data, _ = common.load_dataset(own.dataset, env_id, "cpu", args.sparse)
    torch.manual_seed(own.seed + 2**31)
    generator = torch.Generator().manual_seed(own.seed)
    nets = fql.Networks(data.obs_dim, args.horizon * data.actions.shape[1], args)
    nets.value = fql.MLP(data.obs_dim, args.hidden, 1, layer_norm=True)
    nets.one_step.requires_grad_(False)
    optimizer = fql.make_optimizer(nets, args)
    loss_fn = torch.compile(total_loss, fullgraph=True)
    start = time.time()
    for step in range(1, own.steps + 1):
        batch = data.sample(args.batch_size, args.horizon, args.discount, generator)
        noise = fql.sample_noise(batch.actions, generator)
        fql.update(nets, optimizer, batch, noise, args, loss_fn)
        if step % 1000 == 0:
            print(f"{step} updates, {time.time() - start:.0f} s", file=sys.stderr)
        if step % own.eval_interval == 0 or step == own.steps:
            policy_generator = torch.Generator().manual_seed(own.seed + step)
            policy = partial(act, nets=nets, args=args, generator=policy_generator)
            results = fql.evaluate(policy, env, own.eval_episodes, own.seed + step)
            print(f"{step} updates: success {results['success'].mean():.0%}\n", flush=True)
            before_the_goal.print_table(nets, args, data, with_policy=False)
            print(flush=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="glfw|gymnasium")  # no display, float64 actions
    try:
        main(tyro.cli(Args, description=__doc__))
    except common.UserError as error:
        print(f"ifql.py: error: {error}", file=sys.stderr)
        sys.exit(2)
