"""Where a picture goes for training: scaled and cropped to one of few sizes of about one area, as each trainer does it.

Sizes are (width, height) in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, sqrt

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """A picture is resized to `resized`, of which `bucket` is cut out at `corner`."""

    original: Size
    resized: Size
    bucket: Size

    @property
    def corner(self) -> Size:
        """Left and top of the middle."""
        return (self.resized[0] - self.bucket[0]) // 2, (self.resized[1] - self.bucket[1]) // 2


def nearest(size: Size, buckets: list[Size]) -> Size:
    """The bucket whose aspect ratio is the nearest; the first of the list where two are."""
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - size[0] / size[1]))


def covering(size: Size, bucket: Size) -> Placement:
    """Scaled so that it just covers the bucket, to the nearest pixel."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return Placement(size, (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)), bucket)


class KohyaBuckets:
    """Of kohya's sd-scripts: `--resolution`, `--min_bucket_reso`, `--max_bucket_reso`, `--bucket_reso_steps`."""

    def __init__(
        self, resolution: Size, upscale: bool = True, least: int = 256, most: int = 1024, steps: int = 64
    ) -> None:
        self.area, self.upscale, self.steps = resolution[0] * resolution[1], upscale, steps
        square = int(sqrt(self.area)) // steps * steps
        buckets = {(square, square)}
        for width in range(least, most + 1, steps):
            height = min(most, self.area // width // steps * steps)
            if height >= least:
                buckets |= {(width, height), (height, width)}
        self.buckets = sorted(buckets)

    def place(self, size: Size) -> Placement:
        if not self.upscale:
            return self._shrink(size)
        return covering(size, size if size in self.buckets else nearest(size, self.buckets))

    def _shrink(self, size: Size) -> Placement:
        """What is too large is scaled so that one side is a multiple of `steps`; then all is cropped to multiples."""
        resized, ratio = size, size[0] / size[1]
        if size[0] * size[1] > self.area:
            width, height = sqrt(self.area * ratio), sqrt(self.area / ratio)
            by_width, by_height = self._round(width), self._round(height)
            error_of_width = abs(by_width / self._round(by_width / ratio) - ratio)
            error_of_height = abs(self._round(by_height * ratio) / by_height - ratio)
            if error_of_width < error_of_height:
                resized = (by_width, int(by_width / ratio + 0.5))
            else:
                resized = (int(by_height * ratio + 0.5), by_height)
        return Placement(size, resized, (resized[0] - resized[0] % self.steps, resized[1] - resized[1] % self.steps))

    def _round(self, side: float) -> int:
        return int(side + 0.5) // self.steps * self.steps


class MusubiBuckets:
    """Of musubi-tuner's dataset config: `resolution`, `enable_bucket`, `bucket_no_upscale`."""

    def __init__(self, resolution: Size, upscale: bool = True, steps: int = 16) -> None:
        self.area, self.upscale, self.steps = resolution[0] * resolution[1], upscale, steps
        square = int(sqrt(self.area))
        buckets = set()
        for width in range(square // 2 // steps * steps, square + steps, steps):
            height = self.area // width // steps * steps
            buckets |= {(width, height), (height, width)}
        self.buckets = sorted(buckets)

    def place(self, size: Size) -> Placement:
        if not self.upscale and size[0] * size[1] <= self.area:
            return covering(size, (size[0] // self.steps * self.steps, size[1] // self.steps * self.steps))
        return covering(size, nearest(size, self.buckets))


class AIToolkitBuckets:
    """Of ai-toolkit, which never scales up: one side of `resolution`, and the steps of its models."""

    def __init__(self, resolution: Size, steps: int) -> None:
        self.area, self.steps = resolution[0] * resolution[1], steps

    def place(self, size: Size) -> Placement:
        wanted = min(size[0] * size[1], self.area)
        scale = sqrt(wanted / (size[0] * size[1])) / self.steps
        sides = [(floor(side * scale) * self.steps, ceil(side * scale) * self.steps) for side in size]
        candidates = [(width, height) for width in sides[0] for height in sides[1]]
        fitting = [bucket for bucket in candidates if 0 < bucket[0] * bucket[1] <= self.area]
        least = (max(self.steps, sides[0][0]), max(self.steps, sides[1][0]))
        bucket = min(fitting or [least], key=lambda sides: abs(sides[0] * sides[1] - wanted))
        cover = max(bucket[0] / size[0], bucket[1] / size[1])
        return Placement(size, (ceil(size[0] * cover), ceil(size[1] * cover)), bucket)
