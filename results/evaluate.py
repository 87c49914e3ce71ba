"""Evaluates a run: success, return and length with 95% intervals; --video films three episodes.

    python results/evaluate.py runs/RUN --episodes 200
    MUJOCO_GL=egl python results/evaluate.py runs/RUN --video

Works for every script with the functions of qflow.py, such as a copy of it. It looks for the script
in the current folder, beside common.py and under results/.
"""

import importlib
import math
import sys
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium
import imageio
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """folder of the run, with config.json and checkpoint.pt"""
    episodes: int = 50
    """number of episodes"""
    seed: int = 0
    """seed of the episodes and of the policy's noise"""
    video: bool = False
    """also write three episodes to evaluation.gif in the folder"""
    device: str = "auto"
    """auto (CUDA if usable), cpu, cuda or cuda:N"""


def import_script(name):
    """The module of a run's script. Raises UserError."""
    for path in (Path.cwd() / name, ROOT / name, *ROOT.glob(f"results/**/{name}")):
        if path.is_file():
            sys.path.insert(0, str(path.parent))
            try:
                return importlib.import_module(path.stem)
            except ImportError as error:
                raise common.UserError(f"{path}: cannot be imported: {error}") from None
    raise common.UserError(f"{name}, the run's script, is neither in {ROOT} nor in {Path.cwd()}")


def wilson(rate, episodes):
    """The 95% Wilson score interval of a success rate; it has a width even at rates 0 and 1."""
    z = 1.96
    n = episodes
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)  # rounding may pass 0 or 1


def print_intervals(results):
    """Print the mean of each result and its 95% interval; for the success rate it is Wilson's."""
    for name, values in results.items():
        n = len(values)
        mean = values.mean()
        if name == "success":
            low, high = wilson(mean, n)
        else:
            half = 1.96 * values.std(ddof=1) / math.sqrt(n) if n > 1 else math.inf
            low = mean - half
            high = mean + half
        if not np.isnan(mean):
            print(f"{name} {mean:.4g} (95%: {low:.4g} to {high:.4g})")


def record_video(script, policy, env, seed, path):
    """Write three episodes in `env` (render_mode "rgb_array") to a GIF, every eighth step."""
    frames = []
    for episode in range(3):
        obs = script.reset(env, seed + episode)
        step = 0
        done = False
        while not done:
            for action in policy(obs[None])[0]:
                if step % 8 == 0:
                    frames.append(env.render())
                obs, _, terminated, truncated, _ = env.step(action)
                step += 1
                done = terminated or truncated
                if done:
                    break
    with common.disk_errors(path.parent):
        imageio.mimsave(path, frames, loop=0)
    print(f"three episodes, every eighth step: {path}")


@contextmanager
def rendering_errors():
    """Turn what fails without a display or a renderer into a UserError."""
    try:
        yield
    except common.UserError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise common.UserError(f"--video: cannot render ({error})") from None
    except Exception as error:  # MuJoCo, PyOpenGL and the drivers each raise their own types
        hint = "without a display, set the environment variable MUJOCO_GL to egl"
        packages = "which needs apt-get install libegl1 libgl1-mesa-dri"
        raise common.UserError(f"--video: cannot render ({error}); {hint}, {packages}") from None


def main():
    cli = tyro.cli(Args, description=__doc__)
    if cli.episodes < 1:
        raise common.UserError(f"--episodes {cli.episodes}: must be positive")
    config = common.read_config(cli.run)
    if "script" not in config:
        raise common.UserError(f"{cli.run}: its config.json does not name a script")
    script = import_script(config["script"])
    step = common.read_checkpoint(cli.run)["step"]
    # The script is perhaps not the one that made the run, which perhaps goes on.
    print(f"script: {script.__file__}, checkpoint of step {step}", file=sys.stderr)
    nets, args = script.load(cli.run)
    device = script.choose_device(cli.device)
    nets.to(device)
    generator = torch.Generator(device).manual_seed(cli.seed)
    policy = partial(script.act, nets, args=args, generator=generator)
    environment = script
    if "environment" in config:  # of minari_data.py
        environment = import_script(config["environment"])
        environment.add_normalized_score(script, environment.load_data(args.env))
        print(config["dataset"])
    # MUJOCO_GL chooses a renderer when MuJoCo is imported, even if nothing is rendered.
    with rendering_errors() if cli.video else nullcontext():
        env = environment.make_env(args)
    with env:
        print_intervals(script.evaluate(policy, env, cli.episodes, cli.seed))
    if cli.video:
        with rendering_errors():
            env = environment.make_env(args, render_mode="rgb_array")
            env.reset(seed=0)
            env.render()
        with env:
            record_video(script, policy, env, cli.seed, cli.run / "evaluation.gif")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="glfw|gymnasium")  # no display, float64 spaces
    try:
        main()
    except common.UserError as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
