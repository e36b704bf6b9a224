"""A request over HTTP and its answer: `RequestHandler.run` is the way from one to the other."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any, TypeVar

from anyio import to_thread
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from handlers.model import Task
from handlers.serving import metrics
from handlers.serving.devices import JobFuture
from handlers.serving.errors import RequestError
from handlers.serving.http.access_log import CLIENT_CLOSED
from handlers.serving.media.output import to_json
from handlers.serving.media.payload import lost_bytes
from handlers.serving.media.request import Request, media_type_of
from handlers.serving.media.stream import Stream
from handlers.serving.pipeline import Pipeline, Prepared, Result

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


class RequestHandler:
    """One request and its answer. Its stages are methods, in their order; what it holds is in `held`."""

    def __init__(self, http: HttpRequest, pipeline: Pipeline, task: Task | None) -> None:
        """Without a `task`, the payload tells which it is."""
        self.http, self.pipeline, self.task = http, pipeline, task
        self.settings = pipeline.settings
        self.record: dict[str, Any] = http.state.record
        """Of the log's line."""
        self.timing: dict[str, float] = {}
        """Milliseconds of each stage that is over."""
        self.held = AsyncExitStack()
        """What is given back at the end, whatever that is: the work, the place, the bytes that count, the deadline."""
        self.admission = pipeline.admission
        self.reservation = self.admission.reservation()
        """The bytes in flight of this request."""
        self.arrived = False
        """Whether the body is there."""
        self.queued_at = 0.0

    async def run(self) -> Response:
        """The way of a request. Nothing heavy happens on the event loop: that runs on threads."""
        async with self.held:
            body = await self.admit()
            request, prepared = await self.read(body)
            work = self.queue(request, prepared)
            result = await self.wait_for(work)
            return await self.write(request, prepared, result)

    async def admit(self) -> bytearray:
        """Admission: the headers are looked at, the body is received, and one of the places is taken.

        Raises:
            RequestError: status 401, 415, 413; 408 without a body in time; 503 without room for it, or for any more.
        """
        check_token(self.http, self.settings.api_token)
        check_content_type(self.http)
        check_content_encoding(self.http)
        self.pipeline.device_queue.check_open()
        self.held.enter_context(self.deadline())
        self.held.enter_context(self.reservation)
        body = await self.receive()
        await self.held.enter_async_context(self.admission.slot())
        return body

    async def read(self, body: bytearray) -> tuple[Request, Prepared]:
        """Payload: what is asked for, and what the VAE takes of it."""
        async with self.admission.readers:
            request, prepared = await self.on_thread("payload", self.parse, body)
        self.record.update(
            task=request.task, shape=list(prepared.inputs.shape), answer=request.output_kind.name.lower()
        )
        self.reservation.hold(self.pipeline.unsent(request, prepared.inputs))
        return request, prepared

    def queue(self, request: Request, prepared: Prepared) -> JobFuture[Result]:
        """Queue: the work for a device, which is given up at the end of this exchange if it is not over by then."""
        self.queued_at = perf_counter()
        work = self.pipeline.submit(request, prepared.inputs)
        self.held.callback(give_up, work)
        return work

    async def wait_for(self, work: JobFuture[Result]) -> Result:
        """VAE: what a device has made of it, or of a stream the beginning."""
        result = await self.unless_disconnected(asyncio.wrap_future(work))
        self.timing["queue"] = milliseconds_since(self.queued_at) - result.milliseconds
        return result

    async def write(self, request: Request, prepared: Prepared, result: Result) -> Response:
        """Output: the answer, with its bytes, or with the first of those that a stream will send."""
        response: Response
        if isinstance(result.value, Stream):
            first = await self.unless_disconnected(asyncio.wrap_future(result.value.read()))
            self.timing["first"] = milliseconds_since(self.queued_at) - self.timing["queue"]
            response = StreamedVideo(self, first, result.value)
        else:
            self.timing["vae"] = result.milliseconds
            response = await self.on_thread("output", self.render, request, result.value)
        self.observe(self.timing)
        self.record["mode"] = result.mode.value
        response.headers["Server-Timing"] = ", ".join(f"{stage};dur={ms:.1f}" for stage, ms in self.timing.items())
        response.headers["X-VAE-Mode"] = result.mode.value
        response.headers.update(prepared.headers)
        return response

    @contextmanager
    def deadline(self) -> Iterator[None]:
        """Ends what is within, when its time is over or the service stops.

        Raises:
            RequestError: it was ended: status 408 where the body did not arrive, 503 where the service stops, else 504.
        """
        try:
            with self.admission.deadline():
                yield
        except TimeoutError:
            self.pipeline.device_queue.check_open()
            limit = f"within {self.settings.timeout:g} s (VAE_TIMEOUT)"
            if not self.arrived:
                raise RequestError(f"the body did not arrive {limit}", 408) from None
            raise RequestError(f"no answer {limit}; send less at once", 504) from None

    async def receive(self) -> bytearray:
        """The body, within the limits, whatever its Content-Length says."""
        declared = self.http.headers.get("content-length", "")
        self.settings.check_body(int(declared[:20]) if declared.isdecimal() else 0)
        body = bytearray()
        async for chunk in self.http.stream():
            body += chunk
            self.settings.check_body(len(body))
            self.reservation.hold(len(chunk))
        self.arrived = True
        return body

    def parse(self, body: bytearray) -> tuple[Request, Prepared]:
        query, headers = self.http.query_params, self.http.headers
        values: dict[str, Any] = dict(query)
        if "shape" in values:
            values["shape"] = query.getlist("shape")
        content_type, accept = headers.get("content-type", ""), headers.get("accept")
        try:
            with self.reservation:  # a thread that is left behind has its bytes until it ends
                request = self.pipeline.parse(body, content_type, accept, values, self.task)
                if request.body is not body:
                    body.clear()  # all of it was copied: the files of a form, the tensor in JSON
                request = replace(request, hold=self.reservation.hold)
                return request, self.pipeline.prepare(request)
        except RequestError as error:
            if not lost_bytes(body, content_type):
                raise
            raise RequestError(f"{error}; curl's -d drops line breaks: use --data-binary", error.status) from error

    def render(self, request: Request, value: Any) -> Response:
        content = self.pipeline.render(request, value)
        if request.accept.json:
            return JSONResponse(to_json(content))
        return Response(content.body, media_type=content.media_type, headers=content.headers)

    async def on_thread(self, stage: str, function: Callable[..., T], *arguments: Any) -> T:
        """What the function gives; what it takes is the stage's time. Where the exchange ends, it is left behind."""

        def timed() -> tuple[T, float]:
            start = perf_counter()
            result = function(*arguments)
            return result, milliseconds_since(start)

        result, self.timing[stage] = await to_thread.run_sync(timed, abandon_on_cancel=True)
        return result

    async def unless_disconnected(self, work: asyncio.Future[T]) -> T:
        """Return its result. Work whose client is gone, or whose time is over, is cancelled."""
        watch: asyncio.Future[Any] = asyncio.ensure_future(self.disconnected())
        try:
            await asyncio.wait([work, watch], return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return work.result()
        finally:
            watch.cancel()
            work.cancel()

    async def disconnected(self) -> None:
        """Ends when the client is."""
        while (await self.http.receive())["type"] != "http.disconnect":
            pass

    def observe(self, timing: dict[str, float]) -> None:
        """Milliseconds of stages, for the log and the metrics."""
        for stage, milliseconds in timing.items():
            metrics.STAGES.labels(stage).observe(milliseconds / 1000)
            self.record[f"{stage}_ms"] = round(milliseconds, 1)


class StreamedVideo(StreamingResponse):
    """A video that is sent while it is made.

    A failure breaks the connection: the last chunk of the answer is missing then, and the file's last box. What the
    exchange holds, its place and its deadline among it, it holds until the last byte is sent.
    """

    def __init__(self, handler: RequestHandler, first: bytes, stream: Stream) -> None:
        super().__init__(self._chunks(first, stream), media_type="video/mp4")
        self.handler, self.held = handler, handler.held.pop_all()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record, start = self.handler.record, perf_counter()
        try:
            async with self.held:
                await self.handler.unless_disconnected(asyncio.ensure_future(self.stream_response(send)))
        except ClientDisconnect:
            record["status"] = CLIENT_CLOSED
        except Exception as error:
            metrics.BROKEN.inc()
            if not isinstance(error, RequestError):
                logger.error("request %s failed", record["request_id"], exc_info=error)
            record["error"] = f"the stream broke: {str(error) or type(error).__name__}"[:200]
        self.handler.observe({"stream": milliseconds_since(start)})

    async def _chunks(self, first: bytes, stream: Stream) -> AsyncIterator[bytes]:
        chunk = first
        while chunk:
            yield chunk
            chunk = await asyncio.wrap_future(stream.read())


def give_up(work: JobFuture[Result]) -> None:
    """Drop a job that waits, stop its pass, end the encoder of its stream. Does nothing to what is over."""
    work.cancel()
    work.add_done_callback(close_stream)  # the encoder may have all its frames, and wait for a reader


def close_stream(work: Future[Result]) -> None:
    """End the encoder of a video that nobody reads any more."""
    if not work.cancelled() and not work.exception() and isinstance(stream := work.result().value, Stream):
        stream.close()


def check_token(http: HttpRequest, token: str | None) -> None:
    """Raises `RequestError`, status 401, unless the request has this token, where there is one."""
    if token:
        scheme, _, given = http.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            given.strip().encode("latin-1"), token.strip().encode()
        ):
            raise RequestError("send the header `Authorization: Bearer <token>` with the token of this service", 401)


def check_content_type(http: HttpRequest) -> None:
    """Raises `RequestError`, status 415, for one that is not taken."""
    if (media_type := media_type_of(http.headers.get("content-type", ""))) not in CONTENT_TYPES:
        known = ", ".join(sorted(CONTENT_TYPES - {""}))
        raise RequestError(f"Content-Type {media_type[:100]!r} is not taken; send none, or one of {known}", 415)


def check_content_encoding(http: HttpRequest) -> None:
    """Raise `RequestError`, status 415, for a body that is compressed as a whole."""
    codings = ",".join(http.headers.getlist("content-encoding")).lower().split(",")
    if coding := next((one.strip() for one in codings if one.strip() not in ("", "identity")), None):
        raise RequestError(f"Content-Encoding {coding[:100]!r} is not taken; send the body as it is, without it", 415)


def milliseconds_since(start: float) -> float:
    return (perf_counter() - start) * 1000
