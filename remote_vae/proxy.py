"""A local address that brings requests to a protected endpoint, and waits while it starts: `remote-vae proxy`.

So any client reaches it unchanged, in any language, though it knows neither tokens nor cold starts. Bodies and answers
pass through as they come; what was sent is kept until the answer begins, in memory and then on disk, to send it again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from tempfile import SpooledTemporaryFile

import httpx2 as httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tenacity import AsyncRetrying

from remote_vae.client import NOT_READY, Client, RemoteVAEError

IN_MEMORY = 16 * 1024 * 1024
"""Bytes of a body; more go to disk."""

HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
"""Headers that are of one connection (RFC 9110, section 7.6.1)."""

LOOPBACK = ["127.0.0.1", "localhost", "[::1]"]


def build_proxy(client: Client, hosts: list[str]) -> Starlette:
    """The app. It answers requests to `hosts` alone, and none that a page of another site makes in a browser."""

    async def forward(request: Request) -> Response:
        origin = httpx.URL(request.headers.get("origin") or "http://localhost")
        if "*" not in hosts and origin.host not in [host.strip("[]") for host in hosts]:
            return JSONResponse({"error": f"a page of {origin.host[:100]} may not use this proxy"}, status_code=403)
        body = Body(request)
        try:
            answer = await send(request.app.state.http, client, request, body)
        except RemoteVAEError as error:
            return JSONResponse({"error": str(error)}, status_code=error.status or 504)
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            body.close()
        headers = {name: value for name, value in answer.headers.items() if name not in HOP_BY_HOP}
        chunks = answer.aiter_raw()
        return StreamingResponse(chunks, answer.status_code, headers, background=BackgroundTask(answer.aclose))

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        async with httpx.AsyncClient(timeout=client.times, limits=limits) as app.state.http:
            yield

    methods = ["DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"]
    return Starlette(
        routes=[Route("/{path:path}", forward, methods=methods)],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        lifespan=lifespan,
    )


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
    """The answer's head, once there is one that is not about a replica that starts.

    Raises:
        RemoteVAEError: patience is over, or nobody is there.
    """
    dropped = (*HOP_BY_HOP, "host", "origin")  # which pages may call is decided here, not by the endpoint
    kept = {name: value for name, value in request.headers.items() if name not in dropped and name[:10] != "sec-fetch-"}
    url = httpx.URL(client.url + request.url.path, query=request.url.query.encode())
    async for attempt in client.attempts(AsyncRetrying):
        with attempt, client.errors_of_the_way():
            if attempt.retry_state.attempt_number > 1:
                client.check(await http.get(client.url + "/health", headers=client.headers), "/health")
            content = body.chunks() if request.method in ("POST", "PUT", "PATCH") else None
            message = http.build_request(request.method, url, headers={**kept, **client.headers}, content=content)
            answer = await http.send(message, stream=True)
            if answer.status_code in NOT_READY:
                await answer.aread()
                client.check(answer, request.url.path)
            return answer
    raise AssertionError  # one of the attempts has returned or raised
