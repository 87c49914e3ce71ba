"""Downloads, from a host on this machine that fails in the ways that hosts do."""

import re
import resource
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest.mock import Mock

import numpy as np
import ogbench
import pytest

import common

NAME = "pointmaze-medium-stitch-v0"  # not one that is collected
_, _, ENV_ID = common.resolve_task(NAME)
DESCRIPTION = "1000 transitions, 1 episodes, no source stated, as in OGBench files"
DESCRIPTION += ", downloaded from"  # and the URL
BLOCK = 2**16


class Host(ThreadingHTTPServer):
    """A web server that has the same file under every path that does not start with /broken."""

    def __init__(self, file):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.file = file
        self.seen = []  # the path of each request
        self.fault = ""  # of the answers below /broken
        self.seconds_per_block = 0
        self.test_is_over = threading.Event()

    def handle_error(self, *args):
        """Print nothing when the client goes away."""


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        host = self.server
        host.seen.append(self.path)
        fault = host.fault if self.path.startswith("/broken") else ""
        if fault == "stalls":
            host.test_is_over.wait(60)
            return
        if fault.isdigit():
            self.send_error(int(fault))
            return
        body = b"<html>Log in first</html>" if fault == "login page" else host.file
        lengths = {"too long": len(body) + 999, "too short": len(body) - 999, "no number": "many"}
        end = len(body)
        if fault.startswith("half"):
            end = len(body) // 2
        self.send_response(200)
        if fault not in ("half, no length", "no length"):
            self.send_header("Content-Length", str(lengths.get(fault, len(body))))
        self.end_headers()
        for i in range(0, end, BLOCK):
            host.test_is_over.wait(host.seconds_per_block)
            self.wfile.write(body[i : min(i + BLOCK, end)])
        if fault == "half, then stalls":
            self.wfile.flush()
            host.test_is_over.wait(60)

    def log_message(self, *args):
        """Print nothing."""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A dataset of one episode, with noise for more than one of the blocks that are written."""
    path = tmp_path_factory.mktemp("host") / "x.npz"
    common.collect_pointmaze("pointmaze-medium-navigate-v0", path, num_episodes=1, workers=1)
    with np.load(path) as file:
        arrays = {name: array for name, array in file.items() if name != "source"}
    noise = np.random.default_rng(0).normal(size=150_000)
    np.savez_compressed(path, **arrays, noise=noise)  # compressed, as OGBench's files are
    return path.read_bytes()


@pytest.fixture
def host(file, monkeypatch):
    """The host; OGBench's own is its folder /broken, the mirror its folder /mirror."""
    with Host(file) as host:
        threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(ogbench.utils, "DATASET_URL", f"{host.url}/broken")
        monkeypatch.setattr(common, "MIRROR", f"{host.url}/mirror")
        get = common.requests.get

        def hasty_get(*args, timeout, **kwargs):
            assert 2 * timeout[0] <= 30  # seconds, if neither host can be reached
            return get(*args, timeout=0.3, **kwargs)

        monkeypatch.setattr(common.requests, "get", hasty_get)
        yield host
        host.test_is_over.set()
        host.shutdown()


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """Where the official file belongs."""
    monkeypatch.setenv("OGBENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("NO_PROXY", "*")
    return tmp_path / "data" / f"{NAME}.npz"


def visible_files(folder):
    """All files below a folder but the locks and the notes on sources."""
    hidden = (".lock", ".source")
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix not in hidden]


FAULTS = [
    ("404", "404 Client Error"),
    ("stalls", "timed out"),
    ("half", "download failed"),
    ("half, then stalls", "timed out"),
    ("half, no length", "not an npz file"),
    ("too long", "download failed"),
    ("too short", "not an npz file"),
    ("no number", "download failed"),
    ("login page", "not an npz file"),
]


@pytest.mark.parametrize("fault, reason", FAULTS)
def test_the_mirror_is_tried_after_the_official_host(host, path, capsys, fault, reason):
    host.fault = fault
    dataset, description = common.get_dataset(NAME, ENV_ID)
    assert len(dataset) == 1000 and description == f"{DESCRIPTION} {host.url}/mirror/{NAME}.npz"
    assert host.seen == [f"/broken/{NAME}.npz", f"/mirror/{NAME}.npz"]
    assert path.read_bytes() == host.file and visible_files(path.parent) == [path]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{host.url}/broken/{NAME}.npz: ") and reason in line
    assert line.endswith(f"; trying {host.url}/mirror/{NAME}.npz")


@pytest.mark.parametrize("fault", ["", "no length"])
def test_an_official_host_that_works_is_enough(host, path, capsys, fault):
    host.fault = fault
    for _ in range(2):  # downloaded once, used twice
        dataset, description = common.get_dataset(NAME, ENV_ID)
        assert len(dataset) == 1000 and description == f"{DESCRIPTION} {host.url}/broken/{NAME}.npz"
    assert host.seen == [f"/broken/{NAME}.npz"]
    assert path.read_bytes() == host.file and visible_files(path.parent) == [path]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("fault", ["404", "half"])
def test_without_a_host_the_ways_out_are_named(host, path, monkeypatch, fault):
    monkeypatch.setattr(common, "MIRROR", f"{host.url}/broken/mirror")
    host.fault = fault
    with pytest.raises(common.UserError) as error:
        common.get_dataset(NAME, ENV_ID)
    message = str(error.value)
    for folder in ("broken", "broken/mirror"):
        assert f"{host.url}/{folder}/{NAME}.npz: " in message
    assert f"put {NAME}.npz into {path.parent} by hand" in message
    assert "--dataset" in message and "python results/" not in message
    assert len(host.seen) == 2 and visible_files(path.parent) == []
    host.fault = ""  # the same process tries again, and no lock is in its way
    assert common.get_dataset(NAME, ENV_ID)[1].startswith(DESCRIPTION)


@pytest.mark.parametrize("end", ["mine.npz", "a/mine.npz?download=true"])
def test_a_url_is_downloaded_once(host, path, monkeypatch, end):
    monkeypatch.setattr(common, "collect_pointmaze", None)
    navigate = "pointmaze-medium-navigate-v0"
    for _ in range(2):
        dataset, description = common.get_dataset(navigate, ENV_ID, f"{host.url}/{end}")
        assert len(dataset) == 1000 and description == f"{DESCRIPTION} {host.url}/{end}"
    assert host.seen == [f"/{end}"]
    (downloaded,) = visible_files(path.parent)
    assert downloaded.parent == path.parent / "downloaded" and downloaded.name.endswith("mine.npz")
    assert downloaded.read_bytes() == host.file
    common.get_dataset(navigate, ENV_ID, f"{host.url}/other/mine.npz")  # not the same file
    assert host.seen == [f"/{end}", "/other/mine.npz"]


def test_a_download_keeps_what_the_file_says_of_itself(host, path, tmp_path):
    common.collect_pointmaze("pointmaze-medium-navigate-v0", tmp_path / "x.npz", 1, workers=1)
    host.file = (tmp_path / "x.npz").read_bytes()
    description = common.get_dataset(NAME, ENV_ID, f"{host.url}/x.npz")[1]
    assert "not the official file, downloaded from http" in description


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.npz", "http://[/x.npz"])
def test_a_url_without_a_host(path, url):
    with pytest.raises(common.UserError, match=f"^{re.escape(url)}: download failed") as error:
        common.get_dataset(NAME, ENV_ID, url)
    assert "by hand" not in str(error.value)
    assert visible_files(path.parent) == []


def test_a_url_never_falls_back_to_another_file(host, path):
    host.fault = "404"
    with pytest.raises(common.UserError, match="/broken/x.npz: download failed .404"):
        common.get_dataset(NAME, ENV_ID, f"{host.url}/broken/x.npz")
    assert host.seen == ["/broken/x.npz"]


def test_a_file_that_cannot_be_put_in_place(host, path, monkeypatch):
    denied = Mock(side_effect=PermissionError(13, "Denied"))
    monkeypatch.setattr(common.os, "replace", denied)
    with pytest.raises(common.UserError, match=f"{path.parent}: cannot write there: .*Denied"):
        common.get_dataset(NAME, ENV_ID)
    assert visible_files(path.parent) == []


def test_a_full_disk(host, path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, hard))
    try:
        with pytest.raises(common.UserError, match=f"^{path.parent}: cannot write there: "):
            common.get_dataset(NAME, ENV_ID)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(host.seen) == 1  # the mirror's file would not fit either
    assert visible_files(path.parent) == []
    assert common.get_dataset(NAME, ENV_ID)[1].startswith(DESCRIPTION)  # there is room again


def test_of_two_that_want_the_same_file_one_downloads(host, path):
    host.seconds_per_block = 0.02
    descriptions = []

    def get():
        descriptions.append(common.get_dataset(NAME, ENV_ID)[1])

    threads = [threading.Thread(target=get) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert descriptions == [f"{DESCRIPTION} {host.url}/broken/{NAME}.npz"] * 2
    assert host.seen == [f"/broken/{NAME}.npz"] and path.read_bytes() == host.file


@pytest.mark.parametrize(
    "name, tool",
    [
        ("antmaze-giant-navigate-v0", "collect_antmaze.py"),
        ("puzzle-3x3-play-v0", "collect_play.py"),
        ("visual-scene-play-v0", "collect_play.py"),
        ("humanoidmaze-large-navigate-v0", ""),
        ("antmaze-large-stitch-v0", ""),
        ("cube-single-noisy-v0", ""),
    ],
)
def test_without_a_host_the_tool_that_collects_is_named(name, tool, monkeypatch, tmp_path):
    def fail(urls, path, hint):
        raise common.UserError(hint)

    monkeypatch.setattr(common, "download", fail)
    monkeypatch.setenv("OGBENCH_DATA", str(tmp_path))
    with pytest.raises(common.UserError) as error:
        common.get_dataset(name, common.resolve_task(name)[2])
    _, _, named = str(error.value).partition("\nor collect it: python results/")
    assert named == (f"{tool} {name}, then --dataset {name}.npz" if tool else "")
