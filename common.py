"""Data onto the device, results onto disk and screen; nothing here is about a method."""

import csv
import difflib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import ogbench
import ogbench.online_locomotion  # registers online-ant-v0 and relatives
import torch
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from ogbench.relabel_utils import relabel_dataset
from tqdm import tqdm

warnings.filterwarnings("ignore", message=".*DISPLAY environment variable")  # nothing is shown
warnings.filterwarnings("ignore", message=".*precision lowered by casting")  # of OGBench's spaces


class UserError(Exception):
    """A mistake that the user can mend; shown as one line."""


# --------------------------------------------------------------------------------- command line


def tuned(args_type, settings, env):
    """args_type with the row of settings whose name begins `env`; its own defaults without one."""
    row = next((row for name, row in settings.items() if env.startswith(name)), {})
    return args_type(**{"env": env, **row})


def flag(name):
    return "--" + name.replace("_", "-")


def settings_table(args_type, settings):
    """The settings as text for --help, environment by environment, as flags."""
    *_, names = settings.values()
    lines = []
    for env, row in {**settings, "any other": vars(args_type())}.items():
        names = row if env in settings else names
        values = {k: " ".join(map(str, v)) if type(v) is tuple else v for k, v in row.items()}
        words = f"{env:29}" + " ".join(f"{flag(name)} {values[name]}" for name in names)
        lines += textwrap.wrap(
            words, 95, initial_indent="    ", subsequent_indent=" " * 33, break_on_hyphens=False
        )
    return "\n".join(lines)


def parse_args(args_type, doc, settings):
    """Command line -> args_type, on top of the settings of its --env. Raises UserError."""
    table = settings_table(args_type, settings)
    doc = f"{doc}\nDefaults by environment (a flag that is given beats them):\n\n{table}"
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    box = io.StringIO()
    try:
        with redirect_stderr(box):  # twice: --env decides what the other flags default to
            args, _ = tyro.cli(args_type, return_unknown_args=True, add_help=False, config=config)
            default = tuned(args_type, settings, args.env)
            args = tyro.cli(args_type, default=default, description=doc, config=config)
    except SystemExit as e:
        if not e.code:
            raise
        text = " ".join(re.sub("[─│╭╮╰╯]", " ", box.getvalue().partition("\n")[2]).split())
        text = re.split(" Argument helptext| For full helptext", text)[0]
        text = re.sub(r"(Perhaps you meant: --\S+).*", r"\1", text)
        raise UserError(f"{text} (--help lists all flags)") from None
    limits = dict(discount=(1e-9, 1), tau=(1e-9, 1), seed=(0, 2**31 - 1), task=(-99, 99))
    limits.update(policy_width=(0, 1e6), target_entropy=(-1e6, 1e6))
    for name, value in vars(args).items():
        if value == ():
            raise UserError(f"{flag(name)}: needs at least one number")
        low, high = limits.get(name, (1e-12, 1e12))
        for x in value if type(value) is tuple else (value,):
            if type(x) in (int, float) and not low <= x <= high:
                raise UserError(f"{flag(name)} {x}: too {'large' if x > high else 'small'}")
    return args


def cli(main):
    """Run main(); a user's mistake becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as e:
        print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def pick_device(name, compile=False):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> torch.device. Raises UserError."""
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    cuda = re.fullmatch(r"cuda(:\d+)?", name)
    if name != "cpu" and not (cuda and int((cuda[1] or ":0")[1:]) < count):
        raise UserError(f"--device {name}: must be cpu or one of the {count} CUDA devices found")
    compilers = os.environ.get("CXX", "g++"), "g++", "clang++"
    if compile and name == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError("--compile: no C++ compiler found (g++, clang++ or $CXX)")
    return torch.device(name)


# --------------------------------------------------------------------------------- environments


class Task(NamedTuple):
    """What --env and --task name."""

    name: str  # antmaze-giant-navigate-singletask-task3-v0
    dataset: str  # antmaze-giant-navigate-v0
    env_id: str  # antmaze-giant-singletask-task3-v0


def dataset_names():
    """Every state-based dataset whose single tasks the installed ogbench has environments for."""
    names = []
    for env_id in gymnasium.registry:
        base, found, _ = env_id.partition("-singletask-v0")
        kinds = ["navigate", "stitch"] if re.search("maze|soccer", base) else ["play", "noisy"]
        kinds += ["explore"] if re.fullmatch("antmaze-(medium|large|teleport)", base) else []
        if found and not base.startswith("visual"):
            names += [f"{base}-{kind}-v0" for kind in kinds]
    return names


def resolve_task(env, task=0):
    """--env NAME[-singletask[-taskN]]-v0 and --task N (0: default) -> Task. Raises UserError."""
    match = re.fullmatch(r"(.+?)(?:-singletask(?:-task(\d+))?)?-(v\d+)", env)
    dataset = f"{match[1]}-{match[3]}" if match else env
    if dataset not in dataset_names():
        close = difflib.get_close_matches(dataset, dataset_names(), n=3, cutoff=0)
        raise UserError(f"--env {env}: no such OGBench dataset; closest: {', '.join(close)}")
    number = int(match[2] or task)
    if task not in (0, number):
        raise UserError(f"--task {task}: --env {env} already names task {number}")
    if match[2] == "0" or not 0 <= number <= 5:
        raise UserError(f"task {number}: must be 1 to 5, or left out for the default task")
    suffix = f"singletask-task{number}" if number else "singletask"
    base, kind, version = dataset.rsplit("-", 2)
    return Task(f"{base}-{kind}-{suffix}-{version}", dataset, f"{base}-{suffix}-{version}")


class SeededReset(gymnasium.Wrapper):
    """Makes episodes follow from the last seed: OGBench draws from NumPy's global generator.

    For an environment that has its process to itself. Of a step's info it keeps `success`; the
    rest would be copied between processes for nothing.
    """

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seeds = np.random.default_rng(seed)
        number = int(self.seeds.integers(2**31))
        np.random.seed(number)
        self.env.action_space.seed(number)
        obs, _ = self.env.reset(seed=number, options=options)
        return obs, {}

    def step(self, action):
        *result, info = self.env.step(action)
        return *result, {k: info[k] for k in ("success",) if k in info}


def continuous_env(env_id):
    """Registered Gymnasium id -> function that makes it, actions in [-1, 1]. Raises UserError."""
    known = [name for name in gymnasium.registry if "/" not in name]
    if env_id not in gymnasium.registry:
        close = difflib.get_close_matches(env_id, known, n=3, cutoff=0)
        raise UserError(f"--env {env_id}: no such environment; closest: {', '.join(close)}")
    try:
        with gymnasium.make(env_id) as env:
            obs, actions = env.observation_space, env.action_space
    except Exception as e:  # a package that is missing, a version that is too old
        raise UserError(f"--env {env_id}: cannot be made: {' '.join(str(e).split())}") from None
    for name, space in (("observations", obs), ("actions", actions)):
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise UserError(f"--env {env_id}: {name} must be a vector (Box), here {space}")
    if not actions.is_bounded():
        raise UserError(f"--env {env_id}: actions must be bounded, here {actions}")
    return lambda: gymnasium.wrappers.RescaleAction(gymnasium.make(env_id), -1.0, 1.0)


def make_envs(env, num_envs):
    """`num_envs` copies of a Gymnasium id, or of what a function makes, a process each."""
    make = env if callable(env) else lambda: gymnasium.make(env)
    functions = [lambda: SeededReset(make())] * num_envs
    return AsyncVectorEnv(functions, autoreset_mode=AutoresetMode.SAME_STEP)


# ------------------------------------------------------------------------------------- datasets


class Batch(NamedTuple):
    """Transitions, or chunks of h consecutive actions: float32 tensors on the dataset's device."""

    observations: torch.Tensor  # (B, O) where the chunk starts
    actions: torch.Tensor  # (B, h * A)
    rewards: torch.Tensor  # (B,) discounted sum over the valid steps
    masks: torch.Tensor  # (B,) 0 if the task was solved at any valid step: no bootstrap
    next_observations: torch.Tensor  # (B, O) after the last valid step
    valid: torch.Tensor  # (B, h) 0 for steps after the episode's end


class Dataset:
    """Transitions (s, a, r, s') in order of time, as tensors; each observation is stored once.

    NumPy arrays: observations, next_observations (N, O); actions (N, A) in [-1, 1]; rewards (N,);
    masks (N,), 0 where s is terminal and its value therefore r alone; terminals (N,), 1 at the last
    transition of each episode. Raises ValueError if they do not fit together.
    """

    def __init__(
        self, observations, actions, next_observations, rewards, masks, terminals, device="cpu"
    ):
        n, obs_dim = len(actions), observations.shape[1:]
        for name, array, shape in [
            ("actions", actions, (n, *actions.shape[1:2])),
            ("observations", observations, (n, *obs_dim[:1])),
            ("next_observations", next_observations, (n, *obs_dim[:1])),
            ("rewards", rewards, (n,)),
            ("masks", masks, (n,)),
            ("terminals", terminals, (n,)),
        ]:
            if array.shape != shape or n == 0:
                raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
            if not np.isfinite(array).all():
                row = np.argwhere(~np.isfinite(array))[0, 0]
                raise ValueError(f"{name} has NaN or infinity, first in row {row}")
        if np.abs(actions).max() > 1:
            raise ValueError(f"actions must be in [-1, 1], found {np.abs(actions).max()}")

        ends = terminals.astype(bool)
        ends[-1] = True
        rows = np.arange(n) + np.cumsum(ends) - ends  # an episode's last next_observation is extra
        stored = np.empty((n + ends.sum(), *obs_dim), np.float32)
        stored[rows] = observations
        stored[rows[ends] + 1] = next_observations[ends]
        wrong = (stored[rows + 1] != next_observations.astype(np.float32)).any(1)
        if wrong.any():
            i = wrong.argmax()
            raise ValueError(f"next_observations[{i}] is not observations[{i + 1}]: set terminals")

        put = lambda array: torch.as_tensor(array.astype(np.float32), device=device)
        self.observations, self.actions = put(stored), put(actions)
        self.rewards, self.masks, self.terminals = put(rewards), put(masks), put(ends)
        self.rows = torch.as_tensor(rows, device=device)
        self.episodes = int(ends.sum())

    def __len__(self):
        return len(self.actions)

    def q_bounds(self, discount):
        """The least and the greatest discounted return that these rewards allow."""
        low, high = self.rewards.min().clamp(max=0), self.rewards.max().clamp(min=0)
        return low.item() / max(1 - discount, 1e-9), high.item() / max(1 - discount, 1e-9)

    def chunks(self, starts, horizon, discount):
        """Batch of the chunks that start at transitions (B,), none later than N - horizon."""
        steps = starts[:, None] + torch.arange(horizon, device=starts.device)
        ended = self.terminals[steps]
        valid = (ended.cumsum(1) - ended == 0).float()
        powers = discount ** torch.arange(horizon, device=starts.device)
        last = starts + valid.sum(1).long() - 1
        return Batch(
            observations=self.observations[self.rows[starts]],
            actions=self.actions[steps].flatten(1),
            rewards=(powers * self.rewards[steps] * valid).sum(1),
            masks=torch.where(valid > 0, self.masks[steps], 1.0).prod(1),
            next_observations=self.observations[self.rows[last] + 1],
            valid=valid,
        )

    def sample(self, batch_size, horizon=1, discount=1.0, generator=None):
        """Batch of chunks with uniformly drawn starts; never waits for the device."""
        starts, device = len(self) - horizon + 1, self.actions.device
        starts = torch.randint(starts, (batch_size,), device=device, generator=generator)
        return self.chunks(starts, horizon, discount)


def load_dataset(path, task, device):
    """A file in OGBench's layout -> Dataset with OGBench's rewards for the task, source or None.

    Raises UserError, which names the file and what is wrong with it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with gymnasium.make(task.env_id) as env:
        sizes = env.observation_space.shape + env.action_space.shape
        try:
            if not zipfile.is_zipfile(path):
                raise ValueError("not an npz file, or the end of one is missing")
            with np.load(path) as file:
                source = str(file["source"]) if "source" in file else None
                for name in ("observations", "actions", "terminals", "qpos"):
                    if name not in file:
                        raise ValueError(f"has no {name}")
            data = ogbench.load_dataset(path, add_info=True)
            for name, array in data.items():
                if len(array) != len(data["observations"]):
                    raise ValueError(f"{name} has the wrong length, or the last terminal is not 1")
                if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
                    raise ValueError(f"{name} has NaN, infinity, or no real numbers")
            relabel_dataset(task.env_id, env, data)
            found = data["observations"].shape[1:] + data["actions"].shape[1:]
            if found != sizes:
                raise ValueError(f"observation, action sizes {found}, the environment has {sizes}")
            data["actions"] = np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5)  # as the authors do
            names = "observations actions next_observations rewards masks terminals".split()
            return Dataset(*(data[name] for name in names), device=device), source
        except Exception as e:  # a damaged zip can raise anything; all of it means the same
            cause = "arrays differ in length" if isinstance(e, IndexError) else str(e)
            raise UserError(f"{path}: not a usable dataset: {' '.join(cause.split())}") from None


def get_dataset(task, path, device, horizon=1):
    """The dataset for a task, and a line that says where it came from. Raises UserError.

    In this order: the file `path`; the official one in ~/.ogbench/data; for pointmaze-*-navigate
    a small one collected here and kept in ~/.ogbench/collected; OGBench's own download.
    """
    official = Path("~/.ogbench/data").expanduser() / f"{task.dataset}.npz"
    note = "given by --dataset" if path else "official file"
    if not path and not official.exists() and re.match("pointmaze-.*-nav", task.dataset):
        path = official.parents[1] / "collected" / official.name
        if not path.exists():
            collect_pointmaze(task.dataset, path)
    elif not path:
        path = official
        try:
            if not path.exists():
                ogbench.download_datasets([task.dataset], path.parent)
        except Exception as e:  # whatever network and disk can raise
            if not path.exists():  # else only the -val.npz is missing, which nothing here needs
                how = f"put {path.name} into {path.parent} by hand, or name it with --dataset"
                raise UserError(f"{task.dataset}: download failed ({e}); {how}") from None
    dataset, source = load_dataset(path, task, device)
    if horizon > len(dataset):
        raise UserError(f"--horizon {horizon}: {path} has only {len(dataset)} transitions")
    return dataset, f"{str(path).replace(str(Path.home()), '~')} ({source or note})"


def write_atomically(path, write):
    """write(file) under a temporary name, then rename: nobody ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def collect_pointmaze(name, path, episodes=300, workers=None, seed=0):
    """Write a pointmaze-*-navigate dataset to `path`, the same one for any number of workers."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path.parent}: cannot keep the collected data there: {e}") from None
    steps = 2001 if "giant" in name else 1001
    jobs = [(name.replace("-navigate", ""), steps, [seed, i]) for i in range(episodes)]
    with multiprocessing.Pool(workers) as pool:
        results = pool.imap(collect_episode, jobs)
        parts = list(tqdm(results, f"collecting {name}", episodes, unit=" episodes"))
    data = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    source = f"collected by OGBench's protocol, {episodes} episodes, seed {seed}; not official"
    write_atomically(path, lambda file: np.savez_compressed(file, source=source, **data))


def collect_episode(job):
    """An episode (environment id, steps, seed) by OGBench's protocol, in the layout of its files.

    From a random cell to one random goal after the other (hallways are no goals), along the
    environment's own shortest paths, with Gaussian noise of 0.5 on the actions.
    """
    env_id, steps, seed = job
    rng = np.random.default_rng(seed)
    number = int(rng.integers(2**31))
    np.random.seed(number)
    with gymnasium.make(env_id, terminate_at_goal=False, max_episode_steps=steps) as env:
        maze = env.unwrapped
        free = maze.maze_map == 0
        up, down, left, right = (np.roll(free, s, axis) for axis in (0, 1) for s in (1, -1))
        goals = free & ~((up == down) & (left == right) & (up != left))
        pick = lambda cells: tuple(rng.choice(np.argwhere(cells)))
        env.action_space.seed(number)
        task_info = dict(init_ij=pick(free), goal_ij=pick(goals))
        obs, _ = env.reset(seed=number, options=dict(task_info=task_info))
        rows, done = [], False
        while not done:
            direction = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)[0] - maze.get_xy()
            direction /= np.linalg.norm(direction) + 1e-6
            action = np.clip(direction + rng.normal(0, 0.5, 2), -1, 1)
            next_obs, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            rows.append((obs, action, info["prev_qpos"], info["prev_qvel"], done))
            obs = next_obs
            if info["success"]:
                maze.set_goal(pick(goals))
    names = "observations", "actions", "qpos", "qvel", "terminals"
    return {k: np.array(column, np.float32) for k, column in zip(names, zip(*rows))}


# ------------------------------------------------------------------------------------------ run


def commit():
    """The commit of this checkout, with a + if files have changed since; None outside of git."""
    words = "git describe --always --abbrev=40 --dirty=+ --exclude *".split()
    try:
        here = Path(__file__).parent
        return (
            subprocess.run(words, cwd=here, capture_output=True, text=True).stdout.strip() or None
        )
    except OSError:  # no git
        return None


class Run:
    """A run's folder: config.json, CSV files, curve.png, checkpoint.pt. Raises UserError."""

    def __init__(self, root, name, config):
        packages = "torch", "numpy", "gymnasium", "ogbench", "mujoco"
        versions = {name: importlib.metadata.version(name) for name in packages}
        versions["python"] = platform.python_version()
        threads = torch.get_num_threads()
        config = {**config, "versions": versions, "threads": threads, "commit": commit()}
        self.files, self.warned = {}, False
        self.path = Path(root) / f"{name}__{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            self.path.mkdir(parents=True)
            text = json.dumps(config, indent=2, default=str) + "\n"
            (self.path / "config.json").write_text(text)
        except OSError as e:
            raise UserError(f"--run-dir {root}: cannot write there: {e}") from None

    def log(self, name, **row):
        """Append a row to a CSV file, which takes its columns from the first."""
        if name not in self.files:
            self.files[name] = open(self.path / name, "w", newline="")
            csv.writer(self.files[name]).writerow(row)
        csv.writer(self.files[name]).writerow(row.values())
        self.files[name].flush()

    def check_q(self, step, q_min, q_max, bounds):
        """Warn, once, when Q is outside its possible range by more than a tenth of that range."""
        low, high = bounds
        slack = 0.1 * (high - low)
        if not self.warned and not low - slack <= q_min <= q_max <= high + slack:
            self.warned = True
            q, possible = f"[{q_min:.4g}, {q_max:.4g}]", f"[{low:.4g}, {high:.4g}]"
            text = f"warning: update {step}: Q in {q}, but the rewards allow only {possible}"
            tqdm.write(text, file=sys.stderr)

    def save(self, **state):
        """Replace checkpoint.pt; torch.load(path, weights_only=True) reads it."""
        write_atomically(self.path / "checkpoint.pt", lambda file: torch.save(state, file))

    def plot(self, unit="updates"):
        """Draw curve.png from the CSV files, over their column `step`, which counts `unit`."""
        from matplotlib.figure import Figure  # here, since it takes a second

        def read(name):
            with open(self.path / name, newline="") as file:
                header, *rows = csv.reader(file)
            return dict(zip(header, np.array(rows, float).T))

        figure = Figure(figsize=(13, 3.5), layout="constrained")
        figure.suptitle(self.path.name)
        left, middle, right = figure.subplots(1, 3)
        if "eval.csv" in self.files:
            rows = read("eval.csv")
            known = not np.isnan(rows["success"]).all()
            left.plot(rows["step"], 100 * rows["success"] if known else rows["return"], "o-")
            left.set(title="evaluation", ylabel="success (%)" if known else "return")
            left.set_ylim((-3, 103) if known else None)
        if "train.csv" in self.files:
            rows = read("train.csv")
            for name in (name for name in rows if name.endswith("_loss")):
                middle.plot(rows["step"], rows[name], linewidth=1, label=name.removesuffix("_loss"))
            middle.set(title="losses")
            middle.set_yscale("symlog", linthresh=1e-2)  # a policy's loss can be negative
            right.plot(rows["step"], rows["q_mean"], linewidth=1, label="mean")
            right.fill_between(rows["step"], rows["q_min"], rows["q_max"], alpha=0.2, label="range")
            right.set(title="Q in a batch")
            middle.legend(), right.legend()
        for axes in (left, middle, right):
            axes.set_xlabel(unit)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
            axes.grid(alpha=0.3)
        figure.savefig(self.path / "curve.png")
