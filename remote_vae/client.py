"""HTTP client of one endpoint: it adds the token, waits for a replica that starts, and raises the service's errors."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import responses as PHRASES
from threading import Event
from time import monotonic
from typing import Any, TypeVar

import httpx2 as httpx
from huggingface_hub import get_token
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay

from remote_vae.config import read_config
from remote_vae.text import visible

T = TypeVar("T")

logger = logging.getLogger("remote_vae")

ENDPOINTS = ".endpoints.huggingface.cloud"
"""End of the host names of Inference Endpoints. The Hugging Face login is sent to these alone, and over HTTPS."""

NOT_READY = (429, 502, 503)
"""Statuses that the service, or the platform's proxy, returns for now. The same request may succeed later."""

LOADING = "the model is loading"
"""Start of the error while the service loads its model. The Inference Toolkit returns it with status 400."""

MAX_SENDS = 3
"""Times that a request is sent if its connection breaks before the response is complete."""

REPORT_INTERVAL = 30
"""Seconds between two lines about the same wait."""

REFUSED_TIMEOUT = 3
"""Seconds to retry a refused connection at an address that has never responded: the port is probably wrong."""

MAX_ERROR_BYTES = 1 << 16
"""Bytes to read of an error response."""

MAX_SMALL_BYTES = 1 << 24
"""Bytes to read of a response for which the caller gives no bound, such as `/config`."""

URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?P<host>[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*|\[(?P<ipv6>[0-9a-f:.]+)\])"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?:/[!-\[\]-~]*)?",
    re.IGNORECASE | re.ASCII,
)
"""An endpoint's URL, in which every reader sees the same host. The path is any printable ASCII but a backslash."""


class RemoteVAEError(Exception):
    """An error that the service returned, or that occurred on the way to it. It never contains a token.

    Control characters, which a terminal would obey, are written as escapes.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(visible(message))
        self.status = status
        """Status of the response; None if there was no response."""


class NotReady(RemoteVAEError):
    """The service starts, is full, or cannot be reached. The same request may succeed later."""

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after


class ConnectionRefused(NotReady):
    """The connection is refused, and nothing has ever responded at this address."""


class ConnectionBroken(RemoteVAEError):
    """The connection ended before the response was complete."""


class NoResponse(RemoteVAEError):
    """Nothing arrived for `timeout` seconds."""


class Paused(RemoteVAEError):
    """The endpoint is paused. Its owner must resume it."""


@dataclass(frozen=True)
class Response:
    """A complete response."""

    status: int
    headers: Mapping[str, str]
    """Headers by name, in upper or lower case."""
    content: bytes
    seconds: float = 0
    """Time from the start of the request to the end of the response."""


class Client:
    """Client of one endpoint. It keeps its connections open. Threads may share it.

    Args:
        url: URL of the endpoint, as `make deploy` or `make serve` prints it.
        token: Bearer token for this URL. None: the Hugging Face login, for hosts of Inference Endpoints. "": no token.
        trusted_hosts: further hosts to which the Hugging Face login may be sent.
        retry_timeout: seconds for which a request is retried while the service starts or is full.
        timeout: seconds without a byte after which a request fails.
        report: function that gets a line while a request waits; by default it writes to the log `remote_vae`.

    Raises:
        ValueError: `url` is no URL of an endpoint, or `token` contains characters that no token has.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        trusted_hosts: Collection[str] = (),
        retry_timeout: float = 900,
        timeout: float = 330,
        report: Callable[[str], None] = logger.warning,
    ) -> None:
        scheme, host = _parse_url(url)
        self.url = url.rstrip("/")
        self.retry_timeout = retry_timeout
        self.timeout = timeout
        self.report = report
        self._token = _login(scheme, host, trusted_hosts) if token is None else token
        if not (self._token or "").isprintable() or not (self._token or "").isascii():
            raise ValueError(
                "the token contains characters that no token has, such as a line break: expected printable ASCII; "
                "copy the token again"
            )
        self.headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        """Headers of every request. Only these contain the token."""
        self.has_responded = False
        """True once anything has responded at this address."""
        self._cancelled = Event()
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self.times = httpx.Timeout(timeout, connect=10, pool=None)
        identity = {"Accept-Encoding": "identity"}  # no response grows after its bytes are counted
        self._http = httpx.Client(headers={**identity, **self.headers}, timeout=self.times, limits=limits)
        weakref.finalize(self, self._http.close)

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __deepcopy__(self, memo: Any) -> Client:
        """Return this client: a copied pipeline shares its connections."""
        return self

    def config(self) -> dict[str, Any]:
        """Return the service's `GET /config`. Every entry that this package reads is checked.

        Raises:
            RemoteVAEError: the request failed, or the response is no config of a service of this project.
        """
        return self.read_config(self.request("GET", "/config"))

    def read_config(self, response: Response) -> dict[str, Any]:
        """Return the config in a response of `GET /config`, as `config` does."""
        try:
            return read_config(response.content)
        except ValueError as error:
            message = f"{self.url}/config: {error}; is this a service of this project?"
            raise RemoteVAEError(message) from None

    def request(self, method: str, path: str, *, max_bytes: int = MAX_SMALL_BYTES, **arguments: Any) -> Response:
        """Send a request, and again until there is a response. A request changes nothing, so this is safe.

        Args:
            max_bytes: size of the largest valid response.
            arguments: arguments of httpx.

        Raises:
            RemoteVAEError: the service refused the request, did not respond in time, or sent more than `max_bytes`.
        """
        return self._retry(lambda: self.send(method, path, max_bytes, **arguments), has_body=method == "POST")

    def stream(self, path: str, *, max_bytes: int, **arguments: Any) -> Iterator[bytes]:
        """POST until a response begins, and yield its bytes as they arrive.

        Raises:
            RemoteVAEError: as `request`; or the connection broke in the middle. Nothing is sent again then.
        """
        yield from self.read(self._retry(lambda: self.open("POST", path, **arguments), has_body=True), path, max_bytes)

    def read(self, response: httpx.Response, path: str, max_bytes: int) -> Iterator[bytes]:
        """Yield the body of a response, and close it."""
        try:
            yield from self._chunks(response, path, max_bytes)
        finally:
            response.close()

    def cancel(self) -> None:
        """End the retries of all requests that run now in other threads. Each raises its last error."""
        self._cancelled.set()
        self._cancelled = Event()

    def _retry(self, send: Callable[[], T], has_body: bool) -> T:
        cancelled = self._cancelled
        for attempt in self.attempts(Retrying, sleep=cancelled.wait, is_cancelled=cancelled.is_set):
            with attempt:
                if has_body and attempt.retry_state.attempt_number > 1:
                    self.send("GET", "/health")  # before many megabytes are sent again
                return send()
        raise AssertionError  # one of the attempts has returned or raised

    def send(self, method: str, path: str, max_bytes: int = MAX_SMALL_BYTES, **arguments: Any) -> Response:
        """Send a request once, as `request` does with its attempts."""
        start = monotonic()
        response = self.open(method, path, **arguments)
        try:
            content = b"".join(self._chunks(response, path, max_bytes))
        finally:
            response.close()
        return Response(response.status_code, response.headers, content, monotonic() - start)

    def open(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Return a successful response whose body is not read yet."""
        with self.translated_errors():
            response = self._http.send(self._http.build_request(method, self.url + path, **arguments), stream=True)
        self.has_responded = True
        try:
            if not response.is_success:
                with self.translated_errors():
                    content = _first_bytes(response.iter_raw())
                if response.status_code == 404 and path != "/":
                    self._load_model()
                self.check(Response(response.status_code, response.headers, content), path)
            if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
                message = f"the response is encoded ({encoding[:50]}): expected no encoding, as the request says"
                raise RemoteVAEError(f"{self.url}{path}: {message}")
        except BaseException:
            response.close()
            raise
        return response

    def _load_model(self) -> None:
        """POST nothing. A toolkit that has unloaded its idle model loads it then, and has none of our paths before.

        Raises:
            NotReady: the model is loading.
        """
        try:
            self.send("POST", "/")
        except RemoteVAEError as error:
            if isinstance(error, NotReady) and LOADING in str(error):
                raise

    def _chunks(self, response: httpx.Response, path: str, max_bytes: int) -> Iterator[bytes]:
        """Yield the body, and read no more of it than a valid one has."""
        count = 0
        with self.translated_errors():
            for chunk in response.iter_raw():
                count += len(chunk)
                if count > max_bytes:
                    message = f"the response is too long: expected at most {max_bytes / 1e6:.1f} MB"
                    raise RemoteVAEError(f"{self.url}{path}: {message}; is this a service of this project?")
                yield chunk

    def attempts(
        self, retrying: Callable[..., T], is_cancelled: Callable[[], bool] = lambda: False, **options: Any
    ) -> T:
        """Return a `Retrying` or `AsyncRetrying` with this client's rules. It reports what it waits for."""
        is_over = stop_after_delay(self.retry_timeout)
        return retrying(
            retry=retry_if_exception_type((NotReady, ConnectionBroken)),
            stop=lambda state: is_over(state) or is_cancelled() or _is_hopeless(state),
            wait=self._wait,
            before_sleep=_Reporter(self),
            reraise=True,
            **options,
        )

    def _wait(self, state: RetryCallState) -> float:
        """Return the seconds until the next attempt: Retry-After up to 60 s, else 1, 2, 4, ... 10 s."""
        retry_after = getattr(_last_error(state), "retry_after", None)
        seconds = min(2 ** (state.attempt_number - 1), 10) if retry_after is None else min(retry_after, 60)
        return max(min(seconds, self.retry_timeout - (state.seconds_since_start or 0)), 0)

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Raise `RemoteVAEError` in place of httpx's errors."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if _is_caused_by(error, socket.gaierror):
                message = f"the host name in {self.url} is unknown; is it spelled correctly, and is there a network?"
                raise RemoteVAEError(message) from None
            if _is_caused_by(error, ConnectionRefusedError) and not self.has_responded:
                message = "connection refused, nothing listens there; is the port right, and is the server running?"
                raise ConnectionRefused(f"{self.url} cannot be reached: {message}") from None
            raise NotReady(f"{self.url} cannot be reached ({error})") from None
        except httpx.TimeoutException:
            raise NoResponse(f"{self.url} did not respond for {self.timeout:g} s") from None
        except httpx.TransportError as error:
            message = f"the connection to {self.url} broke before the response was complete ({error})"
            raise ConnectionBroken(message) from None
        except (httpx.RequestError, httpx.InvalidURL, UnicodeError) as error:
            raise RemoteVAEError(f"{self.url}: {error}") from None

    def check(self, response: Response, path: str) -> None:
        """Raise `RemoteVAEError` with the service's message unless the response is a success."""
        status = response.status
        if 200 <= status < 300:
            return
        text = self._error_text(response)
        message = f"{self.url}{path}: {status} {text}"
        if status in NOT_READY or (status == 400 and text.startswith(LOADING)):
            raise NotReady(message, status, _retry_after(response.headers.get("retry-after")))
        error = Paused if status == 400 and "Invalid state" in message else RemoteVAEError
        raise error(message + _advice(status, message, self._token), status)

    def _error_text(self, response: Response) -> str:
        """Return the message of the service or of the proxy, without the token."""
        if 300 <= response.status < 400:
            text = f"it redirects to {response.headers.get('location', 'nowhere')[:300]}, which is not followed"
        else:
            try:
                text = str(json.loads(response.content)["error"])[:1000]
            except (ValueError, KeyError, TypeError, RecursionError):
                body = "" if "content-encoding" in response.headers else response.content.decode(errors="replace")
                text = " ".join(body.split())[:300] or PHRASES.get(response.status, "")
        return text.replace(self._token, "<token>") if self._token else text


class _Reporter:
    """Callback of tenacity that reports a wait: at first, when its status changes, and every `REPORT_INTERVAL`."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.last: tuple[int | None, float] | None = None

    def __call__(self, state: RetryCallState) -> None:
        error = _last_error(state)
        now, status = monotonic(), getattr(error, "status", None)
        if self.last and self.last[0] == status and now - self.last[1] < REPORT_INTERVAL:
            return
        self.last = (status, now)
        waited, timeout = state.seconds_since_start or 0, self.client.retry_timeout
        self.client.report(f"{error}; retrying, {waited:.0f} s of at most {timeout:.0f} s so far")


def _first_bytes(chunks: Iterator[bytes]) -> bytes:
    """Return the start of an error's body."""
    content = b""
    for chunk in chunks:
        content += chunk
        if len(content) >= MAX_ERROR_BYTES:
            break
    return content[:MAX_ERROR_BYTES]


def _parse_url(url: str) -> tuple[str, str]:
    """Return the scheme and the host of an endpoint's URL, in lower case.

    Raises:
        ValueError: it is no such URL, or two readers may see different hosts in it.
    """
    if any(mark in url for mark in "@?#"):  # a URL with a password must not be printed
        raise ValueError("the URL of an endpoint contains a user, password, query or fragment: remove it")
    match = URL.fullmatch(url)
    if not match or not 0 < int(match["port"] or 80) < 1 << 16:
        raise ValueError(
            f"{visible(url)!r} is no URL of an endpoint: expected https://HOST or http://HOST:PORT, and maybe /PATH; "
            "a host has letters, digits, '.', '-' and '_'"
        )
    return match["scheme"].lower(), (match["ipv6"] or match["host"]).lower()


def _login(scheme: str, host: str, trusted_hosts: Collection[str]) -> str | None:
    """Return the user's Hugging Face token if it may be sent to this host."""
    is_trusted = (scheme == "https" and host.endswith(ENDPOINTS)) or host in {name.lower() for name in trusted_hosts}
    return get_token() if is_trusted else None


def _last_error(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome else None


def _is_hopeless(state: RetryCallState) -> bool:
    """Return True if the connection broke too often, or nothing listens at the address."""
    error, waited = _last_error(state), state.seconds_since_start or 0
    if isinstance(error, ConnectionBroken):
        return state.attempt_number >= MAX_SENDS
    return isinstance(error, ConnectionRefused) and waited >= REFUSED_TIMEOUT


def _retry_after(header: str | None) -> float | None:
    """Return the seconds in a `Retry-After` header; None if it is missing or a date."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return max(seconds, 0.1) if math.isfinite(seconds) else None


def _is_caused_by(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Search an error's causes for one of this type. asyncio raises a group of errors if a connection fails."""
    if error is None or isinstance(error, kind):
        return error is not None
    causes = (error.__cause__ or error.__context__, *getattr(error, "exceptions", ()))
    return any(_is_caused_by(cause, kind) for cause in causes)


def _advice(status: int, message: str, token: str | None) -> str:
    if status in (401, 403):
        return "; the token is not accepted" if token else "; pass a token: RemoteVAE(url, token=...)"
    if status == 400 and "Invalid state" in message:
        return "; this is the message of a paused endpoint: make resume MODEL=..."
    if status == 404 and "/config: " in message:
        return "; this is no service of this project, or one before its version 0.1"
    return ""
