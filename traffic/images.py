"""PNG, JPEG and WebP files with a changed structure: headers, lengths, counts, order and copies of their segments.

A maker takes a random generator and returns a file: a good one, changed in one to three ways.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from random import Random

import numpy as np
from PIL import Image

SIDES = (0, 1, 7, 8, 16, 33, 64, 300, 4000, 11_313, 16_383, 30_000, 65_535, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1)
"""Widths and heights that a header may say."""
LENGTHS = (0, 1, 2, 3, 4, 7, 8, 12, 100, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 9, 2**32 - 1)
"""Lengths that a chunk may say."""
COUNTS = (1, 2, 20, 99, 101, 500, 1990, 2010)
"""Copies of a segment."""
MANY = (9000, 11_000, 300_000)
"""Copies of a small segment."""
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row and both steps of each pass of an interlaced PNG."""


def pixels(rng: Random, channels: int, most: int = 255) -> np.ndarray:
    """Return a smooth image [H, W, channels] of whole numbers from 0 to `most`, with sides of 16 to 64."""
    height, width = rng.choice((16, 24, 33, 64)), rng.choice((16, 25, 40, 64))
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / rng.uniform(3, 20) + columns / rng.uniform(3, 20)) for _ in range(channels)]
    return np.round((np.stack(waves, axis=-1) / 2 + 0.5) * most).astype(np.int64)


def number(rng: Random, size: int) -> int:
    """Return a value of so many bytes, often one of the limits."""
    top = 256**size
    return rng.choice((0, 1, 2, 255, 256, top // 2 - 1, top // 2, top - 1, rng.randrange(top))) % top


def scrambled(rng: Random, data: bytes, most: int = 4) -> bytes:
    """Return the data with up to `most` of its bytes changed, or cut off, or longer."""
    edited = bytearray(data)
    for _ in range(rng.randint(1, most)):
        if edited:
            edited[rng.randrange(min(len(edited), 64))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    end = rng.choice((len(data), len(data), rng.randrange(len(data) + 1)))
    return bytes(edited[:end]) + rng.choice((b"", b"", b"\0", b"\xff" * 7))


def exif(rng: Random) -> bytes:
    """Return a TIFF file with an orientation, whose directory is right or not."""
    order, mark = rng.choice(((">", b"MM\0*"), ("<", b"II*\0")))
    entry = struct.pack(order + "HHIHH", 0x0112, rng.choice((3, 3, 3, 1, 4, 12)), rng.choice((1, 1, 1, 0, 2**32 - 1)),
                        rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9)), 0)  # fmt: skip
    start, count = rng.choice((8, 8, 8, 0, 4, 2**32 - 1)), rng.choice((1, 1, 1, 0, 65_535))
    return mark + struct.pack(order + "IH", start, count) + entry + struct.pack(order + "I", rng.choice((0, 0, 8)))


@cache
def bomb(size: int) -> bytes:
    """Return so many zeros, compressed."""
    compress = zlib.compressobj(9)
    return b"".join(compress.compress(bytes(1_000_000)) for _ in range(size // 1_000_000)) + compress.flush()


@dataclass(frozen=True)
class Part:
    """A chunk of a PNG or WebP file, or a segment of a JPEG file with all that stands before the next marker."""

    kind: bytes
    data: bytes
    length: int | None = None
    """Its length as the file says it; None for the right one."""
    checksum: int | None = None
    """Its CRC as a PNG says it; None for the right one."""


Parts = list[Part]
Change = Callable[[Random, Parts], None]
"""Changes the parts of a file in place."""


def changed(rng: Random, parts: Parts, changes: list[Change]) -> Parts:
    for _ in range(rng.choice((1, 1, 2, 3))):
        if parts:
            rng.choice(changes)(rng, parts)
    return parts


def cut(rng: Random, file: bytes) -> bytes:
    """Return the file, or now and then less or more of it."""
    if rng.random() < 0.1:
        return file[: rng.randrange(len(file) + 1)]
    return file + rng.choice((b"", b"", b"", b"", b"\0" * 100, file, b"\0\0\0\x18ftypisom"))


def place(rng: Random, parts: Parts, kind: bytes = b"") -> int:
    """Return where a part of this kind is, or any part."""
    found = [position for position, part in enumerate(parts) if part.kind == kind]
    return rng.choice(found or range(len(parts)))


def edit(parts: Parts, position: int, **fields: object) -> None:
    parts[position] = replace(parts[position], **fields)  # type: ignore[arg-type]


# Changes of every format


def drop(rng: Random, parts: Parts) -> None:
    del parts[place(rng, parts)]


def repeat(rng: Random, parts: Parts) -> None:
    position = place(rng, parts)
    copies = rng.choice(COUNTS) if len(parts[position].data) < 5000 else 2
    parts[position:position] = [parts[position]] * copies


def swap(rng: Random, parts: Parts) -> None:
    first, second = place(rng, parts), place(rng, parts)
    parts[first], parts[second] = parts[second], parts[first]


def scramble(rng: Random, parts: Parts) -> None:
    position = place(rng, parts)
    edit(parts, position, data=scrambled(rng, parts[position].data))


def say_length(rng: Random, parts: Parts) -> None:
    position = place(rng, parts)
    right = len(parts[position].data)
    edit(parts, position, length=max(0, rng.choice((right - 1, right + 1, right + 2, *LENGTHS))))


# PNG


def good_png(rng: Random) -> Parts:
    color_type = rng.choice((0, 2, 3, 4, 6))
    depth = rng.choice({0: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8)}.get(color_type, (8, 16)))
    interlaced = rng.random() < 0.3
    array = pixels(rng, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type], 2**depth - 1)
    height, width, _ = array.shape
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, interlaced)
    passes = [array[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [array]
    data = b"".join(b"\0" + png_row(row, depth) for part in passes if part.size for row in part)
    parts = [Part(b"IHDR", header)]
    if color_type == 3:
        parts.append(Part(b"PLTE", rng.randbytes(3 * 2**depth)))
    if color_type in (0, 2, 3) and rng.random() < 0.3:
        parts.append(Part(b"tRNS", rng.randbytes({0: 2, 2: 6, 3: 2**depth}[color_type])))
    if rng.random() < 0.2:
        parts.append(Part(b"eXIf", exif(rng)))
    compressed = zlib.compress(data)
    middle = rng.randrange(len(compressed)) if rng.random() < 0.3 else len(compressed)
    return [*parts, *(Part(b"IDAT", piece) for piece in (compressed[:middle], compressed[middle:])), Part(b"IEND", b"")]


def png_row(row: np.ndarray, depth: int) -> bytes:
    """Return the bytes of a row of samples."""
    if depth >= 8:
        return row.astype(">u2" if depth == 16 else np.uint8).tobytes()
    bits = row.ravel()[:, None] >> np.arange(depth - 1, -1, -1) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def png_size(rng: Random, parts: Parts) -> None:
    position = place(rng, parts, b"IHDR")
    data = parts[position].data
    sides = struct.pack(">II", *rng.choices(SIDES, k=2))
    edit(parts, position, data=rng.choice((sides, sides[:4] + data[4:8], data[:4] + sides[4:])) + data[8:])


def png_format(rng: Random, parts: Parts) -> None:
    position = place(rng, parts, b"IHDR")
    form = bytes(
        (rng.choice((0, 1, 2, 4, 8, 16, 32)), rng.choice((0, 2, 3, 4, 6, 7)), *rng.choices((0, 0, 0, 1, 2), k=3))
    )
    edit(parts, position, data=parts[position].data[:8] + form)


def png_checksum(rng: Random, parts: Parts) -> None:
    edit(parts, place(rng, parts), checksum=number(rng, 4))


def png_many(rng: Random, parts: Parts) -> None:
    kind = rng.choice((b"IDAT", b"tEXt", b"vaEx", b"PLTE", b"fcTL", b"tRNS", b"iCCP"))
    few = Part(kind, rng.choice((b"", b"", b"a\0b")))
    position = rng.randrange(len(parts) + 1)
    parts[position:position] = [few] * rng.choice((*COUNTS, *MANY))


def png_bomb(rng: Random, parts: Parts) -> None:
    zeros = bomb(rng.choice((1_000_000, 40_000_000, 100_000_000)))
    text = rng.choice((
        Part(b"zTXt", b"Raw profile type exif\0\0" + zeros), Part(b"zTXt", b"a\0\0" + zeros),
        Part(b"iCCP", b"a\0\0" + zeros), Part(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zeros),
    ))  # fmt: skip
    parts[1:1] = [text] * rng.choice((1, 1, 30))


def png_black(rng: Random, parts: Parts) -> None:
    """A large image, whose data is there, or more or less of it."""
    side = rng.choice((300, 1000, 5000, 11_313))
    data = bomb(rng.choice((1_000_000, 40_000_000, 100_000_000)))
    header = struct.pack(">IIBBBBB", side, side, 8, rng.choice((0, 2, 6)), 0, 0, rng.choice((0, 0, 1)))
    parts[:] = [Part(b"IHDR", header), Part(b"IDAT", data), Part(b"IEND", b"")]


def png_ancillary(rng: Random, parts: Parts) -> None:
    kinds = (b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"pHYs", b"gAMA", b"sBIT", b"iCCP", b"cICP")
    data = rng.choice((exif(rng), rng.randbytes(rng.choice((0, 1, 2, 6, 8, 13, 26, 256, 768, 771)))))
    parts.insert(rng.randrange(1, len(parts) + 1), Part(rng.choice(kinds), data))


PNG_CHANGES: list[Change] = [
    drop, repeat, swap, scramble, say_length, png_size, png_size, png_format, png_checksum, png_many, png_bomb,
    png_black, png_ancillary, png_ancillary,
]  # fmt: skip


def png(rng: Random) -> bytes:
    parts = changed(rng, good_png(rng), PNG_CHANGES)
    file = b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, parts))
    return cut(rng, file)


def png_chunk(part: Part) -> bytes:
    length = len(part.data) if part.length is None else part.length
    checksum = zlib.crc32(part.kind + part.data) if part.checksum is None else part.checksum
    return struct.pack(">I", length) + part.kind + part.data + struct.pack(">I", checksum)


# JPEG: the kind of a part is its marker


def good_jpeg(rng: Random) -> Parts:
    mode = rng.choice(("RGB", "RGB", "L", "CMYK"))
    array = pixels(rng, {"RGB": 3, "L": 1, "CMYK": 4}[mode]).astype(np.uint8)
    height, width, _ = array.shape
    image = Image.frombytes(mode, (width, height), array.tobytes())
    options = {"quality": rng.choice((50, 90, 100)), "subsampling": rng.choice((0, 1, 2))}
    options |= rng.choice(({}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 1}))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", **options)
    parts = jpeg_parts(buffer.getvalue())
    if rng.random() < 0.2:
        parts.insert(1, Part(b"\xe1", b"Exif\0\0" + exif(rng)))
    return parts


def jpeg_parts(file: bytes) -> Parts:
    """Return the segments of a good file; a scan's data stands in the segment of its header."""
    parts, position = [], 2
    while file[position + 1] != 0xD9:
        marker = file[position + 1 : position + 2]
        end = position + 2 + int.from_bytes(file[position + 2 : position + 4])
        if marker == b"\xda":
            while file[end] != 0xFF or file[end + 1] == 0 or 0xD0 <= file[end + 1] < 0xD8:
                end += 1
        parts.append(Part(marker, file[position + 4 : end]))
        position = end
    return parts


def jpeg_frame(parts: Parts) -> int | None:
    """Return where the frame header (SOF) is."""
    frames = [at for at, part in enumerate(parts) if part.kind in (b"\xc0", b"\xc1", b"\xc2") and len(part.data) > 8]
    return frames[0] if frames else None


def jpeg_size(rng: Random, parts: Parts) -> None:
    if (position := jpeg_frame(parts)) is not None:
        data = parts[position].data
        sides = struct.pack(">HH", *(min(side, 65_535) for side in rng.choices(SIDES, k=2)))
        edit(parts, position, data=data[:1] + sides + data[5:])


def jpeg_components(rng: Random, parts: Parts) -> None:
    """Another precision, number of components or sampling of one of them."""
    if (position := jpeg_frame(parts)) is None:
        return
    data = bytearray(parts[position].data)
    at = rng.choice((0, 5, 7, 7, 7, len(data) - 2, len(data) - 1))
    data[at] = rng.choice((0, 1, 3, 4, 8, 12, 16, 0x11, 0x12, 0x21, 0x22, 0x41, 0x44, 0xFF))
    edit(parts, position, data=bytes(data))


def jpeg_coding(rng: Random, parts: Parts) -> None:
    """Another way of coding: lossless, arithmetic, progressive."""
    if (position := jpeg_frame(parts)) is not None:
        edit(parts, position, kind=bytes((rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC7, 0xC9, 0xCA, 0xCB, 0xCF)),)))


def jpeg_fill(rng: Random, parts: Parts) -> None:
    position = place(rng, parts)
    edit(parts, position, data=parts[position].data + b"\xff" * rng.choice((1, 2, 1000, 3_000_000)))


def jpeg_many(rng: Random, parts: Parts) -> None:
    markers = b"\xe0\xe1\xe2\xe5\xed\xee\xfe\xdb\xc4\xdd\xdc\x01\xd0\xd8\xf0\xc8"
    starts = (
        b"", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"MPF\0II*\0", b"ICC_PROFILE\0\1\1", b"Adobe\0d\0\0\0\0\2",
    )  # fmt: skip
    data = rng.choice(starts) + rng.choice((b"", b"", rng.randbytes(20), bytes(60_000)))
    copies = rng.choice(COUNTS) if len(data) > 1000 else rng.choice((*COUNTS, *MANY))
    position = rng.randrange(len(parts) + 1)
    parts[position:position] = [Part(bytes((rng.choice(markers),)), data)] * copies


def jpeg_scans(rng: Random, parts: Parts) -> None:
    """The same scan many times, which takes a pass over the image each."""
    position = place(rng, parts, b"\xda")
    parts[position:position] = [parts[position]] * rng.choice(COUNTS)


def jpeg_restarts(rng: Random, parts: Parts) -> None:
    parts.insert(rng.randrange(len(parts)), Part(b"\xdd", struct.pack(">H", rng.choice((0, 1, 2, 5, 65_535)))))


JPEG_CHANGES: list[Change] = [
    drop, repeat, swap, scramble, say_length, jpeg_size, jpeg_size, jpeg_components, jpeg_components, jpeg_coding,
    jpeg_fill, jpeg_many, jpeg_scans, jpeg_restarts,
]  # fmt: skip


def jpeg(rng: Random) -> bytes:
    parts = changed(rng, good_jpeg(rng), JPEG_CHANGES)
    end = rng.choice((b"\xff\xd9", b"\xff\xd9", b"\xff\xd9", b""))
    file = b"\xff\xd8" + b"".join(map(jpeg_segment, parts)) + end
    return cut(rng, file)


def jpeg_segment(part: Part) -> bytes:
    return b"\xff" + part.kind + struct.pack(">H", jpeg_length(part)) + part.data


def jpeg_length(part: Part) -> int:
    """Return the length that a segment says. That of a scan leaves its data out."""
    if part.length is not None:
        return part.length % 65_536
    if part.kind == b"\xda" and part.data:
        return min(len(part.data), 4 + 2 * part.data[0]) + 2
    return (len(part.data) + 2) % 65_536


# WebP


def good_webp(rng: Random) -> Parts:
    alpha, animated = rng.random() < 0.4, rng.random() < 0.3
    array = pixels(rng, 4 if alpha else 3).astype(np.uint8)
    image, buffer = Image.fromarray(array), io.BytesIO()
    options: dict[str, object] = {"lossless": rng.random() < 0.5, "method": 0, "quality": 90}
    if animated:
        options |= {"save_all": True, "append_images": [Image.fromarray(255 - array)]}
    if rng.random() < 0.2:
        options["exif"] = exif(rng)
    image.save(buffer, "webp", **options)
    return webp_parts(buffer.getvalue())


def webp_parts(file: bytes) -> Parts:
    parts, position = [], 12
    while position + 8 <= len(file):
        kind, length = struct.unpack_from("<4sI", file, position)
        parts.append(Part(kind, file[position + 8 : position + 8 + length]))
        position += 8 + length + length % 2
    return parts


def webp_canvas(rng: Random, parts: Parts) -> None:
    sides = b"".join((min(side, 2**24) - 1 & 0xFFFFFF).to_bytes(3, "little") for side in rng.choices(SIDES, k=2))
    header = Part(b"VP8X", bytes((rng.choice((0, 0x02, 0x10, 0x12, 0xFF)), 0, 0, 0)) + sides)
    position = place(rng, parts, b"VP8X")
    if parts[position].kind == b"VP8X":
        parts[position] = rng.choice((header, replace(header, data=header.data[:4] + parts[position].data[4:])))
    else:
        parts.insert(0, header)


def webp_frame(rng: Random, parts: Parts) -> None:
    """Another place, size, duration or image of a frame of an animation."""
    position = place(rng, parts, b"ANMF")
    data = bytearray(parts[position].data)
    start = rng.choice((0, 3, 6, 9, 12, 16, 20))
    for at in range(start, min(start + 3, len(data))):
        data[at] = rng.choice((0, 1, 16, 255, data[at]))
    edit(parts, position, data=bytes(data))


def webp_sides(rng: Random, parts: Parts) -> None:
    """Another size in the image's own header."""
    kind = rng.choice((b"VP8 ", b"VP8L"))
    position = place(rng, parts, kind)
    data = parts[position].data
    if parts[position].kind == b"VP8 ":
        sides = struct.pack("<HH", *(min(side, 65_535) for side in rng.choices(SIDES, k=2)))
        edit(parts, position, data=data[:6] + sides + data[10:])
    elif parts[position].kind == b"VP8L":
        edit(parts, position, data=data[:1] + struct.pack("<I", number(rng, 4) & 0x1FFFFFFF) + data[5:])


def webp_alpha(rng: Random, parts: Parts) -> None:
    data = bytes((rng.choice((0, 1, 2, 4, 5, 0x10, 0xFF)),)) + rng.choice((b"", bytes(5000), rng.randbytes(50)))
    parts.insert(rng.randrange(len(parts) + 1), Part(b"ALPH", data))


def webp_many(rng: Random, parts: Parts) -> None:
    kind = rng.choice((b"ANMF", b"ALPH", b"EXIF", b"XMP ", b"ICCP", b"vaEx", b"VP8L", b"VP8 ", b"ANIM", b"VP8X"))
    data = rng.choice((b"", b"", rng.randbytes(6), bytes(10)))
    position = rng.randrange(len(parts) + 1)
    parts[position:position] = [Part(kind, data)] * rng.choice((*COUNTS, *MANY))


WEBP_CHANGES: list[Change] = [
    drop, repeat, swap, scramble, scramble, say_length, webp_canvas, webp_canvas, webp_frame, webp_frame, webp_sides,
    webp_sides, webp_alpha, webp_many,
]  # fmt: skip


def webp(rng: Random) -> bytes:
    parts = changed(rng, good_webp(rng), WEBP_CHANGES)
    chunks = b"".join(map(webp_chunk, parts))
    size = 4 + len(chunks)
    if rng.random() < 0.1:
        size = rng.choice((0, 4, size - 1, size + 1, size // 2, 2**31, 2**32 - 1)) % 2**32
    return cut(rng, b"RIFF" + struct.pack("<I", size) + b"WEBP" + chunks)


def webp_chunk(part: Part) -> bytes:
    length = len(part.data) if part.length is None else part.length
    return part.kind + struct.pack("<I", length) + part.data + bytes(len(part.data) % 2)


IMAGES: dict[str, Callable[[Random], bytes]] = {"file: PNG": png, "file: JPEG": jpeg, "file: WebP": webp}
