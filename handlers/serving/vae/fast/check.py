"""Whether the fast pass may be used: tried on the device, against diffusers' own, when a model has been loaded.

It has to be no further from the truth than diffusers' own pass is in the same dtype, and quicker. The truth is the next
wider dtype. Until that is known, and where it is not so, the service runs diffusers' own.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from handlers.model import Model, Task
from handlers.serving import metrics
from handlers.serving.vae.autoencoder import encode_at_once, forget, has_frames
from handlers.serving.vae.blocks import is_known
from handlers.serving.vae.chunks import decode_chunks, join
from handlers.serving.vae.fast.forward import FastPass
from handlers.serving.vae.low_memory import reduced_peak

logger = logging.getLogger(__name__)

TOLERANCE = 0.5
"""dB that the fast pass may be further from the truth."""
TURNS = 3
SMALL = 128
"""Height and width of the smaller of the two that are tried, in pixels."""
LARGEST_ON_CPU = 256
"""The same of the larger one; a GPU takes the model's usual size."""
LATENT_FRAMES = 3
"""Of a video: the first one alone, and some with others before them."""


UNWANTED = "off: VAE_FAST is not set"
NONE = "off: there is none for this architecture"
PENDING = "off: not checked yet"


class FastPasses:
    """The fast pass of a model, and for each task whether it is on, in words. Only its device's thread runs it."""

    def __init__(self, model: Any, declared: type[Model], wanted: bool, name: str = "") -> None:
        """`name` is the model's in metrics and the log."""
        self.declared, self.name, self.device = declared, name, str(model.device)
        self.fast = fast_pass(model) if wanted else None
        state = PENDING if self.fast else NONE if wanted else UNWANTED
        self.verdicts: dict[Task, str] = {"decode": state, "encode": state}
        self._on: set[Task] = set()

    def on(self, task: Task, dtype: torch.dtype) -> bool:
        """Whether it is to be used by a model that is in this dtype now."""
        return task in self._on and self.fast is not None and self.fast.dtype == dtype

    def checks(self) -> Iterator[Callable[[], None]]:
        """What the device is to do before it is on, in pieces; what needs no device is done first, here."""
        if self.fast is None:
            return
        try:
            self.fast.prepare()
        except Exception as error:
            for task in self.verdicts:
                self._set(task, False, _reason(error))
            return
        yield from (partial(self._check, self.fast, task) for task in self.verdicts)

    def installed(self) -> AbstractContextManager[None]:
        """The model runs it for as long as a `with` block lasts. It is there where it is on."""
        assert self.fast
        return self.fast.installed()

    def _check(self, fast: FastPass, task: Task) -> None:
        """Runs both passes at a small and at the model's usual size."""
        try:
            for height, width in _sizes(fast, self.declared):
                ratio, nearer = _compare(fast, task, _inputs(fast, self.declared, task, height, width))
                if not nearer >= -TOLERANCE:
                    self._set(task, False, f"{-nearer:.1f} dB further from exact than diffusers at {width}x{height}")
                    return
        except Exception as error:
            forget(fast.model)
            self._set(task, False, _reason(error))
            return
        self._set(task, ratio <= 1, f"{ratio:.2f} of diffusers' time at {width}x{height}, {nearer:+.1f} dB")

    def _set(self, task: Task, on: bool, why: str) -> None:
        self.verdicts[task] = f"{'on' if on else 'off'}: {why}"
        if on:
            self._on.add(task)
        metrics.FAST.labels(task, self.device, self.name).set(on)
        level = logging.INFO if on else logging.WARNING
        logger.log(level, "fast pass, %s %s on %s, %s", self.name, task, self.device, self.verdicts[task])


def fast_pass(model: Any) -> FastPass | None:
    """The best that there is for the model on its device; None for one whose parts are not known."""
    if not is_known(model):
        return None
    if model.device.type == "cuda" and importlib.util.find_spec("triton"):
        from handlers.serving.vae.fast.fused import FusedPass

        return FusedPass(model)
    return FastPass(model)


def _reason(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _sizes(fast: FastPass, declared: type[Model]) -> Iterator[tuple[int, int]]:
    yield SMALL, SMALL
    height, width = declared.usual_size[:2]
    most = LARGEST_ON_CPU if fast.model.device.type == "cpu" else max(height, width)
    yield min(height, most), min(width, most)


def _inputs(fast: FastPass, declared: type[Model], task: Task, height: int, width: int) -> Tensor:
    """Of one item, on the device: normal latents, or pixels in [-1, 1]."""
    device, generator = fast.model.device, torch.Generator().manual_seed(0)
    latent_frames = LATENT_FRAMES if declared.kind == "video" else 1
    side = declared.vae_scale_factor
    if task == "decode":
        frames = (latent_frames,) if has_frames(fast.model) else ()
        latents = torch.randn(1, declared.latent_channels, *frames, height // side, width // side, generator=generator)
        return latents.to(device, fast.dtype)
    frames = ((latent_frames - 1) * declared.frame_factor + 1,) if has_frames(fast.model) else ()
    pixels = torch.rand(1, 3, *frames, height // side * side, width // side * side, generator=generator)
    return (pixels * 2 - 1).to(device, fast.dtype)


@torch.no_grad()
def _compare(fast: FastPass, task: Task, inputs: Tensor) -> tuple[float, float]:
    """The fast pass's time in parts of diffusers' own, and by how many dB it is nearer to the exact result."""

    def run(inputs: Tensor = inputs) -> Tensor:
        return join(decode_chunks(fast.model, inputs)) if task == "decode" else encode_at_once(fast.model, inputs)

    fast.model.use_tiling = False  # the last request may have left it on
    passes: dict[str, Callable[[], Any]] = {"own": nullcontext, "fast": fast.installed}
    results: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(TURNS + 1):
        for name, installed in passes.items():
            with installed():
                start = _now(inputs)
                results[name] = run()
                if turn:  # not the first one, which sets up what the others use
                    seconds[name].append(_now(inputs) - start)
    wider = torch.float64 if fast.dtype == torch.float32 else torch.float32
    try:
        with reduced_peak(fast.model.to(wider)):
            exact = run(inputs.to(wider))
    finally:
        fast.model.to(fast.dtype)  # exact: its weights were in it
    errors = {name: (result.to(wider) - exact).square().mean().item() for name, result in results.items()}
    nearer = 10 * math.log10(errors["own"] / errors["fast"]) if errors["own"] and errors["fast"] else 0.0
    if errors["fast"] and not errors["own"]:
        nearer = -math.inf
    return min(seconds["fast"]) / min(seconds["own"]), nearer


def _now(inputs: Tensor) -> float:
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    return perf_counter()
