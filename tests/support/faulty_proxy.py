"""A proxy in front of the service that fails on demand, as the proxy of Inference Endpoints and the network do.

While a replica starts, the platform's proxy returns 503 (or 502, as others saw). A paused endpoint returns 400 and `Bad
Request: Invalid state`. A protected endpoint returns 401 without a token, and 403 for a token without access.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests

from remote_vae.client import LOADING

HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")


class FaultyProxy(ThreadingHTTPServer):
    """Each attribute is a fault. By default there is none."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, target: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.target = target
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        """Method, path and headers of each request."""
        self.starts_until = 0.0
        """Value of `time.monotonic` until which the replica starts: the status is 502 at first and then 503."""
        self.is_unloaded = False
        """The toolkit has unloaded its idle model: only `/health` and `POST /` exist, and the latter loads it."""
        self.token: str | None = None
        """Token that requests must send."""
        self.drops = 0
        """Number of responses to POSTs, from the next one on, that break off in the middle."""
        self.hides_drops = False
        """These responses end as if they were complete."""
        self.hangs = False
        """POSTs get no response until the proxy stops."""
        self.response: tuple[int, Any] | None = None
        """Status and error of every POST, in place of the service's response."""
        self.stopped = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have disconnected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def _respond(self) -> None:
        proxy = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        proxy.seen.append((self.command, self.path, dict(self.headers)))
        if proxy.token and self.headers.get("Authorization") is None:
            return self._send_error(401, "Unauthorized")
        if proxy.token and self.headers["Authorization"] != f"Bearer {proxy.token}":
            return self._send_error(403, f"Forbidden: {self.headers['Authorization']} may not")
        if proxy.is_unloaded and self.path != "/health":
            proxy.is_unloaded = (self.command, self.path) != ("POST", "/")
            return self._send_error(*((404, "Not Found") if proxy.is_unloaded else (400, f"{LOADING}: send it again")))
        if time.monotonic() < proxy.starts_until:
            return self._send_error(502 if len(proxy.seen) == 1 else 503, "Service Unavailable")
        if self.command == "POST" and proxy.response:
            return self._send_error(*proxy.response)
        if self.command == "POST" and proxy.hangs:
            proxy.stopped.wait(60)
            self.close_connection = True
            return None
        return self._forward(body)

    def _forward(self, body: bytes) -> None:
        proxy = self.server
        headers = {k: v for k, v in self.headers.items() if k.lower() not in (*HOP_BY_HOP, "host", "authorization")}
        response = requests.request(self.command, proxy.target + self.path, data=body, headers=headers, timeout=60)
        is_dropped = self.command == "POST" and proxy.drops > 0
        self.send_response(response.status_code)
        for name, value in response.headers.items():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        if not (is_dropped and proxy.hides_drops):
            self.send_header("Content-Length", str(len(response.content)))
        self.end_headers()
        if not is_dropped:
            self.wfile.write(response.content)
            return
        proxy.drops -= 1
        self.wfile.write(response.content[: len(response.content) // 2])
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _send_error(self, status: int, error: str) -> None:
        content = json.dumps({"error": error}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def faulty_proxy(target: str, port: int = 0) -> Iterator[FaultyProxy]:
    with FaultyProxy(target, port) as proxy:
        threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.stopped.set()
            proxy.shutdown()
