"""Downloads, from a host on this machine that fails in the ways that hosts do."""

import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import common

_, NAME, ENV_ID = common.resolve_task("pointmaze-medium-navigate-v0")
DESCRIPTION = "1000 transitions, 1 episodes, no source stated, as in OGBench files"
BLOCK = 2**16

# Another process: for each line "HOME URL BYTES", get_dataset with files of at most so many bytes.
OTHER_PROCESS = """
import os, resource, sys, common
print("ready", flush=True)
for line in sys.stdin:
    os.environ["HOME"], url, limit = line.split()
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    try:
        print(common.get_dataset(*sys.argv[1:], url=url)[1], flush=True)
    except common.UserError as error:
        print("UserError:", error, flush=True)
"""


class Host(ThreadingHTTPServer):
    """A web server that has the same file under every path."""

    def __init__(self, file):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.file = file
        self.knows_ranges = True
        self.seen = []  # (path, Range) of each request
        self.sent = 0  # bytes
        self.seconds_per_block = 0
        self.test_is_over = threading.Event()
        self.behave()

    def behave(self):
        """From now on, answer well."""
        self.body = self.file
        self.claimed_length = str  # of the true one, the header's text; None: no such header
        self.stalls = False
        self.statuses = iter(())  # of one answer after the other; None: no answer
        self.ends = iter(())  # where one answer after the other stops

    def handle_error(self, *args):
        """Print nothing when the client goes away."""


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        host = self.server
        asked_for = self.headers["Range"]
        host.seen.append((self.path, asked_for))
        if len(host.seen) > 20:  # a download without end becomes one that wrongly succeeds
            host.behave()
        is_part = asked_for and host.knows_ranges
        start = int(asked_for.removeprefix("bytes=").removesuffix("-")) if is_part else 0
        size = len(host.body)
        status = next(host.statuses, 416 if start >= size else 200)
        end = next(host.ends, size)
        if status is None:
            host.test_is_over.wait(60)
            return
        if status != 200:
            self.send_error(status)
            return
        self.send_response(206 if is_part else 200)
        self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        length = host.claimed_length(size - start)
        if length is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        for i in range(start, end, BLOCK):
            host.test_is_over.wait(host.seconds_per_block)
            block = host.body[i : min(i + BLOCK, end)]
            host.sent += len(block)  # before anybody can look at it
            self.wfile.write(block)
        if host.stalls:
            host.test_is_over.wait(60)

    def log_message(self, *args):
        """Print nothing."""


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Two datasets, with noise for more than one of the blocks that are written."""
    path = tmp_path_factory.mktemp("host") / "x.npz"
    common.collect_pointmaze(NAME, path, num_episodes=1, workers=1)
    with np.load(path) as file:
        arrays = {name: array for name, array in file.items() if name != "source"}
    files = []
    for seed in range(2):
        noise = np.random.default_rng(seed).normal(size=150_000)
        np.savez_compressed(path, **arrays, noise=noise)  # compressed, as OGBench's files are
        files.append(path.read_bytes())
    return files


@pytest.fixture
def host(versions):
    with Host(versions[0]) as host:
        threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()
        yield host
        host.test_is_over.set()
        host.shutdown()


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """Where the official file belongs in a home that is empty; common does not wait."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(common, "time", Mock())
    folder = tmp_path / ".ogbench/data"
    folder.mkdir(parents=True)
    return folder / f"{NAME}.npz"


def part_of(path):
    return path.with_name(f"{path.name}.part")


def succeeds(host, path):
    """Download; the file must be there and nothing else."""
    common.download(NAME, f"{host.url}/x.npz", path)
    assert path.read_bytes() == host.body and list(path.parent.iterdir()) == [path]


def fails(host, path, words=""):
    """Download; there must be a message of one line and no file."""
    with pytest.raises(common.UserError) as error:
        common.download(NAME, f"{host.url}/x.npz", path)
    message = str(error.value)
    assert message.startswith(f"{host.url}/x.npz: download failed") and words in message
    assert "\n" not in message and not path.exists()


# --------------------------------------------------------------------- hosts that break off


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_host_that_dies_half_way_and_one_that_does_not(host, path, knows_ranges):
    size = len(host.body)
    half = size // 2
    host.knows_ranges = knows_ranges
    succeeds(host, path)
    assert len(host.seen) == 1 and host.sent == size
    path.unlink()
    host.ends = iter([half])
    host.sent = 0
    succeeds(host, path)
    assert len(host.seen) == 3
    start = int(host.seen[2][1].removeprefix("bytes=").removesuffix("-"))
    assert half - 2**18 < start <= half  # less than half: a block is lost with the connection
    assert host.sent == half + (size - start if knows_ranges else size)


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_host_that_always_dies_at_the_same_place(host, path, knows_ranges):
    host.knows_ranges = knows_ranges
    host.ends = repeat(len(host.body) // 2)
    fails(host, path)
    assert len(host.seen) == 4
    size = part_of(path).stat().st_size
    assert size > 0
    host.behave()
    succeeds(host, path)
    assert host.seen[4:] == [("/x.npz", f"bytes={size}-")]


def test_the_fourth_attempt_is_the_last(host, path):
    host.statuses = iter([503, 503, 503])
    succeeds(host, path)
    path.unlink()
    host.statuses = iter([503, 503, 503, 503])
    fails(host, path, "503")
    assert len(host.seen) == 8 and host.sent == len(host.body)


@pytest.mark.parametrize("after_half", [False, True])
def test_a_host_that_stalls(host, path, monkeypatch, after_half):
    host.stalls = True
    host.ends = repeat(len(host.body) // 2)
    host.statuses = repeat(200 if after_half else None)
    get = common.requests.get
    timeouts = []

    def hasty_get(*args, timeout, **kwargs):
        timeouts.append(max(timeout))  # of connecting and reading
        return get(*args, timeout=(0.3, 0.3), **kwargs)

    monkeypatch.setattr(common.requests, "get", hasty_get)
    fails(host, path)
    assert len(host.seen) == 4 and part_of(path).exists() == after_half
    waits = [call.args[0] for call in common.time.sleep.mock_calls]
    assert len(timeouts) == len(waits) == 4
    assert sum(timeouts) + sum(waits) <= 30


# ------------------------------------------------------------------------ what was there before


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_what_an_earlier_process_left_is_continued(host, path, share):
    size = int(share * len(host.body))
    part_of(path).write_bytes(host.body[:size])
    succeeds(host, path)  # all there: the host says 416
    assert host.seen == [("/x.npz", f"bytes={size}-")]
    assert host.sent == len(host.body) - size


@pytest.mark.parametrize("knows_ranges", [True, False])
@pytest.mark.parametrize("left", ["text", "hole", "old", "long"])
def test_what_does_not_belong_to_the_file_is_thrown_away(host, path, versions, left, knows_ranges):
    host.knows_ranges = knows_ranges
    half = len(host.body) // 2
    start = host.body.index(b"noise.npy") + 9  # zeros are no deflate stream: zlib.error
    contents = dict(
        text=b"?" * 999,
        hole=host.body[:start] + bytes(9999) + host.body[start + 9999 : half],
        old=versions[1][:half],
        long=b"?" * 4 * half,
    )
    part_of(path).write_bytes(contents[left])
    succeeds(host, path)
    assert len(host.seen) == (2 if knows_ranges else 1)


def test_a_file_that_is_there_is_replaced(host, path):
    path.write_bytes(b"an old file")
    succeeds(host, path)


def test_a_file_that_cannot_be_put_in_place_is_kept(host, path, monkeypatch):
    denied = Mock(side_effect=PermissionError(13, "Denied"))
    monkeypatch.setattr(common.os, "replace", denied)
    with pytest.raises(common.UserError, match=f"{path.parent}: cannot write there: .*Denied"):
        common.get_dataset(NAME, ENV_ID, url=host.url)
    assert part_of(path).read_bytes() == host.body and not path.exists()


# ------------------------------------------------------------------------------ hosts that lie


@pytest.mark.parametrize("knows_ranges", [True, False])
@pytest.mark.parametrize("share", [1, 0.5])
@pytest.mark.parametrize("claim", ["too much", "too little", "no number", "nothing"])
def test_a_host_that_lies_about_the_length(host, path, claim, share, knows_ranges):
    claims = {
        "too much": lambda length: str(length + 999),
        "too little": lambda length: str(length - 999),
        "no number": lambda length: "many",
        "nothing": lambda length: None,
    }
    host.claimed_length = claims[claim]
    host.knows_ranges = knows_ranges
    host.ends = repeat(int(share * len(host.body)))
    if claim == "nothing" and share == 1:
        succeeds(host, path)
    else:
        fails(host, path)
    assert len(host.seen) <= 4


@pytest.mark.parametrize("status, requests", [(200, 1), (416, 1), (403, 4), (404, 4), (503, 4)])
def test_a_host_that_refuses(host, path, status, requests):
    host.statuses = repeat(status)
    host.body = b"<html>Log in first</html>"
    fails(host, path, "not an npz file" if requests == 1 else str(status))
    assert len(host.seen) == requests and not list(path.parent.iterdir())


# ---------------------------------------------------------------------------------- get_dataset


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/nobody", "nonsense", "ftp://x/y", "http://["])
def test_without_a_host_the_ways_out_are_named(path, monkeypatch, url):
    monkeypatch.setattr(sys, "argv", ["/somewhere/fql.py", "--seed", "3"])
    with pytest.raises(common.UserError) as error:
        common.get_dataset(NAME, ENV_ID, url=url)
    message = str(error.value)
    mirror = "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main"
    assert message.startswith(f"{url}/{path.name}: download failed") and "\n" not in message
    assert f"python fql.py --env {NAME} --dataset-url {mirror}, " in message
    assert f"put {path.name} into {path.parent} by hand" in message
    assert "--dataset" in message.split()


@pytest.mark.parametrize("end", ["", "/folder", "/folder/", "/other.npz"])
def test_a_given_url_comes_before_collecting(host, path, monkeypatch, end):
    monkeypatch.setattr(common, "collect_pointmaze", None)
    for _ in range(2):  # downloaded once, used twice
        dataset, description = common.get_dataset(NAME, ENV_ID, url=host.url + end)
        assert len(dataset) == 1000 and description == DESCRIPTION
        assert path.read_bytes() == host.body
    wanted = end if end.endswith(".npz") else f"{end.removesuffix('/')}/{path.name}"
    assert [seen for seen, _ in host.seen] == [wanted]


@pytest.fixture(scope="module")
def other_process():
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, NAME, ENV_ID],
        cwd=Path(common.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # progress bars
        text=True,
        bufsize=1,
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        yield process


def test_a_full_disk(host, path, other_process, tmp_path):
    print(tmp_path, host.url, 600_000, file=other_process.stdin)
    answer = other_process.stdout.readline()
    assert answer.startswith(f"UserError: {path.parent}: cannot write there: ")
    assert not path.exists() and part_of(path).stat().st_size == 600_000
    common.get_dataset(NAME, ENV_ID, url=host.url)  # there is room again
    assert host.seen[1][1] == "bytes=600000-" and path.read_bytes() == host.body


def test_two_processes_want_the_same_file(host, path, other_process, tmp_path):
    host.seconds_per_block = 0.1
    print(tmp_path, host.url, 2**40, file=other_process.stdin)
    assert common.get_dataset(NAME, ENV_ID, url=host.url)[1] == DESCRIPTION
    assert other_process.stdout.readline() == f"{DESCRIPTION}\n"
    assert len(host.seen) == 1 and path.read_bytes() == host.body
