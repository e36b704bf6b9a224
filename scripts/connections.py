"""Connections of the standalone server: how many are open, and how long one may be open without a request."""

from __future__ import annotations

import asyncio
import json
import math
import resource
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_CONNECTIONS = 1000
"""Open connections, if the process may have enough file descriptors."""
RESERVED = 32
"""File descriptors for the service itself: its files, its device, the listening socket."""
HEAD_SECONDS = 20
"""Seconds in which a request's head has to arrive after the connection is open, or after the response before."""
HEAD_BYTES = 128 * 1024
"""Bytes of a request's head."""
WARN_SECONDS = 10
"""Seconds between two log lines that say the same."""


class Connection(HttpToolsProtocol):
    """One of uvicorn's connections, in a bounded number of them.

    uvicorn has no limit on idle connections, on connections whose head does not arrive, or on the length of a head. Its
    own limit on connections refuses health probes, too. Here the connection that is idle for longest is closed when
    another one comes. A new connection is refused (503) only when every other one has a request in progress.
    """

    warned = -math.inf

    def __init__(self, most: int, **arguments: Any) -> None:
        """`most` connections are open at a time; the other arguments are uvicorn's."""
        super().__init__(**arguments)
        self.most = most
        self.idle_since = 0.0
        self.head_timer: asyncio.TimerHandle | None = None
        self.head_bytes = 0
        self.in_head = False

    @property
    def is_idle(self) -> bool:
        """Return whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_expendable(self) -> bool:
        """Return whether it may be closed without a loss: it is idle, and its last response is all on its way."""
        return self.is_idle and not self.transport.get_write_buffer_size()

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.expect_head()
        if len(self.connections) <= self.most:
            return
        self.warn()
        if idle := [other for other in self.connections if other.is_expendable and other is not self]:
            longest = min(idle, key=lambda other: other.idle_since)
            self.connections.discard(longest)
            longest.transport.abort()
        else:
            self.app = too_many(self.most)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.head_timer.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.expect_head()

    def expect_head(self) -> None:
        """Close the connection unless a request has arrived in time. Later bytes of a refused body do not count."""
        if self.head_timer:
            self.head_timer.cancel()
        self.idle_since = self.loop.time()
        self.head_timer = self.loop.call_later(HEAD_SECONDS, self.close_if_idle)

    def close_if_idle(self) -> None:
        if self.is_idle:
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.in_head, self.head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self.in_head = False
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.in_head and not self.transport.is_closing():
            self.head_bytes += len(data)
            if self.head_bytes > HEAD_BYTES:
                self.refuse(431, f"the request's head is larger than {HEAD_BYTES} bytes; send parameters in the body")

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, "the bytes that arrived are no HTTP/1.1 request")

    def refuse(self, status: int, message: str) -> None:
        """Respond in JSON to what never becomes a request for the app, and close the connection."""
        if not self.pipeline and (self.is_idle or not self.cycle.response_started):  # not into another response
            body = json.dumps({"error": message})
            head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            self.transport.write((head + body).encode())
        self.transport.close()

    def warn(self) -> None:
        if (now := self.loop.time()) > Connection.warned + WARN_SECONDS:
            Connection.warned = now
            self.logger.warning(
                "%d connections are open, the most that this server takes: it closes the one that is idle for longest, "
                "or refuses the new one",
                self.most,
            )


def too_many(most: int) -> ASGIApp:
    """The response to a request on one connection too many."""
    message = f"{most} requests are in progress, each on its own connection, and no more are taken; try again soon"
    return JSONResponse({"error": message}, 503, {"Retry-After": "1", "Connection": "close"})


def raise_descriptor_limit() -> int:
    """Raise the soft limit of file descriptors as far as it goes, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, min(hard, 65536)) if hard != resource.RLIM_INFINITY else max(soft, 10240)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (ValueError, OSError):  # macOS reports no limit, and has one
        return soft
    return wanted


def run_server(app: ASGIApp, host: str, port: int, stop_after: int) -> None:
    """Serve the app until SIGTERM or Ctrl-C, and at most `stop_after` seconds longer."""
    spare = raise_descriptor_limit() - RESERVED
    # asyncio accepts a whole backlog of connections at a time, and closes them three turns of its loop later
    backlog = max(4, min(512, spare // 8))
    most = max(4, min(MAX_CONNECTIONS, spare // 2))
    uvicorn.run(
        app,
        host=host,
        port=port,
        access_log=False,
        http=partial(Connection, most),  # type: ignore[arg-type]  # it is only called
        backlog=backlog,
        timeout_graceful_shutdown=stop_after,
    )
