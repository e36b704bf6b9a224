"""Decoder of an MP4 file's frames in a separate process: `python frames.py <bytes of the file> <bytes of memory>`.

A crafted file can make a decoder take any memory and any time, or crash it. Then only this process ends. It reads the
file from standard input. It writes each frame to standard output, as a `HEADER` and RGB rows. On an error it writes the
reason to standard error, and its exit status gives the kind of error.

The module imports nothing from the service, so the process starts quickly.
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
"""Width, height, bytes of a row (at least 3 per pixel) and display matrix of a frame."""
UPRIGHT = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
"""Display matrix of a frame that needs no rotation."""

UNREADABLE, REFUSED, OTHER_CODEC = 3, 4, 5
"""Exit statuses: FFmpeg failed or memory ran out; the file was refused; the codec is not supported."""

DECODERS = ("h264", "hevc", "libdav1d", "libaom-av1", "av1", "vp9", "mpeg4")
"""FFmpeg's decoders of the supported codecs. The other codecs that MP4 files may have are old, rare and less tested."""

BLOCK = 64
"""Height and width in pixels of a codec's largest block. Codecs store frames as whole blocks."""

MAX_CORES = 4
"""Cores for the process. FFmpeg starts two threads per core, and each thread takes memory."""


def main(size: int, memory: int) -> int:
    """Write the frames of the first video stream to standard output."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out, the system kills this process and not the service
    if hasattr(os, "sched_setaffinity"):
        cores = list(os.sched_getaffinity(0))
        os.sched_setaffinity(0, random.sample(cores, min(MAX_CORES, len(cores))))
    _, limit = resource.getrlimit(resource.RLIMIT_DATA)
    memory = memory if limit == resource.RLIM_INFINITY else min(memory, limit)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    try:
        return _write_frames(io.BytesIO(sys.stdin.buffer.read(size)))
    except MemoryError:
        print("decoding takes more memory than a video of this size should", file=sys.stderr)
    except (av.FFmpegError, ValueError) as error:
        print(error, file=sys.stderr)
    return UNREADABLE


def _write_frames(file: io.BytesIO) -> int:
    # metadata may be in any encoding, and the frames do not depend on it
    with av.open(file, "r", format="mp4", metadata_errors="replace") as container:
        if not container.streams.video:
            print("FFmpeg finds no video stream", file=sys.stderr)
            return REFUSED
        stream = container.streams.video[0]
        context = stream.codec_context
        if context is None or context.codec.name not in DECODERS:
            print("the video's codec is none of h264, hevc, av1, vp9, mpeg4; send H.264", file=sys.stderr)
            return OTHER_CODEC
        reformatter = VideoReformatter()  # one for all frames, because each has its own threads
        for frame in container.decode(stream):
            if context.coded_width * context.coded_height > 4 * (frame.width + BLOCK) * (frame.height + BLOCK):
                stored, shown = f"{context.coded_width}x{context.coded_height}", f"{frame.width}x{frame.height}"
                print(f"its frames have {stored} pixels, but show only {shown}", file=sys.stderr)
                return REFUSED
            (rows,) = reformatter.reformat(frame, format="rgb24").planes
            matrix: Any = frame.side_data.get("DISPLAYMATRIX")
            orientation = struct.unpack("=9i", matrix) if matrix else UPRIGHT
            sys.stdout.buffer.write(HEADER.pack(frame.width, frame.height, rows.line_size, *orientation))
            sys.stdout.buffer.write(memoryview(rows)[: rows.line_size * frame.height])
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
