"""The fast pass on a GPU: normalisation, activation, biases and sums in kernels of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handlers.serving.vae import blocks as coders
from handlers.serving.vae.autoencoder import has_frames
from handlers.serving.vae.blocks import Part
from handlers.serving.vae.fast import kernels
from handlers.serving.vae.fast.forward import FastPass


class FusedPass(FastPass):
    """Pictures have their channels last in memory, and copies of the weights that layout; videos stay as they are."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._weights: dict[nn.Module, Tensor] = {}
        if not has_frames(model):
            self._weights = {part: _channels_last(part.weight) for part in self._parts if isinstance(part, nn.Conv2d)}
            for phases in self._folded.values():
                phases[:] = [(phase, _channels_last(weight)) for phase, weight in phases]

    @torch.no_grad()
    def prepare(self) -> None:
        """Has the kernels compiled, by running each once."""
        device, dtype = self.model.device, self.model.dtype
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for norm in self._distinct_norms():
                if isinstance(norm, nn.GroupNorm):
                    x = _channels_last(torch.zeros(1, norm.num_channels, 4, 4, device=device, dtype=dtype))
                    for before in (None, norm.bias):
                        self._group_norm(norm, x, x, before)
                    kernels.add(x, norm.bias, x.clone())
                else:
                    x = torch.zeros(1, norm.gamma.numel(), 1, 4, 4, device=device, dtype=dtype)
                    self._normalize(norm, nn.SiLU(), x)

    def _distinct_norms(self) -> Iterator[Part]:
        """One of those that a kernel is for, of each number of channels."""
        found = {}
        for part in self._parts:
            if isinstance(part, nn.GroupNorm) and self._weights and _fits(part):
                found[part.num_channels] = part
            elif _is_rms_norm(part):
                found[part.gamma.numel()] = part
        yield from found.values()

    def _run(self, coder: Part, sample: Tensor, latent_embeds: None = None) -> Tensor:
        if not self._weights:
            return super()._run(coder, sample)
        return coders.run(coder, self._ops, _channels_last(sample)).contiguous()

    def _normalize(self, norm: Part, activation: Part, x: Tensor) -> Tensor:
        if isinstance(activation, nn.SiLU):
            if isinstance(norm, nn.GroupNorm) and self._weights and _fits(norm):
                return self._group_norm(norm, x, torch.empty_like(x))
            if _is_rms_norm(norm) and x.ndim == 5 and x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]:
                bias = norm.bias if isinstance(norm.bias, Tensor) else None
                return kernels.rms_norm(x, norm.gamma, bias, norm.scale)
        return super()._normalize(norm, activation, x)

    def _group_norm(self, norm: nn.GroupNorm, x: Tensor, out: Tensor, before: Tensor | None = None) -> Tensor:
        return kernels.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, out, before)

    def _residual(self, block: Part, x: Tensor) -> Tensor:
        """Neither convolution adds its bias: what reads its result does."""
        if not (
            self._weights and _fits(block.norm1) and _fits(block.norm2) and isinstance(block.nonlinearity, nn.SiLU)
        ):
            return super()._residual(block, x)
        hidden = self._convolve(block.conv1, self._normalize(block.norm1, block.nonlinearity, x))
        hidden = self._convolve(block.conv2, self._group_norm(block.norm2, hidden, hidden, before=block.conv1.bias))
        shortcut = block.conv_shortcut
        x = x if shortcut is None else self._convolve(shortcut, x, shortcut.bias)
        return kernels.add(hidden, block.conv2.bias, x)

    def _finish(self, coder: Part, x: Tensor) -> Tensor:
        if not self._weights:
            return super()._finish(coder, x)
        conv = coder.conv_out
        return self._convolve(conv, self._normalize(coder.conv_norm_out, coder.conv_act, x), conv.bias)

    def _convolve(self, conv: nn.Conv2d, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, self._weights[conv], bias, conv.stride, conv.padding)


def _fits(norm: nn.GroupNorm) -> bool:
    """Whether the kernels take so many channels."""
    return all(number & (number - 1) == 0 for number in (norm.num_channels, norm.num_groups))


def _is_rms_norm(part: Part) -> bool:
    return type(part).__name__ in ("WanRMS_norm", "QwenImageRMS_norm")


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
