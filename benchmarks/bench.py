"""The benchmark: `make bench [DEVICE=...] [MODELS=...]`. It needs no network and writes `benchmarks/<device>/`.

The results are written after each step, so a run that is stopped leaves the results so far.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import clients, forward, report, service
from benchmarks.forward import Size
from benchmarks.report import pixels
from benchmarks.service import Load
from handlers import MODELS, get_model
from handlers.model import Task
from handlers.serving.vae.heap import map_gpu_memory
from handlers.serving.vae.vae import VAE
from scripts.local_server import ROOT, serve, wait_until_checked

BENCHMARKS = ROOT / "benchmarks"
console = Console()


TINY = 512
"""Height and width for `tiny`, on every device."""


@dataclass(frozen=True)
class Plan:
    """The measurements on one kind of device."""

    decode: tuple[int, ...]
    """Heights and widths of images, in pixels."""
    encode: tuple[int, ...]
    video: tuple[Size, ...]
    more_decodes: dict[str, Size]
    """One further decode for some models."""
    repeats: int
    openvino: tuple[tuple[str, Task, Size], ...]
    """Passes that are compared with OpenVINO's, on a CPU."""
    loads: tuple[Load, ...]
    latency: tuple[str, int]
    """Model, and height and width of the latency over HTTP."""
    latency_count: int
    queue: tuple[str, Size, int]
    """Model, size and number of images for the queue against decoding in place."""
    data_set: tuple[str, int, int]
    """Model, height and width, and number of images of a data set."""
    fake: tuple[tuple[str, Task, Size], ...]
    """Peaks that are computed, because this device would take too long to measure them."""


GPU = Plan(
    decode=(512, 1024, 2048),
    encode=(256, 512, 1024, 2048),
    video=((320, 512, 9), (320, 512, 61)),
    more_decodes={"wan-2.1": (480, 832, 33)},
    repeats=10,
    openvino=(),
    loads=tuple(
        Load("sd-v1", size, image_format, clients, 128)
        for size in (512, 1024)
        for image_format in ("jpg", "png", "uint8")
        for clients in (1, 8, 32)
    ),
    latency=("sd-v1", 1024),
    latency_count=100,
    queue=("sd-v1", (1024, 1024, None), 16),
    data_set=("sd-v1", 512, 512),
    fake=(),
)
CPU = Plan(
    decode=(256,),
    encode=(256,),
    video=(),
    more_decodes={"sd-v1": (512, 512, None), "flux": (512, 512, None)},
    repeats=2,
    openvino=tuple(
        (key, task, (side, side, None))
        for key, side in (("sd-v1", 256), ("flux", 256), ("qwen-image", 256), ("tiny", TINY), ("taesd", 256))
        for task in ("decode", "encode")
    ),
    loads=(
        Load("sd-v1", 256, "jpg", 8, 12),
        Load("tiny", 512, "jpg", 1, 16, rounds=1),
        Load("tiny", 512, "jpg", 8, 16, rounds=1),
        Load("tiny", 512, "jpg", 32, 32, rounds=1),
        Load("tiny", 512, "png", 8, 16, rounds=1),
        Load("tiny", 512, "uint8", 8, 16, rounds=1),
    ),
    latency=("tiny", 1024),
    latency_count=10,
    queue=("tiny", (512, 512, None), 8),
    data_set=("tiny", 256, 128),
    fake=(
        ("sd-v1", "decode", (1024, 1024, None)),
        ("sd-v1", "encode", (1024, 1024, None)),
        ("hunyuan-video", "decode", (320, 512, 9)),
        ("hunyuan-video", "encode", (320, 512, 9)),
        ("flux2", "decode", (1024, 1024, None)),
        ("qwen-image", "decode", (1024, 1024, None)),
        ("wan-2.1", "decode", (320, 512, 9)),
    ),
)


def main(
    device: Annotated[str | None, typer.Option(help="A torch device; default: CUDA where it exists, else cpu.")] = None,
    models: Annotated[str | None, typer.Option(help="Keys of models, separated by commas; default: all.")] = None,
) -> None:
    """Measure speed and memory, and write the results into a folder for this device."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = GPU if torch.device(device).type == "cuda" else CPU
    try:
        for key in models.split(",") if models else ():
            get_model(key)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    keys = [key for key in MODELS if has_weights(key) and (not models or key in models.split(","))]
    diffusers_logging.set_verbosity_error()
    map_gpu_memory()  # as the service does
    benchmark = Benchmark(plan, keys, device)
    folder = BENCHMARKS / slug(benchmark.about["device"])
    folder.mkdir(parents=True, exist_ok=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # A thread of the progress bar would disturb the measurements, so the bar is drawn between them.
    with benchmark.servers, Progress(*columns, console=console, auto_refresh=False) as progress:
        steps = list(benchmark.steps())
        task = progress.add_task("", total=len(steps))
        for description, step in steps:
            progress.update(task, description=description, refresh=True)
            step()
            progress.advance(task)
            benchmark.about["seconds"] = round((datetime.now(UTC) - START).total_seconds())
            report.write(benchmark.results, folder)
    report.plots(benchmark.results, folder)
    console.print(f"Written to [bold]{folder}/[/]: README.md, results.json, time.png, memory.png")


START = datetime.now(UTC)


def has_weights(key: str) -> bool:
    """True if the weights are here: `tiny` runs with its own, the other models with random ones."""
    return key != "tiny" or (Path(MODELS["tiny"].checkpoint) / "config.json").is_file()


class Benchmark:
    """The measurements of a plan, and their results. One model is loaded and one server runs at a time."""

    def __init__(self, plan: Plan, keys: list[str], device: str) -> None:
        self.plan, self.keys, self.device = plan, keys, device
        self.about = about(device)
        names = ("forward", "openvino", "fake_peaks", "latency", "throughput", "queue", "data_set")
        self.results: dict[str, Any] = {"about": self.about, **{name: [] for name in names}}
        self.servers = ExitStack()
        self.loaded: tuple[str, Any, VAE] | None = None
        self.running: tuple[str, str] | None = None

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield the measurements in order, each with its line for the progress bar."""
        plan = self.plan
        yield "matrix rate", self.measure_matrix_rate
        for key in self.keys:
            for task, size in passes(plan, key):
                yield f"{key} {task} {pixels(size)}", partial(self.compare_passes, key, task, size)
        for key, task, size in plan.openvino:
            if key in self.keys:
                yield f"{key} {task} {pixels(size)}: OpenVINO", partial(self.compare_openvino, key, task, size)
        for key, task, size in plan.fake:
            if key in self.keys:
                yield f"{key} {task} {pixels(size)}: peak", partial(self.compute_peaks, key, task, size)
        key, side = plan.latency
        for image_format in ("uint8", "jpg") if key in self.keys else ():
            yield f"{key} over HTTP: latency, {image_format}", partial(self.measure_latency, key, side, image_format)
        for load in plan.loads:
            if load.model in self.keys:
                line = f"{load.model} {load.size} over HTTP: {load.clients} x {load.format}"
                yield line, partial(self.measure_throughput, load)
        if (key := plan.queue[0]) in self.keys:
            yield f"{key} {pixels(plan.queue[1])}: the queue", partial(self.measure_queue, *plan.queue)
        if (key := plan.data_set[0]) in self.keys:
            yield (
                f"{key} {plan.data_set[1]}: {plan.data_set[2]} latents",
                partial(self.measure_data_set, *plan.data_set),
            )

    def measure_matrix_rate(self) -> None:
        is_cpu = torch.device(self.device).type == "cpu"
        for name in ("float32",) if is_cpu else ("float32", "float16", "bfloat16"):
            self.about["matrix_tflops"][name] = forward.matrix_rate(self.device, getattr(torch, name)) / 1e12

    def compare_passes(self, key: str, task: Task, size: Size) -> None:
        plain, vae = self.models(key)
        row = forward.compare(key, plain, vae, task, size, self.plan.repeats)
        row["share_of_floor"] = row["tflop"] / self.about["matrix_tflops"][row["dtype"]] / row["seconds"]["fast"]
        if max(size[:2]) > MODELS[key].published_config.get("sample_size", 256):
            row |= forward.tiled(key, vae, task, size, self.plan.repeats)
        self.results["forward"].append(row)

    def compare_openvino(self, key: str, task: Task, size: Size) -> None:
        from benchmarks import openvino  # its package is installed for a CPU alone

        self.results["openvino"] += openvino.compare(key, *self.models(key), task, size, self.plan.repeats)

    def compute_peaks(self, key: str, task: Task, size: Size) -> None:
        self.results["fake_peaks"].append(forward.fake_peaks(key, task, size))

    def measure_latency(self, key: str, side: int, image_format: str) -> None:
        size, count = (side, side, None), self.plan.latency_count
        row = service.latency(self.url(key), key, self.models(key)[1], size, image_format, count)
        self.results["latency"].append(row)

    def measure_throughput(self, load: Load) -> None:
        url, (_, vae) = self.url(load.model), self.models(load.model)
        self.results["throughput"].append(service.throughput(url, vae, load))

    def measure_queue(self, key: str, size: Size, count: int) -> None:
        self.results["queue"].append(clients.queue(self.url(key), key, self.models(key)[1], size, count))

    def measure_data_set(self, key: str, side: int, count: int) -> None:
        self.results["data_set"].append(clients.data_set(self.url(key), key, side, count))

    def models(self, key: str) -> tuple[Any, VAE]:
        """Return the model in plain diffusers and in this project."""
        if self.loaded is None or self.loaded[0] != key:
            self.loaded = None  # frees its memory first
            self.loaded = (key, *forward.load(key, self.device))
        return self.loaded[1:]

    def url(self, key: str) -> str:
        """Return the address of a server of the model."""
        if self.running is None or self.running[0] != key:
            self.servers.close()
            self.running = key, self.servers.enter_context(server(key, self.device))
        return self.running[1]


def passes(plan: Plan, key: str) -> Iterator[tuple[Task, Size]]:
    """Yield the passes of a model that are compared with plain diffusers."""
    is_video = MODELS[key].kind == "video"
    if is_video and not plan.video:
        return
    for task, sides in (("decode", plan.decode), ("encode", plan.encode)):
        images = [(side, side, None) for side in ((TINY,) if key == "tiny" else sides)]
        for size in plan.video if is_video else images:
            yield task, size
    if key in plan.more_decodes:
        yield "decode", plan.more_decodes[key]


@contextmanager
def server(key: str, device: str, log: Path | None = None) -> Iterator[str]:
    """Serve the model, and yield its URL when the fast pass has been checked."""
    log = log or Path(tempfile.mkdtemp()) / "server.log"
    weights = () if key == "tiny" else ("--weights", "random")
    with serve("--model", key, "--device", device, *weights, log=log, VAE_FAST="1") as url:
        wait_until_checked(url)
        yield url


def about(device: str) -> dict[str, Any]:
    """Return the device, the versions and the commit of a run."""
    packages = ("torch", "diffusers", "starlette", "uvicorn", "pillow")
    return {
        "kind": torch.device(device).type,
        "device": device_name(device),
        "cores": service.cores(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "commit": commit(),
        "date": f"{START:%Y-%m-%d %H:%M} UTC",
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "matrix_tflops": {},
    }


def commit() -> str:
    """Return the commit that is measured; an unknown one without git or its folder."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"


def device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.is_file() else []
    return f"{names[0] if names else platform.processor() or 'CPU'}, {service.cores()} cores"


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    typer.run(main)
