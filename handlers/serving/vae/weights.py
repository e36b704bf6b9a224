"""Weights of a model: from a folder, a file, the deployed repository, the Hub, or random values."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import load_file

from handlers.model import Model, WrongWeights
from handlers.serving.settings import Settings
from handlers.serving.vae import hub

logger = logging.getLogger(__name__)


def load_model(declared: type[Model], path: str, settings: Settings, dtype: torch.dtype) -> Any:
    """Load an autoencoder in `dtype` from `settings.weights`, the repository at `path`, or its checkpoint.

    Raises:
        OSError: `settings.weights` has no VAE of the model's class, or the Hub does not provide the checkpoint.
        ValueError: the installed diffusers is older than the model, or does not have its class; or the weights are of
            another network.
    """
    if Version(diffusers.__version__) < Version(declared.diffusers):
        raise ValueError(
            f"{settings.model or declared.__name__} needs diffusers {declared.diffusers} or later, and this is "
            f"{diffusers.__version__}; `pip install --upgrade diffusers` on a machine of your own"
        )
    vae_class = find_class(declared.vae_class)
    if settings.weights == "random":
        logger.warning("the weights are RANDOM: good for speed and memory, not for images")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return vae_class.from_config(declared.published_config).to(dtype)
    source = _find_weights(declared, path, settings)
    logger.info("loading %s from %s", declared.vae_class, source)
    if source.is_file():
        return load_single_file(declared, source, dtype)
    return vae_class.from_pretrained(source, torch_dtype=dtype, use_safetensors=True)


def find_class(vae_class: str) -> Any:
    """Return the class of an autoencoder, by its name in diffusers or "module:Class".

    Raises:
        ValueError: diffusers or the module has no such class.
    """
    module, _, name = vae_class.rpartition(":")
    try:
        return getattr(importlib.import_module(module or "diffusers"), name)
    except AttributeError:
        raise ValueError(f"{module or f'diffusers {diffusers.__version__}'} has no {name}") from None


def load_single_file(declared: type[Model], file: Path, dtype: torch.dtype) -> Any:
    """Load one .safetensors file with the names of the model's class, or those that diffusers can convert.

    `published_config` describes the network, because the file has no config.

    Raises:
        OSError: the file is no .safetensors file.
        ValueError: its tensors are those of another network.
    """
    vae_class = find_class(declared.vae_class)
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise OSError(f"{file.name} is no .safetensors file: {error}") from None
    with torch.device("meta"):
        expected = vae_class.from_config(declared.published_config).state_dict()
    channels = next((value.shape[1] for name, value in tensors.items() if name.endswith(FIRST_LAYERS)), None)

    def another_network(reason: str) -> WrongWeights:
        problem = f"{file.name} has the weights of another network than {declared.__name__}: {reason}"
        return WrongWeights(problem, declared.vae_class, channels, declared)

    if expected.keys() <= tensors.keys():
        if wrong := _difference(tensors, expected):
            raise another_network(wrong)
        model = vae_class.from_config(declared.published_config)
        model.load_state_dict({name: tensors[name] for name in expected})
        return model.to(dtype)
    if not hasattr(vae_class, "from_single_file"):
        raise another_network(f"no {next(name for name in expected if name not in tensors)}")
    with TemporaryDirectory() as folder:
        vae_class.from_config(declared.published_config).save_config(folder)
        try:
            return vae_class.from_single_file(str(file), config=folder, torch_dtype=dtype, local_files_only=True)
        except Exception as error:  # diffusers' converters raise what they meet
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise another_network(reason) from error


FIRST_LAYERS = ("decoder.conv_in.weight", "decoder.1.weight", "decoder.layers.0.weight", "decoder.conv1.weight")
"""Ends of the names of a decoder's first weights: in diffusers and original layouts, the TAEHV family, AutoencoderTiny
and taef2, and Wan's original layout."""


def _difference(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str | None:
    """Return the first tensor that has another shape, in words; None without one."""
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            return f"{name} has shape {list(tensors[name].shape)}, expected {list(tensor.shape)}"
    return None


def _find_weights(declared: type[Model], path: str, settings: Settings) -> Path:
    """Find the folder or file of the weights, after downloading a checkpoint from the Hub if necessary."""
    if settings.weights:
        return _find_own_weights(declared, settings.weights)
    if path and (source := _in_folder(declared, Path(path))):
        return source
    if (folder := Path(declared.checkpoint)).is_dir():
        return folder / (declared.subfolder or "")
    if declared.download:
        raise FileNotFoundError(
            f"the weights of {settings.model or declared.__name__} are not on the Hub: download {declared.download} "
            "and name the file in WEIGHTS (VAE_WEIGHTS)"
        )
    logger.info("looking for %s on the Hub", declared.checkpoint)
    if declared.file:
        return hub.fetch_file(declared.checkpoint, declared.subfolder, declared.file, settings.revision)
    return hub.fetch(declared.checkpoint, declared.subfolder, settings.revision)


def _find_own_weights(declared: type[Model], weights: str) -> Path:
    """Return the file or folder that a user names: on this machine, or on the Hub as `org/repo[:subfolder][@commit]`.

    Raises:
        OSError: there is no such file or folder, or it has no VAE of the model's class.
    """
    source = Path(weights)
    if source.is_file():
        return source
    repository = None if source.exists() else hub.Repository.parse(weights)
    if repository is None:
        if own := _in_folder(declared, source):
            return own
    elif repository.subfolder and hub.names_file(repository):
        return hub.fetch_file(repository.name, None, repository.subfolder, repository.revision)
    elif folder := _vae_folder(hub.fetch(*repository), declared.vae_class):
        return folder
    if (config := _read_config(source) or _read_config(source / "vae")) and "_class_name" in config:
        found, channels = config["_class_name"], config.get("latent_channels") or config.get("z_dim")
        problem = f"VAE_WEIGHTS={weights} has no {declared.vae_class}, but an {found}"
        raise WrongWeights(problem, found, channels)
    raise FileNotFoundError(
        f"VAE_WEIGHTS={weights} has no {declared.vae_class}: neither the folder nor its vae/ has a config.json of that "
        "class; name a folder that has, a .safetensors file, or org/repo:subfolder of the Hub"
    )


def _in_folder(declared: type[Model], folder: Path) -> Path | None:
    """Return the weights in a folder of a user or in a deployed repository; None if it has none of this class."""
    for name in filter(None, (declared.file, hub.ONE_FILE)):
        for file in (folder / name, folder / "vae" / name):
            if file.is_file():
                return file
    return _vae_folder(folder, declared.vae_class)


def _vae_folder(folder: Path, vae_class: str) -> Path | None:
    """Return `folder` or its vae/, whichever has a config of this class."""
    for candidate in (folder, folder / "vae"):
        config = _read_config(candidate)
        if config and config.get("_class_name") == vae_class.rpartition(":")[2]:
            return candidate
    return None


def _read_config(folder: Path) -> dict[str, Any] | None:
    """Return the object in a folder's config.json; None without one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else None
    return config if isinstance(config, dict) else None
