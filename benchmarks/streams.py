"""A streamed video against the whole file: when its first bytes come, and its first frame."""

from __future__ import annotations

import io
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import av
import diffusers
import requests
import torch

from benchmarks.forward import Size, inputs
from handlers import MODELS
from scripts.local_server import serve

REPEATS = 3
FEW_CHANNELS = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1}


@contextmanager
def small_server(key: str, device: str) -> Iterator[str]:
    """The model's published architecture with few channels: what streaming takes is a larger part of it."""
    folder = Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    model = MODELS[key]
    vae = getattr(diffusers, model.vae_class).from_config({**model.published_config, **FEW_CHANNELS})
    vae.save_pretrained(folder / "weights")
    arguments = ("--model", key, "--device", device, "--weights", str(folder / "weights"))
    with serve(*arguments, log=folder / "server.log", VAE_TIMEOUT="3600") as url:
        yield url


def first_bytes(url: str, key: str, size: Size) -> dict[str, Any]:
    """Seconds from a request to its first bytes, to bytes that hold a frame, and to the last; medians, and shares."""
    whole, streamed = [], []
    for _ in range(REPEATS + 1):  # the first is to warm up
        whole.append(_receive(url, key, size, "false")[2])
        streamed.append(_receive(url, key, size, "true"))
    first, frame, last = (statistics.median(times[1:]) for times in zip(*streamed, strict=True))
    return {
        "model": key,
        "size": size,
        "count": REPEATS,
        "whole_seconds": statistics.median(whole[1:]),
        "first_byte_seconds": first,
        "first_frame_seconds": frame,
        "last_byte_seconds": last,
        "first_byte_share": first / last,
    }


def _receive(url: str, key: str, size: Size, stream: str) -> tuple[float, float, float]:
    latents = inputs(key, "decode", size)
    parameters = {"shape": list(latents.shape), "dtype": "float32", "output_type": "mp4", "stream": stream}
    start, came, file = perf_counter(), [], b""
    with requests.post(f"{url}/decode", latents.numpy().tobytes(), params=parameters, stream=True) as answer:
        answer.raise_for_status()
        for chunk in answer.iter_content(None):
            file += chunk
            came.append((perf_counter() - start, len(file)))
    frame = next(seconds for seconds, length in came if _holds_a_frame(file[:length]))
    return came[0][0], frame, came[-1][0]


def _holds_a_frame(file: bytes) -> bool:
    try:
        with av.open(io.BytesIO(file)) as container:
            return next(container.decode(video=0), None) is not None
    except av.FFmpegError:
        return False
