"""Replays this repository's recorded updates of Q-Flow with the authors' own agent.

    git clone https://github.com/jaehyeokdoo2/qflow
    VENV/bin/pip install -r requirements.txt "jax[cpu]" flax optax distrax ml_collections
    VENV/bin/python results/parity/authors_qflow.py qflow

tests/golden/qflow_*.npz have weights, batches, noise and what three updates made of them by a JAX
transcription of the paper's equations; tests/test_parity.py compares qflow.py with them. Here the
authors' agents/qflow.py (for the ensemble with chunks: agents/qflow_qamsetting.py) gets the same
weights and batches, and the recorded noise in the place of its own draws. Prints the largest
differences of the losses, relative to the recorded ones, and of the weights after the last update.
"""

import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
NETS = {  # the files' names -> the agent's
    "critic": ("modules_critic", "value_net"),
    "target_critic": ("modules_target_critic", "value_net"),
    "inner_value": ("modules_tc_critic", "value_net"),
    "flow": ("modules_actor_bc_flow", "mlp"),
}
LAYERS = {"dense": "layer_", "norm": "layer_norm_"}


def weight(params, name):
    """The dictionary that holds a weight of a file, and its key there."""
    net, layer, key = name.split("/")
    module, mlp = NETS[net]
    kind = layer.rstrip("0123456789")
    return params[module][mlp][LAYERS[kind] + layer.removeprefix(kind)], key


def make_agent(module, config, batch):
    """The authors' agent with the settings of a file, and weights of its own."""
    settings = module.get_config()
    for name in ("lr", "discount", "tau", "flow_steps"):
        settings[name] = config[name]
    settings["actor_hidden_dims"] = settings["value_hidden_dims"] = tuple(config["hidden_dims"])
    settings["guidance_lambda"] = config["alpha"]
    settings["use_time_embed"] = True
    settings["time_embed_dim"] = config["time_embed_dim"]
    observations, actions = batch["observations"], batch["actions"]
    if "horizon" in config:
        settings["num_qs"] = config["num_critics"]
        settings["rho"] = config["rho"]
        settings["horizon_length"] = config["horizon"]
        settings["action_chunking"] = True
        observations, actions = observations[0], actions[0, 0]  # examples without a batch
    else:
        settings["num_ensembles"] = config["num_critics"]
        settings["q_agg"] = config["q_agg"]
    return module.QFlowAgent.create(0, observations, actions, settings)


def make_batch(recorded, horizon):
    """A recorded batch; with chunks, as QAM's code has it: by step, (B, h, ...)."""
    batch = {name: jnp.asarray(array) for name, array in recorded.items()}
    if horizon:
        batch["actions"] = batch["actions"].reshape(len(batch["actions"]), horizon, -1)
        for name in ("next_observations", "rewards", "masks"):  # of which it reads the last step
            batch[name] = jnp.stack([batch[name]] * horizon, 1)
    return batch


def under(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def replay(path):
    """Print how far the authors' agent is from a file."""
    with np.load(path) as file:
        arrays = dict(file)
    config = json.loads(str(arrays.pop("config")))
    horizon = config.get("horizon")
    module = importlib.import_module("agents.qflow_qamsetting" if horizon else "agents.qflow")
    agent = make_agent(module, config, make_batch(under(arrays, "step0/batch/"), horizon))
    params = jax.tree_util.tree_map(jnp.copy, agent.network.params)  # the target's are no copy yet
    agent = agent.replace(network=agent.network.replace(params=params))
    for name, array in under(arrays, "init/").items():
        layer, key = weight(params, name)
        assert layer[key].shape == array.shape, name
        layer[key] = jnp.asarray(array)

    normal, uniform = [], []  # the next draws

    def next_normal(key, shape=()):
        return jnp.asarray(normal.pop(0)).reshape(shape)

    def next_uniform(key, shape=(), minval=0.0, maxval=1.0):
        return jnp.asarray(uniform.pop(0)).reshape(shape)

    jax.random.normal, jax.random.uniform = next_normal, next_uniform
    difference = 0.0
    for step in range(config["steps"]):
        draws = under(arrays, f"step{step}/draw/")
        normal += [draws[k] for k in ("critic/next_noise", "critic/x0", "actor/x0")]
        uniform += [draws[k] for k in ("critic/t", "actor/t")]
        with jax.disable_jit():  # a compiled update would keep the noise of the first step
            agent, info = agent.update(make_batch(under(arrays, f"step{step}/batch/"), horizon))
        assert not normal and not uniform
        expected = under(arrays, f"step{step}/expect/")
        for name in ("critic/outer_loss", "critic/distillation_loss", "actor/total_loss"):
            difference = max(difference, abs(info[name] / expected[name] - 1).item())
    final = under(arrays, "final/")
    differences = []
    for name, array in final.items():
        layer, key = weight(agent.network.params, name)
        differences.append(np.abs(np.asarray(layer[key]) - array).max())
    print(f"{path.name}: losses {difference:.1e}, weights {max(differences):.1e}")


def main(clone: tyro.conf.Positional[Path]):
    """clone: the authors' repository."""
    sys.path.insert(0, str(clone))
    originals = jax.random.normal, jax.random.uniform
    for path in sorted(GOLDEN.glob("qflow_*.npz")):
        replay(path)
        jax.random.normal, jax.random.uniform = originals


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
