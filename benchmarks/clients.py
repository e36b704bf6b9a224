"""The package `remote_vae` against the same work without it: the queue, and the latents of a data set."""

from __future__ import annotations

import io
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from diffusers.utils.remote_utils import remote_encode
from PIL import Image
from rich.console import Console

from benchmarks.forward import Size, inputs
from handlers.serving.vae.vae import VAE
from remote_vae import Client, RemoteVAE, tensors
from remote_vae.latents.formats import FORMATS
from remote_vae.latents.run import Run

WORKERS = 8


def queue(url: str, key: str, vae: VAE, size: Size, count: int) -> dict[str, Any]:
    """Compare decoding each image in place with `decode_async`, which decodes while the next image is generated.

    Another device generates, so generating is a wait here. It is as long as a decode in this process.
    """
    latents, remote = inputs(key, "decode", size), RemoteVAE(url)

    def in_place(generate: float) -> None:
        for _ in range(count):
            sleep(generate)
            vae.decode(latents)

    def queued(generate: float) -> None:
        pending = []
        for _ in range(count):
            sleep(generate)
            pending.append(remote.decode_async(latents, do_scaling=False))
        for future in pending:
            future.result()

    vae.decode(latents), remote.decode_async(latents, do_scaling=False).result()
    generate = statistics.median(_seconds(vae.decode, latents) for _ in range(3))
    rounds = [(_seconds(in_place, generate), _seconds(queued, generate)) for _ in range(2)]
    return {
        "model": key,
        "size": size,
        "count": count,
        "in_place_seconds": [in_place for in_place, _ in rounds],
        "queued_seconds": [queued for _, queued in rounds],
        "ratio": statistics.mean(queued / in_place for in_place, queued in rounds),
    }


def data_set(url: str, key: str, side: int, count: int) -> dict[str, Any]:
    """Measure images a second, for a loop of `remote_encode`, for `remote-vae latents`, and for the service alone.

    The service alone gets as many tensors at a time as `latents` sends. They are ready before it begins.
    """
    client = Client(url)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        folder.mkdir()
        small = rng.integers(0, 255, (count, side // 8, side // 8, 3), dtype=np.uint8)
        for index, pixels in enumerate(small):
            Image.fromarray(pixels).resize((side, side)).save(folder / f"{index}.png")
        files = sorted(folder.iterdir())

        def loop() -> None:
            for file in files[: count // 4]:
                with Image.open(file) as image:
                    np.save(io.BytesIO(), remote_encode(url, image).float().numpy())

        def latents(name: str) -> None:
            format = FORMATS["webdataset"](key, (side, side), sample_mode="argmax")
            run = Run(client, client.config(), folder, Path(temporary) / name, format, 0, WORKERS)
            run.encode(Console(file=io.StringIO()))

        images = [torch.from_numpy(np.array(Image.open(file)))[None] for file in files]

        def service() -> None:
            with ThreadPoolExecutor(WORKERS) as threads:
                list(threads.map(lambda each: tensors.encode(client, each), images))

        service()
        rates = [
            (count // 4 / _seconds(loop), count / _seconds(latents, f"out-{turn}"), count / _seconds(service))
            for turn in range(2)
        ]
    return {
        "model": key,
        "size": (side, side, None),
        "count": count,
        "per_second": [dict(zip(("loop", "latents", "service"), rate, strict=True)) for rate in rates],
        "against_loop": statistics.mean(latents / loop for loop, latents, _ in rates),
        "against_service": statistics.mean(latents / service for _, latents, service in rates),
    }


def _seconds(function: Any, *arguments: Any) -> float:
    start = perf_counter()
    function(*arguments)
    return perf_counter() - start
