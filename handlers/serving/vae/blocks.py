"""Blocks of diffusers' encoders and decoders, as a sequence of ops that another pass can replace.

diffusers' forward pass is a tree of modules that call each other. For another pass (`low_memory`, `fast`), an encoder
or decoder is a sequence of residual blocks, with attention or a change of size between some. `run` goes through this
sequence. The modules of Wan and Qwen-Image keep earlier frames, so their `forward`s are replaced one by one instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from handlers.serving.vae.stop import check_wanted

Module = Any
"""A module of diffusers. No type describes its attributes; the sets of class names below do."""
Op = Callable[[Tensor], Tensor]

CAUSAL_CODERS = {"WanEncoder3d", "WanDecoder3d", "QwenImageEncoder3d", "QwenImageDecoder3d"}
CODERS = {"Encoder", "Decoder", "HunyuanVideoEncoder3D", "HunyuanVideoDecoder3D"}
BLOCKS = {
    "UNetMidBlock2D",
    "DownEncoderBlock2D",
    "UpDecoderBlock2D",
    "HunyuanVideoMidBlock3D",
    "HunyuanVideoDownBlock3D",
    "HunyuanVideoUpBlock3D",
}
"""Classes of blocks whose ops are known. Others have other modules, or a `forward` with other arguments."""


class BlockOps(NamedTuple):
    """Ops of a pass. Each takes a tensor [B, C, H, W] or [B, C, F, H, W] that it may overwrite."""

    residual: Callable[[Module, Tensor], Tensor]
    upsample: Callable[[Module, Tensor], Tensor]
    downsample: Callable[[Module, Tensor], Tensor]
    attend: Callable[[Module, Tensor], Tensor]
    finish: Callable[[Module, Tensor], Tensor]
    """Last normalization, activation and convolution of the coder."""


def coders_of(model: Any) -> list[Module]:
    """Return the encoder and the decoder."""
    return [model.encoder, model.decoder]


def is_known(model: Any) -> bool:
    """Return whether all blocks of the model are known."""
    coders = [getattr(model, "encoder", None), getattr(model, "decoder", None)]
    return is_causal(coders) or all(
        type(coder).__name__ in CODERS and all(type(block).__name__ in BLOCKS for block in _blocks(coder))
        for coder in coders
    )


def is_causal(coders: list[Any]) -> bool:
    """Return whether the coders are Wan's or Qwen-Image's."""
    return all(type(coder).__name__ in CAUSAL_CODERS for coder in coders)


@torch.no_grad()
def run(coder: Module, ops: BlockOps, sample: Tensor, latent_embeds: None = None) -> Tensor:
    """Run a coder's ops, instead of its `forward`. The input of each op is freed after it."""
    for op in _ops(coder, ops):
        check_wanted()
        sample = op(sample)
    return sample


def _blocks(coder: Module) -> list[Module]:
    if hasattr(coder, "down_blocks"):
        return [*coder.down_blocks, getattr(coder, "mid_block", None)]  # none in DC-AE
    return [getattr(coder, "mid_block", None), *getattr(coder, "up_blocks", ())]


def _ops(coder: Module, ops: BlockOps) -> Iterator[Op]:
    yield coder.conv_in
    for block in _blocks(coder):
        yield from _block_ops(block, ops)
    yield partial(ops.finish, coder)


def _block_ops(block: Module, ops: BlockOps) -> Iterator[Op]:
    """Yield the residual blocks with attention between them, then changes of size."""
    between = getattr(block, "attentions", ())
    for index, resnet in enumerate(block.resnets):
        if 0 < index <= len(between) and between[index - 1] is not None:
            yield partial(ops.attend, between[index - 1])
        yield partial(ops.residual, resnet)
    for layer in getattr(block, "upsamplers", None) or ():
        yield partial(ops.upsample, layer)
    for layer in getattr(block, "downsamplers", None) or ():
        yield partial(ops.downsample, layer)


def identity(x: Tensor) -> Tensor:
    """Return x, as the `forward` of a module whose work is done elsewhere."""
    return x


def attend(attention: Module, x: Tensor) -> Tensor:
    """Compute attention between the pixels of an image, or of each video frame and the frames before it.

    For videos diffusers uses a mask of (F * H * W) squared. Here each frame gets only the frames that it attends to.
    """
    if x.ndim == 4:
        return attention(x)
    frame_size, heads = x.shape[-2] * x.shape[-1], attention.heads
    tokens = attention.group_norm(x.flatten(2)).transpose(1, 2)
    query, key, value = (
        project(tokens).unflatten(2, (heads, -1)).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    frames = [
        F.scaled_dot_product_attention(frame, key[:, :, : last + 1], value[:, :, : last + 1])
        for frame, last in zip(
            query.split(frame_size, dim=2), range(frame_size - 1, key.shape[2], frame_size), strict=True
        )
    ]
    result = attention.to_out[0](torch.cat(frames, dim=2).transpose(1, 2).flatten(2))
    return result.transpose(1, 2).unflatten(2, x.shape[2:]) + x
