"""The format of a trainer: the images that it loads, how it resizes them, and its files of latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from remote_vae.latents.buckets import AIToolkitBuckets, KohyaBuckets, MusubiBuckets, Placement, Size


@dataclass(frozen=True)
class ImageFile:
    """One image of the data set."""

    path: Path
    relative: Path
    """Path below the data set's folder."""
    placement: Placement

    def sized_name(self, ending: str) -> Path:
        """Return the relative path with the image's size and `ending` in its name."""
        width, height = self.placement.original
        return self.relative.with_name(f"{self.relative.stem}_{width:04d}x{height:04d}_{ending}")


@dataclass(frozen=True)
class Encoded:
    """One image's latents [C, h, w] or moments [2 * C, h, w]; [C, 1, h, w] from the VAE of a video model."""

    image: ImageFile
    latents: Tensor
    flipped: Tensor | None = None
    caption: bytes | None = None


@dataclass
class Format(ABC):
    """Files of latents as a trainer writes and reads them.

    Raises:
        ValueError: the trainer does not have these options, or its format for this model is unknown.
    """

    model: str
    resolution: Size
    upscale: bool = True
    flip: bool = False
    sample_mode: str | None = None
    """Values of the encoder's distribution to store; None stores those that the trainer stores."""

    models: ClassVar[dict[str, Any]]
    """Properties of each model, by its key; empty if every model works."""
    trainer: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]
    """Suffixes of the images that the trainer loads, in lower case."""
    any_case: ClassVar[bool] = True
    """Load mixed-case suffixes such as `.Jpg` too, not only all lower and all upper case."""
    follows_links: ClassVar[bool] = True
    """Load images of linked folders."""
    applies_exif: ClassVar[bool] = False
    """Rotate images as their EXIF data says."""
    default_sample_mode: ClassVar[str] = "sample"
    images_per_file: ClassVar[int] = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.models and self.model not in self.models:
            raise ValueError(f"{name} does not have the model {self.model}: expected one of {', '.join(self.models)}")
        if self.models and self.sample_mode not in (None, self.default_sample_mode):
            raise ValueError(
                f"--sample-mode {self.sample_mode}: {name} stores {self.default_sample_mode}; use --format webdataset"
            )
        self.sample_mode = self.sample_mode or self.default_sample_mode
        self.normalized = True
        """Store latents normalized, as the diffusion model takes them."""
        self.mixes_resolutions = False
        """Latents of several resolutions may be in one folder."""
        self.buckets: KohyaBuckets | MusubiBuckets | AIToolkitBuckets

    @property
    def set_name(self) -> str:
        """Name for all files that could be mistaken for one another. One set of options must have made them."""
        return f"{self.trainer}-{self.model}"

    def loads(self, relative: Path) -> bool:
        """Return True if the trainer loads a file of this name."""
        suffix = relative.suffix
        return suffix.lower() in self.suffixes and (self.any_case or suffix in (suffix.lower(), suffix.upper()))

    def place(self, size: Size) -> Placement:
        return self.buckets.place(size)

    def pixels(self, image: Image.Image, placement: Placement) -> list[Image.Image]:
        """Return the image in RGB as the trainer encodes it, and with `flip` its mirror image."""
        fitted = self.fit(self.convert(image), placement)
        return [fitted, ImageOps.mirror(fitted)] if self.flip else [fitted]

    def convert(self, image: Image.Image) -> Image.Image:
        """Return the image in the mode in which it is resized."""
        return image.convert("RGB")

    def fit(self, image: Image.Image, placement: Placement) -> Image.Image:
        """Resize and crop as kohya's trainers do: shrink with OpenCV's area, enlarge with Pillow's Lanczos."""
        if image.size != placement.resized:
            if image.width >= placement.resized[0] and image.height >= placement.resized[1]:
                pixels = cv2.resize(np.array(image), placement.resized, interpolation=cv2.INTER_AREA)
                image = Image.fromarray(pixels)
            else:
                image = image.resize(placement.resized, Image.Resampling.LANCZOS)
        return cropped(image, placement)

    def caption(self, image: ImageFile) -> bytes | None:
        """Return the caption if the format stores it beside the latents."""
        return None

    def stored(self, out: Path) -> dict[Path, Path]:
        """Return the relative paths of the images in files of several images, by `name`."""
        return {}

    def is_stored(self, out: Path, image: ImageFile) -> bool:
        """Return True if the folder `out` has the image's own files, and they hold its latents."""
        return all((out / file).exists() for file in self.files([image]))

    def name(self, image: ImageFile) -> Path:
        """Return the image's own name, which no other image's latents may have."""
        return self.files([image])[0]

    @abstractmethod
    def files(self, images: list[ImageFile]) -> list[Path]:
        """Return the files for images that are written together, relative to the output folder."""

    @abstractmethod
    def contents(self, encoded: list[Encoded], paths: list[Path]) -> list[bytes]:
        """Return the new contents of `paths`, which are the `files` in the output folder."""


def cropped(image: Image.Image, placement: Placement) -> Image.Image:
    left, top = placement.corner
    return image.crop((left, top, left + placement.bucket[0], top + placement.bucket[1])).convert("RGB")


def crop_ltrb(placement: Placement) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the bucket in the image, as SDXL is conditioned on them."""
    (width, height), ratio = placement.bucket, placement.original[0] / placement.original[1]
    resized = (height * ratio, height) if width / height > ratio else (width, width / ratio)
    left, top = (width - resized[0]) // 2, (height - resized[1]) // 2
    return left, top, left + resized[0], top + resized[1]
