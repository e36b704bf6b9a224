"""MP4 files for tests: real ones, encoded by PyAV, and crafted ones with false fields in their boxes.

An MP4 file is a sequence of boxes: a size (4 bytes, its own 8 included), a type (4 letters) and a content, which may be
more boxes. `change(file, "moov/trak/tkhd", edit)` replaces the content of a box with the result of `edit`.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import av
import numpy as np
from av.bitstream import BitStreamFilterContext

CONTAINERS = (b"moov", b"trak", b"edts", b"mdia", b"minf", b"stbl", b"mvex", b"moof", b"traf", b"udta")


def box(kind: str, *contents: bytes) -> bytes:
    """Return a box."""
    content = b"".join(contents)
    return struct.pack(">I4s", 8 + len(content), kind.encode("latin-1")) + content


def table(kind: str, *fields: int, version: int = 0) -> bytes:
    """Return a box with a version, flags and fields of 4 bytes."""
    return box(kind, bytes([version, 0, 0, 0]), *(struct.pack(">I", field) for field in fields))


def boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield type and content of each box in `content`."""
    offset = 0
    while offset < len(content):
        size, kind = struct.unpack_from(">I4s", content, offset)
        yield kind, content[offset + 8 : offset + size]
        offset += size


def change(file: bytes, path: str, edit: Callable[[bytes], bytes]) -> bytes:
    """Replace the content of the first box at a path.

    The boxes after it move, so `mdat` must come before it.
    """
    name, _, inner_path = path.partition("/")
    changed, is_changed = [], False
    for kind, content in boxes(file):
        if kind == name.encode() and not is_changed:
            is_changed, content = True, change(content, inner_path, edit) if inner_path else edit(content)
        changed.append(box(kind.decode("latin-1"), content))
    assert is_changed, path
    return b"".join(changed)


def add(file: bytes, path: str, *more: bytes) -> bytes:
    """Append boxes to the content of a box."""
    return change(file, path, lambda content: content + b"".join(more))


def make_frames(count: int, width: int = 64, height: int = 32) -> np.ndarray:
    """Return uint8 [count, height, width, 3]. All frames differ, and no frame equals itself rotated or mirrored.

    The top left quarter is red, an eighth beside it green, and the brightness tells the number of the frame.
    """
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = np.linspace(40, 200, count, dtype=np.uint8)[:, None, None, None]
    frames[:, : height // 2, : width // 2] = (250, 0, 0)
    frames[:, : height // 2, width // 2 : 3 * width // 4] = (0, 250, 0)
    return frames


def video(
    frames: np.ndarray,
    sound: int = 0,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    audio_codec: str = "aac",
    flags: str = "",
    **options: str,
) -> bytes:
    """Encode frames to an MP4 file at 24 frames a second, with `sound` tracks of 3 s of silence."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": flags} if flags else {}) as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        tracks = [container.add_stream(audio_codec, rate=48_000, layout="mono") for _ in range(sound)]
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for track in tracks:
            form, dtype = ("fltp", np.float32) if audio_codec == "aac" else ("s16", np.int16)
            for start in range(0, 144_000, 1_000):
                silence = av.AudioFrame.from_ndarray(np.zeros((1, 1_000), dtype), format=form, layout="mono")
                silence.sample_rate, silence.pts = 48_000, start
                container.mux(track.encode(silence))
            container.mux(track.encode(None))
    return buffer.getvalue()


def with_matrix(file: bytes, *matrix: float) -> bytes:
    """Set a, b, c, d of the display matrix in the track header, as 16.16 fixed point."""
    a, b, c, d = (round(value * 65536) for value in matrix)
    values = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return change(file, "moov/trak/tkhd", lambda header: header[:40] + values + header[76:])


def with_edits(file: bytes, *edits: tuple[int, int]) -> bytes:
    """Set the edit list. Each edit is a duration in 1/1000 s and a start in units of the track's time."""
    fields = [field for duration, start in edits for field in (duration, start & 0xFFFFFFFF, 0x10000)]
    return change(file, "moov/trak/edts", lambda _: table("elst", len(edits), *fields))


def with_samples(file: bytes, count: int) -> bytes:
    """Declare `count` samples of one size in one chunk."""
    for name, edited in {
        "stsz": table("stsz", 10, count),
        "stts": table("stts", 1, count, 512),
        "stsc": table("stsc", 1, 1, count, 1),
    }.items():
        file = change(file, f"moov/trak/mdia/minf/stbl/{name}", lambda _, edited=edited: edited[8:])
    return change(file, "moov/trak/mdia/minf/stbl", lambda tables: _without(tables, b"ctts", b"stss"))


def with_fragment(file: bytes, count: int) -> bytes:
    """Append a fragment to a fragmented file. Its `trun` declares `count` samples without a byte for each."""
    header = box("tfhd", b"\0\2\0\x38", struct.pack(">4I", 1, 512, 1, 0))  # defaults: duration, size, flags
    run = table("trun", count)
    return file + box("moof", table("mfhd", 9), box("traf", header, run)) + box("mdat", b"\0")


def cropped(file: bytes, width: int, height: int) -> bytes:
    """Crop the H.264 frames in their metadata. Their coded size stays."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(file)) as source, av.open(buffer, "w", format="mp4") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        right, bottom = stream.width - width, stream.height - height
        crop = BitStreamFilterContext(f"h264_metadata=crop_right={right}:crop_bottom={bottom}", stream, copy)
        for packet in source.demux(stream):
            for copied in crop.filter(packet) if packet.dts is not None else ():
                copied.stream = copy
                target.mux(copied)
    sizes = struct.pack(">HH", width, height)
    return change(
        buffer.getvalue(),
        "moov/trak/mdia/minf/stbl/stsd",
        lambda content: content[: 8 + 32] + sizes + content[8 + 36 :],
    )


def compressed_header(size: int) -> bytes:
    """Return a file with a compressed header, which contains `size` zero bytes."""
    data = struct.pack(">I", size) + zlib.compress(b"\0" * size, 9)
    header = box("cmov", box("dcom", b"zlib"), box("cmvd", data))
    return box("ftyp", b"isom\0\0\0\0") + box("moov", header) + box("mdat", b"\0")


def _without(content: bytes, *kinds: bytes) -> bytes:
    return b"".join(box(kind.decode(), data) for kind, data in boxes(content) if kind not in kinds)
