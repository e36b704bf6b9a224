"""The model: where its weights come from, the device it runs on, its two forward passes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from handlers.base import EndpointHandler
from handlers.serving.layout import Layout
from handlers.serving.request import Kind
from handlers.serving.settings import Settings

logger = logging.getLogger(__name__)


class VAE:
    """A diffusers autoencoder on its device. It takes tensors from any device; what it gives is on its own."""

    def __init__(self, model: Any, kind: Kind) -> None:
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        self.layout = Layout.of_config(model.config, kind)

    @classmethod
    def load(cls, handler: type[EndpointHandler], path: str, settings: Settings) -> VAE:
        """Loads the weights of `handler`'s model: from `settings.weights`, the repository at `path`, or its checkpoint.

        Raises:
            FileNotFoundError: `settings.weights` names a folder that holds no VAE of the model's class.
            ValueError: `settings.device` is no device of this machine.
        """
        device = _check_device(settings.device) if settings.device else _default_device()
        dtype = getattr(torch, settings.dtype or ("float32" if device == "cpu" else handler.dtype))
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
        return cls(model.to(device), handler.kind)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents [B, C, H, W] or [B, C, F, H, W] to pixels, about in [-1, 1]."""
        return self.model.decode(latents.to(self.device, self.dtype), return_dict=False)[0]

    @torch.inference_mode()
    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels in [-1, 1], [B, 3, H, W] or [B, 3, F, H, W], to raw latents.

        Gives the mode of the encoder's distribution, or a sample of it where a generator is given.
        """
        posterior = self.model.encode(pixels.to(self.device, self.dtype), return_dict=False)[0]
        if isinstance(posterior, Tensor):  # the autoencoders that are not variational, AutoencoderTiny for one
            return posterior
        return posterior.mode() if generator is None else posterior.sample(generator)


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _check_device(device: str) -> str:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"VAE_DEVICE: torch cannot use {device!r} here ({str(error).splitlines()[0]})") from None
    return device


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
        config = candidate / "config.json"
        if config.is_file() and json.loads(config.read_text()).get("_class_name") == vae_class:
            return candidate
    return None
