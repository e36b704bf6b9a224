"""One request, in the order it happens: parse, prepare, forward, render."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from concurrent.futures import InvalidStateError
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from handlers.model import Model, SampleMode, Task
from handlers.serving import metrics
from handlers.serving.admission import Admission
from handlers.serving.devices import DevicePool, JobFuture, device_names
from handlers.serving.errors import RequestError
from handlers.serving.media import mp4, output, payload, pixels
from handlers.serving.media.image_files import ImageFile
from handlers.serving.media.latents import LatentsLayouts, add_noise, generator_of
from handlers.serving.media.normalization import Normalization
from handlers.serving.media.request import (
    Accept,
    Body,
    BodyKind,
    OutputKind,
    Parameters,
    Request,
    decode_output_kind,
    media_type_of,
)
from handlers.serving.media.stream import BOUND, Stream
from handlers.serving.settings import Settings
from handlers.serving.vae.autoencoder import DecodeOptions, EncodeOptions
from handlers.serving.vae.heap import HEAP
from handlers.serving.vae.memory import Mode, free_memory, is_out_of_memory, total_memory
from handlers.serving.vae.vae import VAE

FLOAT = torch.float32.itemsize


@dataclass(frozen=True)
class Prepared:
    """The VAE's input, on the CPU."""

    inputs: Tensor
    """Raw latents, or pixels in [-1, 1], both with a batch dimension first."""
    headers: dict[str, str] = field(default_factory=dict)
    """What the answer says of what was made of the body."""


@dataclass(frozen=True)
class Result:
    """What a device made of a request."""

    value: Tensor | output.Mp4Writer | Stream
    """The answer's tensor, on the CPU; or the MP4 that its frames are written to, which may be streamed."""
    mode: Mode
    milliseconds: float
    """Of the batch that the request was in; of a stream until its first bytes."""


class BatchKey(NamedTuple):
    """What the requests of one batch have in common."""

    task: Task
    shape: tuple[int, ...]
    """Of one item of the inputs."""
    is_mp4: bool
    sample_mode: SampleMode
    options: DecodeOptions


class Work(NamedTuple):
    """What a device gets of a request."""

    request: Request
    inputs: Tensor
    result: JobFuture[Result] | None = None
    """Of a request for a stream: it is set as soon as there are bytes, and at the end of the pass for all others."""


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter that is null was not sent."""
    return {name: value for name, value in values.items() if value is not None}


def load_pipelines(models: Mapping[str, type[Model]], path: str) -> dict[str, Pipeline]:
    """One for each model, by its key, on the devices of this machine. `path` is the deployed repository's, or "".

    Raises:
        ValueError, OSError: a setting or weights are wrong, as `Settings.load` and `VAE.load` say.
    """
    settings = Settings.load().within(total_memory(torch.device("cpu")))
    HEAP.reserve = int(settings.max_in_flight_mb * 1e6)
    path = "" if settings.foreign_repository else path
    names = device_names(settings.device)
    admission = Admission(settings, len(names))
    devices = DevicePool([torch.device(name) for name in names], settings.timeout)

    def load(key: str, declared: type[Model]) -> Pipeline:
        own, folder = settings, path
        if len(models) > 1:
            own, folder = settings.of(key), str(Path(path, "vae", key)) if path else ""
        return Pipeline([VAE.load(declared, folder, own, name) for name in names], own, admission, devices)

    return {key: load(key, declared) for key, declared in models.items()}


class Pipeline:
    """The stages of a request around one VAE.

    They share nothing but the request, so different requests may be in different stages at the same time. Only
    `forward` is bound to threads: those of the device queue, one for each device.
    """

    def __init__(
        self,
        vaes: list[VAE],
        settings: Settings,
        admission: Admission | None = None,
        devices: DevicePool | None = None,
    ) -> None:
        """`vaes` are one for each device. Other pipelines share `admission` and `devices`; None makes new ones."""
        self.vaes = vaes
        self.vae = vaes[0]
        self.layout = self.vae.layout
        self.latents_layouts = LatentsLayouts(self.layout, self.vae.declared)
        self.fps = self.vae.declared.fps
        self.settings = settings
        self.normalization = Normalization.of(self.vae.model, self.vae.declared)
        self.admission = admission or Admission(settings, len(vaes))
        self.devices = devices or DevicePool([vae.device for vae in vaes], settings.timeout)
        self.device_queue = self.devices.queue
        for number, vae in enumerate(vaes):
            if vae.fast.fast:  # requests are served meanwhile, by diffusers' own pass
                Thread(target=self._check_fast, args=(number, vae), name=f"fast-{number}", daemon=True).start()

    def _check_fast(self, number: int, vae: VAE) -> None:
        for check in vae.fast.checks():
            self.device_queue.when_idle(number, check)

    def parse(
        self,
        body: Body,
        content_type: str,
        accept: str | None,
        values: Mapping[str, Any],
        task: Task | None = None,
    ) -> Request:
        """The request that an HTTP message carries; without a `task`, its payload tells which it is."""
        media_type, files = media_type_of(content_type), [body]
        if media_type in ("application/json", "tensor/base64"):
            with HEAP.lend(payload.json_peak(body)):
                files[0], more = payload.read_json(body)
            values = {**values, **_without_nulls(more)}
        elif media_type == "multipart/form-data":
            with HEAP.lend(len(body)):
                files, more = payload.read_form(body, content_type)
            values = {**values, **more}
        kind: BodyKind | None = "tensor" if media_type == "tensor/binary" or "shape" in values else None
        kind = kind or self._kind_of(files)
        content = files[0] if len(files) == 1 else files
        return self._request(content, kind, Parameters.parse(values), Accept.parse(accept, content_type), task)

    def _kind_of(self, files: list[Body]) -> BodyKind:
        """What one file holds, or several, which are pictures."""
        kinds = [payload.sniff(file) for file in files]
        if len(files) > 1 and (self.layout.kind == "video" or set(kinds) != {"image"}):
            taken = "a video model takes one file" if self.layout.kind == "video" else "a batch is of pictures alone"
            raise RequestError(f"the form holds {len(files)} files ({', '.join(sorted(set(kinds)))}); {taken}", 422)
        return kinds[0]

    def _request(
        self, body: Any, body_kind: BodyKind, parameters: Parameters, accept: Accept, task: Task | None
    ) -> Request:
        if body_kind == "tensor" and isinstance(body, list):
            raise RequestError("`shape` and `dtype` are of one tensor, but the form holds several files")
        if task is None:
            task = "encode" if body_kind != "tensor" or self._holds_pixels(parameters) else "decode"
        if task == "decode" and body_kind != "tensor":
            raise RequestError(f"the body is {body_kind} data, but decoding takes latents; POST it to /encode")
        if self.layout.kind == "image" and body_kind == "video":
            raise RequestError("the body is a video, but this is an image model; send PNG, JPEG or WebP", 422)
        output_kind = (
            OutputKind.LATENTS if task == "encode" else decode_output_kind(self.layout.kind, parameters, accept)
        )
        if task == "encode" and parameters.sample_mode == "moments":
            self._check_moments(parameters)
        if parameters.stream and (output_kind is not OutputKind.MP4 or accept.json):
            raise RequestError(
                "`stream`: only a video that is decoded to an MP4 file is streamed, not inside JSON", 422
            )
        image_format: Any = parameters.image_format or "jpg"
        if not parameters.image_format and output_kind in (OutputKind.IMAGE, OutputKind.IMAGES):
            image_format = accept.image_format("png" if accept.json else "jpg")  # inside JSON a PNG, as in the toolkit
        return Request(task, body, body_kind, parameters, output_kind, accept, image_format)

    def _check_moments(self, parameters: Parameters) -> None:
        """Raises `RequestError` where there are none, or where they are asked for in a way that they do not come in."""
        if not self.layout.variational:
            raise RequestError("`sample_mode`: this VAE's encoder gives latents, no distribution with moments", 422)
        scaled = parameters.do_scaling or parameters.scaling_factor or parameters.shift_factor
        if scaled or parameters.latents_layout:
            raise RequestError(
                "`sample_mode`: moments come raw and in the VAE's own layout, with twice the channels (means, then "
                "log-variances); send no scaling and no `latents_layout`",
                422,
            )

    def _holds_pixels(self, parameters: Parameters) -> bool:
        """Whether a tensor that came to no explicit path is to be encoded."""
        shape, layouts = parameters.shape or (), self.latents_layouts
        if not pixels.is_pixels(shape, parameters.dtype, self.layout):
            return False
        found = layouts.matches(shape, parameters)
        if "packed" in found or (found and (parameters.latents_layout or parameters.output_type)):
            return False  # pixels would come with neither
        if found and pixels.fits(shape, self.layout):
            raise RequestError(
                f"`shape` {list(shape)} may be pixels, or latents ({' or '.join(found)}); POST pixels to /encode and "
                "latents to /decode"
            )
        if len(shape) == 3 and shape[2] == self.layout.latent_channels * layouts.patch**2:
            raise RequestError(
                f"`shape` {list(shape)} may be pixels, or packed latents without their `height` and `width`; "
                "POST pixels to /encode, and send height and width with packed latents"
            )
        return not found

    def prepare(self, request: Request) -> Prepared:
        """What the VAE takes of a request."""
        if request.task == "encode":
            prepared = self._read_pixels(request)
        else:
            prepared = Prepared(self._read_latents(request))
            request.hold(prepared.inputs.nbytes)
        # the least and the greatest value are NaN where one is; `isfinite` of all would take another copy
        if request.body_kind == "tensor" and not all(value.isfinite() for value in prepared.inputs.aminmax()):
            dtype = str(prepared.inputs.dtype).removeprefix("torch.")
            raise RequestError(f"the tensor holds NaN or infinity, as it came or once it is scaled in {dtype}", 422)
        if request.parameters.memory_format:
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            return replace(prepared, inputs=prepared.inputs.contiguous(memory_format=formats[prepared.inputs.ndim]))
        return prepared

    def _read_latents(self, request: Request) -> Tensor:
        parameters = request.parameters
        batch, layout = self.latents_layouts.read(self._read_tensor(request), parameters)
        self._check_batch("decode", batch.shape)
        if len(batch) > 1 and not self._takes_batch(request.output_kind):
            raise RequestError(
                f"`shape`: a batch of {len(batch)} cannot be answered as {request.output_kind.value}; "
                "send one at a time "
                "(in a UI: a batch size of 1, and a larger batch count), or ask for output_type=pt"
                + (", or for pictures with Accept: application/zip" if self.layout.kind == "image" else "")
            )
        width, height = (side * self.layout.vae_scale_factor for side in (batch.shape[-1], batch.shape[-2]))
        output.check_size(request.output_kind, request.image_format, width, height)
        raw = self.normalization.scaling(parameters, "decode", layout).unscale(batch, self.vae.dtype)
        return add_noise(raw, parameters) if self.vae.config.get("timestep_conditioning") else raw

    def _check_batch(self, task: Task, shape: tuple[int, ...]) -> None:
        self.settings.check_batch(shape, self.layout.frames(task, shape), self.layout.pixels(task, shape))

    def _read_tensor(self, request: Request) -> Tensor:
        if isinstance(request.body, Tensor):
            return request.body
        return payload.read_tensor(request.body, request.parameters.shape, request.parameters.dtype)

    def _read_pixels(self, request: Request) -> Prepared:
        if request.body_kind == "tensor":
            batch = pixels.to_batch(self._read_tensor(request), self.layout, request.parameters.exact)
            self._check_batch("encode", batch.shape)
            self._check_encode(request, batch.shape)
            request.hold(batch.numel() * (FLOAT if batch.dtype == torch.uint8 else batch.dtype.itemsize))
            return Prepared(pixels.normalize(batch))
        if request.body_kind == "video":
            return self._read_video(request)
        return Prepared(self._read_images(request))

    def _read_images(self, request: Request) -> Tensor:
        """Nothing is decoded before the whole batch is known, by its headers, to fit the limits and the memory."""
        files = request.body if isinstance(request.body, list) else [request.body]
        self.settings.check_files(len(files))
        images = [self._inspect_image(file, len(files)) for file in files]
        shape = pixels.shape_of_images([image.size for image in images], self.layout)
        size = FLOAT * math.prod(shape)
        request.hold(size)
        self._check_encode(request, shape)
        decoding = max((image.peak for image in images if isinstance(image, ImageFile)), default=0)
        with HEAP.lend(decoding, held=size):
            decoded = (image if isinstance(image, Image.Image) else payload.decode_image(image) for image in images)
            return pixels.from_images(decoded, shape)

    def _inspect_image(self, file: Body | Image.Image, batch: int) -> ImageFile | Image.Image:
        if isinstance(file, Image.Image):
            return payload.upright_rgb(file)
        return payload.inspect_image(file, self.settings, batch)

    def _read_video(self, request: Request) -> Prepared:
        """Its frames are counted as they are decoded. They make way, one after the other, for their floats."""
        held = 0

        def hold_frame(size: int) -> None:
            nonlocal held
            request.hold(size)
            held += size

        frames = mp4.read_video(request.body, self.settings, hold_frame)
        count = len(frames)
        shape = pixels.shape_of_images([frame.size for frame in frames], self.layout)
        self._check_encode(request, shape)
        more = max(0, FLOAT * math.prod(shape) - held)
        request.hold(more)
        frames.reverse()
        with HEAP.lend(0, held=more):
            batch = pixels.from_images((frames.pop() for _ in range(count)), shape)
        return Prepared(batch, {"X-VAE-Frames": f"the first {shape[2]} of {count}"} if shape[2] < count else {})

    def _check_encode(self, request: Request, shape: tuple[int, ...]) -> None:
        """Refuse here what would be refused when pixels of this shape are decoded, or even encoded."""
        self._to_output(request, self._no_latents(shape))
        for vae in self.vaes:
            vae.check_capacity("encode", shape, self._encode_options(request).exact)

    def _no_latents(self, shape: tuple[int, ...]) -> Tensor:
        """Of the shape that pixels of this one are encoded to, without numbers."""
        layout = self.layout
        frames = {"image": (1,), "video": (layout.latent_frames(layout.frames("encode", shape)),)}[layout.kind]
        side = layout.vae_scale_factor
        sizes = (*frames[: layout.ndim - 4], shape[-2] // side, shape[-1] // side)
        return torch.empty((shape[0], layout.latent_channels, *sizes), dtype=self.vae.dtype, device="meta")

    def _to_output(self, request: Request, raw: Tensor) -> Tensor:
        """Raw latents, scaled and laid out as was asked for; moments as they are."""
        layout = request.parameters.latents_layout
        if request.parameters.sample_mode == "moments":
            return raw
        scaled = self.normalization.scaling(request.parameters, "encode", layout).scale(raw)
        return self.latents_layouts.write(scaled, layout)

    def _takes_batch(self, output_kind: OutputKind) -> bool:
        if self.layout.kind == "video":
            return output_kind is OutputKind.DECODED
        return output_kind is not OutputKind.IMAGE

    def submit(self, request: Request, inputs: Tensor) -> JobFuture[Result]:
        """Queue the prepared request for a device. Requests that wait with an equal `BatchKey` are one batch.

        A stream goes alone: where a batch fails, its requests are run again one by one, and sent bytes stay sent.
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

    def unsent(self, request: Request, inputs: Tensor) -> int:
        """Bytes, at most, that wait for the reader of a stream: frames for the encoder, and what it made of them."""
        return 3 * self.layout.pixels(request.task, inputs.shape) + BOUND if request.parameters.stream else 0

    def _decode_options(self, request: Request) -> DecodeOptions:
        asked = request.parameters
        return DecodeOptions(asked.decode_timestep, asked.decode_chunk_size, asked.exact or self.settings.exact)

    def _encode_options(self, request: Request) -> EncodeOptions:
        asked = request.parameters
        generator = generator_of(asked) if asked.sample_mode == "sample" else None
        return EncodeOptions(asked.sample_mode, generator, asked.exact or self.settings.exact)

    def forward(self, vae: VAE, batch: list[Work]) -> list[Result]:
        """The VAE and what belongs on its device, for requests of one task and shape.

        Raises:
            RequestError: among others, that there is no memory beside the VAE itself; status 503.
        """
        try:
            return self._forward(vae, batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            metrics.OUT_OF_MEMORY.inc()
            raise RequestError("this device has no memory free for that now; try again soon", 503) from error

    def _forward(self, vae: VAE, batch: list[Work]) -> list[Result]:
        start = perf_counter()
        metrics.BATCH_SIZE.observe(len(batch))
        requests = [work.request for work in batch]
        inputs = batch[0].inputs if len(batch) == 1 else torch.cat([work.inputs for work in batch])
        options = self._decode_options(requests[0])
        outputs: Tensor
        values: Sequence[Tensor | output.Mp4Writer | Stream]
        if requests[0].output_kind is OutputKind.MP4:
            values, mode = vae.decode(inputs, partial(self._write_videos, vae, batch, start), options)
        else:
            if requests[0].task == "decode":
                outputs, mode = vae.decode(inputs, options=options)
            else:
                outputs, mode = vae.encode(inputs, self._encode_options(requests[0]))
            parts = outputs.split([len(work.inputs) for work in batch])
            values = [vae.to_cpu(self._finish(request, part)) for request, part in zip(requests, parts, strict=True)]
        metrics.PASSES.labels(requests[0].task, mode.value, self.settings.model or "").inc()
        milliseconds = (perf_counter() - start) * 1000
        return [Result(value, mode, milliseconds) for value in values]

    def _write_videos(
        self, vae: VAE, batch: list[Work], start: float, chunks: Iterator[Tensor]
    ) -> list[output.Mp4Writer | Stream]:
        """Gives each request's frames to an encoder, which works on them while the device decodes the next.

        Raises:
            RequestError: an earlier pass has failed when bytes of its stream were sent; what is sent stays sent.
        """
        streams = [self._stream(vae, work, start) for work in batch]
        with ExitStack() as stack:
            writers = [
                stack.enter_context(output.Mp4Writer(work.request.parameters.fps or self.fps, stream))
                for work, stream in zip(batch, streams, strict=True)
            ]
            for frames in chunks:
                for writer, part in zip(writers, frames.split(1), strict=True):
                    writer.add(vae.to_cpu(pixels.to_output(part, OutputKind.MP4)).numpy())
        return [stream or writer for stream, writer in zip(streams, writers, strict=True)]

    def _stream(self, vae: VAE, work: Work, start: float) -> Stream | None:
        """Where one is asked for; its first bytes are the request's result, and with them it can no more be refused."""
        result = work.result
        if result is None:
            return None
        if result.done():
            raise RequestError("the stream had begun when its pass failed, so it cannot be tried again", 503)
        mode = vae.mode

        def begin() -> None:
            milliseconds = (perf_counter() - start) * 1000
            with suppress(InvalidStateError):  # the pass is over already
                result.set_result(Result(stream, mode, milliseconds))

        stream = Stream(begin)
        return stream

    def _finish(self, request: Request, output: Tensor) -> Tensor:
        dtype, decodes = request.parameters.output_dtype, request.task == "decode"
        answer = pixels.to_output(output, request.output_kind) if decodes else self._to_output(request, output)
        if dtype and answer.is_floating_point():
            answer = answer.to(payload.DTYPES[dtype])
        if (dtype or not decodes) and not answer.isfinite().all():
            raise RequestError(
                "`scaling_factor`, `shift_factor`, `output_dtype`: they take the answer out of its dtype's range", 422
            )
        return answer

    def render(self, request: Request, value: Tensor | output.Mp4Writer) -> output.Content:
        """The answer's bytes."""
        return output.render(value, request.output_kind, request.image_format, request.parameters.quality)

    def measure(self) -> None:
        """Sets what `/metrics` shows of this moment."""
        metrics.IN_FLIGHT.set(self.admission.bytes_in_flight)
        metrics.RUNNING.set(self.device_queue.running)
        metrics.WAITING.set(self.device_queue.waiting)
        for vae in self.vaes:
            metrics.FREE_MEMORY.labels(str(vae.device)).set(free_memory(vae.device))
            metrics.TOTAL_MEMORY.labels(str(vae.device)).set(total_memory(vae.device))

    def run_object(self, data: Mapping[str, Any]) -> Any:
        """All stages in a row for a request given as a plain object; see `EndpointHandler.__call__`."""
        parameters = {**_without_nulls(data.get("parameters") or {}), "stream": False}
        request = self._parse_object(data.get("inputs"), parameters)
        work = self.submit(request, self.prepare(request).inputs)
        try:
            result: Any = work.result(self.settings.timeout).value
        finally:
            work.cancel()  # at the deadline; else it is done
        if request.output_kind is OutputKind.IMAGE:
            return output.to_image(result[0])
        if request.output_kind is OutputKind.UINT8 and request.parameters.output_type == "pil":
            return [output.to_image(frame) for frame in result]
        if not request.accept.json and request.output_kind is not OutputKind.MP4:
            return result
        content = self.render(request, result)
        return output.to_json(content) if request.accept.json else content.body

    def _parse_object(self, inputs: Any, values: Mapping[str, Any]) -> Request:
        accept = Accept(json=isinstance(inputs, str | Image.Image))
        kind: BodyKind | None = "tensor" if "shape" in values else None
        if isinstance(inputs, Tensor):
            shape, dtype = output.describe(inputs)
            kind, values = "tensor", {**values, "shape": shape, "dtype": dtype}
        elif isinstance(inputs, Image.Image):
            kind = "image"
        elif not isinstance(inputs, bytes | bytearray):
            inputs = payload.read_base64(inputs)
        request = self._request(inputs, kind or payload.sniff(inputs), Parameters.parse(values), accept, task=None)
        if request.output_kind is OutputKind.PIXELS:  # a video's frames, which are given as PIL images
            request = replace(request, output_kind=OutputKind.UINT8)
        return request
