"""Is it Q or the policy? What an FQL run's behaviour flow does alone, and with its learned Q.

    python results/antmaze-large/best_of_n.py RUN --n 4 16 64 --out RUN/best_of_n.csv

Evaluates policies made of one checkpoint of fql.py, without any training, on the same episodes: the
one-step policy, which the run itself evaluates; the behaviour flow; and, of N actions of the flow,
the one with the largest Q (the mean of the critics). Prints means with 95% intervals.

If the best of N is far better than the flow, Q ranks actions well. If it is also better than the
one-step policy, that policy does not find what Q knows. A poor best of N decides nothing: Q may be
wrong, or the correct Q of a poor policy, or there is no good action among the N.
"""

import csv
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import tyro

RESULTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(RESULTS.parent), str(RESULTS)]
from evaluate import print_intervals  # noqa: E402

import common  # noqa: E402
import fql  # noqa: E402


@torch.no_grad()
def best_of_flow(nets, obs, n, args, generator=None):
    """Of n actions of the flow the one with the largest Q: (N, O) -> (N, h, A), NumPy arrays."""
    num_obs = len(obs)
    device = next(nets.parameters()).device
    obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
    obs = obs.repeat_interleave(n, 0)
    z = torch.randn(len(obs), nets.sizes[1], device=device, generator=generator)
    actions = fql.rollout(nets.velocity, obs, z, torch.zeros_like(z[:, :1]), args.flow_steps)
    q = nets.critic(obs, actions).mean(0).view(num_obs, n)
    best = actions.view(num_obs, n, -1)[torch.arange(num_obs), q.argmax(1)]
    return best.view(num_obs, args.horizon, -1).cpu().numpy()


def main(
    run: tyro.conf.Positional[Path],
    n: tuple[int, ...] = (16,),
    episodes: int = 200,
    seed: int = 0,
    device: str = "auto",
    out: Path | None = None,
):
    """run: folder of a run of fql.py; n: numbers of actions to choose from, a policy for each;
    episodes: of each policy; seed: of episodes and noise; device: auto, cpu, cuda or cuda:N; out: a
    CSV file with every episode"""
    for number in n:
        if number < 1:
            raise common.UserError(f"--n {number}: must be at least 1")
    if episodes < 1:
        raise common.UserError(f"--episodes {episodes}: must be at least 1")
    args = fql.saved_args(run)
    rows = []
    with fql.make_env(args) as env:
        device = fql.choose_device(device)
        nets, _ = fql.load(run, device)
        generator = torch.Generator(device)

        def one_step(obs):
            return fql.act(nets, obs, args, generator)

        def flow(obs, n):
            return best_of_flow(nets, obs, n, args, generator)

        policies = {"one-step policy": one_step, "flow": partial(flow, n=1)}
        for number in n:
            policies[f"best of {number} of the flow"] = partial(flow, n=number)
        for name, policy in policies.items():
            generator.manual_seed(seed)
            results = fql.evaluate(policy, env, episodes, seed)
            print(f"{name}, {episodes} episodes:")
            print_intervals(results)
            for episode in zip(*results.values()):
                rows.append([name, *episode])
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["policy", "success", "return", "length"])
            writer.writerows(rows)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="glfw|gymnasium")  # no display, float64 spaces
    try:
        tyro.cli(main, description=__doc__)
    except common.UserError as error:
        sys.exit(f"best_of_n.py: error: {error}")
