"""Tests of `remote-vae proxy`: clients without tokens and retries reach an endpoint that needs both."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
import torch
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image

from remote_vae import RemoteVAE
from scripts.local_server import free_port
from tests.support import forked
from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.small_service import Service
from tests.support.values import assert_same
from traffic.servers import listening

TOKEN = "hf_theTokenThatNobodyMaySee"
LATENTS = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def faulty(service: Service) -> Iterator[FaultyProxy]:
    with faulty_proxy(f"{service.url}/sd-v1") as faulty:
        faulty.token = TOKEN
        yield faulty


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@contextmanager
def proxy(target: str, folder: Path, *arguments: str, token: str | None = TOKEN) -> Iterator[str]:
    """Run the command in its own process. Nothing that it prints contains the token."""
    port, log = free_port(), folder / "proxy.log"
    command = ["-m", "remote_vae", "proxy", target, "--port", str(port), *arguments]
    environment = {**os.environ, "COLUMNS": "200", **({"REMOTE_VAE_TOKEN": token} if token else {})}
    process = forked.Process(command, environment, log, log)
    try:
        deadline = time.monotonic() + 30
        while not listens(port) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(10) == 0
        assert TOKEN not in log.read_text()


def test_the_client_of_diffusers_reaches_a_protected_starting_endpoint(
    faulty: FaultyProxy, tmp_path: Path, service: Service
) -> None:
    with proxy(faulty.url, tmp_path) as url:
        faulty.starts_until = time.monotonic() + 5
        image = remote_decode(url, LATENTS, scaling_factor=0.18215, image_format="png")
        latents = remote_encode(url, image, scaling_factor=0.18215)
    assert time.monotonic() > faulty.starts_until
    assert image.size == (64, 64)
    assert latents.shape == (1, 4, 8, 8)
    assert (
        image.tobytes()
        == remote_decode(f"{service.url}/sd-v1", LATENTS, scaling_factor=0.18215, image_format="png").tobytes()
    )
    posts = [headers for method, _, headers in faulty.seen if method == "POST"]
    assert all(headers["Authorization"] == f"Bearer {TOKEN}" for headers in posts)
    assert len(posts) == 3  # the first before the replica has started


def test_responses_pass_unchanged(service: Service, tmp_path: Path) -> None:
    """Compare status, headers and body, also for a query with characters that must stay quoted."""
    with proxy(f"{service.url}/sd-v1", tmp_path) as url:
        for path, options in (
            ("/decode?shape=1&shape=4&shape=8&shape=8&dtype=float32&x=%26%2F%20", {"data": LATENTS.numpy().tobytes()}),
            ("/decode?shape=7", {"data": b"1234"}),
            ("/config", None),
            ("/nowhere", None),
        ):
            actual, expected = (
                requests.post(base + path, **options, timeout=20) if options else requests.get(base + path, timeout=20)
                for base in (url, f"{service.url}/sd-v1")
            )
            assert actual.status_code == expected.status_code
            assert actual.content == expected.content
            changing = ("date", "x-request-id", "server-timing")
            assert [(k, v) for k, v in actual.headers.items() if k.lower() not in changing] == [
                (k, v) for k, v in expected.headers.items() if k.lower() not in changing
            ]
        assert_same(RemoteVAE(url).decode(LATENTS).sample, service.model("sd-v1").decode(LATENTS).sample)


@pytest.mark.slow
def test_large_bodies_pass_in_little_memory(tmp_path: Path) -> None:
    class Echo(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_POST(self) -> None:
            """Send the hash of the body, and then `SIZE` bytes."""
            digest, remaining = hashlib.sha256(), int(self.headers["Content-Length"])
            while remaining:
                chunk = self.rfile.read(min(remaining, 1 << 20))
                digest.update(chunk)
                remaining -= len(chunk)
            self.send_response(200)
            self.send_header("Content-Length", str(64 + SIZE))
            self.end_headers()
            self.wfile.write(digest.hexdigest().encode())
            for _ in range(SIZE >> 20):
                self.wfile.write(bytes(1 << 20))

    SIZE = 300 << 20
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    file, expected = tmp_path / "body", hashlib.sha256()
    with file.open("wb") as body:
        for index in range(SIZE >> 20):
            body.write(chunk := bytes([index % 256]) * (1 << 20))
            expected.update(chunk)
    with proxy(f"http://127.0.0.1:{server.server_address[1]}", tmp_path) as url:
        process = listening(urlsplit(url).port)
        before = process.memory_info().rss
        with file.open("rb") as body:
            response = requests.post(url, data=body, stream=True, timeout=60)
        assert response.raw.read(64).decode() == expected.hexdigest()
        assert sum(len(chunk) for chunk in response.iter_content(1 << 20)) == SIZE
        assert process.memory_info().rss - before < 100 << 20
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_an_unreachable_endpoint(tmp_path: Path) -> None:
    with proxy(f"http://127.0.0.1:{free_port()}", tmp_path, "--retry-timeout", "2") as url:
        response = requests.post(url + "/decode", data=b"1", timeout=20)
    assert response.status_code == 504
    assert "cannot be reached" in response.json()["error"]


def test_an_incomplete_response_stays_incomplete(faulty: FaultyProxy, tmp_path: Path) -> None:
    """Test that the client gets no response that looks complete."""
    faulty.drops = 1
    with proxy(faulty.url, tmp_path) as url, pytest.raises(requests.exceptions.RequestException):
        remote_decode(url, LATENTS, output_type="pt", return_type="pt", do_scaling=False)


OTHER_SITES = [
    {"Host": "rebound.example.org"},
    {"Host": "127.0.0.1.example.org"},
    {"Origin": "https://example.org"},
    {"Origin": "null"},
    {"Origin": "http://localhost:3000"},
    {"Referer": "http://example.org/"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"},
]
"""Headers that a browser sends for a page of another site: a script, a frame, a form, an `<img>`, a link."""


def test_pages_on_other_sites_may_not_use_the_token(faulty: FaultyProxy, tmp_path: Path) -> None:
    with proxy(faulty.url, tmp_path) as url:
        for headers in OTHER_SITES:
            response = requests.get(url + "/nowhere", headers=headers, timeout=10)
            assert response.status_code == 403, headers
            assert "this proxy" in response.json()["error"]
        assert faulty.seen == []
        for headers in ({}, {"Sec-Fetch-Site": "none"}, {"Host": url.replace("http://127.0.0.1", "localhost")}):
            assert requests.get(url + "/nowhere", headers=headers, timeout=10).status_code == 404
    assert len(faulty.seen) == 3


def test_the_web_demo_works_through_the_proxy(faulty: FaultyProxy, tmp_path: Path) -> None:
    """Send the headers that Chromium sends for the web demo, and for its requests."""
    own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
    with proxy(faulty.url, tmp_path) as url:
        page = requests.get(url, headers={"Accept": "text/html", "Sec-Fetch-Site": "none"}, timeout=20)
        assert page.headers["Content-Type"].startswith("text/html")
        response = requests.post(
            f"{url}/decode?shape=1,4,8,8&dtype=float32",
            data=LATENTS.numpy().tobytes(),
            headers={**own, "Origin": url, "Referer": f"{url}/", "Cookie": "of=another"},
            timeout=20,
        )
        assert response.headers["Content-Type"] == "image/jpeg"
    forwarded = {name.lower() for name in faulty.seen[-1][2]}
    assert not forwarded & {"origin", "referer", "cookie", "sec-fetch-site"}  # these headers describe this computer


class Recorder(BaseHTTPRequestHandler):
    """Handler that returns the request's headers, as a list of pairs, and sends headers of its own."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = json.dumps({"path": self.path, "headers": self.headers.items(), "body": body.decode()}).encode()
        self.send_response(200)
        for name, value in (("X-Twice", "1"), ("X-Twice", "2"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")):
            self.send_header(name, value)
        self.send_header("Connection", "keep-alive, X-Hop")
        self.send_header("X-Hop", "1")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_DELETE = do_GET


@pytest.fixture
def recorder() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def send_raw(url: str, *lines: str, body: str = "", method: str = "GET") -> tuple[dict[str, Any], list[str]]:
    """Send these headers unchanged. Return what the recorder received, and the lines of the response's head."""
    host, port = url.removeprefix("http://").split(":")
    head = "\r\n".join([f"{method} /a%2Fb/..%3F?x=%26 HTTP/1.1", f"Host: {host}:{port}", *lines, "", body])
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(head.encode())
        response = b""
        while b"\r\n\r\n" not in response or len(response.split(b"\r\n\r\n")[1]) < read_content_length(response):
            response = (response + connection.recv(65536)).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    head, _, content = response.decode().partition("\r\n\r\n")
    return json.loads(content), head.split("\r\n")


def read_content_length(response: bytes) -> int:
    return int(re.search(rb"content-length: (\d+)", response, re.IGNORECASE)[1])


def values(received: dict[str, Any], name: str) -> list[str]:
    return [value for key, value in received["headers"] if key.lower() == name]


@pytest.mark.slow
def test_headers_pass_once_except_connection_headers(recorder: str, tmp_path: Path) -> None:
    with proxy(recorder, tmp_path) as url:
        received, head = send_raw(
            url,
            "Authorization: Bearer hf_ofTheClient",
            "authorization: Bearer hf_another",
            "Accept: image/png",
            "Accept: image/jpeg",
            "Connection: keep-alive, X-Mine",
            "X-Mine: 1",
            "X-Forwarded-For: 1.2.3.4",
            "Forwarded: for=1.2.3.4",
            "Proxy-Authorization: Basic eA==",
        )
        chunked, _ = send_raw(url, "Transfer-Encoding: chunked", body="3\r\nabc\r\n0\r\n\r\n", method="POST")
        with_length, _ = send_raw(url, "Content-Length: 3", "Expect: 100-continue", body="abc", method="DELETE")
    assert values(received, "authorization") == [f"Bearer {TOKEN}"]
    assert values(received, "accept") == ["image/png", "image/jpeg"]
    assert values(received, "host") == [recorder.removeprefix("http://")]
    for name in ("x-mine", "x-forwarded-for", "forwarded", "proxy-authorization", "accept-encoding", "user-agent"):
        assert values(received, name) == [], name
    assert received["path"] == "/a%2Fb/..%3F?x=%26"
    names = [line.partition(":")[0].lower() for line in head]
    assert names.count("x-twice") == 2
    assert not {"set-cookie", "x-hop"} & set(names)
    assert (chunked["body"], values(chunked, "content-length")) == ("abc", [])
    assert (with_length["body"], values(with_length, "content-length")) == ("abc", ["3"])


@pytest.mark.slow
def test_the_clients_token_passes_without_a_token_of_the_proxy(recorder: str, tmp_path: Path) -> None:
    with proxy(recorder, tmp_path, token=None) as url:
        received, _ = send_raw(url, "Authorization: Bearer hf_ofTheClient")
        refused, head = send_raw(url, "Authorization: Bearer a", "Authorization: Bearer b")
    assert values(received, "authorization") == ["Bearer hf_ofTheClient"]
    assert head[0].startswith("HTTP/1.1 400 ")
    assert refused["error"] == "expected one Authorization header, not several"


def test_an_image(faulty: FaultyProxy, tmp_path: Path) -> None:
    """Send an image as PNG, as the clients of Hugging Face's remote VAE pilot do."""
    with proxy(faulty.url, tmp_path) as url:
        latents = remote_encode(url, Image.radial_gradient("L").resize((64, 64)).convert("RGB"))
    assert latents.shape == (1, 4, 8, 8)
