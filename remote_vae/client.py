"""HTTP to one endpoint: its token, patience with a replica that starts, and errors in the service's own words."""

from __future__ import annotations

import logging
import socket
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx2 as httpx
from huggingface_hub import get_token
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay

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


class RemoteVAEError(Exception):
    """What the service said of a request, or what happened on the way to it. It never holds a token."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """Of the answer; None where there was none."""


class NotReady(RemoteVAEError):
    """The service starts, or has no place free, or is not reached; the same request may succeed later."""

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after


class ConnectionBroken(RemoteVAEError):
    """The connection ended before the answer did."""


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
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"{url!r} is no URL of an endpoint: expected https://... or http://...")
        if address.username or address.password or address.query or address.fragment:
            raise ValueError("the URL of an endpoint holds no user, password, query or fragment")
        self.url = url.rstrip("/")
        self.patience = patience
        self.timeout = timeout
        self._token = _login(address.scheme, address.hostname, trusted_hosts) if token is None else token
        if not (self._token or "").isprintable() or not (self._token or "").isascii():
            raise ValueError("the token has characters that no token has, such as a line's end: is it copied whole?")
        self.headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        """Of every request. The one thing here that holds the token."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self.times = httpx.Timeout(timeout, connect=10, pool=None)
        self._http = httpx.Client(headers=self.headers, timeout=self.times, limits=limits)
        weakref.finalize(self, self._http.close)

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def __deepcopy__(self, memo: Any) -> Client:
        """A copy of a pipeline talks through the same connections."""
        return self

    def config(self) -> dict[str, Any]:
        """What the service says of itself: its `GET /config`."""
        answer = self.request("GET", "/config")
        try:
            return answer.json()
        except ValueError:
            raise RemoteVAEError(f"{self.url}/config is no JSON: is this a service of this project?") from None

    def request(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """Sends it until there is an answer: requests change nothing, so they may be sent again.

        Raises:
            RemoteVAEError: the service refused it, or did not answer in time.
        """
        for attempt in self.attempts(Retrying):
            with attempt:
                if attempt.retry_state.attempt_number > 1 and method == "POST":
                    self._send("GET", "/health")  # before a body of many megabytes goes once more
                return self._send(method, path, **arguments)
        raise AssertionError  # one of the attempts has returned or raised

    def stream(self, path: str, **arguments: Any) -> Iterator[bytes]:
        """POSTs until an answer begins, and gives its bytes as they come.

        Raises:
            RemoteVAEError: as `request`; or the connection broke midway, after which nothing is sent again.
        """
        for attempt in self.attempts(Retrying):
            with attempt:
                if attempt.retry_state.attempt_number > 1:
                    self._send("GET", "/health")
                answer = self._begin(path, **arguments)
        try:
            with self.errors_of_the_way():
                yield from answer.iter_bytes()
        finally:
            answer.close()

    def _begin(self, path: str, **arguments: Any) -> httpx.Response:
        """An answer whose body is still to come."""
        with self.errors_of_the_way():
            answer = self._http.send(self._http.build_request("POST", self.url + path, **arguments), stream=True)
            if not answer.is_success:
                answer.read()
        self.check(answer, path)
        return answer

    def attempts(self, kind: Callable[..., T]) -> T:
        """Of tenacity's kind: as many as patience allows, with a line that says what is waited for."""
        return kind(
            retry=retry_if_exception_type((NotReady, ConnectionBroken)),
            stop=lambda state: stop_after_delay(self.patience)(state) or _broke_too_often(state),
            wait=_wait,
            before_sleep=_Report(self),
            reraise=True,
        )

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        with self.errors_of_the_way():
            answer = self._http.request(method, self.url + path, **arguments)
        self.check(answer, path)
        return answer

    @contextmanager
    def errors_of_the_way(self) -> Iterator[None]:
        """httpx's errors as ours."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if _is_unknown_name(error):
                message = f"the name in {self.url} is not known: is it spelt right, and is there a network?"
                raise RemoteVAEError(message) from None
            raise NotReady(f"{self.url} cannot be reached ({error})") from None
        except httpx.TimeoutException:
            raise RemoteVAEError(f"{self.url} gave no answer for {self.timeout:g} s") from None
        except httpx.TransportError as error:
            message = f"the connection to {self.url} broke before the answer was complete ({error})"
            raise ConnectionBroken(message) from None
        except (httpx.RequestError, httpx.InvalidURL, UnicodeError) as error:
            raise RemoteVAEError(f"{self.url}: {error}") from None

    def check(self, answer: httpx.Response, path: str) -> None:
        """Raises `RemoteVAEError` with the service's words unless the answer, which has been read, is a success."""
        if answer.is_success:
            return
        message = f"{self.url}{path}: {answer.status_code} {self._words(answer)}"
        if answer.status_code in NOT_READY:
            raise NotReady(message, answer.status_code, _seconds(answer.headers.get("retry-after")))
        raise RemoteVAEError(message + _advice(answer.status_code, message, self._token), answer.status_code)

    def _words(self, answer: httpx.Response) -> str:
        """The service's own, or the proxy's."""
        try:
            words = str(answer.json()["error"])
        except (ValueError, KeyError, TypeError):
            words = " ".join(answer.text.split())[:300] or answer.reason_phrase
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


def _login(scheme: str, host: str, trusted_hosts: Collection[str]) -> str | None:
    """The user's Hugging Face token, for the hosts that it may be sent to."""
    trusted = (scheme == "https" and host.endswith(ENDPOINTS)) or host in trusted_hosts
    return get_token() if trusted else None


def _error(state: RetryCallState) -> BaseException | None:
    """What the last try failed with."""
    return state.outcome.exception() if state.outcome else None


def _broke_too_often(state: RetryCallState) -> bool:
    return isinstance(_error(state), ConnectionBroken) and state.attempt_number >= RESENT


def _wait(state: RetryCallState) -> float:
    """As long as the service says, at most a minute; else 1, 2, 4, ... 10 s."""
    asked = getattr(_error(state), "retry_after", None)
    return min(asked, 60) if asked is not None else min(2 ** (state.attempt_number - 1), 10)


def _seconds(retry_after: str | None) -> float | None:
    try:
        return max(float(retry_after), 0.1) if retry_after else None
    except ValueError:  # a date
        return None


def _is_unknown_name(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, socket.gaierror):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _advice(status: int, message: str, token: str | None) -> str:
    if status in (401, 403):
        return "; the token is not taken" if token else "; it needs a token: RemoteVAE(url, token=...)"
    if status == 400 and "Invalid state" in message:
        return "; a paused endpoint says so: make resume MODEL=..."
    if status == 404 and "/config: " in message:
        return "; this is no service of this project, or one before its version 0.1"
    return ""
