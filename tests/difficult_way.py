"""A way to a service on which things go wrong: what stands in front of an Inference Endpoint, and the network.

While a replica starts, the platform's proxy answers 503 (or 502, as others saw); a paused endpoint answers 400 and
`Bad Request: Invalid state`; one that is not public 401 without a token and 403 with one that may not.
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

HOP_BY_HOP = ("connection", "keep-alive", "transfer-encoding", "content-length", "date", "server")


class Way(ThreadingHTTPServer):
    """Each attribute is something that goes wrong; by default nothing does."""

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, target: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.target = target
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        """Method, path and headers of each request."""
        self.starts_until = 0.0
        """Of `time.monotonic`: until then the replica starts, and the proxy answers 502 at first and then 503."""
        self.token: str | None = None
        """What requests must send."""
        self.drops = 0
        """Answers of POSTs that are cut off in the middle, from the next one on."""
        self.hides_drops = False
        """They end as if that were all."""
        self.hangs = False
        """POSTs get no answer."""
        self.answer: tuple[int, Any] | None = None
        """Of every POST, in place of the service's."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are gone are no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Way

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        way = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        way.seen.append((self.command, self.path, dict(self.headers)))
        left = way.starts_until - time.monotonic()
        if way.token and self.headers.get("Authorization") is None:
            return self._json(401, "Unauthorized")
        if way.token and self.headers["Authorization"] != f"Bearer {way.token}":
            return self._json(403, f"Forbidden: {self.headers['Authorization']} may not")
        if left > 0:
            return self._json(502 if len(way.seen) == 1 else 503, "Service Unavailable")
        if self.command == "POST" and way.answer:
            return self._json(*way.answer)
        if self.command == "POST" and way.hangs:
            return time.sleep(60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in (*HOP_BY_HOP, "host", "authorization")}
        answer = requests.request(self.command, way.target + self.path, data=body, headers=headers, timeout=60)
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            if name.lower() not in HOP_BY_HOP:
                self.send_header(name, value)
        if not (self.command == "POST" and way.drops and way.hides_drops):
            self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        if self.command == "POST" and way.drops:
            way.drops -= 1
            self.wfile.write(answer.content[: len(answer.content) // 2])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.wfile.write(answer.content)

    def _json(self, status: int, error: str) -> None:
        content = json.dumps({"error": error}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def difficult_way(target: str, port: int = 0) -> Iterator[Way]:
    with Way(target, port) as way:
        threading.Thread(target=way.serve_forever, daemon=True).start()
        yield way
        way.shutdown()
