"""Copies what loading and evaluating need of a run, weights and settings, to another folder.

python results/weights_only.py runs/RUN results/policies/NAME
"""

import json
import sys
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402


def main(run: tyro.conf.Positional[Path], target: tyro.conf.Positional[Path]):
    """run: folder of the run; target: the new folder"""
    config = common.read_config(run)
    checkpoint = common.read_checkpoint(run)
    config["args"]["run_dir"] = "runs"  # not where it was trained
    if target.exists():
        raise common.UserError(f"{target}: exists already; remove it or choose another folder")
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    path = target / "checkpoint.pt"
    torch.save({name: checkpoint[name] for name in ("step", "sizes", "nets")}, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        tyro.cli(main, description=__doc__)
    except common.UserError as error:
        sys.exit(f"weights_only.py: error: {error}")
