"""Experiments and tools in results/: backpropagation, Q of runs, toy, costs, export, links."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import gymnasium
import numpy as np
import ogbench
import pytest
import torch
import tyro

import common
import fql
import qflow

ROOT = Path(__file__).parent.parent
for folder in (".", "antmaze-large", "bptt", "flow-steps", "online", "published", "toy"):
    sys.path.insert(0, str(ROOT / "results" / folder))
import before_the_goal  # noqa: E402
import best_of_n  # noqa: E402
import bptt  # noqa: E402
import collect_antmaze  # noqa: E402
import collect_play  # noqa: E402
import export_online  # noqa: E402
import flip_buttons  # noqa: E402
import flow_steps  # noqa: E402
import ifql  # noqa: E402
import online_cost  # noqa: E402
import q_by_distance  # noqa: E402
import toy  # noqa: E402
import weights_only  # noqa: E402

POINTMAZE = "pointmaze-medium-navigate-v0"


def make(**settings):
    """bptt's networks, a random batch and random noise, in float64: there no rounding shows."""
    torch.manual_seed(0)
    args = fql.Args(hidden=(16, 16), flow_steps=6, batch_size=8, alpha=3.0)
    args = replace(args, **settings)
    nets = bptt.Networks(4, 3, args).double()
    ones = torch.ones(8, dtype=torch.float64)
    batch = common.Batch(
        observations=torch.randn(8, 4, dtype=torch.float64),
        actions=torch.rand(8, 3, dtype=torch.float64) * 2 - 1,
        rewards=torch.randn(8, dtype=torch.float64),
        masks=ones,
        next_observations=torch.randn(8, 4, dtype=torch.float64),
        valid=ones[:, None],
    )
    noise = fql.sample_noise(batch.actions.float(), None)
    noise = fql.Noise(*(0.3 * x.double() for x in noise))
    return args, nets, batch, noise


def set_dataset(run, dataset):
    """Change --dataset in a run's config.json."""
    config = common.read_config(run)
    config["args"]["dataset"] = str(dataset)
    (run / "config.json").write_text(json.dumps(config))


def velocity_gradient(loss, nets):
    """The gradient of a loss by all weights of the velocity, as one vector."""
    gradients = torch.autograd.grad(loss, list(nets.velocity.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


# --------------------------------------------------------------- backpropagation through the solver


@pytest.mark.parametrize("normalize_q_loss", [False, True])
def test_the_gradient_through_all_steps_is_that_of_finite_differences(normalize_q_loss):
    args, nets, batch, noise = make(normalize_q_loss=normalize_q_loss)
    scale = 1.0
    if normalize_q_loss:  # by a constant, as far as the gradient knows
        actions = bptt.flow_actions(nets, batch.observations, noise.policy_z, 6)
        scale = nets.critic(batch.observations, actions).mean(0).abs().mean().item()
    loss, _ = bptt.policy_loss(nets, batch, noise.policy_z, args)
    gradient = velocity_gradient(loss, nets)
    direction = torch.randn(len(gradient), dtype=torch.float64)
    weights = torch.nn.utils.parameters_to_vector(nets.velocity.parameters())

    def mean_q(shift):
        shifted = weights + shift * direction
        torch.nn.utils.vector_to_parameters(shifted.detach(), nets.velocity.parameters())
        actions = bptt.flow_actions(nets, batch.observations, noise.policy_z, 6)
        return nets.critic(batch.observations, actions).mean().item()

    step = 1e-5
    difference = -(mean_q(step) - mean_q(-step)) / (2 * step) / scale
    assert abs(difference) > 1e-3
    assert gradient @ direction == pytest.approx(difference, rel=1e-5)


def test_the_gradient_equals_that_of_a_loop_written_out_and_clipped_actions_have_none():
    args, nets, batch, noise = make()
    with torch.no_grad():
        nets.velocity.mlp[-1].bias[..., 0] += 0.8  # some of the actions leave [-1, 1]
    x = noise.policy_z
    for i in range(6):
        t = torch.full((8, 1), i / 6, dtype=torch.float64)
        x = x + nets.velocity(batch.observations, x, t) / 6
    clipped = x.abs() > 1
    assert 0 < clipped.sum() < clipped.numel()
    q = nets.critic(batch.observations, torch.where(clipped, x.sign(), x))
    expected = velocity_gradient(-q.mean(), nets)
    loss, _ = bptt.policy_loss(nets, batch, noise.policy_z, args)
    found = velocity_gradient(loss, nets)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_the_critic_gets_no_gradient_from_the_policy_and_alpha_weighs_flow_matching():
    args, nets, batch, noise = make()
    flow_loss, _ = fql.flow_loss(nets, batch, noise.flow_x0, noise.flow_t)
    q_loss, _ = bptt.policy_loss(nets, batch, noise.policy_z, args)
    critic_loss, _ = fql.critic_loss(nets, batch, fql.td_target(nets, batch, noise.next_z, args))
    critic_gradient = torch.autograd.grad(critic_loss, list(nets.critic.parameters()))
    of_flow = velocity_gradient(flow_loss, nets)
    of_q = velocity_gradient(q_loss, nets)

    total, _ = bptt.total_loss(nets, batch, noise, args)
    total.backward()
    found = torch.cat([p.grad.flatten() for p in nets.velocity.parameters()])
    assert torch.allclose(found, 3.0 * of_flow + of_q, rtol=1e-9, atol=1e-12)
    for p, expected in zip(nets.critic.parameters(), critic_gradient):
        assert torch.allclose(p.grad, expected, rtol=1e-9, atol=1e-12)


def test_the_next_action_in_the_td_target_is_the_flows():
    args, nets, batch, noise = make(q_agg="min")
    with torch.no_grad():
        start = torch.zeros(8, 1, dtype=torch.float64)
        obs = batch.next_observations
        actions = fql.rollout(nets.velocity, obs, noise.next_z, start, 6)
        expected = batch.rewards + args.discount * nets.target_critic(obs, actions).amin(0)
    assert torch.equal(fql.td_target(nets, batch, noise.next_z, args), expected)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    common.collect_pointmaze(POINTMAZE, path, num_episodes=2, workers=1)
    return path


@pytest.mark.slow
def test_bptt_trains_through_fqls_own_loop_under_its_own_name(tmp_path, monkeypatch, data):
    for name in ("Networks", "total_loss", "ONLINE_ALPHA", "__file__", "__doc__"):
        monkeypatch.setattr(fql, name, getattr(fql, name))  # to restore what bptt replaces
    flags = f"""--dataset {data} --hidden 8 8 --batch-size 16 --offline-steps 5 --eval-episodes 1
        --log-interval 5 --run-dir {tmp_path / "runs"} --alpha 2"""
    monkeypatch.setattr(sys, "argv", ["bptt.py", *flags.split()])
    bptt.use_in_fql()
    fql.main()

    (run,) = (tmp_path / "runs").iterdir()
    assert "__bptt__" in run.name
    assert common.read_config(run)["script"] == "bptt.py"
    state = common.read_checkpoint(run)
    assert {name.split(".")[0] for name in state["nets"]} == {"critic", "velocity", "target_critic"}
    with pytest.raises(common.UserError):
        qflow.load(run)
    command = [sys.executable, ROOT / "results/evaluate.py", run, "--episodes", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout.startswith("success "), result.stderr

    bptt.gradients((run,), steps=(1, 3), out=tmp_path)
    with open(tmp_path / "gradients.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["K"] for row in rows] == 2 * ["1", "3", "5"]  # 5 is the run's own
    assert [row["weights"] for row in rows] == 3 * ["untrained"] + 3 * [run.name]
    assert [row["trained_K"] for row in rows] == 3 * [""] + 3 * ["5"]
    assert rows[3]["q_grad_norm"] != rows[4]["q_grad_norm"]
    assert rows[3]["flow_matching_grad_norm"] == rows[4]["flow_matching_grad_norm"]
    for row in rows:
        quotient = float(row["q_grad_norm"]) / float(row["dq_da_norm"])
        assert float(row["relative_norm"]) == pytest.approx(quotient, rel=2e-3)
    assert (tmp_path / "gradients.png").exists()

    with pytest.raises(common.UserError, match="at least one run"):
        bptt.gradients((), out=tmp_path)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    set_dataset(other, "other.npz")
    with pytest.raises(common.UserError, match=f"{other}: has --dataset other.npz, {run} has"):
        bptt.gradients((run, other), out=tmp_path)


def test_the_measured_norms_are_those_of_the_losses_whatever_the_critics_scale():
    args, nets, batch, noise = make(normalize_q_loss=True)
    q_norm, dq_da_norm, flow_norm = bptt.gradient_norms(nets, batch, noise, args.flow_steps)
    plain = replace(args, normalize_q_loss=False)
    q_loss, _ = bptt.policy_loss(nets, batch, noise.policy_z, plain)
    assert q_norm.item() == pytest.approx(velocity_gradient(q_loss, nets).norm().item())
    flow_loss, _ = fql.flow_loss(nets, batch, noise.flow_x0, noise.flow_t)
    assert flow_norm.item() == pytest.approx(velocity_gradient(flow_loss, nets).norm().item())

    actions = bptt.flow_actions(nets, batch.observations, noise.policy_z, args.flow_steps)
    norms = []
    for obs, action in zip(batch.observations, actions.detach()):
        action = action.requires_grad_()
        nets.critic(obs[None], action[None]).mean().backward()
        norms.append(action.grad.norm().item())
    assert dq_da_norm.item() == pytest.approx(np.mean(norms))

    with torch.no_grad():
        nets.critic.mlp[-1].weight.mul_(10)
    scaled = bptt.gradient_norms(nets, batch, noise, args.flow_steps)
    assert (scaled[0] / scaled[1]).item() == pytest.approx((q_norm / dq_da_norm).item())
    assert scaled[0].item() == pytest.approx(10 * q_norm.item())


# --------------------------------------------------------------------------------------- best of N


def test_of_n_actions_of_the_flow_the_one_with_the_largest_mean_q_is_taken():
    torch.manual_seed(0)
    args = fql.Args(hidden=(16, 16), flow_steps=4, horizon=2)
    nets = fql.Networks(3, 4, args)
    obs = np.random.default_rng(0).normal(size=(5, 3))
    found = best_of_n.best_of_flow(nets, obs, 7, args, torch.Generator().manual_seed(1))
    assert found.shape == (5, 2, 2)

    z = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(1))
    for i in range(5):
        same_obs = torch.as_tensor(obs[i], dtype=torch.float32).expand(7, -1)
        with torch.no_grad():
            actions = fql.rollout(nets.velocity, same_obs, z[i], torch.zeros(7, 1), 4)
            q = nets.critic(same_obs, actions).mean(0)
        best = max(range(7), key=lambda j: q[j])
        assert np.allclose(found[i].ravel(), actions[best], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_best_of_n_evaluates_the_policies_of_a_run(tmp_path, capsys):
    run = ROOT / "results/policies/fql-pointmaze-medium"
    best_of_n.main(run, n=(2, 4), episodes=2, out=tmp_path / "best.csv")
    printed = capsys.readouterr().out
    with open(tmp_path / "best.csv") as file:
        rows = list(csv.DictReader(file))
    names = [row["policy"] for row in rows]
    best_of = ["best of 2 of the flow", "best of 4 of the flow"]
    assert names[::2] == ["one-step policy", "flow", *best_of]
    assert names[1::2] == names[::2]
    assert printed.count("success ") == 4
    assert any(float(row["success"]) for row in rows[:2])  # this policy reaches nearly every goal
    with pytest.raises(common.UserError, match="^--n 0: must be at least 1"):
        best_of_n.main(run, n=(4, 0))


# ------------------------------------------------------------------------------- Q by the distance


@pytest.mark.slow
def test_distances_are_those_of_the_shortest_way_through_the_maze():
    with gymnasium.make("antmaze-large-singletask-task1-v0") as env:
        maze = env.unwrapped
        distances = q_by_distance.distances_to_goal(maze)
        assert distances[7, 10] == 0  # the goal of task 1, at the lower right
        assert ((distances < 0) == (maze.maze_map == 1)).all()
        for i, j in np.argwhere(distances > 0):
            around = [distances[i + 1, j], distances[i - 1, j], distances[i, j + 1]]
            around.append(distances[i, j - 1])
            assert min(x for x in around if x >= 0) == distances[i, j] - 1
    with gymnasium.make("cube-single-singletask-v0") as env:
        with pytest.raises(common.UserError, match="CubeEnv: is no maze"):
            q_by_distance.distances_to_goal(env.unwrapped)


def test_q_values_are_the_critics_on_data_and_on_the_flows_actions():
    args, nets, batch, _ = make(num_critics=3)
    torch.manual_seed(1)
    q, critics_differ, actions_differ, gradient = q_by_distance.q_values(
        nets, batch, args, num_actions=5
    )
    torch.manual_seed(1)
    with torch.no_grad():
        all_q = nets.critic(batch.observations, batch.actions)
        others = []
        for _ in range(5):
            z = torch.randn_like(batch.actions)
            actions = fql.rollout(nets.velocity, batch.observations, z, z[:, :1] * 0, 6)
            others.append(nets.critic(batch.observations, actions).mean(0).numpy())
    assert np.allclose(q, all_q.numpy().mean(0))
    assert np.allclose(critics_differ, all_q.numpy().std(0))
    assert np.allclose(actions_differ, np.std(others, axis=0, ddof=1))
    slopes = []
    for shift in 1e-6 * torch.eye(3, dtype=torch.float64):
        with torch.no_grad():
            higher = nets.critic(batch.observations, batch.actions + shift).mean(0)
            lower = nets.critic(batch.observations, batch.actions - shift).mean(0)
        slopes.append((higher - lower).numpy() / 2e-6)
    assert np.allclose(gradient, np.linalg.norm(slopes, axis=0), rtol=1e-5)


@pytest.mark.slow
def test_q_of_trained_policies_falls_with_the_distance(tmp_path, data):
    runs = []
    for name in ("qflow", "fql"):
        run = tmp_path / name
        shutil.copytree(ROOT / f"results/policies/{name}-pointmaze-medium", run)
        set_dataset(run, data)
        runs.append(run)
    q_by_distance.main(tuple(runs), samples=1000, out=tmp_path)
    with open(tmp_path / "q_by_distance.csv") as file:
        rows = list(csv.DictReader(file))
    for run in runs:
        own = [row for row in rows if row["run"] == run.name]
        assert sum(int(row["samples"]) for row in own) == 1000
        assert float(own[0]["q"]) > -60 > -130 > float(own[-1]["q"])
    assert (tmp_path / "q_by_distance.png").exists()

    with pytest.raises(common.UserError, match="^--cells 0: must be at least 1"):
        q_by_distance.main(tuple(runs), cells=0)
    with pytest.raises(common.UserError, match="nowhere: "):
        q_by_distance.main((tmp_path / "nowhere",))


# --------------------------------------------------------------------------------------------- toy


@pytest.mark.parametrize(
    "name, point, expected",
    [
        ("swiss-roll", (3, 0), 1),
        ("swiss-roll", (0, -1.5), 0.25),
        ("two-spirals", (0, 0), 1),
        ("two-spirals", (np.pi, 0), 1 - 0.3 * np.pi),  # where the first arm ends
        ("two-spirals", (-np.pi, 0), 1 - 0.3 * np.pi),
        ("two-spirals", (-3.9, 3.9), 0),
        ("moons", (-1, 1.8), 0),  # the middle of the upper one
        ("moons", (1, -1.2), 1),
        ("eight-gaussians", (0, 2.8), 0),
        ("eight-gaussians", (-2, 2), 1 / 7),
        ("eight-gaussians", (-2.8, 0), 2 / 7),
        ("eight-gaussians", (2, 2), 1),
    ],
)
def test_rewards_at_known_points(name, point, expected):
    found = toy.reward(name, np.array([point], float))
    assert found == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize("name", toy.DATASETS)
def test_points_have_the_rewards_of_their_dataset(name):
    points = toy.sample_points(name, 4000, np.random.default_rng(0))
    rewards = toy.reward(name, points)
    assert points.shape == (4000, 2) and np.abs(points).max() <= 4
    # Mean rewards: r uniform, so E r^2 / 25 / 9 and the noise; E (1 - 0.3 r / 3) for r ~ sqrt(u),
    # of which the noise across the arm costs some 2 %; one half; the mean of k / 7.
    r = 1.5 * np.pi * (1 + 2 * np.linspace(0, 1, 10_001))
    expected = {
        "swiss-roll": ((r**2).mean() / 25 + 2 * 0.04) / 9,
        "two-spirals": 0.98 * (1 - 0.1 * 2 * np.pi),
        "moons": 0.5,
        "eight-gaussians": 0.5,
    }
    assert rewards.mean() == pytest.approx(expected[name], abs=0.03)
    fresh = toy.sample_points(name, 4000, np.random.default_rng(1))
    assert toy.is_off_data(fresh, points).mean() < 0.03
    assert toy.is_off_data(np.full((10, 2), 4.0), points).all()


def test_off_data_is_farther_than_the_datas_99th_percentile():
    line = np.stack([np.arange(1000.0), np.zeros(1000)], 1)
    line[:5, 1] = [100, 200, 300, 400, 500]  # a few outliers do not move the limit, which is 1
    samples = np.array([[500.5, 0], [500, 0.9], [500, 1.1], [-3, 0], [0, 101]])
    found = toy.is_off_data(samples, line)
    assert found.tolist() == [False, False, True, True, False]


def toy_batch():
    """A random batch of a bandit, and noise in units of actions."""
    torch.manual_seed(0)
    actions = torch.rand(16, 2) - 0.5
    ones = torch.ones(16)
    none = torch.zeros(16, 0)
    batch = common.Batch(none, actions, ones, 0 * ones, none, ones[:, None])
    return batch, toy.scale_noise(qflow.sample_noise(actions, None))


@pytest.fixture
def calls_of_fit(monkeypatch):
    """What toy.fit would have been called with, in place of training."""
    calls = []
    monkeypatch.setattr(toy, "fit", lambda *args: calls.append(args))
    return calls


def test_cloning_has_no_guidance(calls_of_fit):
    toy.clone(None, None, 20, 1e-3)
    ((_, loss, method, args, _, _, policy),) = calls_of_fit
    assert method is qflow and policy is fql
    nets = toy.make_networks(0)
    batch, noise = toy_batch()
    assert noise.policy_x0.std() < 0.4 and noise.policy_t.max() > 0.6
    total, _ = loss(nets, batch, noise, args)
    found = velocity_gradient(total, nets)
    flow_loss, _ = fql.flow_loss(nets, batch, noise.policy_x0, noise.policy_t)
    expected = velocity_gradient(flow_loss, nets)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("strength", [5.0, 0.3])
def test_the_strength_weighs_the_data_in_the_papers_units(calls_of_fit, strength):
    """Points are 4 times as long as actions; distances and velocities are then 4 times as large."""
    for name in toy.METHODS:
        toy.guide(None, name, strength, 1e-3, 20, None)
    nets = toy.make_networks(0)
    batch, noise = toy_batch()
    of_bptt, of_fql, of_qflow = calls_of_fit
    for (_, loss, noise_of, _, _, _, policy), method in zip(calls_of_fit, toy.METHODS.values()):
        assert loss is method.total_loss and policy is method and noise_of is method

    # Q-Flow: the target is x1 - x0 + grad V / s, all in the paper's units.
    args = of_qflow[3]
    obs, x, t = batch.observations, noise.policy_x0, noise.policy_t
    points = (4 * x).requires_grad_()
    (slope,) = torch.autograd.grad(nets.value(obs, points / 4, t).mean(0).sum(), points)
    in_actions = qflow.guidance(nets.value, obs, x, t) / args.lam
    assert torch.allclose(4 * in_actions, slope / strength, rtol=1e-4, atol=1e-6)

    # FQL: s / 2 |difference|^2 - Q. Backpropagation: s / 2 |v - (x1 - x0)|^2 - Q.
    differences = torch.rand(16, 2)
    in_points = strength / 2 * (4 * differences).square().sum(1).mean()
    for call in (of_fql, of_bptt):
        weighted = call[3].alpha * differences.square().mean()
        assert torch.allclose(weighted, in_points, rtol=1e-5)


@pytest.mark.slow
def test_the_toy_trains_draws_and_skips_what_is_there(tmp_path, monkeypatch):
    small = dict(hidden=(8, 8), flow_steps=2, batch_size=16)
    monkeypatch.setattr(toy, "SETTINGS", small)
    monkeypatch.setattr(toy, "NUM_POINTS", 200)
    monkeypatch.setattr(toy, "NUM_SAMPLES", 200)
    few = dict(imitation_updates=20, cloning_updates=20, guided_updates=20, out=tmp_path)
    toy.train(datasets=("swiss-roll",), seeds=(0, 1), **few)
    files = sorted(tmp_path.glob("runs/*/*"))
    assert len(files) == 2 * (3 + 9)
    times = [path.stat().st_mtime_ns for path in files]
    toy.train(datasets=("swiss-roll",), seeds=(0, 1), **few)
    assert [path.stat().st_mtime_ns for path in files] == times
    with pytest.raises(common.UserError, match="use another --out"):
        toy.train(datasets=("swiss-roll",), seeds=(2,), **few | dict(guided_updates=40))
    with pytest.raises(common.UserError, match="multiple of 20"):
        toy.train(**few | dict(guided_updates=30))

    problem = toy.make_problem("swiss-roll", 0)
    run = np.load(tmp_path / "runs/swiss-roll-seed0/Q-Flow-1.npz")
    assert np.allclose(run["paths"][0], 4 * problem.noise[:150], rtol=0, atol=1e-5)
    assert np.allclose(run["paths"][-1], run["samples"][:150], rtol=0, atol=1e-5)
    assert run["rewards"][-1] == toy.reward("swiss-roll", run["samples"]).mean()
    assert len(run["rewards"]) == 21

    toy.draw(tmp_path)
    with open(tmp_path / "table.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 + 9
    (row,) = (r for r in rows if (r["policy"], r["strength"]) == ("FQL", "0.3"))
    values = []
    for seed in (0, 1):
        samples = np.load(tmp_path / f"runs/swiss-roll-seed{seed}/FQL-0.3.npz")["samples"]
        values.append(toy.reward("swiss-roll", samples).mean())
    assert float(row["reward"]) == pytest.approx(np.mean(values), abs=1e-4)
    assert float(row["reward_std"]) == pytest.approx(np.std(values, ddof=1), abs=1e-4)
    assert rows[0]["policy"] == "fresh points of the data" and float(rows[0]["off_data"]) < 0.1
    for name in ("swiss-roll", "paths", "three-methods", "training"):
        assert (tmp_path / f"{name}.png").exists()


# ---------------------------------------------------------------------------------------- the costs


def test_the_methods_take_turns():
    calls = []
    updates = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = flow_steps.paired_milliseconds(updates, 4, torch.device("cpu"))
    assert calls == list("abc") * 7  # three rounds do not count
    assert {name: len(values) for name, values in times.items()} == dict(a=4, b=4, c=4)


@pytest.mark.slow
def test_backpropagation_keeps_every_step_and_q_flow_keeps_none(tmp_path, monkeypatch):
    timed = []
    paired_milliseconds = flow_steps.paired_milliseconds

    def keep_times(*args):
        times = paired_milliseconds(*args)
        timed.extend(times.values())  # in the order of the rows
        return times

    monkeypatch.setattr(flow_steps, "paired_milliseconds", keep_times)
    flow_steps.measure(widths=(128,), steps=(1, 50), rounds=2, out=tmp_path)
    with open(tmp_path / "cpu.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["K"], row["method"]) for row in rows[2:4]] == [("1", "BPTT"), ("50", "Q-Flow")]
    peak = {(row["method"], row["K"]): float(row["peak_mb"]) for row in rows}
    kept = 49 * 4 * 2 * 256 * 128 * 4 / 1e6  # MB: input and output of GELU, per step and layer
    assert 0.7 * kept < peak["BPTT", "50"] - peak["BPTT", "1"] < 2 * kept
    assert abs(peak["Q-Flow", "50"] - peak["Q-Flow", "1"]) < 0.3 * kept
    assert 0 < peak["Q-Flow", "1"] < 70  # what libraries allocate once, about 80, is not in it
    for row, (first, second) in zip(rows, timed, strict=True):
        low, high = sorted([round(first, 2), round(second, 2)])
        assert low <= float(row["ms_p10"]) <= float(row["ms_median"])
        assert float(row["ms_median"]) <= float(row["ms_p90"]) <= high
    conditions = json.loads((tmp_path / "cpu.json").read_text())
    assert conditions["threads"] == 1 and conditions["torch"] == torch.__version__
    assert (tmp_path / "cpu.png").exists()


@pytest.mark.parametrize("flag, value", [("rounds", 1), ("threads", 0)])
def test_flow_steps_names_the_wrong_flag(tmp_path, flag, value):
    with pytest.raises(common.UserError, match=f"^--{flag} {value}: must be"):
        flow_steps.measure(**{flag: value}, out=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_parts_of_an_online_step_add_up_to_it():
    settings = dict(hidden=(8, 8), batch_size=8, horizon=2)
    times = online_cost.measure(fql, POINTMAZE, settings, 20, torch.device("cpu"))
    parts = [times[name] for name in ("of it: environment", "resets", "acting", "append")]
    assert min(parts) > 0 and sum(parts) < times["online step"]


# ---------------------------------------------------------------------------------------- the tools


@pytest.mark.slow
def test_what_was_collected_online_can_be_written_and_trained_on(tmp_path, monkeypatch, data):
    def train(*flags):
        small = "--hidden 16 --batch-size 16 --eval-episodes 1".split()
        monkeypatch.setattr(sys, "argv", ["fql.py", *small, *map(str, flags)])
        fql.main()

    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    train("--dataset", data, "--offline-steps", 0, "--online-steps", 20, "--start-or-resume", run)
    export_online.main(run, tmp_path / "online.npz")

    transitions = ogbench.load_dataset(tmp_path / "online.npz")
    assert transitions["next_observations"].shape == (20, 2)
    assert transitions["terminals"].tolist() == [0] * 19 + [1]
    collected = common.read_checkpoint(run)["collected"]
    *_, env_id = common.resolve_task(POINTMAZE)
    dataset, source = common.load_dataset(tmp_path / "online.npz", env_id, "cpu")
    task = "pointmaze-medium-navigate-singletask-v0"
    assert source == f"collected online in {task}, seed 0; not the official file"
    assert len(dataset) == 20
    for column, tensor in collected.items():
        found = getattr(dataset, column)
        assert torch.allclose(found, tensor, rtol=0, atol=1.1e-5), column  # actions are clipped
    train("--dataset", "online.npz", "--offline-steps", 5)


def test_a_run_that_collected_nothing_has_nothing_to_export(tmp_path):
    run = ROOT / "results/policies/fql-pointmaze-medium"
    with pytest.raises(common.UserError, match=f"{run}: has collected nothing"):
        export_online.main(run, tmp_path / "online.npz")
    (tmp_path / "online.npz").touch()
    with pytest.raises(common.UserError, match="online.npz: exists already"):
        export_online.main(run, tmp_path / "online.npz")


@pytest.mark.parametrize(
    "tool, words, jobs",
    [
        (
            collect_antmaze,
            "antmaze-giant-navigate-v0 --transitions 20001",
            [("antmaze-giant-v0", 2001, [7, 0]), ("antmaze-giant-v0", 2001, [7, 1])],
        ),
        (collect_play, "scene-play-v0 --episodes 2", [("scene-v0", [7, 0]), ("scene-v0", [7, 1])]),
    ],
)
def test_each_part_of_a_collection_has_a_seed_of_its_own(tool, words, jobs, monkeypatch, tmp_path):
    pool = MagicMock()
    pool.return_value.__enter__.return_value.imap = lambda collect, jobs: [
        dict(job=np.array([str(job)])) for job in jobs
    ]
    monkeypatch.setattr(tool.multiprocessing, "Pool", pool)
    monkeypatch.setattr(sys, "argv", ["x", *words.split(), "--seed", "7", "--out", str(tmp_path)])
    tool.main()
    (path,) = tmp_path.iterdir()
    assert np.load(path)["job"].tolist() == [str(job) for job in jobs]


def test_cubes_are_stacked_with_the_probability_of_their_number():
    info = {"privileged/target_task": "cube"}
    env, oracle, rng = MagicMock(), MagicMock(done=True), MagicMock()
    env.reset.return_value = env.unwrapped.set_new_target.return_value = (0, info)
    env.step.return_value = (0, 0, False, True, info)
    oracle.select_action.return_value = np.zeros(5)
    rng.integers.return_value = 3
    rng.uniform = lambda low, high: (low, high)
    collect_play.play(env, dict(cube=oracle), rng, "visual-cube-double-v0")
    env.unwrapped.set_new_target.assert_called_once_with(p_stack=(0.0, 0.25))


@pytest.mark.parametrize(
    "y, z, hidden",
    [(0.28, 0.02, False), (0.29, 0.02, True), (-0.3, 0.02, True), (-0.3, 0.07, False)],
)
def test_a_cube_is_hidden_behind_the_window_or_before_the_drawer(y, z, hidden):
    qpos = np.zeros((3, 21))
    qpos[1, 15:17] = y, z  # in one row only
    assert collect_play.cube_is_hidden(qpos) == hidden


def test_weights_and_settings_are_what_is_copied(tmp_path):
    run = ROOT / "results/policies/qflow-pointmaze-medium"
    weights_only.main(run, tmp_path / "copy")
    nets, args = qflow.load(run)
    copied_nets, copied_args = qflow.load(tmp_path / "copy")
    assert copied_args == args
    for found, expected in zip(copied_nets.parameters(), nets.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == [
        "checkpoint.pt",
        "config.json",
    ]
    with pytest.raises(common.UserError, match="copy: exists already; remove it or choose another"):
        weights_only.main(run, tmp_path / "copy")


@pytest.mark.parametrize(
    "tool, flags, message",
    [
        (collect_play, "cube-single-play-v0 --episodes 0", "--episodes 0: must be positive"),
        (collect_play, "cube-none-play-v0", "cube-none-play-v0: must be one of"),
        (collect_antmaze, "antmaze-large-navigate-v0 --transitions 0", "--transitions 0: must be"),
        (collect_antmaze, "antmaze-none-navigate-v0", "antmaze-none-navigate-v0: MAZE is"),
        (collect_antmaze, "antmaze-large-navigate-v0 --seed -1", "--seed -1: must be at least 0"),
        (collect_play, "cube-single-play-v0 --seed -1", "--seed -1: must be at least 0"),
    ],
)
def test_a_mistake_in_collecting_is_named_in_one_line(monkeypatch, tool, flags, message):
    monkeypatch.setattr(sys, "argv", ["collect.py", *flags.split()])
    with pytest.raises(SystemExit, match=f"^{message}"):
        tool.main()


@pytest.mark.parametrize(
    "tool, name",
    [(collect_antmaze, "antmaze-large-navigate-v0"), (collect_play, "cube-single-play-v0")],
)
def test_what_cannot_be_written_is_known_before_collecting(monkeypatch, tmp_path, tool, name):
    monkeypatch.setattr(tool, "collect", None)
    path = tmp_path / f"{name}.npz"
    path.write_text("a file of hours")
    monkeypatch.setattr(sys, "argv", ["collect.py", name, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=f"{path}: exists already"):
        tool.main()
    monkeypatch.setattr(sys, "argv", ["collect.py", name, "--out", str(path)])
    with pytest.raises(common.UserError, match=f"{path}: cannot write there"):
        tool.main()
    assert path.read_text() == "a file of hours"


@pytest.mark.parametrize("tool", [collect_antmaze, collect_play])
def test_collecting_uses_the_cores_that_it_may_use(monkeypatch, tool):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5})
    assert tool.num_cores() == 2


@pytest.mark.slow
def test_a_puzzle_with_flipped_buttons_moves_as_the_puzzle_does(tmp_path, monkeypatch, capsys):
    env, oracles = collect_play.make("puzzle-3x3-v0")
    rows = collect_play.play(env, oracles, np.random.default_rng(0), "puzzle-3x3-v0")
    data = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    common.write_dataset(tmp_path / "data.npz", "a test", data)
    flipped = flip_buttons.flip(data, np.arange(9) % 3 == 0)
    env.reset(seed=0)
    env.unwrapped.set_state(*(flipped[name][0] for name in ("qpos", "qvel", "button_states")))
    for action, expected in zip(flipped["actions"][:100], flipped["observations"][1:101]):
        np.testing.assert_allclose(env.step(action)[0], expected, atol=1e-4)
    assert len(np.unique(flipped["button_states"][:100], axis=0)) > 2  # there were presses

    monkeypatch.setattr(sys, "argv", ["", f"{tmp_path}/data.npz", f"{tmp_path}/new/out.npz"])
    tyro.cli(flip_buttons.main)
    counts = flip_buttons.visits(data["button_states"], data["terminals"])
    assert f"flipped, {counts.max()} times\n" in capsys.readouterr().out
    written = dict(np.load(tmp_path / "new/out.npz"))
    goal = np.array([1, 1, 0, 1, 0, 1, 0, 1, 1])
    states = written["button_states"]
    arrivals = (states[1:] == goal).all(1) & (states[:-1] != goal).any(1)
    assert arrivals.sum() == counts.max()
    assert (before_the_goal.button_states(written["observations"]) == states).all()

    # Two updates of IFQL, and what its critic says before the goal.
    settings = dict(hidden=(8, 8), steps=2, eval_interval=2, eval_episodes=1)
    ifql.main(ifql.Args(str(tmp_path / "new/out.npz"), **settings))
    printed = capsys.readouterr().out
    assert re.match(r"2 updates: success 0%\n\nthe task switches \[0 1 3 5 7 8\]; ", printed)
    rows = re.findall(r"^\| (all|data|flow|best of flow)\b.*?((?: -?\d+ \|){4})$", printed, re.M)
    assert [name for name, _ in rows] == ["all", "data", "flow", "best of flow"]
    assert rows[0][1] == rows[1][1]

    # What the critic of a run says: Q-Flow's policy is its flow, FQL's is another network.
    flags = f"--env puzzle-3x3-play-v0 --dataset {tmp_path}/new/out.npz --sparse --task 1"
    flags += " --horizon 5 --hidden 8 8 --offline-steps 2 --eval-episodes 1 --start-or-resume"
    for script in ("qflow.py", "fql.py"):
        run = tmp_path / script
        subprocess.run([sys.executable, ROOT / script, *flags.split(), run], check=True)
        capsys.readouterr()
        before_the_goal.main(run, tmp_path / "new/out.npz")
        printed = capsys.readouterr().out
        assert ("| best of policy |" in printed) == (script == "fql.py")
        assert "| best of flow |" in printed


@pytest.mark.slow
def test_training_on_arrays_of_ones_own(tmp_path):
    command = [sys.executable, ROOT / "results/own_data.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert re.search(r"^action \[.*\]$", result.stdout, re.M), result.stderr
    assert (tmp_path / "runs/own-pendulum/curve.png").exists()


TOOLS = ["collect_antmaze", "collect_play", "curves", "evaluate", "export_online", "sweep"]


@pytest.mark.slow
@pytest.mark.parametrize("tool", [*TOOLS, "table", "weights_only"])
def test_a_tool_can_be_called_by_a_path_with_two_dots(tool):
    command = [sys.executable, f"../{tool}.py", "--help"]
    result = subprocess.run(command, cwd=ROOT / "results/toy", capture_output=True, text=True)
    assert result.returncode == 0 and "usage" in result.stdout, result.stderr


# ---------------------------------------------------------------------------------------- the text


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("results/**/*.md"))]


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_linked_files_and_sections_exist(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not link.startswith("https://"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_scripts_that_commands_name_exist(page):
    for path in re.findall(r"\bpython ((?:\w[\w/-]*/)?\w+\.py)", page.read_text()):
        assert (ROOT / path).exists(), path


def test_every_experiment_is_in_the_index():
    linked = re.findall(r"\]\(([\w-]+)", (ROOT / "results/README.md").read_text())
    folders = [path.name for path in (ROOT / "results").iterdir() if path.is_dir()]
    assert {name for name in folders if not name.startswith("__")} <= set(linked)
