"""The peak memory of each published architecture in each mode, beside the service's estimate of it.

    python -m benchmarks.memory [MODEL ...]

The passes run on torch's meta device, operator by operator, on tensors that have a shape and no values. This takes
neither memory nor weights nor a GPU.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
import typer
from diffusers.models.autoencoders import autoencoder_kl_hunyuanvideo15
from torch import Tensor

from benchmarks.peak import peak_bytes
from handlers import MODELS, get_model
from handlers.model import Model, Task
from handlers.serving.layout import Layout
from handlers.serving.vae.autoencoder import encode_at_once, has_frames, shuffle
from handlers.serving.vae.blocks import is_known
from handlers.serving.vae.chunks import decode_chunks, join
from handlers.serving.vae.low_memory import reduced_peak
from handlers.serving.vae.memory import Estimate, MemoryUse, Mode
from handlers.serving.vae.vae import _tile_pixels
from handlers.serving.vae.weights import find_class

META = torch.device("meta")
"""A device where a pass in reduced memory splits its convolutions as on a GPU."""


class Case(NamedTuple):
    """One request."""

    task: Task
    mode: Mode
    height: int
    width: int
    frames: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.float32


def measured(declared: type[Model], case: Case) -> int:
    """Return the bytes of all tensors at the peak, with the inputs and the result and without the weights.

    A decode has `height` and `width` of decoded pixels.
    Attention counts as one kernel without scores, as on a GPU. Memory inside operators does not count.
    """
    pixels = _pixels_shape(declared, case)
    latents = _latents_shape(declared, case)
    return _measured(declared.vae_class, _layers(declared), latents, pixels, declared.upscale, case)


def estimated(declared: type[Model], case: Case) -> int:
    """Return the bytes that the service plans for a request."""
    return _estimate(declared, case).needed(case.mode, case.batch)


def offered(declared: type[Model], task: Task, batch: int = 1) -> list[Mode]:
    """Return the modes for a batch, without the fast pass, which takes less memory than diffusers' own."""
    whole = batch == 1 or declared.runs_batches
    if declared.always_tiles:
        return [Mode.TILED]
    has = {
        Mode.FULL: whole,
        Mode.REDUCED: whole and is_known(_model(declared.vae_class, _layers(declared), torch.float32)),
        Mode.SLICED: batch > 1,
        Mode.TILED: task in declared.tiles,
    }
    return [mode for mode in Mode if has.get(mode)]


def tile_side(declared: type[Model], task: Task) -> int:
    """Return the side of a square with as many pixels as one tile of the model."""
    side = round(_tile_pixels(_model(declared.vae_class, _layers(declared), torch.float32)) ** 0.5)
    return side * declared.upscale if task == "decode" else side


def _estimate(declared: type[Model], case: Case) -> Estimate:
    model = _model(declared.vae_class, _layers(declared), case.dtype)
    counts = tuple(map(declared.decoded_frames, range(1, (declared.clip or 2) + 2)))
    layout = Layout(
        declared.kind,
        declared.latent_channels,
        declared.vae_scale_factor,
        counts,
        clip=declared.clip,
        upscale=declared.upscale,
    )
    shape = _latents_shape(declared, case) if case.task == "decode" else _pixels_shape(declared, case)
    return MemoryUse(declared, is_known(model), _tile_pixels(model)).estimate(
        case.task, layout, shape, case.dtype.itemsize
    )


def _latents_shape(declared: type[Model], case: Case) -> tuple[int, ...]:
    time = (latent_frames(declared, case.frames),) if declared.kind == "video" else ()
    side = declared.vae_scale_factor * declared.upscale
    return case.batch, declared.latent_channels, *time, case.height // side, case.width // side


def latent_frames(declared: type[Model], frames: int) -> int:
    """Return the fewest latent frames that are decoded to at least `frames` frames."""
    return next(count for count in itertools.count(1) if declared.decoded_frames(count) >= frames)


def _pixels_shape(declared: type[Model], case: Case) -> tuple[int, ...]:
    return (
        case.batch,
        declared.pixel_channels,
        *((case.frames,) if declared.kind == "video" else ()),
        case.height,
        case.width,
    )


NO_LAYERS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
"""Entries of a config that no layer depends on."""


def _layers(declared: type[Model]) -> str:
    """Return the entries of the config that the passes depend on, as JSON."""
    return json.dumps({name: value for name, value in declared.published_config.items() if name not in NO_LAYERS})


@cache
def _model(vae_class: str, layers: str, dtype: torch.dtype) -> Any:
    with META:
        model = find_class(vae_class).from_config(json.loads(layers)).eval().requires_grad_(False)
    torch.nn.Module.to(model, META, dtype)  # some parameters ignore the default device
    for blend in ("blend_v", "blend_h"):  # blending row by row takes much time and no memory
        if hasattr(model, blend):
            setattr(model, blend, lambda first, second, extent: second)
    return model


@cache
def _measured(
    vae_class: str,
    layers: str,
    latents_shape: tuple[int, ...],
    pixels_shape: tuple[int, ...],
    upscale: int,
    case: Case,
) -> int:
    model = _model(vae_class, layers, case.dtype)
    one_by_one = case.mode in (Mode.SLICED, Mode.TILED) and case.batch > 1

    def encode() -> Tensor:
        pixels = torch.empty(pixels_shape, dtype=case.dtype)
        return _finite(encode_at_once(model, pixels, one_by_one=one_by_one))

    def decode() -> Tensor:
        latents = torch.empty(latents_shape, dtype=case.dtype)
        if model.encoder and latents.ndim == 4 and has_frames(model):
            latents = latents.unsqueeze(2)
        items = latents.split(1) if one_by_one else [latents]
        decoded = [join(_finite(shuffle(chunk, upscale)) for chunk in decode_chunks(model, item)) for item in items]
        return torch.cat(decoded) if len(decoded) > 1 else decoded[0]

    model.use_tiling = case.mode is Mode.TILED
    try:
        with META, torch.no_grad(), _quick(), nullcontext() if case.mode is Mode.FULL else reduced_peak(model):
            return peak_bytes(decode if case.task == "decode" else encode)
    finally:
        model.use_tiling = False


def _finite(result: Tensor) -> Tensor:
    result.isfinite()  # the service checks that all values are
    return result


@contextmanager
def _quick() -> Iterator[None]:
    """Replace attention by one kernel, and fill the mask of HunyuanVideo 1.5 at once instead of row by row."""

    def attention(query: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.empty_like(query)

    def mask(frames: int, size: int, dtype: Any, device: Any, batch_size: int | None = None) -> Tensor:
        full = torch.full((frames * size, frames * size), float("-inf"), dtype=dtype, device=device)
        return full if batch_size is None else full.unsqueeze(0).expand(batch_size, -1, -1)

    block = autoencoder_kl_hunyuanvideo15.HunyuanVideo15AttnBlock
    with (
        patch.object(F, "scaled_dot_product_attention", attention),
        patch.object(block, "prepare_causal_attention_mask", staticmethod(mask)),
    ):
        yield


def weight_bytes(declared: type[Model], dtype: torch.dtype) -> int:
    """Return the bytes of the model's weights in this dtype."""
    model = _model(declared.vae_class, _layers(declared), torch.float32)
    return sum(weight.numel() for weight in model.parameters()) * dtype.itemsize


def table(keys: list[str]) -> Iterator[str]:
    """Yield the rows of a Markdown table: values per pixel of one frame, once for models with the same layers."""
    yield "| model | task | frames | full | half precision | reduced | in tiles | estimates |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    seen: dict[tuple[str, str], str] = {}
    for key in keys:
        declared = MODELS[key]
        same = seen.setdefault((declared.vae_class, _layers(declared)), key)
        for task in ("decode", "encode") if same == key else ():
            for frames in dict.fromkeys(frame_counts(declared)):
                yield _row(key, task, frames)


def frame_counts(declared: type[Model]) -> tuple[int, ...]:
    """Return the numbers of frames in the table: the fewest, a few, and about 33."""
    if declared.kind == "image":
        return (1,)
    least = declared.least_latent_frames
    few = least + 2 if declared.clip is None else 2 + declared.clip
    return declared.decoded_frames(least if declared.clip is None else few), declared.decoded_frames(few), 33


def _row(key: str, task: Task, frames: int) -> str:
    declared = MODELS[key]
    modes = offered(declared, task)
    side = -(-tile_side(declared, task) * 5 // 4 // 32) * 32 if Mode.TILED in modes else 0
    frames = declared.decoded_frames(latent_frames(declared, frames + 1) - 1)
    cells, ratios = [], []
    for mode, dtype, height, width in (
        (Mode.FULL, torch.float32, 512, 768),
        (Mode.FULL, torch.float16, 512, 768),
        (Mode.REDUCED, torch.float16, 512, 768),
        (Mode.TILED, torch.float16, side, side),
    ):
        if mode not in modes:
            cells.append("")
            continue
        case = Case(task, mode, height, width, frames, dtype=dtype)
        taken = measured(declared, case)
        tile = side if mode is Mode.TILED else ""
        cells.append(f"{taken / dtype.itemsize / height / width:.0f}" + (f" ({tile}x{tile})" if tile else ""))
        ratios.append(estimated(declared, case) / taken)
    return " | ".join((f"| {key}", task, str(frames), *cells, f"{min(ratios):.2f} to {max(ratios):.2f} |"))


def main(models: Annotated[list[str] | None, typer.Argument(help="Keys of models; default: all.")] = None) -> None:
    """Print the table of the peak memory of models."""
    for key in models or ():
        get_model(key)
    for line in table(models or list(MODELS)):
        print(line, flush=True)


if __name__ == "__main__":
    typer.run(main)
