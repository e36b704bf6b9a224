"""Latents as ComfyUI has them, and what is sent along so that an endpoint takes and gives those.

ComfyUI's latents are the VAE's own, raw: its samplers scale them (`comfy/latent_formats.py`). Where its VAE does more
than diffusers' class, so does this module:

- FLUX.2: normalised, and in patches of 2x2: 128 channels of 1/16 of the side.
- LTX-Video, LTX-2: normalised.
- TAESD and its like: a small decoder takes what the diffusion model gives; for ComfyUI that is scaled back to the raw
  latents of the large VAE.
- Qwen-Image: a picture is a video of one frame, as with Wan.
- Stable Video Diffusion: frames are a batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from remote_vae import Client, tensors
from remote_vae.batches import batch_limit, decoded_frames

NORMALISED = ("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video")

SCALED = {"taesd": (0.18215, 0.0), "taesdxl": (0.13025, 0.0), "taesd3": (1.5305, 0.0609), "taef1": (0.3611, 0.1159)}
"""Factor and shift of the large VAE that each stands for."""

LTX_TIMESTEP, LTX_NOISE = 0.05, 0.025
"""On which ComfyUI conditions the decoder of LTX-Video from 0.9.1 on, and the share of noise that it adds."""


class Statistics:
    """The mean and deviation of LTX's channels, by the names under which ComfyUI's nodes look for them in a VAE."""

    def __init__(self, normalization: dict[str, Any]) -> None:
        self.mean, self.std = (torch.tensor(normalization[name]).view(-1, 1, 1, 1) for name in ("mean", "std"))
        self.std = self.std / (normalization["factor"] or 1)

    def normalize(self, latents: Tensor) -> Tensor:
        """From the latents of the VAE's own range, `[B, C, F, H, W]`, to ComfyUI's."""
        return (latents - self.mean.to(latents)) / self.std.to(latents)

    def un_normalize(self, latents: Tensor) -> Tensor:
        """From ComfyUI's latents to those of the VAE's own range."""
        return latents * self.std.to(latents) + self.mean.to(latents)


class Latents:
    """Of the model that `/config` describes.

    Attributes:
        channels, factor: as ComfyUI has them, in patches of FLUX.2.
        dimensions: 3 where there are frames, else 2.
        statistics: of LTX's channels; None for other models, whose latents ComfyUI has raw.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.channels, self.factor = config["latents"]["channels"], config["latents"]["vae_scale_factor"]
        self.statistics: Statistics | None = None
        self.parameters: dict[str, Any] = {"latents_layout": config["latents"]["layout"]}
        self.video = config["kind"] == "video"
        self.batch_of_frames = config["vae_class"] == "AutoencoderKLTemporalDecoder"
        self.dimensions = 3 if config["latents"]["layout"] == "BCFHW" and not self.batch_of_frames else 2
        if config["vae_class"] == "AutoencoderKLFlux2":
            self.channels, self.factor = 4 * self.channels, 2 * self.factor
            self.parameters = {"latents_layout": "patchified", "do_scaling": True}
        elif config["vae_class"] in NORMALISED:
            self.parameters |= {"do_scaling": True, "normalized": True}
            self.statistics = Statistics(config["normalization"])
        self.scale, self.shift = SCALED.get(config["model"], (1.0, 0.0))
        self.conditioned = bool(config["vae_config"].get("timestep_conditioning"))

    @property
    def frames_each(self) -> int:
        """Of pixels, for a latent frame after the first."""
        counts = self.config["pixels"]["frame_counts"]
        return max((counts[2] - counts[0]) // 2, 1)

    def encoded_frames(self, frames: int) -> int:
        """Latent frames of so many frames of pixels, of which those that are too many are left out."""
        if not self.video:
            return frames
        most = 1 + (frames - 1) // self.frames_each
        return most if self.decoded_frames(most) <= frames else most - 1  # CogVideoX's second takes 7 frames, not 4

    def decoded_frames(self, latent_frames: int) -> int:
        """Frames of pixels of so many latent frames."""
        return decoded_frames(self.config, latent_frames) if self.video else latent_frames

    def encode(self, client: Client, pixels: Tensor) -> Tensor:
        """The mode of the latents of `[B, 3, H, W]` or `[B, 3, F, H, W]` in [-1, 1]."""
        batch = self._batch_for_endpoint(pixels)
        parameters = {**self.parameters, "memory_format": tensors.memory_format(batch)}
        if self.video:
            batch = batch[:, :, : self.decoded_frames(self.encoded_frames(batch.shape[2]))]
        limit = batch_limit(self.config, batch, math.prod(batch.shape[2:]))
        latents = torch.cat([tensors.encode(client, piece, **parameters) for piece in batch.split(limit)])
        if self.batch_of_frames:
            latents = latents[0].movedim(0, 1)
        return latents / self.scale + self.shift

    def decode(self, client: Client, latents: Tensor) -> Tensor:
        """To pixels about in [-1, 1]."""
        parameters = dict(self.parameters)
        if self.conditioned:
            latents = torch.randn_like(latents) * LTX_NOISE + latents * (1 - LTX_NOISE)
            parameters |= {"decode_timestep": LTX_TIMESTEP, "decode_noise_scale": 0}
        latents = (latents - self.shift) * self.scale
        batch = latents.movedim(0, 1).unsqueeze(0) if self.batch_of_frames else latents
        frames = 1
        if self.video:
            frames = self.decoded_frames(batch.shape[2])
            parameters["num_frames"] = 1 + (batch.shape[2] - 1) * self.frames_each  # none of them is padding
        limit = batch_limit(self.config, batch, frames * self.factor**2 * math.prod(batch.shape[-2:]))
        pixels = torch.cat([tensors.decode(client, piece, **parameters) for piece in batch.split(limit)])
        if self.batch_of_frames:
            return pixels[0].movedim(0, 1)
        return pixels.unsqueeze(2) if pixels.ndim < latents.ndim else pixels

    def _batch_for_endpoint(self, pixels: Tensor) -> Tensor:
        """As the endpoint has them: frames of a video in a dimension of their own, and of a picture in none."""
        if self.batch_of_frames:
            return pixels.movedim(0, 1).unsqueeze(0)
        return pixels.squeeze(2) if pixels.ndim == 5 and not self.video else pixels
