"""How much goes into one request, by what the endpoint's `/config` says of its limits."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def batch_limit(config: dict[str, Any], batch: Tensor, pixels: int) -> int:
    """How many of these go into one request; `pixels` of each."""
    limits = config["limits"]
    size = batch[0].numel() * batch.element_size()
    fits = min(limits["max_batch"], limits["max_pixels"] // pixels, int(limits["max_body_mb"] * 1e6) // size)
    return max(fits, 1)


def decoded_frames(config: dict[str, Any], latent_frames: int) -> int:
    """As the entry `frame_counts` of `/config` is defined."""
    counts = config["pixels"]["frame_counts"]
    return counts[(latent_frames - 1) % 2] + (latent_frames - 1) // 2 * (counts[2] - counts[0])


def encodes_whole(config: dict[str, Any], frames: int, height: int, width: int) -> bool:
    """Whether the VAE uses every pixel of such images or frames, and adds none."""
    side = config["latents"]["vae_scale_factor"]
    if config["kind"] == "video":
        latent_frames = 1
        while decoded_frames(config, latent_frames) < frames:
            latent_frames += 1
        if decoded_frames(config, latent_frames) != frames:
            return False
    return height % side == 0 and width % side == 0
