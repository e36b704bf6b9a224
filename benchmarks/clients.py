"""The package `remote_vae` against what one does without it: the queue, and the latents of a data set."""

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
    """Pictures decoded in place after each is generated, and by `decode_async` while the next is.

    Generating is a wait, as long as a decode here takes: it is another device's work.
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
        "in_place_seconds": [place for place, _ in rounds],
        "queued_seconds": [queued for _, queued in rounds],
        "ratio": statistics.mean(queued / place for place, queued in rounds),
    }


def data_set(url: str, key: str, side: int, count: int) -> dict[str, Any]:
    """Pictures a second, of a loop of `remote_encode`, of `remote-vae latents`, and of the service by itself.

    The service by itself gets as many tensors at a time as `latents` sends, which are ready before it begins.
    """
    client = Client(url)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        folder.mkdir()
        small = rng.integers(0, 255, (count, side // 8, side // 8, 3), dtype=np.uint8)
        for index, picture in enumerate(small):
            Image.fromarray(picture).resize((side, side)).save(folder / f"{index}.png")
        files = sorted(folder.iterdir())

        def loop() -> None:
            for file in files[: count // 4]:
                with Image.open(file) as image:
                    np.save(io.BytesIO(), remote_encode(url, image).float().numpy())

        def latents(name: str) -> None:
            format = FORMATS["webdataset"](key, (side, side), sample_mode="argmax")
            run = Run(client, client.config(), folder, Path(temporary) / name, format, 0, WORKERS)
            run.encode(Console(file=io.StringIO()))

        pixels = [torch.from_numpy(np.array(Image.open(file)))[None] for file in files]

        def service() -> None:
            with ThreadPoolExecutor(WORKERS) as threads:
                list(threads.map(lambda each: tensors.encode(client, each), pixels))

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
