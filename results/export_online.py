"""Writes what a run collected online as an npz file in OGBench's layout.

    python results/export_online.py runs/RUN online.npz

The file holds the rewards and masks of the run's task instead of positions, and
ogbench.load_dataset reads it. For a task of OGBench, `--dataset online.npz` trains on the file; if
the run had --sparse, give --sparse again.
"""

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402


def main(run: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]):
    """run: folder of the run; out: the npz file, which must not exist yet."""
    if out.exists():
        raise common.UserError(f"{out}: exists already")
    args = common.read_config(run)["args"]
    collected = common.read_checkpoint(run).get("collected", {})
    if len(collected.get("valids", [])) == 0:
        raise common.UserError(f"{run}: has collected nothing")
    arrays = {name: tensor.numpy() for name, tensor in collected.items()}
    arrays["terminals"] = arrays.pop("valids") == 0  # the last row of each episode
    name = args["env"]
    if common.is_dataset(name):
        name, _, _ = common.resolve_task(name, args["task"])
    rewards = ", sparse rewards" if args.get("sparse") else ""
    source = f"collected online in {name}{rewards}, seed {args['seed']}; not the official file"
    common.write_dataset(out, source, arrays)


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except common.UserError as error:
        sys.exit(f"export_online.py: error: {error}")
