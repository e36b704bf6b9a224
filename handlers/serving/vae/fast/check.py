"""Check of the fast pass against diffusers' own, on the device, after a model is loaded.

The fast pass is on if it is faster than diffusers' own pass and accurate: at least as near to the exact result, within
`TOLERANCE`, or nearer than `ACCURATE`. The exact result is computed in the next wider dtype. Until the check is done,
diffusers' own pass runs.
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
from handlers.serving.vae.fast.cpu import CpuPass
from handlers.serving.vae.fast.forward import FastPass
from handlers.serving.vae.low_memory import reduced_peak

logger = logging.getLogger(__name__)

TOLERANCE = 0.5
"""Error in dB that the fast pass may have in excess."""
ACCURATE = 90
"""Ratio of the exact result's variance to the mean squared error, in dB, that always suffices. Rounding to 8 bits gives
59 dB at most, so the error changes only pixels on the boundary of two values. Float32 rounds to about 110 dB.
"""
REPETITIONS = 3
"""Measured passes of each kind."""
SMALL = 128
"""Height and width of the smaller input in pixels."""
LARGEST_ON_CPU = 256
"""Largest height and width of the larger input on a CPU. A GPU takes the model's usual size."""
LATENT_FRAMES = 3
"""Latent frames of a video: the first one, and others after it."""


UNWANTED = "off: VAE_FAST is not set"
UNKNOWN = "off: this architecture has none"
PENDING = "off: not checked yet"


class FastPasses:
    """Fast pass of a model, and for each task whether it is on. Only the thread of its device runs it."""

    def __init__(self, model: Any, declared: type[Model], wanted: bool, name: str = "") -> None:
        """Create the fast pass, if `wanted` and possible. `name` is the model's in metrics and the log."""
        self.declared, self.name, self.device = declared, name, str(model.device)
        self.fast = fast_pass(model) if wanted else None
        state = PENDING if self.fast else UNKNOWN if wanted else UNWANTED
        self.verdicts: dict[Task, str] = {"decode": state, "encode": state}
        self._on: set[Task] = set()

    def is_on(self, task: Task, dtype: torch.dtype) -> bool:
        """Return whether a model that is in this dtype now uses the fast pass."""
        return task in self._on and self.fast is not None and self.fast.dtype == dtype

    def checks(self) -> Iterator[Callable[[], None]]:
        """Prepare the fast pass, and yield its checks, which must run on the thread of the device."""
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
        """Let the model run the fast pass in a `with` block. It must be on."""
        assert self.fast
        return self.fast.installed()

    def _check(self, fast: FastPass, task: Task) -> None:
        """Compare both passes at a small size and at the model's usual size."""
        try:
            for height, width in _sizes(fast, self.declared):
                ratio, own, accuracy = _compare(fast, task, _inputs(fast, self.declared, task, height, width))
                if not (accuracy >= own - TOLERANCE or accuracy >= ACCURATE):
                    reason = f"{own - accuracy:.1f} dB further from exact than diffusers at {width}x{height}"
                    self._set(task, False, reason)
                    return
        except Exception as error:
            forget(fast.model)
            self._set(task, False, _reason(error))
            return
        accuracies = f"accurate to {accuracy:.0f} dB (diffusers {own:.0f} dB)"
        self._set(task, ratio <= 1, f"{ratio:.2f} of diffusers' time at {width}x{height}, {accuracies}")

    def _set(self, task: Task, is_on: bool, reason: str) -> None:
        self.verdicts[task] = f"{'on' if is_on else 'off'}: {reason}"
        if is_on:
            self._on.add(task)
        metrics.FAST.labels(task, self.device, self.name).set(is_on)
        level = logging.INFO if is_on else logging.WARNING
        logger.log(level, "fast pass, %s %s on %s, %s", self.name, task, self.device, self.verdicts[task])


def fast_pass(model: Any) -> FastPass | None:
    """Return the best fast pass for the model on its device; None for an unknown architecture."""
    if not is_known(model):
        return None
    if model.device.type == "cuda" and importlib.util.find_spec("triton"):
        from handlers.serving.vae.fast.fused import FusedPass

        return FusedPass(model)
    return CpuPass(model) if model.device.type == "cpu" else FastPass(model)


def _reason(error: Exception) -> str:
    """Return one line about an error."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _sizes(fast: FastPass, declared: type[Model]) -> Iterator[tuple[int, int]]:
    """Yield height and width of the inputs."""
    yield SMALL, SMALL
    height, width = declared.usual_size[:2]
    limit = LARGEST_ON_CPU if fast.model.device.type == "cpu" else max(height, width)
    yield min(height, limit), min(width, limit)


def _inputs(fast: FastPass, declared: type[Model], task: Task, height: int, width: int) -> Tensor:
    """Return one item on the device: normal latents, or pixels in [-1, 1]."""
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
def _compare(fast: FastPass, task: Task, inputs: Tensor) -> tuple[float, float, float]:
    """Return the time of the fast pass relative to diffusers' own, and the accuracy in dB of diffusers' and its own."""

    def run(inputs: Tensor = inputs) -> Tensor:
        return join(decode_chunks(fast.model, inputs)) if task == "decode" else encode_at_once(fast.model, inputs)

    fast.model.use_tiling = False  # the last request may have set it
    passes: dict[str, Callable[[], Any]] = {"own": nullcontext, "fast": fast.installed}
    results: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for repetition in range(REPETITIONS + 1):
        for name, installed in passes.items():
            with installed():
                start = _now(inputs)
                results[name] = run()
                if repetition:  # the first one also sets up caches
                    seconds[name].append(_now(inputs) - start)
    wider = torch.float64 if fast.dtype == torch.float32 else torch.float32
    try:
        with reduced_peak(fast.model.to(wider)):
            exact = run(inputs.to(wider))
    finally:
        fast.model.to(fast.dtype)  # exact, because the weights were in this dtype
    own, accuracy = (_accuracy(results[name].to(wider), exact) for name in ("own", "fast"))
    return min(seconds["fast"]) / min(seconds["own"]), own, accuracy


def _accuracy(result: Tensor, exact: Tensor) -> float:
    """Return the ratio of the exact result's variance to the mean squared error, in dB.

    It is infinite without an error, and NaN if a result has NaN or the exact one is constant.
    """
    error = (result - exact).square().mean().item()
    if not error:
        return math.inf
    variance = exact.var(correction=0).item()
    return 10 * math.log10(variance / error) if variance else math.nan


def _now(inputs: Tensor) -> float:
    """Return the time after the device has finished its work."""
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    return perf_counter()
