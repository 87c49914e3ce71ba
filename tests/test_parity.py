"""Replays what a JAX implementation of the authors' equations computed, with the code that trains.

Each *.npz in $GOLDEN_DIR (default: tests/golden) holds weights, batches, random noise and results
of three updates in a row, or a sampler's output. Its `config` says which algorithm it records.

The files are float32, so even exact code differs from them by their rounding. Each is replayed in
float64, where nothing depends on the CPU and the tolerances are tight enough to catch a wrong
epsilon or a wrong order of two updates; and in float32, as the scripts compute, where our own
rounding, which is another one on each CPU, adds to that of the file.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import common
import flow_sac
import fql
import qflow

FOLDER = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = sorted(FOLDER.glob("*.npz"))
NETS = {"velocity": "flow", "value": "inner_value"}  # our names, where the files have others
SAME_IN_CONFIG = ("flow_steps", "batch_size", "q_agg", "num_critics", "discount", "tau", "lr")
EPS = torch.finfo(torch.float32).eps


def load(path):
    """The algorithm of a golden file, its config and its arrays."""
    with np.load(path) as file:
        arrays = dict(file)
    config = json.loads(str(arrays.pop("config")))
    return config.get("algorithm") or config["architecture"], config, arrays


def under(arrays, prefix, dtype=torch.float64):
    """The arrays below a prefix, as tensors."""
    found = {}
    for name, array in arrays.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = torch.as_tensor(array, dtype=dtype)
    return found


def golden_parameters(nets):
    """Every parameter under the name that the files give it."""
    named = {}
    for net, module in nets.named_children():
        net = NETS.get(net, net)
        if isinstance(module, fql.WithEncoder):
            named |= golden_encoder(module.encoder, f"{net}/encoder")
            net = f"{net}/head"
            module = module.head
        counts = {"dense": 0, "norm": 0}
        for layer in module.mlp:
            own = dict(layer.named_parameters())
            if own:
                kind, first = ("dense", "kernel") if "weight" in own else ("norm", "scale")
                for name, parameter in zip((first, "bias"), own.values()):
                    named[f"{net}/{kind}{counts[kind]}/{name}"] = parameter
                counts[kind] += 1
    return named


def golden_encoder(encoder, prefix):
    """The parameters of an encoder under the names that the files give them."""
    layers = {"dense0": encoder.dense}
    for i, stack in enumerate(encoder.stacks):
        for j, conv in enumerate((stack.conv, stack.block[1], stack.block[3])):
            layers[f"stack{i}/conv{j}"] = conv
    named = {}
    for name, layer in layers.items():
        named[f"{prefix}/{name}/kernel"] = layer.weight
        named[f"{prefix}/{name}/bias"] = layer.bias
    return named


def with_torch_kernels(arrays):
    """The arrays of a file with the encoders' kernels, (..., in, out), as torch has them."""
    changed = dict(arrays)
    for name, array in arrays.items():
        if "/encoder/" in name and name.endswith("/kernel"):
            changed[name] = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0)).copy()
    return changed


def float32_error(nets):
    """How far a network's float32 output may be off, of the size of what its sums add up.

    A sum of n products is off by at most n * EPS / 2 of the sum of their sizes, in whatever order a
    CPU adds them, and each layer passes on what the one before it is off by.
    """
    summands = 0
    for p in nets.critic.parameters():
        if p.dim() == 3:  # of the ensemble: (n, in, out), (n, 1, out)
            summands += p.shape[1]
        else:  # of the encoder: (out, in, 3, 3), (out, in), (out,)
            summands += p[0].numel()
    return EPS / 2 * summands


def close(actual, expected, relative=0.0, of_largest=0.0, absolute=0.0, share=1.0, what=""):
    """At least `share` of the entries are within the sum of the tolerances."""
    actual = actual.detach().double().reshape(expected.shape)
    bound = absolute + relative * expected.abs() + of_largest * expected.abs().max()
    error = (actual - expected).abs()
    assert (error <= bound).double().mean() >= share, (
        f"{what}: off by up to {error.max():.3g}, allowed {bound.max():.3g}"
    )


def settings_of(config):
    """The settings that both methods have; files of single actions say nothing of rho and h."""
    settings = {name: config[name] for name in SAME_IN_CONFIG}
    settings["hidden"] = tuple(config["hidden_dims"])
    settings["rho"] = config.get("rho", 0.0)
    settings["horizon"] = config.get("horizon", 1)
    return settings


def replay_updates(config, arrays, args, dtype, module, make_noise, check_step, losses):
    """Replay the updates of a file with the module's networks and losses.

    check_step: also compares what is not in the metrics. losses: our metric -> (the file's name
    for it, relative tolerance).
    """
    obs_dim = tuple(config["image"]) if "image" in config else config["obs_dim"]
    nets = module.Networks(obs_dim, config["action_dim"] * args.horizon, args)
    # if each critic is off by e, mean - rho * std is off by up to (1 + rho) e
    rounding = 0.0 if dtype == torch.float64 else float32_error(nets) * (1 + args.rho)
    nets.to(dtype)
    parameters = golden_parameters(nets)
    initial = under(arrays, "init/")
    assert set(parameters) == set(initial)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(initial[name].reshape(parameter.shape))
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    optimizer = module.make_optimizer(nets, args)
    for step in range(config["steps"]):
        recorded = under(arrays, f"step{step}/batch/", dtype)
        whole = torch.ones(len(recorded["rewards"]), args.horizon, dtype=dtype)
        batch = common.Batch(**{"valid": whole, **recorded})
        noise = make_noise(under(arrays, f"step{step}/draw/", dtype))
        expected = under(arrays, f"step{step}/expect/")
        check_step(nets, batch, noise, expected, rounding)
        metrics = module.update(nets, optimizer, batch, noise, args)
        for name, (key, tolerance) in losses.items():
            tolerance += rounding
            # q_loss is a mean of numbers of size 1 and of both signs, the others are of squares
            absolute = tolerance if name == "q_loss" else 0.0
            what = f"step {step} {name}"
            close(metrics[name], expected[key], relative=tolerance, absolute=absolute, what=what)
        gradients = under(arrays, f"step{step}/grad/")
        assert set(gradients) == trained
        for name, gradient in gradients.items():
            tolerance = 1e-3 + rounding
            close(parameters[name].grad, gradient, of_largest=tolerance, what=f"{step} {name}")
    final = under(arrays, "final/")
    assert set(final) == set(parameters)

    # Adam divides each gradient by its own size. So rounding shows in those that are almost 0, few
    # of 10,000; where it turns the sign, a weight is off by 2 lr, and the target by tau of that.
    # A target update rounds 1 - tau, its product and the sum, in the file and here.
    steps = config["steps"]
    turned = args.tau * 2 * args.lr * sum(range(steps))  # each update is in the targets after it
    rounded = 2 * steps * 3 * EPS / 2
    for name in set(final) - trained:
        target = parameters[name]
        close(target, final[name], rounded, absolute=3e-7 + turned, what=name)
        close(target, final[name], rounded, absolute=3e-7, share=0.99, what=name)
    ours = torch.cat([parameters[name].flatten() for name in sorted(trained)])
    theirs = torch.cat([final[name].flatten() for name in sorted(trained)])
    close(ours, theirs, absolute=1e-5, share=0.999, what="parameters")


def replay_qflow(config, arrays, dtype):
    settings = settings_of(config)
    args = qflow.Args(**settings, lam=config["alpha"], time_dim=config["time_embed_dim"])

    def noise(d):
        names = "critic/next_noise", "critic/x0", "critic/t", "actor/x0", "actor/t"
        return qflow.Noise(*(d[name] for name in names))

    @torch.no_grad()
    def check(nets, batch, noise, expected, rounding):
        s, a, k = batch.observations, batch.actions, args.flow_steps
        next_actions = qflow.sample_actions(nets, batch.next_observations, noise.next_x0, args)
        close(next_actions, expected["critic/next_actions"], absolute=1e-5 + rounding)
        xt = (1 - noise.value_t) * noise.value_x0 + noise.value_t * a
        x1 = qflow.rollout(nets.velocity, s, xt, noise.value_t, k)
        close(x1, expected["critic/x1_pred"], absolute=1e-5 + rounding)
        target_q, target_v = qflow.targets(nets, batch, noise.next_x0, xt, noise.value_t, args)
        close(target_q, expected["critic/target_q"], of_largest=1e-5 + rounding)
        close(target_v, expected["critic/target_v"], of_largest=1e-5 + rounding)
        xt = (1 - noise.policy_t) * noise.policy_x0 + noise.policy_t * a
        grad_v = qflow.guidance(nets.value, s, xt, noise.policy_t)
        close(grad_v, expected["actor/grad_v"], of_largest=5e-4 + rounding)
        v_target = a - noise.policy_x0 + grad_v / args.lam
        close(v_target, expected["actor/v_target"], of_largest=5e-4 + rounding)

    losses = {
        "critic_loss": ("critic/outer_loss", 1e-5),
        "value_loss": ("critic/distillation_loss", 1e-4),
        "policy_loss": ("actor/total_loss", 1e-4),
    }
    replay_updates(config, arrays, args, dtype, qflow, noise, check, losses)


def replay_fql(config, arrays, dtype):
    settings = settings_of(config)
    for name in ("alpha", "normalize_q_loss"):
        settings[name] = config[name]
    args = fql.Args(**settings)

    def noise(d):
        names = "critic/next_noise", "actor/x0", "actor/t", "actor/distill_noise"
        return fql.Noise(*(d[name] for name in names))

    def check(nets, batch, noise, expected, rounding):
        pass  # the losses are all that these files have

    losses = {
        "critic_loss": ("critic/critic_loss", 1e-5),
        "flow_loss": ("actor/bc_flow_loss", 1e-5),
        "distill_loss": ("actor/distill_loss", 1e-5),
        "q_loss": ("actor/q_loss", 1e-5),
    }
    replay_updates(config, arrays, args, dtype, fql, noise, check, losses)


def replay_fql_pixels(config, arrays, dtype):
    """The same on images, in [0, 255] as the files have them; their encoder is a small one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fql.Encoder, "channels", config["stack_sizes"])
        patch.setattr(fql.Encoder, "feature_dim", config["features"])
        replay_fql(config, with_torch_kernels(arrays), dtype)


def replay_sequences(config, arrays, dtype):
    """The dataset's arrays are float32 whatever the dtype."""
    data = {k.removeprefix("dataset/"): v for k, v in arrays.items() if k.startswith("dataset/")}
    ends = np.flatnonzero([*data["terminals"][:-1], 1]) + 1
    rows = {"valids": np.insert(np.ones(len(data["actions"])), ends, 0)}
    for name in ("observations", "actions", "rewards", "masks"):
        rows[name] = np.insert(data[name], ends, 0, axis=0)  # one row more per episode
    rows["observations"][rows["valids"] == 0] = data["next_observations"][ends - 1]
    dataset = common.Dataset(**rows)

    horizon = config["horizon"]
    starts = torch.arange(len(dataset) - horizon + 1)
    assert starts.tolist() == arrays["starts"].tolist()
    batch = dataset.chunks(starts, horizon, config["discount"])
    # of h rewards and powers of the discount, each with a rounding, as have product and sum
    rewards_tolerance = 2 * horizon * EPS * np.abs(data["rewards"]).max()
    for name, expected in under(arrays, "expect/").items():
        tolerance = rewards_tolerance if name == "rewards" else 0.0
        close(getattr(batch, name), expected, absolute=tolerance, what=name)


def replay_flow_g(config, arrays, dtype):
    """The authors' gated network and noise level; theirs is a function of the state alone."""
    sizes = config["obs_dim"], config["action_dim"]
    velocity = flow_sac.FlowG(*sizes, config["hidden_dim"], config["time_emb_dim"])
    log_sigma = flow_sac.LogSigma(*sizes, 512, low=-5.0, high=2.0)
    velocity.to(dtype)
    log_sigma.to(dtype)
    ours = {"time_mlp/layers_1": velocity.time_mlp[0], "time_mlp/layers_3": velocity.time_mlp[2]}
    for name, theirs in {"gate": "gate_net", "candidate": "candidate_net"}.items():
        ours |= {f"{theirs}/layers_{i}": getattr(velocity, name)[i] for i in (0, 2)}
    ours |= {f"fc_logstd/layers_{i}": log_sigma.mlp[i] for i in (0, 2, 4)}
    initial = under(arrays, "init/")
    assert {f"{name}/{kind}" for name in ours for kind in ("kernel", "bias")} == set(initial)
    inputs = under(arrays, "", dtype)
    expected = under(arrays, "expect/")
    with torch.no_grad():
        for name, layer in ours.items():
            kernel = initial[f"{name}/kernel"].T
            if name == "fc_logstd/layers_0":  # ours has t as one input more
                kernel = torch.cat([kernel, torch.zeros(512, 1)], 1)
            assert layer.weight.shape == kernel.shape
            layer.weight.copy_(kernel)
            layer.bias.copy_(initial[f"{name}/bias"])
        v = velocity(inputs["obs"], inputs["x"], inputs["t"])
        log_std = log_sigma(inputs["obs"], inputs["t"])
        squashed = log_sigma.mlp(torch.cat([inputs["obs"], inputs["t"]], 1)).abs().max()
    # Roundings are as good as random, so that of a sum of n numbers grows with sqrt(n). That of the
    # widest layer counts, once for the file and once for ours.
    close(v, expected["velocity"], of_largest=2 * EPS * 32**0.5, what="velocity")
    # log_std = 3.5 tanh(u) - 1.5, with u up to 28; the slope is at most 3.5.
    tolerance = 3.5 * 2 * EPS * 512**0.5 * squashed.item()
    close(log_std, expected["log_std"], absolute=tolerance, what="log_std")


REPLAY = {
    "qflow": replay_qflow,
    "fql": replay_fql,
    "fql_pixels": replay_fql_pixels,
    "sequences": replay_sequences,
    "flow_g": replay_flow_g,
}


def test_there_are_golden_files():
    assert FILES, f"no *.npz in {FOLDER}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_replay(path, dtype):
    algorithm, config, arrays = load(path)
    assert algorithm in REPLAY, f"{path.name}: nothing here replays {algorithm!r}"
    REPLAY[algorithm](config, arrays, dtype)
