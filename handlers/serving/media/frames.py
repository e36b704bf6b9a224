"""The frames of an MP4 file, decoded in a process of its own: `python frames.py <bytes of the file> <bytes of memory>`.

A crafted file may have a decoder take any memory and any time, or crash it; here it ends this process alone. The file
comes on standard input. Each frame goes to standard output as a `HEADER` and its RGB rows. When a frame cannot be
decoded, the reason goes to standard error, and the exit status says what kind it is.

The module imports nothing of the service, so that the process starts quickly.
"""

from __future__ import annotations

import io
import os
import random
import resource
import struct
import sys
from contextlib import suppress
from typing import Any

import av
from av.video.reformatter import VideoReformatter

HEADER = struct.Struct("=3I9i")
"""Of a frame: its width, its height, the bytes of a row (at least 3 for each pixel), and its display matrix."""
UPRIGHT = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
"""The display matrix of a frame that is shown as it is stored."""

UNREADABLE, REFUSED, OTHER_CODEC = 3, 4, 5
"""Exit statuses: FFmpeg or the limit of memory ended it, or it did not try."""

DECODERS = ("h264", "hevc", "libdav1d", "libaom-av1", "av1", "vp9", "mpeg4")
"""FFmpeg's decoders of the codecs that are taken. The other codecs that it reads in MP4 files are old, rare and less
often tested."""

BLOCK = 64
"""Pixels of the largest block of a codec, each way; frames are stored as whole blocks."""

CORES = 4
"""Cores that the process runs on, at most: FFmpeg starts two threads for each, which have memory of their own."""


def main(size: int, memory: int) -> int:
    """Write the frames of the first video stream to standard output."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where the system is short of memory, it ends this process and not the service
    if hasattr(os, "sched_setaffinity"):
        cores = list(os.sched_getaffinity(0))
        os.sched_setaffinity(0, random.sample(cores, min(CORES, len(cores))))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    memory = memory if most == resource.RLIM_INFINITY else min(memory, most)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    try:
        return _write_frames(io.BytesIO(sys.stdin.buffer.read(size)))
    except MemoryError:
        print("decoding it takes more memory than a video of its size may", file=sys.stderr)
    except (av.FFmpegError, ValueError) as error:
        print(error, file=sys.stderr)
    return UNREADABLE


def _write_frames(file: io.BytesIO) -> int:
    # Metadata may be in any encoding, and says nothing about the frames.
    with av.open(file, "r", format="mp4", metadata_errors="replace") as container:
        if not container.streams.video:
            print("FFmpeg finds no video stream in it", file=sys.stderr)
            return REFUSED
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None or context.codec.name not in DECODERS:
            print("the video's codec is none of h264, hevc, av1, vp9, mpeg4; send H.264", file=sys.stderr)
            return OTHER_CODEC
        reformatter = VideoReformatter()  # one for all frames: each has threads of its own
        for frame in container.decode(stream):
            if context.coded_width * context.coded_height > 4 * (frame.width + BLOCK) * (frame.height + BLOCK):
                stored, seen = f"{context.coded_width}x{context.coded_height}", f"{frame.width}x{frame.height}"
                print(f"its frames have {stored} pixels, but show {seen} of them", file=sys.stderr)
                return REFUSED
            (rows,) = reformatter.reformat(frame, format="rgb24").planes
            matrix: Any = frame.side_data.get("DISPLAYMATRIX")
            turned = struct.unpack("=9i", matrix) if matrix else UPRIGHT
            sys.stdout.buffer.write(HEADER.pack(frame.width, frame.height, rows.line_size, *turned))
            sys.stdout.buffer.write(memoryview(rows)[: rows.line_size * frame.height])
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
