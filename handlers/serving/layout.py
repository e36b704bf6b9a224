from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handlers.base import vae_scale_factor
from handlers.serving.request import Kind


@dataclass(frozen=True)
class Layout:
    """The shapes of a VAE's tensors: latents [B, C, H, W] for an image model, [B, C, F, H, W] for a video model."""

    kind: Kind
    latent_channels: int
    vae_scale_factor: int
    """Pixels per latent in height and in width."""

    @classmethod
    def of_config(cls, config: Mapping[str, Any], kind: Kind) -> Layout:
        return cls(kind, config["latent_channels"], vae_scale_factor(config))

    @property
    def ndim(self) -> int:
        """Dimensions of a batch."""
        return 5 if self.kind == "video" else 4

    def broadcast(self, count: int) -> tuple[int, ...]:
        """The shape in which `count` numbers, one a channel, broadcast over a batch."""
        return (1, count) + (1,) * (self.ndim - 2)

    def describe(self, channels: int, shrink: int = 1) -> str:
        """The shape of a batch in words, for messages."""
        frames = "F, " if self.kind == "video" else ""
        by = f"/{shrink}" if shrink > 1 else ""
        return f"[B, {channels}, {frames}height{by}, width{by}]"
