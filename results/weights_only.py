"""Copies what --evaluate needs of a run's checkpoint, weights and settings, to another folder.

python results/weights_only.py runs/RUN results/policies/NAME
"""

import sys
from pathlib import Path

import torch

source, target = Path(sys.argv[1]), Path(sys.argv[2])
state = torch.load(source / "checkpoint.pt", map_location="cpu", weights_only=True)
kept = {name: state[name] for name in ("config", "step", "sizes", "nets")}
kept["config"]["args"]["run_dir"] = "runs"  # not where it was trained
target.mkdir(parents=True, exist_ok=True)
torch.save(kept, target / "checkpoint.pt")
print(f"{target / 'checkpoint.pt'}: {(target / 'checkpoint.pt').stat().st_size / 1e6:.1f} MB")
