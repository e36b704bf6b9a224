"""Scaling of latents between the range of a diffusion model and the range of its VAE."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Map from the diffusion model's latents to the VAE's (raw): ``raw = scaled * std / factor + shift``.

    Each value is a number or a tensor [1, C, p, p] that repeats over height, width and frames. p is 1 for a value per
    channel, and 2 for a value per position in a patch of 2x2.
    """

    factor: float | Tensor = 1.0
    shift: float | Tensor = 0.0
    std: float | Tensor = 1.0

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise `RequestError`, status 422, unless patches fit in the height and width of latents [..., H, W]."""
        side = max(values.shape[-1] if isinstance(values, Tensor) else 1 for values in (self.factor, self.shift))
        if shape[-2] % side or shape[-1] % side:
            raise RequestError(
                f"`shape` {list(shape)}: this model normalizes its latents in patches, so their height and width must "
                f"be multiples of {side}",
                422,
            )

    def unscale(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        """Return raw latents in `dtype`, computed in the wider of the two dtypes."""
        self.check_shape(latents.shape)
        latents = latents.to(torch.promote_types(latents.dtype, dtype))
        factor, shift, std = (_expand(values, latents) for values in (self.factor, self.shift, self.std))
        return (latents * std / factor + shift).to(dtype)

    def scale(self, latents: Tensor) -> Tensor:
        """Return scaled latents in their own dtype. `check_shape` has accepted their shape."""
        factor, shift, std = (_expand(values, latents) for values in (self.factor, self.shift, self.std))
        return ((latents - shift) * factor / std).to(latents.dtype)


def _expand(values: float | Tensor, latents: Tensor) -> float | Tensor:
    """Repeat values [1, C, p, p] for latents [B, C, H, W] or [B, C, F, H, W]."""
    if not isinstance(values, Tensor):
        return values
    values, side = values.to(latents.device), values.shape[-1]
    if side > 1:
        height, width = latents.shape[-2:]
        values = repeat(values, "1 c p q -> 1 c (h p) (w q)", h=height // side, w=width // side)
    return values if latents.ndim == 4 else values.unsqueeze(2)


@dataclass(frozen=True)
class Normalization:
    """Statistics of a checkpoint's latents: ``raw = scaled * std / factor + mean``, or ``scaled / factor + shift``."""

    factor: float | None
    shift: float
    mean: Tensor | None
    std: Tensor | None
    """[1, C, p, p], as `mean`. Either both are set or none is."""
    inverts: bool
    """`invert_scale_latents` of CogVideoX 1.5: its image-to-video pipeline divides by the factor, others multiply."""
    declared: type[Model]

    @classmethod
    def read(cls, model: Any, declared: type[Model]) -> Normalization:
        """Read the statistics from the model's BatchNorm (FLUX.2), its buffers (LTX), or its config."""
        config, patch = model.config, 1
        factor, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
        if (norm := getattr(model, "bn", None)) is not None:
            mean, std = norm.running_mean, (norm.running_var + config["batch_norm_eps"]).sqrt()
            patch, factor = declared.patch, 1.0
        else:
            buffers = dict(model.named_buffers(recurse=False))
            mean, std = (buffers.get(name, config.get(name)) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            mean = std = None
        else:
            mean, std = (
                rearrange(torch.as_tensor(values).float().cpu(), "(c p q) -> 1 c p q", p=patch, q=patch)
                for values in (mean, std)
            )
        return cls(factor, shift, mean, std, bool(config.get("invert_scale_latents")), declared)

    def scaling(self, parameters: Parameters, task: Task, layout: LatentsLayout | None = None) -> Scaling:
        """Choose the scaling of a request: the client's values, the checkpoint's for `do_scaling` alone, or none.

        Mean and deviation belong to every scaling. The client's factor then replaces the config's.

        Args:
            layout: layout of the latents on the wire, which tells the pipeline that they belong to.

        Raises:
            RequestError: a parameter does not apply to this model, or the parameters are ambiguous; status 422.
        """
        if self.declared.takes_scaled:
            self._check_takes_scaled(parameters)
        if not self._is_scaled(parameters, task, layout):
            return Scaling()
        uses_config = parameters.do_scaling and parameters.scaling_factor is None
        if uses_config and task == "encode":
            self._check_not_inverted()
        if self.mean is not None and self.std is not None:
            factor = self.factor if uses_config else parameters.scaling_factor
            return self._by_statistics(self.mean, self.std, factor, parameters)
        if uses_config:
            return self._by_factor(layout)
        return Scaling(parameters.scaling_factor or 1.0, parameters.shift_factor or 0.0)

    def _is_scaled(self, parameters: Parameters, task: Task, layout: LatentsLayout | None) -> bool:
        """Return whether latents are scaled on the wire."""
        requested = (
            parameters.do_scaling or parameters.scaling_factor is not None or parameters.shift_factor is not None
        )
        if task == "encode" or not requested or layout not in self.declared.raw_layouts:
            return requested
        if parameters.normalized is None:
            raise RequestError(
                f"this model's pipelines give {layout} latents either denormalized or normalized: for denormalized "
                "ones send do_scaling=false alone (or normalized=false), else add normalized=true",
                422,
            )
        return parameters.normalized

    def _check_takes_scaled(self, parameters: Parameters) -> None:
        """Refuse raw latents of the large VAE, and its factor, for a VAE that has neither."""
        has_factor = parameters.scaling_factor not in (None, 1.0) or parameters.shift_factor
        if has_factor or not parameters.do_scaling or parameters.normalized is False:
            raise RequestError(
                "this VAE takes and gives latents in the range of the diffusion model alone, not raw ones: send "
                "do_scaling=true without a factor",
                422,
            )

    def _check_not_inverted(self) -> None:
        if self.inverts and self.factor:
            raise RequestError(
                "`do_scaling`: this model's pipelines divide the first image of a video by the VAE's factor, but "
                f"multiply videos by it; send scaling_factor={1 / self.factor!r} for such an image, {self.factor} for "
                "a video",
                422,
            )

    def _by_factor(self, layout: LatentsLayout | None) -> Scaling:
        """Return the scaling of a checkpoint without mean and deviation."""
        shift = 0.0 if layout in self.declared.unshifted_layouts else self.shift
        factor = self.factor or 1.0
        return Scaling(1.0, shift, 1 / factor) if self.declared.takes_reciprocal else Scaling(factor, shift)

    def _by_statistics(self, mean: Tensor, std: Tensor, factor: float | None, parameters: Parameters) -> Scaling:
        """Return the scaling of a checkpoint with a mean and a deviation for each channel."""
        if parameters.shift_factor:
            raise RequestError("`shift_factor`: this VAE has a mean for each channel; send do_scaling=true alone", 422)
        if not self.declared.uses_scaling_factor and factor not in (None, 1.0, self.factor):
            raise RequestError("`scaling_factor`: this VAE's latents have none; send do_scaling=true alone", 422)
        if factor is None:  # pipelines of VAEs without a factor compute it so
            return Scaling(1.0 / std, mean)
        return Scaling(factor if self.declared.uses_scaling_factor else 1.0, mean, std)
