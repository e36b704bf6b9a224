"""Check of callers in a browser: pages of other origins, and names that were rebound to this machine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from handlers.serving.errors import RequestError

PORTS = {"http": 80, "https": 443}


class CallerCheck:
    """ASGI middleware that refuses requests of pages in a browser that are not allowed to call the service.

    A browser sends some requests for any page: the POST of a form, the GET of an image. Other clients send neither
    `Origin` nor `Sec-Fetch-Site`, and are not affected.
    """

    def __init__(
        self, app: ASGIApp, origins: Sequence[str], refuse: Callable[[Request, RequestError], Awaitable[Response]]
    ) -> None:
        """Allow pages of `origins`, or all for "*". `refuse` makes the response to all others."""
        self.app, self.origins, self.refuse = app, origins, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            request = Request(scope)
            try:
                self.check_host(request)
                self.check_origin(request)
            except RequestError as error:
                response = await self.refuse(request, error)
                return await response(scope, receive, send)
        await self.app(scope, receive, send)

    def check_host(self, request: Request) -> None:
        """Refuse foreign host names on a loopback address, against DNS rebinding.

        When `a.example` is rebound to 127.0.0.1, its pages have the same origin as this server.

        Raises:
            RequestError: status 403.
        """
        own, host = request.app.state.loopback_host, request.headers.get("host")
        if own is None or not host or "*" in self.origins:
            return
        name = _split(f"//{host}")[0]
        if name in {own.lower(), *(_split(origin)[0] for origin in self.origins)} or _is_local(name):
            return
        raise RequestError(
            f"the Host {host[:100]!r} is no name of this server, which listens on {own}; use that address, or set "
            f"VAE_CORS_ORIGINS=http://{host[:100]} if the name is this server's",
            403,
        )

    def check_origin(self, request: Request) -> None:
        """Refuse pages of other origins, except for links and health checks, which tell them nothing.

        Raises:
            RequestError: status 403.
        """
        headers, reads = request.headers, request.method in ("GET", "HEAD")
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if "*" in self.origins or (origin and origin.lower() in self.origins):
            return
        if reads and (request.scope["path"] in ("/", "/health") or headers.get("sec-fetch-mode") == "navigate"):
            return
        if site in ("same-origin", "none"):  # only browsers set this header
            return
        if site or (origin and not self.is_own(origin, request)):
            page = f"a page of {origin[:100]!r}" if origin else "a page of another origin"
            raise RequestError(f"{page} may not call this service; VAE_CORS_ORIGINS allows origins", 403)

    def is_own(self, origin: str, request: Request) -> bool:
        """Return whether an origin is this service, by the host name that the client or its proxy used."""
        scheme = origin.partition(":")[0].lower()
        hosts = [request.headers.get(name, "").split(",")[0].strip() for name in ("host", "x-forwarded-host")]
        return _split(origin)[0] is not None and any(
            host and _split(origin) == _split(f"{scheme}://{host}") for host in hosts
        )


def _split(url: str) -> tuple[str | None, int | None]:
    """Return host name and port of an origin or `//host`; None for an invalid one."""
    try:
        parts = urlsplit(url.lower())
        return parts.hostname, parts.port or PORTS.get(parts.scheme)
    except ValueError:
        return None, None


def _is_local(name: str | None) -> bool:
    """Return whether a name always means this machine. An address cannot be rebound."""
    if not name or name == "localhost" or name.endswith(".localhost"):
        return bool(name)
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
