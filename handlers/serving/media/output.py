"""Encoding of responses: images, videos and raw tensors."""

from __future__ import annotations

import base64
import io
import json
import logging
import struct
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from fractions import Fraction
from queue import SimpleQueue
from threading import Thread
from typing import Any

import av
import numpy as np
from isal import isal_zlib
from PIL import Image
from torch import Tensor, uint8

from handlers.serving.errors import RequestError
from handlers.serving.media.payload import lay_on
from handlers.serving.media.request import OutputKind
from handlers.serving.media.stream import Stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """Body and headers of a response."""

    body: bytes
    media_type: str
    headers: dict[str, str] = field(default_factory=dict)


MAX_SIDE = {"jpg": 65500, "webp": 16383, "png": 65535, "mp4": 16384}
"""Largest height and width in pixels of a file that the encoder writes and readers open."""


def check_size(output_kind: OutputKind, image_format: str, width: int, height: int) -> None:
    """Raise `RequestError`, status 422, when the file format does not allow this size."""
    name = {OutputKind.IMAGE: image_format, OutputKind.IMAGES: image_format, OutputKind.MP4: "mp4"}.get(output_kind)
    if name and max(width, height) > MAX_SIDE[name]:
        raise RequestError(
            f"`shape`: {width}x{height} pixels are too large for a {name} file ({MAX_SIDE[name]} per side); "
            "use output_type=pt with partial_postprocess=True",
            422,
        )


def render(
    value: Tensor | Mp4Writer, output_kind: OutputKind, image_format: str, quality: int, background: str | None = None
) -> Content:
    """Encode the output tensor, on the CPU, or finish the video. Lay images with transparency on `background`."""
    if isinstance(value, Mp4Writer):
        return Content(value.finish(), "video/mp4")
    if output_kind is OutputKind.IMAGE:
        return write_image(to_image(value[0], background), image_format, quality)
    if output_kind is OutputKind.IMAGES:
        files = [write_image(to_image(pixels, background), image_format, quality) for pixels in value]
        return write_zip(files, image_format)
    shape, dtype = describe(value)
    return Content(tensor_bytes(value), "tensor/binary", {"shape": json.dumps(shape), "dtype": dtype})


def to_json(content: Content) -> str | dict[str, Any]:
    """Convert to JSON: a file to base64 text, a tensor to `{"inputs": <base64>, "parameters": {"shape", "dtype"}}`.

    The serializer of the Inference Toolkit sends images in the same form.
    """
    text = base64.b64encode(content.body).decode()
    if "shape" not in content.headers:
        return text
    parameters = {"shape": json.loads(content.headers["shape"]), "dtype": content.headers["dtype"]}
    return {"inputs": text, "parameters": parameters}


def describe(tensor: Tensor) -> tuple[list[int], str]:
    """Return the shape and the name of the dtype."""
    return list(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return C-contiguous little-endian bytes. numpy has no bfloat16, so it gets a view of bytes."""
    return tensor.contiguous().reshape(-1).view(uint8).numpy().tobytes()


def to_image(pixels: Tensor, background: str | None = None) -> Image.Image:
    """Convert uint8 pixels [H, W, 3 or 4] to a PIL image. Lay one with transparency on `background`, if it is named."""
    image = Image.fromarray(pixels.numpy())
    return lay_on(image, background) if background and image.mode == "RGBA" else image


def write_image(image: Image.Image, image_format: str, quality: int) -> Content:
    """Encode an image file. JPEG keeps the full resolution of colors (4:4:4)."""
    if image_format == "png":
        return Content(write_png(np.asarray(image)), "image/png")
    name, options = {
        "jpg": ("jpeg", {"quality": quality, "subsampling": 0}),
        "webp": ("webp", {"quality": quality}),
    }[image_format]
    buffer = io.BytesIO()
    image.save(buffer, format=name, **options)
    return Content(buffer.getvalue(), f"image/{name}")


def write_zip(images: list[Content], image_format: str) -> Content:
    """Pack files as `0.png`, `1.png`, ... in order. They are stored without further compression."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for index, image in enumerate(images):
            archive.writestr(f"{index}.{image_format}", image.body)
    return Content(buffer.getvalue(), "application/zip")


def write_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels [H, W, 3 or 4] as PNG, with the filter "up" and ISA-L's deflate.

    A photograph takes a quarter of the time of FFmpeg's fastest setting and an eighth of Pillow's at zlib level 1, for
    the same size (benchmarks/NOTES.md).
    """
    height, width, channels = pixels.shape
    flat = pixels.reshape(height, -1)
    rows = np.empty((height, 1 + width * channels), np.uint8)
    rows[:, 0] = 2  # the filter "up"
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    color = {3: 2, 4: 6}[channels]  # RGB, RGBA
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)  # 8 bits per channel
    chunks = ((b"IHDR", header), (b"IDAT", isal_zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, data) for kind, data in chunks)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = isal_zlib.crc32(data, isal_zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


class Mp4Writer:
    """Encoder of an MP4 file on a thread, which works while later frames are still decoded.

    Add frames in a `with` block, then call `finish` for the file. If the block fails, the file is dropped. The thread
    ends in both cases, even if nobody calls `finish`.

    With a `stream` the file goes there, and `finish` returns no bytes. A slow reader delays only the encoder's thread;
    frames wait in the queue.
    """

    def __init__(self, fps: float, stream: Stream | None = None) -> None:
        self._frames: SimpleQueue[np.ndarray | None] = SimpleQueue()
        self._file: Future[bytes] = Future()
        self._is_cancelled = False
        self._stream = stream
        Thread(target=self._run, args=(fps,), name="mp4", daemon=True).start()

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        self._is_cancelled = kind is not None
        if self._stream and error:
            self._stream.fail(error)
        self._frames.put(None)

    def add(self, frames: np.ndarray) -> None:
        """Queue the next frames, uint8 [F, H, W, 3], without waiting for the encoder.

        Raises:
            RequestError: the encoder failed on earlier frames, or nobody reads the stream.
        """
        if self._stream:
            self._stream.check()
        if self._file.done():
            self.finish()
        self._frames.put(frames)

    def finish(self) -> bytes:
        """Wait until all frames are encoded and return the file.

        Raises:
            RequestError: the encoder failed; status 500.
        """
        return self._file.result()

    def _run(self, fps: float) -> None:
        try:
            if self._stream:
                stream_mp4(self._queued(), fps, self._stream)
                self._file.set_result(b"")
            else:
                self._file.set_result(write_mp4(self._queued(), fps))
        except BaseException as error:  # `finish` raises it
            self._file.set_exception(error)
            if self._stream:
                self._stream.fail(error)

    def _queued(self) -> Iterator[np.ndarray]:
        while (frames := self._frames.get()) is not None:
            for frame in frames:
                if self._is_cancelled:
                    return
                yield frame


def write_mp4(frames: Iterable[np.ndarray], fps: float) -> bytes:
    """Encode uint8 frames [H, W, 3] as H.264 in yuv420p, BT.709, which every browser plays.

    yuv420p halves the resolution of colors, so height and width must be even. Every VAE here gives multiples of 8.

    Raises:
        RequestError: the encoder failed; status 500.
    """
    buffer = io.BytesIO()
    _encode(frames, fps, buffer, {})
    return buffer.getvalue()


FRAGMENTED = {
    # a fragment per frame; the header waits for the first frame, because it contains the start time
    "movflags": "frag_every_frame+empty_moov+delay_moov+default_base_moof",
    "flush_packets": "1",
}
"""Options of FFmpeg's muxer for a file that plays from its first bytes on. A complete file ends with a box `mfra`."""


def stream_mp4(frames: Iterable[np.ndarray], fps: float, stream: Stream) -> None:
    """Encode the frames like `write_mp4` and write them to the stream, as a fragmented MP4.

    The encoder looks 10 frames ahead, so the first bytes come after 11 frames, or after the last one.

    Raises:
        RequestError: the encoder failed; status 500.
        Exception: the error of a stream that failed.
    """
    _encode(frames, fps, stream, FRAGMENTED)
    stream.end()


def _encode(frames: Iterable[np.ndarray], fps: float, file: Any, options: dict[str, str]) -> None:
    stream = None
    try:
        with av.open(file, mode="w", format="mp4", options=options) as container:
            for pixels in frames:
                height, width = pixels.shape[:2]
                stream = stream or _add_stream(container, height, width, fps)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
            if stream:
                container.mux(stream.encode(None))
    except av.FFmpegError:
        logger.exception("the MP4 encoder failed")
        message = "the MP4 encoder failed; the log has the reason; output_type=pt returns the frames"
        raise RequestError(message, 500) from None


def _add_stream(container: av.container.OutputContainer, height: int, width: int, fps: float) -> av.VideoStream:
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.height, stream.width = height, width
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": "17", "preset": "veryfast"}
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = BT709
    context.color_range = av.video.reformatter.ColorRange.MPEG
    return stream


BT709 = 1
"""Code point of the matrix, the primaries and the transfer function in ITU-T H.273."""
