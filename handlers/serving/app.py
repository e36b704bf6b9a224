"""HTTP: routes, headers, status codes. Every answer that is no success is JSON with a string under `error`."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from time import perf_counter
from typing import Any, TypeVar

import anyio
from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from handlers.model import Task
from handlers.serving import metrics
from handlers.serving.access_log import NO_ANSWER, AccessLog
from handlers.serving.description import describe, public_name
from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits
from handlers.serving.output import to_json
from handlers.serving.page import HEADERS, PAGE, asks_for_page
from handlers.serving.pipeline import Pipeline, Result
from handlers.serving.request import media_type_of
from handlers.serving.stream import Stream

T = TypeVar("T")

logger = logging.getLogger(__name__)

CONTENT_TYPES = {
    "",
    "application/octet-stream",
    "application/x-www-form-urlencoded",  # what curl says of any --data-binary
    "application/json",
    "multipart/form-data",
    "tensor/base64",
    "tensor/binary",
    "image/png",
    "image/jpeg",
    "image/jpg",
    "image/webp",
    "video/mp4",
}


EXPOSED = ("dtype", "shape", "Server-Timing", "X-Request-Id", "X-VAE-Frames", "X-VAE-Mode")
"""Headers of an answer that pages of other origins may read."""


def build_app(model: str | None = None, cors_origins: Sequence[str] = ()) -> Starlette:
    """The service; pages of `cors_origins` may call it.

    `model` is its name in the metrics. Where it is several, separated by commas, each is served under its name too, as
    `/flux/decode`, and the first one at the root.

    It answers 503 until `app.state.handler` is set to a loaded `EndpointHandler`.
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
    ]
    models = [name.strip() for name in (model or "").split(",")]
    access_log = Middleware(AccessLog, models, {route.path for route in routes}, on_crash)
    app = Starlette(
        routes=routes,
        middleware=[*cross_origin(cors_origins), access_log],
        exception_handlers={
            RequestError: on_request_error,
            HTTPException: on_http_error,
            ClientDisconnect: on_disconnect,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.handler = None
    app.state.held_bytes = 0
    app.state.deadlines = set()
    return app


def cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """What lets pages of these origins call the service, or of all for "*"; a preflight is answered and not logged."""
    if not origins:
        return []
    options = {"allow_methods": ["GET", "POST", "PUT"], "allow_headers": ["*"], "expose_headers": EXPOSED}
    return [Middleware(CORSMiddleware, allow_origins=origins, **options)]


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Of the standalone server; the toolkit has its own."""
    drain_on_sigterm(app)
    yield


def drain_on_sigterm(app: Starlette) -> None:
    """Before the server stops: no new work, 503 from `/health`, and an answer for every request within the grace time.

    To be called once the server has its own handler in place; where there is none, nothing changes.
    """
    stop = signal.getsignal(signal.SIGTERM)
    if not callable(stop) or threading.current_thread() is not threading.main_thread():
        return

    def drain(*arguments: Any) -> None:
        if app.state.handler is not None:
            pipeline = app.state.handler.pipeline
            pipeline.workers.close()
            server = getattr(stop, "__self__", None)
            if hasattr(server, "config"):  # uvicorn, which else waits for ever
                server.config.timeout_graceful_shutdown = int(pipeline.settings.grace) + 5
            loop = asyncio.get_running_loop()  # which this signal has interrupted
            loop.call_soon_threadsafe(loop.call_later, pipeline.settings.grace, end_requests, app)
        stop(*arguments)

    signal.signal(signal.SIGTERM, drain)


def end_requests(app: Starlette) -> None:
    for deadline in list(app.state.deadlines):
        deadline.deadline = -math.inf


async def root(request: Request) -> Response:
    if request.method not in ("GET", "HEAD"):
        return await predict(request)
    if asks_for_page(request.headers.get("accept")):  # while the model loads too: the page waits for it
        return Response(PAGE, media_type="text/html", headers=HEADERS)
    return await health(request)


async def predict(request: Request) -> Response:
    return await run(request, task=None)


async def decode(request: Request) -> Response:
    return await run(request, task="decode")


async def encode(request: Request) -> Response:
    return await run(request, task="encode")


async def health(request: Request) -> Response:
    """200 while requests are taken. 503 tells the platform to replace this replica, or to send it no more."""
    if problem := _pipeline(request).workers.problem:
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


async def show_metrics(request: Request) -> Response:
    _pipeline(request).measure()
    metrics.HELD.set(request.app.state.held_bytes)
    return Response(metrics.exposition(), media_type="text/plain; version=0.0.4")


async def run(request: Request, task: Task | None) -> Response:
    """One request through the pipeline. Nothing heavy happens here: each stage runs on a thread."""
    pipeline, record = _pipeline(request), request.state.record
    settings = pipeline.settings
    check_token(request, settings.api_token)
    content_type = request.headers.get("content-type", "")
    if (media_type := media_type_of(content_type)) not in CONTENT_TYPES:
        known = ", ".join(sorted(CONTENT_TYPES - {""}))
        raise RequestError(f"Content-Type {media_type[:100]!r} is not taken; send none, or one of {known}", 415)
    pipeline.workers.check_open()
    accept = request.headers.get("accept")
    values: dict[str, Any] = dict(request.query_params)
    if "shape" in values:
        values["shape"] = request.query_params.getlist("shape")

    def read() -> Any:
        parsed = pipeline.parse(body, content_type, accept, values, task)
        prepared = pipeline.prepare(parsed)
        record.update(task=parsed.task, shape=list(prepared.inputs.shape), answer=parsed.answer.name.lower())
        return parsed, prepared

    def write() -> Response:
        content = pipeline.render(parsed, result.value)
        if parsed.accept.json:
            return JSONResponse(to_json(content))
        return Response(content.body, media_type=content.media_type, headers=content.headers)

    body: bytearray | None = None
    timing: dict[str, float] = {}
    try:
        async with AsyncExitStack() as held:
            held.enter_context(deadline_of(request, settings.timeout))
            body, hold = await held.enter_async_context(body_of(request, settings))
            await held.enter_async_context(place_in(pipeline))
            async with pipeline.machine.readers:
                (parsed, prepared), timing["payload"] = await to_thread.run_sync(timed, read, abandon_on_cancel=True)
            hold(prepared.inputs.nbytes + pipeline.unsent(parsed, prepared.inputs))
            start = perf_counter()
            work = pipeline.submit(parsed, prepared.inputs)
            if parsed.parameters.stream:
                held.callback(work.add_done_callback, drop_stream)
            result = await unless_gone(request, asyncio.wrap_future(work))
            timing["queue"] = (perf_counter() - start) * 1000 - result.milliseconds
            if isinstance(result.value, Stream):
                first = await unless_gone(request, asyncio.wrap_future(result.value.read()))
                timing["first"] = (perf_counter() - start) * 1000 - timing["queue"]
                response = StreamedVideo(request, first, result.value, pipeline, held.pop_all())
            else:
                timing["vae"] = result.milliseconds
                response, timing["output"] = await to_thread.run_sync(timed, write, abandon_on_cancel=True)
    except TimeoutError:
        if body is None:
            pipeline.workers.check_open()
            raise RequestError(f"the body did not arrive within {settings.timeout:g} s (VAE_TIMEOUT)", 408) from None
        raise out_of_time(pipeline) from None
    observe(record, timing)
    record["mode"] = result.mode.value
    response.headers["Server-Timing"] = ", ".join(f"{stage};dur={ms:.1f}" for stage, ms in timing.items())
    response.headers["X-VAE-Mode"] = result.mode.value
    response.headers.update(prepared.headers)
    return response


def out_of_time(pipeline: Pipeline) -> RequestError:
    """Why a request was ended: its deadline, or that of the service."""
    try:
        pipeline.workers.check_open()
    except RequestError as closed:
        return closed
    limit = pipeline.settings.timeout
    return RequestError(f"no answer within {limit:g} s (VAE_TIMEOUT); send less at once", 504)


def observe(record: dict[str, Any], timing: Mapping[str, float]) -> None:
    """Milliseconds of stages, for the log and the metrics."""
    for stage, milliseconds in timing.items():
        metrics.STAGES.labels(stage).observe(milliseconds / 1000)
        record[f"{stage}_ms"] = round(milliseconds, 1)


def drop_stream(work: Future[Result]) -> None:
    """Ends the work on a video that nobody reads any more; at its end this does nothing."""
    if not work.cancelled() and not work.exception():
        work.result().value.close()


class StreamedVideo(StreamingResponse):
    """A video that is sent while it is made.

    A failure breaks the connection: the last chunk of the answer is missing then, and the file's last box. What the
    request holds, its place and its deadline among it, it holds until the last byte is sent.
    """

    def __init__(
        self, request: Request, first: bytes, stream: Stream, pipeline: Pipeline, held: AsyncExitStack
    ) -> None:
        super().__init__(self._chunks(first, stream), media_type="video/mp4")
        self.request, self.pipeline, self.held = request, pipeline, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record, start = self.request.state.record, perf_counter()
        try:
            async with self.held:
                await unless_gone(self.request, asyncio.ensure_future(self.stream_response(send)))
        except ClientDisconnect:
            record["status"] = NO_ANSWER
        except Exception as error:
            metrics.BROKEN.inc()
            if isinstance(error, TimeoutError):
                error = out_of_time(self.pipeline)
            elif not isinstance(error, RequestError):
                logger.error("request %s failed", record["request_id"], exc_info=error)
            record["error"] = f"the stream broke: {str(error) or type(error).__name__}"[:200]
        observe(record, {"stream": (perf_counter() - start) * 1000})

    async def _chunks(self, first: bytes, stream: Stream) -> AsyncIterator[bytes]:
        chunk = first
        while chunk:
            yield chunk
            chunk = await asyncio.wrap_future(stream.read())


@contextmanager
def deadline_of(request: Request, seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` when the time is over, or when the service stops."""
    deadlines = request.app.state.deadlines
    with anyio.fail_after(seconds) as deadline:
        deadlines.add(deadline)
        try:
            yield
        finally:
            deadlines.discard(deadline)


def check_token(request: Request, token: str | None) -> None:
    """Raises `RequestError`, status 401, unless the request has this token, where there is one."""
    if token:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode("latin-1"), token.strip().encode()
        ):
            raise RequestError("send the header `Authorization: Bearer <token>` with the token of this service", 401)


@asynccontextmanager
async def body_of(request: Request, limits: Limits) -> AsyncIterator[tuple[bytearray, Callable[[int], None]]]:
    """The body, within the limits, whatever its Content-Length says.

    It counts as held until the context ends, and so do the bytes that the function beside it is called with: of what
    was made of the body.
    """
    body, held, state = bytearray(), 0, request.app.state

    def hold(size: int) -> None:
        nonlocal held
        held += size
        state.held_bytes += size
        limits.check_held(state.held_bytes, held)

    try:
        declared = request.headers.get("content-length", "")
        limits.check_body(int(declared[:20]) if declared.isdecimal() else 0)
        async for chunk in request.stream():
            body += chunk
            limits.check_body(len(body))
            hold(len(chunk))
        yield body, hold
    finally:
        state.held_bytes -= held


@asynccontextmanager
async def place_in(pipeline: Pipeline) -> AsyncIterator[None]:
    """One of the places in the pipeline, for as long as the context lasts.

    Raises:
        RequestError: none became free in time; status 503.
    """
    limits = pipeline.settings
    with anyio.move_on_after(limits.patience) as waiting:
        await pipeline.machine.places.acquire()
    if waiting.cancelled_caught:
        raise RequestError(f"{limits.max_queue} requests are waiting already (VAE_MAX_QUEUE); try again soon", 503)
    try:
        yield
    finally:
        pipeline.machine.places.release()


async def unless_gone(request: Request, work: asyncio.Future[T]) -> T:
    """The work's result. Work whose client is gone, or whose time is over, is dropped unless a device has begun it."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        watch.cancel()
        work.cancel()


def timed(function: Callable[..., T], *args: Any) -> tuple[T, float]:
    """The function's result and the milliseconds it took."""
    start = perf_counter()
    result = function(*args)
    return result, (perf_counter() - start) * 1000


def _pipeline(request: Request) -> Pipeline:
    if request.app.state.handler is None:
        raise HTTPException(503, "the model is loading", headers={"Retry-After": "5"})
    handler = request.app.state.handler
    return handler.pipelines[request.state.model] if request.state.model else handler.pipeline


async def on_request_error(request: Request, error: RequestError) -> Response:
    headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return error_answer(request, str(error), error.status, headers)


async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    """Nobody reads this."""
    return Response(status_code=NO_ANSWER)


async def on_http_error(request: Request, error: HTTPException) -> Response:
    path = request.state.record["path"]
    models = list(getattr(request.app.state.handler, "models", {}))
    named = f", each also under the name of a model: {', '.join(f'/{model}/decode' for model in models)}"
    detail = {
        404: f"there is no {path}; POST to /, /predict, /decode or /encode{named if models else ''}",
        405: f"{path} does not take {request.method}",
    }.get(error.status_code, error.detail)
    return error_answer(request, detail, error.status_code, error.headers)


async def on_crash(request: Request, error: Exception) -> Response:
    """A fault of ours. In the middleware, as starlette would run a handler of `Exception` outside of it."""
    request_id = request.state.record["request_id"]
    logger.error("request %s failed", request_id, exc_info=error)
    return error_answer(request, "the service failed on this request; its log says why", 500, request_id=request_id)


def error_answer(
    request: Request, message: str, status: int, headers: Mapping[str, str] | None = None, **more: str
) -> JSONResponse:
    """Every error's JSON. The message may quote what no UTF-8 is: half of a surrogate pair, out of JSON."""
    message = message.encode("utf-8", "backslashreplace").decode()
    request.state.record["error"] = message[:200]
    return JSONResponse({"error": message, **more}, status_code=status, headers=headers)
