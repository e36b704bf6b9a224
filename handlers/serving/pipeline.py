"""Stages of a request: parse, prepare, forward, render."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from handlers.model import Model, SampleMode, Task
from handlers.serving import metrics
from handlers.serving.admission import Admission
from handlers.serving.devices import DevicePool, JobFuture, device_names
from handlers.serving.errors import RequestError
from handlers.serving.media import mp4, output, payload, pixels
from handlers.serving.media.latents import LatentsLayouts, add_noise, generator_of
from handlers.serving.media.normalization import Normalization
from handlers.serving.media.request import (
    Accept,
    Body,
    BodyKind,
    OutputKind,
    Parameters,
    Request,
    choose_image_format,
    decode_output_kind,
    media_type_of,
)
from handlers.serving.media.stream import BOUND, Stream
from handlers.serving.settings import Settings
from handlers.serving.vae.autoencoder import DecodeOptions, EncodeOptions
from handlers.serving.vae.heap import HEAP
from handlers.serving.vae.memory import Mode, free_memory, is_out_of_memory, total_memory
from handlers.serving.vae.vae import VAE
from handlers.serving.vae.warm_up import warm_up

logger = logging.getLogger(__name__)

FLOAT = torch.float32.itemsize

Output = Tensor | output.Mp4Writer | Stream
"""Output of a request: a tensor on the CPU, an MP4 file that is still encoded, or its stream."""


@dataclass(frozen=True)
class Prepared:
    """Input of the VAE, on the CPU."""

    inputs: Tensor
    """Raw latents or pixels in [-1, 1], with a batch dimension."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers for the response, which say how the body was used."""


@dataclass(frozen=True)
class Result:
    """Result of a request on a device."""

    value: Output
    mode: Mode
    milliseconds: float
    """Time of the batch; for a stream, the time until its first bytes."""


class BatchKey(NamedTuple):
    """Properties that the requests of a batch share."""

    task: Task
    shape: tuple[int, ...]
    """Shape of an item of the inputs."""
    is_mp4: bool
    sample_mode: SampleMode
    options: DecodeOptions


class Work(NamedTuple):
    """A request and its input, for a device."""

    request: Request
    inputs: Tensor
    result: JobFuture[Result] | None = None
    """Future of a streamed request, which gets its result with the first bytes."""


def load_pipelines(models: Mapping[str, type[Model]], path: str) -> dict[str, Pipeline]:
    """Load each model onto the devices of this machine, warm it up, and return the pipelines by key.

    Args:
        path: folder of the deployed repository, or "".

    Raises:
        ValueError, OSError: a setting or the weights are wrong; see `Settings.load` and `VAE.load`.
    """
    settings = Settings.load().within(total_memory(torch.device("cpu")))
    HEAP.reserve = int(settings.max_in_flight_mb * 1e6)
    path = "" if settings.foreign_repository else path
    names = device_names(settings.device)

    def load(key: str, declared: type[Model]) -> tuple[list[VAE], Settings]:
        own, folder = settings, path
        if len(models) > 1:
            own, folder = settings.for_model(key), str(Path(path, "vae", key)) if path else ""
        return [VAE.load(declared, folder, own, name) for name in names], own

    loaded = {key: load(key, declared) for key, declared in models.items()}
    admission = Admission(settings, len(names))
    # The threads of the devices begin after `VAE.load` has configured the heap: earlier ones have a heap of their own.
    devices = DevicePool([torch.device(name) for name in names], settings.timeout)
    pipelines = {key: Pipeline(vaes, own, admission, devices) for key, (vaes, own) in loaded.items()}
    wait([end for pipeline in pipelines.values() for end in pipeline.warm_up()])
    for pipeline in pipelines.values():
        pipeline.check_fast_passes()
    return pipelines


class Pipeline:
    """The stages of a request for one VAE.

    The stages share only the request, so requests may be in different stages at the same time. `forward` runs on the
    thread of a device; the others run on any thread.
    """

    def __init__(
        self,
        vaes: list[VAE],
        settings: Settings,
        admission: Admission | None = None,
        devices: DevicePool | None = None,
    ) -> None:
        """Create the pipeline of `vaes`, one for each device. Pipelines may share `admission` and `devices`."""
        self.vaes = vaes
        self.vae = vaes[0]
        self.layout = self.vae.layout
        self.latents_layouts = LatentsLayouts(self.layout, self.vae.declared)
        self.fps = self.vae.declared.fps
        self.settings = settings
        self.normalization = Normalization.read(self.vae.model, self.vae.declared)
        self.admission = admission or Admission(settings, len(vaes))
        self.devices = devices or DevicePool([vae.device for vae in vaes], settings.timeout)
        self.device_queue = self.devices.queue

    def warm_up(self) -> list[Future[None]]:
        """Start the warm-up of each device, if there is one, and return the futures of its end."""
        return [
            self.device_queue.when_idle(number, warm_up(vae, seconds))
            for number, vae in enumerate(self.vaes)
            if (seconds := self.settings.warm_up_seconds(vae.device.type))
        ]

    def check_fast_passes(self) -> None:
        """Start the check of the fast passes. diffusers' own pass serves requests meanwhile."""
        for number, vae in enumerate(self.vaes):
            if any(vae.fast.candidates.values()):
                Thread(target=self._check_fast, args=(number, vae), name=f"fast-{number}", daemon=True).start()

    def _check_fast(self, number: int, vae: VAE) -> None:
        vae.fast.prepare()
        self.device_queue.when_idle(number, vae.fast.check())

    def parse(
        self,
        body: Body,
        content_type: str,
        accept: str | None,
        values: Mapping[str, Any],
        task: Task | None = None,
    ) -> Request:
        """Parse an HTTP request. Without a `task`, find the task from the payload."""
        media_type, files = media_type_of(content_type), [body]
        if media_type in ("application/json", "tensor/base64"):
            with HEAP.claim(payload.json_peak(body)):
                files[0], more = payload.read_json(body)
            values = {**values, **more}
        elif media_type == "multipart/form-data":
            with HEAP.claim(len(body)):
                files, more = payload.read_form(body, content_type)
            values = {**values, **more}
        is_tensor = media_type == "tensor/binary" or "shape" in values
        kind: BodyKind = "tensor" if is_tensor else self._sniff(files)
        return self._request(files, kind, Parameters.parse(values), Accept.parse(accept, content_type), task)

    def _sniff(self, files: list[Body]) -> BodyKind:
        """Return the kind of one file, or of several, which must be images."""
        kinds = [payload.sniff(file) for file in files]
        if len(files) > 1 and (self.layout.kind == "video" or set(kinds) != {"image"}):
            allowed = "a video model takes one file" if self.layout.kind == "video" else "a batch has images alone"
            raise RequestError(f"the form has {len(files)} files ({', '.join(sorted(set(kinds)))}); {allowed}", 422)
        return kinds[0]

    def _request(
        self, files: list[Body], body_kind: BodyKind, parameters: Parameters, accept: Accept, task: Task | None
    ) -> Request:
        if body_kind == "tensor" and len(files) > 1:
            raise RequestError("`shape` and `dtype` describe one tensor, but the form has several files")
        task = task or ("encode" if body_kind != "tensor" or self._is_pixels(parameters) else "decode")
        if task == "decode" and body_kind != "tensor":
            raise RequestError(f"the body is {body_kind} data, but decoding takes latents; POST it to /encode")
        if self.layout.kind == "image" and body_kind == "video":
            raise RequestError("the body is a video, but this is an image model; send PNG, JPEG or WebP", 422)
        output_kind = OutputKind.LATENTS
        if task == "decode":
            output_kind = decode_output_kind(self.layout.kind, parameters, accept)
        elif parameters.sample_mode == "moments":
            self._check_moments(parameters)
        if parameters.stream and (output_kind is not OutputKind.MP4 or accept.json):
            raise RequestError("`stream`: only the MP4 file of a decoded video is streamed, and not inside JSON", 422)
        image_format = choose_image_format(parameters, accept, output_kind, self.layout.pixel_channels == 4)
        body = files[0] if len(files) == 1 else files
        return Request(task, body, body_kind, parameters, output_kind, accept, image_format)

    def _check_moments(self, parameters: Parameters) -> None:
        """Raise `RequestError`, status 422, where the encoder has no moments, or for moments with scaling or layout."""
        if not self.layout.variational:
            raise RequestError("`sample_mode`: this VAE's encoder gives latents, no distribution with moments", 422)
        scaled = parameters.do_scaling or parameters.scaling_factor or parameters.shift_factor
        if scaled or parameters.latents_layout:
            raise RequestError(
                "`sample_mode`: moments are raw and in the VAE's own layout, with twice the channels (means, then "
                "log-variances); send no scaling and no `latents_layout`",
                422,
            )

    def _is_pixels(self, parameters: Parameters) -> bool:
        """Return whether a tensor is pixels to encode, and not latents to decode.

        Raises:
            RequestError: it may be both.
        """
        shape, layouts = parameters.shape or (), self.latents_layouts
        if not pixels.is_pixels(shape, parameters.dtype, self.layout):
            return False
        matches = layouts.matches(shape, parameters)
        if "packed" in matches or (matches and (parameters.latents_layout or parameters.output_type)):
            return False  # pixels have neither parameter
        if matches and pixels.is_encodable(shape, self.layout, parameters.dtype):
            raise RequestError(
                f"`shape` {list(shape)} may be pixels, or latents ({' or '.join(matches)}); POST pixels to /encode and "
                "latents to /decode"
            )
        if len(shape) == 3 and shape[2] == self.layout.latent_channels * layouts.patch**2:
            raise RequestError(
                f"`shape` {list(shape)} may be pixels, or packed latents without their `height` and `width`; "
                "POST pixels to /encode, and send height and width with packed latents"
            )
        return not matches

    def prepare(self, request: Request) -> Prepared:
        """Make the VAE's input from the body. Check its size before each step that takes memory."""
        prepared = self._read_latents(request) if request.task == "decode" else self._read_pixels(request)
        inputs = prepared.inputs
        # minimum and maximum are NaN if a value is; `isfinite` of all values would take another copy
        if request.body_kind == "tensor" and not all(value.isfinite() for value in inputs.aminmax()):
            _, dtype = output.describe(inputs)
            raise RequestError(f"the tensor has NaN or infinity, as sent or after scaling in {dtype}", 422)
        if request.parameters.memory_format:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            inputs = inputs.contiguous(memory_format=formats[inputs.ndim])
        return Prepared(inputs, prepared.headers)

    def _read_latents(self, request: Request) -> Prepared:
        parameters = request.parameters
        batch, layout = self.latents_layouts.to_own(self._read_tensor(request), parameters)
        self._check_batch("decode", batch.shape)
        if len(batch) > 1 and not self._takes_batch(request.output_kind):
            use_zip = ", or for images with Accept: application/zip" if self.layout.kind == "image" else ""
            raise RequestError(
                f"`shape`: a batch of {len(batch)} does not fit in {request.output_kind.value}; send one item at a "
                "time (in a UI: a batch size of 1, and a larger batch count), or use output_type=pt" + use_zip
            )
        width, height = (side * self.layout.decode_factor for side in (batch.shape[-1], batch.shape[-2]))
        output.check_size(request.output_kind, request.image_format, width, height)
        raw = self.normalization.scaling(parameters, "decode", layout).unscale(batch, self.vae.dtype)
        if self.vae.config.get("timestep_conditioning"):
            raw = add_noise(raw, parameters)
        request.reserve(raw.nbytes)
        return Prepared(raw)

    def _check_batch(self, task: Task, shape: tuple[int, ...]) -> None:
        self.settings.check_batch(shape, self.layout.frames(task, shape), self.layout.pixels(task, shape))

    def _read_tensor(self, request: Request) -> Tensor:
        assert not isinstance(request.body, list)
        return payload.read_tensor(request.body, request.parameters.shape, request.parameters.dtype)

    def _read_pixels(self, request: Request) -> Prepared:
        match request.body_kind:
            case "tensor":
                batch = pixels.to_batch(self._read_tensor(request), self.layout, request.parameters.exact)
                self._check_batch("encode", batch.shape)
                self._check_encode(request, batch.shape)
                request.reserve(batch.numel() * (FLOAT if batch.dtype == torch.uint8 else batch.dtype.itemsize))
                return Prepared(pixels.normalize(batch))
            case "image":
                return Prepared(self._read_images(request))
            case "video":
                return self._read_video(request)

    def _read_images(self, request: Request) -> Tensor:
        """Decode the images of a batch, after the headers of all files have shown that they fit limits and memory."""
        files = request.body if isinstance(request.body, list) else [request.body]
        self.settings.check_files(len(files))
        images = [payload.inspect_image(file, self.settings, len(files)) for file in files]
        shape = pixels.shape_of_images([image.size for image in images], self.layout)
        size = FLOAT * math.prod(shape)
        request.reserve(size)
        self._check_encode(request, shape)
        with HEAP.claim(max(image.peak for image in images), reserved=size):
            return pixels.from_images(map(payload.decode_image, images), shape)

    def _read_video(self, request: Request) -> Prepared:
        """Decode the frames of a video. Frames count as they are decoded, and are freed one by one for their floats."""
        assert not isinstance(request.body, list)
        frame_bytes = 0

        def reserve_frame(size: int) -> None:
            nonlocal frame_bytes
            request.reserve(size)
            frame_bytes += size

        frames = mp4.read_video(request.body, self.settings, reserve_frame)
        count = len(frames)
        shape = pixels.shape_of_images([frame.size for frame in frames], self.layout)
        self._check_encode(request, shape)
        more = max(0, FLOAT * math.prod(shape) - frame_bytes)
        request.reserve(more)
        frames.reverse()
        with HEAP.claim(0, reserved=more):
            batch = pixels.from_images((frames.pop() for _ in range(count)), shape)
        return Prepared(batch, {"X-VAE-Frames": f"the first {shape[2]} of {count}"} if shape[2] < count else {})

    def _check_encode(self, request: Request, shape: tuple[int, ...]) -> None:
        """Refuse pixels of this shape before they are decoded, when their latents or their pass would be refused."""
        parameters, latents_shape = request.parameters, self.layout.encoded_shape(shape)
        if parameters.sample_mode != "moments":
            self.normalization.scaling(parameters, "encode", parameters.latents_layout).check_shape(latents_shape)
            self.latents_layouts.check_layout(parameters.latents_layout, latents_shape)
        for vae in self.vaes:
            vae.check_capacity("encode", shape, self._encode_options(request).exact)

    def _takes_batch(self, output_kind: OutputKind) -> bool:
        if self.layout.kind == "video":
            return output_kind is OutputKind.DECODED
        return output_kind is not OutputKind.IMAGE

    def submit(self, request: Request, inputs: Tensor) -> JobFuture[Result]:
        """Queue a prepared request for a device. Waiting requests with an equal `BatchKey` become one batch.

        A stream runs alone: when a batch fails, its requests run again one by one, and sent bytes cannot be taken back.
        """
        parameters, streamed = request.parameters, request.parameters.stream
        key: Hashable = BatchKey(
            request.task,
            tuple(inputs.shape[1:]),
            request.output_kind is OutputKind.MP4,
            parameters.sample_mode,
            self._decode_options(request),
        )
        if streamed or parameters.sample_mode == "sample" or not self.vae.declared.runs_batches:
            key = object()
        size = len(inputs) * self.layout.pixels(request.task, inputs.shape)
        future: JobFuture[Result] = JobFuture()
        return self.devices.submit(self, Work(request, inputs, future if streamed else None), key, size, future)

    def unread_bytes(self, request: Request, inputs: Tensor) -> int:
        """Return the bytes that a slow reader of a stream may leave in memory: frames, and encoded bytes."""
        return 3 * self.layout.pixels(request.task, inputs.shape) + BOUND if request.parameters.stream else 0

    def _decode_options(self, request: Request) -> DecodeOptions:
        parameters = request.parameters
        return DecodeOptions(
            parameters.decode_timestep, parameters.decode_chunk_size, parameters.exact or self.settings.exact
        )

    def _encode_options(self, request: Request) -> EncodeOptions:
        parameters = request.parameters
        generator = generator_of(parameters) if parameters.sample_mode == "sample" else None
        return EncodeOptions(parameters.sample_mode, generator, parameters.exact or self.settings.exact)

    def forward(self, vae: VAE, batch: list[Work]) -> list[Result]:
        """Run a batch, whose requests have equal `BatchKey`s, on a device.

        Raises:
            RequestError: among others, the device has no free memory; status 503.
        """
        try:
            start = perf_counter()
            values, mode = self._run_batch(vae, batch, start)
            milliseconds = (perf_counter() - start) * 1000
            return [Result(value, mode, milliseconds) for value in values]
        except RuntimeError as error:
            if not is_out_of_memory(error, vae.device):
                raise
            metrics.OUT_OF_MEMORY.inc()
            logger.warning("out of memory outside of the pass: %s", error)
            raise RequestError("this device has no free memory for the request now; try again soon", 503) from error

    def _run_batch(self, vae: VAE, batch: list[Work], start: float) -> tuple[Sequence[Output], Mode]:
        metrics.BATCH_SIZE.observe(len(batch))
        request, sizes = batch[0].request, [len(work.inputs) for work in batch]
        inputs = batch[0].inputs if len(batch) == 1 else torch.cat([work.inputs for work in batch])
        values: Sequence[Output]
        outputs: Tensor
        if request.output_kind is OutputKind.MP4:
            write = partial(self._write_videos, vae, batch, start)
            values, mode = vae.decode(inputs, write, self._decode_options(request))
        else:
            if request.task == "decode":
                outputs, mode = vae.decode(inputs, options=self._decode_options(request))
            else:
                outputs, mode = vae.encode(inputs, self._encode_options(request))
            items = zip(batch, outputs.split(sizes), strict=True)
            values = [vae.to_cpu(self._finish(work.request, item)) for work, item in items]
        metrics.PASSES.labels(request.task, mode.value, self.settings.model or "").inc()
        return values, mode

    def _write_videos(
        self, vae: VAE, batch: list[Work], start: float, chunks: Iterator[Tensor]
    ) -> list[output.Mp4Writer | Stream]:
        """Give the frames of each request to an encoder, which works while the device decodes the next chunk.

        Raises:
            RequestError: a pass failed after bytes of its stream were sent, so it cannot run again; status 503.
        """
        streams = [self._stream(vae, work, start) for work in batch]
        with ExitStack() as stack:
            writers = [
                stack.enter_context(output.Mp4Writer(work.request.parameters.fps or self.fps, stream))
                for work, stream in zip(batch, streams, strict=True)
            ]
            for frames in chunks:
                for writer, video in zip(writers, frames.split(1), strict=True):
                    writer.add(vae.to_cpu(pixels.to_output(video, OutputKind.MP4)).numpy())
        return [stream or writer for stream, writer in zip(streams, writers, strict=True)]

    def _stream(self, vae: VAE, work: Work, start: float) -> Stream | None:
        """Create the stream of a request that wants one. Its first bytes set the result."""
        result = work.result
        if result is None:
            return None
        if result.done():
            raise RequestError("the pass failed after its stream began, so it cannot run again; try again", 503)
        mode = vae.mode

        def begin() -> None:
            milliseconds = (perf_counter() - start) * 1000
            with suppress(InvalidStateError):  # the pass is over
                result.set_result(Result(stream, mode, milliseconds))

        stream = Stream(begin)
        return stream

    def _finish(self, request: Request, result: Tensor) -> Tensor:
        return (
            self._finish_pixels(request, result) if request.task == "decode" else self._finish_latents(request, result)
        )

    def _finish_pixels(self, request: Request, decoded: Tensor) -> Tensor:
        result = pixels.to_output(decoded, request.output_kind)
        dtype = request.parameters.output_dtype
        return _to_dtype(result, dtype) if dtype and result.is_floating_point() else result

    def _finish_latents(self, request: Request, raw: Tensor) -> Tensor:
        """Scale raw latents and convert their layout. Moments stay as they are."""
        parameters, result = request.parameters, raw
        if parameters.sample_mode != "moments":
            scaling = self.normalization.scaling(parameters, "encode", parameters.latents_layout)
            result = self.latents_layouts.from_own(scaling.scale(raw), parameters.latents_layout)
        return _to_dtype(result, parameters.output_dtype)

    def render(self, request: Request, value: Tensor | output.Mp4Writer) -> output.Content:
        """Encode the body of the response."""
        parameters = request.parameters
        return output.render(
            value, request.output_kind, request.image_format, parameters.quality, parameters.background
        )

    def measure(self) -> None:
        """Set the gauges of `/metrics`."""
        metrics.IN_FLIGHT.set(self.admission.bytes_in_flight)
        metrics.RUNNING.set(self.device_queue.running)
        metrics.WAITING.set(self.device_queue.waiting)
        for vae in self.vaes:
            with suppress(RuntimeError):  # from a lost GPU; `/health` reports it
                metrics.FREE_MEMORY.labels(str(vae.device)).set(free_memory(vae.device))
            metrics.TOTAL_MEMORY.labels(str(vae.device)).set(total_memory(vae.device))

    def run_message(self, message: Mapping[str, Any]) -> Any:
        """Run the object of a JSON request and return the object of its response."""
        request = self.parse(json.dumps(message).encode(), "application/json", None, {})
        job = self.submit(request, self.prepare(request).inputs)
        try:
            value: Any = job.result(self.settings.timeout).value
        finally:
            job.cancel()  # at the deadline
        return output.to_json(self.render(request, value))


def _to_dtype(result: Tensor, dtype: str | None) -> Tensor:
    """Convert floats to a dtype; None keeps theirs. Raise `RequestError`, status 422, when a value overflows."""
    if dtype:
        result = result.to(payload.DTYPES[dtype])
    if not result.isfinite().all():
        raise RequestError(
            "`scaling_factor`, `shift_factor`, `output_dtype`: a value of the response exceeds its dtype's range; "
            "use a wider dtype or other factors",
            422,
        )
    return result
