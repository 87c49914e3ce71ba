"""Gradient norms of SAC Flow's actor against K, for the three velocity networks.

    python results/flow_sac_gradients.py --out results/flow-sac-gradients

Trains HalfCheetah-v5 for some thousand updates with each network and each K, then measures on
fixed batches of observations. Writes gradients.csv and gradients.png.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import flow_sac  # noqa: E402

POLICIES = ("flow-t", "flow-g", "naive")


@dataclass
class Args:
    out: Path = Path("results/flow-sac-gradients")
    """folder for table and picture; the runs go into runs/ below it"""
    steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    """the values of K"""
    online_steps: int = 8_000
    """environment steps of each training, the first 2,000 of them without updates"""
    seed: int = 0
    """of the trainings"""
    workers: int = 2
    """trainings at a time, one thread each"""


def run_of(args, policy, k):
    """Train unless it has been trained already; returns the run's folder."""
    folder = args.out / "runs" / f"{policy}-K{k}-seed{args.seed}"
    if not list(folder.glob("*/checkpoint.pt")):
        flags = f"""--env HalfCheetah-v5 --policy {policy} --flow-steps {k} --seed {args.seed}
            --policy-width 128 --hidden 256 256 --batch-size 256 --learning-starts 2000
            --online-steps {args.online_steps} --eval-interval {args.online_steps}
            --eval-episodes 4 --run-dir {folder}"""
        command = [sys.executable, str(ROOT / "flow_sac.py"), *flags.split()]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)
    return next(folder.glob("*/checkpoint.pt")).parent


def observations(count, seed=0):
    """What random actions see, the same for everyone: (count, O)."""
    env = common.continuous_env("HalfCheetah-v5")()
    env.action_space.seed(seed)
    rows = [env.reset(seed=seed)[0]]
    while len(rows) < count:
        obs, _, _, truncated, _ = env.step(env.action_space.sample())
        rows.append(env.reset()[0] if truncated else obs)
    return torch.as_tensor(np.array(rows), dtype=torch.float32)


def measure(folder, k, obs, batches=8):
    """Norms for the run's weights with K = k: of the policy's gradient, and at x_0, ..., x_K."""
    config = json.loads((folder / "config.json").read_text())["args"]
    config["hidden"] = tuple(config["hidden"])
    args = flow_sac.Args(**config)
    nets = flow_sac.Networks(obs.shape[1], 6, args)
    nets.load_state_dict(torch.load(folder / "checkpoint.pt", weights_only=True)["nets"])
    generator, rows = torch.Generator().manual_seed(0), []
    for part in obs.chunk(batches):
        noise = torch.randn(k + 1, len(part), 6, generator=generator)
        batch = flow_sac.Batch(part, None, None, None, None)
        nets.zero_grad()
        x0 = noise[0].requires_grad_()
        loss, _, path = flow_sac.policy_loss(nets, batch, x0, noise[1:])
        for x in path:
            x.retain_grad()
        loss.backward()
        total = torch.nn.utils.get_total_norm([p.grad for p in nets.policy.parameters()])
        rows.append([total.item()] + [x.grad.norm().item() for x in path])
    return np.mean(rows, 0)


def main():
    args = tyro.cli(Args, description=__doc__)
    jobs = [(policy, k) for policy in POLICIES for k in args.steps]
    with ThreadPoolExecutor(args.workers) as pool:
        folders = dict(zip(jobs, pool.map(lambda job: run_of(args, *job), jobs)))
    obs = observations(2048)
    rows = []
    for policy, k in jobs:
        rows.append(("trained with this K", policy, k, measure(folders[policy, k], k, obs)))
        if 4 in args.steps:
            rows.append(("trained with K = 4", policy, k, measure(folders[policy, 4], k, obs)))
    with open(args.out / "gradients.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["weights", "policy", "K", "policy_grad_norm", "grad_x0", "..."])
        for *words, values in rows:
            writer.writerow([*words, *(f"{v:.5g}" for v in values)])

    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    for column, weights in enumerate(("trained with this K", "trained with K = 4")):
        for policy in POLICIES:
            picked = [(k, v) for w, p, k, v in rows if (w, p) == (weights, policy)]
            axes[0, column].plot(*zip(*[(k, v[0]) for k, v in picked]), "o-", label=policy)
        axes[0, column].set(title=f"policy's gradient norm, {weights}")
    for policy in POLICIES:
        picked = [(k, v) for w, p, k, v in rows if (w, p) == ("trained with this K", policy)]
        axes[0, 2].plot(*zip(*[(k, v[1] / v[-1]) for k, v in picked]), "o-", label=policy)
    axes[0, 2].set(title="gradient at x_0 / gradient at x_K, trained with this K")
    for column, policy in enumerate(POLICIES):
        for w, p, k, v in rows:
            if (w, p) == ("trained with this K", policy):
                axes[1, column].plot(np.arange(k + 1) / k, v[1:], ".-", label=f"K = {k}")
        axes[1, column].set(title=f"{policy}: gradient norm at x_i", xlabel="i / K")
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.legend()
        axis.grid(alpha=0.3)
    for axis in axes[0]:
        axis.set_xscale("log", base=2)
        axis.set_xlabel("K")
    figure.savefig(args.out / "gradients.png")
    for weights, policy, k, values in rows:
        ratio = values[1] / values[-1]
        print(f"{weights:20} {policy:7} K {k:2}  {values[0]:8.4g}  x_0 / x_K {ratio:.4g}")


if __name__ == "__main__":
    main()
