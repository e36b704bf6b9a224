"""Shapes of a VAE's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handlers.model import Kind, Task


@dataclass(frozen=True)
class Layout:
    """Shapes of a VAE: images [B, 3, H, W] or videos [B, 3, F, H, W], and latents with C channels and smaller sizes.

    Transparent images have 4 channels.

    Some VAEs take images as videos of one frame; their latents are [B, C, 1, H, W]. Others take videos as batches of
    images, which does not matter here.
    """

    kind: Kind
    latent_channels: int
    vae_scale_factor: int
    """Encoded pixels per latent in height and width."""
    frame_counts: tuple[int, ...] = (1, 1, 1)
    """Frames decoded from 1, 2, ... and `period` + 1 latent frames. `period` more latent frames always add the same
    number of frames. Most VAEs decode n latent frames to (n - 1) * factor + 1 frames; CogVideoX to n * factor for an
    even n; MiniMax-H3 clips of 5 to 17."""
    vae_ndim: int = 4
    """Dimensions of the VAE's input; 5 for a VAE with frames."""
    variational: bool = True
    """True if the encoder gives a distribution, which has moments and samples."""
    clip: int | None = None
    """Latent frames of a clip (see `Model.clip`)."""
    pixel_channels: int = 3
    """Channels of pixels: 3 for RGB, 4 for RGBA."""
    upscale: int = 1
    """Height and width of decoded pixels relative to those that are encoded."""

    @property
    def ndim(self) -> int:
        """Dimensions of a batch of latents."""
        return 5 if self.kind == "video" else self.vae_ndim

    @property
    def pixels_ndim(self) -> int:
        """Dimensions of a batch of pixels."""
        return 5 if self.kind == "video" else 4

    @property
    def decode_factor(self) -> int:
        """Decoded pixels per latent in height and width."""
        return self.vae_scale_factor * self.upscale

    @property
    def frame_factor(self) -> int:
        """Frames of a video per latent frame after the first."""
        return (self.frame_counts[2] - self.frame_counts[0]) // 2

    def decoded_frames(self, latent_frames: int) -> int:
        """Return the number of frames decoded from latent frames."""
        periods, position = divmod(latent_frames - 1, len(self.frame_counts) - 1)
        return self.frame_counts[position] + periods * (self.frame_counts[-1] - self.frame_counts[0])

    def latent_frames(self, frames: int) -> int:
        """Return the most latent frames that the encoder makes of at most `frames` frames; at least 1."""
        count = 1
        while self.kind == "video" and self.decoded_frames(self._next_count(count)) <= frames:
            count = self._next_count(count)
        return count

    def _next_count(self, latent_frames: int) -> int:
        """Return the next larger number of latent frames that the encoder gives."""
        return latent_frames + (self.clip if self.clip and latent_frames > 1 else 1)

    def fitting_frames(self, frames: int) -> tuple[int, int]:
        """Return the nearest lower and upper number of frames that the VAE encodes without dropping one."""
        latent_frames = self.latent_frames(frames)
        below = self.decoded_frames(latent_frames)
        return below, below if below == frames else self.decoded_frames(self._next_count(latent_frames))

    def frames(self, task: Task, shape: Sequence[int]) -> int:
        """Return the decoded frames of one item, from the shape of a task's inputs."""
        if self.kind == "image":
            return 1
        return shape[2] if task == "encode" else self.decoded_frames(shape[2])

    def frame_pixels(self, task: Task, shape: Sequence[int]) -> int:
        """Return the pixels of one image or frame, from the shape of a task's inputs."""
        side = self.decode_factor if task == "decode" else 1
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
        channels = "3" if self.pixel_channels == 3 else "3 or 4"
        if self.kind == "video":
            return f"[B, {channels}, F, height, width]"
        frame = f" or [B, {channels}, 1, height, width]" if self.ndim == 5 else ""
        return f"[B, {channels}, height, width]{frame}"
