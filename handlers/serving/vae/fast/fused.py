"""Fast passes on a GPU: normalization, activation, biases and sums in the project's own kernels."""

from __future__ import annotations

import inspect
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handlers.serving.vae import blocks
from handlers.serving.vae.autoencoder import has_frames
from handlers.serving.vae.blocks import BlockOps, Module
from handlers.serving.vae.fast import kernels
from handlers.serving.vae.fast.forward import FastPass, convolve_frame
from handlers.serving.vae.fast.kernels import channels_last

ALIGNED = 8
"""Tensor cores take a multiple of this many channels, so images with 3 or 4 channels get channels of zeros."""
SCORES = 2**25
"""Most attention scores in memory: 128 MiB of float32."""
COMPILING = Lock()
"""Held while kernels are compiled. Several models share most of them."""
WIDEST_HEAD = 256
"""Channels of the widest attention head that torch's fast kernels take."""


def fused_pass(model: Any) -> FastPass:
    """Return the best fast pass of a known model on a GPU. Without a compiler it has no kernels of its own."""
    if problem := missing_compiler():
        fast = FastPass(model)
        fast.note = f"; without the kernels, because {problem}"
        return fast
    if blocks.is_causal(blocks.coders_of(model)):
        return CausalPass(model)
    return FastPass(model) if has_frames(model) else ImagePass(model)


def missing_compiler() -> str | None:
    """Return what Triton lacks to build the code that starts its kernels; None if it lacks nothing."""
    if not any((os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang"))):
        return "Triton finds no C compiler (gcc, clang or CC)"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return None if header.is_file() else f"Triton needs Python's headers ({header})"


class ImagePass(FastPass):
    """Fast pass of images, which are channels-last in memory, as are copies of the weights."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # cuDNN before 9.3 takes fewer than 2^31 values. The first two levels have the largest tensors.
        self.most_pixels = (2**31 - 1) // max(model.config.block_out_channels[:2])
        self._parameters: dict[Module, tuple[Tensor, Tensor | None]] = {}
        self._biases: dict[Module, Tensor] = {}
        """Biases that the sum at the end of a residual block adds."""
        for module in self._modules:
            if isinstance(module, nn.Conv2d):
                self._parameters[module] = _aligned(module)
            elif _has_kernels(module):
                convs = [module.conv2] if module.conv_shortcut is None else [module.conv2, module.conv_shortcut]
                wide = torch.promote_types(self.dtype, torch.float32)
                self._biases[module] = torch.stack([conv.bias for conv in convs]).sum(0, dtype=wide)
        self._subpixel_kernels = {
            conv: channels_last(torch.cat([kernel for _, kernel in self._folded.pop(conv)]))
            for conv in list(self._folded)
            if _is_power_of_two(conv.out_channels)
        }
        """Kernels of the upsamplings: four convolutions as one."""

    @torch.no_grad()
    def prepare(self) -> None:
        """Compile the kernels by running each once for each number of channels."""
        with COMPILING, self._on_device():
            for block in {block.conv2.out_channels: block for block in self._biases}.values():
                x = torch.zeros(1, block.conv2.out_channels, 4, 4, device=self.device, dtype=self.dtype)
                self._group_norm(block.norm2, x)
                self._group_norm(block.norm2, x, input_bias=block.conv1.bias)
                kernels.add(x, self._biases[block], x)
            for conv in {conv.out_channels: conv for conv in self._subpixel_kernels}.values():
                subpixels = torch.zeros(1, 4 * conv.out_channels, 3, 3, device=self.device, dtype=self.dtype)
                kernels.interleave(subpixels, conv.bias)

    def _forwards(self, coder: Module) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
        yield from super()._forwards(coder)
        for module in coder.modules():
            if module in self._parameters:
                yield module, partial(self._convolve, module)

    def _run(self, coder: Module, sample: Tensor, latent_embeds: None = None) -> Tensor:
        return super()._run(coder, channels_last(sample)).contiguous()

    @cached_property
    def _ops(self) -> BlockOps:
        return super()._ops._replace(attend=attend)

    def _normalize(self, norm: Module, activation: Module, x: Tensor) -> Tensor:
        has_kernel = isinstance(activation, nn.SiLU) and isinstance(norm, nn.GroupNorm) and _fits(norm)
        return self._group_norm(norm, x) if has_kernel else super()._normalize(norm, activation, x)

    def _group_norm(self, norm: Module, x: Tensor, input_bias: Tensor | None = None, in_place: bool = False) -> Tensor:
        return kernels.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, input_bias, in_place)

    def _residual(self, block: Module, x: Tensor) -> Tensor:
        """Compute a residual block. The kernel that reads a convolution's result adds its bias."""
        if block not in self._biases:
            return super()._residual(block, x)
        conv = block.conv_shortcut
        shortcut = x if conv is None else self._convolve(conv, x, has_bias=False)
        normalized = self._group_norm(block.norm1, x, in_place=shortcut is not x)
        hidden = self._convolve(block.conv1, normalized, has_bias=False)
        del normalized
        if shortcut is not x:
            _free(x)
        hidden = self._group_norm(block.norm2, hidden, block.conv1.bias, in_place=True)
        return kernels.add(self._convolve(block.conv2, hidden, has_bias=False), self._biases[block], shortcut)

    def _upsample(self, layer: Module, x: Tensor) -> Tensor:
        if layer.conv not in self._subpixel_kernels:
            return super()._upsample(layer, x)
        subpixels = F.conv2d(x, self._subpixel_kernels[layer.conv], padding=1)
        _free(x)
        return kernels.interleave(subpixels, layer.conv.bias)

    def _convolve(self, conv: Module, x: Tensor, has_bias: bool = True) -> Tensor:
        weight, bias = self._parameters[conv]
        if conv.in_channels < weight.shape[1]:
            x = F.pad(x, (0, 0, 0, 0, 0, weight.shape[1] - conv.in_channels))
        result = F.conv2d(x, weight, bias if has_bias else None, conv.stride, conv.padding)
        return result[:, : conv.out_channels] if conv.out_channels < len(weight) else result


class CausalPass(FastPass):
    """Fast pass of Wan and Qwen-Image. Videos are contiguous in memory."""

    @torch.no_grad()
    def prepare(self) -> None:
        """Compile the kernel by running it once for each number of channels, with and without vectors."""
        norms = {module.gamma.numel(): module for module in self._modules if _is_rms_norm(module)}
        with COMPILING, self._on_device():
            for channels, norm in norms.items():
                for width in (1, kernels.VECTOR):
                    x = torch.zeros(1, channels, 1, 1, width, device=self.device, dtype=self.dtype)
                    self._normalize(norm, nn.SiLU(), x)

    def _normalize(self, norm: Module, activation: Module, x: Tensor) -> Tensor:
        has_kernel = isinstance(activation, nn.SiLU) and _is_rms_norm(norm) and x.ndim == 5
        return _rms_norm(norm, x) if has_kernel else super()._normalize(norm, activation, x)

    def _normalize_after(self, earlier: Tensor | None, norm: Module, activation: Module, x: Tensor) -> Tensor:
        """Normalize and activate frames as in `FastPass`. The kernel writes them where they are needed."""
        if earlier is None or not (isinstance(activation, nn.SiLU) and _is_rms_norm(norm)):
            return super()._normalize_after(earlier, norm, activation, x)
        room = earlier.shape[2]
        frames = _rms_norm(norm, x, room)
        frames[:, :, :room] = earlier
        return frames

    def _convolve_in_time(self, conv: Module, x: Tensor, missing: int) -> Tensor:
        """Convolve frames as in `FastPass`. One frame takes a convolution of an image."""
        is_alone = x.shape[2] == 1 and missing == conv.weight.shape[2] - 1
        return convolve_frame(conv, x) if is_alone else super()._convolve_in_time(conv, x, missing)


def attend(attention: Module, x: Tensor) -> Tensor:
    """Compute attention between the pixels of an image [B, C, H, W].

    A head of more than `WIDEST_HEAD` channels is computed by matrix products, with a slice of the queries at a time.
    """
    if x.shape[1] // attention.heads <= WIDEST_HEAD or attention.heads > 1 or not has_wide_products():
        return blocks.attend(attention, x)
    tokens = attention.group_norm(x.flatten(2)).transpose(1, 2)
    query, key, value = (project(tokens) for project in (attention.to_q, attention.to_k, attention.to_v))
    rows = max(1, SCORES // query.shape[1])
    result = torch.empty_like(query)
    for item in range(len(x)):
        for part, out in zip(query[item].split(rows), result[item].split(rows), strict=True):
            scores = wide_product(part, key[item].t()).mul_(query.shape[-1] ** -0.5)
            torch.mm(scores.softmax(-1).to(x.dtype), value[item], out=out)
    return attention.to_out[0](result).transpose(1, 2).unflatten(2, x.shape[2:]) + x


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of two matrices of half precision in float32; on a CPU that of wider copies."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda and wide != a.dtype else a.to(wide) @ b.to(wide)


def has_wide_products() -> bool:
    """Return whether torch has products of half precision in float32, which came with 2.8."""
    return "out_dtype" in (inspect.getdoc(torch.mm) or "")


def _free(x: Tensor) -> None:
    """Free the memory of a tensor that the caller still refers to, but does not read."""
    x.data = x.new_empty(0)


def _aligned(conv: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Return weights [out, in, h, w] and bias, both numbers of channels padded to a multiple of `ALIGNED`."""
    more_out, more_in = (-channels % ALIGNED for channels in conv.weight.shape[:2])
    weight = F.pad(conv.weight, (0, 0, 0, 0, 0, more_in, 0, more_out))
    return channels_last(weight), None if conv.bias is None else F.pad(conv.bias, (0, more_out))


def _has_kernels(module: Module) -> bool:
    """Return whether a module is a residual block that the kernels can compute."""
    is_block = hasattr(module, "norm1") and hasattr(module, "conv_shortcut")
    return is_block and isinstance(module.nonlinearity, nn.SiLU) and _fits(module.norm1) and _fits(module.norm2)


def _fits(norm: nn.GroupNorm) -> bool:
    """Return whether the kernels support the numbers of channels and groups."""
    return _is_power_of_two(norm.num_channels) and _is_power_of_two(norm.num_groups)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def _rms_norm(norm: Module, x: Tensor, room: int = 0) -> Tensor:
    return kernels.rms_norm(x, norm.gamma, norm.bias if isinstance(norm.bias, Tensor) else None, norm.scale, room)


def _is_rms_norm(module: Module) -> bool:
    return type(module).__name__ in ("WanRMS_norm", "QwenImageRMS_norm")
