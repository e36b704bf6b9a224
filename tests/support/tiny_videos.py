"""Seeded weights for the networks of the TAEHV family, at their published size."""

from __future__ import annotations

import torch
from torch import Tensor


def seeded_weights(shapes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights that keep the deviation of values from layer to layer about the same."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, tensor in sorted(shapes.items()):
        inputs = tensor[0].numel() if tensor.ndim > 1 else 100
        weights[name] = torch.randn(tensor.shape, generator=generator) * inputs**-0.5
    return weights


def seeded_values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))
