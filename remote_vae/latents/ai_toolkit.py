"""Files of ai-toolkit: a `_latent_cache` beside the images, as `cache_latents_to_disk` writes it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save

from remote_vae.latents.buckets import AIToolkitBuckets, Placement, Size
from remote_vae.latents.format import Architecture, Encoded, Format, ImageFile, Pixels, cropped
from remote_vae.latents.storage import Folder
from remote_vae.latents.videos import FRAME_FACTOR, captured, frame_size, read_spread


@dataclass
class AIToolkit(Format):
    architectures: ClassVar[dict[str, Architecture]] = {
        "sd1": Architecture("sd-v1", "sd1", 16),
        "sdxl": Architecture("sdxl", "sdxl", 16),
        "sd3": Architecture("sd3", "sd3", 32),
        "flux": Architecture("flux", "flux1", 32),
        "flux_kontext": Architecture("flux", "flux_kontext", 16),
        "chroma": Architecture("flux", "chroma", 32),
        "hidream": Architecture("flux", "hidream", 16),
        "zimage": Architecture("flux", "zimage", 16),
        "flux2": Architecture("flux2", "flux2", 16, "argmax", layout="patchified"),
        "flux2_klein_4b": Architecture("flux2", "flux2_klein_4b", 16, "argmax", layout="patchified"),
        "flux2_klein_9b": Architecture("flux2", "flux2_klein_9b", 16, "argmax", layout="patchified"),
        "qwen_image": Architecture("qwen-image", "qwen_image", 32),
        "qwen_image_edit": Architecture("qwen-image", "qwen_image_edit", 32),
        "qwen_image_edit_plus": Architecture("qwen-image", "qwen_image_edit_plus", 32),
        "krea2": Architecture("qwen-image", "krea2", 16),
        "anima": Architecture("qwen-image", "anima", 32),
        "cogview4": Architecture("cogview4", "cogview4", 8),
        "wan21": Architecture("wan-2.1", "wan21", 16, has_frames=True),
        "wan21_i2v": Architecture("wan-2.1", "wan21_i2v", 16, has_frames=True),
        "wan22_14b": Architecture("wan-2.1", "wan22_14b", 16, has_frames=True),
        "wan22_14b_i2v": Architecture("wan-2.1", "wan22_14b_i2v", 16, has_frames=True),
        "wan22_5b": Architecture("wan-2.2", "wan22_5b", 32, has_frames=True),
    }
    """Each ending is the name of the latent space in the files' metadata."""
    trainer: ClassVar[str] = "ai-toolkit"
    suffixes: ClassVar[frozenset[str]] = frozenset({".png", ".jpg", ".jpeg", ".webp"})
    follows_links: ClassVar[bool] = False
    applies_exif: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        width, height = self.resolution
        if width != height:
            side = int((width * height) ** 0.5)
            raise ValueError(f"--resolution {width}x{height}: expected one side; {side} has about this area")
        self.mixes_resolutions = True
        self.buckets = AIToolkitBuckets(self.resolution, self.architecture.steps)

    def loads(self, relative: Path) -> bool:
        return super().loads(relative) and relative.parent.name != "_controls"

    def pixels(self, image: Image.Image, placement: Placement) -> list[Pixels]:
        """Mirror before the crop, as ai-toolkit does: it matters if an odd number of pixels is cut off."""
        image = self.convert(image)
        return [self.fit(each, placement) for each in ([image, ImageOps.mirror(image)] if self.flip else [image])]

    def fit(self, image: Image.Image, placement: Placement) -> Pixels:
        return cropped(np.array(image.resize(placement.resized, Image.Resampling.BICUBIC)), placement)

    def files(self, images: list[ImageFile]) -> list[Path]:
        return [self._file(images[0], flip) for flip in ([False, True] if self.flip else [False])]

    def _file(self, image: ImageFile, flip: bool) -> Path:
        key = json.dumps(self._metadata(image, flip), sort_keys=True).encode()
        name = base64.urlsafe_b64encode(hashlib.md5(key).digest()).decode().replace("=", "")
        return image.relative.parent / "_latent_cache" / f"{image.relative.stem}_{name}.safetensors"

    def _metadata(self, image: ImageFile, flip: bool) -> dict[str, Any]:
        """Return the values by which the trainer distinguishes its files, in its order."""
        placement = image.placement
        metadata = {
            "filename": image.relative.name,
            "scale_to_width": placement.resized[0],
            "scale_to_height": placement.resized[1],
            "crop_x": placement.corner[0],
            "crop_y": placement.corner[1],
            "crop_width": placement.bucket[0],
            "crop_height": placement.bucket[1],
            "latent_space_version": self.architecture.ending,
            "latent_version": 1,
        }
        return {**metadata, "flip_x": True} if flip else metadata

    def contents(self, encoded: list[Encoded], out: Folder) -> list[bytes]:
        (item,) = encoded
        contents = []
        for flip, latents in enumerate((item.latents, item.flipped)):
            if latents is not None:
                values = self._metadata(item.image, bool(flip)).items()
                metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values}
                metadata["filename"] = metadata["filename"].encode(errors="backslashreplace").decode()  # not UTF-8
                arrays = {"latent": latents.contiguous()}
                if item.image.clip:
                    arrays["num_frames"] = torch.tensor(item.image.clip[1], dtype=torch.int32)
                if item.first is not None:
                    arrays["first_frame_latent"] = item.first.contiguous()
                contents.append(save(arrays, {**metadata, "format": "pt"}))
        return contents


@dataclass
class AIToolkitVideos(AIToolkit):
    """Videos of a data set with `num_frames` and `shrink_video_to_frames`, ai-toolkit's default."""

    frames: int = 1
    i2v: bool = False
    """`do_i2v`: store the latents of the first frame too."""

    suffixes: ClassVar[frozenset[str]] = frozenset({".mp4", ".avi", ".mov", ".webm", ".mkv", ".wmv", ".m4v", ".flv"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.architecture.has_frames:
            names = [name for name, row in self.architectures.items() if row.has_frames]
            raise ValueError(f"--frames: {self.arch} has no videos; expected one of {', '.join(names)}")
        if self.flip:
            raise ValueError("--flip: mirrored videos are not supported; remove the option, and `flip_x` of ai-toolkit")
        if self.frames < 2 or self.frames % FRAME_FACTOR != 1:
            raise ValueError(f"--frames {self.frames}: expected 5, 9, 13, ..., a count that the VAE encodes whole")
        if self.i2v and self.arch != "wan22_5b":
            raise ValueError(
                f"--i2v: ai-toolkit stores no first frame for {self.arch}: expected wan22_5b; remove the option"
            )

    @property
    def set_name(self) -> str:
        return f"{super().set_name}-{self.frames}-frames{'-i2v' * self.i2v}"  # the names of the files have it, too

    def read_size(self, file: BinaryIO) -> Size:
        with captured(file) as video:
            return frame_size(video)

    def files(self, images: list[ImageFile]) -> list[Path]:
        return super().files([replace(images[0], clip=(0, self.frames))])

    def _metadata(self, image: ImageFile, flip: bool) -> dict[str, Any]:
        metadata = {**super()._metadata(image, flip), "num_frames": self.frames}
        return {**metadata, "do_i2v": True} if self.i2v else metadata

    def first_frame(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
        return pixels[:1] if self.i2v else None

    def parts(self, image: ImageFile, out: Folder) -> Iterator[tuple[ImageFile, np.ndarray[Any, Any]]]:
        """Yield the video with its frames [F, H, W, 3] in 8 bits."""
        with image.files.open(image.relative) as file, captured(file) as video:
            pixels = read_spread(video, self.frames, lambda frame: self.fit(frame, image.placement))
        yield replace(image, clip=(0, self.frames)), pixels
