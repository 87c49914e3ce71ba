"""Bandits in the plane: what backpropagation, FQL and Q-Flow make of the same behaviour flow.

    python results/toy/toy.py train                                       # everything
    python results/toy/toy.py train --datasets moons --seeds 0 1          # a part of it
    python results/toy/toy.py draw

The one-step problems of Q-Flow's paper: there is no state, an action is a point in the plane, and
the reward is a function of that point. `train` first clones the behaviour: the flow imitates the
data and the critic regresses the reward; then, beside them, Q-Flow's V learns the value of this
flow and FQL's one-step policy is distilled from it. Each method goes on from copies of these
networks with the total_loss of its file (bptt.py for backpropagation), once for each strength. One
more copy goes on for as many updates without guidance: the behaviour that the methods are compared
with. Nothing that is in OUT/runs is trained again. `draw` turns it into table.csv, training.png,
paths.png, three-methods.png and a NAME.png for each dataset.

The paper's points lie in [-4, 4] and its noise is N(0, I). The methods clip actions to [-1, 1], so
an action is a point / 4 here, noise is N(0, I) / 4, and the reward is that of 4 * action. A
strength s is the weight of the data beside the guidance, in the paper's units: alpha of FQL and
backpropagation, lambda of Q-Flow. Here the methods get alpha = lambda = 16 s. For alpha, because
squared distances between actions are 16 times smaller than between points. For lambda, because the
gradient of V by the action is 4 times that by the point, and the velocity it is added to 4 times
smaller.
"""

import copy
import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.spatial import cKDTree
from tqdm import trange

RESULTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(RESULTS.parent), str(RESULTS / "bptt")]
import bptt  # noqa: E402

import common  # noqa: E402
import fql  # noqa: E402
import qflow  # noqa: E402

Dataset = Literal["swiss-roll", "two-spirals", "moons", "eight-gaussians"]
DATASETS = get_args(Dataset)
METHODS = {"BPTT": bptt, "FQL": fql, "Q-Flow": qflow}
STRENGTHS = {5.0: "weak", 1.0: "", 0.3: "strong"}  # and what to call that guidance
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
    """Whether a sample is farther from the data than 99% of the points are from the others.

    Distances are those to the nearest point of the data. (m, 2), (n, 2) -> (m,), bool.
    """
    distances, _ = cKDTree(points).query(samples)
    return distances > distance_limit(points)


def distance_limit(points):
    """The 99th percentile of the points' distances to their nearest neighbours, (n, 2) -> float."""
    distances, _ = cKDTree(points).query(points, k=2)  # the nearest one is the point itself
    return np.quantile(distances[:, 1], 0.99)


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


def imitation_loss(nets, batch, noise, args):
    """The critic's regression on the reward, and flow matching."""
    q_loss, q_metrics = fql.critic_loss(nets, batch, batch.rewards)
    bc_loss, bc_metrics = fql.flow_loss(nets, batch, noise.value_x0, noise.value_t)
    return q_loss + bc_loss, q_metrics | bc_metrics


def cloning_loss(nets, batch, noise, args):
    """All networks without guidance: Q-Flow's losses, with args.lam infinite, and distillation."""
    loss, metrics = qflow.total_loss(nets, batch, noise, args)
    _, pi_metrics = fql.policy_loss(nets, batch, noise.next_x0, fql.Args(**SETTINGS))
    return loss + pi_metrics["distill_loss"], metrics


def scale_noise(noise):
    """Noise in units of actions, so that the flow starts from where the paper's does."""
    scaled = [x / SCALE if x.shape[1] == 2 else x for x in noise]  # times have one column
    return type(noise)(*scaled)


def fit(nets, loss, method, args, num_updates, problem, policy):
    """Train nets in place; returns the mean reward of `policy` at 21 times, from start to end.

    loss, args: as in the `update` of the methods; method: the one whose noise the loss takes;
    policy: the method whose policy is evaluated. The learning rate is args.lr, but in the last
    fifth of the updates it falls to 0.
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
        noise = scale_noise(method.sample_noise(batch.actions, generator))
        remaining = 1 - step / num_updates
        optimizer.param_groups[0]["lr"] = args.lr * min(1, 5 * remaining)
        method.update(nets, optimizer, batch, noise, args, loss)


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


def imitate(nets, problem, num_updates):
    """Train the flow and the critic in place; returns the flow's mean rewards on the way."""
    args = qflow.Args(**SETTINGS, lr=4e-3)
    return fit(nets, imitation_loss, qflow, args, num_updates, problem, qflow)


def clone(nets, problem, num_updates, lr):
    """Train all networks in place, without guidance; returns the one-step policy's rewards."""
    args = qflow.Args(**SETTINGS, lam=math.inf, lr=lr)
    return fit(nets, cloning_loss, qflow, args, num_updates, problem, fql)


def guide(nets, name, strength, lr, num_updates, problem):
    """Train nets in place by a method; returns the mean rewards on the way."""
    method = METHODS[name]
    if method is qflow:
        args = qflow.Args(**SETTINGS, lam=SCALE**2 * strength, lr=lr)
    else:
        args = fql.Args(**SETTINGS, alpha=SCALE**2 * strength, lr=lr)
    return fit(nets, method.total_loss, method, args, num_updates, problem, method)


def write_arrays(path, **arrays):
    """An npz file."""
    data = io.BytesIO()
    np.savez(data, **arrays)
    common.write_file(path, data.getvalue())


def write_config(out, settings):
    """config.json in `out`. Raises UserError if it is there with other settings."""
    path = out / "config.json"
    if path.exists():
        found = json.loads(path.read_text())["settings"]
        if found != settings:
            raise common.UserError(f"{out}: was trained with {found}; use another --out")
        return
    out.mkdir(parents=True, exist_ok=True)
    config = dict(settings=settings, commit=common.git_commit(), torch=torch.__version__)
    common.write_file(path, json.dumps(config, indent=2).encode())


def train(
    datasets: tuple[Dataset, ...] = DATASETS,
    seeds: tuple[int, ...] = (0, 1, 2),
    imitation_updates: int = 10_000,
    cloning_updates: int = 4_000,
    guided_updates: int = 1_000,
    guided_lr: float = 1e-3,
    out: Path = OUT,
):
    """datasets, seeds: what to train; imitation_updates: of the flow and the critic;
    cloning_updates: of all networks, without guidance; guided_updates: of each method; guided_lr:
    their learning rate; out: folder"""
    settings = dict(
        imitation_updates=imitation_updates,
        cloning_updates=cloning_updates,
        guided_updates=guided_updates,
        guided_lr=guided_lr,
    )
    for name, updates in settings.items():
        if name != "guided_lr" and (updates < 20 or updates % 20):
            raise common.UserError(
                f"{name} is {updates}, must be a multiple of 20: its curve has 20"
            )
    write_config(out, settings)
    torch.set_num_threads(1)
    for name in datasets:
        for seed in seeds:
            problem = make_problem(name, seed)
            folder = out / "runs" / f"{name}-seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "cloned.pt").exists():
                print(folder, "cloning")
                nets = make_networks(seed)
                flow = imitate(nets, problem, imitation_updates)
                one_step = clone(nets, problem, cloning_updates, 2e-3)
                write_arrays(folder / "cloning.npz", flow=flow, one_step=one_step)
                weights = io.BytesIO()
                torch.save(nets.state_dict(), weights)
                common.write_file(folder / "cloned.pt", weights.getvalue())
            cloned = make_networks(seed)
            cloned.load_state_dict(torch.load(folder / "cloned.pt"))

            path = folder / "unguided.npz"
            if not path.exists():
                print(path)
                nets = copy.deepcopy(cloned)
                rewards = clone(nets, problem, guided_updates, guided_lr)
                write_arrays(
                    path,
                    flow=sample(qflow, nets, problem.noise),
                    one_step=sample(fql, nets, problem.noise),
                    paths=paths(nets, problem.noise[:150]),
                    rewards=rewards,
                )
            for method in METHODS:
                for strength in STRENGTHS:
                    path = folder / f"{method}-{strength:g}.npz"
                    if path.exists():
                        continue
                    print(path)
                    nets = copy.deepcopy(cloned)
                    rewards = guide(nets, method, strength, guided_lr, guided_updates, problem)
                    arrays = dict(
                        samples=sample(METHODS[method], nets, problem.noise), rewards=rewards
                    )
                    if method == "Q-Flow":
                        arrays["paths"] = paths(nets, problem.noise[:150])
                    write_arrays(path, **arrays)


# --------------------------------------------------------------------------------------- results


class Policy(NamedTuple):
    """A row of the table for each dataset."""

    name: str
    strength: str
    file: str  # in a run's folder
    key: str  # of the samples in that file


def make_policies():
    """All rows of the table but that of fresh points."""
    policies = [
        Policy("behaviour flow", "", "unguided.npz", "flow"),
        Policy("one-step policy, not guided", "", "unguided.npz", "one_step"),
    ]
    for method in METHODS:
        for strength in STRENGTHS:
            file = f"{method}-{strength:g}.npz"
            policies.append(Policy(method, f"{strength:g}", file, "samples"))
    return policies


def numbers_of(samples, problem):
    """Mean reward, mean reward of those on the data, and the share that is off the data."""
    rewards = reward(problem.name, samples)
    is_off = is_off_data(samples, problem.points)
    on_data = rewards[~is_off].mean() if not is_off.all() else np.nan
    return rewards.mean(), on_data, is_off.mean()


def make_row(problem, policy, strength, values):
    """A row of the table: means and standard deviations over seeds (NaN if one) of (seeds, 3)."""
    means = np.mean(values, 0)
    stds = np.full(3, np.nan)
    if len(values) > 1:
        stds = np.std(values, 0, ddof=1)
    row = dict(dataset=problem.name, policy=policy, strength=strength, seeds=len(values))
    for name, mean, std in zip(("reward", "reward_on_data", "off_data"), means, stds):
        row |= {name: mean, f"{name}_std": std}
    return row


def summarise(name, folders):
    """The rows of a dataset: of fresh points, and of every policy."""
    problems = {folder: make_problem(name, seed_of(folder)) for folder in folders}
    first = problems[folders[0]]
    values = []
    for problem in problems.values():
        fresh = make_problem(name, problem.seed + 2**20).points
        values.append(numbers_of(fresh, problem))
    rows = [make_row(first, "fresh points of the data", "", values)]
    for policy in make_policies():
        values = []
        for folder, problem in problems.items():
            if (folder / policy.file).exists():
                values.append(numbers_of(np.load(folder / policy.file)[policy.key], problem))
        if values:
            rows.append(make_row(first, policy.name, policy.strength, values))
    return rows


def seed_of(folder):
    return int(folder.name.rpartition("-seed")[2])


def describe(row):
    """Both numbers of a row as two lines under a picture."""
    numbers = f"reward {row['reward']:.2f}"
    share = f"{100 * row['off_data']:.1f}"
    if row["seeds"] > 1:
        numbers += f" ± {row['reward_std']:.2f}"
        share += f" ± {100 * row['off_data_std']:.1f}"
    return f"{numbers}\noff the data {share}%"


def make_axes(figure, num_rows, num_columns):
    """Empty pictures of the plane, an array."""
    pictures = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in pictures.flat:
        axes.set(xlim=(-4.1, 4.1), ylim=(-4.1, 4.1), aspect="equal", xticks=[], yticks=[])
    return pictures


def show_samples(axes, samples, points, row):
    """Samples on the data in blue, off the data in red, the data behind them."""
    is_off = is_off_data(samples, points)
    axes.scatter(*points.T, s=3, color="0.85", linewidths=0)
    axes.scatter(*samples[~is_off].T, s=5, color="tab:blue", linewidths=0)
    axes.scatter(*samples[is_off].T, s=5, color="tab:red", linewidths=0)
    axes.set_xlabel(describe(row))


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
    pictures = make_axes(figure, 3, 4)
    colored = pictures[0, 0].scatter(*points.T, s=3, c=reward(name, points), linewidths=0)
    figure.colorbar(colored, cax=pictures[0, 0].inset_axes([0.05, 0.05, 0.03, 0.3]))
    pictures[0, 0].set(title="data and reward", xlabel=f"reward {reward(name, points).mean():.2f}")
    places = {("behaviour flow", ""): (1, 0), ("one-step policy, not guided", ""): (2, 0)}
    for i, method in enumerate(METHODS):
        for j, strength in enumerate(STRENGTHS):
            places[method, f"{strength:g}"] = (i, j + 1)
    for policy in make_policies():
        axes = pictures[places[policy.name, policy.strength]]
        title = policy.name
        if policy.strength:
            title = f"{policy.name}, s = {policy.strength}"
        axes.set_title(title)
        if (folder / policy.file).exists():
            samples = np.load(folder / policy.file)[policy.key]
            show_samples(axes, samples, points, found[policy.name, policy.strength])
    for j, words in enumerate(STRENGTHS.values()):
        if words:
            pictures[0, j + 1].set_title(f"{pictures[0, j + 1].get_title()} ({words})")
    figure.savefig(path)


def draw_paths(name, folder, path):
    """From noise to action: the behaviour flow, and Q-Flow with each strength."""
    points = make_problem(name, seed_of(folder)).points
    figure = Figure(figsize=(16, 4.4), dpi=100, layout="constrained")
    files = {"behaviour flow": "unguided.npz"}
    for strength in STRENGTHS:
        files[f"Q-Flow, s = {strength:g}"] = f"Q-Flow-{strength:g}.npz"
    for axes, (title, file) in zip(make_axes(figure, 1, len(files)).flat, files.items()):
        axes.set_title(title)
        if (folder / file).exists():
            show_paths(axes, np.load(folder / file)["paths"], points)
    figure.savefig(path)


def draw_three_methods(name, folder, rows, path):
    """The three methods at strength 1, to be understood without a caption."""
    found = {(row["policy"], row["strength"]): row for row in rows}
    points = make_problem(name, seed_of(folder)).points
    figure = Figure(figsize=(12, 5.6), dpi=100, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
    title = "Backpropagation, FQL and Q-Flow improve the same flow at guidance strength s = 1"
    figure.suptitle(f"{title}\n(actions are clipped at the frame)")
    for axes, method in zip(make_axes(figure, 1, 3).flat, METHODS):
        axes.set_title(method)
        if (folder / f"{method}-1.npz").exists():
            row = found[method, "1"]
            show_samples(axes, np.load(folder / f"{method}-1.npz")["samples"], points, row)
            axes.set_title(f"{method}: {100 * row['off_data']:.0f}% off the data")
            axes.set_xlabel(f"mean reward {row['reward']:.2f}")
    labels = {
        "0.75": "data (reward grows with the radius)",
        "tab:blue": "sample on the data",
        "tab:red": "sample off the data",
    }
    dots = [Line2D([], [], color=color, marker="o", linestyle="") for color in labels]
    figure.legend(dots, labels.values(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path)


def draw_training(out):
    """Mean reward during the last phase, of every seed."""
    figure = Figure(figsize=(16, 4), dpi=100, layout="constrained")
    colors = {"BPTT": "tab:red", "FQL": "tab:green", "Q-Flow": "tab:blue"}
    styles = dict(zip(STRENGTHS, (":", "--", "-")))
    curves = {"one-step policy, not guided": ("unguided.npz", ":", "0.5")}
    for method, color in colors.items():
        for strength, style in styles.items():
            curves[f"{method}, s = {strength:g}"] = (f"{method}-{strength:g}.npz", style, color)
    for axes, name in zip(figure.subplots(1, len(DATASETS)), DATASETS):
        for label, (file, style, color) in curves.items():
            axes.plot([], [], style, color=color, label=label)
            for path in sorted((out / "runs").glob(f"{name}-seed*/{file}")):
                rewards = np.load(path)["rewards"]
                progress = np.linspace(0, 1, len(rewards))
                axes.plot(progress, rewards, style, color=color, linewidth=1)
        axes.set(title=name, xlabel="share of the updates")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean reward")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right", fontsize=11)
    figure.savefig(out / "training.png")


def draw(out: Path = OUT):
    """out: folder"""
    matplotlib.rc("font", size=15)
    rows = []
    for name in DATASETS:
        done = (out / "runs").glob(f"{name}-seed*/unguided.npz")
        folders = sorted((path.parent for path in done), key=seed_of)
        if not folders:
            continue
        own_rows = summarise(name, folders)
        limit = distance_limit(make_problem(name, seed_of(folders[0])).points)
        print(f"{name}: off the data is farther than {limit:.3f} from it")
        draw_dataset(name, folders[0], own_rows, out / f"{name}.png")
        if name == "swiss-roll":
            draw_paths(name, folders[0], out / "paths.png")
            draw_three_methods(name, folders[0], own_rows, out / "three-methods.png")
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
