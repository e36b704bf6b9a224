"""HTTP: routes, headers, status codes. Every answer that is no success is JSON with a string under `error`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar

from anyio import to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from handlers.serving.errors import RequestError
from handlers.serving.output import to_json
from handlers.serving.pipeline import Pipeline
from handlers.serving.request import Task

T = TypeVar("T")


def build_app() -> Starlette:
    """The service. It answers 503 until `app.state.handler` is set to a loaded `EndpointHandler`."""
    app = Starlette(
        routes=[
            Route("/", root, methods=["GET", "POST"]),
            Route("/predict", predict, methods=["POST"]),
            Route("/decode", decode, methods=["POST"]),
            Route("/encode", encode, methods=["POST"]),
            Route("/health", health, methods=["GET"]),
            Route("/metrics", metrics, methods=["GET"]),
        ],
        exception_handlers={
            RequestError: on_request_error,
            HTTPException: on_http_error,
            ClientDisconnect: on_disconnect,
            Exception: on_crash,
        },
    )
    app.state.handler = None
    return app


async def root(request: Request) -> Response:
    return await (predict(request) if request.method == "POST" else health(request))


async def predict(request: Request) -> Response:
    return await run(request, task=None)


async def decode(request: Request) -> Response:
    return await run(request, task="decode")


async def encode(request: Request) -> Response:
    return await run(request, task="encode")


async def health(request: Request) -> Response:
    _pipeline(request)
    return PlainTextResponse("Ok")


async def metrics(request: Request) -> Response:
    """The toolkit's two gauges: requests in the VAE, and requests that wait for it."""
    workers = _pipeline(request).workers
    return PlainTextResponse(f"inf_batch_current_size {workers.running}\ninf_queue_size {workers.waiting}\n")


async def run(request: Request, task: Task | None) -> Response:
    """One request through the pipeline. Nothing heavy happens here: each stage runs on a thread."""
    pipeline = _pipeline(request)
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    accept = request.headers.get("accept")
    values: dict[str, Any] = dict(request.query_params)
    if "shape" in values:
        values["shape"] = request.query_params.getlist("shape")
    body = await read_body(request, int(pipeline.settings.max_body_mb * 1e6))

    def read() -> Any:
        parsed = pipeline.parse(body, content_type, accept, values, task)
        return parsed, pipeline.prepare(parsed)

    def write() -> Response:
        content = pipeline.render(parsed, result.tensor)
        if parsed.accept.json:
            return JSONResponse(to_json(content))
        return Response(content.body, media_type=content.media_type, headers=content.headers)

    timing = {}
    (parsed, inputs), timing["payload"] = await to_thread.run_sync(timed, read)
    start = perf_counter()
    result = await unless_gone(request, asyncio.wrap_future(pipeline.submit(parsed, inputs)))
    timing["queue"] = (perf_counter() - start) * 1000 - result.milliseconds
    timing["vae"] = result.milliseconds
    response, timing["output"] = await to_thread.run_sync(timed, write)
    response.headers["Server-Timing"] = ", ".join(f"{stage};dur={ms:.1f}" for stage, ms in timing.items())
    response.headers["X-VAE-Mode"] = result.mode.value
    return response


async def read_body(request: Request, limit: int) -> bytearray:
    """The body, of `limit` bytes at most, whatever its Content-Length says.

    What is over is read and forgotten up to a point, so that the client, which is still sending, sees the answer.
    """
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            body += chunk
        elif size > 2 * limit:
            break
    if size > limit:
        raise RequestError(f"the body is larger than {limit / 1e6:g} MB, the limit here (VAE_MAX_BODY_MB)", 413)
    return body


async def unless_gone(request: Request, work: asyncio.Future[T]) -> T:
    """The work's result; work whose client disconnects is dropped before it reaches the device."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            work.cancel()
            raise ClientDisconnect
        return work.result()
    finally:
        watch.cancel()


def timed(function: Callable[..., T], *args: Any) -> tuple[T, float]:
    """The function's result and the milliseconds it took."""
    start = perf_counter()
    result = function(*args)
    return result, (perf_counter() - start) * 1000


def _pipeline(request: Request) -> Pipeline:
    if request.app.state.handler is None:
        raise HTTPException(503, "the model is loading", headers={"Retry-After": "5"})
    return request.app.state.handler.pipeline


async def on_request_error(request: Request, error: RequestError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse({"error": str(error)}, status_code=error.status, headers=headers)


async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    """Nobody reads this; 499 is what nginx logs."""
    return Response(status_code=499)


async def on_http_error(request: Request, error: HTTPException) -> Response:
    detail = {
        404: f"there is no {request.url.path}; POST to /, /predict, /decode or /encode",
        405: f"{request.url.path} does not take {request.method}",
    }.get(error.status_code, error.detail)
    return JSONResponse({"error": detail}, status_code=error.status_code, headers=error.headers)


async def on_crash(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": "the service failed on this request; its log says why"}, status_code=500)
