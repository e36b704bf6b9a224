"""Check of the fast passes against diffusers' own, on the device, after a model is loaded.

A fast pass is on if it is faster than diffusers' own pass and accurate. Until the check is done, diffusers' own pass
runs. Accuracy has three rules:

- Its difference from diffusers' own pass may be `ACCURATE`, as it is in float32 for most models.
- A larger difference may come from either pass. The exact result, in the next wider dtype, decides: the fast pass must
  be at least as near to it as diffusers' own, within `TOLERANCE`.
- A pass in bfloat16 for a model in float32, as on a CPU, is further from exact. Its images of 8 bits must be within
  `INVISIBLE` of float32's.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from handlers.model import Model, Task
from handlers.serving import metrics
from handlers.serving.vae.autoencoder import encode_at_once, forget, has_frames
from handlers.serving.vae.blocks import is_known
from handlers.serving.vae.chunks import decode_chunks, join
from handlers.serving.vae.fast.cpu import CpuPass, DiffusersPass, decoder_in_bfloat16
from handlers.serving.vae.fast.forward import FastPass
from handlers.serving.vae.low_memory import reduced_peak
from handlers.serving.vae.stop import PassStopped

logger = logging.getLogger(__name__)

TOLERANCE = 0.5
"""Error in dB that the fast pass may have in excess."""
ACCURATE = 90
"""Ratio of the result's variance to the mean squared difference, in dB, that always suffices. Rounding to 8 bits gives
59 dB at most, so the difference changes only pixels on the boundary of two values. Float32 rounds to about 110 dB.
"""
INVISIBLE = 45
"""Peak signal-to-noise ratio of images of 8 bits, in dB, that suffices: a typical pixel differs by one level of 255."""
TURNS = 2
"""Measured passes of each kind."""
MOST_TURNS = 5
"""Measured passes of each kind while the fast one is slower, because other load may be the reason."""
SMALL = 128
"""Height and width of the smaller input in pixels."""
LARGEST_ON_CPU = 256
"""Largest height and width of the larger input on a CPU. A GPU takes the model's usual size."""
LATENT_FRAMES = 3
"""Latent frames of a video: the first one, and others after it."""

UNWANTED = "off: VAE_FAST is not set"
UNKNOWN = "off: this architecture has none"
PENDING = "off: not checked yet"

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Steps of a check, on the thread of the device. It serves requests between two steps. T is the result."""


class FastPasses:
    """Fast passes of a model, and for each task which one is on. Only the thread of its device runs them."""

    def __init__(
        self,
        model: Any,
        declared: type[Model],
        wanted: bool,
        bfloat16: bool = False,
        name: str = "",
        make_room: Callable[[Task, torch.Size], AbstractContextManager[None]] = lambda *_: nullcontext(),
    ) -> None:
        """Create the fast passes.

        Args:
            make_room: plan the memory of diffusers' own pass over inputs of a shape, for a `with` block. It raises
                `RequestError` without enough memory, which ends the check.
            wanted: create one of the model's own dtype, if the architecture has one.
            bfloat16: create one that decodes in bfloat16 too, for a model in float32. It is preferred.
            name: label of the model in metrics and the log.
        """
        self.model, self.declared, self.name, self.device = model, declared, name, str(model.device)
        self._make_room = make_room
        own = [fast for fast in [fast_pass(model) if wanted else None] if fast]
        half = [half_pass(model)] if bfloat16 else []
        self.candidates: dict[Task, list[FastPass]] = {"decode": [*half, *own], "encode": own}
        """Passes in the order in which they are checked. The first good one is used."""
        none = UNKNOWN if wanted else UNWANTED
        self.verdicts: dict[Task, str] = {task: PENDING if passes else none for task, passes in self.candidates.items()}
        self._used: dict[Task, FastPass] = {}

    def used(self, task: Task, pixels: int = 0) -> FastPass | None:
        """Return the pass that is on for a task and frames of this many pixels.

        None is on while its weights are in another dtype.
        """
        fast = self._used.get(task)
        return fast if fast and fast.dtype == fast.current_dtype and pixels <= fast.most_pixels else None

    def prepare(self) -> None:
        """Do the slow preparations that need no device queue, such as compiling. A pass that fails is dropped."""
        for fast in {id(fast): fast for passes in self.candidates.values() for fast in passes}.values():
            try:
                fast.prepare()
            except Exception as error:
                for task, passes in self.candidates.items():
                    if fast in passes:
                        passes.remove(fast)
                        self._set(task, None, _reason(error))

    def check(self) -> Steps[None]:
        """Compare each candidate with diffusers' own pass, one pass a step."""
        for task, passes in self.candidates.items():
            for fast in passes:
                try:
                    is_on, verdict = yield from self._judge(fast, task)
                except Exception as error:
                    is_on, verdict = False, _reason(error)
                self._set(task, fast if is_on else None, verdict + fast.note)
                if is_on:
                    break

    def _judge(self, fast: FastPass, task: Task) -> Steps[tuple[bool, str]]:
        """Return whether a pass is accurate and fast at a small size and at the model's usual size, and why."""
        ratio, accuracy = math.nan, ""
        for height, width in _sizes(self.model, self.declared):
            inputs = _inputs(self.model, self.declared, task, height, width)
            own, result, ratio = yield from self._compare(fast, task, inputs)
            is_accurate, accuracy = yield from self._accuracy(fast, task, inputs, own, result)
            if not is_accurate:
                return False, f"{accuracy} at {width}x{height}"
        return ratio <= 1, f"{ratio:.2f} of diffusers' time at {width}x{height}, {accuracy}"

    def _compare(self, fast: FastPass, task: Task, inputs: Tensor) -> Steps[tuple[Tensor, Tensor, float]]:
        """Return the results of diffusers' own pass and of the fast one, and the ratio of the fast one's time."""
        own_seconds = seconds = math.inf
        for turn in range(MOST_TURNS):
            own, time = yield from self._run(self.model, task, inputs, nullcontext)
            own_seconds = min(own_seconds, time)
            result, time = yield from self._run(fast.model, task, inputs.to(fast.dtype), fast.installed)
            seconds = min(seconds, time)
            if turn + 1 >= TURNS and seconds <= own_seconds:
                break
        return own, result, seconds / own_seconds

    def _accuracy(
        self, fast: FastPass, task: Task, inputs: Tensor, own: Tensor, result: Tensor
    ) -> Steps[tuple[bool, str]]:
        """Return whether the fast pass is accurate, and a phrase about it. The module's docstring has the rules."""
        if fast.model is not self.model:
            psnr = image_psnr(result, own)
            return psnr >= INVISIBLE, f"in {str(fast.dtype)[6:]}, {psnr:.0f} dB PSNR from float32"
        accuracy = _signal_to_noise(result, own)
        if accuracy >= ACCURATE:
            return True, f"{accuracy:.0f} dB from diffusers"
        exact = yield from self._exact(task, inputs)
        own_accuracy, accuracy = (_signal_to_noise(values, exact) for values in (own, result))
        if not accuracy >= own_accuracy - TOLERANCE:
            return False, f"{own_accuracy - accuracy:.1f} dB further from exact than diffusers"
        return True, f"accurate to {accuracy:.0f} dB (diffusers {own_accuracy:.0f} dB)"

    def _exact(self, task: Task, inputs: Tensor) -> Steps[Tensor]:
        """Return the result in the next wider dtype. A GPU takes float32 for float32, because float64 is slow there."""
        dtype: torch.dtype = self.model.dtype
        wider = torch.float64 if dtype == torch.float32 and inputs.device.type == "cpu" else torch.float32

        @contextmanager
        def widened() -> Iterator[None]:
            try:
                with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), reduced_peak(self.model.to(wider)):
                    yield
            finally:
                self.model.to(dtype)  # exact, because the weights were in this dtype

        exact, _ = yield from self._run(self.model, task, inputs.to(wider), widened)
        return exact

    def _run(
        self, model: Any, task: Task, inputs: Tensor, installed: Callable[[], AbstractContextManager[None]]
    ) -> Steps[tuple[Tensor, float]]:
        """Run one pass, and return its result and its seconds. When a request stops it, run it again later."""
        while True:
            yield
            model.use_tiling = False  # the last request may have set it
            start = _now(inputs)
            try:
                with torch.no_grad(), self._make_room(task, inputs.shape), installed():
                    result = join(decode_chunks(model, inputs)) if task == "decode" else encode_at_once(model, inputs)
                return result, _now(inputs) - start
            except PassStopped:
                continue
            finally:
                forget(model)

    def _set(self, task: Task, fast: FastPass | None, reason: str) -> None:
        self.verdicts[task] = f"{'on' if fast else 'off'}: {reason}"
        if fast:
            self._used[task] = fast
        metrics.FAST.labels(task, self.device, self.name).set(fast is not None)
        level = logging.INFO if fast else logging.WARNING
        logger.log(level, "fast pass, %s %s on %s, %s", self.name, task, self.device, self.verdicts[task])


def fast_pass(model: Any) -> FastPass | None:
    """Return the best fast pass for the model on its device; None for an unknown architecture."""
    if not is_known(model):
        return None
    if model.device.type == "cuda" and importlib.util.find_spec("triton"):
        from handlers.serving.vae.fast.fused import fused_pass

        return fused_pass(model)
    return CpuPass(model) if model.device.type == "cpu" else FastPass(model)


def half_pass(model: Any) -> FastPass:
    """Return the pass of a copy of a model on a CPU that decodes in bfloat16."""
    return (CpuPass if is_known(model) else DiffusersPass)(decoder_in_bfloat16(model))


def _reason(error: Exception) -> str:
    """Return one line about an error."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _sizes(model: Any, declared: type[Model]) -> Iterator[tuple[int, int]]:
    """Yield height and width of the inputs."""
    yield SMALL, SMALL
    height, width = declared.usual_size[:2]
    limit = LARGEST_ON_CPU if model.device.type == "cpu" else max(height, width)
    yield min(height, limit), min(width, limit)


def _inputs(model: Any, declared: type[Model], task: Task, height: int, width: int) -> Tensor:
    """Return one item on the device: normal latents, or pixels in [-1, 1]."""
    device, generator = model.device, torch.Generator().manual_seed(0)
    latent_frames = LATENT_FRAMES if declared.kind == "video" else 1
    side = declared.vae_scale_factor
    if task == "decode":
        side *= declared.upscale
        frames = (latent_frames,) if has_frames(model) else ()
        latents = torch.randn(1, declared.latent_channels, *frames, height // side, width // side, generator=generator)
        return latents.to(device, model.dtype)
    frames = ((latent_frames - 1) * declared.frame_factor + 1,) if has_frames(model) else ()
    sides = height // side * side, width // side * side
    pixels = torch.rand(1, declared.pixel_channels, *frames, *sides, generator=generator)
    return (pixels * 2 - 1).to(device, model.dtype)


def _signal_to_noise(result: Tensor, exact: Tensor) -> float:
    """Return the ratio of the exact result's variance to the mean squared error, in dB.

    It is infinite without an error, and NaN if a result has NaN or the exact one is constant.
    """
    error = (result.to(exact.dtype) - exact).square().mean().item()
    if not error:
        return math.inf
    variance = exact.var(correction=0).item()
    return 10 * math.log10(variance / error) if variance else math.nan


def image_psnr(result: Tensor, exact: Tensor) -> float:
    """Return the peak signal-to-noise ratio of images of 8 bits, in dB; infinite without a difference."""
    images = [((values.float().clamp(-1, 1) + 1) * 127.5).round() for values in (result, exact)]
    error = (images[0] - images[1]).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def _now(inputs: Tensor) -> float:
    """Return the time after the device has finished its work."""
    if inputs.device.type == "cuda":
        torch.cuda.synchronize(inputs.device)
    return perf_counter()
