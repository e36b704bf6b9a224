"""Several endpoints of one model. A request goes to the least busy, and to another if that one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event, Lock
from time import monotonic
from typing import Any, TypeVar

from tenacity import Retrying

from remote_vae.client import (
    Client,
    ConnectionBroken,
    ConnectionRefused,
    NoResponse,
    NotReady,
    Paused,
    RemoteVAEError,
    Response,
)

T = TypeVar("T")

SAME = ("model", "checkpoint", "vae_class", "vae_config", "buffers", "dtype", "latents", "pixels", "limits")
"""Entries of `/config` that all endpoints must have in common."""

HALF_LIFE = 10
"""Seconds after which half of an idle endpoint's slowness is forgotten, so that it is tried again."""

MAX_PAUSE = 60
"""Most seconds without a request to an endpoint that fails."""


@dataclass
class Endpoint:
    """One endpoint and its load."""

    client: Client
    is_checked: bool = False
    """True once its config is known to be that of the others."""
    started: list[float] = field(default_factory=list)
    """Moments at which its requests in flight were sent."""
    seconds: float = 0
    """Recent time of a request."""
    ended: float = 0
    """Moment at which its last request ended."""
    failures: int = 0
    """Requests that failed one after the other."""
    paused_until: float = 0

    def load(self, now: float) -> tuple[float, int]:
        """Return an estimate of the seconds that one more request takes, and the requests in flight."""
        recent = self.seconds * 0.5 ** ((now - self.ended) / HALF_LIFE)
        oldest = now - min(self.started, default=now)
        return max(recent, oldest) * (len(self.started) + 1), len(self.started)


class ClientPool:
    """Clients of several endpoints, with the methods of one `Client`. Threads may share it.

    An endpoint that is full, starts, is paused or does not respond gets no request for some seconds. A request fails
    if it fails at all endpoints until `retry_timeout`.

    Args:
        urls: URLs of the endpoints.
        token: token of all endpoints.
        options: further arguments of `Client`.

    Raises:
        ValueError: a URL is none of an endpoint, or is named twice.
    """

    def __init__(self, urls: Sequence[str], token: str | None = None, **options: Any) -> None:
        self.endpoints = [Endpoint(Client(url, token, **options)) for url in urls]
        self.url = " and ".join(endpoint.client.url for endpoint in self.endpoints)
        if not urls or len({endpoint.client.url for endpoint in self.endpoints}) < len(urls):
            raise ValueError(f"the URLs of the endpoints are {self.url or 'missing'}: expected different URLs")
        self._config: dict[str, Any] | None = None
        self._lock, self._config_lock = Lock(), Lock()
        self._cancelled = Event()

    def __repr__(self) -> str:
        return f"ClientPool({[endpoint.client.url for endpoint in self.endpoints]!r})"

    def __deepcopy__(self, memo: Any) -> ClientPool:
        """Return this pool: a copied pipeline shares its connections."""
        return self

    def config(self) -> dict[str, Any]:
        """Return the config that the endpoints have in common. Endpoints that are not ready are compared later.

        Raises:
            RemoteVAEError: no endpoint is ready, or two endpoints do not serve the same model.
        """
        for endpoint in self.endpoints:
            try:
                self._check(endpoint)
            except (NotReady, NoResponse, ConnectionBroken, Paused) as error:
                endpoint.client.report(f"{error}; continuing with the other endpoints")
        self._retry(lambda client: None)
        assert self._config is not None
        return self._config

    def request(self, method: str, path: str, **arguments: Any) -> Response:
        """Send a request to one endpoint, and to others until there is a response. The arguments are those of `Client`.

        Raises:
            RemoteVAEError: an endpoint refused the request, or none responded in time.
        """
        return self._retry(lambda client: client.send(method, path, **arguments))

    def stream(self, path: str, *, max_bytes: int, **arguments: Any) -> Iterator[bytes]:
        """POST until a response begins, and yield its bytes as they arrive.

        Raises:
            RemoteVAEError: as `request`; or the connection broke in the middle. Nothing is sent again then.
        """
        client, response = self._retry(lambda client: (client, client.open("POST", path, **arguments)))
        yield from client.read(response, path, max_bytes)

    def cancel(self) -> None:
        """End the retries of all requests that run now in other threads. Each raises its last error."""
        self._cancelled.set()
        self._cancelled = Event()

    def _retry(self, send: Callable[[Client], T]) -> T:
        cancelled = self._cancelled
        client = self.endpoints[0].client
        for attempt in client.attempts(Retrying, sleep=cancelled.wait, is_cancelled=cancelled.is_set):
            with attempt:
                return self._send_to_any(send)
        raise AssertionError  # one of the attempts has returned or raised

    def _send_to_any(self, send: Callable[[Client], T]) -> T:
        """Send to the least busy endpoint. If that fails, send to the next."""
        errors: list[RemoteVAEError] = []
        tried: list[Endpoint] = []
        while endpoint := self._take(tried, now := monotonic()):
            tried.append(endpoint)
            try:
                self._check(endpoint)
                result = send(endpoint.client)
            except (NotReady, NoResponse, ConnectionBroken, Paused) as error:
                errors.append(error)
                self._put_back(endpoint, now, error)
            except BaseException:
                self._put_back(endpoint, now)
                raise
            else:
                self._put_back(endpoint, now)
                return result
        raise min(errors, key=_hopelessness)

    def _take(self, tried: list[Endpoint], now: float) -> Endpoint | None:
        """Return the least busy endpoint that may be tried, with one more request in flight; None if there is none."""
        with self._lock:
            ready = [each for each in self.endpoints if each not in tried and each.paused_until <= now]
            if not ready and not tried:
                ready = [min(self.endpoints, key=lambda each: each.paused_until)]
            if not ready:
                return None
            endpoint = min(ready, key=lambda each: each.load(now))
            endpoint.started.append(now)
            return endpoint

    def _put_back(self, endpoint: Endpoint, start: float, error: RemoteVAEError | None = None) -> None:
        """Count a request as done. Pause an endpoint that failed: 1, 2, 4, ... seconds, or as long as it says."""
        with self._lock:
            now = monotonic()
            endpoint.started.remove(start)
            endpoint.seconds = now - start
            endpoint.ended = now
            endpoint.failures = endpoint.failures + 1 if error else 0
            if error:
                pause = getattr(error, "retry_after", None) or 2 ** (endpoint.failures - 1)
                endpoint.paused_until = now + min(pause, MAX_PAUSE)

    def _check(self, endpoint: Endpoint) -> None:
        """Compare the config of an endpoint with those of the others before its first request.

        Raises:
            RemoteVAEError: it serves another model, or has other settings.
        """
        if endpoint.is_checked:
            return
        with self._config_lock:
            if endpoint.is_checked:
                return
            client = endpoint.client
            config = client.read_config(client.send("GET", "/config"))
            first = self._config or config
            if different := [name for name in SAME if config[name] != first[name]]:
                raise RemoteVAEError(
                    f"{client.url} differs from the other endpoints in {', '.join(different)} of /config: expected "
                    "endpoints of one model with the same settings"
                )
            self._config, endpoint.is_checked = first, True


def _hopelessness(error: RemoteVAEError) -> tuple[bool, bool]:
    """Order errors: first one that may pass, then a refused connection, then those that nobody waits for."""
    return not isinstance(error, NotReady), isinstance(error, ConnectionRefused)


AnyClient = Client | ClientPool


def connect(url: str | Sequence[str], token: str | None = None, **options: Any) -> AnyClient:
    """Return the client of one URL, or of several that share the load."""
    urls = [url] if isinstance(url, str) else list(url)
    return Client(urls[0], token, **options) if len(urls) == 1 else ClientPool(urls, token, **options)
