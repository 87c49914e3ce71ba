"""Q-Flow's rollout, losses, evaluation and training; parity with the authors is in test_parity.

Blocks that the scripts share are tested here only; test_shared_blocks shows that they are the same.
"""

import shutil
import types
from unittest.mock import MagicMock, call

import gymnasium
import numpy as np
import pytest
import torch

import common
import fql
import qflow

SMALL = dict(hidden=(32, 32), time_dim=8, flow_steps=5)


def make(batch_size=16, obs_dim=4, action_dim=3, horizon=1, **settings):
    """Small networks, a random batch and noise, in float64.

    Rounding errors of float64 are far below the default tolerances of allclose and approx.
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
    noise = qflow.sample_noise(batch.actions, None)
    return args, nets.double(), convert(batch, torch.float64), convert(noise, torch.float64)


def convert(tensors, *target):
    """A Batch or Noise as another type or on another device."""
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
    args, nets, batch, noise = make()
    xt, t = noise.value_x0, noise.value_t
    targets = lambda: qflow.targets(nets, batch, noise.next_x0, xt, t, args)
    losses = {
        "critic": lambda: qflow.critic_loss(nets, batch, targets()[0])[0],
        "value": lambda: qflow.value_loss(nets, batch, xt, t, targets()[1], args)[0],
        "velocity": lambda: qflow.policy_loss(nets, batch, *noise[3:], args)[0],
    }
    for own, loss in losses.items():
        nets.zero_grad()
        loss().backward()
        for name, parameter in nets.named_parameters():
            got = parameter.grad is not None and parameter.grad.abs().sum() > 0
            assert got == name.startswith(f"{own}."), (own, name)


def test_guidance_is_the_gradient_of_each_samples_own_value():
    args, nets, batch, noise = make()
    s, x, t = batch.observations, noise.policy_x0, noise.policy_t
    gradient = qflow.guidance(nets.value, s, x, t)
    assert not gradient.requires_grad
    for j in range(x.shape[1]):
        step = torch.zeros_like(x)
        step[:, j] = 1e-5
        with torch.no_grad():
            slope = (nets.value(s, x + step, t) - nets.value(s, x - step, t)).mean(0) / 2e-5
        assert torch.allclose(gradient[:, j], slope, atol=1e-8)


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(q_agg="min", horizon=3), dict(num_critics=5, rho=0.7, horizon=3)],
    ids=["mean", "min", "rho"],
)
def test_targets_are_the_ensembles_value_of_the_ends_of_the_flow(settings):
    args, nets, batch, noise = make(discount=0.9, **settings)
    obs, next_obs, t = batch.observations, batch.next_observations, noise.value_t
    xt = noise.value_x0

    def ensemble_value(obs, actions):
        q = nets.target_critic(obs, actions)
        if args.q_agg == "min":
            return q.min(0).values
        mean = q.sum(0) / len(q)
        variance = ((q - mean) ** 2).sum(0) / len(q)  # the population's
        assert variance.min() > 1e-9
        return mean - args.rho * variance**0.5

    with torch.no_grad():
        next_actions = qflow.sample_actions(nets, next_obs, noise.next_x0, args)
        y = qflow.rollout(nets.velocity, obs, xt, t, args.flow_steps)
        next_q = ensemble_value(next_obs, next_actions)
        expected = batch.rewards + 0.9**args.horizon * batch.masks * next_q
        q_target, v_target = qflow.targets(nets, batch, noise.next_x0, xt, t, args)
    assert torch.allclose(q_target, expected)
    assert torch.allclose(v_target, ensemble_value(obs, y))


@pytest.mark.parametrize("q_agg", ["mean", "min"])
def test_losses_are_regressions_and_chunks_cut_short_have_no_weight(q_agg):
    args, nets, batch, noise = make(horizon=3, q_agg=q_agg, num_critics=4, lam=0.3)
    valid = torch.ones(16, 3, dtype=torch.float64)
    valid[5:, -1] = 0
    valid[9:, -2] = 0
    batch = batch._replace(valid=valid)
    obs, actions = batch.observations, batch.actions
    x0, t = noise.policy_x0, noise.policy_t
    xt = (1 - t) * x0 + t * actions
    target = torch.randn(16, dtype=torch.float64)

    loss, _ = qflow.critic_loss(nets, batch, target)
    error = nets.critic(obs, actions) - target
    assert torch.allclose(loss, (error[:, :5] ** 2).sum() / (4 * 16))

    loss, _ = qflow.value_loss(nets, batch, xt, t, target, args)
    heads = nets.value(obs, xt, t)
    v = heads.min(0).values if q_agg == "min" else heads.sum(0) / 4
    assert torch.allclose(loss, ((v - target)[:5] ** 2).sum() / 16)

    loss, _ = qflow.policy_loss(nets, batch, x0, t, args)
    x = xt.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nets.value(obs, x, t).sum() / 4, x)  # the mean, always
    error = nets.velocity(obs, xt, t) - (actions - x0 + gradient / 0.3)
    assert torch.allclose(loss, (error[:5] ** 2).sum() / (16 * 9))


def test_each_random_number_has_one_use():
    args, nets, batch, noise = make()
    xt = (1 - noise.value_t) * noise.value_x0 + noise.value_t * batch.actions
    q_target, v_target = qflow.targets(nets, batch, noise.next_x0, xt, noise.value_t, args)
    q_loss, _ = qflow.critic_loss(nets, batch, q_target)
    v_loss, _ = qflow.value_loss(nets, batch, xt, noise.value_t, v_target, args)
    pi_loss, _ = qflow.policy_loss(nets, batch, noise.policy_x0, noise.policy_t, args)
    loss, metrics = qflow.total_loss(nets, batch, noise, args)
    assert torch.allclose(loss, q_loss + v_loss + pi_loss)
    expected = dict(critic_loss=q_loss, value_loss=v_loss, policy_loss=pi_loss)
    for name, value in expected.items():
        assert torch.equal(metrics[name], value.detach())
    flat = torch.cat([x.flatten() for x in qflow.sample_noise(batch.actions, None)])
    assert len(flat.unique()) == len(flat)


@pytest.mark.parametrize("num_critics", [1, 5])
def test_q_and_v_have_as_many_heads_as_asked_and_each_is_trained(num_critics):
    args, nets, batch, noise = make(num_critics=num_critics)
    q = nets.critic(batch.observations, batch.actions)
    v = nets.value(batch.observations, batch.actions, noise.value_t)
    assert q.shape == v.shape == (num_critics, 16)
    qflow.total_loss(nets, batch, noise, args)[0].backward()
    for net in (nets.critic, nets.value):
        for name, parameter in net.named_parameters():
            assert len(parameter) == num_critics
            assert (parameter.grad.flatten(1).abs().amax(1) > 0).all(), name


@pytest.mark.slow
def test_the_loss_compiles_into_one_graph_and_computes_the_same():
    args, nets, batch, noise = make(horizon=3, q_agg="min", hidden=(8, 8), flow_steps=2)
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    compiled = torch.compile(qflow.total_loss, fullgraph=True, backend=backend)
    results = []
    for function in (qflow.total_loss, compiled):
        nets.zero_grad()
        loss, metrics = function(nets, batch, noise, args)
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
        metrics = qflow.update(nets, optimizer, batch, qflow.sample_noise(actions, generator), args)
        losses.append([metrics[f"{name}_loss"].item() for name in ("critic", "value", "policy")])
    with torch.no_grad():
        x0 = torch.randn(2000, 1, generator=generator)
        samples = qflow.sample_actions(nets, torch.zeros(2000, 1), x0, args)
    return samples, np.mean(losses[:5], 0), np.mean(losses[-50:], 0)


# Over hundreds of updates rounding grows, as if another seed were used. The bounds leave twice the
# room that four seeds needed.


@pytest.mark.slow
def test_losses_fall_and_two_modes_are_cloned_as_two_modes():
    samples, early, late = train_on_two_modes(lam=1e6, updates=600)
    assert (late < 0.75 * early).all()  # flow matching keeps an error that no field can remove
    assert late[0] < 0.05
    assert (samples.abs() - 0.6).abs().lt(0.2).float().mean() > 0.6
    assert samples.abs().lt(0.3).float().mean() < 0.25  # a single Gaussian would have 0.36 there
    assert 0.4 < samples.gt(0).float().mean() < 0.6


@pytest.mark.slow
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
def test_evaluation_plays_the_episodes_with_chunks_open_loop(horizon):
    env = Script()

    def policy(obs):  # an action says which step of the episode it was planned at, and its place
        actions = np.zeros((len(obs), horizon, 2))
        actions[..., 0] = obs / 10
        actions[..., 1] = np.arange(horizon) / 10
        return actions

    results = qflow.evaluate(policy, env, 200, seed=1)
    assert len(env.episodes) == 200
    for i, actions in enumerate(env.episodes):
        for step, (planned, place) in enumerate(actions):
            assert planned == pytest.approx(step // horizon * horizon / 10)
            assert place == pytest.approx(step % horizon / 10)
        assert results["success"][i] == (len(actions) == 1)
        assert results["return"][i] == results["length"][i] == len(actions) in (1, 7)
    assert 0.4 < results["success"].mean() < 0.6
    again = qflow.evaluate(policy, Script(), 200, seed=1)
    other = qflow.evaluate(policy, Script(), 200, seed=2)
    assert all(np.array_equal(again[name], results[name]) for name in results)
    assert not np.array_equal(other["success"], results["success"])


# ------------------------------------------------------------------------------------- training


class Alternating(gymnasium.Env):
    """Episodes alternate: one succeeds after 3 steps, the next one is cut after 5.

    It observes the step of the episode, rewards the number of steps so far, and keeps the actions.
    """

    observation_space = gymnasium.spaces.Box(0, 5, (1,))
    action_space = gymnasium.spaces.Box(-1, 1, (2,))

    def __init__(self):
        self.short = False
        self.actions = []

    def reset(self, *, seed=None, options=None):
        self.short = not self.short
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.actions.append(action)
        self.steps += 1
        obs = np.full(1, self.steps, np.float32)
        terminated = self.short and self.steps == 3
        return obs, self.steps, terminated, self.steps == 5, {"success": np.bool_(terminated)}


@pytest.mark.parametrize("horizon", [1, 2])
def test_collecting_plays_chunks_open_loop_and_appends_each_step(horizon, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "check_env", lambda env, dataset: None)  # it makes a step, too
    events = []
    batches = []

    def noted(name, function):
        return lambda *args: events.append(name) or function(*args)

    def noted_update(nets, optimizer, batch, *rest):
        batches.append(batch)
        return update(nets, optimizer, batch, *rest)

    def planned_actions(nets, obs, args, generator):
        """Actions that say at which step of the episode they were planned, and their place."""
        actions = np.zeros((len(obs), args.horizon, 2), np.float32)
        actions[..., 0] = obs / 10
        actions[..., 1] = np.arange(args.horizon) / 10
        return actions

    monkeypatch.setattr(qflow, "act", planned_actions)
    update = qflow.update
    monkeypatch.setattr(qflow, "update", noted("update", noted_update))
    monkeypatch.setattr(common.Dataset, "append", noted("append", common.Dataset.append))
    monkeypatch.setattr(common.Run, "plot", lambda self, switch: None)
    args = qflow.Args(
        hidden=(8,),
        time_dim=4,
        flow_steps=2,
        batch_size=8,
        horizon=horizon,
        discount=0.5,
        offline_steps=4,
        online_steps=21,
        eval_interval=10,
        eval_episodes=2,
        log_interval=6,
    )
    valids = np.arange(10) % 5 < 4  # two episodes of four steps
    dataset = common.Dataset(np.zeros((10, 1)), np.zeros((10, 2)), 1 * valids, valids, valids)
    env = Alternating()
    run = common.Run(tmp_path / "run", dict(script="qflow.py", args=vars(args)))
    with run:
        qflow.train(args, dataset, env, Alternating(), run)
    assert events == ["update"] * 4 + ["append", "update"] * 21
    discounts = 0.5 ** torch.arange(horizon)
    assert torch.equal(batches[0].rewards, batches[0].valid @ discounts)  # each reward is 1

    lengths = [3, 5, 3, 5, 3, 2]  # the last one is in progress
    steps = np.concatenate([np.arange(n) for n in lengths])
    planned = np.stack([steps // horizon * horizon, steps % horizon], 1) / 10
    assert np.allclose(env.actions, planned)
    added = dataset.collected()
    in_episode = added["valids"] == 1
    rows = np.concatenate([np.arange(n + 1) for n in lengths])  # one more for the last observation
    ends = np.cumsum([n + 1 for n in lengths]) - 1
    assert (~in_episode).nonzero().flatten().tolist() == ends.tolist()
    assert added["observations"][:, 0].tolist() == rows.tolist()
    assert np.allclose(added["actions"][in_episode], planned)
    assert added["rewards"][in_episode].tolist() == (steps + 1).tolist()
    masks = [[1, 1, 0] if n == 3 else [1] * n for n in lengths]  # on a time limit it bootstraps
    assert added["masks"][in_episode].tolist() == sum(masks, [])

    log = common.read_columns(run.folder / "episodes.csv")
    assert list(log) == ["step", "return", "success"]
    assert log["step"].tolist() == [4 + 3, 4 + 8, 4 + 11, 4 + 16, 4 + 19]
    assert log["return"].tolist() == [6, 15, 6, 15, 6]
    assert log["success"].tolist() == [1, 0, 1, 0, 1]
    log = common.read_columns(run.folder / "train.csv")
    assert log["step"].tolist() == [4, 6, 10, 12, 18, 20, 24, 25]  # 4: the switch
    assert all(np.isfinite(values).all() for values in log.values())
    log = common.read_columns(run.folder / "eval.csv")
    assert log["step"].tolist() == [4, 10, 20, 25]
    assert list(log) == ["step", "episodes", "success", "return", "length"]
    for name, mean in {"success": 0.5, "return": 10.5, "length": 4}.items():
        assert log[name].tolist() == [mean] * 4


def test_the_same_seed_gives_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "plot", lambda self, switch: None)
    rng = np.random.default_rng(0)
    valids = np.arange(60) % 20 < 19
    rows = rng.random((60, 3)), rng.uniform(-1, 1, (60, 1)), -1 * valids, valids, valids

    def make_env():
        env = gymnasium.make("Pendulum-v1", max_episode_steps=8)
        return gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)

    def train(name, disturb, seed=0, eval_interval=100):
        torch.manual_seed(disturb)
        np.random.seed(disturb)
        args = qflow.Args(
            hidden=(8, 8),
            flow_steps=3,
            batch_size=16,
            seed=seed,
            horizon=2,
            offline_steps=5,
            online_steps=16,
            eval_episodes=3,
            eval_interval=eval_interval,
            log_interval=1,
        )
        run = common.Run(tmp_path / name, dict(script="qflow.py", args=vars(args)))
        with run:
            dataset = common.Dataset(*rows)
            nets = qflow.train(args, dataset, make_env(), make_env(), run)
        log = common.read_columns(run.folder / "train.csv")
        log.pop("steps_per_s")
        state = torch.load(run.folder / "checkpoint.pt", weights_only=True)
        return log, state, nets

    log, state, nets = train("run", disturb=1)
    same_log, same_state, _ = train("same", disturb=2, eval_interval=7)
    other_log, _, _ = train("other", disturb=1, seed=1)
    np.testing.assert_equal(log, same_log)
    scores, same_scores = (
        common.read_columns(tmp_path / name / "eval.csv") for name in ("run", "same")
    )
    assert scores["step"].tolist() == [5, 21] and same_scores["step"].tolist() == [5, 7, 14, 21]
    assert scores["return"].tolist() == same_scores["return"][[0, 3]].tolist()
    for name, x in state["collected"].items():
        assert torch.equal(x, same_state["collected"][name])
    assert (log["critic_loss"] != other_log["critic_loss"]).all()

    assert state["step"] == 21
    for name, x in nets.state_dict().items():
        assert torch.equal(state["nets"][name], x)
    collected = state["collected"]
    assert collected["valids"].tolist() == ([1] * 8 + [0]) * 2
    starts = collected["observations"][[0, 9]]
    assert len(starts.unique(dim=0)) == 2  # episodes have seeds of their own
    actions = collected["actions"][collected["valids"] == 1]
    assert len(actions.unique()) > 8  # and actions noise of their own; some are clipped


class WithSeeds(gymnasium.Wrapper):
    """Keeps the seeds of its episodes."""

    def __init__(self, env):
        super().__init__(env)
        self.seeds = set()

    def reset(self, *, seed=None, options=None):
        self.seeds.add(seed)
        return super().reset(seed=seed)


@pytest.mark.parametrize("script", [qflow, fql])
def test_a_seed_has_its_own_weights_noise_and_episodes_and_compiled_losses_are_used(
    script, tmp_path, monkeypatch
):
    monkeypatch.setattr(common.Run, "plot", lambda self, switch: None)
    monkeypatch.setattr(common, "check_env", lambda env, dataset: None)  # it makes a step, too
    manual_seed = torch.manual_seed
    seeds_of_weights = []

    def noted_seed(seed):
        seeds_of_weights.append(seed)
        return manual_seed(seed)

    compiled_calls = []

    def compile(loss_fn, fullgraph):
        return lambda *inputs: compiled_calls.append(1) or loss_fn(*inputs)

    monkeypatch.setattr(torch, "manual_seed", noted_seed)
    monkeypatch.setattr(torch, "compile", compile)
    valids = np.arange(20) < 19
    weights, noise, of_training, of_evaluation = [], [], [], []
    for seed in (0, 1000):
        dataset = common.Dataset(np.zeros((20, 3)), np.zeros((20, 1)), valids, valids, valids)
        sizes = dict(hidden=(8,), batch_size=8, offline_steps=1, online_steps=9, eval_episodes=2)
        args = script.Args(**sizes, seed=seed, lr=1e-30, compile=True)  # weights stay
        env, eval_env = (
            WithSeeds(
                gymnasium.wrappers.RescaleAction(
                    gymnasium.make("Pendulum-v1", max_episode_steps=4), -1.0, 1.0
                )
            )
            for _ in range(2)
        )
        with common.Run(tmp_path / str(seed), dict(script="x.py", args=vars(args))) as run:
            nets = script.train(args, dataset, env, eval_env, run)
        weights.append(nets.critic.mlp[0].weight)
        noise.append(common.read_checkpoint(run.folder)["generator"])
        of_training.append(env.seeds)
        of_evaluation.append(eval_env.seeds)
        assert len(env.seeds) == 3 and len(eval_env.seeds) == 4
        assert seed not in seeds_of_weights  # that of the noise
    assert not torch.equal(*weights) and not torch.equal(*noise)
    assert not set.intersection(*of_training) and not set.intersection(*of_evaluation)
    assert len(compiled_calls) == 2 * 10


@pytest.mark.parametrize("script", [qflow, fql])
def test_the_logged_q(script):
    args, _, batch, _ = make()
    nets = script.Networks(4, 3, script.Args(hidden=(8,))).double()
    _, metrics = script.critic_loss(nets, batch, torch.zeros(16))
    q = nets.critic(batch.observations, batch.actions)
    expected = dict(q_mean=q.mean(), q_min=q.min(), q_max=q.max())
    assert all(metrics[name] == value for name, value in expected.items())


def test_evaluating_does_not_change_what_an_episode_draws_from_numpy(tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "plot", lambda self, switch: None)

    def make_env():
        env = gymnasium.make("Pendulum-v1", max_episode_steps=8)
        env = gymnasium.wrappers.RescaleAction(env, -1.0, 1.0)
        return gymnasium.wrappers.TransformReward(env, lambda reward: np.random.random())

    valids = np.arange(20) < 19
    rewards = []
    for interval in (3, 100):
        dataset = common.Dataset(np.zeros((20, 3)), np.zeros((20, 1)), valids, valids, valids)
        sizes = dict(hidden=(8,), batch_size=8, offline_steps=1, online_steps=12, eval_episodes=1)
        args = qflow.Args(**sizes, eval_interval=interval)
        with common.Run(tmp_path / str(interval), dict(script="x.py", args=vars(args))) as run:
            qflow.train(args, dataset, make_env(), make_env(), run)
        rewards.append(dataset.collected()["rewards"])
    assert torch.equal(*rewards)


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
    own, current = torch.cuda.Stream.return_value, torch.cuda.current_stream.return_value
    assert own.wait_stream.call_args_list == 3 * [call(current)]
    assert current.wait_stream.call_args_list == 3 * [call(own)]
    assert torch.cuda.stream.call_args_list == 3 * [call(own)]
