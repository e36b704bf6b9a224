"""Pixels of image and video files as Pillow and FFmpeg read them, without the service.

Run as a module, it reads an MP4 file from standard input and writes its frames in numpy's format. A crafted file can
crash this process without harm to the caller.
"""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import warnings
from itertools import islice

import av
import numpy as np
from PIL import Image, ImageOps

MOST_BYTES = 300_000
"""Largest file that is compared, in bytes. Pillow takes seconds to read the segments of a longer one."""
MOST_PIXELS = 300_000
"""Most pixels that are compared, of an image or of all frames of a video."""
MOST_MEMORY = 2 * 10**9
"""Memory limit of the process that reads a video, in bytes."""
MOST_SECONDS = 20


def read_pixels(file: bytes, kind: str) -> list[Image.Image] | None:
    """Return the images of a file in RGB on white, upright: one for an image file, or the frames of a video.

    Return None if the reader refuses the file, or if the correct image is not known.
    """
    if len(file) > MOST_BYTES:
        return None
    return _frames(file) if kind == "video" else _image(file)


def _image(file: bytes) -> list[Image.Image] | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(io.BytesIO(file), formats=("PNG", "JPEG", "WEBP"))
            if image.width * image.height > MOST_PIXELS:
                return None
            image.load()
            if image.format == "PNG" and _has_other_transparency(file):
                return None
            return [_on_white(ImageOps.exif_transpose(image))]
    except Exception:  # Pillow raises a dozen types
        return None


def _has_other_transparency(png: bytes) -> bool:
    """Return whether Pillow disagrees with libpng and the PNG specification about transparent pixels.

    Pillow drops the low bytes of 16-bit colors, and compares all bits of a gray value where only `depth` bits count.
    """
    depth, color_type = png[24], png[25]
    _, chunk, value = png.partition(b"tRNS")
    return bool(chunk) and (
        (depth, color_type) == (16, 2) or (color_type == 0 and int.from_bytes(value[:2]) >> depth > 0)
    )


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.float64)
        gray[gray == image.info.get("transparency", -1)] = 65_535
        return Image.fromarray(np.round(gray / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _frames(file: bytes) -> list[Image.Image] | None:
    command = [sys.executable, "-m", "traffic.files"]
    try:
        read = subprocess.run(command, input=file, capture_output=True, timeout=MOST_SECONDS, check=True)
    except subprocess.SubprocessError:
        return None
    return [Image.fromarray(frame) for frame in np.load(io.BytesIO(read.stdout))]


def _write_frames() -> None:
    """Write the frames of the file on standard input as uint8 [F, H, W, 3], rotated by their display matrix."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    with av.open(io.BytesIO(sys.stdin.buffer.read()), format="mp4", metadata_errors="replace") as container:
        stream = container.streams.video[0]
        frames = list(islice(container.decode(stream), 1 + MOST_PIXELS // max(1, stream.width * stream.height)))
    if sum(frame.width * frame.height for frame in frames) > MOST_PIXELS:
        sys.exit("these are too many pixels")
    np.save(sys.stdout.buffer, np.stack([_upright(frame) for frame in frames]))


def _upright(frame: av.VideoFrame) -> np.ndarray:
    array, side_data = frame.to_ndarray(format="rgb24"), frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return array
    a, b, _, c, d = np.frombuffer(side_data, np.int32)[:5] / 65_536
    if sorted(map(abs, (a, b, c, d))) != [0, 0, 1, 1] or abs(a) != abs(d):
        sys.exit("the matrix is none of the eight orientations")
    if b:  # swap x and y
        array = array.transpose(1, 0, 2)
    flip_x, flip_y = (c < 0, b < 0) if b else (a < 0, d < 0)
    return array[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


if __name__ == "__main__":
    _write_frames()
