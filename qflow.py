"""Q-Flow: offline RL with a flow policy that follows the gradient of a value inside the flow.

A flow policy turns noise x_0 ~ N(0, I) into an action x_1 by following a velocity field v(s, x, t)
from t = 0 to t = 1. Imitating the dataset is a regression problem, called flow matching. The direct
way to improve on the data is to backpropagate Q through every step of the solver, which costs
memory and can be unstable.

Q-Flow avoids this. The flow is deterministic, so a point x_t on the way has exactly the value of
the action at its end. A network V(s, x_t, t) learns this value, and its gradient with respect to
x_t tells the velocity field where to bend. Three networks, three regressions. In this file's
notation, with x_0 noise, x_1 an action of the dataset and x_t = (1 - t) x_0 + t x_1, they learn:

    critic    Q(s, a)       ->  r + discount * mask * Q'(s', a'),  a' from the policy, Q' the target
    value     V(s, x_t, t)  ->  Q'(s, y),  y the action to which the policy's flow takes x_t
    velocity  v(s, x_t, t)  ->  x_1 - x_0 + 1 / lam * grad_x V(s, x_t, t)

The arrow means: is trained towards. With chunks of h actions (--horizon; Q-chunking,
https://arxiv.org/abs/2507.07969), r is the discounted sum of the rewards in a chunk and discount
becomes discount^h.

With --online-steps, training continues in the environment: before each update the policy takes one
step, which is added to the dataset.

Doo, Jeon, Ye, Lee, Seo: Q-Flow: Stable and Expressive Reinforcement Learning with Flow-Based
Policy, ICML 2026, https://arxiv.org/abs/2605.13435

    python qflow.py                                     # pointmaze, on data collected on the spot
    python qflow.py --env antmaze-giant-navigate-v0     # with the paper's settings
    python qflow.py --resume RUN --online-steps 200000  # a finished run, now online

The paper's second table uses --num-critics 10 --q-agg mean --rho 0.5 (humanoidmaze: --rho 0), with
--horizon 5 for cube, scene and puzzle and --sparse for scene and puzzle. The lambdas of this table
were not published.
"""

import copy
import math
import re
import signal
import sys
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

import common


@dataclass
class Args:
    env: str = "pointmaze-medium-navigate-v0"
    """OGBench dataset: NAME-v0, NAME-singletask-v0 or NAME-singletask-taskN-v0"""
    task: int = 0
    """task number, 1 to 5; 0: the task in the name of --env, else OGBench's default task"""
    dataset: str = ""
    """npz file or its URL; default: the official file (pointmaze-*-navigate: collected here)"""
    sparse: bool = False
    """scene and puzzle: the reward is -1 until solved, not minus the number of unsolved parts"""
    seed: int = 0
    """seed of weights, batches, noise and episodes"""
    device: str = "auto"
    """auto (CUDA if usable), cpu, cuda or cuda:N"""
    offline_steps: int = 1_000_000
    """number of updates on the dataset"""
    online_steps: int = 0
    """number of further updates; before each, one environment step is added to the dataset"""
    batch_size: int = 256
    """transitions (or chunks) per update"""
    lr: float = 3e-4
    """learning rate of Adam"""
    discount: float = 0.99
    """discount per environment step"""
    tau: float = 0.005
    """Polyak rate of the target critic"""
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    """widths of the hidden layers, in every network"""
    flow_steps: int = 10
    """K, number of Euler steps from noise to action"""
    q_agg: Literal["mean", "min"] = "mean"
    """how the ensembles are aggregated: the critics in the targets, V in its own loss"""
    num_critics: int = 2
    """size of the ensembles of critics and of V"""
    rho: float = 0.0
    """pessimism: the targets are mean - rho * std of the target critics; needs --q-agg mean"""
    horizon: int = 1
    """h, actions per chunk, executed open loop (1: no chunks)"""
    lam: float = 1.0
    """lambda, strength of the regularisation towards the data: grad V has weight 1 / lambda"""
    time_dim: int = 64
    """size of V's Fourier embedding of flow time; the authors used 64, later 16 or no embedding"""
    eval_interval: int = 100_000
    """updates between evaluations (the last update of a phase is always evaluated)"""
    eval_episodes: int = 50
    """episodes per evaluation"""
    log_interval: int = 500
    """updates between rows of train.csv"""
    run_dir: str = "runs"
    """where the run's folder is created"""
    resume: str = ""
    """run folder to resume with its settings; flags that are given override them"""
    start_or_resume: str = ""
    """run folder to start in, or to resume if it has a checkpoint (for sweeps, requeued jobs)"""
    track: bool = False
    """log to Weights & Biases too (pip install wandb; WANDB_PROJECT and WANDB_ENTITY apply)"""
    compile: bool = False
    """compile the losses (takes a minute); on CUDA, also capture the update as one CUDA graph"""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """high: TF32 on CUDA, float32 on CPUs; medium: may use bfloat16, faster on some AMD CPUs"""


# Defaults per environment, from the paper (pointmaze: our own, small enough for a laptop). Keys are
# regular expressions matched at the start of --env; later matches override earlier ones.
SETTINGS = {
    "pointmaze": dict(
        lam=4.0,
        q_agg="min",
        discount=0.998,
        horizon=5,
        flow_steps=4,
        offline_steps=12_000,
        eval_interval=1_200,
        eval_episodes=25,
        lr=1e-3,
        tau=0.02,
        hidden=(128, 128, 128),
    ),
    "antmaze-large-navigate": dict(lam=0.2, q_agg="mean", discount=0.99),
    "antmaze-giant-navigate": dict(lam=0.2, q_agg="min", discount=0.995),
    "antsoccer-arena-navigate": dict(lam=0.5, q_agg="mean", discount=0.995),
    "humanoidmaze-medium-navigate": dict(lam=1.0, q_agg="mean", discount=0.995),
    "humanoidmaze-large-navigate": dict(lam=1.0, q_agg="mean", discount=0.995),
    "cube-single-play": dict(lam=5.0, q_agg="mean", discount=0.99),
    "cube-double-play": dict(lam=2.0, time_dim=16, q_agg="mean", discount=0.99),
    "scene-play": dict(lam=5.0, q_agg="mean", discount=0.99),
    "puzzle-3x3-play": dict(lam=20.0, q_agg="min", discount=0.99),
    "puzzle-4x4-play": dict(lam=20.0, q_agg="min", discount=0.99),
}


# ------------------------------------------------------------------------------------- networks
#
# Shapes: B batch, O observation, A action, h chunk length, K flow steps. Networks see a chunk as
# one action: x and actions are (B, h * A).


class EnsembleLinear(nn.Module):
    """`ensemble` linear layers side by side: (B, in) or (ensemble, B, in) -> (ensemble, B, out)."""

    def __init__(self, in_dim, out_dim, ensemble):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(ensemble, in_dim, out_dim))
        self.bias = nn.Parameter(torch.zeros(ensemble, 1, out_dim))
        for weight in self.weight:  # one by one: the stacked tensor has a wrong fan-in and fan-out
            nn.init.xavier_uniform_(weight)

    def forward(self, x):
        x = x.expand(len(self.weight), -1, -1)
        return torch.bmm(x, self.weight).add_(self.bias)


class EnsembleLayerNorm(nn.Module):
    """LayerNorm with separate scale and bias for each member: (ensemble, B, dim) -> same shape."""

    def __init__(self, dim, ensemble):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(ensemble, 1, dim))
        self.bias = nn.Parameter(torch.zeros(ensemble, 1, dim))

    def forward(self, x):
        normalised = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return torch.addcmul(self.bias, normalised, self.scale)


class MLP(nn.Sequential):
    """(B, in) -> (ensemble, B, out); hidden layers: linear, GELU and, if layer_norm, LayerNorm."""

    def __init__(self, in_dim, hidden, out_dim, ensemble=1, layer_norm=False):
        layers = []
        for width in hidden:
            layers.append(EnsembleLinear(in_dim, width, ensemble))
            layers.append(nn.GELU(approximate="tanh"))
            if layer_norm:
                layers.append(EnsembleLayerNorm(width, ensemble))
            in_dim = width
        layers.append(EnsembleLinear(in_dim, out_dim, ensemble))
        super().__init__(*layers)


class Critic(nn.Module):
    """Q(s, a), an ensemble: (B, O), (B, h * A) -> (ensemble, B)."""

    def __init__(self, obs_dim, action_dim, hidden, ensemble):
        super().__init__()
        self.mlp = MLP(obs_dim + action_dim, hidden, 1, ensemble, layer_norm=True)

    def forward(self, obs, actions):
        return self.mlp(torch.cat([obs, actions], -1)).squeeze(-1)


class Velocity(nn.Module):
    """v(s, x_t, t), the velocity field of the flow: (B, O), (B, h * A), (B, 1) -> (B, h * A)."""

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        self.mlp = MLP(obs_dim + action_dim + 1, hidden, action_dim)

    def forward(self, obs, x, t):
        return self.mlp(torch.cat([obs, x, t], -1)).squeeze(0)  # an ensemble of one


class Value(nn.Module):
    """V(s, x_t, t), an ensemble: (B, O), (B, h * A), (B, 1) -> (ensemble, B)."""

    def __init__(self, obs_dim, action_dim, hidden, ensemble, time_dim):
        super().__init__()
        self.mlp = MLP(obs_dim + action_dim + time_dim, hidden, 1, ensemble, layer_norm=True)
        frequencies = torch.linspace(0, math.log(256), time_dim // 2, dtype=torch.float64).exp()
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def forward(self, obs, x, t):
        angles = t * self.frequencies
        return self.mlp(torch.cat([obs, x, angles.sin(), angles.cos()], -1)).squeeze(-1)


class Networks(nn.Module):
    """The trainable networks and the target critic; action_dim is that of a whole chunk, h * A."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.sizes = (obs_dim, action_dim)
        self.critic = Critic(obs_dim, action_dim, args.hidden, args.num_critics)
        self.value = Value(obs_dim, action_dim, args.hidden, args.num_critics, args.time_dim)
        self.velocity = Velocity(obs_dim, action_dim, args.hidden)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)


# -------------------------------------------------------------------------------------- rollout


def rollout(velocity, obs, x, t, flow_steps):
    """Follow the flow from (x, t) to time 1 with K Euler steps, then clip to [-1, 1].

    From t = 0 these are K steps of size 1 / K. From t > 0 the flow arrives early, and the remaining
    steps have size 0, so that every sample takes K steps. (B, O), (B, h * A), (B, 1) -> (B, h * A).
    """
    for _ in range(flow_steps):
        dt = (1 - t).clamp(0, 1 / flow_steps)
        x = x + velocity(obs, x, t) * dt
        t = t + dt
    return x.clamp(-1, 1)


def sample_actions(nets, obs, x0, args):
    """The policy: noise x_0 ~ N(0, I) to actions in [-1, 1]. (B, O), (B, h * A) -> (B, h * A)."""
    return rollout(nets.velocity, obs, x0, torch.zeros_like(x0[:, :1]), args.flow_steps)


# --------------------------------------------------------------------------------------- losses
#
# A batch:
#
#     observations       (B, O)
#     actions            (B, h * A)  in [-1, 1], step after step; any finite values after an episode
#     rewards            (B,)    discounted sum over the valid steps of a chunk
#     masks              (B,)    0 if solved or terminated at a valid step, else 1 (time limit, too)
#     next_observations  (B, O)  after the last valid step
#     valid              (B, h)  0 for steps after the end of the episode, else 1
#
# A chunk whose last step is not valid has weight 0. So chunks must start at every step of an
# episode, not at every h-th: else most ends are never learned.


class Noise(NamedTuple):
    """All random numbers of the losses: x0 ~ N(0, I), (B, h * A), and t ~ U(0, 1), (B, 1)."""

    next_x0: torch.Tensor
    value_x0: torch.Tensor
    value_t: torch.Tensor
    policy_x0: torch.Tensor
    policy_t: torch.Tensor


def sample_noise(actions, generator):
    """Noise for a batch with these actions."""
    x0 = torch.randn(3, *actions.shape, device=actions.device, generator=generator)
    t = torch.rand(2, len(actions), 1, device=actions.device, generator=generator)
    return Noise(next_x0=x0[0], value_x0=x0[1], value_t=t[0], policy_x0=x0[2], policy_t=t[1])


def aggregate(q, q_agg):
    """One value from the ensemble: (ensemble, B) -> (B,)."""
    return q.mean(0) if q_agg == "mean" else q.amin(0)


@torch.no_grad()
def targets(nets, batch, next_x0, xt, t, args):
    """Targets of the critic, r + discount^h * mask * Q'(s', a'), and of V, Q'(s, y): (B,), (B,).

    Q' is the mean of the target critics minus rho times their population standard deviation, or
    their minimum. The policy's flow takes next_x0 to a' at s', and x_t to y at s: one rollout of 2B
    samples, which is faster than two of B.
    """
    obs = torch.cat([batch.next_observations, batch.observations])
    start_x = torch.cat([next_x0, xt])
    start_t = torch.cat([torch.zeros_like(t), t])
    actions = rollout(nets.velocity, obs, start_x, start_t, args.flow_steps)  # a' and y
    qs = nets.target_critic(obs, actions)
    q = aggregate(qs, args.q_agg)
    if args.rho > 0:
        q = q - args.rho * qs.std(0, correction=0)
    next_q, v_target = q.chunk(2)
    q_target = batch.rewards + args.discount**args.horizon * batch.masks * next_q
    return q_target, v_target


@torch.no_grad()
def guidance(value, obs, xt, t):
    """grad_x V(s, x_t, t), detached: (B, h * A).

    V is the mean of the ensemble even with q_agg min, as in the authors' code.
    """

    def total_value(x):  # each sample's gradient of this sum is the gradient of its own value
        return value(obs, x, t).mean(0).sum()

    return torch.func.grad(total_value)(xt)  # works within no_grad, too


# Each loss function returns the loss and what to log. Logged names that end in _loss are plotted
# and must stay finite.


def critic_loss(nets, batch, target):
    """TD learning, towards a target (B,)."""
    q = nets.critic(batch.observations, batch.actions)
    loss = (batch.valid[:, -1] * (q - target) ** 2).mean()
    return loss, dict(critic_loss=loss, q_mean=q.mean(), q_min=q.amin(), q_max=q.amax())


def value_loss(nets, batch, xt, t, target, args):
    """Flow consistency: V(s, x_t, t) learns the target (B,), which is Q' where the flow ends.

    With q_agg min, each sample trains only the ensemble member with the smallest value. With rho, V
    is the plain mean: the pessimism is in the target.
    """
    v = aggregate(nets.value(batch.observations, xt, t), args.q_agg)
    loss = (batch.valid[:, -1] * (v - target) ** 2).mean()
    return loss, dict(value_loss=loss)


def policy_loss(nets, batch, x0, t, args):
    """Flow matching on the dataset's actions, with the target velocity bent by the guidance."""
    xt = (1 - t) * x0 + t * batch.actions
    target = batch.actions - x0 + guidance(nets.value, batch.observations, xt, t) / args.lam
    error = nets.velocity(batch.observations, xt, t) - target
    loss = (batch.valid[:, -1:] * error**2).mean()
    return loss, dict(policy_loss=loss)


def total_loss(nets, batch, noise, args):
    """The sum of the losses, for one backward pass; each must train its own network only."""
    t = noise.value_t
    xt = (1 - t) * noise.value_x0 + t * batch.actions  # the point at which V is trained
    q_target, v_target = targets(nets, batch, noise.next_x0, xt, t, args)
    td_loss, q_metrics = critic_loss(nets, batch, q_target)
    v_loss, v_metrics = value_loss(nets, batch, xt, t, v_target, args)
    pi_loss, pi_metrics = policy_loss(nets, batch, noise.policy_x0, noise.policy_t, args)
    metrics = {**q_metrics, **v_metrics, **pi_metrics}
    return td_loss + v_loss + pi_loss, {name: x.detach() for name, x in metrics.items()}


# --------------------------------------------------------------------------------------- update


def make_optimizer(nets, args):
    """One Adam for all networks but the target critic."""
    parameters = [p for p in nets.parameters() if p.requires_grad]
    on_cuda = parameters[0].is_cuda
    return torch.optim.Adam(parameters, lr=args.lr, eps=1e-8, fused=True, capturable=on_cuda)


def update(nets, optimizer, batch, noise, args, loss_fn=total_loss):
    """One gradient step on every network; returns the metrics as tensors on the device."""
    loss, metrics = loss_fn(nets, batch, noise, args)
    optimizer.zero_grad()
    loss.backward()
    with torch.no_grad():  # before Adam's step, so towards the old critic, as the authors do
        critics = zip(nets.target_critic.parameters(), nets.critic.parameters())
        for target_param, param in critics:
            target_param.mul_(1 - args.tau).add_(param, alpha=args.tau)
    optimizer.step()
    return metrics


# ----------------------------------------------------------------------------------- evaluation


def load(folder, device="cpu"):
    """Networks and settings of the run in a folder, for `act`. Raises UserError."""
    checkpoint = common.read_checkpoint(folder)
    args = saved_args(folder)
    nets = Networks(*checkpoint["sizes"], args).to(device)
    common.load_weights(nets, checkpoint["nets"])
    return nets, args


@torch.no_grad()
def act(nets, obs, args, generator=None):
    """The policy on NumPy arrays: observations (B, O) -> next h actions (B, h, A) in [-1, 1]."""
    obs_dim, action_dim = nets.sizes
    device = next(nets.parameters()).device
    x0 = torch.randn(len(obs), action_dim, device=device, generator=generator)
    obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
    actions = sample_actions(nets, obs, x0, args)
    return actions.view(len(obs), args.horizon, -1).cpu().numpy()


def reset(env, seed):
    """Start an episode that is reproducible from the seed; return its first observation.

    OGBench also draws from NumPy's global generator. The observation is copied, since the
    environment may reuse its buffer.
    """
    seed %= 2**32  # NumPy takes no more
    np.random.seed(seed)
    obs, _ = env.reset(seed=seed)
    return np.array(obs)


def evaluate(policy, env, num_episodes, seed):
    """Success (NaN if the environment has none), return and length: arrays (num_episodes,).

    policy: observations (1, O) -> the next h actions (1, h, A), as NumPy arrays.
    """
    results = {"success": [], "return": [], "length": []}
    for episode in range(num_episodes):
        obs = reset(env, seed * num_episodes + episode)  # different seeds share no episodes
        chunk = []
        rewards = []
        done = False
        while not done:
            if not chunk:
                chunk = list(policy(obs[None])[0])
            obs, reward, terminated, truncated, info = env.step(chunk.pop(0))  # open loop
            rewards.append(np.asarray(reward).item())  # some environments return an array
            done = terminated or truncated
        results["success"].append(info.get("success", math.nan))
        results["return"].append(sum(rewards))
        results["length"].append(len(rewards))
    return {name: np.array(values, np.float64) for name, values in results.items()}


# ------------------------------------------------------------------------------------- training


def train(args, dataset, env, eval_env, run):
    """Train on `dataset`, then online in `env`; evaluate in `eval_env`. Returns the networks.

    dataset: common.Dataset; the online phase appends to it. env, eval_env: two environments with
    actions in [-1, 1]. run: common.Run.
    """
    common.check_env(env, dataset)
    common.check_env(eval_env, dataset)
    device = dataset.actions.device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else torch would use the first GPU, too
    torch.manual_seed(args.seed + 2**31)  # weights: not from the same random numbers as the noise
    generator = torch.Generator(device).manual_seed(args.seed)
    obs_dim = dataset.obs_dim
    action_dim = args.horizon * dataset.actions.shape[1]
    nets = Networks(obs_dim, action_dim, args).to(device)
    optimizer = make_optimizer(nets, args)
    loss_fn = torch.compile(total_loss, fullgraph=True) if args.compile else total_loss

    step = 0  # updates so far; online, each follows one step in the environment
    last_step = args.offline_steps + args.online_steps
    checkpoint = run.begin(nets)  # loads the weights, too
    if checkpoint:
        step = checkpoint["step"]
        # Only Adam's moments are restored: the learning rate is the current --lr.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": checkpoint["optimizer"]})
        common.restore_generator(generator, checkpoint["generator"], args.seed + step)
        dataset.append_collected(checkpoint["collected"])
    del checkpoint  # it holds a second copy of what was collected
    dataset.reserve(min(args.online_steps, max(0, last_step - step)))  # room for the steps to come

    def sample_and_update():
        batch = dataset.sample(args.batch_size, args.horizon, args.discount, generator)
        noise = sample_noise(batch.actions, generator)
        return update(nets, optimizer, batch, noise, args, loss_fn)

    if args.compile and device.type == "cuda":
        sample_and_update = CUDAGraph(sample_and_update, generator)

    obs = None  # the online phase's last observation; None between episodes
    run.show_progress(step, last_step, "updates")
    while step < last_step:
        step += 1
        if step > args.offline_steps:  # online: first, one step in the environment
            if obs is None:
                obs = reset(env, args.seed + step)
                chunk = []
                episode_return = 0.0
            if not chunk:
                chunk = list(act(nets, obs[None], args, generator)[0])
            action = chunk.pop(0)  # open loop
            next_obs, reward, terminated, truncated, info = env.step(action)
            reward = np.asarray(reward).item()
            done = terminated or truncated
            mask = 1.0 - terminated  # on a time limit, the critic still bootstraps
            dataset.append(obs, action, reward, mask, next_obs, done)
            episode_return += reward
            obs = next_obs
            if done:
                success = float(info.get("success", math.nan))
                row = {"step": step, "return": episode_return, "success": success}
                run.log("episodes.csv", row)
                obs = None
        metrics = sample_and_update()
        run.bar.update()

        ends_phase = step in (args.offline_steps, last_step)
        evaluates = step % args.eval_interval == 0 or ends_phase
        if evaluates or step % args.log_interval == 0:
            numbers = {name: x.item() for name, x in metrics.items()}  # waits for the device
            run.log("train.csv", dict(step=step, **numbers, steps_per_s=run.speed(step)))

        if evaluates:
            seed = args.seed + step
            eval_generator = torch.Generator(device).manual_seed(seed)
            policy = partial(act, nets, args=args, generator=eval_generator)
            random_state = np.random.get_state()  # an online episode in `env` continues from it
            results = evaluate(policy, eval_env, args.eval_episodes, seed)
            np.random.set_state(random_state)
            row = dict(step=step, episodes=args.eval_episodes)
            for name, values in results.items():
                row[name] = values.mean().item()
            run.log("eval.csv", row)
            run.plot(switch=args.offline_steps)
            run.start_clock(step)  # the speed excludes evaluation

        if evaluates or run.save_is_due():
            run.save(
                step=step,
                sizes=nets.sizes,
                nets=nets.state_dict(),
                optimizer=optimizer.state_dict()["state"],
                generator=generator.get_state(),
                collected=dataset.collected(),
            )
    run.finish(switch=args.offline_steps)
    return nets


# --------------------------------------------------------------------------------- command line


def make_env(args, **options):
    """The environment of --env with actions in [-1, 1]; options: as for gymnasium.make."""
    _, _, env_id = common.resolve_task(args.env, args.task)
    env = gymnasium.make(env_id, **options)
    if args.sparse:
        env = gymnasium.wrappers.TransformReward(env, common.sparse_reward)
    return env


def check_args(args):
    """Raise UserError for a value that cannot work."""
    common.check_flags(args, may_be_zero="task seed offline_steps online_steps rho")
    if args.time_dim % 2 == 1:
        raise common.UserError(f"--time-dim {args.time_dim}: must be even")
    if args.rho > 0 and args.q_agg == "min":
        raise common.UserError(f"--rho {args.rho}: needs --q-agg mean")
    if args.sparse and not args.env.startswith(("scene-", "puzzle-")):
        raise common.UserError(f"--sparse: is for scene and puzzle, not for --env {args.env}")
    if args.env.startswith("visual-"):
        raise common.UserError(f"--env {args.env}: pixels are for fql.py only")


def main():
    args = parse_args()
    name, dataset_name, env_id = common.resolve_task(args.env, args.task)
    env = make_env(args)
    eval_env = make_env(args)
    device = choose_device(args.device)
    torch.set_float32_matmul_precision(args.matmul_precision)
    if args.compile:
        common.check_compiler(device)
    dataset, description = common.get_dataset(
        dataset_name, env_id, args.dataset, device, args.sparse
    )
    if args.horizon > len(dataset):
        raise common.UserError(f"--horizon {args.horizon}: longer than the dataset")
    if not any(re.match(names, args.env) for names in SETTINGS):
        print(f"--env {args.env} has no tuned settings: using the defaults")
    with common.start_run(__file__, name, args, description, device) as run:
        train(args, dataset, env, eval_env, run)


# ------------------------------------------- from here on the same in all three scripts: plumbing


class CUDAGraph:
    """A function as one CUDA graph: from the fourth call on, its kernels run without any Python.

    The function takes no arguments, never waits for the device, draws random numbers from
    `generator` only, and returns detached tensors, which the next call overwrites.
    """

    def __init__(self, function, generator):
        self.function = function
        self.calls = 0
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(generator)

    def __call__(self):
        self.calls += 1
        if self.calls <= 3:  # warm-up: compiler and libraries still allocate
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.result = self.function()
            torch.cuda.current_stream().wait_stream(self.stream)
            return self.result
        if self.calls == 4:
            with torch.cuda.graph(self.graph, stream=self.stream):  # records, runs nothing
                self.result = self.function()
        self.graph.replay()
        return self.result


def saved_args(folder):
    """The settings of the run in a folder as Args. Raises UserError."""
    saved = common.read_config(folder)["args"]
    unknown = saved.keys() - vars(Args()).keys()
    if unknown:
        raise common.UserError(f"{folder}: has settings unknown to this script: {unknown}")
    saved["hidden"] = tuple(saved["hidden"])  # JSON has lists only
    return Args(**saved)


def parse_args():
    """The command line as Args. Raises UserError.

    A flag that is not given takes its value from the run to resume, else from SETTINGS for --env,
    else from the defaults in Args; --help shows these values.
    """
    # A first pass reads --env and --resume, which choose the defaults of the second pass.
    words = common.command_line()
    given, _ = tyro.cli(Args, args=words, return_unknown_args=True, add_help=False)
    default = Args(env=given.env)
    for names, settings in SETTINGS.items():
        if re.match(names, given.env):
            default = replace(default, **settings)
    if given.resume and given.start_or_resume:
        raise common.UserError("--resume and --start-or-resume exclude each other")
    if given.resume or common.has_checkpoint(given.start_or_resume):
        saved = saved_args(given.resume or given.start_or_resume)
        default = replace(saved, resume="", start_or_resume="")
    args = tyro.cli(Args, args=words, default=default, description=__doc__)
    check_args(args)
    return args


def choose_device(name):
    """--device as a torch.device; "auto" is CUDA if a test kernel runs on it. Raises UserError."""
    if name == "cpu" or (name == "auto" and torch.cuda.device_count() == 0):
        return torch.device("cpu")
    try:
        device = torch.device("cuda" if name == "auto" else name)
        # float64, in which common.Dataset counts and which Apple's GPUs lack
        torch.ones(1, dtype=torch.float64, device=device).add(1).item()
        return device
    except Exception as error:  # an old driver or an unsupported card; torch raises many types
        reason = str(error).partition("\n")[0]
        if name != "auto":
            raise common.UserError(f"--device {name}: cannot be used: {reason}") from None
        print(f"the GPU cannot be used, so this runs on the CPU: {reason}")
        return torch.device("cpu")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="glfw|gymnasium")  # no display, float64 actions
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's signal: like Ctrl-C
    sys.stdout.reconfigure(line_buffering=True)  # in a file, too, lines appear at once
    try:
        main()
    except common.UserError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
