"""GPU kernels in Triton, with fewer passes through memory than torch takes.

Each kernel computes in float32 for every dtype, and rounds once. They use only features of Triton 3.1, which comes with
torch 2.5. Sizes of images are plain arguments, so a new size compiles nothing. `fused` launches each kernel once for
each number of channels before the first request.

With `TRITON_INTERPRET=1` in the environment they run on a CPU, slowly. The tests do this.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192
"""Values that a program processes at a time."""
PARTIALS = 1024
"""Most programs that share the moments of an image: several per multiprocessor of the largest GPUs."""


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, out: Tensor, input_bias: Tensor | None = None
) -> Tensor:
    """Write ``silu(group_norm(x + input_bias))`` to `out`, which may be x.

    Args:
        x: [B, C, H, W], channels-last in memory; C and `groups` are powers of two.
        input_bias: [C], bias of the convolution before, which did not add it; None for no bias.
    """
    batch, channels, height, width = x.shape
    pixels, rows = height * width, TILE // channels
    tiles = triton.cdiv(pixels, rows)
    partials = min(PARTIALS, tiles)
    moments = torch.empty(3, batch, groups, partials, device=x.device, dtype=torch.float32)
    merged = torch.empty(2, batch, groups, device=x.device, dtype=torch.float32)
    pointer = weight if input_bias is None else input_bias
    shape = {
        "CHANNELS": channels,
        "GROUPS": groups,
        "ROWS": rows,
        "HAS_INPUT_BIAS": input_bias is not None,
        "num_warps": 8,
    }
    _partial_moments[(partials, batch)](x, pointer, moments, pixels, partials, batch, **shape)
    _merge_moments[(groups, batch)](moments, merged, partials, batch, eps, GROUPS=groups, PARTIALS=PARTIALS)
    _apply[(tiles, batch)](x, pointer, merged, weight, bias, out, pixels, batch, **shape)
    return out


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return ``silu(x / |x| * scale * weight + bias)``, contiguous. |x| is the norm of a pixel's channels.

    Args:
        x: [B, C, F, H, W]; each channel of a frame is contiguous.
        weight: C values, like the bias.
    """
    batch, channels, frames, height, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size, pixels = triton.next_power_of_2(channels), height * width
    columns = max(16, TILE // size)
    pointer = weight if bias is None else bias
    _rms_norm[(triton.cdiv(pixels, columns), batch * frames)](
        *(x, weight, pointer, out),
        *(pixels, frames, *x.stride()[:3], *out.stride()[:3], scale),
        **{"CHANNELS": channels, "SIZE": size, "COLUMNS": columns, "BIAS": bias is not None, "num_warps": 8},
    )
    return out


def add(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """Write ``x + bias + residual`` to x.

    Args:
        x: [B, C, ...], channels-last in memory, like `residual`.
        bias: [C], bias of the convolution before, which did not add it.
    """
    count = x.numel()
    _add[(triton.cdiv(count, TILE),)](x, bias, residual, count, CHANNELS=x.shape[1], TILE=TILE, num_warps=8)
    return x


@triton.jit(do_not_specialize=["pixels", "partials", "batch"])
def _partial_moments(
    x,
    input_bias,
    moments,
    pixels,
    partials,
    batch,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_INPUT_BIAS: tl.constexpr,
):
    """Compute count, mean and sum of squared distances of each group, in every partials-th tile of an image.

    Two tiles are merged by the formula of Chan, Golub and LeVeque (1979), so nothing cancels for a large mean.
    """
    partial, item = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    start = x + item.to(tl.int64) * pixels * CHANNELS
    count = tl.zeros([GROUPS], tl.float32)
    mean = tl.zeros([GROUPS], tl.float32)
    squares = tl.zeros([GROUPS], tl.float32)
    for first in range(partial * ROWS, pixels, partials * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < pixels)[:, None]
        offset = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        tile = tl.load(start + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_INPUT_BIAS:
            tile += tl.load(input_bias + channel).to(tl.float32)[None, :]
        tile = tl.where(inside, tile, 0.0)
        size = (tl.minimum(ROWS, pixels - first) * (CHANNELS // GROUPS)).to(tl.float32)
        grouped = tl.reshape(tile, (ROWS, GROUPS, CHANNELS // GROUPS))
        tile_mean = tl.sum(tl.sum(grouped, axis=2), axis=0) / size
        distance = tl.where(inside[:, :, None], grouped - tile_mean[None, :, None], 0.0)
        tile_squares = tl.sum(tl.sum(distance * distance, axis=2), axis=0)
        delta = tile_mean - mean
        total = count + size
        mean += delta * (size / total)
        squares += tile_squares + delta * delta * (count * size / total)
        count = total
    groups = tl.arange(0, GROUPS)
    into = (item * GROUPS + groups) * partials + partial
    stride = batch * GROUPS * partials
    tl.store(moments + into, count)
    tl.store(moments + stride + into, mean)
    tl.store(moments + 2 * stride + into, squares)


@triton.jit(do_not_specialize=["partials", "batch", "eps"])
def _merge_moments(moments, merged, partials, batch, eps, GROUPS: tl.constexpr, PARTIALS: tl.constexpr):
    """Merge the partial moments of one group of one image to its mean and reciprocal deviation."""
    group, item = tl.program_id(0), tl.program_id(1)
    partial = tl.arange(0, PARTIALS)
    inside = partial < partials
    index = item * GROUPS + group
    stride = batch * GROUPS * partials
    count = tl.load(moments + index * partials + partial, mask=inside, other=0.0)
    means = tl.load(moments + stride + index * partials + partial, mask=inside, other=0.0)
    squares = tl.load(moments + 2 * stride + index * partials + partial, mask=inside, other=0.0)
    total = tl.sum(count, axis=0)
    mean = tl.sum(count * means, axis=0) / total
    distance = tl.where(inside, means - mean, 0.0)
    variance = (tl.sum(squares, axis=0) + tl.sum(count * distance * distance, axis=0)) / total
    tl.store(merged + index, mean)
    tl.store(merged + batch * GROUPS + index, 1.0 / tl.sqrt(variance + eps))


@triton.jit(do_not_specialize=["pixels", "batch"])
def _apply(
    x,
    input_bias,
    merged,
    weight,
    bias,
    out,
    pixels,
    batch,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_INPUT_BIAS: tl.constexpr,
):
    """Normalize and activate one tile of an image."""
    item = tl.program_id(1)
    channel = tl.arange(0, CHANNELS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < pixels)[:, None]
    start = item.to(tl.int64) * pixels * CHANNELS
    offset = start + row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    group = item * GROUPS + channel // (CHANNELS // GROUPS)
    mean = tl.load(merged + group)
    scale = tl.load(merged + batch * GROUPS + group) * tl.load(weight + channel).to(tl.float32)
    if HAS_INPUT_BIAS:
        mean -= tl.load(input_bias + channel).to(tl.float32)
    tile = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    tile = (tile - mean[None, :]) * scale[None, :] + tl.load(bias + channel).to(tl.float32)[None, :]
    tile = tile / (1.0 + tl.exp(-tile))
    tl.store(out + offset, tile.to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "pixels",
        "frames",
        "x_item",
        "x_channel",
        "x_frame",
        "out_item",
        "out_channel",
        "out_frame",
        "scale",
    ]
)
def _rms_norm(
    x,
    weight,
    bias,
    out,
    pixels,
    frames,
    x_item,
    x_channel,
    x_frame,
    out_item,
    out_channel,
    out_frame,
    scale,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Normalize and activate some pixels of a frame, with all their channels."""
    item = (tl.program_id(1) // frames).to(tl.int64)
    frame = (tl.program_id(1) % frames).to(tl.int64)
    channel = tl.arange(0, SIZE)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = channel < CHANNELS
    inside = known[:, None] & (column < pixels)[None, :]
    wide = channel.to(tl.int64)[:, None]
    source = x + item * x_item + frame * x_frame + wide * x_channel + column[None, :]
    tile = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(tile * tile, axis=0)), 1e-12)
    factor = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32) * scale
    tile = tile / length[None, :] * factor[:, None]
    if BIAS:
        tile += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[:, None]
    tile = tile / (1.0 + tl.exp(-tile))
    target = out + item * out_item + frame * out_frame + wide * out_channel + column[None, :]
    tl.store(target, tile.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _add(x, bias, residual, count, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offset < count
    total = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(bias + offset % CHANNELS).to(tl.float32)
    total += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + offset, total.to(x.dtype.element_ty), mask=inside)
