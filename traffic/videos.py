"""MP4 files with a changed structure: sizes, counts, values, order and copies of their boxes.

`mp4` takes a random generator and returns a good file with one to three changes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from random import Random

from traffic import mp4_files
from traffic.images import COUNTS, cut, number, scrambled
from traffic.mp4_files import CONTAINERS, make_frames, video

TABLES = (b"stts", b"ctts", b"stsc", b"stsz", b"stco", b"stss")
MATRICES = (
    (1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0),
    (0, -1, -1, 0), (0, 0, 0, 0), (0.7, 0.7, -0.7, 0.7), (2, 0, 0, 2), (1, 0, 0, 0), (30_000, 0, 0, -30_000),
)  # fmt: skip
"""Display matrices: the eight orientations, and others."""
TYPES = (b"moov", b"trak", b"mdat", b"moof", b"free", b"skip", b"stsd", b"cmov", b"uuid", b"meta", b"sidx", b"\0\0\0\0")


@dataclass
class Node:
    """A box with a content or with boxes. A box without a type is a file, which has no header."""

    kind: bytes
    content: bytes = b""
    boxes: list[Node] = field(default_factory=list)
    size: int | None = None
    """Size that the file declares; None for the correct one."""
    is_wide: bool = False
    """True if its size has 64 bits."""

    def wire(self) -> bytes:
        content = self.content + b"".join(box.wire() for box in self.boxes)
        if not self.kind:
            return content
        size = len(content) + (16 if self.is_wide else 8) if self.size is None else self.size
        if self.is_wide:
            return struct.pack(">I4sQ", 1, self.kind, size) + content
        return struct.pack(">I4s", size % 2**32, self.kind) + content

    def copy(self) -> Node:
        return Node(self.kind, self.content, [box.copy() for box in self.boxes], self.size, self.is_wide)

    def all(self) -> Iterator[Node]:
        """Yield the box and its boxes, on all levels."""
        yield self
        for box in self.boxes:
            yield from box.all()


def tree(file: bytes, kind: bytes = b"") -> Node:
    """Return a file, or a box with this content, as a tree of boxes."""
    if kind and kind not in CONTAINERS:
        return Node(kind, file)
    return Node(kind, b"", [tree(content, inner) for inner, content in mp4_files.boxes(file)])


@cache
def good(name: str) -> bytes:
    frames = make_frames(9)
    if name == "cut":
        return mp4_files.with_edits(video(make_frames(24), g="6"), (400, 512 * 7))
    if name == "fragments":
        return video(frames, flags="frag_keyframe+empty_moov+default_base_moof", g="3")
    return {
        "plain": lambda: video(frames),
        "B-frames": lambda: video(frames, bf="3"),
        "sound": lambda: video(frames, sound=2),
        "MPEG-4": lambda: video(frames, codec="mpeg4"),
        "turned": lambda: mp4_files.with_matrix(video(frames), 0, 1, -1, 0),
    }[name]()


GOOD = ("plain", "B-frames", "cut", "fragments", "sound", "MPEG-4", "turned")

Change = Callable[[Random, Node], None]
"""A change of a file, which is the box around its boxes."""


def some(rng: Random, file: Node, *kinds: bytes) -> Node | None:
    """Choose a box of one of these kinds, or of any kind."""
    choices = [box for box in file.all() if box is not file and (not kinds or box.kind in kinds)]
    return rng.choice(choices) if choices else None


def parent(rng: Random, file: Node) -> Node:
    """Choose a box that contains boxes."""
    return rng.choice([box for box in file.all() if box.boxes] or [file])


def fields(rng: Random, content: bytes, start: int, maximum: int = 3) -> bytes:
    """Change the values of some fields of 4 bytes in a content, from `start` on."""
    edited = bytearray(content)
    offsets = range(start, len(edited) - 3, 4)
    for _ in range(rng.randint(1, maximum)):
        if offsets:
            at = rng.choice(offsets)
            near = int.from_bytes(edited[at : at + 4]) + rng.choice((-1, 1, 2))
            edited[at : at + 4] = (rng.choice((number(rng, 4), near)) % 2**32).to_bytes(4)
    return bytes(edited)


def matrix(rng: Random, file: Node) -> None:
    if (box := some(rng, file, b"tkhd", b"mvhd")) and len(box.content) >= 76:
        a, b, c, d = (round(value * 65_536) for value in rng.choice(MATRICES))
        box.content = box.content[:40] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + box.content[76:]


def header(rng: Random, file: Node) -> None:
    """Change values in the header of the movie, the track, its media or a fragment."""
    if box := some(rng, file, b"tkhd", b"mvhd", b"mdhd", b"hdlr", b"mfhd", b"tfhd", b"tfdt", b"trex", b"ftyp"):
        box.content = fields(rng, box.content, 0)


def description(rng: Random, file: Node) -> None:
    """Change the size, the number of entries, the codec or its configuration in the sample description."""
    box = some(rng, file, b"stsd")
    if box is None or len(box.content) < 100:
        return
    start, entry = box.content[:8], box.content[8:]
    change = rng.randrange(6)
    if change == 0:
        sides = rng.choices((0, 1, 15, 16, 32, 64, 128, 1920, 4096, 11_313, 32_768, 65_535), k=2)
        entry = entry[:32] + struct.pack(">HH", *sides) + entry[36:]
    elif change == 1:
        start = start[:4] + number(rng, 4).to_bytes(4)
    elif change == 2:
        kinds = (b"avc1", b"avc3", b"hvc1", b"mp4v", b"av01", b"vp09", b"jpeg", b"encv", b"tx3g", b"\0\0\0\0", b"raw ")
        entry = entry[:4] + rng.choice(kinds) + entry[8:]
    elif change == 3:
        copies = rng.choice((2, 3, 100, 2000))
        start, entry = start[:4] + copies.to_bytes(4), entry * copies
    elif change == 4:
        entry = entry[:86] + scrambled(rng, entry[86:], 8)
    else:
        entry = fields(rng, entry, 0, 1)
    box.content = start + entry


def count(rng: Random, file: Node) -> None:
    """Change the declared number of entries of a table."""
    if box := some(rng, file, *TABLES, b"elst", b"trun"):
        at = 8 if box.kind == b"stsz" else 4
        right = int.from_bytes(box.content[at : at + 4])
        said = rng.choice((0, 1, right - 1, right + 1, 1000, 26_000, 99_999, 100_001, 2**24, 2**28, 2**31, 2**32 - 1))
        box.content = box.content[:at] + (said % 2**32).to_bytes(4) + box.content[at + 4 :]


def values(rng: Random, file: Node) -> None:
    """Change values in the entries of a table."""
    if box := some(rng, file, *TABLES, b"trun"):
        box.content = fields(rng, box.content, 8)


def samples(rng: Random, file: Node) -> None:
    """Write tables of a few bytes that describe many samples."""
    many = rng.choice((100, 5000, 25_700, 99_999, 1_000_000, 2**32 - 1))
    crafted = {b"stsz": (rng.choice((0, 1, 10, 2**31)), many), b"stts": (1, many, rng.choice((0, 1, 512, 2**31))),
               b"stsc": (1, 1, many, 1), b"ctts": (1, many, rng.choice((0, 1, 2**31)))}  # fmt: skip
    for box in file.all():
        if box.kind in crafted and rng.random() < 0.8:
            box.content = bytes(4) + b"".join(value.to_bytes(4) for value in crafted[box.kind])


def edits(rng: Random, file: Node) -> None:
    """Write an edit list of another length, with other durations, starts or rates, or with 64 bits."""
    tracks = [box for box in file.all() if box.kind == b"trak"]
    if not tracks:
        return
    version = rng.choice((0, 0, 0, 1, 2))
    durations, starts = (0, 1, 40, 375, 10_000, 2**31, 2**32 - 1), (0, 1, 512, 1024, 4608, 2**31 - 1, 2**32 - 1)
    entries = b""
    copies = rng.choice((1, 1, 2, 3, 10, 500, 4000))
    for _ in range(copies):
        rate = rng.choice((0x10000, 0x10000, 0x10000, 0, 0x20000, 0xFFFF0000))
        form = ">QQI" if version == 1 else ">III"
        entries += struct.pack(form, rng.choice(durations), rng.choice(starts), rate)
    said = rng.choice((copies, copies, copies, 0, copies + 1, 2**32 - 1))
    track = rng.choice(tracks)
    track.boxes = [box for box in track.boxes if box.kind != b"edts"]
    elst = Node(b"elst", bytes((version, 0, 0, 0)) + said.to_bytes(4) + entries)
    track.boxes.insert(rng.randrange(len(track.boxes) + 1), Node(b"edts", b"", [elst]))


def fragment(rng: Random, file: Node) -> None:
    """Append one or many fragments of samples without bytes."""
    moofs, tracks, runs = rng.choice(((1, 1, 1), (2, 1, 1), (200, 1, 1), (1, 50, 1), (1, 1, 100), (5, 5, 5)))
    run = Node(b"trun", rng.choice((b"\0\0\0\0", b"\0\0\2\0", b"\1\0\x0f\1")) + number(rng, 4).to_bytes(4) + bytes(40))
    defaults = struct.pack(">4I", rng.choice((1, 1, 2, 0)), 512, rng.choice((0, 1, 1000, 2**31)), 0)
    track = Node(b"traf", b"", [Node(b"tfhd", b"\0\2\0\x38" + defaults), *[run] * runs])
    moof = Node(b"moof", b"", [Node(b"mfhd", bytes(8)), *[track] * tracks])
    for _ in range(moofs):
        file.boxes += [moof, Node(b"mdat", b"\0")]
    movie = some(rng, file, b"moov")
    if movie and rng.random() < 0.5:
        movie.boxes.append(Node(b"mvex", b"", [Node(b"trex", struct.pack(">6I", 0, 1, 1, 512, 1, 0))]))


def say_size(rng: Random, file: Node) -> None:
    if box := some(rng, file):
        right = len(box.wire())
        box.is_wide = rng.random() < 0.3
        if rng.random() < 0.9:
            sizes = (2**31, 2**32 - 1) + ((2**40, 2**63 - 1, 2**63, 2**64 - 1) if box.is_wide else ())
            box.size = rng.choice((0, 1, 2, 7, 8, 9, 15, 16, right - 1, right + 1, right + 8, *sizes))


def retype(rng: Random, file: Node) -> None:
    if box := some(rng, file):
        box.kind = rng.choice((*TYPES, *TABLES))


def drop(rng: Random, file: Node) -> None:
    box = parent(rng, file)
    if box.boxes:
        del box.boxes[rng.randrange(len(box.boxes))]


def repeat(rng: Random, file: Node) -> None:
    box = parent(rng, file)
    if box.boxes:
        position = rng.randrange(len(box.boxes))
        copies = rng.choice(COUNTS) if len(box.boxes[position].wire()) < 5000 else 2
        box.boxes[position:position] = [box.boxes[position].copy()] * copies


def swap(rng: Random, file: Node) -> None:
    box = parent(rng, file)
    rng.shuffle(box.boxes)


def move(rng: Random, file: Node) -> None:
    """Copy a box into another box."""
    if (box := some(rng, file)) and box.kind != b"mdat":
        target = parent(rng, file)
        target.boxes.insert(rng.randrange(len(target.boxes) + 1), box.copy())


def nest(rng: Random, file: Node) -> None:
    """Insert nested boxes, or many empty ones."""
    kind, depth = rng.choice((b"moov", b"trak", b"moof", b"udta", b"meta", b"free")), rng.choice((2, 50, 800))
    content = b""
    for _ in range(depth):
        content = struct.pack(">I4s", 8 + len(content), kind) + content
    target = parent(rng, file)
    at = rng.randrange(len(target.boxes) + 1)
    if rng.random() < 0.5:
        target.boxes.insert(at, Node(kind, content))
    else:
        target.boxes.insert(at, Node(b"free", b"", [Node(kind)] * rng.choice((10, 3000, 99_000, 101_000))))
        if rng.random() < 0.5:
            target.boxes[at : at + 1] = target.boxes[at].boxes


def scramble(rng: Random, file: Node) -> None:
    """Change bytes outside the frames."""
    boxes = [box for box in file.all() if box.content and box.kind != b"mdat"]
    if boxes:
        box = rng.choice(boxes)
        box.content = scrambled(rng, box.content)


compressed_header = cache(mp4_files.compressed_header)


def compressed(rng: Random, file: Node) -> None:
    """Insert a compressed header."""
    crafted = tree(compressed_header(rng.choice((1000, 50_000_000))))
    moov = next(box for box in crafted.boxes if box.kind == b"moov")
    file.boxes.insert(rng.randrange(len(file.boxes) + 1), moov)


CHANGES: list[Change] = [
    matrix, header, header, description, description, count, count, values, values, samples, edits, edits, fragment,
    say_size, say_size, retype, drop, repeat, swap, move, nest, scramble, compressed,
]  # fmt: skip


def mp4(rng: Random) -> bytes:
    file = tree(good(rng.choice(GOOD)))
    for _ in range(rng.choice((1, 1, 2, 3))):
        rng.choice(CHANGES)(rng, file)
    return cut(rng, file.wire())


VIDEOS: dict[str, Callable[[Random], bytes]] = {"file: MP4": mp4}
