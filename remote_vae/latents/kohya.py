"""Files of sd-scripts: a `.npz` beside each image, as `--cache_latents_to_disk` writes it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from remote_vae.latents.buckets import KohyaBuckets
from remote_vae.latents.format import Architecture, Encoded, Format, ImageFile, crop_ltrb
from remote_vae.latents.storage import Folder


@dataclass
class Kohya(Format):
    architectures: ClassVar[dict[str, Architecture]] = {
        "sd-v1": Architecture("sd-v1", "sd", 64, normalized=False),
        "sdxl": Architecture("sdxl", "sdxl", 64, normalized=False),
        "sd3": Architecture("sd3", "sd3", 64, normalized=False),
        "flux": Architecture("flux", "flux", 64),
        "lumina": Architecture("flux", "lumina", 64),
        "hunyuan_image": Architecture("hunyuan-image", "hi", 64, normalized=False),
        "anima": Architecture("qwen-image", "anima", 64, "argmax"),
    }
    scale_factors: ClassVar[dict[str, int]] = {"hunyuan_image": 32}
    """Pixels per latent, where they are not 8."""
    trainer: ClassVar[str] = "sd-scripts"
    suffixes: ClassVar[frozenset[str]] = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"})
    any_case: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = max(1024, *self.resolution)
        self.buckets = KohyaBuckets(self.resolution, self.upscale, largest=largest, steps=self.architecture.steps)
        self.mixes_resolutions = self.arch not in ("sd-v1", "sdxl")
        """The keys of the arrays in a file end in the size of the latents."""

    def files(self, images: list[ImageFile]) -> list[Path]:
        return [images[0].sized_name(f"{self.architecture.ending}.npz")]

    def is_stored(self, out: Folder, image: ImageFile) -> bool:
        exists = super().is_stored(out, image)
        if not exists or not self.mixes_resolutions:
            return exists
        width, height = (side // self.scale_factors.get(str(self.arch), 8) for side in image.placement.bucket)
        size = f"_{height}x{width}"
        with _npz(out, self.name(image)) as file:
            return f"latents{size}" in file and (not self.flip or f"latents_flipped{size}" in file)

    def contents(self, encoded: list[Encoded], out: Folder) -> list[bytes]:
        """Return the file. It keeps the arrays of other resolutions that it has already."""
        (item,) = encoded
        name = self.name(item.image)
        height, width = item.latents.shape[-2:]
        size = f"_{height}x{width}" if self.mixes_resolutions else ""
        arrays: dict[str, Any] = {}
        if self.mixes_resolutions and out.is_file(name):
            with _npz(out, name) as file:
                arrays.update(file)
        arrays |= {
            f"latents{size}": item.latents.float().numpy(),
            f"original_size{size}": np.array(item.image.placement.original),
            f"crop_ltrb{size}": np.array(crop_ltrb(item.image.placement)),
        }
        if item.flipped is not None:
            arrays[f"latents_flipped{size}"] = item.flipped.float().numpy()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
        return [buffer.getvalue()]


@contextmanager
def _npz(out: Folder, name: Path) -> Iterator[Any]:
    try:
        with np.load(io.BytesIO(out.read(name))) as file:
            yield file
    except Exception as error:  # numpy and zipfile raise half a dozen types for damaged files
        raise ValueError(f"{out.location}/{name} cannot be read as a .npz file ({error}); delete or move it") from None
