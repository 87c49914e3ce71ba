"""What an update costs against K, the number of flow steps: Q-Flow, FQL, and backpropagation.

    OMP_NUM_THREADS=1 python results/flow-steps/flow_steps.py measure                   # on the CPU
    python results/flow-steps/flow_steps.py measure --device cuda

Sizes of antmaze-giant (29 observations, 8 actions), batch 256, networks of 4 x 512 and 4 x 256. The
times are paired: for each K the three methods take turns within one process, so that a slow minute
hits all of them. The update is that of tests/bench_update.py, not compiled.

Peak memory is measured in a process of its own for each method and K, which first makes one tiny
update: what libraries allocate at their first use does not count. Then it makes networks, optimizer
and batch and a few updates. Peak memory is by how much the peak from there on exceeds what was held
after the tiny update: on a CPU the resident size of the process, on CUDA what torch has allocated.

Writes DEVICE.csv, after each row, and DEVICE.json (machine, threads, versions) and DEVICE.png.
"""

import csv
import io
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "results/bptt"), str(ROOT / "tests")]
import bench_update  # noqa: E402
import bptt  # noqa: E402

import common  # noqa: E402
import fql  # noqa: E402
import qflow  # noqa: E402

METHODS = {"Q-Flow": qflow, "FQL": fql, "BPTT": bptt}
Precision = Literal["highest", "high", "medium"]
STEPS = (1, 2, 5, 10, 20, 50, 100)
COLORS = {"Q-Flow": "tab:blue", "FQL": "tab:green", "BPTT": "tab:red"}


def make_update(name, width, k, device):
    """An update of a method, a function without arguments."""
    torch.manual_seed(0)
    method = METHODS[name]
    settings = method.Args(hidden=(width,) * 4, flow_steps=k)
    update, _ = bench_update.offline_update(method, settings, device, compiles=False)
    return update


def paired_milliseconds(updates, rounds, device):
    """Times of updates (name -> function) that take turns: name -> list, one time per round."""

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = {name: [] for name in updates}
    for i in range(3 + rounds):
        for name, update in updates.items():
            wait()
            start = time.perf_counter()
            update()
            wait()
            if i >= 3:  # before that, the libraries still allocate
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def resident(field):
    """Resident size of this process in MB, now ("VmRSS") or at its peak ("VmHWM"); Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"/proc/self/status has no {field}")


def memory(
    method: Literal["Q-Flow", "FQL", "BPTT"],
    width: int,
    k: int,
    device: str = "cpu",
    threads: int = 1,
    matmul_precision: Precision = "high",
    updates: int = 3,
):
    """Print the peak memory of some updates in MB, in a process that did nothing else."""
    torch.set_num_threads(threads)
    device = fql.choose_device(device)
    torch.set_float32_matmul_precision(matmul_precision)
    tiny_update = make_update(method, 8, 1, device)
    tiny_update()
    del tiny_update
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device) / 1e6
        torch.cuda.reset_peak_memory_stats(device)
    else:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the size now

    update = make_update(method, width, k, device)
    for _ in range(updates):
        update()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 1e6
    else:
        peak = resident("VmHWM")
    print(peak - before)


def device_name(device):
    """Name of the GPU or, on Linux, of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.machine()


def write_csv(path, rows):
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    common.write_file(path, file.getvalue().encode())


def measure(
    device: str = "cpu",
    widths: tuple[int, ...] = (512, 256),
    steps: tuple[int, ...] = STEPS,
    rounds: int = 20,
    threads: int = 1,
    matmul_precision: Precision = "high",
    out: Path = Path("results/flow-steps"),
):
    """device: cpu or cuda; widths: of the four hidden layers; steps: the values of K; rounds: how
    often each method is timed per K; threads: of torch; matmul_precision: as in the scripts; out:
    folder of table and picture"""
    if rounds < 2:
        raise common.UserError(f"--rounds {rounds}: must be at least 2, for percentiles")
    if threads < 1:
        raise common.UserError(f"--threads {threads}: must be at least 1")
    torch.set_num_threads(threads)
    torch_device = fql.choose_device(device)
    torch.set_float32_matmul_precision(matmul_precision)
    conditions = dict(
        device=str(torch_device),
        device_name=device_name(torch_device),
        threads=threads,
        rounds=rounds,
        matmul_precision=matmul_precision,
        torch=torch.__version__,
        commit=common.git_commit(),
    )
    with common.disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    name = torch_device.type
    common.write_file(out / f"{name}.json", (json.dumps(conditions, indent=2) + "\n").encode())
    rows = []
    for width in widths:
        for k in steps:
            updates = {method: make_update(method, width, k, torch_device) for method in METHODS}
            times = paired_milliseconds(updates, rounds, torch_device)
            del updates
            for method in METHODS:
                flags = f"--method {method} --width {width} --k {k}"
                flags += f" --device {torch_device} --threads {threads}"
                flags += f" --matmul-precision {matmul_precision}"
                command = [sys.executable, __file__, "memory", *flags.split()]
                result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                deciles = statistics.quantiles(times[method], n=10, method="inclusive")
                row = dict(
                    width=width,
                    K=k,
                    method=method,
                    ms_median=round(statistics.median(times[method]), 2),
                    ms_p10=round(deciles[0], 2),
                    ms_p90=round(deciles[-1], 2),
                    peak_mb=round(float(result.stdout), 1),
                )
                print(row, flush=True)
                rows.append(row)
                write_csv(out / f"{name}.csv", rows)
    draw(rows, out / f"{name}.png")


def draw(rows, path):
    """Time and peak memory against K, on logarithmic axes; a column for each width."""
    widths = list(dict.fromkeys(row["width"] for row in rows))
    steps = list(dict.fromkeys(row["K"] for row in rows))
    figure = Figure(figsize=(4.5 * len(widths), 6.5), layout="constrained")
    axes = figure.subplots(2, len(widths), sharex=True, sharey="row", squeeze=False)
    labels = dict(ms_median="ms per update", peak_mb="peak memory, MB")
    for i, (column, label) in enumerate(labels.items()):
        for j, width in enumerate(widths):
            for name in METHODS:
                own = [row for row in rows if row["width"] == width and row["method"] == name]
                values = [row[column] for row in own]
                axes[i, j].plot(steps, values, "o-", color=COLORS[name], label=name)
            axes[i, j].set(xscale="log", yscale="log")
            axes[i, j].grid(alpha=0.3)
        axes[i, 0].set_ylabel(label)
        axes[i, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[i, 0].yaxis.set_major_formatter("{x:g}")
        axes[i, 0].yaxis.set_minor_locator(NullLocator())
    for j, width in enumerate(widths):
        axes[0, j].set_title(f"networks of 4 × {width}")
        axes[1, j].set_xlabel("K, flow steps")
        axes[1, j].set_xticks(steps, labels=[str(k) for k in steps])
        axes[1, j].xaxis.set_minor_locator(NullLocator())
    axes[0, 0].legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    commands = dict(measure=measure, memory=memory)
    try:
        tyro.extras.subcommand_cli_from_dict(commands, description=__doc__)
    except common.UserError as error:
        sys.exit(f"flow_steps.py: error: {error}")
