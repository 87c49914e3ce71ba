"""Replays what a JAX implementation of the authors' equations computed, with the code that trains.

Each *.npz in $GOLDEN_DIR (default: tests/golden) holds weights, batches, random draws and results
of three updates in a row, or a sampler's output. Its `config` says which algorithm it records.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_common import compact

import common
import flow_sac
import fql
import qflow

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("*.npz"))
NETS = {"velocity": "flow", "value": "inner_value"}  # our names, where the files have others


def load(path):
    with np.load(path) as file:
        arrays = dict(file)
    config = json.loads(str(arrays.pop("config")))
    return config.get("algorithm") or config["architecture"], config, arrays


def under(arrays, prefix):
    """The arrays below a prefix, as float32 tensors."""
    return {
        k.removeprefix(prefix): torch.as_tensor(v, dtype=torch.float32)
        for k, v in arrays.items()
        if k.startswith(prefix)
    }


def golden_parameters(nets):
    """Every parameter under the name that the files give it."""
    named = {}
    for net, module in nets.named_children():
        counts = {"dense": 0, "norm": 0}
        for layer in module.mlp:
            own = dict(layer.named_parameters())
            if own:
                kind, first = ("dense", "kernel") if "weight" in own else ("norm", "scale")
                for name, parameter in zip((first, "bias"), own.values()):
                    named[f"{NETS.get(net, net)}/{kind}{counts[kind]}/{name}"] = parameter
                counts[kind] += 1
    return named


def close(actual, expected, relative=0.0, of_largest=0.0, absolute=0.0, share=1.0, what=""):
    """At least `share` of the entries are within the sum of the tolerances."""
    actual, expected = actual.detach().reshape(expected.shape), expected
    bound = absolute + relative * expected.abs() + of_largest * expected.abs().max()
    ok = (actual - expected).abs() <= bound
    worst = (actual - expected).abs().max()
    assert ok.float().mean() >= share, (
        f"{what}: off by up to {worst:.3g}, allowed {bound.max():.3g}"
    )


def replay_updates(arrays, config, nets, args, module, make_draws, check_step, losses):
    """losses: our metric -> (the file's name for it, relative tolerance)."""
    parameters = golden_parameters(nets)
    initial = under(arrays, "init/")
    assert set(parameters) == set(initial)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(initial[name].reshape(parameter.shape))
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    optimizer = module.make_optimizer(nets, args)
    assert config["steps"] > 0
    for step in range(config["steps"]):
        recorded = under(arrays, f"step{step}/batch/")
        batch = common.Batch(**recorded, valid=torch.ones(len(recorded["rewards"]), 1))
        draws = make_draws(under(arrays, f"step{step}/draw/"))
        expected = under(arrays, f"step{step}/expect/")
        check_step(batch, draws, expected)
        metrics = module.update(nets, optimizer, batch, draws, args)
        for name, (key, tolerance) in losses.items():
            close(metrics[name], expected[key], relative=tolerance, what=f"step {step} {name}")
        gradients = under(arrays, f"step{step}/grad/")
        assert set(gradients) == trained
        for name, gradient in gradients.items():
            close(parameters[name].grad, gradient, of_largest=1e-3, what=f"step {step} {name}")
    final = under(arrays, "final/")
    assert set(final) == set(parameters)
    for name in set(final) - trained:
        close(parameters[name], final[name], absolute=3e-7, what=name)
    ours, theirs = (
        torch.cat([x[k].flatten() for k in sorted(trained)]) for x in (parameters, final)
    )
    close(ours, theirs, absolute=1e-5, share=0.999, what="parameters")


def replay_qflow(config, arrays):
    args = qflow.Args(
        hidden=tuple(config["hidden_dims"]),
        flow_steps=config["flow_steps"],
        lam=config["alpha"],
        time_dim=config["time_embed_dim"],
        **{k: config[k] for k in ("batch_size", "q_agg", "discount", "tau", "lr")},
    )
    nets = qflow.Networks(config["obs_dim"], config["action_dim"], args)

    def draws(d):
        names = "critic/next_noise", "critic/x0", "critic/t", "actor/x0", "actor/t"
        return qflow.Draws(*(d[name] for name in names))

    def check(batch, draws, expected):
        s, a, k = batch.observations, batch.actions, args.flow_steps
        with torch.no_grad():
            next_s = batch.next_observations
            next_actions = qflow.sample_actions(nets, next_s, draws.next_x0, args)
            close(next_actions, expected["critic/next_actions"], absolute=1e-5)
            xt = (1 - draws.value_t) * draws.value_x0 + draws.value_t * a
            x1 = qflow.rollout(nets.velocity, s, xt, draws.value_t, k)
            close(x1, expected["critic/x1_pred"], absolute=1e-5)
            target_q, target_v = qflow.targets(nets, batch, draws.next_x0, xt, draws.value_t, args)
            close(target_q, expected["critic/target_q"], of_largest=1e-5)
            close(target_v, expected["critic/target_v"], of_largest=1e-5)
            xt = (1 - draws.policy_t) * draws.policy_x0 + draws.policy_t * a
            grad_v = qflow.guidance(nets.value, s, xt, draws.policy_t)
            close(grad_v, expected["actor/grad_v"], of_largest=5e-4)
            v_target = a - draws.policy_x0 + grad_v / args.lam
            close(v_target, expected["actor/v_target"], of_largest=5e-4)

    losses = {
        "critic_loss": ("critic/outer_loss", 1e-5),
        "value_loss": ("critic/distillation_loss", 1e-4),
        "policy_loss": ("actor/total_loss", 1e-4),
    }
    replay_updates(arrays, config, nets, args, qflow, draws, check, losses)


def replay_fql(config, arrays):
    args = fql.Args(
        hidden=tuple(config["hidden_dims"]),
        **{k: config[k] for k in ("flow_steps", "alpha", "normalize_q_loss", "batch_size")},
        **{k: config[k] for k in ("q_agg", "discount", "tau", "lr")},
    )
    nets = fql.Networks(config["obs_dim"], config["action_dim"], args)

    def draws(d):
        names = "critic/next_noise", "actor/x0", "actor/t", "actor/distill_noise"
        return fql.Draws(*(d[name] for name in names))

    losses = {
        "critic_loss": ("critic/critic_loss", 1e-5),
        "flow_loss": ("actor/bc_flow_loss", 1e-5),
        "distill_loss": ("actor/distill_loss", 1e-5),
        "q_loss": ("actor/q_loss", 1e-5),
    }
    replay_updates(arrays, config, nets, args, fql, draws, lambda *unused: None, losses)


def replay_sequences(config, arrays):
    data = {k.removeprefix("dataset/"): v for k, v in arrays.items() if k.startswith("dataset/")}
    dataset = common.Dataset(**compact(**data))
    starts = torch.arange(len(dataset) - config["horizon"] + 1)
    assert starts.tolist() == arrays["starts"].tolist()
    batch = dataset.chunks(starts, config["horizon"], config["discount"])
    expected = under(arrays, "expect/")
    for name, ours in batch._asdict().items():
        close(ours, expected[name], relative=1e-6, absolute=1e-6, what=name)


def replay_flow_g(config, arrays):
    """The authors' gated network and noise level; theirs is a function of the state alone."""
    sizes = config["obs_dim"], config["action_dim"]
    velocity = flow_sac.GatedVelocity(*sizes, config["hidden_dim"], config["time_emb_dim"])
    log_sigma = flow_sac.LogSigma(*sizes, 512, low=-5.0, high=2.0)
    ours = {"time_mlp/layers_1": velocity.time_mlp[0], "time_mlp/layers_3": velocity.time_mlp[2]}
    for name, theirs in {"gate": "gate_net", "candidate": "candidate_net"}.items():
        ours |= {f"{theirs}/layers_{i}": getattr(velocity, name)[i] for i in (0, 2)}
    ours |= {f"fc_logstd/layers_{i}": log_sigma.mlp[i] for i in (0, 2, 4)}
    initial = under(arrays, "init/")
    assert {f"{name}/{kind}" for name in ours for kind in ("kernel", "bias")} == set(initial)
    with torch.no_grad():
        for name, layer in ours.items():
            kernel = initial[f"{name}/kernel"].T
            if name == "fc_logstd/layers_0":  # ours has t as one input more
                kernel = torch.cat([kernel, torch.zeros(512, 1)], 1)
            assert layer.weight.shape == kernel.shape
            layer.weight.copy_(kernel)
            layer.bias.copy_(initial[f"{name}/bias"])
        inputs = under(arrays, "")
        expected = under(arrays, "expect/")
        v = velocity(inputs["obs"], inputs["x"], inputs["t"])
        close(v, expected["velocity"], of_largest=1e-5, what="velocity")
        log_std = log_sigma(inputs["obs"], inputs["t"])
        # What is squashed here reaches 28, so the order of float32 sums (MKL's, oneDNN's) shows.
        tolerance = 1e-5 if torch.get_float32_matmul_precision() == "highest" else 5e-5
        close(log_std, expected["log_std"], absolute=tolerance, what="log_std")


REPLAY = {
    "qflow": replay_qflow,
    "fql": replay_fql,
    "sequences": replay_sequences,
    "flow_g": replay_flow_g,
}


def test_there_are_golden_files():
    assert FILES, f"no *.npz in {FOLDER}"


@pytest.fixture(params=["highest", "auto"], autouse=True)
def precision(request):
    common.pick_device("cpu", request.param)
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_replay(path):
    algorithm, config, arrays = load(path)
    assert algorithm in REPLAY, f"{path.name}: nothing here replays {algorithm!r}"
    REPLAY[algorithm](config, arrays)
