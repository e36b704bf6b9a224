"""Ways to run a decoder, each against diffusers' eager pass by turns: which of them pay on this device."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.forward import (
    Size,
    by_turns,
    exact_result,
    fast_call,
    inputs,
    peak_signal_noise_ratio,
    plain_call,
    synchronize,
    time_ratio,
)
from benchmarks.peak import allocated_peak
from handlers.serving.vae.fast.forward import FastPass
from handlers.serving.vae.low_memory import reduce_peak

BlockOps = Callable[[Any, Tensor], Callable[[], Tensor]]
"""Changes a model that is its own and gives the call that decodes these latents; the first call may set things up."""


def channels_last(model: Any, latents: Tensor) -> Callable[[], Tensor]:
    memory_format = torch.channels_last if latents.ndim == 4 else torch.channels_last_3d
    model.to(memory_format=memory_format)
    return plain_call(model, "decode", latents.to(memory_format=memory_format))


def compiled(model: Any, latents: Tensor) -> Callable[[], Tensor]:
    model.decoder.compile(dynamic=False)
    return plain_call(model, "decode", latents)


def compiled_channels_last(model: Any, latents: Tensor) -> Callable[[], Tensor]:
    model.decoder.compile(dynamic=False)
    return channels_last(model, latents)


def compiled_blocks(model: Any, latents: Tensor) -> Callable[[], Tensor]:
    for block in model.decoder.up_blocks:
        block.compile(dynamic=False)
    return plain_call(model, "decode", latents)


def reduced(model: Any, latents: Tensor) -> Callable[[], Tensor]:
    reduce_peak(model)
    return plain_call(model, "decode", latents)


def fast(model: Any, latents: Tensor) -> Callable[[], Tensor]:
    return fast_call(model, "decode", latents)


def fast_in_torch(model: Any, latents: Tensor) -> Callable[[], Tensor]:
    """Without kernels of our own, in the layout that the model has."""
    return fast_call(model, "decode", latents, FastPass(model))


def data_movement_only(model: Any, latents: Tensor) -> Callable[[], Tensor]:
    """The same arithmetic as diffusers', with fewer copies."""
    return fast_call(model, "decode", latents, FastPass(model, fold=False))


class TransposedPass(FastPass):
    """An upsampling and its convolution as one transposed convolution: 4 multiplications instead of 9 too."""

    def _upsample_image(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        a, b, c = conv.weight.float().unbind(-1)
        wide = torch.stack([c, b + c, a + b, a], dim=-1)
        a, b, c = wide.unbind(-2)
        kernel = torch.stack([c, b + c, a + b, a], dim=-2).transpose(0, 1).to(x.dtype)
        return F.conv_transpose2d(x, kernel, conv.bias, stride=2, padding=1)


def transposed(model: Any, latents: Tensor) -> Callable[[], Tensor]:
    return fast_call(model, "decode", latents, TransposedPass(model))


def cudnn_benchmark(model: Any, latents: Tensor) -> Callable[[], Tensor]:
    decode = plain_call(model, "decode", latents)

    def call() -> Tensor:
        torch.backends.cudnn.benchmark = True
        try:
            return decode()
        finally:
            torch.backends.cudnn.benchmark = False

    return call


def cuda_graph(model: Any, latents: Tensor) -> Callable[[], Tensor]:
    decode = plain_call(model, "decode", latents)
    graph = torch.cuda.CUDAGraph()
    result: list[Tensor] = []

    def call() -> Tensor:
        if not result:
            decode()  # sets up the libraries, which a capture does not allow
            with torch.cuda.graph(graph):
                result.append(decode())
        graph.replay()
        return result[0]

    return call


WAYS: dict[str, BlockOps] = {
    "fast": fast,
    "data movement only": data_movement_only,
    "channels_last": channels_last,
    "reduced memory": reduced,
    "compiled up blocks": compiled_blocks,
}
CUDA_WAYS: dict[str, BlockOps] = {
    "fast, torch's operators alone": fast_in_torch,
    "the same, upsampling by a transposed convolution": transposed,
    "compiled decoder": compiled,
    "compiled decoder, channels_last": compiled_channels_last,
    "cudnn.benchmark": cudnn_benchmark,
    "CUDA graph": cuda_graph,
}
"""On a CPU a whole decoder compiles three times as long as its up blocks and is no quicker: benchmarks/NOTES.md."""


def ways(device: str) -> dict[str, BlockOps]:
    """Those worth a comparison on a device."""
    return WAYS | (CUDA_WAYS if torch.device(device).type == "cuda" else {})


@contextmanager
def empty_compiler_cache() -> Iterator[None]:
    """As on a machine that never compiled this model."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


class Eager:
    """One decode of a model as diffusers runs it, in the model's dtype: what each way is compared with."""

    def __init__(self, key: str, model: Any, size: Size, repeats: int) -> None:
        self.model, self.device, self.repeats = model, model.device, repeats
        self.latents = inputs(key, "decode", size).to(model.device, model.dtype)
        self.call = plain_call(model, "decode", self.latents)
        result = self.call()
        self.exact = result if model.dtype == torch.float32 else exact_result(model, "decode", self.latents)
        self.peak = allocated_peak(self.call, self.device)
        self.about = {
            "model": key,
            "size": size,
            "dtype": str(model.dtype).removeprefix("torch."),
            "eager_peak_mb": self.peak / 2**20,
            "eager_psnr_db": peak_signal_noise_ratio(result, self.exact),
        }

    def compare(self, name: str, way: BlockOps) -> dict[str, Any]:
        """Time, peak and PSNR of a way; where it does not run here, one line that says why, as `failed`."""
        row = {**self.about, "way": name}
        try:
            return row | self._measure(way)
        except Exception as error:  # of any library below: no compiler, an operator that cannot be captured
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return row | {"failed": f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]}
        finally:
            torch.compiler.reset()
            self._reserved()

    def _measure(self, way: BlockOps) -> dict[str, Any]:
        start = perf_counter()
        call = way(deepcopy(self.model), self.latents)
        before = self._reserved()
        with empty_compiler_cache():
            result = call()
        synchronize(self.device)
        first = perf_counter() - start
        psnr = peak_signal_noise_ratio(result, self.exact)
        del result
        kept = max(0, self._reserved() - before)  # between two calls: what a CUDA graph works in
        peak = kept + allocated_peak(call, self.device)
        times = by_turns({"eager": self.call, "way": call}, self.device, self.repeats)
        return {
            "first_call_seconds": first,
            "eager_seconds": statistics.median(times["eager"]),
            "seconds": statistics.median(times["way"]),
            "times": times,
            "time_ratio": time_ratio(times["way"], times["eager"]),
            "peak_mb": peak / 2**20,
            "peak_ratio": peak / self.peak,
            "psnr_db": psnr,
        }

    def _reserved(self) -> int:
        """Bytes of a GPU that nothing can give back; frees the rest."""
        gc.collect()
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)
