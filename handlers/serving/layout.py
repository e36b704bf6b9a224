from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from handlers.serving.request import Kind, Task


def vae_scale_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent in height and in width, from a diffusers VAE config (8 for every published model here)."""
    return config.get("spatial_compression_ratio") or 2 ** (len(config["block_out_channels"]) - 1)


@dataclass(frozen=True)
class Layout:
    """The shapes of a VAE's tensors: latents [B, C, H, W] for an image model, [B, C, F, H, W] for a video model."""

    kind: Kind
    latent_channels: int
    vae_scale_factor: int
    """Pixels per latent in height and in width."""
    frame_factor: int = 1
    """Frames per latent frame of a video, whose first one stands alone: F latent frames are (F - 1) * factor + 1."""

    @classmethod
    def of_config(cls, config: Mapping[str, Any], kind: Kind) -> Layout:
        frame_factor = config.get("temporal_compression_ratio", 1)
        return cls(kind, config["latent_channels"], vae_scale_factor(config), frame_factor)

    @property
    def ndim(self) -> int:
        """Dimensions of a batch."""
        return 5 if self.kind == "video" else 4

    def frames(self, task: Task, shape: Sequence[int]) -> int:
        """Frames of one item's video, or 1, by the shape of a task's input batch."""
        if self.kind == "image":
            return 1
        return shape[2] if task == "encode" else (shape[2] - 1) * self.frame_factor + 1

    def pixels(self, task: Task, shape: Sequence[int]) -> int:
        """Pixels of one item's picture, or of all frames of its video, by the shape of a task's input batch."""
        side = self.vae_scale_factor if task == "decode" else 1
        return self.frames(task, shape) * shape[-2] * side * shape[-1] * side

    def broadcast(self, count: int) -> tuple[int, ...]:
        """The shape in which `count` numbers, one a channel, broadcast over a batch."""
        return (1, count) + (1,) * (self.ndim - 2)

    def describe(self, channels: int, shrink: int = 1) -> str:
        """The shape of a batch in words, for messages."""
        frames = "F, " if self.kind == "video" else ""
        by = f"/{shrink}" if shrink > 1 else ""
        return f"[B, {channels}, {frames}height{by}, width{by}]"
