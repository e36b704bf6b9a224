"""Tests of data sets and latents at URLs and in shards: a file system of fsspec in memory, and a real HTTP server."""

from __future__ import annotations

import functools
import io
import json
import re
import sys
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import numpy as np
import pytest
from PIL import Image

from remote_vae.latents import run as run_module
from remote_vae.latents.storage import Shard, open_data_set, open_folder
from tests.remote_vae.test_latents_scale import encode, save_images, stored
from tests.support.sleeping_service import sleeping_service

pytestmark = pytest.mark.slow


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "png")
    return file.getvalue()


def save_shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def listed(data: bytes) -> list[str]:
    return sorted(line.split("\t")[0] for line in data.decode().splitlines())


def test_a_run_between_urls(memory: fsspec.AbstractFileSystem) -> None:
    """Read from a URL and write to another. A second run encodes what is missing, and lists what is broken."""
    for index in range(12):
        memory.pipe_file(f"/data/sub {index % 2}/{index:02}.png", png())
    memory.pipe_file("/data/.hidden/a.png", png())
    memory.pipe_file("/data/cut.png", png()[:60])
    with sleeping_service() as service:
        run = encode("memory://data", "memory://out", [service.url])
        assert (run.encoded, run.failures.count) == (12, 1)
        assert listed(memory.cat_file("/out/.remote-vae/sd-scripts-sdxl.failed.txt")) == ["cut.png"]
        with np.load(io.BytesIO(memory.cat_file("/out/sub 1/03_0064x0064_sdxl.npz"))) as file:
            assert file["latents"].shape == (4, 8, 8)
        memory.rm_file("/out/sub 1/03_0064x0064_sdxl.npz")
        memory.rm_file("/data/cut.png")
        run = encode("memory://data", "memory://out", [service.url])
        assert (run.encoded, run.already_stored, run.failures.count, service.served) == (1, 11, 0, 13)
    assert not memory.exists("/out/.remote-vae/sd-scripts-sdxl.failed.txt")


def test_captions_and_shards_at_a_url(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/data/a.png", png())
    memory.pipe_file("/data/a.txt", b"a caption")
    with sleeping_service() as service:
        for _ in range(2):
            run = encode("memory://data", "memory://out", [service.url], "webdataset")
    assert (run.encoded, run.already_stored) == (0, 1)
    with tarfile.open(fileobj=io.BytesIO(memory.cat_file("/out/shard-000000.tar"))) as archive:
        assert archive.getnames() == ["a.moments.npy", "a.json", "a.txt"]


def test_a_url_of_this_machine_is_a_folder(tmp_path: Path) -> None:
    save_images(tmp_path / "images", ["a.png"])
    with sleeping_service() as service:
        encode((tmp_path / "images").as_uri(), (tmp_path / "out").as_uri(), [service.url])
    assert stored(tmp_path / "out") == {"a"}


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_images_of_an_http_server(tmp_path: Path) -> None:
    """Read the images and a shard from a real server over HTTP, which has no place for latents."""
    save_images(tmp_path / "images", [f"{index}.png" for index in range(5)])
    save_shard(tmp_path / "images" / "00.tar", {"a.png": png()})
    with serving(functools.partial(Handler, directory=str(tmp_path))) as url, sleeping_service() as service:
        assert encode(f"{url}/images", tmp_path / "out", [service.url]).encoded == 5
        assert encode(f"{url}/images/00.tar", tmp_path / "out", [service.url]).encoded == 1
        with pytest.raises(ValueError, match="may hold incomplete files after an interruption"):
            encode(tmp_path / "images", f"{url}/out", [service.url])


@pytest.mark.parametrize("place", ["folder", "url"])
def test_shards_as_input(tmp_path: Path, place: str, memory: fsspec.AbstractFileSystem) -> None:
    """Encode shards with equal names in them, other files, and a shard that is cut off."""
    names = [f"{index:04}" for index in range(6)]
    files = {f"{name}.{type}": png() if type == "png" else name.encode() for name in names for type in ("png", "txt")}
    for shard in ("00000", "00001"):
        save_shard(tmp_path / "set" / f"{shard}.tar", files)
    save_shard(tmp_path / "set" / "text.tar", {"a.txt": b"no image"})
    whole = save_shard(tmp_path / "cut", files).read_bytes()
    (tmp_path / "set" / "cut.tar").write_bytes(whole[: len(whole) // 3])
    pattern = f"{tmp_path}/set/*.tar"
    if place == "url":
        memory.put(f"{tmp_path}/set/", "/set", recursive=True)
        pattern = "memory://set/*.tar"
    out = tmp_path / "out"
    with sleeping_service() as service:
        run = encode(pattern, out, [service.url])
        assert run.total == run.encoded + run.failures.count - 1
        in_part = {path.name[:4] for path in (out / "cut").iterdir()}
        assert run.encoded == 12 + len(in_part)
        assert 0 < len(in_part) < 6
        assert {Path(name).name for name in listed(Path(run.failures.location).read_bytes())} == {"cut.tar"}
        assert {path.name[:4] for path in (out / "00001").iterdir()} == {*names}
        encode(pattern, tmp_path / "latents", [service.url], "webdataset")
        parts = [encode(pattern, tmp_path / "parts", [service.url], shard=(number, 2)) for number in (1, 2)]
    with tarfile.open(tmp_path / "latents" / "shard-000000.tar") as archive:
        assert archive.getnames()[:3] == ["00000/0000.moments.npy", "00000/0000.json", "00000/0000.txt"]
    assert sum(part.encoded for part in parts) == run.encoded
    assert stored(tmp_path / "parts") == stored(out)


def test_a_part_without_images_is_no_error(tmp_path: Path) -> None:
    """Test that a data set of shards without images is one."""
    save_shard(tmp_path / "a.tar", {"a.png": png()})
    save_shard(tmp_path / "text" / "a.tar", {"a.txt": b"no image"})
    with sleeping_service() as service:
        parts = [encode(f"{tmp_path}/*.tar", tmp_path / "out", [service.url], shard=(number, 2)) for number in (1, 2)]
        assert sorted(part.encoded for part in parts) == [0, 1]
        with pytest.raises(ValueError, match="has no image that sd-scripts loads"):
            encode(f"{tmp_path}/text/*.tar", tmp_path / "out", [service.url])


def test_names_in_a_shard_stay_in_its_folder(tmp_path: Path) -> None:
    save_shard(tmp_path / "a.tar", {"../up.png": png(), "/top.png": png(), "./in/b.png": png(), ".hidden.png": png()})
    with sleeping_service() as service:
        run = encode(f"{tmp_path}/a.tar", tmp_path / "out" / "here", [service.url])
    assert (run.encoded, run.failures.count) == (1, 2)
    assert [path.name for path in tmp_path.rglob("*.npz")] == ["b_0064x0064_sdxl.npz"]
    assert (tmp_path / "out" / "here" / "a" / "in" / "b_0064x0064_sdxl.npz").is_file()


def test_many_windows_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Test that shards are closed and their temporary files deleted when their images are encoded."""
    monkeypatch.setattr(run_module, "WINDOW", 2)
    for shard in range(5):
        save_shard(tmp_path / "set" / f"{shard}.tar", {f"{index}.png": png() for index in range(5)})
    closed = []
    real = Shard.__init__

    def count(self: Shard, name: str, file: io.BytesIO) -> None:
        real(self, name, file)
        closed.append(file)

    monkeypatch.setattr(Shard, "__init__", count)
    with sleeping_service() as service:
        run = encode(f"{tmp_path}/set/*.tar", tmp_path / "out", [service.url])
    assert (run.encoded, run.total, run.found) == (25, 25, 25)
    assert [file.closed for file in closed[:4]] == [True] * 4


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("nowhere", "nowhere is no folder: expected a folder, a URL"),
        ("nowhere/*.tar", "matches no file: expected shards"),
        ("gopher://a", "gopher://a cannot be opened: Protocol not known"),
        ("sftp://a", "cannot be opened: SFTPFileSystem requires"),
    ],
)
def test_wrong_places(location: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        open_data_set(location)


class HubHandler(Handler):
    """Routes of the Hub that list and read the data set `me/images`, whose files are in the server's folder."""

    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        tree, resolve = ("/api/datasets/me/images/tree/main", "/datasets/me/images/resolve/main/")
        if path.startswith(tree):
            entries = list(self.entries(path.removeprefix(tree).strip("/"), "recursive=true" in query.lower()))
            self.reply(200 if entries else 404, json.dumps(entries).encode())
        elif path.startswith("/api/datasets/me/images"):
            self.reply(200, json.dumps({"id": "me/images", "sha": "a" * 40}).encode())
        elif path.startswith(resolve):
            self.reply_file((Path(self.directory) / path.removeprefix(resolve)).read_bytes())
        else:
            self.reply(404, b"{}")

    def entries(self, folder: str, is_recursive: bool) -> Iterator[dict[str, Any]]:
        for path in sorted((Path(self.directory) / folder).glob("**/*" if is_recursive else "*")):
            kind = "file" if path.is_file() else "directory"
            name = path.relative_to(self.directory).as_posix()
            yield {"type": kind, "path": name, "size": path.stat().st_size, "oid": "a" * 40}

    def reply_file(self, content: bytes) -> None:
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            self.reply(200, content)
            return
        start, end = int(asked[1]), int(asked[2] or len(content) - 1)
        self.reply(206, content[start : end + 1], f"bytes {start}-{end}/{len(content)}")

    def reply(self, status: int, content: bytes, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(content)


def test_images_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read images and a shard of a data set from a stand-in of the Hub over HTTP, with huggingface_hub's own client."""
    folder = tmp_path / "repository" / "train"
    save_images(folder, ["a.png", "sub/b.png"])
    save_shard(tmp_path / "repository" / "set" / "00.tar", {"c.png": png()})
    with serving(functools.partial(HubHandler, directory=str(tmp_path / "repository"))) as url:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": url, "token": False})
        with sleeping_service() as service:
            run = encode("hf://datasets/me/images/train", tmp_path / "out", [service.url])
            assert (run.encoded, run.failures.count) == (2, 0)
            assert encode("hf://datasets/me/images/set/*.tar", tmp_path / "out", [service.url]).encoded == 1
    assert stored(tmp_path / "out") == {"a", "b", "c"}


def test_a_folder_at_a_url_knows_what_it_wrote(memory: fsspec.AbstractFileSystem) -> None:
    folder = open_folder("memory://out")
    assert not folder.is_file(Path("a/b.npz"))
    folder.write(Path("a/b.npz"), b"latents")
    assert folder.is_file(Path("a/b.npz"))
    assert folder.read(Path("a/b.npz")) == b"latents"
