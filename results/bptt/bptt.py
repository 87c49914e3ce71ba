"""FBRAC: a flow policy trained by backpropagation through every step of the solver.

The baseline that Q-Flow and FQL avoid. There is no other network than the velocity, and the flow is
the policy. In the notation of fql.py, with y(z) the flow's action from noise z after K Euler steps:

    critic    Q(s, a)      =  r + discount * mask * Q'(s', a'),  a' from the flow, Q' the target
    velocity  v(s, x, t)   minimises  alpha * mean (v(s, x_t, t) - (x_1 - x_0))^2 - mean Q(s, y(z))

The gradient of the last term passes through all K steps. Flags, networks, TD loss, training loop
and evaluation are those of fql.py; alpha has another meaning, so scan it.

    python results/bptt/bptt.py --env antmaze-large-navigate-v0 --alpha 3    # all flags of fql.py
    python results/evaluate.py RUN
    python results/bptt/bptt.py gradients RUN... --out results/bptt/pointmaze-medium

`gradients` measures the norm of the gradient of -mean Q by the velocity's weights against K, on
batches of the runs' data: with the weights of each run, and with untrained ones. The relative norm
is divided by the mean norm of dQ/da at the same actions, which differs from critic to critic.
Writes gradients.csv and gradients.png, in which a large marker is a run's own K, that of training.
"""

import copy
import csv
import signal
import sys
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402
import fql  # noqa: E402
from fql import (  # noqa: E402, F401
    Args,
    act,
    choose_device,
    evaluate,
    make_env,
    make_optimizer,
    reset,
    sample_noise,
    update,
)


class Networks(nn.Module):
    """fql.Networks without the one-step policy, in whose place the flow acts."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
        if isinstance(obs_dim, tuple):
            raise common.UserError(f"--env {args.env}: pixels are for fql.py only")
        self.sizes = (obs_dim, action_dim)
        self.flow_steps = args.flow_steps
        self.critic = fql.Critic(obs_dim, action_dim, args.hidden, args.num_critics)
        self.velocity = fql.Velocity(obs_dim, action_dim, args.hidden)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def one_step(self, obs, z):
        """The policy, under the name that fql.sample_actions calls: (B, O), (B, A) -> (B, A)."""
        return flow_actions(self, obs, z, self.flow_steps)


def flow_actions(nets, obs, z, flow_steps):
    """Where the flow takes noise z in K steps, clipped: (B, O), (B, A) -> (B, A)."""
    return fql.rollout(nets.velocity, obs, z, torch.zeros_like(z[:, :1]), flow_steps)


def policy_loss(nets, batch, z, args):
    """-mean Q of the flow's actions, to be differentiated through all K steps."""
    actions = flow_actions(nets, batch.observations, z, args.flow_steps)
    # As in fql.policy_loss, whose call would add a rollout of the teacher and spoil the costs.
    # The action's gradient passes through the critic; the critic's own parameters get none.
    frozen = {name: p.detach() for name, p in nets.critic.named_parameters()}
    q = torch.func.functional_call(nets.critic, frozen, (batch.observations, actions)).mean(0)
    loss = -q.mean()
    if args.normalize_q_loss:
        loss = loss / q.abs().mean().detach()
    return loss, dict(q_loss=loss)


def total_loss(nets, batch, noise, args):
    """The critic's loss, and alpha * flow matching - Q of the velocity."""
    q_target = fql.td_target(nets, batch, noise.next_z, args)
    q_loss, q_metrics = fql.critic_loss(nets, batch, q_target)
    bc_loss, bc_metrics = fql.flow_loss(nets, batch, noise.flow_x0, noise.flow_t)
    pi_loss, pi_metrics = policy_loss(nets, batch, noise.policy_z, args)
    metrics = {**q_metrics, **bc_metrics, **pi_metrics}
    total = q_loss + args.alpha * bc_loss + pi_loss
    return total, {name: x.detach() for name, x in metrics.items()}


def load(folder, device="cpu"):
    """Networks and settings of the run in a folder, for `act`. Raises UserError."""
    checkpoint = common.read_checkpoint(folder)
    args = fql.saved_args(folder)
    nets = Networks(*checkpoint["sizes"], args).to(device)
    common.load_weights(nets, checkpoint["nets"])
    return nets, args


def use_in_fql():
    """Make fql.py train this method, under this script's name."""
    fql.Networks = Networks
    fql.ONLINE_ALPHA = {}  # FQL's alpha, not this method's
    fql.total_loss = total_loss
    fql.__file__ = __file__  # its name is part of a run's folder and config.json
    fql.__doc__ = __doc__  # for --help


# ------------------------------------------------------------------------------------ gradients


# The settings that runs must share to be measured on the same batches.
SAME = "env task dataset sparse horizon batch_size hidden num_critics".split()


def load_runs(folders):
    """Networks and settings of runs that can be compared: lists. Raises UserError."""
    if not folders:
        raise common.UserError("gradients: needs the folder of at least one run")
    all_nets = []
    all_args = []
    for folder in folders:
        nets, args = load(folder)
        all_nets.append(nets)
        all_args.append(args)
    for folder, args in zip(folders, all_args):
        for name in SAME:
            value = getattr(args, name)
            first = getattr(all_args[0], name)
            if value != first:
                flag = name.replace("_", "-")
                raise common.UserError(f"{folder}: has --{flag} {value}, {folders[0]} has {first}")
    return all_nets, all_args


def gradient_norms(nets, batch, noise, flow_steps):
    """Norms of gradients on a batch: a tensor of three.

    That of -mean Q by the velocity's weights, through all steps; the mean over the batch of the
    norm of dQ/da at the same actions; that of the flow matching loss by the velocity's weights.
    """
    weights = list(nets.velocity.parameters())
    actions = flow_actions(nets, batch.observations, noise.policy_z, flow_steps)
    q = nets.critic(batch.observations, actions).mean(0)
    dq_da, *q_gradient = torch.autograd.grad(-q.sum(), [actions, *weights])
    flow_loss, _ = fql.flow_loss(nets, batch, noise.flow_x0, noise.flow_t)
    flow_gradient = torch.autograd.grad(flow_loss, weights)
    q_norm = torch.nn.utils.get_total_norm(q_gradient) / len(q)  # of the mean, not of the sum
    flow_norm = torch.nn.utils.get_total_norm(flow_gradient)
    return torch.stack([q_norm, dq_da.norm(dim=1).mean(), flow_norm])


def mean_norms(nets, dataset, args, flow_steps, num_batches=8):
    """`gradient_norms`, the mean of some batches: three floats."""
    generator = torch.Generator(dataset.actions.device).manual_seed(0)
    total = torch.zeros(3)
    for _ in range(num_batches):
        batch = dataset.sample(args.batch_size, args.horizon, args.discount, generator)
        noise = sample_noise(batch.actions, generator)
        total += gradient_norms(nets, batch, noise, flow_steps)
    return (total / num_batches).tolist()


def gradients(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100),
    out: Path = Path("results/bptt"),
):
    """runs: folders of runs on the same dataset; steps: the values of K, to which those of the runs
    are added; out: folder to write to"""
    all_nets, all_args = load_runs(runs)
    args = all_args[0]
    torch.manual_seed(0)
    untrained = Networks(*all_nets[0].sizes, args)
    measured = [("untrained", "untrained", untrained, None)]  # name, label, networks, K of training
    all_steps = set(steps)
    for folder, nets, run_args in zip(runs, all_nets, all_args):
        label = f"trained with K = {run_args.flow_steps}, seed {run_args.seed}"
        measured.append((folder.name, label, nets, run_args.flow_steps))
        all_steps.add(run_args.flow_steps)
    steps = sorted(all_steps)
    _, dataset_name, env_id = common.resolve_task(args.env, args.task)
    dataset, _ = common.get_dataset(dataset_name, env_id, args.dataset, sparse=args.sparse)

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    rows = []
    for name, label, nets, trained_k in measured:
        relative_norms = []
        for k in steps:
            q_norm, dq_da_norm, flow_norm = mean_norms(nets, dataset, args, k)
            relative_norms.append(q_norm / dq_da_norm)
            norms = [q_norm, dq_da_norm, q_norm / dq_da_norm, flow_norm]
            rows.append([name, trained_k, k, *(f"{norm:.4g}" for norm in norms)])
        (line,) = axes.plot(steps, relative_norms, "o-", markersize=3, label=label)
        if trained_k:
            own = relative_norms[steps.index(trained_k)]
            axes.plot(trained_k, own, "o", markersize=10, color=line.get_color())
    axes.set(xlabel="K", ylabel="norm of the gradient of -mean Q,\nrelative to that of dQ/da")
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(steps, labels=[str(k) for k in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "gradients.png", dpi=150)
    norms = ["q_grad_norm", "dq_da_norm", "relative_norm", "flow_matching_grad_norm"]
    with open(out / "gradients.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["weights", "trained_K", "K", *norms])
        writer.writerows(rows)
    print((out / "gradients.csv").read_text())


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="glfw|gymnasium")  # no display, float64 spaces
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's signal: like Ctrl-C
    try:
        if sys.argv[1:2] == ["gradients"]:
            tyro.cli(gradients, args=sys.argv[2:])
        else:
            use_in_fql()
            fql.main()
    except common.UserError as error:
        sys.exit(f"bptt.py: error: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
