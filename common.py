"""Data onto the device, results onto disk and screen; nothing here is about a method."""

import difflib
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from contextlib import closing, contextmanager, redirect_stderr, suppress
from ctypes.util import find_library
from pathlib import Path
from typing import NamedTuple

if "--video" in sys.argv and (found := [x for x in ("EGL", "OSMesa") if find_library(x)]):
    os.environ.setdefault("MUJOCO_GL", found[0].lower())  # which MuJoCo reads when it is imported

import gymnasium
import imageio
import numpy as np
import ogbench
import ogbench.online_locomotion  # registers online-ant-v0 and relatives
import requests
import torch
import tyro
from filelock import FileLock
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from ogbench.relabel_utils import relabel_dataset
from tqdm import tqdm

warnings.filterwarnings("ignore", module="glfw|gymnasium")  # no display, spaces, old versions

TYRO = dict(config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone))
MAY_CHANGE = dict(  # of the settings of the run that --resume or --evaluate names
    resume="offline_steps online_steps eval_interval eval_episodes log_interval compile".split(),
    evaluate="eval_episodes seed device video".split(),
)
DIVERGED = "; checkpoint.pt, if any, is from before; a new run with a smaller --lr may do better"
SAME_STEP = dict(autoreset_mode=AutoresetMode.SAME_STEP)


class UserError(Exception):
    """A mistake that the user can mend; one line."""

    def __init__(self, text):
        super().__init__(" ".join(text.split()))


# --------------------------------------------------------------------------------- command line


def flags(settings):
    """Settings (name -> value) as words of a command line; None and what is off need none."""
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        if value is not None and value is not False:
            words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


@contextmanager
def reading(folder):
    """What goes wrong inside becomes a UserError: the folder is not that of such a run."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as e:  # a damaged file can raise anything, tyro exits
        script = Path(sys.argv[0]).name
        raise UserError(f"{folder}: damaged, or not a run of {script}: {repr(e)[:200]}") from None


def read_args(args_type, folder):
    """The settings of the run in a folder, as args_type. Raises UserError."""
    with reading(folder), redirect_stderr(io.StringIO()):
        saved = json.loads((Path(folder) / "config.json").read_text())["args"]
        args = tyro.cli(args_type, args=flags(saved), **TYRO)
        if json.loads(json.dumps(vars(args), default=str)) != saved:
            raise ValueError(f"args in config.json, {saved}")
    args.resume, args.evaluate, args.video = None, None, False
    return args


def parse_args(args_type, doc, settings):
    """Command line -> args_type. Raises UserError.

    What is not given is as in the run of --resume or --evaluate, or as in the settings of --env.
    """
    doc += "\nDefaults by environment (a flag that is given beats them):\n"
    *_, last = settings.values()
    for env, row in {**settings, "any other": {k: vars(args_type())[k] for k in last}}.items():
        indent = dict(initial_indent="\n    ", subsequent_indent=" " * 33, break_on_hyphens=False)
        doc += textwrap.fill(f"{env:29}" + " ".join(flags(row)), 95, **indent)
    box = io.StringIO()
    try:
        with redirect_stderr(box):  # twice: the first says what the others default to
            args, _ = tyro.cli(args_type, return_unknown_args=True, add_help=False, **TYRO)
            row = next((row for env, row in settings.items() if args.env.startswith(env)), {})
            folder = args.resume or args.evaluate
            default = read_args(args_type, folder) if folder else args_type(env=args.env, **row)
            args = tyro.cli(args_type, default=default, description=doc, **TYRO)
    except SystemExit as e:
        if not e.code:
            raise
        text = " ".join(re.sub("[─│╭╮╰╯]|--{9,}", " ", box.getvalue().partition("\n")[2]).split())
        text = re.split(" Argument helptext| For full helptext", text)[0]
        text = re.sub(r"(Perhaps you meant: --\S+).*", r"\1", text)
        raise UserError(f"{text} (--help lists all flags)") from None
    if args.resume and args.evaluate or args.video and not args.evaluate:
        raise UserError("--video goes with --evaluate, --evaluate does not go with --resume")
    mode = "resume" if args.resume else "evaluate"
    limits = dict(discount=(1e-9, 1), tau=(1e-9, 1), seed=(0, 2**31 - 1), task=(-99, 99))
    limits.update(policy_width=(0, 1e6), target_entropy=(-1e6, 1e6))
    limits.update(dict.fromkeys("hidden batch_size time_dim num_envs".split(), (1, 1e6)))
    for name, value in vars(args).items():
        said = " ".join(flags({name: value})) or f"no {name}"
        low, high = limits.get(name, (1e-12, 1e12))
        numbers = [x for x in np.ravel(value) if type(value) in (int, float, tuple)]
        if value == () or not all(low <= x <= high for x in numbers):
            raise UserError(f"{said}: must be from {low:g} to {high:g}")
        if folder and value != getattr(default, name) and name not in [mode, *MAY_CHANGE[mode]]:
            kept = " ".join(flags({k: v for k, v in vars(default).items() if k == name}))
            raise UserError(f"{said}: {folder} was started with {kept or 'no such flag'}")
    return args


def cli(main):
    """Run main(); a user's mistake becomes one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
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
    name = name if name != "auto" else "cuda" if count else "cpu"
    if name not in ["cpu", *["cuda"][:count], *(f"cuda:{i}" for i in range(count))]:
        raise UserError(f"--device {name}: must be cpu or one of the {count} CUDA devices found")
    compilers = os.environ.get("CXX", "g++"), "g++", "clang++"
    if compile and name == "cpu" and not any(map(shutil.which, compilers)):
        raise UserError("--compile: no C++ compiler found (g++, clang++ or $CXX)")
    return torch.device(name)


# --------------------------------------------------------------------------------- environments


def task_names():
    """Every name of an OGBench task on states -> name of its dataset, environment id."""
    names = {}
    for env_id in gymnasium.registry:
        base, found, task = env_id.removesuffix("-v0").partition("-singletask")
        kinds = ["navigate", "stitch"] if re.search("maze|soccer", base) else ["play", "noisy"]
        kinds += ["explore"] if re.fullmatch("antmaze-(medium|large|teleport)", base) else []
        for kind in kinds if found and not base.startswith("visual") else ():
            names[f"{base}-{kind}-singletask{task}-v0"] = f"{base}-{kind}-v0", env_id
    return names


def check_name(said, name, known):
    """Raises UserError with the closest of the known names, if name is none of them."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0)
        raise UserError(f"{said}: no such environment; closest: {', '.join(close)}")


def resolve_task(env, task=0):
    """--env and --task (0: the default one) -> name, dataset, environment id. Raises UserError.

    NAME-v0, NAME-singletask-v0 and NAME-singletask-taskN-v0 are the same but for the task.
    """
    stem, _, named = env.removesuffix("-v0").partition("-singletask")
    name = f"{stem}-singletask{named or (task and f'-task{task}') or ''}-v0"
    known = task_names()
    check_name(f"--env {env} --task {task}" if task else f"--env {env}", name, known)
    if task and named not in ("", f"-task{task}"):
        raise UserError(f"--task {task}: --env {env} already names a task")
    return name, *known[name]


def continuous_env(env_id):
    """Gymnasium id -> function that makes it, with actions in [-1, 1]. Raises UserError."""
    check_name(env_id, env_id, [name for name in gymnasium.registry if "/" not in name])
    make = lambda **options: gymnasium.make(env_id, **options)
    try:
        with make() as env:
            for space in env.observation_space, env.action_space:
                if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
                    raise ValueError(f"{space} is not a vector (Box)")
            if not env.action_space.is_bounded():
                raise ValueError(f"actions {env.action_space} are not bounded")
    except Exception as e:  # also a package that is missing, a version that is too old
        raise UserError(f"--env {env_id}: cannot be used: {e}") from None
    return lambda **options: gymnasium.wrappers.RescaleAction(make(**options), -1.0, 1.0)


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
        return self.env.reset(seed=number, options=options)[0], {}

    def step(self, action):
        *result, info = self.env.step(action)
        return *result, {k: info[k] for k in ("success",) if k in info}


def quiet(on_term):
    """In a worker process: signals are for the main process, which ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_term)


def make_envs(env, num_envs):
    """`num_envs` copies of a Gymnasium id, or of what a function makes, a process each."""

    def start():
        if multiprocessing.parent_process():
            quiet(signal.SIG_IGN)
        return SeededReset(env() if callable(env) else gymnasium.make(env))

    envs = AsyncVectorEnv([start] * num_envs, **SAME_STEP)
    envs.close = lambda **_: [p.kill() for p in envs.processes]  # its own may wait for ever
    return envs


def report(evaluate, policy, env, args):
    """Print what a policy achieves, with 95 % intervals; --video: film three episodes.

    evaluate, policy: as in the method files; env: as for make_envs.
    """
    n, z, play = args.eval_episodes, 1.96, (getattr(args, "horizon", 1), args.seed)
    make = env if callable(env) else lambda **options: gymnasium.make(env, **options)
    with closing(make_envs(make, min(n, 25))) as envs:
        results = evaluate(policy, envs, n, *play)
    for name, x in results.items():
        middle, half = x.mean(), z * x.std(ddof=1) / n**0.5 if n > 1 else np.nan
        if name == "success":  # Wilson's interval: at 100 % the other has no width
            half = z / (1 + z**2 / n) * (x.var() / n + z**2 / n**2 / 4) ** 0.5
            middle = (middle + z**2 / n / 2) / (1 + z**2 / n)
        if not np.isnan(middle):
            print(f"{name} {x.mean():.4g} (95 %: {middle - half:.4g} to {middle + half:.4g})")
    if args.video:
        pictures, calls, every = [], itertools.count(), max(8 // play[0], 1)

        def filmed(obs):
            if next(calls) % every == 0:
                pictures.append(film.render())
            return policy(obs)

        try:
            film = make(render_mode="rgb_array")
            with closing(SyncVectorEnv([lambda: SeededReset(film)], **SAME_STEP)) as envs:
                evaluate(filmed, envs, 3, *play)
            path = args.evaluate / "evaluation.gif"
            write(path, lambda file: imageio.mimsave(file, pictures, "GIF", loop=0))
            print(f"three episodes, a picture every {every * play[0]} steps: {path}")
        except Exception as e:  # whatever a missing library raises
            print(f"--video: cannot render, which needs EGL or OSMesa: {e!r}", file=sys.stderr)


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
        for name, array in {k: v for k, v in locals().items() if isinstance(v, np.ndarray)}.items():
            size = actions.shape[1:2] if name == "actions" else obs_dim[:1] if "obs" in name else ()
            if array.shape != (n, *size) or n == 0:
                raise ValueError(f"{name} has shape {array.shape}, expected {(n, *size)}")
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


def load_dataset(path, env_id, device):
    """A file in OGBench's layout -> Dataset with the environment's rewards, and source or None.

    Raises UserError, which names the file and what is wrong with it.
    """
    with gymnasium.make(env_id) as env:
        sizes = env.observation_space.shape + env.action_space.shape
        try:
            with zipfile.ZipFile(path) as file:  # all checksums, before anything is used
                if broken := file.testzip():
                    raise ValueError(f"{broken} is damaged")
            with np.load(path) as file:
                source = str(file["source"]) if "source" in file else None
                if missing := {"observations", "actions", "terminals", "qpos"} - set(file):
                    raise ValueError(f"has no {', '.join(missing)}")
            data = ogbench.load_dataset(path, add_info=True)
            for name, array in data.items():
                if len(array) != len(data["observations"]):
                    raise ValueError(f"{name} has the wrong length, or the last terminal is not 1")
                if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
                    raise ValueError(f"{name} has NaN, infinity, or no real numbers")
            relabel_dataset(env_id, env, data)
            found = data["observations"].shape[1:] + data["actions"].shape[1:]
            if found != sizes:
                raise ValueError(f"observation, action sizes {found}, the environment has {sizes}")
            data["actions"] = np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5)  # as the authors do
            names = "observations actions next_observations rewards masks terminals".split()
            return Dataset(*(data[name] for name in names), device=device), source
        except Exception as e:  # a damaged zip can raise anything; all of it means the same
            cause = getattr(e, "strerror", None) or str(e) or repr(e)
            cause = "arrays differ in length" if isinstance(e, IndexError) else cause
            raise UserError(f"{path}: not a usable dataset: {cause}") from None


def get_dataset(name, env_id, path, url, device, horizon=1):
    """The dataset `name` with rewards for env_id, and where it is from. Raises UserError.

    In this order: the file `path`; the official one in ~/.ogbench/data; for pointmaze-*-navigate
    one collected here; a download from `url`, a folder or file, by default OGBench's.
    """
    note, target = "given by --dataset", path
    if not path:
        note, target = "official file", Path(f"~/.ogbench/data/{name}.npz").expanduser()
        collect = not (url or os.path.exists(target)) and re.match("pointmaze-.*-nav", name)
        target = target.parents[1] / "collected" / target.name if collect else target
        url = (url or ogbench.utils.DATASET_URL).removesuffix("/")
        if not os.path.exists(target):
            with writing(target.parent), FileLock(target.with_name(f".{target.name}.lock")):
                if not target.exists() and collect:  # which another run may just have done
                    collect_pointmaze(name, target)
                elif not target.exists():
                    download(url if url.endswith(".npz") else f"{url}/{target.name}", target)
    dataset, source = load_dataset(target, env_id, device)
    if horizon > len(dataset):
        raise UserError(f"--horizon {horizon}: {target} has only {len(dataset)} transitions")
    return dataset, f"{str(target).replace(str(Path.home()), '~')} ({source or note})"


def download(url, path):
    """Fetch url into path; goes on where it was interrupted. Raises UserError.

    It gives up after three attempts in a row, or 15 seconds, that bring nothing new.
    """
    part, most, failures, whole = path.with_name(f"{path.name}.part"), -1, 0, False
    while failures < 3:
        have = part.stat().st_size if part.exists() else 0
        if have > most:
            most, last = have, time.perf_counter()
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(3, 8)) as response:
                if response.status_code != 416:  # 416: nothing is lacking
                    failures += 3 * (400 <= response.status_code < 500)
                    response.raise_for_status()
                    have *= response.status_code == 206  # 200: the host ignores ranges
                    total = have + int(response.headers.get("Content-Length", 0))
                    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=path.name)
                    with open(part, "ab" if have else "wb") as file, bar:
                        for block in response.iter_content(2**18):
                            bar.update(file.write(block))
            with suppress(Exception), zipfile.ZipFile(part) as file:  # damage can raise anything
                whole = not file.testzip()
            if whole:
                return part.rename(path)
            cause, failures = "what came is not an npz file", failures + 2  # start once more
            part.unlink(missing_ok=True)
        except (requests.RequestException, ValueError) as e:
            cause, failures = e, failures + 1
        news = part.exists() and part.stat().st_size > most
        failures = 0 if news else failures if time.perf_counter() < last + 15 else 3
        time.sleep(1)
    how = f"put {path.name} into {path.parent} by hand, or name a file with --dataset"
    raise UserError(f"{url}: download failed ({cause}); {how}, or a mirror with --dataset-url")


@contextmanager
def writing(place, hint=""):
    """Makes the folder; what goes wrong on the disk inside becomes a UserError with its name."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as e:
        # torch.save makes a RuntimeError of anything
        cause = e.__context__ if isinstance(e, RuntimeError) and e.__context__ else e
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise UserError(f"{place}: cannot write there: {cause}{hint}") from None


def write(path, fill):
    """fill(file) under a temporary name, then rename: nobody ever sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def collect_pointmaze(name, path, episodes=300, workers=None, seed=0):
    """Write a pointmaze-*-navigate dataset to `path`, the same one for any number of workers."""
    steps = 2001 if "giant" in name else 1001
    jobs = [(name.replace("-navigate", ""), steps, [seed, i]) for i in range(episodes)]
    with multiprocessing.Pool(workers, quiet, (signal.SIG_DFL,)) as pool:
        results = pool.imap(collect_episode, jobs)
        parts = list(tqdm(results, f"collecting {name}", episodes, unit=" episodes"))
    data = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
    source = f"collected by OGBench's protocol, {episodes} episodes, seed {seed}; not official"
    write(path, lambda file: np.savez_compressed(file, source=source, **data))


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
    words = "describe --always --abbrev=40 --dirty=+ --exclude *".split()
    run = lambda *git: subprocess.run([*git, *words], capture_output=True, text=True).stdout
    return shutil.which("git") and run("git", "-C", Path(__file__).parent).strip() or None


def read_checkpoint(folder):
    """The checkpoint in a run's folder: step, nets and more, on the CPU. Raises UserError."""
    with reading(folder):
        return torch.load(Path(folder) / "checkpoint.pt", map_location="cpu", weights_only=True)


class Run:
    """A run's folder: config.json, CSV files, curve.png, checkpoint.pt. Raises UserError.

    It is root/name__time, or that of the run to `resume`. A with statement closes its files.
    """

    def __init__(self, root, name, config, resume=None):
        self.path = Path(resume or Path(root) / f"{name}__{time.strftime('%Y%m%d-%H%M%S')}")
        self.files, self.bars, self.state, self.warned = {}, [], {}, False
        self.saved_at = time.perf_counter()
        packages = "torch", "numpy", "gymnasium", "ogbench", "mujoco"
        versions = {package: importlib.metadata.version(package) for package in packages}
        versions["python"] = sys.version.split()[0]
        extra = dict(versions=versions, threads=torch.get_num_threads(), commit=commit())
        config = json.loads(json.dumps({**config, **extra}, default=str))
        with writing(self.path.parent):
            if not resume:
                self.path.mkdir()
            self.lock = FileLock(self.path / ".lock", blocking=False)
            self.lock.acquire()  # before anything is read: somebody may be writing it
        with reading(self.path):
            old = json.loads((self.path / "config.json").read_text()) if resume else config
            self.state = read_checkpoint(self.path) if resume else {"step": 0}
            for name in ("device", "dataset", "threads", "versions"):
                if (was := old.get(name)) != (now := config.get(name)):
                    what = f"--resume {self.path}: {name} was {was}, is {now}"
                    if name in ("device", "dataset"):
                        raise UserError(what)
                    print(f"warning: {what}: not the same bit for bit", file=sys.stderr)
            for name in {"offline_steps", "online_steps"} & set(config.get("args", ())):
                end = config["args"][name] + config["args"].get("num_envs", 1)
                if end <= (step := self.state["step"]):
                    raise UserError(f"--resume {self.path}: is at step {step} already")
        with writing(self.path):
            text = json.dumps(config, indent=2) + "\n"
            write(self.path / "config.json", lambda file: file.write(text.encode()))

    @property
    def hint(self):
        """How to go on, if that is possible."""
        return f"; go on with --resume {self.path}" * (self.path / "checkpoint.pt").exists()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        for file in (*self.files.values(), *self.bars):
            with suppress(OSError):  # a row that did not fit on the disk
                file.close()
        self.lock.release()
        if kind is KeyboardInterrupt:
            print(f"stopped{self.hint}", file=sys.stderr)

    def restore(self, parts):
        """Put the states of the checkpoint into parts (name -> what has a state), if there is one.

        Returns what else the checkpoint has: step, 0 in a new run. Drops rows logged after it.
        """
        with reading(self.path):
            for name, part in parts.items() if self.state["step"] else ():
                load = getattr(part, "load_state_dict", None) or part.set_state
                load(self.state.pop(name))
            for path in self.path.glob("[te][rv]a*.csv"):  # train.csv, eval.csv
                header, *rows = path.read_text().splitlines(keepends=True)
                whole = [row for row in rows if row.endswith("\n")]
                rows = [row for row in whole if int(row.split(",")[0]) <= self.state["step"]]
                text = "".join([header, *rows]).encode()
                write(path, lambda file, text=text: file.write(text))
                self.read(path.name)
        return self.state

    def save(self, parts, **values):
        """Replace checkpoint.pt by the states of parts and by values, `step` among them."""
        for name, tensor in parts["nets"].state_dict().items():
            if not tensor.isfinite().all():
                raise UserError(f"step {values['step']}: {name} has NaN or infinity{DIVERGED}")
        for name, part in parts.items():
            values[name] = getattr(part, "state_dict", None) or part.get_state
            values[name] = values[name]()
        with writing(self.path, self.hint):
            for file in self.files.values():
                os.fsync(file.fileno())
            write(self.path / "checkpoint.pt", lambda file: torch.save(values, file))
        self.saved_at = time.perf_counter()

    def log(self, name, **row):
        """Append a row to a CSV file, whose columns are the first row's. Losses must be finite."""
        with writing(self.path, self.hint):
            if not (self.path / name).exists():  # a file without its header could not be continued
                write(self.path / name, lambda file: file.write((",".join(row) + "\n").encode()))
            if name not in self.files:
                self.files[name] = open(self.path / name, "a")
            self.files[name].write(",".join(map(str, row.values())) + "\n")
            self.files[name].flush()
        for key, value in row.items():
            if key.endswith("_loss") and not np.isfinite(value):
                raise UserError(f"step {row['step']}: {key} is {value}{DIVERGED}")

    def progress(self, total, initial, unit):
        """The progress bar of a training that begins at `initial`."""
        bar = dict(unit=f" {unit}", dynamic_ncols=True, mininterval=1)
        self.bars.append(tqdm(total=total, initial=initial, **bar))
        return self.bars[-1]

    def check_q(self, step, q_min, q_max, bounds):
        """Warn, once, when Q is outside its possible range by more than a tenth of that range."""
        low, high = bounds
        slack = 0.1 * (high - low)
        if not self.warned and not low - slack <= q_min <= q_max <= high + slack:
            self.warned = True
            text = f"Q in [{q_min:.4g}, {q_max:.4g}], the rewards allow [{low:.4g}, {high:.4g}]"
            tqdm.write(f"warning: update {step}: {text}", file=sys.stderr)

    def read(self, name):
        """The columns of a CSV file: name -> array."""
        header, *rows = (self.path / name).read_text().splitlines()
        columns = np.array([row.split(",") for row in rows], float).T
        return dict(zip(header.split(","), columns))

    def finish(self):
        """Print the score: the means of the last three evaluations."""
        with reading(self.path):
            rows = {k: v[-3:] for k, v in self.read("eval.csv").items()}
        means = {k: rows[k].mean() for k in ("success", "return", "length")}
        text = ", ".join(f"{k} {v:.4g}" for k, v in means.items() if not np.isnan(v))
        print(f"mean of the last {len(rows['step'])} evaluations: {text}")

    def plot(self, unit="updates"):
        """Draw curve.png from the CSV files, over their column `step`, which counts `unit`."""
        from matplotlib.figure import Figure  # here, since it takes a second

        figure = Figure(figsize=(13, 3.5), layout="constrained")
        figure.suptitle(self.path.name)
        left, middle, right = figure.subplots(1, 3)
        rows = self.read("eval.csv")
        known = not np.isnan(rows["success"]).all()
        left.plot(rows["step"], 100 * rows["success"] if known else rows["return"], "o-")
        left.set(title="evaluation", ylabel="success (%)" if known else "return")
        left.set_ylim((-3, 103) if known else None)
        if (self.path / "train.csv").exists():
            rows = self.read("train.csv")
            for name in (name for name in rows if name.endswith("_loss")):
                middle.plot(rows["step"], rows[name], linewidth=1, label=name.removesuffix("_loss"))
            right.plot(rows["step"], rows["q_mean"], linewidth=1, label="mean")
            right.fill_between(rows["step"], rows["q_min"], rows["q_max"], alpha=0.2, label="range")
            middle.legend(), right.legend()
        middle.set(title="losses")
        middle.set_yscale("symlog", linthresh=1e-2)  # a policy's loss can be negative
        right.set(title="Q in a batch")
        for axes in (left, middle, right):
            axes.set_xlabel(unit)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
            axes.grid(alpha=0.3)
        with writing(self.path, self.hint):
            figure.savefig(self.path / "curve.png")
