"""Reading of MP4 files: their frames as images.

FFmpeg believes the tables of a file, and 12 bytes of a table may describe a billion samples. So the boxes of a file are
walked and counted first. FFmpeg sees only the boxes of the first video track. It decodes in a separate process
(frames.py), with little more memory than a video of this size needs.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from signal import SIGKILL, Signals
from subprocess import PIPE, Popen
from threading import Timer
from typing import IO, NamedTuple

from PIL import Image

from handlers.serving.errors import RequestError
from handlers.serving.limits import Limits
from handlers.serving.media import frames
from handlers.serving.media.request import Body

MAX_BOXES = 100_000
"""Boxes of a file. A fragmented file has about ten per fragment."""

MAX_EDITED_SAMPLES = 1_000_000
"""Edits of a track times its samples. FFmpeg makes a list of the samples of each edit."""

VISIBLE: dict[bytes, tuple[bytes, ...]] = {
    b"": (b"ftyp", b"moov", b"moof", b"mdat"),
    b"moov": (b"mvhd", b"trak", b"mvex"),
    b"trak": (b"tkhd", b"edts", b"mdia"),
    b"edts": (b"elst",),
    b"mdia": (b"mdhd", b"hdlr", b"minf"),
    b"minf": (b"stbl",),
    b"stbl": (
        *(b"stsd", b"stts", b"ctts", b"stsc", b"stsz", b"stz2", b"stco", b"co64"),
        *(b"stss", b"stps", b"sgpd", b"sbgp"),
    ),
    b"mvex": (b"trex",),
    b"moof": (b"traf",),
    b"traf": (b"tfhd", b"tfdt", b"trun"),
}
"""Boxes that FFmpeg sees, by the box around them. All others are hidden with their content: sound, subtitles, chapters,
covers, indices, encryption, compressed headers, references to other files."""

HIDDEN = b"skip"
"""Type of a box that every reader ignores. (FFmpeg looks into `free`.)"""

TABLES = (b"stts", b"ctts", b"stsc", b"stco", b"co64", b"stss", b"stps")
"""Tables that begin with their number of entries, which is at most the number of samples."""

BASE_MEMORY = 160_000_000
"""Bytes of the decoding process without its frames: Python, FFmpeg, stacks of threads, tables, packets."""
PIXEL_MEMORY = 160
"""Bytes per pixel of a frame: the 17 frames that H.264 may keep, in its largest format (10 bits, 4:4:4), their motion
vectors, and two frames in RGB."""
MIN_FRAME_MEMORY = 64_000_000
"""Bytes for the frames, at least."""

IMAGE_BYTES = 4
"""Bytes per pixel of an RGB image in Pillow."""

ENVIRONMENT = ("PATH", "HOME", "PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH")
"""Variables of the decoding process, which needs them to find its libraries."""

TRANSPOSITIONS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # Pillow rotates counterclockwise
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""Operations that turn a frame upright, by the images of its x axis and y axis (y points down)."""
MAX_SKEW = math.sin(math.radians(1))
"""Error of an axis, as a share of its length. Some editors write an angle of 89.99 degrees."""


def read_video(body: Body, limits: Limits, reserve: Callable[[int], None] = lambda size: None) -> list[Image.Image]:
    """Read the frames of an MP4 file's first video track, upright and in the order of display.

    `reserve` is called with the bytes of the decoding process's copy of the file, and with those of each frame before
    it is kept. It may raise `RequestError`.

    Raises:
        RequestError: the file is broken, has no video in a supported codec, or exceeds `limits`.
    """
    track = find_video(body, limits)
    limits.check_image(track.width, track.height)
    reserve(len(body))
    images: list[Image.Image] = []
    with _decoder(body, track, limits) as output:
        while len(header := output.read(frames.HEADER.size)) == frames.HEADER.size:
            width, height, row, *matrix = frames.HEADER.unpack(header)
            limits.check_image(width, height, len(images) + 1)
            reserve(width * height * IMAGE_BYTES)
            rows = output.read(row * height)
            if len(rows) < row * height:
                break
            image, transposition = Image.frombytes("RGB", (width, height), rows, "raw", "RGB", row), upright(matrix)
            images.append(image if transposition is None else image.transpose(transposition))
            if images[-1].size != images[0].size:
                raise RequestError("the video's frames differ in size; send frames of one size")
    if not images:
        raise RequestError("the video has no frames; send an MP4 file with a video stream")
    return images


def upright(matrix: Sequence[int]) -> Image.Transpose | None:
    """Return the operation that turns a frame with this display matrix upright.

    None for a matrix that is no rotation by 90 degrees and no mirror.
    """
    axes: list[int] = []
    for axis in (matrix[0:2], matrix[3:5]):
        length = math.hypot(*axis)
        values = [value / length if length else 0 for value in axis]
        axes += [round(value) for value in values if abs(value - round(value)) <= MAX_SKEW]
    return TRANSPOSITIONS.get(tuple(axes))  # type: ignore[arg-type]


@contextmanager
def _decoder(body: Body, track: Track, limits: Limits) -> Iterator[IO[bytes]]:
    """Run frames.py on a file and yield its output. Raise its error at the end of the block."""
    needed = max(PIXEL_MEMORY * track.width * track.height, MIN_FRAME_MEMORY)
    memory = min(needed, max(int(limits.max_in_flight_mb * 1e6), MIN_FRAME_MEMORY))
    command = [sys.executable, "-P", frames.__file__, str(len(body)), str(BASE_MEMORY + len(body) + memory)]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}  # without any token
    process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    timer = Timer(limits.timeout, process.kill)
    timer.daemon = True
    with process:
        try:
            timer.start()
            with suppress(BrokenPipeError), process.stdin as file:  # if it has ended, it says below why
                for data in track.visible_bytes(body):
                    file.write(data)
            yield process.stdout
            reason = process.stderr.read().decode("utf-8", "replace").strip()
            status, is_late = process.wait(), timer.finished.is_set()
        finally:
            timer.cancel()
            process.kill()
    if is_late:
        raise RequestError(f"the video takes longer to decode than {limits.timeout:g} s (VAE_TIMEOUT)", 504)
    if status == frames.UNREADABLE and memory < needed:
        reason += f", or its frames take more than the {limits.max_in_flight_mb:g} MB of VAE_MAX_IN_FLIGHT_MB"
    _check_status(status, reason)


def _check_status(status: int, reason: str) -> None:
    """Raise the error of a decoding process that ended with this exit status."""
    if status == 0:
        return
    if status == frames.OTHER_CODEC:
        raise RequestError(reason, 415)
    if status == -SIGKILL:
        raise RequestError("the system has no free memory to decode the video; try again soon", 503)
    if status < 0:
        reason = f"the decoder crashes, {Signals(-status).name}"
    elif status not in (frames.UNREADABLE, frames.REFUSED):
        raise RuntimeError(reason)
    raise RequestError(f"the video cannot be read ({reason}); send an MP4 file with a video stream")


@dataclass
class Track:
    """The video track of a file, and the boxes of the file that FFmpeg must not see."""

    width: int
    height: int
    """Pixels, by the sample description."""
    hidden: list[int]
    """Positions of the types of hidden boxes."""

    def visible_bytes(self, body: Body) -> Iterator[memoryview]:
        """Yield the bytes of the file, with the type of hidden boxes replaced."""
        file, start = memoryview(body), 0
        for position in sorted(set(self.hidden)):
            yield file[start:position]
            yield memoryview(HIDDEN)
            start = position + 4
        yield file[start:]


def find_video(body: Body, limits: Limits) -> Track:
    """Walk the boxes of a file down to the tables of its first video track, and hide all others.

    Raises:
        RequestError: the file has no video track, or its tables would cost FFmpeg too much memory or time.
    """
    boxes = _Boxes(body)
    root = list(boxes.visible(Box(b"", 0, 0, len(body))))
    movies = [box for box in root if box.kind == b"moov"]
    if not movies:
        raise RequestError("the video cannot be read: the file has no `moov` box; send the whole MP4 file")
    boxes.hide(*movies[1:])
    tracks = [box for box in boxes.visible(movies[0]) if box.kind == b"trak"]
    track = next((track for track in tracks if boxes.is_video(track)), None)
    if track is None:
        raise RequestError("the file has no video; send an MP4 file with a video stream")
    boxes.hide(*(other for other in tracks if other is not track))
    tables = list(boxes.tree(track))
    tables += boxes.fragment_tables(root, boxes.track_id(tables))
    boxes.check_tables(tables, limits)
    return Track(*boxes.size(tables), boxes.hidden)


class Box(NamedTuple):
    """A box of a file. `content` is the position after its header."""

    kind: bytes
    start: int
    content: int
    end: int


class _Boxes:
    """Boxes of a file, found like FFmpeg finds them: each box, then the boxes inside it."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.hidden: list[int] = []
        """Positions of the types of hidden boxes."""
        self.count = 0

    def visible(self, parent: Box) -> Iterator[Box]:
        """Yield the visible boxes in a box, and hide the others."""
        for box in self._inside(parent):
            if box.kind in VISIBLE.get(parent.kind, ()):
                yield box
            else:
                self.hide(box)

    def tree(self, parent: Box) -> Iterator[Box]:
        """Yield the visible boxes in a box, on all levels, and hide the others."""
        for box in self.visible(parent):
            yield box
            if box.kind in VISIBLE:
                yield from self.tree(box)

    def hide(self, *boxes: Box) -> None:
        """Hide boxes from FFmpeg."""
        self.hidden += [box.start + 4 for box in boxes]

    def is_video(self, track: Box) -> bool:
        """Return whether the handler of a track is that of videos."""
        media = [inner for box in self._inside(track) if box.kind == b"mdia" for inner in self._inside(box)]
        return any(box.kind == b"hdlr" and self.body[box.content + 8 : box.content + 12] == b"vide" for box in media)

    def track_id(self, boxes: list[Box]) -> int | None:
        """Return the id of a track, or of a fragment's track, from its header."""
        for box in boxes:
            if box.kind == b"tkhd":
                return self._value(box.content + (20 if self._value(box.content, 1) else 12))
            if box.kind == b"tfhd":
                return self._value(box.content + 4)
        return None

    def fragment_tables(self, root: list[Box], track_id: int | None) -> list[Box]:
        """Return the tables of a track's fragments, and hide the fragments of other tracks."""
        tables: list[Box] = []
        for fragment in [inner for box in root if box.kind == b"moof" for inner in self.visible(box)]:
            boxes = list(self.visible(fragment))
            if self.track_id(boxes) == track_id:
                tables += boxes
            else:
                self.hide(fragment)
        return tables

    def size(self, tables: list[Box]) -> tuple[int, int]:
        """Return width and height of the track's largest sample description."""
        descriptions = (b for box in tables if box.kind == b"stsd" for b in self._inside(box, 8))
        sizes = [(self._value(box.start + 32, 2), self._value(box.start + 34, 2)) for box in descriptions]
        return max(sizes, key=math.prod, default=(0, 0))

    def check_tables(self, tables: list[Box], limits: Limits) -> None:
        """Refuse tables with more samples than a video has, or edits that repeat too many of them; status 413."""
        limit = max(100 * limits.max_frames, 100_000)
        for box in tables:
            if box.kind in TABLES and (entries := self._value(box.content + 4)) > limit:
                name = box.kind.decode()
                raise RequestError(f"the video track has {entries} entries in its `{name}` table; at most {limit}", 413)
        samples, edits = sum(map(self._samples, tables)), sum(map(self._edits, tables))
        if samples > limit:
            raise RequestError(
                f"the video track has {samples} samples; at most {limit} are read, and at most {limits.max_frames} "
                "frames (VAE_MAX_FRAMES) are encoded; send only those frames",
                413,
            )
        if edits * samples > MAX_EDITED_SAMPLES and edits > 1:
            raise RequestError(
                f"the video track has {edits} edits of {samples} samples; at most {MAX_EDITED_SAMPLES // samples} "
                "edits of so many; export the edited video to a new file",
                413,
            )

    def _samples(self, table: Box) -> int:
        offset = {b"stsz": 8, b"stz2": 8, b"trun": 4}.get(table.kind)
        return 0 if offset is None else self._value(table.content + offset)

    def _edits(self, table: Box) -> int:
        size = 20 if self._value(table.content, 1) == 1 else 12
        return (table.end - table.content - 8) // size if table.kind == b"elst" else 0

    def _inside(self, parent: Box, start: int = 0) -> Iterator[Box]:
        """Yield the boxes in a box, from an offset after its header, up to the first broken one."""
        position = parent.content + start
        while position + 8 <= parent.end:
            self.count += 1
            if self.count > MAX_BOXES:
                raise RequestError(f"the MP4 file has more than {MAX_BOXES} boxes; send a file with fewer fragments")
            size, content = self._value(position), position + 8
            if size == 1:
                size, content = self._value(position + 8, 8), position + 16
            end = min(position + size, parent.end) if size else parent.end
            if end < content:
                return
            yield Box(bytes(self.body[position + 4 : position + 8]), position, content, end)
            position = end

    def _value(self, position: int, size: int = 4) -> int:
        return int.from_bytes(self.body[position : position + size])
