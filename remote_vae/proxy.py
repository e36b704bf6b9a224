"""A local address that brings requests to a protected endpoint, and waits while it starts: `remote-vae proxy`.

So any client reaches it unchanged, in any language, though it knows neither tokens nor cold starts. Bodies and
responses pass through as they come. A request's body is kept until the response begins, in memory and then on disk, to
send it again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from tempfile import SpooledTemporaryFile
from urllib.parse import urlsplit

import httpx2 as httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tenacity import AsyncRetrying

from remote_vae.client import MAX_ERROR, NOT_READY, Client, RemoteVAEError
from remote_vae.client import Response as Whole

IN_MEMORY = 16 * 1024 * 1024
"""Bytes of a body; more go to disk."""

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
"""Headers that are of one connection (RFC 9110, section 7.6.1)."""

OF_THE_CLIENT = {"cookie", "expect", "forwarded", "host", "origin", "referer", "x-real-ip"}
"""Headers that end here, beside X-Forwarded-* and Sec-Fetch-*.

They tell of the client and of this address, which are no business of the endpoint's; a browser's cookies for this
address are those of any other program of this machine.
"""

OF_THE_ENDPOINT = {"set-cookie"}
"""Headers of a response that end here: a browser would send that cookie to other programs of this machine."""

LOOPBACK = ["127.0.0.1", "localhost", "::1"]


def build_proxy(client: Client, hosts: list[str]) -> Starlette:
    """The app.

    Args:
        hosts: names in the `Host` header of the requests that are taken; "*" is any.
    """

    async def forward(request: Request) -> Response:
        if reason := refusal(request.headers, hosts):
            return JSONResponse({"error": reason}, status_code=403)
        if not client.headers and len(request.headers.getlist("authorization")) > 1:
            return JSONResponse({"error": "send one Authorization header, not several"}, status_code=400)
        body = Body(request)
        try:
            response = await send(request.app.state.http, client, request, body)
        except RemoteVAEError as error:
            return JSONResponse({"error": str(error)}, status_code=error.status or 504)
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            body.close()
        passed = StreamingResponse(
            response.aiter_raw(), response.status_code, background=BackgroundTask(response.aclose)
        )
        passed.raw_headers = passing(response.headers.raw, OF_THE_ENDPOINT)
        return passed

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        async with httpx.AsyncClient(timeout=client.times, limits=limits) as app.state.http:
            app.state.http.headers.clear()  # of its own: the client's pass
            yield

    methods = ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"]
    return Starlette(routes=[Route("/{path:path}", forward, methods=methods)], lifespan=lifespan)


def refusal(headers: Headers, hosts: list[str]) -> str | None:
    """Why a request is not taken; None for one that is.

    A web page must not use the token, and any that the user opens can make the browser send requests here. Browsers say
    where a request comes from: `Origin`, `Sec-Fetch-Site`, and `Referer` where there is no other. A page that names its
    own host as this machine's address (DNS rebinding) has that name in `Host`. Other clients send none of this.
    """
    named = headers.getlist("host")
    if len(named) != 1 or ("*" not in hosts and _name(f"//{named[0]}") not in hosts):
        return f"this proxy is not {', '.join(named)[:100]!r}; it takes requests to {', '.join(hosts)}"
    if any(site not in ("same-origin", "none") for site in headers.getlist("sec-fetch-site")):
        return "a page of another site may not use this proxy; open its own address, or use a client that is no browser"
    for sender in headers.getlist("origin") + headers.getlist("referer"):
        if _authority(sender) != named[0].lower():
            return f"a page of {sender[:100]!r} may not use this proxy"
    return None


def _authority(url: str) -> str | None:
    """Host and port as they stand in a URL; None where there are none."""
    try:
        return urlsplit(url).netloc.lower() or None
    except ValueError:
        return None


def _name(url: str) -> str | None:
    """The host in a URL, without its port."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def passing(headers: Iterable[tuple[bytes, bytes]], ending: Iterable[str]) -> list[tuple[bytes, bytes]]:
    """The headers that go on, as often as they came; not those of the connection, and not those that end here."""
    found = [(name.decode("latin-1").lower(), name, value) for name, value in headers]
    named = {
        name.strip() for key, _, value in found if key == "connection" for name in value.decode("latin-1").split(",")
    }
    dropped = {*HOP_BY_HOP, *ending, *map(str.lower, named)}
    if any(key == "transfer-encoding" for key, _, _ in found):
        dropped.add("content-length")  # which the other one overrides
    private = ("x-forwarded-", "sec-fetch-")
    return [(name, value) for key, name, value in found if key not in dropped and not key.startswith(private)]


class Body:
    """What the client sends, as often as it is needed. It is read once, while it is sent for the first time."""

    def __init__(self, request: Request) -> None:
        self._coming = request.stream()
        self._came = SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115

    async def chunks(self) -> AsyncIterator[bytes]:
        self._came.seek(0)
        while chunk := self._came.read(1 << 16):
            yield chunk
        async for chunk in self._coming:
            self._came.write(chunk)
            yield chunk

    def close(self) -> None:
        self._came.close()


async def send(http: httpx.AsyncClient, client: Client, request: Request, body: Body) -> httpx.Response:
    """The response's head, once there is one that is not about a replica that starts.

    It is sent with one `Authorization`: the token of `client` in place of any other, or without one what came.

    Raises:
        RemoteVAEError: patience is over, or nobody is there.
    """
    own = {name.lower() for name in client.headers}
    headers = passing(request.headers.raw, {*OF_THE_CLIENT, *own})
    headers += [(name.encode(), value.encode()) for name, value in client.headers.items()]
    base = httpx.URL(client.url)
    query = b"?" + request.scope["query_string"] if request.scope["query_string"] else b""
    url = base.copy_with(raw_path=base.raw_path.rstrip(b"/") + request.scope["raw_path"] + query)
    has_body = "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"
    async for attempt in client.attempts(AsyncRetrying):
        with attempt, client.errors_of_the_way():
            if attempt.retry_state.attempt_number > 1:
                awake = http.build_request("GET", client.url + "/health", headers=client.headers)
                await check(client, await http.send(awake, stream=True), "/health")
            content = body.chunks() if has_body else None
            message = http.build_request(request.method, url, headers=headers, content=content)
            response = await http.send(message, stream=True)
            client.has_responded = True
            if response.status_code in NOT_READY:
                await check(client, response, request.url.path)
            return response
    raise AssertionError  # one of the attempts has returned or raised


async def check(client: Client, response: httpx.Response, path: str) -> None:
    """Ends a response, and raises `RemoteVAEError` with its words unless it is a success."""
    content = b""
    try:
        async for chunk in response.aiter_raw():
            content += chunk
            if len(content) >= MAX_ERROR:
                break
    finally:
        await response.aclose()
    client.check(Whole(response.status_code, response.headers, content[:MAX_ERROR]), path)
