"""Calls of diffusers' autoencoders, with one signature for all of them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from handlers.model import SampleMode
from handlers.serving.vae.taehv import TinyVideoAutoencoder


@dataclass(frozen=True)
class DecodeOptions:
    """Options of a decode, for some autoencoders."""

    timestep: float = 0.0
    """Timestep for LTX-Video from version 0.9.1 on. The latents contain its noise already."""
    chunk_frames: int | None = None
    """Frames per chunk, if a video is decoded as a batch of images; None for all."""
    exact: bool = False
    """True if diffusers' own pass is required."""


@dataclass(frozen=True)
class EncodeOptions:
    """Options of an encode. They do not matter for an encoder without a distribution, as in AutoencoderTiny."""

    sample_mode: SampleMode = "argmax"
    generator: torch.Generator | None = None
    """Random generator of a sample."""
    exact: bool = False
    """True if diffusers' own pass is required."""

    def apply(self, posterior: Any) -> Tensor:
        """Return latents [B, C, ...] of a distribution, or its moments [B, 2 * C, ...]."""
        match self.sample_mode:
            case "argmax":
                return posterior.mode()
            case "sample":
                return posterior.sample(self.generator)
            case "moments":
                return posterior.parameters


class PixelRange:
    """Conversion between pixels in [-1, 1] and those of a VAE with a mean and a deviation for each channel."""

    def __init__(self, statistics: tuple[tuple[float, ...], tuple[float, ...]] | None) -> None:
        self.statistics = statistics

    def to_own(self, pixels: Tensor) -> Tensor:
        """Convert pixels [B, C, (F,) H, W] in [-1, 1] to the VAE's."""
        if self.statistics is None:
            return pixels
        mean, std = self._expanded(pixels)
        return (pixels / 2 + 0.5 - mean) / std

    def from_own(self, pixels: Tensor) -> Tensor:
        """Convert the VAE's pixels to [-1, 1], in float32, as its pipeline does."""
        if self.statistics is None:
            return pixels
        mean, std = self._expanded(pixels)
        return (pixels.float() * std + mean) * 2 - 1

    def _expanded(self, pixels: Tensor) -> list[Tensor]:
        assert self.statistics is not None
        ones = (1,) * (pixels.ndim - 2)
        return [torch.tensor(values, device=pixels.device).view(1, -1, *ones) for values in self.statistics]


def shuffle(pixels: Tensor, upscale: int) -> Tensor:
    """Return decoded pixels [B, C * upscale * upscale, (F,) h, w] as [B, C, (F,) h * upscale, w * upscale]."""
    if upscale == 1:
        return pixels
    return torch.pixel_shuffle(pixels.movedim(1, -3), upscale).movedim(-3, 1)


def has_frames(model: Any) -> bool:
    """Return whether the model's tensors have a dimension for frames, even for images. The first convolution tells."""
    if isinstance(model, TinyVideoAutoencoder):
        return True
    for module in model.encoder.modules():
        # the convolutions of Qwen-Image 2.1 are of images, and its tensors have frames nevertheless
        if isinstance(module, nn.Conv3d) or type(module).__name__.endswith("CausalConv3d"):
            return True
        if isinstance(module, nn.Conv2d):
            return False
    return False


def decode_at_once(model: Any, latents: Tensor, options: DecodeOptions = DecodeOptions()) -> Tensor:
    """Decode raw latents [B, C, H, W] or [B, C, F, H, W] to pixels [B, 3, H, W] or [B, 3, F, H, W]."""
    if latents.ndim == 5 and not has_frames(model):
        return torch.stack([_decode_images(model, video, options) for video in latents])
    arguments = {}
    if model.config.get("timestep_conditioning"):
        arguments["temb"] = torch.full((len(latents),), options.timestep, device=latents.device, dtype=latents.dtype)
    return model.decode(latents, return_dict=False, **arguments)[0]


def _decode_images(model: Any, video: Tensor, options: DecodeOptions) -> Tensor:
    """Decode latents [C, F, H, W] to [3, F, H, W], with the frames as a batch. Some models mix frames of a batch."""
    mixes = "num_frames" in inspect.signature(model.decoder.forward).parameters
    chunks = video.movedim(0, 1).split(options.chunk_frames or video.shape[1])
    images = [
        model.decode(chunk, return_dict=False, **({"num_frames": len(chunk)} if mixes else {}))[0] for chunk in chunks
    ]
    return torch.cat(images).movedim(1, 0)


def encode_at_once(
    model: Any, pixels: Tensor, options: EncodeOptions = EncodeOptions(), one_by_one: bool = False
) -> Tensor:
    """Encode pixels in [-1, 1], [B, 3, H, W] or [B, 3, F, H, W], to raw latents, or [B, C, 1, H, W] for some images."""
    if pixels.ndim == 5 and not has_frames(model):
        images = encode_at_once(model, pixels.movedim(2, 1).flatten(0, 1), options, one_by_one)
        return images.unflatten(0, (-1, pixels.shape[2])).movedim(1, 2)
    encoded = posterior_of(model, pixels, one_by_one)
    return encoded if isinstance(encoded, Tensor) else options.apply(encoded)


def posterior_of(model: Any, pixels: Tensor, one_by_one: bool = False) -> Any:
    """Return diffusers' distribution of the latents, or the latents of an autoencoder that is not variational."""
    if pixels.ndim == 4 and has_frames(model):
        pixels = pixels.unsqueeze(2)
    encoded = [model.encode(item, return_dict=False)[0] for item in (pixels.split(1) if one_by_one else [pixels])]
    if isinstance(encoded[0], Tensor):
        return torch.cat(encoded)
    return type(encoded[0])(torch.cat([posterior.parameters for posterior in encoded])) if one_by_one else encoded[0]


def forget(model: Any) -> None:
    """Clear the frames that a failed pass may have left in the model's caches."""
    for name in ("clear_cache", "_clear_conv_cache"):
        if clear := getattr(model, name, None):
            clear()
