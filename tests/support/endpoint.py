"""Running services of one model each, and comparisons of their results."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import diffusers
import numpy as np
import requests
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.video_processor import VideoProcessor

from handlers import MODELS
from handlers.serving.media.output import describe, tensor_bytes
from scripts.local_server import serve

SERVERS = ("standalone", "toolkit")
"""Servers that run the service."""

SMALL = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1}


def save_small_checkpoint(key: str, folder: Path) -> Path:
    """Save a model with few channels and the rest of its published config, in float32.

    Its random weights give values that fill [-1, 1] and beyond.
    """
    model = MODELS[key]
    torch.manual_seed(sum(key.encode()))
    vae = getattr(diffusers, model.vae_class).from_config({**model.published_config, **SMALL})
    conv_out = vae.decoder.conv_out.conv if model.kind == "video" else vae.decoder.conv_out
    with torch.no_grad():
        conv_out.weight.mul_(6)
    vae.save_pretrained(folder)
    return folder


@dataclass
class Endpoint:
    """A running service, and the same weights in plain diffusers as the reference."""

    key: str
    url: str
    vae: Any
    log: Path
    kind: str = field(init=False)
    scaling: dict[str, float] = field(init=False)
    """Scaling parameters that a client sends for this model."""

    def __post_init__(self) -> None:
        self.kind = MODELS[self.key].kind
        shift = self.vae.config.get("shift_factor")
        self.scaling = {"scaling_factor": self.vae.config.scaling_factor, **({"shift_factor": shift} if shift else {})}

    def latents(
        self, batch: int = 1, height: int = 64, width: int = 96, frames: int = 2, seed: int = 0
    ) -> torch.Tensor:
        """Return random scaled latents for images of this height and width."""
        time_axis = (frames,) if self.kind == "video" else ()
        shape = (batch, self.vae.config.latent_channels, *time_axis, height // 8, width // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        raw = latents / self.scaling["scaling_factor"] + self.scaling.get("shift_factor", 0)
        return self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0]

    @torch.no_grad()
    def encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        latents = self.vae.encode(pixels).latent_dist.mode()
        return (latents - self.scaling.get("shift_factor", 0)) * self.scaling["scaling_factor"]

    def post(
        self, tensor: torch.Tensor, path: str = "/", headers: dict[str, str] | None = None, **parameters: Any
    ) -> Any:
        """POST a tensor as `remote_decode` does. Add its shape and dtype unless `parameters` has them."""
        shape, dtype = describe(tensor)
        return requests.post(
            self.url + path,
            data=tensor_bytes(tensor),
            params={"shape": shape, "dtype": dtype, **parameters},
            headers={"Content-Type": "tensor/binary", **(headers or {})},
            timeout=60,
        )


@contextmanager
def running_endpoint(key: str, weights: Path, log: Path, **options: Any) -> Iterator[Endpoint]:
    """Run the service of a model. `options` are those of `serve`."""
    with serve("--model", key, "--weights", str(weights), log=log, **options) as url:
        yield Endpoint(key, url, getattr(diffusers, MODELS[key].vae_class).from_pretrained(weights).eval(), log)


@contextmanager
def faulty_endpoint(kind: str, key: str, weights: Path, log: Path, **environment: str) -> Iterator[Endpoint]:
    """Run `tests/support/faulty_server.py`."""
    command = ("-m", "tests.support.faulty_server", kind)
    if toolkit := os.environ.get("TOOLKIT"):
        environment["TOOLKIT"] = toolkit
    with running_endpoint(key, weights, log, command=command, **environment) as endpoint:
        yield endpoint


def uint8_pixels(decoded: torch.Tensor) -> np.ndarray:
    """Convert a decoded batch as diffusers' pipelines do: to uint8 [B, H, W, 3], or [F, H, W, 3] for a video."""
    if decoded.ndim == 5:
        images = VideoProcessor().postprocess_video(decoded, output_type="pil")[0]
    else:
        images = VaeImageProcessor().postprocess(decoded, output_type="pil")
    return np.stack([np.asarray(image) for image in images])


def same_video(actual: bytes, expected: bytes) -> bool:
    """Return whether two MP4 files show the same frames.

    x264's threads do not always give the same bytes. Noise then differs by up to 3.5 levels, and another frame by tens.
    """
    videos = []
    for file in (actual, expected):
        with av.open(io.BytesIO(file)) as container:
            videos.append(np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]))
    first, second = videos
    return first.shape == second.shape and np.abs(first.astype(int) - second).mean() < 5
