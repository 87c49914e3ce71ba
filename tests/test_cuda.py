"""On a GPU: updates are those of the CPU, also compiled and captured, and never wait for it."""

import copy

import gymnasium
import numpy as np
import pytest
import test_flow_sac
import test_fql
import test_qflow
import torch

import common
import flow_sac
import fql
import qflow

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def random_dataset(obs_dim, action_dim, n=1000, device="cuda"):
    """Ten episodes of random numbers."""
    rng = np.random.default_rng(0)
    valids = (np.arange(n) % 100 < 99).astype(np.float32)
    return common.Dataset(
        observations=rng.normal(size=(n, obs_dim)),
        actions=rng.uniform(-1, 1, (n, action_dim)),
        rewards=-valids,
        masks=valids,
        valids=valids,
        device=device,
    )


def flat(nets):
    """All parameters as one vector on the CPU."""
    return torch.cat([p.detach().flatten() for p in nets.parameters()]).cpu()


@pytest.fixture(autouse=True)
def float32_products(monkeypatch):
    """TF32 would round products and convolutions to three digits. Nothing is compiled yet."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()


def assert_mostly_close(first, second):
    """All but 0.1%: where a first gradient is rounding alone, Adam's step may have either sign."""
    assert torch.isclose(first, second, rtol=1e-3, atol=1e-4).float().mean() >= 0.999


@pytest.mark.parametrize("settings", [dict(), dict(num_critics=10, rho=0.5)])
@pytest.mark.parametrize("method, make", [(qflow, test_qflow.make), (fql, test_fql.make)])
def test_offline_updates_are_those_of_the_cpu_and_never_wait(method, make, settings):
    results = []
    for device in ("cpu", "cuda"):
        args, nets, batch, noise = make(batch_size=64, **settings)
        nets.to(device)
        batch = common.Batch(*(x.to(device) for x in batch))
        noise = method.Noise(*(x.to(device) for x in noise))
        optimizer = method.make_optimizer(nets, args)
        for _ in range(3):
            method.update(nets, optimizer, batch, noise, args)
        results.append(flat(nets))
    assert torch.allclose(*results, rtol=1e-6, atol=1e-8)  # in float64

    dataset = random_dataset(4, 3)
    nets = copy.deepcopy(nets).float()
    optimizer = method.make_optimizer(nets, args)
    generator = torch.Generator("cuda")

    def sample_and_update():
        batch = dataset.sample(64, 1, 0.99, generator)
        noise = method.sample_noise(batch.actions, generator)
        return method.update(nets, optimizer, batch, noise, args)

    sample_and_update()  # at first, the libraries are loaded and Adam's state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample_and_update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(policy="gaussian"), test_flow_sac.OFFLINE],
    ids=["scratch", "gaussian", "offline"],
)
def test_updates_of_flow_sac_are_those_of_the_cpu_and_never_wait(settings):
    results = []
    for device in ("cpu", "cuda"):
        args, nets, batch, noise = test_flow_sac.make(**settings)
        nets.to(device)
        batch = common.Batch(*(x.to(device) for x in batch))
        noise = flow_sac.Noise(*(x.to(device) for x in noise))
        optimizers = flow_sac.make_optimizers(nets, args)
        for _ in range(3):
            metrics = flow_sac.update_critic(nets, optimizers, batch, noise, args)
            if args.policy != "gaussian":
                metrics |= flow_sac.update_velocity(nets, optimizers, batch, noise)
            metrics |= flow_sac.update_policy(nets, optimizers, batch, noise, args)
        results.append(torch.stack([x.cpu() for x in metrics.values()]))
    assert torch.allclose(*results, rtol=1e-6, atol=1e-8)  # in float64

    dataset = random_dataset(5, 3 // args.horizon)
    nets = copy.deepcopy(nets).float()
    optimizers = flow_sac.make_optimizers(nets, args)
    generator = torch.Generator("cuda")

    def sample_and_update():
        batch = dataset.sample(64, args.horizon, 0.99, generator)
        noise = flow_sac.sample_noise(batch.actions, args.flow_steps, generator)
        flow_sac.update_critic(nets, optimizers, batch, noise, args)
        if args.policy != "gaussian":
            flow_sac.update_velocity(nets, optimizers, batch, noise)
        flow_sac.update_policy(nets, optimizers, batch, noise, args)

    sample_and_update()  # at first, the libraries are loaded and Adam's state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample_and_update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("frames_on_host", [False, True])
def test_updates_on_pixels_are_those_of_the_cpu_and_never_wait(frames_on_host):
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(200, 32, 32, 3), dtype=np.uint8)
    valids = (np.arange(200) % 20 < 19).astype(np.float32)
    rest = rng.uniform(-1, 1, (200, 3)), -valids, valids, valids
    allocated = torch.cuda.memory_allocated()
    dataset = common.Dataset(frames, *rest, device="cuda", frames_on_host=frames_on_host)
    added = torch.cuda.memory_allocated() - allocated
    assert (added < frames.nbytes) == frames_on_host
    assert dataset.observations.is_cuda and np.array_equal(dataset.observations.cpu(), frames)
    args = fql.Args(hidden=(16, 16), flow_steps=3, batch_size=16)
    torch.manual_seed(0)
    nets = fql.Networks(dataset.obs_dim, 3, args)
    results = []
    for device in ("cpu", "cuda"):
        data = dataset if device == "cuda" else common.Dataset(frames, *rest)
        copied = copy.deepcopy(nets).to(device)
        optimizer = fql.make_optimizer(copied, args)
        starts = torch.arange(16, device=device) * 10
        batch = data.chunks(starts, 1, args.discount)
        generator = torch.Generator().manual_seed(0)
        noise = fql.sample_noise(batch.actions.cpu(), generator)
        noise = fql.Noise(*(x.to(device) for x in noise))
        offsets = fql.sample_offsets(batch.actions.cpu(), generator)
        batch = fql.augment(batch, offsets.to(device))
        metrics = fql.update(copied, optimizer, batch, noise, args)
        results.append(torch.stack([x.cpu() for x in metrics.values()]))
    assert torch.allclose(*results, rtol=1e-3, atol=1e-4)

    optimizer = fql.make_optimizer(copied, args)
    generator = torch.Generator("cuda").manual_seed(0)

    def sample_and_update():
        batch = dataset.sample(16, 1, args.discount, generator)
        noise = fql.sample_noise(batch.actions, generator)
        batch = fql.augment(batch, fql.sample_offsets(batch.actions, generator))
        return fql.update(copied, optimizer, batch, noise, args)

    sample_and_update()  # at first, the libraries are loaded and Adam's state is made
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample_and_update()
    finally:
        torch.cuda.set_sync_debug_mode("default")

    captured = fql.CUDAGraph(sample_and_update, generator)
    losses = [captured()["critic_loss"].item() for _ in range(8)]
    assert np.isfinite(losses).all() and len(set(losses)) == 8


@pytest.mark.parametrize("settings", [dict(), dict(num_critics=10, rho=0.5)])
@pytest.mark.parametrize("method", [qflow, fql])
def test_compiled_and_captured_updates_are_the_plain_ones(method, settings):
    dataset = random_dataset(4, 3)
    args = method.Args(hidden=(64, 64), horizon=2, batch_size=64, **settings)

    def fifty_updates(compiles, captures):
        """The metrics (50, M) and the parameters after them."""
        torch.manual_seed(0)
        nets = method.Networks(4, 6, args).cuda()
        optimizer = method.make_optimizer(nets, args)
        generator = torch.Generator("cuda").manual_seed(0)
        loss_fn = method.total_loss
        if compiles:
            loss_fn = torch.compile(loss_fn, fullgraph=True)

        def sample_and_update():
            batch = dataset.sample(args.batch_size, args.horizon, args.discount, generator)
            noise = method.sample_noise(batch.actions, generator)
            return method.update(nets, optimizer, batch, noise, args, loss_fn)

        if captures:
            sample_and_update = method.CUDAGraph(sample_and_update, generator)
        metrics = []
        for _ in range(50):
            metrics.append(torch.stack(list(sample_and_update().values())).cpu())
        return torch.stack(metrics), flat(nets)

    metrics, parameters = fifty_updates(compiles=False, captures=False)
    for compiles, captures in ((True, False), (False, True), (True, True)):
        found = fifty_updates(compiles, captures)
        assert torch.allclose(metrics, found[0], rtol=1e-3, atol=1e-4)
        assert_mostly_close(parameters, found[1])
    assert not torch.equal(metrics[3], metrics[49])  # each update has noise of its own


# At their learning rates, rounding alone makes two runs differ after thirty updates.
OF_FLOW_SAC = dict(learning_starts=10, policy_width=16, q_lr=1e-5, policy_lr=1e-5)


@pytest.mark.parametrize(
    "method, settings",
    [
        (qflow, dict()),
        (fql, dict()),
        (flow_sac, dict(**OF_FLOW_SAC)),
        (flow_sac, dict(**OF_FLOW_SAC, **test_flow_sac.OFFLINE)),
    ],
    ids=["qflow", "fql", "flow_sac-crossq", "flow_sac-offline"],
)
def test_a_captured_run_evaluates_and_goes_on_where_it_stopped(method, settings, tmp_path):
    def pendulum():
        return gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)

    def train(name, steps, compiles, resume=False):
        dataset = random_dataset(3, 1)
        args = method.Args(
            offline_steps=50,
            online_steps=steps - 50,
            eval_interval=50,
            eval_episodes=2,
            log_interval=10,
            hidden=(64, 64),
            batch_size=64,
            compile=compiles,
            **settings,
        )
        config = dict(script=f"{method.__name__}.py", args=vars(args), device="cuda")
        env, eval_env = pendulum(), pendulum()
        with common.Run(tmp_path / name, config, resume) as run:
            nets = method.train(args, dataset, env, eval_env, run)
        return run.folder, flat(nets)

    plain, expected_parameters = train("plain", 100, compiles=False)
    whole = train("whole", 100, compiles=True)
    train("half", 50, compiles=True)
    resumed = train("half", 100, compiles=True, resume=True)
    for folder, parameters in (whole, resumed):
        assert_mostly_close(parameters, expected_parameters)
        for name in ("train.csv", "eval.csv"):
            columns = common.read_columns(folder / name)
            for column, expected in common.read_columns(plain / name).items():
                if column != "steps_per_s":
                    found = columns[column]
                    assert found == pytest.approx(expected, rel=0.05, abs=0.01, nan_ok=True)


def test_a_run_of_the_cpu_goes_on_here(tmp_path, capsys):
    def pendulum():
        return gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)

    def train(device, steps, resume):
        dataset = random_dataset(3, 1, device=device)
        args = qflow.Args(
            offline_steps=steps, eval_episodes=2, hidden=(64, 64), batch_size=64, log_interval=1
        )
        config = dict(script="qflow.py", args=vars(args), device=device)
        env, eval_env = pendulum(), pendulum()
        with common.Run(tmp_path / "run", config, resume) as run:
            return qflow.train(args, dataset, env, eval_env, run)

    train("cpu", 5, resume=False)
    nets = train("cuda", 10, resume=True)
    assert all(p.is_cuda for p in nets.parameters())
    assert "the checkpoint is from another device" in capsys.readouterr().out
    log = common.read_columns(tmp_path / "run/train.csv")
    assert log["step"].tolist() == list(range(1, 11))
    assert all(np.isfinite(values).all() for values in log.values())
