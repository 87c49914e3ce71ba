"""SAC Flow: online RL with a flow policy that SAC trains end to end, through all its steps.

A flow policy turns noise x_0 ~ N(0, I) into x_K with K Euler steps of a velocity field v(s, x, t);
the action is tanh(x_K). This is a recurrent network, x_{i+1} = x_i + v(s, x_i, t_i) / K, and the
actor's gradient is a product of K Jacobians I + dv/dx / K, which can explode or vanish. The paper
proposes two velocity networks from sequence models; a plain one is the baseline:

    flow-g   v = gate * (candidate - x)             the update of a GRU
    flow-t   v = Transformer decoder of (x, t)      with the state as its memory
    naive    v = MLP(s, x, t)
    gaussian a = tanh(mean(s) + std(s) eps)         no flow: the policy of SAC

SAC also needs log pi(a | s). Each step therefore becomes Gaussian, with a drift that preserves the
distribution of every x_i as K grows; the log-density of the whole path replaces log pi:

    x_{i+1} = x_i + (v + sigma^2 / 2 * score) dt + sigma sqrt(dt) eps,  score = (t v - x) / (1 - t)

with dt = 1 / K, eps ~ N(0, I) and sigma(s, t) a network (with an OGBench dataset, a constant). The
drift is exact for the v of flow matching; for a v that SAC trains it is a heuristic.

With an OGBench dataset, training begins offline. Each offline step makes two updates on one batch:
TD and flow matching, then TD and the policy's loss. Each online step after --learning-starts makes
only the second kind. In both phases the policy's loss has a behaviour term, beta * mean
(a - a_data)^2, and, unlike the authors', no entropy term: the noise is fixed, so log pi is nearly
constant, and in the TD target it would reward or punish every step until the task is solved.

From scratch, the equations are the paper's; results/differences.md lists where the authors' scripts
differ from them.

Zhang et al.: SAC Flow, ICLR 2026, https://arxiv.org/abs/2509.25756
Critics without target networks: Bhatt et al., CrossQ, ICLR 2024, https://arxiv.org/abs/1902.05605

    python flow_sac.py                                       # Pendulum, minutes on a laptop
    python flow_sac.py --env HalfCheetah-v5 --policy flow-g  # with the paper's sizes
    python flow_sac.py --env cube-double-play-v0             # first offline, then online
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
import ogbench.online_locomotion  # noqa: F401  registers online-ant-v0 and its variants
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.spaces import Box

import common


@dataclass
class Args:
    env: str = "Pendulum-v1"
    """Gymnasium id with Box spaces (also OGBench's online-ant-v0 etc.), or OGBench dataset"""
    task: int = 0
    """task number, 1 to 5; 0: the task in the name of --env, else OGBench's default task"""
    dataset: str = ""
    """npz file or its URL; default: the official file (pointmaze-*-navigate: collected here)"""
    seed: int = 0
    """seed of weights, batches, noise and episodes"""
    device: str = "auto"
    """auto (CUDA if usable), cpu, cuda or cuda:N"""
    offline_steps: int = 0
    """number of offline steps; each makes two updates on one batch"""
    online_steps: int = 1_000_000
    """number of environment steps after the offline phase"""
    learning_starts: int = 50_000
    """online steps before updates begin; without a dataset, their actions are uniform"""
    batch_size: int = 512
    """transitions (or chunks) per update"""
    policy: Literal["flow-t", "flow-g", "naive", "gaussian"] = "flow-t"
    """velocity network: Transformer, gated or plain MLP; gaussian: no flow, no offline phase"""
    policy_width: int = 0
    """width of the policy's networks; 0: flow-t 96 (with --critic sac 128), the others 512"""
    critic: Literal["crossq", "sac"] = "crossq"
    """crossq: BatchRenorm (policy too), ReLU, no target; sac: LayerNorm, GELU, target (--tau)"""
    policy_lr: float = 3e-4
    """learning rate of the policy's Adam"""
    q_lr: float = 1e-3
    """learning rate of the critics' and the temperature's Adam"""
    policy_frequency: int = 3
    """online, updates of the critics per update of policy and temperature"""
    discount: float = 0.99
    """discount per environment step"""
    tau: float = 0.005
    """Polyak rate of the target critic"""
    hidden: tuple[int, ...] = (1024, 1024)
    """widths of the critics' hidden layers"""
    flow_steps: int = 4
    """K, number of Euler steps from noise to action"""
    q_agg: Literal["mean", "min"] = "min"
    """how the critics' ensemble is aggregated, in the target and in the policy's loss"""
    horizon: int = 1
    """h, actions per chunk, executed open loop (1: no chunks)"""
    bc_weight: float = 0.0
    """beta, weight of the behaviour term mean (a - a_data)^2 in the policy's loss"""
    noise_std: float = 0.0
    """fixed standard deviation of a flow step's noise (no entropy term); 0: sigma is learned"""
    target_entropy: float = 0.0
    """target of the path entropy, for tuning the temperature; gaussian: 0 means SAC's -A (-h A)"""
    eval_interval: int = 20_000
    """steps between evaluations (the last step of a phase is always evaluated)"""
    eval_episodes: int = 50
    """episodes per evaluation"""
    log_interval: int = 500
    """steps between rows of train.csv"""
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


# The defaults in Args are the authors' settings for training from scratch. WITH_DATASET holds their
# settings for OGBench's cube-double, -triple and -quadruple, except noise_std: the authors use 0.05
# in the policy's loss and 0.02 elsewhere. Mazes and soccer need no chunks. The Pendulum settings
# are our own, for a laptop.
WITH_DATASET = dict(
    offline_steps=1_000_000,
    learning_starts=5_000,
    batch_size=256,
    critic="sac",
    q_lr=3e-4,
    policy_frequency=1,
    hidden=(512, 512, 512, 512),
    q_agg="mean",
    horizon=5,
    bc_weight=100.0,
    noise_std=0.05,
    eval_interval=100_000,
)
SETTINGS = {  # keys: regular expressions matched at the start of --env
    "cube|scene|puzzle": WITH_DATASET,
    "antmaze|antsoccer|humanoidmaze|pointmaze": {**WITH_DATASET, "horizon": 1},
    "Pendulum": dict(
        online_steps=15_000,
        learning_starts=1_000,
        batch_size=256,
        hidden=(128, 128),
        policy_width=64,
        eval_interval=1_500,
    ),
}


# ------------------------------------------------------------------------------------- networks
#
# Shapes: B batch, O observation, A action, h chunk length, K flow steps. Networks see a chunk as
# one action: x and actions are (B, h * A).


def lecun_normal_(weight, fan_in):
    """Flax's default: N(0, 1 / fan_in) cut at two standard deviations, in place."""
    std = math.sqrt(1 / fan_in) / 0.87962566  # so that the variance is right after the cut
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class Linear(nn.Linear):
    """(..., in) -> (..., out), initialised as Flax does."""

    def reset_parameters(self):
        lecun_normal_(self.weight, self.in_features)
        nn.init.zeros_(self.bias)


def mlp(activation, *dims):
    """Linear layers of these sizes with activation() between them: (..., in) -> (..., out)."""
    layers = []
    for in_dim, out_dim in zip(dims, dims[1:]):
        layers.append(Linear(in_dim, out_dim))
        layers.append(activation())
    return nn.Sequential(*layers[:-1])  # none after the last


class EnsembleLinear(nn.Module):
    """`ensemble` linear layers side by side: (B, in) or (ensemble, B, in) -> (ensemble, B, out)."""

    def __init__(self, in_dim, out_dim, ensemble):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(ensemble, in_dim, out_dim))
        self.bias = nn.Parameter(torch.zeros(ensemble, 1, out_dim))
        lecun_normal_(self.weight, in_dim)

    def forward(self, x):
        x = x.expand(len(self.weight), -1, -1)
        return torch.bmm(x, self.weight).add_(self.bias)


class BatchRenorm(nn.Module):
    """Batch renormalisation (Ioffe, 2017, https://arxiv.org/abs/1702.03275): (..., B, dim) -> same.

    Evaluation normalises with running statistics. Training normalises with the batch's and, after
    the first `warmup` calls, corrects the result by r and d to what running statistics would give;
    gradients pass through the batch's statistics, not through r and d. shape: (1, dim) or
    (ensemble, 1, dim).
    """

    def __init__(self, *shape, warmup=100_000):
        super().__init__()
        self.warmup = warmup
        self.scale = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        running_std = (self.var + 1e-3).sqrt()
        if not self.training:
            return (x - self.mean) / running_std * self.scale + self.bias
        mean = x.mean(-2, keepdim=True)
        var = (x - mean).square().mean(-2, keepdim=True)  # biased
        std = (var + 1e-3).sqrt()
        with torch.no_grad():
            r = (std / running_std).clamp(1 / 3, 3)
            d = ((mean - self.mean) / running_std).clamp(-5, 5)
            warm = self.calls >= self.warmup
            r = torch.where(warm, r, 1.0)
            d = torch.where(warm, d, 0.0)
            self.mean += 0.01 * (mean - self.mean)
            self.var += 0.01 * (var - self.var)
            self.calls += 1
        return ((x - mean) / std * r + d) * self.scale + self.bias


class EnsembleLayerNorm(nn.Module):
    """LayerNorm with separate scale and bias for each member: (ensemble, B, dim) -> same shape."""

    def __init__(self, dim, ensemble):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(ensemble, 1, dim))
        self.bias = nn.Parameter(torch.zeros(ensemble, 1, dim))

    def forward(self, x):
        normalised = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return torch.addcmul(self.bias, normalised, self.scale)


class Critic(nn.Module):
    """Q(s, a), an ensemble of two: (B, O), (B, h * A) -> (2, B)."""

    def __init__(self, obs_dim, action_dim, hidden, kind):
        super().__init__()
        in_dim = obs_dim + action_dim
        layers = []
        if kind == "crossq":
            layers.append(BatchRenorm(2, 1, in_dim))
        for width in hidden:
            layers.append(EnsembleLinear(in_dim, width, 2))
            if kind == "crossq":
                layers.append(nn.ReLU())
                layers.append(BatchRenorm(2, 1, width))
            else:
                layers.append(nn.GELU(approximate="tanh"))
                layers.append(EnsembleLayerNorm(width, 2))
            in_dim = width
        layers.append(EnsembleLinear(in_dim, 1, 2))
        self.mlp = nn.Sequential(*layers)

    def forward(self, obs, actions):
        return self.mlp(torch.cat([obs, actions], -1)).squeeze(-1)


class Naive(nn.Module):
    """v(s, x_t, t), the plain MLP baseline: (B, O), (B, h * A), (B, 1) -> (B, h * A)."""

    def __init__(self, obs_dim, action_dim, width):
        super().__init__()
        self.mlp = mlp(nn.ReLU, obs_dim + action_dim + 1, width, width, action_dim)

    def forward(self, obs, x, t):
        return self.mlp(torch.cat([obs, x, t], -1))


class FlowG(nn.Module):
    """Flow-G: v = gate * (candidate - x), both from (s, x_t, t).

    (B, O), (B, h * A), (B, 1) -> (B, h * A). A step moves x at most 1 / K of the way to the
    candidate. The gate starts open, at sigmoid(5).
    """

    def __init__(self, obs_dim, action_dim, width, time_dim=32):
        super().__init__()
        frequencies = torch.logspace(0, -4, time_dim // 2, dtype=torch.float64)  # 1 to 1e-4
        self.register_buffer("frequencies", frequencies.float())
        self.time_mlp = mlp(nn.SiLU, time_dim, 2 * time_dim, time_dim)
        self.gate = mlp(nn.SiLU, obs_dim + action_dim + time_dim, width, action_dim)
        self.candidate = mlp(nn.SiLU, obs_dim + action_dim + time_dim, width, action_dim)
        nn.init.zeros_(self.gate[-1].weight)
        nn.init.constant_(self.gate[-1].bias, 5.0)

    def forward(self, obs, x, t):
        angles = t * self.frequencies
        embedded = self.time_mlp(torch.cat([angles.sin(), angles.cos()], -1))
        inputs = torch.cat([obs, x, embedded], -1)
        return self.gate(inputs).sigmoid() * (self.candidate(inputs) - x)


class DecoderLayer(nn.Module):
    """Pre-norm Transformer decoder layer for one token and one memory entry of width D each.

    (B, D), (B, D) -> (B, D). A softmax over a single entry is 1, so queries, keys and heads have no
    effect, and each attention reduces to output(value(.)), of the token or of the state.
    """

    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.Sequential(Linear(width, width), Linear(width, width))
        self.cross_attention = nn.Sequential(Linear(width, width), Linear(width, width))
        gelu = partial(nn.GELU, approximate="tanh")
        self.feed_forward = mlp(gelu, width, 4 * width, width)

    def forward(self, token, memory):
        token = token + self.self_attention(self.norm1(token))
        token = token + self.cross_attention(memory)
        return token + self.feed_forward(self.norm2(token))


class FlowT(nn.Module):
    """Flow-T: a Transformer decoder computes v from the token (x_t, t), with the state as memory.

    (B, O), (B, h * A), (B, 1) -> (B, h * A). The paper's self-attention has a diagonal mask: the
    token of step i sees only itself, not the earlier steps, or v would not be a function of x_i.
    So this network takes one token at a time.
    """

    def __init__(self, obs_dim, action_dim, width, layers=2):
        super().__init__()
        self.embed_obs = mlp(nn.SiLU, obs_dim, width // 2, width)
        self.embed_x = Linear(action_dim, width)
        self.embed_t = mlp(nn.SiLU, 1, width // 4, width // 2, width)
        self.layers = nn.ModuleList(DecoderLayer(width) for _ in range(layers))
        self.head = Linear(width, action_dim)

    def forward(self, obs, x, t):
        memory = self.embed_obs(obs)
        token = self.embed_x(x) + self.embed_t(t)
        for layer in self.layers:
            token = layer(token, memory)
        return self.head(token)


class Gaussian(nn.Module):
    """Mean and log std of a Gaussian, two heads of one MLP: (B, O) -> (B, h * A) twice."""

    def __init__(self, obs_dim, action_dim, width):
        super().__init__()
        self.mlp = mlp(nn.ReLU, obs_dim, width, width, 2 * action_dim)

    def forward(self, obs):
        mean, log_std = self.mlp(obs).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)


class LogSigma(nn.Module):
    """log sigma(s, t), the noise level: (B, O), (B, 1) -> (B, h * A), in (low, high).

    The last step shrinks x by the factor 1 - sigma^2 / 2, so sigma has to stay clearly below 2. It
    must not depend on x, or the drift would not be exact.
    """

    def __init__(self, obs_dim, action_dim, width, low=-5.0, high=0.0):
        super().__init__()
        self.low = low
        self.high = high
        self.mlp = mlp(nn.ReLU, obs_dim + 1, width, width, action_dim)

    def forward(self, obs, t):
        middle = self.mlp(torch.cat([obs, t], -1)).tanh()
        return self.low + 0.5 * (self.high - self.low) * (middle + 1)


class Policy(nn.Module):
    """Observation normalisation, velocity and noise level; a Gaussian has no noise level.

    `sample_with_log_prob` combines them.
    """

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        width = args.policy_width
        if width == 0 and args.policy == "flow-t":
            width = 96 if args.critic == "crossq" else 128  # the authors': from scratch, with data
        elif width == 0:
            width = 512
        self.obs_norm = BatchRenorm(1, obs_dim) if args.critic == "crossq" else nn.Identity()
        if args.policy == "flow-t":
            self.velocity = FlowT(obs_dim, action_dim, width)
        elif args.policy == "flow-g":
            self.velocity = FlowG(obs_dim, action_dim, width)
        elif args.policy == "naive":
            self.velocity = Naive(obs_dim, action_dim, width)
        elif args.policy == "gaussian":
            self.velocity = Gaussian(obs_dim, action_dim, width)
        if args.noise_std > 0:
            # A step's noise has std sigma sqrt(dt), dt = 1 / K.
            fixed = math.log(args.noise_std * math.sqrt(args.flow_steps))
            self.log_sigma = lambda obs, t: torch.full_like(t, fixed)
        elif args.policy != "gaussian":
            self.log_sigma = LogSigma(obs_dim, action_dim, width)


class Networks(nn.Module):
    """The trainable networks and, for `--critic sac`, the target critic.

    They are in evaluation mode; only the losses switch it, where BatchRenorm needs it.
    """

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.sizes = (obs_dim, action_dim)
        self.critic = Critic(obs_dim, action_dim, args.hidden, args.critic)
        self.policy = Policy(obs_dim, action_dim, args)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(0.2)))  # of the entropy, if any
        if args.critic == "sac":
            self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.eval()


# -------------------------------------------------------------------------------------- rollout


def rollout(velocity, log_sigma, obs, x, eps):
    """K noisy Euler steps from x at time 0 to time 1; the drift preserves each x_i's distribution.

    This is exact as K grows if v is the velocity of a rectified flow from N(0, I), whose score is
    (t v - x) / (1 - t).
    (B, O), (B, h * A), eps ~ N(0, I) (K, B, h * A) -> x_K and the path's log-density, (B,).
    """
    dt = 1 / len(eps)
    log_prob = -0.5 * (x**2 + math.log(2 * math.pi)).sum(-1)
    for i, eps_i in enumerate(eps):
        t = torch.full_like(x[:, :1], i * dt)
        v = velocity(obs, x, t)
        log_sigma_i = log_sigma(obs, t)
        sigma = log_sigma_i.exp()
        score = (t * v - x) / (1 - t)
        drift = v + 0.5 * sigma**2 * score
        x = x + drift * dt + sigma * math.sqrt(dt) * eps_i
        log_density = -log_sigma_i - 0.5 * (eps_i**2 + math.log(2 * math.pi * dt))  # of x_{i+1}
        log_prob = log_prob + log_density.sum(-1)
    return x, log_prob


def sample_with_log_prob(policy, obs, x0, eps):
    """The stochastic policy: actions (B, h * A) in [-1, 1] and the log-density of their path (B,).

    With a learned sigma, the path's entropy is at most 1.42 + K (1.42 - log(K) / 2) per action
    dimension. The temperature grows without bound if --target-entropy exceeds this, as the default
    0 does from K = 20 on. A Gaussian is a path of one step and ignores x_0.
    """
    obs = policy.obs_norm(obs)
    if isinstance(policy.velocity, Gaussian):
        mean, log_std = policy.velocity(obs)
        u = mean + log_std.exp() * eps[0]
        log_prob = -(log_std + 0.5 * (eps[0] ** 2 + math.log(2 * math.pi))).sum(-1)
    else:
        u, log_prob = rollout(policy.velocity, policy.log_sigma, obs, x0, eps)
    # log(1 - tanh(u)^2), written so that neither it nor its gradient is lost for large u
    log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return u.tanh(), log_prob - log_det.sum(-1)


def sample_actions(nets, obs, x0, args):
    """The policy in evaluation, eps = 0: x_0 ~ N(0, I) to actions in [-1, 1]. -> (B, h * A).

    The drift stays: where sigma is large, the flow of v alone is another policy.
    """
    eps = x0.new_zeros(args.flow_steps, *x0.shape)
    return sample_with_log_prob(nets.policy, obs, x0, eps)[0]


# --------------------------------------------------------------------------------------- losses
#
# A batch:
#
#     observations       (B, O)
#     actions            (B, h * A)  in [-1, 1], step after step; real ones after an episode, too
#     rewards            (B,)    discounted sum over the valid steps of a chunk
#     masks              (B,)    0 if solved or terminated at a valid step, else 1 (time limit, too)
#     next_observations  (B, O)  after the last valid step
#     valid              (B, h)  0 for steps after the end of the episode, else 1
#
# A chunk whose last step is not valid has weight 0 in TD. So chunks must start at every step of an
# episode, not at every h-th: else most ends are never learned.


class Noise(NamedTuple):
    """All random numbers of an update for one batch; eps is the noise of the K steps of a path.

    x0 ~ N(0, I), (B, h * A); eps ~ N(0, I), (K, B, h * A); t ~ U(0, 1), (B, 1).
    """

    next_x0: torch.Tensor
    next_eps: torch.Tensor
    policy_x0: torch.Tensor
    policy_eps: torch.Tensor
    flow_t: torch.Tensor


def sample_noise(actions, flow_steps, generator):
    """Noise for a batch with these actions."""
    shape = (2, flow_steps + 1, *actions.shape)
    next_noise, noise = torch.randn(shape, device=actions.device, generator=generator)
    return Noise(
        next_x0=next_noise[0],
        next_eps=next_noise[1:],
        policy_x0=noise[0],
        policy_eps=noise[1:],
        flow_t=torch.rand(len(actions), 1, device=actions.device, generator=generator),
    )


def aggregate(q, q_agg):
    """One value from the ensemble: (ensemble, B) -> (B,)."""
    return q.mean(0) if q_agg == "mean" else q.amin(0)


def critic_loss(nets, batch, x0, eps, args):
    """TD: Q(s, a) -> r + discount^h * mask * (agg Q(s', a') - temperature * log pi(a')).

    With crossq the gradient also passes through the statistics to which (s', a') contributes.
    """
    obs = batch.observations
    next_obs = batch.next_observations
    with torch.no_grad():
        next_actions, next_log_prob = sample_with_log_prob(nets.policy, next_obs, x0, eps)
    if args.critic == "crossq":  # one batch, so that both are normalised by the same statistics
        both_obs = torch.cat([obs, next_obs])
        both_actions = torch.cat([batch.actions, next_actions])
        nets.critic.train()
        q, next_q = nets.critic(both_obs, both_actions).chunk(2, 1)
        nets.critic.eval()
    else:
        q = nets.critic(obs, batch.actions)
        next_q = nets.target_critic(next_obs, next_actions)
    next_v = aggregate(next_q, args.q_agg)
    if args.noise_std == 0:  # else there is no entropy
        next_v = next_v - nets.log_temperature.exp() * next_log_prob
    q_target = batch.rewards + args.discount**args.horizon * batch.masks * next_v
    loss = (batch.valid[:, -1] * (q - q_target.detach()) ** 2).mean()
    return loss, dict(critic_loss=loss, q_mean=q.mean(), q_min=q.amin(), q_max=q.amax())


def flow_loss(nets, batch, x0, t):
    """Flow matching on the dataset's actions; in a chunk, only the valid actions count.

    As in the authors' scripts, x_1 is the action itself, although the policy acts tanh(x_K); the
    behaviour term of `policy_loss` compares the actions after tanh.
    """
    xt = (1 - t) * x0 + t * batch.actions
    obs = nets.policy.obs_norm(batch.observations)
    error = nets.policy.velocity(obs, xt, t) - (batch.actions - x0)
    error = error.unflatten(1, (batch.valid.shape[1], -1))  # (B, h, A)
    loss = (batch.valid[..., None] * error**2).mean()
    return loss, dict(flow_loss=loss)


def policy_loss(nets, batch, x0, eps, args):
    """temperature * log pi - Q + beta * mean (a - a_data)^2, differentiated through all K steps.

    With crossq, this loss updates the running statistics of the observations; critic_loss updates
    the critic's.
    """
    obs = batch.observations
    nets.policy.train()
    actions, log_prob = sample_with_log_prob(nets.policy, obs, x0, eps)
    nets.policy.eval()
    # The action's gradient passes through the critic; the critic's own parameters get none.
    frozen = {name: p.detach() for name, p in nets.critic.named_parameters()}
    q = torch.func.functional_call(nets.critic, frozen, (obs, actions))
    loss = -aggregate(q, args.q_agg).mean()
    metrics = {}
    if args.noise_std == 0:
        loss = loss + (nets.log_temperature.exp().detach() * log_prob).mean()
        metrics["entropy"] = -log_prob.mean()
    if args.bc_weight > 0:
        # Of all actions, as the authors do: also of those after the episode's end.
        bc_loss = ((actions - batch.actions) ** 2).mean()
        loss = loss + args.bc_weight * bc_loss
        metrics["bc_loss"] = bc_loss
    return loss, dict(policy_loss=loss, **metrics)


# --------------------------------------------------------------------------------------- update


class Optimizers(NamedTuple):
    """One Adam per group of parameters."""

    critic: torch.optim.Adam
    policy: torch.optim.Adam
    temperature: torch.optim.Adam


def make_optimizers(nets, args):
    """With crossq, all three have its short memory, beta_1 = 0.5."""
    betas = (0.5 if args.critic == "crossq" else 0.9, 0.999)
    on_cuda = nets.log_temperature.is_cuda

    def adam(parameters, lr):
        return torch.optim.Adam(parameters, lr, betas, fused=True, capturable=on_cuda)

    return Optimizers(
        critic=adam(nets.critic.parameters(), args.q_lr),
        policy=adam(nets.policy.parameters(), args.policy_lr),
        temperature=adam([nets.log_temperature], args.q_lr),
    )


def update_critic(nets, optimizers, batch, noise, args, loss_fn=critic_loss):
    """One gradient step on the critics; returns the metrics as tensors on the device."""
    loss, metrics = loss_fn(nets, batch, noise.next_x0, noise.next_eps, args)
    optimizers.critic.zero_grad()
    loss.backward()
    if args.critic == "sac":
        with torch.no_grad():  # before Adam's step, so towards the old critic, as the authors do
            critics = zip(nets.target_critic.parameters(), nets.critic.parameters())
            for target_param, param in critics:
                target_param.mul_(1 - args.tau).add_(param, alpha=args.tau)
    optimizers.critic.step()
    return {name: x.detach() for name, x in metrics.items()}


def update_velocity(nets, optimizers, batch, noise, loss_fn=flow_loss):
    """One gradient step of flow matching; returns the metrics as tensors on the device."""
    loss, metrics = loss_fn(nets, batch, noise.policy_x0, noise.flow_t)
    optimizers.policy.zero_grad()
    loss.backward()
    optimizers.policy.step()
    return {name: x.detach() for name, x in metrics.items()}


def update_policy(nets, optimizers, batch, noise, args, loss_fn=policy_loss):
    """One gradient step on policy and temperature; returns the metrics as tensors on the device."""
    loss, metrics = loss_fn(nets, batch, noise.policy_x0, noise.policy_eps, args)
    optimizers.policy.zero_grad()
    loss.backward()
    optimizers.policy.step()

    # The gradient that may explode or vanish. Sigma's gradient is left out: it contains the
    # entropy's gradient, which grows with K for any velocity.
    gradients = [parameter.grad for parameter in nets.policy.velocity.parameters()]
    metrics["velocity_grad_norm"] = nn.utils.get_total_norm(gradients)

    if args.noise_std == 0:
        target = args.target_entropy
        if args.policy == "gaussian" and target == 0:
            target = -nets.sizes[1]  # minus the dimension of a chunk, h * A: SAC's convention
        temperature = nets.log_temperature.exp()
        metrics["temperature"] = temperature
        temperature_loss = temperature * (metrics["entropy"].detach() - target)
        optimizers.temperature.zero_grad()
        temperature_loss.backward()
        optimizers.temperature.step()
    return {name: x.detach() for name, x in metrics.items()}


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


@torch.no_grad()
def act_with_noise(nets, obs, args, generator):
    """`act` with the noise of the stochastic policy, for collecting."""
    obs_dim, action_dim = nets.sizes
    device = next(nets.parameters()).device
    shape = (args.flow_steps + 1, len(obs), action_dim)
    noise = torch.randn(shape, device=device, generator=generator)
    obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
    actions, _ = sample_with_log_prob(nets.policy, obs, noise[0], noise[1:])
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

    dataset: common.Dataset, which may be empty; the online phase appends to it. env, eval_env: two
    environments with actions in [-1, 1]. run: common.Run.
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
    optimizers = make_optimizers(nets, args)
    losses = (critic_loss, flow_loss, policy_loss)
    if args.compile:
        losses = tuple(torch.compile(loss, fullgraph=True) for loss in losses)

    step = 0  # offline, batches, with two updates each; online, steps in the environment
    starts_uniform = len(dataset) == 0
    metrics = {}  # of the last updates in this phase
    last_step = args.offline_steps + args.online_steps
    checkpoint = run.begin(nets)  # loads the weights, too
    if checkpoint:
        step = checkpoint["step"]
        metrics = checkpoint["metrics"]
        # Only Adam's moments are restored: the learning rates are the current ones.
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        common.restore_generator(generator, checkpoint["generator"], args.seed + step)
        dataset.append_collected(checkpoint["collected"])
    del checkpoint  # it holds a second copy of what was collected
    dataset.reserve(min(args.online_steps, max(0, last_step - step)))  # room for the steps to come

    def sample_and_update(kind):
        """kind: "offline"; online, "both" every --policy-frequency updates, else "critic"."""
        critic_fn, flow_fn, policy_fn = losses
        batch = dataset.sample(args.batch_size, args.horizon, args.discount, generator)
        noise = sample_noise(batch.actions, args.flow_steps, generator)
        logged = update_critic(nets, optimizers, batch, noise, args, critic_fn)
        if kind == "offline":  # two updates on each batch, the first one with flow matching
            logged |= update_velocity(nets, optimizers, batch, noise, flow_fn)
            noise = sample_noise(batch.actions, args.flow_steps, generator)
            logged |= update_critic(nets, optimizers, batch, noise, args, critic_fn)
        if kind != "critic":
            logged |= update_policy(nets, optimizers, batch, noise, args, policy_fn)
        return logged

    updates = {kind: partial(sample_and_update, kind) for kind in ("offline", "critic", "both")}
    if args.compile and device.type == "cuda":
        updates = {kind: CUDAGraph(update, generator) for kind, update in updates.items()}

    obs = None  # the online phase's last observation; None between episodes
    run.show_progress(step, last_step, "steps")
    while step < last_step:
        step += 1
        if step > args.offline_steps:  # online: first, one step in the environment
            if obs is None:
                obs = reset(env, args.seed + step)
                chunk = []
                episode_return = 0.0
            if not chunk:
                if starts_uniform and step <= args.learning_starts:
                    uniform = torch.rand(action_dim, device=device, generator=generator)
                    chunk = list((2 * uniform - 1).view(args.horizon, -1).cpu().numpy())
                else:
                    chunk = list(act_with_noise(nets, obs[None], args, generator)[0])
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

        update_number = step - args.offline_steps - args.learning_starts
        if step <= args.offline_steps:
            metrics = updates["offline"]()
        elif update_number <= 0:
            metrics = {}
            run.start_clock(step)  # the speed is that of learning
        elif (update_number - 1) % args.policy_frequency == 0:
            metrics = updates["both"]()
        else:
            metrics = {**metrics, **updates["critic"]()}  # the policy's are from its last one
        run.bar.update()

        ends_phase = step in (args.offline_steps, last_step)
        evaluates = step % args.eval_interval == 0 or ends_phase
        if metrics and (evaluates or step % args.log_interval == 0):
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
            run.plot("steps", switch=args.offline_steps)
            run.start_clock(step)  # the speed excludes evaluation

        if evaluates or run.save_is_due():
            run.save(
                step=step,
                sizes=nets.sizes,
                nets=nets.state_dict(),
                optimizers=[optimizer.state_dict()["state"] for optimizer in optimizers],
                metrics=metrics,
                generator=generator.get_state(),
                collected=dataset.collected(),
            )
    run.finish(switch=args.offline_steps)
    return nets


# --------------------------------------------------------------------------------- command line


def make_env(args, **options):
    """The environment of --env with actions in [-1, 1]; options: as for gymnasium.make."""
    env_id = args.env
    if common.is_dataset(args.env):
        _, _, env_id = common.resolve_task(args.env, args.task)
    try:
        env = gymnasium.make(env_id, **options)
    except (gymnasium.error.Error, ImportError) as error:
        raise common.UserError(f"--env {env_id}: {error}") from None
    space = env.observation_space
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise common.UserError(f"--env {env_id}: requires vectors as observations, has {space}")
    space = env.action_space
    if not isinstance(space, Box) or not space.is_bounded() or (space.low == space.high).any():
        raise common.UserError(f"--env {env_id}: requires bounded actions, has {space}")
    return gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)


def check_args(args):
    """Raise UserError for a value that cannot work."""
    may_be_zero = (
        "task seed offline_steps online_steps learning_starts policy_width bc_weight noise_std"
    )
    common.check_flags(args, may_be_zero=may_be_zero, any_sign="target_entropy")
    if args.online_steps > 0 and args.learning_starts >= args.online_steps:
        raise common.UserError(
            f"--learning-starts {args.learning_starts}: must be below --online-steps"
        )
    if not common.is_dataset(args.env) and args.learning_starts < args.horizon - 1:
        raise common.UserError(
            f"--learning-starts {args.learning_starts}: must be at least --horizon - 1"
        )
    if 0 < args.policy_width < 4:
        raise common.UserError(f"--policy-width {args.policy_width}: must be 0 or at least 4")
    if args.policy == "gaussian" and (args.noise_std > 0 or args.offline_steps > 0):
        raise common.UserError("--policy gaussian: needs --noise-std 0 and --offline-steps 0")
    if args.env.startswith("visual-"):
        raise common.UserError(f"--env {args.env}: pixels are for fql.py only")
    for names, settings in SETTINGS.items():
        if re.match(names, args.env) and "offline_steps" in settings:  # those for a dataset
            common.resolve_task(args.env, args.task)  # raises for an id that has none


def get_dataset(args, env, device):
    """The dataset of --env, or an empty one for a Gymnasium id; and a line on it."""
    if common.is_dataset(args.env):
        _, dataset_name, env_id = common.resolve_task(args.env, args.task)
        return common.get_dataset(dataset_name, env_id, args.dataset, device)
    for flag in ("task", "dataset", "offline_steps"):
        value = getattr(args, flag)
        if value:
            flag = flag.replace("_", "-")
            hint = f"--env {args.env} is not an OGBench dataset"
            raise common.UserError(f"--{flag} {value}: {hint}")
    obs_dim = env.observation_space.shape[0]
    action_dim = env.action_space.shape[0]
    return common.Dataset.empty(obs_dim, action_dim, device), "no dataset"


def main():
    args = parse_args()
    name = args.env
    if common.is_dataset(args.env):
        name, _, _ = common.resolve_task(args.env, args.task)
    env = make_env(args)
    eval_env = make_env(args)
    device = choose_device(args.device)
    torch.set_float32_matmul_precision(args.matmul_precision)
    if args.compile:
        common.check_compiler(device)
    dataset, description = get_dataset(args, env, device)
    if 0 < len(dataset) < args.horizon:
        raise common.UserError(f"--horizon {args.horizon}: longer than the dataset")
    tuned = "cube-(double|triple|quadruple)-play"
    if common.is_dataset(args.env) and not re.match(tuned, args.env):
        chunks = "" if args.horizon > 1 else ", but without chunks"
        print(f"--env {args.env} has no tuned settings: using cube-double's{chunks}")
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
