"""Latents in ComfyUI's layout and range, and the parameters with which an endpoint takes and returns those.

ComfyUI's latents are the VAE's own, raw: its samplers scale them (`comfy/latent_formats.py`). For some models,
ComfyUI's VAE does more than diffusers' class, and so does this module:

- FLUX.2: latents are normalized and in patches of 2x2, so they have 128 channels and 1/16 of the side.
- LTX-Video, LTX-2, MiniMax-H3: latents are normalized.
- TAESD and similar: the small decoder takes the diffusion model's latents. ComfyUI scales them back to the raw latents
  of the large VAE.
- Qwen-Image: an image is a video of one frame, as with Wan.
- Stable Video Diffusion: the frames are a batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from remote_vae import Client, tensors
from remote_vae.batches import batch_limit, decoded_frames, encoded_frames

SCALING = {"taesd": (0.18215, 0.0), "taesdxl": (0.13025, 0.0), "taesd3": (1.5305, 0.0609), "taef1": (0.3611, 0.1159)}
"""Factor and shift of the large VAE that each small one replaces."""

LTX_TIMESTEP, LTX_NOISE = 0.05, 0.025
"""Timestep and share of noise of ComfyUI's decoder for LTX-Video from 0.9.1 on."""


LTX = ("AutoencoderKLLTXVideo", "AutoencoderKLLTX2Video")


class Statistics:
    """Mean and deviation of LTX's channels, under the names that ComfyUI's nodes look for in a VAE."""

    def __init__(self, normalization: dict[str, Any]) -> None:
        self.mean, self.std = (torch.tensor(normalization[name]).view(-1, 1, 1, 1) for name in ("mean", "std"))
        self.std = self.std / (normalization["factor"] or 1)

    def normalize(self, latents: Tensor) -> Tensor:
        """Normalize raw latents `[B, C, F, H, W]`."""
        return (latents - self.mean.to(latents)) / self.std.to(latents)

    def un_normalize(self, latents: Tensor) -> Tensor:
        """Return the raw latents of ComfyUI's latents."""
        return latents * self.std.to(latents) + self.mean.to(latents)


class Latents:
    """ComfyUI's latents of the model that `/config` describes.

    Attributes:
        channels, factor: channels of the latents, and encoded pixels of a side for each of their values.
        decode_factor: decoded pixels of a side for each value.
        dimensions: 3 for the VAE of a video model, else 2.
        statistics: statistics of LTX's channels; None for all other models.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.channels, self.factor = config["latents"]["channels"], config["latents"]["vae_scale_factor"]
        self.statistics: Statistics | None = None
        self.parameters: dict[str, Any] = {"latents_layout": config["latents"]["layout"]}
        self.is_video = config["kind"] == "video"
        self.frames_in_batch = config["vae_class"] == "AutoencoderKLTemporalDecoder"
        self.dimensions = 3 if config["latents"]["layout"] == "BCFHW" and not self.frames_in_batch else 2
        if config["vae_class"] in ("AutoencoderKLFlux2", "TinyFlux2Autoencoder"):
            self.channels, self.factor = 4 * self.channels, 2 * self.factor
            self.parameters = {"latents_layout": "patchified", "do_scaling": True}
        elif config["latents"]["comfyui"] == "normalized":
            self.parameters |= {"do_scaling": True, "normalized": True}
            if config["vae_class"] in LTX:
                self.statistics = Statistics(config["normalization"])
        self.decode_factor = self.factor * config["pixels"]["upscale"]
        self.scale, self.shift = SCALING.get(config["model"], (1.0, 0.0))
        self.is_conditioned = bool(config["vae_config"].get("timestep_conditioning"))

    @property
    def frame_factor(self) -> int:
        """Frames of a video per latent frame after the first."""
        counts = self.config["pixels"]["frame_counts"]
        return max((counts[2] - counts[0]) // 2, 1)

    def encoded_frames(self, frames: int) -> int:
        """Return the latent frames of so many frames. Frames that do not fill a latent frame are left out."""
        if not self.is_video:
            return frames
        return encoded_frames(self.config, frames)

    def decoded_frames(self, latent_frames: int) -> int:
        """Return the frames of so many latent frames."""
        return decoded_frames(self.config, latent_frames) if self.is_video else latent_frames

    def encode(self, client: Client, pixels: Tensor) -> Tensor:
        """Encode `[B, 3, H, W]` or `[B, 3, F, H, W]` in [-1, 1] to the mode of the latents."""
        batch = pixels
        if self.frames_in_batch:
            batch = pixels.movedim(0, 1).unsqueeze(0)
        elif pixels.ndim == 5 and not self.is_video:
            batch = pixels.squeeze(2)
        parameters = {**self.parameters, "memory_format": tensors.memory_format(batch)}
        if self.is_video:
            batch = batch[:, :, : self.decoded_frames(self.encoded_frames(batch.shape[2]))]
        limit = batch_limit(self.config, batch, math.prod(batch.shape[2:]))
        latents = torch.cat([tensors.encode(client, piece, **parameters) for piece in batch.split(limit)])
        if self.frames_in_batch:
            latents = latents[0].movedim(0, 1)
        return latents / self.scale + self.shift

    def decode(self, client: Client, latents: Tensor) -> Tensor:
        """Decode to pixels about in [-1, 1]."""
        parameters = dict(self.parameters)
        if self.is_conditioned:
            latents = torch.randn_like(latents) * LTX_NOISE + latents * (1 - LTX_NOISE)
            parameters |= {"decode_timestep": LTX_TIMESTEP, "decode_noise_scale": 0}
        latents = (latents - self.shift) * self.scale
        batch = latents.movedim(0, 1).unsqueeze(0) if self.frames_in_batch else latents
        frames = 1
        if self.is_video:
            frames = self.decoded_frames(batch.shape[2])
            if self.config["latents"]["clip"] == 1:
                parameters["num_frames"] = 1 + (batch.shape[2] - 1) * self.frame_factor  # so that no frame is padding
        limit = batch_limit(self.config, batch, frames * self.decode_factor**2 * math.prod(batch.shape[-2:]))
        pixels = torch.cat([tensors.decode(client, piece, **parameters) for piece in batch.split(limit)])
        if self.frames_in_batch:
            return pixels[0].movedim(0, 1)
        return pixels.unsqueeze(2) if pixels.ndim < latents.ndim else pixels
