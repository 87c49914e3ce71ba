"""Times an update of TorchRL's FQLLoss at the sizes of tests/bench_update.py; prints JSON.

    python -m venv torchrl-env
    torchrl-env/bin/pip install torchrl-nightly==2026.10.27 torch==2.13.0
    torchrl-env/bin/python results/speed/torchrl_fql.py --hidden 512 512 512 512
    python tests/bench_update.py --method fql --hidden 512 512 512 512

FQL is in TorchRL's nightly builds, not yet in a release. Networks and settings are those of fql.py;
the update is loss, backward pass, Adam and target update on one batch, without a replay buffer.
"""

import argparse
import json
import statistics
import time

import torch
import torchrl
from tensordict import TensorDict
from torch import nn
from torchrl.modules import MLP, FlowMatchingPolicy, OneStepPolicy, ValueOperator
from torchrl.objectives import FQLLoss, SoftUpdate

OBS_DIM, ACTION_DIM, BATCH_SIZE = 29, 8, 256


def mlp(in_dim, out_dim, hidden, layer_norm=False):
    def activation():
        gelu = nn.GELU(approximate="tanh")
        return nn.Sequential(gelu, nn.LayerNorm(hidden[-1])) if layer_norm else gelu

    return MLP(in_dim, out_dim, num_cells=hidden, activation_class=activation)


def make_update(hidden):
    flow = FlowMatchingPolicy(mlp(OBS_DIM + ACTION_DIM + 1, ACTION_DIM, hidden), ACTION_DIM)
    one_step = OneStepPolicy(mlp(OBS_DIM + ACTION_DIM, ACTION_DIM, hidden), ACTION_DIM)
    critics = []
    for _ in range(2):
        critic = mlp(OBS_DIM + ACTION_DIM, 1, hidden, layer_norm=True)
        critics.append(ValueOperator(critic, in_keys=["observation", "action"]))
    loss = FQLLoss(flow, one_step, critics)
    loss.make_value_estimator(gamma=0.99)
    target_update = SoftUpdate(loss, tau=0.005)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
    ended = torch.zeros(BATCH_SIZE, 1, dtype=torch.bool)
    batch = TensorDict(
        {
            "observation": torch.randn(BATCH_SIZE, OBS_DIM),
            "action": torch.rand(BATCH_SIZE, ACTION_DIM) * 2 - 1,
            "next": {
                "observation": torch.randn(BATCH_SIZE, OBS_DIM),
                "reward": -torch.ones(BATCH_SIZE, 1),
                "done": ended,
                "terminated": ended,
            },
        },
        batch_size=[BATCH_SIZE],
    )

    def update():
        losses = loss(batch.clone(False))
        total = losses["loss_flow"] + losses["loss_actor"] + losses["loss_qvalue"]
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        target_update.step()

    return update


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[512] * 4)
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    update = make_update(args.hidden)
    for _ in range(20):
        update()
    times = []
    end = time.perf_counter() + args.seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        update()
        times.append((time.perf_counter() - start) * 1e3)
    deciles = statistics.quantiles(times, n=10)
    result = {
        "torchrl": torchrl.__version__,
        "torch": torch.__version__,
        "hidden": args.hidden,
        "ms_median": round(statistics.median(times), 3),
        "ms_p10": round(deciles[0], 3),
        "ms_p90": round(deciles[-1], 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
