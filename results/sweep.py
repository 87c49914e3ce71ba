"""Runs scripts on many environments, tasks and seeds with Ray, on one machine or on a cluster.

    python results/sweep.py --scripts qflow.py fql.py --envs antmaze-large-navigate-v0 \\
        --tasks 1 2 3 4 5 --seeds 0 1 2 -- --offline-steps 1000000

Flags after -- go to every script. A job is one script with one set of flags. Its folder is named
after environment, task, script, seed and a hash of the flags after --, and begins with nothing but
config.json. The job's command is `python SCRIPT --resume FOLDER`: it begins, goes on from the
checkpoint, or says that it is finished. So a job that is killed loses the time since its checkpoint
and nothing else, and a sweep that is started again runs what is missing.

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

try:
    import ray
except ImportError:
    ray = None  # --print does without

sys.path.insert(0, str(Path(__file__).parent.parent))
import common  # noqa: E402

RETRIES = 5  # of a job that was killed, by machine or by signal


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
    """The command line as Args, and the flags after --."""
    own_flags = sys.argv[1:]
    script_flags = []
    if "--" in own_flags:
        end = own_flags.index("--")
        script_flags = own_flags[end + 1 :]
        own_flags = own_flags[:end]
    return tyro.cli(Args, args=own_flags, description=__doc__), script_flags


def num_threads(args):
    """Of torch, in a job."""
    return max(1, int(args.cpus))


# ----------------------------------------------------------------------------------------- jobs


def import_script(path):
    """A script as a module. Raises UserError."""
    if not path.is_file():
        raise common.UserError(f"--scripts {path}: no such file")
    sys.path.insert(0, str(path.resolve().parent))
    return importlib.import_module(path.stem)


def make_job(script, env, task, seed, flags, run_dir):
    """The folder of a job, with config.json if it is new. Raises UserError.

    A mistake in the flags ends the program, with the script's own message.
    """
    module = import_script(script)
    sys.argv = [script.name, "--env", env, "--task", str(task), "--seed", str(seed), *flags]
    args = module.parse_args()
    if (args.env, args.task, args.seed) != (env, task, seed):
        raise common.UserError("--env, --task and --seed: use --envs, --tasks and --seeds")
    if args.resume or args.evaluate:
        raise common.UserError("--resume and --evaluate: not in a sweep")
    name = env
    if common.is_dataset(env):
        name, _, _ = common.resolve_task(env, task)
    digest = hashlib.sha256(shlex.join(flags).encode()).hexdigest()[:8]
    folder = run_dir.resolve() / f"{name}__{script.stem}__{seed}__{digest}"
    config = dict(script=script.name, args=vars(args))
    if not (folder / "config.json").exists():
        with common.disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        common.write_file(folder / "config.json", json.dumps(config, indent=2).encode())
    return folder


def last_step(folder):
    """The step at which a job is finished."""
    args = json.loads((folder / "config.json").read_text())["args"]
    return args["offline_steps"] + args["online_steps"]


def is_finished(folder):
    """Whether a job's checkpoint is at its last step."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return False
    try:  # mmap: of a file that may be large, only this number is read
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except common.UNREADABLE:  # the job itself will say so
        return False
    return state["step"] >= last_step(folder)


def read_rows(path):
    """The complete rows of a CSV file (column -> text); none if there is no such file."""
    try:
        lines = path.read_text().split("\n")
    except FileNotFoundError:
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


def run_job(command, environment, output, working_dir):
    """Runs a job in a worker of Ray; returns the last line of its output if it failed, else "".

    Raises ChildProcessError if it was killed: Ray then calls this again.
    """
    # A worker that is killed takes its job with it: Ray would start the job a second time.
    command = ["setpriv", "--pdeathsig", "KILL", *command]
    always = dict(TQDM_DISABLE="1", PYTHONUNBUFFERED="1")  # or its error comes before the rest
    with open(output, "ab") as file:
        result = subprocess.run(
            command,
            cwd=working_dir,
            env={**os.environ, **always, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if result.returncode == 0:
        return ""
    stopped_by_sigterm = result.returncode == 130  # as the scripts end then
    if result.returncode < 0 or stopped_by_sigterm:
        raise ChildProcessError(f"killed, exit status {result.returncode}")
    text = output.read_text(errors="replace").strip()
    if not text:
        return f"exit status {result.returncode}"
    return text.split("\n")[-1]


def start_ray(args):
    """Start Ray, or connect to a cluster; returns the GPUs of a job. Raises UserError."""
    if ray is None:
        raise common.UserError("needs Ray: pip install ray; or use --print")
    ray.init(log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C; Ray has replaced it
    machines = [machine["Resources"] for machine in ray.nodes() if machine["Alive"]]
    gpus = args.gpus
    if gpus is None:
        gpus = 1 if any("GPU" in machine for machine in machines) else 0
    for machine in machines:
        if args.cpus <= machine.get("CPU", 0) and gpus <= machine.get("GPU", 0):
            return gpus
    raise common.UserError(f"--cpus {args.cpus:g} --gpus {gpus:g}: no machine has that many")


def run_with_ray(jobs, args):
    """Run jobs, folder -> command; returns those that failed, folder -> reason. Raises UserError.

    KeyboardInterrupt stops them.
    """
    gpus = start_ray(args)
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
    for folder, command in jobs.items():
        output = folder / "output.txt"  # there from the moment when the job has been started
        output.unlink(missing_ok=True)
        reference = run.remote(command, environment, output, os.getcwd())
        pending[reference] = folder
    failed = {}
    screen = Screen()
    try:
        while pending:
            done, _ = ray.wait(list(pending), timeout=1)
            for reference in done:
                folder = pending.pop(reference)
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


def status(folders, num_finished, num_failed):
    """Lines on the jobs that are not done yet: how many there are, and where each one is."""
    running = [folder for folder in folders if (folder / "output.txt").exists()]
    num_queued = len(folders) - len(running)
    lines = [
        f"queued {num_queued}, running {len(running)}, finished {num_finished}, failed {num_failed}"
    ]
    for folder in running:
        rows = read_rows(folder / "train.csv")
        step = rows[-1]["step"] if rows else 0
        lines.append(f"running   {folder.name}: step {step} of {last_step(folder)}")
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


def main():
    args, flags = parse_args()
    jobs = {}  # folder -> command
    for script, env, task, seed in itertools.product(
        args.scripts, args.envs, args.tasks, args.seeds
    ):
        folder = make_job(script, env, task, seed, flags, args.run_dir)
        jobs[folder] = [sys.executable, str(script.resolve()), "--resume", str(folder)]
    if args.print:
        for command in jobs.values():
            print(f"OMP_NUM_THREADS={num_threads(args)} {shlex.join(command)}")
        return
    missing = {folder: command for folder, command in jobs.items() if not is_finished(folder)}
    print(f"{len(jobs)} jobs in {args.run_dir}, {len(jobs) - len(missing)} of them finished")
    failed = run_with_ray(missing, args) if missing else {}
    for folder, reason in failed.items():
        print(f"failed    {folder.name}: {reason}\n          {folder / 'output.txt'}")
    finished = [str(folder) for folder in jobs if is_finished(folder)]
    if finished:
        table = [sys.executable, str(Path(__file__).with_name("table.py")), *finished]
        subprocess.run([*table, "--out", str(args.run_dir / "table.csv")], check=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except common.UserError as error:
        print(f"sweep.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the jobs' checkpoints", file=sys.stderr)
        sys.exit(130)
