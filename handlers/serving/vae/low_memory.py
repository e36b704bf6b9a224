"""The exact full-frame pass with a lower peak: no layer holds a normalised, padded or upsampled picture as a whole.

diffusers holds up to six full-size activations at once where a decoder's resolution is highest: the block's input, its
normalised copy, its activated copy, and for videos a padded one. Here a convolution reads its input a few rows at a
time, with the rows that its kernel reaches beyond them, and those are normalised, activated, upsampled and padded just
then; a residual block writes its result over its own intermediate. What is left is a block's input and its output.

It adds up in another order than diffusers, so it is for pictures that would not fit otherwise: `memory` plans it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handlers.serving.vae import blocks as coders
from handlers.serving.vae.blocks import BlockOps, Part, Step, attend
from handlers.serving.vae.stop import check_wanted

Read = Callable[[int, int], Tensor]
"""Gives rows, from the first up to the second, of a picture that need not exist as a whole."""
Write = Callable[[Tensor, int, int, Tensor], None]
"""Takes the result of rows, from the first up to the second, and where they belong."""

CHUNK_BYTES = {"cpu": 4 * 2**20, "cuda": 32 * 2**20}
"""Of a convolution's input at a time, by device; an activation that is no larger is one chunk.

CPU: benchmarks/NOTES.md has the times. CUDA: not measured yet; a chunk of a 1024x1024 picture should be large enough to
fill a GPU, and small beside the activation of 512 MB that it is part of (256 channels in float16).
"""
MIN_ROWS = 16
"""Of a chunk, whatever they take: two more rows are normalised for each, which stays cheap beside the convolution."""


def reduce_peak(model: Any) -> list[Part]:
    """Gives the encoder and the decoder of a diffusers autoencoder a forward pass with a lower peak, for inference.

    The results are those of diffusers but for rounding. Weights, `to` and tiling stay as they are.

    Returns:
        The modules whose `forward` was replaced; none where `coders.is_known` says no.
    """
    if not coders.is_known(model):
        return []
    both = coders.coders_of(model)
    if coders.is_causal(both):
        return [module for coder in both for module in _reduce_causal(coder)]
    for coder in both:
        coder.forward = partial(coders.run, coder, BY_ROWS)
    return both


@contextmanager
def reduced_peak(model: Any) -> Iterator[None]:
    """`reduce_peak` for as long as a `with` block lasts."""
    replaced = reduce_peak(model)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def _residual(block: Part, x: Tensor) -> Tensor:
    """x + conv2(act(norm2(conv1(act(norm1(x)))))), in two tensors: x, and one that conv2 reads and writes."""
    hidden = _normalize_and_convolve(block.norm1, block.nonlinearity, block.conv1, x)

    def add(result: Tensor, first: int, last: int, out: Tensor) -> None:
        rows = x[..., first:last, :]
        torch.add(result, rows if block.conv_shortcut is None else _inner(block.conv_shortcut)(rows), out=out)

    return _normalize_and_convolve(block.norm2, block.nonlinearity, block.conv2, hidden, out=hidden, write=add)


def _finish(coder: Part, x: Tensor) -> Tensor:
    return _normalize_and_convolve(coder.conv_norm_out, coder.conv_act, coder.conv_out, x)


def _normalize_and_convolve(norm: nn.GroupNorm, activation: Part, conv: Part, x: Tensor, **into: Any) -> Tensor:
    mean, variance = _group_moments(x, norm.num_groups)
    weight, bias = (p.to(mean.dtype).repeat(len(x)) for p in (norm.weight, norm.bias))

    def read(first: int, last: int) -> Tensor:
        rows = x[..., first:last, :]
        # with the moments given, a group norm is a batch norm
        flat = F.batch_norm(rows.flatten(0, 1).unsqueeze(0), mean, variance, weight, bias, eps=norm.eps)
        rows = flat.view(rows.shape)
        return F.silu(rows, inplace=True) if isinstance(activation, nn.SiLU) else activation(rows)

    return _convolve(conv, read, x.shape[-2], _row_bytes(x), **into)


def _group_moments(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of x [B, C, ...] in each group of channels, in float32, for each channel: two times [B * C].

    Taken in two passes, a few rows at a time: `torch.var_mean` takes ten times as long on a CPU, and the mean of the
    squares less the square of the mean loses digits where a mean is large.
    """
    dtype, channels = torch.promote_types(x.dtype, torch.float32), x.shape[1] // groups
    chunks = x.split(_chunk_rows(_row_bytes(x), x.device), dim=-2)

    def per_channel(rows: list[Tensor]) -> Tensor:
        return torch.cat(rows, dim=-1).view(len(x), groups, -1).mean(-1).repeat_interleave(channels)

    mean = per_channel([rows.mean(-1, dtype=dtype) for rows in chunks])
    near = mean.to(x.dtype)
    offset = near.view(*x.shape[:2], *[1] * (x.ndim - 2))
    squares = [torch.linalg.vector_norm(rows - offset, dim=-1, dtype=dtype).square_() for rows in chunks]
    return mean, per_channel(squares) / x.shape[-1] - (mean - near).square()


def _upsample(layer: Part, x: Tensor) -> Tensor:
    """Each pixel twice in height and width, and in some layers each frame but the first twice; then a convolution."""
    time, scale, _ = getattr(layer, "upsample_factor", (1, 2, 2))
    frames = torch.tensor([0] + [f for f in range(1, x.shape[2]) for _ in range(time)], device=x.device)

    def read(first: int, last: int) -> Tensor:
        rows = x[..., first // scale : -(-last // scale), :]
        if time > 1:
            rows = rows.index_select(2, frames)
        wide = F.interpolate(rows.flatten(0, -4), scale_factor=float(scale), mode="nearest")
        return wide.view(*rows.shape[:-2], *wide.shape[-2:]).narrow(-2, first % scale, last - first)

    return _convolve(layer.conv, read, x.shape[-2] * scale, _row_bytes(x) * scale * time)


def _downsample(layer: Part, x: Tensor) -> Tensor:
    padding = (0, 1, 0, 1) if isinstance(layer.conv, nn.Conv2d) else None  # as Downsample2D pads for itself
    return _convolve(layer.conv, lambda first, last: x[..., first:last, :], x.shape[-2], _row_bytes(x), padding)


BY_ROWS = BlockOps(_residual, _upsample, _downsample, attend, _finish)


def _reduce_causal(coder: Part) -> Iterator[Part]:
    """Has the blocks of Wan's and Qwen-Image's coders normalise and upsample by rows, and add into what they made.

    What is kept of earlier frames is then as it was before its normalisation, which for these takes a pixel at a time.
    """
    for module in coder.modules():
        if hasattr(module, "norm1"):
            module.forward = partial(_causal_residual, module)
            yield module
        if getattr(module, "mode", "").startswith("upsample"):
            module.resample.forward = partial(_upsample, SimpleNamespace(conv=module.resample[1]))
            yield module.resample
    steps = [partial(type(module).forward, module) for module in (coder.norm_out, coder.nonlinearity)]
    coder.norm_out.forward = coder.nonlinearity.forward = _unchanged
    coder.conv_out.forward = partial(_causal_convolve, steps, coder.conv_out)
    yield from (coder.norm_out, coder.nonlinearity, coder.conv_out)


def _causal_residual(block: Part, x: Tensor, feat_cache: list[Any], feat_idx: list[int]) -> Tensor:
    """As `_residual`; each convolution finds the frames before in `feat_cache`, and leaves its last two there."""

    def convolve(norm: Part, conv: Part, frames: Tensor, **into: Any) -> Tensor:
        before = feat_cache[feat_idx[0]]
        last = frames[:, :, -2:].clone()
        if last.shape[2] < 2 and before is not None:
            last = torch.cat([before[:, :, -1:], last], dim=2)
        feat_cache[feat_idx[0]] = last
        feat_idx[0] += 1
        return _causal_convolve((norm, block.nonlinearity), conv, frames, before, **into)

    def add(result: Tensor, first: int, last: int, out: Tensor) -> None:
        torch.add(result, block.conv_shortcut(x[..., first:last, :]), out=out)

    hidden = convolve(block.norm1, block.conv1, x)
    return convolve(block.norm2, block.conv2, hidden, out=hidden, write=add)


def _causal_convolve(steps: Sequence[Step], conv: Part, x: Tensor, before: Tensor | None = None, **into: Any) -> Tensor:
    """Normalises and convolves; `before` are the last frames that it had, so that it needs less padding in time."""
    left, right, above, below, frames, _ = conv._padding
    missing = frames if before is None else frames - before.shape[2]

    def read(first: int, last: int) -> Tensor:
        rows = x[..., first:last, :]
        if before is not None:
            rows = torch.cat([before[..., first:last, :], rows], dim=2)
        for step in steps:
            rows = step(rows)
        return rows

    return _convolve(conv, read, x.shape[-2], _row_bytes(x), (left, right, above, below, missing, 0), **into)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _convolve(
    conv: Part,
    read: Read,
    height: int,
    row_bytes: int,
    padding: tuple[int, ...] | None = None,
    out: Tensor | None = None,
    write: Write | None = None,
) -> Tensor:
    """A convolution of `height` rows that `read` gives, a chunk at a time, into `out` where it is given.

    `write` puts the result of the rows from `first` up to `last` there. `read` may read from `out`: a chunk is written
    when the next one, which reaches a row into it, has been read.
    """
    inner, padding = _inner(conv), padding or _padding(conv)
    above, below = padding[2:4]
    kernel, stride = inner.kernel_size[-2], inner.stride[-2]
    out_height = (height + above + below - kernel) // stride + 1
    step = max(1, _chunk_rows(row_bytes, inner.weight.device) // stride)
    pending = None
    for first in range(0, out_height, step):
        last = min(first + step, out_height)
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
    assert pending is not None  # there was a row
    assert out is not None
    pending()
    return out


def _convolve_padded(conv: Part, rows: Tensor, padding: tuple[int, ...]) -> Tensor:
    """`padding` as `F.pad` takes it: left, right, above, below, and for a video the frames before and after."""
    if isinstance(conv, nn.Conv3d):
        return F.conv3d(F.pad(rows, padding), conv.weight, conv.bias, conv.stride)
    if not isinstance(conv, nn.Conv2d):
        return conv.conv(F.pad(rows, padding, mode=conv.pad_mode))
    left, right, above, below = padding
    if left != right or above != below:  # what a convolution cannot do by itself
        rows, left, above = F.pad(rows, padding), 0, 0
    return F.conv2d(rows, conv.weight, conv.bias, conv.stride, (above, left))


def _padding(conv: Part) -> tuple[int, ...]:
    if isinstance(conv, nn.Conv2d):
        rows, columns = map(int, conv.padding)
        return columns, columns, rows, rows
    return conv.time_causal_padding


def _inner(conv: Part) -> Part:
    """The convolution itself of one that pads before it."""
    return conv if isinstance(conv, nn.Conv2d | nn.Conv3d) else conv.conv


def _row_bytes(x: Tensor) -> int:
    return x.numel() // x.shape[-2] * x.element_size()


def _chunk_rows(row_bytes: int, device: torch.device) -> int:
    return max(MIN_ROWS, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // row_bytes)


def _empty_like(chunk: Tensor, height: int) -> Tensor:
    out = chunk.new_empty((*chunk.shape[:-2], height, chunk.shape[-1]))
    channels_last = chunk.ndim == 4 and not chunk.is_contiguous()
    return out.to(memory_format=torch.channels_last) if channels_last else out


def _copy(result: Tensor, first: int, last: int, out: Tensor) -> None:
    out.copy_(result)
