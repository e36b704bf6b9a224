"""Fast pass on a CPU: tensors are channels-last in memory, and many 3x3 convolutions in float32 are Winograd's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handlers.serving.vae import blocks
from handlers.serving.vae.blocks import Module
from handlers.serving.vae.fast import winograd
from handlers.serving.vae.fast.forward import FastPass, convolve_frame


class CpuPass(FastPass):
    """Fast pass on a CPU. HunyuanVideo, whose convolutions pad by repetition, runs as in `FastPass`."""

    @cached_property
    def workspace(self) -> int:
        weights = [weight for weight in self.model.parameters() if weight.ndim > 3 and winograd.is_faster(weight)]
        return max(map(winograd.workspace, weights), default=0)

    def _run(self, coder: Module, sample: Tensor, latent_embeds: None = None) -> Tensor:
        if sample.ndim == 5:
            return super()._run(coder, sample)
        return blocks.run(coder, self._ops, sample.contiguous(memory_format=torch.channels_last)).contiguous()

    def _normalize(self, norm: Module, activation: Module, x: Tensor) -> Tensor:
        if not isinstance(norm, nn.GroupNorm) or x.ndim == 5:
            return super()._normalize(norm, activation, x)
        if x.dtype == torch.bfloat16:
            x = _group_norm_in_bfloat16(norm, x)
        else:
            x = torch.cat([_group_norm(norm, item) for item in x.split(1)]) if len(x) > 1 else _group_norm(norm, x)
        return F.silu(x, inplace=True) if isinstance(activation, nn.SiLU) else activation(x)

    def _causal(self, coder: Module) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
        for module, forward in super()._causal(coder):
            yield module, partial(_run_channels_last, forward) if module is coder.conv_in else forward

    def _convolve(self, conv: Module, x: Tensor) -> Tensor:
        if (
            isinstance(conv, nn.Conv2d)
            and conv.stride == (1, 1)
            and winograd.is_faster(conv.weight, x.shape[-2:].numel())
        ):
            return _winograd(x.unsqueeze(2), conv.weight.unsqueeze(2), conv.bias).squeeze(2)
        return conv(x)

    def _convolve_in_time(self, conv: Module, x: Tensor, missing: int) -> Tensor:
        """Convolve frames as in `FastPass`. One frame takes a convolution of an image."""
        weight = conv.weight
        if is_alone := x.shape[2] == 1 and missing == weight.shape[2] - 1:
            weight, missing = weight[:, :, -1:], 0  # the kernel's other frames see only zeros
        if tuple(conv.stride) == (1, 1, 1) and winograd.is_faster(weight, x.shape[-2:].numel()):
            return _winograd(F.pad(x, (0, 0, 0, 0, missing, 0)) if missing else x, weight, conv.bias)
        return convolve_frame(conv, x) if is_alone else super()._convolve_in_time(conv, x, missing)


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve frames [B, C, F, H, W] with a kernel [K, C, T, 3, 3] to [B, K, F - T + 1, H, W], channels-last."""
    frames = x.movedim(1, -1)
    out = x.new_empty(len(x), x.shape[2] - weight.shape[2] + 1, *x.shape[3:], len(weight))
    for item, result in zip(frames, out, strict=True):
        winograd.convolve(item, weight, bias, result)
    return out.movedim(-1, 1)


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Normalize [1, C, H, W], channels-last, with the statistics of each channel.

    torch's own kernel takes the variance as the mean of squares minus the square of the mean, which is wrong by 1 % for
    a mean of 50 standard deviations. The statistics for batch normalization take the mean first.
    """
    means, variances = (
        values.unflatten(0, (norm.num_groups, -1)) for values in torch.batch_norm_update_stats(x, None, None, 0.0)
    )
    mean = means.mean(1, keepdim=True)
    variance = (variances + (means - mean).square()).mean(1, keepdim=True)
    # Normalized by an infinite variance, values would be a constant, and the image a wrong one that is finite.
    variance = variance.masked_fill(variance.isinf(), math.nan)
    return F.batch_norm(
        x, mean.expand_as(means).flatten(), variance.expand_as(means).flatten(), norm.weight, norm.bias, eps=norm.eps
    )


def _group_norm_in_bfloat16(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Normalize [B, C, H, W] by torch's own kernel. The result is NaN if a variance overflows, as in `_group_norm`."""
    batch, channels, height, width = x.shape
    x, _, factors = torch.native_group_norm(
        x, norm.weight, norm.bias, batch, channels, height * width, norm.num_groups, norm.eps
    )
    return x if (factors > 0).all() else x.fill_(math.nan)


def _run_channels_last(forward: Callable[..., Tensor], x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    return forward(x.contiguous(memory_format=torch.channels_last_3d), cache_x)


class DiffusersPass(FastPass):
    """diffusers' own pass, for the copy of a model that has no other fast pass (`decoder_in_bfloat16`)."""

    @contextmanager
    def installed(self) -> Iterator[None]:
        yield


def decoder_in_bfloat16(model: Any) -> Any:
    """Return a copy of a model that decodes in bfloat16. It shares the encoder's modules."""
    shared = [module for name in ("encoder", "quant_conv") if (module := getattr(model, name, None)) is not None]
    copied = deepcopy(model, {id(module): module for module in shared})
    for module in copied.children():
        if module not in shared:
            module.to(torch.bfloat16)
    return copied


CPU_INFO = Path("/proc/cpuinfo")
FLAGS = {
    torch.bfloat16: {"avx512_bf16", "amx_bf16", "bf16"},
    torch.float16: {"avx512_fp16", "amx_fp16", "asimdhp"},
}
"""Flags of processors with instructions for a dtype: two of x86, and one of ARM."""


def has_instructions(dtype: torch.dtype) -> bool:
    """Return whether this processor computes in a half dtype; False on a system without Linux's `/proc/cpuinfo`."""
    with suppress(OSError):
        if line := re.search(r"^(?:flags|Features)\s*:(.*)", CPU_INFO.read_text(), re.MULTILINE):
            return not FLAGS[dtype].isdisjoint(line[1].split())
    return False
