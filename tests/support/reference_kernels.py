"""The functions of `handlers.serving.vae.fast.kernels` with operators of torch, in any dtype and on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from handlers.serving.vae.fast.kernels import channels_last


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    input_bias: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    shifted = x if input_bias is None else x + input_bias.to(x.dtype)[:, None, None]
    result = channels_last(F.silu(F.group_norm(shifted, groups, weight.to(x.dtype), bias.to(x.dtype), eps)))
    return x.copy_(result) if in_place else result


def add(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return x.add_(residual).add_(bias.to(x.dtype)[:, None, None])


def interleave(subpixels: Tensor, bias: Tensor) -> Tensor:
    height, width = subpixels.shape[2] - 1, subpixels.shape[3] - 1
    pixels = torch.stack(
        [
            subpixel[..., row : row + height, column : column + width]
            for (row, column), subpixel in zip([(0, 0), (0, 1), (1, 0), (1, 1)], subpixels.chunk(4, dim=1), strict=True)
        ],
        dim=2,
    )
    return channels_last(F.pixel_shuffle(pixels.flatten(1, 2), 2) + bias.to(subpixels.dtype)[:, None, None])


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, room: int = 0) -> Tensor:
    result = F.normalize(x, dim=1) * scale * weight.view(-1, 1, 1, 1)
    result = F.silu(result if bias is None else result + bias.view(-1, 1, 1, 1))
    return torch.cat([result.new_full((*x.shape[:2], room, *x.shape[3:]), torch.nan), result], dim=2)
