"""The model: where its weights come from, the device it runs on, its two forward passes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from torch import Tensor

from handlers.serving.errors import RequestError
from handlers.serving.layout import Layout
from handlers.serving.low_memory import reduced_peak
from handlers.serving.memory import MemoryUse, Mode, choose_modes, free_memory, is_out_of_memory
from handlers.serving.request import Task
from handlers.serving.settings import Settings

if TYPE_CHECKING:
    from handlers.base import EndpointHandler

logger = logging.getLogger(__name__)

BATCH_PIXELS = 1024 * 1024
"""Pixels of pictures that go through a GPU as one batch: four of 512x512, which alone leave a large GPU idle in part.

A CPU is busy with one, so it takes them one by one.
"""


class VAE:
    """A diffusers autoencoder on its device. It takes tensors from any device; what it gives is on its own."""

    def __init__(self, model: Any, handler: type[EndpointHandler]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        self.layout = Layout.of_config(model.config, handler.kind)
        self.memory = MemoryUse(*handler.values_per_pixel, handler.tile_pixels, handler.frames_at_once)
        self.batch_limit = 0 if self.device.type == "cpu" else BATCH_PIXELS

    @classmethod
    def load(cls, handler: type[EndpointHandler], path: str, settings: Settings, device: str) -> VAE:
        """Loads the weights of `handler`'s model: from `settings.weights`, the repository at `path`, or its checkpoint.

        Raises:
            FileNotFoundError: `settings.weights` names a folder that holds no VAE of the model's class.
        """
        dtype = getattr(torch, settings.dtype or ("float32" if torch.device(device).type == "cpu" else handler.dtype))
        vae_class = getattr(diffusers, handler.vae_class)
        if settings.weights == "random":
            logger.warning("the weights are RANDOM: good for speed and memory, not for pictures")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = vae_class.from_config(handler.published_config).to(dtype)
        else:
            source, options = _find_weights(handler, path, settings)
            logger.info("loading %s from %s", handler.vae_class, source)
            model = vae_class.from_pretrained(source, torch_dtype=dtype, use_safetensors=True, **options)
        logger.info("running on %s in %s", device, dtype)
        return cls(model.to(device), handler)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def decode(self, latents: Tensor) -> tuple[Tensor, Mode]:
        """Raw latents [B, C, H, W] or [B, C, F, H, W] to pixels, about in [-1, 1]."""
        return self._run("decode", latents, lambda z: self.model.decode(z, return_dict=False)[0])

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Mode]:
        """Pixels in [-1, 1], [B, 3, H, W] or [B, 3, F, H, W], to raw latents.

        Gives the mode of the encoder's distribution, or a sample of it where a generator is given.
        """
        posterior, mode = self._run("encode", pixels, lambda x: self.model.encode(x, return_dict=False)[0])
        if isinstance(posterior, Tensor):  # the autoencoders that are not variational, AutoencoderTiny for one
            return posterior, mode
        return posterior.mode() if generator is None else posterior.sample(generator), mode

    @torch.no_grad()
    def _run(self, task: Task, inputs: Tensor, forward: Callable[[Tensor], Any]) -> tuple[Any, Mode]:
        """Runs in the best mode that memory allows, and one step down when it turns out not to.

        Raises:
            RequestError: not even tiles fit.
        """
        estimate = self.memory.estimate(task, self.layout, inputs.shape, self.dtype.itemsize)
        for mode in choose_modes(estimate, len(inputs), free_memory(self.device)):
            self.model.use_slicing = mode in (Mode.SLICED, Mode.TILED)
            self.model.use_tiling = mode is Mode.TILED
            way = nullcontext() if mode is Mode.FULL else reduced_peak(self.model)
            try:
                with way:
                    return forward(inputs.to(self.device, self.dtype)), mode
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("out of memory with %s in mode %s: %s", list(inputs.shape), mode.value, error)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        raise RequestError(f"`shape` {list(inputs.shape)} does not fit in this device's memory, not even in tiles", 507)

    def to_cpu(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU, through pinned memory, which a GPU fills several times as fast."""
        if self.device.type != "cuda":
            return tensor.cpu()
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor)


def devices(device: str | None) -> list[str]:
    """The devices to run on: the one that is named, or every GPU, or the CPU.

    Raises:
        ValueError: it is no device of this machine.
    """
    if device:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"VAE_DEVICE: torch cannot use {device!r} here ({reason})") from None
        return [device]
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["mps" if torch.backends.mps.is_available() else "cpu"]


def _find_weights(handler: type[EndpointHandler], path: str, settings: Settings) -> tuple[str, dict[str, Any]]:
    """The folder or repository to load from, and `from_pretrained`'s further arguments."""
    if settings.weights:
        folder = _vae_folder(Path(settings.weights), handler.vae_class)
        if folder is None:
            raise FileNotFoundError(
                f"VAE_WEIGHTS={settings.weights} holds no {handler.vae_class}: neither the folder nor its vae/ has a "
                "config.json of that class"
            )
        return str(folder), {}
    if path and (folder := _vae_folder(Path(path), handler.vae_class)):
        return str(folder), {}
    return handler.checkpoint, {"subfolder": handler.subfolder, "revision": settings.revision}


def _vae_folder(folder: Path, vae_class: str) -> Path | None:
    for candidate in (folder, folder / "vae"):
        file = candidate / "config.json"
        config = json.loads(file.read_text()) if file.is_file() else None
        if isinstance(config, dict) and config.get("_class_name") == vae_class:
            return candidate
    return None
