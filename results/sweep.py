"""Runs scripts on many environments, tasks and seeds with Ray, on one machine or on a cluster.

    python results/sweep.py --scripts qflow.py fql.py --envs antmaze-large-navigate-v0 \\
        --tasks 1 2 3 4 5 --seeds 0 1 2 -- --offline-steps 1000000

Flags after -- go to every script. A job is one script with one set of flags. Its folder is named
after environment, task, script, seed and a hash of the flags after --, and begins with nothing but
config.json; one that is there already must have the same settings. The job's command is `python
SCRIPT --resume FOLDER`: it begins, goes on from the checkpoint, or says that it is finished. So a
job that is killed loses the time since its checkpoint and nothing else, and a sweep that is started
again runs what is missing.

--print prints these commands, one a line, for another engine. Without it Ray runs them; the folders
must then be visible to all of its machines. A job that was killed, or whose machine died, is
retried; one that failed is named with the last line of its output, which is in output.txt.
"""

import csv
import hashlib
import importlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout

try:
    import ray
except ImportError:
    ray = None  # --print does without

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402

RETRIES = 5  # of a job that was killed, by machine or by signal
PREEMPTED = (-signal.SIGKILL, -signal.SIGTERM, 130)  # 130: as the scripts end after SIGTERM
LOCK_SECONDS = 300  # for the lock of a run whose process has not noticed yet that it is dead


@dataclass
class Args:
    scripts: tuple[Path, ...]
    """scripts to run"""
    envs: tuple[str, ...]
    """values of --env"""
    tasks: tuple[int, ...] = (0,)
    """values of --task; 0 is OGBench's default task"""
    seeds: tuple[int, ...] = (0,)
    """values of --seed"""
    cpus: float = 1.0
    """cores that a job takes; rounded down, but at least 1, it is the number of torch threads"""
    gpus: float | None = None
    """GPUs that a job takes (0.25: four share one; 0: none); default: 1 if Ray finds any, else 0"""
    run_dir: Path = Path("runs/sweep")
    """where the folders of the jobs are"""
    print: bool = False
    """print a command for each job, one a line, instead of running them"""


def parse_args():
    """The command line as Args, and the flags after --. Raises UserError."""
    own_flags = sys.argv[1:]
    script_flags = []
    if "--" in own_flags:
        end = own_flags.index("--")
        script_flags = own_flags[end + 1 :]
        own_flags = own_flags[:end]
    args = tyro.cli(Args, args=own_flags, description=__doc__)
    if not args.cpus > 0:
        raise common.UserError(f"--cpus {args.cpus:g}: must be positive")
    if args.gpus is not None and not args.gpus >= 0:
        raise common.UserError(f"--gpus {args.gpus:g}: must be at least 0")
    return args, script_flags


def num_threads(args):
    """Of torch, in a job."""
    return max(1, int(args.cpus))


# ----------------------------------------------------------------------------------------- jobs


@dataclass
class Job:
    folder: Path
    command: list[str]
    config: dict  # of a folder that is new
    last_step: int  # at which it is finished


def import_script(path):
    """A script as a module. Raises UserError."""
    if not path.is_file():
        raise common.UserError(f"--scripts {path}: no such file")
    sys.path.insert(0, str(path.resolve().parent))
    try:
        script = importlib.import_module(path.stem)
    except ImportError as error:
        raise common.UserError(f"--scripts {path}: cannot be imported: {error}") from None
    if not hasattr(script, "parse_args"):
        raise common.UserError(f"--scripts {path}: has no parse_args, unlike qflow.py")
    return script


def parse_script_args(script, flags):
    """The script's Args for these flags. Raises UserError.

    A mistake in the flags ends the program, with the script's own message.
    """
    own_argv = sys.argv
    sys.argv = [Path(script.__file__).name, *flags]
    try:
        return script.parse_args()
    finally:
        sys.argv = own_argv


def full_name(script, args):
    """The environment's name with its task, as the script's folders have it. Raises UserError."""
    if common.is_dataset(args.env):
        name, _, _ = common.resolve_task(args.env, args.task)
        return name
    if hasattr(script, "make_env"):  # flow_sac.py: it starts from scratch too
        for flag in ("task", "dataset", "dataset_url", "offline_steps"):
            value = getattr(args, flag)
            if value:
                flag = flag.replace("_", "-")
                hint = f"--env {args.env} is not an OGBench dataset"
                raise common.UserError(f"--{flag} {value}: {hint}")
        script.make_env(args.env).close()
    elif args.env != script.Args().env:  # a copy's default may be an environment of its own
        common.resolve_task(args.env, args.task)  # raises, with the closest names
    return args.env


def check_settings(folder, script, args):
    """Raise UserError if the folder is there already, with other settings than args."""
    path = folder / "config.json"
    if not os.path.exists(path):
        return
    try:
        saved = json.loads(path.read_text())["args"]
        saved = {**vars(script.Args()), **saved}  # the script may have got new settings
    except common.UNREADABLE as error:
        raise common.UserError(f"{path}: damaged ({error}); remove it") from None
    for name, value in vars(args).items():
        before = json.dumps(saved[name])
        now = json.dumps(value)
        if before != now and name != "resume":
            hint = "use another --run-dir, or remove the folder to begin anew"
            raise common.UserError(f"{folder}: {name} was {before}, would be {now}; {hint}")


def make_job(script, env, task, seed, flags, run_dir):
    """A job, of which nothing is written yet. Raises UserError."""
    names = ["--env", env, "--task", str(task), "--seed", str(seed)]
    args = parse_script_args(script, [*names, *flags])
    if (args.env, args.task, args.seed) != (env, task, seed):
        raise common.UserError("--env, --task and --seed: use --envs, --tasks and --seeds")
    if args.resume or args.evaluate:
        raise common.UserError("--resume and --evaluate: not in a sweep")
    if args.run_dir != script.Args().run_dir:
        raise common.UserError(f"--run-dir {args.run_dir}: must stand before --")
    if args.dataset:
        args.dataset = str(Path(args.dataset).resolve())
    path = Path(script.__file__)
    digest = hashlib.sha256(shlex.join(flags).encode()).hexdigest()[:8]
    name = f"{full_name(script, args)}__{path.stem}__{seed}__{digest}"
    folder = run_dir.resolve() / name
    check_settings(folder, script, args)
    return Job(
        folder=folder,
        command=[sys.executable, str(path), "--resume", str(folder)],
        config=dict(script=path.name, args=vars(args)),
        last_step=args.offline_steps + args.online_steps,
    )


def make_jobs(args, flags):
    """All jobs of the sweep. Raises UserError."""
    scripts = [import_script(path) for path in args.scripts]
    jobs = {}  # by folder
    for names in itertools.product(scripts, args.envs, args.tasks, args.seeds):
        job = make_job(*names, flags, args.run_dir)
        if job.folder in jobs:
            hint = "give each script, environment, task and seed once; scripts need different names"
            raise common.UserError(f"{job.folder.name}: two jobs of this name; {hint}")
        jobs[job.folder] = job
    return list(jobs.values())


def write_config(job):
    """Create the job's folder, unless it is there. Raises UserError."""
    if os.path.exists(job.folder / "config.json"):
        return
    with common.disk_errors(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    common.write_file(job.folder / "config.json", json.dumps(job.config, indent=2).encode())


def is_finished(job):
    """Whether a job's checkpoint is at its last step."""
    path = job.folder / "checkpoint.pt"
    try:  # mmap: of a file that may be large, only this number is read
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except common.UNREADABLE:  # there is none, or the job itself will say what is wrong
        return False
    return state["step"] >= job.last_step


def read_rows(path):
    """The complete rows of a CSV file (column -> text); none if it cannot be read."""
    try:
        lines = path.read_text().split("\n")
    except OSError:  # there is no such file yet, or a network's disk does not answer
        return []
    return list(csv.DictReader(lines[:-1]))  # what follows the last end of line is being written


def score(folder):
    """The mean of the last three evaluations, of success if there is one, as text."""
    rows = read_rows(folder / "eval.csv")[-3:]
    for name in ("success", "return"):
        mean = np.mean([float(row[name]) for row in rows]) if rows else np.nan
        if not np.isnan(mean):
            return f"{name} {mean:.4g}"
    return "no score"


# ------------------------------------------------------------------------------------------ Ray


def run_job(command, environment, folder):
    """Runs a job in a worker of Ray; returns the reason if it failed, else "".

    Raises ChildProcessError if it was preempted: Ray then calls this again.
    """
    try:
        with FileLock(folder / ".lock", timeout=LOCK_SECONDS):
            pass
    except Timeout:
        pass  # the script will say so
    output = folder / "output.txt"
    # A worker that is killed takes its job with it: Ray would start the job a second time.
    command = ["setpriv", "--pdeathsig", "KILL", *command]
    always = dict(TQDM_DISABLE="1", PYTHONUNBUFFERED="1")  # or its error comes before the rest
    with open(output, "ab") as file:
        result = subprocess.run(
            command,
            env={**os.environ, **always, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    status = result.returncode
    if status == 0:
        return ""
    if status in PREEMPTED:
        raise ChildProcessError(f"killed, exit status {status}")
    text = output.read_text(errors="replace").strip()
    if not text:
        text = f"exit status {status}"
    last_line = text.split("\n")[-1]
    if status < 0:
        return f"{signal.strsignal(-status)}: {last_line}"
    return last_line


def choose_gpus(args, devices, machines):
    """The GPUs of a job. Raises UserError if no machine has room for a job.

    devices: --device of each job; machines: what each one has, like {"CPU": 8.0, "GPU": 1.0}.
    """
    gpus = args.gpus
    if gpus is None:
        has_gpu = any("GPU" in machine for machine in machines)
        only_cpu = set(devices) == {"cpu"}
        gpus = 1 if has_gpu and not only_cpu else 0
    for machine in machines:
        if args.cpus <= machine.get("CPU", 0) and gpus <= machine.get("GPU", 0):
            return gpus
    raise common.UserError(f"--cpus {args.cpus:g} --gpus {gpus:g}: no machine has that many")


def start_ray():
    """Start Ray, or connect to a cluster; returns what each machine has. Raises UserError."""
    if ray is None:
        raise common.UserError("needs Ray: pip install ray; or use --print")
    ray.init(log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C; Ray has replaced it
    return [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]


def run_with_ray(jobs, args):
    """Run jobs; returns those that failed, folder -> reason. Raises UserError.

    KeyboardInterrupt stops them.
    """
    machines = start_ray()
    devices = [job.config["args"]["device"] for job in jobs]
    gpus = choose_gpus(args, devices, machines)
    run = ray.remote(run_job).options(
        num_cpus=args.cpus,
        num_gpus=gpus,
        max_retries=RETRIES,
        retry_exceptions=[ChildProcessError],
    )
    environment = dict(OMP_NUM_THREADS=str(num_threads(args)))
    if gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides only those of other jobs
    pending = {}
    for job in jobs:
        output = job.folder / "output.txt"  # there from the moment when the job has been started
        output.unlink(missing_ok=True)
        reference = run.remote(job.command, environment, job.folder)
        pending[reference] = job
    failed = {}
    screen = Screen()
    try:
        while pending:
            done, _ = ray.wait(list(pending), timeout=1)
            for reference in done:
                folder = pending.pop(reference).folder
                try:
                    reason = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    reason = str(error.cause)
                except ray.exceptions.RayError as error:
                    reason = str(error).partition("\n")[0]
                if reason:
                    failed[folder] = reason
                    screen.write(f"failed    {folder.name}: {reason}")
                else:
                    screen.write(f"finished  {folder.name}: {score(folder)}")
            num_finished = len(jobs) - len(pending) - len(failed)
            screen.show(status(pending.values(), num_finished, len(failed)))
        return failed
    finally:
        ray.shutdown()  # which kills the jobs that are left


def status(jobs, num_finished, num_failed):
    """Lines on the jobs that are not done yet: how many there are, and where each one is."""
    running = [job for job in jobs if os.path.exists(job.folder / "output.txt")]
    num_queued = len(jobs) - len(running)
    lines = [
        f"queued {num_queued}, running {len(running)}, finished {num_finished}, failed {num_failed}"
    ]
    for job in running:
        rows = read_rows(job.folder / "train.csv")
        step = rows[-1]["step"] if rows else 0
        lines.append(f"running   {job.folder.name}: step {step} of {job.last_step}")
    return lines


class Screen:
    """Prints lines that stay, and below them lines that the next ones replace."""

    def __init__(self):
        self.num_lines = 0  # that will be replaced
        self.shown_at = -1e9

    def clear(self):
        if self.num_lines:
            print(f"\x1b[{self.num_lines}F\x1b[J", end="")  # up, and erase what is below
        self.num_lines = 0

    def write(self, line):
        self.clear()
        print(line, flush=True)

    def show(self, lines):
        """Replace the last lines by these; in a file, where that cannot be, once a minute."""
        if sys.stdout.isatty():
            size = shutil.get_terminal_size()
            lines = [line[: size.columns - 1] for line in lines[: size.lines - 2]]
            self.clear()
            self.num_lines = len(lines)
        elif time.perf_counter() < self.shown_at + 60:
            return
        print("\n".join(lines), flush=True)
        self.shown_at = time.perf_counter()


# ----------------------------------------------------------------------------------------- main


def run_missing(jobs, args):
    """Run those jobs that are not finished; returns the failed ones as run_with_ray does."""
    missing = [job for job in jobs if not is_finished(job)]
    print(f"{len(jobs)} jobs in {args.run_dir}, {len(jobs) - len(missing)} of them finished")
    if not missing:
        return {}
    try:
        with FileLock(args.run_dir / ".lock", blocking=False):
            return run_with_ray(missing, args)
    except Timeout:
        raise common.UserError(f"--run-dir {args.run_dir}: another sweep runs there") from None


def main():
    args, flags = parse_args()
    jobs = make_jobs(args, flags)
    for job in jobs:
        write_config(job)
    if args.print:
        for job in jobs:
            print(f"OMP_NUM_THREADS={num_threads(args)} {shlex.join(job.command)}")
        return
    failed = run_missing(jobs, args)
    for folder, reason in failed.items():
        print(f"failed    {folder.name}: {reason}\n          {folder / 'output.txt'}")
    finished = [str(job.folder) for job in jobs if is_finished(job)]
    if finished:
        table = [sys.executable, str(Path(__file__).with_name("table.py")), *finished]
        subprocess.run([*table, "--out", str(args.run_dir / "table.csv")], check=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="gymnasium")  # float64 spaces
    try:
        main()
    except common.UserError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the jobs' checkpoints", file=sys.stderr)
        sys.exit(130)
