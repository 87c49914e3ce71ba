"""SAC Flow: the noisy rollout against closed forms, networks, critics, and short runs."""

import math
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, TanhTransform

import common
import flow_sac
import fql
import qflow

ROOT = Path(__file__).parent.parent

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
    """A velocity that cancels rollout's drift: with it, a step adds velocity and noise only."""

    def compensated(obs, x, t):
        half = 0.5 * (2 * log_sigma(obs, t)).exp() / (1 - t)
        return (velocity(obs, x, t) + half * x) / (1 + half * t)

    return compensated


def follow(velocity, log_sigma, obs, x0, eps):
    """The path that flow_sac.rollout takes: [x_0, ..., x_K]."""
    path = []

    def noted_velocity(obs, x, t):
        path.append(x)
        return velocity(obs, x, t)

    end, _ = flow_sac.rollout(noted_velocity, log_sigma, obs, x0, eps)
    return [*path, end]


def kolmogorov_smirnov(a, b):
    """The two-sample statistic over its critical value at level 0.001: above 1, they differ."""
    values = np.concatenate([a, b])
    cdf = lambda sample: np.searchsorted(np.sort(sample), values, side="right") / len(sample)
    critical = math.sqrt(-math.log(0.001 / 2) / 2 * (len(a) + len(b)) / (len(a) * len(b)))
    return np.abs(cdf(a) - cdf(b)).max() / critical


@pytest.mark.parametrize(
    "velocity, log_sigma",
    [
        (gaussian_flow(0.7, 0.3), lambda obs, t: (0.3 + 0.7 * (1 - t)).log()),
        (gaussian_flow([-1.0, 1.0], 0.2), lambda obs, t: torch.full_like(t, 0.8).log()),
    ],
    ids=["one mode, sigma of t", "two modes, constant sigma"],
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
    path = follow(velocity, log_sigma, None, normal(n), normal(steps, n))
    assert kolmogorov_smirnov(plain, path[-1][:, 0].numpy()) < 1
    assert kolmogorov_smirnov(middle, path[steps // 2][:, 0].numpy()) < 1

    wrong = without_drift(velocity, log_sigma)
    end, _ = flow_sac.rollout(wrong, log_sigma, None, normal(n), normal(steps, n))
    assert kolmogorov_smirnov(plain, end[:, 0].numpy()) > 1.5


# --------------------------------------------------------------------------- the path's log-density


def make(obs_dim=5, action_dim=3, batch_size=16, **settings):
    """Small networks, a random batch and noise, in float64.

    With a horizon, action_dim is that of a chunk, a multiple of the horizon; some chunks are cut.
    """
    torch.manual_seed(0)
    sizes = dict(hidden=(32, 32), policy_width=16, batch_size=batch_size)
    args = flow_sac.Args(**{**sizes, **settings})
    nets = flow_sac.Networks(obs_dim, action_dim, args).double()
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    num_valid = torch.arange(batch_size) % args.horizon + 1
    batch = common.Batch(
        observations=normal(batch_size, obs_dim),
        actions=normal(batch_size, action_dim).tanh(),
        rewards=normal(batch_size),
        masks=(normal(batch_size) > -0.5).double(),
        next_observations=normal(batch_size, obs_dim),
        valid=(torch.arange(args.horizon) < num_valid[:, None]).double(),
    )
    noise = flow_sac.Noise(
        next_x0=normal(batch_size, action_dim),
        next_eps=normal(args.flow_steps, batch_size, action_dim),
        policy_x0=normal(batch_size, action_dim),
        policy_eps=normal(args.flow_steps, batch_size, action_dim),
        flow_t=torch.rand(batch_size, 1, dtype=torch.float64),
    )
    return args, nets, batch, noise


OFFLINE = dict(  # small networks in the rest of the settings that come with a dataset
    critic="sac", q_agg="mean", horizon=3, bc_weight=100.0, noise_std=0.05
)


@pytest.mark.parametrize("policy", ["flow-t", "flow-g", "naive"])
def test_log_density_of_the_path_against_torch_distributions(policy):
    args, nets, batch, noise = make(policy=policy, flow_steps=3)
    obs = batch.observations
    actions, log_prob = flow_sac.sample_with_log_prob(
        nets.policy, obs, noise.next_x0, noise.next_eps
    )
    obs = nets.policy.obs_norm(obs)
    networks = nets.policy.velocity, nets.policy.log_sigma
    path = follow(*networks, obs, noise.next_x0, noise.next_eps)
    expected = Normal(0, 1).log_prob(path[0]).sum(-1)
    for i in range(3):
        t = torch.full((16, 1), i / 3, dtype=torch.float64)
        v, sigma = nets.policy.velocity(obs, path[i], t), nets.policy.log_sigma(obs, t).exp()
        mean = path[i] + (v + sigma**2 / 2 * (t * v - path[i]) / (1 - t)) / 3
        expected += Normal(mean, sigma / math.sqrt(3)).log_prob(path[i + 1]).sum(-1)
    expected -= TanhTransform().log_abs_det_jacobian(path[3], actions).sum(-1)
    assert torch.allclose(actions, path[3].tanh())
    assert torch.allclose(log_prob, expected, rtol=1e-10)


def test_a_gaussian_and_its_log_density_against_torch_distributions():
    args, nets, batch, noise = make(policy="gaussian")
    obs = batch.observations
    with torch.no_grad():
        nets.policy.velocity.mlp[-1].bias[3:] = torch.tensor([-30.0, -1.0, 30.0])  # of log std
    inputs = nets.policy, obs, noise.next_x0, noise.next_eps
    actions, log_prob = flow_sac.sample_with_log_prob(*inputs)
    heads = nets.policy.velocity.mlp(nets.policy.obs_norm(obs))
    mean, log_std = heads[:, :3], heads[:, 3:].clone()
    assert (log_std[:, 0] < -20).all() and (log_std[:, 2] > 2).all()
    log_std[:, 0] = -20
    log_std[:, 2] = 2
    u = mean + log_std.exp() * noise.next_eps[0]
    expected = Normal(mean, log_std.exp()).log_prob(u)
    expected = expected - TanhTransform().log_abs_det_jacobian(u, u.tanh())
    assert torch.allclose(actions, u.tanh())
    assert torch.allclose(log_prob, expected.sum(-1), rtol=1e-8)
    evaluated = flow_sac.sample_actions(nets, obs, noise.policy_x0, args)
    assert torch.allclose(evaluated, mean.tanh())


@pytest.mark.parametrize(
    "policy, settings",
    [
        *[(policy, dict()) for policy in ("flow-t", "flow-g", "naive", "gaussian")],
        *[(policy, OFFLINE) for policy in ("flow-t", "flow-g", "naive")],
    ],
)
def test_gradient_of_the_policy_loss_by_finite_differences(policy, settings):
    args, nets, batch, noise = make(policy=policy, **settings)

    def loss():
        return flow_sac.policy_loss(nets, batch, noise.policy_x0, noise.policy_eps, args)[0]

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
        args, nets, batch, noise = make(policy="naive")
        nets.float()
        with torch.no_grad():
            nets.policy.velocity.mlp[-1].bias.fill_(sign * 100.0)  # tanh(u) is 1 in float32
        batch, noise = (type(x)(*(y.float() for y in x)) for x in (batch, noise))
        # One step from x_0 ends at x_0 plus the bias; its log-density depends on x_0 in three ways:
        # log N(x_0), nothing of the step, and tanh's, whose slope is 2 where tanh saturates.
        x0 = torch.zeros_like(noise.policy_x0, requires_grad=True)
        eps = noise.policy_eps[:1]
        actions, log_prob = flow_sac.sample_with_log_prob(nets.policy, batch.observations, x0, eps)
        assert (actions == sign).all() and log_prob.isfinite().all()
        obs = nets.policy.obs_norm(batch.observations)
        u, _ = flow_sac.rollout(nets.policy.velocity, nets.policy.log_sigma, obs, x0, eps)
        (slope,) = torch.autograd.grad(u.sum(), x0, retain_graph=True)
        (gradient,) = torch.autograd.grad(log_prob.sum(), x0)
        assert slope.abs().min() > 0.01
        assert torch.allclose(gradient, 2 * sign * slope)
        for step in (flow_sac.update_critic, flow_sac.update_policy):
            metrics = step(nets, flow_sac.make_optimizers(nets, args), batch, noise, args)
            assert all(x.isfinite() for x in metrics.values())
        assert all(p.isfinite().all() for p in nets.parameters())


@pytest.mark.parametrize("policy", ["flow-t", "flow-g"])
@pytest.mark.parametrize("condition", ["no-drift", "authors"])
def test_rollouts_of_the_diagnosis_against_torch_distributions(policy, condition, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results/flow-sac-gradients")
    import flow_sac_gradients

    _, nets, batch, noise = make(policy=policy, flow_steps=3)
    rollout, log_sigma_class = flow_sac_gradients.REPLACEMENTS[condition]
    log_sigma = log_sigma_class(5, 3, 16).double()
    obs, x0, eps = batch.observations, noise.policy_x0, noise.policy_eps
    end, log_prob = rollout(nets.policy.velocity, log_sigma, obs, x0, eps)
    expected = Normal(0, 1).log_prob(x0).sum(-1)
    x = x0
    for i in range(3):
        t = torch.full((16, 1), i / 3, dtype=torch.float64)
        std = log_sigma(obs, t).exp()
        unit = torch.ones_like(std)  # of the density
        if condition == "no-drift":
            std = std / math.sqrt(3)
        elif policy == "flow-t":
            std = std / 3
            unit = std  # it is left out
        mean = x + nets.policy.velocity(obs, x, t) / 3
        x = mean + std * eps[i]
        expected += (Normal(mean, std).log_prob(x) + unit.log()).sum(-1)
    assert torch.allclose(end, x)
    assert torch.allclose(log_prob, expected, rtol=1e-10)
    assert log_sigma.high == (2.0 if condition == "authors" else 0.0)


@pytest.mark.parametrize("policy", ["flow-t", "naive"])
def test_rollouts_of_one_difference_are_those_of_the_diagnosis(policy, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results/flow-sac-gradients")
    monkeypatch.syspath_prepend(ROOT / "results/halfcheetah")
    import flow_sac_gradients
    import one_difference

    _, nets, batch, noise = make(policy=policy, flow_steps=3)
    networks = nets.policy.velocity, nets.policy.log_sigma
    inputs = batch.observations, noise.policy_x0, noise.policy_eps
    for authors_noise, rollout in [
        (False, flow_sac.rollout),
        (True, flow_sac_gradients.rollout_of_the_authors),
    ]:
        found = one_difference.rollout(*networks, *inputs, authors_noise, two_heads=False)
        for one, other in zip(found, rollout(*networks, *inputs)):
            assert torch.allclose(one, other, rtol=1e-10)
    if policy == "flow-t":
        velocity = one_difference.FlowT(5, 3, 16, has_x=False, two_heads=True)
    else:
        velocity = one_difference.Naive(5, 3, 16, has_x=False, has_t=False, two_heads=True)
    velocity.double()
    obs, x0, eps = inputs[0], inputs[1], inputs[2][:1]
    end, _ = one_difference.rollout(velocity, networks[1], obs, x0, eps, True, two_heads=True)
    v, middle = velocity(obs, x0, torch.zeros(16, 1, dtype=torch.float64)).chunk(2, 1)
    std = (-5 + 2.5 * (middle.tanh() + 1)).exp()  # K = 1: also of flow-t
    assert torch.allclose(end, x0 + v + std * eps[0])


def test_the_authors_density_of_tanh_is_ours_until_it_loses_its_gradient(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "results/halfcheetah")
    import one_difference

    _, nets, batch, noise = make(policy="flow-t")
    monkeypatch.setattr(flow_sac, "rollout", lambda v, sigma, obs, x, eps: (x, 0 * x.sum(-1)))

    def densities(size):
        x = (size * noise.policy_x0.sign()).requires_grad_()
        for module in (flow_sac, one_difference):
            _, log_prob = module.sample_with_log_prob(nets.policy, batch.observations, x, None)
            yield log_prob, torch.autograd.grad(log_prob.sum(), x)[0]

    for ours, theirs in zip(*densities(0.5)):
        assert torch.allclose(ours, theirs, atol=1e-5)  # of 1e-6 / (1 - tanh^2), 3 actions
    (_, ours), (_, theirs) = densities(20.0)
    assert ours.abs().min() > 1.99
    assert theirs.abs().max() < 1e-6


@pytest.mark.parametrize("policy", ["flow-t", "gaussian"])
def test_the_logged_gradient_norm_is_that_of_the_loss_by_the_velocity(policy):
    args, nets, batch, noise = make(policy=policy)
    optimizers = flow_sac.make_optimizers(nets, args)
    metrics = flow_sac.update_policy(nets, optimizers, batch, noise, args)
    _, nets, _, _ = make(policy=policy)
    flow_sac.policy_loss(nets, batch, noise.policy_x0, noise.policy_eps, args)[0].backward()
    norm = torch.cat([p.grad.flatten() for p in nets.policy.velocity.parameters()]).norm()
    assert metrics["velocity_grad_norm"].item() == pytest.approx(norm.item(), rel=1e-8)


def test_evaluation_leaves_out_the_noise_and_keeps_the_drift():
    args, nets, batch, noise = make(flow_steps=3)
    obs, x = nets.policy.obs_norm(batch.observations), noise.next_x0
    for k in range(3):
        t = torch.full((16, 1), k / 3, dtype=torch.float64)
        v, sigma = nets.policy.velocity(obs, x, t), nets.policy.log_sigma(obs, t).exp()
        x = x + (v + sigma**2 / 2 * (t * v - x) / (1 - t)) / 3
    actions = flow_sac.sample_actions(nets, batch.observations, noise.next_x0, args)
    assert torch.allclose(actions, x.tanh())


# ----------------------------------------------------------------------------- with a dataset


@pytest.mark.parametrize("policy", ["flow-t", "flow-g", "naive"])
def test_with_a_fixed_noise_each_step_has_this_standard_deviation(policy):
    std = 0.05
    args, nets, batch, noise = make(policy=policy, flow_steps=3, **OFFLINE)
    obs = batch.observations

    def walk(x, eps):
        for i in range(3):
            t = torch.full((16, 1), i / 3, dtype=torch.float64)
            v = nets.policy.velocity(obs, x, t)
            mean = x + (v + 3 * std**2 / 2 * (t * v - x) / (1 - t)) / 3  # sigma is std sqrt(3)
            x = mean + std * eps[i]
        return x.tanh()

    x0, eps = noise.policy_x0, noise.policy_eps
    actions, _ = flow_sac.sample_with_log_prob(nets.policy, obs, x0, eps)
    assert torch.allclose(actions, walk(x0, eps))
    evaluated = flow_sac.sample_actions(nets, obs, x0, args)
    assert torch.allclose(evaluated, walk(x0, 0 * eps))


def td_target(nets, batch, noise, args):
    """The target of each row: (0 - target)^2 - (1 - target)^2 is 2 target - 1."""
    targets = []
    for i in range(len(batch.rewards)):
        row = common.Batch(*(x[i : i + 1] for x in batch))
        losses = []
        for q in (0.0, 1.0):
            with torch.no_grad():
                nets.critic.mlp[-1].weight.zero_()
                nets.critic.mlp[-1].bias.fill_(q)
            eps = noise.next_eps[:, i : i + 1]
            losses.append(flow_sac.critic_loss(nets, row, noise.next_x0[i : i + 1], eps, args)[0])
        targets.append((losses[0] - losses[1] + 1).item() / 2)
    return np.array(targets)


@pytest.mark.parametrize("policy", ["flow-t", "flow-g", "naive"])
def test_with_a_fixed_noise_not_solving_the_task_does_not_pay(policy):
    """Rewards are at most 0, so is Q; the same rows count as solved or not by their masks alone."""
    args, nets, batch, noise = make(policy=policy, **OFFLINE)
    batch = batch._replace(rewards=-batch.rewards.abs(), valid=torch.ones_like(batch.valid))
    solved = batch._replace(masks=torch.zeros(16, dtype=torch.float64))
    unsolved = batch._replace(masks=torch.ones(16, dtype=torch.float64))
    for q in (0.0, -1.0, -50.0):
        with torch.no_grad():
            nets.target_critic.mlp[-1].weight.zero_()
            nets.target_critic.mlp[-1].bias.fill_(q)
        difference = td_target(nets, solved, noise, args) - td_target(nets, unsolved, noise, args)
        assert difference == pytest.approx(-(0.99**3) * q, abs=1e-9)


def test_with_a_fixed_noise_there_is_no_temperature():
    args, nets, batch, noise = make(**OFFLINE)
    names = {name.split(".")[0] for name, _ in nets.policy.named_parameters()}
    assert names == {"velocity"}
    optimizers = flow_sac.make_optimizers(nets, args)
    metrics = flow_sac.update_critic(nets, optimizers, batch, noise, args)
    metrics |= flow_sac.update_policy(nets, optimizers, batch, noise, args)
    assert nets.log_temperature.grad is None
    assert not {"entropy", "temperature"} & metrics.keys()


@pytest.mark.parametrize("critic", ["sac", "crossq"])
def test_flow_matching_counts_the_actions_before_the_end_of_the_episode(critic):
    args, nets, batch, noise = make(**{**OFFLINE, "critic": critic})
    if critic == "crossq":
        torch.nn.init.normal_(nets.policy.obs_norm.mean)
    obs = nets.policy.obs_norm(batch.observations)
    loss, _ = flow_sac.flow_loss(nets, batch, noise.policy_x0, noise.flow_t)
    expected = 0.0
    for b in range(16):
        x0, action, t = noise.policy_x0[b], batch.actions[b], noise.flow_t[b]
        xt = (1 - t) * x0 + t * action
        v = nets.policy.velocity(obs[b : b + 1], xt[None], t[None])[0]
        for i in range(b % 3 + 1):  # one action a step of the chunk; the others are not valid
            expected += (v[i] - (action[i] - x0[i])) ** 2 / (16 * 3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)


def test_the_critics_loss_of_chunks():
    args, nets, batch, noise = make(**OFFLINE)
    with torch.no_grad():
        for parameter in nets.target_critic.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
        inputs = batch.next_observations, noise.next_x0, noise.next_eps
        next_actions, _ = flow_sac.sample_with_log_prob(nets.policy, *inputs)
        next_q = nets.target_critic(batch.next_observations, next_actions).mean(0)
        target = batch.rewards + 0.99**3 * batch.masks * next_q
        error = nets.critic(batch.observations, batch.actions) - target
        whole = torch.arange(16) % 3 == 2  # the others end before their last step
        expected = (error[:, whole] ** 2).sum() / (2 * 16)
    loss, _ = flow_sac.critic_loss(nets, batch, noise.next_x0, noise.next_eps, args)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_behaviour_term():
    args, nets, batch, noise = make(**OFFLINE)
    without = flow_sac.replace(args, bc_weight=0.0)
    inputs = nets, batch, noise.policy_x0, noise.policy_eps
    loss, metrics = flow_sac.policy_loss(*inputs, args)
    other, _ = flow_sac.policy_loss(*inputs, without)
    obs = batch.observations
    actions, _ = flow_sac.sample_with_log_prob(nets.policy, obs, noise.policy_x0, noise.policy_eps)
    q = nets.critic(obs, actions).mean(0)
    assert other.item() == pytest.approx(-q.mean().item(), rel=1e-6)  # there is no entropy
    expected = ((actions - batch.actions) ** 2).sum() / (16 * 3)  # also where it is not valid
    assert metrics["bc_loss"].item() == pytest.approx(expected.item(), rel=1e-10)
    assert (loss - other).item() == pytest.approx(100 * expected.item(), rel=1e-8)
    nets.zero_grad()
    metrics["bc_loss"].backward()
    got = {name for name, p in nets.named_parameters() if p.grad is not None}
    assert got == {f"policy.velocity.{name}" for name, _ in nets.policy.velocity.named_parameters()}


# -------------------------------------------------------------------------------------- networks


def by_hand(network, x, activation, sizes):
    """What an `mlp` of these sizes computes, with this activation between its layers."""
    layers = [layer for layer in network if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in layers] == sizes
    for layer in layers[:-1]:
        x = activation(layer(x))
    return layers[-1](x)


def test_flow_t_is_a_transformer_decoder_whose_tokens_see_themselves_and_the_state():
    torch.manual_seed(0)
    width, tokens = 16, 5
    ours = flow_sac.FlowT(4, 3, width).double()
    gelu = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    layer = torch.nn.TransformerDecoderLayer(
        width,
        4,
        4 * width,
        0.0,
        gelu,
        batch_first=True,
        norm_first=True,
        layer_norm_eps=1e-6,
        dtype=torch.float64,
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
    embedded = ours.embed_x(x) + by_hand(ours.embed_t, t, F.silu, [width // 4, width // 2, width])
    memory = by_hand(ours.embed_obs, obs, F.silu, [width // 2, width])
    decoded = decoder(embedded, memory[:, None], tgt_mask=diagonal)
    expected = ours.head(decoded)
    for i in range(tokens):
        assert torch.allclose(ours(obs, x[:, i], t[:, i]), expected[:, i], atol=1e-12)


def test_the_plain_networks():
    _, nets, batch, noise = make(policy="naive")
    obs, x, t = batch.observations, noise.next_x0, noise.flow_t
    expected = by_hand(nets.policy.velocity.mlp, torch.cat([obs, x, t], 1), F.relu, [16, 16, 3])
    assert torch.equal(nets.policy.velocity(obs, x, t), expected)
    _, nets, _, _ = make(policy="gaussian")
    expected = by_hand(nets.policy.velocity.mlp, obs, F.relu, [16, 16, 6])
    assert torch.equal(torch.cat(nets.policy.velocity(obs), 1), expected)


@pytest.mark.parametrize("policy", ["flow-t", "flow-g", "naive"])
def test_batch_entries_do_not_mix_in_the_velocity(policy):
    _, nets, batch, noise = make(policy=policy)
    obs, x, t = batch.observations, noise.next_x0, torch.full((16, 1), 0.3, dtype=torch.float64)
    before = nets.policy.velocity(obs, x, t)
    other_obs, other_x = obs.clone(), x.clone()
    other_obs[3] += 1
    other_x[5] += 1
    changed = (nets.policy.velocity(other_obs, other_x, t) != before).any(1)
    assert changed.nonzero().flatten().tolist() == [3, 5]


def test_layers_start_as_flaxs():
    torch.manual_seed(0)
    nets = flow_sac.Networks(17, 6, flow_sac.Args(policy="naive"))
    kinds = (flow_sac.Linear, flow_sac.EnsembleLinear)
    layers = [layer for layer in nets.modules() if isinstance(layer, kinds)]
    assert len(layers) == 9
    for layer in layers:
        std = layer.weight.shape[1] ** -0.5  # both kinds have their inputs there
        assert layer.weight.std().item() == pytest.approx(std, rel=0.06)
        assert 1.9 < layer.weight.abs().max().item() / (std / 0.87962566) < 2.0001
        assert (layer.bias == 0).all()


def test_flow_g_starts_with_an_open_gate():
    _, nets, batch, noise = make(policy="flow-g")
    velocity, t = nets.policy.velocity, torch.full((16, 1), 0.3, dtype=torch.float64)
    seen = {}
    for name in ("gate", "candidate"):
        hook = lambda module, inputs, output, name=name: seen.update({name: output})
        getattr(velocity, name).register_forward_hook(hook)
    v = velocity(batch.observations, noise.next_x0, t)
    assert torch.equal(seen["gate"], torch.full_like(v, 5.0))
    assert torch.allclose(v, 1 / (1 + math.exp(-5)) * (seen["candidate"] - noise.next_x0))


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


@pytest.mark.parametrize("warmup", [0, 100])
def test_gradients_of_batch_renorm_pass_through_the_batchs_statistics_only(warmup):
    torch.manual_seed(0)
    norm = flow_sac.BatchRenorm(2, 1, 3, warmup=warmup).double()
    for x in (norm.scale, norm.bias, norm.mean):
        torch.nn.init.normal_(x)
    x = (2 * torch.randn(2, 20, 3, dtype=torch.float64) + 5).requires_grad_()
    weights = torch.randn(2, 20, 3, dtype=torch.float64)
    inputs = [x, norm.scale, norm.bias]
    running_mean, running_std = norm.mean.clone(), (norm.var + 1e-3).sqrt()
    found = torch.autograd.grad((norm(x) * weights).sum(), inputs)

    mean = x.mean(1, keepdim=True)
    std = (((x - mean) ** 2).mean(1, keepdim=True) + 1e-3).sqrt()
    y = (x - mean) / std
    if warmup == 0:
        r = (std / running_std).detach().clamp(1 / 3, 3)
        d = ((mean - running_mean) / running_std).detach().clamp(-5, 5)
        assert (r != 1).any() and (d != 0).any()
        y = y * r + d
    expected = torch.autograd.grad(((y * norm.scale + norm.bias) * weights).sum(), inputs)
    for one, other in zip(found, expected):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_crossq_loss_is_that_of_one_joint_forward_pass_in_numpy():
    args, nets, batch, noise = make(critic="crossq")
    states = [state_of(m) for m in nets.critic.mlp if isinstance(m, flow_sac.BatchRenorm)]
    linear = [m for m in nets.critic.mlp if isinstance(m, flow_sac.EnsembleLinear)]
    with torch.no_grad():  # a' and its log-density are those of the running statistics
        next_obs = batch.next_observations
        next_actions, log_prob = flow_sac.sample_with_log_prob(
            nets.policy, next_obs, noise.next_x0, noise.next_eps
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
    loss, metrics = flow_sac.critic_loss(nets, batch, noise.next_x0, noise.next_eps, args)
    assert loss.item() == pytest.approx(((q - target) ** 2).mean(), rel=1e-6)
    logged = [metrics[name].item() for name in ("q_mean", "q_min", "q_max")]
    assert logged == pytest.approx([q.mean(), q.min(), q.max()], rel=1e-6)
    for module, state in zip(
        (m for m in nets.critic.mlp if isinstance(m, flow_sac.BatchRenorm)), states
    ):
        assert np.allclose(module.mean, state["mean"]) and np.allclose(module.var, state["var"])
    assert not any(module.training for module in nets.modules())


@pytest.mark.parametrize("settings", [dict(critic="crossq"), dict(critic="sac"), OFFLINE])
def test_each_loss_trains_its_own_networks_only(settings):
    args, nets, batch, noise = make(**settings)
    policy_noise = noise.policy_x0, noise.policy_eps
    for own, loss in [
        ("critic", lambda: flow_sac.critic_loss(nets, batch, noise.next_x0, noise.next_eps, args)),
        ("policy", lambda: flow_sac.policy_loss(nets, batch, *policy_noise, args)),
        ("policy", lambda: flow_sac.flow_loss(nets, batch, noise.policy_x0, noise.flow_t)),
    ]:
        nets.zero_grad()
        loss()[0].backward()
        got = {k.split(".")[0] for k, p in nets.named_parameters() if p.grad is not None}
        assert got == {own}
    has_target = "target_critic" in dict(nets.named_children())
    assert has_target == (args.critic == "sac")


def test_the_critic_with_layer_norm_is_that_of_the_other_scripts():
    torch.manual_seed(0)
    ours = flow_sac.Critic(5, 3, (16, 16), "sac").double()
    theirs = qflow.Critic(5, 3, (16, 16), 2).double()  # test_parity compares it with JAX
    theirs.load_state_dict(ours.state_dict())
    obs = torch.randn(6, 5, dtype=torch.float64)
    actions = torch.randn(6, 3, dtype=torch.float64)
    assert torch.allclose(ours(obs, actions), theirs(obs, actions), rtol=1e-12)


def test_sac_loss_is_that_of_the_target_critics_and_their_minimum():
    args, nets, batch, noise = make(critic="sac")
    with torch.no_grad():
        for parameter in nets.target_critic.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64)
        inputs = batch.next_observations, noise.next_x0, noise.next_eps
        next_actions, log_prob = flow_sac.sample_with_log_prob(nets.policy, *inputs)
        next_q = nets.target_critic(batch.next_observations, next_actions).min(0).values
        target = batch.rewards + 0.99 * batch.masks * (next_q - 0.2 * log_prob)
        expected = ((nets.critic(batch.observations, batch.actions) - target) ** 2).mean()
    loss, _ = flow_sac.critic_loss(nets, batch, noise.next_x0, noise.next_eps, args)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("critic", ["crossq", "sac"])
def test_the_policys_loss_from_scratch(critic):
    args, nets, batch, noise = make(critic=critic)
    inputs = batch.observations, noise.policy_x0, noise.policy_eps
    loss, metrics = flow_sac.policy_loss(nets, batch, noise.policy_x0, noise.policy_eps, args)
    nets.policy.train()
    actions, log_prob = flow_sac.sample_with_log_prob(nets.policy, *inputs)
    q = nets.critic(batch.observations, actions).min(0).values
    assert loss.item() == pytest.approx((0.2 * log_prob - q).mean().item(), rel=1e-6)
    assert metrics["entropy"].item() == pytest.approx(-log_prob.mean().item(), rel=1e-9)


@pytest.mark.parametrize("critic, beta", [("crossq", 0.5), ("sac", 0.9)])
def test_optimizers(critic, beta):
    args, nets, _, _ = make(critic=critic)
    groups = [optimizer.param_groups[0] for optimizer in flow_sac.make_optimizers(nets, args)]
    trained = [nets.critic.parameters(), nets.policy.parameters(), [nets.log_temperature]]
    assert [set(group["params"]) for group in groups] == [set(ones) for ones in trained]
    assert [group["lr"] for group in groups] == [1e-3, 3e-4, 1e-3]
    assert all(group["betas"] == (beta, 0.999) for group in groups)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [dict(), OFFLINE], ids=["from scratch", "offline"])
def test_the_losses_are_traced_into_one_graph_and_compute_the_same(settings):
    results = []
    for compile in (lambda loss: loss, partial(torch.compile, fullgraph=True, backend="aot_eager")):
        args, nets, batch, noise = make(**settings)
        losses = []
        for loss_fn, *inputs in (
            (flow_sac.critic_loss, noise.next_x0, noise.next_eps, args),
            (flow_sac.flow_loss, noise.policy_x0, noise.flow_t),
            (flow_sac.policy_loss, noise.policy_x0, noise.policy_eps, args),
        ):
            loss, _ = compile(loss_fn)(nets, batch, *inputs)
            loss.backward()
            losses.append(loss.detach())
        gradients = [p.grad for p in nets.parameters() if p.grad is not None]
        results.append([*losses, *gradients])
    assert len(results[0]) == len(results[1])
    for plain, traced in zip(*results):
        assert torch.allclose(plain, traced)


def test_sac_target_critic_follows_and_crossq_policy_uses_running_statistics():
    args, nets, batch, noise = make(critic="sac", tau=0.1)
    nets.target_critic.load_state_dict({k: 2 * x for k, x in nets.critic.state_dict().items()})
    before = [p.clone() for p in nets.critic.parameters()]
    flow_sac.update_critic(nets, flow_sac.make_optimizers(nets, args), batch, noise, args)
    for old, target in zip(before, nets.target_critic.parameters()):
        assert torch.allclose(target, 0.9 * (2 * old) + 0.1 * old, rtol=1e-12)  # not the new one

    args, nets, batch, noise = make(critic="crossq")
    before = {k: b.clone() for k, b in nets.critic.named_buffers()}
    flow_sac.policy_loss(nets, batch, noise.policy_x0, noise.policy_eps, args)
    assert all(torch.equal(b, before[k]) for k, b in nets.critic.named_buffers())
    assert nets.policy.obs_norm.calls == 1


@pytest.mark.parametrize("entropy, sign", [(1e3, 1), (-1e3, -1)])
def test_temperature_rises_when_the_entropy_is_below_its_target(entropy, sign):
    args, nets, batch, noise = make(target_entropy=entropy)
    before = nets.log_temperature.item()
    flow_sac.update_policy(nets, flow_sac.make_optimizers(nets, args), batch, noise, args)
    assert sign * (nets.log_temperature.item() - before) > 0


@pytest.mark.parametrize(
    "policy, flag, target", [("flow-t", 0.0, 0.0), ("gaussian", 0.0, -3.0), ("gaussian", 1.5, 1.5)]
)
def test_the_target_entropy(policy, flag, target):
    args, nets, batch, noise = make(policy=policy, target_entropy=flag)
    inputs = nets, flow_sac.make_optimizers(nets, args), batch, noise, args
    for _ in range(2):  # the second gradient does not contain the first
        temperature = nets.log_temperature.exp().item()
        metrics = flow_sac.update_policy(*inputs)
        assert metrics["temperature"].item() == pytest.approx(temperature, rel=1e-6)
        slope = temperature * (metrics["entropy"].item() - target)  # by log temperature
        assert nets.log_temperature.grad.item() == pytest.approx(slope, rel=1e-6)


def test_collecting_has_the_noise_of_the_stochastic_policy():
    args, nets, batch, _ = make(**OFFLINE)
    nets.float()
    obs = batch.observations.float()
    found = flow_sac.act_with_noise(nets, obs.numpy(), args, torch.Generator().manual_seed(0))
    noise = torch.randn(5, 16, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, _ = flow_sac.sample_with_log_prob(nets.policy, obs, noise[0], noise[1:])
    assert np.array_equal(found, expected.view(16, 3, 1))


@pytest.mark.parametrize("script", [qflow, fql, flow_sac])
def test_noise_is_normal_and_times_are_uniform(script):
    flow_steps = [4] if script is flow_sac else []
    actions = torch.zeros(4000, 3)
    noise = script.sample_noise(actions, *flow_steps, torch.Generator().manual_seed(0))
    for x in noise:
        if x.shape == (4000, 1):
            assert 0 <= x.min() and x.max() < 1
            assert abs(x.mean() - 0.5) < 0.03 and abs(x.std() - 12**-0.5) < 0.02
        else:
            assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.05


# -------------------------------------------------------------------------------------- training


class Counter(gymnasium.Env):
    """Observes [episode, step]. Episodes 1, 3, ... end at step 3, the others are cut at step 5."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self):
        self.episode = 0
        self.seeds = []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.episode += 1
        self.steps = 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        self.steps += 1
        even = self.episode % 2 == 0
        obs = np.array([self.episode, float(self.steps)])
        return obs, 1.0, not even and self.steps == 3, even and self.steps == 5, {}


def train_on(make_env, folder, dataset, **settings):
    """Run train; the networks and the logs."""
    sizes = dict(hidden=(8,), policy_width=8, batch_size=8, eval_episodes=2)
    args = flow_sac.Args(**{**sizes, **settings})
    run = common.Run(folder, dict(script="flow_sac.py", args=vars(args)))
    env, eval_env = make_env(), make_env()
    with run:
        nets = flow_sac.train(args, dataset, env, eval_env, run)
    logs = {}
    for name in ("train", "eval", "episodes"):
        logs[name] = common.read_columns(folder / f"{name}.csv")
    logs["train"].pop("steps_per_s")
    return nets, logs


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions that `train` calls."""
    monkeypatch.setattr(common.Run, "plot", lambda self, unit, switch: None)
    calls = []
    for name in ("act_with_noise", "update_critic", "update_velocity", "update_policy"):
        function = getattr(flow_sac, name)
        counted = lambda *inputs, name=name, f=function: calls.append(name) or f(*inputs)
        monkeypatch.setattr(flow_sac, name, counted)
    return calls


def test_from_scratch_it_begins_with_uniform_actions_and_then_learns(tmp_path, calls, monkeypatch):
    def planned_actions(nets, obs, args, generator):
        """Actions that say at which step of the episode they were planned, and their place."""
        return np.array([[obs[0, 1:] / 10, obs[0, 1:] / 10 + 0.01]], np.float32)

    monkeypatch.setattr(flow_sac, "act_with_noise", planned_actions)
    monkeypatch.setattr(common, "check_env", lambda env, dataset: None)  # it makes a step, too
    env = Counter()
    dataset = common.Dataset.empty(2, 1)
    settings = dict(online_steps=60, learning_starts=40, log_interval=2, horizon=2)
    _, logs = train_on(lambda: env, tmp_path / "run", dataset, **settings)
    assert len(set(env.seeds)) == 18  # each episode has its own, two evaluated ones too
    turn = ["update_critic", "update_policy", "update_critic", "update_critic"]
    assert calls == 6 * turn + turn[:3]  # 20 updates
    assert logs["train"]["step"].tolist() == list(range(42, 61, 2))
    assert all(np.isfinite(values).all() for values in logs["train"].values())
    assert logs["eval"]["step"].tolist() == [60]

    # The episodes have 3, 5, 3, ... steps: 10 in the first 40.
    actions = dataset.actions[dataset.rows].flatten()
    assert len(actions[:40].unique()) == 40 and abs(actions[:40].mean()) < 0.3
    assert 0.45 < actions[:40].std() < 0.7 and actions[:40].abs().max() <= 1  # uniform: 0.58
    planned = [step // 2 * 2 / 10 + step % 2 / 100 for n in (3, 5, 3, 5, 3, 1) for step in range(n)]
    assert torch.allclose(actions[40:], torch.tensor(planned))
    batch = dataset.chunks(torch.arange(60), 1, 1.0)
    obs, next_obs = batch.observations, batch.next_observations
    assert (batch.rewards == 1).all()
    assert torch.equal(next_obs, obs + torch.tensor([0.0, 1.0]))  # of the same episode
    terminates = (obs[:, 0] % 2 == 1) & (next_obs[:, 1] == 3)
    assert terminates.sum() == 8 and torch.equal(batch.masks, (~terminates).float())
    assert (next_obs[:, 1] == 5).sum() == 7  # the time limit: it bootstraps
    log = logs["episodes"]
    assert log["step"][:4].tolist() == [3, 8, 11, 16] and len(log["step"]) == 15
    assert log["return"][:4].tolist() == [3, 5, 3, 5] and np.isnan(log["success"]).all()


def test_with_a_dataset_each_offline_batch_has_two_updates(tmp_path, calls):
    settings = {**OFFLINE, "horizon": 2, "policy_frequency": 1}
    steps = dict(offline_steps=10, online_steps=30, learning_starts=20, log_interval=5)
    rng = np.random.default_rng(0)
    valids = np.arange(60) % 6 < 5
    rows = rng.random((60, 2)), rng.uniform(-1, 1, (60, 1)), 1 * valids, valids, valids
    dataset = common.Dataset(*rows)
    _, logs = train_on(Counter, tmp_path / "run", dataset, **settings, **steps)
    offline = ["update_critic", "update_velocity", "update_critic", "update_policy"]
    assert calls[:40] == 10 * offline
    # The policy acts from the start, once for two steps of an episode of 3 or 5 steps.
    assert calls[40:].count("act_with_noise") == 2 + 3 + 2 + 3 + 2 + 3 + 2 + 2
    updates = [name for name in calls[40:] if name != "act_with_noise"]
    assert updates == 10 * ["update_critic", "update_policy"]
    assert calls[40:52] == ["act_with_noise"] * 12  # of 20 steps, before the first update
    assert len(dataset) == 50 + 30
    log = logs["train"]
    assert log["step"].tolist() == [5, 10, 35, 40]  # none while it only collects
    assert np.isnan(log["flow_loss"]).tolist() == [False, False, True, True]
    assert (0 < log["bc_loss"]).all() and (log["bc_loss"] < 10).all()
    assert logs["eval"]["step"].tolist() == [10, 40]
    for name in ("return", "length"):
        assert logs["eval"][name].tolist() == [4, 4]  # the means of 3 and 5


def test_the_second_offline_update_has_noise_of_its_own(tmp_path, monkeypatch):
    used = []
    for name in ("update_critic", "update_velocity", "update_policy"):
        function = getattr(flow_sac, name)
        noted = lambda nets, optimizers, batch, noise, *rest, f=function: (
            used.append((batch, noise)) or f(nets, optimizers, batch, noise, *rest)
        )
        monkeypatch.setattr(flow_sac, name, noted)
    monkeypatch.setattr(common.Run, "plot", lambda self, unit, switch: None)
    valids = np.arange(12) % 6 < 5
    dataset = common.Dataset(np.ones((12, 2)), np.zeros((12, 1)), 1 * valids, valids, valids)
    settings = {**OFFLINE, "horizon": 2, "offline_steps": 1, "online_steps": 0, "discount": 0.5}
    train_on(Counter, tmp_path / "run", dataset, **settings)
    (batch, first), (_, velocity), (_, second), (_, policy) = used
    assert all(other is batch for other, _ in used)
    assert velocity is first and policy is second
    assert not torch.isin(first.next_x0, second.next_x0).any()
    numbers = torch.cat([x.flatten() for noise in (first, second) for x in noise])
    assert len(numbers.unique()) == len(numbers)  # each has one use
    assert first.next_eps.shape == (4, 8, 2)
    assert torch.equal(batch.rewards, batch.valid @ torch.tensor([1.0, 0.5]))


def test_compiled_losses_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "plot", lambda self, unit, switch: None)
    calls = []

    def compile(loss_fn, fullgraph):
        return lambda *inputs: calls.append(loss_fn.__name__) or loss_fn(*inputs)

    monkeypatch.setattr(torch, "compile", compile)
    valids = np.arange(12) % 6 < 5
    dataset = common.Dataset(np.ones((12, 2)), np.zeros((12, 1)), 1 * valids, valids, valids)
    steps = dict(offline_steps=1, online_steps=5, learning_starts=1)
    train_on(Counter, tmp_path / "run", dataset, compile=True, **{**OFFLINE, "horizon": 2}, **steps)
    assert calls == [
        *["critic_loss", "flow_loss", "critic_loss", "policy_loss"],  # offline
        *["critic_loss", "policy_loss", "critic_loss", "critic_loss", "critic_loss"],
        "policy_loss",
    ]


def test_evaluating_does_not_change_what_an_episode_draws_from_numpy(tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "plot", lambda self, unit, switch: None)
    random_reward = lambda reward: np.random.random()
    make_env = lambda: gymnasium.wrappers.TransformReward(Counter(), random_reward)
    rewards = []
    for interval in (2, 100):
        dataset = common.Dataset.empty(2, 1)
        steps = dict(online_steps=12, learning_starts=1, eval_interval=interval)
        train_on(make_env, tmp_path / str(interval), dataset, **steps)
        rewards.append(dataset.collected()["rewards"])
    assert torch.equal(*rewards)


def test_a_seed_has_its_own_weights_noise_and_episodes(tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "plot", lambda self, unit, switch: None)
    monkeypatch.setattr(common, "check_env", lambda env, dataset: None)  # it makes a step, too
    steps = dict(online_steps=12, learning_starts=10, policy_lr=1e-30, q_lr=1e-30)  # weights stay
    weights, noise, episodes, seeds_of_weights = [], [], [], []
    manual_seed = torch.manual_seed

    def noted_seed(seed):
        seeds_of_weights.append(seed)
        return manual_seed(seed)

    monkeypatch.setattr(torch, "manual_seed", noted_seed)
    for seed in (0, 1000):
        env, dataset = Counter(), common.Dataset.empty(2, 1)
        nets, _ = train_on(lambda env=env: env, tmp_path / str(seed), dataset, seed=seed, **steps)
        weights.append(nets.critic.mlp[1].weight)
        noise.append(common.read_checkpoint(tmp_path / str(seed))["generator"])
        episodes.append(set(env.seeds))
    assert not torch.equal(*weights) and not torch.equal(*noise)
    assert not episodes[0] & episodes[1]
    assert seeds_of_weights and not {0, 1000} & set(seeds_of_weights)  # not those of the noise


def short_run(folder, **settings):
    """A run on a real environment; the networks and the logs."""
    sizes = dict(hidden=(32, 32), policy_width=16, batch_size=32, eval_episodes=1)
    steps = dict(online_steps=300, learning_starts=200, eval_interval=150, log_interval=50)
    settings = {**sizes, **steps, **settings}
    make_env = lambda: flow_sac.make_env(flow_sac.Args(env=settings["env"]), max_episode_steps=50)
    with make_env() as env:
        dataset = common.Dataset.empty(*env.observation_space.shape, *env.action_space.shape)
    return train_on(make_env, folder, dataset, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        dict(policy="flow-g", env="Pendulum-v1", online_steps=210),
        dict(policy="gaussian", env="Pendulum-v1", online_steps=210),
        pytest.param(
            dict(policy="flow-t", env="Pendulum-v1", critic="sac", horizon=2),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dict(policy="naive", env="HalfCheetah-v5", online_steps=230), marks=pytest.mark.slow
        ),
        pytest.param(
            dict(policy="flow-t", env="online-ant-v0", online_steps=230), marks=pytest.mark.slow
        ),
    ],
    ids=lambda settings: settings["env"] + "-" + settings["policy"],
)
def test_the_same_seed_gives_the_same_run(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "plot", lambda self, unit, switch: None)
    nets, logs = short_run(tmp_path / "run", **settings, seed=3)
    _, same_logs = short_run(tmp_path / "same", **settings, seed=3)
    _, other_logs = short_run(tmp_path / "other", **settings, seed=4)
    np.testing.assert_equal(logs, same_logs)
    assert (logs["train"]["critic_loss"] != other_logs["train"]["critic_loss"]).all()
    assert (logs["eval"]["return"] != other_logs["eval"]["return"]).all()
    end = settings.get("online_steps", 300)
    assert logs["eval"]["step"].tolist() == [150, end]
    assert logs["train"]["step"][-1] == end
    assert all(np.isfinite(values).all() for values in logs["train"].values())
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert all(torch.equal(x, state["nets"][name]) for name, x in nets.state_dict().items())
    loaded, args = flow_sac.load(tmp_path / "run")
    obs = np.ones((1, nets.sizes[0]))
    act = lambda nets: flow_sac.act(nets, obs, args, torch.Generator().manual_seed(0))
    assert np.array_equal(act(nets), act(loaded))


def test_an_environment_that_is_not_installed(monkeypatch):
    error = gymnasium.error.DependencyNotInstalled("Box2D is not installed")
    monkeypatch.setattr(gymnasium, "make", Mock(side_effect=error))
    with pytest.raises(common.UserError, match="--env CarRacing-v3: Box2D is not installed"):
        flow_sac.make_env(flow_sac.Args(env="CarRacing-v3"))
