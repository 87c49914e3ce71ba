"""How much memory 10,000 frames take, from the file to a batch, on the CPU.

    python results/pixels/memory.py visual-cube-single-play-v0.npz

Repeats the episodes of the file up to 10,000 rows, in a temporary file.
"""

import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common  # noqa: E402


def main(path: tyro.conf.Positional[Path]):
    """path: an npz file of visual-cube-single."""
    with np.load(path) as file:
        names = ("observations", "actions", "terminals", "qpos", "qvel")
        data = {name: np.resize(file[name], (10_000, *file[name].shape[1:])) for name in names}
    data["terminals"][-1] = True
    with tempfile.TemporaryDirectory() as folder:
        repeated = Path(folder) / "repeated.npz"
        common.write_dataset(repeated, "repeated", data)
        del data
        tracemalloc.start()
        data, _ = common.read_ogbench_file(repeated, np.uint8)
    ones = np.ones(len(data["valids"]))  # rewards would need an environment that renders
    dataset = common.Dataset(data["observations"], data["actions"], ones, ones, data["valids"])
    del data
    now, peak = (x / 1e6 for x in tracemalloc.get_traced_memory())
    print(f"NumPy's arrays: at most {peak:.1f} MB, at the end {now:.1f} MB")
    print(f"frames {dataset.observations.nbytes / 1e6:.1f} MB: {tuple(dataset.observations.shape)}")
    arrays = sum(x.nbytes for x in vars(dataset).values() if isinstance(x, torch.Tensor))
    print(f"everything {arrays / 1e6:.1f} MB")
    batch = dataset.sample(256)
    print(f"a batch of 256 {sum(x.nbytes for x in batch) / 1e6:.1f} MB")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
