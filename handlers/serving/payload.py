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

VIDEO_CODECS = ("h264", "hevc", "av1", "vp9", "mpeg4")
"""Of MP4 files, as FFmpeg calls them; what it could read beside these is old, rare and less often tested."""


def sniff(body: Body) -> BodyKind:
    """What a body without a shape holds, from its first bytes. Raises `RequestError` when they are no known file's."""
    if body.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (body[:4] == b"RIFF" and body[8:12] == b"WEBP"):
        return "image"
    if body[4:8] == b"ftyp" and body[8:12] not in PICTURE_BRANDS:
        return "video"
    raise RequestError(
        "`shape` is missing, and the body is no PNG, JPEG, WebP or MP4 file; a tensor needs its shape and dtype as "
        "parameters, e.g. ?shape=1&shape=4&shape=64&shape=64&dtype=float16"
    )


def read_json(body: Body) -> tuple[bytes, dict[str, Any]]:
    """The decoded `inputs` and the `parameters` of `{"inputs": <base64>, "parameters": {...}}`."""
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8 included
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(message, dict) or "inputs" not in message:
        raise RequestError('the body must be a JSON object with base64 text under `inputs`: {"inputs": "..."}')
    parameters = message.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RequestError(f"`parameters` must be a JSON object, got {type(parameters).__name__}")
    return read_base64(message["inputs"]), parameters


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


def read_image(body: Body, limits: Limits) -> Image.Image:
    """A PNG, JPEG or WebP file, of which a small one may hold a huge picture: its header is looked at first."""
    try:
        image = Image.open(io.BytesIO(body), formats=("PNG", "JPEG", "WEBP"))
        limits.check_picture(*image.size)
        image.load()
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError("the image cannot be read; send a PNG, JPEG or WebP file") from None
    except Exception as error:  # Pillow's decoders raise a dozen types for broken files
        raise RequestError(f"the image cannot be read ({error}); send a PNG, JPEG or WebP file") from None
    return image


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
        # metadata may be in any encoding, and says nothing about the pictures
        with av.open(io.BytesIO(body), format="mp4", metadata_errors="replace") as container:
            if not container.streams.video:
                raise RequestError("the file holds no video; send an MP4 file with a video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None or stream.codec_context.codec.canonical_name not in VIDEO_CODECS:
                raise RequestError(f"the video's codec is none of {', '.join(VIDEO_CODECS)}; send H.264", 415)
            limits.check_picture(stream.width, stream.height)
            for frame in container.decode(stream):
                limits.check_picture(frame.width, frame.height, len(frames) + 1)
                frames.append(frame.to_image().rotate(frame.rotation, expand=True))
                if frames[-1].size != frames[0].size:
                    raise RequestError("the video's frames are not all of one size")
    except (av.FFmpegError, ValueError) as error:
        raise RequestError(f"the video cannot be read ({error}); send an MP4 file with a video stream") from None
    if not frames:
        raise RequestError("the video holds no frames")
    return frames
