"""diffusers' autoencoders, all called alike: what each takes and gives besides is settled here."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from handlers.model import SampleMode


@dataclass(frozen=True)
class DecodeOptions:
    """What some autoencoders take beside latents."""

    timestep: float = 0.0
    """Of those that are conditioned on one (LTX-Video from 0.9.1 on); the noise that goes with it is in the latents."""
    chunk_frames: int | None = None
    """Frames at a time of those that take a video as a batch of pictures; None for all of a video."""
    exact: bool = False
    """Whether only diffusers' own pass will do."""


@dataclass(frozen=True)
class EncodeOptions:
    """What is taken of the distribution that an encoder gives; without one, as of AutoencoderTiny, the latents are."""

    sample_mode: SampleMode = "argmax"
    generator: torch.Generator | None = None
    """Of a sample."""
    exact: bool = False
    """Whether only diffusers' own pass will do."""

    def of(self, posterior: Any) -> Tensor:
        """Latents [B, C, ...], or moments [B, 2 * C, ...]."""
        match self.sample_mode:
            case "argmax":
                return posterior.mode()
            case "sample":
                return posterior.sample(self.generator)
            case "moments":
                return posterior.parameters


def has_frames(model: Any) -> bool:
    """Whether its tensors have a dimension for frames, also those of pictures."""
    return any(isinstance(module, nn.Conv3d) for module in model.encoder.modules())


def decode_at_once(model: Any, latents: Tensor, options: DecodeOptions = DecodeOptions()) -> Tensor:
    """Raw latents [B, C, H, W] or [B, C, F, H, W] to pixels [B, 3, H, W] or [B, 3, F, H, W]."""
    if latents.ndim == 5 and not has_frames(model):
        return torch.stack([_decode_images(model, video, options) for video in latents])
    arguments = {}
    if model.config.get("timestep_conditioning"):
        arguments["temb"] = torch.full((len(latents),), options.timestep, device=latents.device, dtype=latents.dtype)
    return model.decode(latents, return_dict=False, **arguments)[0]


def _decode_images(model: Any, video: Tensor, options: DecodeOptions) -> Tensor:
    """Latents [C, F, H, W] to [3, F, H, W], the frames as a batch. Most such models mix the frames of a batch."""
    mixes = "num_frames" in inspect.signature(model.decoder.forward).parameters
    chunks = video.movedim(0, 1).split(options.chunk_frames or video.shape[1])
    pictures = [
        model.decode(chunk, return_dict=False, **({"num_frames": len(chunk)} if mixes else {}))[0] for chunk in chunks
    ]
    return torch.cat(pictures).movedim(1, 0)


def encode_at_once(
    model: Any, pixels: Tensor, options: EncodeOptions = EncodeOptions(), one_by_one: bool = False
) -> Tensor:
    """Pixels in [-1, 1], [B, 3, H, W] or [B, 3, F, H, W], to raw latents, of pictures [B, C, 1, H, W] by some."""
    if pixels.ndim == 5 and not has_frames(model):
        pictures = encode_at_once(model, pixels.movedim(2, 1).flatten(0, 1), options, one_by_one)
        return pictures.unflatten(0, (-1, pixels.shape[2])).movedim(1, 2)
    encoded = posterior_of(model, pixels, one_by_one)
    return encoded if isinstance(encoded, Tensor) else options.of(encoded)


def posterior_of(model: Any, pixels: Tensor, one_by_one: bool = False) -> Any:
    """diffusers' distribution of the latents; or the latents, of the autoencoders that are not variational."""
    if pixels.ndim == 4 and has_frames(model):
        pixels = pixels.unsqueeze(2)
    encoded = [model.encode(part, return_dict=False)[0] for part in (pixels.split(1) if one_by_one else [pixels])]
    if isinstance(encoded[0], Tensor):
        return torch.cat(encoded)
    return type(encoded[0])(torch.cat([part.parameters for part in encoded])) if one_by_one else encoded[0]


def forget(model: Any) -> None:
    """Drops what a failed pass may have left in the model, and would go into the next one's result."""
    for name in ("clear_cache", "_clear_conv_cache"):
        if clear := getattr(model, name, None):
            clear()
