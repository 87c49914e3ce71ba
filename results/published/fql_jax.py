"""The same run of FQL with chunks in JAX: is it the code or the data that learns another curve?

    python3 -m venv VENV && VENV/bin/pip install -r requirements.txt "jax[cpu]" flax optax
    VENV/bin/python results/published/fql_jax.py RUN --dataset puzzle-3x3-play-v0.npz

RUN is a folder of fql.py, whose settings (environment, task, alpha, ...) are taken; its dataset
must be given again. Network, losses, optimizer and the sampling of chunks are written here once
more, with Flax and Optax as the authors have them; rewards are OGBench's own. Only the episodes of
an evaluation are fql.py's. Prints a row of eval.csv for each evaluation and what the critic says
before the goal, as before_the_goal.py does.
"""

import collections
import sys
import time
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import ogbench
import optax
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import before_the_goal  # noqa: E402

import common  # noqa: E402
import fql  # noqa: E402

DENSE = partial(nn.Dense, kernel_init=nn.initializers.variance_scaling(1, "fan_avg", "uniform"))


class MLP(nn.Module):
    hidden: tuple
    out_dim: int
    layer_norm: bool = False

    @nn.compact
    def __call__(self, *inputs):
        x = jnp.concatenate(inputs, -1)
        for width in self.hidden:
            x = nn.gelu(DENSE(width)(x))
            if self.layer_norm:
                x = nn.LayerNorm()(x)
        return DENSE(self.out_dim)(x)


def load(path, env_id, sparse):
    """Arrays of transitions (name -> (N, ...)), by OGBench's own functions."""
    data = ogbench.utils.load_dataset(path, add_info=True)
    env = common.make_env(env_id)
    ogbench.relabel_utils.relabel_dataset(env_id, env, data)
    if sparse:
        data["rewards"] = np.where(data["rewards"] == 0, 0.0, -1.0)
    names = ("observations", "actions", "next_observations", "rewards", "masks", "terminals")
    return {name: jnp.asarray(data[name], jnp.float32) for name in names}


def sample(data, key, args):
    """A batch of chunks, each at any place of the file; valid: not behind the end of an episode."""
    h = args.horizon
    starts = jax.random.randint(key, (args.batch_size,), 0, len(data["rewards"]) - h + 1)
    rows = starts[:, None] + jnp.arange(h)  # (B, h)
    ended = jnp.cumsum(data["terminals"][rows], 1) - data["terminals"][rows]
    valid = (ended == 0).astype(jnp.float32)
    return dict(
        observations=data["observations"][starts],
        actions=data["actions"][rows].reshape(args.batch_size, -1),
        rewards=(data["rewards"][rows] * valid * args.discount ** jnp.arange(h)).sum(1),
        masks=jnp.where(valid > 0, data["masks"][rows], 1).min(1),
        next_observations=data["next_observations"][rows[:, -1]],  # matters if all steps are valid
        valid=valid,
    )


def make_networks(obs_dim, action_dim, args, key):
    """The modules and their parameters (name -> parameters), the target critic's too."""
    critics = nn.vmap(
        MLP,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=args.num_critics,
    )
    modules = dict(
        critic=critics(args.hidden, 1, True),
        velocity=MLP(args.hidden, action_dim),
        one_step=MLP(args.hidden, action_dim),
    )
    obs, action, t = jnp.zeros((1, obs_dim)), jnp.zeros((1, action_dim)), jnp.zeros((1, 1))
    keys = jax.random.split(key, 3)
    params = dict(
        critic=modules["critic"].init(keys[0], obs, action),
        velocity=modules["velocity"].init(keys[1], obs, action, t),
        one_step=modules["one_step"].init(keys[2], obs, action),
    )
    return modules, params, params["critic"]


def make_update(modules, optimizer, data, args):
    """(params, target, optimizer's state), key -> the same after an update."""

    def loss(params, target, batch, key):
        obs = batch["observations"]
        keys = jax.random.split(key, 4)
        shape = batch["actions"].shape

        def one_step(z, obs, params):
            return modules["one_step"].apply(params["one_step"], obs, z)

        fixed = jax.lax.stop_gradient(params)
        z = jax.random.normal(keys[0], shape)
        next_actions = jnp.clip(one_step(z, batch["next_observations"], fixed), -1, 1)
        next_q = modules["critic"].apply(target, batch["next_observations"], next_actions)
        next_q = next_q[..., 0].mean(0)
        q_target = batch["rewards"] + args.discount**args.horizon * batch["masks"] * next_q
        q = modules["critic"].apply(params["critic"], obs, batch["actions"])[..., 0]
        critic_loss = (batch["valid"][:, -1] * (q - q_target) ** 2).mean()

        x0 = jax.random.normal(keys[1], shape)
        t = jax.random.uniform(keys[2], (shape[0], 1))
        xt = (1 - t) * x0 + t * batch["actions"]
        v = modules["velocity"].apply(params["velocity"], obs, xt, t)
        error = ((v - (batch["actions"] - x0)) ** 2).reshape(shape[0], args.horizon, -1)
        flow_loss = (batch["valid"][..., None] * error).mean()

        z = jax.random.normal(keys[3], shape)
        x = z
        for k in range(args.flow_steps):
            t = jnp.full((shape[0], 1), k / args.flow_steps)
            x = x + modules["velocity"].apply(fixed["velocity"], obs, x, t) / args.flow_steps
        actions = one_step(z, obs, params)
        distill_loss = ((actions - jnp.clip(x, -1, 1)) ** 2).mean()
        q = modules["critic"].apply(fixed["critic"], obs, jnp.clip(actions, -1, 1))
        return critic_loss + flow_loss + args.alpha * distill_loss - q.mean()

    def update(state, key):
        params, target, optimizer_state = state
        sample_key, loss_key = jax.random.split(key)
        grads = jax.grad(loss)(params, target, sample(data, sample_key, args), loss_key)
        target = optax.incremental_update(params["critic"], target, args.tau)  # the old critic
        updates, optimizer_state = optimizer.update(grads, optimizer_state)
        return (optax.apply_updates(params, updates), target, optimizer_state), None

    @jax.jit
    def updates(state, keys):
        return jax.lax.scan(update, state, keys)[0]

    return updates


@torch.no_grad()
def copy_to(nets, params):
    """Flax's parameters into the networks of fql.py."""
    for name, tree in params.items():
        count = collections.Counter()
        for module in getattr(nets, name).mlp:
            if isinstance(module, fql.EnsembleLinear):
                layer, kernel, weight = "Dense", "kernel", module.weight
            elif isinstance(module, fql.EnsembleLayerNorm):
                layer, kernel, weight = "LayerNorm", "scale", module.scale
            else:
                continue
            values = tree["params"][f"{layer}_{count[layer]}"]
            count[layer] += 1
            for tensor, value in ((weight, values[kernel]), (module.bias, values["bias"])):
                tensor.copy_(torch.tensor(np.array(value)).view_as(tensor))


def main(
    run: tyro.conf.Positional[Path],
    dataset: Path,
    seed: int = 0,
    updates_per_call: int = 500,
):
    """run: a folder of fql.py; dataset: the npz file that it was trained on."""
    args = fql.saved_args(run)
    _, _, env_id = common.resolve_task(args.env, args.task)
    data = load(dataset, env_id, args.sparse)
    rows, _ = common.load_dataset(dataset, env_id, "cpu", args.sparse)
    env = fql.make_env(args)
    action_dim = args.horizon * data["actions"].shape[1]
    key, init_key = jax.random.split(jax.random.PRNGKey(seed))
    modules, params, target = make_networks(rows.obs_dim, action_dim, args, init_key)
    nets = fql.Networks(rows.obs_dim, action_dim, args)
    optimizer = optax.adam(args.lr)
    updates = make_update(modules, optimizer, data, args)
    state = (params, target, optimizer.init(params))
    start = time.time()
    for step in range(updates_per_call, args.offline_steps + 1, updates_per_call):
        key, call_key = jax.random.split(key)
        state = updates(state, jax.random.split(call_key, updates_per_call))
        if step % args.eval_interval == 0 or step % 5000 == 0:
            jax.block_until_ready(state)
            print(f"step {step}, {step / (time.time() - start):.1f} updates/s", flush=True)
        if step % args.eval_interval == 0:
            copy_to(nets, state[0])
            generator = torch.Generator().manual_seed(seed + step)
            policy = partial(fql.act, nets, args=args, generator=generator)
            results = fql.evaluate(policy, env, args.eval_episodes, seed + step)
            print(f"success {results['success'].mean():.2f} in {args.eval_episodes} episodes\n")
            before_the_goal.print_table(nets, args, rows)
            print(flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
