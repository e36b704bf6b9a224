"""The weights of a model: files of this machine, or a checkpoint on the Hub. Checking them needs no torch."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from handlers import MODELS, fitting_models
from handlers.model import WrongWeights
from handlers.serving.vae.hub import FILES, INDEX, ONE_FILE, Repository
from scripts.console import DeployError
from scripts.models import is_shipped

Files = dict[str, Path]
"""Files of this machine, by their names in the endpoint's repository."""

FIRST_LAYERS = {
    "AutoencoderTiny": ("decoder.layers.0.weight",),
    "TinyFlux2Autoencoder": ("decoder.layers.0.weight",),
    "TinyVideoAutoencoder": ("decoder.1.weight",),
    "AutoencoderKLMiniMaxH3": ("decoder.proj_in.weight",),
}
"""Ends of the names of a decoder's first weights, by class, where they differ from `USUAL_FIRST_LAYERS`."""
USUAL_FIRST_LAYERS = ("decoder.conv_in.weight", "decoder.conv_in.conv.weight", "decoder.conv1.weight")
"""Those of diffusers, and of the original layouts of Stable Diffusion, Flux, Wan and Qwen-Image."""
MAX_HEADER = 100_000_000
"""Bytes of the largest header that safetensors reads."""


def file_names(model: str) -> tuple[str, ...]:
    """Return the names of a published checkpoint's files: `FILES`, or one file without a config."""
    return (file,) if (file := MODELS[model].file) else FILES


def find_weights(model: str, weights: str | None) -> Files | Repository:
    """Return the files that WEIGHTS names, after a check, or a repository on the Hub; by default the checkpoint.

    The subfolder of a repository may end with a file's name.

    Raises:
        DeployError: a file is missing, or is not the model's.
    """
    handler = MODELS[model]
    if weights is None and not is_shipped(model):
        path = "/".join(filter(None, (handler.subfolder, handler.file)))
        return Repository(handler.checkpoint, path or None, None)
    path = Path(weights or handler.checkpoint).expanduser()
    if path.is_file():
        check_file(model, path)
        return {one_file(model): path}
    if weights and not path.exists() and (repository := Repository.parse(weights)):
        return repository
    return _in_folder(model, path)


def one_file(model: str) -> str:
    """Return the name of a file without a config in the endpoint's repository."""
    return MODELS[model].file or ONE_FILE


def _in_folder(model: str, folder: Path) -> Files:
    names = file_names(model)
    if (folder / INDEX).is_file() and not (folder / FILES[1]).is_file():
        names = (FILES[0], INDEX, *shards(folder / INDEX))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DeployError(f"WEIGHTS={folder} has no {' and no '.join(missing)}")
    if MODELS[model].file:
        check_file(model, folder / names[0])
    else:
        check_config(model, folder / FILES[0], str(folder))
    return {name: folder / name for name in names}


def shards(index: Path) -> list[str]:
    """Return the names of the files that the index of a checkpoint lists."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        names = [""]
    if wrong := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
        raise DeployError(f"WEIGHTS: {index} is no index of .safetensors files beside it: it names {wrong[0]!r}")
    return names


def check_config(model: str, config: Path, weights: str) -> None:
    """Raise `DeployError` if a config.json is one of another class, or of other latents."""
    handler, values = MODELS[model], {}
    with suppress(ValueError):
        values = json.loads(config.read_text())
    values = values if isinstance(values, dict) else {}
    found, needed = values.get("_class_name", "unknown class"), handler.vae_class.rpartition(":")[2]
    channels = values.get("latent_channels") or values.get("z_dim")
    if found != needed:
        problem = f"WEIGHTS={weights} is an {found}, and {model} needs an {needed}"
        raise _wrong(problem, found, channels)
    if channels not in (None, handler.latent_channels):
        raise _wrong_channels(model, weights, channels)


def check_file(model: str, file: Path) -> None:
    """Raise `DeployError` if a file is no .safetensors file, or its header is one of another class or other latents."""
    handler, shapes = MODELS[model], _read_shapes(file)
    ends = FIRST_LAYERS.get(handler.vae_class.rpartition(":")[2], USUAL_FIRST_LAYERS)
    first = next((shape for name, shape in shapes.items() if name.endswith(ends)), None)
    if first is None:
        raise DeployError(f"WEIGHTS={file} has no {' and no '.join(ends)}: {model} needs an {handler.vae_class}")
    if first[1] != handler.latent_channels:
        raise _wrong_channels(model, str(file), first[1])


def _read_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors of at least one dimension in a .safetensors file, by name."""
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(size)) if size <= MAX_HEADER else {}
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError):
        shapes = {}
    if not shapes:
        raise DeployError(f"WEIGHTS={file} is no .safetensors file")
    return {name: shape for name, shape in shapes.items() if len(shape) > 1}


def _wrong_channels(model: str, weights: str, channels: int) -> DeployError:
    handler = MODELS[model]
    problem = f"WEIGHTS={weights} has {channels} latent channels, and {model} has {handler.latent_channels}"
    return _wrong(problem, handler.vae_class, channels)


def _wrong(problem: str, vae_class: str, channels: int | None) -> DeployError:
    return DeployError(f"{problem}{fitting_models(WrongWeights(problem, vae_class, channels))}")
