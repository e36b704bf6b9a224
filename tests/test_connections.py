"""Tests of the standalone server's connections, with an app that does nothing: `scripts/connections.py`."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from scripts import connections
from scripts.connections import Connection

GET = b"GET /%s HTTP/1.1\r\nHost: x\r\n\r\n"
MOST = 4


LARGE = 20_000_000
"""Size of a response in bytes that no socket buffer can take."""


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Serve `/slow`, which waits for the client's disconnect, and `/large`, which returns many bytes."""
    if scope["path"] == "/large":
        return await PlainTextResponse(bytes(LARGE))(scope, receive, send)
    if scope["path"] == "/slow":
        await Request(scope, receive).body()
        while not await Request(scope, receive).is_disconnected():
            await anyio.sleep(0.01)
    await PlainTextResponse("Ok")(scope, receive, send)


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], socket.socket]]:
    """Yield a function that connects to a server with `MOST` connections and a second for a request's head."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 1)
    opened: list[socket.socket] = []
    config = uvicorn.Config(app, port=0, log_level="critical", lifespan="off", http=partial(Connection, MOST))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()

    def connect() -> socket.socket:
        opened.append(socket.create_connection(address, timeout=10))
        return opened[-1]

    yield connect
    for connection in opened:
        connection.close()
    server.should_exit = True
    thread.join()


def send_request(connection: socket.socket, request: bytes) -> tuple[int, str]:
    """Send a request. Return the status and the body.

    The response must end the connection or end with "Ok" or "}".
    """
    connection.sendall(request)
    response = b""
    while not response.endswith((b"Ok", b"}")):
        response += (chunk := connection.recv(1 << 16))
        if not chunk:
            break
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def is_closed(connection: socket.socket) -> bool:
    """Return whether the server closes the connection within the 10 s of a test."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@pytest.mark.slow
def test_a_connection_without_a_request_is_closed(connect: Callable[[], socket.socket]) -> None:
    silent, half = connect(), connect()
    half.sendall(GET[:-4] % b"")
    assert is_closed(silent)
    assert is_closed(half)


@pytest.mark.slow
def test_a_connection_with_a_request_stays_open(connect: Callable[[], socket.socket]) -> None:
    slow = connect()
    slow.sendall(GET % b"slow")
    slow.settimeout(2)
    with pytest.raises(TimeoutError):
        slow.recv(1)


def test_a_new_connection_replaces_the_longest_idle_connection(
    connect: Callable[[], socket.socket],
) -> None:
    idle = [connect() for _ in range(MOST)]
    for connection in idle:
        assert send_request(connection, GET % b"") == (200, "Ok")
    assert send_request(connect(), GET % b"") == (200, "Ok")
    assert is_closed(idle[0])
    assert send_request(idle[1], GET % b"") == (200, "Ok")


def test_a_response_is_sent_to_its_end(connect: Callable[[], socket.socket]) -> None:
    slow = [connect() for _ in range(MOST - 1)]
    for connection in slow:
        connection.sendall(GET % b"large")
    time.sleep(0.3)
    for _ in range(MOST):
        assert send_request(connect(), GET % b"") == (200, "Ok")
    for connection in slow:
        with connection.makefile("rb") as response:
            assert response.readline() == b"HTTP/1.1 200 OK\r\n"
            http.client.parse_headers(response)
            assert len(response.read(LARGE)) == LARGE


def test_a_connection_over_the_limit_gets_json(connect: Callable[[], socket.socket]) -> None:
    busy = [connect() for _ in range(MOST)]
    for connection in busy:
        connection.sendall(GET % b"slow")
    time.sleep(0.3)
    status, body = send_request(connect(), GET % b"")
    assert (status, json.loads(body)["error"][:25]) == (503, f"{MOST} requests are in progress"[:25])
    busy[0].close()
    time.sleep(0.3)
    assert send_request(connect(), GET % b"") == (200, "Ok")


@pytest.mark.parametrize(
    ("sent", "status", "message"),
    [
        (b"rubbish\r\n\r\n", 400, "no HTTP/1.1 request"),
        (b"GET nowhere HTTP/1.1\r\nHost: x\r\n\r\n", 400, "no HTTP/1.1 request"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * 300_000, 431, "larger than 131072 bytes"),
    ],
)
def test_invalid_requests_get_json(
    connect: Callable[[], socket.socket], sent: bytes, status: int, message: str
) -> None:
    got, body = send_request(connect(), sent)
    assert (got, message in json.loads(body)["error"]) == (status, True)


@pytest.mark.slow
def test_an_unread_body_is_cut_off(connect: Callable[[], socket.socket]) -> None:
    """Test that an endless body ends, because it would keep its connection open after the response."""
    endless = connect()
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert send_request(endless, head) == (200, "Ok")
    deadline = time.monotonic() + 10
    with suppress(OSError):  # a reset, or a broken pipe
        while time.monotonic() < deadline:
            endless.sendall(b"1\r\nx\r\n")
            time.sleep(0.05)
    assert time.monotonic() < deadline
