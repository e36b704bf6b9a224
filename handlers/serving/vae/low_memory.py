"""Full-frame pass with a lower peak of memory: no normalized, padded or upsampled copy of a whole activation exists.

diffusers keeps up to six full-size activations at once at a decoder's highest resolution: a block's input, its
normalized copy, its activated copy, and for videos a padded one. Here a convolution reads its input a few rows at a
time, plus the rows that its kernel reaches. Only these rows are normalized, activated, upsampled and padded. A residual
block overwrites its intermediate result. So a block keeps only its input and its output.

Sums have another order than in diffusers, so results differ by rounding. `memory` plans this mode for sizes that do not
fit otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handlers.serving.vae import blocks
from handlers.serving.vae.blocks import BlockOps, Module, Op, attend, identity
from handlers.serving.vae.stop import check_wanted

Read = Callable[[int, int], Tensor]
"""Function that returns rows of an activation, from the first index up to the second."""
Write = Callable[[Tensor, int, int, Tensor], None]
"""Function that writes the result of rows, from the first index up to the second, to a slice of the output."""

GROUP_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}
"""Bytes of a convolution's input at a time, by device type.

CPU: measured (benchmarks/NOTES.md). CUDA: not measured; it should fill a GPU, and be small beside an activation of 512
MB (1024x1024 pixels, 256 channels, float16).
"""
MIN_ROWS = 16
"""Rows of a group, at least. Two more rows are normalized for each group, which stays cheap beside the convolution."""


def reduce_peak(model: Any) -> list[Module]:
    """Replace the forward pass of an autoencoder's encoder and decoder by one with a lower peak, for inference.

    Results equal diffusers' except for rounding. Weights, `to` and tiling do not change.

    Returns:
        The modules whose `forward` was replaced; none for an unknown model (`blocks.is_known`).
    """
    if not blocks.is_known(model):
        return []
    coders = blocks.coders_of(model)
    if blocks.is_causal(coders):
        return [module for coder in coders for module in _reduce_causal(coder)]
    for coder in coders:
        coder.forward = partial(blocks.run, coder, BY_ROWS)
    return coders


@contextmanager
def reduced_peak(model: Any) -> Iterator[None]:
    """Apply `reduce_peak` for a `with` block."""
    replaced = reduce_peak(model)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def _residual(block: Module, x: Tensor) -> Tensor:
    """Compute x + conv2(act(norm2(conv1(act(norm1(x)))))) with two tensors: x, and one that conv2 overwrites."""
    hidden = _normalize_and_convolve(block.norm1, block.nonlinearity, block.conv1, x)

    def add(result: Tensor, first: int, last: int, out: Tensor) -> None:
        rows = x[..., first:last, :]
        torch.add(result, rows if block.conv_shortcut is None else _inner(block.conv_shortcut)(rows), out=out)

    return _normalize_and_convolve(block.norm2, block.nonlinearity, block.conv2, hidden, out=hidden, write=add)


def _finish(coder: Module, x: Tensor) -> Tensor:
    return _normalize_and_convolve(coder.conv_norm_out, coder.conv_act, coder.conv_out, x)


def _normalize_and_convolve(norm: nn.GroupNorm, activation: Module, conv: Module, x: Tensor, **into: Any) -> Tensor:
    mean, variance = _group_moments(x, norm.num_groups)
    weight, bias = (p.to(mean.dtype).repeat(len(x)) for p in (norm.weight, norm.bias))

    def read(first: int, last: int) -> Tensor:
        rows = x[..., first:last, :]
        # with known moments, a group norm is a batch norm
        flat = F.batch_norm(rows.flatten(0, 1).unsqueeze(0), mean, variance, weight, bias, eps=norm.eps)
        rows = flat.view(rows.shape)
        return F.silu(rows, inplace=True) if isinstance(activation, nn.SiLU) else activation(rows)

    return _convolve(conv, read, x.shape[-2], _row_bytes(x), **into)


def _group_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance of x [B, C, ...] in each group of channels, per channel: two tensors [B * C] of float32.

    They are computed a few rows at a time, in two loops. `torch.var_mean` takes ten times as long on a CPU, and
    mean(x^2) - mean(x)^2 loses digits for a large mean.
    """
    dtype, channels = torch.promote_types(x.dtype, torch.float32), x.shape[1] // groups
    row_groups = x.split(_group_rows(_row_bytes(x), x.device), dim=-2)

    def per_channel(rows: list[Tensor]) -> Tensor:
        return torch.cat(rows, dim=-1).view(len(x), groups, -1).mean(-1).repeat_interleave(channels)

    mean = per_channel([rows.mean(-1, dtype=dtype) for rows in row_groups])
    near = mean.to(x.dtype)
    offset = near.view(*x.shape[:2], *[1] * (x.ndim - 2))
    squares = [torch.linalg.vector_norm(rows - offset, dim=-1, dtype=dtype).square_() for rows in row_groups]
    variance = per_channel(squares) / x.shape[-1] - (mean - near).square()
    # Normalized by an infinite variance, values would be a constant, and the image a wrong one that is finite.
    return mean, variance.masked_fill(variance.isinf(), math.nan)


def _upsample(layer: Module, x: Tensor) -> Tensor:
    """Double height and width, and in some layers all frames but the first, then convolve."""
    time, scale, _ = getattr(layer, "upsample_factor", (1, 2, 2))
    frames = torch.tensor([0] + [f for f in range(1, x.shape[2]) for _ in range(time)], device=x.device)

    def read(first: int, last: int) -> Tensor:
        rows = x[..., first // scale : -(-last // scale), :]
        if time > 1:
            rows = rows.index_select(2, frames)
        wide = F.interpolate(rows.flatten(0, -4), scale_factor=float(scale), mode="nearest")
        return wide.view(*rows.shape[:-2], *wide.shape[-2:]).narrow(-2, first % scale, last - first)

    return _convolve(layer.conv, read, x.shape[-2] * scale, _row_bytes(x) * scale * time)


def _downsample(layer: Module, x: Tensor) -> Tensor:
    padding = (0, 1, 0, 1) if isinstance(layer.conv, nn.Conv2d) else None  # Downsample2D pads like this
    return _convolve(layer.conv, lambda first, last: x[..., first:last, :], x.shape[-2], _row_bytes(x), padding)


BY_ROWS = BlockOps(_residual, _upsample, _downsample, attend, _finish)


def _reduce_causal(coder: Module) -> Iterator[Module]:
    """Let the blocks of a coder of Wan or Qwen-Image normalize and upsample by rows, and add in place.

    The cached earlier frames are then not normalized. These norms treat each pixel alone, so the result is the same.
    """
    for module in coder.modules():
        if hasattr(module, "norm1"):
            module.forward = partial(_causal_residual, module)
            yield module
        if getattr(module, "mode", "").startswith("upsample"):
            module.resample.forward = partial(_upsample, SimpleNamespace(conv=module.resample[1]))
            yield module.resample
    ops = [partial(type(module).forward, module) for module in (coder.norm_out, coder.nonlinearity)]
    coder.norm_out.forward = coder.nonlinearity.forward = identity
    coder.conv_out.forward = partial(_causal_convolve, ops, coder.conv_out)
    yield from (coder.norm_out, coder.nonlinearity, coder.conv_out)


def _causal_residual(block: Module, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
    """Compute `_residual` for a video. Each convolution keeps its last two frames in `feat_cache`."""

    def convolve(norm: Module, conv: Module, frames: Tensor, **into: Any) -> Tensor:
        earlier = feat_cache[feat_idx[0]]
        last = frames[:, :, -2:].clone()
        if last.shape[2] < 2 and earlier is not None:
            last = torch.cat([earlier[:, :, -1:], last], dim=2)
        feat_cache[feat_idx[0]] = last
        feat_idx[0] += 1
        return _causal_convolve((norm, block.nonlinearity), conv, frames, earlier, **into)

    def add(result: Tensor, first: int, last: int, out: Tensor) -> None:
        torch.add(result, block.conv_shortcut(x[..., first:last, :]), out=out)

    hidden = convolve(block.norm1, block.conv1, x)
    return convolve(block.norm2, block.conv2, hidden, out=hidden, write=add)


def _causal_convolve(ops: Sequence[Op], conv: Module, x: Tensor, earlier: Tensor | None = None, **into: Any) -> Tensor:
    """Apply `ops`, such as a norm, and convolve. `earlier` frames replace padding in time."""
    left, right, above, below, frames, _ = conv._padding
    missing = frames if earlier is None else frames - earlier.shape[2]

    def read(first: int, last: int) -> Tensor:
        rows = x[..., first:last, :]
        if earlier is not None:
            rows = torch.cat([earlier[..., first:last, :], rows], dim=2)
        for op in ops:
            rows = op(rows)
        return rows

    return _convolve(conv, read, x.shape[-2], _row_bytes(x), (left, right, above, below, missing, 0), **into)


def _convolve(
    conv: Module,
    read: Read,
    height: int,
    row_bytes: int,
    padding: tuple[int, ...] | None = None,
    out: Tensor | None = None,
    write: Write | None = None,
) -> Tensor:
    """Convolve `height` rows, a group at a time.

    Args:
        read: returns the input rows. It may read from `out`: a group is written after the next one, which reaches a
            row into it, has been read.
        out: the output; None allocates it.
        write: writes the rows of a group to a slice of `out`; None copies them.
    """
    inner, padding = _inner(conv), padding or _padding(conv)
    above, below = padding[2:4]
    kernel, stride = inner.kernel_size[-2], inner.stride[-2]
    out_height = (height + above + below - kernel) // stride + 1
    size = max(1, _group_rows(row_bytes, inner.weight.device) // stride)
    pending = None
    for first in range(0, out_height, size):
        last = min(first + size, out_height)
        top, bottom = first * stride - above, (last - 1) * stride - above + kernel
        check_wanted()
        rows = read(max(top, 0), min(bottom, height))
        if pending:
            pending()
            result = pending = None
        edges = max(0, -top), max(0, bottom - height)
        result = _convolve_padded(conv, rows, (*padding[:2], *edges, *padding[4:]))
        del rows
        if out is None:
            if last == out_height:
                return result
            out = _empty_like(result, out_height)
        pending = partial(write or _copy, result, first, last, out.narrow(-2, first, last - first))
    assert pending is not None  # there is at least one row
    assert out is not None
    pending()
    return out


def _convolve_padded(conv: Module, rows: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Pad like `F.pad` (left, right, above, below, and frames before and after), and convolve."""
    if isinstance(conv, nn.Conv3d):
        return F.conv3d(F.pad(rows, padding), conv.weight, conv.bias, conv.stride)
    if not isinstance(conv, nn.Conv2d):
        return conv.conv(F.pad(rows, padding, mode=conv.pad_mode))
    left, right, above, below = padding
    if left != right or above != below:  # a convolution cannot pad like this by itself
        rows, left, above = F.pad(rows, padding), 0, 0
    return F.conv2d(rows, conv.weight, conv.bias, conv.stride, (above, left))


def _padding(conv: Module) -> tuple[int, ...]:
    if isinstance(conv, nn.Conv2d):
        rows, columns = map(int, conv.padding)
        return columns, columns, rows, rows
    return conv.time_causal_padding


def _inner(conv: Module) -> Module:
    """Return the convolution inside a module that pads."""
    return conv if isinstance(conv, nn.Conv2d | nn.Conv3d) else conv.conv


def _row_bytes(x: Tensor) -> int:
    return x.numel() // x.shape[-2] * x.element_size()


def _group_rows(row_bytes: int, device: torch.device) -> int:
    return max(MIN_ROWS, GROUP_BYTES.get(device.type, GROUP_BYTES["cuda"]) // row_bytes)


def _empty_like(rows: Tensor, height: int) -> Tensor:
    out = rows.new_empty((*rows.shape[:-2], height, rows.shape[-1]))
    channels_last = rows.ndim == 4 and not rows.is_contiguous()
    return out.to(memory_format=torch.channels_last) if channels_last else out


def _copy(result: Tensor, first: int, last: int, out: Tensor) -> None:
    out.copy_(result)
