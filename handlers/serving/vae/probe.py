"""Probe of a model's tensor shapes, on a copy without weights, which takes no memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from handlers.model import Model, Task
from handlers.serving.layout import Layout
from handlers.serving.vae.autoencoder import decode_at_once, encode_at_once, forget, has_frames, posterior_of

SIDE = 64
"""Height and width of the encoded image in pixels: a multiple of the scale factors of known VAEs, 8 to 32."""


class Probe:
    """A copy of a diffusers autoencoder on the meta device."""

    def __init__(self, model: Any) -> None:
        with torch.device("meta"):
            self.copy = type(model).from_config(model.config).eval()

    def layout(self, declared: type[Model]) -> Layout:
        """Find the shapes, in about 0.1 s for an image model and 0.4 s for a video model.

        Raises:
            ValueError: the model takes no images of so many channels.
        """
        try:
            encoded = self._run(posterior_of, (1, declared.pixel_channels, SIDE, SIDE))
        except RuntimeError as error:
            colors = "RGB" if declared.pixel_channels == 3 else "RGBA"
            problem = f"the {declared.vae_class} of {declared.__name__} takes no {colors} images: {error}"
            raise ValueError(problem) from None
        variational = not isinstance(encoded, torch.Tensor)
        latents = encoded.mode() if variational else encoded
        channels = latents.shape[1]
        frames: tuple[int, ...] = (1, 2, 3) if declared.kind == "video" else (1, 1, 1)
        upscale = 1
        if declared.kind == "video" and has_frames(self.copy):
            frames, upscale = self._decoded(declared, channels)
        ndim = 5 if has_frames(self.copy) else 4
        scale, clip, pixel_channels = SIDE // latents.shape[-1], declared.clip, declared.pixel_channels
        return Layout(declared.kind, channels, scale, frames, ndim, variational, clip, pixel_channels, upscale)

    def _decoded(self, declared: type[Model], channels: int) -> tuple[tuple[int, ...], int]:
        """Return the frames decoded from 1, 2, ... latent frames, for one period, and `Layout.upscale`.

        A model that does not decode so few is probed with a period more.
        """
        period = declared.clip or 2
        skipped = period if declared.least_latent_frames > 1 else 0
        shapes = [
            self._run(decode_at_once, (1, channels, skipped + count, 2, 2)).shape for count in range(1, period + 2)
        ]
        counts = [shape[2] for shape in shapes]
        frames = tuple(count - skipped // period * (counts[-1] - counts[0]) for count in counts)
        return frames, math.isqrt(shapes[0][1] // declared.pixel_channels)

    def refuses(self, task: Task, shape: Sequence[int], tiled: bool) -> bool:
        """Return whether the model fails for every input of this shape, on any device."""
        self.copy.use_tiling = tiled
        try:
            self._run(encode_at_once if task == "encode" else decode_at_once, shape)
        except NotImplementedError:  # the meta device lacks an op
            return False
        except (RuntimeError, ValueError):
            return True
        finally:
            forget(self.copy)
        return False

    def _run(self, forward: Callable[[Any, torch.Tensor], Any], shape: Sequence[int]) -> Any:
        with torch.device("meta"), torch.no_grad():
            return forward(self.copy, torch.zeros(tuple(shape)))


def find_difference(layout: Layout, declared: type[Model]) -> str | None:
    """Describe what a model declares wrongly, with the probed values; None if all is right."""
    probed = {
        "latent_channels": layout.latent_channels,
        "vae_scale_factor": layout.vae_scale_factor,
        "upscale": layout.upscale,
        "frame_factor": layout.frame_factor if layout.kind == "video" else 1,
    }
    wrong = {name: value for name, value in probed.items() if getattr(declared, name, None) != value}
    if not wrong:
        return None
    declares = ", ".join(f"{name} = {getattr(declared, name, None)}" for name in wrong)
    has = ", ".join(f"{name} = {value}" for name, value in wrong.items())
    owner = next(base.__name__ for base in declared.__mro__ if "vae_class" in vars(base))
    return f"{owner} declares {declares}, but its {declared.vae_class} has {has}"
