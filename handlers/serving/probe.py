"""What a loaded autoencoder's tensors look like: found on a copy without weights, which takes no memory."""

from __future__ import annotations

from typing import Any

import torch

from handlers.model import Model
from handlers.serving.autoencoder import DecodeOptions, decode_at_once, encode_at_once, has_frames
from handlers.serving.layout import Layout

SIDE = 64
"""Pixels of the picture that is encoded: a multiple of what every known VAE shrinks by, 8 to 32."""


def probe(model: Any, declared: type[Model]) -> Layout:
    """The layout of a diffusers autoencoder, in about 0.1 s for pictures and 0.4 s for videos.

    Raises:
        ValueError: it takes no RGB pixels.
    """
    with torch.device("meta"), torch.no_grad():
        copy = type(model).from_config(model.config).eval()
        try:
            latents = encode_at_once(copy, torch.zeros(1, 3, SIDE, SIDE))
        except RuntimeError as error:
            raise ValueError(
                f"{declared.__name__}: its {declared.vae_class} encodes no RGB picture ({error})"
            ) from None
        channels, frames = latents.shape[1], (1, 2, 3) if declared.kind == "video" else (1, 1, 1)
        if declared.kind == "video" and has_frames(copy):
            videos = (torch.zeros(1, channels, count, 2, 2) for count in (1, 2, 3))
            frames = tuple(decode_at_once(copy, video, DecodeOptions()).shape[2] for video in videos)
    return Layout(declared.kind, channels, SIDE // latents.shape[-1], frames, 5 if has_frames(model) else 4)


def differs(layout: Layout, declared: type[Model]) -> str | None:
    """What the model declares otherwise than it was found, with what was found; None where all is right."""
    found = {
        "latent_channels": layout.latent_channels,
        "vae_scale_factor": layout.vae_scale_factor,
        "frame_factor": layout.frame_factor if layout.kind == "video" else 1,
    }
    wrong = [f"{name} = {value}" for name, value in found.items() if getattr(declared, name, None) != value]
    if not wrong:
        return None
    said = ", ".join(f"{name.split()[0]} = {getattr(declared, name.split()[0], None)}" for name in wrong)
    return f"{declared.__name__} declares {said}, but its {declared.vae_class} has {', '.join(wrong)}"
