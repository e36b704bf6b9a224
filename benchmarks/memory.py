"""What each way to run each published architecture takes, beside what the service plans for it.

    python -m benchmarks.memory [MODEL ...]

Computed on torch's meta device: the passes run operator by operator, on tensors that have a shape and no numbers. It
takes neither memory nor weights nor a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import diffusers
import torch
import torch.nn.functional as F
import typer
from diffusers.models.autoencoders import autoencoder_kl_hunyuanvideo15
from torch import Tensor

from benchmarks.peak import peak_bytes
from handlers import MODELS, get_model
from handlers.model import Model, Task
from handlers.serving.layout import Layout
from handlers.serving.vae.autoencoder import encode_at_once, has_frames
from handlers.serving.vae.blocks import is_known
from handlers.serving.vae.chunks import decode_chunks, join
from handlers.serving.vae.low_memory import reduced_peak
from handlers.serving.vae.memory import Estimate, MemoryUse, Mode
from handlers.serving.vae.vae import _tile_pixels

META = torch.device("meta")
"""A pass in reduced memory cuts its convolutions there as on a GPU."""


class Case(NamedTuple):
    """A request."""

    task: Task
    mode: Mode
    height: int
    width: int
    frames: int = 1
    batch: int = 1
    dtype: torch.dtype = torch.float32


def measured(declared: type[Model], case: Case) -> int:
    """Bytes of all tensors that are alive at the peak: the inputs and the result among them, the weights not.

    Attention counts as one kernel, which holds no scores, as it does on a GPU; what operators take inside themselves
    is not seen.
    """
    return _measured(declared.vae_class, _layers(declared), _latents_shape(declared, case), case)


def estimated(declared: type[Model], case: Case) -> int:
    """Bytes that the service plans for it."""
    return _estimate(declared, case).needed(case.mode, case.batch)


def offered(declared: type[Model], task: Task, batch: int = 1) -> list[Mode]:
    """The modes that a batch can be run in, without the fast pass, which takes less than diffusers' own."""
    whole = batch == 1 or declared.runs_batches
    has = {
        Mode.FULL: whole,
        Mode.REDUCED: whole and is_known(_model(declared.vae_class, _layers(declared), torch.float32)),
        Mode.SLICED: batch > 1,
        Mode.TILED: task in declared.tiles,
    }
    return [mode for mode in Mode if has.get(mode)]


def tile_side(declared: type[Model]) -> int:
    """Of a square with the pixels of one of its tiles."""
    return round(_tile_pixels(_model(declared.vae_class, _layers(declared), torch.float32)) ** 0.5)


def _estimate(declared: type[Model], case: Case) -> Estimate:
    model = _model(declared.vae_class, _layers(declared), case.dtype)
    factor = declared.frame_factor
    layout = Layout(declared.kind, declared.latent_channels, declared.vae_scale_factor, (1, 1 + factor, 1 + 2 * factor))
    shape = _latents_shape(declared, case) if case.task == "decode" else _pixels_shape(declared, case)
    return MemoryUse(declared, is_known(model), _tile_pixels(model)).estimate(
        case.task, layout, shape, case.dtype.itemsize
    )


def _latents_shape(declared: type[Model], case: Case) -> tuple[int, ...]:
    time = ((case.frames - 1) // declared.frame_factor + 1,) if declared.kind == "video" else ()
    side = declared.vae_scale_factor
    return case.batch, declared.latent_channels, *time, case.height // side, case.width // side


def _pixels_shape(declared: type[Model], case: Case) -> tuple[int, ...]:
    return case.batch, 3, *((case.frames,) if declared.kind == "video" else ()), case.height, case.width


NUMBERS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
"""Of a config: those that no layer is made by."""


def _layers(declared: type[Model]) -> str:
    """The config, as far as the passes depend on it."""
    return json.dumps({name: value for name, value in declared.published_config.items() if name not in NUMBERS})


@cache
def _model(vae_class: str, layers: str, dtype: torch.dtype) -> Any:
    with META:
        model = getattr(diffusers, vae_class).from_config(json.loads(layers)).eval().requires_grad_(False)
    torch.nn.Module.to(model, META, dtype)  # some parameters were made without asking for the device
    for blend in ("blend_v", "blend_h"):  # they write row by row into the second tile: much time, no memory
        if hasattr(model, blend):
            setattr(model, blend, lambda first, second, extent: second)
    return model


@cache
def _measured(vae_class: str, layers: str, latents_shape: tuple[int, ...], case: Case) -> int:
    model = _model(vae_class, layers, case.dtype)
    one_by_one = case.mode in (Mode.SLICED, Mode.TILED) and case.batch > 1

    def encode() -> Tensor:
        pixels = torch.empty(_case_pixels(latents_shape, case), dtype=case.dtype)
        return _finite(encode_at_once(model, pixels, one_by_one=one_by_one))

    def decode() -> Tensor:
        latents = torch.empty(latents_shape, dtype=case.dtype)
        if model.encoder and latents.ndim == 4 and has_frames(model):
            latents = latents.unsqueeze(2)
        items = latents.split(1) if one_by_one else [latents]
        parts = [join(_finite(chunk) for chunk in decode_chunks(model, item)) for item in items]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    model.use_tiling = case.mode is Mode.TILED
    try:
        with META, torch.no_grad(), _quick(), nullcontext() if case.mode is Mode.FULL else reduced_peak(model):
            return peak_bytes(decode if case.task == "decode" else encode)
    finally:
        model.use_tiling = False


def _case_pixels(latents_shape: tuple[int, ...], case: Case) -> tuple[int, ...]:
    return case.batch, 3, *((case.frames,) if len(latents_shape) == 5 else ()), case.height, case.width


def _finite(result: Tensor) -> Tensor:
    result.isfinite()  # the service asks whether all are
    return result


@contextmanager
def _quick() -> Iterator[None]:
    """Attention in one kernel, and the mask of HunyuanVideo 1.5, which diffusers fills row by row, at once."""

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
    """Of the model's weights in this dtype."""
    model = _model(declared.vae_class, _layers(declared), torch.float32)
    return sum(weight.numel() for weight in model.parameters()) * dtype.itemsize


def table(keys: list[str]) -> Iterator[str]:
    """Markdown, a row as soon as it is there: numbers per pixel of one frame, of models with the same layers once."""
    yield "| model | task | frames | full | half precision | reduced | in tiles | estimates |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    seen: dict[tuple[str, str], str] = {}
    for key in keys:
        declared = MODELS[key]
        same = seen.setdefault((declared.vae_class, _layers(declared)), key)
        for task in ("decode", "encode") if same == key else ():
            for frames in (1, 2 * declared.frame_factor + 1, 33) if declared.kind == "video" else (1,):
                yield _row(key, task, frames)


def _row(key: str, task: Task, frames: int) -> str:
    declared = MODELS[key]
    modes = offered(declared, task)
    side = -(-tile_side(declared) * 5 // 4 // 32) * 32 if Mode.TILED in modes else 0
    frames = (frames - 1) // declared.frame_factor * declared.frame_factor + 1
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


def main(models: Annotated[list[str] | None, typer.Argument(help="Keys; default: all.")] = None) -> None:
    for key in models or ():
        get_model(key)
    for line in table(models or list(MODELS)):
        print(line, flush=True)


if __name__ == "__main__":
    typer.run(main)
