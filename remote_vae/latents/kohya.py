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
from remote_vae.latents.format import Encoded, Format, ImageFile, crop_ltrb


@dataclass
class Kohya(Format):
    models: ClassVar[dict[str, tuple[str, bool, bool]]] = {
        "sd-v1": ("sd", False, False),
        "sdxl": ("sdxl", False, False),
        "sd3": ("sd3", True, False),
        "flux": ("flux", True, True),
    }
    """Ending of the file's name; keys end in the latents' size; latents are normalized."""
    trainer: ClassVar[str] = "sd-scripts"
    suffixes: ClassVar[frozenset[str]] = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl"})
    any_case: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.buckets = KohyaBuckets(self.resolution, self.upscale, largest=max(1024, *self.resolution))
        self.ending, self.mixes_resolutions, self.normalized = self.models[self.model]

    def files(self, images: list[ImageFile]) -> list[Path]:
        return [images[0].sized_name(f"{self.ending}.npz")]

    def is_stored(self, out: Path, image: ImageFile) -> bool:
        exists = super().is_stored(out, image)
        if not exists or not self.mixes_resolutions:
            return exists
        width, height = image.placement.bucket
        size = f"_{height // 8}x{width // 8}"
        with _npz(out / self.name(image)) as file:
            return f"latents{size}" in file and (not self.flip or f"latents_flipped{size}" in file)

    def contents(self, encoded: list[Encoded], paths: list[Path]) -> list[bytes]:
        """Return the file. It keeps the arrays of other resolutions that it has already."""
        (item,), (path,) = encoded, paths
        height, width = item.latents.shape[-2:]
        size = f"_{height}x{width}" if self.mixes_resolutions else ""
        arrays: dict[str, Any] = {}
        if self.mixes_resolutions and path.exists():
            with _npz(path) as file:
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
def _npz(path: Path) -> Iterator[Any]:
    try:
        with np.load(path) as file:
            yield file
    except Exception as error:  # numpy and zipfile raise half a dozen types for damaged files
        raise ValueError(f"{path} cannot be read as a .npz file ({error}); delete or move it") from None
