"""Shapes of a VAE's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handlers.model import Kind, Task


@dataclass(frozen=True)
class Layout:
    """Shapes of a VAE: images [B, 3, H, W] or videos [B, 3, F, H, W], and latents with C channels and smaller sizes.

    Some VAEs take images as videos of one frame; their latents are [B, C, 1, H, W]. Others take videos as batches of
    images, which does not matter here.
    """

    kind: Kind
    latent_channels: int
    vae_scale_factor: int
    """Pixels per latent in height and width."""
    frame_counts: tuple[int, int, int] = (1, 1, 1)
    """Frames decoded from 1, 2 and 3 latent frames. Two more latent frames always add the same number of frames. Most
    VAEs decode n latent frames to (n - 1) * factor + 1 frames; CogVideoX to n * factor for an even n."""
    vae_ndim: int = 4
    """Dimensions of the VAE's input; 5 for a VAE with frames."""
    variational: bool = True
    """True if the encoder gives a distribution, which has moments and samples."""

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
        """Return the number of frames decoded from latent frames."""
        odd, even, next_odd = self.frame_counts
        return (odd if latent_frames % 2 else even) + (latent_frames - 1) // 2 * (next_odd - odd)

    def latent_frames(self, frames: int) -> int:
        """Return the most latent frames whose decoded frames are at most `frames`; at least 1."""
        count = 1
        while self.kind == "video" and self.decoded_frames(count + 1) <= frames:
            count += 1
        return count

    def fitting_frames(self, frames: int) -> tuple[int, int]:
        """Return the nearest lower and upper number of frames that the VAE encodes without dropping one."""
        latent_frames = self.latent_frames(frames)
        below = self.decoded_frames(latent_frames)
        return below, below if below == frames else self.decoded_frames(latent_frames + 1)

    def frames(self, task: Task, shape: Sequence[int]) -> int:
        """Return the decoded frames of one item, from the shape of a task's inputs."""
        if self.kind == "image":
            return 1
        return shape[2] if task == "encode" else self.decoded_frames(shape[2])

    def frame_pixels(self, task: Task, shape: Sequence[int]) -> int:
        """Return the pixels of one image or frame, from the shape of a task's inputs."""
        side = self.vae_scale_factor if task == "decode" else 1
        return shape[-2] * side * shape[-1] * side

    def pixels(self, task: Task, shape: Sequence[int]) -> int:
        """Return the pixels of one item, with all frames of a video, from the shape of a task's inputs."""
        return self.frames(task, shape) * self.frame_pixels(task, shape)

    def encoded_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the latents that a batch of pixels is encoded to."""
        side = self.vae_scale_factor
        frames = (self.latent_frames(self.frames("encode", shape)),) if self.ndim == 5 else ()
        return shape[0], self.latent_channels, *frames, shape[-2] // side, shape[-1] // side

    def describe_pixels(self) -> str:
        """Return the shape of a batch of pixels in words, for error texts."""
        if self.kind == "video":
            return "[B, 3, F, height, width]"
        return "[B, 3, height, width]" + (" or [B, 3, 1, height, width]" if self.ndim == 5 else "")
