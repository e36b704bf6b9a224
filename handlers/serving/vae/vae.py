"""The model: where its weights come from, the device it runs on, its passes in each mode."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from handlers.model import Model, Task
from handlers.serving import metrics
from handlers.serving.errors import RequestError
from handlers.serving.settings import Settings
from handlers.serving.vae.autoencoder import DecodeOptions, EncodeOptions, encode_at_once, forget
from handlers.serving.vae.blocks import is_known
from handlers.serving.vae.chunks import decode_chunks, join
from handlers.serving.vae.fast.check import FastPasses
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
from handlers.serving.vae.probe import Probe, differs
from handlers.serving.vae.stop import PassStopped, make_stoppable
from handlers.serving.vae.weights import load_model

T = TypeVar("T")

logger = logging.getLogger(__name__)


class VAE:
    """A diffusers autoencoder on its device. It takes tensors from any device; what it gives is on its own."""

    def __init__(self, model: Any, declared: type[Model], fast: bool = False, name: str = "") -> None:
        """`name` is the model's in metrics; `fast`, whether the fast pass is wanted."""
        self.model = model.eval().requires_grad_(False)
        self.dtype: torch.dtype = model.dtype
        self.config = model.config
        self.declared = declared
        self.probe = Probe(model)
        self.layout = self.probe.layout(declared)
        self.memory = MemoryUse(declared, is_known(model), _tile_pixels(model))
        self.fast = FastPasses(self.model, declared, wanted=fast, name=name)
        make_stoppable(self.model)
        self.mode = Mode.FULL
        """Of the pass that runs now, or ran last."""

    @classmethod
    def load(cls, declared: type[Model], path: str, settings: Settings, device: str) -> VAE:
        """Load a model onto a device. `load_model` says where its weights come from.

        Raises:
            OSError: `settings.weights` names a folder that holds no VAE of the model's class, or the Hub does not give
                the checkpoint.
            ValueError: the weights are not what the model declares, or diffusers does not have its class.
        """
        is_cpu = torch.device(device).type == "cpu"
        HEAP.keep(pages=is_cpu)
        dtype = getattr(torch, settings.dtype or ("float32" if is_cpu else declared.dtype))
        model = load_model(declared, path, settings, dtype)
        vae = cls(model.to(device), declared, settings.fast, settings.model or "")
        if difference := differs(vae.layout, declared):
            if settings.weights in (None, "random"):
                raise ValueError(difference)
            logger.warning("%s; these weights are taken as they are", difference)
        logger.info("running on %s in %s", device, dtype)
        return vae

    @property
    def device(self) -> torch.device:
        return self.model.device

    def decode(
        self,
        latents: Tensor,
        gather: Callable[[Iterator[Tensor]], T] = join,  # type: ignore[assignment]  # of which T is Tensor
        options: DecodeOptions = DecodeOptions(),  # noqa: B008
    ) -> tuple[T, Mode]:
        """Raw latents [B, C, H, W] or [B, C, F, H, W] to pixels, about in [-1, 1], [B, 3, H, W] or [B, 3, F, H, W].

        `gather` makes the result of them while they are decoded: it gets pictures at once, and of videos the next
        frames [B, 3, f, H, W] as soon as they are finished. Where a pass fails and another is tried, so is `gather`.
        """

        def chunks(z: Tensor, one_by_one: bool) -> Iterator[Tensor]:
            if one_by_one and len(z) > 1:
                yield torch.cat([join(chunks(item, False)) for item in z.split(1)])
                return
            for pixels in decode_chunks(self.model, z, options):
                yield self._finite(pixels.squeeze(2) if pixels.ndim > self.layout.pixels_ndim else pixels)

        return self._run("decode", latents, lambda z, one_by_one: gather(chunks(z, one_by_one)), options.exact)

    def encode(self, pixels: Tensor, options: EncodeOptions = EncodeOptions()) -> tuple[Tensor, Mode]:  # noqa: B008
        """Pixels in [-1, 1], [B, 3, H, W] or [B, 3, F, H, W], to raw latents, of pictures [B, C, 1, H, W] by some."""

        def forward(x: Tensor, one_by_one: bool) -> Tensor:
            return self._finite(encode_at_once(self.model, x, options, one_by_one))

        return self._run("encode", pixels, forward, options.exact)

    def _finite(self, result: Tensor) -> Tensor:
        """In the VAE's dtype, whichever it was made in; or `FloatingPointError`."""
        result = result.to(self.dtype)
        if not result.isfinite().all():
            raise FloatingPointError
        return result

    @torch.no_grad()
    def _run(self, task: Task, inputs: Tensor, forward: Callable[[Tensor, bool], T], exact: bool) -> tuple[T, Mode]:
        """Runs `forward` with the inputs on the device, and whether it shall take them one by one."""
        with HEAP.settle() if self.device.type == "cpu" else nullcontext():
            return self._run_finite(task, inputs, forward, exact)

    def _run_finite(
        self, task: Task, inputs: Tensor, forward: Callable[[Tensor, bool], T], exact: bool
    ) -> tuple[T, Mode]:
        """Runs in the model's dtype; where that overflows, or torch has no kernel for it, once more in float32.

        Raises:
            RequestError: not even float32 gives finite numbers (422), or the memory does not suffice.
        """
        try:
            return self._fit(task, inputs, forward, exact)
        except FloatingPointError:
            reason = "is not finite"
        except RuntimeError as error:
            if "not implemented for" not in str(error) or self.dtype == torch.float32:
                raise
            reason = str(error).splitlines()[0]  # of older versions, on a CPU
        if self.dtype != torch.float32:
            logger.warning("%s of %s in %s: %s; in float32 then", task, list(inputs.shape), self.dtype, reason)
            metrics.UPCAST.inc()
            try:
                self.model.to(torch.float32)
                with suppress(FloatingPointError):
                    return self._fit(task, inputs, forward, exact)
            finally:
                self.model.to(self.dtype)  # exact: these weights were in it
        raise RequestError(
            f"the VAE gives NaN or infinity for this {task} request, in float32 too: its input is out of the range "
            "that the model knows; raw latents are about normal, pixels are in [-1, 1]",
            422,
        )

    def _fit(self, task: Task, inputs: Tensor, forward: Callable[[Tensor, bool], T], exact: bool) -> tuple[T, Mode]:
        """Runs in the best mode that memory allows, and one step down when it turns out not to.

        Raises:
            RequestError: not even tiles fit: in this device (422), or now (503).
        """
        estimate = self.memory.estimate(task, self.layout, inputs.shape, self.model.dtype.itemsize)
        offered = self._offered(task, len(inputs), exact)
        if self.device.type == "cpu":
            HEAP.make_room(estimate.of(offered[0], len(inputs)))
            free = HEAP.available()
        else:
            free = free_memory(self.device)
        capacity = self._capacity()
        modes = choose_modes(estimate, len(inputs), free, capacity, offered)
        needed = _needed(inputs.shape, estimate, offered[-1], exact)
        if not modes:
            raise RequestError(f"{needed}, and this device has {capacity / 1e9:.1f} GB for it", 422)
        if self.device.type == "cpu" and estimate.of(modes[0], len(inputs)) > free:  # which says so by being killed
            raise RequestError(f"{needed}, which this device does not have free now; try again soon", 503)
        if self.device.type == "cpu":
            HEAP.planned = estimate.of(modes[0], len(inputs))
        for mode in modes:
            self.mode, self.model.use_tiling = mode, mode is Mode.TILED
            one_by_one = mode in (Mode.SLICED, Mode.TILED) and len(inputs) > 1
            try:
                with self._pass(mode):
                    return forward(inputs.to(self.device, self.model.dtype), one_by_one), mode
            except PassStopped as stop:
                raise stop.with_traceback(None)  # noqa: B904  # whose frames hold the pass's tensors
            except (RuntimeError, ValueError) as error:
                if not is_out_of_memory(error):
                    if not self.probe.refuses(task, inputs.shape, mode is Mode.TILED):
                        raise
                    shape, reason = list(inputs.shape), str(error).splitlines()[0]
                    message = f"this model cannot {task} `shape` {shape} in mode {mode.value}: {reason}"
                    raise RequestError(message, 422) from error
                logger.warning("out of memory with %s in mode %s: %s", list(inputs.shape), mode.value, error)
                metrics.OUT_OF_MEMORY.inc()
            finally:
                forget(self.model)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        raise RequestError(f"{needed}, which this device does not have free now; try again soon", 503)

    def check_capacity(self, task: Task, shape: Sequence[int], exact: bool) -> None:
        """Refuse a pass over inputs of this shape that this device will never have the memory for; status 422."""
        estimate = self.memory.estimate(task, self.layout, shape, self.model.dtype.itemsize)
        least, capacity = self._offered(task, shape[0], exact)[-1], self._capacity()
        if estimate.of(least, shape[0]) > capacity:
            needed = _needed(shape, estimate, least, exact)
            raise RequestError(f"{needed}, and this device has {capacity / 1e9:.1f} GB for it", 422)

    def _capacity(self) -> int:
        """Bytes that a pass could get at best."""
        return HEAP.capacity() if self.device.type == "cpu" else total_memory(self.device)

    def _pass(self, mode: Mode) -> AbstractContextManager[None]:
        """Whose forward pass the model runs in this mode: the one place that chooses."""
        match mode:
            case Mode.FAST:
                return self.fast.installed()
            case Mode.FULL:
                return nullcontext()
            case Mode.REDUCED | Mode.SLICED | Mode.TILED:
                return reduced_peak(self.model)

    def _offered(self, task: Task, batch: int, exact: bool) -> list[Mode]:
        """The modes that this model has for a batch of so many, from the best.

        Raises:
            RequestError: it is to be exact, and diffusers cannot run a batch; status 422.
        """
        whole = batch == 1 or self.declared.runs_batches
        if exact:
            if not whole:
                raise RequestError("`exact`: diffusers runs no batch through this model; send one at a time", 422)
            return [Mode.FULL]
        fast = whole and self.fast.on(task, self.model.dtype)
        has = {
            Mode.FAST: fast,
            Mode.FULL: whole and not fast,
            Mode.REDUCED: whole and self.memory.reduces,
            Mode.SLICED: batch > 1,
            Mode.TILED: task in self.declared.tiles,
        }
        return [mode for mode in Mode if has[mode]]

    def is_alive(self) -> bool:
        """Whether the device still computes; after an unrecoverable error of CUDA nothing does."""
        try:
            return torch.ones(2, device=self.device).sum().item() == 2
        except RuntimeError:
            return False

    def to_cpu(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU, through pinned memory, which a GPU fills several times as fast."""
        if self.device.type != "cuda":
            return tensor.cpu()
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor)


def _needed(shape: Sequence[int], estimate: Estimate, least: Mode, exact: bool) -> str:
    """What a pass over inputs of this shape takes in the mode that needs least, for messages."""
    needed = f"`shape` {list(shape)} takes about {estimate.of(least, shape[0]) / 1e9:.1f} GB of memory"
    if exact:
        return f"{needed} in diffusers' own pass; without `exact` it may take less"
    return needed + (" even in tiles" if least is Mode.TILED else ", and there are no tiles for it")


def _tile_pixels(model: Any) -> int:
    """Of one of the tiles that the model cuts a picture into, as its config says."""
    side = getattr(model, "tile_sample_min_size", None)
    height = side or getattr(model, "tile_sample_min_height", None)
    width = side or getattr(model, "tile_sample_min_width", None)
    if height is None or width is None:  # one that knows no tiles
        return sys.maxsize
    return height * width
