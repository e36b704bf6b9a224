"""The object that ComfyUI's nodes pass on as VAE: the code around its model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Placeholder(torch.nn.Module):
    """Model of a VAE without weights."""

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class Patcher:
    """Holder of a model for ComfyUI's memory management. Its clones share the model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def clone(self) -> Patcher:
        return Patcher(self.model)


class VAE:
    """VAE for images or frames `[B, H, W, C]` in [0, 1]. Its model takes `[B, C, (F,) H, W]` in [-1, 1]."""

    def __init__(self, sd: dict[str, Tensor], device: Any = None, dtype: Any = None) -> None:
        assert set(sd) == {"pixel_space_vae"}  # this kind alone has no weights
        self.device, self.vae_dtype = device, dtype
        self.first_stage_model: Any = Placeholder()
        self.patcher = Patcher(self.first_stage_model)
        self.latent_dim, self.latent_channels, self.output_channels = 2, 3, 3
        self.upscale_ratio: Any = 1
        self.downscale_ratio: Any = 1
        self.not_video = False

    def encode(self, pixels: Tensor) -> Tensor:
        pixels = self._cropped(pixels).movedim(-1, 1)
        if self.latent_dim == 3 and pixels.ndim < 5:
            pixels = pixels.unsqueeze(2) if self.not_video else pixels.movedim(1, 0).unsqueeze(0)
        assert self.memory_used_encode(pixels.shape, self.vae_dtype) > 0  # ComfyUI divides the free memory by it
        return self.first_stage_model.encode((pixels * 2 - 1).to(self.vae_dtype).to(self.device)).float()

    def decode(self, latents: Tensor) -> Tensor:
        assert self.memory_used_decode(latents.shape, self.vae_dtype) > 0
        pixels = self.first_stage_model.decode(latents.to(self.vae_dtype).to(self.device)).float()
        return ((pixels + 1) / 2).clamp(0, 1).movedim(1, -1)

    def decode_tiled(self, latents: Tensor, tile: int) -> Tensor:
        """Decode tile by tile. These tiles do not overlap, unlike ComfyUI's."""
        side = self.spacial_compression_decode()
        frames = [self.upscale_ratio[0](latents.shape[2])] if latents.ndim == 5 else []
        height, width = (length * side for length in latents.shape[-2:])
        whole = torch.empty(latents.shape[0], self.output_channels, *frames, height, width)
        for y in range(0, latents.shape[-2], tile):
            for x in range(0, latents.shape[-1], tile):
                decoded = self.first_stage_model.decode(latents[..., y : y + tile, x : x + tile].to(self.vae_dtype))
                whole[..., y * side : (y + tile) * side, x * side : (x + tile) * side] = decoded
        return ((whole + 1) / 2).clamp(0, 1).movedim(1, -1)

    def spacial_compression_decode(self) -> int:
        return self.upscale_ratio[-1] if isinstance(self.upscale_ratio, tuple) else self.upscale_ratio

    def spacial_compression_encode(self) -> int:
        return self.downscale_ratio[-1] if isinstance(self.downscale_ratio, tuple) else self.downscale_ratio

    def temporal_compression_decode(self) -> int | None:
        return round(self.upscale_ratio[0](8192) / 8192) if isinstance(self.upscale_ratio, tuple) else None

    def _cropped(self, pixels: Tensor) -> Tensor:
        """Crop the middle, with sides that are multiples of a latent's side."""
        side = self.spacial_compression_encode()
        for dimension in (1, 2):
            length = pixels.shape[dimension]
            pixels = pixels.narrow(dimension, length % side // 2, length // side * side)
        return pixels
