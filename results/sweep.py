"""Runs scripts on many environments, tasks and seeds with Ray, on one machine or on a cluster.

    python results/sweep.py --scripts qflow.py fql.py --envs antmaze-large-navigate-v0 \\
        --tasks 1 2 3 4 5 --seeds 0 1 2 -- --offline-steps 1000000
    python results/sweep.py --gpus 0.25 --scripts ...    # four jobs share a GPU

Flags after -- go to every script. A job is one script on one environment, task and seed; its folder
is named after them and a hash of the flags after --. Its command is `python SCRIPT FLAGS
--start-or-resume FOLDER`, which starts the run, resumes it from its checkpoint, or says that it is
finished. So a killed job loses only the work since its last checkpoint, and repeating the sweep's
command runs what is missing.

With Ray, all machines must share RUN_DIR and the directory in which the sweep is started. A job
that was killed, or whose machine died, is retried. For a job that failed, the sweep prints the last
line of its output; output.txt in its folder has the rest. The sweep ends with the table of
table.py, which is also written to RUN_DIR/table.csv. To use several machines, start Ray before the
sweep, and set environment variables such as WANDB_* before starting Ray:

    ray get-auth-token --generate                                 # once
    RAY_AUTH_MODE=token ray start --head                          # where the sweep is started
    RAY_AUTH_MODE=token ray start --address=FIRST:6379            # on the others

--print prints the commands, one per line, for other schedulers:

    python results/sweep.py --print --scripts ... > jobs.txt
    xargs -d '\\n' -P 4 -I LINE sh -c 'LINE || exit 1' < jobs.txt    # or: parallel -j 4 < jobs.txt
    sbatch --array=1-$(wc -l < jobs.txt) --gpus=1 --requeue --open-mode=append \\
        --wrap 'eval "$(sed -n ${SLURM_ARRAY_TASK_ID}p jobs.txt)"'

For GPU jobs, give --device cuda after --: without it, a job whose node has no usable GPU runs on
the CPU. SLURM does not requeue a job that reached its time limit: submit jobs.txt again; finished
jobs end once they have loaded their dataset. Other flags after --, or another order, start new
runs. On a filesystem without flock, a killed job leaves .lock, which must be deleted.

A Weights & Biases sweep calls the scripts itself. Its `command` needs ${args_no_boolean_flags};
flags with a list belong there, too:
[${env}, python, ${program}, --hidden, 256, 256, ${args_no_boolean_flags}].
"""

import hashlib
import importlib
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

try:
    import ray
except ImportError:
    ray = None  # --print does without

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402

RETRIES = 5  # for a job that was killed by a signal or with its machine
PREEMPTED = (-signal.SIGKILL, -signal.SIGTERM, 130)  # 130: the scripts' exit status on SIGTERM

# Runs a command that is killed when its parent dies; 1 is Linux's PR_SET_PDEATHSIG.
DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"
)


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
    """cores per job; the number of torch threads is this, rounded down, but at least 1"""
    gpus: float | None = None
    """with Ray: GPUs per job (0.25: four share one; 0: CPU); default: 1 if Ray finds any, else 0"""
    run_dir: Path = Path("runs/sweep")
    """where the folders of the jobs are"""
    print: bool = False
    """print each job's command, one per line, instead of running the jobs"""


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
    for word in script_flags:
        flag = word.partition("=")[0].replace("_", "-")
        if flag in ("--env", "--task", "--seed"):
            raise common.UserError(f"{flag}: use {flag}s, before --")
        if flag in ("--run-dir", "--resume", "--start-or-resume"):
            raise common.UserError(f"{flag}: the sweep chooses the folders, in its own --run-dir")
    return args, script_flags


def num_threads(args):
    """Torch threads of a job."""
    return max(1, int(args.cpus))


# ----------------------------------------------------------------------------------------- jobs


@dataclass
class Job:
    folder: Path
    command: list[str]
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
    if not hasattr(script, "parse_args") or not hasattr(script, "make_env"):
        raise common.UserError(f"--scripts {path}: has no parse_args or make_env, unlike qflow.py")
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
    if args.task:
        raise common.UserError(f"--tasks {args.task}: --env {args.env} is not an OGBench dataset")
    script.make_env(args).close()
    return args.env.replace("/", "-")


def check_settings(folder, args):
    """Raise UserError if the folder holds a run whose settings differ from args."""
    if not (folder / "config.json").exists():
        return
    new_settings = vars(type(args)())  # for settings added to the script after that run
    saved = {**new_settings, **common.read_config(folder)["args"]}
    for name, value in vars(args).items():
        before = json.dumps(saved[name])
        now = json.dumps(value)
        if before != now and name not in ("resume", "start_or_resume"):
            hint = "use another --run-dir, or move the folder away to start anew"
            raise common.UserError(f"{folder}: {name} was {before}, would be {now}; {hint}")


def make_job(path, script, env, task, seed, flags, run_dir):
    """A job of the script at `path`; writes nothing. Raises UserError."""
    flags_of_job = ["--env", env, "--task", str(task), "--seed", str(seed), *flags]
    args = parse_script_args(script, flags_of_job)
    digest = hashlib.sha256(shlex.join(flags).encode()).hexdigest()[:8]
    name = f"{full_name(script, args)}__{path.stem}__{seed}__{digest}"
    folder = run_dir.resolve() / name
    check_settings(folder, args)
    return Job(
        folder=folder,
        command=[
            sys.executable,
            str(path.resolve()),
            *flags_of_job,
            "--start-or-resume",
            str(folder),
        ],
        last_step=args.offline_steps + args.online_steps,
    )


def make_jobs(args, flags):
    """All jobs of the sweep. Raises UserError."""
    scripts = [(path, import_script(path)) for path in args.scripts]
    jobs = {}  # by folder
    for (path, script), *names in itertools.product(scripts, args.envs, args.tasks, args.seeds):
        job = make_job(path, script, *names, flags, args.run_dir)
        if job.folder in jobs:
            hint = "give each script, environment, task and seed once; scripts need different names"
            raise common.UserError(f"{job.folder.name}: two jobs of this name; {hint}")
        jobs[job.folder] = job
    return list(jobs.values())


def is_finished(job):
    """Whether a job's checkpoint is at its last step."""
    path = job.folder / "checkpoint.pt"
    try:  # mmap: reads only this number from a file that may be large
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return state["step"] >= job.last_step
    except Exception:  # no checkpoint yet, or a broken one, which the job itself will report
        return False


def steps_done(jobs):
    """The steps of all jobs together, by the last complete row of each train.csv."""
    total = 0
    for job in jobs:
        try:
            text = (job.folder / "train.csv").read_text()
        except OSError:  # there is no such file yet, or a network disk does not answer
            continue
        lines = text.split("\n")[1:-1]  # what follows the last end of line is being written
        if lines:
            total += int(lines[-1].partition(",")[0])
    return total


# ------------------------------------------------------------------------------------------ Ray


def run_job(command, environment, folder, directory):
    """Runs a job in a worker of Ray, in `directory`; returns the reason if it failed, else "".

    Raises ChildProcessError if it was preempted: Ray then calls this again.
    """
    if sys.platform == "linux":  # else a process may outlive its worker while Ray retries the job
        command = [sys.executable, "-c", DIE_WITH_PARENT, *command]
    always = dict(TQDM_DISABLE="1", PYTHONUNBUFFERED="1")  # so that an error is the last line
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "output.txt"
    with open(output, "ab") as file:
        result = subprocess.run(
            command,
            cwd=directory,  # of the sweep: a worker has another one, and paths may be relative
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
    last_line = text.rpartition("\n")[2] or f"exit status {status}"
    if status < 0:
        return f"{signal.strsignal(-status)}: {last_line}"
    return last_line


def choose_gpus(args, machines):
    """The GPUs of a job. Raises UserError if no machine has room for a job.

    machines: what each one has, like {"CPU": 8.0, "GPU": 1.0}.
    """
    gpus = args.gpus
    if gpus is None:
        gpus = 1 if any("GPU" in machine for machine in machines) else 0
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


def last_words(folder):
    """A finished job's line with its score, without what Weights & Biases prints after it."""
    try:
        lines = (folder / "output.txt").read_text(errors="replace").splitlines()
    except OSError:  # a network disk does not answer
        lines = []
    found = [line for line in lines if line.startswith("finished")]
    return found[-1] if found else "finished"


def run_with_ray(jobs, args):
    """Run jobs; returns those that failed, folder -> reason. Raises UserError.

    KeyboardInterrupt stops them.
    """
    machines = start_ray()
    gpus = choose_gpus(args, machines)
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
        pending[run.remote(job.command, environment, job.folder, Path.cwd())] = job
    failed = {}
    bar = common.progress_bar(
        total=sum(job.last_step for job in jobs), initial=steps_done(jobs), unit=" steps"
    )
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
                    bar.write(f"failed    {folder.name}: {reason}")
                else:
                    bar.write(f"{folder.name}: {last_words(folder)}")
            bar.set_postfix_str(f"{len(pending)} jobs left, {len(failed)} failed", refresh=False)
            bar.update(steps_done(jobs) - bar.n)
        return failed
    finally:
        bar.close()
        ray.shutdown()  # which kills the jobs that are left


# ----------------------------------------------------------------------------------------- main


def main():
    args, flags = parse_args()
    jobs = make_jobs(args, flags)
    if args.print:
        for job in jobs:
            print(f"OMP_NUM_THREADS={num_threads(args)} {shlex.join(job.command)}")
        return
    missing = [job for job in jobs if not is_finished(job)]
    print(f"{len(jobs)} jobs in {args.run_dir}, {len(jobs) - len(missing)} of them finished")
    failed = run_with_ray(missing, args) if missing else {}
    for folder, reason in failed.items():
        print(f"failed    {folder.name}: {reason}\n          {folder / 'output.txt'}", flush=True)
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
        print("stopped; the same command resumes the jobs from their checkpoints", file=sys.stderr)
        sys.exit(130)
