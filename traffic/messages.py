"""HTTP as bytes on a socket, so that a request can be wrong in every way, and the answer to it."""

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
    """A request that is HTTP, whatever it asks for."""

    method: str = "POST"
    path: str = "/"
    query: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def header(self, name: str) -> str | None:
        """The value of the last header of this name, given in lower case."""
        return {key.lower(): value for key, value in self.headers}.get(name)

    def wire(self, *, close: bool = True) -> bytes:
        """The bytes to send; `close` asks the server to end the connection after its answer."""
        return self.head(close=close) + self.body

    def head(self, *, close: bool = True) -> bytes:
        """All before the body."""
        target = self.path + ("?" + urlencode(self.query, errors="surrogatepass") if self.query else "")
        lines = [f"{self.method} {target} HTTP/1.1"]
        headers = {"Host": "localhost", "Content-Length": str(len(self.body))}
        sent = {name.lower() for name, _ in self.headers}
        lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() not in sent]
        lines += [f"{name}: {value}" for name, value in self.headers]
        lines += ["Connection: close"] if close else []
        return "\r\n".join([*lines, "", ""]).encode()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def media_type(self) -> str:
        return self.headers.get("content-type", "").split(";")[0]

    @property
    def is_plain_refusal(self) -> bool:
        """Whether it is uvicorn's own, which refuses what is not HTTP."""
        return self.status == 400 and self.body == b"Invalid HTTP request received."


class NoAnswer(Exception):
    """The connection ended without an answer, or with a part of one."""


class Hang(Exception):
    """No answer in time."""


class _Stream(BufferedReader):
    """A connection's bytes as `HTTPResponse` reads them. It closes what it read to the end; here more may follow."""

    def makefile(self, mode: str) -> Self:
        return self

    def close(self) -> None:
        pass


class Connection:
    """A connection for one request after another."""

    def __init__(self, address: Address, timeout: float) -> None:
        """Raises `ConnectionError` where nobody listens. `timeout` is in seconds, of each answer."""
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
        """Sends what the server takes; it may have answered and closed before it read everything."""
        with suppress(BrokenPipeError, ConnectionResetError), in_time():
            self.socket.sendall(data)

    def end(self) -> None:
        """Nothing more will be sent; an answer can still come."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def receive(self, method: str = "POST") -> Answer:
        """The next answer. Raises `Hang` or `NoAnswer`."""
        start = monotonic()
        response = HTTPResponse(self._stream, method=method)
        try:
            with in_time():
                response.begin()
                body = response.read()
        except (ConnectionError, HTTPException) as error:
            raise NoAnswer(f"{type(error).__name__}: {error}") from None
        if monotonic() - start > self.timeout:
            raise Hang(f"{response.status} after {monotonic() - start:.1f} s")
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, body)


@contextmanager
def in_time() -> Iterator[None]:
    """Raises `Hang` for the socket's timeout."""
    try:
        yield
    except TimeoutError:
        raise Hang("no answer in time") from None


def exchange(address: Address, wire: bytes, timeout: float, *, method: str = "POST", ends: bool = False) -> Answer:
    """Sends bytes on a connection of their own and gives the answer.

    Args:
        ends: end the sending side then, as the request is shorter than it says.

    Raises:
        ConnectionError: nobody listens.
        NoAnswer: the connection ended without an answer.
        Hang: none came within `timeout` seconds.
    """
    with Connection(address, timeout) as connection:
        connection.send(wire)
        if ends:
            connection.end()
        return connection.receive(method)


def address_of(url: str) -> Address:
    parts = urlsplit(url)
    return parts.hostname, parts.port
