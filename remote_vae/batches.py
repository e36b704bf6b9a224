"""Sizes of batches and videos, from the endpoint's `/config`."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def batch_limit(config: dict[str, Any], batch: Tensor, pixels: int) -> int:
    """Return how many items of `batch` fit into one request, at least 1. Each has so many pixels."""
    limits = config["limits"]
    size = batch[0].numel() * batch.element_size()
    return max(min(limits["max_batch"], limits["max_pixels"] // pixels, int(limits["max_body_mb"] * 1e6) // size), 1)


def decoded_frames(config: dict[str, Any], latent_frames: int) -> int:
    """Return the frames of the video that so many latent frames are decoded to, from `frame_counts` of `/config`."""
    counts = config["pixels"]["frame_counts"]
    periods, position = divmod(latent_frames - 1, len(counts) - 1)
    return counts[position] + periods * (counts[-1] - counts[0])


def encoded_frames(config: dict[str, Any], frames: int) -> int:
    """Return the most latent frames that the VAE encodes of at most so many frames; at least 1."""
    count = following = 1
    while decoded_frames(config, following) <= frames:
        count, following = following, following + (config["latents"]["clip"] if following > 1 else 1)
    return count


def fits_latents(config: dict[str, Any], frames: int, height: int, width: int) -> bool:
    """Return True if the VAE encodes every pixel of such an image or video, and pads none."""
    side = config["latents"]["vae_scale_factor"]
    if height % side or width % side:
        return False
    return config["kind"] == "image" or decoded_frames(config, encoded_frames(config, frames)) == frames
