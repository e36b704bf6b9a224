"""Declarations of a model. Reading them needs no torch, so the deploy script can do it on any machine."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

Kind = Literal["image", "video"]
Task = Literal["decode", "encode"]
SampleMode = Literal["argmax", "sample", "moments"]
"""Use of an encoder's distribution: its mode, a sample, or its mean and log-variance, [B, 2 * C, ...]."""
LatentsLayout = Literal["BCHW", "BCFHW", "BFCHW", "BFHWC", "packed", "patchified"]
"""Layouts of latents in requests: the order of batch, channels, frames, height and width; or

packed:     tokens, [B, F * (H/patch) * (W/patch), C * patch * patch]
patchified: [B, C * patch * patch, H/patch, W/patch]
"""


def split_keys(keys: str | None) -> list[str]:
    """Split `sd-v1,sdxl,flux` into keys. Without a key, return one empty key."""
    return [key.strip() for key in (keys or "").split(",") if key.strip()] or [""]


def read_config(key: str) -> dict[str, Any]:
    """Read `handlers/configs/<key>.json`: a checkpoint's `config.json` without the defaults of its class."""
    return json.loads((Path(__file__).parent / "configs" / f"{key}.json").read_text())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean flux?)" for the most similar known name; "" without one."""
    near = difflib.get_close_matches(name.lower(), list(known), 1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


class WrongWeights(ValueError):
    """Weights of another network than the model's. `handlers.fitting_models` names the models that they fit."""

    def __init__(
        self, problem: str, vae_class: str, latent_channels: int | None, refused_by: type[Model] | None = None
    ) -> None:
        super().__init__(problem)
        self.vae_class = vae_class
        self.latent_channels = latent_channels
        self.refused_by = refused_by


class Peak(NamedTuple):
    """Values in memory at the peak of diffusers' own pass, per pixel of an image or frame.

    They were computed on torch's meta device for the published sizes. benchmarks/NOTES.md has the table and the
    command that makes it.
    """

    first: float
    """Values for an image, or for a video of one frame."""
    more: float = 0
    """Values for each further frame, up to `frames`. Later frames run after these."""
    frames: int = 1
    reduced: float = 1
    """Share of these values that reduced memory takes, for models that `low_memory` knows.

    It is measured for a small image or tile, which is convolved at once, and may exceed 1. Large images take down to
    half of the values.
    """
    reduced_first: float = 0
    """Share for the first frame, if it differs from the share for later frames; else 0."""
    tile: int = 1
    """Pixels of a tile relative to the config's: Wan 2.2 counts patches of 2x2 when it cuts pixels to encode, and the
    config does not know `upscale`."""

    def values(self, frames: int) -> float:
        """Return the values per pixel of a frame, for a video of `frames` frames."""
        return self.first + self.more * (min(frames, self.frames) - 1)

    def reduced_values(self, frames: int) -> float:
        """Return the values per pixel of a frame in reduced memory."""
        first = self.first * (self.reduced_first or self.reduced)
        return first + (self.values(frames) - self.first) * self.reduced


ALL = 10_000
"""More frames than a request may have, for models that do not cut time."""


class Model:
    """Declaration of a VAE. The defaults suit most models.

    Loading the weights checks `latent_channels`, `vae_scale_factor`, `upscale` and `frame_factor`. A wrong one is an
    error.
    """

    checkpoint: ClassVar[str]
    """Repository on the Hub, or local folder, with the weights."""
    subfolder: ClassVar[str | None] = None
    """Folder of the VAE inside the checkpoint; None for the root."""
    file: ClassVar[str | None] = None
    """Name of one file with the weights, in a checkpoint without a config.json; `published_config` describes them."""
    download: ClassVar[str | None] = None
    """URL of `file`, for weights that are not on the Hub. A user names the file in `VAE_WEIGHTS`."""
    vae_class: ClassVar[str]
    """Class in diffusers, or "module:Class" in another module that can be imported."""
    diffusers: ClassVar[str] = "0.36"
    """First version of diffusers with the class and the entries of its config. With an older one, loading ends with an
    error. requirements.txt has the version of an endpoint."""
    dtype: ClassVar[str]
    """Dtype of the weights on a GPU. On a CPU they are in float32."""
    published_config: ClassVar[dict[str, Any]] = {}
    """The checkpoint's `config.json` without the defaults of `vae_class`: `read_config(key)`.

    It describes the model without its weights, and builds it with random ones.
    """

    kind: ClassVar[Kind] = "image"
    """Kind of an item: an image or a video. Latents of an image may have a dimension for one frame."""
    pixel_channels: ClassVar[Literal[3, 4]] = 3
    """Channels of pixels: 3 for RGB, 4 for RGBA."""
    has_layers: ClassVar[bool] = False
    """True if the frames of latents are the layers of one image, each decoded alone."""
    latent_channels: ClassVar[int]
    vae_scale_factor: ClassVar[int] = 8
    """Encoded pixels per latent in height and width."""
    frame_factor: ClassVar[int] = 1
    """Frames of a video per latent frame, except for the first one (of each clip), which is one frame."""
    clip: ClassVar[int | None] = None
    """Latent frames of a clip, for a VAE that takes a video clip by clip; None for one clip of any length.

    Its encoder gives 1 latent frame, or 2 and any number of whole clips.
    """
    least_latent_frames: ClassVar[int] = 1
    """Fewest latent frames of a video that diffusers decodes."""
    pixel_statistics: ClassVar[tuple[tuple[float, ...], tuple[float, ...]] | None] = None
    """Mean and deviation of each channel that normalize the VAE's pixels, from [0, 1]; None for pixels in [-1, 1]."""
    upscale: ClassVar[int] = 1
    """Height and width of decoded pixels relative to those that are encoded.

    The decoder gives upscale * upscale times the channels, which a pixel shuffle turns into height and width.
    """
    pipeline_layout: ClassVar[LatentsLayout | None] = None
    """Layout from the model's pipelines with `output_type="latent"`; None for the VAE's own."""
    latents_layouts: ClassVar[tuple[LatentsLayout, ...]] = ()
    """Further layouts for requests. All models take the VAE's own, the pipelines' and packed latents."""
    unshifted_layouts: ClassVar[tuple[LatentsLayout, ...]] = ()
    """Layouts of pipelines that do not apply the config's `shift_factor`."""
    patch: ClassVar[int] = 2
    """Height and width in latents of a token of packed latents."""
    uses_scaling_factor: ClassVar[bool] = True
    """True if pipelines apply the config's `scaling_factor` in addition to a mean and a deviation."""
    takes_reciprocal: ClassVar[bool] = False
    """True if pipelines multiply by the reciprocal of the factor, which rounds differently from a division."""
    takes_scaled: ClassVar[bool] = False
    """True if the VAE itself takes the latents of the diffusion model, so that it has no raw ones."""
    raw_layouts: ClassVar[tuple[LatentsLayout, ...]] = ()
    """Layouts in which `output_type="latent"` of a pipeline gives raw latents, so `do_scaling` is ambiguous."""
    comfyui_latents: ClassVar[Literal["raw", "normalized"] | None] = "raw"
    """Range of ComfyUI's latents; None if they are those of a larger VAE, in a range that this one does not take."""
    padding_frames: ClassVar[int] = 0
    """Most latent frames of padding that a pipeline puts before a video. `num_frames` tells how many there are."""
    fps: ClassVar[int] = 24
    """Frames per second of an MP4, unless the request names another rate."""

    runs_batches: ClassVar[bool] = True
    """True if diffusers can run a batch of more than one."""
    tiles: ClassVar[tuple[Task, ...]] = ("decode", "encode")
    """Tasks that diffusers can run in tiles."""
    always_tiles: ClassVar[bool] = False
    """True if tiles are the pipelines' own pass. Without them, such a VAE gives other values."""
    peak: ClassVar[dict[Task, Peak]] = {"decode": Peak(770, reduced=0.71), "encode": Peak(645, reduced=0.66)}
    """Memory by task, which decides the mode of a pass. The default is that of Stable Diffusion and Flux."""

    usual_size: ClassVar[tuple[int, ...]] = (1024, 1024)
    """Height and width in pixels, and frames of a video, as the pipelines make by default or in examples."""
    instance: ClassVar[str] = "nvidia-l4"
    """Smallest instance type of Inference Endpoints whose memory suffices to decode `usual_size` without tiles.

    If none up to nvidia-l40s does, the smallest one that decodes it in tiles.
    """
    license: ClassVar[str] = "other"
    """License of the checkpoint, as the Hub spells it."""
    license_link: ClassVar[str | None] = None
    """Link to the license; None for the checkpoint's page."""
    weights_mb: ClassVar[int | None] = None
    """Size of the checkpoint's safetensors in MB, for a plan without a network; None if unknown."""
    shared_by: ClassVar[str] = ""
    """Other models with this VAE, for users who search for theirs."""

    @classmethod
    def decoded_frames(cls, latent_frames: int) -> int:
        """Return the frames that pipelines count for so many latent frames."""
        clips, rest = divmod(latent_frames, cls.clip) if cls.clip else (0, latent_frames)
        return clips * cls._clip_frames(cls.clip or 1) + (cls._clip_frames(rest) if rest else 0)

    @classmethod
    def _clip_frames(cls, latent_frames: int) -> int:
        return (latent_frames - 1) * cls.frame_factor + 1
