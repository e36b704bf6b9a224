"""Request handler: from an HTTP request to its response. `RequestHandler.run` lists the stages."""

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
    "application/x-www-form-urlencoded",  # curl sends it with any --data-binary
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
    """One request and its response. The stages are methods, in order."""

    def __init__(self, http: HttpRequest, pipeline: Pipeline, task: Task | None) -> None:
        """Create the handler. `task` None finds the task from the payload."""
        self.http, self.pipeline, self.task = http, pipeline, task
        self.settings = pipeline.settings
        self.record: dict[str, Any] = http.state.record
        """Fields of the log line."""
        self.timing: dict[str, float] = {}
        """Milliseconds of each finished stage."""
        self.resources = AsyncExitStack()
        """Job, slot, bytes in flight and deadline, which are released when the request ends."""
        self.admission = pipeline.admission
        self.reservation = self.admission.reservation()
        """Bytes in flight of this request."""
        self.arrived = False
        """True if the whole body was received."""
        self.queued_at = 0.0

    async def run(self) -> Response:
        """Run all stages. Heavy work runs on threads, never on the event loop."""
        async with self.resources:
            body = await self.admit()
            request, prepared = await self.prepare(body)
            job = self.queue(request, prepared)
            result = await self.wait_for(job)
            return await self.respond(request, prepared, result)

    async def admit(self) -> bytearray:
        """Check the headers, receive the body, take a slot.

        Raises:
            RequestError: status 401, 413 or 415; 408 for a late body; 503 without a free slot or memory.
        """
        check_token(self.http, self.settings.api_token)
        check_content_type(self.http)
        check_content_encoding(self.http)
        self.pipeline.device_queue.check_open()
        self.resources.enter_context(self.deadline())
        self.resources.enter_context(self.reservation)
        body = await self.receive()
        await self.resources.enter_async_context(self.admission.slot())
        return body

    async def prepare(self, body: bytearray) -> tuple[Request, Prepared]:
        """Parse the request and make the input of the VAE, on a thread."""
        async with self.admission.readers:
            request, prepared = await self.run_on_thread("payload", self.parse, body)
        self.record.update(
            task=request.task, shape=list(prepared.inputs.shape), output=request.output_kind.name.lower()
        )
        self.reservation.reserve(self.pipeline.unread_bytes(request, prepared.inputs))
        return request, prepared

    def queue(self, request: Request, prepared: Prepared) -> JobFuture[Result]:
        """Queue the job. It is cancelled if the request ends first."""
        self.queued_at = perf_counter()
        job = self.pipeline.submit(request, prepared.inputs)
        self.resources.callback(cancel_job, job)
        return job

    async def wait_for(self, job: JobFuture[Result]) -> Result:
        """Wait for the result of the job, or for the beginning of a stream."""
        result = await self.unless_disconnected(asyncio.wrap_future(job))
        self.timing["queue"] = milliseconds_since(self.queued_at) - result.milliseconds
        return result

    async def respond(self, request: Request, prepared: Prepared, result: Result) -> Response:
        """Encode the response, or wait for the first bytes of a stream."""
        response: Response
        if isinstance(result.value, Stream):
            first = await self.unless_disconnected(asyncio.wrap_future(result.value.read()))
            self.timing["first"] = milliseconds_since(self.queued_at) - self.timing["queue"]
            response = StreamedVideo(self, first, result.value)
        else:
            self.timing["vae"] = result.milliseconds
            response = await self.run_on_thread("output", self.render, request, result.value)
        self.observe(self.timing)
        self.record["mode"] = result.mode.value
        response.headers["Server-Timing"] = ", ".join(f"{stage};dur={ms:.1f}" for stage, ms in self.timing.items())
        response.headers["X-VAE-Mode"] = result.mode.value
        response.headers.update(prepared.headers)
        return response

    @contextmanager
    def deadline(self) -> Iterator[None]:
        """End a `with` block at the deadline, or when the service stops.

        Raises:
            RequestError: 408 if the body did not arrive, 503 if the service stops, else 504.
        """
        try:
            with self.admission.deadline():
                yield
        except TimeoutError:
            self.pipeline.device_queue.check_open()
            limit = f"within {self.settings.timeout:g} s (VAE_TIMEOUT)"
            if not self.arrived:
                raise RequestError(f"the body did not arrive {limit}", 408) from None
            raise RequestError(f"no response {limit}; send less at once", 504) from None

    async def receive(self) -> bytearray:
        """Receive the body. Count its bytes as they arrive, because Content-Length may be wrong."""
        declared = self.http.headers.get("content-length", "")
        self.settings.check_body(int(declared[:20]) if declared.isdecimal() else 0)
        body = bytearray()
        async for chunk in self.http.stream():
            body += chunk
            self.settings.check_body(len(body))
            self.reservation.reserve(len(chunk))
        self.arrived = True
        return body

    def parse(self, body: bytearray) -> tuple[Request, Prepared]:
        """Parse the request and make the input of the VAE. Run on a thread, which may outlive the request."""
        query, headers = self.http.query_params, self.http.headers
        values: dict[str, Any] = dict(query)
        if "shape" in values:
            values["shape"] = query.getlist("shape")
        content_type, accept = headers.get("content-type", ""), headers.get("accept")
        try:
            with self.reservation:  # an abandoned thread keeps its bytes until it ends
                request = self.pipeline.parse(body, content_type, accept, values, self.task)
                if request.body is not body:
                    body.clear()  # it was copied: the files of a form, the tensor in JSON
                request = replace(request, reserve=self.reservation.reserve)
                return request, self.pipeline.prepare(request)
        except RequestError as error:
            if not lost_bytes(body, content_type):
                raise
            raise RequestError(f"{error}; curl's -d drops line breaks: use --data-binary", error.status) from error

    def render(self, request: Request, value: Any) -> Response:
        """Encode the response. Run on a thread."""
        content = self.pipeline.render(request, value)
        if request.accept.json:
            return JSONResponse(to_json(content))
        return Response(content.body, media_type=content.media_type, headers=content.headers)

    async def run_on_thread(self, stage: str, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function on a thread and measure its time. If the request ends, the thread runs on, abandoned."""

        def timed() -> tuple[T, float]:
            start = perf_counter()
            result = function(*arguments)
            return result, milliseconds_since(start)

        result, self.timing[stage] = await to_thread.run_sync(timed, abandon_on_cancel=True)
        return result

    async def unless_disconnected(self, future: asyncio.Future[T]) -> T:
        """Return the result of a future. Cancel it when the client disconnects or the deadline passes."""
        watch: asyncio.Future[Any] = asyncio.ensure_future(self.disconnected())
        try:
            await asyncio.wait([future, watch], return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise ClientDisconnect
            return future.result()
        finally:
            watch.cancel()
            future.cancel()

    async def disconnected(self) -> None:
        """Return when the client disconnects."""
        while (await self.http.receive())["type"] != "http.disconnect":
            pass

    def observe(self, timing: dict[str, float]) -> None:
        """Add the milliseconds of stages to the log line and the metrics."""
        for stage, milliseconds in timing.items():
            metrics.STAGES.labels(stage).observe(milliseconds / 1000)
            self.record[f"{stage}_ms"] = round(milliseconds, 1)


class StreamedVideo(StreamingResponse):
    """A video that is sent while it is encoded. It keeps the request's resources until the last byte is sent.

    A failure breaks the connection, without the last HTTP chunk and the last box of the file.
    """

    def __init__(self, handler: RequestHandler, first: bytes, stream: Stream) -> None:
        super().__init__(self._chunks(first, stream), media_type="video/mp4")
        self.handler, self.resources = handler, handler.resources.pop_all()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record, start = self.handler.record, perf_counter()
        try:
            async with self.resources:
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


def cancel_job(job: JobFuture[Result]) -> None:
    """Drop a waiting job, or stop its pass, and end the encoder of its stream. A finished job stays as it is."""
    job.cancel()
    job.add_done_callback(close_stream)  # the encoder may have all frames and wait for a reader


def close_stream(job: Future[Result]) -> None:
    """End the encoder of a stream without a reader."""
    if not job.cancelled() and not job.exception() and isinstance(stream := job.result().value, Stream):
        stream.close()


def check_token(http: HttpRequest, token: str | None) -> None:
    """Raise `RequestError`, status 401, unless the request has `token`. None accepts every request."""
    if token:
        scheme, _, sent = http.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(
            sent.strip().encode("latin-1"), token.strip().encode()
        ):
            raise RequestError("send the header `Authorization: Bearer <token>` with the token of this service", 401)


def check_content_type(http: HttpRequest) -> None:
    """Raise `RequestError`, status 415, for an unsupported Content-Type."""
    if (media_type := media_type_of(http.headers.get("content-type", ""))) not in CONTENT_TYPES:
        known = ", ".join(sorted(CONTENT_TYPES - {""}))
        raise RequestError(f"Content-Type {media_type[:100]!r} is not supported; send none, or one of {known}", 415)


def check_content_encoding(http: HttpRequest) -> None:
    """Raise `RequestError`, status 415, for a compressed body."""
    codings = ",".join(http.headers.getlist("content-encoding")).lower().split(",")
    if coding := next((name.strip() for name in codings if name.strip() not in ("", "identity")), None):
        raise RequestError(f"Content-Encoding {coding[:100]!r} is not supported; send the body uncompressed", 415)


def milliseconds_since(start: float) -> float:
    """Return the milliseconds since a value of `perf_counter`."""
    return (perf_counter() - start) * 1000
