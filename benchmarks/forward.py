"""The VAE itself: plain diffusers, this project, its fast pass and its reduced-memory pass."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.memory import latent_frames
from benchmarks.peak import allocated_peak, peak_bytes
from handlers import MODELS
from handlers.serving.settings import Settings
from handlers.serving.vae.autoencoder import has_frames
from handlers.serving.vae.blocks import is_known
from handlers.serving.vae.fast.check import fast_pass
from handlers.serving.vae.fast.forward import FastPass
from handlers.serving.vae.low_memory import reduce_peak, reduced_peak
from handlers.serving.vae.vae import VAE
from handlers.serving.vae.weights import find_class

ATTENTION_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Operator that torch does not count by itself."""
Size = tuple[int, int, int | None]
"""Height and width in pixels, and the frames of a video."""


def load(key: str, device: str) -> tuple[Any, VAE]:
    """Load the model in plain diffusers and in this project, with the same seeded random weights (`tiny`: its own).

    The project runs its fast pass where the check finds it accurate and quicker.
    """
    handler = MODELS[key]
    vae = VAE.load(handler, "", Settings(weights=None if key == "tiny" else "random", fast=True), device)
    check(vae)
    plain = find_class(handler.vae_class).from_config(vae.config)
    plain.load_state_dict(vae.model.state_dict())
    return plain.to(vae.device, vae.dtype).eval().requires_grad_(False), vae


def check(vae: VAE) -> None:
    """Check the fast pass as the service does on an idle device."""
    vae.fast.prepare()
    for _ in vae.fast.check():
        pass


def inputs(key: str, task: str, size: Size) -> Tensor:
    """Return seeded latents or pixels for an image or video of this size: float32, on the CPU."""
    height, width, frames = size
    generator = torch.Generator().manual_seed(0)
    model = MODELS[key]
    factor = model.vae_scale_factor
    if task == "decode":
        time = () if frames is None else (latent_frames(model, frames),)
        return torch.randn(1, model.latent_channels, *time, height // factor, width // factor, generator=generator)
    time = () if frames is None else (frames,)
    return torch.rand(1, 3, *time, height, width, generator=generator) * 2 - 1


def compare(key: str, plain: Any, vae: VAE, task: str, size: Size, repeats: int) -> dict[str, Any]:
    """Compare plain diffusers with this project, its fast and its reduced-memory pass, by ratios."""
    data = inputs(key, task, size).to(vae.device, vae.dtype)
    calls = {
        "plain": plain_call(plain, task, data),
        "project": lambda: getattr(vae, task)(with_frames(vae.model, data) if task == "decode" else data)[0],
        "fast": fast_call(fast_pass(vae.model), task, data) if is_known(vae.model) else plain_call(plain, task, data),
        "reduced": reduced_call(vae.model, task, data),
    }
    results: dict[str, Tensor] = {}
    peaks: dict[str, int] = {}
    for name, call in calls.items():
        if vae.device.type == "cuda":
            call()  # a first call sets up what later ones use
        peaks[name] = allocated_peak(lambda name=name, call=call: results.update({name: call()}), vae.device)
    exact = results["plain"] if vae.dtype == torch.float32 else exact_result(plain, task, data)
    psnr = {name: peak_signal_noise_ratio(result, exact) for name, result in results.items()}
    results.clear()
    del exact
    times = by_turns(calls, vae.device, repeats)
    flop = flops(key, task, size)
    return {
        "model": key,
        "task": task,
        "size": size,
        "dtype": str(vae.dtype).removeprefix("torch."),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "times": times,
        "time_ratio": {name: time_ratio(times[name], times["plain"]) for name in calls if name != "plain"},
        "peak_mb": {name: peak / 2**20 for name, peak in peaks.items()},
        "peak_ratio": {name: peak / peaks["plain"] for name, peak in peaks.items() if name != "plain"},
        "memory_percent": 100 * peaks["project"] / total_memory(vae.device),
        "psnr_db": psnr,
        "tflop": flop / 1e12,
    }


def tiled(key: str, vae: VAE, task: str, size: Size, repeats: int) -> dict[str, Any]:
    """Measure time and memory in tiles of the model's own size, each in reduced memory, as in the service."""
    call = reduced_call(vae.model, task, inputs(key, task, size).to(vae.device, vae.dtype))
    vae.model.use_tiling = True
    try:
        call()
        seconds = statistics.median(timed(call, vae.device) for _ in range(repeats))
        peak = allocated_peak(call, vae.device)
    finally:
        vae.model.use_tiling = False
    percent = 100 * peak / total_memory(vae.device)
    return {"tiled_seconds": seconds, "tiled_peak_mb": peak / 2**20, "tiled_memory_percent": percent}


def fake_peaks(key: str, task: str, size: Size) -> dict[str, Any]:
    """Compute the peaks of live tensors in float32 without running the model, for sizes that take too long here."""
    with FakeTensorMode(), torch.inference_mode():
        model = find_class(MODELS[key].vae_class).from_config(MODELS[key].published_config).eval()
        data = inputs(key, task, size)
        call = plain_call(model, task, data)
        plain = peak_bytes(call)
        reduce_peak(model)
        reduced = peak_bytes(call)
    peak_mb = {"plain": plain / 2**20, "reduced": reduced / 2**20}
    return {"model": key, "task": task, "size": size, "peak_mb": peak_mb, "peak_ratio": {"reduced": reduced / plain}}


def with_frames(model: Any, data: Tensor) -> Tensor:
    """Return an image as a video of one frame, for models that take videos."""
    return data.unsqueeze(2) if data.ndim == 4 and has_frames(model) else data


def plain_call(model: Any, task: str, data: Tensor) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def call() -> Tensor:
        result = getattr(model, task)(with_frames(model, data), return_dict=False)[0]
        if not isinstance(result, Tensor):
            return result.mode()
        return result.squeeze(2) if task == "decode" and data.ndim == 4 and result.ndim == 5 else result

    return call


def reduced_call(model: Any, task: str, data: Tensor) -> Callable[[], Tensor]:
    """Return the pass that the service runs when the plain one does not fit into memory."""
    call = plain_call(model, task, data)

    def reduced() -> Tensor:
        with reduced_peak(model):
            return call()

    return reduced


def fast_call(fast: FastPass, task: str, data: Tensor) -> Callable[[], Tensor]:
    call = plain_call(fast.model, task, data.to(fast.dtype))

    def installed() -> Tensor:
        with fast.installed():
            return call()

    return installed


def exact_result(model: Any, task: str, data: Tensor) -> Tensor:
    """Return the result in float32 with weights rounded to the model's dtype, and restore that dtype.

    By default a GPU's convolutions round float32 to TF32, whose error is half of float16's.
    """
    dtype = model.dtype
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return plain_call(model.float(), task, data.float())()
    finally:
        model.to(dtype)


def by_turns(calls: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each call. The calls take turns, so other load on the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(timed(call, device))
    return times


def time_ratio(times: Sequence[float], against: Sequence[float]) -> float:
    """Return the median of the ratios of the turns: other load in a turn slows both calls."""
    return statistics.median(a / b for a, b in zip(times, against, strict=True))


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of a call, including the work that it queued on a GPU."""
    synchronize(device)
    start = perf_counter()
    call()
    synchronize(device)
    return perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_signal_noise_ratio(result: Tensor, exact: Tensor) -> float | None:
    """Return the PSNR in dB for values in [-1, 1], or None where nothing differs."""
    assert result.shape == exact.shape, (result.shape, exact.shape)
    error = (result.float() - exact.float()).square().mean().item()
    return 10 * math.log10(4 / error) if error else None


def flops(key: str, task: str, size: Size) -> int:
    """Count the multiplications and additions of plain diffusers' convolutions and matrix products."""
    with FakeTensorMode(), torch.no_grad():  # in inference mode torch 2.5 counts nothing
        model = find_class(MODELS[key].vae_class).from_config(MODELS[key].published_config).eval()
        with FlopCounterMode(display=False, custom_mapping={ATTENTION_ON_CPU: attention_flops}) as counter:
            getattr(model, task)(with_frames(model, inputs(key, task, size)))
    return counter.get_total_flops()


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Count the operations of attention, from the shapes of its inputs."""
    return sdpa_flop_count(query, key, value)


MATRIX_SIDES = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices of `matrix_rate`, by the type of device. Others take those of a CPU."""


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Measure the operations a second in a product of two large matrices, the most that this device reaches."""
    size = MATRIX_SIDES.get(torch.device(device).type, MATRIX_SIDES["cpu"])
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * size**3 / min(timed(lambda: a @ b, a.device) for _ in range(10))


def total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total
