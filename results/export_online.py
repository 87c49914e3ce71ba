"""Writes what a run collected online as an npz file in OGBench's layout.

    python results/export_online.py runs/RUN online.npz

It has the rewards and masks of the run's task instead of positions, so `--dataset online.npz`
trains on it for that task (after a run with --sparse, with --sparse again), and
ogbench.load_dataset reads it.
"""

import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402


def main(run: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]):
    """run: folder of the run; out: the npz file."""
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    if not state["collected"]:
        sys.exit(f"{run}: has collected nothing")
    arrays = {name: tensor.numpy() for name, tensor in state["collected"].items()}
    arrays["terminals"] = arrays.pop("valids") == 0  # the last row of each episode
    args = state["config"]["args"]
    task, _, _ = common.resolve_task(args["env"], args["task"])
    rewards = ", sparse rewards" if args.get("sparse") else ""
    source = f"collected online in {task}{rewards}, seed {args['seed']}; not the official file"
    common.write_dataset(out, source, arrays)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
