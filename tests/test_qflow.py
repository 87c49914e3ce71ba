"""Q-Flow's rollout, losses, evaluation and training; parity with the authors is in test_parity."""

import csv
import shutil
import types
from dataclasses import replace
from unittest.mock import MagicMock

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import common
import fql
import qflow

SMALL = dict(hidden=(32, 32), time_dim=8, flow_steps=5)
CPU = torch.device("cpu")


def make(batch_size=16, obs_dim=4, action_dim=3, horizon=1, **settings):
    """Small networks, a random batch and random draws, in float64: there no rounding shows.

    allclose and approx allow 1e-5 or 1e-6 of a number by default, a thousand million times what is
    rounded, on any CPU.
    """
    torch.manual_seed(0)
    args = qflow.Args(**{**SMALL, **settings}, horizon=horizon, batch_size=batch_size)
    chunk_dim = action_dim * horizon
    nets = qflow.Networks(obs_dim, chunk_dim, args)
    batch = common.Batch(
        observations=torch.randn(batch_size, obs_dim),
        actions=torch.rand(batch_size, chunk_dim) * 2 - 1,
        rewards=torch.randn(batch_size),
        masks=(torch.rand(batch_size) > 0.3).float(),
        next_observations=torch.randn(batch_size, obs_dim),
        valid=torch.ones(batch_size, horizon),
    )
    draws = qflow.draw(batch.actions, None)
    return args, nets.double(), convert(batch, torch.float64), convert(draws, torch.float64)


def convert(tensors, *target):
    """A Batch or Draws of another type, or on another device."""
    return type(tensors)(*(x.to(*target) for x in tensors))


# ------------------------------------------------------------------------------------- networks


def test_every_member_starts_as_a_xavier_uniform_network_of_its_own():
    nets = qflow.Networks(29, 8, qflow.Args())
    for name, p in nets.state_dict().items():
        if name.endswith("weight"):
            bound = (6 / (p.shape[1] + p.shape[2])) ** 0.5
            for member in p:
                assert 0.97 * bound < member.abs().max() <= bound
                assert member.std() == pytest.approx(bound / 3**0.5, rel=0.1)
            assert len(p) == 1 or not torch.equal(p[0], p[1])
        else:
            assert (p == name.endswith("scale")).all()
    for target, online in zip(nets.target_critic.parameters(), nets.critic.parameters()):
        assert torch.equal(target, online) and online.requires_grad > target.requires_grad
    assert sum(p.numel() for p in nets.velocity.parameters()) == (39 + 3 * 513) * 512 + 513 * 8


# -------------------------------------------------------------------------------------- rollout


def test_rollout_is_eulers_method():
    x = torch.rand(7, 3, dtype=torch.float64) - 0.5
    start = torch.zeros(7, 1, dtype=torch.float64)
    for k in (1, 3, 10):
        calls = []

        def field(obs, x, t, calls=calls):
            calls.append(t.flatten().tolist())
            return -x

        out = qflow.rollout(field, None, x, start, k)
        assert torch.allclose(out, x * (1 - 1 / k) ** k)
        assert np.allclose(calls, np.repeat(np.arange(k) / k, 7).reshape(k, 7))
        nets = types.SimpleNamespace(velocity=lambda obs, x, t: -x)
        args = qflow.Args(flow_steps=k)
        assert torch.equal(out, qflow.sample_actions(nets, None, x, args))
        by_time = qflow.rollout(lambda o, x, t: t.expand_as(x), None, x, start, k)
        assert torch.allclose(by_time, x + (k - 1) / (2 * k))


def test_rollout_converges_to_the_exact_flow():
    # dx/dt = -x + t has the solution x(t) = t - 1 + C e^-t
    x = torch.tensor([[0.3], [-0.2], [0.8]], dtype=torch.float64)
    t = torch.tensor([[0.0], [0.37], [0.95]], dtype=torch.float64)
    exact = 0 + (x - t + 1) * torch.exp(t - 1)
    field = lambda obs, x, t: t - x
    errors = [(qflow.rollout(field, None, x, t, k) - exact).abs().max() for k in (8, 16, 32)]
    assert errors[0] < 0.05
    assert 1.7 < errors[0] / errors[1] < 2.3 and 1.7 < errors[1] / errors[2] < 2.3


def test_rollout_from_any_time_ends_at_one_and_is_clipped():
    t = torch.tensor([[0.0], [0.05], [0.31], [0.5], [0.999], [1.0]], dtype=torch.float64)
    x = torch.zeros(6, 2, dtype=torch.float64)
    ones = lambda obs, x, t: torch.full_like(x, 0.9)
    out = qflow.rollout(ones, None, x, t, 10)
    assert torch.allclose(out, (0.9 * (1 - t)).expand(6, 2))
    assert qflow.rollout(lambda o, x, t: 9 + 0 * x, None, x, t, 10)[:4].eq(1).all()


# --------------------------------------------------------------------------------------- losses


def test_each_loss_trains_its_own_network_only():
    args, nets, batch, draws = make()
    xt, t = draws.value_x0, draws.value_t
    targets = lambda: qflow.targets(nets, batch, draws.next_x0, xt, t, args)
    losses = {
        "critic": lambda: qflow.critic_loss(nets, batch, targets()[0])[0],
        "value": lambda: qflow.value_loss(nets, batch, xt, t, targets()[1], args)[0],
        "velocity": lambda: qflow.policy_loss(nets, batch, *draws[3:], args)[0],
    }
    for own, loss in losses.items():
        nets.zero_grad()
        loss().backward()
        for name, parameter in nets.named_parameters():
            got = parameter.grad is not None and parameter.grad.abs().sum() > 0
            assert got == name.startswith(f"{own}."), (own, name)


def test_guidance_is_the_gradient_of_each_samples_own_value():
    args, nets, batch, draws = make()
    s, x, t = batch.observations, draws.policy_x0, draws.policy_t
    gradient = qflow.guidance(nets.value, s, x, t)
    assert not gradient.requires_grad
    for j in range(x.shape[1]):
        step = torch.zeros_like(x)
        step[:, j] = 1e-5
        with torch.no_grad():
            slope = (nets.value(s, x + step, t) - nets.value(s, x - step, t)).mean(0) / 2e-5
        assert torch.allclose(gradient[:, j], slope, atol=1e-8)


def test_chunks_cut_short_by_the_episodes_end_do_not_count():
    args, nets, batch, draws = make(horizon=3)
    valid = batch.valid.clone()
    valid[4:, -1] = 0
    part = common.Batch(*(x[:4] for x in batch))
    part_draws = qflow.Draws(*(x[:4] for x in draws))
    loss, _ = qflow.total_loss(nets, batch._replace(valid=valid), draws, args)
    alone, _ = qflow.total_loss(nets, part, part_draws, args)
    assert torch.allclose(loss, alone * 4 / 16)


def test_chunks_bootstrap_with_the_discount_of_their_length():
    args, nets, batch, draws = make(horizon=3, discount=0.9)
    xt, t = draws.value_x0, draws.value_t
    target, _ = qflow.targets(nets, batch, draws.next_x0, xt, t, args)
    a = qflow.sample_actions(nets, batch.next_observations, draws.next_x0, args)
    q = nets.target_critic(batch.next_observations, a).mean(0)
    assert torch.allclose(target, batch.rewards + 0.9**3 * batch.masks * q)


@pytest.mark.parametrize("num_critics", [1, 2, 5])
def test_q_and_v_have_as_many_heads_as_asked_and_each_is_trained(num_critics):
    args, nets, batch, draws = make(num_critics=num_critics)
    q = nets.critic(batch.observations, batch.actions)
    v = nets.value(batch.observations, batch.actions, draws.value_t)
    assert q.shape == v.shape == (num_critics, 16)
    qflow.total_loss(nets, batch, draws, args)[0].backward()
    for net in (nets.critic, nets.value):
        for name, parameter in net.named_parameters():
            assert len(parameter) == num_critics
            assert (parameter.grad.flatten(1).abs().amax(1) > 0).all(), name


def test_pessimism_is_in_the_targets_and_nowhere_else():
    args, nets, batch, draws = make(num_critics=5, rho=0.7)
    xt, t, s = draws.value_x0, draws.value_t, batch.observations
    target, value_target = qflow.targets(nets, batch, draws.next_x0, xt, t, args)

    def pessimistic(obs, actions):
        q = nets.target_critic(obs, actions)
        mean = q.sum(0) / 5
        variance = ((q - mean) ** 2).sum(0) / 5  # the population's
        assert variance.min() > 1e-4
        return mean - 0.7 * variance**0.5

    with torch.no_grad():
        a = qflow.sample_actions(nets, batch.next_observations, draws.next_x0, args)
        next_q = pessimistic(batch.next_observations, a)
        x1 = qflow.rollout(nets.velocity, s, xt, t, args.flow_steps)
        assert torch.allclose(value_target, pessimistic(s, x1))
    assert torch.allclose(target, batch.rewards + args.discount * batch.masks * next_q)

    loss, _ = qflow.value_loss(nets, batch, xt, t, value_target, args)
    v = nets.value(s, xt, t).sum(0) / 5
    assert torch.allclose(loss, ((v - value_target) ** 2).mean())
    without = replace(args, rho=0.0)
    losses = [qflow.policy_loss(nets, batch, *draws[3:], a)[0] for a in (args, without)]
    assert torch.equal(*losses)


def test_one_rollout_for_both_targets_is_two_rollouts():
    for q_agg in ("mean", "min"):
        args, nets, batch, draws = make(q_agg=q_agg)
        xt, t, s = draws.value_x0, draws.value_t, batch.observations
        both = qflow.targets(nets, batch, draws.next_x0, xt, t, args)
        with torch.no_grad():
            a = qflow.sample_actions(nets, batch.next_observations, draws.next_x0, args)
            next_q = qflow.aggregate(nets.target_critic(batch.next_observations, a), q_agg)
            x1 = qflow.rollout(nets.velocity, s, xt, t, args.flow_steps)
            alone = qflow.aggregate(nets.target_critic(s, x1), q_agg)
        td = batch.rewards + args.discount * batch.masks * next_q
        assert torch.allclose(both[0], td) and torch.allclose(both[1], alone)


def test_gelu_is_the_same_with_and_without_gradients():
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        # A dozen operations, each rounded; and the tail, where exp(2u) multiplies the error of 2u,
        # is below the absolute part.
        tolerance = 32 * torch.finfo(dtype).eps
        y = x.to(dtype, copy=True)
        with torch.no_grad():
            fast = qflow.GELU()(y)
        assert torch.equal(y, x.to(dtype)) and fast.dtype == dtype
        assert torch.allclose(fast, qflow.GELU()(y), rtol=tolerance, atol=tolerance)
        exact = torch.nn.functional.gelu(x, approximate="tanh")
        assert torch.allclose(fast.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_loss_compiles_into_one_graph_and_computes_the_same():
    args, nets, batch, draws = make(horizon=3, q_agg="min", hidden=(8, 8), flow_steps=2)
    compiled = torch.compile(qflow.total_loss, fullgraph=True)
    results = []
    for function in (qflow.total_loss, compiled):
        nets.zero_grad()
        loss, metrics = function(nets, batch, draws, args)
        loss.backward()
        gradients = [p.grad.clone() for p in nets.parameters() if p.requires_grad]
        results.append([loss.detach(), *metrics.values(), *gradients])
    for plain, other in zip(*results):
        assert torch.allclose(plain, other)


def train_on_two_modes(lam, updates):
    """A bandit without state, actions near -0.6 (reward -1) and 0.6 (reward 1); returns samples."""
    sizes = dict(obs_dim=1, action_dim=1, hidden=(64, 64), flow_steps=10)
    args, nets, _, _ = make(**sizes, lam=lam, lr=2e-3, tau=0.05)
    nets.float()
    optimizer = qflow.make_optimizer(nets, args)
    generator = torch.Generator().manual_seed(0)
    zeros = torch.zeros(256, 1)
    losses = []
    for _ in range(updates):
        sign = torch.randint(2, (256, 1), generator=generator) * 2.0 - 1
        actions = 0.6 * sign + 0.05 * torch.randn(256, 1, generator=generator)
        batch = common.Batch(zeros, actions, sign[:, 0], zeros[:, 0], zeros, zeros + 1)
        metrics = qflow.update(nets, optimizer, batch, qflow.draw(actions, generator), args)
        losses.append([metrics[f"{name}_loss"].item() for name in ("critic", "value", "policy")])
    with torch.no_grad():
        x0 = torch.randn(2000, 1, generator=generator)
        samples = qflow.sample_actions(nets, torch.zeros(2000, 1), x0, args)
    return samples, np.mean(losses[:5], 0), np.mean(losses[-50:], 0)


# Rounding grows in hundreds of updates until it is a training with another seed. The bounds leave
# twice the room that four seeds needed.


def test_losses_fall_and_two_modes_are_cloned_as_two_modes():
    samples, early, late = train_on_two_modes(lam=1e6, updates=600)
    assert (late < 0.75 * early).all()  # flow matching keeps an error that no field can remove
    assert late[0] < 0.05
    assert (samples.abs() - 0.6).abs().lt(0.2).float().mean() > 0.6
    assert samples.abs().lt(0.3).float().mean() < 0.25  # a single Gaussian would have 0.36 there
    assert 0.4 < samples.gt(0).float().mean() < 0.6


def test_guidance_moves_the_policy_to_the_better_mode():
    samples, _, _ = train_on_two_modes(lam=0.2, updates=400)
    assert samples.gt(0).float().mean() > 0.9


# ----------------------------------------------------------------------------------- evaluation


class Script(gymnasium.Env):
    """Half of the episodes succeed in 1 step, the others fail in 7; keeps the actions it got."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def __init__(self):
        self.episodes = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.short = self.np_random.random() < 0.5
        self.episodes.append([])
        return np.zeros(1, np.float32), {}

    def step(self, action):
        actions = self.episodes[-1]
        actions.append(action.tolist())
        obs = np.full(1, len(actions), np.float32)
        over = len(actions) >= (1 if self.short else 7)
        info = {"success": np.bool_(self.short)}
        return obs, np.float64(1), over and self.short, over and not self.short, info


@pytest.mark.parametrize("horizon", [1, 3])
def test_evaluation_gives_each_environment_its_share_and_runs_chunks_open_loop(horizon):
    envs = SyncVectorEnv([Script] * 3, autoreset_mode=AutoresetMode.SAME_STEP)

    def policy(obs):  # an action says which step of the episode it was planned at, and its place
        actions = np.zeros((3, horizon, 2))
        actions[..., 0] = obs / 10
        actions[..., 1] = np.arange(horizon) / 10
        return actions

    results = qflow.evaluate(policy, envs, 200, seed=1)
    result = {name: values.mean() for name, values in results.items()}
    shares, outcomes = (67, 67, 66), []
    for env, share in zip(envs.envs, shares):
        assert len(env.episodes) > share
        for actions in env.episodes[:share]:
            outcomes.append((len(actions) == 1, len(actions)))
            for step, (planned, place) in enumerate(actions):
                assert planned == pytest.approx(step // horizon * horizon / 10)
                assert place == pytest.approx(step % horizon / 10)
    success, length = np.mean(outcomes, 0)
    assert result == pytest.approx({"success": success, "return": length, "length": length})
    assert 0.4 < success < 0.6
    again = qflow.evaluate(policy, envs, 200, seed=1)
    assert all(np.array_equal(again[name], results[name]) for name in results)
    assert len(results["return"]) == 200
    envs.close()


def test_evaluation_without_success_is_nan_not_zero():
    envs = qflow.make_envs(lambda: gymnasium.make("Pendulum-v1"), 2)
    policy = lambda obs: np.zeros((2, 1, 1))
    result = qflow.evaluate(policy, envs, 3, seed=0)
    envs.close()
    assert np.isnan(result["success"]).all() and (result["length"] == 200).all()
    assert result["return"].shape == (3,) and result["return"].max() < -100


# --------------------------------------------------------------------------------- environments


def test_reset_without_a_seed_draws_a_new_episode():
    env = qflow.SeededReset(gymnasium.make("Pendulum-v1"))
    first, info = env.reset()
    assert env.observation_space.contains(first) and info == {}
    second, _ = env.reset()
    assert not np.array_equal(first, second)

    envs = qflow.make_envs(lambda: gymnasium.make("Pendulum-v1"), 2)
    first, _ = envs.reset()
    second, _ = envs.reset()
    envs.close()
    starts = np.concatenate([first, second])
    assert len(np.unique(starts, axis=0)) == 4  # in two processes, too


def test_an_environment_is_made_once_and_every_process_has_a_copy():
    made = []

    class Closing(Script):
        def close(self):
            self.reset = None  # of no use any more

    def make_env():
        made.append(Closing())
        return made[-1]

    envs = qflow.make_envs(make_env, 3)
    envs.reset(seed=[0, 1, 2])
    ends = []
    for _ in range(7):
        _, _, terminated, truncated, _ = envs.step(np.zeros((3, 2)))
        ends.append(terminated | truncated)
    envs.close()
    assert len(made) == 1 and made[0].episodes == []  # played in the other processes only
    assert len(np.unique(ends, axis=1).T) > 1  # each on its own


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", [qflow, fql])
@pytest.mark.parametrize("horizon", [1, 3])
def test_the_collector_plays_chunks_open_loop_and_appends_each_step(method, horizon):
    env = Script()
    one = np.array([1, 0])
    dataset = common.Dataset(np.zeros((2, 1)), np.zeros((2, 2)), one, one, one)
    dataset.reserve(60)

    def policy(obs):  # which step an action was planned at, and its place in the chunk
        assert obs.shape == (1, 1)
        return np.stack([np.full(horizon, obs[0, 0] / 10), np.arange(horizon) / 10], 1)[None]

    collector = method.Collector(env, policy, dataset)
    assert np.isnan(list(collector.results().values())).all() and env.episodes == []
    for i in range(60):
        collector.step(seed=i)
    added = dataset.collected()
    ends = np.flatnonzero(added["valids"].numpy() == 0)
    assert len(ends) == len(env.episodes) and len(added["valids"]) == 60 + len(ends)
    first = 0
    for actions, end in zip(env.episodes, ends):
        n = len(actions)
        steps = np.arange(n)
        planned = np.stack([steps // horizon * horizon, steps % horizon], 1) / 10
        assert np.allclose(actions, planned) and np.allclose(added["actions"][first:end], planned)
        assert added["observations"][first : end + 1, 0].tolist() == list(range(n + 1))
        if n == 1 and end != ends[-1]:
            assert added["masks"][first] == 0  # terminated
        elif n == 7:
            assert added["masks"][first:end].all()  # time is up
        first = end + 1
    lengths = [len(actions) for actions in env.episodes]
    if collector.obs is not None:
        lengths.pop()  # in progress
    assert set(lengths) == {1, 7}
    results = collector.results()
    assert results["train_return"] == pytest.approx(np.mean(lengths))
    assert results["train_success"] == pytest.approx(np.mean([n == 1 for n in lengths]))
    assert all(type(x) is float for x in results.values())  # a checkpoint cannot hold NumPy's
    assert np.isnan(collector.results()["train_success"])

    other = Script()  # the same seeds, the same episodes
    dataset.reserve(60)
    collector = method.Collector(other, policy, dataset)
    for i in range(60):
        collector.step(seed=i)
    assert other.episodes == env.episodes


def test_the_same_seed_gives_the_same_curve(tmp_path, monkeypatch):
    path = tmp_path / "data.npz"
    common.collect_pointmaze("pointmaze-medium-navigate-v0", path, num_episodes=2, workers=1)
    *_, env_id = common.resolve_task("pointmaze-medium-navigate-v0")

    calls = []
    for owner, name in ((qflow.Collector, "step"), (qflow, "update")):
        original = getattr(owner, name)

        def noted(*args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    def train(name, disturb, seed=0, log_interval=5):
        dataset, _ = common.load_dataset(path, env_id, "cpu")
        torch.manual_seed(disturb)
        np.random.seed(disturb)
        args = qflow.Args(
            **SMALL,
            seed=seed,
            horizon=2,
            offline_steps=25,
            online_steps=70,
            eval_interval=50,
            eval_episodes=3,
            log_interval=log_interval,
        )

        def make_env():
            return gymnasium.make(env_id, max_episode_steps=30)

        envs = qflow.make_envs(make_env, 2)
        with common.Run(tmp_path / name, dict(script="qflow.py", args=vars(args))) as run:
            nets = qflow.train(args, dataset, qflow.SeededReset(make_env()), envs, run)
        envs.close()
        files = {}
        for file_name in ("train.csv", "eval.csv"):
            with open(run.folder / file_name) as file:
                rows = list(csv.DictReader(file))
            for row in rows:
                row.pop("time_updates_per_s", None)
            files[file_name] = rows
        return files, nets, run.folder

    files, nets, folder = train("run", disturb=1)
    assert calls == ["update"] * 25 + ["step", "update"] * 70
    again, _, _ = train("again", disturb=2)
    other, _, _ = train("other", disturb=1, seed=1)
    often, its_nets, _ = train("often", disturb=3, log_interval=4)
    assert files == again and files["train.csv"] != other["train.csv"]
    assert often["eval.csv"] == files["eval.csv"]
    assert all(torch.equal(x, y) for x, y in zip(nets.parameters(), its_nets.parameters()))
    assert [int(row["step"]) for row in files["train.csv"]] == list(range(5, 96, 5))
    steps = sorted({*range(4, 96, 4), 25, 50, 95})
    assert [int(row["step"]) for row in often["train.csv"]] == steps
    assert [row["step"] for row in files["eval.csv"]] == ["25", "50", "95"]  # 25: the switch
    returns = {int(row["step"]): float(row["train_return"]) for row in files["train.csv"]}
    assert {step: x for step, x in returns.items() if not np.isnan(x)} == {55: -30, 85: -30}
    assert [row["train_success"] for row in files["train.csv"]].count("0.0") == 2
    assert list(files["eval.csv"][0]) == ["step", "episodes", "success", "return", "length"]
    assert all(0 <= float(row["success"]) <= 1 for row in files["eval.csv"])

    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 95 and {"nets", "optimizer"} < set(state)
    collected = state["collected"]
    assert collected["valids"].tolist() == ([1] * 30 + [0]) * 2 + [1] * 10 + [0]
    starts = collected["observations"][[0, 31, 62]]
    assert len(starts.unique(dim=0)) == 3  # episodes have seeds of their own
    for name, value in nets.state_dict().items():
        assert torch.equal(state["nets"][name], value)


def test_a_cuda_graph_runs_three_times_records_once_and_then_replays(monkeypatch):
    for name in ("CUDAGraph", "Stream", "current_stream", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    graph = torch.cuda.CUDAGraph.return_value
    replays_before = []  # at each time that the function runs

    def function():
        replays_before.append(graph.replay.call_count)
        return len(replays_before)

    generator = object()
    captured = qflow.CUDAGraph(function, generator)
    assert [captured() for _ in range(7)] == [1, 2, 3, 4, 4, 4, 4]
    assert replays_before == [0, 0, 0, 0] and graph.replay.call_count == 4
    graph.register_generator_state.assert_called_once_with(generator)
    torch.cuda.graph.assert_called_once_with(graph, stream=torch.cuda.Stream.return_value)
