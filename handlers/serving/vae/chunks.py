"""Decoding that gives a video's frames as soon as they are finished; a picture is finished at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from handlers.serving.vae.autoencoder import DecodeOptions, decode_at_once


def decode_chunks(
    model: Any,
    latents: Tensor,
    options: DecodeOptions = DecodeOptions(),  # noqa: B008
) -> Iterator[Tensor]:
    """Raw latents to pixels [B, 3, H, W], or to the next frames [B, 3, f, H, W] of a video, in order.

    Together they are what `decode_at_once` gives, bit for bit. Where the model is set to tiles, each tile has all
    frames, so they are finished together; but AutoencoderKLHunyuanVideo cuts time before space.
    """
    for model_class, chunks in CHUNKED_DECODERS.items():
        if isinstance(model, model_class) and (chunks is _blended_chunks or not model.use_tiling):
            yield from chunks(model, latents)
            return
    yield decode_at_once(model, latents, options)


def join(chunks: Iterator[Tensor]) -> Tensor:
    """All pixels at once."""
    parts = list(chunks)
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _frame_by_frame(model: AutoencoderKLWan, latents: Tensor) -> Iterator[Tensor]:
    """A latent frame at a time; what its convolutions need of the frames before it is kept in the model."""
    model.clear_cache()
    for index, frame in enumerate(model.post_quant_conv(latents).split(1, dim=2)):
        model._conv_idx = [0]
        frames = model.decoder(frame, feat_cache=model._feat_map, feat_idx=model._conv_idx, first_chunk=index == 0)
        if model.config.patch_size is not None:
            frames = unpatchify(frames, patch_size=model.config.patch_size)
        yield frames.clamp(-1.0, 1.0)
    model.clear_cache()


def _in_small_batches(model: AutoencoderKLCogVideoX, latents: Tensor) -> Iterator[Tensor]:
    """Two latent frames at a time, the first time three where their number is odd."""
    size, cache = model.num_latent_frames_batch_size, None
    first = min(size + latents.shape[2] % size, latents.shape[2])
    for part in (latents[:, :, :first], *latents[:, :, first:].split(size, dim=2)):
        if part.shape[2]:
            if model.post_quant_conv is not None:
                part = model.post_quant_conv(part)
            frames, cache = model.decoder(part, conv_cache=cache)
            yield frames


def _blended_chunks(model: AutoencoderKLHunyuanVideo, latents: Tensor) -> Iterator[Tensor]:
    """Up to 17 frames at a time, the last 4 of them again with the 12 that follow, and the two blended.

    diffusers blends when all is decoded; here a chunk's frames are given before the next chunk is decoded.
    """
    length, stride = model.tile_sample_min_num_frames, model.tile_sample_stride_num_frames
    factor = model.temporal_compression_ratio
    if not model.use_framewise_decoding or latents.shape[2] <= length // factor:
        yield decode_at_once(model, latents)
        return
    before = None
    # a chunk that starts with the last latent frame has no new frames: diffusers decodes it, and drops the result
    for start in range(0, latents.shape[2] - 1, stride // factor):
        frames = _decode_one_chunk(model, latents[:, :, start : start + length // factor + 1])
        if before is None:
            yield frames[:, :, : stride + 1]
        else:
            frames = model.blend_t(before, frames[:, :, 1:], length - stride)
            yield frames[:, :, :stride]
        before = frames


def _decode_one_chunk(model: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    """All its frames, in tiles where the model is set to them."""
    model.use_framewise_decoding = False
    try:
        return decode_at_once(model, latents)
    finally:
        model.use_framewise_decoding = True


CHUNKED_DECODERS: dict[type[Any], Callable[[Any, Tensor], Iterator[Tensor]]] = {
    AutoencoderKLWan: _frame_by_frame,
    AutoencoderKLCogVideoX: _in_small_batches,
    AutoencoderKLHunyuanVideo: _blended_chunks,
}
"""How each class that does not need all latents for the first frame is run; all others decode at once."""
