"""Access log: the id, the log line and the counters of each request."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Awaitable, Callable, Collection
from time import perf_counter
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handlers.serving import metrics

logger = logging.getLogger(__name__)

REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
"""Request ids that a client may choose. Any other id could forge log lines and is replaced."""

CLIENT_CLOSED = 499
"""Status that nginx logs when the client disconnects first."""

OnCrash = Callable[[Request, Exception], Awaitable[Response]]


class AccessLog:
    """ASGI middleware that logs one line for each request. The app adds fields to `request.state.record`, a dict."""

    def __init__(self, app: ASGIApp, model: str, routes: Collection[str], on_crash: OnCrash) -> None:
        """Create the middleware.

        Args:
            model: label of the model in the metrics, unless the app puts a field `model` in the record.
            routes: paths that are labels of the metrics. All others are "other".
            on_crash: function that makes the response when the app fails before its own.
        """
        self.app = app
        self.model = model
        self.routes = routes
        self.on_crash = on_crash

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent_id = Headers(scope=scope).get("x-request-id", "")
        record = {
            "request_id": sent_id if REQUEST_ID.fullmatch(sent_id) else uuid4().hex,
            "method": scope["method"][:20],
            "path": scope["path"][:100],
            "status": CLIENT_CLOSED,
        }
        scope = {**scope, "state": {**scope.get("state", {}), "record": record}}
        start, sent, received = perf_counter(), 0, 0

        async def counting_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message

        async def counting_send(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record["request_id"]
            await send(message)
            sent += len(message.get("body", b""))

        try:
            await self.app(scope, counting_receive, counting_send)
        except Exception as error:
            if record["status"] != CLIENT_CLOSED:  # the response has begun and cannot be taken back
                raise
            response = await self.on_crash(Request(scope), error)
            await response(scope, counting_receive, counting_send)
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            metrics.REQUESTS.labels(route, record.get("model", self.model), record["status"]).inc()
            metrics.RECEIVED.inc(received)
            metrics.SENT.inc(sent)
            record |= {"received_bytes": received, "sent_bytes": sent, "ms": round((perf_counter() - start) * 1000, 1)}
            is_probe = scope["method"] in ("GET", "HEAD") and record["status"] == 200  # every few seconds
            logger.log(logging.DEBUG if is_probe else logging.INFO, json.dumps(record))
