"""`remote-vae proxy`: clients that know neither tokens nor cold starts reach an endpoint that has both."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image

from remote_vae import RemoteVAE
from scripts.local_server import ROOT, free_port
from tests.difficult_way import Way, difficult_way
from tests.forked import killed_at_the_end
from tests.small_service import Service

TOKEN = "hf_theTokenThatNobodyMaySee"
LATENTS = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def way(service: Service) -> Iterator[Way]:
    with difficult_way(f"{service.url}/sd-v1") as way:
        way.token = TOKEN
        yield way


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@contextmanager
def proxy(target: str, folder: Path, *arguments: str, token: str | None = TOKEN) -> Iterator[str]:
    """The command in a process of its own; nothing that it says holds the token."""
    port, log = free_port(), folder / "proxy.log"
    command = [sys.executable, "-m", "remote_vae", "proxy", target, "--port", str(port), *arguments]
    environment = {**os.environ, "COLUMNS": "200", **({"REMOTE_VAE_TOKEN": token} if token else {})}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
    url = f"http://127.0.0.1:{port}"
    with killed_at_the_end(process):
        try:
            deadline = time.monotonic() + 30
            while not answers(port) and time.monotonic() < deadline:
                time.sleep(0.05)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(10) == 0
            assert TOKEN not in log.read_text()


def test_the_released_client_reaches_a_protected_endpoint_that_starts(
    way: Way, tmp_path: Path, service: Service
) -> None:
    with proxy(way.url, tmp_path) as url:
        way.starts_until = time.monotonic() + 5
        image = remote_decode(url, LATENTS, scaling_factor=0.18215, image_format="png")
        latents = remote_encode(url, image, scaling_factor=0.18215)
    assert time.monotonic() > way.starts_until
    assert image.size == (64, 64)
    assert latents.shape == (1, 4, 8, 8)
    assert (
        image.tobytes()
        == remote_decode(f"{service.url}/sd-v1", LATENTS, scaling_factor=0.18215, image_format="png").tobytes()
    )
    posts = [headers for method, _, headers in way.seen if method == "POST"]
    assert all(headers["Authorization"] == f"Bearer {TOKEN}" for headers in posts)
    assert len(posts) == 3  # one before the replica was there


def test_what_passes_is_what_came(service: Service, tmp_path: Path) -> None:
    """Status, headers and body of an answer; a query that holds what must stay quoted."""
    with proxy(f"{service.url}/sd-v1", tmp_path) as url:
        for path, more in (
            ("/decode?shape=1&shape=4&shape=8&shape=8&dtype=float32&x=%26%2F%20", {"data": LATENTS.numpy().tobytes()}),
            ("/decode?shape=7", {"data": b"1234"}),
            ("/config", None),
            ("/nowhere", None),
        ):
            here, there = (
                requests.post(base + path, **more, timeout=20) if more else requests.get(base + path, timeout=20)
                for base in (url, f"{service.url}/sd-v1")
            )
            assert here.status_code == there.status_code
            assert here.content == there.content
            changing = ("date", "x-request-id", "server-timing")
            assert [(k, v) for k, v in here.headers.items() if k.lower() not in changing] == [
                (k, v) for k, v in there.headers.items() if k.lower() not in changing
            ]
        assert torch.equal(RemoteVAE(url).decode(LATENTS).sample, service.model("sd-v1").decode(LATENTS).sample)


@pytest.mark.slow
def test_large_bodies_pass_in_little_memory(tmp_path: Path) -> None:
    import http.server
    import threading

    import psutil

    class Echo(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            """Answers with the body's hash, and then with so many bytes."""
            seen, left = hashlib.sha256(), int(self.headers["Content-Length"])
            while left:
                chunk = self.rfile.read(min(left, 1 << 20))
                seen.update(chunk)
                left -= len(chunk)
            self.send_response(200)
            self.send_header("Content-Length", str(64 + SIZE))
            self.end_headers()
            self.wfile.write(seen.hexdigest().encode())
            for _ in range(SIZE >> 20):
                self.wfile.write(bytes(1 << 20))

    SIZE = 300 << 20
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    file, expected = tmp_path / "body", hashlib.sha256()
    with file.open("wb") as body:
        for index in range(SIZE >> 20):
            body.write(chunk := bytes([index % 256]) * (1 << 20))
            expected.update(chunk)
    with proxy(f"http://127.0.0.1:{server.server_address[1]}", tmp_path) as url:
        process = next(child for child in psutil.Process().children() if "proxy" in child.cmdline())
        before = process.memory_info().rss
        with file.open("rb") as body:
            answer = requests.post(url, data=body, stream=True, timeout=60)
        assert answer.raw.read(64).decode() == expected.hexdigest()
        assert sum(len(chunk) for chunk in answer.iter_content(1 << 20)) == SIZE
        assert process.memory_info().rss - before < 100 << 20
    server.shutdown()
    server.server_close()


def test_nobody_is_there(tmp_path: Path) -> None:
    with proxy(f"http://127.0.0.1:{free_port()}", tmp_path, "--patience", "2") as url:
        answer = requests.post(url + "/decode", data=b"1", timeout=20)
    assert answer.status_code == 504
    assert "cannot be reached" in answer.json()["error"]


def test_an_answer_that_breaks_off_breaks_off(way: Way, tmp_path: Path) -> None:
    """Nothing that looks whole reaches the client."""
    way.drops = 1
    with proxy(way.url, tmp_path) as url, pytest.raises(requests.exceptions.RequestException):
        remote_decode(url, LATENTS, output_type="pt", return_type="pt", do_scaling=False)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "rebound.example.org"}, 400),
        ({"Origin": "https://example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 404),
    ],
)
def test_pages_of_other_sites_may_not_use_the_token(
    way: Way, tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    with proxy(way.url, tmp_path) as url:
        assert requests.get(url + "/nowhere", headers=headers, timeout=10).status_code == status
    assert len(way.seen) == (status == 404)


def test_a_picture(way: Way, tmp_path: Path) -> None:
    """The pilot's clients send a picture as PNG."""
    with proxy(way.url, tmp_path) as url:
        latents = remote_encode(url, Image.radial_gradient("L").resize((64, 64)).convert("RGB"))
    assert latents.shape == (1, 4, 8, 8)
