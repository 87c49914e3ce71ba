"""An update as it is written, compiled, and as a CUDA graph: the same 50 updates."""

from contextlib import closing

import gymnasium
import numpy as np
import pytest
import torch

import common
import fql
import qflow

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("method", [qflow, fql])
def test_compiled_and_captured_updates_are_the_plain_ones(method):
    rng, n = np.random.default_rng(0), 1000
    obs, actions = rng.normal(size=(n, 4)), rng.uniform(-1, 1, (n, 3))
    valids = (np.arange(n) % 100 < 99).astype(np.float32)
    dataset = common.Dataset(obs, actions, -valids, valids, valids, device="cuda")
    common.pick_device("cuda", "highest")
    args = method.Args(hidden=(64, 64), horizon=2, batch_size=64)

    def run(compiled, per_graph=0):
        torch.manual_seed(0)
        nets = method.Networks(4, 6, args).cuda()
        optimizer = method.make_optimizer(nets, args)
        generator = torch.Generator("cuda").manual_seed(0)
        loss = torch.compile(method.total_loss, fullgraph=True) if compiled else method.total_loss

        def updates():
            for _ in range(per_graph or 1):
                batch = dataset.sample(64, 2, 0.99, generator)
                draws = method.draw(batch.actions, generator)
                metrics = method.update(nets, optimizer, batch, draws, args, loss)
            return metrics

        updates = method.capture(updates, generator) if per_graph else updates
        calls = range(50 // (per_graph or 1))
        losses = [torch.stack(list(updates().values())).cpu() for _ in calls]
        return torch.stack(losses), torch.cat([p.flatten() for p in nets.parameters()]).cpu()

    losses, parameters = run(False)
    for compiled, per_graph in ((True, 0), (False, 1), (True, 1), (False, 5), (True, 5)):
        found = run(compiled, per_graph)
        every = max(per_graph, 1)
        assert torch.allclose(losses[every - 1 :: every], found[0], rtol=1e-3, atol=1e-4)
        assert torch.allclose(parameters, found[1], rtol=1e-3, atol=1e-4)
    assert not torch.equal(losses[3], losses[49])  # each update has draws of its own


@pytest.mark.parametrize("method", [qflow, fql])
def test_a_captured_run_evaluates_and_goes_on_where_it_stopped(method, tmp_path):
    rng, n = np.random.default_rng(0), 1000
    obs, actions = rng.normal(size=(n, 3)), rng.uniform(-1, 1, (n, 1))
    valids = (np.arange(n) % 100 < 99).astype(np.float32)
    dataset = common.Dataset(obs, actions, -valids, valids, valids, device="cuda")
    common.pick_device("cuda", "highest")
    settings = dict(hidden=(64, 64), batch_size=64, eval_episodes=2, log_interval=10)
    pendulum = lambda: gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)

    def train(name, steps, compile, resume=None):
        args = method.Args(offline_steps=steps, eval_interval=50, compile=compile, **settings)
        envs = common.make_envs(pendulum, 2)
        with closing(envs), common.Run(tmp_path, name, {}, resume) as run:
            nets = method.train(args, dataset, envs, run)
        return run, torch.cat([p.flatten() for p in nets.parameters()]).cpu()

    plain = train("plain", 100, compile=False)
    whole = train("whole", 100, compile=True)
    half, _ = train("half", 50, compile=True)
    resumed = train("half", 100, compile=True, resume=half.path)
    for run, parameters in (whole, resumed):
        assert torch.allclose(parameters, plain[1], rtol=1e-3, atol=1e-4)
        for name in ("train.csv", "eval.csv"):
            for row, expected in zip(run.rows[name], plain[0].rows[name], strict=True):
                expected.pop("time_updates_per_s", None)
                found = {k: row[k] for k in expected}
                assert found == pytest.approx(expected, rel=0.05, abs=0.01, nan_ok=True)
