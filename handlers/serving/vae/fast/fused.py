"""Fast pass on a GPU: normalization, activation, biases and sums in the project's own kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handlers.serving.vae import blocks
from handlers.serving.vae.autoencoder import has_frames
from handlers.serving.vae.blocks import Module
from handlers.serving.vae.fast import kernels
from handlers.serving.vae.fast.forward import FastPass


class FusedPass(FastPass):
    """Fast pass with kernels. Images and copies of their weights are channels-last in memory; videos are not."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._weights: dict[nn.Module, Tensor] = {}
        if not has_frames(model):
            self._weights = {
                module: _channels_last(module.weight) for module in self._modules if isinstance(module, nn.Conv2d)
            }
            for folded in self._folded.values():
                folded[:] = [(position, _channels_last(weight)) for position, weight in folded]

    @torch.no_grad()
    def prepare(self) -> None:
        """Compile the kernels by running each once."""
        device, dtype = self.model.device, self.model.dtype
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for norm in self._distinct_norms():
                if isinstance(norm, nn.GroupNorm):
                    x = _channels_last(torch.zeros(1, norm.num_channels, 4, 4, device=device, dtype=dtype))
                    for input_bias in (None, norm.bias):
                        self._group_norm(norm, x, x, input_bias)
                    kernels.add(x, norm.bias, x.clone())
                else:
                    x = torch.zeros(1, norm.gamma.numel(), 1, 4, 4, device=device, dtype=dtype)
                    self._normalize(norm, nn.SiLU(), x)

    def _distinct_norms(self) -> Iterator[Module]:
        """Yield a norm that has a kernel for each number of channels."""
        norms = {}
        for module in self._modules:
            if isinstance(module, nn.GroupNorm) and self._weights and _fits(module):
                norms[module.num_channels] = module
            elif _is_rms_norm(module):
                norms[module.gamma.numel()] = module
        yield from norms.values()

    def _run(self, coder: Module, sample: Tensor, latent_embeds: None = None) -> Tensor:
        if not self._weights:
            return super()._run(coder, sample)
        return blocks.run(coder, self._ops, _channels_last(sample)).contiguous()

    def _normalize(self, norm: Module, activation: Module, x: Tensor) -> Tensor:
        if isinstance(activation, nn.SiLU):
            if isinstance(norm, nn.GroupNorm) and self._weights and _fits(norm):
                return self._group_norm(norm, x, torch.empty_like(x))
            if _is_rms_norm(norm) and x.ndim == 5 and x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]:
                bias = norm.bias if isinstance(norm.bias, Tensor) else None
                return kernels.rms_norm(x, norm.gamma, bias, norm.scale)
        return super()._normalize(norm, activation, x)

    def _group_norm(self, norm: nn.GroupNorm, x: Tensor, out: Tensor, input_bias: Tensor | None = None) -> Tensor:
        return kernels.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, out, input_bias)

    def _residual(self, block: Module, x: Tensor) -> Tensor:
        """Compute a residual block. The kernel that reads a convolution's result adds its bias."""
        if not (
            self._weights and _fits(block.norm1) and _fits(block.norm2) and isinstance(block.nonlinearity, nn.SiLU)
        ):
            return super()._residual(block, x)
        hidden = self._convolve(block.conv1, self._normalize(block.norm1, block.nonlinearity, x))
        hidden = self._convolve(block.conv2, self._group_norm(block.norm2, hidden, hidden, input_bias=block.conv1.bias))
        shortcut = block.conv_shortcut
        x = x if shortcut is None else self._convolve(shortcut, x, shortcut.bias)
        return kernels.add(hidden, block.conv2.bias, x)

    def _finish(self, coder: Module, x: Tensor) -> Tensor:
        if not self._weights:
            return super()._finish(coder, x)
        conv = coder.conv_out
        return self._convolve(conv, self._normalize(coder.conv_norm_out, coder.conv_act, x), conv.bias)

    def _convolve(self, conv: nn.Conv2d, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.conv2d(x, self._weights[conv], bias, conv.stride, conv.padding)


def _fits(norm: nn.GroupNorm) -> bool:
    """Return whether the kernels support the numbers of channels and groups, which must be powers of two."""
    return all(number & (number - 1) == 0 for number in (norm.num_channels, norm.num_groups))


def _is_rms_norm(module: Module) -> bool:
    return type(module).__name__ in ("WanRMS_norm", "QwenImageRMS_norm")


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
