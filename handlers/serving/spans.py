"""Decoding that gives a video's frames as soon as they are finished; a picture is finished at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo
from torch import Tensor


def decode_spans(model: Any, latents: Tensor) -> Iterator[Tensor]:
    """Raw latents to pixels [B, 3, H, W], or to the next frames [B, 3, f, H, W] of a video, in order.

    Together they are what `model.decode` gives, bit for bit. AutoencoderKLHunyuanVideo decodes up to 17 frames at a
    time, the last 4 of them again with the 12 that follow, and blends the two. diffusers blends when all is decoded;
    here a span's frames are given before the next span is decoded.
    """
    if not _has_spans(model, latents):
        yield model.decode(latents, return_dict=False)[0]
        return
    length, stride = model.tile_sample_min_num_frames, model.tile_sample_stride_num_frames
    factor = model.temporal_compression_ratio
    before = None
    # a span that starts with the last latent frame has no new frames: diffusers decodes it, and drops the result
    for start in range(0, latents.shape[2] - 1, stride // factor):
        frames = _decode_at_once(model, latents[:, :, start : start + length // factor + 1])
        if before is None:
            yield frames[:, :, : stride + 1]
        else:
            frames = model.blend_t(before, frames[:, :, 1:], length - stride)
            yield frames[:, :, :stride]
        before = frames


def join(spans: Iterator[Tensor]) -> Tensor:
    """All pixels at once."""
    parts = list(spans)
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _has_spans(model: Any, latents: Tensor) -> bool:
    return (
        isinstance(model, AutoencoderKLHunyuanVideo)
        and model.use_framewise_decoding
        and latents.shape[2] > model.tile_sample_min_num_frames // model.temporal_compression_ratio
    )


def _decode_at_once(model: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    """All frames of one span, in slices and tiles where the model is set to them."""
    model.use_framewise_decoding = False
    try:
        return model.decode(latents, return_dict=False)[0]
    finally:
        model.use_framewise_decoding = True
