"""MP4 files to the frames of their video.

FFmpeg believes what a file says of itself, and takes memory and time for it: a table of 12 bytes may describe a
billion samples. So the boxes of the file are walked first. FFmpeg gets to see those of the first video track alone,
whose tables are counted, and decodes in a process of its own (frames.py) with little more memory than a video of this
size needs.
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

BOXES = 100_000
"""Boxes that are looked at, at most; a file in fragments has about ten for each."""

EDITED_SAMPLES = 1_000_000
"""Edits of a track times its samples, at most. FFmpeg makes a list of the samples of each edit."""

SEEN: dict[bytes, tuple[bytes, ...]] = {
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
"""The boxes that FFmpeg gets to see in each box. A box that is not named here is hidden, with all that is in it: sound,
subtitles, chapters, covers, indices, encryption, compressed headers, references to other files."""

HIDDEN = b"skip"
"""The type of a box that every reader passes over. (FFmpeg looks into `free`.)"""

TABLES = (b"stts", b"ctts", b"stsc", b"stco", b"co64", b"stss", b"stps")
"""Tables that begin with the number of their entries, which are no more than there are samples."""

BASE_MEMORY = 160_000_000
"""Bytes that the decoding process may take beside its frames: Python, FFmpeg, its threads' stacks, tables, packets."""
PIXEL_MEMORY = 160
"""Bytes for each pixel of a frame: the 17 frames that H.264 may keep, in the largest format that it has (10 bits,
4:4:4), their motion vectors, and two frames in RGB."""
SMALLEST_MEMORY = 64_000_000
"""Bytes for the frames, at least."""

IMAGE_BYTES = 4
"""Bytes that Pillow takes for a pixel of an RGB image."""

ENVIRONMENT = ("PATH", "HOME", "PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH")
"""Variables that the decoding process gets: what it needs to find its libraries."""

TURNS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # Pillow turns to the left
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
"""The eight orientations, by where a display matrix takes the x axis and the y axis of a frame (y points down)."""
SKEW = math.sin(math.radians(1))
"""How far off a quarter turn an axis may be, as a part of its length: some editors write an angle of 89.99 degrees."""


def read_video(body: Body, limits: Limits, hold: Callable[[int], None] = lambda size: None) -> list[Image.Image]:
    """Read the frames of an MP4 file's first video track, in the order and the orientation in which they are shown.

    `hold` is called with the bytes of the file, of which the decoding process has a copy, and with those of each frame
    before it is kept. It may raise `RequestError`.

    Raises:
        RequestError: the file is broken, holds no video of a codec that is taken, or more than `limits` allow.
    """
    track = find_video(body, limits)
    limits.check_image(track.width, track.height)
    hold(len(body))
    images: list[Image.Image] = []
    with _decoder(body, track, limits) as output:
        while len(header := output.read(frames.HEADER.size)) == frames.HEADER.size:
            width, height, row, *matrix = frames.HEADER.unpack(header)
            limits.check_image(width, height, len(images) + 1)
            hold(width * height * IMAGE_BYTES)
            rows = output.read(row * height)
            if len(rows) < row * height:
                break
            image, turn = Image.frombytes("RGB", (width, height), rows, "raw", "RGB", row), turn_of(matrix)
            images.append(image if turn is None else image.transpose(turn))
            if images[-1].size != images[0].size:
                raise RequestError("the video's frames are not all of one size")
    if not images:
        raise RequestError("the video holds no frames")
    return images


def turn_of(matrix: Sequence[int]) -> Image.Transpose | None:
    """Return how a frame with this display matrix is turned; None for a matrix that is no quarter turn or mirror."""
    axes: list[int] = []
    for axis in (matrix[0:2], matrix[3:5]):
        length = math.hypot(*axis)
        parts = [part / length if length else 0 for part in axis]
        axes += [round(part) for part in parts if abs(part - round(part)) <= SKEW]
    return TURNS.get(tuple(axes))  # type: ignore[arg-type]


@contextmanager
def _decoder(body: Body, track: Track, limits: Limits) -> Iterator[IO[bytes]]:
    """Run frames.py on a file and give its output. An error that it ends with is raised after the block."""
    needed = max(PIXEL_MEMORY * track.width * track.height, SMALLEST_MEMORY)
    memory = min(needed, max(int(limits.max_in_flight_mb * 1e6), SMALLEST_MEMORY))
    command = [sys.executable, "-P", frames.__file__, str(len(body)), str(BASE_MEMORY + len(body) + memory)]
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}  # no token is among them
    process = Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    timer = Timer(limits.timeout, process.kill)
    timer.daemon = True
    with process:
        try:
            timer.start()
            with suppress(BrokenPipeError), process.stdin as file:  # it may have ended, and says below why
                for piece in track.pieces(body):
                    file.write(piece)
            yield process.stdout
            reason = process.stderr.read().decode("utf-8", "replace").strip()
            status, is_late = process.wait(), timer.finished.is_set()
        finally:
            timer.cancel()
            process.kill()
    if is_late:
        raise RequestError(f"the video takes longer to decode than {limits.timeout:g} s (VAE_TIMEOUT)", 504)
    if status == frames.OTHER_CODEC:
        raise RequestError(reason, 415)
    if status == -SIGKILL:
        raise RequestError("the system has no memory free to decode the video; try again soon", 503)
    if status < 0:
        reason = f"the decoder crashes, {Signals(-status).name}"
    elif status not in (0, frames.UNREADABLE, frames.REFUSED):
        raise RuntimeError(reason)
    if status == frames.UNREADABLE and memory < needed:
        reason += f", or its frames take more than the {limits.max_in_flight_mb:g} MB of VAE_MAX_IN_FLIGHT_MB"
    if status:
        raise RequestError(f"the video cannot be read ({reason}); send an MP4 file with a video stream")


@dataclass
class Track:
    """The video track of a file, and what of the file is not for FFmpeg."""

    width: int
    height: int
    """Pixels, by the sample description."""
    hidden: list[int]
    """Where the types of hidden boxes are."""

    def pieces(self, body: Body) -> Iterator[memoryview]:
        """Yield the file, with another type for the boxes that are hidden."""
        file, start = memoryview(body), 0
        for place in sorted(set(self.hidden)):
            yield file[start:place]
            yield memoryview(HIDDEN)
            start = place + 4
        yield file[start:]


def find_video(body: Body, limits: Limits) -> Track:
    """Walk the boxes of a file down to the tables of its first video track.

    Raises:
        RequestError: there is none, or its tables would take FFmpeg too much memory or time.
    """
    boxes = _Boxes(body)
    root = list(boxes.seen(Box(b"", 0, 0, len(body))))
    movies = [box for box in root if box.kind == b"moov"]
    if not movies:
        raise RequestError("the video cannot be read: the file has no `moov` box; send the whole MP4 file")
    boxes.hide(*movies[1:])
    tracks = [box for box in boxes.seen(movies[0]) if box.kind == b"trak"]
    track = next((track for track in tracks if boxes.is_video(track)), None)
    if track is None:
        raise RequestError("the file holds no video; send an MP4 file with a video stream")
    boxes.hide(*(other for other in tracks if other is not track))
    tables = list(boxes.tree(track))
    number = boxes.track_number(tables)
    for fragment in [part for box in root if box.kind == b"moof" for part in boxes.seen(box)]:
        parts = list(boxes.seen(fragment))
        if boxes.track_number(parts) == number:
            tables += parts
        else:
            boxes.hide(fragment)
    boxes.check(tables, limits)
    return Track(*boxes.size(tables), boxes.hidden)


class Box(NamedTuple):
    kind: bytes
    start: int
    content: int
    """Where its header ends."""
    end: int


class _Boxes:
    """The boxes of a file, found as FFmpeg finds them: the child boxes of one box after the other."""

    def __init__(self, body: Body) -> None:
        self.body = body
        self.hidden: list[int] = []
        """Where the types of hidden boxes are."""
        self.walked = 0

    def seen(self, parent: Box) -> Iterator[Box]:
        """Yield the boxes in a box that FFmpeg is to see, and hide the others."""
        for box in self._inside(parent):
            if box.kind in SEEN.get(parent.kind, ()):
                yield box
            else:
                self.hide(box)

    def tree(self, parent: Box) -> Iterator[Box]:
        """Yield the boxes in a box that FFmpeg is to see, on all levels, and hide the others."""
        for box in self.seen(parent):
            yield box
            if box.kind in SEEN:
                yield from self.tree(box)

    def hide(self, *boxes: Box) -> None:
        """Have FFmpeg pass over these boxes."""
        self.hidden += [box.start + 4 for box in boxes]

    def is_video(self, track: Box) -> bool:
        """Whether the handler of a track is that of videos."""
        media = [part for box in self._inside(track) if box.kind == b"mdia" for part in self._inside(box)]
        return any(box.kind == b"hdlr" and self.body[box.content + 8 : box.content + 12] == b"vide" for box in media)

    def track_number(self, boxes: list[Box]) -> int | None:
        """Return the number of a track, or of the track that a fragment belongs to, by its header."""
        for box in boxes:
            if box.kind == b"tkhd":
                return self._value(box.content + (20 if self._value(box.content, 1) else 12))
            if box.kind == b"tfhd":
                return self._value(box.content + 4)
        return None

    def size(self, tables: list[Box]) -> tuple[int, int]:
        """Return width and height of the track's largest sample description."""
        descriptions = (b for box in tables if box.kind == b"stsd" for b in self._inside(box, 8))
        sizes = [(self._value(box.start + 32, 2), self._value(box.start + 34, 2)) for box in descriptions]
        return max(sizes, key=math.prod, default=(0, 0))

    def check(self, tables: list[Box], limits: Limits) -> None:
        """Refuse tables that describe more samples than a video has, or edits that repeat too many of them."""
        most = max(100 * limits.max_frames, 100_000)
        samples = edits = 0
        for box in tables:
            if box.kind in (b"stsz", b"stz2"):
                samples += self._value(box.content + 8)
            elif box.kind == b"trun":
                samples += self._value(box.content + 4)
            elif box.kind == b"elst":
                edits += (box.end - box.content - 8) // (20 if self._value(box.content, 1) == 1 else 12)
            elif box.kind in TABLES and (entries := self._value(box.content + 4)) > most:
                name = box.kind.decode()
                raise RequestError(f"the video track has {entries} entries in its `{name}` table; at most {most}", 413)
        if samples > most:
            raise RequestError(
                f"a track of {samples} samples; at most {limits.max_frames} frames (VAE_MAX_FRAMES) are encoded, and "
                f"{most} samples are looked at; send the frames alone",
                413,
            )
        if edits * samples > EDITED_SAMPLES and edits > 1:
            raise RequestError(
                f"the video track has {edits} edits of {samples} samples; at most {EDITED_SAMPLES // samples} edits of "
                "so many; export the edited video to a new file",
                413,
            )

    def _inside(self, parent: Box, start: int = 0) -> Iterator[Box]:
        """Yield the boxes in a box, from so many bytes after its header on, up to the first that is broken."""
        place = parent.content + start
        while place + 8 <= parent.end:
            self.walked += 1
            if self.walked > BOXES:
                raise RequestError(f"the MP4 file has more than {BOXES} boxes; send a file with fewer fragments")
            size, content = self._value(place), place + 8
            if size == 1:
                size, content = self._value(place + 8, 8), place + 16
            end = min(place + size, parent.end) if size else parent.end
            if end < content:
                return
            yield Box(bytes(self.body[place + 4 : place + 8]), place, content, end)
            place = end

    def _value(self, place: int, size: int = 4) -> int:
        return int.from_bytes(self.body[place : place + size])
