"""Start each model at its published size with random weights: `python -m benchmarks.published_sizes`.

The input is an image of 256x256, or the fewest frames of at least 5 that the model has. All models take a quarter of an
hour and up to 10 GB. Name keys to run some.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from time import monotonic
from typing import Annotated

import psutil
import requests
import torch
import typer
from rich.console import Console

from handlers import MODELS
from handlers.serving.media.output import tensor_bytes
from scripts.local_server import serve

SIDE = 256
console = Console(highlight=False, soft_wrap=True)


def main(keys: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    folder = Path(tempfile.mkdtemp(prefix="published-"))
    for key in keys or [key for key in MODELS if key != "tiny"]:
        start = monotonic()
        with serve("--model", key, "--weights", "random", log=folder / f"{key}.log", VAE_DEVICE="cpu") as url:
            started = monotonic() - start
            lines = [check(url, key, task) for task in ("encode", "decode")]
        console.print(f"{key:18} started in {started:3.0f} s; " + "; ".join(lines))


def check(url: str, key: str, task: str) -> str:
    """Send one request. Raise `AssertionError` unless the response has the shape that the model declares."""
    model = MODELS[key]
    side, factor = SIDE // model.vae_scale_factor, model.frame_factor
    latent_frames = 1 + -(-4 // factor) + model.padding_frames  # whose grid has 8 and 9 frames
    if model.clip:
        latent_frames = model.clip + 2
    frames, time_axis = (model.decoded_frames(latent_frames), True) if model.kind == "video" else (1, False)
    time = [frames] if time_axis else []
    latents = [1, model.latent_channels, *([latent_frames] if time_axis else []), side, side]
    sent, expected = [1, model.pixel_channels, *time, SIDE, SIDE], latents
    if task == "decode":
        sent, expected = latents, [1, model.pixel_channels, *time, SIDE * model.upscale, SIDE * model.upscale]
    tensor = torch.randn(sent, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    scaling: dict[str, bool] = {"do_scaling": model.takes_scaled or not model.raw_layouts}
    if model.takes_scaled:
        scaling["normalized"] = True
    start = monotonic()
    response = requests.post(
        f"{url}/{task}",
        data=tensor_bytes(tensor),
        params={"shape": sent, "dtype": "float32", "output_type": "pt", **scaling},
        timeout=600,
    )
    assert response.ok, response.text
    came = [int(size) for size in response.headers["shape"].strip("[]").split(",")]
    assert [size for size in came if size > 1] == [size for size in expected if size > 1], (came, expected)
    resident = max(child.memory_info().rss for child in psutil.Process().children())
    return f"{task} {came} in {monotonic() - start:.1f} s ({response.headers['X-VAE-Mode']}, {resident / 1e9:.1f} GB)"


if __name__ == "__main__":
    typer.run(main)
