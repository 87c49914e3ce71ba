"""Bandits in the plane: what backpropagation, FQL and Q-Flow make of the same behaviour flow.

    python results/toy.py train                                       # everything
    python results/toy.py train --datasets moons --seeds 0 1          # a part of it
    python results/toy.py draw

The one-step problems of Q-Flow's paper: there is no state, an action is a point in the plane, and
the reward is a function of that point. `train` first clones the behaviour: the flow imitates the
data and the critic regresses the reward; then, beside them, Q-Flow's V learns the value of this
flow and FQL's one-step policy is distilled from it. Each method goes on from copies of these
networks with the total_loss of its file (bptt.py for backpropagation), once for each strength.
Nothing that is in OUT/runs is trained again. `draw` turns it into table.csv, training.png and a
NAME.png for each dataset.

The paper's points lie in [-4, 4] and its noise is N(0, I). The methods clip actions to [-1, 1], so
an action is a point / 4 here, noise is N(0, I) / 4, and the reward is that of 4 * action. A
strength s is the weight of the data beside the guidance: alpha of FQL and backpropagation, lambda
of Q-Flow. It is in the paper's units. Squared distances between actions are 16 times smaller than
between points, so the methods get alpha = lambda = 16 s.
"""

import copy
import csv
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from scipy.spatial import cKDTree
from tqdm import trange

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import bptt  # noqa: E402

import common  # noqa: E402
import fql  # noqa: E402
import qflow  # noqa: E402

Dataset = Literal["swiss-roll", "two-spirals", "moons", "eight-gaussians"]
Method = Literal["BPTT", "FQL", "Q-Flow"]
DATASETS = get_args(Dataset)
METHODS = {"BPTT": bptt, "FQL": fql, "Q-Flow": qflow}
STRENGTHS = (5.0, 1.0, 0.3)  # from weak to strong guidance
SETTINGS = dict(hidden=(128, 128, 128, 128), flow_steps=25, batch_size=256)
NUM_POINTS = 10_000
NUM_SAMPLES = 2_000  # of each policy
SCALE = 4  # points in the paper's coordinates / actions
OUT = Path("results/toy")


# ------------------------------------------------------------------------------ data and rewards


def spiral_arm(r):
    """Points at r in [0, 3 pi] of the first spiral arm; the second arm is its negative."""
    return np.stack([-r * np.cos(r), r * np.sin(r)], 1) / 3


def moon(angle, lower):
    """Points at angles in [0, pi] of the upper or the lower moon."""
    x = np.stack([np.cos(angle), np.sin(angle)], 1)
    if lower:
        x = np.array([1.0, 0.5]) - x
    return 2 * x + np.array([-1.0, -0.2])


def gaussian_centres():
    """The eight centres, counterclockwise from the top."""
    angle = math.pi / 2 + np.arange(8) * math.pi / 4
    return 4 / math.sqrt(2) * np.stack([np.cos(angle), np.sin(angle)], 1)


def sample_points(name, n, rng):
    """n points of a dataset in the paper's coordinates, clipped to [-4, 4]: (n, 2)."""
    noise = rng.normal(size=(n, 2))
    if name == "swiss-roll":
        r = 1.5 * math.pi * (1 + 2 * rng.random(n))
        points = np.stack([r * np.cos(r), r * np.sin(r)], 1) / 5 + noise / 5
    elif name == "two-spirals":
        arm = spiral_arm(3 * math.pi * np.sqrt(rng.random(n // 2)))
        points = np.concatenate([arm, -arm]) + 0.1 / 3 * noise
    elif name == "moons":
        upper = moon(math.pi * rng.random(n // 2), lower=False)
        lower = moon(math.pi * rng.random(n // 2), lower=True)
        points = np.concatenate([upper, lower]) + 0.2 * noise
    else:
        centres = gaussian_centres()
        points = centres[rng.integers(8, size=n)] + 0.5 / math.sqrt(2) * noise
    return points.clip(-4, 4)


def reward(name, points):
    """The reward of points in the paper's coordinates: (n, 2) -> (n,)."""
    radius = np.linalg.norm(points, axis=1)
    if name == "swiss-roll":
        return radius**2 / 9
    if name == "two-spirals":
        arm = spiral_arm(np.linspace(0, 3 * math.pi, 2000))
        distance, _ = cKDTree(np.concatenate([arm, -arm])).query(points)
        near_an_arm = np.exp(-0.5 * (distance / 0.15) ** 2)
        return near_an_arm * (1 - 0.3 * radius).clip(0, 1)
    if name == "moons":  # 1 for the lower one
        angle = np.linspace(0, math.pi, 2000)
        to_upper, _ = cKDTree(moon(angle, lower=False)).query(points)
        to_lower, _ = cKDTree(moon(angle, lower=True)).query(points)
        return (to_lower < to_upper).astype(float)
    _, nearest = cKDTree(gaussian_centres()).query(points)
    return nearest / 7


def is_off_data(samples, points):
    """Whether a sample is farther from the data than 99 % of the points are from the others.

    Distances are those to the nearest point of the data. (m, 2), (n, 2) -> (m,), bool.
    """
    tree = cKDTree(points)
    own_distances, _ = tree.query(points, k=2)  # the nearest one is the point itself
    limit = np.quantile(own_distances[:, 1], 0.99)
    distances, _ = tree.query(samples)
    return distances > limit


# -------------------------------------------------------------------------------------- training


class Problem(NamedTuple):
    """A dataset, and the noise from which all policies are sampled."""

    name: str
    seed: int
    points: np.ndarray  # (NUM_POINTS, 2), in the paper's coordinates
    noise: torch.Tensor  # (NUM_SAMPLES, 2), in units of actions


def make_problem(name, seed):
    points = sample_points(name, NUM_POINTS, np.random.default_rng(seed))
    generator = torch.Generator().manual_seed(seed + 2**32)
    noise = torch.randn(NUM_SAMPLES, 2, generator=generator) / SCALE
    return Problem(name, seed, points, noise)


def make_networks(seed):
    """The networks of all three methods: Q-Flow's, and FQL's one-step policy."""
    torch.manual_seed(seed + 2**31)
    nets = qflow.Networks(0, 2, qflow.Args(**SETTINGS))
    nets.one_step = fql.OneStep(0, 2, SETTINGS["hidden"])
    return nets


def imitation_loss(nets, batch, draws, args):
    """The critic's regression on the reward, and flow matching."""
    loss_q, metrics_q = fql.critic_loss(nets, batch, batch.rewards)
    loss_v, metrics_v = fql.flow_loss(nets, batch, draws.value_x0, draws.value_t)
    return loss_q + loss_v, metrics_q | metrics_v


def cloning_loss(nets, batch, draws, args):
    """All networks without guidance: Q-Flow's losses, with args.lam infinite, and distillation."""
    loss, metrics = qflow.total_loss(nets, batch, draws, args)
    _, metrics_pi = fql.policy_loss(nets, batch, draws.next_x0, fql.Args(**SETTINGS))
    return loss + metrics_pi["distill_loss"], metrics


def scale_noise(draws):
    """Noise in units of actions, so that the flow starts from where the paper's does."""
    scaled = [x / SCALE if x.shape[1] == 2 else x for x in draws]  # times have one column
    return type(draws)(*scaled)


def fit(nets, loss, method, args, num_updates, problem, policy):
    """Train nets in place; returns the mean reward of `policy` at 21 times, from start to end.

    loss, args: as in the `update` of the methods; method: the one with the draws that loss takes;
    policy: the method whose policy is evaluated. The learning rate falls linearly to 0.
    """
    actions = torch.as_tensor(problem.points / SCALE, dtype=torch.float32)
    rewards = torch.as_tensor(reward(problem.name, problem.points), dtype=torch.float32)
    optimizer = method.make_optimizer(nets, args)
    generator = torch.Generator().manual_seed(problem.seed)
    no_state = torch.zeros(args.batch_size, 0)
    ones = torch.ones(args.batch_size)
    mean_rewards = []
    for step in trange(num_updates + 1, mininterval=5):
        if step % (num_updates // 20) == 0:
            samples = sample(policy, nets, problem.noise)
            mean_rewards.append(reward(problem.name, samples).mean())
        if step == num_updates:
            return mean_rewards
        rows = torch.randint(len(actions), (args.batch_size,), generator=generator)
        batch = common.Batch(
            observations=no_state,
            actions=actions[rows],
            rewards=rewards[rows],
            masks=0 * ones,  # nothing follows: the critic's target is the reward
            next_observations=no_state,
            valid=ones[:, None],
        )
        draws = scale_noise(method.draw(batch.actions, generator))
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / num_updates)
        method.update(nets, optimizer, batch, draws, args, loss)


@torch.no_grad()
def sample(policy, nets, noise):
    """Points in the paper's coordinates from the policy of a method: (n, 2) -> (n, 2)."""
    method = fql if policy is fql else qflow  # with backpropagation, too, the flow acts
    no_state = torch.zeros(len(noise), 0)
    actions = method.sample_actions(nets, no_state, noise, method.Args(**SETTINGS))
    return SCALE * actions.double().numpy()


@torch.no_grad()
def paths(nets, noise):
    """The points that the flow's rollout passes, in the paper's coordinates: (K + 1, n, 2)."""
    passed = []

    def velocity(obs, x, t):
        passed.append(x)
        return nets.velocity(obs, x, t)

    no_state = torch.zeros(len(noise), 0)
    start = torch.zeros(len(noise), 1)
    end = qflow.rollout(velocity, no_state, noise, start, SETTINGS["flow_steps"])
    return SCALE * torch.stack([*passed, end]).numpy()


def clone(problem, imitation_updates, cloning_updates):
    """The networks after behaviour cloning."""
    nets = make_networks(problem.seed)
    args = qflow.Args(**SETTINGS, lam=math.inf, lr=4e-3)
    fit(nets, imitation_loss, qflow, args, imitation_updates, problem, qflow)
    args = replace(args, lr=2e-3)
    fit(nets, cloning_loss, qflow, args, cloning_updates, problem, fql)
    return nets


def guide(nets, name, strength, lr, num_updates, problem):
    """Train nets in place by a method; returns the mean rewards on the way."""
    method = METHODS[name]
    if method is qflow:
        args = qflow.Args(**SETTINGS, lam=SCALE**2 * strength, lr=lr)
    else:
        args = fql.Args(**SETTINGS, alpha=SCALE**2 * strength, lr=lr)
    return fit(nets, method.total_loss, method, args, num_updates, problem, method)


def train(
    datasets: tuple[Dataset, ...] = DATASETS,
    seeds: tuple[int, ...] = (0, 1, 2),
    methods: tuple[Method, ...] = tuple(METHODS),
    strengths: tuple[float, ...] = STRENGTHS,
    imitation_updates: int = 10_000,
    cloning_updates: int = 2_000,
    guided_updates: int = 1_000,
    guided_lr: float = 1e-3,
    out: Path = OUT,
):
    """datasets, seeds, methods, strengths: what to train; imitation_updates: of the flow and the
    critic; cloning_updates: of all networks, without guidance; guided_updates: of each method;
    guided_lr: their learning rate at the start; out: folder"""
    if min(imitation_updates, cloning_updates, guided_updates) < 20:
        raise common.UserError("a phase needs at least 20 updates, between the points of its curve")
    torch.set_num_threads(1)
    qflow.set_matmul_precision("auto", torch.device("cpu"))
    for name in datasets:
        for seed in seeds:
            problem = make_problem(name, seed)
            folder = out / "runs" / f"{name}-seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "cloned.pt").exists():
                print(folder, "cloning")
                nets = clone(problem, imitation_updates, cloning_updates)
                flow = sample(qflow, nets, problem.noise)
                one_step = sample(fql, nets, problem.noise)
                np.savez(folder / "cloned.npz", flow=flow, one_step=one_step)
                torch.save(nets.state_dict(), folder / "cloned.pt")
            cloned = make_networks(seed)
            cloned.load_state_dict(torch.load(folder / "cloned.pt"))
            for method in methods:
                for strength in strengths:
                    path = folder / f"{method}-{strength:g}.npz"
                    if path.exists():
                        continue
                    print(path)
                    nets = copy.deepcopy(cloned)
                    rewards = guide(nets, method, strength, guided_lr, guided_updates, problem)
                    samples = sample(METHODS[method], nets, problem.noise)
                    way = paths(nets, problem.noise[:150])
                    np.savez(path, samples=samples, rewards=rewards, paths=way)


# --------------------------------------------------------------------------------------- results


def summarise(name, folders, policy, strength, file, key):
    """The row of a policy in the table: mean and standard deviation over seeds (NaN if one)."""
    values = []
    for folder in folders:
        if (folder / file).exists():
            problem = make_problem(name, seed_of(folder))
            samples = np.load(folder / file)[key]
            is_off = is_off_data(samples, problem.points)
            values.append([reward(name, samples).mean(), is_off.mean()])
    means = np.mean(values, 0)
    stds = np.full(2, np.nan)
    if len(values) > 1:
        stds = np.std(values, 0, ddof=1)
    return dict(
        dataset=name,
        policy=policy,
        strength=strength,
        seeds=len(values),
        reward=means[0],
        reward_std=stds[0],
        off_data=means[1],
        off_data_std=stds[1],
    )


def seed_of(folder):
    return int(folder.name.rpartition("-seed")[2])


def describe(row):
    """Both numbers of a row as a line under a picture."""
    numbers = f"reward {row['reward']:.2f}"
    share = f"off the data {100 * row['off_data']:.1f}"
    if row["seeds"] > 1:
        numbers += f" ± {row['reward_std']:.2f}"
        share += f" ± {100 * row['off_data_std']:.1f}"
    return f"{numbers},  {share} %"


def show_samples(axes, samples, points, row):
    """Samples on the data in blue, off the data in red, the data behind them."""
    is_off = is_off_data(samples, points)
    axes.scatter(*points.T, s=3, color="0.85", linewidths=0)
    axes.scatter(*samples[~is_off].T, s=5, color="tab:blue", linewidths=0)
    axes.scatter(*samples[is_off].T, s=5, color="tab:red", linewidths=0)
    axes.set_xlabel(describe(row), fontsize=14)


def show_paths(axes, way, points):
    """Lines from noise to action; way: (K + 1, n, 2)."""
    is_off = is_off_data(way[-1], points)
    colors = np.where(is_off, "tab:red", "tab:blue")
    axes.scatter(*points.T, s=3, color="0.85", linewidths=0)
    lines = LineCollection(way.swapaxes(0, 1), colors="0.35", linewidths=0.7, alpha=0.7)
    axes.add_collection(lines)
    axes.scatter(*way[0].T, s=7, color="0.35", linewidths=0)
    axes.scatter(*way[-1].T, s=22, color=colors, linewidths=0, zorder=3)


def draw_dataset(name, folder, rows, path):
    """The samples of one seed for each method and strength, with the numbers over all seeds."""
    found = {(row["policy"], row["strength"]): row for row in rows}
    points = make_problem(name, seed_of(folder)).points
    figure = Figure(figsize=(16, 13.2), dpi=100, layout="constrained")
    pictures = figure.subplots(3, 4)
    for axes in pictures.flat:
        axes.set(xlim=(-4.1, 4.1), ylim=(-4.1, 4.1), aspect="equal", xticks=[], yticks=[])

    colored = pictures[0, 0].scatter(*points.T, s=3, c=reward(name, points), linewidths=0)
    figure.colorbar(colored, cax=pictures[0, 0].inset_axes([0.05, 0.05, 0.03, 0.3]))
    pictures[0, 0].set_title("data and reward")
    pictures[0, 0].set_xlabel(f"reward {reward(name, points).mean():.2f}", fontsize=14)
    behaviour = found["behaviour flow", ""]
    show_samples(pictures[1, 0], np.load(folder / "cloned.npz")["flow"], points, behaviour)
    pictures[1, 0].set_title("behaviour flow")
    for i, method in enumerate(METHODS):
        for j, strength in enumerate(STRENGTHS):
            axes = pictures[i, j + 1]
            file = folder / f"{method}-{strength:g}.npz"
            axes.set_title(f"{method}, s = {strength:g}")
            if file.exists():
                samples = np.load(file)["samples"]
                show_samples(axes, samples, points, found[method, f"{strength:g}"])
    strength = STRENGTHS[-1]
    file = folder / f"Q-Flow-{strength:g}.npz"
    if file.exists():
        show_paths(pictures[2, 0], np.load(file)["paths"], points)
    pictures[2, 0].set_title(f"Q-Flow, s = {strength:g}: noise to action")
    figure.savefig(path)


def draw_training(out):
    """Mean reward during the guided phase, of every seed."""
    figure = Figure(figsize=(16, 4.5), dpi=100, layout="constrained")
    colors = {"BPTT": "tab:red", "FQL": "tab:green", "Q-Flow": "tab:blue"}
    styles = dict(zip(STRENGTHS, (":", "--", "-")))
    for axes, name in zip(figure.subplots(1, len(DATASETS)), DATASETS):
        for method, color in colors.items():
            for strength, style in styles.items():
                axes.plot([], [], style, color=color, label=f"{method}, s = {strength:g}")
                for file in sorted((out / "runs").glob(f"{name}-seed*/{method}-{strength:g}.npz")):
                    rewards = np.load(file)["rewards"]
                    progress = np.linspace(0, 1, len(rewards))
                    axes.plot(progress, rewards, style, color=color, linewidth=1)
        axes.set(title=name, xlabel="share of the guided updates")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean reward")
    figure.axes[0].legend(fontsize=9)
    figure.savefig(out / "training.png")


def draw(out: Path = OUT):
    """out: folder"""
    matplotlib.rc("font", size=15)
    rows = []
    for name in DATASETS:
        cloned = (out / "runs").glob(f"{name}-seed*/cloned.pt")
        folders = sorted((path.parent for path in cloned), key=seed_of)
        if not folders:
            continue
        policies = [
            ("behaviour flow", "", "cloned.npz", "flow"),
            ("one-step policy, not guided", "", "cloned.npz", "one_step"),
        ]
        for method in METHODS:
            for strength in STRENGTHS:
                file = f"{method}-{strength:g}.npz"
                if list((out / "runs").glob(f"{name}-seed*/{file}")):
                    policies.append((method, f"{strength:g}", file, "samples"))
        own_rows = [summarise(name, folders, *policy) for policy in policies]
        draw_dataset(name, folders[0], own_rows, out / f"{name}.png")
        rows += own_rows
    if not rows:
        raise common.UserError(f"{out / 'runs'}: nothing is trained yet")
    draw_training(out)
    with open(out / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {}
            for column, value in row.items():
                rounded[column] = f"{value:.4f}" if isinstance(value, float) else value
            writer.writerow(rounded)
    print((out / "table.csv").read_text())


if __name__ == "__main__":
    commands = dict(train=train, draw=draw)
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except common.UserError as error:
        sys.exit(f"toy.py: error: {error}")
