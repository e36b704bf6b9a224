"""`remote-vae proxy`: clients that know neither tokens nor cold starts reach an endpoint that has both."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    import psutil

    class Echo(BaseHTTPRequestHandler):
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
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
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


OF_OTHERS = [
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
"""What a browser sends for a page that is not the proxy's own: a script, a frame, a form, an `<img>`, a link."""


def test_pages_of_other_sites_may_not_use_the_token(way: Way, tmp_path: Path) -> None:
    with proxy(way.url, tmp_path) as url:
        for headers in OF_OTHERS:
            response = requests.get(url + "/nowhere", headers=headers, timeout=10)
            assert response.status_code == 403, headers
            assert "this proxy" in response.json()["error"]
        assert way.seen == []
        for headers in ({}, {"Sec-Fetch-Site": "none"}, {"Host": url.replace("http://127.0.0.1", "localhost")}):
            assert requests.get(url + "/nowhere", headers=headers, timeout=10).status_code == 404
    assert len(way.seen) == 3


def test_the_web_demo_works_through_the_proxy(way: Way, tmp_path: Path) -> None:
    """What Chromium sends of the page, and for what the page does."""
    own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
    with proxy(way.url, tmp_path) as url:
        page = requests.get(url, headers={"Accept": "text/html", "Sec-Fetch-Site": "none"}, timeout=20)
        assert page.headers["Content-Type"].startswith("text/html")
        answer = requests.post(
            f"{url}/decode?shape=1,4,8,8&dtype=float32",
            data=LATENTS.numpy().tobytes(),
            headers={**own, "Origin": url, "Referer": f"{url}/", "Cookie": "of=another"},
            timeout=20,
        )
        assert answer.headers["Content-Type"] == "image/jpeg"
    told = {name.lower() for name in way.seen[-1][2]}
    assert not told & {"origin", "referer", "cookie", "sec-fetch-site"}  # which are of this machine


class Recorder(BaseHTTPRequestHandler):
    """Responds with the headers that came, in a list of pairs, and with headers of its own."""

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
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def exchange(url: str, *lines: str, body: str = "", method: str = "GET") -> tuple[dict[str, Any], list[str]]:
    """Sends these headers as they are; what the recorder got, and the lines of the response's head."""
    host, port = url.removeprefix("http://").split(":")
    head = "\r\n".join([f"{method} /a%2Fb/..%3F?x=%26 HTTP/1.1", f"Host: {host}:{port}", *lines, "", body])
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(head.encode())
        response = b""
        while b"\r\n\r\n" not in response or len(response.split(b"\r\n\r\n")[1]) < length_of(response):
            response = (response + connection.recv(65536)).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    head, _, content = response.decode().partition("\r\n\r\n")
    return json.loads(content), head.split("\r\n")


def length_of(response: bytes) -> int:
    return int(re.search(rb"content-length: (\d+)", response, re.IGNORECASE)[1])


def values(got: dict[str, Any], name: str) -> list[str]:
    return [value for key, value in got["headers"] if key.lower() == name]


def test_headers_pass_once_and_those_of_a_connection_do_not(recorder: str, tmp_path: Path) -> None:
    with proxy(recorder, tmp_path) as url:
        got, head = exchange(
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
        chunked, _ = exchange(url, "Transfer-Encoding: chunked", body="3\r\nabc\r\n0\r\n\r\n", method="POST")
        with_length, _ = exchange(url, "Content-Length: 3", "Expect: 100-continue", body="abc", method="DELETE")
    assert values(got, "authorization") == [f"Bearer {TOKEN}"]
    assert values(got, "accept") == ["image/png", "image/jpeg"]
    assert values(got, "host") == [recorder.removeprefix("http://")]
    for name in ("x-mine", "x-forwarded-for", "forwarded", "proxy-authorization", "accept-encoding", "user-agent"):
        assert values(got, name) == [], name
    assert got["path"] == "/a%2Fb/..%3F?x=%26"
    names = [line.partition(":")[0].lower() for line in head]
    assert names.count("x-twice") == 2
    assert not {"set-cookie", "x-hop"} & set(names)
    assert (chunked["body"], values(chunked, "content-length")) == ("abc", [])
    assert (with_length["body"], values(with_length, "content-length")) == ("abc", ["3"])


def test_without_a_token_the_clients_own_passes(recorder: str, tmp_path: Path) -> None:
    with proxy(recorder, tmp_path, token=None) as url:
        got, _ = exchange(url, "Authorization: Bearer hf_ofTheClient")
        refused, head = exchange(url, "Authorization: Bearer a", "Authorization: Bearer b")
    assert values(got, "authorization") == ["Bearer hf_ofTheClient"]
    assert head[0].startswith("HTTP/1.1 400 ")
    assert refused["error"] == "send one Authorization header, not several"


def test_a_picture(way: Way, tmp_path: Path) -> None:
    """The pilot's clients send a picture as PNG."""
    with proxy(way.url, tmp_path) as url:
        latents = remote_encode(url, Image.radial_gradient("L").resize((64, 64)).convert("RGB"))
    assert latents.shape == (1, 4, 8, 8)
