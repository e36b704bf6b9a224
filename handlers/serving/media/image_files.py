"""The structure of PNG, JPEG and WebP files, read before any pixel is decoded.

Pillow reads a file's segments in Python loops, a byte or a chunk at a time, and takes memory for text, profiles and
EXIF that say nothing about pixels. So it gets a file that was put together here, of what its pixels need alone. The
walks below are short: each counts its steps, whatever the file says.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops

from handlers.serving.errors import RequestError
from handlers.serving.media.request import Body

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"

JPEG_SCANS = 100
"""Scans of a progressive JPEG, each of which takes a pass over the image; encoders write about ten."""
JPEG_SCANNED_PIXELS = 1_500_000_000
"""Pixels of all scans together, each of which is a hundredth of a microsecond even where a scan is empty."""
JPEG_SEGMENTS = 2000
"""Segments of a JPEG; a large profile or a depth map takes a few hundred."""
JPEG_TABLES = 1_000_000
"""Bytes before the first scan that a decoder needs; the tables of an ordinary file are a thousand."""

ORIENTATION = 0x0112
"""EXIF's tag for it."""
EXIF_INTEGERS = {1: "B", 3: "H", 4: "I"}
"""EXIF's types of integers, and their codes in `struct`."""
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
MAX_TEXT = 1_000_000
"""Bytes of text in which an orientation is looked for; it may be compressed."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF's orientation, how an image is turned upright."""


@dataclass(frozen=True)
class ImageFile:
    """A file's format, and what its structure says of its image."""

    body: Body
    format: str
    stored_size: tuple[int, int]
    """Width and height before the image is turned upright."""
    orientation: int = 1
    """EXIF's, from 1 to 8."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        width, height = self.stored_size
        return (height, width) if self.orientation >= 5 else (width, height)

    @property
    def peak(self) -> int:
        """Bytes that decoding, turning and resizing take at their peak, as they were measured, with a margin."""
        per_pixel, per_byte = {"PNG": (17, 1.2), "JPEG": (17, 1.2), "WEBP": (22, 3)}[self.format]
        width, height = self.stored_size
        return int(width * height * per_pixel + len(self.body) * per_byte) + 1_000_000

    def decode(self) -> Image.Image:
        """The upright image, in the mode of the file.

        Raises:
            Exception: a dozen types, for broken files; `RequestError` among them.
        """
        read = {"PNG": _open_png, "JPEG": _open_jpeg, "WEBP": _open_webp}[self.format]
        image = read(self.body)
        if image.size != self.stored_size:
            raise ValueError("its headers do not agree on its size")
        image.load()
        if self.format == "WEBP":
            image = image.copy()  # without the decoder, which holds three more
        return image.transpose(TURNS[self.orientation]) if self.orientation in TURNS else image


def inspect(body: Body) -> ImageFile:
    """Read the structure of a PNG, JPEG or WebP file, but no pixel.

    Raises:
        RequestError: it is none of these or has no image (400), or it is made of too many parts (422).
    """
    try:
        if body.startswith(PNG):
            return _inspect_png(body)
        if body.startswith(JPEG):
            return _inspect_jpeg(body)
        if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
            return _inspect_webp(body)
    except (struct.error, IndexError):
        pass  # a header that is cut off
    raise RequestError("the image cannot be read; send a PNG, JPEG or WebP file")


# PNG: a signature, then chunks, each with its length, kind, data and checksum


class Chunk(NamedTuple):
    """A part of a PNG or WebP file; its data is `body[start:stop]`."""

    kind: bytes
    start: int
    stop: int


def _png_chunks(body: Body) -> Iterator[Chunk]:
    """Chunks up to the end of the image; the last one may be cut off."""
    position = len(PNG)
    for _ in range(_most_chunks(body)):
        if position + 8 > len(body):
            return
        length, kind = struct.unpack_from(">I4s", body, position)
        yield Chunk(kind, position + 8, min(position + 8 + length, len(body)))
        if kind == b"IEND":
            return
        position += 12 + length
    raise RequestError(f"the PNG file has more than {_most_chunks(body)} chunks; save it anew", 422)


def _most_chunks(body: Body) -> int:
    """Chunks that a file of this size may have: one for each KB, and 10,000 for small ones."""
    return 10_000 + len(body) // 1024


def _inspect_png(body: Body) -> ImageFile:
    size, exif, texts = None, b"", {}
    for kind, start, stop in _png_chunks(body):
        if size is None:
            if kind != b"IHDR":
                break  # readers disagree on what chunks before the header mean
            size = struct.unpack_from(">II", body, start)
        elif kind == b"eXIf":
            exif = _text(body, start, stop)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            for keyword in (b"Raw profile type exif", b"XML:com.adobe.xmp"):
                if body.startswith(keyword + b"\0", start, stop):
                    texts[keyword] = kind, start + len(keyword) + 1, stop
    if size is None:
        raise struct.error
    read = {keyword: _png_text(body, *place) for keyword, place in texts.items()}
    if not exif and (profile := read.get(b"Raw profile type exif")):
        lines = profile.split(b"\n")[3:]  # after an empty line, the profile's name and its length
        exif = _unhex(b"".join(lines))
    return ImageFile(body, "PNG", size, _orientation(exif, read.get(b"XML:com.adobe.xmp", b"")))


def _png_text(body: Body, kind: bytes, start: int, stop: int) -> bytes:
    """The text of a chunk after its keyword, or its beginning; none where it cannot be read."""
    data = _text(body, start, stop)
    compressed = kind == b"zTXt"
    if compressed:
        data = data[1:]  # after the method
    elif kind == b"iTXt":  # a flag, a method, a language and a translated keyword
        compressed = data[:1] == b"\1"
        data = b"".join(data[2:].split(b"\0", 2)[2:])
    if not compressed:
        return data
    try:
        return zlib.decompressobj().decompress(data, MAX_TEXT)
    except zlib.error:
        return b""


def _open_png(body: Body) -> Image.Image:
    """The image of a PNG, its transparent color among what Pillow knows of it."""
    header, color = b"", b""
    for kind, start, stop in _png_chunks(body):
        if kind == b"IDAT":
            break
        if kind == b"IHDR" and not header:
            header = bytes(body[start:stop])
        elif kind == b"tRNS":
            color = bytes(body[start:stop])
    file = _pixels_of_png(body)
    image = Image.open(file, formats=("PNG",))
    depth, color_type = header[8], header[9]
    if color_type == 0 and len(color) >= 2:
        most = 2**depth - 1
        value = int.from_bytes(color[:2]) & most
        image.info["transparency"] = value if depth == 16 else value * (255 // most)  # as Pillow scales the pixels
    elif color_type == 2 and len(color) >= 6:
        red, green, blue = struct.unpack_from(">HHH", color)
        if depth == 16:
            return _with_transparent_color(image, file, (red, green, blue))
        image.info["transparency"] = red & 255, green & 255, blue & 255
    return image


def _with_transparent_color(image: Image.Image, file: io.BytesIO, color: tuple[int, int, int]) -> Image.Image:
    """An image of 16 bits a color, of which Pillow keeps the high bytes, with the pixels of this color transparent.

    Pillow reads the low bytes where it is told that the others come first.
    """
    low_bytes = Image.open(io.BytesIO(file.getvalue()), formats=("PNG",))
    low_bytes.tile = [low_bytes.tile[0]._replace(args="RGB;16L")]
    same = Image.new("L", image.size, 255)
    for pixels, shift in ((low_bytes, 0), (image, 8)):
        bytes_of_color = [value >> shift & 255 for value in color]
        table = [255 * (value == byte) for byte in bytes_of_color for value in range(256)]
        for band in pixels.point(table).split():
            same = ImageChops.multiply(same, band)
    image.info.pop("transparency", None)
    image.putalpha(ImageChops.invert(same))
    return image


def _pixels_of_png(body: Body) -> io.BytesIO:
    """The file without what is no pixels, and with its image data in one chunk."""
    view, file = memoryview(body), io.BytesIO()
    file.write(PNG)
    begin, checksum = 0, zlib.crc32(b"IDAT")
    for kind, start, stop in _png_chunks(body):
        if kind == b"IDAT":
            if not begin:
                begin = file.tell()
                file.write(b"\0\0\0\0IDAT")
            file.write(view[start:stop])
            checksum = zlib.crc32(view[start:stop], checksum)
        elif begin:
            break  # image data after other chunks does not belong to the image
        elif kind in (b"IHDR", b"PLTE", b"tRNS"):
            file.write(view[start - 8 : stop + 4])
    length = file.tell() - begin - 8
    file.write(struct.pack(">I", checksum) + b"\0\0\0\0IEND\xaeB`\x82")
    file.seek(begin)
    file.write(struct.pack(">I", length) if begin else PNG[:4])
    file.seek(0)
    return file


# JPEG: markers, most of which begin a segment with its length; after a scan's segment, its data up to the next marker


IS_MARKER = np.ones(256, bool)
"""Of the byte after 0xFF: not within data (0x00, 0xFF), and not without a segment (0x01, and restarts)."""
IS_MARKER[[0x00, 0x01, *range(0xD0, 0xD8), 0xFF]] = False

SOI, EOI, SOS, APP0, APP1, APP14, APP15, COM = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
"""Markers of the segment that has the image's size, by the way of coding."""


class Segment(NamedTuple):
    """A marker of a JPEG file, and the segment after it: `body[start:stop]`, its length included."""

    marker: int
    start: int
    stop: int


def _jpeg_segments(body: Body) -> Iterator[Segment]:
    """Segments up to the end of the first image; what stands between them, and what follows, is skipped."""
    data, position = np.frombuffer(body, np.uint8), 2
    for _ in range(JPEG_SEGMENTS):
        found = _next_marker(data, position)
        if found is None:
            return
        marker, start = int(data[found]), found + 1
        stop = start if marker == EOI else min(start + struct.unpack_from(">H", body, start)[0], len(body))
        yield Segment(marker, start, stop)
        if marker == EOI:
            return
        position = max(stop, start + 2)
    raise RequestError(f"the JPEG file has more than {JPEG_SEGMENTS} segments; save it anew", 422)


def _next_marker(data: np.ndarray, position: int) -> int | None:
    """Where the byte of the next marker after 0xFF is."""
    step = 64
    while position + 1 < len(data):
        part = data[position : position + step + 1]
        if len(hits := np.flatnonzero((part[:-1] == 0xFF) & IS_MARKER[part[1:]])):
            return position + int(hits[0]) + 1
        position, step = position + step, min(8 * step, 2**18)
    return None


def _inspect_jpeg(body: Body) -> ImageFile:
    size, scans, tables, exif, xmp = None, 0, 0, b"", b""
    for marker, start, stop in _jpeg_segments(body):
        if marker in FRAMES and size is None:
            height, width = struct.unpack_from(">HH", body, start + 3)
            size = width, height
        elif marker == SOS:
            scans += 1
        elif marker == APP1 and not exif and body.startswith(b"Exif\0\0", start + 2):
            exif = bytes(body[start + 2 : stop])
        elif marker == APP1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0", start + 2):
            xmp = bytes(body[start + 2 : stop])
        if not scans and _is_needed(marker):
            tables += stop - start
    if size is None:
        raise struct.error
    if scans > JPEG_SCANS or scans * size[0] * size[1] > max(JPEG_SCANNED_PIXELS, size[0] * size[1]):
        most = max(1, min(JPEG_SCANS, JPEG_SCANNED_PIXELS // max(1, size[0] * size[1])))
        raise RequestError(f"the JPEG file has more than {most} scans; save it anew", 422)
    if tables > JPEG_TABLES:
        raise RequestError(f"the JPEG file has more than {JPEG_TABLES} bytes of tables; save it anew", 422)
    return ImageFile(body, "JPEG", size, _orientation(exif, xmp))


def _is_needed(marker: int) -> bool:
    """Whether a decoder needs a segment: tables, and of the applications' the two that tell how colors are coded."""
    return not (APP0 < marker <= APP15 or marker == COM) or marker == APP14


def _open_jpeg(body: Body) -> Image.Image:
    """The image of a JPEG, of whose file what is no part of it is left out."""
    view, file = memoryview(body), io.BytesIO()
    file.write(JPEG[:2])
    first_scan, end = 0, len(body)
    for marker, start, stop in _jpeg_segments(body):
        if marker == EOI:
            end = stop
        elif marker == SOS:
            first_scan = first_scan or start - 2
        elif not first_scan and _is_needed(marker):
            file.write(view[start - 2 : stop])
    if first_scan:
        file.write(view[first_scan:end])
    file.seek(0)
    return Image.open(file, formats=("JPEG",))


# WebP: a RIFF file, whose chunks each have a kind, a length and data; every image of an animation is one of them


def _webp_chunks(body: Body) -> Iterator[Chunk]:
    position = 12
    for _ in range(_most_chunks(body)):
        if position + 8 > len(body):
            return
        kind, length = struct.unpack_from("<4sI", body, position)
        yield Chunk(kind, position + 8, min(position + 8 + length, len(body)))
        position += 8 + length + length % 2
    raise RequestError(f"the WebP file has more than {_most_chunks(body)} chunks; save it anew", 422)


def _inspect_webp(body: Body) -> ImageFile:
    size, exif, xmp = None, b"", b""
    for kind, start, stop in _webp_chunks(body):
        size = size or _webp_size(body, kind, start)
        if kind == b"EXIF":
            exif = exif or _text(body, start, stop)
        elif kind == b"XMP ":
            xmp = xmp or _text(body, start, stop)
    if size is None:
        raise struct.error
    return ImageFile(body, "WEBP", size, _orientation(exif, xmp))


def _webp_size(body: Body, kind: bytes, start: int) -> tuple[int, int] | None:
    """Width and height by the first chunk, which is of one of three kinds."""
    if kind == b"VP8X":
        sides = struct.unpack_from("<4x3s3s", body, start)
        width, height = (1 + int.from_bytes(side, "little") for side in sides)
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<xI", body, start)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<6xHH", body, start))
    else:
        return None
    return width, height


def _open_webp(body: Body) -> Image.Image:
    """The first image of a WebP file, whose decoder takes memory for the canvas and each chunk when it is opened."""
    view, chunks = memoryview(body), bytearray()
    for kind, start, stop in _webp_chunks(body):
        chunk = bytearray(view[start - 8 : stop])
        if kind == b"VP8X":
            chunk[8] &= 0b10010  # an animation, transparency: all else that it announces is left out
        if kind in (b"VP8X", b"ANIM", b"ALPH", b"VP8 ", b"VP8L", b"ANMF"):
            chunks += chunk + bytes(len(chunk) % 2)
        if kind in (b"VP8 ", b"VP8L", b"ANMF"):
            break
    return Image.open(io.BytesIO(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks), formats=("WEBP",))


# Which way up: EXIF says it, or else XMP


def _text(body: Body, start: int, stop: int) -> bytes:
    """A chunk's data, or the beginning of more than anybody writes."""
    return bytes(body[start : min(stop, start + MAX_TEXT)])


def _unhex(text: bytes) -> bytes:
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        return b""


def _orientation(exif: bytes, xmp: bytes) -> int:
    """EXIF's number for it, from 1 to 8. Metadata that cannot be read turns nothing."""
    found = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
    if found is None and (match := XMP_ORIENTATION.search(xmp)):
        found = int(match[1])
    return found if found in TURNS else 1


def _exif_orientation(tiff: bytes) -> int | None:
    """What the first directory of a TIFF file says. The directory alone is read, and so once."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return None
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    count = int.from_bytes(tiff[start : start + 2], "little" if order == "<" else "big")
    entries = tiff[start + 2 : start + 2 + 12 * count]
    found = None
    for tag, kind, number, value in struct.iter_unpack(order + "HHI4s", entries[: len(entries) // 12 * 12]):
        if tag == ORIENTATION and kind in EXIF_INTEGERS and number == 1:
            (found,) = struct.unpack_from(order + EXIF_INTEGERS[kind], value)
    return found
