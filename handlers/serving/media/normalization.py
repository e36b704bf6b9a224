"""Latents between the range that a diffusion model works in and the one that a VAE takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from handlers.model import LatentsLayout, Model, Task
from handlers.serving.errors import RequestError
from handlers.serving.media.request import Parameters


@dataclass(frozen=True)
class Scaling:
    """Between what the VAE gives (raw) and what the diffusion model takes: ``raw = scaled * std / factor + shift``.

    Each is a number, or a tensor [1, C, p, p] that is repeated over the picture and all frames: of a number a channel
    with p = 1, of one for each place in a patch with p = 2.
    """

    factor: float | Tensor = 1.0
    shift: float | Tensor = 0.0
    std: float | Tensor = 1.0

    def unscale(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        """Scaled latents to raw ones in `dtype`, computed in the wider of their dtype and `dtype`."""
        latents = latents.to(torch.promote_types(latents.dtype, dtype))
        factor, shift, std = (_over(latents, values) for values in (self.factor, self.shift, self.std))
        return (latents * std / factor + shift).to(dtype)

    def scale(self, latents: Tensor) -> Tensor:
        """Raw latents to scaled ones, in their own dtype."""
        factor, shift, std = (_over(latents, values) for values in (self.factor, self.shift, self.std))
        return ((latents - shift) * factor / std).to(latents.dtype)


def _over(latents: Tensor, values: float | Tensor) -> float | Tensor:
    """The values for each of these latents, [B, C, H, W] or [B, C, F, H, W].

    Raises:
        RequestError: a patch does not go evenly into height and width.
    """
    if not isinstance(values, Tensor):
        return values
    values, side = values.to(latents.device), values.shape[-1]
    height, width = latents.shape[-2:]
    if height % side or width % side:
        raise RequestError(
            f"`shape` {list(latents.shape)}: this model's latents are normalised in patches, so their height and width "
            f"must be multiples of {side}",
            422,
        )
    if side > 1:
        values = repeat(values, "1 c p q -> 1 c (h p) (w q)", h=height // side, w=width // side)
    return values if latents.ndim == 4 else values.unsqueeze(2)


@dataclass(frozen=True)
class Normalization:
    """What a checkpoint says of its latents: ``raw = scaled * std / factor + mean``, or ``scaled / factor + shift``."""

    factor: float | None
    shift: float
    mean: Tensor | None
    std: Tensor | None
    """[1, C, p, p] both, or None."""
    inverts: bool
    """`invert_scale_latents` of CogVideoX 1.5: its image-to-video pipeline divides by the factor, others multiply."""
    declared: type[Model]

    @classmethod
    def of(cls, model: Any, declared: type[Model]) -> Normalization:
        """By the model's BatchNorm (FLUX.2), its buffers (LTX), or its config."""
        config, period = model.config, 1
        factor, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
        if (norm := getattr(model, "bn", None)) is not None:
            mean, std = norm.running_mean, (norm.running_var + config["batch_norm_eps"]).sqrt()
            period, factor = declared.patch, 1.0
        else:
            buffers = dict(model.named_buffers(recurse=False))
            mean, std = (buffers.get(name, config.get(name)) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            mean = std = None
        else:
            mean, std = (
                rearrange(torch.as_tensor(values).float().cpu(), "(c p q) -> 1 c p q", p=period, q=period)
                for values in (mean, std)
            )
        return cls(factor, shift, mean, std, bool(config.get("invert_scale_latents")), declared)

    def scaling(self, parameters: Parameters, task: Task, layout: LatentsLayout | None = None) -> Scaling:
        """What the client sent, or the checkpoint's own where it sent `do_scaling` alone, or none.

        A mean and a deviation belong to every scaling; what the client sends then stands for the config's factor.

        Args:
            layout: of the latents as they came or will go, which tells the pipeline that they are of.

        Raises:
            RequestError: what was sent has no place in this model's formula, or is not enough to tell what is meant.
        """
        asked = parameters.do_scaling or parameters.scaling_factor is not None or parameters.shift_factor is not None
        if task == "decode" and asked and layout in self.declared.raw_layouts:
            if parameters.normalized is None:
                raise RequestError(
                    f"some pipelines give {layout} latents of this model that are denormalised already, others do not: "
                    "for the former send do_scaling=false alone (or normalized=false), else normalized=true too",
                    422,
                )
            asked = parameters.normalized
        if not asked:
            return Scaling()
        own = parameters.do_scaling and parameters.scaling_factor is None
        if own and task == "encode" and self.inverts and self.factor:
            raise RequestError(
                f"`do_scaling`: the pictures that a video begins with are divided by this VAE's factor, and videos "
                f"multiplied: send scaling_factor={1 / self.factor!r} for the former, {self.factor} for the latter",
                422,
            )
        if self.mean is None or self.std is None:
            if own:
                shift = 0.0 if layout in self.declared.unshifted_layouts else self.shift
                known = self.factor or 1.0
                return Scaling(1.0, shift, 1 / known) if self.declared.takes_reciprocal else Scaling(known, shift)
            return Scaling(parameters.scaling_factor or 1.0, parameters.shift_factor or 0.0)
        if parameters.shift_factor:
            raise RequestError("`shift_factor`: this VAE has a mean for each channel; send do_scaling=true alone", 422)
        factor = self.factor if own else parameters.scaling_factor
        if not self.declared.uses_scaling_factor and factor not in (None, 1.0, self.factor):
            raise RequestError("`scaling_factor`: this VAE's latents have none; send do_scaling=true alone", 422)
        if factor is None:  # as the pipelines of VAEs without one compute it
            return Scaling(1.0 / self.std, self.mean)
        return Scaling(factor if self.declared.uses_scaling_factor else 1.0, self.mean, self.std)
