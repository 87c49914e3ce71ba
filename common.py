"""Loads OGBench's datasets onto the device and writes a run's results to disk and screen.

Nothing here is about a method: no network, no loss, no training loop.
"""

import csv
import difflib
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import ogbench
import requests
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

MIRROR = "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main"

# What NumPy, zipfile, ogbench and torch raise for a file that is damaged or something else.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    RuntimeError,
    MemoryError,
    OverflowError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


class UserError(Exception):
    """An error the user can fix; the scripts show it as one line, without a traceback."""


class Diverged(UserError):
    """A loss or a weight that is not finite; resuming would not help."""


# ---------------------------------------------------------------------------------------- names


def dataset_kinds(stem):
    """The kinds of datasets that OGBench has for an environment like antmaze-giant."""
    if stem in ("antmaze-medium", "antmaze-large", "antmaze-teleport"):
        return ["navigate", "stitch", "explore"]
    if "maze" in stem or "soccer" in stem:
        return ["navigate", "stitch"]
    return ["play", "noisy"]


def single_tasks():
    """OGBench's state-based single tasks: {name: (dataset name, Gymnasium id)}.

    The Gymnasium id is the name without the kind of the dataset: antmaze-giant-singletask-v0 for
    antmaze-giant-navigate-singletask-v0.
    """
    tasks = {}
    for env_id in gymnasium.registry:
        stem, separator, number = env_id.removesuffix("-v0").partition("-singletask")
        if separator and not stem.startswith("visual-"):
            for kind in dataset_kinds(stem):
                name = f"{stem}-{kind}-singletask{number}-v0"
                tasks[name] = (f"{stem}-{kind}-v0", env_id)
    return tasks


def is_dataset(env):
    """Whether --env names an OGBench dataset, with or without its task."""
    stem, _, _ = env.removesuffix("-v0").partition("-singletask")
    return f"{stem}-v0" in {dataset_name for dataset_name, _ in single_tasks().values()}


def resolve_task(env, task=0):
    """--env and --task (0: the default task) -> full name, dataset name, Gymnasium id.

    NAME-v0, NAME-singletask-v0 and NAME-singletask-taskN-v0 differ in the task only. Raises
    UserError.
    """
    stem, _, suffix = env.removesuffix("-v0").partition("-singletask")
    if task and suffix not in ("", f"-task{task}"):
        raise UserError(f"--env {env} --task {task}: this name has a task already")
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


# -------------------------------------------------------------------------------------- dataset


class Batch(NamedTuple):
    """Transitions, or chunks of h consecutive actions: float32 tensors on the dataset's device."""

    observations: torch.Tensor  # (B, O) at the first step of the chunk
    actions: torch.Tensor  # (B, h * A)
    rewards: torch.Tensor  # (B,) discounted sum over the valid steps
    masks: torch.Tensor  # (B,) 0 if the task was solved at a valid step: no bootstrap
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
        if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            raise ValueError(f"{name} has NaN, infinity, or no real numbers")


class Dataset:
    """Transitions of consecutive episodes on the device, in OGBench's compact layout.

    An episode of n steps has n + 1 rows; the last one only holds its last observation. Arguments
    are NumPy arrays of M rows, or of none, for `append` to add to. Raises ValueError.

    observations: (M, O)
    actions: (M, A) in [-1, 1]
    rewards: (M,)
    masks: (M,), 0 if nothing counts after this step (solved, terminated), else 1 (also: time is up)
    valids: (M,), 0 in the last row of each episode, else 1
    """

    COLUMNS = ("observations", "actions", "rewards", "masks", "valids")

    def __init__(self, observations, actions, rewards, masks, valids, device="cpu"):
        arrays = dict(
            observations=observations, actions=actions, rewards=rewards, masks=masks, valids=valids
        )
        check_arrays(arrays)
        for name, array in arrays.items():
            ndim = 2 if name in ("observations", "actions") else 1
            if array.ndim != ndim:
                raise ValueError(f"{name} has {array.ndim} dimensions, must have {ndim}")
        if len(valids) > 0 and (not np.any(valids) or valids[-1] != 0):
            raise ValueError("no transitions, or no end of an episode in the last row")
        if (np.abs(actions) > 1).any():
            raise ValueError("actions beyond [-1, 1]")

        def to_device(array):
            return torch.as_tensor(np.asarray(array, np.float32), device=device)

        self.observations = to_device(observations)
        self.actions = to_device(actions)
        self.rewards = to_device(rewards)
        self.masks = to_device(masks)
        self.valids = to_device(valids)
        rows = np.flatnonzero(valids)
        self.rows = torch.as_tensor(rows, device=device)  # (N,) the row of each transition
        # N on the device: a captured CUDA graph reads it anew, where a Python number is frozen.
        self.count = torch.tensor(len(rows), dtype=torch.float64, device=device)
        self.num_transitions = len(rows)
        self.num_rows = len(valids)
        self.num_given_rows = len(valids)  # the others are what `append` added
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

    def reserve(self, num_transitions):
        """Make room for that many more transitions. Raises MemoryError.

        It replaces the tensors, so call it before a CUDA graph is captured.
        """

        def extend(tensor, num_rows):
            extended = tensor.new_zeros(len(tensor) + num_rows, *tensor.shape[1:])
            extended[: len(tensor)] = tensor
            return extended

        if num_transitions == 0:
            return
        try:
            for name in self.COLUMNS:  # two rows each: an episode may have a single step
                setattr(self, name, extend(getattr(self, name), 2 * num_transitions))
            self.rows = extend(self.rows, num_transitions)
        except RuntimeError as error:  # of torch, on a CPU
            raise MemoryError(f"no memory for {num_transitions} online steps: {error}") from None

    def append(self, observation, action, reward, mask, next_observation, done):
        """Add the next step of the last episode or, if that one is done, the first of a new one.

        It can be sampled from then on. In an episode that goes on, `observation` is the last
        `next_observation`. mask: as above, so 1 if the episode is done only because time is up.
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
        """What `append` added, a CPU tensor for each argument of the constructor (name -> tensor).

        None if it added nothing.
        """
        if self.num_rows == self.num_given_rows:
            return None
        added = slice(self.num_given_rows, self.num_rows)
        return {name: getattr(self, name)[added].to("cpu", copy=True) for name in self.COLUMNS}

    def append_collected(self, collected):
        """Add what `collected` returned, in room of its own; its last episode is over."""
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
            observations=self.observations[rows[:, 0]],
            actions=self.actions[rows].flatten(1),
            rewards=(discount**offsets * valid * self.rewards[rows]).sum(1),
            masks=torch.where(valid > 0, self.masks[rows], 1.0).prod(1),
            next_observations=self.observations[last_row + 1],
            valid=valid,
        )

    def sample(self, batch_size, horizon=1, discount=1.0, generator=None):
        """Batch of chunks with uniformly drawn starts; never waits for the device.

        In float64: a float32 in [0, 1) has 2^24 values, which shows with millions of transitions.
        """
        u = torch.rand(
            batch_size, dtype=torch.float64, device=self.count.device, generator=generator
        )
        starts = (u * (self.count - horizon + 1)).long()
        return self.chunks(starts, horizon, discount)


def read_ogbench_file(path):
    """The arrays of a file in OGBench's layout (name -> array), and where they are from.

    The second is None for official files, which do not say. Raises UserError.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged_member = archive.testzip()  # compares all checksums
        if damaged_member:
            raise ValueError(f"{damaged_member} is damaged")
        with np.load(path) as file:
            # OGBench computes rewards from the positions; what was collected online has its own.
            has_rewards = "rewards" in file and "qpos" not in file
            basis = {"rewards", "masks"} if has_rewards else {"qpos"}
            missing = ({"observations", "actions", "terminals"} | basis) - set(file)
            if missing:
                raise ValueError(f"has no {', '.join(missing)}")
            source = str(file["source"]) if "source" in file else None
            rewards = {name: file[name] for name in basis} if has_rewards else {}
        data = ogbench.load_dataset(path, compact_dataset=True, add_info=True)
        return {**data, **rewards}, source
    except UNREADABLE as error:
        raise UserError(f"{path}: not a usable dataset: {error}") from None


def sparse_reward(reward):
    """0 if the task is solved, else -1.

    reward: a number, minus the number of unsolved parts, as in OGBench's scene and puzzle.
    """
    return (reward == 0) - 1.0


def load_dataset(path, env_id, device, sparse=False):
    """A file in OGBench's layout -> (Dataset with the rewards of env_id, where the data are from).

    A file without positions keeps the rewards and masks that it has. sparse: the rewards become 0
    where the mask is 0, which means solved, and -1 elsewhere, as in `sparse_reward`. Raises
    UserError.
    """
    data, source = read_ogbench_file(path)
    with gymnasium.make(env_id) as env:
        expected = env.observation_space.shape + env.action_space.shape
        try:
            check_arrays(data)
            found = data["observations"].shape[1:] + data["actions"].shape[1:]
            if found != expected:
                raise ValueError(f"observation, action sizes {found}; {env_id} has {expected}")
            if len(data["observations"]) == 0:
                raise ValueError("no transitions")
            if "rewards" not in data:
                ogbench.relabel_utils.relabel_dataset(env_id, env, data)  # adds both
            if sparse:
                data["rewards"] = (data["masks"] == 0) - 1.0
            dataset = Dataset(
                observations=data["observations"],
                actions=np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5),  # as the authors do
                rewards=data["rewards"],
                masks=data["masks"],
                valids=data["valids"],
                device=device,
            )
        except (ValueError, IndexError, KeyError) as error:
            raise UserError(f"{path}: not a usable dataset: {error}") from None
    return dataset, source


def get_dataset(name, env_id, path="", url="", device="cpu", sparse=False):
    """The dataset `name` with the rewards of env_id -> (Dataset, description). Raises UserError.

    The first of these that is there: the file `path`; the official file in ~/.ogbench/data; for
    pointmaze-*-navigate, unless a url is given, one collected here; a download from `url`, a folder
    or an npz file, by default OGBench's host.
    """
    official = Path("~/.ogbench/data").expanduser() / f"{name}.npz"
    collected = Path("~/.ogbench/collected").expanduser() / f"{name}.npz"
    if path:
        path = Path(path)
    elif url or os.path.exists(official) or not re.fullmatch("pointmaze-.*-navigate-v0", name):
        path = official
        make_once(path, lambda: download(name, url, path))
    else:
        path = collected
        make_once(path, lambda: collect_pointmaze(name, path))
    dataset, source = load_dataset(path, env_id, device, sparse)
    counts = f"{len(dataset)} transitions, {dataset.num_episodes} episodes"
    return dataset, f"{counts}, {source or 'no source stated, as in OGBench files'}"


@contextmanager
def disk_errors(folder):
    """Turn a full disk or a missing permission into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error}") from None


def make_once(path, make):
    """Call make() unless the file exists; of several processes, one calls and the others wait."""
    if os.path.exists(path):
        return
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
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


def download(name, url, path):
    """Fetch the dataset `name` to `path`; url: a folder or an npz file, "" for OGBench's host.

    Four attempts; each resumes where the last one was interrupted. Raises UserError.
    """
    url = (url or ogbench.utils.DATASET_URL).removesuffix("/")
    if not url.endswith(".npz"):
        url = f"{url}/{path.name}"
    part = path.with_name(f"{path.name}.part")
    for _ in range(4):
        resumed = part.exists() and part.stat().st_size > 0
        with disk_errors(path.parent):
            try:
                resumed = fetch(url, part) and resumed
                if is_npz(part):
                    os.replace(part, path)
                    return
                error = "the download is not an npz file"
                part.unlink(missing_ok=True)
                if not resumed:
                    break
                # The damage may be in what an earlier attempt left: once more from the start.
            except (requests.RequestException, ValueError) as failure:
                error = failure
        time.sleep(1)
    raise UserError(
        f"{url}: download failed ({error}); try the mirror that OGBench's issue 49 names: "
        f"python {Path(sys.argv[0]).name} --env {name} --dataset-url {MIRROR}, "
        f"or put {path.name} into {path.parent} by hand, or name a file with --dataset"
    )


def fetch(url, part):
    """Append what is missing to the file `part`; returns False if it had to start from byte 0."""
    size = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={size}-"}
    with requests.get(url, headers=headers, stream=True, timeout=(3, 6)) as response:
        if response.status_code == 416:  # nothing is missing
            return True
        response.raise_for_status()
        resumed = response.status_code == 206
        if not resumed:  # 200: the host does not know ranges
            size = 0
        total = size + int(response.headers.get("Content-Length", 0))
        bar = tqdm(total=total, initial=size, unit="B", unit_scale=True, desc=part.stem)
        with open(part, "ab" if resumed else "wb") as file, bar:
            for block in response.iter_content(2**18):
                bar.update(file.write(block))
    return resumed


def is_npz(path):
    """Whether the file is a zip archive whose checksums are all right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except UNREADABLE:
        return False


def leave_signals_to_main():
    """In a worker process: Ctrl-C is for the main process, which then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def collect_pointmaze(name, path, num_episodes=300, workers=None, seed=0):
    """Write a pointmaze-*-navigate dataset to `path`; the same for any number of workers."""
    env_id = name.replace("-navigate", "")
    steps = 2001 if "giant" in name else 1001
    jobs = [(env_id, steps, [seed, episode]) for episode in range(num_episodes)]
    if workers is None and hasattr(os, "sched_getaffinity"):  # not on macOS: all cores
        workers = len(os.sched_getaffinity(0))  # SLURM gives a job few of many
    with multiprocessing.Pool(workers, leave_signals_to_main) as pool:
        results = pool.imap(collect_episode, jobs)
        episodes = list(tqdm(results, f"collecting {name}", num_episodes, unit=" episodes"))
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

    From a random cell to one random goal after the other along the environment's own shortest
    paths, with Gaussian noise of standard deviation 0.5 on the actions.
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


# --------------------------------------------------------------------------------- run's folder


def read_checkpoint(folder, script):
    """checkpoint.pt of a run of `script` as it was saved. Raises UserError.

    A run that has not reached its first checkpoint, or was queued by a sweep, has config.json only:
    then {config: ...}.
    """
    path = Path(folder) / "checkpoint.pt"
    try:
        if path.exists():
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = dict(config=json.loads((Path(folder) / "config.json").read_text()))
        found = state["config"]["script"]
    except UNREADABLE as error:
        reason = str(error).partition("\n")[0]  # torch goes on for several lines
        raise UserError(f"{folder}: damaged, or not a run: {reason}") from None
    if found != script:
        raise UserError(f"{folder}: a run of {found}, not of {script}")
    return state


def git_commit():
    """The commit of this file's repository, with a + if files were changed; None outside of one."""
    if shutil.which("git") is None:
        return None
    command = "git describe --always --abbrev=40 --dirty=+ --exclude *".split()
    folder = Path(__file__).parent
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return result.stdout.strip() or None


def start_wandb(folder, config, wandb_id=None):
    """A Weights & Biases run; project and entity come from WANDB_PROJECT and WANDB_ENTITY.

    wandb_id: of the run to go on with; None begins one.
    """
    try:
        import wandb
    except ImportError:
        raise UserError("--track: needs Weights & Biases: pip install wandb") from None
    try:
        return wandb.init(name=folder.name, id=wandb_id, dir=folder, config=config, resume="allow")
    except wandb.errors.Error as error:
        raise UserError(f"--track: {error}") from None


def make_new_folder(path):
    """Create the folder `path` or, where there is one, path-2, path-3 and so on; returns it."""
    folder = path
    number = 1
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # of a run that began in the same second
            number += 1
            folder = path.with_name(f"{path.name}-{number}")


class Run:
    """The folder of a run: config.json, train.csv, eval.csv, curve.png, checkpoint.pt.

    config: dict that JSON can hold; `script` is the name of the file that trains, `args` its
    settings. resume: the folder is that of an earlier run; else, if it exists, a number is added to
    its name. Use it in a with statement. Raises UserError.
    """

    def __init__(self, folder, config, resume=False, track=False):
        self.folder = Path(folder)
        self.rows = {}  # file name -> logged rows
        self.shown = {}  # beside the progress bar
        self.bar = None
        self.wandb = None
        self.warned = False
        self.saved_at = time.perf_counter()
        packages = ("torch", "numpy", "gymnasium", "ogbench", "mujoco")
        self.config = dict(
            config,
            commit=git_commit(),
            threads=torch.get_num_threads(),
            matmul_precision=torch.get_float32_matmul_precision(),
            python=sys.version.split()[0],
            versions={package: version(package) for package in packages},
        )
        with disk_errors(self.folder):
            if not resume:
                self.folder = make_new_folder(self.folder)
            self.lock = FileLock(self.folder / ".lock", blocking=False)
            try:
                self.lock.acquire()
            except Timeout:
                raise UserError(f"{self.folder}: another process writes there") from None
        self.track = track

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        if self.bar:
            self.bar.close()
        can_resume = (self.folder / "checkpoint.pt").exists() and error_type is not Diverged
        if self.bar and error and can_resume:
            print(f"stopped; --resume {self.folder} continues from its checkpoint", file=sys.stderr)
        if self.wandb:
            self.wandb.finish(exit_code=1 if error else 0)
        self.lock.release()

    def restore(self):
        """Write config.json and, if resumed, the rows logged so far; returns what `save` saved.

        That is {} in a new run, and in one that was stopped before its first checkpoint.
        """
        state = {}
        if (self.folder / "checkpoint.pt").exists():
            state = read_checkpoint(self.folder, self.config["script"])
            if "rows" not in state:
                raise UserError(f"--resume {self.folder}: has weights only, for --evaluate")
            for name in ("device", "dataset"):
                before, now = state["config"].get(name), self.config.get(name)
                if before != now:
                    raise UserError(f"--resume {self.folder}: {name} was {before}, is {now}")
        elif self.num_lines("eval.csv") > 2:  # a checkpoint follows each evaluation: it was removed
            hint = "remove its CSV files to begin anew"
            raise UserError(f"--resume {self.folder}: has no checkpoint.pt; {hint}")
        wandb_id = state.get("config", {}).get("wandb_id")
        if self.track:
            self.wandb = start_wandb(self.folder, self.config, wandb_id)
            wandb_id = self.wandb.id
        if wandb_id:  # the folder's name would not do: another sweep may have had the same
            self.config["wandb_id"] = wandb_id
        text = json.dumps(self.config, indent=2)
        write_file(self.folder / "config.json", text.encode())
        saved_rows = []
        for name in ("train.csv", "eval.csv"):
            (self.folder / name).unlink(missing_ok=True)  # rows after the checkpoint come anew
            for row in state.get("rows", {}).get(name, []):
                saved_rows.append((row["step"], name, row))
        saved_rows.sort(key=lambda entry: entry[0])  # Weights & Biases ignores smaller steps
        for _, name, row in saved_rows:
            self.log(name, row)
        if state:  # with the settings of now, for the next resume
            kept = {name: x for name, x in state.items() if name not in ("config", "rows")}
            self.save(**kept)
        return state

    def num_lines(self, name):
        """How many lines a CSV file has, with its header."""
        path = self.folder / name
        return len(path.read_text().splitlines()) if path.exists() else 0

    def show_progress(self, step, total, unit):
        """Show a progress bar of `total` units (updates, say), of which `step` are done."""
        self.bar = tqdm(
            total=total, initial=step, unit=f" {unit}", dynamic_ncols=True, mininterval=1
        )

    def log(self, name, row):
        """Append a row (column -> number, `step` among them) to the CSV file `name`.

        Columns are those of the file's first row; NaN stands for what a later one lacks. Raises
        UserError if a loss is not finite.
        """
        rows = self.rows.setdefault(name, [])
        rows.append(row)
        with disk_errors(self.folder), open(self.folder / name, "a", newline="") as file:
            names = rows[0].keys()
            writer = csv.DictWriter(file, names, restval=math.nan, lineterminator="\n")
            if len(rows) == 1:
                writer.writeheader()
            writer.writerow(row)
        if self.wandb:
            section = name.removesuffix(".csv")
            self.wandb.log({f"{section}/{key}": x for key, x in row.items()}, step=row["step"])
        for key, value in row.items():
            if key.endswith("_loss") and not np.isfinite(value):
                hint = "start a new run with a lower learning rate"
                raise Diverged(f"step {row['step']}: {key} is {value}; {hint}")
            is_score = key in ("success", "return") and not np.isnan(value)
            if key.endswith("_loss") or is_score:
                self.shown[key.removesuffix("_loss")] = f"{value:.3g}"
        if self.bar:
            self.bar.set_postfix(self.shown)

    def check_q(self, row, rewards, discount):
        """Warn once when Q leaves the range of possible returns by a tenth of that range."""
        lowest, highest = rewards.aminmax()
        lowest = min(lowest.item() / (1 - discount + 1e-9), 0)
        highest = max(highest.item() / (1 - discount + 1e-9), 0)
        slack = 0.1 * (highest - lowest)
        inside = lowest - slack <= row["q_min"] and row["q_max"] <= highest + slack
        if not inside and not self.warned:
            self.warned = True
            tqdm.write(
                f"warning: update {row['step']}: Q in [{row['q_min']:.4g}, {row['q_max']:.4g}], "
                f"the rewards allow [{lowest:.4g}, {highest:.4g}]",
                file=sys.stderr,
            )

    def save_is_due(self):
        """Whether the last checkpoint is five minutes old."""
        return time.perf_counter() > self.saved_at + 300

    def save(self, **state):
        """Replace checkpoint.pt by `state` (`step`, `nets` and more), settings and logged rows."""
        for name, tensor in state["nets"].items():
            if not tensor.isfinite().all():
                hint = "start a new run with a lower learning rate"
                raise Diverged(f"step {state['step']}: {name} is not finite; {hint}")
        file = io.BytesIO()
        torch.save(dict(state, config=self.config, rows=self.rows), file)
        write_file(self.folder / "checkpoint.pt", file.getbuffer())
        self.saved_at = time.perf_counter()

    def finish(self):
        """Print that the run is finished and its score.

        As in the papers, that is the mean of the last three evaluations.
        """
        self.bar.close()
        rows = self.rows.get("eval.csv", [])[-3:]
        means = []
        for name in ("success", "return", "length"):
            mean = np.mean([row[name] for row in rows]) if rows else np.nan
            if not np.isnan(mean):
                means.append(f"{name} {mean:.4g}")
        print(f"finished; mean of the last {len(rows)} evaluations: {', '.join(means)}")

    def plot(self, unit="updates", switch=0):
        """Draw curve.png from the logged rows; `unit` is what their `step` counts.

        switch: the last step of the offline phase, marked if there are rows after it.
        """
        from matplotlib.figure import Figure  # here: the import takes a second

        evaluations = self.rows["eval.csv"]
        training = self.rows.get("train.csv", [])
        names = list(training[0]) if training else []
        has_success = not np.isnan(evaluations[-1]["success"])
        score = "success" if has_success else "return"
        figure = Figure(figsize=(13, 3.5), layout="constrained")
        figure.suptitle(self.folder.name)
        score_axes, loss_axes, q_axes = figure.subplots(1, 3)
        plot_columns(score_axes, evaluations, [score])
        plot_columns(loss_axes, training, [name for name in names if name.endswith("_loss")])
        plot_columns(q_axes, training, [name for name in names if name.startswith("q_m")])
        loss_axes.set_yscale("symlog", linthresh=1e-2)  # a policy's loss can be negative
        for axes in (score_axes, loss_axes, q_axes):
            if 0 < switch < evaluations[-1]["step"]:
                axes.axvline(switch / 1000, color="black", linestyle="--", linewidth=1)
            axes.set_xlabel(f"thousand {unit}")
            axes.grid(alpha=0.3)
        with disk_errors(self.folder):
            figure.savefig(self.folder / "curve.png")


def plot_columns(axes, rows, names):
    """Lines of these columns over `step`, in thousands; where a row lacks one, the line ends."""
    steps = [row["step"] / 1000 for row in rows]
    for name in names:
        values = [row.get(name, np.nan) for row in rows]
        axes.plot(steps, values, ".-", markersize=3, linewidth=1, label=name)
    if names:
        axes.legend()
