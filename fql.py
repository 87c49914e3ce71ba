"""FQL: offline RL with a flow that imitates and a one-step policy that improves on it.

A flow policy turns noise x_0 ~ N(0, I) into an action x_1 by following a velocity field v(s, x, t)
from t = 0 to t = 1. Imitating the dataset is a regression problem, called flow matching. The direct
way to improve on the data is to backpropagate Q through every step of the solver, which costs
memory and can be unstable.

FQL avoids this. The flow only imitates. A second network mu(s, z) maps noise to an action in one
step, and this network is the policy. It learns to stay close to the flow's actions and to maximise
Q, and the critic's gradient passes through its single step only. In this file's notation, with x_0
and z noise, x_1 an action of the dataset and x_t = (1 - t) x_0 + t x_1, the three networks learn:

    critic    Q(s, a)       ->  r + discount * mask * Q'(s', a'),  a' from the policy, Q' the target
    velocity  v(s, x_t, t)  ->  x_1 - x_0
    one_step  mu(s, z)      minimises  alpha * mean (mu - flow's action from z)^2 - Q(s, clip(mu))

The arrow means: is trained towards. With chunks of h actions (--horizon; Q-chunking,
https://arxiv.org/abs/2507.07969), r is the discounted sum of the rewards in a chunk and discount
becomes discount^h.

With --online-steps, training continues in the environment: before each update the policy takes one
step, which is added to the dataset.

Park, Li, Levine: Flow Q-Learning, ICML 2025, https://arxiv.org/abs/2502.02538

    python fql.py                                     # pointmaze, on data collected on the spot
    python fql.py --env antmaze-giant-navigate-v0     # with the paper's settings
    python fql.py --env visual-cube-single-play-singletask-task1-v0    # on pixels
    python fql.py --resume RUN --online-steps 200000  # a finished run, now online

QAM (https://arxiv.org/abs/2601.14234) runs its FQL baseline with --num-critics 10 --q-agg mean
--rho 0.5 (humanoidmaze: --rho 0), with --horizon 5 for cube, scene and puzzle, with --sparse for
scene and puzzle, and with these alphas: antmaze 3, humanoidmaze 30, cube-double 300, cube-triple
30, cube-quadruple 100, scene 300, puzzle-3x3 300, puzzle-4x4 1. Q-Flow's second table uses the same
critics, chunks and rewards.

Q-chunking's QC-FQL is --horizon 5 --q-agg mean, with alpha 300 for cube-double, scene and
puzzle-3x3 (the last two with --sparse), and alpha 100 for cube-triple and cube-quadruple.

For offline-to-online runs, FQL's authors use alpha 100 for humanoidmaze-medium and 30 for
antsoccer-arena, in both phases.
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
    """how the critics are aggregated in the targets; the policy's loss takes their mean"""
    num_critics: int = 2
    """size of the ensemble of critics"""
    rho: float = 0.0
    """pessimism: the targets are mean - rho * std of the target critics; needs --q-agg mean"""
    horizon: int = 1
    """h, actions per chunk, executed open loop (1: no chunks)"""
    alpha: float = 10.0
    """strength of the regularisation towards the data: weight of the distillation loss"""
    normalize_q_loss: bool = False
    """divide the Q loss by the mean |Q|; advised on new environments, with alpha from 0.03 to 10"""
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
    device_data: Literal["device", "cpu"] = "device"
    """pixels: frames on the device (12.3 GB a million) or in host memory (computed: 17.2 to 30)"""


# Defaults per environment, from the paper (pointmaze: our own, small enough for a laptop). Keys are
# regular expressions matched at the start of --env; later matches override earlier ones.
SETTINGS = {
    "pointmaze": dict(
        alpha=16.0,
        q_agg="min",
        discount=0.996,
        horizon=2,
        flow_steps=5,
        offline_steps=38_000,
        eval_interval=3_800,
        eval_episodes=25,
        lr=1.5e-3,
        tau=0.07,
        hidden=(128, 128, 128, 128),
    ),
    "antmaze-large-navigate": dict(alpha=10.0, q_agg="min", discount=0.99),
    "antmaze-giant-navigate": dict(alpha=10.0, q_agg="min", discount=0.995),
    "antsoccer-arena-navigate": dict(alpha=10.0, q_agg="mean", discount=0.995),
    "humanoidmaze-medium-navigate": dict(alpha=30.0, q_agg="mean", discount=0.995),
    "humanoidmaze-large-navigate": dict(alpha=30.0, q_agg="mean", discount=0.995),
    "cube-single-play": dict(alpha=300.0, q_agg="mean", discount=0.99),
    "cube-double-play": dict(alpha=300.0, q_agg="mean", discount=0.99),
    "scene-play": dict(alpha=300.0, q_agg="mean", discount=0.99),
    "puzzle-3x3-play": dict(alpha=1000.0, q_agg="mean", discount=0.99),
    "puzzle-4x4-play": dict(alpha=1000.0, q_agg="mean", discount=0.99),
    # Pixels: tuned on task 1, with the defaults --q-agg mean and --discount 0.99.
    "visual-cube-single-play": dict(alpha=300.0, offline_steps=500_000),
    "visual-cube-double-play": dict(alpha=100.0, offline_steps=500_000),
    "visual-scene-play": dict(alpha=100.0, offline_steps=500_000),
    "visual-puzzle-3x3-play": dict(alpha=300.0, offline_steps=500_000),
    "visual-puzzle-4x4-play": dict(alpha=300.0, offline_steps=500_000),
}

# Where the authors use another alpha if a run goes online, in both of its phases.
ONLINE_ALPHA = {"humanoidmaze-medium-navigate": 100.0, "antsoccer-arena-navigate": 30.0}


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


class OneStep(nn.Module):
    """mu(s, z), from noise to action in one step: (B, O), (B, h * A) -> (B, h * A), not clipped."""

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        self.mlp = MLP(obs_dim + action_dim, hidden, action_dim)

    def forward(self, obs, z):
        return self.mlp(torch.cat([obs, z], -1)).squeeze(0)  # an ensemble of one


class Networks(nn.Module):
    """The trainable networks and the target critic; action_dim is that of a whole chunk, h * A.

    obs_dim: O or, on pixels, the shape of an image; then each network begins with an encoder.
    """

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.sizes = (obs_dim, action_dim)
        image_shape = None
        if isinstance(obs_dim, tuple):
            image_shape = obs_dim
            obs_dim = Encoder.feature_dim
        self.critic = Critic(obs_dim, action_dim, args.hidden, args.num_critics)
        self.velocity = Velocity(obs_dim, action_dim, args.hidden)
        self.one_step = OneStep(obs_dim, action_dim, args.hidden)
        if image_shape:
            add_encoders(self, image_shape)
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


def sample_actions(nets, obs, z, args):
    """The policy: noise z ~ N(0, I) to actions in [-1, 1]. (B, O), (B, h * A) -> (B, h * A).

    args is not used here; the signature is that of qflow.py.
    """
    return nets.one_step(obs, z).clamp(-1, 1)


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
# A chunk whose last step is not valid has weight 0 in TD. So chunks must start at every step of an
# episode, not at every h-th: else most ends are never learned.


class Noise(NamedTuple):
    """All random numbers of the losses: x0, z ~ N(0, I), (B, h * A), and t ~ U(0, 1), (B, 1)."""

    next_z: torch.Tensor
    flow_x0: torch.Tensor
    flow_t: torch.Tensor
    policy_z: torch.Tensor


def sample_noise(actions, generator):
    """Noise for a batch with these actions."""
    x0 = torch.randn(3, *actions.shape, device=actions.device, generator=generator)
    t = torch.rand(len(actions), 1, device=actions.device, generator=generator)
    return Noise(next_z=x0[0], flow_x0=x0[1], flow_t=t, policy_z=x0[2])


def aggregate(q, q_agg):
    """One value from the ensemble: (ensemble, B) -> (B,)."""
    return q.mean(0) if q_agg == "mean" else q.amin(0)


@torch.no_grad()
def td_target(nets, batch, z, args):
    """r + discount^h * mask * Q'(s', a'), with a' from the current policy: (B,).

    Q' is the mean of the target critics minus rho times their population standard deviation, or
    their minimum.
    """
    next_actions = sample_actions(nets, batch.next_observations, z, args)
    next_qs = nets.target_critic(batch.next_observations, next_actions)
    next_q = aggregate(next_qs, args.q_agg)
    if args.rho > 0:
        next_q = next_q - args.rho * next_qs.std(0, correction=0)
    return batch.rewards + args.discount**args.horizon * batch.masks * next_q


# Each loss function returns the loss and what to log. Logged names that end in _loss are plotted
# and must stay finite.


def critic_loss(nets, batch, target):
    """TD learning, towards a target (B,)."""
    q = nets.critic(batch.observations, batch.actions)
    loss = (batch.valid[:, -1] * (q - target) ** 2).mean()
    return loss, dict(critic_loss=loss, q_mean=q.mean(), q_min=q.amin(), q_max=q.amax())


def flow_loss(nets, batch, x0, t):
    """Flow matching on the dataset's actions; in a chunk, only the valid actions count."""
    xt = (1 - t) * x0 + t * batch.actions
    error = nets.velocity(batch.observations, xt, t) - (batch.actions - x0)
    error = error.unflatten(1, (batch.valid.shape[1], -1))  # (B, h, A)
    loss = (batch.valid[..., None] * error**2).mean()
    return loss, dict(flow_loss=loss)


def policy_loss(nets, batch, z, args):
    """The one-step policy: distillation of the flow's action from the same noise, and -Q."""
    obs = batch.observations
    actions = nets.one_step(obs, z)
    with torch.no_grad():
        velocity, flow_obs = nets.velocity, obs
        if obs.ndim == 4:  # images: encoded once, not in every step
            velocity, flow_obs = velocity.head, velocity.encoder(obs)
        flow_actions = rollout(velocity, flow_obs, z, torch.zeros_like(z[:, :1]), args.flow_steps)
    distill_loss = ((actions - flow_actions) ** 2).mean()
    # The action's gradient passes through the critic; the critic's own parameters get none.
    frozen = {name: p.detach() for name, p in nets.critic.named_parameters()}
    q = torch.func.functional_call(nets.critic, frozen, (obs, actions.clamp(-1, 1))).mean(0)
    q_loss = -q.mean()
    if args.normalize_q_loss:
        q_loss = q_loss / q.abs().mean().detach()
    loss = args.alpha * distill_loss + q_loss
    return loss, dict(distill_loss=distill_loss, q_loss=q_loss)


def total_loss(nets, batch, noise, args):
    """The sum of the losses, for one backward pass; each must train its own network only."""
    q_target = td_target(nets, batch, noise.next_z, args)
    td_loss, q_metrics = critic_loss(nets, batch, q_target)
    fm_loss, fm_metrics = flow_loss(nets, batch, noise.flow_x0, noise.flow_t)
    pi_loss, pi_metrics = policy_loss(nets, batch, noise.policy_z, args)
    metrics = {**q_metrics, **fm_metrics, **pi_metrics}
    return td_loss + fm_loss + pi_loss, {name: x.detach() for name, x in metrics.items()}


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


# --------------------------------------------------------------------------------------- pixels
#
# Not needed for state observations. An observation of the visual-* tasks is an image (H, W, C),
# uint8: the last three frames, concatenated along the channels. Each network, including the target
# critic, has its own encoder; the critics of an ensemble share one. Half of the batches are
# augmented by small random shifts, the same for s and s'.


class ResidualStack(nn.Module):
    """Convolution, pooling to half the size, one residual block: (B, in, H, W) -> (B, out, ...)."""

    def __init__(self, in_channels, channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.block = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x):
        x = self.conv(x)
        # JAX's "SAME": an even size is padded at its end only, an odd one on both sides.
        padding = (x.shape[2] % 2, x.shape[3] % 2)
        x = F.max_pool2d(x, 3, stride=2, padding=padding, ceil_mode=True)
        return x + self.block(x)


class Encoder(nn.Module):
    """Images (B, H, W, C) from 0 to 255 -> features (B, 512): the authors' small IMPALA network.

    Convolutions run channels-last, as the frames lie in memory, so that nothing is transposed.
    """

    channels = (16, 32, 32)
    feature_dim = 512

    def __init__(self, image_shape):
        super().__init__()
        height, width, in_channels = image_shape
        stacks = []
        for channels in self.channels:
            stacks.append(ResidualStack(in_channels, channels))
            in_channels = channels
            height = math.ceil(height / 2)
            width = math.ceil(width / 2)
        self.stacks = nn.Sequential(*stacks)
        self.dense = nn.Linear(height * width * in_channels, self.feature_dim)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, images):
        x = images.permute(0, 3, 1, 2) / 255
        x = F.relu(self.stacks(x))
        x = self.dense(x.permute(0, 2, 3, 1).flatten(1))  # in the order H, W, C
        return F.gelu(x, approximate="tanh")


class WithEncoder(nn.Module):
    """A network that sees images: an encoder, and a head that sees features in place of states."""

    def __init__(self, image_shape, head):
        super().__init__()
        self.encoder = Encoder(image_shape)
        self.head = head

    def forward(self, images, *inputs):
        return self.head(self.encoder(images), *inputs)


def add_encoders(nets, image_shape):
    """Put an encoder in front of each trainable network."""
    nets.critic = WithEncoder(image_shape, nets.critic)
    nets.velocity = WithEncoder(image_shape, nets.velocity)
    nets.one_step = WithEncoder(image_shape, nets.one_step)


PADDING = 3  # pixels at each edge; the largest shift


def sample_offsets(actions, generator):
    """Offsets (B, 2) for `augment`: in half of the batches, each sample has a shift of its own."""
    offsets = torch.randint(
        2 * PADDING + 1, (len(actions), 2), device=actions.device, generator=generator
    )
    coin = torch.rand(1, device=actions.device, generator=generator)
    return torch.where(coin < 0.5, offsets, PADDING)  # an `if` would wait for the device


def augment(batch, offsets):
    """Images padded by copies of their edges and cropped at offsets; PADDING means no shift.

    offsets (B, 2), down and right, hold for all frames and for the next observations too.
    """
    b, height, width, _ = batch.observations.shape
    device = offsets.device
    y = torch.arange(height, device=device) + offsets[:, :1] - PADDING  # (B, H)
    x = torch.arange(width, device=device) + offsets[:, 1:] - PADDING  # (B, W)
    y = y.clamp(0, height - 1)[:, :, None]
    x = x.clamp(0, width - 1)[:, None, :]
    sample = torch.arange(b, device=device)[:, None, None]
    return batch._replace(
        observations=batch.observations[sample, y, x],
        next_observations=batch.next_observations[sample, y, x],
    )


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
        if dataset.has_frames:  # pixels
            batch = augment(batch, sample_offsets(batch.actions, generator))
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
    env = common.make_env(env_id, **options)
    if env_id.startswith("visual-"):
        env = common.stack_frames(env)
    if args.sparse:
        env = gymnasium.wrappers.TransformReward(env, common.sparse_reward)
    return env


def check_args(args):
    """Raise UserError for a value that cannot work; name the authors' alpha for online runs."""
    common.check_flags(args, may_be_zero="task seed offline_steps online_steps rho")
    if args.rho > 0 and args.q_agg == "min":
        raise common.UserError(f"--rho {args.rho}: needs --q-agg mean")
    if args.sparse and not args.env.startswith(("scene-", "puzzle-")):
        raise common.UserError(f"--sparse: is for scene and puzzle, not for --env {args.env}")
    if args.online_steps > 0 and args.env.startswith("visual-"):
        raise common.UserError(f"--online-steps {args.online_steps}: not on pixels, offline only")
    for name_start, alpha in ONLINE_ALPHA.items():
        if args.online_steps > 0 and args.env.startswith(name_start) and args.alpha != alpha:
            hint = f"the authors use {alpha} if a run goes online, in both phases"
            print(f"--alpha {args.alpha}: {hint}", file=sys.stderr)


def main():
    args = parse_args()
    name, dataset_name, env_id = common.resolve_task(args.env, args.task)
    env = make_env(args)
    eval_env = make_env(args)
    device = choose_device(args.device)
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.backends.cudnn.allow_tf32 = args.matmul_precision != "highest"  # pixels: convolutions
    if args.compile:
        common.check_compiler(device)
    dataset, description = common.get_dataset(
        dataset_name,
        env_id,
        args.dataset,
        device,
        args.sparse,
        frames_on_host=args.device_data == "cpu",
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
