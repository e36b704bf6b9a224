"""Latents between the layouts that clients send and the one that a VAE takes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from handlers.model import LatentsLayout, Model
from handlers.serving.errors import RequestError
from handlers.serving.layout import Layout
from handlers.serving.media.request import Parameters

PATTERNS: dict[LatentsLayout, str] = {
    "BCHW": "b c h w",
    "BCFHW": "b c f h w",
    "BFCHW": "b f c h w",
    "BFHWC": "b f h w c",
    "packed": "b (f h w) (c p q)",
    "patchified": "b (c p q) h w",
}
"""As einops writes them: batch, channels, frames, height and width; or rows and columns h, w of patches of p by q."""


class LatentsLayouts:
    """The layouts in which a model's latents travel: the VAE's own, and those that the model declares."""

    def __init__(self, layout: Layout, declared: type[Model]) -> None:
        self.layout = layout
        self.patch = declared.patch
        self.padding_frames = declared.padding_frames
        self.own: LatentsLayout = "BCFHW" if layout.ndim == 5 else "BCHW"
        names = [self.own, "packed", declared.pipeline_layout, *declared.latents_layouts]
        if layout.kind == "image":
            names.insert(1, "BCHW")
        self.names: tuple[LatentsLayout, ...] = tuple(dict.fromkeys(filter(None, names)))

    def matches(self, shape: Sequence[int], parameters: Parameters) -> list[LatentsLayout]:
        """The layouts that latents of this shape may have.

        Packed latents are told by the height and width that came along; where they fit, it is no other layout, although
        an unbatched [C, H, W] has three dimensions too, and one client sends height and width with any. So it is with
        batches: without one, pictures 128 pixels wide with their channels last are [1, H, 16, 16], as a batch is.
        """
        asked = (parameters.latents_layout,) if parameters.latents_layout else self.names
        found = [name for name in asked if name in self.names and self._sizes(name, shape, parameters)]
        batched = [name for name in found if len(shape) == len(_groups(PATTERNS[name]))]
        return ["packed"] if "packed" in found else batched or found

    def read(self, latents: Tensor, parameters: Parameters) -> tuple[Tensor, LatentsLayout]:
        """Latents as they came, with or without their batch dimension, to the VAE's own [B, C, (F,) H, W].

        Returns:
            The latents, and the layout that they came in.

        Raises:
            RequestError: the shape is that of none of these layouts, or of more than one.
        """
        shape = list(latents.shape)
        found = self.matches(shape, parameters)
        if len(found) > 1:
            ways = " or ".join(f"{name}, {self._describe(name)}" for name in found)
            raise RequestError(f"`shape` {shape} may be {ways}; say which with `latents_layout`", 422)
        if not found:
            raise RequestError(self._refusal(shape, parameters), 422)
        source, target = self._patterns(found[0])
        if len(shape) < len(_groups(source)):
            source, target = source.removeprefix("b "), f"1 {target.removeprefix('b ')}"
        sizes = self._sizes(found[0], shape, parameters) or {}
        axes = {name: sizes[name] for name in "hwpq" if name in sizes and "(" in source}
        latents = rearrange(latents, f"{source} -> {target}", **axes).contiguous()
        return self._without_padding(latents, parameters), found[0]

    def write(self, latents: Tensor, name: LatentsLayout | None) -> Tensor:
        """The VAE's own layout to the one that was asked for; None for its own.

        Raises:
            RequestError: the model's latents do not have it, or cannot be cut into its patches.
        """
        if name is None:
            return latents
        if name not in self.names:
            raise RequestError(f"`latents_layout`: {name!r} is none of this model's, {', '.join(self.names)}", 422)
        target, source = self._patterns(name)
        if "p" in target and (latents.shape[-2] % self.patch or latents.shape[-1] % self.patch):
            side = self.patch * self.layout.vae_scale_factor
            raise RequestError(f"`latents_layout`: {name} needs a height and a width that are multiples of {side}", 422)
        axes = {"p": self.patch, "q": self.patch} if "p" in target else {}
        return rearrange(latents, f"{source} -> {target}", **axes)

    def _patterns(self, name: LatentsLayout) -> tuple[str, str]:
        """einops' pattern of a layout, and of the VAE's own with the same axes; the one frame of a picture is 1."""
        pattern, own = PATTERNS[name], PATTERNS[self.own]
        if "p" in pattern:
            own = own.replace("h", "(h p)").replace("w", "(w q)")
        if self.layout.kind == "image":
            pattern, own = pattern.replace("f", "1"), own.replace("f", "1")
        return pattern, own

    def _sizes(self, name: LatentsLayout, shape: Sequence[int], parameters: Parameters) -> dict[str, int] | None:
        """The size of each axis, where latents of this shape have this layout; else None."""
        groups = _groups(self._patterns(name)[0])
        if len(shape) == len(groups) - 1 and name != "packed":
            groups = groups[1:]
        if len(shape) != len(groups):
            return None
        sizes = {"1": 1, "c": self.layout.latent_channels, "p": self.patch, "q": self.patch}
        if name == "packed":
            sizes |= self._packed_grid(parameters)
        for axes, size in zip(groups, shape, strict=True):
            known = math.prod(sizes.get(axis, 1) for axis in axes)
            unknown = [axis for axis in axes if axis not in sizes]
            if len(unknown) > 1 or not known or size % known or (not unknown and size != known):
                return None
            sizes |= dict.fromkeys(unknown, size // known)
        return sizes

    def _packed_grid(self, parameters: Parameters) -> dict[str, int]:
        """Frames, and rows and columns of patches, in pixels of the height and width that came; 0 where none came."""
        side = self.patch * self.layout.vae_scale_factor
        num_frames = None if self.layout.kind == "image" else parameters.num_frames
        frames = 1 if num_frames is None else self._latent_frames(num_frames)
        try:
            rows, columns = int(parameters.height) // side, int(parameters.width) // side
        except (TypeError, ValueError, OverflowError):
            return {"f": frames, "h": 0, "w": 0}
        return {"f": frames, "h": max(rows, 0), "w": max(columns, 0)}

    def _latent_frames(self, num_frames: int) -> int:
        """As pipelines count them."""
        return (num_frames - 1) // self.layout.frame_factor + 1

    def _without_padding(self, latents: Tensor, parameters: Parameters) -> Tensor:
        """A video's latents without what its pipeline put before them, where `num_frames` says that it did.

        Raises:
            RequestError: `num_frames` is missing where it matters, or is not what came.
        """
        if self.layout.kind == "image":
            return latents
        came, padding, num_frames = latents.shape[2], self.padding_frames, parameters.num_frames
        if num_frames is None:
            if padding and came % (padding + 1) == 0:
                raise RequestError(
                    f"{came} latent frames of this model may begin with {padding} of padding; send `num_frames`", 422
                )
            return latents
        expected = self._latent_frames(num_frames)
        if not expected <= came <= expected + padding:
            raise RequestError(f"`num_frames`: {num_frames} frames are {expected} latent frames, but {came} came", 422)
        return latents[:, :, came - expected :]

    def _refusal(self, shape: list[int], parameters: Parameters) -> str:
        if parameters.latents_layout and parameters.latents_layout not in self.names:
            names = ", ".join(self.names)
            return f"`latents_layout`: {parameters.latents_layout!r} is none of this model's, {names}"
        plain = [self._describe(name) for name in self.names if name != "packed"]
        expected = " or ".join(plain) + ", the same without B"
        if "packed" in self.names:
            sizes = f"height={str(parameters.height)[:20]}, width={str(parameters.width)[:20]}"
            video = self.layout.kind == "video"
            expected += f", or packed {self._describe('packed')} with `height` and `width` (got {sizes}"
            expected += f", num_frames={parameters.num_frames})" if video else ")"
        return f"`shape` {shape} is no shape of this VAE's latents: expected {expected}"

    def _describe(self, name: LatentsLayout) -> str:
        """Its shape in words."""
        scale, channels = self.layout.vae_scale_factor, self.layout.latent_channels
        side = scale * self.patch
        words = {
            **{"b": "B", "f": "F", "1": "1", "c": f"{channels}", "h": f"height/{scale}", "w": f"width/{scale}"},
            "c p q": f"{channels * self.patch**2}",
            "f h w": f"F*(height/{side})*(width/{side})",
            "1 h w": f"(height/{side})*(width/{side})",
        }
        if name == "patchified":
            words |= {"h": f"height/{side}", "w": f"width/{side}"}
        return f"[{', '.join(words[' '.join(axes)] for axes in _groups(self._patterns(name)[0]))}]"


def _groups(pattern: str) -> list[list[str]]:
    """The axes in each dimension of a pattern."""
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", pattern)]


def add_noise(latents: Tensor, parameters: Parameters) -> Tensor:
    """Latents with the share of noise that a VAE with a timestep expects, as LTX's pipelines mix it."""
    share = parameters.decode_timestep if parameters.decode_noise_scale is None else parameters.decode_noise_scale
    if not share:
        return latents
    noise = torch.randn(latents.shape, generator=generator_of(parameters), dtype=latents.dtype)
    return (1 - share) * latents + share * noise


def generator_of(parameters: Parameters) -> torch.Generator:
    """The source of noise and samples, on the CPU so that a seed gives the same on every device."""
    generator = torch.Generator()
    generator.seed() if parameters.seed is None else generator.manual_seed(parameters.seed)
    return generator
