"""HTTP to one endpoint: its token, patience with a replica that starts, and errors in the service's own words."""

from __future__ import annotations

import ipaddress
import json
import logging
import math
import re
import socket
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx
from huggingface_hub import get_token
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay

from remote_vae.config import read_config
from remote_vae.text import visible

T = TypeVar("T")

logger = logging.getLogger("remote_vae")

ENDPOINTS = ".endpoints.huggingface.cloud"
"""Of the host of every Inference Endpoint. The user's Hugging Face token goes to these alone, and over HTTPS."""

NOT_READY = (429, 502, 503)
"""Statuses of a service, or of the proxy before it, that may be another for the same request later."""

RESENT = 3
"""Times that a request is sent whose connection breaks before the answer is complete."""

REPORTED_EVERY = 30
"""Seconds between two lines that say what is waited for."""

NOBODY_LISTENS = 3
"""Seconds for which refused connections are tried again where nothing has ever responded: the port is wrong then."""

MAX_ERROR = 1 << 16
"""Bytes that are read of an error."""

MAX_SMALL = 1 << 24
"""Bytes that are read of `/config`, `/health`, and of any response for which the caller names no bound."""

HOST = re.compile(r"(?:[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*|\[(?P<ipv6>[0-9a-f:.]+)\])(?::[0-9]{1,5})?", re.I | re.A)
"""Names of hosts that are what they seem, with or without a port."""


class RemoteVAEError(Exception):
    """What the service said of a request, or what happened on the way to it. It never holds a token.

    Control characters, which a terminal would obey, are written as escapes.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(visible(message))
        self.status = status
        """Of the answer; None where there was none."""


class NotReady(RemoteVAEError):
    """The service starts, or has no place free, or is not reached; the same request may succeed later."""

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after


class NobodyListens(NotReady):
    """The connection is refused, and nothing has ever responded at this address."""


class ConnectionBroken(RemoteVAEError):
    """The connection ended before the answer did."""


@dataclass(frozen=True)
class Response:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    """Their names are found in upper and lower case."""
    content: bytes
    seconds: float = 0
    """From the first byte of the request to the last one of the response."""


class Client:
    """One endpoint. It keeps its connections, and any number of threads may use it.

    Args:
        url: of the endpoint, as `make deploy` or `make serve` prints it.
        token: sent as a Bearer token to this URL; None takes the Hugging Face login for hosts of Inference Endpoints,
            "" sends none.
        trusted_hosts: other hosts that the Hugging Face login may be sent to.
        patience: seconds for which a request waits for a service that starts, or has no place free.
        timeout: seconds without a byte after which a request that was sent is given up.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        trusted_hosts: Collection[str] = (),
        patience: float = 900,
        timeout: float = 330,
    ) -> None:
        scheme, host = _scheme_and_host(url)
        self.url = url.rstrip("/")
        self.patience = patience
        self.timeout = timeout
        self._token = _login(scheme, host, trusted_hosts) if token is None else token
        if not (self._token or "").isprintable() or not (self._token or "").isascii():
            raise ValueError("the token has characters that no token has, such as a line's end: is it copied whole?")
        self.headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        """Of every request. The one thing here that holds the token."""
        self.has_responded = False
        """Whether anything ever responded at this address."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self.times = httpx.Timeout(timeout, connect=10, pool=None)
        plain = {"Accept-Encoding": "identity"}  # the bytes that come are counted, and so are those that stay
        self._http = httpx.Client(headers={**plain, **self.headers}, timeout=self.times, limits=limits)
        weakref.finalize(self, self._http.close)

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __deepcopy__(self, memo: Any) -> Client:
        """A copy of a pipeline talks through the same connections."""
        return self

    def config(self) -> dict[str, Any]:
        """What the service says of itself: its `GET /config`, of which every entry that is read here is checked.

        Raises:
            RemoteVAEError: as `request`; or it is not the config of a service of this project.
        """
        response = self.request("GET", "/config")
        try:
            return read_config(response.content)
        except ValueError as error:
            message = f"{self.url}/config: {error}; is this a service of this project?"
            raise RemoteVAEError(message) from None

    def request(self, method: str, path: str, *, max_bytes: int = MAX_SMALL, **arguments: Any) -> Response:
        """Sends it until there is a response: requests change nothing, so they may be sent again.

        Args:
            max_bytes: the most bytes that a right response has.
            arguments: those of httpx.

        Raises:
            RemoteVAEError: the service refused it, did not respond in time, or responded with more than `max_bytes`.
        """
        for attempt in self.attempts(Retrying):
            with attempt:
                if attempt.retry_state.attempt_number > 1 and method == "POST":
                    self._send("GET", "/health", MAX_SMALL)  # before a body of many megabytes goes once more
                return self._send(method, path, max_bytes, **arguments)
        raise AssertionError  # one of the attempts has returned or raised

    def stream(self, path: str, *, max_bytes: int, **arguments: Any) -> Iterator[bytes]:
        """POSTs until a response begins, and gives its bytes as they come.

        Raises:
            RemoteVAEError: as `request`; or the connection broke midway, after which nothing is sent again.
        """
        for attempt in self.attempts(Retrying):
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    self._send("GET", "/health", MAX_SMALL)
                response = self._begin("POST", path, **arguments)
        try:
            yield from self._chunks(response, path, max_bytes)
        finally:
            response.close()

    def _send(self, method: str, path: str, max_bytes: int, **arguments: Any) -> Response:
        start = monotonic()
        response = self._begin(method, path, **arguments)
        try:
            content = b"".join(self._chunks(response, path, max_bytes))
        finally:
            response.close()
        return Response(response.status_code, response.headers, content, monotonic() - start)

    def _begin(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """A response that is a success, and whose body is still to come."""
        with self.errors_of_the_way():
            response = self._http.send(self._http.build_request(method, self.url + path, **arguments), stream=True)
        self.has_responded = True
        try:
            if not response.is_success:
                with self.errors_of_the_way():
                    content = first_bytes(response.iter_raw())
                self.check(Response(response.status_code, response.headers, content), path)
            if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
                message = f"{self.url}{path}: the response is encoded ({encoding[:50]}), which was not asked for"
                raise RemoteVAEError(message)
        except BaseException:
            response.close()
            raise
        return response

    def _chunks(self, response: httpx.Response, path: str, max_bytes: int) -> Iterator[bytes]:
        """The body, of which no more is read than a right one has."""
        count = 0
        with self.errors_of_the_way():
            for chunk in response.iter_raw():
                count += len(chunk)
                if count > max_bytes:
                    message = f"{self.url}{path}: the response is longer than the {max_bytes / 1e6:.1f} MB that a "
                    raise RemoteVAEError(message + "right one has at most; is this a service of this project?")
                yield chunk

    def attempts(self, kind: Callable[..., T]) -> T:
        """Of tenacity's kind: as many as patience allows, with a line that says what is waited for."""
        return kind(
            retry=retry_if_exception_type((NotReady, ConnectionBroken)),
            stop=lambda state: stop_after_delay(self.patience)(state) or _is_hopeless(state),
            wait=self._wait,
            before_sleep=_Report(self),
            reraise=True,
        )

    def _wait(self, state: RetryCallState) -> float:
        """As long as the service says, at most a minute; else 1, 2, 4, ... 10 s. Never longer than patience."""
        asked = getattr(_error(state), "retry_after", None)
        seconds = min(asked, 60) if asked is not None else min(2 ** (state.attempt_number - 1), 10)
        return max(min(seconds, self.patience - (state.seconds_since_start or 0)), 0)

    @contextmanager
    def errors_of_the_way(self) -> Iterator[None]:
        """httpx's errors as ours."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if _is_caused_by(error, socket.gaierror):
                message = f"the name in {self.url} is not known: is it spelt right, and is there a network?"
                raise RemoteVAEError(message) from None
            if _is_caused_by(error, ConnectionRefusedError) and not self.has_responded:
                message = "nothing listens there (connection refused); is the port right, and is the server running?"
                raise NobodyListens(f"{self.url} cannot be reached: {message}") from None
            raise NotReady(f"{self.url} cannot be reached ({error})") from None
        except httpx.TimeoutException:
            raise RemoteVAEError(f"{self.url} gave no answer for {self.timeout:g} s") from None
        except httpx.TransportError as error:
            message = f"the connection to {self.url} broke before the answer was complete ({error})"
            raise ConnectionBroken(message) from None
        except (httpx.RequestError, httpx.InvalidURL, UnicodeError) as error:
            raise RemoteVAEError(f"{self.url}: {error}") from None

    def check(self, response: Response, path: str) -> None:
        """Raises `RemoteVAEError` with the service's words unless the response is a success."""
        status = response.status
        if 200 <= status < 300:
            return
        message = f"{self.url}{path}: {status} {self._words(response)}"
        if status in NOT_READY:
            raise NotReady(message, status, _seconds(response.headers.get("retry-after")))
        raise RemoteVAEError(message + _advice(status, message, self._token), status)

    def _words(self, response: Response) -> str:
        """The service's own, or the proxy's."""
        if 300 <= response.status < 400:
            words = f"it redirects to {response.headers.get('location', 'nowhere')[:300]}, which is not followed"
        else:
            try:
                words = str(json.loads(response.content)["error"])[:1000]
            except (ValueError, KeyError, TypeError, RecursionError):
                text = "" if "content-encoding" in response.headers else response.content.decode(errors="replace")
                words = " ".join(text.split())[:300] or _phrase(response.status)
        return words.replace(self._token, "<token>") if self._token else words


class _Report:
    """Says what is waited for: at first, when it changes, and every half minute."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.said: tuple[int | None, float] | None = None

    def __call__(self, state: RetryCallState) -> None:
        error = _error(state)
        now, status = monotonic(), getattr(error, "status", None)
        if self.said and self.said[0] == status and now - self.said[1] < REPORTED_EVERY:
            return
        self.said = (status, now)
        waited = state.seconds_since_start
        logger.warning("%s; waiting, %.0f s of at most %.0f s so far", error, waited, self.client.patience)


def first_bytes(chunks: Iterator[bytes]) -> bytes:
    """The beginning of an error's body, as much as is read of it."""
    content = b""
    for chunk in chunks:
        content += chunk
        if len(content) >= MAX_ERROR:
            break
    return content[:MAX_ERROR]


def _scheme_and_host(url: str) -> tuple[str, str]:
    """Of an endpoint's URL, in lower case.

    Raises:
        ValueError: it is no such URL, or one that another reader may take for one of another host.
    """
    scheme, separator, rest = url.partition("://")
    if scheme.lower() not in ("http", "https") or not separator:
        raise ValueError(f"{visible(url)!r} is no URL of an endpoint: expected https://... or http://...")
    if any(mark in rest for mark in "@?#"):
        raise ValueError("the URL of an endpoint holds no user, password, query or fragment")
    wrong = f"{visible(url)!r} is no URL of an endpoint: "
    if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
        raise ValueError(wrong + "it has a blank, a backslash, or a character that is not ASCII")
    authority = rest.partition("/")[0]
    found = HOST.fullmatch(authority)
    if not found:
        raise ValueError(wrong + f"{authority!r} is no name of a host, with or without a port")
    address = urlsplit(url)
    try:
        if found["ipv6"]:
            ipaddress.IPv6Address(found["ipv6"])
        if address.port == 0 or not address.hostname:  # `port` raises ValueError above 65535
            raise ValueError("there is no port 0")
    except ValueError as error:
        raise ValueError(wrong + str(error)) from None
    return address.scheme, address.hostname


def _login(scheme: str, host: str, trusted_hosts: Collection[str]) -> str | None:
    """The user's Hugging Face token, for the hosts that it may be sent to."""
    trusted = (scheme == "https" and host.endswith(ENDPOINTS)) or host in {name.lower() for name in trusted_hosts}
    return get_token() if trusted else None


def _error(state: RetryCallState) -> BaseException | None:
    """What the last try failed with."""
    return state.outcome.exception() if state.outcome else None


def _is_hopeless(state: RetryCallState) -> bool:
    """Whether the connection broke too often, or nothing listens."""
    error, waited = _error(state), state.seconds_since_start or 0
    if isinstance(error, ConnectionBroken):
        return state.attempt_number >= RESENT
    return isinstance(error, NobodyListens) and waited >= NOBODY_LISTENS


def _seconds(retry_after: str | None) -> float | None:
    try:
        seconds = float(retry_after or "")
    except ValueError:  # none, or a date
        return None
    return max(seconds, 0.1) if math.isfinite(seconds) else None


def _is_caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error of this kind is behind it; asyncio's connections fail in a group of them."""
    if error is None or isinstance(error, kind):
        return error is not None
    others = (error.__cause__ or error.__context__, *getattr(error, "exceptions", ()))
    return any(_is_caused_by(other, kind) for other in others)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _advice(status: int, message: str, token: str | None) -> str:
    if status in (401, 403):
        return "; the token is not taken" if token else "; it needs a token: RemoteVAE(url, token=...)"
    if status == 400 and "Invalid state" in message:
        return "; a paused endpoint says so: make resume MODEL=..."
    if status == 404 and "/config: " in message:
        return "; this is no service of this project, or one before its version 0.1"
    return ""
