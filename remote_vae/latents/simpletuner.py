"""Files of SimpleTuner's `cache_dir_vae`: a `.pt` for each image or video, which its own metadata says how to place."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import cv2
import numpy as np
import torch
from PIL import Image

from remote_vae.latents.buckets import Placement, Size
from remote_vae.latents.format import Architecture, Encoded, Format, ImageFile, Pixels, cropped, to_rgb
from remote_vae.latents.storage import Folder
from remote_vae.latents.videos import SUFFIXES, captured, frame_size, read_first

METADATA = "aspect_ratio_bucket_metadata"
INDICES = "aspect_ratio_bucket_indices"
"""Beginnings of the names of SimpleTuner's files. The second has the settings of the data backend."""
PAIRS = ("original_size", "intermediary_size", "target_size", "crop_coordinates")
"""Entries of an image's metadata that place it: width and height, or top and left."""
SETTINGS = (
    "instance_data_dir",
    "resolution",
    "resolution_type",
    "crop",
    "crop_style",
    "crop_aspect",
    "crop_aspect_buckets",
)


@dataclass(frozen=True)
class RecordedPlacement(Placement):
    """Sizes of an image, with the corner that SimpleTuner recorded."""

    recorded_corner: Size

    @property
    def corner(self) -> Size:
        return self.recorded_corner


@dataclass
class SimpleTuner(Format):
    """Latents of the images in a folder in which SimpleTuner has written its metadata.

    Raises:
        ValueError: the metadata cannot be read or does not say how to place the images, or an option contradicts it.
    """

    metadata: str | None = None
    """Path of SimpleTuner's `aspect_ratio_bucket_metadata_<id>.json`."""
    backend: dict[str, Any] = field(init=False)
    """Settings of SimpleTuner's data backend by which it places images."""

    architectures: ClassVar[dict[str, Architecture]] = {
        "sd1x": Architecture("sd-v1", "sd1x", 8),
        "sdxl": Architecture("sdxl", "sdxl", 8),
        "sd3": Architecture("sd3", "sd3", 8),
        "flux": Architecture("flux", "flux", 8),
        "chroma": Architecture("flux", "chroma", 8),
        "hidream": Architecture("flux", "hidream", 8),
        "lumina2": Architecture("flux", "lumina2", 8),
        "z_image": Architecture("flux", "z_image", 8),
        "flux2": Architecture("flux2", "flux2", 16, "argmax", layout="patchified"),
        "qwen_image": Architecture("qwen-image", "qwen_image", 8),
        "krea2": Architecture("qwen-image", "krea2", 8),
        "anima": Architecture("qwen-image", "anima", 16, "argmax", has_frames=True),
        "sana": Architecture("sana", "sana", 32, normalized=False),
        "wan": Architecture("wan-2.1", "wan", 16, "argmax", has_frames=True),
        "sanavideo": Architecture("wan-2.1", "sanavideo", 16, "argmax", has_frames=True, unit_range=True),
        "longcat_video": Architecture(
            "wan-2.1", "longcat_video", 16, normalized=False, has_frames=True, unit_range=True
        ),
        "kandinsky5-video": Architecture("hunyuan-video", "kandinsky5-video", 16, has_frames=True, unit_range=True),
        "ltxvideo": Architecture("ltx-video", "ltxvideo", 64, has_frames=True, unit_range=True),
    }
    """The names are those of SimpleTuner's `model_family`."""
    trainer: ClassVar[str] = "SimpleTuner"
    suffixes: ClassVar[frozenset[str]] = frozenset(
        {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip or not self.upscale or self.resolution != (1024, 1024):
            raise ValueError("--resolution, --no-upscale, --flip: SimpleTuner's metadata has the sizes; remove them")
        if not self.metadata:
            raise ValueError(
                f"--format simpletuner: add --metadata with the path of SimpleTuner's {METADATA}_<id>.json"
            )
        self.metadata = os.path.abspath(self.metadata)
        self.folder, name = os.path.split(self.metadata)
        """Absolute path of the images. SimpleTuner writes its metadata there."""
        if not name.startswith(METADATA):
            raise ValueError(f"--metadata {self.metadata}: expected {METADATA}_<id>.json, which SimpleTuner writes")
        entries = _read(self.metadata)
        config = _read(os.path.join(self.folder, name.replace(METADATA, INDICES))).get("config", {})
        self.check_frames((config.get("video") or {}).get("num_frames"))
        self.backend = {name: config.get(name) for name in SETTINGS}
        if not self.backend["instance_data_dir"]:
            raise ValueError(
                f"--metadata {self.metadata}: it is not of a local folder; expected a backend of type local"
            )
        if config.get("crop") and config.get("maximum_image_size") and config.get("target_downsample_size"):
            raise ValueError(
                f"--metadata {self.metadata}: it lacks the sizes before the crop, because the data backend has "
                "target_downsample_size; remove that setting and let SimpleTuner write its metadata again"
            )
        below = self.folder + os.sep
        self.entries = {Path(path[len(below) :]): entry for path, entry in entries.items() if path.startswith(below)}
        """Sizes and crop of each image by its path below the folder."""
        if not self.entries:
            raise ValueError(
                f"--metadata {self.metadata} has no image in its folder; expected absolute paths such as "
                f"{below}a.png; mount the folder at the path that SimpleTuner uses"
            )

    def check_frames(self, frames: int | None) -> None:
        """Compare with the data backend's number of frames, which is None for images."""
        if frames is not None:
            raise ValueError(f"--metadata {self.metadata}: it is of videos; add --frames {frames}")

    def loads(self, relative: Path) -> bool:
        return super().loads(relative) and relative in self.entries

    def place(self, size: Size, relative: Path | None = None) -> Placement:
        """Return the recorded placement of an image.

        Raises:
            ValueError: it is that of an image of another size, or the VAE would cut off pixels.
        """
        original, resized, bucket, (top, left) = (_pair(self.entries[relative or Path()], name) for name in PAIRS)
        if original != size:
            raise ValueError(
                f"the image has {size[0]}x{size[1]} pixels, and {original[0]}x{original[1]} in --metadata; "
                "delete the metadata and let SimpleTuner write it again"
            )
        steps = self.architecture.steps
        is_inside = 0 <= left <= resized[0] - bucket[0] and 0 <= top <= resized[1] - bucket[1]
        if not is_inside or bucket[0] % steps or bucket[1] % steps:
            raise ValueError(
                f"--metadata crops {bucket[0]}x{bucket[1]} from {resized[0]}x{resized[1]}; expected a part of it, with "
                f"sides that are multiples of {steps}; set SimpleTuner's aspect_bucket_alignment"
            )
        return RecordedPlacement(original, resized, bucket, (left, top))

    def convert(self, image: Image.Image) -> Image.Image:
        """Return the image in RGB without its transparency, as SimpleTuner does."""
        if image.mode not in ("1", "L", "P", "RGB", "RGBA", "CMYK"):
            raise ValueError(f"SimpleTuner reads images of mode {image.mode} in its own way; save it as RGB")
        return to_rgb(image)

    def fit(self, image: Image.Image, placement: Placement) -> Pixels:
        """Resize as SimpleTuner resizes one image: with OpenCV if it computes the size anew, else with Pillow."""
        if self.backend["crop"] and self.backend["crop_aspect"] != "random":
            return cropped(resized(np.array(image), placement.resized), placement)
        if image.size != placement.resized:
            image = image.resize(placement.resized, Image.Resampling.LANCZOS)
        return cropped(np.array(image), placement)

    def files(self, images: list[ImageFile]) -> list[Path]:
        """Return the name, which has more folders if the data backend's `instance_data_dir` is a relative path."""
        path = os.path.join(self.folder, images[0].relative)
        folders = os.path.dirname(path).replace(self.backend["instance_data_dir"].rstrip("/"), "").lstrip("/")
        return [Path(folders, f"{hashlib.sha256(images[0].relative.stem.encode()).hexdigest()}.pt")]

    def contents(self, encoded: list[Encoded], out: Folder) -> list[bytes]:
        """Return the latents alone. SimpleTuner reads them also if it compresses its own (`compress_cache`)."""
        buffer = BytesIO()
        torch.save(encoded[0].latents.clone(), buffer)
        return [buffer.getvalue()]


@dataclass
class SimpleTunerVideos(SimpleTuner):
    """The first frames of the videos in a folder. Their number is the data backend's `num_frames`."""

    frames: int = 1

    suffixes: ClassVar[frozenset[str]] = SUFFIXES | {".3gp", ".ogv"}

    @property
    def set_name(self) -> str:
        return f"{super().set_name}-videos"

    def check_frames(self, frames: int | None) -> None:
        names = [name for name, row in self.architectures.items() if row.has_frames and name != "anima"]
        if self.arch not in names:
            raise ValueError(f"--frames: {self.arch} has no videos; expected one of {', '.join(names)}")
        if frames != self.frames:
            expected = f"--frames {frames}, its num_frames" if frames else "no --frames, since it is of images"
            raise ValueError(
                f"--frames {self.frames}: --metadata {self.metadata} has other frames: expected {expected}"
            )

    def read_size(self, file: BinaryIO) -> Size:
        with captured(file) as video:
            return frame_size(video)

    def parts(self, image: ImageFile, out: Folder) -> Iterator[tuple[ImageFile, np.ndarray[Any, Any]]]:
        """Yield the video with its first frames [F, H, W, 3] in 8 bits."""
        with image.files.open(image.relative) as file, captured(file) as video:
            pixels = read_first(video, self.frames, lambda frame: self.fit(frame, image.placement))
        yield replace(image, clip=(0, self.frames)), pixels

    def fit(self, image: Image.Image, placement: Placement) -> Pixels:
        """Stretch a frame to the bucket, and then resize and crop it. SimpleTuner does both with each video."""
        return cropped(resized(resized(np.array(image), placement.bucket), placement.resized), placement)


def resized(pixels: Pixels, size: Size) -> Pixels:
    return pixels if pixels.shape[1::-1] == size else cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)


def _pair(entry: Any, name: str) -> tuple[int, int]:
    """Return two numbers of an image's metadata."""
    try:
        first, second = entry[name]
        return int(first), int(second)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"its {name} in --metadata is missing or not two numbers; delete the metadata and let SimpleTuner write it "
            "again"
        ) from None


def _read(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); let SimpleTuner write it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} has no object; delete it and let SimpleTuner write it again")
    return content
