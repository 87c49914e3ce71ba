"""Updates on the meta device, which has shapes and no numbers: nothing there can be waited for.

On a GPU, a number that Python reads (.item(), a condition, a boolean index) makes the loop wait,
and a tensor left on the CPU is copied at each update. On meta the first is an error of torch, the
second one of MetaOnly.
"""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import flow_sac
import fql
import qflow


class MetaOnly(TorchDispatchMode):
    """Every tensor that an operation takes or returns is on meta; numbers (0-dim) may be on CPU."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, torch.Tensor) and x.dim() > 0 and x.device.type != "meta":
                raise AssertionError(f"{op}: a tensor of shape {tuple(x.shape)} on {x.device}")
        return result


class NoOptimizer:
    """In place of Adam: fused, it does not exist on meta."""

    def __init__(self, parameters):
        self.parameters = list(parameters)
        self.steps = 0

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    def step(self):
        self.steps += 1


def assert_trained(module):
    """Each parameter that is trained has a gradient, on meta like itself."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.is_meta, name


def meta_dataset(observations=None):
    """Two episodes of zeros on meta: 4 observations, or these (40, ...), and 3 actions."""
    valids = (np.arange(40) % 20 < 19).astype(np.float32)
    if observations is None:
        observations = np.zeros((40, 4))
    dataset = common.Dataset(observations, np.zeros((40, 3)), -valids, valids, valids)
    for name, x in vars(dataset).items():
        if isinstance(x, torch.Tensor):
            setattr(dataset, name, x.to("meta"))
    return dataset


@pytest.mark.parametrize("method", [qflow, fql])
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(horizon=5, q_agg="min", normalize_q_loss=True),
        dict(num_critics=10, rho=0.5),
    ],
    ids=["default", "min", "ensemble"],
)
def test_offline_updates(method, settings):
    if method is qflow:
        settings = {name: x for name, x in settings.items() if name != "normalize_q_loss"}
    args = method.Args(hidden=(16, 16), flow_steps=3, batch_size=8, **settings)
    dataset = meta_dataset()
    nets = method.Networks(4, 3 * args.horizon, args).to("meta")
    optimizer = NoOptimizer(p for p in nets.parameters() if p.requires_grad)
    generator = torch.Generator()  # there is none on meta; there, the CPU's serves
    with MetaOnly():
        batch = dataset.sample(args.batch_size, args.horizon, args.discount, generator)
        noise = method.sample_noise(batch.actions, generator)
        metrics = method.update(nets, optimizer, batch, noise, args)
    assert batch.valid.shape == (8, args.horizon) and optimizer.steps == 1
    assert all(x.is_meta for x in metrics.values())
    assert_trained(nets)


@pytest.mark.parametrize("horizon", [1, 5])
def test_updates_on_pixels(horizon):
    args = fql.Args(hidden=(16, 16), flow_steps=3, batch_size=8, horizon=horizon)
    dataset = meta_dataset(np.zeros((40, 16, 16, 3), np.uint8))
    nets = fql.Networks(dataset.obs_dim, 3 * args.horizon, args).to("meta")
    optimizer = NoOptimizer(p for p in nets.parameters() if p.requires_grad)
    generator = torch.Generator()
    with MetaOnly():
        batch = dataset.sample(args.batch_size, args.horizon, args.discount, generator)
        noise = fql.sample_noise(batch.actions, generator)
        batch = fql.augment(batch, fql.sample_offsets(batch.actions, generator))
        metrics = fql.update(nets, optimizer, batch, noise, args)
    assert batch.observations.shape == batch.next_observations.shape == (8, 16, 16, 9)
    assert all(x.is_meta for x in metrics.values())
    assert_trained(nets)


@pytest.mark.parametrize("policy", ["flow-t", "flow-g", "naive", "gaussian"])
@pytest.mark.parametrize(
    "settings",
    [
        dict(critic="crossq"),
        dict(critic="sac", q_agg="mean"),
        dict(critic="sac", horizon=5, bc_weight=100.0, noise_std=0.05),
    ],
    ids=["crossq", "sac", "offline"],
)
def test_updates_of_flow_sac(policy, settings):
    is_offline = "noise_std" in settings
    if is_offline and policy == "gaussian":
        pytest.skip("from scratch only")
    args = flow_sac.Args(policy=policy, hidden=(16, 16), policy_width=8, batch_size=8, **settings)
    dataset = meta_dataset()
    nets = flow_sac.Networks(4, 3 * args.horizon, args).to("meta")
    modules = nets.critic.parameters(), nets.policy.parameters(), [nets.log_temperature]
    optimizers = flow_sac.Optimizers(*(NoOptimizer(parameters) for parameters in modules))
    generator = torch.Generator()
    with MetaOnly():
        batch = dataset.sample(args.batch_size, args.horizon, args.discount, generator)
        noise = flow_sac.sample_noise(batch.actions, args.flow_steps, generator)
        metrics = flow_sac.update_critic(nets, optimizers, batch, noise, args)
        if is_offline:
            metrics |= flow_sac.update_velocity(nets, optimizers, batch, noise)
        metrics |= flow_sac.update_policy(nets, optimizers, batch, noise, args)
    assert all(x.is_meta for x in metrics.values())
    steps = [optimizer.steps for optimizer in optimizers]
    assert steps == ([1, 2, 0] if is_offline else [1, 1, 1])
    assert_trained(nets.critic)
    assert_trained(nets.policy)


def take(x):
    return x[torch.tensor([0, 2, 1])]


def take_in_backward(x):
    x.requires_grad_().register_hook(take)
    x.sum().backward()


WAIT = {
    "item": lambda x: x.sum().item(),
    "condition": lambda x: 1 if x.sum() > 0 else 0,
    "boolean index": lambda x: x[x > 0],
    "copy": lambda x: x.cpu(),
}
ON_THE_CPU = {
    "index": take,
    "index in backward": take_in_backward,
    "constant": lambda x: torch.zeros(3),
    "noise": lambda x: torch.rand(3, 2),
}


@pytest.mark.parametrize("name", WAIT)
def test_what_waits_for_the_device_is_an_error_of_torch(name):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta|Meta"), MetaOnly():
        WAIT[name](torch.zeros(3, device="meta"))


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_what_stays_on_the_cpu_is_found(name):
    ON_THE_CPU[name](torch.zeros(3, device="meta"))  # passes, unless it is looked for
    with pytest.raises(AssertionError, match="on cpu"), MetaOnly():
        ON_THE_CPU[name](torch.zeros(3, device="meta"))


def test_a_number_on_the_cpu_is_no_mistake():
    with MetaOnly():
        assert (torch.tensor(2.0) * torch.zeros(3, device="meta") + 1).is_meta
