"""Questions that only a GPU can decide, in stages: `python -m benchmarks.gpu STAGE[,STAGE ...]`.

Each result is written at once, so a run that is stopped leaves the results so far. `benchmarks/gpu.sh` runs the stages
in an order that fits into two calls of 300 s. With `--device cpu` all stages run at toy sizes, to find mistakes first.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers.models.attention_processor import Attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks import bench, forward
from benchmarks import service as over_http
from benchmarks.peak import allocated_peak
from benchmarks.service import Load
from handlers import MODELS
from handlers.model import Task
from handlers.serving.settings import Settings
from handlers.serving.vae import blocks
from handlers.serving.vae.fast import fused, kernels
from handlers.serving.vae.fast.check import fast_pass
from handlers.serving.vae.fast.forward import FastPass, _fold
from handlers.serving.vae.heap import map_gpu_memory
from handlers.serving.vae.memory import Mode
from handlers.serving.vae.vae import VAE

SECONDS = 15
"""Least time left for the start of a stage or of a model."""
Call = Callable[[], Any]


class Stages:
    """The stages, and their results so far."""

    def __init__(self, device: str, models: list[str], seconds: float, path: Path) -> None:
        """Prepare the stages. None begins in the last `SECONDS` of `seconds`. `path` is the file of the results."""
        self.device, self.models, self.path = torch.device(device), models, path
        self.end = monotonic() + seconds
        self.is_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.is_gpu else torch.float32
        self.scale = 1 if self.is_gpu else 64
        """Divisor of heights and widths."""
        self.results: dict[str, list[dict[str, Any]]] = {}

    @torch.no_grad()
    def run(self, stages: list[str]) -> None:
        for stage in stages:
            if not self.has_time():
                self.write("skipped", stage=stage)
                continue
            try:
                getattr(self, stage)()
            except Exception as error:
                traceback.print_exc()
                self.write("failed", stage=stage, error=f"{type(error).__name__}: {error}"[:200])
            gc.collect()
            if self.is_gpu:
                torch.cuda.empty_cache()

    def has_time(self) -> bool:
        return monotonic() < self.end - SECONDS

    def write(self, stage: str, /, **row: Any) -> None:
        self.results.setdefault(stage, []).append(row)
        self.path.write_text(json.dumps(self.results, indent=1, default=str))
        values = (
            f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in row.items()
        )
        print(f"[{self.end - monotonic():4.0f} s left] {stage}:", *values, flush=True)

    def milliseconds(self, call: Call, seconds: float = 0.4) -> float:
        """Return the median of several turns. Short calls are repeated in a turn, so that a start hardly counts."""
        first, once = forward.timed(call, self.device), forward.timed(call, self.device)
        if not self.is_gpu:
            return min(first, once) * 1000
        count = max(1, int(0.01 / once))
        turns = min(30, max(5, int(seconds / (once * count))))
        times = [forward.timed(partial(repeat, call, count), self.device) for _ in range(turns)]
        return statistics.median(times) / count * 1000

    def image(self, channels: int, height: int, width: int) -> Tensor:
        height, width = max(2, height // self.scale), max(2, width // self.scale)
        image = torch.randn(1, channels, height, width, device=self.device, dtype=self.dtype)
        return kernels.channels_last(image)

    def weight(self, *shape: int) -> Tensor:
        return kernels.channels_last(torch.randn(shape, device=self.device, dtype=self.dtype) * 0.02)

    def environment(self) -> None:
        """Versions, and the most that this GPU reaches in a copy and in a matrix product."""
        import triton

        self.write("environment", torch=torch.__version__, triton=triton.__version__, cuda=torch.version.cuda)
        self.write(
            "environment", compiler=fused.missing_compiler() or "found", device=bench.device_name(str(self.device))
        )
        if self.is_gpu:
            source = torch.empty(2**31, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            copy = self.milliseconds(lambda: target.copy_(source))
            self.write("environment", cudnn=torch.backends.cudnn.version(), copy_tb_s=2 * 2**31 / copy / 1e9)
        self.write("environment", matrix_tflops=forward.matrix_rate(str(self.device), self.dtype) / 1e12)

    def kernels(self) -> None:
        """Time and bandwidth of each kernel. `tests/serving/test_kernels.py` tests that they are right."""
        for channels, side in ((128, 1024), (256, 1024), (512, 512), (512, 128)):
            x, y = self.image(channels, side, side), self.image(channels, side, side)
            bias = torch.randn(channels, device=self.device, dtype=self.dtype)
            subpixels = self.image(4 * channels, side // 2 + self.scale, side // 2 + self.scale)
            calls: dict[str, tuple[Call, int]] = {
                "group_norm": (lambda x=x, bias=bias: kernels.group_norm(x, bias, bias, 32, 1e-6, bias), 3),
                "add": (lambda x=x, y=y, bias=bias: kernels.add(x, bias, y), 3),
                "interleave": (lambda subpixels=subpixels, bias=bias: kernels.interleave(subpixels, bias), 2),
            }
            for name, (call, passes) in calls.items():
                self.write_bandwidth(name, call, passes * x.nbytes, channels)
        for channels in (96, 192, 384):
            size = 480 * 96 // channels // self.scale, 832 * 96 // channels // 8 // self.scale * 8 or 8
            frames = torch.randn(1, channels, 4, *size, device=self.device, dtype=self.dtype)
            bias = torch.randn(channels, device=self.device, dtype=self.dtype)
            call = partial(kernels.rms_norm, frames, bias, None, channels**0.5)
            self.write_bandwidth("rms_norm", call, 2 * frames.nbytes, channels)

    def write_bandwidth(self, name: str, call: Call, nbytes: int, channels: int) -> None:
        milliseconds = self.milliseconds(call)
        self.write("kernels", name=name, channels=channels, ms=milliseconds, tb_s=nbytes / milliseconds / 1e9)

    def attention(self) -> None:
        """The attention of a decoder's middle: 16384 pixels of a head of 512 channels, in each way."""
        module = Attention(512, heads=1, dim_head=512, norm_num_groups=32, bias=True, residual_connection=True)
        module.to(self.device, self.dtype)
        x = self.image(512, 128, 128)
        exact = blocks.attend(module.double(), x.double()) if self.is_gpu else None
        module.to(self.dtype)
        backends = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH] if self.is_gpu else []
        for name, call in {
            "slices of queries": lambda: fused.attend(module, x),
            "torch's choice": lambda: blocks.attend(module, x),
            **{backend.name: partial(attend_by, backend, module, x) for backend in backends},
        }.items():
            try:
                error = None if exact is None else (call() - exact).norm().item() / (x - exact).norm().item()
                self.write("attention", way=name, ms=self.milliseconds(call), error=error)
            except RuntimeError as error:
                self.write("attention", way=name, failed=str(error).splitlines()[0][:100])

    def upsampling(self) -> None:
        """A nearest upsampling and its convolution, in each way, also with cuDNN's own benchmark."""
        for channels, side in ((512, 128), (512, 256), (256, 512)):
            x, weight = self.image(channels, side, side), self.weight(channels, channels, 3, 3)
            bias = torch.randn(channels, device=self.device, dtype=self.dtype)
            for name, call in upsamplings(x, weight, bias).items():
                self.write_convolution("upsampling", call, way=name, channels=channels, side=side)

    def convolutions(self) -> None:
        """The convolutions of a decoder by shape, with the few channels of images and padded to eight."""
        for inner, outer, side in (
            *((512, 512, 128), (512, 512, 256), (512, 256, 512), (256, 256, 512), (256, 128, 1024), (128, 128, 1024)),
            *((128, 3, 1024), (128, 8, 1024), (3, 128, 1024), (8, 128, 1024)),
        ):
            x, weight = self.image(inner, side, side), self.weight(outer, inner, 3, 3)
            shape = {"channels": f"{inner} to {outer}", "side": side}
            flop = 18 * inner * outer * x.shape[-1] * x.shape[-2]
            self.write_convolution(
                "convolutions", partial(F.conv2d, x, weight, padding=1), flop, layout="last", **shape
            )
            x, weight = x.contiguous(), weight.contiguous()
            self.write_convolution(
                "convolutions", partial(F.conv2d, x, weight, padding=1), flop, layout="first", **shape
            )

    def videos(self) -> None:
        """Convolutions of the frames of a video in both layouts, and the copy that puts them after earlier ones."""
        for channels, divisor in ((96, 1), (192, 2), (384, 4)):
            height, width = (max(2, size // divisor // self.scale) for size in (480, 832))
            frames = torch.randn(1, channels, 6, height, width, device=self.device, dtype=self.dtype)
            weight = torch.randn(channels, channels, 3, 3, 3, device=self.device, dtype=self.dtype) * 0.02
            flop = 2 * weight.numel() * 4 * height * width
            for layout, memory_format in (("first", torch.contiguous_format), ("last", torch.channels_last_3d)):
                x, kernel = (tensor.contiguous(memory_format=memory_format) for tensor in (frames, weight))
                call = partial(F.conv3d, x, kernel, padding=(0, 1, 1))
                self.write_convolution("videos", call, flop, channels=channels, layout=layout)
            copy = partial(torch.cat, frames.split([2, 4], dim=2), 2)
            self.write("videos", channels=channels, layout="copy", ms=self.milliseconds(copy))

    def transfers(self) -> None:
        """Ways to bring an image and a video to the device, and 8-bit results back; the service's ways come first."""
        for frames, height, width in ((1, 1024, 1024), (33, 480, 832)):
            data = torch.rand(1, 3, frames, max(2, height // self.scale), max(2, width // self.scale))
            result = data.to(self.device, torch.uint8)
            calls: dict[str, Call] = {
                "to: converted, then copied": partial(data.to, self.device, self.dtype),
                "to: copied, then converted": lambda data=data: data.to(self.device).to(self.dtype),
            }
            if self.is_gpu:
                pinned = data.pin_memory()
                calls["to: pinned, then converted"] = lambda data=pinned: data.to(self.device).to(self.dtype)
                calls["to: a copy in pinned memory"] = data.pin_memory
                calls["back: through pinned memory"] = partial(to_pinned, result)
            calls["back: without pinned memory"] = result.cpu
            for name, call in calls.items():
                self.write("transfers", way=name, mb=data.nbytes / 1e6, ms=self.milliseconds(call))

    def write_convolution(self, stage: str, call: Call, flop: float = 0, **row: Any) -> None:
        row["ms"] = self.milliseconds(call)
        if flop:
            row["tflops"] = flop / row["ms"] / 1e9
        torch.backends.cudnn.benchmark = True
        row["benchmark_ms"] = self.milliseconds(call)
        torch.backends.cudnn.benchmark = False
        self.write(stage, **row)

    def passes(self) -> None:
        """Time, memory and error of each pass, for each model."""
        for key in self.models:
            if not self.has_time():
                return
            plain, vae = forward.load(key, str(self.device))
            self.write("verdicts", model=key, **vae.fast.verdicts)
            tasks: tuple[tuple[Task, int], ...] = (("decode", 1024), ("decode", 512), ("encode", 1024))
            for task, side in tasks:
                if self.has_time():
                    self.compare(key, plain, vae, task, side)
            del plain, vae
            gc.collect()

    def compare(self, key: str, plain: Any, vae: VAE, task: Task, side: int) -> None:
        size = side // min(self.scale, 8), side // min(self.scale, 8), None
        data = forward.inputs(key, task, size).to(self.device, vae.dtype)
        calls = {
            "diffusers": forward.plain_call(plain, task, data),
            "fast": forward.fast_call(fast_pass(vae.model), task, data),
            "fast without kernels": forward.fast_call(FastPass(vae.model), task, data),
            "reduced": forward.reduced_call(vae.model, task, data),
        }
        exact = forward.exact_result(plain, task, data)
        estimate = vae.memory.estimate(task, vae.layout, data.shape, vae.dtype.itemsize)
        for name, call in calls.items():
            self.write(
                "passes",
                **{"model": key, "task": task, "side": side, "way": name},
                psnr_db=forward.peak_signal_noise_ratio(call(), exact),
                ms=self.milliseconds(call, 0.8),
                peak_mb=allocated_peak(call, self.device) / 2**20,
                planned_mb=estimate.needed(Mode.REDUCED if name == "reduced" else Mode.FULL, 1) / 2**20,
            )
        if self.is_gpu and task == "decode" and side == 1024 and key == self.models[0]:
            self.write_profile("fast", calls["fast"])
            self.write_profile("diffusers", calls["diffusers"])

    def write_profile(self, way: str, call: Call) -> None:
        """Write the kernels that take most of the time of a pass."""
        with profile(activities=[ProfilerActivity.CUDA]) as measured:
            call()
            torch.cuda.synchronize(self.device)
        for event in sorted(measured.key_averages(), key=lambda event: -event.self_device_time_total)[:22]:
            self.write("profile", way=way, us=event.self_device_time_total, count=event.count, kernel=event.key[:100])

    def wan(self) -> None:
        """A video in each pass, and whether it has the bits of diffusers' own."""
        model = VAE.load(MODELS["wan-2.1"], "", Settings(weights="random", fast=False), str(self.device)).model
        size = (480, 832, 33) if self.is_gpu else (32, 32, 5)
        data = forward.inputs("wan-2.1", "decode", size).to(self.device, model.dtype)
        own = forward.plain_call(model, "decode", data)
        expected = own()
        calls = {
            "diffusers": own,
            "without folding and kernels": forward.fast_call(FastPass(model, fold=False), "decode", data),
            "fast": forward.fast_call(fast_pass(model), "decode", data),
        }
        for name, call in calls.items():
            if self.has_time():
                same = torch.equal(call(), expected)
                self.write("wan", way=name, has_the_same_bits=same, ms=self.milliseconds(call, 1))
        if self.is_gpu and self.has_time():
            self.write_profile("wan, fast", calls["fast"])

    def service(self) -> None:
        """Latency and throughput over HTTP against a bare loop of the same VAE. The server's log has its warm-up."""
        key, side, count = ("sd-v1", 1024, 40) if self.is_gpu else ("tiny", 64, 2)
        vae = forward.load(key, str(self.device))[1]
        with bench.server(key, str(self.device), self.path.with_name("gpu-server.log")) as url:
            for image_format in ("uint8", "jpg"):
                row = over_http.latency(url, key, vae, (side, side, None), image_format, count)
                self.write(
                    "latency", format=image_format, ms=row["http_ms"]["p50"], beside_the_vae_ms=row["overhead_ms"]
                )
            for pixels in (side // 2, side):
                for image_format in ("jpg", "png"):
                    if self.has_time():
                        load = Load(key, pixels, image_format, clients=8, count=2 * count, rounds=1)
                        row = over_http.throughput(url, vae, load)
                        names = ("per_second", "bare_per_second", "ratio", "health_ms")
                        self.write(
                            "throughput", side=pixels, format=image_format, **{name: row[name] for name in names}
                        )


def repeat(call: Call, count: int) -> None:
    for _ in range(count):
        call()


def to_pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def attend_by(backend: SDPBackend, module: Any, x: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return blocks.attend(module, x)


def upsamplings(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Call]:
    """Return the ways to upsample x [1, C, H, W] by 2 and convolve."""
    channels, height, width = x.shape[1:]
    folded = [kernels.channels_last(kernel) for _, kernel in _fold(weight, [-2, -1])]
    joined = kernels.channels_last(torch.cat(folded))
    wide = weight
    for dim in (-1, -2):
        a, b, c = wide.split(1, dim)
        wide = torch.cat([c, b + c, a + b, a], dim)
    transposed = kernels.channels_last(wide.transpose(0, 1))

    def four() -> Tensor:
        out = kernels.channels_last(x.new_empty(1, channels, 2 * height, 2 * width))
        for index, kernel in enumerate(folded):
            row, column = divmod(index, 2)
            part = F.conv2d(x, kernel, bias, padding=1)
            out[..., row::2, column::2] = part[..., row : row + height, column : column + width]
        return out

    return {
        "upsample, then 3x3": lambda: F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1),
        "four 2x2": four,
        "one 2x2 of 4C": lambda: kernels.interleave(F.conv2d(x, joined, padding=1), bias),
        "one 2x2 of 4C, the convolution alone": lambda: F.conv2d(x, joined, padding=1),
        "transposed 4x4": lambda: F.conv_transpose2d(x, transposed, bias, stride=2, padding=1),
    }


STAGES = (
    *("environment", "kernels", "passes", "attention", "upsampling", "convolutions"),
    *("transfers", "wan", "videos", "service"),
)


def main(
    stages: Annotated[str, typer.Argument(help=f"Stages, separated by commas: {', '.join(STAGES)}.")],
    device: Annotated[str, typer.Option(help="cuda, or cpu to find mistakes at toy sizes.")] = "cuda",
    models: Annotated[str, typer.Option(help="Models of the stage `passes`, separated by commas.")] = "flux2",
    seconds: Annotated[float, typer.Option(help="Time of the run; a stage that does not fit is skipped.")] = 180,
) -> None:
    """Measure, and write the results to gpu-<first stage>.json in the folder $OUT or the current one."""
    names = stages.split(",")
    if unknown := set(names) - set(STAGES):
        raise SystemExit(f"error: no stage {', '.join(sorted(unknown))}; the stages are {', '.join(STAGES)}")
    map_gpu_memory()
    path = Path(os.environ.get("OUT", "."), f"gpu-{names[0]}-{len(names)}.json")
    Stages(device, models.split(","), seconds, path).run(names)


if __name__ == "__main__":
    typer.run(main)
