"""Tests of the plan's estimates against the memory of real passes, for every model and mode, and of the chosen
instances.
"""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest
import torch
from packaging.version import Version

from benchmarks.memory import Case, estimated, measured, offered, tile_side, weight_bytes
from handlers import MODELS
from handlers.model import ALL, Model, Task
from handlers.serving.vae.memory import Mode
from scripts.instances import HOURLY

pytestmark = pytest.mark.slow

HERE = [key for key in MODELS if Version(diffusers.__version__) >= Version(MODELS[key].diffusers)]
"""Models that the installed diffusers has."""
AT_MOST = 2.5
"""Largest ratio of estimate and memory.

Above it, a request would run in tiles, or be refused, that fits three times over.
"""
MEMORY_GB = {"nvidia-t4": 14, "nvidia-l4": 24, "nvidia-a10g": 24, "nvidia-l40s": 48}
BY_PRICE = sorted(MEMORY_GB, key=lambda instance: HOURLY[instance]["x1"])


def cases(declared: type[Model], task: Task) -> Iterator[Case]:
    """Yield few cases, because each is a pass of a published architecture, operator by operator.

    Every model has a small decode, because the channels of latents differ. The first model of a class with these peaks
    also has those of whole passes, and the first of a class those of a pass in parts.
    """
    if declared.always_tiles:
        yield Case(task, Mode.TILED, 320, 256, 39)
        return
    if task == "decode" or is_first(declared, "vae_class", "peak"):
        yield Case(task, Mode.FULL, 128, 128)
    half, factor = torch.float16, declared.frame_factor
    most, few = (4 * factor + 1, factor + 1) if declared.kind == "video" else (1, 1)
    if is_first(declared, "vae_class", "peak"):
        both = offered(declared, task, batch=2)
        height, width, frames = (*declared.usual_size, 1)[:3]
        # more frames take more memory only if the model keeps all of them, but they take time
        frames = min(frames, most if declared.peak[task].frames == ALL else 2 * factor + 1)
        yield Case(task, Mode.FULL, height, width, frames, batch=2 if Mode.FULL in both else 1, dtype=half)
        if Mode.REDUCED in both:
            yield Case(task, Mode.REDUCED, 256, 384, few, batch=2, dtype=half)
    if is_first(declared, "vae_class"):
        yield Case(task, Mode.SLICED, 128, 192, few, batch=2)
        if Mode.TILED in offered(declared, task):
            unit = declared.vae_scale_factor * declared.upscale
            height, width = (-(-tile_side(declared, task) * part // 8 // unit) * unit for part in (9, 6))  # two tiles
            yield Case(task, Mode.TILED, height, width, few, dtype=half)  # a batch runs one by one, as in slices


def is_first(declared: type[Model], *names: str) -> bool:
    """Return whether no model before this one declares the same values."""
    same = (model for model in MODELS.values() if all(getattr(model, n) == getattr(declared, n) for n in names))
    return declared is next(same)


def takes_less(declared: type[Model], case: Case) -> bool:
    """Return whether the plan overestimates this case.

    Models that treat a video as a batch of images decode batches video by video in any mode, and encode frame by frame
    in slices. The plan assumes more memory, and slices without need.
    """
    return declared.vae_class == "AutoencoderKLTemporalDecoder" and case.batch > 1


@pytest.mark.parametrize(
    ("key", "task"), [(key, task) for key in HERE for task in ("decode", "encode") if any(cases(MODELS[key], task))]
)
def test_estimates_are_close_to_the_memory_and_not_below(key: str, task: Task) -> None:
    declared = MODELS[key]
    ratios = {case: estimated(declared, case) / measured(declared, case) for case in cases(declared, task)}
    wrong = {
        case: round(ratio, 2)
        for case, ratio in ratios.items()
        if ratio < 1 or (ratio > AT_MOST and not takes_less(declared, case))
    }
    assert not wrong


def fits(declared: type[Model], instance: str, modes: set[Mode]) -> bool:
    """Return whether an instance decodes the model's usual size in one of these modes."""
    if instance == "nvidia-t4" and declared.dtype == "bfloat16":  # the estimate needs no weights
        return False
    dtype = getattr(torch, declared.dtype)
    free = MEMORY_GB[instance] * 1e9 - weight_bytes(declared, dtype)
    return any(
        estimated(declared, Case("decode", mode, *declared.usual_size, dtype=dtype)) <= free
        for mode in modes.intersection(offered(declared, "decode"))
    )


@pytest.mark.parametrize("key", [key for key in HERE if key != "tiny"])  # the plan needs no GPU
def test_the_instance_is_the_cheapest_that_decodes_the_usual_size(key: str) -> None:
    declared = MODELS[key]
    whole = [instance for instance in BY_PRICE if fits(declared, instance, {Mode.FULL, Mode.REDUCED})]
    tiled = [instance for instance in BY_PRICE if fits(declared, instance, {Mode.TILED})]
    assert declared.instance == (whole or tiled)[0]
