"""What the encoders and decoders of diffusers' autoencoders are made of, as steps that a pass of our own runs its way.

diffusers' own forward pass is a tree of modules that call each other. For another way to run it (`low_memory`, `fast`)
what counts is that an encoder or decoder is a row of residual blocks, with an attention or a change of size between
some. `run` goes through that row; Wan's and Qwen-Image's keep earlier frames inside their modules, so those are
replaced one by one instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from handlers.serving.vae.stop import check_wanted

Part = Any
"""A module of diffusers', or a part of one: which attributes it has no type tells, but the sets of names below do."""
Step = Callable[[Tensor], Tensor]

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
"""Those whose steps are known here; others have other parts, or a `forward` with other arguments."""


class BlockOps(NamedTuple):
    """How each step is run; what it is given, a tensor [B, C, H, W] or [B, C, F, H, W], nobody else holds."""

    residual: Callable[[Part, Tensor], Tensor]
    upsample: Callable[[Part, Tensor], Tensor]
    downsample: Callable[[Part, Tensor], Tensor]
    attend: Callable[[Part, Tensor], Tensor]
    finish: Callable[[Part, Tensor], Tensor]
    """The coder's last normalisation, activation and convolution."""


def coders_of(model: Any) -> list[Part]:
    return [model.encoder, model.decoder]


def is_known(model: Any) -> bool:
    """Whether all that the model is made of is known here."""
    coders = [getattr(model, "encoder", None), getattr(model, "decoder", None)]
    return is_causal(coders) or all(
        type(coder).__name__ in CODERS and all(type(block).__name__ in BLOCKS for block in _blocks(coder))
        for coder in coders
    )


def is_causal(coders: list[Any]) -> bool:
    """Whether they are Wan's or Qwen-Image's."""
    return all(type(coder).__name__ in CAUSAL_CODERS for coder in coders)


@torch.no_grad()
def run(coder: Part, ops: BlockOps, sample: Tensor, latent_embeds: None = None) -> Tensor:
    """What `forward` of the coder gives. No step's input outlives it: nothing else refers to it."""
    for step in _steps(coder, ops):
        check_wanted()
        sample = step(sample)
    return sample


def _blocks(coder: Part) -> list[Part]:
    if hasattr(coder, "down_blocks"):
        return [*coder.down_blocks, getattr(coder, "mid_block", None)]  # DC-AE's has none
    return [getattr(coder, "mid_block", None), *getattr(coder, "up_blocks", ())]


def _steps(coder: Part, ops: BlockOps) -> Iterator[Step]:
    yield coder.conv_in
    for block in _blocks(coder):
        yield from _block_steps(block, ops)
    yield partial(ops.finish, coder)


def _block_steps(block: Part, ops: BlockOps) -> Iterator[Step]:
    """A residual block, then what comes between two of them or after the last."""
    between = getattr(block, "attentions", ())
    for index, resnet in enumerate(block.resnets):
        if 0 < index <= len(between) and between[index - 1] is not None:
            yield partial(ops.attend, between[index - 1])
        yield partial(ops.residual, resnet)
    for layer in getattr(block, "upsamplers", None) or ():
        yield partial(ops.upsample, layer)
    for layer in getattr(block, "downsamplers", None) or ():
        yield partial(ops.downsample, layer)


def attend(attention: Part, x: Tensor) -> Tensor:
    """Attention between the pixels of a picture; a video's see those of their own frame and the frames before it.

    diffusers says the latter with a mask, (F * H * W) squared; here each frame is given the frames that it sees.
    """
    if x.ndim == 4:
        return attention(x)
    frame_size, heads = x.shape[-2] * x.shape[-1], attention.heads
    tokens = attention.group_norm(x.flatten(2)).transpose(1, 2)
    query, key, value = (
        project(tokens).unflatten(2, (heads, -1)).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    seen = [
        F.scaled_dot_product_attention(frame, key[:, :, : last + 1], value[:, :, : last + 1])
        for frame, last in zip(
            query.split(frame_size, dim=2), range(frame_size - 1, key.shape[2], frame_size), strict=True
        )
    ]
    result = attention.to_out[0](torch.cat(seen, dim=2).transpose(1, 2).flatten(2))
    return result.transpose(1, 2).unflatten(2, x.shape[2:]) + x
