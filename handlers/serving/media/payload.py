"""Parsing of request bodies: JSON, forms, tensors and images. mp4.py reads videos."""

from __future__ import annotations

import binascii
import json
import math
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits
from handlers.serving.media.image_files import JPEG, PNG, ImageFile, inspect
from handlers.serving.media.request import Body, BodyKind

Image.MAX_IMAGE_PIXELS = None  # `Limits` bounds the pixels of the whole request

IMAGE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"mif1")
"""Brands of files with the structure of an MP4 that contain a still image."""

DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}

NAME_LENGTH = 200
"""Bytes up to which a body may be a file's name, sent by mistake instead of the file."""

JSON_VALUES = 10_000
"""Values in a JSON body. Each takes 25 times its size in memory; a request needs a few dozen."""

FORM_PARTS = 1000
"""Files and fields of a form. `Limits` bounds the images of a batch."""

FORM_FIELD = 10_000
"""Bytes of a form field that contains a parameter."""


def sniff(body: Body) -> BodyKind:
    """Return the kind of a body without a shape, by its first bytes. Raise `RequestError` for an unknown kind."""
    if body.startswith((PNG, JPEG)) or (body[:4] == b"RIFF" and body[8:12] == b"WEBP"):
        return "image"
    if body[4:8] == b"ftyp" and body[8:12] not in IMAGE_BRANDS:
        return "video"
    hint = ""
    if not body:
        hint = ", it is empty"
    elif len(body) <= NAME_LENGTH and body.isascii() and (name := body.decode()).isprintable():
        hint = f", it is the text {name!r} (curl sends the content of a file with `--data-binary @FILE`)"
    raise RequestError(
        f"`shape` is missing, and the body is no PNG, JPEG, WebP or MP4 file{hint}; a tensor needs its shape and dtype "
        "as parameters, e.g. ?shape=1,4,64,64&dtype=float16"
    )


def lost_bytes(body: Body, content_type: str) -> bool:
    """Return whether curl sent a file with `-d`, which drops every line break and zero byte."""
    sent_by_curl = content_type == "application/x-www-form-urlencoded"
    return sent_by_curl and len(body) > NAME_LENGTH and not any(byte in body for byte in b"\n\r\0")


def read_json(body: Body) -> tuple[bytes, dict[str, Any]]:
    """Return the decoded `inputs` and the `parameters` of `{"inputs": <base64>, "parameters": {...}}`."""
    try:
        if sum(map(body.count, (b"[", b"{", b","))) > JSON_VALUES:  # base64 has none of these
            raise ValueError(f"more than {JSON_VALUES} values")
        message = json.loads(body)
    except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(message, dict) or "inputs" not in message:
        raise RequestError('the body must be a JSON object with base64 text under `inputs`: {"inputs": "..."}')
    parameters = message.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RequestError(f"`parameters` must be a JSON object, got {type(parameters).__name__}")
    sent = {name: value for name, value in parameters.items() if value is not None}  # null counts as not sent
    return read_base64(message["inputs"]), sent


def json_peak(body: Body) -> int:
    """Return the bytes that `read_json` takes at its peak: two copies with up to 4 bytes per character."""
    is_ascii = body.isascii() and b"\\u" not in body
    return len(body) * (2 if is_ascii else 8)


def read_form(body: Body, content_type: str) -> tuple[list[Body], dict[str, Any]]:
    """Return the files of a `multipart/form-data` body, in order, and its other fields as parameters."""
    form = _Form()
    _, options = parse_options_header(content_type)
    try:
        parser = MultipartParser(options.get(b"boundary", b""), form.callbacks)  # type: ignore[arg-type]
        parser.write(body)  # type: ignore[arg-type]  # it takes a bytearray too
        parser.finalize()
    except FormParserError as error:
        raise RequestError(f"the body is no multipart/form-data: {error}") from None
    if not form.files:
        raise RequestError("the form has no file: send one as `curl -F file=@image.png` does, with a filename")
    return form.files, {name: values if name == "shape" else values[-1] for name, values in form.fields.items()}


class _Form:
    """Files and fields of a form, filled by the callbacks of a parser."""

    def __init__(self) -> None:
        self.files: list[Body] = []
        self.fields: dict[str, list[str]] = {}
        self._headers: dict[str, str] = {}
        self._header_name, self._content = bytearray(), bytearray()
        self._count = 0
        self.callbacks = {
            "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._content.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": lambda data, start, end: self._content.extend(data[start:end]),
            "on_part_end": self._end_part,
        }

    def _end_header(self) -> None:
        self._headers[self._header_name.decode("latin-1").lower()] = self._content.decode("latin-1")
        self._header_name.clear()
        self._content.clear()

    def _end_part(self) -> None:
        """Add a finished part of the form. Its content becomes a file without a copy."""
        headers, content = self._headers, self._content
        self._headers, self._content, self._count = {}, bytearray(), self._count + 1
        if self._count > FORM_PARTS:
            raise RequestError(f"the form has more than {FORM_PARTS} parts", 413)
        disposition, options = parse_options_header(headers.get("content-disposition", ""))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if disposition != b"form-data" or not (name or b"filename" in options):
            raise RequestError("a part of the form has no `Content-Disposition: form-data` with a name")
        if b"filename" in options:
            self.files.append(content)
            return
        if len(content) > FORM_FIELD:
            raise RequestError(f"a field of the form is longer than {FORM_FIELD} bytes; send a file with a filename")
        self.fields.setdefault(name, []).append(content.decode("utf-8", "replace"))


def read_base64(text: Any) -> bytes:
    """Decode base64 text. Raise `RequestError` for anything else."""
    if not isinstance(text, str):
        raise RequestError(f"`inputs` must be base64 text, got {type(text).__name__}")
    try:
        return binascii.a2b_base64(text, strict_mode=True)  # the module base64 copies the text first
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"`inputs` is not base64: {error}") from None


def read_tensor(body: Body, shape: tuple[int, ...] | None, dtype: str | None) -> torch.Tensor:
    """Convert C-contiguous little-endian bytes to a tensor of `shape` and `dtype` on the CPU."""
    if shape is None:
        raise RequestError("`shape` is missing: repeat it for each dimension, e.g. shape=1&shape=4&shape=64&shape=64")
    if dtype is None:
        raise RequestError(f"`dtype` is missing: one of {', '.join(DTYPES)}")
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if len(body) != expected:
        raise RequestError(f"`shape` {list(shape)} of {dtype} is {expected} bytes, but the body has {len(body)}")
    writable = body if isinstance(body, bytearray) else bytearray(body)  # torch warns of read-only memory
    return torch.frombuffer(writable, dtype=DTYPES[dtype]).reshape(shape)


def inspect_image(body: Body, limits: Limits, batch: int = 1) -> ImageFile:
    """Read the structure of a PNG, JPEG or WebP file, but no pixel. A small file may contain a huge image.

    Args:
        batch: images in the request, all of one size.

    Raises:
        RequestError: the file has no image (400), more pixels than the limit (413), or too many chunks (422).
    """
    file = inspect(body)
    limits.check_image(*file.size, batch=batch)
    return file


def decode_image(file: ImageFile) -> Image.Image:
    """Decode the upright image of a file, in the mode of the file. Raise `RequestError` for a broken file."""
    try:
        return file.decode()
    except RequestError:
        raise
    except UnidentifiedImageError:
        raise RequestError("the image cannot be read; send a PNG, JPEG or WebP file") from None
    except Exception as error:  # Pillow raises a dozen types for broken files
        raise RequestError(f"the image cannot be read ({error}); send a PNG, JPEG or WebP file") from None


def read_image(body: Body, limits: Limits, batch: int = 1) -> Image.Image:
    """Decode the upright image of a PNG, JPEG or WebP file, in the mode of the file."""
    return decode_image(inspect_image(body, limits, batch))


def to_rgba(image: Image.Image) -> Image.Image:
    """Convert an image to RGBA, with 16 bits per channel rounded to 8. Without transparency it is opaque."""
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    return image if image.mode == "RGBA" else image.convert("RGBA")


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, with transparency flattened on white and 16 bits per channel rounded to 8."""
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.has_transparency_data:
        return lay_on(image, "white")
    return image if image.mode == "RGB" else image.convert("RGB")


def lay_on(image: Image.Image, color: str) -> Image.Image:
    """Lay an image with transparency on a color, and return RGB."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, color), image).convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Convert 16 gray bits to RGBA. Pillow would clip them to 8 bits."""
    gray = np.asarray(image, np.int64)
    levels = Image.fromarray(((gray + 128) // 257).clip(0, 255).astype(np.uint8))
    alpha = np.where(gray == image.info.get("transparency", -1), 0, 255).astype(np.uint8)
    return Image.merge("RGBA", (levels, levels, levels, Image.fromarray(alpha)))
