"""Kills jobs, machines and the sweep itself, and compares with runs that nothing disturbed.

    python results/sweep/check_ray.py > results/sweep/check_ray.txt

Linux with Ray, nothing else of Ray running. The two machines are two nodes of Ray on this one.
"""

import csv
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

SWEEP = ROOT / "results/sweep.py"
ENV = "pointmaze-medium-navigate-v0"
FLAGS = """--hidden 8 --batch-size 16 --offline-steps 1200 --eval-interval 300 --log-interval 100
    --eval-episodes 1""".split()


def say(text):
    """Print text, without colours and without what is above the repository."""
    text = re.sub(r"\x1b\[\d*m", "", text)
    text = text.replace(f"{ROOT}/", "").replace(str(Path.home()), "~")
    print(text, flush=True)


def start_sweep(run_dir, envs=(ENV,), flags=()):
    """A sweep of two seeds, as a process."""
    command = ["setpriv", "--pdeathsig", "TERM", sys.executable, SWEEP]  # it ends with this one
    command += ["--scripts", ROOT / "qflow.py", "--envs", *envs, "--seeds", "0", "1"]
    command += ["--run-dir", run_dir]
    command += ["--", *FLAGS, *flags]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end_of(sweep, status):
    """Wait for the end of a sweep, check its exit status and show what it printed."""
    out, _ = sweep.communicate(timeout=1800)
    for line in out.splitlines():
        if line.strip() and "[state-dump]" not in line:  # Ray's, of a machine that died
            say(f"    {line}")
    assert sweep.returncode == status, sweep.returncode


def process_ids(*words):
    """The processes whose command line has all these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if all(str(word) in command for word in words):
            found.append(int(path.parent.name))
    return found


def parent(pid):
    """The process that started this one."""
    return int(re.search(r"^PPid:\s*(\d+)", Path(f"/proc/{pid}/status").read_text(), re.M)[1])


def main_process(folder):
    """The process of a job's script, of which those of its environments are children."""
    pids = process_ids("qflow.py", f"--start-or-resume {folder}")
    (main,) = [pid for pid in pids if parent(pid) not in pids]
    return main


def rows(path):
    """The rows of a CSV file without the speed."""
    with open(path, newline="") as file:
        found = list(csv.DictReader(file))
    for row in found:
        row.pop("steps_per_s", None)
    return found


def first_rows(folder):
    """The lines of train.csv until the first checkpoint, at step 300, with their speed.

    A run that was resumed has them as they were; they differ in one that began again.
    """
    return (folder / "train.csv").read_text().splitlines()[:4]


def job_folder(run_dir, seed):
    (folder,) = run_dir.glob(f"pointmaze*__qflow__{seed}__*")
    return folder


def wait_for_checkpoints(sweep, run_dir, seeds):
    """Wait for the jobs' first checkpoints; returns their first rows, seed -> lines."""
    found = {}
    for seed in seeds:
        while not list(run_dir.glob(f"pointmaze*__qflow__{seed}__*/checkpoint.pt")):
            assert sweep.poll() is None, sweep.communicate()
            time.sleep(0.05)
        found[seed] = first_rows(job_folder(run_dir, seed))
        assert len(found[seed]) == 4 and "steps_per_s" in found[seed][0]
    return found


def wait_for_end(pids):
    """Wait until these processes are gone, for up to a minute."""
    deadline = time.time() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.time() < deadline, pids
        time.sleep(0.05)


def compare(run_dir, whole, starts, before):
    """starts: seed -> how often the job has been started.

    before: seed -> the first rows as they were before the job was stopped.
    """
    for seed, expected in starts.items():
        folder = job_folder(run_dir, seed)
        reference = job_folder(whole, seed)
        for name in ("train.csv", "eval.csv"):
            assert rows(folder / name) == rows(reference / name), (folder, name)
        if seed in before:
            assert first_rows(folder) == before[seed], folder
        found = (folder / "output.txt").read_text().count("settings: ")
        assert found == expected, (folder, found)
        say(f"seed {seed}: started {found} times; its CSV files equal the reference's")


def start_reference(whole):
    for seed in (0, 1):
        command = [sys.executable, ROOT / "qflow.py", "--env", ENV, "--seed", str(seed), *FLAGS]
        command += ["--run-dir", whole]
        subprocess.run(command, check=True, capture_output=True)


def check_killed_and_failing_jobs(run_dir, whole):
    say("\n== two jobs fail, since the dataset is not theirs; another one is killed with SIGKILL")
    path = common.data_folder() / "collected" / f"{ENV}.npz"
    sweep = start_sweep(run_dir, ["antmaze-medium-navigate-v0", ENV], ["--dataset", path])
    before = wait_for_checkpoints(sweep, run_dir, [0])
    os.kill(main_process(job_folder(run_dir, 0)), signal.SIGKILL)
    say("killed seed 0's script after its first checkpoint")
    end_of(sweep, 1)
    compare(run_dir, whole, {0: 2, 1: 1}, before)


def check_interrupted_sweep(run_dir, whole):
    say("\n== the sweep is interrupted (Ctrl-C), then started again")
    sweep = start_sweep(run_dir)
    before = wait_for_checkpoints(sweep, run_dir, [0, 1])
    pids = process_ids("qflow.py", f"--start-or-resume {run_dir}")
    os.killpg(sweep.pid, signal.SIGINT)
    end_of(sweep, 130)
    wait_for_end(pids)
    say("no process of a job is left")
    end_of(start_sweep(run_dir), 0)
    compare(run_dir, whole, {0: 2, 1: 2}, before)
    say("once more:")
    end_of(start_sweep(run_dir), 0)


def call_ray(words):
    say(f"ray {words}")
    program = Path(sys.executable).with_name("ray")
    subprocess.run([program, *words.split()], check=True, stdout=subprocess.DEVNULL)


def check_two_machines(run_dir, whole):
    say("\n== two machines of one core each, one of which dies")
    os.environ["RAY_AUTH_MODE"] = "token"
    raylets = []
    try:
        call_ray("get-auth-token --generate")
        for command in ("start --head --num-cpus 1", "start --address=127.0.0.1:6379 --num-cpus 1"):
            call_ray(command)
            (new,) = set(process_ids("raylet/raylet --raylet_socket_name")) - set(raylets)
            raylets.append(new)
        sweep = start_sweep(run_dir)
        before = wait_for_checkpoints(sweep, run_dir, [0, 1])
        pids = {seed: main_process(job_folder(run_dir, seed)) for seed in (0, 1)}
        machine = {seed: raylets.index(parent(parent(pid))) for seed, pid in pids.items()}
        assert sorted(machine.values()) == [0, 1], machine
        (moved,) = [seed for seed in (0, 1) if machine[seed] == 1]
        os.kill(raylets[1], signal.SIGKILL)
        wait_for_end([pids[moved]])
        say(f"killed the second machine's raylet; seed {moved}, which ran there, is gone too")
        end_of(sweep, 0)
        compare(run_dir, whole, {moved: 2, 1 - moved: 1}, before)
    finally:
        call_ray("stop --force")


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    os.environ["OMP_NUM_THREADS"] = "1"
    say(f"Ray {ray.__version__}, Python {sys.version.split()[0]}")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        whole = folder / "whole"
        start_reference(whole)
        check_killed_and_failing_jobs(folder / "killed", whole)
        check_interrupted_sweep(folder / "interrupted", whole)
        check_two_machines(folder / "machines", whole)
    say("\nall as expected")


if __name__ == "__main__":
    main()
