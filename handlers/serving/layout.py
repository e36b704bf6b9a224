"""The shapes of a VAE's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handlers.model import Kind, Task


@dataclass(frozen=True)
class Layout:
    """Pictures are [B, 3, H, W] and videos [B, 3, F, H, W]; latents the same with other channels and a smaller H, W.

    Some VAEs take pictures as videos of one frame, so that their latents are [B, C, 1, H, W]; others take videos as
    batches of pictures, which does not show here.
    """

    kind: Kind
    latent_channels: int
    vae_scale_factor: int
    """Pixels per latent in height and in width."""
    frame_counts: tuple[int, int, int] = (1, 1, 1)
    """Frames that 1, 2 and 3 latent frames are decoded to. Every two more give as many more as the third gives over the
    first: most VAEs have (n - 1) * factor + 1 for all n, CogVideoX only for odd ones, and n * factor for even ones."""
    vae_ndim: int = 4
    """Dimensions of what the VAE itself takes; 5 where it has frames."""
    variational: bool = True
    """Whether the encoder gives a distribution, of which there are moments and samples."""

    @property
    def ndim(self) -> int:
        """Dimensions of a batch of latents."""
        return 5 if self.kind == "video" else self.vae_ndim

    @property
    def pixels_ndim(self) -> int:
        """Dimensions of a batch of pixels."""
        return 5 if self.kind == "video" else 4

    @property
    def frame_factor(self) -> int:
        """Frames of a video per latent frame after the first."""
        return (self.frame_counts[2] - self.frame_counts[0]) // 2

    def decoded_frames(self, latent_frames: int) -> int:
        """Frames of a video that so many latent frames are decoded to."""
        odd, even, next_odd = self.frame_counts
        return (odd if latent_frames % 2 else even) + (latent_frames - 1) // 2 * (next_odd - odd)

    def latent_frames(self, frames: int) -> int:
        """The most latent frames that are decoded to no more than so many frames; at least 1."""
        count = 1
        while self.kind == "video" and self.decoded_frames(count + 1) <= frames:
            count += 1
        return count

    def fitting_frames(self, frames: int) -> tuple[int, int]:
        """The nearest counts, not above and not below, of frames that can be encoded without one being dropped."""
        latent_frames = self.latent_frames(frames)
        below = self.decoded_frames(latent_frames)
        return below, below if below == frames else self.decoded_frames(latent_frames + 1)

    def frames(self, task: Task, shape: Sequence[int]) -> int:
        """Frames of one item's video, or 1, by the shape of a task's input batch."""
        if self.kind == "image":
            return 1
        return shape[2] if task == "encode" else self.decoded_frames(shape[2])

    def frame_pixels(self, task: Task, shape: Sequence[int]) -> int:
        """Pixels of one picture or frame, by the shape of a task's input batch."""
        side = self.vae_scale_factor if task == "decode" else 1
        return shape[-2] * side * shape[-1] * side

    def pixels(self, task: Task, shape: Sequence[int]) -> int:
        """Pixels of one item's picture, or of all frames of its video, by the shape of a task's input batch."""
        return self.frames(task, shape) * self.frame_pixels(task, shape)

    def describe_pixels(self) -> str:
        """The shape of a batch in words, for messages."""
        if self.kind == "video":
            return "[B, 3, F, height, width]"
        return "[B, 3, height, width]" + (" or [B, 3, 1, height, width]" if self.ndim == 5 else "")
