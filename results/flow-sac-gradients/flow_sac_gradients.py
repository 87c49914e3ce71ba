"""Gradient norms of SAC Flow's actor against K, under three conditions of its noise.

    python results/flow-sac-gradients/flow_sac_gradients.py train --condition authors --policy naive
    python results/flow-sac-gradients/flow_sac_gradients.py measure

`train` makes a run of flow_sac.py on HalfCheetah-v5 with K = 4 under one condition, in
runs/gradients/CONDITION/POLICY. `measure` takes the weights of those that are there, computes the
gradient with other K on the same observations, and writes gradients.csv and gradients.png. The
conditions:

    drift      flow_sac.py as it is: a drift, noise sigma sqrt(dt), sigma at most 1
    no-drift   the same without the drift
    authors    as in the authors' scripts: no drift; noise std whatever dt is (flow-t: std dt), std
               at most e^2; of flow-t, the density leaves out std

The last two replace flow_sac.rollout, here and for these runs only.
"""

import csv
import math
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import flow_sac  # noqa: E402

CONDITIONS = ("drift", "no-drift", "authors")
COLORS = {"flow-t": "tab:blue", "flow-g": "tab:orange", "naive": "tab:green"}  # of the policies
RUNS = Path("runs/gradients")


def rollout_without_drift(velocity, log_sigma, obs, x, eps):
    """As flow_sac.rollout, but x_{i+1} = x_i + v dt + sigma sqrt(dt) eps."""
    dt = 1 / len(eps)
    log_prob = -0.5 * (x**2 + math.log(2 * math.pi)).sum(-1)
    for i, noise in enumerate(eps):
        t = torch.full_like(x[:, :1], i * dt)
        log_std = log_sigma(obs, t) + 0.5 * math.log(dt)
        x = x + velocity(obs, x, t) * dt + log_std.exp() * noise
        log_prob = log_prob - (log_std + 0.5 * (noise**2 + math.log(2 * math.pi))).sum(-1)
    return x, log_prob


def rollout_of_the_authors(velocity, log_std, obs, x, eps):
    """As flow_sac.rollout, but x_{i+1} = x_i + v dt + std eps, for flow-t std dt eps."""
    is_flow_t = isinstance(velocity, flow_sac.FlowT)
    dt = 1 / len(eps)
    log_prob = -0.5 * (x**2 + math.log(2 * math.pi)).sum(-1)
    for i, noise in enumerate(eps):
        t = torch.full_like(x[:, :1], i * dt)
        log_std_i = log_std(obs, t)
        std = log_std_i.exp()
        if is_flow_t:
            std = std * dt
            log_std_i = torch.zeros_like(log_std_i)
        x = x + velocity(obs, x, t) * dt + std * noise
        log_prob = log_prob - (log_std_i + 0.5 * (noise**2 + math.log(2 * math.pi))).sum(-1)
    return x, log_prob


class LogStdOfTheAuthors(flow_sac.LogSigma):
    """log std in (-5, 2)."""

    def __init__(self, obs_dim, action_dim, width):
        super().__init__(obs_dim, action_dim, width, high=2.0)


ORIGINAL = (flow_sac.rollout, flow_sac.LogSigma)
REPLACEMENTS = {
    "drift": ORIGINAL,
    "no-drift": (rollout_without_drift, flow_sac.LogSigma),
    "authors": (rollout_of_the_authors, LogStdOfTheAuthors),
}


def impose(condition):
    """Make flow_sac work under this condition."""
    flow_sac.rollout, flow_sac.LogSigma = REPLACEMENTS[condition]


def train(
    condition: Literal["drift", "no-drift", "authors"],
    policy: Literal["flow-t", "flow-g", "naive"],
    online_steps: int = 30_000,
    learning_starts: int = 5_000,
    compile: bool = False,
):
    """online_steps, learning_starts, compile: as in flow_sac.py."""
    impose(condition)
    width = 64 if policy == "flow-t" else 128
    flags = f"""--env HalfCheetah-v5 --policy {policy} --policy-width {width} --hidden 256 256
        --batch-size 256 --online-steps {online_steps} --learning-starts {learning_starts}
        --eval-interval 10000 --eval-episodes 10 --start-or-resume {RUNS / condition / policy}"""
    if compile:
        flags += " --compile"
    if condition != "drift":
        flow_sac.__file__ = f"flow_sac_{condition}.py"  # the run's name for the script
    sys.argv = ["flow_sac.py", *flags.split()]
    flow_sac.main()


def observations(count, seed=0):
    """What random actions see, the same for everyone: (count, O)."""
    env = flow_sac.make_env(flow_sac.Args(env="HalfCheetah-v5"))
    env.action_space.seed(seed)
    obs, _ = env.reset(seed=seed)
    rows = [obs]
    while len(rows) < count:
        obs, _, _, truncated, _ = env.step(env.action_space.sample())
        if truncated:
            obs, _ = env.reset()
        rows.append(obs)
    return torch.as_tensor(np.array(rows), dtype=torch.float32)


def gradient_norm(folder, k, obs, num_batches=8):
    """Norm of the gradient of the policy's loss by the velocity's weights, mean over batches."""
    nets, args = flow_sac.load(folder)
    action_dim = nets.sizes[1]
    generator = torch.Generator().manual_seed(0)
    norms = []
    for part in obs.chunk(num_batches):
        noise = torch.randn(k + 1, len(part), action_dim, generator=generator)
        batch = common.Batch(part, None, None, None, None, None)
        nets.zero_grad()
        loss, _ = flow_sac.policy_loss(nets, batch, noise[0], noise[1:], args)
        loss.backward()
        gradients = [parameter.grad for parameter in nets.policy.velocity.parameters()]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
    return np.mean(norms)


def measure(
    steps: tuple[int, ...] = (1, 2, 4, 8, 16), out: Path = Path("results/flow-sac-gradients")
):
    """steps: the values of K. out: folder of table and picture."""
    obs = observations(2048)
    out.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    axes = figure.subplots(2, 3, sharey=True)
    table = []
    for column, condition in enumerate(CONDITIONS):
        impose(condition)
        for policy in COLORS:
            folder = RUNS / condition / policy
            if not folder.exists():
                continue
            norms = [gradient_norm(folder, k, obs) for k in steps]
            with open(folder / "train.csv") as file:
                rows = list(csv.DictReader(file))
            trained = [float(row["velocity_grad_norm"]) for row in rows]
            with open(folder / "eval.csv") as file:
                final_return = float(list(csv.DictReader(file))[-1]["return"])
            late = np.mean(trained[-len(trained) // 3 :])  # the last third of the training
            table.append([condition, policy, final_return, late, *norms])
            style = dict(color=COLORS[policy], label=policy)
            axes[0, column].plot(steps, norms, "o-", **style)
            thousands = [int(row["step"]) / 1000 for row in rows]
            axes[1, column].plot(thousands, trained, linewidth=1, **style)
        axes[0, column].set(title=condition, xlabel="K")
        axes[0, column].set_xscale("log", base=2)
        axes[1, column].set_xlabel("thousand steps of training with K = 4")
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.set_ylabel("gradient norm")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(out / "gradients.png")
    names = ["condition", "policy", "return", "norm_while_training", *(f"K={k}" for k in steps)]
    with open(out / "gradients.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for condition, policy, *values in table:
            writer.writerow([condition, policy, *(f"{value:.4g}" for value in values)])
    print((out / "gradients.csv").read_text())


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(dict(train=train, measure=measure), description=__doc__)
