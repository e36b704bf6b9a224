"""Fast pass on a CPU, whose convolutions prefer tensors that are channels-last in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handlers.serving.vae import blocks
from handlers.serving.vae.blocks import Module
from handlers.serving.vae.fast.forward import FastPass


class CpuPass(FastPass):
    """Fast pass on a CPU. HunyuanVideo, whose convolutions pad by repetition, runs as in `FastPass`."""

    def _run(self, coder: Module, sample: Tensor, latent_embeds: None = None) -> Tensor:
        if sample.ndim == 5:
            return super()._run(coder, sample)
        return blocks.run(coder, self._ops, sample.contiguous(memory_format=torch.channels_last)).contiguous()

    def _causal(self, coder: Module) -> Iterator[tuple[nn.Module, Callable[..., Tensor]]]:
        for module, forward in super()._causal(coder):
            yield module, partial(_run_channels_last, forward) if module is coder.conv_in else forward

    def _convolve_in_time(self, conv: Module, x: Tensor, missing: int) -> Tensor:
        """Convolve frames as in `FastPass`. One frame takes a convolution of an image."""
        time = conv.weight.shape[2]
        if x.shape[2] > 1 or missing != time - 1:
            return super()._convolve_in_time(conv, x, missing)
        columns, _, rows, *_ = conv._padding
        # The kernel's other frames see only zeros.
        return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], (rows, columns)).unsqueeze(2)


def _run_channels_last(forward: Callable[..., Tensor], x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    return forward(x.contiguous(memory_format=torch.channels_last_3d), cache_x)
