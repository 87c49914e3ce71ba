"""FQL: offline RL with a flow that imitates and a one-step policy that improves on it.

A flow policy turns noise x_0 ~ N(0, I) into an action x_1 by following a velocity field v(s, x, t)
from t = 0 to t = 1. To imitate a dataset is a regression, called flow matching. To improve on the
dataset usually means to differentiate Q through every step of the solver: costly and unstable.

FQL does without. The flow only imitates. A second network mu(s, z) maps noise to an action in one
step and is the policy: it learns from the flow to stay with the data, and from the critic, whose
gradient has to pass through that one step only. Three networks, in this file's letters:

    critic    Q(s, a)       ->  r + discount * mask * Q'(s', a'),  a' from the policy, Q' the target
    velocity  v(s, x_t, t)  ->  x_1 - x_0,  x_1 from the dataset
    one_step  mu(s, z)      ->  minimum of  alpha * mean (mu - flow's end from z)^2 - Q(s, clip(mu))

Park, Li, Levine: Flow Q-Learning, ICML 2025, https://arxiv.org/abs/2502.02538

    python fql.py                                    # pointmaze on data collected on the spot
    python fql.py --env antmaze-giant-navigate-v0    # with the paper's settings
"""

import copy
import math
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import common


@dataclass
class Args:
    env: str = "pointmaze-medium-navigate-v0"
    """OGBench dataset: NAME-v0, NAME-singletask-v0 or NAME-singletask-taskN-v0"""
    task: int = 0
    """task of the environment, 1 to 5; 0 is OGBench's default task"""
    dataset: Path | None = None
    """file in OGBench's layout; None: the official one (pointmaze-*-navigate: collected here)"""
    dataset_url: str = ""
    """folder or npz file to download from instead of OGBench's host"""
    seed: int = 0
    """seeds networks, batches, noise and evaluation"""
    device: str = "auto"
    """auto (CUDA if there is one), cpu, cuda or cuda:N"""
    offline_steps: int = 1_000_000
    """number of updates"""
    batch_size: int = 256
    """transitions (or chunks) per update"""
    lr: float = 3e-4
    """learning rate of Adam"""
    discount: float = 0.99
    """discount per environment step"""
    tau: float = 0.005
    """Polyak rate of the target critic"""
    hidden: tuple[int, ...] = (512, 512, 512, 512)
    """widths of the hidden layers of every network"""
    flow_steps: int = 10
    """K, Euler steps from noise to action"""
    q_agg: Literal["mean", "min"] = "mean"
    """how two critics become one value"""
    horizon: int = 1
    """h, actions per decision, executed open loop (1: no chunks)"""
    alpha: float = 10.0
    """the pull of the data: weight of the distance between policy and flow"""
    normalize_q_loss: bool = False
    """divide the Q loss by the mean |Q|; on a new environment, then try alpha 0.03 to 10"""
    eval_interval: int = 100_000
    """updates between evaluations (there is always one at the end)"""
    eval_episodes: int = 50
    """episodes per evaluation"""
    log_interval: int = 500
    """updates between rows of train.csv"""
    run_dir: Path = Path("runs")
    """the run's folder is made in here"""
    resume: Path | None = None
    """folder of a run to go on with; steps and intervals may be changed"""
    evaluate: Path | None = None
    """folder of a run to evaluate, on --eval-episodes, instead of training"""
    video: bool = False
    """with --evaluate: film three of the episodes, into that folder"""
    compile: bool = False
    """compile the losses (half a minute); on CUDA up to ten updates become one CUDA graph"""
    matmul_precision: Literal["auto", "highest", "high", "medium"] = "auto"
    """of torch; auto: TF32 (high) on CUDA, on CPUs the fastest that is as exact as float32"""


# Defaults per environment: the paper's, and for pointmaze our own, small enough for a laptop.
SETTINGS = {
    "pointmaze": dict(
        **dict(alpha=16.0, q_agg="min", discount=0.996, horizon=2, flow_steps=5),
        **dict(offline_steps=38_000, eval_interval=3_800, lr=1.5e-3, tau=0.07, hidden=(128,) * 4),
    ),
    "antmaze-large-navigate": dict(alpha=10.0, q_agg="min", discount=0.99),
    "antmaze-giant-navigate": dict(alpha=10.0, q_agg="min", discount=0.995),
    "humanoidmaze-medium-navigate": dict(alpha=30.0, q_agg="mean", discount=0.995),
    "humanoidmaze-large-navigate": dict(alpha=30.0, q_agg="mean", discount=0.995),
    "antsoccer-arena-navigate": dict(alpha=10.0, q_agg="mean", discount=0.995),
    "cube-single-play": dict(alpha=300.0, q_agg="mean", discount=0.99),
    "cube-double-play": dict(alpha=300.0, q_agg="mean", discount=0.99),
    "scene-play": dict(alpha=300.0, q_agg="mean", discount=0.99),
    "puzzle-3x3-play": dict(alpha=1000.0, q_agg="mean", discount=0.99),
    "puzzle-4x4-play": dict(alpha=1000.0, q_agg="mean", discount=0.99),
}


# ------------------------------------------------------------------------------------- networks


class EnsembleLinear(nn.Module):
    """`ensemble` linear layers side by side: (B, in) or (ensemble, B, in) -> (ensemble, B, out)."""

    def __init__(self, in_dim, out_dim, ensemble):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(ensemble, in_dim, out_dim))
        self.bias = nn.Parameter(torch.zeros(ensemble, 1, out_dim))
        for weight in self.weight:  # one by one: the fans of the stacked tensor would be wrong
            nn.init.xavier_uniform_(weight)

    def forward(self, x):
        return torch.bmm(x.expand(len(self.weight), -1, -1), self.weight).add_(self.bias)


class EnsembleLayerNorm(nn.Module):
    """LayerNorm, scale and bias separate for each member: (ensemble, B, dim) -> same shape."""

    def __init__(self, dim, ensemble):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(ensemble, 1, dim))
        self.bias = nn.Parameter(torch.zeros(ensemble, 1, dim))

    def forward(self, x):
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], eps=1e-6), self.scale)


class GELU(nn.Module):
    """tanh's GELU; on CPUs, without gradients or compiled, as x * sigmoid(2u): the same, sooner."""

    def forward(self, x):
        if x.is_cuda or torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return F.gelu(x, approximate="tanh")
        two_u = torch.addcmul(x, x * x, x, value=0.044715).mul_((8 / torch.pi) ** 0.5)
        return x * two_u.sigmoid_()


class MLP(nn.Sequential):
    """(B, in) -> (ensemble, B, out); each hidden layer is Linear, GELU and perhaps LayerNorm."""

    def __init__(self, in_dim, hidden, out_dim, ensemble=1, layer_norm=False):
        layers = []
        for width in hidden:
            layers += [EnsembleLinear(in_dim, width, ensemble), GELU()]
            layers += [EnsembleLayerNorm(width, ensemble)] if layer_norm else []
            in_dim = width
        super().__init__(*layers, EnsembleLinear(in_dim, out_dim, ensemble))


class Critic(nn.Module):
    """Q(s, a), two of them: (B, O), (B, A) -> (2, B)."""

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        self.mlp = MLP(obs_dim + action_dim, hidden, 1, ensemble=2, layer_norm=True)

    def forward(self, obs, actions):
        return self.mlp(torch.cat([obs, actions], -1)).squeeze(-1)


class Velocity(nn.Module):
    """v(s, x_t, t), the flow policy: (B, O), (B, A), (B, 1) -> (B, A)."""

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        self.mlp = MLP(obs_dim + action_dim + 1, hidden, action_dim)

    def forward(self, obs, x, t):
        return self.mlp(torch.cat([obs, x, t], -1)).squeeze(0)


class OneStep(nn.Module):
    """mu(s, z), noise to action in one step: (B, O), (B, A) -> (B, A), not clipped."""

    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        self.mlp = MLP(obs_dim + action_dim, hidden, action_dim)

    def forward(self, obs, z):
        return self.mlp(torch.cat([obs, z], -1)).squeeze(0)


class Networks(nn.Module):
    """All that is trained, and the target critic. action_dim counts every action of a chunk."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        self.sizes = obs_dim, action_dim
        self.critic = Critic(obs_dim, action_dim, args.hidden)
        self.velocity = Velocity(obs_dim, action_dim, args.hidden)
        self.one_step = OneStep(obs_dim, action_dim, args.hidden)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)


# -------------------------------------------------------------------------------------- rollout


def rollout(velocity, obs, x, t, flow_steps):
    """Follow the flow from (x, t) to time 1 in K Euler steps, then clip to [-1, 1].

    From t = 0 these are K steps of 1 / K; from t > 0 the flow arrives early, and the steps left
    have length 0. (B, O), (B, A), (B, 1) -> (B, A).
    """
    for _ in range(flow_steps):
        dt = (1 - t).clamp(0, 1 / flow_steps)
        x = x + velocity(obs, x, t) * dt
        t = t + dt
    return x.clamp(-1, 1)


def sample_actions(nets, obs, x0, args):
    """The policy: noise x_0 ~ N(0, I) to actions in [-1, 1]. (B, O), (B, A) -> (B, A)."""
    return nets.one_step(obs, x0).clamp(-1, 1)


# --------------------------------------------------------------------------------------- losses
#
# A batch has observations (B, O), actions (B, h * A), rewards (B,) summed over the chunk, masks
# (B,) that are 0 where the task is solved, next_observations (B, O), and valid (B, h) that is 0
# for steps after the episode's end. A chunk whose last step is not valid has weight 0 in TD.


class Draws(NamedTuple):
    """All randomness of an update: x0, z ~ N(0, I) of shape (B, A), t ~ U(0, 1) of shape (B, 1)."""

    next_z: torch.Tensor
    flow_x0: torch.Tensor
    flow_t: torch.Tensor
    policy_z: torch.Tensor


def draw(actions, generator):
    """Draws for a batch with these actions."""
    x0 = torch.randn(3, *actions.shape, device=actions.device, generator=generator)
    t = torch.rand(len(actions), 1, device=actions.device, generator=generator)
    return Draws(x0[0], x0[1], t, x0[2])


def aggregate(q, q_agg):
    """One value out of two: (2, B) -> (B,)."""
    return q.mean(0) if q_agg == "mean" else q.amin(0)


@torch.no_grad()
def critic_target(nets, batch, x0, args):
    """r + discount^h * mask * Q'(s', a'), with a' from the current policy: (B,)."""
    next_actions = sample_actions(nets, batch.next_observations, x0, args)
    next_q = aggregate(nets.target_critic(batch.next_observations, next_actions), args.q_agg)
    return batch.rewards + args.discount**args.horizon * batch.masks * next_q


# Each loss returns itself and what to log.


def critic_loss(nets, batch, target):
    """TD learning, towards a target (B,)."""
    q = nets.critic(batch.observations, batch.actions)
    loss = (batch.valid[:, -1] * (q - target) ** 2).mean()
    return loss, dict(critic_loss=loss, q_mean=q.mean(), q_min=q.amin(), q_max=q.amax())


def flow_loss(nets, batch, x0, t):
    """Flow matching on the dataset's actions; of a chunk, the valid ones count."""
    xt = (1 - t) * x0 + t * batch.actions
    error = nets.velocity(batch.observations, xt, t) - (batch.actions - x0)
    error = error.unflatten(1, (batch.valid.shape[1], -1))  # (B, h, A)
    loss = (batch.valid[..., None] * error**2).mean()
    return loss, dict(flow_loss=loss)


def policy_loss(nets, batch, z, args):
    """The one-step policy: distance to the flow's action from the same noise, and -Q."""
    obs = batch.observations
    actions = nets.one_step(obs, z)
    with torch.no_grad():
        flow_actions = rollout(nets.velocity, obs, z, torch.zeros_like(z[:, :1]), args.flow_steps)
    distill = ((actions - flow_actions) ** 2).mean()
    # The action's gradient passes through the critic, the critic's own parameters get none.
    frozen = {name: p.detach() for name, p in nets.critic.named_parameters()}
    q = torch.func.functional_call(nets.critic, frozen, (obs, actions.clamp(-1, 1))).mean(0)
    q_loss = -q.mean()
    if args.normalize_q_loss:
        q_loss = q_loss / q.abs().mean().detach()
    return args.alpha * distill + q_loss, dict(distill_loss=distill, q_loss=q_loss)


def total_loss(nets, batch, draws, args):
    """The sum of the losses. Each has gradients for its own network only."""
    critic, critic_log = critic_loss(nets, batch, critic_target(nets, batch, draws.next_z, args))
    flow, flow_log = flow_loss(nets, batch, draws.flow_x0, draws.flow_t)
    policy, policy_log = policy_loss(nets, batch, draws.policy_z, args)
    metrics = {**critic_log, **flow_log, **policy_log}
    return critic + flow + policy, {name: x.detach() for name, x in metrics.items()}


# --------------------------------------------------------------------------------------- update


def make_optimizer(nets, args):
    """One Adam for all that learns, which the target critic does not."""
    parameters = [p for p in nets.parameters() if p.requires_grad]
    on_cuda = parameters[0].is_cuda
    return torch.optim.Adam(parameters, lr=args.lr, eps=1e-8, fused=True, capturable=on_cuda)


def update(nets, optimizer, batch, draws, args, loss=total_loss):
    """One gradient step on every network; returns the metrics as tensors on the device."""
    total, metrics = loss(nets, batch, draws, args)
    optimizer.zero_grad()
    total.backward()
    with torch.no_grad():  # before Adam: the target mixes in the critic of before this step
        for target, online in zip(nets.target_critic.parameters(), nets.critic.parameters()):
            target.mul_(1 - args.tau).add_(online, alpha=args.tau)
    optimizer.step()
    return metrics


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
    """The policy on NumPy arrays: observations (N, O) -> the next h actions (N, h, A)."""
    device, shape = next(nets.parameters()).device, (len(obs), nets.sizes[1])
    x0 = torch.randn(shape, device=device, generator=generator)
    obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
    return sample_actions(nets, obs, x0, args).view(len(obs), args.horizon, -1).cpu().numpy()


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


def capture(function, generator):
    """`function` as a CUDA graph: from the fourth call on its kernels run without any Python.

    `function` must take no arguments, must never wait for the device, and may draw from `generator`
    only. What the result holds is overwritten by the next call.
    """
    graph, stream, calls, result = torch.cuda.CUDAGraph(), torch.cuda.Stream(), 0, None
    graph.register_generator_state(generator)

    def captured():
        nonlocal calls, result
        calls += 1
        if calls <= 3:  # while compiler and libraries still allocate
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = function()
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if calls == 4:
            with torch.cuda.graph(graph, stream=stream):  # records, runs nothing
                result = function()
        graph.replay()
        return result

    return captured


def train(args, dataset, envs, run):
    """Train on `dataset`, `evaluate` in `envs`, write to `run`; returns the networks."""
    device = dataset.actions.device
    torch.manual_seed(args.seed + 2**31)  # for the networks; not the generator's random numbers
    generator = torch.Generator(device).manual_seed(args.seed)
    eval_generator = torch.Generator(device)
    obs_dim, action_dim = dataset.observations.shape[1], args.horizon * dataset.actions.shape[1]
    nets = Networks(obs_dim, action_dim, args).to(device)
    optimizer = make_optimizer(nets, args)
    loss = torch.compile(total_loss, fullgraph=True) if args.compile else total_loss
    parts = dict(nets=nets, optimizer=optimizer, generator=generator)  # what a checkpoint keeps
    start = run.restore(parts)["step"]
    # Updates per call, in one CUDA graph: up to ten, so that what is due falls between two calls.
    stride = math.gcd(10, start, args.offline_steps, args.eval_interval, args.log_interval)

    def updates():
        for _ in range(stride):
            batch = dataset.sample(args.batch_size, args.horizon, args.discount, generator)
            draws = draw(batch.actions, generator)
            metrics = update(nets, optimizer, batch, draws, args, loss)
        return metrics

    if args.compile and device.type == "cuda":
        updates = capture(updates, generator)
    logged_step, logged_time, shown = start, time.perf_counter(), {}
    progress = run.progress(args.offline_steps, start, "updates")
    for step in range(start + stride, args.offline_steps + 1, stride):
        metrics = updates()
        progress.update(stride)

        evaluates = step % args.eval_interval == 0 or step == args.offline_steps
        if step % args.log_interval == 0 or evaluates:
            row = dict(step=step, **{name: value.item() for name, value in metrics.items()})
            speed = (step - logged_step) / (time.perf_counter() - logged_time)
            run.log("train.csv", **row, time_updates_per_s=round(speed, 1))
            run.check_q(row, dataset.rewards, args.discount)
            shown.update({k[:-5]: f"{v:.3g}" for k, v in row.items() if k.endswith("_loss")})
            progress.set_postfix(shown)
            logged_step, logged_time = step, time.perf_counter()

        if evaluates:
            eval_start = time.perf_counter()
            policy = lambda obs: act(nets, obs, args, eval_generator)
            eval_generator.manual_seed(args.seed + step)
            result = evaluate(policy, envs, args.eval_episodes, args.horizon, args.seed + step)
            result = {name: values.mean() for name, values in result.items()}
            run.log("eval.csv", step=step, episodes=args.eval_episodes, **result)
            run.plot()
            shown["success"] = f"{result['success']:.0%}"
            progress.set_postfix(shown)
            logged_time += time.perf_counter() - eval_start  # does not count as updates
        if evaluates or time.perf_counter() > run.saved_at + 300:
            run.save(parts, step=step, sizes=nets.sizes)
    run.finish()
    return nets


def main():
    args = common.parse_args(Args, __doc__, SETTINGS)
    name, dataset_name, env_id = common.resolve_task(args.env, args.task)
    device = common.pick_device(args.device, args.matmul_precision, args.compile)
    if args.evaluate:
        nets, _ = load(args.evaluate, device)
        generator = torch.Generator(device).manual_seed(args.seed)
        return common.report(evaluate, lambda obs: act(nets, obs, args, generator), env_id, args)
    dataset, source = common.get_dataset(
        dataset_name, env_id, args.dataset, args.dataset_url, device, args.horizon
    )
    config = dict(args=vars(args), device=str(device), dataset=source)
    folder = f"{name}__{Path(__file__).stem}__{args.seed}"
    print(f"{name}: {len(dataset)} transitions, {dataset.episodes} episodes, from {source}")
    print("settings:", ", ".join(f"{k}={v}" for k, v in vars(args).items()))
    with (
        common.Run(args.run_dir, folder, config, args.resume) as run,
        closing(common.make_envs(env_id, min(args.eval_episodes, 25))) as envs,
    ):
        print(f"device: {device}, writing to {run.path}")
        train(args, dataset, envs, run)


if __name__ == "__main__":
    common.cli(main)
