"""What a loaded autoencoder's tensors look like: found on a copy without weights, which takes no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from handlers.model import Model, Task
from handlers.serving.layout import Layout
from handlers.serving.vae.autoencoder import decode_at_once, encode_at_once, forget, has_frames, posterior_of

SIDE = 64
"""Pixels of the picture that is encoded: a multiple of what every known VAE shrinks by, 8 to 32."""


class Probe:
    """A copy of a diffusers autoencoder on the meta device."""

    def __init__(self, model: Any) -> None:
        with torch.device("meta"):
            self.copy = type(model).from_config(model.config).eval()

    def layout(self, declared: type[Model]) -> Layout:
        """Found in about 0.1 s for pictures and 0.4 s for videos.

        Raises:
            ValueError: it takes no RGB pictures.
        """
        try:
            encoded = self._run(posterior_of, (1, 3, SIDE, SIDE))
        except RuntimeError as error:
            raise ValueError(
                f"the {declared.vae_class} of {declared.__name__} takes no RGB pictures: {error}"
            ) from None
        variational = not isinstance(encoded, torch.Tensor)
        latents = encoded.mode() if variational else encoded
        channels, frames = latents.shape[1], (1, 2, 3) if declared.kind == "video" else (1, 1, 1)
        if declared.kind == "video" and has_frames(self.copy):
            frames = tuple(self._run(decode_at_once, (1, channels, count, 2, 2)).shape[2] for count in (1, 2, 3))
        ndim = 5 if has_frames(self.copy) else 4
        return Layout(declared.kind, channels, SIDE // latents.shape[-1], frames, ndim, variational)

    def refuses(self, task: Task, shape: Sequence[int], tiled: bool) -> bool:
        """Whether the model fails for every batch of this shape, whatever its values and wherever it runs."""
        self.copy.use_tiling = tiled
        try:
            self._run(encode_at_once if task == "encode" else decode_at_once, shape)
        except NotImplementedError:  # an op that the copy's device lacks says nothing of the shape
            return False
        except (RuntimeError, ValueError):
            return True
        finally:
            forget(self.copy)
        return False

    def _run(self, forward: Callable[[Any, torch.Tensor], Any], shape: Sequence[int]) -> Any:
        with torch.device("meta"), torch.no_grad():
            return forward(self.copy, torch.zeros(tuple(shape)))


def differs(layout: Layout, declared: type[Model]) -> str | None:
    """What the model declares otherwise than it was found, with what was found; None where all is right."""
    found = {
        "latent_channels": layout.latent_channels,
        "vae_scale_factor": layout.vae_scale_factor,
        "frame_factor": layout.frame_factor if layout.kind == "video" else 1,
    }
    wrong = [f"{name} = {value}" for name, value in found.items() if getattr(declared, name, None) != value]
    if not wrong:
        return None
    said = ", ".join(f"{name.split()[0]} = {getattr(declared, name.split()[0], None)}" for name in wrong)
    name = next(part.__name__ for part in declared.__mro__ if "vae_class" in vars(part))
    return f"{name} declares {said}, but its {declared.vae_class} has {', '.join(wrong)}"
