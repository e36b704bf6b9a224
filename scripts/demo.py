"""Send a photograph and a video through a VAE on this machine: `make demo`.

It writes `out/demo.png` (the original beside the decoded image) and `out/demo.mp4`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import requests
import torch
from diffusers.utils.remote_utils import remote_decode, remote_encode
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from skimage import data
from skimage.metrics import peak_signal_noise_ratio

from handlers import MODELS
from handlers.serving.media.output import write_mp4
from scripts.local_server import ROOT, serve

OUT = ROOT / "out"
console = Console(width=100, highlight=False)


def main() -> None:
    OUT.mkdir(exist_ok=True)
    console.print("Serving [bold]tiny[/], the VAE in this repository, and sending it a photograph ...")
    with serve("--model", "tiny", log=OUT / "tiny.log") as url:
        show_image(url, Image.fromarray(data.astronaut()))
    console.print("Serving [bold]HunyuanVideo[/] with RANDOM weights: the video is noise ...")
    with serve("--model", "hunyuan-video", "--weights", "random", log=OUT / "hunyuan-video.log") as url:
        show_video(url, data.astronaut())


def show_image(url: str, photograph: Image.Image) -> None:
    """Encode and decode with diffusers' own client, write `out/demo.png`, and print bytes and times."""
    config = MODELS["tiny"].published_config
    scaling = {"scaling_factor": config["scaling_factor"], "shift_factor": config["shift_factor"]}
    with recorded() as calls:
        latents = remote_encode(url, photograph, **scaling)
        image = remote_decode(url, latents, image_format="png", **scaling)
    psnr = peak_signal_noise_ratio(np.asarray(photograph), np.asarray(image))
    images = {"original": photograph, f"encoded and decoded over HTTP: {psnr:.1f} dB PSNR": image}
    side_by_side(images).save(OUT / "demo.png")
    print_calls(calls)
    console.print(f"PSNR {psnr:.2f} dB: see [bold]out/demo.png[/]\n")


def show_video(url: str, photograph: np.ndarray) -> None:
    """Encode an MP4, decode its latents to `out/demo.mp4`, and print bytes and times."""
    frames = np.stack([photograph[60:124, 180 + 4 * step : 276 + 4 * step] for step in range(9)])
    scaling = {"scaling_factor": MODELS["hunyuan-video"].published_config["scaling_factor"]}
    with recorded() as calls:
        response = requests.post(url, data=write_mp4(frames, fps=24), params=scaling, timeout=600)
        latents = torch.frombuffer(bytearray(response.content), dtype=torch.float32)
        latents = latents.reshape(json.loads(response.headers["shape"]))
        video = remote_decode(url, latents, output_type="mp4", return_type="mp4", **scaling)
    (OUT / "demo.mp4").write_bytes(video)
    print_calls(calls)
    console.print(f"{len(frames)} frames: [bold]out/demo.mp4[/]")


@contextmanager
def recorded() -> Iterator[list[requests.Response]]:
    """Yield a list of every response of `requests` inside the block. The client does not return them."""
    calls: list[requests.Response] = []
    send = requests.Session.send

    def record(session: requests.Session, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        response = send(session, request, **options)
        response.raise_for_status()
        calls.append(response)
        return response

    requests.Session.send = record
    try:
        yield calls
    finally:
        requests.Session.send = send


def print_calls(calls: list[requests.Response]) -> None:
    """Print the bytes and the milliseconds of an encode and a decode call."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", "sent", "received", "total", "payload", "queue", "VAE", "output"):
        table.add_column(column, justify="right" if column else "left")
    for name, response in zip(("encode", "decode"), calls, strict=True):
        stages = re.findall(r"dur=([\d.]+)", response.headers["Server-Timing"])
        sizes = (len(response.request.body), len(response.content))
        total = response.elapsed.total_seconds() * 1000
        times = (total, *map(float, stages))
        table.add_row(name, *(f"{size:,} B" for size in sizes), *(f"{ms:,.1f} ms" for ms in times))
    console.print(table)


def side_by_side(images: dict[str, Image.Image]) -> Image.Image:
    """Return the images in a row, each under its label."""
    margin, band = 12, 34
    width, height = next(iter(images.values())).size
    canvas = Image.new("RGB", (margin + len(images) * (width + margin), band + height + margin), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=20)
    for column, (label, image) in enumerate(images.items()):
        x = margin + column * (width + margin)
        draw.text((x, 5), label, fill="black", font=font)
        canvas.paste(image, (x, band))
    return canvas


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, requests.RequestException) as error:
        raise SystemExit(f"error: {error}") from None
