"""What a model declares of itself. Reading it needs no torch, so the deploy script does so on any machine."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

Kind = Literal["image", "video"]
Task = Literal["decode", "encode"]
SampleMode = Literal["argmax", "sample", "moments"]
"""What of an encoder's distribution: its mode, a sample, or its mean and log-variance, [B, 2 * C, ...]."""
LatentsLayout = Literal["BCHW", "BCFHW", "BFCHW", "BFHWC", "packed", "patchified"]
"""How latents are laid out on their way: batch, channels, frames, height, width, in this order of dimensions; or

packed:     tokens, [B, F * (H/patch) * (W/patch), C * patch * patch]
patchified: [B, C * patch * patch, H/patch, W/patch]
"""


def split_keys(keys: str | None) -> list[str]:
    """The keys of `flux` or `sd-v1,sdxl,flux`; one that is empty where none is named."""
    return [key.strip() for key in (keys or "").split(",") if key.strip()] or [""]


def read_config(key: str) -> dict[str, Any]:
    """Return `handlers/configs/<key>.json`: a checkpoint's `config.json` without the defaults of its class."""
    return json.loads((Path(__file__).parent / "configs" / f"{key}.json").read_text())


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean flux?)" for the nearest of the known names; "" where none is near."""
    near = difflib.get_close_matches(name.lower(), list(known), 1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


class Peak(NamedTuple):
    """Numbers alive at the peak of a pass, for each pixel of a picture or of a frame, as diffusers runs it.

    Computed without numbers for the published sizes; benchmarks/NOTES.md has the table and how it is made again.
    """

    first: float
    """Of a picture, or of a video of one frame."""
    more: float = 0
    """For each further frame, up to `frames`; what comes after them is run when they are done."""
    frames: int = 1
    reduced: float = 1
    """Share of it that reduced memory takes at most, of models that `low_memory` knows.

    That is of a small picture or a tile, which is convolved in one piece, with copies of all of it, so that it
    may be above 1; of large ones it is down to a half.
    """
    reduced_first: float = 0
    """The same share of the first frame, where it is another than of those that follow; 0 where it is not."""
    tile: int = 1
    """Pixels of a tile against those of the config: Wan 2.2 counts patches of 2x2 when it cuts what it encodes."""

    def values(self, frames: int) -> float:
        """For each pixel of one frame of a video of so many."""
        return self.first + self.more * (min(frames, self.frames) - 1)

    def reduced_values(self, frames: int) -> float:
        """The same in reduced memory."""
        first = self.first * (self.reduced_first or self.reduced)
        return first + (self.values(frames) - self.first) * self.reduced


ALL = 10_000
"""More frames than any request may have: where nothing cuts time."""


class Model:
    """A VAE, declared. Each word has the default that most models need, and none can be found in the loaded weights.

    What can be found there is probed when they are loaded, and a declaration that differs from it is an error then.
    """

    checkpoint: ClassVar[str]
    """Repository on the Hub, or a local folder, that holds the weights."""
    subfolder: ClassVar[str | None] = None
    """Folder of the VAE inside the checkpoint; None where it lies at the root."""
    vae_class: ClassVar[str]
    """Class in diffusers; "module:Class" for one that it does not have, in a module that can be imported."""
    diffusers: ClassVar[str] = "0.36"
    """The first version of diffusers that has the class; what an endpoint has is in requirements.txt."""
    dtype: ClassVar[str]
    """What the weights run in on a GPU; on a CPU every model runs in float32."""
    published_config: ClassVar[dict[str, Any]] = {}
    """The checkpoint's `config.json` without the defaults of `vae_class`: `read_config(key)`.

    It describes the model before the model is loaded, and builds it with random weights.
    """

    kind: ClassVar[Kind] = "image"
    """Whether an item is one picture or a video. A picture's latents may have a dimension for its one frame."""
    latent_channels: ClassVar[int]
    vae_scale_factor: ClassVar[int] = 8
    """Pixels per latent in height and in width."""
    frame_factor: ClassVar[int] = 1
    """Frames of a video per latent frame after the first one, which stands alone."""
    pipeline_layout: ClassVar[LatentsLayout | None] = None
    """What the model's pipelines give with `output_type="latent"`; None for the VAE's own layout."""
    latents_layouts: ClassVar[tuple[LatentsLayout, ...]] = ()
    """What requests may bring beside the VAE's own layout, the pipelines' and packed latents, which all models take."""
    unshifted_layouts: ClassVar[tuple[LatentsLayout, ...]] = ()
    """Of these, those of pipelines that leave the config's `shift_factor` out."""
    patch: ClassVar[int] = 2
    """Latents in height and in width of one token of packed latents."""
    uses_scaling_factor: ClassVar[bool] = True
    """Whether the pipelines multiply by the config's `scaling_factor` where it has a mean and a deviation too."""
    takes_reciprocal: ClassVar[bool] = False
    """Whether the pipelines multiply by the reciprocal of the factor, which rounds otherwise than to divide by it."""
    raw_layouts: ClassVar[tuple[LatentsLayout, ...]] = ()
    """Those in which a pipeline's `output_type="latent"` gives raw latents, so that `do_scaling` is ambiguous."""
    padding_frames: ClassVar[int] = 0
    """Latent frames, at most, that a pipeline puts before the first one; `num_frames` tells whether it did."""
    fps: ClassVar[int] = 24
    """Frames per second of an MP4 for which the request names none."""

    runs_batches: ClassVar[bool] = True
    """Whether diffusers can run a batch of more than one."""
    tiles: ClassVar[tuple[Task, ...]] = ("decode", "encode")
    """What diffusers can do in tiles."""
    peak: ClassVar[dict[Task, Peak]] = {"decode": Peak(770, reduced=0.71), "encode": Peak(645, reduced=0.66)}
    """By which a request is run as a whole, in reduced memory or in tiles; those of Stable Diffusion and Flux."""

    usual_size: ClassVar[tuple[int, ...]] = (1024, 1024)
    """Height and width in pixels, and of a video its frames: what its pipelines make by default or in examples."""
    instance: ClassVar[str] = "nvidia-l4"
    """Smallest instance type of Inference Endpoints that decodes `usual_size` without tiling, as `memory` plans it.

    Where none up to nvidia-l40s does, the smallest that does it in tiles.
    """
    license: ClassVar[str] = "other"
    """Of the checkpoint, as the Hub spells it."""
    license_link: ClassVar[str | None] = None
    """None for the checkpoint's page."""
    weights_mb: ClassVar[int | None] = None
    """Size of the checkpoint's safetensors in MB, for a plan made without a network; None where nobody looked."""
    shared_by: ClassVar[str] = ""
    """Other models that have this VAE, for people who look for theirs."""
