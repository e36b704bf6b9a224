"""Structure of PNG, JPEG and WebP files, read before any pixel is decoded.

Pillow reads the chunks of a file in slow Python loops, and allocates memory for text, profiles and EXIF. So Pillow gets
a rewritten file with only the chunks that the pixels need. All loops here are bounded, whatever the file says.
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
"""Scans of a progressive JPEG. Each takes a pass over the image; encoders write about ten."""
JPEG_SCANNED_PIXELS = 1_500_000_000
"""Pixels of all scans together. Even an empty scan takes 10 ns per pixel."""
JPEG_SEGMENTS = 2000
"""Segments of a JPEG. A large profile or a depth map takes a few hundred."""
JPEG_TABLES = 1_000_000
"""Bytes before the first scan that a decoder needs. The tables of an ordinary file take a thousand."""

ORIENTATION = 0x0112
"""EXIF tag of the orientation."""
EXIF_INTEGERS = {3: "H", 4: "I"}
"""EXIF's integer types that Pillow reads an orientation of, and their codes in `struct`. The standard has the first."""
WEBP_EXIF, WEBP_XMP = 0b1000, 0b100
"""Flags of a WebP file's first chunk, VP8X."""
PNG_EXIF, PNG_XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"
"""Keywords of PNG text chunks that may contain an orientation."""
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
MAX_TEXT = 1_000_000
"""Bytes of a text, after decompression, that are searched for an orientation."""

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Operations that turn an image upright, by EXIF orientation."""


@dataclass(frozen=True)
class ImageFile:
    """An image file, its format, and the size and orientation from its structure."""

    body: Body
    format: str
    stored_size: tuple[int, int]
    """Width and height before the image is turned upright."""
    orientation: int = 1
    """EXIF orientation, from 1 to 8."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        width, height = self.stored_size
        return (height, width) if self.orientation >= 5 else (width, height)

    @property
    def peak(self) -> int:
        """Bytes that decoding, turning and resizing take at their peak, as measured, with a margin."""
        per_pixel, per_byte = {"PNG": (17, 1.2), "JPEG": (17, 1.2), "WEBP": (22, 3)}[self.format]
        width, height = self.stored_size
        return int(width * height * per_pixel + len(self.body) * per_byte) + 1_000_000

    def decode(self) -> Image.Image:
        """Decode the upright image, in the mode of the file.

        Raises:
            Exception: one of a dozen types, `RequestError` among them, when the file is broken.
        """
        open_file = {"PNG": _open_png, "JPEG": _open_jpeg, "WEBP": _open_webp}[self.format]
        image = open_file(self.body)
        if image.size != self.stored_size:
            raise ValueError("its headers do not agree on its size")
        image.load()
        if self.format == "WEBP":
            image = image.copy()  # frees the decoder, which has three more copies
        return image.transpose(TRANSPOSITIONS[self.orientation]) if self.orientation in TRANSPOSITIONS else image


def inspect(body: Body) -> ImageFile:
    """Read the structure of a PNG, JPEG or WebP file, but no pixel.

    Raises:
        RequestError: the file has another format or no image (400), or too many chunks (422).
    """
    try:
        if body.startswith(PNG):
            return _inspect_png(body)
        if body.startswith(JPEG):
            return _inspect_jpeg(body)
        if body[:4] == b"RIFF" and body[8:12] == b"WEBP":
            return _inspect_webp(body)
    except (struct.error, IndexError):
        pass  # a header is cut off
    raise RequestError("the image cannot be read; send a PNG, JPEG or WebP file")


class Chunk(NamedTuple):
    """A chunk of a PNG or WebP file. Its data is `body[start:stop]`."""

    kind: bytes
    start: int
    stop: int


def _chunks(body: Body, file_format: str) -> Iterator[Chunk]:
    """Yield the chunks of a PNG file (up to the end of its image) or a WebP file. The last one may be cut off.

    A PNG chunk has a length, kind, data and checksum; a WebP chunk a kind, length, data and padding.
    """
    is_png, limit = file_format == "PNG", 10_000 + len(body) // 1024
    position = len(PNG) if is_png else 12
    for _ in range(limit):
        if position + 8 > len(body):
            return
        kind = bytes(body[position + 4 : position + 8] if is_png else body[position : position + 4])
        (length,) = struct.unpack_from(">I" if is_png else "<4xI", body, position)
        start = position + 8
        yield Chunk(kind, start, min(start + length, len(body)))
        if is_png and kind == b"IEND":
            return
        position = start + length + (4 if is_png else length % 2)
    raise RequestError(f"the {file_format} file has more than {limit} chunks; save it again", 422)


def _inspect_png(body: Body) -> ImageFile:
    chunks = _chunks(body, "PNG")
    header = next(chunks, None)
    if header is None or header.kind != b"IHDR":  # readers disagree on chunks before the header
        raise struct.error
    exif, texts = b"", dict[bytes, Chunk]()
    for kind, start, stop in chunks:
        if kind == b"eXIf":
            exif = _beginning(body, start, stop)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            for keyword in (PNG_EXIF, PNG_XMP):
                if body.startswith(keyword + b"\0", start, stop):
                    texts[keyword] = Chunk(kind, start + len(keyword) + 1, stop)
    if not exif:
        lines = _png_text(body, texts.get(PNG_EXIF)).split(b"\n")[3:]  # after an empty line, a name and a length
        exif = _unhex(b"".join(lines))
    size = struct.unpack_from(">II", body, header.start)
    return ImageFile(body, "PNG", size, _orientation(exif, _png_text(body, texts.get(PNG_XMP))))


def _png_text(body: Body, chunk: Chunk | None) -> bytes:
    """Return the beginning of a chunk's text after its keyword; empty without a chunk, or when it is broken."""
    if chunk is None:
        return b""
    data = _beginning(body, chunk.start, chunk.stop)
    compressed = chunk.kind == b"zTXt"
    if compressed:
        data = data[1:]  # after the method
    elif chunk.kind == b"iTXt":  # a flag, a method, a language and a translated keyword
        compressed = data[:1] == b"\1"
        data = b"".join(data[2:].split(b"\0", 2)[2:])
    if not compressed:
        return data
    try:
        return zlib.decompressobj().decompress(data, MAX_TEXT)
    except zlib.error:
        return b""


def _open_png(body: Body) -> Image.Image:
    """Open a PNG. Its transparent color goes to `image.info`, or for 16 bits per channel to an alpha channel."""
    file, color = _rewrite_png(body)
    image = Image.open(file, formats=("PNG",))
    depth, color_type = file.getbuffer()[24:26]
    if color_type == 3 and image.palette is None:  # Pillow would use a palette of its own
        raise ValueError("its palette is missing, or comes after its pixels")
    if color_type == 0 and len(color) >= 2:
        white = 2**depth - 1
        value = int.from_bytes(color[:2]) & white
        image.info["transparency"] = value if depth == 16 else value * (255 // white)  # Pillow scales pixels alike
    elif color_type == 2 and len(color) >= 6:
        red, green, blue = struct.unpack_from(">HHH", color)
        if depth == 16:
            return _with_transparent_color(image, file, (red, green, blue))
        image.info["transparency"] = red & 255, green & 255, blue & 255
    return image


def _with_transparent_color(image: Image.Image, file: io.BytesIO, color: tuple[int, int, int]) -> Image.Image:
    """Make one color of an image with 16 bits per channel transparent.

    Pillow keeps only the high bytes. It reads the low bytes when it is told that the byte order is the other one.
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


def _rewrite_png(body: Body) -> tuple[io.BytesIO, bytes]:
    """Write a PNG with only the chunks of its pixels, and its image data in one chunk.

    Returns:
        The file, and the data of its chunk `tRNS`.
    """
    view, file, color = memoryview(body), io.BytesIO(), b""
    file.write(PNG)
    begin, checksum = 0, zlib.crc32(b"IDAT")
    for kind, start, stop in _chunks(body, "PNG"):
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
            color = bytes(view[start:stop]) if kind == b"tRNS" else color
    length = file.tell() - begin - 8
    file.write(struct.pack(">I", checksum) + b"\0\0\0\0IEND\xaeB`\x82")
    file.seek(begin)
    file.write(struct.pack(">I", length) if begin else PNG[:4])
    file.seek(0)
    return file, color


IS_MARKER = np.ones(256, bool)
"""Bytes that begin a segment after 0xFF. 0x00 and 0xFF occur in data; 0x01 and restarts have no segment."""
IS_MARKER[[0x00, 0x01, *range(0xD0, 0xD8), 0xFF]] = False

SOI, EOI, SOS, APP0, APP1, APP14, APP15, COM = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xEE, 0xEF, 0xFE
FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}
"""Markers of the segment with the image's size, one for each coding process."""


class Segment(NamedTuple):
    """A marker of a JPEG file and its segment `body[start:stop]`, which begins with its length."""

    marker: int
    start: int
    stop: int


def _jpeg_segments(body: Body) -> Iterator[Segment]:
    """Yield the segments up to the end of the first image. The data of scans is skipped."""
    data, position = np.frombuffer(body, np.uint8), 2
    for _ in range(JPEG_SEGMENTS):
        start = _after_marker(data, position)
        if start is None:
            return
        marker = int(data[start - 1])
        stop = start if marker == EOI else min(start + struct.unpack_from(">H", body, start)[0], len(body))
        yield Segment(marker, start, stop)
        if marker == EOI:
            return
        position = max(stop, start + 2)
    raise RequestError(f"the JPEG file has more than {JPEG_SEGMENTS} segments; save it again", 422)


def _after_marker(data: np.ndarray, position: int) -> int | None:
    """Return the position after the next marker; None without one. Each search window is larger than the last one."""
    size = 64
    while position + 1 < len(data):
        window = data[position : position + size + 1]
        if len(hits := np.flatnonzero((window[:-1] == 0xFF) & IS_MARKER[window[1:]])):
            return position + int(hits[0]) + 2
        position, size = position + size, min(8 * size, 2**18)
    return None


def _inspect_jpeg(body: Body) -> ImageFile:
    size, scans, tables, exif, xmp = None, 0, 0, b"", b""
    for marker, start, stop in _jpeg_segments(body):
        if marker in FRAMES and size is None:
            height, width = struct.unpack_from(">HH", body, start + 3)
            size = width, height
        elif marker == SOS:
            scans += 1
        elif marker == APP1 and body.startswith(b"Exif\0\0", start + 2):
            exif = exif or bytes(body[start + 2 : stop])
        elif marker == APP1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0", start + 2):
            xmp = bytes(body[start + 2 : stop])
        if not scans and _is_needed(marker):
            tables += stop - start
    if size is None:
        raise struct.error
    max_scans = max(1, min(JPEG_SCANS, JPEG_SCANNED_PIXELS // max(1, size[0] * size[1])))
    if scans > max_scans:
        raise RequestError(f"the JPEG file has more than {max_scans} scans; save it again", 422)
    if tables > JPEG_TABLES:
        raise RequestError(f"the JPEG file has more than {JPEG_TABLES} bytes of tables; save it again", 422)
    return ImageFile(body, "JPEG", size, _orientation(exif, xmp))


def _is_needed(marker: int) -> bool:
    """Return whether a decoder needs a segment. Of the application segments it needs two, for the color space."""
    return not (APP0 < marker <= APP15 or marker == COM) or marker == APP14


def _open_jpeg(body: Body) -> Image.Image:
    """Open a JPEG, with only the segments of its first image."""
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


def _inspect_webp(body: Body) -> ImageFile:
    size, exif, xmp = None, b"", b""
    flags = body[20] if body[12:16] == b"VP8X" else 0  # libwebp reads only metadata that they announce
    for kind, start, stop in _chunks(body, "WebP"):
        size = size or _webp_size(body, kind, start)
        if kind == b"EXIF" and flags & WEBP_EXIF:
            exif = exif or _beginning(body, start, stop)
        elif kind == b"XMP " and flags & WEBP_XMP:
            xmp = xmp or _beginning(body, start, stop)
    if size is None:
        raise struct.error
    return ImageFile(body, "WEBP", size, _orientation(exif, xmp))


def _webp_size(body: Body, kind: bytes, start: int) -> tuple[int, int] | None:
    """Return width and height from the first chunk; None for a kind without a size."""
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
    """Open the first image of a WebP file. Its decoder would allocate memory for every chunk."""
    view, chunks = memoryview(body), bytearray()
    for kind, start, stop in _chunks(body, "WebP"):
        chunk = bytearray(view[start - 8 : stop])
        if kind == b"VP8X":
            chunk[8] &= 0b10010  # keep only the flags of animation and transparency
        if kind in (b"VP8X", b"ANIM", b"ALPH", b"VP8 ", b"VP8L", b"ANMF"):
            chunks += chunk + bytes(len(chunk) % 2)
        if kind in (b"VP8 ", b"VP8L", b"ANMF"):
            break
    return Image.open(io.BytesIO(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks), formats=("WEBP",))


def _beginning(body: Body, start: int, stop: int) -> bytes:
    """Return the first `MAX_TEXT` bytes of a chunk's data."""
    return bytes(body[start : min(stop, start + MAX_TEXT)])


def _unhex(text: bytes) -> bytes:
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        return b""


def _orientation(exif: bytes, xmp: bytes) -> int:
    """Return the orientation from 1 to 8, from EXIF or else XMP. Unreadable metadata means 1."""
    orientation = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
    if orientation is None and (match := XMP_ORIENTATION.search(xmp)):
        orientation = int(match[1])
    return orientation if orientation in TRANSPOSITIONS else 1


def _exif_orientation(tiff: bytes) -> int | None:
    """Return the orientation from the first directory of a TIFF file; None without one. No other directory is read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return None
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    count = int.from_bytes(tiff[start : start + 2], "little" if order == "<" else "big")
    entries = tiff[start + 2 : start + 2 + 12 * count]
    orientation = None
    for tag, kind, number, value in struct.iter_unpack(order + "HHI4s", entries[: len(entries) // 12 * 12]):
        if tag == ORIENTATION and kind in EXIF_INTEGERS and number == 1:
            (orientation,) = struct.unpack_from(order + EXIF_INTEGERS[kind], value)
    return orientation
