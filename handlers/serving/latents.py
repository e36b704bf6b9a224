"""Latents between the forms that clients send and the one that a VAE takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handlers.serving.errors import RequestError
from handlers.serving.layout import Layout
from handlers.serving.request import Parameters


def is_packed(shape: tuple[int, ...], parameters: Parameters, layout: Layout) -> bool:
    """Whether this is the shape of packed latents of the height and width that came with it.

    The number of dimensions does not tell: an unbatched [C, H, W] latent has three too, and one client sends height and
    width along with it.
    """
    rows, columns = packed_grid(parameters, layout)
    return len(shape) == 3 and shape[1] == rows * columns > 0 and shape[2] == layout.latent_channels * 4


def packed_grid(parameters: Parameters, layout: Layout) -> tuple[int, int]:
    """Rows and columns of 2x2 patches in pixels of the height and width that came; zeros where none came."""
    patch = 2 * layout.vae_scale_factor
    try:
        rows, columns = int(parameters.height) // patch, int(parameters.width) // patch
    except (TypeError, ValueError, OverflowError):
        return 0, 0
    return max(rows, 0), max(columns, 0)


def unpack(latents: Tensor, rows: int, columns: int) -> Tensor:
    """[B, rows * columns, C * 4] of 2x2 patches to [B, C, rows * 2, columns * 2]."""
    batch, _, features = latents.shape
    latents = latents.view(batch, rows, columns, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return latents.reshape(batch, features // 4, rows * 2, columns * 2)


def to_batch(latents: Tensor, parameters: Parameters, layout: Layout) -> Tensor:
    """Packed, unbatched or plain latents to the VAE's [B, C, H, W] (image) or [B, C, F, H, W] (video).

    Raises:
        RequestError: the shape is none of these for this VAE.
    """
    shape, scale, channels = tuple(latents.shape), layout.vae_scale_factor, layout.latent_channels
    if is_packed(shape, parameters, layout):
        latents = unpack(latents, *packed_grid(parameters, layout))
        return latents.unsqueeze(2) if layout.kind == "video" else latents
    if latents.ndim == layout.ndim - 1 and shape[0] == channels:
        return latents.unsqueeze(0)
    if latents.ndim == layout.ndim and shape[1] == channels:
        return latents
    raise RequestError(
        f"`shape` {list(shape)} is no shape of this VAE's latents: expected {layout.describe(channels, scale)}, the "
        f"same without B, or packed [B, (height/{2 * scale})*(width/{2 * scale}), {channels * 4}] with `height` and "
        f"`width` (got height={str(parameters.height)[:20]}, width={str(parameters.width)[:20]})",
        422,
    )


@dataclass(frozen=True)
class Scaling:
    """Between what the VAE gives (raw) and what the diffusion model takes: ``scaled = (raw - shift) * factor``.

    Both are numbers, or tensors that broadcast over the channels.
    """

    factor: float | Tensor = 1.0
    shift: float | Tensor = 0.0

    @classmethod
    def of(cls, parameters: Parameters, config: Mapping[str, Any], layout: Layout) -> Scaling:
        """What the client sent, or the checkpoint's own where it sent `do_scaling` alone, or none."""
        if parameters.do_scaling and parameters.scaling_factor is None:
            return cls.of_config(config, layout)
        return cls(parameters.scaling_factor or 1.0, parameters.shift_factor or 0.0)

    @classmethod
    def of_config(cls, config: Mapping[str, Any], layout: Layout) -> Scaling:
        """The checkpoint's: mean and standard deviation a channel where its config has them, else scaling and shift."""
        factor = config.get("scaling_factor") or 1.0
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return cls(factor, config.get("shift_factor") or 0.0)
        channels = layout.broadcast(len(mean))
        return cls(factor / torch.tensor(std).view(channels), torch.tensor(mean).view(channels))

    def unscale(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        """Scaled latents to raw ones in `dtype`, computed in the wider of their dtype and `dtype`."""
        latents = latents.to(torch.promote_types(latents.dtype, dtype))
        factor, shift = self._on(latents.device)
        return (latents / factor + shift).to(dtype)

    def scale(self, latents: Tensor) -> Tensor:
        """Raw latents to scaled ones, in their own dtype."""
        factor, shift = self._on(latents.device)
        return ((latents - shift) * factor).to(latents.dtype)

    def _on(self, device: torch.device) -> list[float | Tensor]:
        return [value.to(device) if isinstance(value, Tensor) else value for value in (self.factor, self.shift)]
