"""Files of musubi-tuner's `cache_directory`: a `.safetensors` for each image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image
from safetensors.torch import save

from remote_vae.latents.buckets import MusubiBuckets
from remote_vae.latents.format import Encoded, Format, ImageFile
from remote_vae.latents.kohya import Kohya


@dataclass
class Musubi(Format):
    models: ClassVar[dict[str, tuple[str, str]]] = {
        "qwen-image": ("qi", "qwen_image"),
        "wan-2.1": ("wan", "wan"),
    }
    """Short and long name of the architecture."""
    trainer: ClassVar[str] = "musubi-tuner"
    suffixes: ClassVar[frozenset[str]] = Kohya.suffixes
    any_case: ClassVar[bool] = False
    default_sample_mode: ClassVar[str] = "argmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip:
            raise ValueError("--flip: musubi-tuner reads no flipped latents; remove the option")
        self.buckets = MusubiBuckets(self.resolution, self.upscale)
        self.short_name, self.architecture = self.models[self.model]

    def convert(self, image: Image.Image) -> Image.Image:
        """Keep transparency: musubi-tuner resizes with it and then drops it, and Lanczos gives other colors then."""
        return image if image.mode == "RGBA" else image.convert("RGB")

    def files(self, images: list[ImageFile]) -> list[Path]:
        return [images[0].sized_name(f"{self.short_name}.safetensors")]

    def contents(self, encoded: list[Encoded], paths: list[Path]) -> list[bytes]:
        (item,) = encoded
        dtype = str(item.latents.dtype).removeprefix("torch.")
        sizes = "x".join(map(str, item.latents.shape[1:]))
        width, height = map(str, item.image.placement.original)
        metadata = {"architecture": self.architecture, "width": width, "height": height, "format_version": "1.0.1"}
        return [save({f"latents_{sizes}_{dtype}": item.latents.contiguous()}, metadata)]
