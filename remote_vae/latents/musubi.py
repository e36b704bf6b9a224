"""Files of musubi-tuner's `cache_directory`: a `.safetensors` for each image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image
from safetensors.torch import save

from remote_vae.latents.buckets import MusubiBuckets
from remote_vae.latents.format import Architecture, Encoded, Format, ImageFile
from remote_vae.latents.kohya import Kohya


@dataclass
class Musubi(Format):
    architectures: ClassVar[dict[str, Architecture]] = {
        "qwen_image": Architecture("qwen-image", "qi", 16, "argmax", has_frames=True),
        "krea2": Architecture("qwen-image", "kr2", 16, "argmax", has_frames=True),
        "wan": Architecture("wan-2.1", "wan", 16, "argmax", has_frames=True),
        "hunyuan_video_1_5": Architecture("hunyuan-video-1.5", "hv15", 16, "argmax", normalized=False, has_frames=True),
        "z_image": Architecture("flux", "zi", 16, "argmax", normalized=False),
        "flux_2_dev": Architecture("flux2", "f2d", 16, "argmax", layout="patchified"),
        "flux_2_klein_4b": Architecture("flux2", "f2k4b", 16, "argmax", layout="patchified"),
        "flux_2_klein_9b": Architecture("flux2", "f2k9b", 16, "argmax", layout="patchified"),
    }
    """The names are those in the files' metadata."""
    trainer: ClassVar[str] = "musubi-tuner"
    suffixes: ClassVar[frozenset[str]] = Kohya.suffixes
    any_case: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip:
            raise ValueError("--flip: musubi-tuner reads no flipped latents; remove the option")
        self.buckets = MusubiBuckets(self.resolution, self.upscale, self.architecture.steps)

    def convert(self, image: Image.Image) -> Image.Image:
        """Keep transparency: musubi-tuner resizes with it and then drops it, and Lanczos gives other colors then."""
        return image if image.mode == "RGBA" else image.convert("RGB")

    def files(self, images: list[ImageFile]) -> list[Path]:
        return [images[0].sized_name(f"{self.architecture.ending}.safetensors")]

    def contents(self, encoded: list[Encoded], paths: list[Path]) -> list[bytes]:
        (item,) = encoded
        dtype = str(item.latents.dtype).removeprefix("torch.")
        sizes = "x".join(map(str, item.latents.shape[1:]))
        if self.arch == "z_image":  # the key has the frame that the latents lack
            sizes = f"1x{sizes}"
        width, height = map(str, item.image.placement.original)
        metadata = {"architecture": str(self.arch), "width": width, "height": height, "format_version": "1.0.1"}
        return [save({f"latents_{sizes}_{dtype}": item.latents.contiguous()}, metadata)]
