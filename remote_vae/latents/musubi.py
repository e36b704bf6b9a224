"""Files of musubi-tuner's `cache_directory`: a `.safetensors` for each image, or for each clip of a video."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from remote_vae.latents.buckets import MusubiBuckets, Size
from remote_vae.latents.format import Architecture, Encoded, Format, ImageFile
from remote_vae.latents.kohya import Kohya
from remote_vae.latents.storage import Folder
from remote_vae.latents.videos import SUFFIXES, Sampling, missing_clips, read_size


@dataclass
class Musubi(Format):
    i2v: bool = False
    """Store the latents of the first frame too, as `--i2v` of its script for Wan does without `--clip`."""

    architectures: ClassVar[dict[str, Architecture]] = {
        "qwen_image": Architecture("qwen-image", "qi", 16, "argmax", has_frames=True),
        "krea2": Architecture("qwen-image", "kr2", 16, "argmax", has_frames=True),
        "wan": Architecture("wan-2.1", "wan", 16, "argmax", has_frames=True),
        "hunyuan_video": Architecture("hunyuan-video", "hv", 16, normalized=False, has_frames=True),
        "kandinsky5": Architecture("hunyuan-video", "k5", 16, has_frames=True),
        "hunyuan_video_1_5": Architecture("hunyuan-video-1.5", "hv15", 16, "argmax", normalized=False, has_frames=True),
        "z_image": Architecture("flux", "zi", 16, "argmax", normalized=False),
        "flux_2_dev": Architecture("flux2", "f2d", 16, "argmax", layout="patchified"),
        "flux_2_klein_4b": Architecture("flux2", "f2k4b", 16, "argmax", layout="patchified"),
        "flux_2_klein_9b": Architecture("flux2", "f2k9b", 16, "argmax", layout="patchified"),
        "ideogram4": Architecture("flux2", "i4", 16, "argmax", normalized=False),
    }
    """The names are those in the files' metadata."""
    trainer: ClassVar[str] = "musubi-tuner"
    suffixes: ClassVar[frozenset[str]] = Kohya.suffixes
    any_case: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip:
            raise ValueError("--flip: musubi-tuner reads no flipped latents; remove the option")
        if self.i2v and self.arch != "wan":
            raise ValueError(
                f"--i2v: expected --arch wan, and not {self.arch}: remove the option, and see docs/training.md"
            )
        self.buckets = MusubiBuckets(self.resolution, self.upscale, self.architecture.steps)

    def convert(self, image: Image.Image) -> Image.Image:
        """Keep transparency: musubi-tuner resizes with it and then drops it, and Lanczos gives other colors then."""
        return image if image.mode == "RGBA" else image.convert("RGB")

    def files(self, images: list[ImageFile]) -> list[Path]:
        return [images[0].sized_name(f"{self.architecture.ending}.safetensors")]

    def contents(self, encoded: list[Encoded], out: Folder) -> list[bytes]:
        (item,) = encoded
        latents = {"latents": _tokens(item.latents) if self.arch == "ideogram4" else item.latents}
        if self.i2v:
            latents["latents_image"] = _with_mask(item.latents if item.first is None else item.first)
        if self.arch == "kandinsky5":
            latents["latents_image"] = item.latents[:, [0, -1]]
        width, height = map(str, item.image.placement.original)
        metadata = {"architecture": str(self.arch), "width": width, "height": height, "format_version": "1.0.1"}
        if item.image.clip:
            metadata["frame_count"] = str(item.image.clip[1])
        return [save({self._key(name, values): values.contiguous() for name, values in latents.items()}, metadata)]

    def _key(self, name: str, values: Tensor) -> str:
        """Return the key of latents: their name, size and type."""
        sizes = "x".join(map(str, values.shape[1:]))
        if self.arch in ("z_image", "ideogram4"):  # the key has the frame that the latents lack
            sizes = f"1x{sizes}"
        return f"{name}_{sizes}_{str(values.dtype).removeprefix('torch.')}"


def _tokens(latents: Tensor) -> Tensor:
    """Return patches of 2x2 latents [C, h, w] as [4 * C, h/2, w/2], with the place in the patch first, then C."""
    channels, height, width = latents.shape
    patches = latents.reshape(channels, height // 2, 2, width // 2, 2)
    return patches.permute(2, 4, 0, 1, 3).reshape(4 * channels, height // 2, width // 2)


def _with_mask(first: Tensor) -> Tensor:
    """Return latents [C, F, h, w] after four channels that are 1 in the known frame, the first, and else 0."""
    mask = torch.zeros_like(first[:1]).repeat(4, 1, 1, 1)
    mask[:, 0] = 1
    return torch.cat([mask, first])


@dataclass
class MusubiVideos(Musubi):
    """Clips of videos, for a data set with `video_directory`."""

    sampling: Sampling = field(default_factory=lambda: Sampling((1,)))

    frame_rates: ClassVar[dict[str, float]] = {
        "wan": 16,
        "hunyuan_video": 24,
        "hunyuan_video_1_5": 24,
        "kandinsky5": 24,
    }
    """Frames per second to which musubi-tuner converts videos with `source_fps`."""
    suffixes: ClassVar[frozenset[str]] = SUFFIXES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arch not in self.frame_rates:
            raise ValueError(f"--frames: {self.arch} has no videos; expected one of {', '.join(self.frame_rates)}")
        if not self.upscale:
            raise ValueError("--no-upscale: musubi-tuner always enlarges small videos; remove the option")

    @property
    def set_name(self) -> str:
        return f"{super().set_name}-videos"

    def read_size(self, file: BinaryIO) -> Size:
        return read_size(file)

    def is_stored(self, out: Folder, image: ImageFile) -> bool:
        """Return False: only `parts` knows the clips of a video, because it counts the frames."""
        return False

    def name(self, image: ImageFile) -> Path:
        return image.relative.with_suffix("")

    def parts(self, image: ImageFile, out: Folder) -> Iterator[tuple[ImageFile, np.ndarray[Any, Any]]]:
        """Yield the clips that are not stored yet, with their pixels [F, H, W, 3] in 8 bits.

        Raises:
            ValueError: the video is too short for every clip.
        """
        rate = self.frame_rates[str(self.arch)]
        yield from missing_clips(image, self.sampling, rate, partial(super().is_stored, out), self.fit)

    def first_frame(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        """Return the first frame and, in place of all others, gray, which is 0 in [-1, 1]."""
        if not self.i2v or len(pixels) == 1:
            return None
        frames = np.zeros(pixels.shape, np.float32)
        frames[0] = pixels[0].astype(np.float32) / 127.5 - 1
        return frames

    def files(self, images: list[ImageFile]) -> list[Path]:
        (image,) = images
        (start, count), (width, height) = image.clip or (0, 0), image.placement.bucket
        size = f"{width:04d}x{height:04d}"
        name = f"{image.relative.stem}_{start:05d}-{count:03d}_{size}_{self.architecture.ending}.safetensors"
        return [image.relative.with_name(name)]
