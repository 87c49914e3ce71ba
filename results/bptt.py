"""FBRAC: a flow policy trained by backpropagation through every step of the solver.

The baseline that Q-Flow and FQL avoid. There is no other network than the velocity, and the flow is
the policy. In the notation of fql.py, with y(z) the flow's action from noise z after K Euler steps:

    critic    Q(s, a)      =  r + discount * mask * Q'(s', a'),  a' from the flow, Q' the target
    velocity  v(s, x, t)   minimises  alpha * mean (v(s, x_t, t) - (x_1 - x_0))^2 - mean Q(s, y(z))

The gradient of the last term passes through all K steps. Flags, networks, TD loss, training loop
and evaluation are those of fql.py; alpha has another meaning, so scan it.

    python results/bptt.py --env antmaze-large-navigate-v0 --alpha 3    # all flags of fql.py
    python results/bptt.py --evaluate RUN
    python results/bptt.py gradients RUN... --out results/bptt/pointmaze-medium

`gradients` measures the norm of the gradient of -mean Q by the velocity's weights against K, on
batches of the run's own data: with the weights of each run, and with untrained ones. Writes
gradients.csv and gradients.png.
"""

import copy
import csv
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import fql  # noqa: E402
from fql import Args, draw, make_optimizer, update  # noqa: E402, F401


class Networks(nn.Module):
    """fql.Networks without the one-step policy, in whose place the flow acts."""

    def __init__(self, obs_dim, action_dim, args):
        super().__init__()
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
    # The action's gradient passes through the critic; the critic's own parameters get none.
    frozen = {name: p.detach() for name, p in nets.critic.named_parameters()}
    q = torch.func.functional_call(nets.critic, frozen, (batch.observations, actions)).mean(0)
    loss = -q.mean()
    if args.normalize_q_loss:
        loss = loss / q.abs().mean().detach()
    return loss, dict(q_loss=loss)


def total_loss(nets, batch, draws, args):
    """The critic's loss, and alpha * flow matching - Q of the velocity."""
    target = fql.critic_target(nets, batch, draws.next_z, args)
    loss_q, metrics_q = fql.critic_loss(nets, batch, target)
    loss_v, metrics_v = fql.flow_loss(nets, batch, draws.flow_x0, draws.flow_t)
    loss_pi, metrics_pi = policy_loss(nets, batch, draws.policy_z, args)
    metrics = {**metrics_q, **metrics_v, **metrics_pi}
    total = loss_q + args.alpha * loss_v + loss_pi
    return total, {name: x.detach() for name, x in metrics.items()}


def use_in_fql():
    """Make fql.py train, load and evaluate this method, under this script's name."""
    fql.Networks = Networks
    fql.total_loss = total_loss
    fql.__file__ = __file__  # in the names of runs, and compared with when one is loaded
    fql.__doc__ = __doc__  # for --help


# ------------------------------------------------------------------------------------ gradients


def gradient_norm(loss, nets):
    """Norm of the gradient of a loss by the velocity's weights, a float."""
    gradients = torch.autograd.grad(loss, list(nets.velocity.parameters()))
    return torch.nn.utils.get_total_norm(gradients).item()


def mean_norms(nets, dataset, args, num_batches=8):
    """Norms of the gradients of -mean Q and of flow matching, the mean of some batches."""
    generator = torch.Generator(dataset.actions.device).manual_seed(0)
    q_norm = 0.0
    flow_norm = 0.0
    for _ in range(num_batches):
        batch = dataset.sample(args.batch_size, args.horizon, args.discount, generator)
        draws = draw(batch.actions, generator)
        q_loss, _ = policy_loss(nets, batch, draws.policy_z, args)
        flow_loss, _ = fql.flow_loss(nets, batch, draws.flow_x0, draws.flow_t)
        q_norm += gradient_norm(q_loss, nets) / num_batches
        flow_norm += gradient_norm(flow_loss, nets) / num_batches
    return q_norm, flow_norm


def gradients(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    steps: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100),
    out: Path = Path("results/bptt"),
):
    """runs: folders of runs on the same dataset; steps: the values of K; out: folder to write to"""
    use_in_fql()
    device = torch.device("cpu")
    fql.set_matmul_precision("auto", device)
    named_nets = {}
    for folder in runs:
        nets, args = fql.load(folder)
        named_nets[f"{folder.name}, K = {args.flow_steps}"] = nets
    torch.manual_seed(0)
    named_nets["untrained"] = Networks(*nets.sizes, args)
    _, dataset_name, env_id = common.resolve_task(args.env, args.task)
    dataset, _ = common.get_dataset(dataset_name, env_id, args.dataset, args.dataset_url, device)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    rows = []
    for name, nets in named_nets.items():
        norms = []
        for k in steps:
            q_norm, flow_norm = mean_norms(nets, dataset, replace(args, flow_steps=k))
            norms.append(q_norm)
            rows.append([name, k, f"{q_norm:.4g}", f"{flow_norm:.4g}"])
        axes.plot(steps, norms, "o-", label=name)
    axes.set(xlabel="K", ylabel="norm of the gradient of -mean Q", xscale="log", yscale="log")
    axes.set_xticks(steps, labels=[str(k) for k in steps])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "gradients.png", dpi=150)
    with open(out / "gradients.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["weights", "K", "q_grad_norm", "flow_matching_grad_norm"])
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
