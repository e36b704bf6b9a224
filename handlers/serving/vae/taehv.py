"""The TAEHV family: tiny autoencoders of video models. diffusers has no class for them.

Such a network has 2-D convolutions alone. Its blocks see a frame and the frame before it, so that a video is decoded
and encoded a latent frame at a time, in constant memory. The names of the weights are those of the published files
(https://github.com/madebyollin/taehv), and so are the results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

WIDTH = 64
"""Channels of the encoder's blocks."""
WIDTHS = (256, 128, 64, 64)
"""Channels of the decoder's blocks, and of its last convolution."""

Memory = dict[int, Tensor]
"""The last frame that each block with memory has seen, by the block's position."""


def convolution(channels: int, out_channels: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1, **options)


class SoftClamp(nn.Module):
    """Bound latents to (-3, 3), smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """A residual block of frames [B, C, H, W] and of the frames before them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            convolution(2 * channels, channels),
            nn.ReLU(inplace=True),
            convolution(channels, channels),
            nn.ReLU(inplace=True),
            convolution(channels, channels),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, before], 1)) + x)


class JoinFrames(nn.Module):
    """Join the channels of `stride` frames to one frame."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels * stride, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.reshape(-1, self.conv.in_channels, *x.shape[-2:]))


class SplitFrames(nn.Module):
    """Make `stride` frames of one."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, self.conv.in_channels, *x.shape[-2:])


class TinyVideoAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # their base classes have no types
    """An autoencoder of the TAEHV family. Pixels are in [-1, 1], although the published code has [0, 1].

    Each stage halves, or doubles, height and width. Stages whose entry in `encoder_time_downscale` or
    `decoder_time_upscale` is True do the same with frames.
    """

    use_tiling = False

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        latent_channels: int = 16,
        patch_size: int = 1,
        encoder_time_downscale: tuple[bool, ...] = (True, True, False),
        decoder_time_upscale: tuple[bool, ...] = (False, True, True),
        clip_latent_frames: int | None = None,
        keeps_even: bool = False,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        """Create the network.

        Args:
            patch_size: height and width in pixels of the patches that the network makes of pixels.
            clip_latent_frames: latent frames of a clip, as MiniMax-H3 has them; None for one clip of any length.
            keeps_even: True if an even number of latent frames is decoded without leaving out the first frames, as
                CogVideoX does.
            latents_mean, latents_std: statistics of raw latents for clients; the network does not use them.
        """
        super().__init__()
        pixels = 3 * patch_size**2
        self.encoder = nn.Sequential(
            convolution(pixels, WIDTH),
            nn.ReLU(inplace=True),
            *(block for halves in encoder_time_downscale for block in _encoder_stage(2 if halves else 1)),
            convolution(WIDTH, latent_channels),
        )
        self.decoder = nn.Sequential(
            SoftClamp(),
            convolution(latent_channels, WIDTHS[0]),
            nn.ReLU(inplace=True),
            *(
                block
                for stage, doubles in enumerate(decoder_time_upscale)
                for block in _decoder_stage(WIDTHS[stage], WIDTHS[stage + 1], 2 if doubles else 1)
            ),
            nn.ReLU(inplace=True),
            convolution(WIDTHS[-1], pixels),
        )
        self.frame_factor: int = 2 ** sum(encoder_time_downscale)

    def encode(self, pixels: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Encode pixels [B, 3, F, H, W] in [-1, 1] to latents [B, C, f, h, w]."""
        frames = pixels / 2 + 0.5
        clip = self.config.clip_latent_frames
        if clip is None:
            return (self._encode_clip(frames),)
        # a clip begins with black frames, which fill its first latent frame, and the last 3 latent frames are dropped
        whole = clip * self.frame_factor
        frames = _repeat_last(frames, whole - self.frame_factor + 1)
        clips = [
            self._encode_clip(F.pad(part, (0, 0, 0, 0, self.frame_factor - 1, 0)))
            for part in frames.split(whole - self.frame_factor + 1, dim=2)
        ]
        return (torch.cat(clips, 2)[:, :, : 1 if pixels.shape[2] == 1 else -3],)

    def _encode_clip(self, frames: Tensor) -> Tensor:
        memory: Memory = {}
        parts = _repeat_last(frames, self.frame_factor).split(self.frame_factor, dim=2)
        return torch.cat([self._run(self.encoder, self._to_patches(part), memory, len(frames)) for part in parts], 2)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Decode latents [B, C, f, h, w] to pixels [B, 3, F, H, W] in [-1, 1]."""
        return (torch.cat(list(self.decode_frames(latents)), 2),)

    def decode_frames(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode one latent frame at a time. Yield its frames [B, 3, F, H, W]."""
        memory: Memory = {}
        clip = self.config.clip_latent_frames or latents.shape[2]
        starts = not (self.config.keeps_even and latents.shape[2] % 2 == 0)
        for index, latent in enumerate(latents.split(1, dim=2)):
            frames = self._run(self.decoder, latent[:, :, 0], memory, len(latents))
            if self.config.patch_size > 1:
                frames = F.pixel_shuffle(frames.movedim(2, 1), self.config.patch_size).movedim(1, 2)
            first = frames.shape[2] - 1 if starts and index % clip == 0 else 0
            yield frames[:, :, first:].clamp(0, 1) * 2 - 1

    def _to_patches(self, frames: Tensor) -> Tensor:
        """Return frames [B, C, F, H, W] as a batch of images [B * F, C * p * p, H/p, W/p]."""
        return F.pixel_unshuffle(frames.movedim(2, 1).flatten(0, 1), self.config.patch_size)

    def _run(self, blocks: nn.Sequential, x: Tensor, memory: Memory, batch: int) -> Tensor:
        """Run the next frames, [B * F, C, H, W], through the blocks. Return [B, C, f, h, w], and change `memory`."""
        for index, block in enumerate(blocks):
            if isinstance(block, MemoryBlock):
                frames = x.unflatten(0, (batch, -1))
                before = memory.get(index, torch.zeros_like(frames[:, :1]))
                memory[index] = frames[:, -1:]
                x = block(x, torch.cat([before, frames[:, :-1]], 1).flatten(0, 1))
            else:
                x = block(x)
        return x.unflatten(0, (batch, -1)).movedim(1, 2)


def _encoder_stage(stride: int) -> Iterator[nn.Module]:
    yield JoinFrames(WIDTH, stride)
    yield convolution(WIDTH, WIDTH, stride=2, bias=False)
    yield from (MemoryBlock(WIDTH) for _ in range(3))


def _decoder_stage(width: int, next_width: int, stride: int) -> Iterator[nn.Module]:
    yield from (MemoryBlock(width) for _ in range(3))
    yield nn.Upsample(scale_factor=2)
    yield SplitFrames(width, stride)
    yield convolution(width, next_width, bias=False)


def _repeat_last(frames: Tensor, multiple: int) -> Tensor:
    """Repeat the last of frames [B, C, F, H, W] until their number is a multiple."""
    missing = -frames.shape[2] % multiple
    return torch.cat([frames, frames[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2) if missing else frames
