"""Bytes as they came to what they hold: a tensor, an image, or the frames of a video."""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from contextlib import suppress
from typing import Any

import av
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits
from handlers.serving.request import BodyKind

Body = bytes | bytearray

Image.MAX_IMAGE_PIXELS = None  # `Limits` has its own limit, and it is one for the whole request

PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1")
"""Of files that have an MP4's structure and hold a still picture."""

DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}

NAME_LENGTH = 200
"""Bytes of a body that may be the name of a file, sent in place of the file."""

JPEG = b"\xff\xd8\xff"
JPEG_SCANS = 100
"""Of a progressive JPEG, each of which takes a pass over the picture; encoders write about ten."""

JSON_VALUES = 10_000
"""Lists, objects and their elements in a JSON body, which take 25 times their size; parameters are a few dozen."""

FORM_PARTS = 1000
"""Files and fields of a form; how many pictures make a batch is one of `Limits`."""

MP4_BOXES = 10_000
"""Beside each other in an MP4 file; one in fragments has two for each."""

VIDEO_CODECS = ("h264", "hevc", "av1", "vp9", "mpeg4")
"""Of MP4 files, as FFmpeg calls them; what it could read beside these is old, rare and less often tested."""


def sniff(body: Body) -> BodyKind:
    """What a body without a shape holds, from its first bytes. Raises `RequestError` when they are no known file's."""
    if body.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (body[:4] == b"RIFF" and body[8:12] == b"WEBP"):
        return "image"
    if body[4:8] == b"ftyp" and body[8:12] not in PICTURE_BRANDS:
        return "video"
    seen = ""
    if not body:
        seen = ", it is empty"
    elif len(body) <= NAME_LENGTH and body.isascii() and (name := body.decode()).isprintable():
        seen = f", it is the text {name!r} (curl sends the content of a file with `--data-binary @FILE`)"
    raise RequestError(
        f"`shape` is missing, and the body is no PNG, JPEG, WebP or MP4 file{seen}; a tensor needs its shape and dtype "
        "as parameters, e.g. ?shape=1,4,64,64&dtype=float16"
    )


def lost_bytes(body: Body, content_type: str) -> bool:
    """Return whether a file was sent with curl's -d, which drops every line break and zero byte in it."""
    sent_by_curl = content_type == "application/x-www-form-urlencoded"
    return sent_by_curl and len(body) > NAME_LENGTH and not any(byte in body for byte in b"\n\r\0")


def read_json(body: Body) -> tuple[bytes, dict[str, Any]]:
    """The decoded `inputs` and the `parameters` of `{"inputs": <base64>, "parameters": {...}}`."""
    try:
        if sum(map(body.count, (b"[", b"{", b","))) > JSON_VALUES:  # none of these is in base64
            raise ValueError(f"more than {JSON_VALUES} values")
        message = json.loads(body)
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8 included
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(message, dict) or "inputs" not in message:
        raise RequestError('the body must be a JSON object with base64 text under `inputs`: {"inputs": "..."}')
    parameters = message.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RequestError(f"`parameters` must be a JSON object, got {type(parameters).__name__}")
    return read_base64(message["inputs"]), parameters


def read_form(body: Body, content_type: str) -> tuple[list[Body], dict[str, Any]]:
    """The files of a `multipart/form-data` body in their order, and its other fields, which are parameters."""
    files: list[Body] = []
    values: dict[str, Any] = {}
    headers: dict[str, str] = {}
    name, part, parts = bytearray(), bytearray(), 0

    def end_header() -> None:
        headers[name.decode("latin-1").lower()] = part.decode("latin-1")
        name.clear()
        part.clear()

    def end_part() -> None:
        nonlocal part, parts
        parts += 1
        disposition, options = parse_options_header(headers.get("content-disposition", ""))
        field = options.get(b"name", b"").decode("utf-8", "replace")
        if disposition != b"form-data" or not (field or b"filename" in options):
            raise RequestError("a part of the form has no `Content-Disposition: form-data` with a name")
        if b"filename" in options:
            files.append(part)
        else:
            values.setdefault(field, []).append(part.decode("utf-8", "replace"))
        if parts > FORM_PARTS:
            raise RequestError(f"the form has more than {FORM_PARTS} parts", 413)
        headers.clear()
        part = bytearray()

    _, options = parse_options_header(content_type)
    try:
        parser = MultipartParser(
            options.get(b"boundary", b""),
            {
                "on_header_field": lambda data, start, end: name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: part.extend(data[start:end]),
                "on_header_end": end_header,
                "on_part_data": lambda data, start, end: part.extend(data[start:end]),
                "on_part_end": end_part,
            },
        )
        parser.write(body)  # type: ignore[arg-type]  # it takes a bytearray too
        parser.finalize()
    except FormParserError as error:
        raise RequestError(f"the body is no multipart/form-data: {error}") from None
    if not files:
        raise RequestError("the form holds no file: send one as `curl -F file=@picture.png` does, with a filename")
    return files, {field: value if field == "shape" else value[-1] for field, value in values.items()}


def read_base64(text: Any) -> bytes:
    if not isinstance(text, str):
        raise RequestError(f"`inputs` must be base64 text, got {type(text).__name__}")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"`inputs` is not base64: {error}") from None


def read_tensor(body: Body, shape: tuple[int, ...] | None, dtype: str | None) -> torch.Tensor:
    """Raw C-contiguous little-endian bytes to a tensor of `shape` and `dtype` on the CPU."""
    if shape is None:
        raise RequestError("`shape` is missing: repeat it for each dimension, e.g. shape=1&shape=4&shape=64&shape=64")
    if dtype is None:
        raise RequestError(f"`dtype` is missing: one of {', '.join(DTYPES)}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if len(body) != expected:
        raise RequestError(f"`shape` {list(shape)} of {dtype} is {expected} bytes, but {len(body)} came")
    writable = body if isinstance(body, bytearray) else bytearray(body)  # torch warns of memory that it may not write
    return torch.frombuffer(writable, dtype=DTYPES[dtype]).reshape(shape)


def read_image(body: Body, limits: Limits, batch: int = 1) -> Image.Image:
    """A PNG, JPEG or WebP file, of which a small one may hold a huge picture: its header is looked at first.

    It is one of a batch of so many, all of one size.
    """
    if body.startswith(JPEG) and body.count(b"\xff\xda") > JPEG_SCANS:
        raise RequestError(f"the JPEG file has more than {JPEG_SCANS} scans; save it anew", 422)
    if body[8:12] == b"WEBP":  # for which Pillow takes memory as soon as it opens the file
        limits.check_picture(*_webp_size(body), batch=batch)
    try:
        image = Image.open(io.BytesIO(body), formats=("PNG", "JPEG", "WEBP"))
        limits.check_picture(*image.size, batch=batch)
        image.load()
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError("the image cannot be read; send a PNG, JPEG or WebP file") from None
    except Exception as error:  # Pillow's decoders raise a dozen types for broken files
        raise RequestError(f"the image cannot be read ({error}); send a PNG, JPEG or WebP file") from None
    return image


def _webp_size(body: Body) -> tuple[int, int]:
    """Width and height by the header of the first chunk, which is of one of three kinds."""
    kind, header = body[12:16], body[20:30]
    if kind == b"VP8X":
        return 1 + int.from_bytes(header[4:7], "little"), 1 + int.from_bytes(header[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(header[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(header[6:8], "little") & 0x3FFF, int.from_bytes(header[8:10], "little") & 0x3FFF


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it: its EXIF orientation applied, its transparency flattened on white."""
    with suppress(Exception):  # EXIF that cannot be read, for which Pillow raises a dozen types too, turns nothing
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 8
        image = Image.fromarray(((np.asarray(image, np.int64) + 128) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_video(body: Body, limits: Limits) -> list[Image.Image]:
    """The frames of an MP4 file's first video stream, in the order and the orientation in which they are shown.

    What the header says of their number and size may be wrong, so each frame is counted as it comes.
    """
    frames: list[Image.Image] = []
    try:
        _check_samples(body, 0, len(body), limits)
        options = {"max_streams": "8"}
        # metadata may be in any encoding, and says nothing about the pictures
        with av.open(io.BytesIO(body), "r", format="mp4", metadata_errors="replace", options=options) as container:
            if not container.streams.video:
                raise RequestError("the file holds no video; send an MP4 file with a video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None or stream.codec_context.codec.canonical_name not in VIDEO_CODECS:
                raise RequestError(f"the video's codec is none of {', '.join(VIDEO_CODECS)}; send H.264", 415)
            limits.check_picture(stream.width, stream.height)
            for frame in container.decode(stream):
                limits.check_picture(frame.width, frame.height, len(frames) + 1)
                frames.append(frame.to_image().rotate(_quarter_turns(frame.rotation), expand=True))
                if frames[-1].size != frames[0].size:
                    raise RequestError("the video's frames are not all of one size")
    except (av.FFmpegError, ValueError, MemoryError) as error:
        raise RequestError(f"the video cannot be read ({error}); send an MP4 file with a video stream") from None
    if not frames:
        raise RequestError("the video holds no frames")
    return frames


def _quarter_turns(degrees: float) -> float:
    """A rotation that no camera writes turns nothing."""
    return degrees if degrees % 90 == 0 else 0


def _check_samples(
    body: Body,
    start: int,
    end: int,
    limits: Limits,
    path: tuple[bytes, ...] = (b"moov", b"trak", b"mdia", b"minf", b"stbl"),
) -> None:
    """Refuses tables of more samples than a video and its sound may have: FFmpeg takes memory for each of them.

    They stand in boxes, each in the one before, of `path`.
    """
    for _ in range(MP4_BOXES):
        if start + 8 > end:
            return
        size, kind, header = int.from_bytes(body[start : start + 4]), body[start + 4 : start + 8], 8
        if size == 1:
            size, header = int.from_bytes(body[start + 8 : start + 16]), 16
        stop = min(start + size, end) if size else end
        if stop < start + header:  # FFmpeg will say what is wrong
            return
        if path and kind == path[0]:
            _check_samples(body, start + header, stop, limits, path[1:])
        count = int.from_bytes(body[start + header + 8 : start + header + 12])
        if kind in (b"stsz", b"stz2") and count > max(100 * limits.max_frames, 100_000):
            raise RequestError(f"a track of {count} samples; at most {limits.max_frames} frames (VAE_MAX_FRAMES)", 413)
        start = stop
    raise RequestError(f"the MP4 file has more than {MP4_BOXES} boxes in one place")
