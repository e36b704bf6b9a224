"""Bytes as they came to what they hold: a tensor or an image. The frames of a video are read in mp4.py."""

from __future__ import annotations

import binascii
import json
import math
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits
from handlers.serving.media.image_files import JPEG, PNG, ImageFile, inspect
from handlers.serving.media.request import Body, BodyKind

Image.MAX_IMAGE_PIXELS = None  # `Limits` has its own limit, and it is one for the whole request

IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1")
"""Of files that have an MP4's structure and hold a still picture."""

DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}

NAME_LENGTH = 200
"""Bytes of a body that may be the name of a file, sent in place of the file."""

JSON_VALUES = 10_000
"""Lists, objects and their elements in a JSON body, which take 25 times their size; parameters are a few dozen."""

FORM_PARTS = 1000
"""Files and fields of a form; how many pictures make a batch is one of `Limits`."""

FORM_FIELD = 10_000
"""Bytes of a field of a form that is no file, and so a parameter."""


def sniff(body: Body) -> BodyKind:
    """What a body without a shape holds, from its first bytes. Raises `RequestError` when they are no known file's."""
    if body.startswith((PNG, JPEG)) or (body[:4] == b"RIFF" and body[8:12] == b"WEBP"):
        return "image"
    if body[4:8] == b"ftyp" and body[8:12] not in IMAGE_BRANDS:
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


def json_peak(body: Body) -> int:
    """Bytes that reading a JSON body takes at its peak: two copies, in which a character may be 4 bytes long."""
    is_ascii = body.isascii() and b"\\u" not in body
    return len(body) * (2 if is_ascii else 8)


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
            if len(part) > FORM_FIELD:
                raise RequestError(
                    f"a field of the form is longer than {FORM_FIELD} bytes; send a file with a filename"
                )
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
        return binascii.a2b_base64(text, strict_mode=True)  # `base64` would copy the text first
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


def inspect_image(body: Body, limits: Limits, batch: int = 1) -> ImageFile:
    """Read the structure of a PNG, JPEG or WebP file, of which a small one may hold a huge image, but no pixel.

    It is one of a batch of so many, all of one size.

    Raises:
        RequestError: the file has no image (400), more pixels than the limit (413), or too many parts (422).
    """
    file = inspect(body)
    limits.check_image(*file.size, batch=batch)
    return file


def decode_image(file: ImageFile) -> Image.Image:
    """The upright image of a file, in the mode of the file. Raises `RequestError` where it is broken."""
    try:
        return file.decode()
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError("the image cannot be read; send a PNG, JPEG or WebP file") from None
    except Exception as error:  # Pillow's decoders raise a dozen types for broken files
        raise RequestError(f"the image cannot be read ({error}); send a PNG, JPEG or WebP file") from None


def read_image(body: Body, limits: Limits, batch: int = 1) -> Image.Image:
    """The upright image of a PNG, JPEG or WebP file, in the mode of the file."""
    return decode_image(inspect_image(body, limits, batch))


def upright_rgb(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it: its EXIF orientation applied, its transparency flattened on white."""
    with suppress(Exception):  # EXIF that cannot be read, for which Pillow raises a dozen types too, turns nothing
        image = ImageOps.exif_transpose(image)
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image with its transparency flattened on white, and 16 bits a pixel rounded to 8."""
    if image.mode.startswith("I"):  # which Pillow would clip to 8 bits
        gray = np.asarray(image, np.int64)
        levels = ((gray + 128) // 257).clip(0, 255).astype(np.uint8)
        levels[gray == image.info.get("transparency", -1)] = 255
        return Image.fromarray(levels).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
