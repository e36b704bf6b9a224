"""The benchmark: `make bench [DEVICE=...] [MODELS=...]`. Needs no network; writes `benchmarks/<device>/`.

What is measured is written down after each step, so that a run which is stopped leaves the part that it did.
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
from importlib.metadata import version
from pathlib import Path
from time import sleep
from typing import Annotated, Any

import httpx2
import torch
import typer
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import clients, forward, report, service, streams, ways
from benchmarks.forward import Size
from benchmarks.service import Load
from handlers import MODELS, get_model
from scripts.local_server import ROOT, serve

BENCHMARKS = ROOT / "benchmarks"
console = Console()


@dataclass(frozen=True)
class Plan:
    """What to measure on a kind of device."""

    decode: tuple[int, ...]
    """Heights and widths."""
    encode: tuple[int, ...]
    video: tuple[Size, ...]
    own: dict[str, Size]
    """A further decode of some models."""
    repeats: int
    fast: bool
    """Whether what is served runs the fast pass."""
    ways: dict[str, Size]
    """The decode of each model that the ways to run it are compared on."""
    served: tuple[Load, ...]
    pilot: Load
    """What the plain handler is asked for; a load of the same model, size and format is in `served`."""
    latency: tuple[str, int]
    """Model and size of the latency over HTTP."""
    latency_count: int
    queue: tuple[str, Size, int]
    """Model, size and pictures of the queue against decoding in place."""
    data_set: tuple[str, int, int]
    """Model, side and pictures of a data set whose latents are made."""
    stream: tuple[str, Size]
    """Model and size of the video that is streamed; of few channels on every device."""
    fake: tuple[tuple[str, str, Size], ...]
    """Peaks that are computed, not measured, as this device would take too long."""


WAN: Size = (480, 832, 33)
GPU = Plan(
    decode=(512, 1024, 2048),
    encode=(256, 512, 1024, 2048),
    video=((320, 512, 9), (320, 512, 61)),
    own={"wan-2.1": WAN},
    repeats=10,
    fast=True,
    ways={
        "sd-v1": (1024, 1024, None),
        "sdxl": (1024, 1024, None),
        "flux": (1024, 1024, None),
        "flux2": (1024, 1024, None),
        "qwen-image": (1024, 1024, None),
        "hunyuan-video": (320, 512, 9),
        "wan-2.1": WAN,
    },
    served=tuple(
        Load("sd-v1", size, image_format, clients, 128)
        for size in (512, 1024)
        for image_format in ("jpg", "png", "uint8")
        for clients in (1, 8, 32)
    ),
    pilot=Load("sd-v1", 512, "png", 8, 64, rounds=1),
    latency=("sd-v1", 1024),
    latency_count=100,
    queue=("sd-v1", (1024, 1024, None), 16),
    data_set=("sd-v1", 512, 512),
    stream=("hunyuan-video", (320, 512, 61)),
    fake=(),
)
CPU = Plan(
    decode=(256,),
    encode=(256,),
    video=(),
    own={"sd-v1": (512, 512, None), "flux": (512, 512, None)},
    repeats=2,
    fast=False,
    ways={"sd-v1": (256, 256, None)},
    served=(
        Load("sd-v1", 256, "jpg", 8, 12),
        Load("tiny", 512, "jpg", 1, 16, rounds=1),
        Load("tiny", 512, "jpg", 8, 16, rounds=1),
        Load("tiny", 512, "jpg", 32, 32, rounds=1),
        Load("tiny", 512, "png", 8, 16, rounds=1),
        Load("tiny", 512, "uint8", 8, 16, rounds=1),
    ),
    pilot=Load("tiny", 512, "png", 8, 16, rounds=1),
    latency=("tiny", 1024),
    latency_count=10,
    queue=("tiny", (512, 512, None), 8),
    data_set=("tiny", 256, 128),
    stream=("hunyuan-video", (320, 512, 61)),
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
TINY = 512
"""Height and width for `tiny`, on every device."""


def main(
    device: Annotated[str | None, typer.Option(help="A torch device; default: the best that is there.")] = None,
    models: Annotated[str | None, typer.Option(help="Keys, separated by commas; default: all that fit.")] = None,
) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = GPU if torch.device(device).type == "cuda" else CPU
    try:
        keys = [key for key in MODELS if key in models.split(",")] if models else list(MODELS)
        for key in models.split(",") if models else ():
            get_model(key)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    keys = [key for key in keys if is_here(key)]
    diffusers_logging.set_verbosity_error()
    results = {"about": about(device) | {"fast": plan.fast}}
    results |= {
        name: []
        for name in ("forward", "fake_peaks", "ways", "latency", "throughput", "pilot", "queue", "data_set", "stream")
    }
    folder = BENCHMARKS / slug(results["about"]["device"])
    folder.mkdir(parents=True, exist_ok=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with ExitStack() as servers, Progress(*columns, console=console, auto_refresh=False) as progress:
        # no thread of the bar's own beside what is measured
        steps = list(all_steps(plan, keys, device, results, servers))
        task = progress.add_task("", total=len(steps))
        for description, step in steps:
            progress.update(task, description=description, refresh=True)
            step()
            progress.advance(task)
            results["about"]["seconds"] = round((datetime.now(UTC) - START).total_seconds())
            report.write(results, folder)
    report.plots(results, folder)
    console.print(f"Written to [bold]{folder}/[/]: README.md, results.json, time.png, memory.png")


START = datetime.now(UTC)


def is_here(key: str) -> bool:
    """`tiny` is served with its own weights, the others with random ones."""
    return key != "tiny" or (Path(MODELS["tiny"].checkpoint) / "config.json").is_file()


def all_steps(
    plan: Plan, keys: list[str], device: str, results: dict[str, Any], servers: ExitStack
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is measured, in order, each with its line for the progress bar. The server that runs is in `servers`."""
    loaded: dict[str, Any] = {}
    eager: dict[str, ways.Eager] = {}
    urls: dict[str, str] = {}

    def vae(key: str) -> Any:
        if key not in loaded:
            loaded.clear(), eager.clear()  # one model at a time
            loaded[key] = forward.load(key, device, plan.fast)
        return loaded[key]

    def url(key: str, pilot: bool = False) -> str:
        name = f"{key}, the pilot's way" if pilot else key
        if name not in urls:
            urls.clear(), servers.close()  # and one server
            urls[name] = servers.enter_context(server(key, device, pilot, plan.fast))
        return urls[name]

    def matrix() -> None:
        for name in ("float32",) if torch.device(device).type == "cpu" else ("float32", "float16", "bfloat16"):
            results["about"]["matrix_tflops"][name] = forward.matrix_rate(device, getattr(torch, name)) / 1e12

    def compare(key: str, task: str, size: Size) -> None:
        row = forward.compare(key, *vae(key), task, size, plan.repeats)
        row["share_of_floor"] = row["tflop"] / results["about"]["matrix_tflops"][row["dtype"]] / row["seconds"]["fast"]
        if max(size[:2]) > MODELS[key].published_config.get("sample_size", 256):
            row |= forward.tiled(key, vae(key)[1], task, size, plan.repeats)
        results["forward"].append(row)

    def fake(key: str, task: str, size: Size) -> None:
        results["fake_peaks"].append(forward.fake_peaks(key, task, size))

    def way(key: str, size: Size, name: str) -> None:
        model = vae(key)[0]
        if key not in eager:
            eager[key] = ways.Eager(key, model, size, plan.repeats)
        results["ways"].append(eager[key].compare(name, ways.ways(device)[name]))

    def latency(key: str, size: Size, image_format: str) -> None:
        results["latency"].append(service.latency(url(key), key, vae(key)[1], size, image_format, plan.latency_count))

    def served(load: Load) -> None:
        results["throughput"].append(service.throughput(url(load.model), vae(load.model)[1], load))

    def queued(key: str, size: Size, count: int) -> None:
        results["queue"].append(clients.queue(url(key), key, vae(key)[1], size, count))

    def data_set(key: str, side: int, count: int) -> None:
        results["data_set"].append(clients.data_set(url(key), key, side, count))

    def streamed(key: str, size: Size) -> None:
        with streams.small_server(key, device) as address:
            results["stream"].append(streams.first_bytes(address, key, size))

    def pilot(load: Load) -> None:
        results["pilot"].append(service.throughput(url(load.model, pilot=True), vae(load.model)[1], load))

    yield "matrix rate", matrix
    for key in keys:
        if MODELS[key].kind == "video" and not plan.video:
            continue
        sizes = {"decode": plan.decode, "encode": plan.encode}
        for task in ("decode", "encode"):
            chosen = [(TINY, TINY, None)] if key == "tiny" else [(size, size, None) for size in sizes[task]]
            for size in plan.video if MODELS[key].kind == "video" else chosen:
                yield f"{key} {task} {describe(size)}", lambda key=key, task=task, size=size: compare(key, task, size)
        if size := plan.own.get(key):
            yield f"{key} decode {describe(size)}", lambda key=key, size=size: compare(key, "decode", size)
        if size := plan.ways.get(key):
            for name in ways.ways(device):
                line = f"{key} decode {describe(size)}: {name}"
                yield line, lambda key=key, size=size, name=name: way(key, size, name)
    for key, task, size in (peak for peak in plan.fake if peak[0] in keys):
        yield f"{key} {task} {describe(size)}: peak", lambda key=key, task=task, size=size: fake(key, task, size)
    key, size = plan.latency
    if key in keys:
        for name in ("uint8", "jpg"):
            yield (
                f"{key} over HTTP: latency, {name}",
                lambda key=key, size=(size, size, None), name=name: latency(key, size, name),
            )
    for load in (load for load in plan.served if load.model in keys):
        yield f"{load.model} {load.size} over HTTP: {load.clients} x {load.format}", lambda load=load: served(load)
    key, size, count = plan.queue
    if key in keys:
        yield f"{key} {describe(size)}: the queue", lambda: queued(*plan.queue)
    key, side, count = plan.data_set
    if key in keys:
        yield f"{key} {side}: {count} latents", lambda: data_set(*plan.data_set)
    key, size = plan.stream
    if key in keys:
        yield f"{key} {describe(size)}: streamed", lambda: streamed(*plan.stream)
    if plan.pilot.model in keys:
        yield f"{plan.pilot.model} {plan.pilot.size}: the pilot's way", lambda: pilot(plan.pilot)


@contextmanager
def server(key: str, device: str, pilot: bool, fast: bool) -> Iterator[str]:
    """The service's URL; or that of the pilot's way to run one."""
    log = Path(tempfile.mkdtemp()) / "server.log"
    if pilot:
        with serve("--model", key, "--device", device, log=log, command=("-m", "benchmarks.pilot")) as url:
            yield url
        return
    weights = () if key == "tiny" else ("--weights", "random")
    with serve("--model", key, "--device", device, *weights, log=log, VAE_FAST=str(int(fast))) as url:
        while "not checked yet" in httpx2.get(f"{url}/config").json()["fast"].values():
            sleep(1)
        yield url


def describe(size: Size) -> str:
    height, width, frames = size
    return f"{width}x{height}" + (f", {frames} frames" if frames else "")


def about(device: str) -> dict[str, Any]:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    packages = ("torch", "diffusers", "starlette", "uvicorn", "pillow")
    return {
        "kind": torch.device(device).type,
        "device": device_name(device),
        "cores": service.cores(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "commit": git.stdout.strip(),
        "date": f"{START:%Y-%m-%d %H:%M} UTC",
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "matrix_tflops": {},
    }


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
