"""results/sweep.py without Ray: its jobs, and their commands as another engine runs them.

What Ray does is checked by results/sweep/check_ray.py, SLURM by check_slurm.sh beside it.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import common
import flow_sac
import fql
import qflow

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "results"))
import sweep  # noqa: E402

NAME = "pointmaze-medium-navigate-v0"
TASK = "pointmaze-medium-navigate-singletask-v0"
FLAGS = """--device cpu --hidden 8 --batch-size 16 --offline-steps 300 --eval-interval 100
    --log-interval 20 --eval-episodes 1""".split()
SCRIPTS = [str(ROOT / "qflow.py"), str(ROOT / "fql.py")]
README = (ROOT / "README.md").read_text()

# Python imports this file when it starts: where no dataset is there, a small one is collected.
SITE = """
import common

collect = common.collect_pointmaze

def collect_and_note(name, path):
    with open("collections.txt", "a") as file:
        print(path, file=file)
    collect(name, path, num_episodes=4)

common.collect_pointmaze = collect_and_note
"""


@pytest.fixture
def sweep_prints(monkeypatch, capsys):
    """sweep_prints(*flags): the commands that --print prints."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["sweep.py", "--print", *map(str, flags)])
        sweep.main()
        return capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def sweep_jobs(monkeypatch):
    """sweep_jobs(*flags): the jobs, of which nothing is written."""

    def make(*flags):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, flags)])
        return sweep.make_jobs(*sweep.parse_args())

    return make


def job_folder(command):
    """The folder of a printed command."""
    return Path(command.split(" --resume ")[1])


def rows(path):
    """The lines of a CSV file without its last column, the speed in train.csv."""
    return [line.rpartition(",")[0] for line in path.read_text().splitlines()]


# ----------------------------------------------------------------------------------------- jobs


def test_a_job_for_each_script_environment_task_and_seed(sweep_prints, tmp_path):
    envs = ["cube-single-play-v0", "antmaze-giant-navigate-v0"]
    flags = ["--scripts", *SCRIPTS, "--envs", *envs, "--tasks", 2, 3, "--seeds", 0, 7]
    flags += ["--run-dir", tmp_path, "--cpus", 2.5, "--", "--hidden", 8, 9, "--tau", 0.1]
    commands = sweep_prints(*flags)
    folders = [job_folder(command) for command in commands]
    assert len(set(folders)) == 16 and set(folders) == set(tmp_path.iterdir())
    name = r"antmaze-giant-navigate-singletask-task3-v0__fql__7__\w{8}"
    assert re.fullmatch(name, folders[-1].name)
    words = [sys.executable, SCRIPTS[1], "--resume", str(folders[-1])]
    assert commands[-1] == f"OMP_NUM_THREADS=2 {' '.join(words)}"

    config = json.loads((folders[-1] / "config.json").read_text())
    args = config["args"]
    assert config["script"] == "fql.py" and args["hidden"] == [8, 9] and args["tau"] == 0.1
    assert (args["env"], args["task"], args["seed"]) == (envs[1], 3, 7)
    assert args["discount"] == 0.995 and args["alpha"] == 10  # of antmaze-giant

    (folders[0] / "config.json").write_text(json.dumps(dict(config, args=dict(args, seed=0))))
    with pytest.raises(common.UserError, match="env was"):
        sweep_prints(*flags)
    others = sweep_prints(*flags[:-1], 0.2)
    assert not set(others) & set(commands)


def test_an_environment_without_dataset(sweep_jobs, tmp_path):
    script = ROOT / "flow_sac.py"
    (job,) = sweep_jobs(
        "--scripts", script, "--envs", "Hopper-v5", "--run-dir", tmp_path, "--", "--hidden", 8
    )
    assert job.folder.name.startswith("Hopper-v5__flow_sac__0__")
    assert job.last_step == 1_000_000
    assert not list(tmp_path.iterdir())


def test_the_folder_of_a_job_has_the_settings_of_the_command_line(sweep_prints, tmp_path):
    flags = ["--scripts", SCRIPTS[0], "--envs", NAME, "--run-dir", tmp_path, "--", *FLAGS]
    (command,) = sweep_prints(*flags)
    path = job_folder(command) / "config.json"
    config = json.loads(path.read_text())

    # As the script writes it when it resumes, and before it had the setting --sparse.
    config["args"]["resume"] = str(path.parent)
    del config["args"]["sparse"]
    path.write_text(json.dumps(dict(config, device="cpu", dataset="a description", commit="a")))
    written = path.read_text()
    assert sweep_prints(*flags) == [command]
    assert path.read_text() == written

    config["args"]["offline_steps"] = 500
    path.write_text(json.dumps(config))
    with pytest.raises(common.UserError, match="offline_steps was 500, would be 300; use another"):
        sweep_prints(*flags)
    path.write_text(written[:-9])
    with pytest.raises(common.UserError, match="config.json: damaged"):
        sweep_prints(*flags)


def test_a_dataset_file_is_found_from_any_folder(sweep_jobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (job,) = sweep_jobs("--scripts", SCRIPTS[0], "--envs", NAME, "--", "--dataset", "a/file.npz")
    assert job.config["args"]["dataset"] == str(tmp_path / "a/file.npz")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks", "6"], "--task 6: no such environment"),
        (["--tasks", "0", "6"], "--task 6: no such environment"),
        (["--envs", NAME, "pointmaze-mediun-navigate-v0"], f"closest: {TASK}"),
        (["--envs", "Hopper-v5"], "--env Hopper-v5: no such environment"),
        (["--seeds", "0", "0"], "two jobs of this name"),
        (["--envs", NAME, TASK], "two jobs of this name"),
        (["--scripts", SCRIPTS[0], SCRIPTS[1], SCRIPTS[0]], "two jobs of this name"),
        (["--scripts", "no.py"], "--scripts no.py: no such file"),
        (["--cpus", "0"], "--cpus 0: must be positive"),
        (["--gpus", "-1"], "--gpus -1: must be at least 0"),
        (["--", "--seed", "3"], "use --envs, --tasks and --seeds"),
        (["--", "--run-dir", "elsewhere"], "--run-dir elsewhere: must stand before --"),
        (["--", "--resume", "a_run"], "--resume and --evaluate: not in a sweep"),
        (["--", "--tau", "2"], "--tau 2.0: must be above 0 and at most 1"),
    ],
)
def test_mistakes_are_found_before_anything_runs(flags, message, sweep_prints, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    args = dict(script="fql.py", args=vars(fql.Args(env=NAME)))
    (run / "config.json").write_text(json.dumps(args))
    flags = [str(run) if flag == "a_run" else flag for flag in flags]
    with pytest.raises(common.UserError, match=re.escape(message)):
        sweep_prints(
            "--scripts", SCRIPTS[1], "--envs", NAME, "--run-dir", tmp_path / "sweep", *flags
        )
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--envs", "Hoper-v5"], "--env Hoper-v5: Environment `Hoper` doesn't exist"),
        (["--envs", "Pendulum-v1", "--tasks", "0", "1"], "--task 1: --env Pendulum-v1 is not an"),
        (["--envs", "Pendulum-v1", "--", "--offline-steps", "9"], "--offline-steps 9: --env Pend"),
    ],
)
def test_mistakes_in_an_environment_without_dataset(flags, message, sweep_prints, tmp_path):
    with pytest.raises(common.UserError, match=re.escape(message)):
        sweep_prints("--scripts", flow_sac.__file__, "--run-dir", tmp_path / "sweep", *flags)
    assert not (tmp_path / "sweep").exists()


def test_scripts_that_cannot_be_swept(sweep_jobs, tmp_path):
    (tmp_path / "qflow.copy.py").write_text(Path(qflow.__file__).read_text())
    (tmp_path / "qflow.py").write_text(Path(qflow.__file__).read_text())
    for paths, message in (
        ([tmp_path / "qflow.copy.py"], "cannot be imported"),
        ([ROOT / "results/own_data.py"], "own_data.py: has no parse_args"),
        ([SCRIPTS[0], tmp_path / "qflow.py"], "scripts need different names"),
    ):
        with pytest.raises(common.UserError, match=message):
            sweep_jobs("--scripts", *paths, "--envs", NAME, "--run-dir", tmp_path / "sweep")


def test_a_mistake_in_a_flag_has_the_message_of_the_script(sweep_prints, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep_prints(
            "--scripts", SCRIPTS[1], "--envs", NAME, "--run-dir", tmp_path, "--", "--lam", 3
        )
    assert "--lam" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_readme_s_command_parses(sweep_prints, monkeypatch, tmp_path):
    command = re.search(r"^python results/sweep\.py (--scripts(?:.*\\\n)*.*)$", README, re.M)[1]
    flags = command.replace("\\\n", " ").split()
    for i, flag in enumerate(flags):
        if flag.endswith(".py"):
            flags[i] = ROOT / flag
    lines = sweep_prints("--run-dir", tmp_path, *flags)
    array = re.search(r"--array=1-(\d+) ", README)[1]
    assert len(lines) == int(array)


# ------------------------------------------------------------------------------- their commands


def main_process(folder):
    """The process of a job's script, of which those of its environments are children."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        if words[0] == sys.executable.encode() and str(folder).encode() in words:
            pids.append(int(path.parent.name))
    return min(pids)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
def test_the_commands_with_xargs_one_of_them_killed(
    sweep_jobs, sweep_prints, tmp_path, monkeypatch
):
    site, home = tmp_path / "site", tmp_path / "home"
    site.mkdir()
    home.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    (home / "collections.txt").touch()
    flags = ["--scripts", *SCRIPTS, "--envs", NAME, "--seeds", 0, 1, "--run-dir", home / "runs"]
    jobs = sweep_jobs(*flags, "--", *FLAGS)[:3]
    commands = sweep_prints(*flags, "--", *FLAGS)[:3]
    first, _, last = (job.folder for job in jobs)
    xargs = shlex.split(re.search(r"^(xargs .*) < jobs.txt", README, re.M)[1])
    xargs[xargs.index("-P") + 1] = "2"

    def start():
        process = subprocess.Popen(
            xargs,
            cwd=home,
            env={**os.environ, "HOME": str(home), "PYTHONPATH": f"{site}:{ROOT}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.stdin.write("\n".join(commands))
        process.stdin.close()
        process.stdin = None
        return process

    process = start()
    while not (first / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(main_process(first), signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 123 and out.count("finished; ") == 2, err
    assert [sweep.is_finished(job) for job in jobs] == [False, True, True]
    until_checkpoint = (first / "train.csv").read_text().splitlines()[: 1 + 100 // 20]
    process = start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.count("finished; ") == 3, err
    assert all(sweep.is_finished(job) for job in jobs)
    assert len((home / "collections.txt").read_text().splitlines()) == 1  # for all jobs
    resumed = (first / "train.csv").read_text().splitlines()
    assert "time_updates_per_s" in resumed[0]  # equal only if these rows were not computed anew
    assert resumed[: len(until_checkpoint)] == until_checkpoint

    monkeypatch.setenv("HOME", str(home))
    for script, folder in ((qflow, first), (fql, last)):
        whole = tmp_path / script.__name__
        monkeypatch.setattr(
            sys, "argv", ["script.py", "--env", NAME, *FLAGS, "--run-dir", str(whole)]
        )
        script.main()
        (whole,) = whole.iterdir()
        assert rows(folder / "train.csv") == rows(whole / "train.csv")
        assert (folder / "eval.csv").read_text() == (whole / "eval.csv").read_text()
        assert len(rows(folder / "train.csv")) == 1 + 15
    torch.set_float32_matmul_precision("highest")


# ------------------------------------------------------------------------------ in Ray's worker


def run_job(code, tmp_path):
    """What sweep.run_job returns for a job of this Python code."""
    return sweep.run_job([sys.executable, "-c", code], dict(A="3"), tmp_path)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs Linux's setpriv")
@pytest.mark.parametrize(
    "code, reason",
    [
        ("import os; print(os.environ['A'])", ""),
        ("import sys; print('one'); print('a reason', file=sys.stderr); sys.exit(2)", "a reason"),
        ("print('x'); raise ValueError('a reason')", "ValueError: a reason"),
        ("import sys; print('one\\n\\ntwo\\n'); sys.exit(2)", "two"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 11)", "Segmentation fault: exit status -11"),
        ("import os; print('one', flush=True); os.abort()", "Aborted: one"),
    ],
)
def test_how_a_job_ends(code, reason, tmp_path):
    assert run_job(code, tmp_path) == reason
    if not reason:
        assert (tmp_path / "output.txt").read_text() == "3\n"


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs Linux's setpriv")
@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 15)", "exit(130)"]
)
def test_a_killed_job_is_not_a_failed_one(end, tmp_path):
    with pytest.raises(ChildProcessError, match="killed"):
        run_job(f"import os; {end}", tmp_path)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs Linux's setpriv")
def test_a_job_waits_for_the_end_of_the_process_before_it(tmp_path, monkeypatch):
    code = f"from filelock import FileLock; FileLock({str(tmp_path / '.lock')!r}, 0).acquire()"
    lock = FileLock(tmp_path / ".lock", thread_local=False)
    lock.acquire()
    threading.Timer(1, lock.release).start()
    assert run_job(code, tmp_path) == ""

    monkeypatch.setattr(sweep, "LOCK_SECONDS", 0.1)
    with lock:
        assert "Timeout" in run_job(code, tmp_path)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs Linux's setpriv")
def test_a_job_ends_with_its_worker(tmp_path):
    output = tmp_path / "output.txt"
    job = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    worker = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "results")!r})
import sweep
sweep.run_job([sys.executable, "-c", {job!r}], dict(), Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", worker])
    while not (output.exists() and output.read_text()) and process.poll() is None:
        time.sleep(0.01)
    pid = int(output.read_text())
    assert Path(f"/proc/{pid}").exists()
    process.kill()
    process.wait()
    deadline = time.perf_counter() + 10
    while Path(f"/proc/{pid}").exists() and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


# ------------------------------------------------------------------------------------ the sweep


def test_gpus_of_a_job(sweep_jobs, monkeypatch):
    cpu = {"CPU": 8.0}
    gpu = {"CPU": 4.0, "GPU": 2.0}

    def choose(devices, machines, *flags):
        argv = ["sweep.py", "--scripts", "a.py", "--envs", "b", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        args, _ = sweep.parse_args()
        return sweep.choose_gpus(args, devices, machines)

    assert choose(["auto"], [cpu]) == 0
    assert choose(["auto"], [cpu, gpu]) == 1
    assert choose(["cpu", "cpu"], [cpu, gpu]) == 0
    assert choose(["auto"], [cpu, gpu], "--gpus", "0.25") == 0.25
    assert choose(["auto"], [cpu, gpu], "--gpus", "0", "--cpus", "8") == 0
    for flags in (["--cpus", "8"], ["--gpus", "3"], ["--cpus", "9", "--gpus", "0"]):
        with pytest.raises(common.UserError, match="no machine has that many"):
            choose(["auto"], [cpu, gpu], *flags)


def test_one_sweep_at_a_time(sweep_jobs, tmp_path, monkeypatch):
    flags = ["--scripts", SCRIPTS[1], "--envs", NAME, "--run-dir", tmp_path, "--", *FLAGS]
    sweep_jobs(*flags)
    monkeypatch.setattr(sweep, "ray", None)
    with FileLock(tmp_path / ".lock"):
        with pytest.raises(common.UserError, match="another sweep runs there"):
            sweep.main()
    with pytest.raises(common.UserError, match="needs Ray"):
        sweep.main()


def test_a_finished_sweep_is_a_table(sweep_jobs, tmp_path, monkeypatch, capfd):
    flags = ["--scripts", *SCRIPTS, "--envs", NAME, "--run-dir", tmp_path, "--", *FLAGS]
    for job in sweep_jobs(*flags):
        sweep.write_config(job)
        torch.save(dict(step=300), job.folder / "checkpoint.pt")
        evaluation = "step,episodes,success,return,length\n300,1,0.5,-9,9\n"
        (job.folder / "eval.csv").write_text(evaluation)
    monkeypatch.setattr(sweep, "ray", None)
    sweep.main()
    out, err = capfd.readouterr()
    assert f"2 jobs in {tmp_path}, 2 of them finished" in out
    assert out.count("50.0 %") == 2 and "| FQL |" in out and "| Q-Flow |" in out, err
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 3


def test_states(sweep_prints, sweep_jobs, tmp_path):
    flags = ["--scripts", SCRIPTS[1], "--envs", NAME, "--seeds", 0, 1, "--run-dir", tmp_path]
    sweep_prints(*flags, "--", *FLAGS)
    queued, running = sweep_jobs(*flags, "--", *FLAGS)
    folder = running.folder
    assert not sweep.is_finished(queued) and sweep.score(queued.folder) == "no score"
    (folder / "output.txt").touch()
    lines = sweep.status([queued, running], 3, 4)
    assert lines[0] == "queued 1, running 1, finished 3, failed 4"
    assert lines[1:] == [f"running   {folder.name}: step 0 of 300"]

    (folder / "train.csv").write_text("step,critic_loss\n20,0.5\n40,0.5\n60,0")  # being written
    (folder / "eval.csv").write_text("step,success,return\n1,1,-1\n2,1,-9\n3,0,-9\n4,.5,-9\n")
    assert sweep.status([running], 0, 0)[1].endswith(": step 40 of 300")
    assert sweep.score(folder) == "success 0.5"
    text = (folder / "eval.csv").read_text()
    (folder / "eval.csv").write_text(re.sub(r"(?<=\d),[.\d]+,", ",nan,", text))
    assert sweep.score(folder) == "return -9"
    (folder / "train.csv").unlink()
    (folder / "train.csv").mkdir()  # cannot be read
    assert sweep.status([running], 0, 0)[1].endswith(": step 0 of 300")

    for step, is_finished in ((299, False), (300, True)):
        torch.save(dict(step=step), folder / "checkpoint.pt")
        assert sweep.is_finished(running) is is_finished
    (folder / "checkpoint.pt").write_bytes(b"damaged")
    assert not sweep.is_finished(running)
