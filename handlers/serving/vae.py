"""The model: where its weights come from, the device it runs on, its two forward passes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import diffusers
import torch
from torch import Tensor

from handlers.serving import metrics
from handlers.serving.errors import RequestError
from handlers.serving.heap import HEAP, map_gpu_memory
from handlers.serving.layout import Layout
from handlers.serving.low_memory import reduced_peak
from handlers.serving.memory import (
    MemoryUse,
    Mode,
    choose_modes,
    free_memory,
    is_out_of_memory,
    total_memory,
)
from handlers.serving.request import Task
from handlers.serving.settings import Settings
from handlers.serving.spans import decode_spans, join

if TYPE_CHECKING:
    from handlers.base import EndpointHandler

T = TypeVar("T")

logger = logging.getLogger(__name__)

BATCH_PIXELS = 1024 * 1024
"""Pixels of pictures that go through a GPU as one batch: four of 512x512, which alone leave a large GPU idle in part.

A CPU is busy with one, so it takes them one by one.
"""


class VAE:
    """A diffusers autoencoder on its device. It takes tensors from any device; what it gives is on its own."""

    def __init__(self, model: Any, handler: type[EndpointHandler]) -> None:
        self.model = model.eval().requires_grad_(False)
        self.dtype: torch.dtype = model.dtype
        self.config = model.config
        self.layout = Layout.of_config(model.config, handler.kind)
        self.memory = MemoryUse(*handler.values_per_pixel, _tile_pixels(model), handler.frames_at_once)
        self.batch_limit = 0 if self.device.type == "cpu" else BATCH_PIXELS

    @classmethod
    def load(cls, handler: type[EndpointHandler], path: str, settings: Settings, device: str) -> VAE:
        """Loads the weights of `handler`'s model: from `settings.weights`, the repository at `path`, or its checkpoint.

        Raises:
            FileNotFoundError: `settings.weights` names a folder that holds no VAE of the model's class.
        """
        HEAP.keep()
        dtype = getattr(torch, settings.dtype or ("float32" if torch.device(device).type == "cpu" else handler.dtype))
        vae_class = getattr(diffusers, handler.vae_class)
        if settings.weights == "random":
            logger.warning("the weights are RANDOM: good for speed and memory, not for pictures")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = vae_class.from_config(handler.published_config).to(dtype)
        else:
            source, options = _find_weights(handler, path, settings)
            logger.info("loading %s from %s", handler.vae_class, source)
            model = vae_class.from_pretrained(source, torch_dtype=dtype, use_safetensors=True, **options)
        logger.info("running on %s in %s", device, dtype)
        return cls(model.to(device), handler)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def decode(self, latents: Tensor, gather: Callable[[Iterator[Tensor]], T] = join) -> tuple[T, Mode]:
        """Raw latents [B, C, H, W] or [B, C, F, H, W] to pixels, about in [-1, 1].

        `gather` makes the result of them while they are decoded: it gets pictures at once, and of videos the next
        frames [B, 3, f, H, W] as soon as they are finished. Where a pass fails and another is tried, so is `gather`.
        """
        return self._run("decode", latents, lambda z: gather(map(self._finite, decode_spans(self.model, z))))

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Mode]:
        """Pixels in [-1, 1], [B, 3, H, W] or [B, 3, F, H, W], to raw latents.

        Gives the mode of the encoder's distribution, or a sample of it where a generator is given.
        """

        def forward(x: Tensor) -> Tensor:
            posterior = self.model.encode(x, return_dict=False)[0]
            if isinstance(posterior, Tensor):  # the autoencoders that are not variational, AutoencoderTiny for one
                return self._finite(posterior)
            return self._finite(posterior.mode() if generator is None else posterior.sample(generator))

        return self._run("encode", pixels, forward)

    def _finite(self, result: Tensor) -> Tensor:
        """In the VAE's dtype, whichever it was made in; or `FloatingPointError`."""
        result = result.to(self.dtype)
        if not result.isfinite().all():
            raise FloatingPointError
        return result

    @torch.no_grad()
    @HEAP.settle()
    def _run(self, task: Task, inputs: Tensor, forward: Callable[[Tensor], T]) -> tuple[T, Mode]:
        """Runs in the model's dtype; where that overflows, once more in float32.

        Raises:
            RequestError: not even float32 gives finite numbers (422), or the memory does not suffice.
        """
        with suppress(FloatingPointError):
            return self._fit(task, inputs, forward)
        if self.dtype != torch.float32:
            logger.warning("%s of %s is not finite in %s; once more in float32", task, list(inputs.shape), self.dtype)
            metrics.UPCAST.inc()
            try:
                self.model.to(torch.float32)
                with suppress(FloatingPointError):
                    return self._fit(task, inputs, forward)
            finally:
                self.model.to(self.dtype)  # exact: these weights were in it
        raise RequestError(
            f"the VAE gives NaN or infinity for this {task} request, in float32 too: its input is out of the range "
            "that the model knows; raw latents are about normal, pixels are in [-1, 1]",
            422,
        )

    def _fit(self, task: Task, inputs: Tensor, forward: Callable[[Tensor], T]) -> tuple[T, Mode]:
        """Runs in the best mode that memory allows, and one step down when it turns out not to.

        Raises:
            RequestError: not even tiles fit: in this device (422), or now (503).
        """
        estimate = self.memory.estimate(task, self.layout, inputs.shape, self.model.dtype.itemsize)
        needed = f"`shape` {list(inputs.shape)} takes about {estimate.tiled / 1e9:.1f} GB of memory even in tiles"
        capacity = total_memory(self.device)
        if self.device.type == "cpu":
            HEAP.make_room(estimate.full * len(inputs))
        modes = choose_modes(estimate, len(inputs), free_memory(self.device), capacity)
        if not modes:
            raise RequestError(f"{needed}, and this device has {capacity / 1e9:.1f} GB", 422)
        for mode in modes:
            self.model.use_slicing = mode in (Mode.SLICED, Mode.TILED)
            self.model.use_tiling = mode is Mode.TILED
            way = nullcontext() if mode is Mode.FULL else reduced_peak(self.model)
            try:
                with way:
                    return forward(inputs.to(self.device, self.model.dtype)), mode
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("out of memory with %s in mode %s: %s", list(inputs.shape), mode.value, error)
                metrics.OUT_OF_MEMORY.inc()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        raise RequestError(f"{needed}, which this device does not have free now; try again soon", 503)

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


def devices(device: str | None) -> list[str]:
    """The devices to run on: the one that is named, or every GPU, or the CPU.

    Raises:
        ValueError: it is no device of this machine.
    """
    map_gpu_memory()
    if device:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"VAE_DEVICE: torch cannot use {device!r} here ({reason})") from None
        return [device]
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["mps" if torch.backends.mps.is_available() else "cpu"]


def _tile_pixels(model: Any) -> int:
    """Of the tiles that the model cuts a picture into, as its config says: 256x256 to 1024x1024 for those here."""
    side = getattr(model, "tile_sample_min_size", None)
    height = side or getattr(model, "tile_sample_min_height", None)
    width = side or getattr(model, "tile_sample_min_width", None)
    if height is None or width is None:  # one that knows no tiles
        return sys.maxsize
    return height * width * getattr(model, "tile_sample_min_num_frames", 1)


def _find_weights(handler: type[EndpointHandler], path: str, settings: Settings) -> tuple[str, dict[str, Any]]:
    """The folder or repository to load from, and `from_pretrained`'s further arguments."""
    if settings.weights:
        folder = _vae_folder(Path(settings.weights), handler.vae_class)
        if folder is None:
            raise FileNotFoundError(
                f"VAE_WEIGHTS={settings.weights} holds no {handler.vae_class}: neither the folder nor its vae/ has a "
                "config.json of that class"
            )
        return str(folder), {}
    if path and (folder := _vae_folder(Path(path), handler.vae_class)):
        return str(folder), {}
    return handler.checkpoint, {"subfolder": handler.subfolder, "revision": settings.revision}


def _vae_folder(folder: Path, vae_class: str) -> Path | None:
    for candidate in (folder, folder / "vae"):
        file = candidate / "config.json"
        config = json.loads(file.read_text()) if file.is_file() else None
        if isinstance(config, dict) and config.get("_class_name") == vae_class:
            return candidate
    return None
