"""The format of a trainer: the images that it loads, how it resizes them, and its files of latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import cv2
import numpy as np
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from torch import Tensor

from remote_vae.latents.buckets import AIToolkitBuckets, KohyaBuckets, MusubiBuckets, Placement, Size
from remote_vae.latents.storage import Files, Folder

Pixels = np.ndarray[Any, Any]
"""Pixels in 8 bits, with the channels last."""

METADATA = {"exif", "xmp"}
"""Pillow's names of metadata that may turn an image."""


@dataclass(frozen=True)
class ImageFile:
    """One image of the data set."""

    files: Files
    """Folder or shard that it is in."""
    relative: Path
    """Path below the data set's folder."""
    placement: Placement
    clip: tuple[int, int] | None = None
    """First frame and number of frames of a part of a video."""

    def sized_name(self, ending: str) -> Path:
        """Return the relative path with the image's size and `ending` in its name."""
        width, height = self.placement.original
        return self.relative.with_name(f"{self.relative.stem}_{width:04d}x{height:04d}_{ending}")


@dataclass(frozen=True)
class Encoded:
    """One image's latents or moments [C, h, w], or [C, 1, h, w] if the architecture stores frames."""

    image: ImageFile
    latents: Tensor
    flipped: Tensor | None = None
    caption: bytes | None = None
    first: Tensor | None = None
    """Latents of `Format.first_frame`, for image-to-video training."""


@dataclass(frozen=True)
class Architecture:
    """A model that a trainer trains: its VAE, and what the trainer stores of the VAE's distribution."""

    vae: str
    """Key of the VAE that encodes its images."""
    ending: str
    """Name of the architecture in the names or the metadata of files."""
    steps: int = 16
    """Number of pixels of which the sides of buckets are multiples."""
    sample_mode: str = "sample"
    normalized: bool = True
    """Store latents as the diffusion model takes them, not as the VAE gives them."""
    layout: str | None = None
    """Layout of the latents, if it is not the VAE's own."""
    has_frames: bool = False
    """Store latents [C, F, h, w] with the one frame of an image, not [C, h, w]."""
    unit_range: bool = False
    """Encode pixels in [0, 1], as the trainer does, not in [-1, 1]."""


@dataclass
class Format(ABC):
    """Files of latents as a trainer writes and reads them.

    Raises:
        ValueError: the trainer does not have these options, or it has no architecture with this model's VAE.
    """

    model: str
    """Key of the VAE."""
    resolution: Size
    upscale: bool = True
    flip: bool = False
    sample_mode: str | None = None
    """Values of the encoder's distribution to store; None stores those that the trainer stores."""
    arch: str | None = None
    """Name of the trained model; None: the only one with this VAE, or the one with the VAE's name."""

    architectures: ClassVar[dict[str, Architecture]]
    """Models of the trainer by name; empty if the format is the same for all."""
    trainer: ClassVar[str]
    suffixes: ClassVar[frozenset[str]]
    """Suffixes of the images that the trainer loads, in lower case."""
    any_case: ClassVar[bool] = True
    """Load mixed-case suffixes such as `.Jpg` too, not only all lower and all upper case."""
    follows_links: ClassVar[bool] = True
    """Load images of linked folders."""
    applies_exif: ClassVar[bool] = False
    """Rotate images as their EXIF data says."""
    images_per_file: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self.architecture = self.find_architecture()
        """Latents that the trainer stores for the model."""
        if self.architectures and self.sample_mode not in (None, self.architecture.sample_mode):
            raise ValueError(
                f"--sample-mode {self.sample_mode}: {self.trainer} stores {self.architecture.sample_mode}; "
                "use --format webdataset"
            )
        self.sample_mode = self.sample_mode or self.architecture.sample_mode
        self.normalized = self.architecture.normalized
        self.mixes_resolutions = False
        """Latents of several resolutions may be in one folder."""
        self.buckets: KohyaBuckets | MusubiBuckets | AIToolkitBuckets

    def find_architecture(self) -> Architecture:
        """Return the architecture that the options name."""
        names = [name for name, row in self.architectures.items() if row.vae == self.model]
        if not names:
            vaes = ", ".join(dict.fromkeys(row.vae for row in self.architectures.values()))
            raise ValueError(f"{self.trainer} has no format for latents of {self.model}: expected one of {vaes}")
        own = [name for name in names if len(names) == 1 or name.replace("_", "-") == self.model]
        self.arch = self.arch or next(iter(own), None)
        if self.arch not in names:
            problem = f"--arch {self.arch} is not a model" if self.arch else "add --arch: there are several models"
            raise ValueError(
                f"{problem} that {self.trainer} trains with the VAE {self.model}: expected one of {', '.join(names)}"
            )
        return self.architectures[self.arch]

    @property
    def set_name(self) -> str:
        """Name for all files that could be mistaken for one another. One set of options must have made them."""
        return f"{self.trainer}-{self.arch or self.model}"

    def loads(self, relative: Path) -> bool:
        """Return True if the trainer loads a file of this name."""
        suffix = relative.suffix
        return suffix.lower() in self.suffixes and (self.any_case or suffix in (suffix.lower(), suffix.upper()))

    def place(self, size: Size, relative: Path | None = None) -> Placement:
        """Return the placement of an image of this size, and of this path below the data set's folder."""
        return self.buckets.place(size)

    def read_size(self, file: BinaryIO) -> Size:
        """Return width and height of an image, upright if the trainer turns it."""
        with Image.open(file) as image:
            is_turned = self.applies_exif and image.getexif().get(Base.Orientation, 1) >= 5
            return image.size[::-1] if is_turned else image.size

    def jpeg(self, image: ImageFile) -> bytes | None:
        """Return the file of an image whose pixels are encoded as they are; None if the image must be changed.

        The endpoint reads the same pixels from a JPEG in RGB or gray. One with EXIF or XMP may be turned.
        """
        placement = image.placement
        is_changed = self.flip or self.architecture.unit_range
        if is_changed or not placement.original == placement.resized == placement.bucket:
            return None
        if image.relative.suffix.lower() not in (".jpg", ".jpeg"):
            return None
        file = image.files.read(image.relative)
        with Image.open(BytesIO(file)) as opened:
            is_plain = opened.format == "JPEG" and opened.mode in ("RGB", "L") and not opened.info.keys() & METADATA
            return file if is_plain and opened.size == placement.bucket else None

    def parts(self, image: ImageFile, out: Folder) -> Iterator[tuple[ImageFile, np.ndarray[Any, Any]]]:
        """Yield what is encoded at a time with its pixels in 8 bits [B, H, W, 3]. An image is one part.

        B is 2 with `flip`: the image and its mirror image.
        """
        with Image.open(BytesIO(image.files.read(image.relative))) as opened:
            upright = ImageOps.exif_transpose(opened) if self.applies_exif else opened
            pixels = self.pixels(upright, image.placement)
        yield image, np.stack(pixels) if len(pixels) > 1 else pixels[0][None]

    def first_frame(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """Return what is encoded in addition to a clip [F, H, W, 3] for image-to-video training; None: nothing.

        It has 8 bits, or floats in [-1, 1].
        """
        return None

    def pixels(self, image: Image.Image, placement: Placement) -> list[Pixels]:
        """Return the pixels [H, W, 3] of the image as the trainer encodes it, and with `flip` of its mirror image."""
        fitted = self.fit(self.convert(image), placement)
        return [fitted, fitted[:, ::-1]] if self.flip else [fitted]

    def convert(self, image: Image.Image) -> Image.Image:
        """Return the image in the mode in which it is resized."""
        return to_rgb(image)

    def fit(self, image: Image.Image, placement: Placement) -> Pixels:
        """Resize and crop as kohya's trainers do: shrink with OpenCV's area, enlarge with Pillow's Lanczos.

        Return pixels [H, W, 3].
        """
        width, height = placement.resized
        if image.size != placement.resized and image.width >= width and image.height >= height:
            return cropped(cv2.resize(np.array(image), placement.resized, interpolation=cv2.INTER_AREA), placement)
        if image.size != placement.resized:
            image = image.resize(placement.resized, Image.Resampling.LANCZOS)
        return cropped(np.array(image), placement)

    def caption(self, image: ImageFile) -> bytes | None:
        """Return the caption if the format stores it beside the latents."""
        return None

    def prepare(self, out: Folder, run: str) -> None:  # noqa: B027
        """Read what the output folder has, before `is_stored`. `run` is a name that no other run at the time has."""

    def is_stored(self, out: Folder, image: ImageFile) -> bool:
        """Return True if the folder `out` has the latents of this image.

        Raises:
            ValueError: it has those of another image under the same name, or a damaged file.
        """
        return all(out.is_file(file) for file in self.files([image]))

    def name(self, image: ImageFile) -> Path:
        """Return the image's own name, which no other image's latents may have."""
        return self.files([image])[0]

    @abstractmethod
    def files(self, images: list[ImageFile]) -> list[Path]:
        """Return the files for images that are written together, relative to the output folder."""

    @abstractmethod
    def contents(self, encoded: list[Encoded], out: Folder) -> list[bytes]:
        """Return the new contents of the `files` of these images in the output folder."""


def cropped(pixels: Pixels, placement: Placement) -> Pixels:
    """Return the bucket of a resized image, without its transparency."""
    (left, top), (width, height) = placement.corner, placement.bucket
    return pixels[top : top + height, left : left + width, :3]


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB. One that is RGB is not copied."""
    return image if image.mode == "RGB" else image.convert("RGB")


def crop_ltrb(placement: Placement) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the bucket in the image, as SDXL is conditioned on them."""
    (width, height), ratio = placement.bucket, placement.original[0] / placement.original[1]
    resized = (height * ratio, height) if width / height > ratio else (width, width / ratio)
    left, top = (width - resized[0]) // 2, (height - resized[1]) // 2
    return left, top, left + resized[0], top + resized[1]
