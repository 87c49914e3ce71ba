"""SAC Flow: online RL with a flow policy that SAC trains end to end, through all its steps.

A flow policy turns noise x_0 ~ N(0, I) into x_K by K Euler steps of a velocity v(s, x, t); the
action is tanh(x_K). To SAC that is a recurrent network, x_{i+1} = x_i + v(s, x_i, t_i) / K, and the
actor's gradient is a product of K Jacobians I + dv/dx / K that grows or dies. Two velocity
networks, known from recurrent networks, keep it in bounds; a plain one is there to compare:

    flow-g   v = gate * (candidate - x)             a GRU's update
    flow-t   v = Transformer decoder of (x, t)      with the state as its memory
    naive    v = MLP(s, x, t)

SAC also needs log pi(a | s). So each step becomes Gaussian, with a drift that, as K grows, leaves
the distribution of every x_i as it was, and the whole path's log-density stands in for log pi:

    x_{i+1} = x_i + (v + sigma^2 / 2 * score) dt + sigma sqrt(dt) eps,  score = (t v - x) / (1 - t)

Zhang et al.: SAC Flow, ICLR 2026, https://arxiv.org/abs/2509.25756
Critics without target networks: Bhatt et al., CrossQ, ICLR 2024, https://arxiv.org/abs/1902.05605

    python flow_sac.py                                       # Pendulum, a few minutes on a laptop
    python flow_sac.py --env HalfCheetah-v5 --policy flow-g  # with the paper's sizes
"""

import copy
import math
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import RescaleAction

import common


@dataclass
class Args:
    env: str = "Pendulum-v1"
    """Gymnasium id with Box observations and actions, or OGBench's online-ant-v0 and relatives"""
    seed: int = 0
    """seeds networks, environments, batches, noise and evaluation"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N"""
    online_steps: int = 1_000_000
    """environment steps; one update of the critics each, once learning has started"""
    num_envs: int = 1
    """environments that collect side by side"""
    learning_starts: int = 50_000
    """environment steps with uniform actions before the first update"""
    buffer_size: int = 1_000_000
    """transitions that are kept"""
    batch_size: int = 512
    """transitions per update"""
    policy: Literal["flow-t", "flow-g", "naive"] = "flow-t"
    """velocity network: decoded, gated or plain"""
    policy_width: int = 0
    """of the velocity and noise networks; 0: the authors', flow-t 96, flow-g and naive 512"""
    critic: Literal["crossq", "sac"] = "crossq"
    """critics with BatchRenorm and a joint forward pass, or with target networks (--tau)"""
    policy_lr: float = 3e-4
    """learning rate of the policy's Adam"""
    q_lr: float = 1e-3
    """learning rate of the critics' and the temperature's Adam"""
    policy_frequency: int = 3
    """updates of the critics per update of policy and temperature"""
    discount: float = 0.99
    """discount per environment step"""
    tau: float = 0.005
    """Polyak rate of the target critic"""
    hidden: tuple[int, ...] = (1024, 1024)
    """widths of the critics' hidden layers"""
    flow_steps: int = 4
    """K, Euler steps from noise to action"""
    init_temperature: float = 0.2
    """weight of the entropy at the start; it is tuned from there"""
    target_entropy: float = 0.0
    """path entropy that the temperature is tuned to; 0 is for K = 4, from K = 20 on out of reach"""
    eval_interval: int = 20_000
    """environment steps between evaluations (there is always one at the end)"""
    eval_episodes: int = 50
    """episodes per evaluation"""
    log_interval: int = 500
    """environment steps between rows of train.csv"""
    run_dir: Path = Path("runs")
    """the run's folder is made in here"""
    resume: Path | None = None
    """folder of a run to go on with; steps and intervals may be changed"""
    evaluate: Path | None = None
    """folder of a run to evaluate, on --eval-episodes, instead of training"""
    video: bool = False
    """with --evaluate: film three of the episodes, into that folder"""
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """of torch; auto: TF32 (high) on CUDA, on CPUs the fastest that is as exact as float32"""


# Defaults per environment: the authors' for all, except for one that is meant for a laptop.
SETTINGS = {
    "Pendulum": dict(
        **dict(online_steps=15_000, learning_starts=1_000, batch_size=256, hidden=(128, 128)),
        **dict(policy_width=64, eval_interval=1_500),
    ),
}


# ------------------------------------------------------------------------------------- networks


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
    """Linear layers of these sizes with the activation between them: (..., in) -> (..., out)."""
    layers = [Linear(*pair) for pair in zip(dims, dims[1:])]
    return nn.Sequential(*(x for layer in layers for x in (layer, activation())))[:-1]


class EnsembleLinear(nn.Module):
    """`ensemble` linear layers side by side: (B, in) or (ensemble, B, in) -> (ensemble, B, out)."""

    def __init__(self, in_dim, out_dim, ensemble):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(ensemble, in_dim, out_dim))
        self.bias = nn.Parameter(torch.zeros(ensemble, 1, out_dim))
        lecun_normal_(self.weight, in_dim)

    def forward(self, x):
        return torch.bmm(x.expand(len(self.weight), -1, -1), self.weight).add_(self.bias)


class BatchRenorm(nn.Module):
    """Batch renormalisation (Ioffe, 2017, https://arxiv.org/abs/1702.03275): (..., B, dim) -> same.

    Evaluation normalises by running statistics. Training normalises by the batch's and, after the
    first `warmup` calls, moves the result to what running statistics would give: gradients pass
    through the batch's statistics, not through r and d. shape: (1, dim) or (ensemble, 1, dim).
    """

    def __init__(self, *shape, rate=0.01, eps=1e-3, r_max=3.0, d_max=5.0, warmup=100_000):
        super().__init__()
        self.rate, self.eps, self.r_max, self.d_max, self.warmup = rate, eps, r_max, d_max, warmup
        self.scale = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.ones(shape))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        mean, std, r, d = self.mean, (self.var + self.eps).sqrt(), 1.0, 0.0
        if self.training:
            running_std = std
            mean = x.mean(-2, keepdim=True)
            var = (x - mean).square().mean(-2, keepdim=True)  # many times faster than x.var() here
            std = (var + self.eps).sqrt()
            warm = self.calls >= self.warmup
            r = (std / running_std).detach().clamp(1 / self.r_max, self.r_max)
            d = ((mean - self.mean) / running_std).detach().clamp(-self.d_max, self.d_max)
            r, d = torch.where(warm, r, 1.0), torch.where(warm, d, 0.0)
            with torch.no_grad():
                self.mean += self.rate * (mean - self.mean)
                self.var += self.rate * (var - self.var)
                self.calls += 1
        factor = self.scale * r / std
        return torch.addcmul(self.bias + self.scale * d - factor * mean, x, factor)


class Critic(nn.Module):
    """Q(s, a), two of them: (B, O), (B, A) -> (2, B)."""

    def __init__(self, obs_dim, action_dim, hidden, batch_norm):
        super().__init__()
        norm = lambda dim: [BatchRenorm(2, 1, dim)] if batch_norm else []
        in_dim = obs_dim + action_dim
        layers = norm(in_dim)
        for width in hidden:
            layers += [EnsembleLinear(in_dim, width, 2), nn.ReLU(), *norm(width)]
            in_dim = width
        self.mlp = nn.Sequential(*layers, EnsembleLinear(in_dim, 1, 2))

    def forward(self, obs, actions):
        return self.mlp(torch.cat([obs, actions], -1)).squeeze(-1)


class NaiveVelocity(nn.Module):
    """v(s, x_t, t), nothing done for its gradient: (B, O), (B, A), (B, 1) -> (B, A)."""

    def __init__(self, obs_dim, action_dim, width):
        super().__init__()
        self.mlp = mlp(nn.ReLU, obs_dim + action_dim + 1, width, width, action_dim)

    def forward(self, obs, x, t):
        return self.mlp(torch.cat([obs, x, t], -1))


class GatedVelocity(nn.Module):
    """Flow-G: v = gate * (candidate - x), both from (s, x_t, t): (B, O), (B, A), (B, 1) -> (B, A).

    A step moves x by at most the way to the candidate. The gate starts open, at sigmoid(5).
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
    """Pre-norm Transformer decoder layer, one token and one memory entry: (B, D) twice -> (B, D).

    A softmax over a single entry is 1. So queries, keys and heads have no effect, and of either
    attention remains output(value(.)): of the token itself, and of the state.
    """

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attention = nn.Sequential(Linear(width, width), Linear(width, width))
        self.cross_attention = nn.Sequential(Linear(width, width), Linear(width, width))
        self.feed_forward = mlp(lambda: nn.GELU("tanh"), width, 4 * width, width)

    def forward(self, token, memory):
        token = token + self.self_attention(self.norm1(token))
        token = token + self.cross_attention(memory)
        return token + self.feed_forward(self.norm2(token))


class DecodedVelocity(nn.Module):
    """Flow-T: a Transformer decoder makes v of the token (x_t, t), with the state as its memory.

    (B, O), (B, A), (B, 1) -> (B, A). The paper's self-attention has a diagonal mask: the token of
    step i sees itself and not the steps before it, or v would not be a function of x_i. That is
    one token at a time.
    """

    def __init__(self, obs_dim, action_dim, width, layers=2):
        super().__init__()
        half, quarter = max(width // 2, 1), max(width // 4, 1)
        self.embed_obs = mlp(nn.SiLU, obs_dim, half, width)
        self.embed_x = Linear(action_dim, width)
        self.embed_t = mlp(nn.SiLU, 1, quarter, half, width)
        self.layers = nn.ModuleList(DecoderLayer(width) for _ in range(layers))
        self.head = Linear(width, action_dim)

    def forward(self, obs, x, t):
        memory, token = self.embed_obs(obs), self.embed_x(x) + self.embed_t(t)
        for layer in self.layers:
            token = layer(token, memory)
        return self.head(token)


class LogSigma(nn.Module):
    """log sigma(s, t), the noise level: (B, O), (B, 1) -> (B, A), in (low, high).

    The last step shrinks x by the factor 1 - sigma^2 / 2, so sigma has to stay clearly below 2. It
    must not depend on x, or the drift would not be exact.
    """

    def __init__(self, obs_dim, action_dim, width, low=-5.0, high=0.0):
        super().__init__()
        self.low, self.high = low, high
        self.mlp = mlp(nn.ReLU, obs_dim + 1, width, width, action_dim)

    def forward(self, obs, t):
        middle = self.mlp(torch.cat([obs, t], -1)).tanh()
        return self.low + 0.5 * (self.high - self.low) * (middle + 1)


class Policy(nn.Module):
    """Normalised observations, velocity and noise level."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        kinds = {"flow-t": (DecodedVelocity, 96), "flow-g": (GatedVelocity, 512)}
        kind, width = kinds.get(args.policy, (NaiveVelocity, 512))
        width = args.policy_width or width
        self.obs_norm = BatchRenorm(1, obs_dim) if args.critic == "crossq" else nn.Identity()
        self.velocity = kind(obs_dim, action_dim, width)
        self.log_sigma = LogSigma(obs_dim, action_dim, width)


class Networks(nn.Module):
    """All that is trained, and the target critic of `--critic sac`; in evaluation mode."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.sizes = obs_dim, action_dim
        self.critic = Critic(obs_dim, action_dim, args.hidden, args.critic == "crossq")
        self.policy = Policy(obs_dim, action_dim, args)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(args.init_temperature)))
        if args.critic == "sac":
            self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.eval()


# -------------------------------------------------------------------------------------- rollout


def rollout(velocity, log_sigma, obs, x, eps):
    """K noisy Euler steps from x at time 0 to time 1, in which x_i is distributed as without noise.

    Exact as K grows, for the v of a rectified flow from N(0, I): (t v - x) / (1 - t) is its score.
    (B, O), (B, A), eps ~ N(0, I) (K, B, A) -> [x_0, ..., x_K], log-density of that path (B,).
    """
    dt = 1 / len(eps)
    path, log_prob = [x], -0.5 * (x.detach() ** 2 + math.log(2 * math.pi)).sum(-1)  # noise: fixed
    for i, noise in enumerate(eps):
        t = torch.full_like(x[:, :1], i * dt)
        v, log_std = velocity(obs, x, t), log_sigma(obs, t)
        score = (t * v - x) / (1 - t)
        drift = v + 0.5 * (2 * log_std).exp() * score
        x = x + drift * dt + log_std.exp() * math.sqrt(dt) * noise
        path.append(x)
        step = log_std + 0.5 * (noise**2 + math.log(2 * math.pi * dt))  # -log N(x_{i+1}; ...)
        log_prob = log_prob - step.sum(-1)
    return path, log_prob


def explore(policy, obs, x0, eps):
    """The policy that acts and learns: actions (B, A), log-density of their path (B,), the path."""
    path, log_prob = rollout(policy.velocity, policy.log_sigma, policy.obs_norm(obs), x0, eps)
    u = path[-1]
    # log(1 - tanh(u)^2), written so that neither it nor its gradient is lost for large u
    log_prob = log_prob - (2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)
    return u.tanh(), log_prob, path


def sample_actions(nets, obs, x0, args):
    """The policy in evaluation, eps = 0: x_0 ~ N(0, I) to actions in [-1, 1]. -> (B, A)."""
    return explore(nets.policy, obs, x0, x0.new_zeros(args.flow_steps, *x0.shape))[0]


# --------------------------------------------------------------------------------------- losses


class Batch(NamedTuple):
    """Transitions, float32; masks are 0 where the environment terminated (not: time was up)."""

    observations: torch.Tensor  # (B, O)
    actions: torch.Tensor  # (B, A) in [-1, 1]
    rewards: torch.Tensor  # (B,)
    masks: torch.Tensor  # (B,)
    next_observations: torch.Tensor  # (B, O)


class Draws(NamedTuple):
    """All randomness of an update: x0 ~ N(0, I) of shape (B, A), eps ~ N(0, I) of (K, B, A)."""

    next_x0: torch.Tensor
    next_eps: torch.Tensor
    policy_x0: torch.Tensor
    policy_eps: torch.Tensor


def draw(actions, flow_steps, generator):
    """Draws for a batch with these actions."""
    shape = 2, flow_steps + 1, *actions.shape
    following, policy = torch.randn(shape, device=actions.device, generator=generator)
    return Draws(following[0], following[1:], policy[0], policy[1:])


def critic_loss(nets, batch, x0, eps, args):
    """TD learning: Q(s, a) -> r + discount * mask * (min Q(s', a') - temperature * log pi(a'))."""
    obs, next_obs = batch.observations, batch.next_observations
    with torch.no_grad():
        next_actions, next_log_prob, _ = explore(nets.policy, next_obs, x0, eps)
    if args.critic == "crossq":  # one batch, so that both are normalised by the same statistics
        nets.critic.train()
        both = torch.cat([obs, next_obs]), torch.cat([batch.actions, next_actions])
        q, next_q = nets.critic(*both).chunk(2, 1)
        nets.critic.eval()
    else:
        q = nets.critic(obs, batch.actions)
        next_q = nets.target_critic(next_obs, next_actions)
    next_v = next_q.amin(0) - nets.log_temperature.exp() * next_log_prob
    target = batch.rewards + args.discount * batch.masks * next_v
    loss = ((q - target.detach()) ** 2).mean()
    return loss, dict(critic_loss=loss, q_mean=q.mean(), q_min=q.amin(), q_max=q.amax())


def policy_loss(nets, batch, x0, eps):
    """temperature * log pi - min Q, back through all K steps; also returns the path.

    Moves the running statistics of the observations, as critic_loss (crossq) does the critic's.
    """
    obs = batch.observations
    nets.policy.train()
    actions, log_prob, path = explore(nets.policy, obs, x0, eps)
    nets.policy.eval()
    # The action's gradient passes through the critic, the critic's own parameters get none.
    frozen = {name: p.detach() for name, p in nets.critic.named_parameters()}
    q = torch.func.functional_call(nets.critic, frozen, (obs, actions)).amin(0)
    loss = (nets.log_temperature.exp().detach() * log_prob - q).mean()
    return loss, dict(policy_loss=loss, entropy=-log_prob.mean()), path


# --------------------------------------------------------------------------------------- update


def make_optimizers(nets, args):
    """Adam for critics, policy and temperature; CrossQ wants the short memory of beta_1 = 0.5."""
    betas = (0.5 if args.critic == "crossq" else 0.9, 0.999)
    adam = lambda parameters, lr: torch.optim.Adam(parameters, lr, betas, eps=1e-8, fused=True)
    critic = adam(nets.critic.parameters(), args.q_lr)
    policy = adam(nets.policy.parameters(), args.policy_lr)
    return critic, policy, adam([nets.log_temperature], args.q_lr)


def update_critic(nets, optimizers, batch, draws, args):
    """One gradient step on the critics; returns metrics as tensors on the device."""
    loss, metrics = critic_loss(nets, batch, draws.next_x0, draws.next_eps, args)
    optimizers[0].zero_grad()
    loss.backward()
    optimizers[0].step()
    if args.critic == "sac":
        with torch.no_grad():
            for target, online in zip(nets.target_critic.parameters(), nets.critic.parameters()):
                target.mul_(1 - args.tau).add_(online, alpha=args.tau)
    return {name: x.detach() for name, x in metrics.items()}


def update_policy(nets, optimizers, batch, draws, args):
    """One gradient step on policy and temperature; metrics as tensors on the device.

    They include norms of the loss's gradient: by the policy's parameters, by those of the velocity
    alone (sigma's have the gradient of the entropy, which grows with K for any velocity), and by
    each x_i of the rollout, (B, A) as one vector.
    """
    x0 = draws.policy_x0.clone().requires_grad_()
    loss, metrics, path = policy_loss(nets, batch, x0, draws.policy_eps)
    for x in path:
        x.retain_grad()
    optimizers[1].zero_grad()
    loss.backward()
    for name, module in (("policy", nets.policy), ("velocity", nets.policy.velocity)):
        gradients = [p.grad for p in module.parameters()]
        metrics[f"{name}_grad_norm"] = nn.utils.get_total_norm(gradients)
    metrics.update({f"grad_x{i}": x.grad.norm() for i, x in enumerate(path)})
    optimizers[1].step()

    temperature = nets.log_temperature.exp()
    metrics["temperature"] = temperature
    optimizers[2].zero_grad()
    (temperature * (metrics["entropy"].detach() - args.target_entropy)).backward()
    optimizers[2].step()
    return {name: x.detach() for name, x in metrics.items()}


# ----------------------------------------------------------------------------------- evaluation


def load(folder, device="cpu"):
    """Networks and settings of the run in a folder, for `act`."""
    args, state = common.read_run(Args, folder)
    with common.reading(folder):
        nets = Networks(*state["sizes"], args).to(device)
        nets.load_state_dict(state["nets"])
    return nets, args


@torch.no_grad()
def act(nets, obs, args, generator=None):
    """The policy on NumPy arrays: observations (N, O) -> actions (N, 1, A)."""
    device, shape = next(nets.parameters()).device, (len(obs), nets.sizes[1])
    x0 = torch.randn(shape, device=device, generator=generator)
    obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
    return sample_actions(nets, obs, x0, args)[:, None].cpu().numpy()


def evaluate(policy, envs, episodes, horizon, seed):
    """Success (NaN if the environment has none), return and length, arrays (episodes,).

    policy: observations (N, O) -> actions (N, horizon, A), as NumPy arrays. envs: N environments
    with autoreset mode SAME_STEP. Each runs a fixed share of the episodes: those that finish first
    anywhere would mostly be the short, successful ones.
    """
    n = envs.num_envs
    quota = np.full(n, episodes // n)
    quota[: episodes % n] += 1
    obs, _ = envs.reset(seed=[seed * n + i for i in range(n)])
    chunks = np.zeros((n, horizon, *envs.single_action_space.shape), np.float32)
    place = np.full(n, horizon)  # of the next action in the chunk; horizon: a new chunk is due
    returns, lengths, results = np.zeros(n), np.zeros(n, int), []
    while quota.any():
        due = place == horizon
        if due.any():
            chunks[due], place[due] = policy(obs)[due], 0
        obs, rewards, terminated, truncated, infos = envs.step(chunks[np.arange(n), place])
        place, returns, lengths = place + 1, returns + rewards, lengths + 1
        for i in np.flatnonzero(terminated | truncated):
            if quota[i] > 0:
                success = infos["final_info"].get("success", np.full(n, np.nan))[i]
                results.append((success, returns[i], lengths[i]))
                quota[i] -= 1
            place[i], returns[i], lengths[i] = horizon, 0, 0
    return dict(zip(("success", "return", "length"), np.array(results).T))


# ------------------------------------------------------------------------------------- training


class ReplayBuffer:
    """The last `size` transitions, as rows of one tensor on the device."""

    def __init__(self, size, obs_dim, action_dim, device):
        self.sizes = (obs_dim, action_dim, 1, 1, obs_dim)
        self.rows = torch.zeros(size, sum(self.sizes), device=device)
        self.count = 0

    def add(self, obs, actions, rewards, masks, next_obs):
        """N transitions as NumPy arrays, shapes as in Batch."""
        columns = obs, actions, rewards[:, None], masks[:, None], next_obs
        rows = torch.as_tensor(np.concatenate(columns, 1).astype(np.float32))
        places = torch.arange(self.count, self.count + len(rows)) % len(self.rows)
        self.rows[places.to(self.rows.device)] = rows.to(self.rows.device)
        self.count += len(rows)

    def sample(self, batch_size, generator):
        """Batch of uniformly drawn transitions."""
        filled, device = min(self.count, len(self.rows)), self.rows.device
        places = torch.randint(filled, (batch_size,), device=device, generator=generator)
        obs, actions, rewards, masks, next_obs = self.rows[places].split(self.sizes, 1)
        return Batch(obs, actions, rewards[:, 0], masks[:, 0], next_obs)

    def state_dict(self):
        return dict(count=self.count, rows=self.rows[: self.count].clone())

    def load_state_dict(self, state):
        rows = state["rows"][: len(self.rows)]  # not all, if --online-steps was lowered
        self.count, self.rows[: len(rows)] = state["count"], rows


def train(args, device, envs, eval_envs, run):
    """Learn in `envs`, evaluate in `eval_envs`, write to `run`; returns the networks.

    Both are vector environments with actions in [-1, 1] that reset in the same step; in gymnasium's
    other modes there would be a step of no meaning after each episode. Raises ValueError.
    """
    for each in (envs, eval_envs):
        if each.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise ValueError(f"autoreset_mode must be SAME_STEP, is {each.metadata}")
    torch.manual_seed(args.seed + 2**31)  # for the networks; not the generator's random numbers
    generator = torch.Generator(device).manual_seed(args.seed)
    eval_generator = torch.Generator(device)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    nets = Networks(obs_dim, action_dim, args).to(device)
    optimizers = make_optimizers(nets, args)
    n, size = envs.num_envs, min(args.buffer_size, args.online_steps + envs.num_envs)
    buffer = ReplayBuffer(size, obs_dim, action_dim, device)

    @torch.no_grad()
    def explore_actions(obs):
        obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
        shape = 1 + args.flow_steps, n, action_dim
        noise = torch.randn(shape, device=device, generator=generator)
        return explore(nets.policy, obs, noise[0], noise[1:])[0].cpu().numpy()

    parts = dict(nets=nets, buffer=buffer, generator=generator, critic_adam=optimizers[0])
    parts.update(policy_adam=optimizers[1], temperature_adam=optimizers[2])
    saved = run.restore(parts)
    step, updates = saved["step"], saved.get("updates", 0)
    metrics, finished = saved.get("metrics", {}), saved.get("finished", [])
    begin_episodes = lambda: envs.reset(seed=[(args.seed + step) * n + i for i in range(n)])[0]
    obs, returns, save_due, shown = begin_episodes(), np.zeros(n), False, {}
    logged_step, logged_time = step, time.perf_counter()
    progress = run.progress(args.online_steps, step, "steps")
    while step < args.online_steps:
        if step < args.learning_starts:
            uniform = torch.rand(n, action_dim, device=device, generator=generator)
            actions = (2 * uniform - 1).cpu().numpy()
        else:
            actions = explore_actions(obs)
        next_obs, rewards, terminated, truncated, infos = envs.step(actions)
        last_obs, done = next_obs.copy(), terminated | truncated
        if done.any():  # next_obs begins a new episode there
            last_obs[done] = np.stack(infos["final_obs"][done])
        buffer.add(obs, actions, rewards, 1.0 - terminated, last_obs)
        obs, returns, step = next_obs, returns + rewards, step + n
        finished += returns[done].tolist()
        returns[done] = 0
        progress.update(n)

        if updates == 0:  # nothing to log yet; the random steps' speed says nothing
            logged_step, logged_time, finished = step, time.perf_counter(), []
        for _ in range(n if step > args.learning_starts else 0):
            batch = buffer.sample(args.batch_size, generator)
            draws = draw(batch.actions, args.flow_steps, generator)
            metrics.update(update_critic(nets, optimizers, batch, draws, args))
            if updates % args.policy_frequency == 0:
                metrics.update(update_policy(nets, optimizers, batch, draws, args))
            updates += 1

        ended = step >= args.online_steps
        evaluates = step % args.eval_interval < n or ended
        if metrics and (step % args.log_interval < n or evaluates):
            row = {name: value.item() for name, value in metrics.items()}
            row["train_return"] = np.mean(finished) if finished else math.nan
            speed = (step - logged_step) / (time.perf_counter() - logged_time)
            run.log("train.csv", step=step, **row, time_steps_per_s=round(speed, 1))
            shown.update({k: f"{row[k]:.3g}" for k in ("critic_loss", "entropy", "temperature")})
            progress.set_postfix(shown)
            logged_step, logged_time, finished = step, time.perf_counter(), []

        if evaluates:
            eval_start = time.perf_counter()
            policy = lambda obs: act(nets, obs, args, eval_generator)
            eval_generator.manual_seed(args.seed + step)
            result = evaluate(policy, eval_envs, args.eval_episodes, 1, args.seed + step)
            result = {name: values.mean() for name, values in result.items()}
            run.log("eval.csv", step=step, episodes=args.eval_episodes, **result)
            run.plot("environment steps")
            shown["return"], save_due = f"{result['return']:.1f}", True
            progress.set_postfix(shown)
            logged_time += time.perf_counter() - eval_start  # does not count as steps

        if save_due and (done.any() or ended):
            # What is inside an environment cannot be saved, so all begin new episodes here, as a
            # run does that goes on from this checkpoint.
            counts = dict(step=step, updates=updates, metrics=metrics, finished=finished)
            run.save(parts, **counts, sizes=nets.sizes)
            obs, returns, save_due = begin_episodes(), np.zeros(n), False
    run.finish()
    return nets


def continuous_env(env_id):
    """Gymnasium id -> function that makes it, with actions in [-1, 1]. Raises UserError."""
    make = lambda **options: RescaleAction(gymnasium.make(env_id, **options), -1.0, 1.0)
    with common.blame(f"--env {env_id}: cannot be used"), make() as env:
        (_,), (_,) = env.observation_space.shape, env.action_space.shape  # vectors
    return make


def main():
    args = common.parse_args(Args, __doc__, SETTINGS)
    make_env = continuous_env(args.env)
    if args.learning_starts >= args.online_steps:
        what = f"--learning-starts {args.learning_starts}: nothing would be learned in"
        raise common.UserError(f"{what} --online-steps {args.online_steps}")
    device = common.pick_device(args.device, args.matmul_precision)
    if args.evaluate:
        nets, _ = load(args.evaluate, device)
        generator = torch.Generator(device).manual_seed(args.seed)
        return common.report(evaluate, lambda obs: act(nets, obs, args, generator), make_env, args)
    config = dict(args=vars(args), device=str(device))
    folder = f"{args.env}__{Path(__file__).stem}__{args.seed}"
    print("settings:", ", ".join(f"{k}={v}" for k, v in vars(args).items()))
    with (
        common.Run(args.run_dir, folder, config, args.resume) as run,
        closing(common.make_envs(make_env, args.num_envs)) as envs,
        closing(common.make_envs(make_env, min(args.eval_episodes, 25))) as eval_envs,
    ):
        print(f"device: {device}, writing to {run.path}")
        train(args, device, envs, eval_envs, run)


if __name__ == "__main__":
    common.cli(main)
