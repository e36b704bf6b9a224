"""PNG, JPEG and WebP files with a changed structure: headers, lengths, counts, order and copies of their segments.

A maker takes a random generator and returns a good file with one to three changes.
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
"""Widths and heights in a header."""
LENGTHS = (0, 1, 2, 3, 4, 7, 8, 12, 100, 65_535, 2**24, 2**31 - 1, 2**31, 2**32 - 9, 2**32 - 1)
"""Lengths of a chunk."""
COUNTS = (1, 2, 20, 99, 101, 500, 1990, 2010)
"""Numbers of copies of a segment."""
MANY = (9000, 11_000, 300_000)
"""Numbers of copies of a small segment."""
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column, first row and both strides of each pass of an interlaced PNG."""


def pixels(rng: Random, channels: int, maximum: int = 255) -> np.ndarray:
    """Return a smooth image [H, W, channels] of integers from 0 to `maximum`, with sides of 16 to 64."""
    height, width = rng.choice((16, 24, 33, 64)), rng.choice((16, 25, 40, 64))
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [np.sin(rows / rng.uniform(3, 20) + columns / rng.uniform(3, 20)) for _ in range(channels)]
    return np.round((np.stack(waves, axis=-1) / 2 + 0.5) * maximum).astype(np.int64)


def number(rng: Random, size: int) -> int:
    """Return a value of `size` bytes, often one of the limits."""
    top = 256**size
    return rng.choice((0, 1, 2, 255, 256, top // 2 - 1, top // 2, top - 1, rng.randrange(top))) % top


def scrambled(rng: Random, data: bytes, maximum: int = 4) -> bytes:
    """Return the data with up to `maximum` of its bytes changed, or cut off, or longer."""
    edited = bytearray(data)
    for _ in range(rng.randint(1, maximum)):
        if edited:
            edited[rng.randrange(min(len(edited), 64))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    end = rng.choice((len(data), len(data), rng.randrange(len(data) + 1)))
    return bytes(edited[:end]) + rng.choice((b"", b"", b"\0", b"\xff" * 7))


def exif(rng: Random) -> bytes:
    """Return a TIFF file with an orientation. Its directory is valid or not."""
    order, mark = rng.choice(((">", b"MM\0*"), ("<", b"II*\0")))
    entry = struct.pack(order + "HHIHH", 0x0112, rng.choice((3, 3, 3, 1, 4, 12)), rng.choice((1, 1, 1, 0, 2**32 - 1)),
                        rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 9)), 0)  # fmt: skip
    start, count = rng.choice((8, 8, 8, 0, 4, 2**32 - 1)), rng.choice((1, 1, 1, 0, 65_535))
    return mark + struct.pack(order + "IH", start, count) + entry + struct.pack(order + "I", rng.choice((0, 0, 8)))


@cache
def bomb(size: int) -> bytes:
    """Return `size` zeros, compressed."""
    compress = zlib.compressobj(9)
    return b"".join(compress.compress(bytes(1_000_000)) for _ in range(size // 1_000_000)) + compress.flush()


@dataclass(frozen=True)
class Segment:
    """A chunk of a PNG or WebP file, or a segment of a JPEG file with all bytes before the next marker."""

    kind: bytes
    data: bytes
    length: int | None = None
    """Length that the file declares; None for the correct one."""
    checksum: int | None = None
    """CRC that a PNG declares; None for the correct one."""


Segments = list[Segment]
Change = Callable[[Random, Segments], None]
"""A change of the segments of a file in place."""


def changed(rng: Random, segments: Segments, changes: list[Change]) -> Segments:
    for _ in range(rng.choice((1, 1, 2, 3))):
        if segments:
            rng.choice(changes)(rng, segments)
    return segments


def cut(rng: Random, file: bytes) -> bytes:
    """Return the file, or sometimes less or more of it."""
    if rng.random() < 0.1:
        return file[: rng.randrange(len(file) + 1)]
    return file + rng.choice((b"", b"", b"", b"", b"\0" * 100, file, b"\0\0\0\x18ftypisom"))


def choose_index(rng: Random, segments: Segments, kind: bytes = b"") -> int:
    """Choose the index of a segment of this kind, or of any segment."""
    matches = [position for position, segment in enumerate(segments) if segment.kind == kind]
    return rng.choice(matches or range(len(segments)))


def edit(segments: Segments, position: int, **fields: object) -> None:
    segments[position] = replace(segments[position], **fields)  # type: ignore[arg-type]


# Changes of every format


def drop(rng: Random, segments: Segments) -> None:
    del segments[choose_index(rng, segments)]


def repeat(rng: Random, segments: Segments) -> None:
    position = choose_index(rng, segments)
    copies = rng.choice(COUNTS) if len(segments[position].data) < 5000 else 2
    segments[position:position] = [segments[position]] * copies


def swap(rng: Random, segments: Segments) -> None:
    first, second = choose_index(rng, segments), choose_index(rng, segments)
    segments[first], segments[second] = segments[second], segments[first]


def scramble(rng: Random, segments: Segments) -> None:
    position = choose_index(rng, segments)
    edit(segments, position, data=scrambled(rng, segments[position].data))


def say_length(rng: Random, segments: Segments) -> None:
    position = choose_index(rng, segments)
    right = len(segments[position].data)
    edit(segments, position, length=max(0, rng.choice((right - 1, right + 1, right + 2, *LENGTHS))))


# PNG


def good_png(rng: Random) -> Segments:
    color_type = rng.choice((0, 2, 3, 4, 6))
    depth = rng.choice({0: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8)}.get(color_type, (8, 16)))
    interlaced = rng.random() < 0.3
    array = pixels(rng, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color_type], 2**depth - 1)
    height, width, _ = array.shape
    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, interlaced)
    passes = [array[y::dy, x::dx] for x, y, dx, dy in ADAM7] if interlaced else [array]
    data = b"".join(b"\0" + png_row(row, depth) for rows in passes if rows.size for row in rows)
    segments = [Segment(b"IHDR", header)]
    if color_type == 3:
        segments.append(Segment(b"PLTE", rng.randbytes(3 * 2**depth)))
    if color_type in (0, 2, 3) and rng.random() < 0.3:
        segments.append(Segment(b"tRNS", rng.randbytes({0: 2, 2: 6, 3: 2**depth}[color_type])))
    if rng.random() < 0.2:
        segments.append(Segment(b"eXIf", exif(rng)))
    compressed = zlib.compress(data)
    middle = rng.randrange(len(compressed)) if rng.random() < 0.3 else len(compressed)
    return [
        *segments,
        *(Segment(b"IDAT", piece) for piece in (compressed[:middle], compressed[middle:])),
        Segment(b"IEND", b""),
    ]


def png_row(row: np.ndarray, depth: int) -> bytes:
    """Return the bytes of a row of samples."""
    if depth >= 8:
        return row.astype(">u2" if depth == 16 else np.uint8).tobytes()
    bits = row.ravel()[:, None] >> np.arange(depth - 1, -1, -1) & 1
    return np.packbits(bits.astype(np.uint8)).tobytes()


def png_size(rng: Random, segments: Segments) -> None:
    position = choose_index(rng, segments, b"IHDR")
    data = segments[position].data
    sides = struct.pack(">II", *rng.choices(SIDES, k=2))
    edit(segments, position, data=rng.choice((sides, sides[:4] + data[4:8], data[:4] + sides[4:])) + data[8:])


def png_format(rng: Random, segments: Segments) -> None:
    position = choose_index(rng, segments, b"IHDR")
    form = bytes(
        (rng.choice((0, 1, 2, 4, 8, 16, 32)), rng.choice((0, 2, 3, 4, 6, 7)), *rng.choices((0, 0, 0, 1, 2), k=3))
    )
    edit(segments, position, data=segments[position].data[:8] + form)


def png_checksum(rng: Random, segments: Segments) -> None:
    edit(segments, choose_index(rng, segments), checksum=number(rng, 4))


def png_many(rng: Random, segments: Segments) -> None:
    kind = rng.choice((b"IDAT", b"tEXt", b"vaEx", b"PLTE", b"fcTL", b"tRNS", b"iCCP"))
    few = Segment(kind, rng.choice((b"", b"", b"a\0b")))
    position = rng.randrange(len(segments) + 1)
    segments[position:position] = [few] * rng.choice((*COUNTS, *MANY))


def png_bomb(rng: Random, segments: Segments) -> None:
    zeros = bomb(rng.choice((1_000_000, 40_000_000, 100_000_000)))
    text = rng.choice((
        Segment(b"zTXt", b"Raw profile type exif\0\0" + zeros), Segment(b"zTXt", b"a\0\0" + zeros),
        Segment(b"iCCP", b"a\0\0" + zeros), Segment(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zeros),
    ))  # fmt: skip
    segments[1:1] = [text] * rng.choice((1, 1, 30))


def png_black(rng: Random, segments: Segments) -> None:
    """Declare a large image with all of its data, or more or less."""
    side = rng.choice((300, 1000, 5000, 11_313))
    data = bomb(rng.choice((1_000_000, 40_000_000, 100_000_000)))
    header = struct.pack(">IIBBBBB", side, side, 8, rng.choice((0, 2, 6)), 0, 0, rng.choice((0, 0, 1)))
    segments[:] = [Segment(b"IHDR", header), Segment(b"IDAT", data), Segment(b"IEND", b"")]


def png_ancillary(rng: Random, segments: Segments) -> None:
    kinds = (b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf", b"pHYs", b"gAMA", b"sBIT", b"iCCP", b"cICP")
    data = rng.choice((exif(rng), rng.randbytes(rng.choice((0, 1, 2, 6, 8, 13, 26, 256, 768, 771)))))
    segments.insert(rng.randrange(1, len(segments) + 1), Segment(rng.choice(kinds), data))


PNG_CHANGES: list[Change] = [
    drop, repeat, swap, scramble, say_length, png_size, png_size, png_format, png_checksum, png_many, png_bomb,
    png_black, png_ancillary, png_ancillary,
]  # fmt: skip


def png(rng: Random) -> bytes:
    segments = changed(rng, good_png(rng), PNG_CHANGES)
    file = b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, segments))
    return cut(rng, file)


def png_chunk(segment: Segment) -> bytes:
    length = len(segment.data) if segment.length is None else segment.length
    checksum = zlib.crc32(segment.kind + segment.data) if segment.checksum is None else segment.checksum
    return struct.pack(">I", length) + segment.kind + segment.data + struct.pack(">I", checksum)


# JPEG: the kind of a segment is its marker


def good_jpeg(rng: Random) -> Segments:
    mode = rng.choice(("RGB", "RGB", "L", "CMYK"))
    array = pixels(rng, {"RGB": 3, "L": 1, "CMYK": 4}[mode]).astype(np.uint8)
    height, width, _ = array.shape
    image = Image.frombytes(mode, (width, height), array.tobytes())
    options = {"quality": rng.choice((50, 90, 100)), "subsampling": rng.choice((0, 1, 2))}
    options |= rng.choice(({}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 1}))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", **options)
    segments = jpeg_segments(buffer.getvalue())
    if rng.random() < 0.2:
        segments.insert(1, Segment(b"\xe1", b"Exif\0\0" + exif(rng)))
    return segments


def jpeg_segments(file: bytes) -> Segments:
    """Return the segments of a good file. A scan's data belongs to the segment of its header."""
    segments, position = [], 2
    while file[position + 1] != 0xD9:
        marker = file[position + 1 : position + 2]
        end = position + 2 + int.from_bytes(file[position + 2 : position + 4])
        if marker == b"\xda":
            while file[end] != 0xFF or file[end + 1] == 0 or 0xD0 <= file[end + 1] < 0xD8:
                end += 1
        segments.append(Segment(marker, file[position + 4 : end]))
        position = end
    return segments


def jpeg_frame(segments: Segments) -> int | None:
    """Return the index of the frame header (SOF)."""
    frames = [
        at
        for at, segment in enumerate(segments)
        if segment.kind in (b"\xc0", b"\xc1", b"\xc2") and len(segment.data) > 8
    ]
    return frames[0] if frames else None


def jpeg_size(rng: Random, segments: Segments) -> None:
    if (position := jpeg_frame(segments)) is not None:
        data = segments[position].data
        sides = struct.pack(">HH", *(min(side, 65_535) for side in rng.choices(SIDES, k=2)))
        edit(segments, position, data=data[:1] + sides + data[5:])


def jpeg_components(rng: Random, segments: Segments) -> None:
    """Change the precision, the number of components or the sampling of a component."""
    if (position := jpeg_frame(segments)) is None:
        return
    data = bytearray(segments[position].data)
    at = rng.choice((0, 5, 7, 7, 7, len(data) - 2, len(data) - 1))
    data[at] = rng.choice((0, 1, 3, 4, 8, 12, 16, 0x11, 0x12, 0x21, 0x22, 0x41, 0x44, 0xFF))
    edit(segments, position, data=bytes(data))


def jpeg_coding(rng: Random, segments: Segments) -> None:
    """Change the coding: lossless, arithmetic, progressive."""
    if (position := jpeg_frame(segments)) is not None:
        edit(
            segments, position, kind=bytes((rng.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC7, 0xC9, 0xCA, 0xCB, 0xCF)),))
        )


def jpeg_fill(rng: Random, segments: Segments) -> None:
    position = choose_index(rng, segments)
    edit(segments, position, data=segments[position].data + b"\xff" * rng.choice((1, 2, 1000, 3_000_000)))


def jpeg_many(rng: Random, segments: Segments) -> None:
    markers = b"\xe0\xe1\xe2\xe5\xed\xee\xfe\xdb\xc4\xdd\xdc\x01\xd0\xd8\xf0\xc8"
    starts = (
        b"", b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"MPF\0II*\0", b"ICC_PROFILE\0\1\1", b"Adobe\0d\0\0\0\0\2",
    )  # fmt: skip
    data = rng.choice(starts) + rng.choice((b"", b"", rng.randbytes(20), bytes(60_000)))
    copies = rng.choice(COUNTS) if len(data) > 1000 else rng.choice((*COUNTS, *MANY))
    position = rng.randrange(len(segments) + 1)
    segments[position:position] = [Segment(bytes((rng.choice(markers),)), data)] * copies


def jpeg_scans(rng: Random, segments: Segments) -> None:
    """Repeat a scan many times. Each copy takes a pass over the image."""
    position = choose_index(rng, segments, b"\xda")
    segments[position:position] = [segments[position]] * rng.choice(COUNTS)


def jpeg_restarts(rng: Random, segments: Segments) -> None:
    segments.insert(rng.randrange(len(segments)), Segment(b"\xdd", struct.pack(">H", rng.choice((0, 1, 2, 5, 65_535)))))


JPEG_CHANGES: list[Change] = [
    drop, repeat, swap, scramble, say_length, jpeg_size, jpeg_size, jpeg_components, jpeg_components, jpeg_coding,
    jpeg_fill, jpeg_many, jpeg_scans, jpeg_restarts,
]  # fmt: skip


def jpeg(rng: Random) -> bytes:
    segments = changed(rng, good_jpeg(rng), JPEG_CHANGES)
    end = rng.choice((b"\xff\xd9", b"\xff\xd9", b"\xff\xd9", b""))
    file = b"\xff\xd8" + b"".join(map(jpeg_segment, segments)) + end
    return cut(rng, file)


def jpeg_segment(segment: Segment) -> bytes:
    return b"\xff" + segment.kind + struct.pack(">H", jpeg_length(segment)) + segment.data


def jpeg_length(segment: Segment) -> int:
    """Return the length that a segment declares. A scan's length excludes its data."""
    if segment.length is not None:
        return segment.length % 65_536
    if segment.kind == b"\xda" and segment.data:
        return min(len(segment.data), 4 + 2 * segment.data[0]) + 2
    return (len(segment.data) + 2) % 65_536


# WebP


def good_webp(rng: Random) -> Segments:
    alpha, animated = rng.random() < 0.4, rng.random() < 0.3
    array = pixels(rng, 4 if alpha else 3).astype(np.uint8)
    image, buffer = Image.fromarray(array), io.BytesIO()
    options: dict[str, object] = {"lossless": rng.random() < 0.5, "method": 0, "quality": 90}
    if animated:
        options |= {"save_all": True, "append_images": [Image.fromarray(255 - array)]}
    if rng.random() < 0.2:
        options["exif"] = exif(rng)
    image.save(buffer, "webp", **options)
    return webp_segments(buffer.getvalue())


def webp_segments(file: bytes) -> Segments:
    segments, position = [], 12
    while position + 8 <= len(file):
        kind, length = struct.unpack_from("<4sI", file, position)
        segments.append(Segment(kind, file[position + 8 : position + 8 + length]))
        position += 8 + length + length % 2
    return segments


def webp_canvas(rng: Random, segments: Segments) -> None:
    sides = b"".join((min(side, 2**24) - 1 & 0xFFFFFF).to_bytes(3, "little") for side in rng.choices(SIDES, k=2))
    header = Segment(b"VP8X", bytes((rng.choice((0, 0x02, 0x10, 0x12, 0xFF)), 0, 0, 0)) + sides)
    position = choose_index(rng, segments, b"VP8X")
    if segments[position].kind == b"VP8X":
        segments[position] = rng.choice((header, replace(header, data=header.data[:4] + segments[position].data[4:])))
    else:
        segments.insert(0, header)


def webp_frame(rng: Random, segments: Segments) -> None:
    """Change the position, size, duration or image of a frame of an animation."""
    position = choose_index(rng, segments, b"ANMF")
    data = bytearray(segments[position].data)
    start = rng.choice((0, 3, 6, 9, 12, 16, 20))
    for at in range(start, min(start + 3, len(data))):
        data[at] = rng.choice((0, 1, 16, 255, data[at]))
    edit(segments, position, data=bytes(data))


def webp_sides(rng: Random, segments: Segments) -> None:
    """Change the size in the image's own header."""
    kind = rng.choice((b"VP8 ", b"VP8L"))
    position = choose_index(rng, segments, kind)
    data = segments[position].data
    if segments[position].kind == b"VP8 ":
        sides = struct.pack("<HH", *(min(side, 65_535) for side in rng.choices(SIDES, k=2)))
        edit(segments, position, data=data[:6] + sides + data[10:])
    elif segments[position].kind == b"VP8L":
        edit(segments, position, data=data[:1] + struct.pack("<I", number(rng, 4) & 0x1FFFFFFF) + data[5:])


def webp_alpha(rng: Random, segments: Segments) -> None:
    data = bytes((rng.choice((0, 1, 2, 4, 5, 0x10, 0xFF)),)) + rng.choice((b"", bytes(5000), rng.randbytes(50)))
    segments.insert(rng.randrange(len(segments) + 1), Segment(b"ALPH", data))


def webp_many(rng: Random, segments: Segments) -> None:
    kind = rng.choice((b"ANMF", b"ALPH", b"EXIF", b"XMP ", b"ICCP", b"vaEx", b"VP8L", b"VP8 ", b"ANIM", b"VP8X"))
    data = rng.choice((b"", b"", rng.randbytes(6), bytes(10)))
    position = rng.randrange(len(segments) + 1)
    segments[position:position] = [Segment(kind, data)] * rng.choice((*COUNTS, *MANY))


WEBP_CHANGES: list[Change] = [
    drop, repeat, swap, scramble, scramble, say_length, webp_canvas, webp_canvas, webp_frame, webp_frame, webp_sides,
    webp_sides, webp_alpha, webp_many,
]  # fmt: skip


def webp(rng: Random) -> bytes:
    segments = changed(rng, good_webp(rng), WEBP_CHANGES)
    chunks = b"".join(map(webp_chunk, segments))
    size = 4 + len(chunks)
    if rng.random() < 0.1:
        size = rng.choice((0, 4, size - 1, size + 1, size // 2, 2**31, 2**32 - 1)) % 2**32
    return cut(rng, b"RIFF" + struct.pack("<I", size) + b"WEBP" + chunks)


def webp_chunk(segment: Segment) -> bytes:
    length = len(segment.data) if segment.length is None else segment.length
    return segment.kind + struct.pack("<I", length) + segment.data + bytes(len(segment.data) % 2)


IMAGES: dict[str, Callable[[Random], bytes]] = {"file: PNG": png, "file: JPEG": jpeg, "file: WebP": webp}
