"""Times a method's update beside its bare matrix products; prints one line of JSON.

    python tests/bench_update.py --method qflow --hidden 512 512 512 512 --device cpu --threads 1
    python tests/bench_update.py --method qflow --num-critics 10
    python tests/bench_update.py --method flow_sac

Sizes are those of antmaze-giant (29 observations, 8 actions), and for SAC Flow those of HalfCheetah
(17, 6); its update is one of the critics and a third of one of the policy. An update includes
drawing its noise, but not its batch. floor_ratio is the time of an update over the time of its
matrix products alone, measured in this process with the same threads and backend.
"""

import importlib
import json
import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402
import qflow  # noqa: E402


@dataclass
class Args:
    method: Literal["qflow", "fql", "flow_sac"] = "qflow"
    """the script to time"""
    hidden: tuple[int, ...] = ()
    """widths of the hidden layers; default: the script's"""
    batch_size: int = 0
    """transitions per update; default: the script's"""
    flow_steps: int = 0
    """Euler steps from noise to action; default: the script's"""
    num_critics: int = 2
    """size of the critics' ensemble, of qflow and fql"""
    policy: Literal["flow-t", "flow-g", "naive"] = "flow-g"
    """velocity network of SAC Flow"""
    device: str = "cpu"
    """cpu or cuda"""
    threads: int = 1
    """torch threads"""
    compile: bool = False
    """as in the scripts"""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """as in the scripts"""
    seconds: float = 10.0
    """how long to measure each of the two"""


class RecordProducts(TorchDispatchMode):
    """Keeps the operands of every matrix product that runs."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            self.operands.append([x.detach() for x in args[-2:]])
        return op(*args, **(kwargs or {}))


def milliseconds(function, seconds, device, burn_in):
    """Median, 10th and 90th percentile of the time of a call; on CUDA of means over 20 calls."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    calls = 20 if device.type == "cuda" else 1  # per reading of the clock
    for _ in range(burn_in):
        function()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 10:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        times.append((time.perf_counter() - start) / calls * 1e3)
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return statistics.median(times), deciles[0], deciles[-1]


def offline_update(method, settings, device, compiles):
    """An update of qflow or fql without arguments, and its generator."""
    nets = method.Networks(29, 8, settings).to(device)
    optimizer = method.make_optimizer(nets, settings)
    generator = torch.Generator(device)
    loss_fn = method.total_loss
    if compiles:
        loss_fn = torch.compile(loss_fn, fullgraph=True)
    batch = random_batch(settings.batch_size, 29, 8, device)

    def update():
        noise = method.sample_noise(batch.actions, generator)
        return method.update(nets, optimizer, batch, noise, settings, loss_fn)

    return update, generator


def online_update(method, settings, device, compiles):
    """Three updates of flow_sac's critics and one of its policy; and the generator."""
    nets = method.Networks(17, 6, settings).to(device)
    optimizers = method.make_optimizers(nets, settings)
    generator = torch.Generator(device)
    q_loss = method.critic_loss
    pi_loss = method.policy_loss
    if compiles:
        q_loss = torch.compile(q_loss, fullgraph=True)
        pi_loss = torch.compile(pi_loss, fullgraph=True)
    batch = random_batch(settings.batch_size, 17, 6, device)

    def update():
        for _ in range(settings.policy_frequency):
            noise = method.sample_noise(batch.actions, settings.flow_steps, generator)
            metrics = method.update_critic(nets, optimizers, batch, noise, settings, q_loss)
        return metrics | method.update_policy(nets, optimizers, batch, noise, settings, pi_loss)

    return update, generator


def random_batch(n, obs_dim, action_dim, device):
    obs, next_obs = torch.randn(2, n, obs_dim, device=device)
    actions = torch.rand(n, action_dim, device=device) * 2 - 1
    ones = torch.ones(n, device=device)
    return common.Batch(obs, actions, -ones, ones, next_obs, ones[:, None])


def main():
    args = tyro.cli(Args, description=__doc__)
    method = importlib.import_module(args.method)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = qflow.choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else torch would use the first GPU, too
    torch.set_float32_matmul_precision(args.matmul_precision)
    if args.compile:
        common.check_compiler(device)
    chosen = {}
    for name in ("hidden", "batch_size", "flow_steps"):
        if getattr(args, name):
            chosen[name] = getattr(args, name)
    make_update = offline_update
    per_call = 1  # updates
    settings = method.Args(**chosen)
    if args.method == "flow_sac":
        make_update = online_update
        settings = replace(settings, policy=args.policy)
        per_call = settings.policy_frequency
    else:
        settings = replace(settings, num_critics=args.num_critics)
    update, generator = make_update(method, settings, device, args.compile)
    captures = args.compile and device.type == "cuda"
    if captures:
        update = method.CUDAGraph(update, generator)
    start = time.perf_counter()
    update()["critic_loss"].item()  # waits for it
    first = time.perf_counter() - start
    median, low, high = milliseconds(update, args.seconds, device, burn_in=20)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        memory = torch.cuda.max_memory_allocated(device)
    else:
        name = "cpu"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    plain_update, _ = make_update(method, settings, device, compiles=False)
    with RecordProducts() as record:
        plain_update()
    flop = sum(2 * a.numel() * b.shape[-1] for a, b in record.operands)
    outs = [torch.matmul(a, b) for a, b in record.operands]

    @torch.no_grad()
    def products():
        for (a, b), out in zip(record.operands, outs):
            torch.matmul(a, b, out=out)

    if captures:
        products = method.CUDAGraph(products, generator)
    floor, _, _ = milliseconds(products, args.seconds, device, burn_in=5)
    args = replace(
        args,
        hidden=settings.hidden,
        batch_size=settings.batch_size,
        flow_steps=settings.flow_steps,
    )
    result = dict(
        **vars(args),
        updates_per_s=round(1000 * per_call / median, 1),
        ms_median=round(median / per_call, 3),
        ms_p10=round(low / per_call, 3),
        ms_p90=round(high / per_call, 3),
        gflop=round(flop / per_call / 1e9, 6),
        floor_ms=round(floor / per_call, 3),
        floor_ratio=round(median / floor, 3),
        first_update_s=round(first, 1),
        peak_memory_mb=round(memory / 1e6),
        device_name=name,
        torch=torch.__version__,
        commit=common.git_commit(),
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
