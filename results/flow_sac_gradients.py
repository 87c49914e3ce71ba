"""Gradient norms of SAC Flow's actor against K, for the three velocity networks.

    python results/flow_sac_gradients.py --trained RUN RUN RUN     # flow-t, flow-g, naive
    python results/flow_sac_gradients.py --out /tmp/gradients      # trains them itself

Measures on fixed batches of observations, either the weights of three runs on HalfCheetah-v5 with
every K, or those of 3,000 updates with each network and each K (15 trainings, which have not been
run to the end). Writes gradients.csv and gradients.png. Of the trainings: an entropy of 0, the
target for K = 4, means another noise level for another K; the target moves so that sigma can stay.
"""

import csv
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import flow_sac  # noqa: E402

POLICIES = ("flow-t", "flow-g", "naive")
COLUMNS = ["velocity_grad_norm", "sigma_grad_norm", "sigma", "entropy", "temperature"]


@dataclass
class Args:
    out: Path = Path("results/flow-sac-gradients")
    """folder for table and picture; the runs go into runs/ below it"""
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    """the values of K"""
    online_steps: int = 4_000
    """environment steps of each training, the first 1,000 of them without updates"""
    seed: int = 0
    """of the trainings"""
    trained: tuple[Path, ...] = ()
    """instead of training with each K: three runs on HalfCheetah-v5, flow-t flow-g naive, whose
    weights are measured with every K"""
    workers: int = 2
    """trainings at a time, one thread each"""


def target_entropy(k, sigma=0.35, action_dim=6):
    """The entropy of a path of K steps with this sigma: near the authors' 0 for their K = 4."""
    step = 0.5 * math.log(2 * math.pi * math.e / k) + math.log(sigma)
    return round(action_dim * (0.5 * math.log(2 * math.pi * math.e) + k * step), 2)


def run_of(args, policy, k):
    """Train unless it has been trained already; returns the run's folder."""
    folder = args.out / "runs" / f"{policy}-K{k}-{args.online_steps}-seed{args.seed}"
    if not list(folder.glob("*/checkpoint.pt")):
        flags = f"""--env HalfCheetah-v5 --policy {policy} --flow-steps {k} --seed {args.seed}
            --policy-width 128 --hidden 256 256 --batch-size 256 --learning-starts 1000
            --online-steps {args.online_steps} --eval-interval {args.online_steps}
            --eval-episodes 4 --run-dir {folder} --target-entropy {target_entropy(k)}"""
        command = [sys.executable, str(ROOT / "flow_sac.py"), *flags.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            sys.exit(result.stderr[-500:])
    return next(folder.glob("*/checkpoint.pt")).parent


def observations(count, seed=0):
    """What random actions see, the same for everyone: (count, O)."""
    env = flow_sac.make_env("HalfCheetah-v5")
    env.action_space.seed(seed)
    obs, _ = env.reset(seed=seed)
    rows = [obs]
    while len(rows) < count:
        obs, _, _, truncated, _ = env.step(env.action_space.sample())
        if truncated:
            obs, _ = env.reset()
        rows.append(obs)
    return torch.as_tensor(np.array(rows), dtype=torch.float32)


def policy_loss(nets, obs, x0, eps):
    """flow_sac.policy_loss -> the loss, the entropy and the path [x_0, ..., x_K] that leads to it.

    Of the gradient by x_0, that of its own log-density, log N(x_0; 0, I), is left out: it is the
    same for every velocity.
    """
    policy = nets.policy.train()
    normalised = policy.obs_norm(obs)
    policy.eval()
    x0 = x0.detach().requires_grad_()
    path, log_prob = flow_sac.rollout(policy.velocity, policy.log_sigma, normalised, x0, eps)
    for x in path:
        x.retain_grad()
    own = -0.5 * (x0**2).sum(-1)  # log N(x_0; 0, I), but for a constant
    log_prob = log_prob - own + own.detach()
    u = path[-1]
    log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))
    log_prob = log_prob - log_det.sum(-1)
    q = nets.critic(obs, u.tanh()).amin(0)
    loss = (nets.log_temperature.exp().detach() * log_prob - q).mean()
    return loss, -log_prob.mean(), path


def measure(folder, k, obs, batches=8):
    """For the run's weights with K = k: COLUMNS, then the norms at x_0, ..., x_K."""
    nets, _ = flow_sac.load(folder)
    policy = nets.policy
    generator = torch.Generator().manual_seed(0)
    rows = []
    for part in obs.chunk(batches):
        noise = torch.randn(k + 1, len(part), 6, generator=generator)
        nets.zero_grad()
        loss, entropy, path = policy_loss(nets, part, noise[0], noise[1:])
        loss.backward()
        log_sigma = policy.log_sigma(policy.obs_norm(part), torch.full_like(part[:, :1], 0.5))
        values = [
            flow_sac.gradient_norm(policy.velocity),
            flow_sac.gradient_norm(policy.log_sigma),
            log_sigma.exp().mean(),
            entropy,
            nets.log_temperature.exp(),
        ]
        values += [x.grad.norm() for x in path]
        rows.append([value.item() for value in values])
    return np.mean(rows, 0)


def main():
    args = tyro.cli(Args, description=__doc__)
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = [(policy, k) for policy in POLICIES for k in args.steps]
    if args.trained:
        folders = [args.trained[POLICIES.index(policy)] for policy, _ in jobs]
    else:
        with ThreadPoolExecutor(args.workers) as pool:
            folders = list(pool.map(lambda job: run_of(args, *job), jobs))
    obs = observations(2048)
    rows = [(*job, measure(folder, job[1], obs)) for job, folder in zip(jobs, folders)]
    with open(args.out / "gradients.csv", "w", newline="") as file:
        writer = csv.writer(file)
        points = [f"grad_x{i}" for i in range(max(args.steps) + 1)]
        writer.writerow(["policy", "K", *COLUMNS, *points])
        for *words, values in rows:
            writer.writerow([*words, *(f"{v:.5g}" for v in values)])

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    for column, (title, value) in enumerate(
        {
            "gradient norm of the velocity's parameters": lambda v: v[0],
            "gradient norm of sigma's parameters": lambda v: v[1],
            "gradient at x_0 / gradient at x_K": lambda v: v[5] / v[-1],
        }.items()
    ):
        for policy in POLICIES:
            picked = [(k, value(v)) for p, k, v in rows if p == policy]
            axes[0, column].plot(*zip(*picked), "o-", label=policy)
        axes[0, column].set(title=title)
    for column, policy in enumerate(POLICIES):
        for p, k, v in rows:
            if p == policy:
                axes[1, column].plot(np.arange(k + 1) / k, v[5:], ".-", label=f"K = {k}")
        axes[1, column].set(title=f"{policy}: gradient norm at x_i", xlabel="i / K")
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.legend()
        axis.grid(alpha=0.3)
    for axis in axes[0]:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("K")
    figure.savefig(args.out / "gradients.png")
    for policy, k, values in rows:
        shown = " ".join(f"{name} {v:.3g}" for name, v in zip(COLUMNS, values))
        print(f"{policy:7} K {k:2}  {shown}  x_0 / x_K {values[5] / values[-1]:.3g}")


if __name__ == "__main__":
    main()
