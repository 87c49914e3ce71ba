"""SAC Flow: the noisy rollout against closed forms, its networks, critics, and real short runs."""

import csv
import math
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform

import common
import flow_sac

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

# ---------------------------------------------------------------------- the marginal is preserved


def gaussian_flow(mean, std):
    """Velocity of the rectified flow from N(0, 1) to N(mean, std^2); also of a mixture of them.

    Conditional on component k, x_t ~ N(t m_k, (1 - t)^2 + t^2 s^2), and x_1 - x_0 is linear in x_t.
    """
    mean = torch.as_tensor(mean).reshape(-1, 1, 1)

    def velocity(obs, x, t):
        var = (1 - t) ** 2 + t**2 * std**2
        weights = (-((x - t * mean) ** 2) / (2 * var)).softmax(0)
        return (weights * (mean + (t * std**2 - (1 - t)) / var * (x - t * mean))).sum(0)

    return velocity


def without_drift(velocity, log_sigma):
    """A velocity from which rollout's drift makes what velocity is without any drift."""

    def compensated(obs, x, t):
        half = 0.5 * (2 * log_sigma(obs, t)).exp() / (1 - t)
        return (velocity(obs, x, t) + half * x) / (1 + half * t)

    return compensated


def kolmogorov_smirnov(a, b):
    """The two-sample statistic over its critical value at level 0.001: above 1, they differ."""
    values = np.concatenate([a, b])
    cdf = lambda sample: np.searchsorted(np.sort(sample), values, side="right") / len(sample)
    critical = math.sqrt(-math.log(0.001 / 2) / 2 * (len(a) + len(b)) / (len(a) * len(b)))
    return np.abs(cdf(a) - cdf(b)).max() / critical


@pytest.mark.parametrize(
    "velocity", [gaussian_flow(0.7, 0.3), gaussian_flow([-1.0, 1.0], 0.2)], ids=["one", "two modes"]
)
@pytest.mark.parametrize(
    "log_sigma",
    [lambda obs, t: torch.full_like(t, 0.8).log(), lambda obs, t: (0.3 + 0.7 * (1 - t)).log()],
    ids=["constant", "of t"],
)
def test_noise_preserves_the_distribution_and_without_drift_it_does_not(velocity, log_sigma):
    generator = torch.Generator().manual_seed(0)
    n, steps = 8000, 400
    normal = lambda *shape: torch.randn(*shape, 1, generator=generator, dtype=torch.float64)
    plain, middle = normal(n), None
    for i in range(steps):  # the flow without noise and drift
        middle = plain if i == steps // 2 else middle
        plain = plain + velocity(None, plain, torch.full_like(plain, i / steps)) / steps
    plain, middle = plain[:, 0].numpy(), middle[:, 0].numpy()
    path, _ = flow_sac.rollout(velocity, log_sigma, None, normal(n), normal(steps, n))
    assert kolmogorov_smirnov(plain, path[-1][:, 0].numpy()) < 1
    assert kolmogorov_smirnov(middle, path[steps // 2][:, 0].numpy()) < 1

    wrong = without_drift(velocity, log_sigma)
    path, _ = flow_sac.rollout(wrong, log_sigma, None, normal(n), normal(steps, n))
    assert kolmogorov_smirnov(plain, path[-1][:, 0].numpy()) > 1.5


# --------------------------------------------------------------------------- the path's log-density


def make(obs_dim=5, action_dim=3, batch_size=16, **settings):
    """Small networks, a random batch and random draws, in float64: there no rounding shows."""
    torch.manual_seed(0)
    sizes = dict(hidden=(32, 32), policy_width=16, batch_size=batch_size)
    args = flow_sac.Args(**{**sizes, **settings})
    nets = flow_sac.Networks(obs_dim, action_dim, args).double()
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    batch = flow_sac.Batch(
        observations=normal(batch_size, obs_dim),
        actions=normal(batch_size, action_dim).tanh(),
        rewards=normal(batch_size),
        masks=(normal(batch_size) > -0.5).double(),
        next_observations=normal(batch_size, obs_dim),
    )
    next_noise = normal(args.flow_steps + 1, batch_size, action_dim)
    noise = normal(args.flow_steps + 1, batch_size, action_dim)
    draws = flow_sac.Draws(next_noise[0], next_noise[1:], noise[0], noise[1:])
    return args, nets, batch, draws


def follow(policy, obs, x0, eps):
    """The path that explore takes: [x_0, ..., x_K]."""
    path, _ = flow_sac.rollout(policy.velocity, policy.log_sigma, policy.obs_norm(obs), x0, eps)
    return path


@pytest.mark.parametrize("policy", ["flow-t", "flow-g", "naive"])
def test_log_density_of_the_path_against_torch_distributions(policy):
    args, nets, batch, draws = make(policy=policy, flow_steps=3)
    obs = batch.observations
    actions, log_prob = flow_sac.explore(nets.policy, obs, draws.next_x0, draws.next_eps)
    path = follow(nets.policy, obs, draws.next_x0, draws.next_eps)
    expected = Normal(0, 1).log_prob(path[0]).sum(-1)
    obs = nets.policy.obs_norm(obs)
    for i in range(3):
        t = torch.full((16, 1), i / 3, dtype=torch.float64)
        v, sigma = nets.policy.velocity(obs, path[i], t), nets.policy.log_sigma(obs, t).exp()
        mean = path[i] + (v + sigma**2 / 2 * (t * v - path[i]) / (1 - t)) / 3
        expected += Normal(mean, sigma / math.sqrt(3)).log_prob(path[i + 1]).sum(-1)
    expected -= TanhTransform().log_abs_det_jacobian(path[3], actions).sum(-1)
    assert torch.allclose(actions, path[3].tanh())
    assert torch.allclose(log_prob, expected, rtol=1e-10)


@pytest.mark.parametrize("policy", ["flow-t", "flow-g", "naive"])
def test_gradient_of_the_policy_loss_by_finite_differences(policy):
    args, nets, batch, draws = make(policy=policy)

    def loss():
        return flow_sac.policy_loss(nets, batch, draws.policy_x0, draws.policy_eps)[0]

    nets.zero_grad()
    loss().backward()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in nets.policy.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        for h in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += h * direction
                values.append(loss().item())
                parameter -= h * direction
        numeric = (values[0] - values[1]) / 2e-6
        exact = (parameter.grad * direction).sum().item()
        assert exact == pytest.approx(numeric, rel=1e-4, abs=1e-7), name


def test_saturated_actions_have_finite_losses_and_a_gradient_that_leads_back():
    for sign in (-1.0, 1.0):
        args, nets, batch, draws = make(policy="naive")
        nets.float()
        with torch.no_grad():
            nets.policy.velocity.mlp[-1].bias.fill_(sign * 100.0)  # tanh(u) is 1 in float32
        batch, draws = (type(x)(*(y.float() for y in x)) for x in (batch, draws))
        # One step from x_0 ends at x_0 plus the bias; its log-density depends on x_0 in three ways:
        # log N(x_0), nothing of the step, and tanh's, whose slope is 2 where tanh saturates.
        x0 = torch.zeros_like(draws.policy_x0, requires_grad=True)
        eps = draws.policy_eps[:1]
        actions, log_prob = flow_sac.explore(nets.policy, batch.observations, x0, eps)
        assert (actions == sign).all() and log_prob.isfinite().all()
        u = follow(nets.policy, batch.observations, x0, eps)[-1]
        (slope,) = torch.autograd.grad(u.sum(), x0, retain_graph=True)
        (gradient,) = torch.autograd.grad(log_prob.sum(), x0)
        assert slope.abs().min() > 0.01
        assert torch.allclose(gradient, 2 * sign * slope)
        for step in (flow_sac.update_critic, flow_sac.update_policy):
            metrics = step(nets, flow_sac.make_optimizers(nets, args), batch, draws, args)
            assert all(x.isfinite() for x in metrics.values())
        assert all(p.isfinite().all() for p in nets.parameters())


def test_gradients_by_the_points_of_the_path(monkeypatch):
    """Against a rollout written out here, in which one x_i at a time is shifted."""
    monkeypatch.syspath_prepend(ROOT / "results")
    import flow_sac_gradients

    _, nets, batch, draws = make(batch_size=4, flow_steps=3)

    def loss(i, shift):
        policy = nets.policy.train()
        obs, x = policy.obs_norm(batch.observations), draws.policy_x0
        policy.eval()
        for k in range(3):
            x = x + shift * (k == i)
            t = torch.full((4, 1), k / 3, dtype=torch.float64)
            v, sigma = policy.velocity(obs, x, t), policy.log_sigma(obs, t).exp()
            drift = v + sigma**2 / 2 * (t * v - x) / (1 - t)
            x = x + drift / 3 + sigma * draws.policy_eps[k] / math.sqrt(3)
        action = (x + shift * (i == 3)).tanh()
        log_prob = -torch.log(1 - action**2).sum(-1)  # all of it that depends on x_i
        q = nets.critic(batch.observations, action).amin(0)
        return (nets.log_temperature.exp() * log_prob - q).mean()

    expected = []
    for i in range(4):
        shift = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(i, shift), shift)
        expected.append(gradient.norm().item())
    _, nets, _, _ = make(batch_size=4, flow_steps=3)
    inputs = batch.observations, draws.policy_x0, draws.policy_eps
    found, entropy, path = flow_sac_gradients.policy_loss(nets, *inputs)
    found.backward()
    assert [x.grad.norm().item() for x in path] == pytest.approx(expected, rel=1e-8)
    trained, metrics = flow_sac.policy_loss(nets, batch, draws.policy_x0, draws.policy_eps)
    assert found.item() == pytest.approx(trained.item(), rel=1e-8)
    assert entropy.item() == pytest.approx(metrics["entropy"].item(), rel=1e-8)


def test_logged_gradient_norms_are_those_of_the_loss():
    args, nets, batch, draws = make()
    metrics = flow_sac.update_policy(nets, flow_sac.make_optimizers(nets, args), batch, draws, args)
    _, nets, _, _ = make()
    flow_sac.policy_loss(nets, batch, draws.policy_x0, draws.policy_eps)[0].backward()
    for name, module in (("policy", nets.policy), ("velocity", nets.policy.velocity)):
        norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
        assert metrics[f"{name}_grad_norm"].item() == pytest.approx(norm.item(), rel=1e-8)


def test_evaluation_leaves_out_the_noise_and_keeps_the_drift():
    args, nets, batch, draws = make(flow_steps=3)
    obs, x = nets.policy.obs_norm(batch.observations), draws.next_x0
    for k in range(3):
        t = torch.full((16, 1), k / 3, dtype=torch.float64)
        v, sigma = nets.policy.velocity(obs, x, t), nets.policy.log_sigma(obs, t).exp()
        x = x + (v + sigma**2 / 2 * (t * v - x) / (1 - t)) / 3
    actions = flow_sac.sample_actions(nets, batch.observations, draws.next_x0, args)
    assert torch.allclose(actions, x.tanh())


# -------------------------------------------------------------------------------------- networks


def test_flow_t_is_a_transformer_decoder_whose_tokens_see_themselves_and_the_state():
    torch.manual_seed(0)
    width, tokens = 16, 5
    ours = flow_sac.DecodedVelocity(4, 3, width).double()
    gelu = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    layer = torch.nn.TransformerDecoderLayer(
        width, 4, 4 * width, 0.0, gelu, batch_first=True, norm_first=True, dtype=torch.float64
    )
    decoder = torch.nn.TransformerDecoder(layer, 2)
    for own, theirs in zip(ours.layers, decoder.layers):
        for linears, attention in (
            (own.self_attention, theirs.self_attn),
            (own.cross_attention, theirs.multihead_attn),
        ):
            attention.in_proj_weight.data[2 * width :] = linears[0].weight.data
            attention.in_proj_bias.data[2 * width :] = linears[0].bias.data
            attention.out_proj.load_state_dict(linears[1].state_dict())
        theirs.linear1.load_state_dict(own.feed_forward[0].state_dict())
        theirs.linear2.load_state_dict(own.feed_forward[2].state_dict())

    obs = torch.randn(6, 4, dtype=torch.float64)
    x = torch.randn(6, tokens, 3, dtype=torch.float64)
    t = torch.linspace(0, 0.9, tokens, dtype=torch.float64)[None, :, None].expand(6, -1, 1)
    diagonal = torch.full((tokens, tokens), -math.inf, dtype=torch.float64).fill_diagonal_(0)
    embedded = ours.embed_x(x) + ours.embed_t(t)
    decoded = decoder(embedded, ours.embed_obs(obs)[:, None], tgt_mask=diagonal)
    expected = ours.head(decoded)
    for i in range(tokens):
        assert torch.allclose(ours(obs, x[:, i], t[:, i]), expected[:, i], atol=1e-12)


@pytest.mark.parametrize("policy", ["flow-t", "flow-g", "naive"])
def test_batch_entries_do_not_mix_in_the_velocity(policy):
    _, nets, batch, draws = make(policy=policy)
    obs, x, t = batch.observations, draws.next_x0, torch.full((16, 1), 0.3, dtype=torch.float64)
    before = nets.policy.velocity(obs, x, t)
    other_obs, other_x = obs.clone(), x.clone()
    other_obs[3] += 1
    other_x[5] += 1
    changed = (nets.policy.velocity(other_obs, other_x, t) != before).any(1)
    assert changed.nonzero().flatten().tolist() == [3, 5]


def test_flow_g_starts_with_an_open_gate():
    _, nets, batch, draws = make(policy="flow-g")
    velocity, t = nets.policy.velocity, torch.full((16, 1), 0.3, dtype=torch.float64)
    seen = {}
    for name in ("gate", "candidate"):
        hook = lambda module, inputs, output, name=name: seen.update({name: output})
        getattr(velocity, name).register_forward_hook(hook)
    v = velocity(batch.observations, draws.next_x0, t)
    assert torch.equal(seen["gate"], torch.full_like(v, 5.0))
    assert torch.allclose(v, 1 / (1 + math.exp(-5)) * (seen["candidate"] - draws.next_x0))


def test_sigma_stays_in_its_range():
    _, nets, batch, _ = make()
    for t in (0.0, 0.75):
        log_sigma = nets.policy.log_sigma(1e3 * batch.observations, torch.full((16, 1), t).double())
        assert (log_sigma >= -5).all() and (log_sigma <= 0).all()


# --------------------------------------------------------------------------------------- critics


def renorm(x, state, training, warmup, rate=0.01, eps=1e-3):
    """BatchRenorm in plain NumPy; state: mean, var, calls, scale, bias."""
    running_std = np.sqrt(state["var"] + eps)
    if not training:
        return (x - state["mean"]) / running_std * state["scale"] + state["bias"]
    mean, var = x.mean(-2, keepdims=True), x.var(-2, keepdims=True)
    y = (x - mean) / np.sqrt(var + eps)
    if state["calls"] >= warmup:
        r = np.clip(np.sqrt(var + eps) / running_std, 1 / 3, 3)
        d = np.clip((mean - state["mean"]) / running_std, -5, 5)
        y = y * r + d
    state["mean"] = (1 - rate) * state["mean"] + rate * mean
    state["var"] = (1 - rate) * state["var"] + rate * var
    state["calls"] += 1
    return y * state["scale"] + state["bias"]


def state_of(norm):
    named = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    return {name: x.detach().numpy().copy() for name, x in named.items()}


def test_batch_renorm_against_numpy_before_and_after_its_warm_up():
    rng = np.random.default_rng(0)
    norm = flow_sac.BatchRenorm(2, 1, 3, warmup=3).double()
    with torch.no_grad():
        norm.scale.copy_(torch.as_tensor(rng.normal(size=(2, 1, 3))))
        norm.bias.copy_(torch.as_tensor(rng.normal(size=(2, 1, 3))))
    state = state_of(norm)
    for call in range(8):
        x = rng.normal(3, 0.1 + 2 * (call % 3), size=(2, 20, 3))  # r and d reach their limits
        norm.train()
        ours = norm(torch.as_tensor(x)).detach().numpy()
        assert np.allclose(ours, renorm(x, state, True, warmup=3), atol=1e-12)
        norm.eval()
        ours = norm(torch.as_tensor(x)).detach().numpy()
        assert np.allclose(ours, renorm(x, state, False, warmup=3), atol=1e-12)
    assert norm.calls == 8 and np.allclose(state["mean"], norm.mean)


def test_after_the_warm_up_r_and_d_get_no_gradient():
    norm = flow_sac.BatchRenorm(1, 3, warmup=0, eps=0.0).double()
    x = torch.randn(20, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(20, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((norm(x) * weights).sum(), x)
    # with constants for r and d, y * r + d does not notice shifts of the batch, nor a new scale
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.allclose(gradient.sum(0), zero, atol=1e-12)
    assert torch.allclose((gradient * (x - x.mean(0))).sum(0), zero, atol=1e-12)


def test_crossq_loss_is_that_of_one_joint_forward_pass_in_numpy():
    args, nets, batch, draws = make(critic="crossq")
    states = [state_of(m) for m in nets.critic.mlp if isinstance(m, flow_sac.BatchRenorm)]
    linear = [m for m in nets.critic.mlp if isinstance(m, flow_sac.EnsembleLinear)]
    with torch.no_grad():  # a' and its log-density are those of the running statistics
        next_obs = batch.next_observations
        next_actions, log_prob = flow_sac.explore(
            nets.policy, next_obs, draws.next_x0, draws.next_eps
        )
    obs = np.concatenate([batch.observations, next_obs])
    x = np.concatenate([obs, np.concatenate([batch.actions, next_actions])], 1)[None]
    x = renorm(np.repeat(x, 2, 0), states[0], True, 100_000)
    for i, layer in enumerate(linear):
        x = x @ layer.weight.detach().numpy() + layer.bias.detach().numpy()
        if i < 2:
            x = renorm(np.maximum(x, 0), states[i + 1], True, 100_000)
    q, next_q = x[:, :16, 0], x[:, 16:, 0]
    next_v = next_q.min(0) - 0.2 * log_prob.numpy()
    target = batch.rewards.numpy() + 0.99 * batch.masks.numpy() * next_v
    loss, _ = flow_sac.critic_loss(nets, batch, draws.next_x0, draws.next_eps, args)
    assert loss.item() == pytest.approx(((q - target) ** 2).mean(), rel=1e-6)
    for module, state in zip(
        (m for m in nets.critic.mlp if isinstance(m, flow_sac.BatchRenorm)), states
    ):
        assert np.allclose(module.mean, state["mean"]) and np.allclose(module.var, state["var"])
    assert not any(module.training for module in nets.modules())


@pytest.mark.parametrize("critic", ["crossq", "sac"])
def test_each_loss_trains_its_own_networks_only(critic):
    args, nets, batch, draws = make(critic=critic)
    for own, loss in {
        "critic": lambda: flow_sac.critic_loss(nets, batch, draws.next_x0, draws.next_eps, args),
        "policy": lambda: flow_sac.policy_loss(nets, batch, draws.policy_x0, draws.policy_eps),
    }.items():
        nets.zero_grad()
        loss()[0].backward()
        got = {k.split(".")[0] for k, p in nets.named_parameters() if p.grad is not None}
        assert got == {own}
    assert ("target_critic" in dict(nets.named_children())) == (critic == "sac")


def test_sac_loss_is_that_of_the_target_critics_and_their_minimum():
    args, nets, batch, draws = make(critic="sac")
    with torch.no_grad():
        for parameter in nets.target_critic.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
        inputs = batch.next_observations, draws.next_x0, draws.next_eps
        next_actions, log_prob = flow_sac.explore(nets.policy, *inputs)
        next_q = nets.target_critic(batch.next_observations, next_actions).min(0).values
        target = batch.rewards + 0.99 * batch.masks * (next_q - 0.2 * log_prob)
        expected = ((nets.critic(batch.observations, batch.actions) - target) ** 2).mean()
    loss, _ = flow_sac.critic_loss(nets, batch, draws.next_x0, draws.next_eps, args)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("critic, beta", [("crossq", 0.5), ("sac", 0.9)])
def test_optimizers(critic, beta):
    args, nets, _, _ = make(critic=critic)
    groups = [optimizer.param_groups[0] for optimizer in flow_sac.make_optimizers(nets, args)]
    assert [group["lr"] for group in groups] == [1e-3, 3e-4, 1e-3]
    assert all(group["betas"] == (beta, 0.999) for group in groups)


def test_sac_target_critic_follows_and_crossq_policy_uses_running_statistics():
    args, nets, batch, draws = make(critic="sac", tau=0.1)
    before = [p.clone() for p in nets.target_critic.parameters()]
    flow_sac.update_critic(nets, flow_sac.make_optimizers(nets, args), batch, draws, args)
    for old, target, online in zip(
        before, nets.target_critic.parameters(), nets.critic.parameters()
    ):
        assert torch.allclose(target, 0.9 * old + 0.1 * online)

    args, nets, batch, draws = make(critic="crossq")
    before = {k: b.clone() for k, b in nets.critic.named_buffers()}
    flow_sac.policy_loss(nets, batch, draws.policy_x0, draws.policy_eps)
    assert all(torch.equal(b, before[k]) for k, b in nets.critic.named_buffers())
    assert nets.policy.obs_norm.calls == 1


@pytest.mark.parametrize("entropy, sign", [(1e3, 1), (-1e3, -1)])
def test_temperature_rises_when_the_entropy_is_below_its_target(entropy, sign):
    args, nets, batch, draws = make(target_entropy=entropy)
    before = nets.log_temperature.item()
    flow_sac.update_policy(nets, flow_sac.make_optimizers(nets, args), batch, draws, args)
    assert sign * (nets.log_temperature.item() - before) > 0


# -------------------------------------------------------------------------------------- training


class Counter(gymnasium.Env):
    """Observes [episode, step]. Episode 0, 2, ... are cut at step 5, the others end at step 3."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    episode = -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.steps = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        self.steps += 1
        even = self.episode % 2 == 0
        obs = np.array([self.episode, float(self.steps)])
        return obs, 1.0, not even and self.steps == 3, even and self.steps == 5, {}


@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_buffer_gets_true_last_observations_and_masks(tmp_path, monkeypatch, num_envs):
    added, calls = [], []
    add = flow_sac.ReplayBuffer.add
    for name in ("update_critic", "update_policy"):
        function = getattr(flow_sac, name)
        counted = lambda *inputs, name=name, f=function: calls.append(name) or f(*inputs)
        monkeypatch.setattr(flow_sac, name, counted)

    def record(self, *columns):
        added.append([np.array(column) for column in columns])
        add(self, *columns)

    monkeypatch.setattr(flow_sac.ReplayBuffer, "add", record)
    args = flow_sac.Args(
        online_steps=60,
        learning_starts=40,
        batch_size=8,
        hidden=(8,),
        policy_width=8,
        eval_episodes=2,
    )
    run = common.Run(tmp_path / "run", dict(script="flow_sac.py"))
    envs, eval_envs = (flow_sac.make_envs(Counter, n) for n in (num_envs, 2))
    flow_sac.train(args, envs, eval_envs, run, CPU)
    envs.close()
    eval_envs.close()
    obs, actions, rewards, masks, next_obs = (np.concatenate(c) for c in zip(*added))
    assert calls.count("update_critic") == (20 if num_envs == 1 else 21)  # from 40 or 42 on
    assert calls.count("update_policy") == 7
    with open(run.folder / "train.csv") as file:  # only the last one is due
        assert [row["step"] for row in csv.DictReader(file)] == ["60"]
    assert len(np.unique(actions[:40])) == 40 and abs(actions[:40].mean()) < 0.3  # uniform
    assert len(obs) == 60 and (rewards == 1).all() and (abs(actions) <= 1).all()
    assert (next_obs == obs + [0, 1]).all()  # never the first observation of the next episode
    ends = (obs[:, 0] % 2 == 1) & (next_obs[:, 1] == 3)
    assert ends.sum() >= 6 and (masks == ~ends).all()
    assert (obs[:, 1] <= 4).all() and (next_obs[:, 1] == 5).sum() >= 6  # cut, and bootstrapped


@pytest.mark.parametrize("mode", ["NEXT_STEP", "DISABLED"])
def test_other_autoreset_modes_are_refused(tmp_path, mode):
    mode = gymnasium.vector.AutoresetMode[mode]
    bad, good = (
        gymnasium.vector.SyncVectorEnv([Counter], autoreset_mode=m)
        for m in (mode, gymnasium.vector.AutoresetMode.SAME_STEP)
    )
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(ValueError, match="SAME_STEP"):
            flow_sac.train(flow_sac.Args(), *pair, None, CPU)


def test_the_buffer_keeps_the_last_transitions():
    buffer = flow_sac.ReplayBuffer(5, 2, 1, "cpu")
    for i in range(4):
        pair = np.array([2.0 * i, 2 * i + 1])
        buffer.add(np.stack([pair, pair], 1), pair[:, None], pair, pair, np.stack([pair, pair], 1))
    assert sorted(buffer.rows[:, 2].tolist()) == [3, 4, 5, 6, 7]
    batch = buffer.sample(100, torch.Generator().manual_seed(0))
    assert set(batch.rewards.tolist()) == {3, 4, 5, 6, 7}
    assert batch.observations.shape == (100, 2) and batch.masks.shape == (100,)
    assert torch.equal(batch.rewards, batch.next_observations[:, 1])


def short_run(folder, **settings):
    """A real run on Pendulum; train.csv without its columns of time, eval.csv, the networks."""
    sizes = dict(hidden=(32, 32), policy_width=16, batch_size=32, eval_episodes=2)
    steps = dict(online_steps=300, learning_starts=200, eval_interval=150, log_interval=50)
    args = flow_sac.Args(**{**sizes, **steps, **settings})
    make_env = lambda: flow_sac.make_env(args.env)
    envs, eval_envs = (flow_sac.make_envs(make_env, n) for n in (args.num_envs, 2))
    with common.Run(folder, dict(script="flow_sac.py", args=vars(args))) as run:
        nets = flow_sac.train(args, envs, eval_envs, run, CPU)
    envs.close()
    eval_envs.close()
    with open(folder / "train.csv") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row.pop("time_steps_per_s")
    return rows, (folder / "eval.csv").read_text(), nets


@pytest.mark.parametrize(
    "settings",
    [
        dict(policy="flow-t", num_envs=2),
        dict(policy="flow-g", critic="sac"),
        dict(policy="naive", env="HalfCheetah-v4", online_steps=230, eval_interval=230),
        dict(policy="flow-t", env="online-ant-v0", online_steps=230, eval_interval=230),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_same_seed_same_curve(tmp_path, settings):
    one, two = (short_run(tmp_path / name, **settings, seed=3) for name in "ab")
    rows, evaluations, nets = one
    assert (rows, evaluations) == two[:2]
    if settings["policy"] == "flow-g":
        other = short_run(tmp_path / "c", **settings, seed=4)
        assert rows != other[0] and evaluations != other[1]
    evaluated = [line.split(",")[0] for line in evaluations.splitlines()]
    end = str(settings.get("online_steps", 300))
    assert evaluated == (["step", "150", "300"] if end == "300" else ["step", end])
    assert rows[-1]["step"] == end
    values = [float(v) for row in rows for k, v in row.items() if k != "train_return"]
    assert np.isfinite(values).all()
    state = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    assert all(torch.equal(x, state["nets"][k]) for k, x in nets.state_dict().items())
    assert (tmp_path / "a/curve.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "env, words",
    [
        ("HalfCheeta-v5", "Did you mean: `HalfCheetah`"),
        ("CartPole-v1", "requires a Box action space"),
        ("CarRacing-v3", "not installed"),
    ],
)
def test_environments_that_do_not_fit_are_refused(env, words):
    with pytest.raises(common.UserError) as error:
        flow_sac.make_env(env)
    assert env in str(error.value) and words in str(error.value)
