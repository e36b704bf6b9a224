"""The fast pass: what diffusers computes, with less arithmetic and fewer trips through memory.

It is exact algebra, and rounds otherwise than diffusers' own pass, which `exact` asks for. What it does otherwise:

- A nearest upsampling by two and the convolution of 3x3 behind it are four convolutions of 2x2 on the small picture,
  one for each position of a pixel in its square: 4 multiplications instead of 9. Of a video that doubles in time too,
  8 instead of 27.
- What is normalised is activated in place, what is convolved is added to in place, and nothing is padded by a copy
  that a convolution pads by itself.
- On a GPU normalisation and activation are one kernel (`kernels`); pictures have their channels last in memory, as its
  convolutions want them, and a convolution's bias is added by the kernel that reads its result.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handlers.serving.vae import blocks as coders
from handlers.serving.vae.blocks import BlockOps, Part, attend

FoldedKernels = list[tuple[tuple[int, ...], Tensor]]
"""A folded convolution: for each position in the square, or cube, where it is, and the kernel of its pixels."""


class FastPass:
    """For one model in one dtype, with the kernels that it has of its own. Operators of torch alone, on any device."""

    def __init__(self, model: Any, fold: bool = True) -> None:
        """Of a model of which `coders.is_known` is true, and whose weights do not change any more.

        Args:
            fold: whether an upsampling is folded into its convolution. Without, and with operators of torch alone, the
                pass of Wan's and of Qwen-Image's is bit for bit diffusers'.
        """
        self.model = model
        self.dtype: torch.dtype = model.dtype
        self._folded: dict[nn.Module, FoldedKernels] = {}
        for layer in self._parts if fold else ():
            if type(layer).__name__ in ("Upsample2D", "HunyuanVideoUpsampleCausal3D"):
                self._fold(layer.conv, *getattr(layer, "upsample_factor", ()))
            elif getattr(layer, "mode", "").startswith("upsample"):
                self._fold(layer.resample[1])

    @property
    def _parts(self) -> Iterator[Part]:
        for coder in coders.coders_of(self.model):
            yield from coder.modules()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model runs this pass for as long as a `with` block lasts."""
        both = coders.coders_of(self.model)
        replaced = [
            pair
            for coder in both
            for pair in (self._causal(coder) if coders.is_causal(both) else [(coder, partial(self._run, coder))])
        ]
        for module, forward in replaced:
            module.forward = forward
        try:
            yield
        finally:
            for module, _ in replaced:
                del module.forward

    def prepare(self) -> None:
        """What may take long and needs no turn on the device. To be called before the first pass, on any thread."""

    def _run(self, coder: Part, sample: Tensor, latent_embeds: None = None) -> Tensor:
        return coders.run(coder, self._ops, sample)

    @cached_property
    def _ops(self) -> BlockOps:
        return BlockOps(self._residual, self._upsample, _as_it_is, attend, self._finish)

    def _normalize(self, norm: Part, activation: Part, x: Tensor) -> Tensor:
        x = type(norm).forward(norm, x)  # not `norm(x)`: the last one's forward may be this
        return F.silu(x, inplace=True) if isinstance(activation, nn.SiLU) else activation(x)

    def _residual(self, block: Part, x: Tensor) -> Tensor:
        hidden = block.conv1(self._normalize(block.norm1, block.nonlinearity, x))
        hidden = block.conv2(self._normalize(block.norm2, block.nonlinearity, hidden))
        return hidden.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))

    def _finish(self, coder: Part, x: Tensor) -> Tensor:
        return coder.conv_out(self._normalize(coder.conv_norm_out, coder.conv_act, x))

    def _fold(self, conv: Part, time: int = 1, scale: int = 2, _: int = 2) -> None:
        if scale == 2:
            inner = getattr(conv, "conv", None) or conv
            self._folded[conv] = _fold(inner.weight, [*([2] if time == 2 else []), -2, -1])

    def _upsample(self, layer: Part, x: Tensor) -> Tensor:
        if layer.conv not in self._folded:
            return layer(x)
        return self._upsample_video(layer.conv, x) if x.ndim == 5 else self._upsample_image(layer.conv, x)

    def _upsample_image(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, 2 * H, 2 * W], convolved."""
        height, width = x.shape[-2:]
        out = None
        for (row, column), weight in self._folded[conv]:
            part = F.conv2d(x, weight, conv.bias, padding=1)[..., row : row + height, column : column + width]
            if out is None:
                out = _empty_like(part, (2 * height, 2 * width))
            out[..., row::2, column::2] = part
        assert out is not None  # there are four
        return out

    def _upsample_video(self, conv: Part, x: Tensor) -> Tensor:
        """[B, C, F, H, W] to [B, C, F, 2 * H, 2 * W], convolved; or to 2 * F - 1 frames of that size.

        The edges are repeated outwards, which is the same of a small picture as of one whose pixels are doubled.
        """
        frames, height, width = x.shape[-3:]
        doubles = len(self._folded[conv][0][0]) == 3
        padded = F.pad(x, (1, 1, 1, 1, 1 if doubles else 2, 0), mode=conv.pad_mode)
        out = None
        for (*odd, row, column), weight in self._folded[conv]:
            # the first frame is not doubled, so the odd ones begin with what the second and the first are made of
            first, count = (1, frames - 1) if odd == [1] else (0, frames)
            if count == 0:
                continue
            part = padded[:, :, first:, row : row + height + 1, column : column + width + 1]
            part = F.conv3d(part, weight, conv.conv.bias)
            if out is None:
                out = part.new_empty((*part.shape[:2], 2 * frames - 1 if doubles else frames, 2 * height, 2 * width))
            out[:, :, first :: 2 if doubles else 1, row::2, column::2] = part
        assert out is not None  # there are four, or eight
        return out

    def _causal(self, coder: Part) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
        """What runs for `forward` in each part of Wan's and Qwen-Image's coders."""
        for module in coder.modules():
            if hasattr(module, "norm1"):
                yield module, partial(self._causal_residual, module)
            elif hasattr(module, "_padding"):
                yield module, partial(_causal_convolve, module)
            elif getattr(module, "mode", "").startswith("upsample") and module.resample[1] in self._folded:
                yield module.resample, partial(self._upsample_image, module.resample[1])
        yield coder.norm_out, partial(self._normalize, coder.norm_out, coder.nonlinearity)
        yield coder.nonlinearity, _unchanged

    def _causal_residual(
        self, block: Part, x: Tensor, feat_cache: list[Any] | None = None, feat_idx: list[int] | None = None
    ) -> Tensor:
        """Each convolution finds the frames before in `feat_cache`, and leaves its last two there."""

        def convolve(norm: Part, conv: Part, frames: Tensor) -> Tensor:
            frames = self._normalize(norm, block.nonlinearity, frames)
            before = None
            if feat_cache is not None and feat_idx is not None:
                before = feat_cache[feat_idx[0]]
                frames = frames if before is None else torch.cat([before, frames], dim=2)
                feat_cache[feat_idx[0]] = frames[:, :, -2:].clone()
                feat_idx[0] += 1
            return _causal_convolve(conv, frames, there=0 if before is None else before.shape[2])

        hidden = convolve(block.norm1, block.conv1, x)
        return convolve(block.norm2, block.conv2, hidden).add_(block.conv_shortcut(x))


def _causal_convolve(conv: Part, x: Tensor, cache_x: Tensor | None = None, there: int = 0) -> Tensor:
    """`there` of the frames that the convolution reaches back to are in x already; the cached ones come before it."""
    columns, _, rows, _, missing, _ = conv._padding
    if cache_x is not None and missing:
        x, there = torch.cat([cache_x, x], dim=2), cache_x.shape[2]
    if missing > there:
        x = F.pad(x, (0, 0, 0, 0, missing - there, 0))
    return F.conv3d(x, conv.weight, conv.bias, conv.stride, (0, rows, columns))


def _unchanged(x: Tensor) -> Tensor:
    return x


def _as_it_is(layer: Part, x: Tensor) -> Tensor:
    return layer(x)


def _fold(weight: Tensor, doubled: list[int]) -> FoldedKernels:
    """A kernel of 3 in each of the doubled dimensions, as kernels of 2 on what is not doubled yet, one for each phase.

    Of ``a b c`` the first of two equal pixels sees ``a`` in the pixel before and ``b + c`` in its own, the second ``a +
    b`` in its own and ``c`` in the next. Frames are seen two back, so of two equal ones the first sees ``a + b`` in the
    frame before and ``c`` in its own, the second ``a`` and ``b + c``.
    """
    phases = []
    for phase in itertools.product((0, 1), repeat=len(doubled)):
        folded = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for dim, second in zip(doubled, phase, strict=True):
            a, b, c = folded.split(1, dim=dim)
            folded = torch.cat([a + b, c] if second else [a, b + c], dim=dim)
        phases.append((phase, folded.to(weight.dtype)))
    return phases


def _empty_like(part: Tensor, size: tuple[int, int]) -> Tensor:
    channels_last = part.ndim == 4 and part.stride(1) == 1 and part.shape[1] > 1
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((*part.shape[:2], *size), dtype=part.dtype, device=part.device, memory_format=memory_format)
