"""Downloads, from a host on this machine that fails in the ways that hosts do."""

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from subprocess import PIPE, Popen
from unittest.mock import Mock

import numpy as np
import pytest

import common

_, NAME, ENV_ID = common.resolve_task("pointmaze-medium-navigate-v0")
SOURCE = f"~/.ogbench/data/{NAME}.npz (official file)"
PROCESS = """
import os, resource, sys, common
print("ready", flush=True)
for line in sys.stdin:
    os.environ["HOME"], url, most = line.split()
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(most), resource.RLIM_INFINITY))
    try:
        print(common.get_dataset(*sys.argv[1:], None, url, "cpu")[1], flush=True)
    except common.UserError as e:
        print("UserError:", e, flush=True)
"""


class Host(ThreadingHTTPServer):  # has the same file under every path
    def __init__(self, body):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url, self.whole, self.ranges = f"http://127.0.0.1:{self.server_port}", body, True
        self.seen, self.sent, self.pause, self.over = [], 0, 0, threading.Event()
        self.handle_error = Answer.log_message = lambda *args: None  # they print
        self.heal()

    def heal(self):
        self.body, self.length, self.stalls = self.whole, str, False
        self.statuses = self.ends = iter(())  # of one answer after the other, then all is well


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        host, asked = self.server, self.headers["Range"]
        host.seen.append((self.path, asked))
        if len(host.seen) > 20:  # a download without end becomes one that wrongly succeeds
            host.heal()
        start = int(asked[6:-1]) if asked and host.ranges else 0
        status = next(host.statuses, 416 if start >= len(host.body) else 200)
        end = next(host.ends, len(host.body))
        if status != 200:
            return self.send_error(status) if status else host.over.wait(60)
        self.send_response(206 if asked and host.ranges else 200)
        self.send_header("Content-Range", f"bytes {start}-{len(host.body) - 1}/{len(host.body)}")
        if (length := host.length(len(host.body) - start)) is not None:
            self.send_header("Content-Length", length)
        self.end_headers()
        for i in range(start, end, 2**16):
            host.over.wait(host.pause)
            host.sent += min(2**16, end - i)  # before anybody can look at it
            self.wfile.write(host.body[i : min(i + 2**16, end)])
        host.over.wait(60 * host.stalls)


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """Two datasets, with noise for more than one of the blocks that are written."""
    path = tmp_path_factory.mktemp("host") / "x.npz"
    common.collect_pointmaze(NAME, path, episodes=1, workers=1)
    arrays, files = {k: v for k, v in np.load(path).items() if k != "source"}, []
    for seed in range(2):  # compressed, as OGBench's files are
        np.savez_compressed(path, **arrays, z=np.random.default_rng(seed).normal(size=150_000))
        files += [path.read_bytes()]
    return files


@pytest.fixture
def host(versions):
    with Host(versions[0]) as host:
        threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()
        yield host
        host.over.set()
        host.shutdown()


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(common, "time", Mock(perf_counter=time.perf_counter))
    (tmp_path / ".ogbench/data").mkdir(parents=True)
    return tmp_path / ".ogbench/data" / f"{NAME}.npz"


def fetch(host, path):
    common.download(f"{host.url}/x.npz", path)
    assert path.read_bytes() == host.body and list(path.parent.iterdir()) == [path]


def fails(host, path, words=""):
    with pytest.raises(common.UserError) as e:
        common.download(f"{host.url}/x.npz", path)
    assert f"{host.url}/x.npz: " in str(e.value) and words in str(e.value)
    assert "\n" not in str(e.value) and not path.exists()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_host_that_dies_half_way_and_one_that_does_not(host, path, ranges):
    half, host.ranges = len(host.body) // 2, ranges
    fetch(host, path)
    assert len(host.seen) == 1 and host.sent == len(host.body)
    path.unlink()
    host.ends, host.sent = iter([half]), 0
    fetch(host, path)
    start = int(host.seen[2][1][6:-1])  # less than half: a block is lost with the connection
    assert len(host.seen) == 3 and half - 2**18 < start <= half
    assert host.sent == half + len(host.body) - start * ranges


@pytest.mark.parametrize("ranges", [True, False])
def test_a_host_that_always_dies_at_the_same_place(host, path, ranges):
    host.ranges, host.ends = ranges, repeat(len(host.body) // 2)
    fails(host, path)
    assert len(host.seen) == 4
    have = path.with_suffix(".npz.part").stat().st_size
    host.heal()
    fetch(host, path)
    assert have > 0 and host.seen[4:] == [("/x.npz", f"bytes={have}-")]


def test_the_fourth_attempt_is_the_last(host, path):
    host.statuses = iter([503, 503, 503])
    fetch(host, path)
    path.unlink()
    host.statuses = iter([503, 503, 503, 503])
    fails(host, path, "503")
    assert len(host.seen) == 8 and host.sent == len(host.body)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_what_an_earlier_process_left_is_continued(host, path, share):
    have = int(share * len(host.body))
    path.with_suffix(".npz.part").write_bytes(host.body[:have])
    fetch(host, path)  # all there: the host says 416
    assert host.seen == [("/x.npz", f"bytes={have}-")] and host.sent == len(host.body) - have


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("left", ["text", "hole", "old", "long"])
def test_what_does_not_belong_to_the_file_is_thrown_away(host, path, versions, left, ranges):
    n, host.ranges = len(host.body), ranges
    start = host.body.index(b"z.npy") + 5  # zeros are no deflate stream: zlib.error
    hole = host.body[:start] + bytes(9999) + host.body[start + 9999 : n // 2]
    wrong = dict(text=b"?" * 999, hole=hole, old=versions[1][: n // 2], long=b"?" * 2 * n)
    path.with_suffix(".npz.part").write_bytes(wrong[left])
    fetch(host, path)
    assert len(host.seen) == 1 + ranges


@pytest.mark.parametrize("half", [False, True])
def test_a_host_that_stalls(host, path, monkeypatch, half):
    host.stalls, host.ends = True, repeat(len(host.body) // 2)
    host.statuses, get = repeat(200 if half else None), common.requests.get
    hasty = Mock(side_effect=lambda *args, **kw: get(*args, **{**kw, "timeout": (0.5, 0.5)}))
    monkeypatch.setattr(common.requests, "get", hasty)
    fails(host, path)
    assert len(host.seen) == 4 and path.with_suffix(".npz.part").exists() == half
    seconds = [np.max(call.kwargs["timeout"]) for call in hasty.mock_calls]  # connect or read
    seconds += [call.args[0] for call in common.time.sleep.mock_calls]
    assert len(seconds) == 8 and sum(seconds) <= 30


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("end", [1, 0.5])
@pytest.mark.parametrize("lie", [999, -999, "many", None])
def test_a_host_that_lies_about_the_length(host, path, lie, end, ranges):
    host.length = lambda n: str(n + lie) if isinstance(lie, int) else lie
    host.ranges, host.ends = ranges, repeat(int(end * len(host.body)))
    (fetch if lie is None and end == 1 else fails)(host, path)
    assert len(host.seen) <= 4


@pytest.mark.parametrize("status, seen", [(200, 1), (416, 1), (403, 4), (404, 4), (503, 4)])
def test_a_host_that_refuses(host, path, status, seen):
    host.statuses, host.body = repeat(status), b"<html>Log in first</html>"
    fails(host, path, "not an npz file" if seen == 1 else str(status))
    assert len(host.seen) == seen and not list(path.parent.iterdir())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/nobody", "nonsense", "ftp://x/y"])
def test_without_a_host_the_ways_out_are_named(path, url):
    with pytest.raises(common.UserError) as e:
        common.get_dataset(NAME, ENV_ID, None, url, "cpu")
    for words in (f"{url}/{path.name}", "--dataset,", "--dataset-url", str(path.parent)):
        assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("end", ["", "/folder", "/folder/", "/other.npz"])
def test_a_given_url_comes_before_collecting(host, path, monkeypatch, end):
    monkeypatch.setattr(common, "collect_pointmaze", None)
    for _ in range(2):  # downloaded once, used twice
        dataset, source = common.get_dataset(NAME, ENV_ID, None, host.url + end, "cpu")
        assert len(dataset) == 1000 and source == SOURCE and path.read_bytes() == host.body
    wanted = end if end.endswith("npz") else f"{end.removesuffix('/')}/{path.name}"
    assert [seen for seen, _ in host.seen] == [wanted]


@pytest.fixture(scope="module")
def process():
    """Another process, which calls get_dataset when told home, url and how large files may be."""
    options = dict(cwd=Path(common.__file__).parent, stdin=PIPE, stdout=PIPE, text=True, bufsize=1)
    with Popen([sys.executable, "-c", PROCESS, NAME, ENV_ID], **options) as process:
        assert process.stdout.readline() == "ready\n"
        yield process


def test_a_full_disk(host, path, process, tmp_path):
    print(tmp_path, host.url, 600_000, file=process.stdin)
    assert f"UserError: {path.parent}: cannot write there: " in process.stdout.readline()
    assert not path.exists() and path.with_suffix(".npz.part").stat().st_size == 600_000
    common.get_dataset(NAME, ENV_ID, None, host.url, "cpu")  # there is room again
    assert host.seen[1][1] == "bytes=600000-" and path.read_bytes() == host.body


def test_a_file_that_cannot_be_put_in_place_is_kept(host, path, monkeypatch):
    monkeypatch.setattr(Path, "rename", Mock(side_effect=PermissionError(13, "Denied")))
    with pytest.raises(common.UserError, match=f"{path.parent}: cannot write there: .*Denied"):
        common.get_dataset(NAME, ENV_ID, None, host.url, "cpu")
    assert path.with_suffix(".npz.part").read_bytes() == host.body


def test_two_processes_want_the_same_file(host, path, process, tmp_path):
    host.pause = 0.1
    print(tmp_path, host.url, 2**40, file=process.stdin)
    assert common.get_dataset(NAME, ENV_ID, None, host.url, "cpu")[1] == SOURCE
    assert process.stdout.readline() == f"{SOURCE}\n"
    assert len(host.seen) == 1 and path.read_bytes() == host.body
