"""GPU kernels in Triton, with fewer passes through memory than torch takes.

An image is channels-last in memory: a matrix of pixels and channels. A program takes ROWS pixels with all their
channels, 16 bytes at a time in each thread. A group norm is three launches: partial moments, their merge, and the
normalization. The functions copy an image that has another layout.

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
VECTOR = 8
"""Values of half precision in 16 bytes, the most that a thread loads at a time."""


def channels_last(x: Tensor) -> Tensor:
    """Return x [B, C, H, W] with this layout in memory: itself, or a copy."""
    return x.contiguous(memory_format=torch.channels_last)


def group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    input_bias: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """Return ``silu(group_norm(x + input_bias))``.

    Args:
        x: [B, C, H, W]; C and `groups` are powers of two.
        input_bias: [C], bias of the convolution before, which did not add it; None for no bias.
        in_place: write the result to x, if it is channels-last.
    """
    x = channels_last(x)
    out = x if in_place else torch.empty_like(x)
    batch, channels, height, width = x.shape
    pixels, rows = height * width, TILE // channels
    tiles = triton.cdiv(pixels, rows)
    partials = min(PARTIALS, tiles)
    moments = torch.empty(3, batch, groups, partials, device=x.device, dtype=torch.float32)
    merged = torch.empty(2, batch, groups, device=x.device, dtype=torch.float32)
    pointer = weight if input_bias is None else input_bias  # Triton wants a pointer for an unused argument too
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


def add(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """Return ``x + bias + residual``, in the memory of x if it is channels-last.

    Args:
        x: [B, C, H, W], like `residual`; C is a power of two.
        bias: [C], bias of the convolutions before, which did not add it.
    """
    x, residual = channels_last(x), channels_last(residual)
    channels = x.shape[1]
    rows, pixels = TILE // channels, x.numel() // channels
    _add[(triton.cdiv(pixels, rows),)](x, bias, residual, pixels, CHANNELS=channels, ROWS=rows, num_warps=8)
    return x


def interleave(subpixels: Tensor, bias: Tensor) -> Tensor:
    """Return an upsampled image [B, C, 2 * H, 2 * W].

    Args:
        subpixels: [B, 4 * C, H + 1, W + 1], the results of the four 2x2 convolutions of an image that was padded by 1,
            for the upper left pixel of each square, the upper right, the lower left and the lower right one. C is a
            power of two.
        bias: [C], bias of the convolutions, which did not add it.
    """
    subpixels = channels_last(subpixels)
    batch, channels = len(subpixels), subpixels.shape[1] // 4
    height, width = (size - 1 for size in subpixels.shape[2:])
    out = torch.empty(
        (batch, channels, 2 * height, 2 * width),
        dtype=subpixels.dtype,
        device=subpixels.device,
        memory_format=torch.channels_last,
    )
    rows = TILE // channels
    grid = triton.cdiv(4 * height * width, rows), batch
    _interleave[grid](subpixels, bias, out, height, width, CHANNELS=channels, ROWS=rows, num_warps=8)
    return out


def rms_norm(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, room: int = 0) -> Tensor:
    """Return ``silu(x / |x| * scale * weight + bias)``, contiguous. |x| is the norm of a pixel's channels.

    Args:
        x: [B, C, F, H, W]; each channel of a frame is contiguous, or x is copied.
        weight: C values, like the bias.
        room: frames without values that the result begins with, for the caller to fill.
    """
    batch, channels, frames, height, width = x.shape
    if x.stride(-1) != 1 or x.stride(-2) != width:
        x = x.contiguous()
    out = torch.empty((batch, channels, room + frames, height, width), dtype=x.dtype, device=x.device)
    size, pixels = triton.next_power_of_2(channels), height * width
    columns = max(2 * VECTOR, TILE // size)
    unit = 1 if any(step % VECTOR for step in (*x.stride()[:3], pixels)) else VECTOR
    pointer = weight if bias is None else bias
    _rms_norm[(triton.cdiv(pixels, columns), batch * frames)](
        *(x, weight, pointer, out, pixels // unit, frames, room, *(step // unit for step in x.stride()[:3]), scale),
        **{"CHANNELS": channels, "SIZE": size, "COLUMNS": columns, "UNIT": unit, "BIAS": bias is not None},
        num_warps=8 if size * columns == TILE else 16,
    )
    return out


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


@triton.jit(do_not_specialize=["pixels"])
def _add(x, bias, residual, pixels, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Add some pixels of all images."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    inside = (row < pixels)[:, None]
    offset = row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    total = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(bias + channel).to(tl.float32)[None, :]
    total += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + offset, total.to(x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["height", "width"])
def _interleave(subpixels, bias, out, height, width, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Copy some pixels of an image. Pixel (2 * y + r, 2 * x + s) is subpixel (r, s) at (y + r, x + s)."""
    item = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    inside = (row < 4 * height * width)[:, None]
    y, x = row // (2 * width), row % (2 * width)
    source = (item * (height + 1) + (y + 1) // 2) * (width + 1) + (x + 1) // 2
    source = source * (4 * CHANNELS) + (y % 2 * 2 + x % 2) * CHANNELS
    tile = tl.load(subpixels + source[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    tile += tl.load(bias + channel).to(tl.float32)[None, :]
    target = (item * (4 * height * width) + row) * CHANNELS
    tl.store(out + target[:, None] + channel[None, :], tile.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels", "frames", "room", "x_item", "x_channel", "x_frame", "scale"])
def _rms_norm(
    x,
    weight,
    bias,
    out,
    pixels,
    frames,
    room,
    x_item,
    x_channel,
    x_frame,
    scale,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Normalize and activate some pixels of a frame, with all their channels.

    `pixels` and the strides of x count in UNIT values, so the compiler knows what is a multiple of 16 bytes.
    """
    item = (tl.program_id(1) // frames).to(tl.int64)
    frame = (tl.program_id(1) % frames).to(tl.int64)
    channel = tl.arange(0, SIZE)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = channel < CHANNELS
    inside = known[:, None] & (column < pixels * UNIT)[None, :]
    wide = channel.to(tl.int64)
    source = item * x_item + frame * x_frame + wide * x_channel
    tile = tl.load(x + source[:, None] * UNIT + column[None, :], mask=inside, other=0.0).to(tl.float32)
    length = tl.maximum(tl.sqrt(tl.sum(tile * tile, axis=0)), 1e-12)
    factor = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32) * scale
    tile = tile / length[None, :] * factor[:, None]
    if BIAS:
        tile += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[:, None]
    tile = tile / (1.0 + tl.exp(-tile))
    target = ((item * CHANNELS + wide) * (room + frames) + room + frame) * pixels
    tl.store(out + target[:, None] * UNIT + column[None, :], tile.to(out.dtype.element_ty), mask=inside)
