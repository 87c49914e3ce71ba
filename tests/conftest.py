"""One torch thread: two beside another busy process are many times slower."""

import os
import sys
from pathlib import Path

import torch

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_configure(config):
    """Ignore the warnings that the scripts ignore: no display, float64 spaces."""
    config.addinivalue_line("filterwarnings", "ignore:::glfw|gymnasium")
