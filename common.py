"""Finds, loads or collects OGBench's datasets, and writes a run's results to disk and screen.

It also checks the settings before training. It contains no method code: no network, no loss, no
training loop.
"""

import csv
import difflib
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import ogbench
import requests
import torch
from filelock import FileLock, Timeout
from gymnasium.spaces import Box
from tqdm import tqdm

# Named by OGBench's maintainer in issue 49, for when the official host cannot be reached.
MIRROR = "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main"

STACK = 3  # frames stacked in an observation of pixels


class UserError(Exception):
    """An error the user can fix; the scripts show its message without a traceback."""


class Diverged(UserError):
    """A loss or a weight is not finite; a resumed run would fail in the same way."""


# ---------------------------------------------------------------------------------------- names


def dataset_kinds(stem):
    """The kinds of datasets that OGBench has for an environment like antmaze-giant."""
    if stem.removeprefix("visual-") in ("antmaze-medium", "antmaze-large", "antmaze-teleport"):
        return ["navigate", "stitch", "explore"]
    if "maze" in stem or "soccer" in stem:
        return ["navigate", "stitch"]
    return ["play", "noisy"]


def single_tasks():
    """OGBench's single tasks: {name: (dataset name, Gymnasium id)}.

    The Gymnasium id is the name without the kind of the dataset: antmaze-giant-singletask-v0 for
    antmaze-giant-navigate-singletask-v0.
    """
    tasks = {}
    for env_id in gymnasium.registry:
        stem, separator, number = env_id.removesuffix("-v0").partition("-singletask")
        if separator:
            for kind in dataset_kinds(stem):
                name = f"{stem}-{kind}-singletask{number}-v0"
                tasks[name] = (f"{stem}-{kind}-v0", env_id)
    return tasks


def is_dataset(env):
    """Whether --env names an OGBench dataset, with or without its task."""
    stem, _, _ = env.removesuffix("-v0").partition("-singletask")
    return f"{stem}-v0" in {dataset_name for dataset_name, _ in single_tasks().values()}


def environment_of(dataset):
    """antmaze-giant for antmaze-giant-navigate-v0, whether or not the name has a task or -v0."""
    stem, _, _ = dataset.removesuffix("-v0").partition("-singletask")
    return stem.rpartition("-")[0]


def resolve_task(env, task=0):
    """--env and --task (0: the default task) -> full name, dataset name, Gymnasium id.

    ("scene-play-v0", 2) -> ("scene-play-singletask-task2-v0", "scene-play-v0",
    "scene-singletask-task2-v0"). Without `task`, NAME-v0 and NAME-singletask-v0 are the default
    task, NAME-singletask-taskN-v0 is task N. Raises UserError.
    """
    stem, _, suffix = env.removesuffix("-v0").partition("-singletask")
    if task and suffix not in ("", f"-task{task}"):
        raise UserError(f"--env {env} --task {task}: this name already has a task")
    if task:
        suffix = f"-task{task}"
    name = f"{stem}-singletask{suffix}-v0"
    tasks = single_tasks()
    if name not in tasks:
        closest = ", ".join(difflib.get_close_matches(name, tasks, n=3, cutoff=0))
        flags = f"--env {env} --task {task}" if task else f"--env {env}"
        raise UserError(f"{flags}: no such environment; closest: {closest}")
    dataset_name, env_id = tasks[name]
    return name, dataset_name, env_id


# --------------------------------------------------------------------------------- environments


def make_env(env_id, **options):
    """An environment of OGBench; options: as for gymnasium.make. Raises UserError.

    The visual ones need no display: on Linux they use EGL, unless MUJOCO_GL names another renderer.
    MuJoCo reads that variable once, when the first environment imports it.
    """
    if not env_id.startswith("visual-"):
        return gymnasium.make(env_id, **options)
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        return gymnasium.make(env_id, **options)
    except Exception as error:  # MuJoCo, PyOpenGL and the drivers each raise their own types
        hint = "apt-get install libegl1 libgl1-mesa-dri, or set MUJOCO_GL to glfw or osmesa"
        raise UserError(f"{env_id}: cannot render: {error}; {hint}") from None


def stack_frames(env):
    """Observe the last three frames (H, W, C) as one image (H, W, 3 * C), as `Dataset.observe`.

    At the start of an episode, its first frame is repeated.
    """
    env.observation_space = env.observation_space  # stored: OGBench's renders at each access
    height, width, channels = env.observation_space.shape
    space = Box(0, 255, (height, width, STACK * channels), np.uint8)
    env = gymnasium.wrappers.FrameStackObservation(env, STACK)
    return gymnasium.wrappers.TransformObservation(env, lambda x: np.concatenate(x, -1), space)


# -------------------------------------------------------------------------------------- dataset


class Batch(NamedTuple):
    """Transitions, or chunks of h consecutive actions: float32 tensors on the dataset's device.

    For pixels, the observations are stacks of frames, uint8 (B, H, W, 3 * C).
    """

    observations: torch.Tensor  # (B, O) at the first step of the chunk
    actions: torch.Tensor  # (B, h * A) in [-1, 1]
    rewards: torch.Tensor  # (B,) discounted sum over the valid steps
    masks: torch.Tensor  # (B,) 0 if solved or terminated at a valid step: no bootstrap
    next_observations: torch.Tensor  # (B, O) after the last valid step
    valid: torch.Tensor  # (B, h) 0 for steps after the end of the episode


def check_arrays(arrays):
    """Raise ValueError unless all arrays are finite numbers and of the same length."""
    for name, array in arrays.items():
        if array.ndim == 0:
            raise ValueError(f"{name} is a single number")
    lengths = {name: len(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if lengths[name] != max(lengths.values()):
            raise ValueError(f"{name} has the wrong length, {lengths[name]}")
        kind = array.dtype.kind
        if kind not in "biu" and not (kind == "f" and np.isfinite(array).all()):
            raise ValueError(f"{name} has NaN, infinity, or no real numbers")


class HostMemory:
    """Pinned host memory (uint8) that torch takes as a CUDA tensor, without copying it.

    The GPU's kernels read it over the bus, so that an update waits for neither a copy nor the CPU.
    """

    def __init__(self, tensor):
        self.tensor = tensor.pin_memory()
        self.__cuda_array_interface__ = dict(
            shape=tuple(tensor.shape),
            typestr="|u1",
            data=(self.tensor.data_ptr(), False),
            version=3,
        )


def store_frames(frames, device, on_host):
    """Frames (M, H, W, C) as a tensor for the device, uint8. Raises UserError."""
    frames = torch.from_numpy(np.ascontiguousarray(frames))
    if torch.device(device).type != "cuda":
        return frames.to(device)
    try:
        if on_host:
            return torch.as_tensor(HostMemory(frames), device=device)
        return frames.to(device)
    except RuntimeError as error:  # torch raises it when memory runs out
        frames = f"{frames.nbytes / 1e9:.1f} GB of frames"
        hint = "" if on_host else "; --device-data cpu keeps them in host memory"
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot store {frames}: {reason}{hint}") from None


class Dataset:
    """Transitions of consecutive episodes on the device, in OGBench's compact layout.

    An episode of n steps has n + 1 rows; the last one only holds its last observation. Arguments
    are NumPy arrays of M rows; M may be 0, and `append` adds rows. Raises ValueError.

    observations: (M, O), or frames (M, H, W, C) of type uint8, which batches stack
    actions: (M, A) in [-1, 1]
    rewards: (M,)
    masks: (M,), 0 if solved or terminated (no bootstrap), else 1 (also on a time limit)
    valids: (M,), 0 in the last row of each episode, else 1
    frames_on_host: keep frames in pinned host memory, not on the GPU
    """

    COLUMNS = ("observations", "actions", "rewards", "masks", "valids")

    def __init__(
        self, observations, actions, rewards, masks, valids, device="cpu", frames_on_host=False
    ):
        arrays = dict(
            observations=observations, actions=actions, rewards=rewards, masks=masks, valids=valids
        )
        check_arrays(arrays)
        self.has_frames = observations.dtype == np.uint8 and observations.ndim == 4
        for name, array in arrays.items():
            ndim = dict(observations=4 if self.has_frames else 2, actions=2).get(name, 1)
            if array.ndim != ndim:
                raise ValueError(f"{name} has {array.ndim} dimensions, must have {ndim}")
        if len(valids) > 0 and (not np.any(valids) or valids[-1] != 0):
            raise ValueError("no transitions, or no end of an episode in the last row")
        if (np.abs(actions) > 1).any():
            raise ValueError("actions beyond [-1, 1]: rescale them and the environment's")

        def to_device(array):
            return torch.as_tensor(np.asarray(array, np.float32), device=device)

        if self.has_frames:
            self.observations = store_frames(observations, device, frames_on_host)
        else:
            self.observations = to_device(observations)
        self.actions = to_device(actions)
        self.rewards = to_device(rewards)
        self.masks = to_device(masks)
        self.valids = to_device(valids)
        rows = np.flatnonzero(valids)
        self.rows = torch.as_tensor(rows, device=device)  # (N,) the row of each transition
        # N is a tensor, since a captured CUDA graph would freeze a Python number.
        self.count = torch.tensor(len(rows), dtype=torch.float64, device=device)
        self.num_transitions = len(rows)
        self.num_rows = len(valids)
        self.num_given_rows = len(valids)  # rows after these were added by `append`
        self.in_episode = False  # whether the next `append` continues the last episode

    @classmethod
    def empty(cls, obs_dim, action_dim, device="cpu"):
        """A dataset without transitions."""
        none = np.zeros(0)
        return cls(np.zeros((0, obs_dim)), np.zeros((0, action_dim)), none, none, none, device)

    def __len__(self):
        return self.num_transitions

    @property
    def num_episodes(self):
        return self.num_rows - self.num_transitions

    @property
    def obs_dim(self):
        """O or, for pixels, the shape of the stacked frames, (H, W, 3 * C)."""
        *shape, last = self.observations.shape[1:]
        return (*shape, STACK * last) if self.has_frames else last

    def reserve(self, num_transitions):
        """Make room for that many more transitions. Raises UserError.

        It replaces the tensors, so call it before a CUDA graph is captured.
        """

        def extend(tensor, num_rows):
            extended = tensor.new_zeros(len(tensor) + num_rows, *tensor.shape[1:])
            extended[: len(tensor)] = tensor
            return extended

        if num_transitions == 0:
            return
        if self.has_frames:
            raise UserError(f"--online-steps {num_transitions}: not on pixels")
        try:
            for name in self.COLUMNS:  # two rows each: an episode may have a single step
                setattr(self, name, extend(getattr(self, name), 2 * num_transitions))
            self.rows = extend(self.rows, num_transitions)
        except RuntimeError as error:  # torch raises it when memory runs out
            raise UserError(f"no memory for {num_transitions} online steps: {error}") from None

    def append(self, observation, action, reward, mask, next_observation, done):
        """Add the next step of the last episode or, if that episode is done, start a new one.

        The step can be sampled at once. Within an episode, `observation` must be the previous
        `next_observation`. mask: 0 if the environment terminated, else 1 (also on a time limit).
        Raises ValueError when there is no room.
        """
        if self.num_transitions == len(self.rows):
            raise ValueError(f"no room for transition {self.num_transitions + 1}: reserve more")
        if not self.in_episode:
            self.observations[self.num_rows] = torch.as_tensor(observation)
            self.num_rows += 1
        row = self.num_rows - 1  # so far the last one of its episode
        self.actions[row] = torch.as_tensor(action)
        self.rewards[row] = float(reward)
        self.masks[row] = float(mask)
        self.valids[row] = 1
        self.observations[row + 1] = torch.as_tensor(next_observation)
        self.rows[self.num_transitions] = row
        self.num_rows += 1
        self.num_transitions += 1
        self.count += 1
        self.in_episode = not done

    def collected(self):
        """What `append` added, on the CPU: a tensor for each argument of the constructor."""
        added = slice(self.num_given_rows, self.num_rows)
        return {name: getattr(self, name)[added].to("cpu", copy=True) for name in self.COLUMNS}

    def append_collected(self, collected):
        """Reserve room for what `collected` returned and add it; its last episode ends there."""
        num_rows = len(collected["valids"])
        rows = self.num_rows + collected["valids"].nonzero()[:, 0]
        self.reserve(len(rows))
        for name in self.COLUMNS:
            getattr(self, name)[self.num_rows : self.num_rows + num_rows] = collected[name]
        self.rows[self.num_transitions : self.num_transitions + len(rows)] = rows
        self.num_rows += num_rows
        self.num_transitions += len(rows)
        self.count += len(rows)
        self.in_episode = False

    def observe(self, rows):
        """The observations in these rows (B,); for pixels, the last three frames, stacked.

        At the start of an episode, its first frame is repeated, as in `stack_frames`.
        """
        if not self.has_frames:
            return self.observations[rows]
        stack = [rows]
        for _ in range(STACK - 1):  # the row before, unless it ends an episode, as row -1 does
            stack.insert(0, stack[0] - self.valids[stack[0] - 1].long())
        frames = self.observations[torch.stack(stack, 1)]  # (B, 3, H, W, C)
        return frames.movedim(1, 3).flatten(3)

    def chunks(self, starts, horizon, discount):
        """Batch of the chunks that start at transitions `starts` (B,), at most N - horizon."""
        offsets = torch.arange(horizon, device=starts.device)
        rows = self.rows[starts[:, None] + offsets]  # (B, h)
        ends_here = 1 - self.valids[rows + 1]
        ended_before = ends_here.cumsum(1) - ends_here
        valid = (ended_before == 0).float()
        last_valid = valid.sum(1, keepdim=True).long() - 1
        last_row = rows.gather(1, last_valid).squeeze(1)
        return Batch(
            observations=self.observe(rows[:, 0]),
            actions=self.actions[rows].flatten(1),
            rewards=(discount**offsets * valid * self.rewards[rows]).sum(1),
            masks=torch.where(valid > 0, self.masks[rows], 1.0).prod(1),
            next_observations=self.observe(last_row + 1),
            valid=valid,
        )

    def sample(self, batch_size, horizon=1, discount=1.0, generator=None):
        """Batch of chunks with uniformly drawn starts; never waits for the device.

        The draw is in float64: float32 has only 2^24 values in [0, 1), too few for millions of
        transitions.
        """
        u = torch.rand(
            batch_size, dtype=torch.float64, device=self.count.device, generator=generator
        )
        starts = (u * (self.count - horizon + 1)).long()
        return self.chunks(starts, horizon, discount)


# -------------------------------------------------------------------------------------- loading


def data_folder():
    """Where datasets are kept: $OGBENCH_DATA, by default OGBench's ~/.ogbench/data."""
    try:
        return Path(os.environ.get("OGBENCH_DATA") or "~/.ogbench/data").expanduser()
    except RuntimeError:
        hint = "set OGBENCH_DATA to a folder for datasets"
        raise UserError(f"there is no home directory; {hint}") from None


def check_layout(file):
    """Raise ValueError for arrays (name -> array) that are not in OGBench's compact layout."""
    names = ", ".join(sorted(file))
    missing = {"observations", "actions", "terminals"} - set(file)
    if missing:
        raise ValueError(f"has no {', '.join(sorted(missing))}, only {names}")
    for name in ("next_observations", "timeouts", "truncations", "dones"):
        if name in file:  # then the last row of an episode is a transition like the others
            hint = "an episode must have one more row, with its last observation and terminals 1"
            raise ValueError(f"has {name}, unlike OGBench's compact layout: {hint}")
    if file["actions"].dtype.kind != "f":
        raise ValueError(f"actions are {file['actions'].dtype}, must be floating point")


def read_ogbench_file(path, ob_dtype=np.float32):
    """The arrays of a file in OGBench's layout (name -> array), and their source.

    The source is None for official files, which do not state it. ob_dtype: dtype of the
    observations. Raises UserError.
    """
    try:
        zipfile.ZipFile(path).close()  # np.load's message for another file is misleading
        with np.load(path) as file:
            check_layout(file)
            given = {name: file[name] for name in ("rewards", "masks") if name in file}
            source = str(file["source"]) if "source" in file else None
        data = ogbench.load_dataset(path, ob_dtype, compact_dataset=True, add_info=True)
        if ob_dtype == np.uint8 and data["observations"].max() <= 1:
            raise ValueError("frames must have numbers from 0 to 255")
    except Exception as error:  # NumPy, zipfile and OGBench raise a dozen types
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not a usable dataset: {reason}") from None
    if "qpos" not in data:  # else OGBench computes the rewards from the positions
        data.update(given)
    return data, source


def sparse_reward(reward):
    """0 if the task is solved, else -1.

    reward: minus the number of unsolved parts, as in OGBench's scene and puzzle.
    """
    return (reward == 0) - 1.0


def load_dataset(path, env_id, device, sparse=False, frames_on_host=False):
    """A file in OGBench's layout -> (Dataset with the rewards of env_id, where the data are from).

    A file without positions keeps the rewards and masks that it has. sparse: the rewards become 0
    where the mask is 0, which means solved, and -1 elsewhere, as in `sparse_reward`.
    frames_on_host: as for Dataset. Raises UserError.
    """
    with make_env(env_id) as env:
        has_frames = env.observation_space.dtype == np.uint8
        data, source = read_ogbench_file(path, np.uint8 if has_frames else np.float32)
        expected = env.observation_space.shape + env.action_space.shape
        try:
            check_arrays(data)
            found = data["observations"].shape[1:] + data["actions"].shape[1:]
            if found != expected:
                raise ValueError(f"observation, action sizes {found}; {env_id} has {expected}")
            if len(data["observations"]) == 0:
                raise ValueError("no transitions")
            low, high = data["actions"].min(), data["actions"].max()
            if low < -1.0001 or high > 1.0001:  # 0.0001: rounding of the file's numbers
                raise ValueError(f"actions in [{low:.4g}, {high:.4g}], must be in [-1, 1]")
            if "rewards" not in data:
                ogbench.relabel_utils.relabel_dataset(env_id, env, data)  # adds both
            if sparse:
                data["rewards"] = (data["masks"] == 0) - 1.0
            data["actions"] = np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5)  # as the authors do
            columns = {name: data[name] for name in Dataset.COLUMNS}
            dataset = Dataset(**columns, device=device, frames_on_host=frames_on_host)
        except KeyError as error:
            raise UserError(f"{path}: not a usable dataset: has no {error}") from None
        except (ValueError, IndexError) as error:
            raise UserError(f"{path}: not a usable dataset: {error}") from None
    return dataset, source


def get_dataset(name, env_id, source="", device="cpu", sparse=False, frames_on_host=False):
    """The dataset `name` with the rewards of env_id -> (Dataset, description). Raises UserError.

    source: an npz file or its URL. By default, the official file in `data_folder()`; if it is
    missing, pointmaze-*-navigate is collected here and any other dataset is downloaded.
    frames_on_host: as for Dataset.
    """
    stem = Path(source.partition("?")[0]).stem
    if is_dataset(stem) and environment_of(stem) != environment_of(name):
        raise UserError(f"--dataset {source}: is for another environment, not for {name}")
    folder = data_folder()
    path = folder / f"{name}.npz"
    if source.startswith(("http://", "https://")):
        address = source.partition("?")[0]
        if not address.endswith(".npz"):
            raise UserError(f"--dataset {source}: must be the URL of an npz file")
        path = folder / "downloaded" / re.sub(r"[^\w.-]+", "_", address)
        make_once(path, lambda: download([source], path))
    elif source:
        path = Path(source)
    elif not os.path.exists(path) and re.fullmatch("pointmaze-.*-navigate-v0", name):
        path = folder / "collected" / f"{name}.npz"
        make_once(path, lambda: collect_pointmaze(name, path))
    else:
        hosts = (ogbench.utils.DATASET_URL, MIRROR)
        urls = [f"{host}/{name}.npz" for host in hosts]
        hint = f"\nput {path.name} into {folder} by hand, or name a file or a URL with --dataset"
        tools = {"antmaze-.*-navigate-v0": "collect_antmaze.py", ".*-play-v0": "collect_play.py"}
        for names, tool in tools.items():
            if re.fullmatch(names, name):
                hint += f"\nor collect it: python results/{tool} {name}, then --dataset {name}.npz"
        make_once(path, lambda: download(urls, path, hint))
    dataset, origin = load_dataset(path, env_id, device, sparse, frames_on_host)
    counts = f"{len(dataset)} transitions, {dataset.num_episodes} episodes"
    description = f"{counts}, {origin or 'no source stated, as in OGBench files'}"
    note = path.with_suffix(".source")  # written by `download`
    if os.path.exists(note):
        description += f", downloaded from {note.read_text()}"
    return dataset, description


@contextmanager
def disk_errors(folder):
    """Turn a full disk or a missing permission into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error}") from None


def take_lock(lock, seconds=-1):
    """Take a lock; if another process has it, say so and wait that long (-1: without limit).

    Raises filelock.Timeout.
    """
    try:
        lock.acquire(timeout=1)
    except Timeout:
        if seconds == 0:
            raise
        hint = "if its machine died, delete that file"
        print(f"waiting for another process, which holds {lock.lock_file} ({hint})")
        lock.acquire(timeout=seconds)


def make_once(path, make):
    """Call make() unless the file exists; of several processes, one calls and the others wait."""
    if os.path.exists(path):
        return
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        take_lock(lock)
    try:
        if not path.exists():
            make()
    finally:
        lock.release()


def write_file(path, data):
    """Write bytes to a temporary name and rename, so that readers never see a partial file."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path.parent):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_dataset(path, source, data):
    """Write arrays (name -> array) and a line on where they are from in OGBench's layout."""
    file = io.BytesIO()
    np.savez_compressed(file, source=source, **data)
    write_file(path, file.getbuffer())


def download(urls, path, hint=""):
    """Fetch an npz file to `path` from the first of these URLs that works.

    hint: added to the error if none does. Raises UserError.
    """
    temporary = path.with_name(f".{path.name}.part")
    failures = []
    for url in urls:
        if failures:
            print(f"{failures[-1]}; trying {url}")
        try:
            with requests.get(url, stream=True, timeout=(5, 20)) as response:
                response.raise_for_status()
                size = int(response.headers.get("Content-Length", 0))
                bar = progress_bar(total=size, unit="B", unit_scale=True, desc=path.name)
                with open(temporary, "wb") as file, bar:
                    for block in response.iter_content(2**20):
                        bar.update(file.write(block))
            if zipfile.is_zipfile(temporary):  # as an npz file is
                write_file(path.with_suffix(".source"), url.encode())
                os.replace(temporary, path)
                return
            failures.append(f"{url}: not an npz file")
        except (requests.RequestException, ValueError) as error:  # ValueError: a wrong length
            failures.append(f"{url}: download failed ({error})")
        except OSError as error:
            raise UserError(f"{path.parent}: cannot write there: {error}") from None
        finally:
            temporary.unlink(missing_ok=True)
    raise UserError("\n  ".join(failures) + hint)


def progress_bar(*args, **options):
    """tqdm(...), with one line per minute if the output is not a terminal."""
    interval = 1 if sys.stderr.isatty() else 60
    return tqdm(*args, dynamic_ncols=True, mininterval=interval, maxinterval=interval, **options)


def leave_signals_to_main():
    """Set up a worker process: it ignores Ctrl-C, and ends with the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def end_with_main():  # if it was killed: returning a result to it would be a traceback
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_main, daemon=True).start()


def collect_pointmaze(name, path, num_episodes=300, workers=None, seed=0):
    """Write a pointmaze-*-navigate dataset to `path`; its content does not depend on `workers`."""
    env_id = name.replace("-navigate", "")
    steps = 2001 if "giant" in name else 1001
    jobs = [(env_id, steps, [seed, episode]) for episode in range(num_episodes)]
    if workers is None and hasattr(os, "sched_getaffinity"):  # macOS lacks it: all cores
        workers = len(os.sched_getaffinity(0))  # SLURM may grant a job only some of the cores
    with multiprocessing.Pool(workers, leave_signals_to_main) as pool:
        results = pool.imap(collect_episode, jobs)
        bar = progress_bar(results, f"collecting {name}", num_episodes, unit=" episodes")
        episodes = list(bar)
    data = {}
    for key in episodes[0]:
        data[key] = np.concatenate([episode[key] for episode in episodes])
    source = f"collected by OGBench's protocol, seed {seed}; not the official file"
    write_dataset(path, source, data)


def goal_cells(maze_map):
    """The free cells of a maze (n, 2), and those that may be goals: all but straight hallways."""
    free = maze_map == 0
    above, below = np.roll(free, 1, axis=0), np.roll(free, -1, axis=0)
    left, right = np.roll(free, 1, axis=1), np.roll(free, -1, axis=1)
    hallway = (above == below) & (left == right) & (above != left)
    return np.argwhere(free), np.argwhere(free & ~hallway)


def collect_episode(job):
    """One episode (Gymnasium id, steps, seed) by OGBench's protocol -> arrays of its layout.

    The point goes from a random cell to one random goal after another along the environment's own
    shortest paths, with Gaussian noise of standard deviation 0.5 on the actions.
    """
    env_id, steps, seed = job
    rng = np.random.default_rng(seed)
    env_seed = int(rng.integers(2**31))
    np.random.seed(env_seed)  # OGBench draws the noise of the start from NumPy's global generator
    rows = []
    with gymnasium.make(env_id, terminate_at_goal=False, max_episode_steps=steps) as env:
        maze = env.unwrapped
        cells, goals = goal_cells(maze.maze_map)
        task_info = dict(init_ij=tuple(rng.choice(cells)), goal_ij=tuple(rng.choice(goals)))
        obs, _ = env.reset(seed=env_seed, options=dict(task_info=task_info))
        for _ in range(steps):
            subgoal, _ = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)
            direction = subgoal - maze.get_xy()
            direction = direction / (np.linalg.norm(direction) + 1e-6)
            action = np.clip(direction + rng.normal(0, 0.5, 2), -1, 1)
            next_obs, _, _, truncated, info = env.step(action)
            rows.append((obs, action, truncated, info["prev_qpos"], info["prev_qvel"]))
            obs = next_obs
            if info["success"]:
                maze.set_goal(tuple(rng.choice(goals)))
    observations, actions, terminals, qpos, qvel = zip(*rows)
    return dict(
        observations=np.array(observations, np.float32),
        actions=np.array(actions, np.float32),
        terminals=np.array(terminals, bool),
        qpos=np.array(qpos, np.float32),
        qvel=np.array(qvel, np.float32),
    )


# ----------------------------------------------------------------------- checks before training


def command_line():
    """sys.argv for tyro, with 1e6 written out: tyro does not read 1e6 as an integer."""
    words = []
    for word in sys.argv[1:]:
        flag, equals, value = word.rpartition("=")
        is_integer = re.fullmatch(r"\d+(\.\d+)?[eE]\+?\d+", value) and float(value).is_integer()
        words.append(f"{flag}{equals}{float(value):.0f}" if is_integer else word)
    return words


def check_flags(args, *, may_be_zero, any_sign=""):
    """Raise UserError for a flag that cannot work.

    Numbers must be positive, except those named in `may_be_zero` and `any_sign`.
    """
    for name, value in vars(args).items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or name in any_sign.split():
            continue
        flag = f"--{name.replace('_', '-')} {value}"
        if name in may_be_zero.split():
            if not value >= 0:  # also catches NaN
                raise UserError(f"{flag}: must be at least 0")
        elif not value > 0:
            raise UserError(f"{flag}: must be positive")
        if value > 1 and name in ("discount", "tau"):
            raise UserError(f"{flag}: must be at most 1")
    if len(args.hidden) == 0 or min(args.hidden) < 1:
        raise UserError(f"--hidden {args.hidden}: needs positive widths")
    if args.offline_steps + args.online_steps == 0:
        raise UserError("--offline-steps and --online-steps: one must be positive")
    if args.resume and not has_checkpoint(args.resume):
        hint = "rerun the command that started this run"
        raise UserError(f"--resume {args.resume}: has no checkpoint.pt; {hint}")


def check_compiler(device):
    """Raise UserError unless torch can compile for this device."""
    try:
        torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.ones(8, device=device))
    except Exception as error:  # of the compiler, its headers, the linker, the cache's folder
        reason = str(error).partition("\n")[0]
        hint = "it needs gcc and g++ (or others, named in CC and CXX), Python's headers "
        hint += "(python3-dev) and, if /tmp is noexec, TORCHINDUCTOR_CACHE_DIR in another folder"
        raise UserError(f"--compile: torch cannot compile here: {reason}; {hint}") from None


def check_env(env, dataset):
    """Raise UserError unless the environment's spaces and a step fit the training and the data.

    Resets the environment and takes one step. Warns where an episode may never end.
    """
    obs_shape = dataset.obs_dim if dataset.has_frames else (dataset.obs_dim,)
    action_shape = tuple(dataset.actions.shape[1:])
    spaces = {
        "observation": (env.observation_space, obs_shape),
        "action": (env.action_space, action_shape),
    }
    for kind, (space, shape) in spaces.items():
        if not isinstance(space, Box) or space.shape != shape:
            found = f"a Box of shape {space.shape}" if isinstance(space, Box) else space
            raise UserError(f"the {kind} space is {found}, the data require a Box of shape {shape}")
    space = env.action_space
    if space.dtype.kind != "f" or (space.low != -1).any() or (space.high != 1).any():
        hint = "must be floating point from -1 to 1: see gymnasium.wrappers.RescaleAction"
        raise UserError(f"the action space is {space}, {hint}")
    env.reset(seed=0)
    results = env.step(np.zeros(space.shape, space.dtype))
    try:
        obs, reward, _, _, _ = results
        np.asarray(reward).item()
    except (ValueError, TypeError) as error:
        words = "step() must return observation, reward (a number), terminated, truncated and info"
        raise UserError(f"{words}: {error}") from None
    if np.shape(obs) != obs_shape:
        raise UserError(f"the environment's observation has shape {np.shape(obs)}, not {obs_shape}")
    if not np.isfinite(obs).all():
        raise UserError("the environment's observation is not finite")
    if not env.has_wrapper_attr("_max_episode_steps"):
        hint = "if episodes can go on forever, use gymnasium.wrappers.TimeLimit"
        print(f"the environment has no time limit; {hint}")


# --------------------------------------------------------------------------------- run's folder


def read_config(folder):
    """config.json of a run. Raises UserError."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        return {**config, "args": dict(config["args"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder}: damaged, or not a run: {error}") from None


def write_config(folder, config):
    """Replace config.json of a run. Raises UserError."""
    write_file(Path(folder) / "config.json", json.dumps(config, indent=2).encode())


def read_checkpoint(folder):
    """checkpoint.pt of a run, on the CPU. Raises UserError."""
    path = Path(folder) / "checkpoint.pt"
    if not path.exists():
        raise UserError(f"{folder}: has no checkpoint.pt; rerun the command that started this run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {**state, "nets": dict(state["nets"])}
    except Exception as error:  # pickle, zipfile and torch raise a dozen types
        reason = str(error).partition("\n")[0]  # torch goes on for several lines
        raise UserError(f"{path}: damaged, or not a checkpoint: {reason}") from None


def load_weights(nets, weights):
    """Copy the weights of a checkpoint into the networks. Raises UserError."""
    expected = {name: tuple(tensor.shape) for name, tensor in nets.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            shapes = f"{name} has shape {found.get(name)} there, {expected.get(name)} here"
            raise UserError(f"the checkpoint does not fit these networks: {shapes}")
    nets.load_state_dict(weights)


def has_checkpoint(folder):
    """Whether `folder` holds a run with a checkpoint; "" does not."""
    return folder != "" and os.path.exists(Path(folder) / "checkpoint.pt")


def restore_generator(generator, state, seed):
    """Restore the generator's state, or seed it if the state is from another kind of device."""
    try:
        generator.set_state(state)
    except RuntimeError:
        print("the checkpoint is from another device: batches and noise will differ")
        generator.manual_seed(seed)


def print_changes(before, now):
    """Print which settings of a resumed run have changed (name -> value)."""
    for name, value in now.items():
        is_same = json.dumps(before.get(name)) == json.dumps(value)
        if not is_same and name not in ("resume", "start_or_resume"):
            print(f"changed: {name} {before.get(name)} -> {value}")


def git_commit():
    """The commit of this file's repository, with a + if files were changed; None outside of one."""
    if shutil.which("git") is None:
        return None
    command = "git describe --always --abbrev=40 --dirty=+ --exclude *".split()
    folder = Path(__file__).parent
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return result.stdout.strip() or None


def installed_version(package):
    """A package's version; None if it is not installed, like a clone on the PYTHONPATH."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def start_wandb(folder, config, wandb_id=None):
    """A Weights & Biases run; project and entity come from WANDB_PROJECT and WANDB_ENTITY.

    wandb_id: of the run to continue; None starts a new one.
    """
    try:
        import wandb
    except ImportError:
        raise UserError("--track: needs Weights & Biases: pip install wandb") from None
    try:
        return wandb.init(name=folder.name, id=wandb_id, dir=folder, config=config, resume="allow")
    except wandb.errors.Error as error:
        raise UserError(f"--track: {error}") from None


def cut_rows(path, step):
    """Remove the rows of a CSV file that were logged after `step`: they will be logged again.

    A file whose first column is not the step is not the run's own and stays as it is.
    """
    lines = path.read_text().splitlines(keepends=True)
    if not "".join(lines[:1]).startswith("step,"):
        return
    rows = [row for row in lines[1:] if row.endswith("\n") and int(row.split(",")[0]) <= step]
    if len(rows) < len(lines) - 1:
        write_file(path, "".join(lines[:1] + rows).encode())


def read_columns(path):
    """The columns of a CSV file of numbers (name -> array); none if there is no file or row."""
    if not path.exists():
        return {}
    with open(path) as file:
        rows = list(csv.DictReader(file))
    names = rows[0] if rows else []
    return {name: np.array([float(row[name]) for row in rows]) for name in names}


class Run:
    """The folder of a run: config.json, train.csv, eval.csv, curve.png, checkpoint.pt and more.

    folder: must not exist yet, unless resume is true, which continues a run found there. config:
    JSON-serialisable dict; `script` is the name of the method file, `args` are its settings.
    lock_seconds: how long to wait for an earlier process that still writes there. Use a Run in a
    with statement. Raises UserError.
    """

    def __init__(self, folder, config, resume=False, track=False, lock_seconds=0):
        self.folder = Path(folder)
        self.track = track
        self.wandb = None
        self.bar = None
        self.how_to_resume = "start it again to continue"
        self.same_settings = ""  # appended to how_to_resume
        self.shown = {}  # beside the progress bar
        self.columns = {}  # of each CSV file
        self.saved_at = time.perf_counter()
        packages = ("torch", "numpy", "gymnasium", "ogbench", "mujoco")
        self.config = dict(
            config,
            commit=git_commit(),
            threads=torch.get_num_threads(),
            python=sys.version.split()[0],
            versions={package: installed_version(package) for package in packages},
        )
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=resume)
            self.lock = FileLock(self.folder / ".lock")
            try:
                take_lock(self.lock, lock_seconds)
            except Timeout:
                hint = f"if its machine died, delete {self.lock.lock_file}"
                raise UserError(f"{self.folder}: another process writes there; {hint}") from None

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        if self.bar:
            self.bar.close()
            can_resume = (self.folder / "checkpoint.pt").exists() and error_type is not Diverged
            if error and can_resume:
                print(f"stopped; {self.how_to_resume}{self.same_settings}", file=sys.stderr)
        if self.wandb:
            self.wandb.finish(exit_code=1 if error else 0)
        self.lock.release()

    def begin(self, nets):
        """Write config.json and return the last checkpoint, or None in a new run.

        The checkpoint's weights are loaded into `nets`, rows that were logged after it are removed,
        and changed settings are printed. They reach config.json with the next `save`: until then
        they have had no effect.
        """
        checkpoint = None
        config = self.config
        wandb_id = None
        if (self.folder / "checkpoint.pt").exists():
            checkpoint = read_checkpoint(self.folder)
            if "generator" not in checkpoint:
                raise UserError(f"{self.folder}: has weights only, which cannot be resumed")
            load_weights(nets, checkpoint["nets"])
            config = read_config(self.folder)
            self.same_settings = ", with the same settings"
            wandb_id, name = config.get("wandb", (None, ""))
            if name != self.folder.resolve().name:  # a copy of a run is a run of its own
                wandb_id = None
            before, now = config["args"], self.config["args"]
            step = checkpoint["step"]
            old, new = before.get("offline_steps", 0), now.get("offline_steps", 0)
            if old != new and step > min(old, new):  # a phase that is over keeps its length
                raise UserError(f"--offline-steps {new}: was {old}, and {step} steps are done")
            print_changes(before, now)
            names = ("script", "commit", "device", "dataset", "threads", "versions")
            print_changes(config, {name: self.config.get(name) for name in names})
        elif len(read_columns(self.folder / "eval.csv").get("step", [])) > 1:
            # There was a checkpoint: one follows each evaluation.
            hint = "remove its CSV files to start it again"
            raise UserError(f"{self.folder}: its checkpoint.pt was removed; {hint}")
        if (self.folder / "config.json").exists():
            for path in self.folder.glob("*.csv"):
                cut_rows(path, checkpoint["step"] if checkpoint else -1)
        if self.track:
            self.wandb = start_wandb(self.folder, self.config, wandb_id)
            wandb_id = self.wandb.id
        if wandb_id:  # the folder's name would not do: another sweep may have had the same
            self.config["wandb"] = config["wandb"] = (wandb_id, self.folder.resolve().name)
        write_config(self.folder, config)
        return checkpoint

    def start_clock(self, step):
        """Count the next `speed` from here."""
        self.clock_step = step
        self.clock_time = time.perf_counter()

    def speed(self, step):
        """Steps per second since the last call or `start_clock`."""
        steps = step - self.clock_step
        seconds = time.perf_counter() - self.clock_time
        self.start_clock(step)
        return round(steps / seconds, 1)

    def show_progress(self, step, total, unit):
        """Show a progress bar of `total` units (updates, say), of which `step` are done.

        Starts the clock.
        """
        self.start_clock(step)
        self.bar = progress_bar(total=total, initial=step, unit=f" {unit}")

    def log(self, name, row):
        """Append a row (column -> number, `step` first) to the CSV file `name`.

        The first row of the file sets its columns: later rows get NaN for columns they lack, and
        columns they have in addition are dropped. Raises UserError if a loss is not finite.
        """
        path = self.folder / name
        with disk_errors(self.folder), open(path, "a+", newline="") as file:
            if name not in self.columns:
                file.seek(0)
                header = file.readline().strip()
                self.columns[name] = header.split(",") if header else list(row)
                if not header:
                    file.write(",".join(row) + "\n")
            writer = csv.DictWriter(
                file,
                self.columns[name],
                restval=math.nan,
                extrasaction="ignore",
                lineterminator="\n",
            )
            writer.writerow(row)
        if self.wandb:
            section = name.removesuffix(".csv")
            self.wandb.log({f"{section}/{key}": x for key, x in row.items()}, step=row["step"])
        for key, value in row.items():
            if key.endswith("_loss") and not np.isfinite(value):
                hint = "start a new run with a lower learning rate"
                raise Diverged(f"step {row['step']}: {key} is {value}; {hint}")
            is_score = name == "eval.csv" and key in ("success", "return") and not np.isnan(value)
            if key.endswith("_loss") or is_score:
                self.shown[key.removesuffix("_loss")] = f"{value:.3g}"
        if self.bar:
            self.bar.set_postfix(self.shown, refresh=False)

    def save_is_due(self):
        """Whether the last checkpoint is five minutes old."""
        return time.perf_counter() > self.saved_at + 300

    def save(self, **state):
        """Replace checkpoint.pt by `state`: `step`, `nets` and more; config.json by this run's."""
        for name, tensor in state["nets"].items():
            if not tensor.isfinite().all():
                hint = "start a new run with a lower learning rate"
                raise Diverged(f"step {state['step']}: {name} is not finite; {hint}")
        with disk_errors(self.folder):
            for name in self.columns:  # the rows reach the disk before the checkpoint
                with open(self.folder / name, "a") as file:
                    os.fsync(file.fileno())
        write_config(self.folder, self.config)
        self.same_settings = ""
        file = io.BytesIO()
        torch.save(state, file)
        write_file(self.folder / "checkpoint.pt", file.getbuffer())
        self.saved_at = time.perf_counter()

    def finish(self, switch=0):
        """Print the score, the mean of the last three evaluations as in the papers.

        switch: the last step of the offline phase; if evaluations follow it, only they count.
        """
        self.bar.close()
        evaluations = read_columns(self.folder / "eval.csv")
        steps = evaluations.get("step", np.zeros(0))
        count = (steps > switch).sum()
        if count == 0:
            count = len(steps)
        count = min(3, count)
        means = []
        for name, values in evaluations.items():
            mean = values[len(values) - count :].mean()
            if name in ("success", "return", "length") and not np.isnan(mean):
                means.append(f"{name} {mean:.4g}")
        print(f"finished; mean of the last {count} evaluations: {', '.join(means)}")

    def plot(self, unit="updates", switch=0):
        """Draw curve.png from the CSV files; `unit` is what their `step` counts.

        switch: the last step of the offline phase, marked if there are rows after it.
        """
        from matplotlib.figure import Figure  # here: the import takes a second

        evaluations = read_columns(self.folder / "eval.csv")
        training = read_columns(self.folder / "train.csv")
        score = "return" if np.isnan(evaluations["success"]).all() else "success"
        losses = [name for name in training if name.endswith("_loss")]
        q_values = [name for name in training if name.startswith("q_m")]
        panels = [(evaluations, [score]), (training, losses), (training, q_values)]
        figure = Figure(figsize=(13, 3.5), layout="constrained")
        figure.suptitle(self.folder.name)
        for axes, (columns, names) in zip(figure.subplots(1, 3), panels):
            for name in names:
                thousands = columns["step"] / 1000
                axes.plot(thousands, columns[name], ".-", markersize=3, linewidth=1, label=name)
            if names:
                axes.legend()
            if 0 < switch < evaluations["step"][-1]:
                axes.axvline(switch / 1000, color="black", linestyle="--", linewidth=1)
            axes.set_xlabel(f"thousand {unit}")
            axes.grid(alpha=0.3)
        figure.axes[1].set_yscale("symlog", linthresh=1e-2)  # a policy's loss can be negative
        with disk_errors(self.folder):
            figure.savefig(self.folder / "curve.png")


def warn_of_cpu_quota():
    """Print a warning where a container grants fewer cores than torch has threads."""
    groups = Path("/sys/fs/cgroup")
    quota, period = "max", "1"
    if (groups / "cpu.max").exists():
        quota, period = (groups / "cpu.max").read_text().split()
    elif (groups / "cpu/cpu.cfs_quota_us").exists():  # cgroups version 1; -1 is no limit
        quota = (groups / "cpu/cpu.cfs_quota_us").read_text()
        period = (groups / "cpu/cpu.cfs_period_us").read_text()
    threads = torch.get_num_threads()
    if quota != "max" and 0 < int(quota) < threads * int(period):
        cores = max(1, int(quota) // int(period))
        print(f"this container grants fewer than {threads} cores: set OMP_NUM_THREADS={cores}")


def start_run(script, name, args, description, device):
    """A `Run` of the file `script` with these settings, which it prints.

    name: of the environment. description: of the dataset.
    """
    script = Path(script)
    old_folder = args.resume or args.start_or_resume
    folder = old_folder
    if not folder:
        started = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # several may start in one second
        own_name = name.replace("/", "-")  # a Gymnasium id may have a namespace
        folder = Path(args.run_dir) / f"{own_name}__{script.stem}__{args.seed}__{started}"
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    config = dict(script=script.name, args=vars(args), device=device_name, dataset=description)
    lock_seconds = 300 if args.start_or_resume else 0  # a requeued job's last process may still run
    run = Run(folder, config, bool(old_folder), args.track, lock_seconds)
    run.how_to_resume = f"resume with --resume {run.folder}"
    warn_of_cpu_quota()
    print(f"{name}: {description}")
    print("settings:", ", ".join(f"{name}={value}" for name, value in vars(args).items()))
    print(f"device: {device}, writing to {run.folder}")
    return run
