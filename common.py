"""Data onto the device, results onto disk and screen; nothing here is about a method."""

import ctypes.util
import difflib
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
from contextlib import AbstractContextManager, closing, contextmanager, redirect_stderr, suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

if "--video" in sys.argv and (found := [*filter(ctypes.util.find_library, ("EGL", "OSMesa"))]):
    os.environ.setdefault("MUJOCO_GL", found[0].lower())  # which MuJoCo reads when it is imported

import gymnasium
import imageio
import numpy as np
import ogbench.online_locomotion  # registers online-ant-v0 and relatives
import requests
import torch
import tyro
from filelock import FileLock, Timeout
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from tqdm import tqdm

warnings.filterwarnings("ignore", module="glfw|gymnasium")  # no display, spaces, old versions

TYRO = dict(config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone))


class UserError(Exception):
    """A mistake that the user can mend, in one line."""


@contextmanager
def blame(text, kinds=(Exception, SystemExit)):
    """What goes wrong inside (any of these kinds) becomes a UserError that begins with `text`."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except kinds as e:  # a damaged file can raise anything, tyro exits
        cause = str(e) if isinstance(e, OSError | ValueError) else repr(e)
        raise UserError(f"{text}: {cause[:200]}") from None


def flags(settings):
    """Settings (name -> value) as words of a command line; None and what is off need none."""
    words = []
    for name, value in settings.items():
        values = value if isinstance(value, list | tuple) else [] if value is True else [value]
        if value is not None and value is not False:
            words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


# For a with statement: what goes wrong with a run's folder, or on a disk, is the user's to mend.
reading = lambda folder: blame(f"{folder}: damaged, or not a run of {Path(sys.argv[0]).name}")
writing = lambda folder: blame(f"{folder}: cannot write there", OSError)


def read_run(args_type, folder):
    """A run's settings as args_type, and its checkpoint: step, nets and more. Raises UserError."""
    with reading(folder), redirect_stderr(io.StringIO()):
        state = torch.load(Path(folder) / "checkpoint.pt", "cpu", weights_only=True)
        saved = state["config"]["args"] | dict(resume=None, evaluate=None, video=False)
        return tyro.cli(args_type, args=flags(saved), **TYRO), state


def parse_args(args_type, doc, settings):
    """Command line -> args_type. Raises UserError.

    What is not given is as in the run of --resume or --evaluate, or as in the settings of --env.
    """
    doc += "\nDefaults by environment (flags beat them; --env NAME --help shows all of them):\n"
    for env, row in settings.items():
        indent = dict(initial_indent="\n    ", subsequent_indent=" " * 33, break_on_hyphens=False)
        doc += textwrap.fill(f"{env:29}" + " ".join(flags(row)), 95, **indent)
    box = io.StringIO()
    try:
        with redirect_stderr(box):  # twice: the first says what the others default to
            args, _ = tyro.cli(args_type, return_unknown_args=True, add_help=False, **TYRO)
            row = next((row for env, row in settings.items() if args.env.startswith(env)), {})
            folder = args.resume or args.evaluate
            default = read_run(args_type, folder)[0] if folder else args_type(env=args.env, **row)
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
    free = "resume offline_steps online_steps eval_interval eval_episodes log_interval compile"
    free = free if args.resume else "evaluate eval_episodes seed device video"
    limits = dict(discount=(1e-9, 1), tau=(1e-9, 1), seed=(0, 2**31 - 1), task=(-99, 99))
    limits.update(policy_width=(0, 1e6), target_entropy=(-1e6, 1e6))
    for name, value in vars(args).items():
        said = " ".join(flags({name: value})) or f"no {name}"
        low, high = limits.get(name, (1 if type(value) in (int, tuple) else 1e-12, 1e9))
        numbers = [x for x in np.ravel(value) if type(value) in (int, float, tuple)]
        if value == () or not all(low <= x <= high for x in numbers):
            raise UserError(f"{said}: must be from {low:g} to {high:g}")
        if folder and value != getattr(default, name) and name not in free.split():
            kept = " ".join(flags({name: getattr(default, name)})) or "no such flag"
            raise UserError(f"{said}: {folder} was started with {kept}")
    return args


def cli(main):
    """Run main(); a user's mistake becomes one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main()
    except (UserError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "o allocate" not in str(e):  # torch: "tried to allocate"
            raise
        text = str(e) or "out of memory"
        print(f"{Path(sys.argv[0]).name}: error:", *text.split(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def pick_device(name, matmul_precision, compile=False):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> torch.device, with torch set up. Raises UserError.

    matmul_precision is torch's, or "auto": TF32 on CUDA, fast float32 on a CPU. There torch takes
    oneDNN's products, up to twice as fast as MKL's, for "medium" only. They are float32 where the
    CPU has no units for bfloat16: the product of two matrices shows it.
    """
    count = torch.cuda.device_count()
    name = name if name != "auto" else "cuda" if count else "cpu"
    if name not in ["cpu", *["cuda"][:count], *(f"cuda:{i}" for i in range(count))]:
        raise UserError(f"--device {name}: must be cpu or one of the {count} CUDA devices found")
    compilers = ("g++", "clang++", "$CXX") if name == "cpu" else ("gcc", "clang", "$CC")
    if compile and not any(shutil.which(os.path.expandvars(x)) for x in compilers):
        raise UserError(f"--compile: no compiler found ({', '.join(compilers)})")
    device = torch.device(name)
    if device.index:  # streams and graphs are made on the current device
        torch.cuda.set_device(device)
    auto = "high" if device.type == "cuda" else "medium"
    torch.set_float32_matmul_precision(auto if matmul_precision == "auto" else matmul_precision)
    if matmul_precision == "auto" and device.type == "cpu":
        x, y = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
        exact = x.double() @ y.double()
        if (x @ y - exact).norm() > 1e-5 * exact.norm():
            torch.set_float32_matmul_precision("highest")
    with suppress(Exception):  # glibc only: keep what tensors free, which the next update needs
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, libc = -1, -3, ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30), libc.mallopt(M_MMAP_THRESHOLD, 2**30)
    return device


def resolve_task(env, task=0):
    """--env and --task (0: the default one) -> name, dataset, environment id. Raises UserError.

    NAME-v0, NAME-singletask-v0 and NAME-singletask-taskN-v0 are the same but for the task.
    """
    known = {}  # every task of OGBench on states
    for env_id in gymnasium.registry:
        base, found, number = env_id.removesuffix("-v0").partition("-singletask")
        kinds = ["navigate", "stitch"] if re.search("maze|soccer", base) else ["play", "noisy"]
        kinds += ["explore"] if re.fullmatch("antmaze-(medium|large|teleport)", base) else []
        for kind in kinds if found and not base.startswith("visual") else ():
            known[f"{base}-{kind}-singletask{number}-v0"] = f"{base}-{kind}-v0", env_id
    stem, _, named = env.removesuffix("-v0").partition("-singletask")
    name = f"{stem}-singletask{named or (task and f'-task{task}') or ''}-v0"
    said = f"--env {env} --task {task}" if task else f"--env {env}"
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0)
        raise UserError(f"{said}: no such environment; closest: {', '.join(close)}")
    if task and named not in ("", f"-task{task}"):
        raise UserError(f"{said}: that name has a task already")
    return name, *known[name]


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

    envs = AsyncVectorEnv([start] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    envs.close = lambda **_: [p.kill() for p in envs.processes]  # its own may wait for ever
    return envs


def report(evaluate, policy, env, args):
    """Print what a policy achieves, with 95 % intervals; --video: film three episodes.

    evaluate, policy: as in the method files; env: as for make_envs.
    """
    n, z, play = args.eval_episodes, 1.96, (getattr(args, "horizon", 1), args.seed)
    with closing(make_envs(env, min(n, 25))) as envs:
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
        make = env if callable(env) else lambda **options: gymnasium.make(env, **options)
        start = lambda: SeededReset(make(render_mode="rgb_array"))

        def filmed(obs):
            if next(calls) % every == 0:
                pictures.extend(envs.render())
            return policy(obs)

        try:
            with closing(SyncVectorEnv([start], autoreset_mode=AutoresetMode.SAME_STEP)) as envs:
                evaluate(filmed, envs, 3, *play)
        except Exception as e:  # whatever a missing library raises
            return print(f"--video: cannot render, needs EGL or OSMesa: {e!r}", file=sys.stderr)
        path = args.evaluate / "evaluation.gif"
        write(path, imageio.mimsave("<bytes>", pictures, "GIF", loop=0))
        print(f"three episodes, a picture every {every * play[0]} steps: {path}")


class Batch(NamedTuple):
    """Transitions, or chunks of h consecutive actions: float32 tensors on the dataset's device."""

    observations: torch.Tensor  # (B, O) where the chunk starts
    actions: torch.Tensor  # (B, h * A)
    rewards: torch.Tensor  # (B,) discounted sum over the valid steps
    masks: torch.Tensor  # (B,) 0 if the task was solved at any valid step: no bootstrap
    next_observations: torch.Tensor  # (B, O) after the last valid step
    valid: torch.Tensor  # (B, h) 0 for steps after the episode's end


class Dataset:
    """Episodes one after the other, each with a row more than it has steps (OGBench: compact).

    NumPy arrays: observations (M, O); actions (M, A) in [-1, 1]; rewards (M,); masks (M,), 0 where
    s is terminal and its value therefore r alone; valids (M,), 0 in the last row of an episode,
    which is only there for its observation. Others are checked and dropped. Raises ValueError.
    """

    def __init__(self, observations, actions, rewards, masks, valids, device="cpu", **others):
        kept = dict(observations=observations, actions=actions, rewards=rewards, masks=masks)
        kept["valids"] = valids
        for name, x in (others | kept).items():
            if len(x) != len(valids):
                raise ValueError(f"{name} has the wrong length")
            if x.dtype.kind not in "biuf" or not np.isfinite(x).all():
                raise ValueError(f"{name} has NaN, infinity, or no real numbers")
        if not np.any(valids) or valids[-1] or np.abs(actions).max() > 1:
            raise ValueError("no transitions, no end in the last row, or actions beyond [-1, 1]")
        kept = [torch.as_tensor(np.asarray(x, np.float32), device=device) for x in kept.values()]
        self.observations, self.actions, self.rewards, self.masks, self.valids = kept
        rows = np.flatnonzero(valids)  # (N,) of the transitions
        self.rows = torch.as_tensor(rows, device=device)
        self.count = torch.tensor(len(rows), dtype=torch.float64, device=device)
        self.episodes = len(valids) - len(rows)

    def __len__(self):
        return len(self.rows)

    def chunks(self, starts, horizon, discount):
        """Batch of the chunks that start at transitions (B,), none later than N - horizon."""
        steps = self.rows[starts[:, None] + torch.arange(horizon, device=starts.device)]
        ended = 1 - self.valids[steps + 1]
        valid = (ended.cumsum(1) - ended == 0).float()
        powers = discount ** torch.arange(horizon, device=starts.device)
        last = steps.gather(1, valid.sum(1, keepdim=True).long() - 1).squeeze(1)
        return Batch(
            observations=self.observations[steps[:, 0]],
            actions=self.actions[steps].flatten(1),
            rewards=(powers * self.rewards[steps] * valid).sum(1),
            masks=torch.where(valid > 0, self.masks[steps], 1.0).prod(1),
            next_observations=self.observations[last + 1],
            valid=valid,
        )

    def sample(self, batch_size, horizon=1, discount=1.0, generator=None):
        """Batch of chunks with uniformly drawn starts; never waits for the device."""
        device = self.actions.device
        u = torch.rand(batch_size, dtype=torch.float64, device=device, generator=generator)
        starts = (u * (self.count - horizon + 1)).long()
        return self.chunks(starts, horizon, discount)


def load_dataset(path, env_id, device):
    """A file in OGBench's layout -> Dataset with the environment's rewards, and source or None.

    Raises UserError, which names the file and what is wrong with it.
    """
    with gymnasium.make(env_id) as env, blame(f"{path}: not a usable dataset"):
        with zipfile.ZipFile(path) as zipped, np.load(path) as file:
            if broken := zipped.testzip():  # all checksums, before anything is used
                raise ValueError(f"{broken} is damaged")
            if missing := {"observations", "actions", "terminals", "qpos"} - set(file):
                raise ValueError(f"has no {', '.join(missing)}")
            source = str(file["source"]) if "source" in file else None
        data = ogbench.load_dataset(path, compact_dataset=True, add_info=True)
        ogbench.relabel_utils.relabel_dataset(env_id, env, data)
        found = data["observations"].shape[1:] + data["actions"].shape[1:]
        if found != (sizes := env.observation_space.shape + env.action_space.shape):
            raise ValueError(f"observation, action sizes {found}, the environment has {sizes}")
        data["actions"] = np.clip(data["actions"], -1 + 1e-5, 1 - 1e-5)  # as the authors do
        return Dataset(**data, device=device), source


def get_dataset(name, env_id, path, url, device, horizon=1):
    """The dataset `name` with rewards for env_id, and where it is from. Raises UserError.

    In this order: the file `path`; the official one in ~/.ogbench/data; for pointmaze-*-navigate
    one collected here; a download from `url`, a folder or file, by default OGBench's.
    """
    note = "given by --dataset"
    if not path:
        note, path = "official file", Path(f"~/.ogbench/data/{name}.npz").expanduser()
        collect = not (url or os.path.exists(path)) and re.match("pointmaze-.*-nav", name)
        path = path.parents[1] / "collected" / path.name if collect else path
        if not os.path.exists(path):
            with writing(path.parent), FileLock(path.with_name(f".{path.name}.lock")):  # and mkdir
                if not path.exists():  # else another run has just made it
                    collect_pointmaze(name, path) if collect else download(url, path)
    dataset, source = load_dataset(path, env_id, device)
    if horizon > len(dataset):
        raise UserError(f"--horizon {horizon}: {path} has only {len(dataset)} transitions")
    return dataset, f"{str(path).replace(str(Path.home()), '~')} ({source or note})"


def download(url, path):
    """Fetch a file, or path.name from a folder; "" is OGBench's. Raises UserError.

    Four attempts, each of which goes on where the last one was interrupted.
    """
    url = (url or ogbench.utils.DATASET_URL).removesuffix("/")
    url = url if url.endswith(".npz") else f"{url}/{path.name}"
    part = path.with_name(f"{path.name}.part")
    for _ in range(4):
        have = part.stat().st_size if part.exists() else 0
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(3, 6)) as response:
                if response.status_code != 416:  # 416: nothing is lacking
                    response.raise_for_status()
                    have *= response.status_code == 206  # 200: the host ignores ranges
                    total = have + int(response.headers.get("Content-Length", 0))
                    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=path.name)
                    with open(part, "ab" if have else "wb") as file, bar:
                        for block in response.iter_content(2**18):
                            bar.update(file.write(block))
            cause = "what came is not an npz file"
            with suppress(Exception), zipfile.ZipFile(part) as file:  # damage can raise anything
                cause = file.testzip() and cause
            if not cause:
                return part.rename(path)
            part.unlink(missing_ok=True)
            if not have:  # else it may be due to an older part: from the start once more
                break
        except (requests.RequestException, ValueError) as e:
            cause = e
        time.sleep(1)
    how = f"put {path.name} into {path.parent} by hand, or name a file with --dataset"
    raise UserError(f"{url}: download failed ({cause}); {how}, or a mirror with --dataset-url")


def write(path, data):
    """Bytes under a temporary name, then rename: nobody ever sees half a file. Raises UserError."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path.parent):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
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
    np.savez_compressed(file := io.BytesIO(), source=source, **data)
    write(path, file.getbuffer())


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
        task_info = dict(init_ij=pick(free), goal_ij=pick(goals))
        obs, _ = env.reset(seed=number, options=dict(task_info=task_info))
        rows = []
        for _ in range(steps):
            direction = maze.get_oracle_subgoal(maze.get_xy(), maze.cur_goal_xy)[0] - maze.get_xy()
            direction /= np.linalg.norm(direction) + 1e-6
            action = np.clip(direction + rng.normal(0, 0.5, 2), -1, 1)
            next_obs, _, _, done, info = env.step(action)
            rows.append((obs, action, info["prev_qpos"], info["prev_qvel"], done))
            obs = next_obs
            if info["success"]:
                maze.set_goal(pick(goals))
    names = "observations", "actions", "qpos", "qvel", "terminals"
    return {k: np.array(column, np.float32) for k, column in zip(names, zip(*rows))}


class Run(AbstractContextManager):
    """A run's folder: config.json, CSV files, curve.png, checkpoint.pt. Raises UserError.

    It is root/name__time, or that of the run to `resume`. Leave it by a with statement.
    """

    def __init__(self, root, name, config, resume=None):
        self.path = Path(resume or Path(root) / f"{name}__{time.strftime('%Y%m%d-%H%M%S')}")
        self.rows, self.bar, self.warned, self.saved_at = {}, None, False, time.perf_counter()
        self.lock = FileLock(self.path / ".lock", blocking=False)
        git = "git describe --always --abbrev=40 --dirty=+ --exclude *".split()
        options = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = shutil.which("git") and subprocess.run(git, **options).stdout.strip() or None
        extra = dict(commit=commit, threads=torch.get_num_threads())
        extra["matmul_precision"] = torch.get_float32_matmul_precision()
        extra["versions"] = {p: version(p) for p in "torch numpy gymnasium ogbench mujoco".split()}
        extra["versions"]["python"] = sys.version.split()[0]
        self.config = config = json.loads(json.dumps(config | extra, default=str))
        with writing(self.path), blame(f"{self.path}: another process writes there", Timeout):
            self.path.mkdir(parents=True, exist_ok=bool(resume))
            self.lock.acquire()  # before anything is read: somebody may be writing it
        with reading(self.path):
            new, file = dict(step=0, config=config), self.path / "checkpoint.pt"
            self.state = torch.load(file, "cpu", weights_only=True) if resume else new
            for name in "device", "dataset", "threads", "matmul_precision", "versions":
                if (was := self.state["config"].get(name)) != (now := config.get(name)):
                    what = f"--resume {self.path}: {name} was {was}, is {now}"
                    if name in ("device", "dataset"):
                        raise UserError(what)
                    print(f"warning: {what}: not the same bit for bit", file=sys.stderr)
        write(self.path / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    def __exit__(self, kind, *_):
        self.lock.release()
        if self.bar:
            self.bar.close()
        if self.bar and kind and (self.path / "checkpoint.pt").exists():
            print(f"stopped; --resume {self.path} goes on where it was saved", file=sys.stderr)

    def restore(self, parts):
        """Put the states of the checkpoint into parts (name -> what has a state), if there is one.

        Returns what else it has: step, 0 in a new run. Drops rows logged after it.
        """
        with reading(self.path):
            for name, part in parts.items() if self.state["step"] else ():
                load = getattr(part, "load_state_dict", None) or part.set_state
                load(self.state.pop(name))
            for path in self.path.glob("*.csv"):
                path.unlink()
            for name, rows in self.state.pop("rows", {}).items():
                for row in rows:
                    self.log(name, **row)
        return self.state

    def save(self, parts, **values):
        """Replace checkpoint.pt: states of parts, values (`step` too), config, logged rows."""
        for name, tensor in parts["nets"].state_dict().items():
            if not tensor.isfinite().all():
                raise UserError(f"step {values['step']}: {name} is not finite; restart, lower --lr")
        for name, part in parts.items():
            values[name] = (getattr(part, "state_dict", None) or part.get_state)()
        torch.save(dict(values, config=self.config, rows=self.rows), file := io.BytesIO())
        write(self.path / "checkpoint.pt", file.getbuffer())
        self.saved_at = time.perf_counter()

    def log(self, name, **row):
        """Append a row to a CSV file, whose columns are the first row's. Losses must be finite."""
        self.rows.setdefault(name, []).append({k: np.asarray(v).item() for k, v in row.items()})
        with writing(self.path), open(self.path / name, "a") as file:
            for line in (row.values(),) if file.tell() else (row, row.values()):
                file.write(",".join(map(str, line)) + "\n")
        for key, value in row.items():
            if key.endswith("_loss") and not np.isfinite(value):
                raise UserError(f"step {row['step']}: {key} is {value}; restart, lower --lr")

    def progress(self, total, initial, unit):
        """The progress bar of a training that begins at `initial`."""
        options = dict(unit=f" {unit}", dynamic_ncols=True, mininterval=1)
        self.bar = tqdm(total=total, initial=initial, **options)
        return self.bar

    def check_q(self, row, rewards, discount):
        """Warn, once, when Q leaves the range of returns by more than a tenth of that range."""
        low, high = (x.item() / max(1 - discount, 1e-9) for x in rewards.aminmax())
        low, high = min(low, 0), max(high, 0)
        slack = 0.1 * (high - low)
        if not self.warned and not low - slack <= row["q_min"] <= row["q_max"] <= high + slack:
            self.warned = True
            text = "warning: update {step}: Q in [{q_min:.4g}, {q_max:.4g}]".format(**row)
            tqdm.write(f"{text}, the rewards allow [{low:.4g}, {high:.4g}]", file=sys.stderr)

    def finish(self):
        """Print the score: the means of the last three evaluations."""
        self.bar.close()
        rows = self.rows.get("eval.csv", [])[-3:]
        names = ("success", "return", "length") if rows else ()
        means = {k: np.mean([row[k] for row in rows]) for k in names}
        text = ", ".join(f"{k} {v:.4g}" for k, v in means.items() if not np.isnan(v))
        print(f"mean of the last {len(rows)} evaluations: {text}")

    def plot(self, unit="updates"):
        """Draw curve.png from the logged rows, over their `step`, which counts `unit`."""
        from matplotlib.figure import Figure  # here, since it takes a second

        figure = Figure(figsize=(13, 3.5), layout="constrained")
        figure.suptitle(self.path.name)
        score = "return" if np.isnan(self.rows["eval.csv"][-1]["success"]) else "success"
        panels = ("eval.csv", score), ("train.csv", ".*_loss"), ("train.csv", "q_m.*")
        for axes, (file, pattern) in zip(figure.subplots(1, 3), panels):
            rows = self.rows.get(file, [{}])
            for name in filter(re.compile(pattern).fullmatch, rows[0]):
                x, y = ([row[key] for row in rows] for key in ("step", name))
                axes.plot(x, y, ".-", markersize=3, linewidth=1, label=name)
            axes.set_xlabel(unit)
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
            axes.grid(alpha=0.3)
            axes.legend(*axes.get_legend_handles_labels())  # there may be none yet
        figure.axes[1].set_yscale("symlog", linthresh=1e-2)  # a policy's loss can be negative
        with writing(self.path):
            figure.savefig(self.path / "curve.png")
