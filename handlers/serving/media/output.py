"""Tensors to the bytes that go back: pictures, videos, raw tensors."""

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
from handlers.serving.media.request import OutputKind
from handlers.serving.media.stream import Stream

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Content:
    """What goes back to the client."""

    body: bytes
    media_type: str
    headers: dict[str, str] = field(default_factory=dict)


MAX_SIDE = {"jpg": 65500, "webp": 16383, "png": 65535, "mp4": 16384}
"""Pixels of width or height that a format, or its encoder, takes."""


def check_size(output_kind: OutputKind, image_format: str, width: int, height: int) -> None:
    """Raises `RequestError` where the answer's file cannot be that large."""
    name = {OutputKind.IMAGE: image_format, OutputKind.IMAGES: image_format, OutputKind.MP4: "mp4"}.get(output_kind)
    if name and max(width, height) > MAX_SIDE[name]:
        raise RequestError(
            f"`shape`: {width}x{height} pixels do not fit in a {name} file, which takes {MAX_SIDE[name]} each way; "
            "use output_type=pt with partial_postprocess=True",
            422,
        )


def render(value: Tensor | Mp4Writer, output_kind: OutputKind, image_format: str, quality: int) -> Content:
    """The answer's tensor, on the CPU, or its video, as bytes."""
    if isinstance(value, Mp4Writer):
        return Content(value.finish(), "video/mp4")
    if output_kind is OutputKind.IMAGE:
        return write_image(to_image(value[0]), image_format, quality)
    if output_kind is OutputKind.IMAGES:
        return write_zip([write_image(to_image(pixels), image_format, quality) for pixels in value], image_format)
    shape, dtype = describe(value)
    return Content(tensor_bytes(value), "tensor/binary", {"shape": json.dumps(shape), "dtype": dtype})


def to_json(content: Content) -> str | dict[str, Any]:
    """The same for JSON: a file as base64 text, a tensor as `{"inputs": <base64>, "parameters": {"shape", "dtype"}}`.

    Like this the toolkit's own serializer sends a picture.
    """
    text = base64.b64encode(content.body).decode()
    if "shape" not in content.headers:
        return text
    parameters = {"shape": json.loads(content.headers["shape"]), "dtype": content.headers["dtype"]}
    return {"inputs": text, "parameters": parameters}


def describe(tensor: Tensor) -> tuple[list[int], str]:
    return list(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def tensor_bytes(tensor: Tensor) -> bytes:
    """C-contiguous little-endian bytes; numpy, which has no bfloat16, sees bytes only."""
    return tensor.contiguous().reshape(-1).view(uint8).numpy().tobytes()


def to_image(pixels: Tensor) -> Image.Image:
    """uint8 [H, W, 3] to a PIL image."""
    return Image.fromarray(pixels.numpy())


def write_image(image: Image.Image, image_format: str, quality: int) -> Content:
    """A picture file; JPEG with its colours at full resolution (4:4:4)."""
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
    """The files as `0.png`, `1.png`, ... in their order; stored as they are, since pictures are compressed already."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for index, image in enumerate(images):
            archive.writestr(f"{index}.{image_format}", image.body)
    return Content(buffer.getvalue(), "application/zip")


def write_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as PNG: each row less the one above, deflated by ISA-L.

    A photograph takes a quarter of FFmpeg's time at its quickest, and an eighth of Pillow's at zlib's level 1, for as
    many bytes (benchmarks/NOTES.md).
    """
    height, width, _ = pixels.shape
    flat = pixels.reshape(height, -1)
    rows = np.empty((height, 1 + width * 3), np.uint8)
    rows[:, 0] = 2  # PNG's number of the filter "up"
    rows[0, 1:] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of red, green and blue each
    chunks = ((b"IHDR", header), (b"IDAT", isal_zlib.compress(rows, 1)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, data) for kind, data in chunks)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = isal_zlib.crc32(data, isal_zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


class Mp4Writer:
    """An MP4 that a thread of its own encodes, from the first frames on, while later ones are still decoded.

    A `with` block adds the frames. Its end is the video's, and `finish` then gives the file. Where the block fails, the
    file is given up. The thread ends in both cases, whether or not anybody asks for the file.

    With a `stream` the file goes there while it is made, and `finish` gives nothing. A reader that is slow then holds
    back this thread, and not who adds frames: they wait here.
    """

    def __init__(self, fps: float, stream: Stream | None = None) -> None:
        self._frames: SimpleQueue[np.ndarray | None] = SimpleQueue()
        self._file: Future[bytes] = Future()
        self._given_up = False
        self._stream = stream
        Thread(target=self._run, args=(fps,), name="mp4", daemon=True).start()

    def __enter__(self) -> Mp4Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        self._given_up = kind is not None
        if self._stream and error:
            self._stream.fail(error)
        self._frames.put(None)

    def add(self, frames: np.ndarray) -> None:
        """Takes the next frames, uint8 [F, H, W, 3]. It does not wait for the encoder.

        Raises:
            RequestError: the encoder has failed with earlier ones, or nobody reads the stream.
        """
        if self._stream:
            self._stream.check()
        if self._file.done():
            self.finish()
        self._frames.put(frames)

    def finish(self) -> bytes:
        """The file, as soon as all its frames are encoded.

        Raises:
            RequestError: the encoder has failed; status 500.
        """
        return self._file.result()

    def _run(self, fps: float) -> None:
        try:
            if self._stream:
                stream_mp4(self._added(), fps, self._stream)
                self._file.set_result(b"")
            else:
                self._file.set_result(write_mp4(self._added(), fps))
        except BaseException as error:  # whatever it is, `finish` raises it
            self._file.set_exception(error)
            if self._stream:
                self._stream.fail(error)

    def _added(self) -> Iterator[np.ndarray]:
        while (frames := self._frames.get()) is not None:
            for frame in frames:
                if self._given_up:
                    return
                yield frame


def write_mp4(frames: Iterable[np.ndarray], fps: float) -> bytes:
    """uint8 frames [H, W, 3] to H.264 in yuv420p, BT.709: what every browser plays.

    yuv420p halves the colour resolution, so height and width must be even; every VAE here gives multiples of 8.

    Raises:
        RequestError: the encoder has failed; status 500.
    """
    buffer = io.BytesIO()
    _encode(frames, fps, buffer, {})
    return buffer.getvalue()


FRAGMENTED = {
    # a box for each frame as it is encoded, behind a header that is written with the first and says where time begins
    "movflags": "frag_every_frame+empty_moov+delay_moov+default_base_moof",
    "flush_packets": "1",
}
"""Of FFmpeg's muxer. Such a file plays from its first bytes on, and ends with a box `mfra` if it is complete."""


def stream_mp4(frames: Iterable[np.ndarray], fps: float, stream: Stream) -> None:
    """The same, written to the stream as it is made: the same frames in a fragmented MP4.

    The encoder looks 10 frames ahead, so that the first bytes come with the frame after them, or with the last one.

    Raises:
        RequestError: the encoder has failed; status 500.
        Exception: what the stream has failed with.
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
        raise RequestError(
            "the MP4 encoder failed; the log says why, and output_type=pt gives the frames", 500
        ) from None


def _add_stream(container: av.container.OutputContainer, height: int, width: int, fps: float) -> av.VideoStream:
    stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
    stream.height, stream.width = height, width
    stream.pix_fmt = "yuv420p"
    stream.options = {"crf": "17", "preset": "veryfast"}
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = av.video.reformatter.ColorRange.MPEG
    return stream


_BT709 = 1  # the code point of its matrix, primaries and transfer function alike, in ITU-T H.273
