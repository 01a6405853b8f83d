"""Shards at a URL: cached, through proxies, and after failed downloads."""

import errno
import fcntl
import http.server
import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest
from test_shards import complaint, copy, settings

from rrcm.data import shards
from rrcm.data.sharding import write_shards
from rrcm.data.shards import ShardedDataset
from rrcm.data.verification import verify_shards


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "shards"
    write_shards(settings(), 0, folder)
    return folder


@pytest.fixture
def web(digits: Path, tmp_path: Path) -> Iterator[tuple[Path, str, list[str]]]:
    """A copy of the digits' shards, the loopback address that serves it, and the requested paths."""
    folder, asked = copy(digits, tmp_path), []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.path = urlsplit(self.path).path  # a proxy is asked for the whole address
            if asked.count(self.path) == 1 and self.path.endswith("val-00000.tar"):
                self.send_error(503)  # overloaded, once
            else:
                super().do_GET()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_url_with_cache(web: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, address, asked = web
    monkeypatch.setattr(shards, "DOWNLOAD_PAUSES", (0.0, 0.0))
    local = ShardedDataset(folder, "val")
    images = ShardedDataset(address, "val", tmp_path / "cache")
    assert asked == ["/manifest.json", "/val.index.npy"]
    assert np.array_equal(images.read(3)[0], local.read(3)[0])
    assert asked.count("/val-00000.tar") == 2  # the first attempt failed
    again = ShardedDataset(address + "/", "val", tmp_path / "cache")
    verify_shards([again])
    assert [again.read(i)[2] for i in range(len(again))] == [local.read(i)[2] for i in range(len(local))]
    assert asked.count("/val-00000.tar") == 2 and asked.count("/val.index.npy") == 1
    assert asked.count("/manifest.json") == 2


@pytest.mark.slow
@pytest.mark.parametrize("form", ["http://{}", "http://user:secret@{}"])
@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY"])
def test_url_behind_a_proxy(web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str):
    """No such host exists, so the proxy must get the whole address. `no_proxy` names hosts that need no proxy."""
    folder, address, asked = web
    monkeypatch.setattr(shards, "DOWNLOAD_PAUSES", (0.0, 0.0))
    monkeypatch.setenv(name, form.format(address.removeprefix("http://")))
    images = ShardedDataset("http://shards.invalid", "test", tmp_path / "cache")
    assert np.array_equal(images.read(3)[0], ShardedDataset(folder, "test").read(3)[0])
    files = ("manifest.json", "test.index.npy", "test-00000.tar")
    assert asked == [f"http://shards.invalid/{file}" for file in files]
    monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody is there
    assert "127.0.0.1:1" in complaint(lambda: ShardedDataset("http://shards.invalid", "test", tmp_path / "cache"))
    assert len(ShardedDataset(address, "test", tmp_path / "cache")) == len(images)


@pytest.mark.parametrize("proxy", ["127.0.0.1:1", "http://[bad", "http://127.0.0.1:none", "x y"])
def test_a_proxy_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str):
    monkeypatch.setattr(shards, "DOWNLOAD_PAUSES", (0.0, 0.0))
    monkeypatch.setenv("http_proxy", proxy)
    said = complaint(lambda: ShardedDataset("http://shards.invalid", "test", tmp_path / "cache"))
    assert (
        said.startswith("http://shards.invalid/manifest.json: cannot be opened (")
        and "correct the address, any proxy" in said
    )


@pytest.mark.slow
def test_a_user_without_a_home_needs_a_folder_for_remote_shards_alone(digits, web, monkeypatch):
    def no_home(_: str) -> None:
        raise KeyError("no such user")

    monkeypatch.setattr("pwd.getpwuid", no_home)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert len(ShardedDataset(digits, "test"))
    assert "set XDG_CACHE_HOME" in complaint(lambda: ShardedDataset(web[1], "test"))


@pytest.mark.slow
@pytest.mark.parametrize(("cache", "place"), [("{}/cache", "cache/rrcm"), ("", "home/.cache/rrcm")])
def test_an_empty_name_of_the_cache_counts_as_none(web, tmp_path, monkeypatch, cache, place):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", cache.format(tmp_path))
    assert ShardedDataset(web[1], "test").cache == tmp_path / place


@pytest.mark.slow
def test_url_damage_is_named(web: tuple[Path, str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, address, _ = web
    monkeypatch.setattr(shards, "DOWNLOAD_PAUSES", (0.0, 0.0))
    images = ShardedDataset(address, "train", tmp_path / "cache")
    path = folder / "train-00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:-512])
    assert f"{address}/train-00001.tar: does not match manifest.json" in complaint(lambda: images.read(300))
    path.unlink()
    assert f"{address}/train-00001.tar: download failed" in complaint(lambda: images.read(300))
    path.write_bytes(whole)
    images.read(300)
    assert "manifest.json: cannot be read" in complaint(lambda: ShardedDataset(f"{address}/none", "train", tmp_path))
    assert "cannot be opened" in complaint(lambda: ShardedDataset("nonsense://x", "train", tmp_path))
    assert not [p for p in (tmp_path / "cache").iterdir() if "tmp" in p.name]


@pytest.mark.slow
@pytest.mark.parametrize("locks", [True, False])
def test_two_downloads_at_once_do_not_mix(web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool):
    """Locks may be missing or work on one machine only, so each download has a file of its own."""
    folder, address, _ = web
    cache, fetch = tmp_path / "cache", shards._fetch
    if not locks:
        monkeypatch.setattr(fcntl, "flock", _no_locks)

    def fetch_while_another_does(url: str, path: Path) -> None:
        for scratch in cache.glob(".*.tar.*.tmp"):
            assert scratch != path and scratch.read_bytes() == b"another machine's"
        other.write_bytes(b"another machine's")
        fetch(url, path)

    images = ShardedDataset(address, "train", cache)
    name = f".{images.split.shards[0].sha256}.tar"
    other, abandoned = cache / f"{name}.7-0123abcd-node2.tmp", cache / f"{name}.7-0123abcd-node3.tmp"
    abandoned.write_bytes(b"killed")
    os.utime(abandoned, (0, 0))
    monkeypatch.setattr(shards, "_fetch", fetch_while_another_does)
    assert np.array_equal(images.read(0)[0], ShardedDataset(folder, "train").read(0)[0])
    assert [path for path in cache.iterdir() if path.suffix == ".tmp"] == [other]


def _no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number", "line"),
    [
        ("get_file", errno.ENOSPC, r"\.tar: cannot write it \(No space left on device\); free some space; nothing was"),
        ("get_file", errno.ETIMEDOUT, r"train-00000\.tar: download failed \(.*timed out.*\); check the address"),
        (
            "mkdir",
            errno.EROFS,
            r"cache: cannot write it \(Read-only file system\); mount .*; or set XDG_CACHE_HOME",
        ),
    ],
)
def test_a_cache_that_cannot_be_written_is_not_called_a_failed_download(
    web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, number: int, line: str
):
    images = ShardedDataset(web[1], "train", tmp_path / "cache")

    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shards, "DOWNLOAD_PAUSES", (0.0, 0.0))
    monkeypatch.setattr("fsspec.url_to_fs", lambda url, **_: (SimpleNamespace(get_file=fails), url))
    if where == "mkdir":
        monkeypatch.setattr(Path, "mkdir", fails)
    assert re.search(line, complaint(lambda: images.read(0)))
