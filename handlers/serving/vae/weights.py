"""Weights of a model: from a folder, the deployed repository, the Hub, or random values."""

from __future__ import annotations

import importlib
import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from packaging.version import Version

from handlers.model import Model
from handlers.serving.settings import Settings
from handlers.serving.vae import hub

logger = logging.getLogger(__name__)


def load_model(declared: type[Model], path: str, settings: Settings, dtype: torch.dtype) -> Any:
    """Load a diffusers autoencoder in `dtype` from `settings.weights`, the repository at `path`, or its checkpoint.

    Raises:
        OSError: the folder `settings.weights` has no VAE of the model's class, or the Hub does not provide the
            checkpoint.
        ValueError: the installed diffusers is older than the model, or does not have its class.
    """
    if Version(diffusers.__version__) < Version(declared.diffusers):
        raise ValueError(
            f"{settings.model or declared.__name__} needs diffusers {declared.diffusers} or later, and this is "
            f"{diffusers.__version__}; `pip install --upgrade diffusers` on a machine of your own"
        )
    vae_class = _diffusers_class(declared)
    if settings.weights == "random":
        logger.warning("the weights are RANDOM: good for speed and memory, not for images")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return vae_class.from_config(declared.published_config).to(dtype)
    folder = _find_weights(declared, path, settings)
    logger.info("loading %s from %s", declared.vae_class, folder)
    return vae_class.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)


def _diffusers_class(declared: type[Model]) -> Any:
    """Return the class of an autoencoder. Raise `ValueError` if diffusers or the named module lacks it."""
    module, _, name = declared.vae_class.rpartition(":")
    try:
        return getattr(importlib.import_module(module or "diffusers"), name)
    except AttributeError:
        raise ValueError(f"{module or f'diffusers {diffusers.__version__}'} has no {name}") from None


def _find_weights(declared: type[Model], path: str, settings: Settings) -> Path:
    """Find the folder of the weights, after downloading a checkpoint from the Hub if necessary."""
    if settings.weights:
        folder = _vae_folder(Path(settings.weights), declared.vae_class)
        if folder is None:
            raise FileNotFoundError(
                f"VAE_WEIGHTS={settings.weights} has no {declared.vae_class}: neither the folder nor its vae/ has a "
                "config.json of that class; name a folder that has"
            )
        return folder
    if path and (folder := _vae_folder(Path(path), declared.vae_class)):
        return folder
    if (folder := Path(declared.checkpoint)).is_dir():
        return folder / (declared.subfolder or "")
    logger.info("looking for %s on the Hub", declared.checkpoint)
    return hub.fetch(declared.checkpoint, declared.subfolder, settings.revision)


def _vae_folder(folder: Path, vae_class: str) -> Path | None:
    """Return `folder` or its vae/, whichever has a config of this class."""
    for candidate in (folder, folder / "vae"):
        file = candidate / "config.json"
        config = json.loads(file.read_text()) if file.is_file() else None
        if isinstance(config, dict) and config.get("_class_name") == vae_class.rpartition(":")[2]:
            return candidate
    return None
