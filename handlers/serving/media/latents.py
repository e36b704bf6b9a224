"""Conversion of latents between the layouts of clients and the layout of the VAE."""

from __future__ import annotations

import itertools
import math
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
    "packed": "b tokens features",
    "patchified": "b features h w",
}
"""Dimensions of each layout: batch, channels, frames, height and width."""

GROUPS = {"tokens": "(f h w)", "features": "(c p q)"}
"""Dimensions that combine several axes, as einops writes them. h and w then count patches of p by q latents."""


class LatentsLayouts:
    """The layouts that requests may use for a model's latents: the VAE's own, packed, and the declared ones."""

    def __init__(self, layout: Layout, declared: type[Model]) -> None:
        self.layout = layout
        self.patch = declared.patch
        self.padding_frames = declared.padding_frames
        self.least_latent_frames = declared.least_latent_frames
        self.has_layers = declared.has_layers
        self.own: LatentsLayout = "BCFHW" if layout.ndim == 5 else "BCHW"
        names = [self.own, "packed", declared.pipeline_layout, *declared.latents_layouts]
        if layout.kind == "image":
            names.insert(1, "BCHW")
        self.names: tuple[LatentsLayout, ...] = tuple(dict.fromkeys(filter(None, names)))

    def matches(self, shape: Sequence[int], parameters: Parameters) -> list[LatentsLayout]:
        """Return the layouts that latents of this shape may have.

        Packed latents are recognized by `height` and `width`. Where these fit, no other layout counts: an unbatched
        [C, H, W] has three dimensions too, and one client always sends height and width. A batched layout wins over an
        unbatched one: [1, H, 16, 16] may be a batch of one, or an image 128 pixels wide with its channels last.
        """
        candidates = (parameters.latents_layout,) if parameters.latents_layout else self.names
        matching = [name for name in candidates if name in self.names and self._fits(name, shape, parameters)]
        batched = [name for name in matching if len(shape) == len(PATTERNS[name].split())]
        return ["packed"] if "packed" in matching else batched or matching

    def to_own(self, latents: Tensor, parameters: Parameters) -> tuple[Tensor, LatentsLayout]:
        """Convert latents, with or without a batch dimension, to the VAE's layout [B, C, (F,) H, W].

        Returns:
            The latents, and the layout that they had.

        Raises:
            RequestError: the shape fits none of the layouts, or more than one; status 422.
        """
        shape = list(latents.shape)
        names = self.matches(shape, parameters)
        if len(names) > 1:
            candidates = " or ".join(f"{name}, {self._describe(name)}" for name in names)
            raise RequestError(f"`shape` {shape} may be {candidates}; say which with `latents_layout`", 422)
        if not names:
            raise RequestError(self._refusal(shape, parameters), 422)
        if self._may_be_images(shape, parameters):
            raise RequestError(
                f"`shape` {shape} may be one video, {self._describe(self.own)} without B, or a batch of images: send "
                f"latents_layout={self.own} for the video, or images with a dimension of one frame",
                422,
            )
        name, axes = names[0], self._patch_axes(names[0])
        source, target = self._patterns(name, parameters.layers)
        if name == "packed":
            _, axes["h"], axes["w"] = self._packed_grid(parameters)
        elif len(shape) < len(PATTERNS[name].split()):
            source, target = source.removeprefix("b "), f"1 {target.removeprefix('b ')}"
        latents = rearrange(latents, f"{source} -> {target}", **axes).contiguous()
        if parameters.layers:  # a first frame that is no layer is left out
            return rearrange(latents[:, :, -parameters.layers :], "b c f h w -> (b f) c 1 h w").contiguous(), name
        return self._without_padding(latents, parameters), name

    def _may_be_images(self, shape: Sequence[int], parameters: Parameters) -> bool:
        """Return whether latents [C, F, H, W] of a video may be [B, C, H, W], with as many images as channels.

        `latents_layout` or `num_frames` tells that they are a video.
        """
        is_named = parameters.latents_layout or parameters.num_frames
        fits_both = len(shape) == 4 and shape[0] == shape[1] == self.layout.latent_channels
        return self.layout.kind == "video" and fits_both and not is_named

    def check_layout(self, name: LatentsLayout | None, shape: Sequence[int]) -> None:
        """Check that latents [B, C, (F,) H, W] of the VAE can be converted to a layout.

        Raises:
            RequestError: the model does not have the layout, or its patches do not fit; status 422.
        """
        if name is None:
            return
        if name not in self.names:
            raise RequestError(self._unknown(name), 422)
        if self._patch_axes(name) and (shape[-2] % self.patch or shape[-1] % self.patch):
            side = self.patch * self.layout.vae_scale_factor
            raise RequestError(f"`latents_layout`: {name} needs a height and a width that are multiples of {side}", 422)

    def from_own(self, latents: Tensor, name: LatentsLayout | None) -> Tensor:
        """Convert the VAE's latents to a layout that `check_layout` has accepted; None keeps the VAE's own."""
        if name is None:
            return latents
        target, source = self._patterns(name)
        return rearrange(latents, f"{source} -> {target}", **self._patch_axes(name))

    def _patterns(self, name: LatentsLayout, layers: int | None = None) -> tuple[str, str]:
        """Return einops' pattern of a layout, and of the VAE's own with the same axes."""
        pattern, own = PATTERNS[name], PATTERNS[self.own]
        if self._patch_axes(name):
            own = own.replace("h", "(h p)").replace("w", "(w q)")
        pattern = " ".join(GROUPS.get(dimension, dimension) for dimension in pattern.split())
        if self.layout.kind == "image" and not layers:  # its one frame
            pattern, own = pattern.replace("f", "1"), own.replace("f", "1")
        return pattern, own

    def _patch_axes(self, name: LatentsLayout) -> dict[str, int]:
        return {"p": self.patch, "q": self.patch} if name in ("packed", "patchified") else {}

    def _fits(self, name: LatentsLayout, shape: Sequence[int], parameters: Parameters) -> bool:
        """Return whether latents of this shape may have a layout. Only packed latents need a batch dimension."""
        channels, dimensions = self.layout.latent_channels, PATTERNS[name].split()
        if len(shape) == len(dimensions) - 1 and name != "packed":
            dimensions = dimensions[1:]
        sizes: dict[str, tuple[int, ...]] = {"c": (channels,), "features": (channels * self.patch**2,)}
        layers = parameters.layers
        frames: tuple[int, ...] = (1,)
        if layers:
            if not self.has_layers or name not in ("packed", "BCFHW"):
                return False
            frames = (layers, layers + 1)
        if self.layout.kind == "image":
            sizes["f"] = frames
        if name == "packed":
            grid = math.prod(self._packed_grid(parameters))
            sizes["tokens"] = tuple(count * grid for count in frames)
        return len(shape) == len(dimensions) and all(
            size in sizes.get(dimension, (size,)) for dimension, size in zip(dimensions, shape, strict=True)
        )

    def _packed_grid(self, parameters: Parameters) -> tuple[int, int, int]:
        """Return the frames, rows and columns of patches; no rows and columns without `height` and `width`."""
        side = self.patch * self.layout.vae_scale_factor
        num_frames = None if self.layout.kind == "image" else parameters.num_frames
        frames = 1 if num_frames is None else self._latent_frames(num_frames)
        try:
            rows, columns = int(parameters.height) // side, int(parameters.width) // side
        except (TypeError, ValueError, OverflowError):
            return frames, 0, 0
        return frames, max(rows, 0), max(columns, 0)

    def _latent_frames(self, num_frames: int) -> int:
        """Return the latent frames of a video, counted like diffusers' pipelines do."""
        if self.layout.clip:
            return next(count for count in itertools.count(1) if self.layout.decoded_frames(count) >= num_frames)
        return (num_frames - 1) // self.layout.frame_factor + 1

    def _without_padding(self, latents: Tensor, parameters: Parameters) -> Tensor:
        """Remove the frames that a pipeline puts before a video, where `num_frames` shows that it did.

        Raises:
            RequestError: `num_frames` is missing but needed, or does not match the latents; status 422.
        """
        if self.layout.kind == "image":
            return latents
        count, padding, num_frames = latents.shape[2], self.padding_frames, parameters.num_frames
        if count < self.least_latent_frames:
            raise RequestError(f"{count} latent frames: this VAE decodes {self.least_latent_frames} or more", 422)
        if num_frames is None:
            if padding and count % (padding + 1) == 0:
                raise RequestError(
                    f"{count} latent frames of this model may begin with {padding} of padding; send `num_frames`", 422
                )
            return latents
        expected = self._latent_frames(num_frames)
        if not expected <= count <= expected + padding:
            raise RequestError(
                f"`num_frames`: {num_frames} frames are {expected} latent frames, but the tensor has {count}", 422
            )
        return latents[:, :, count - expected :]

    def _unknown(self, name: LatentsLayout) -> str:
        return f"`latents_layout`: this model has no {name!r}, only {', '.join(self.names)}"

    def _refusal(self, shape: list[int], parameters: Parameters) -> str:
        """Describe the shapes that the model takes, for an error text."""
        if parameters.latents_layout and parameters.latents_layout not in self.names:
            return self._unknown(parameters.latents_layout)
        if parameters.layers and not self.has_layers:
            return "`layers`: this model's images have no layers; leave it out"
        if self.has_layers and not parameters.layers:
            return (
                f"`shape` {shape}: latents of several layers need `layers`, the number of layers, and packed ones "
                "`height` and `width`"
            )
        plain = " or ".join(self._describe(name) for name in self.names if name != "packed")
        sizes = f"height={str(parameters.height)[:20]}, width={str(parameters.width)[:20]}"
        if self.layout.kind == "video":
            sizes += f", num_frames={parameters.num_frames}"
        return (
            f"`shape` {shape} is no shape of this VAE's latents: expected {plain}, the same without B, or packed "
            f"{self._describe('packed')} with `height` and `width` (got {sizes})"
        )

    def _describe(self, name: LatentsLayout) -> str:
        """Return the shape of a layout in words, for error texts."""
        channels = self.layout.latent_channels
        side = self.layout.vae_scale_factor * (self.patch if self._patch_axes(name) else 1)
        words = {"b": "B", "f": "F", "c": f"{channels}", "h": f"height/{side}", "w": f"width/{side}"}
        words["tokens"] = f"F*({words['h']})*({words['w']})"
        words["features"] = f"{channels * self.patch**2}"
        if self.layout.kind == "image":
            words |= {"f": "1", "tokens": words["tokens"].removeprefix("F*")}
        return f"[{', '.join(words[dimension] for dimension in PATTERNS[name].split())}]"


def add_noise(latents: Tensor, parameters: Parameters) -> Tensor:
    """Mix noise into latents for a VAE with a timestep, like LTX's pipelines do."""
    share = parameters.decode_timestep if parameters.decode_noise_scale is None else parameters.decode_noise_scale
    if not share:
        return latents
    noise = torch.randn(latents.shape, generator=generator_of(parameters), dtype=latents.dtype)
    return (1 - share) * latents + share * noise


def generator_of(parameters: Parameters) -> torch.Generator:
    """Return the random generator of a request. It is on the CPU, so a seed gives the same values on every device."""
    generator = torch.Generator()
    generator.seed() if parameters.seed is None else generator.manual_seed(parameters.seed)
    return generator
