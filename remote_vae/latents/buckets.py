"""Buckets of the trainers: the sizes, all of about one area, to which they resize and crop images.

Sizes are (width, height) in pixels. tests/remote_vae/trainers.json has the results of the trainers' own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, sqrt

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """Sizes of an image: the original, after it is resized, and after `bucket` is cut out at `corner`.

    Raises:
        ValueError: the image is so narrow that no pixel would remain.
    """

    original: Size
    resized: Size
    bucket: Size

    def __post_init__(self) -> None:
        if min(self.bucket) < 1:
            raise ValueError(
                f"the image of {self.original[0]}x{self.original[1]} is too narrow: its bucket would be "
                f"{self.bucket[0]}x{self.bucket[1]}; crop or enlarge it"
            )

    @property
    def corner(self) -> Size:
        """Left and top of the bucket in the middle of the resized image."""
        return (self.resized[0] - self.bucket[0]) // 2, (self.resized[1] - self.bucket[1]) // 2


def nearest(size: Size, buckets: list[Size]) -> Size:
    """Return the bucket with the nearest aspect ratio; the first one if several are as near."""
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - size[0] / size[1]))


def covering(size: Size, bucket: Size) -> Placement:
    """Scale an image so that it just covers the bucket, to the nearest pixel."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return Placement(size, (int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)), bucket)


class KohyaBuckets:
    """Buckets of sd-scripts: `--resolution`, `--min_bucket_reso`, `--max_bucket_reso`, `--bucket_reso_steps`."""

    def __init__(
        self, resolution: Size, upscale: bool = True, smallest: int = 256, largest: int = 1024, steps: int = 64
    ) -> None:
        self.area, self.upscale, self.steps = resolution[0] * resolution[1], upscale, steps
        square = int(sqrt(self.area)) // steps * steps
        buckets = {(square, square)}
        for width in range(smallest, largest + 1, steps):
            height = min(largest, self.area // width // steps * steps)
            if height >= smallest:
                buckets |= {(width, height), (height, width)}
        self.buckets = sorted(buckets)

    def place(self, size: Size) -> Placement:
        if not self.upscale:
            return self._shrink(size)
        return covering(size, size if size in self.buckets else nearest(size, self.buckets))

    def _shrink(self, size: Size) -> Placement:
        """Scale a large image so that one side is a multiple of `steps`, and crop every image to multiples."""
        resized, ratio = size, size[0] / size[1]
        if size[0] * size[1] > self.area:
            width = sqrt(self.area * ratio)
            by_width, by_height = self._round(width), self._round(self.area / width)
            if not (self._round(by_width / ratio) and by_height):  # sd-scripts itself divides by zero here
                return Placement(size, (by_width, by_height), (by_width, 0))
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
    """Buckets of musubi-tuner's dataset config: `resolution`, `enable_bucket`, `bucket_no_upscale`."""

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
    """Buckets of ai-toolkit, which never enlarges. `steps` is its models' `get_bucket_divisibility`."""

    def __init__(self, resolution: Size, steps: int) -> None:
        self.area, self.steps = resolution[0] * resolution[1], steps

    def place(self, size: Size) -> Placement:
        area = min(size[0] * size[1], self.area)
        scale = (area / (size[0] * size[1])) ** 0.5
        sides = [
            (floor(side * scale / self.steps) * self.steps, ceil(side * scale / self.steps) * self.steps)
            for side in size
        ]
        candidates = [(width, height) for width in sides[0] for height in sides[1]]
        fitting = [bucket for bucket in candidates if 0 < bucket[0] * bucket[1] <= self.area]
        smallest = (max(self.steps, sides[0][0]), max(self.steps, sides[1][0]))
        bucket = min(fitting or [smallest], key=lambda sides: abs(sides[0] * sides[1] - area))
        cover = max(bucket[0] / size[0], bucket[1] / size[1])
        return Placement(size, (ceil(size[0] * cover), ceil(size[1] * cover)), bucket)
