"""Repeats a run of fql.py in JAX: is fql.py's code the reason why it learns so slowly?

    python3 -m venv VENV
    VENV/bin/pip install -r requirements.txt "jax[cpu]" flax optax
    VENV/bin/python results/published/fql_jax.py RUN --dataset DATASET
    VENV/bin/python results/published/fql_jax.py RUN --dataset DATASET --lockstep 1800

RUN is a run folder of fql.py, whose settings are used. It must have q_agg mean, rho 0, state
observations and no online steps. Networks, losses, optimizer and chunks are written here a second
time, with Flax and Optax, the authors' libraries; the transitions come from OGBench's own
functions. Training uses fql.py only to run the evaluation episodes.

The first command trains. At each evaluation, it prints the success and what the critic says before
the goal, as before_the_goal.py does. The second command makes the same updates, from the same
weights, chunks and noise, with both implementations, and prints how far apart their critics are.
"""

import collections
import copy
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

PER_CALL = 500  # updates that are compiled into one loop
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


def draw(key, num_transitions, action_dim, args):
    """The random numbers of an update: starts of the chunks, (B,), and noise of the losses."""
    keys = jax.random.split(key, 5)
    last = num_transitions - args.horizon
    starts = jax.random.randint(keys[0], (args.batch_size,), 0, last + 1)
    noise = fql.Noise(
        next_z=jax.random.normal(keys[1], (args.batch_size, action_dim)),
        flow_x0=jax.random.normal(keys[2], (args.batch_size, action_dim)),
        flow_t=jax.random.uniform(keys[3], (args.batch_size, 1)),
        policy_z=jax.random.normal(keys[4], (args.batch_size, action_dim)),
    )
    return starts, noise


def chunks(data, starts, args):
    """The chunks that start at `starts` (B,); valid: 0 for steps after the end of an episode."""
    rows = starts[:, None] + jnp.arange(args.horizon)  # (B, h)
    ended_before = jnp.cumsum(data["terminals"][rows], 1) - data["terminals"][rows]
    valid = (ended_before == 0).astype(jnp.float32)
    return dict(
        observations=data["observations"][starts],
        actions=data["actions"][rows].reshape(len(starts), -1),
        rewards=(data["rewards"][rows] * valid * args.discount ** jnp.arange(args.horizon)).sum(1),
        masks=jnp.where(valid > 0, data["masks"][rows], 1).min(1),
        next_observations=data["next_observations"][rows[:, -1]],  # weight 0 unless all are valid
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


def make_updates(modules, optimizer, data, args):
    """A function: (params, target, optimizer's state), N keys -> the same after N updates."""

    def loss(params, target, batch, noise):
        obs = batch["observations"]
        fixed = jax.lax.stop_gradient(params)

        def one_step(params, obs, z):
            return modules["one_step"].apply(params["one_step"], obs, z)

        def critic(params, obs, actions):
            return modules["critic"].apply(params, obs, actions)[..., 0]  # (critics, B)

        def velocity(params, obs, x, t):
            return modules["velocity"].apply(params["velocity"], obs, x, t)

        next_obs = batch["next_observations"]
        next_actions = jnp.clip(one_step(fixed, next_obs, noise.next_z), -1, 1)
        next_q = critic(target, next_obs, next_actions).mean(0)
        q_target = batch["rewards"] + args.discount**args.horizon * batch["masks"] * next_q
        q = critic(params["critic"], obs, batch["actions"])
        critic_loss = (batch["valid"][:, -1] * (q - q_target) ** 2).mean()

        xt = (1 - noise.flow_t) * noise.flow_x0 + noise.flow_t * batch["actions"]
        error = velocity(params, obs, xt, noise.flow_t) - (batch["actions"] - noise.flow_x0)
        error = error.reshape(len(error), args.horizon, -1)
        flow_loss = (batch["valid"][..., None] * error**2).mean()

        x = noise.policy_z
        for k in range(args.flow_steps):
            t = jnp.full_like(noise.flow_t, k / args.flow_steps)
            x = x + velocity(fixed, obs, x, t) / args.flow_steps
        actions = one_step(params, obs, noise.policy_z)
        distill_loss = ((actions - jnp.clip(x, -1, 1)) ** 2).mean()
        q = critic(fixed["critic"], obs, jnp.clip(actions, -1, 1)).mean(0)
        return critic_loss + flow_loss + args.alpha * distill_loss - q.mean()

    def update(state, key):
        params, target, optimizer_state = state
        num_transitions, action_dim = data["actions"].shape
        starts, noise = draw(key, num_transitions, args.horizon * action_dim, args)
        grads = jax.grad(loss)(params, target, chunks(data, starts, args), noise)
        target = optax.incremental_update(params["critic"], target, args.tau)  # the old critic
        updates, optimizer_state = optimizer.update(grads, optimizer_state)
        return (optax.apply_updates(params, updates), target, optimizer_state), None

    return jax.jit(lambda state, keys: jax.lax.scan(update, state, keys)[0])


@torch.no_grad()
def copy_to(nets, params):
    """Copy Flax parameters into the networks of fql.py."""
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


def train(updates, state, nets, args, rows, seed):
    """Train as fql.py does; rows, nets: fql.py's dataset and networks, used in evaluations."""
    env = fql.make_env(args)
    key = jax.random.PRNGKey(seed + 1)
    for step in range(PER_CALL, args.offline_steps + 1, PER_CALL):
        start = time.perf_counter()
        key, call_key = jax.random.split(key)
        state = jax.block_until_ready(updates(state, jax.random.split(call_key, PER_CALL)))
        if step % 5000 == 0:
            speed = PER_CALL / (time.perf_counter() - start)
            print(f"step {step}, {speed:.1f} updates/s", flush=True)
        if step % args.eval_interval == 0:
            copy_to(nets, state[0])
            generator = torch.Generator().manual_seed(seed + step)
            policy = partial(fql.act, nets, args=args, generator=generator)
            results = fql.evaluate(policy, env, args.eval_episodes, seed + step)
            print(f"success {results['success'].mean():.2f} in {args.eval_episodes} episodes\n")
            before_the_goal.print_table(nets, args, rows)
            print(flush=True)


def compare(updates, state, nets, args, rows, seed, steps):
    """Make the same updates with both implementations; rows, nets: fql.py's dataset and networks.

    After every sixth of the updates, print how far the two critics' Q differ on a thousand chunks
    of the data and, beside that, how far fql.py differs from a copy of itself whose initial weights
    differ by rounding errors.
    """
    copy_to(nets, state[0])
    nets.target_critic.load_state_dict(nets.critic.state_dict())
    rounded = copy.deepcopy(nets)
    jax_nets = copy.deepcopy(nets)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.mul_(1 + 2**-24 * torch.randn_like(parameter))
    optimizers = [(x, fql.make_optimizer(x, args)) for x in (nets, rounded)]
    _, action_dim = nets.sizes
    starts = torch.arange(0, len(rows) - args.horizon, len(rows) // 1000)
    some = rows.chunks(starts, args.horizon, args.discount)
    print("| updates | mean Q | difference: root mean square, largest | from other rounding |")
    print("| --- | --- | --- | --- |")
    for step, key in enumerate(jax.random.split(jax.random.PRNGKey(seed + 1), steps), 1):
        state = updates(state, key[None])
        starts, noise = draw(key, len(rows), action_dim, args)
        starts, *noise = (torch.tensor(np.array(x)) for x in (starts, *noise))
        batch = rows.chunks(starts.long(), args.horizon, args.discount)
        for these_nets, optimizer in optimizers:
            fql.update(these_nets, optimizer, batch, fql.Noise(*noise), args)
        if step % max(1, steps // 6) == 0:
            copy_to(jax_nets, state[0])
            with torch.no_grad():
                q, jax_q, rounded_q = (
                    x.critic(some.observations, some.actions) for x in (nets, jax_nets, rounded)
                )
            columns = [f"{step}", f"{q.mean():.1f}"]
            for other_q in (jax_q, rounded_q):
                difference = q - other_q
                rms = difference.square().mean().sqrt()
                columns.append(f"{rms:.1e}, {difference.abs().max():.1e}")
            print("|", " | ".join(columns), "|", flush=True)


def main(run: tyro.conf.Positional[Path], dataset: Path, seed: int = 0, lockstep: int = 0):
    """run: a folder of fql.py; dataset: the npz file that it was trained on.

    Args:
        seed: seed of weights, chunks and noise
        lockstep: instead of training, make this many updates with both implementations
    """
    args = fql.saved_args(run)
    name, _, env_id = common.resolve_task(args.env, args.task)
    if args.q_agg != "mean" or args.rho > 0 or args.normalize_q_loss or args.online_steps > 0:
        raise common.UserError(
            f"{run}: only runs with q_agg mean and without rho, normalize_q_loss or online steps "
            "can be repeated here"
        )
    if not name.startswith("puzzle-3x3-"):
        raise common.UserError(f"{run}: only runs of puzzle-3x3 can be repeated here, not {name}")
    rows, _ = common.load_dataset(dataset, env_id, "cpu", args.sparse)
    data = load(dataset, env_id, args.sparse)
    action_dim = args.horizon * data["actions"].shape[1]
    key = jax.random.PRNGKey(seed)
    modules, params, target = make_networks(rows.obs_dim, action_dim, args, key)
    nets = fql.Networks(rows.obs_dim, action_dim, args)
    optimizer = optax.adam(args.lr)
    updates = make_updates(modules, optimizer, data, args)
    state = (params, target, optimizer.init(params))
    if lockstep > 0:
        compare(updates, state, nets, args, rows, seed, lockstep)
    else:
        train(updates, state, nets, args, rows, seed)


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except common.UserError as error:
        print(f"fql_jax.py: error: {error}", file=sys.stderr)
        sys.exit(2)
