"""results/sweep.py without Ray: its jobs, and their commands as another engine runs them.

What Ray does is checked by results/sweep/check_ray.py, SLURM by check_slurm.sh beside it.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

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


# ----------------------------------------------------------------------------------------- jobs


def test_a_job_for_each_script_environment_task_and_seed(sweep_prints, tmp_path):
    envs = ["cube-single-play-v0", "antmaze-giant-navigate-v0"]
    flags = ["--scripts", *SCRIPTS, "--envs", *envs, "--tasks", 2, 3, "--seeds", 0, 7]
    flags += ["--run-dir", tmp_path, "--cpus", 2.5, "--", "--hidden", 8, 9, "--dataset", "a b.npz"]
    commands = sweep_prints(*flags)
    assert len({command.split()[-1] for command in commands}) == len(commands) == 16
    threads, *words = shlex.split(commands[-1])
    folder = words.pop()
    name = r"antmaze-giant-navigate-singletask-task3-v0__fql__7__\w{8}"
    assert re.fullmatch(f"{tmp_path}/{name}", folder)
    assert threads == "OMP_NUM_THREADS=2" and words[:2] == [sys.executable, SCRIPTS[1]]
    expected = "--env antmaze-giant-navigate-v0 --task 3 --seed 7 --hidden 8 9 --dataset".split()
    assert words[2:] == [*expected, "a b.npz", "--start-or-resume"]
    assert not list(tmp_path.iterdir())

    others = sweep_prints(*flags[:-1], "c.npz")
    assert not set(others) & set(commands)
    assert sweep_prints(*flags) == commands


def test_nothing_but_commands_is_printed(sweep_prints, tmp_path):
    flags = ["--scripts", SCRIPTS[1], "--envs", "antsoccer-arena-navigate-v0", "--seeds", 0, 1]
    flags += ["--cpus", 0.5, "--run-dir", tmp_path]
    lines = sweep_prints(*flags, "--", "--online-steps", 9)
    assert [line.split()[0] for line in lines] == ["OMP_NUM_THREADS=1"] * 2


def test_an_environment_without_dataset(sweep_jobs, tmp_path):
    script = ROOT / "flow_sac.py"
    (job,) = sweep_jobs(
        "--scripts", script, "--envs", "Hopper-v5", "--run-dir", tmp_path, "--", "--hidden", 8
    )
    assert job.folder.name.startswith("Hopper-v5__flow_sac__0__")
    assert job.last_step == 1_000_000


def test_a_run_with_other_settings_is_not_continued(sweep_jobs, tmp_path):
    flags = ["--scripts", SCRIPTS[0], "--envs", NAME, "--run-dir", tmp_path, "--", *FLAGS]
    (job,) = sweep_jobs(*flags)
    job.folder.mkdir()
    path = job.folder / "config.json"
    settings = vars(qflow.Args(env=NAME, **qflow.SETTINGS["pointmaze"]))
    settings |= dict(device="cpu", hidden=(8,), batch_size=16, offline_steps=300)
    settings |= dict(eval_interval=100, log_interval=20, eval_episodes=1)
    settings |= dict(resume="", start_or_resume=str(job.folder))
    del settings["sparse"]  # as if the script had not had it then
    path.write_text(json.dumps(dict(script="qflow.py", args=settings)))
    assert sweep_jobs(*flags) == [job]

    path.write_text(json.dumps(dict(script="qflow.py", args=dict(settings, offline_steps=500))))
    with pytest.raises(common.UserError, match="offline_steps was 500, would be 300; use another"):
        sweep_jobs(*flags)
    path.write_text("{")
    with pytest.raises(common.UserError, match="damaged"):
        sweep_jobs(*flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--tasks", "6"], "--task 6: no such environment"),
        (["--envs", NAME, "pointmaze-mediun-navigate-v0"], f"closest: {TASK}"),
        (["--envs", "Hopper-v5"], "--env Hopper-v5: no such environment"),
        (["--seeds", "0", "0"], "two jobs of this name"),
        (["--envs", NAME, TASK], "two jobs of this name"),
        (["--scripts", SCRIPTS[0], SCRIPTS[1], SCRIPTS[0]], "two jobs of this name"),
        (["--scripts", "no.py"], "--scripts no.py: no such file"),
        (["--scripts", flow_sac.__file__, "--envs", "Hoper-v5"], "Environment `Hoper` doesn't"),
        (
            ["--scripts", flow_sac.__file__, "--envs", "Hopper-v5", "--tasks", "1", "2"],
            "--tasks 1: --env Hopper-v5 is not an OGBench dataset",
        ),
        (["--cpus", "0"], "--cpus 0: must be positive"),
        (["--gpus", "-1"], "--gpus -1: must be at least 0"),
        (["--", "--seed", "3"], "--seed: use --seeds, before --"),
        (["--", "--run_dir=elsewhere"], "--run-dir: the sweep chooses the folders"),
        (["--", "--resume", "a_run"], "--resume: the sweep chooses the folders"),
        (["--", "--tau", "2"], "--tau 2.0: must be at most 1"),
    ],
)
def test_mistakes_are_found_before_anything_runs(flags, message, sweep_prints, tmp_path):
    run_dir = tmp_path / "sweep"
    with pytest.raises(common.UserError, match=re.escape(message)):
        sweep_prints("--scripts", SCRIPTS[1], "--envs", NAME, "--run-dir", run_dir, *flags)
    assert not run_dir.exists()


def test_a_mistake_in_a_flag_has_the_message_of_the_script(sweep_prints, capsys):
    with pytest.raises(SystemExit):
        sweep_prints("--scripts", SCRIPTS[1], "--envs", NAME, "--", "--lam", 3)
    assert "--lam" in capsys.readouterr().err


def test_scripts_that_cannot_be_swept(sweep_jobs, tmp_path):
    (tmp_path / "qflow.copy.py").write_text(Path(qflow.__file__).read_text())
    (tmp_path / "qflow.py").write_text(Path(qflow.__file__).read_text())
    for paths, message in (
        ([tmp_path / "qflow.copy.py"], "cannot be imported"),
        ([ROOT / "results/table.py"], "table.py: has no parse_args"),
        ([SCRIPTS[0], tmp_path / "qflow.py"], "scripts need different names"),
    ):
        with pytest.raises(common.UserError, match=message):
            sweep_jobs("--scripts", *paths, "--envs", NAME, "--run-dir", tmp_path / "sweep")


def test_the_docstring_s_command_parses(sweep_prints, tmp_path):
    command = re.search(r"sweep\.py (--scripts qflow.*\\\n.*)$", sweep.__doc__, re.M)[1]
    flags = command.replace("\\\n", " ").replace("qflow.py fql.py", " ".join(SCRIPTS)).split()
    assert len(sweep_prints("--run-dir", tmp_path, *flags)) == 2 * 5 * 3


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


def rows(path):
    """The lines of train.csv without its last column, the speed."""
    return [line.rpartition(",")[0] for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs Linux's /proc")
def test_the_commands_with_xargs_one_of_them_killed(
    sweep_jobs, sweep_prints, tmp_path, monkeypatch
):
    site, home = tmp_path / "site", tmp_path / "home"
    site.mkdir()
    home.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    (home / "collections.txt").touch()
    environment = dict(OGBENCH_DATA=str(home / "data"), PYTHONPATH=f"{site}:{ROOT}")
    flags = ["--scripts", *SCRIPTS, "--envs", NAME, "--run-dir", home / "runs"]
    jobs = sweep_jobs(*flags, "--", *FLAGS)
    commands = sweep_prints(*flags, "--", *FLAGS)
    first, last = (job.folder for job in jobs)
    xargs = shlex.split(re.search(r"(xargs .*) < jobs.txt", sweep.__doc__)[1])
    xargs[xargs.index("-P") + 1] = "2"

    def start():
        process = subprocess.Popen(
            xargs,
            cwd=home,
            env={**os.environ, **environment},
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
    assert process.returncode == 123 and out.count("finished; ") == 1, err
    assert [sweep.is_finished(job) for job in jobs] == [False, True]
    until_checkpoint = (first / "train.csv").read_text().splitlines()[: 1 + 100 // 20]
    process = start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and out.count("finished; ") == 2, err
    assert "changed: " not in out
    assert all(sweep.is_finished(job) for job in jobs)
    assert len((home / "collections.txt").read_text().splitlines()) == 1  # for all jobs
    resumed = (first / "train.csv").read_text().splitlines()
    assert "steps_per_s" in resumed[0]  # equal only if these rows were not computed anew
    assert resumed[: len(until_checkpoint)] == until_checkpoint

    monkeypatch.setenv("OGBENCH_DATA", str(home / "data"))
    for script, folder in ((qflow, first), (fql, last)):
        whole = tmp_path / script.__name__
        monkeypatch.setattr(
            sys, "argv", ["script.py", "--env", NAME, *FLAGS, "--start-or-resume", str(whole)]
        )
        script.main()
        assert rows(folder / "train.csv") == rows(whole / "train.csv")
        assert (folder / "eval.csv").read_text() == (whole / "eval.csv").read_text()
        assert len(rows(folder / "train.csv")) == 1 + 15
    torch.set_float32_matmul_precision("highest")


# ------------------------------------------------------------------------------ in Ray's worker


def run_job(code, folder):
    """What sweep.run_job returns for a job of this Python code."""
    return sweep.run_job([sys.executable, "-c", code], dict(A="3"), folder, "/")


@pytest.mark.parametrize(
    "code, reason",
    [
        ("import os; print(os.environ['A'] + os.getcwd())", ""),
        ("import sys; print('one'); print('a reason', file=sys.stderr); sys.exit(2)", "a reason"),
        ("import sys; print('one\\n\\ntwo\\n'); sys.exit(2)", "two"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 11)", "Segmentation fault: exit status -11"),
    ],
)
def test_how_a_job_ends(code, reason, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # it needs no other program
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    assert run_job(code, tmp_path / "job") == reason
    if not reason:
        assert (tmp_path / "job/output.txt").read_text() == "3/\n"


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), 9)", "os.kill(os.getpid(), 15)", "exit(130)"]
)
def test_a_killed_job_is_not_a_failed_one(end, tmp_path):
    with pytest.raises(ChildProcessError, match="killed"):
        run_job(f"import os; {end}", tmp_path)


def test_the_score_of_a_finished_job_is_its_own_line(tmp_path):
    run_job("print('finished; earlier')", tmp_path)
    run_job("print('finished; mean of 1: success 0.5'); print('wandb: goodbye')", tmp_path)
    assert (tmp_path / "output.txt").read_text().startswith("finished; earlier\n")
    assert sweep.last_words(tmp_path) == "finished; mean of 1: success 0.5"
    (tmp_path / "output.txt").write_text("")
    assert sweep.last_words(tmp_path) == "finished"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
def test_a_job_ends_with_its_worker(tmp_path):
    output = tmp_path / "output.txt"
    job = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    worker = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "results")!r})
import sweep
sweep.run_job([sys.executable, "-c", {job!r}], dict(), Path({str(tmp_path)!r}), None)
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


def test_gpus_of_a_job(monkeypatch):
    cpu = {"CPU": 8.0}
    gpu = {"CPU": 4.0, "GPU": 2.0}

    def choose(machines, *flags):
        argv = ["sweep.py", "--scripts", "a.py", "--envs", "b", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        args, _ = sweep.parse_args()
        return sweep.choose_gpus(args, machines)

    assert choose([cpu]) == 0
    assert choose([cpu, gpu]) == 1
    assert choose([cpu, gpu], "--gpus", "0.25") == 0.25
    assert choose([cpu, gpu], "--gpus", "0", "--cpus", "8") == 0
    for flags in (["--cpus", "8"], ["--gpus", "3"], ["--cpus", "9", "--gpus", "0"]):
        with pytest.raises(common.UserError, match="no machine has that many"):
            choose([cpu, gpu], *flags)


def test_a_sweep_with_a_failed_job_ends_with_1(sweep_jobs, tmp_path, monkeypatch, capsys):
    (job,) = sweep_jobs("--scripts", SCRIPTS[1], "--envs", NAME, "--run-dir", tmp_path)
    monkeypatch.setattr(sweep, "run_with_ray", lambda jobs, args: {job.folder: "a reason"})
    with pytest.raises(SystemExit, match="^1$"):
        sweep.main()
    assert "a reason" in capsys.readouterr().out


def test_steps_done_and_finished(sweep_jobs, tmp_path, monkeypatch):
    flags = ["--scripts", SCRIPTS[1], "--envs", NAME, "--seeds", 0, 1, 2, "--run-dir", tmp_path]
    jobs = sweep_jobs(*flags, "--", *FLAGS)
    started, logging, empty = (job.folder for job in jobs)
    for folder in (started, logging, empty):
        folder.mkdir()
    (started / "train.csv").write_text("step,critic_lo")
    (logging / "train.csv").write_text("step,critic_loss\n20,0.5\n40,0.5\n60,0")  # being written
    assert sweep.steps_done(jobs) == 40
    for step, is_finished in ((299, False), (300, True)):
        torch.save(dict(step=step), logging / "checkpoint.pt")
        assert sweep.is_finished(jobs[1]) is is_finished
    (logging / "checkpoint.pt").write_bytes(b"damaged")
    assert not sweep.is_finished(jobs[1]) and not sweep.is_finished(jobs[2])

    monkeypatch.setattr(sweep, "ray", None)
    with pytest.raises(common.UserError, match="needs Ray"):
        sweep.main()


@pytest.mark.slow
def test_a_finished_sweep_is_a_table(sweep_jobs, tmp_path, monkeypatch, capfd):
    flags = ["--scripts", *SCRIPTS, "--envs", NAME, "--run-dir", tmp_path]
    flags += ["--", *FLAGS, "--offline-steps", 3]
    monkeypatch.setenv("OGBENCH_DATA", str(tmp_path / "data"))
    path = tmp_path / "data/collected" / f"{NAME}.npz"
    path.parent.mkdir(parents=True)
    common.collect_pointmaze(NAME, path, num_episodes=2, workers=1)
    for job in sweep_jobs(*flags):
        subprocess.run(job.command, check=True)
    monkeypatch.setattr(sweep, "ray", None)
    sweep.main()
    out, err = capfd.readouterr()
    assert f"2 jobs in {tmp_path}, 2 of them finished" in out
    assert "| FQL |" in out and "| Q-Flow |" in out, err
    assert len((tmp_path / "table.csv").read_text().splitlines()) == 3
