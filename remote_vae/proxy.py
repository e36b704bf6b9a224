"""Local proxy of an endpoint: `remote-vae proxy`. It adds the token, and waits for a replica that starts.

So every client reaches a protected endpoint unchanged. Bodies and responses pass through chunk by chunk. The body of a
request is kept, in memory and then on disk, until the response begins: it may have to be sent again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from tempfile import SpooledTemporaryFile
from urllib.parse import SplitResult, urlsplit

import httpx2 as httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tenacity import AsyncRetrying

from remote_vae.client import MAX_ERROR_BYTES, NOT_READY, Client, RemoteVAEError
from remote_vae.client import Response as CompleteResponse

IN_MEMORY = 16 * 1024 * 1024
"""Bytes of a body that are kept in memory; more go to disk."""

HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
"""Headers of one connection (RFC 9110, section 7.6.1)."""

PRIVATE = {"cookie", "expect", "forwarded", "host", "origin", "referer", "x-real-ip"}
PRIVATE_PREFIXES = ("x-forwarded-", "sec-fetch-")
"""Headers of a request that are not forwarded.

They describe the client and this address. A browser's cookies for this address belong to any program of this machine.
"""

PRIVATE_TO_ENDPOINT = {"set-cookie"}
"""Headers of a response that are not forwarded: a browser would send the cookie to other programs of this machine."""

LOOPBACK = ["127.0.0.1", "localhost", "::1"]


def build_proxy(client: Client, hosts: list[str]) -> Starlette:
    """Return the app. It accepts requests whose `Host` header names one of `hosts`; "*" stands for any."""

    async def forward(request: Request) -> Response:
        if reason := refusal(request.headers, hosts):
            return JSONResponse({"error": reason}, status_code=403)
        if not client.headers and len(request.headers.getlist("authorization")) > 1:
            return JSONResponse({"error": "expected one Authorization header, not several"}, status_code=400)
        body = Body(request)
        try:
            response = await send(request.app.state.http, client, request, body)
        except RemoteVAEError as error:
            return JSONResponse({"error": str(error)}, status_code=error.status or 504)
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            body.close()
        forwarded = StreamingResponse(
            response.aiter_raw(), response.status_code, background=BackgroundTask(response.aclose)
        )
        forwarded.raw_headers = forwarded_headers(response.headers.raw, PRIVATE_TO_ENDPOINT)
        return forwarded

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        async with httpx.AsyncClient(timeout=client.times, limits=limits) as app.state.http:
            app.state.http.headers.clear()  # the headers of the client's request replace httpx's own
            yield

    methods = ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"]
    return Starlette(routes=[Route("/{path:path}", forward, methods=methods)], lifespan=lifespan)


def refusal(headers: Headers, hosts: list[str]) -> str | None:
    """Return why a request is refused; None if it is accepted.

    No web page may use the token, but every page that the user opens can make the browser send requests here. Browsers
    say which page sends a request, in `Origin`, `Sec-Fetch-Site` or `Referer`. A page whose own host name resolves to
    this machine (DNS rebinding) has that name in `Host`. Other clients send none of these headers.
    """
    named = headers.getlist("host")
    if len(named) != 1 or ("*" not in hosts and _split(f"//{named[0]}").hostname not in hosts):
        return f"this proxy is not {', '.join(named)[:100]!r}: expected a request to {', '.join(hosts)}"
    if any(site not in ("same-origin", "none") for site in headers.getlist("sec-fetch-site")):
        return "a page of another site may not use this proxy; open its own address, or use a client outside a browser"
    for sender in headers.getlist("origin") + headers.getlist("referer"):
        authority = _split(sender).netloc.lower()
        if not authority or authority != named[0].lower():
            return f"a page of {sender[:100]!r} may not use this proxy; open its own address"
    return None


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def forwarded_headers(headers: Iterable[tuple[bytes, bytes]], private: Iterable[str]) -> list[tuple[bytes, bytes]]:
    """Return the headers to forward, each as often as it occurs: none of the connection, and none of `private`."""
    named = [(name.decode("latin-1").lower(), name, value) for name, value in headers]
    dropped = {*HOP_BY_HOP, *private}
    for key, _, value in named:
        if key == "connection":
            dropped |= {name.strip().lower() for name in value.decode("latin-1").split(",")}
        elif key == "transfer-encoding":
            dropped.add("content-length")  # Transfer-Encoding overrides it
    return [(name, value) for key, name, value in named if key not in dropped and not key.startswith(PRIVATE_PREFIXES)]


class Body:
    """Body of the client's request. It is read once, while it is sent for the first time, and then kept."""

    def __init__(self, request: Request) -> None:
        self._incoming = request.stream()
        self._received = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115

    async def chunks(self) -> AsyncIterator[bytes]:
        self._received.seek(0)
        while chunk := self._received.read(1 << 16):
            yield chunk
        async for chunk in self._incoming:
            self._received.write(chunk)
            yield chunk

    def close(self) -> None:
        self._received.close()


async def send(http: httpx.AsyncClient, client: Client, request: Request, body: Body) -> httpx.Response:
    """Send a request until the response is not one of a replica that starts. Return that response, its body unread.

    The token of `client` replaces the request's own `Authorization`; if `client` has none, the request's own is sent.

    Raises:
        RemoteVAEError: the endpoint cannot be reached, or did not start in time.
    """
    own = {name.lower() for name in client.headers}
    headers = forwarded_headers(request.headers.raw, {*PRIVATE, *own})
    headers += [(name.encode(), value.encode()) for name, value in client.headers.items()]
    base = httpx.URL(client.url)
    query = b"?" + request.scope["query_string"] if request.scope["query_string"] else b""
    url = base.copy_with(raw_path=base.raw_path.rstrip(b"/") + request.scope["raw_path"] + query)
    has_body = "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"
    async for attempt in client.attempts(AsyncRetrying):
        with attempt, client.translated_errors():
            if attempt.retry_state.attempt_number > 1:
                health = http.build_request("GET", client.url + "/health", headers=client.headers)
                await check(client, await http.send(health, stream=True), "/health")
            content = body.chunks() if has_body else None
            message = http.build_request(request.method, url, headers=headers, content=content)
            response = await http.send(message, stream=True)
            client.has_responded = True
            if response.status_code in NOT_READY:
                await check(client, response, request.url.path)
            return response
    raise AssertionError  # one of the attempts has returned or raised


async def check(client: Client, response: httpx.Response, path: str) -> None:
    """Close a response. Raise `RemoteVAEError` with its message unless it is a success."""
    content = b""
    try:
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) >= MAX_ERROR_BYTES:
                break
    finally:
        await response.aclose()
    client.check(CompleteResponse(response.status_code, response.headers, content[:MAX_ERROR_BYTES]), path)
