"""HTTP app: middleware, routes and error responses. Every error response is JSON with a string under `error`."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from handlers.model import split_keys
from handlers.serving import metrics
from handlers.serving.errors import RequestError
from handlers.serving.http.access_log import CLIENT_CLOSED, AccessLog
from handlers.serving.http.callers import CallerCheck
from handlers.serving.http.config import describe, public_name
from handlers.serving.http.openapi import describe_interface
from handlers.serving.http.request_handler import RequestHandler, check_token
from handlers.serving.http.web_demo import HEADERS, PAGE, wants_html
from handlers.serving.pipeline import Pipeline

logger = logging.getLogger(__name__)

EXPOSED = ("dtype", "shape", "Retry-After", "Server-Timing", "X-Request-Id", "X-VAE-Frames", "X-VAE-Mode")
"""Headers of a response that pages of other origins may read."""


def build_app(model: str | None = None, cors_origins: Sequence[str] = ()) -> Starlette:
    """Build the app. It responds 503 until `app.state.handler` is set to a loaded `EndpointHandler`.

    Args:
        model: key of the model, a label of the metrics. Of several keys, separated by commas, each is also the prefix
            of a model's paths, as in `/flux/decode`; the first one is served at the root too.
        cors_origins: origins whose pages may call the service.
    """
    routes = [
        Route("/", root, methods=["GET", "POST", "PUT"]),
        *(
            Route(path + slash, endpoint, methods=["POST", "PUT"])  # PUT is what `curl -T` sends
            for path, endpoint in (("/predict", predict), ("/decode", decode), ("/encode", encode))
            for slash in ("", "/")
        ),
        Route("/config", config, methods=["GET"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]
    models = split_keys(model)
    access_log = Middleware(AccessLog, models[0], {route.path for route in routes}, on_crash)
    router = Middleware(ModelRouter, models)
    caller_check = Middleware(CallerCheck, cors_origins, on_request_error)
    error_handlers: dict[Any, Any] = {
        RequestError: on_request_error,
        HTTPException: on_http_error,
        ClientDisconnect: on_disconnect,
    }
    app = Starlette(
        routes=routes,
        middleware=[Middleware(CloseConnections), *cross_origin(cors_origins), access_log, router, caller_check],
        exception_handlers=error_handlers,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.handler = None
    app.state.is_draining = False  # True from SIGTERM on
    app.state.loopback_host = None  # set by the standalone server, if it listens on a loopback address
    return app


def cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """Return the middleware that lets pages of these origins, or "*", call the service. It does not log preflights."""
    if not origins:
        return []
    methods = ["GET", "POST", "PUT"]
    return [
        Middleware(
            CrossOrigin, allow_origins=origins, allow_methods=methods, allow_headers=["*"], expose_headers=EXPOSED
        )
    ]


class CloseConnections:
    """ASGI middleware that closes each connection after its response, once SIGTERM has come.

    A balancer that keeps connections would send the next request on one that is about to end.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing_send(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["app"].state.is_draining:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        await self.app(scope, receive, closing_send)


class CrossOrigin(CORSMiddleware):
    """CORS middleware that lets the service refuse an origin, in JSON and with a log line."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origin = Headers(scope=scope).get("origin") if scope["type"] == "http" else None
        if origin and not self.is_allowed_origin(origin):
            return await self.app(scope, receive, send)
        await super().__call__(scope, receive, send)


class ModelRouter:
    """ASGI middleware that moves a model's key from the beginning of the path to `request.state.model`.

    `request.state.model` is "" for a path without a key, which belongs to the first model.
    """

    def __init__(self, app: ASGIApp, models: Sequence[str]) -> None:
        self.app, self.models = app, models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["state"]["model"] = ""
            if len(self.models) > 1:
                key, _, path = scope["path"][1:].partition("/")
                if key in self.models:
                    scope["state"]["model"], scope["path"] = key, f"/{path}"
                scope["state"]["record"]["model"] = scope["state"]["model"] or self.models[0]
        await self.app(scope, receive, send)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Prepare the standalone server's shutdown. The Inference Toolkit has its own lifespan."""
    drain_on_sigterm(app)
    yield


def drain_on_sigterm(app: Starlette) -> None:
    """On SIGTERM, respond 503 to `/health`, take no new work, and let requests finish within `VAE_GRACE`.

    New work is still taken for `VAE_DRAIN_DELAY` seconds, or until a second SIGTERM. Call this after the server has
    installed its own signal handler. Without one, nothing changes.
    """
    stop = signal.getsignal(signal.SIGTERM)
    if not callable(stop) or threading.current_thread() is not threading.main_thread():
        return

    def drain(*arguments: Any) -> None:
        if app.state.handler is None:
            return stop(*arguments)
        is_second, app.state.is_draining = app.state.is_draining, True
        pipeline = app.state.handler.pipeline
        queue, settings = pipeline.device_queue, pipeline.settings
        loop = asyncio.get_running_loop()  # this signal has interrupted it

        def finish() -> None:
            queue.close()
            server = getattr(stop, "__self__", None)
            if config := getattr(server, "config", None):  # uvicorn's; without a timeout it waits forever
                config.timeout_graceful_shutdown = int(settings.grace) + 5
            loop.call_soon_threadsafe(loop.call_later, settings.grace, pipeline.admission.expire)
            stop(*arguments)

        if settings.drain_delay and not is_second:
            loop.call_soon_threadsafe(loop.call_later, settings.drain_delay, finish)
        else:
            finish()

    signal.signal(signal.SIGTERM, drain)


def limit_reads() -> None:
    """Let asyncio read 64 kB of a connection at a time, and not 256 kB.

    All HTTP chunks of one read are parsed before anything else runs, and 256 kB have 43,000 chunks of one byte.
    """
    asyncio.selector_events._SelectorSocketTransport.max_size = 1 << 16  # type: ignore[attr-defined]


async def root(request: Request) -> Response:
    if request.method not in ("GET", "HEAD"):
        return await predict(request)
    if wants_html(request.headers.get("accept")):  # also while the model loads: the web demo waits for it
        return Response(PAGE, media_type="text/html", headers=HEADERS)
    return await health(request)


async def predict(request: Request) -> Response:
    return await RequestHandler(request, _pipeline(request), task=None).run()


async def decode(request: Request) -> Response:
    return await RequestHandler(request, _pipeline(request), "decode").run()


async def encode(request: Request) -> Response:
    return await RequestHandler(request, _pipeline(request), "encode").run()


async def health(request: Request) -> Response:
    """Respond 200 while the service takes requests. 503 tells the platform to replace this replica."""
    is_draining = request.app.state.is_draining
    if problem := "the service is shutting down" if is_draining else _pipeline(request).device_queue.problem:
        raise HTTPException(503, problem, headers={"Retry-After": "1"})
    return PlainTextResponse("Ok")


async def config(request: Request) -> Response:
    pipeline = _pipeline(request)
    check_token(request, pipeline.settings.api_token)
    described = describe(pipeline)
    pipelines = getattr(request.app.state.handler, "pipelines", {})
    if len(pipelines) > 1 and not request.state.model:
        described["models"] = [
            {"name": name, "checkpoint": public_name(other.vae.declared.checkpoint), "kind": other.layout.kind}
            for name, other in pipelines.items()
        ]
    return JSONResponse(described)


async def openapi(request: Request) -> Response:
    return JSONResponse(describe_interface(request.state.model))


async def show_metrics(request: Request) -> Response:
    _pipeline(request).measure()
    return Response(metrics.exposition(), media_type="text/plain; version=0.0.4")


def _pipeline(request: Request) -> Pipeline:
    if request.app.state.handler is None:
        raise HTTPException(503, "the model is loading", headers={"Retry-After": "5"})
    handler = request.app.state.handler
    return handler.pipelines[request.state.model] if request.state.model else handler.pipeline


async def on_request_error(request: Request, error: RequestError) -> Response:
    headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return error_response(request, str(error), error.status, headers)


async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    """Return a response for the log. The client has left."""
    return Response(status_code=CLIENT_CLOSED)


async def on_http_error(request: Request, error: HTTPException) -> Response:
    path = request.state.record["path"]
    models = list(getattr(request.app.state.handler, "models", {}))
    prefixed = f", each also under the name of a model: {', '.join(f'/{model}/decode' for model in models)}"
    allowed = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
    hint = "; curl sends a file with `--data-binary @FILE`" if request.method == "GET" else ""
    detail = {
        404: f"there is no {path}; POST to /, /predict, /decode or /encode{prefixed if models else ''}",
        405: f"{path} does not take {request.method}, it takes {allowed}{hint}",
    }.get(error.status_code, error.detail)
    return error_response(request, detail, error.status_code, error.headers)


async def on_crash(request: Request, error: Exception) -> Response:
    """Respond to a bug. `AccessLog` calls this, because starlette runs handlers of `Exception` outside of it."""
    request_id = request.state.record["request_id"]
    logger.error("request %s failed", request_id, exc_info=error)
    return error_response(
        request, "the service failed on this request; its log has the reason", 500, request_id=request_id
    )


def error_response(
    request: Request, message: str, status: int, headers: Mapping[str, str] | None = None, **more: str
) -> JSONResponse:
    """Return the JSON of an error. Its message may quote JSON with half of a surrogate pair, which is no UTF-8."""
    message = message.encode("utf-8", "backslashreplace").decode()
    request.state.record["error"] = message[:200]
    return JSONResponse({"error": message, **more}, status_code=status, headers=headers)
