"""HTTP as bytes on a socket, so that a request can be malformed in every way."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from io import BufferedReader
from time import monotonic
from typing import Self
from urllib.parse import urlencode, urlsplit

Address = tuple[str, int]


@dataclass(frozen=True)
class Message:
    """A valid HTTP request with any content."""

    method: str = "POST"
    path: str = "/"
    query: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def header(self, name: str) -> str | None:
        """Return the value of the last header with this name. `name` is in lower case."""
        return {key.lower(): value for key, value in self.headers}.get(name)

    def wire(self, *, close: bool = True) -> bytes:
        """Return the bytes to send. With `close`, ask the server to close the connection after its response."""
        return self.head(close=close) + self.body

    def head(self, *, close: bool = True) -> bytes:
        """Return everything before the body."""
        target = self.path + ("?" + urlencode(self.query, errors="surrogatepass") if self.query else "")
        lines = [f"{self.method} {target} HTTP/1.1"]
        headers = {"Host": "localhost", "Content-Length": str(len(self.body))}
        sent = {name.lower() for name, _ in self.headers}
        lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() not in sent]
        lines += [f"{name}: {value}" for name, value in self.headers]
        lines += ["Connection: close"] if close else []
        return "\r\n".join([*lines, "", ""]).encode()


@dataclass(frozen=True)
class Response:
    status: int
    headers: dict[str, str]
    """Headers with names in lower case."""
    body: bytes

    @property
    def media_type(self) -> str:
        return self.headers.get("content-type", "").split(";")[0]

    @property
    def is_plain_refusal(self) -> bool:
        """Return whether this is uvicorn's own response to bytes that are not HTTP."""
        return self.status == 400 and self.body == b"Invalid HTTP request received."


class NoResponse(Exception):
    """The connection ended without a complete response."""


class Hang(Exception):
    """The response did not arrive in time."""


class _Stream(BufferedReader):
    """A connection's bytes for `HTTPResponse`. It stays open at the end of a response, because more may follow."""

    def makefile(self, mode: str) -> Self:
        return self

    def close(self) -> None:
        pass


class Connection:
    """A connection for a sequence of requests."""

    def __init__(self, address: Address, timeout: float) -> None:
        """Connect. `timeout` is in seconds, for each response. Raise `ConnectionError` if nobody listens."""
        self.timeout = timeout
        with in_time():
            self.socket = socket.create_connection(address, timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._bytes = self.socket.makefile("rb", buffering=0)
        self._stream = _Stream(self._bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._bytes.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send data. The server may have responded and closed the connection before it read everything."""
        with suppress(BrokenPipeError, ConnectionResetError), in_time():
            self.socket.sendall(data)

    def end(self) -> None:
        """End the sending side. A response can still arrive."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def receive(self, method: str = "POST") -> Response:
        """Return the next response. Raise `Hang` or `NoResponse`."""
        start = monotonic()
        response = HTTPResponse(self._stream, method=method)
        try:
            with in_time():
                response.begin()
                body = response.read()
        except (ConnectionError, HTTPException) as error:
            raise NoResponse(f"{type(error).__name__}: {error}") from None
        if monotonic() - start > self.timeout:
            raise Hang(f"{response.status} after {monotonic() - start:.1f} s")
        return Response(response.status, {name.lower(): value for name, value in response.getheaders()}, body)


@contextmanager
def in_time() -> Iterator[None]:
    """Raise `Hang` at the socket's timeout."""
    try:
        yield
    except TimeoutError:
        raise Hang("no response in time") from None


def send_request(
    address: Address, wire: bytes, timeout: float, *, method: str = "POST", ends: bool = False
) -> Response:
    """Send bytes on a new connection and return the response.

    Args:
        ends: end the sending side afterwards, because the request is shorter than its length says.

    Raises:
        ConnectionError: nobody listens.
        NoResponse: the connection ended without a complete response.
        Hang: no response arrived within `timeout` seconds.
    """
    with Connection(address, timeout) as connection:
        connection.send(wire)
        if ends:
            connection.end()
        return connection.receive(method)


def parse_address(url: str) -> Address:
    split_url = urlsplit(url)
    return split_url.hostname, split_url.port
