"""Decoding in chunks: the frames of a video as soon as they are finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor

from handlers.serving.vae.autoencoder import DecodeOptions, decode_at_once
from handlers.serving.vae.taehv import TinyVideoAutoencoder


def decode_chunks(
    model: Any,
    latents: Tensor,
    options: DecodeOptions = DecodeOptions(),  # noqa: B008
) -> Iterator[Tensor]:
    """Decode raw latents to pixels [B, 3, H, W], or to chunks of frames [B, 3, f, H, W] in order.

    Joined, the chunks equal the result of `decode_at_once`, bit for bit. With tiling, each tile has all frames, so
    there is one chunk, except for AutoencoderKLHunyuanVideo, which cuts time before space.
    """
    for model_class, chunks in CHUNKED_DECODERS.items():
        if isinstance(model, model_class) and (chunks is _blended_chunks or not model.use_tiling):
            yield from chunks(model, latents)
            return
    yield decode_at_once(model, latents, options)


def join(chunks: Iterator[Tensor]) -> Tensor:
    """Join chunks of frames to all pixels."""
    frames = list(chunks)
    return torch.cat(frames, dim=2) if len(frames) > 1 else frames[0]


def _frame_by_frame(model: AutoencoderKLWan, latents: Tensor) -> Iterator[Tensor]:
    """Decode one latent frame at a time. The model caches what its convolutions need of earlier frames."""
    model.clear_cache()
    for index, frame in enumerate(model.post_quant_conv(latents).split(1, dim=2)):
        model._conv_idx = [0]
        frames = model.decoder(frame, feat_cache=model._feat_map, feat_idx=model._conv_idx, first_chunk=index == 0)
        if model.config.patch_size is not None:
            frames = unpatchify(frames, patch_size=model.config.patch_size)
        yield frames.clamp(-1.0, 1.0)
    model.clear_cache()


def _in_small_batches(model: AutoencoderKLCogVideoX, latents: Tensor) -> Iterator[Tensor]:
    """Decode two latent frames at a time, and three at first if their number is odd."""
    size, cache = model.num_latent_frames_batch_size, None
    first = min(size + latents.shape[2] % size, latents.shape[2])
    for chunk in (latents[:, :, :first], *latents[:, :, first:].split(size, dim=2)):
        if chunk.shape[2]:
            if model.post_quant_conv is not None:
                chunk = model.post_quant_conv(chunk)
            frames, cache = model.decoder(chunk, conv_cache=cache)
            yield frames


def _blended_chunks(model: AutoencoderKLHunyuanVideo, latents: Tensor) -> Iterator[Tensor]:
    """Decode up to 17 frames at a time. Each chunk overlaps the previous one by 4 frames, which are blended.

    diffusers blends after all chunks are decoded. Here each chunk is yielded before the next one is decoded.
    """
    length, stride = model.tile_sample_min_num_frames, model.tile_sample_stride_num_frames
    factor = model.temporal_compression_ratio
    if not model.use_framewise_decoding or latents.shape[2] <= length // factor:
        yield decode_at_once(model, latents)
        return
    previous = None
    # diffusers also decodes a chunk that starts with the last latent frame, and drops it: it has no new frames
    for start in range(0, latents.shape[2] - 1, stride // factor):
        frames = _decode_one_chunk(model, latents[:, :, start : start + length // factor + 1])
        if previous is None:
            yield frames[:, :, : stride + 1]
        else:
            frames = model.blend_t(previous, frames[:, :, 1:], length - stride)
            yield frames[:, :, :stride]
        previous = frames


def _decode_one_chunk(model: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    """Decode the frames of one chunk, in tiles if the model is set to tiling."""
    model.use_framewise_decoding = False
    try:
        return decode_at_once(model, latents)
    finally:
        model.use_framewise_decoding = True


CHUNKED_DECODERS: dict[type[Any], Callable[[Any, Tensor], Iterator[Tensor]]] = {
    AutoencoderKLWan: _frame_by_frame,
    AutoencoderKLCogVideoX: _in_small_batches,
    AutoencoderKLHunyuanVideo: _blended_chunks,
    TinyVideoAutoencoder: TinyVideoAutoencoder.decode_frames,
}
"""Functions for the classes that do not need all latents for the first frame. All others decode at once."""
