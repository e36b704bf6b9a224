"""What is known of each request afterwards: its id, one line in the log, the counters of `/metrics`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from time import perf_counter
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handlers.serving import metrics

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
"""Request ids that are taken from a client. Any other id could forge log lines, so it is replaced by a new one."""


CLIENT_CLOSED = 499
"""The status that nginx logs where the client disconnected first."""

OnCrash = Callable[[Request, Exception], Awaitable[Response]]


class AccessLog:
    """ASGI middleware that logs one line for each request. Handlers add fields to `request.state.record`, a dict."""

    def __init__(self, app: ASGIApp, models: Sequence[str], routes: Collection[str], on_crash: OnCrash) -> None:
        """Create the middleware.

        Args:
            models: keys of the models. With several, the key at the beginning of a path is moved from the path to
                `request.state.model`.
            routes: paths that the metrics count by name.
            on_crash: makes the response to a request that failed without one.
        """
        self.app = app
        self.models = models
        self.routes = routes
        self.on_crash = on_crash

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        record = {
            "request_id": request_id,
            "method": scope["method"][:20],
            "path": scope["path"][:100],
            "status": CLIENT_CLOSED,
        }
        model, path = self._split(scope["path"])
        scope = {**scope, "path": path, "state": {**scope.get("state", {}), "record": record, "model": model}}
        if len(self.models) > 1:
            record["model"] = model or self.models[0]
        start, sent, received = perf_counter(), 0, 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def observed(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)
            sent += len(message.get("body", b""))

        try:
            await self.app(scope, counted, observed)
        except Exception as error:
            if record["status"] != CLIENT_CLOSED:  # it has begun, and cannot be taken back
                raise
            response = await self.on_crash(Request(scope), error)
            await response(scope, counted, observed)
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            metrics.REQUESTS.labels(route, model or self.models[0], record["status"]).inc()
            metrics.RECEIVED.inc(received)
            metrics.SENT.inc(sent)
            record |= {"received_bytes": received, "sent_bytes": sent, "ms": round((perf_counter() - start) * 1000, 1)}
            quiet = scope["method"] in ("GET", "HEAD") and record["status"] == 200  # probes, every few seconds
            logger.log(logging.DEBUG if quiet else logging.INFO, json.dumps(record))

    def _split(self, path: str) -> tuple[str, str]:
        """The model that a path names, or "", and the path without it."""
        first, _, rest = path[1:].partition("/")
        return (first, f"/{rest}") if len(self.models) > 1 and first in self.models else ("", path)
