"""The VAE: a model on its device, and its passes in each mode."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from handlers.model import Model, Task, WrongWeights
from handlers.serving import metrics
from handlers.serving.errors import RequestError
from handlers.serving.settings import Settings
from handlers.serving.vae.autoencoder import (
    DecodeOptions,
    EncodeOptions,
    PixelRange,
    encode_at_once,
    forget,
    shuffle,
)
from handlers.serving.vae.blocks import is_known
from handlers.serving.vae.chunks import decode_chunks, join
from handlers.serving.vae.fast.check import FastPasses
from handlers.serving.vae.fast.cpu import has_instructions
from handlers.serving.vae.heap import HEAP
from handlers.serving.vae.low_memory import reduced_peak
from handlers.serving.vae.memory import (
    Estimate,
    MemoryUse,
    Mode,
    choose_modes,
    free_memory,
    is_out_of_memory,
    total_memory,
)
from handlers.serving.vae.probe import Probe, find_difference
from handlers.serving.vae.stop import PassStopped, make_stoppable
from handlers.serving.vae.weights import load_model

T = TypeVar("T")

MAX_STATISTICS = 4096
"""Values of a buffer with statistics. Larger buffers are weights."""

logger = logging.getLogger(__name__)


class VAE:
    """A diffusers autoencoder on its device. Inputs may be on any device; results are on its own."""

    def __init__(
        self, model: Any, declared: type[Model], fast: bool = False, bfloat16: bool = False, name: str = ""
    ) -> None:
        """Wrap a loaded model.

        Args:
            fast: prepare the fast pass too.
            bfloat16: prepare a fast pass that decodes in bfloat16 too.
            name: label of the model in the metrics.
        """
        self.model = model.eval().requires_grad_(False)
        # A model searches all its modules for its device and its dtype, which takes a millisecond.
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.config = model.config
        self.statistics = _statistics(model)
        """Values of the small buffers by name. A copy from a GPU would wait for the pass that runs there."""
        self.declared = declared
        self.probe = Probe(model)
        self.layout = self.probe.layout(declared)
        self.pixel_range = PixelRange(declared.pixel_statistics)
        self.memory = MemoryUse(declared, is_known(model), _tile_pixels(model))
        make_stoppable(self.model)
        self.fast = FastPasses(self.model, declared, fast, bfloat16, name, self._make_room)
        self.mode = Mode.FULL
        """Mode of the current pass, or of the last one."""

    @classmethod
    def load(cls, declared: type[Model], path: str, settings: Settings, device: str) -> VAE:
        """Load a model onto a device. `load_model` lists the sources of its weights.

        Raises:
            OSError: the folder `settings.weights` has no VAE of the model's class, or the Hub does not provide the
                checkpoint.
            ValueError: the weights differ from the model's declaration, or diffusers does not have its class.
        """
        is_cpu = torch.device(device).type == "cpu"
        HEAP.configure(keep_pages=is_cpu)
        dtype = getattr(torch, settings.dtype or ("float32" if is_cpu else declared.dtype))
        model = load_model(declared, path, settings, dtype)
        fast = settings.allows_fast(torch.device(device).type) and not declared.always_tiles
        bfloat16 = fast and is_cpu and settings.dtype is None and has_instructions(torch.bfloat16)
        vae = cls(model.to(device), declared, fast, bfloat16, settings.model or "")
        if difference := find_difference(vae.layout, declared):
            if settings.weights in (None, "random"):
                raise ValueError(difference)
            if (vae.layout.latent_channels, vae.layout.upscale) != (declared.latent_channels, declared.upscale):
                raise WrongWeights(difference, declared.vae_class, vae.layout.latent_channels, declared)
            logger.warning("%s; these weights are used nevertheless", difference)
        logger.info("running on %s in %s", device, dtype)
        if is_cpu and dtype == torch.float16 and not has_instructions(dtype):
            logger.warning(
                "this processor has no instructions for float16, which takes up to 190 times as long as float32; "
                "unset VAE_DTYPE, or set it to bfloat16 or float32"
            )
        return vae

    @property
    def current_dtype(self) -> torch.dtype:
        """Dtype of the weights now: float32 while a pass that overflowed is repeated."""
        return next(self.model.parameters()).dtype

    def decode(
        self,
        latents: Tensor,
        gather: Callable[[Iterator[Tensor]], T] = join,  # type: ignore[assignment]  # T is Tensor by default
        options: DecodeOptions = DecodeOptions(),  # noqa: B008
    ) -> tuple[T, Mode]:
        """Decode raw latents [B, C, (F,) h, w] to pixels [B, 3, (F,) H, W], about in [-1, 1].

        `gather` makes the result while the latents are decoded. It gets all images at once, or the next frames
        [B, 3, f, H, W] of videos as soon as they are finished. When a pass fails and another one runs, `gather` runs
        again.
        """

        def chunks(model: Any, z: Tensor, one_by_one: bool) -> Iterator[Tensor]:
            if one_by_one and len(z) > 1:
                yield torch.cat([join(chunks(model, item, False)) for item in z.split(1)])
                return
            for pixels in decode_chunks(model, z, options):
                pixels = self.pixel_range.from_own(shuffle(pixels, self.layout.upscale))
                yield self._check_finite(pixels.squeeze(2) if pixels.ndim > self.layout.pixels_ndim else pixels)

        return self._run("decode", latents, lambda *inputs: gather(chunks(*inputs)), options.exact)

    def encode(self, pixels: Tensor, options: EncodeOptions = EncodeOptions()) -> tuple[Tensor, Mode]:  # noqa: B008
        """Encode pixels in [-1, 1], [B, 3, H, W] or [B, 3, F, H, W], to raw latents (see `Layout`)."""

        def forward(model: Any, x: Tensor, one_by_one: bool) -> Tensor:
            return self._check_finite(encode_at_once(model, self.pixel_range.to_own(x), options, one_by_one))

        return self._run("encode", pixels, forward, options.exact)

    def _check_finite(self, result: Tensor) -> Tensor:
        """Return the result in the VAE's dtype. Raise `FloatingPointError` for NaN or infinity."""
        result = result.to(self.dtype)
        if not result.isfinite().all():
            raise FloatingPointError
        return result

    @torch.no_grad()
    def _run(
        self, task: Task, inputs: Tensor, forward: Callable[[Any, Tensor, bool], T], exact: bool
    ) -> tuple[T, Mode]:
        """Run `forward` in the model's dtype. After an overflow, or without a kernel for the dtype, repeat in float32.

        Args:
            forward: function of the model, of the inputs on its device, and of whether to take them one by one.

        Raises:
            RequestError: float32 overflows too (422), or the memory does not suffice (422, 503).
        """
        with HEAP.settle() if self.device.type == "cpu" else nullcontext():
            try:
                return self._try_modes(task, inputs, forward, exact)
            except FloatingPointError:
                reason = "is not finite"
            except RuntimeError as error:
                if "not implemented for" not in str(error) or self.dtype == torch.float32:
                    raise
                reason = str(error).splitlines()[0]  # from older versions of torch on a CPU
            if self.dtype != torch.float32:
                logger.warning("%s of %s in %s: %s; repeated in float32", task, list(inputs.shape), self.dtype, reason)
                metrics.UPCAST.inc()
                try:
                    self.model.to(torch.float32)
                    with suppress(FloatingPointError):
                        return self._try_modes(task, inputs, forward, exact)
                finally:
                    self.model.to(self.dtype)  # exact, because the weights were in this dtype
        raise RequestError(
            f"the VAE gives NaN or infinity for this {task} request, even in float32: its input is out of the model's "
            "range; raw latents are about normal, pixels are in [-1, 1]",
            422,
        )

    def _try_modes(
        self, task: Task, inputs: Tensor, forward: Callable[[Any, Tensor, bool], T], exact: bool
    ) -> tuple[T, Mode]:
        """Run `forward` in the best mode that fits in memory. When memory runs out, try the next one."""
        for mode in self._plan(task, inputs.shape, exact):
            self.mode, self.model.use_tiling = mode, mode is Mode.TILED
            one_by_one = mode in (Mode.SLICED, Mode.TILED) and len(inputs) > 1
            try:
                with self._pass(task, mode) as (model, dtype):
                    return forward(model, inputs.to(self.device, dtype), one_by_one), mode
            except PassStopped as stop:
                raise stop.with_traceback(None)  # noqa: B904  # its frames refer to the tensors of the pass
            except (RuntimeError, ValueError) as error:
                self._check_out_of_memory(error, task, inputs.shape, mode)
                logger.warning("out of memory with %s in mode %s: %s", list(inputs.shape), mode.value, error)
                metrics.OUT_OF_MEMORY.inc()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        raise self._no_free_memory(task, inputs.shape, exact)

    def _check_out_of_memory(self, error: Exception, task: Task, shape: Sequence[int], mode: Mode) -> None:
        """Raise an error other than a lack of memory. It is the request's if the model cannot take its shape."""
        if is_out_of_memory(error, self.device):
            return
        if not self.probe.refuses(task, shape, mode is Mode.TILED):
            raise error
        reason = str(error).splitlines()[0]
        message = f"this model cannot {task} `shape` {list(shape)} in mode {mode.value}: {reason}"
        raise RequestError(message, 422) from error

    def _plan(self, task: Task, shape: Sequence[int], exact: bool) -> list[Mode]:
        """Return the modes to try for inputs of this shape, and make room for the first one.

        Raises:
            RequestError: the least mode does not fit in this device (422), or on a CPU in its free memory (503).
        """
        batch, is_cpu = shape[0], self.device.type == "cpu"
        estimate, offered = self._estimate(task, shape), self._offered(task, shape, exact)
        if is_cpu:
            HEAP.make_room(estimate.needed(offered[0], batch))
        free = HEAP.available() if is_cpu else free_memory(self.device)
        modes = choose_modes(estimate, batch, free, self._capacity(), offered)
        if not modes:
            raise self._too_large(task, shape, exact)
        if is_cpu:
            needed = estimate.needed(modes[0], batch)
            if needed > free:  # the system would kill the process
                raise self._no_free_memory(task, shape, exact)
            HEAP.planned = needed
        return modes

    @contextmanager
    def _make_room(self, task: Task, shape: Sequence[int]) -> Iterator[None]:
        """Make room for diffusers' own pass in a `with` block.

        Raises:
            RequestError: see `_plan`.
        """
        with HEAP.settle() if self.device.type == "cpu" else nullcontext():
            self._plan(task, shape, exact=True)
            yield

    def check_capacity(self, task: Task, shape: Sequence[int], exact: bool) -> None:
        """Raise `RequestError`, status 422, for inputs whose pass never fits in this device."""
        estimate = self._estimate(task, shape)
        least = estimate.least(self._offered(task, shape, exact), shape[0])
        if estimate.needed(least, shape[0]) > self._capacity():
            raise self._too_large(task, shape, exact)

    def _estimate(self, task: Task, shape: Sequence[int]) -> Estimate:
        fast = self.fast.used(task)
        of_fast = (fast.dtype.itemsize, fast.workspace) if fast else ()
        return self.memory.estimate(task, self.layout, shape, self.current_dtype.itemsize, *of_fast)

    def _capacity(self) -> int:
        """Return the most bytes that a pass can ever get."""
        return HEAP.capacity() if self.device.type == "cpu" else total_memory(self.device)

    def _too_large(self, task: Task, shape: Sequence[int], exact: bool) -> RequestError:
        need, hint = self._describe_need(task, shape, exact)
        return RequestError(f"{need}, and this device has {self._capacity() / 1e9:.1f} GB for it{hint}", 422)

    def _no_free_memory(self, task: Task, shape: Sequence[int], exact: bool) -> RequestError:
        need, hint = self._describe_need(task, shape, exact)
        return RequestError(f"{need}, which this device does not have free now; try again soon{hint}", 503)

    def _describe_need(self, task: Task, shape: Sequence[int], exact: bool) -> tuple[str, str]:
        """Return the memory of the mode that needs least, and a hint how to need less, for error texts."""
        estimate = self._estimate(task, shape)
        offered = self._offered(task, shape, exact)
        gigabytes = estimate.needed(estimate.least(offered, shape[0]), shape[0]) / 1e9
        need = f"`shape` {list(shape)} takes about {gigabytes:.1f} GB of memory"
        if exact:
            return f"{need} in diffusers' own pass", "; without `exact` (or VAE_EXACT) it may take less"
        return need + (" even in tiles" if Mode.TILED in offered else ", and this model has no tiles for it"), ""

    @contextmanager
    def _pass(self, task: Task, mode: Mode) -> Iterator[tuple[Any, torch.dtype]]:
        """Install the forward pass of a mode for a `with` block. Return the model to call, and the dtype of inputs."""
        fast = self.fast.used(task) if mode is Mode.FAST else None
        model, dtype = (fast.model, fast.dtype) if fast else (self.model, self.current_dtype)
        installed = fast.installed() if fast else nullcontext() if mode is Mode.FULL else reduced_peak(model)
        try:
            with installed:
                yield model, dtype
        finally:
            forget(model)

    def _offered(self, task: Task, shape: Sequence[int], exact: bool) -> list[Mode]:
        """Return the modes of this model for inputs of this shape, best first.

        Raises:
            RequestError: `exact` is set, and diffusers cannot run a batch; status 422.
        """
        batch = shape[0]
        whole = batch == 1 or self.declared.runs_batches
        if exact and not whole:
            raise RequestError("`exact`: diffusers runs no batch through this model; send one at a time", 422)
        if self.declared.always_tiles:
            return [Mode.TILED]
        if exact:
            return [Mode.FULL]
        fast = whole and self.fast.used(task, self.layout.frame_pixels(task, shape)) is not None
        has = {
            Mode.FAST: fast,
            Mode.FULL: whole and not fast,
            Mode.REDUCED: whole and self.memory.reduces,
            Mode.SLICED: batch > 1,
            Mode.TILED: task in self.declared.tiles,
        }
        return [mode for mode in Mode if has[mode]]

    def is_alive(self) -> bool:
        """Return whether the device still computes. After an unrecoverable error of CUDA it does not."""
        try:
            return torch.ones(2, device=self.device).sum().item() == 2
        except RuntimeError:
            return False

    def to_cpu(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the CPU. From a GPU it goes through pinned memory, which is several times as fast."""
        if self.device.type != "cuda":
            return tensor.cpu()
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor)


def _statistics(model: Any) -> dict[str, Any]:
    """Return the statistics in the checkpoint's buffers: of a BatchNorm, or mean and deviation of latents."""
    state = model.state_dict()
    return {
        name: buffer.cpu().double().tolist()
        for name, buffer in model.named_buffers()
        if name in state and buffer.numel() <= MAX_STATISTICS
    }


def _tile_pixels(model: Any) -> int:
    """Return the pixels of the model's tiles, from its config; the largest integer for a model without tiles."""
    side = getattr(model, "tile_sample_min_size", None)
    height = side or getattr(model, "tile_sample_min_height", None)
    width = side or getattr(model, "tile_sample_min_width", None)
    return sys.maxsize if height is None or width is None else height * width
