"""A server with faults on request: `python -m tests.support.faulty_server standalone|toolkit --port N`.

Decoding ignores `seed`, so it names the fault. The toolkit is its stand-in in `tests/support/toolkit`, or the real one
from the checkout in the variable TOOLKIT.
"""

from __future__ import annotations

import os
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch
import typer
import uvicorn

from handlers.serving.pipeline import Pipeline
from handlers.serving.vae.vae import VAE
from scripts import serve

SLOW, BUG, OUT_OF_MEMORY, NEVER_ENOUGH, THREAD_ENDS, DEVICE_LOST, NOT_FINITE = range(901, 908)
"""Faults on the device. A slow request takes `DEVICE_SECONDS`."""
PAYLOAD_HANGS, PAYLOAD_BUG, OUTPUT_HANGS, DISK_FULL = range(911, 915)
CHUNK_BUG, CHUNK_OUT_OF_MEMORY, CHUNK_NOT_FINITE, CHUNK_SLOW, CHUNK_LOSES_DEVICE = range(921, 926)
"""Faults while the second chunk of a video is decoded, after its first bytes were sent."""
THIRD_CHUNK_SLOW = 926
"""Fault while a second of a video is sent."""
NOISE = 931
"""Fault that sends frames of noise, which no encoder compresses well."""
DEVICE_SECONDS = float(os.environ.get("DEVICE_SECONDS", "1"))
HANGS_SECONDS = 5

LOAD_WAITS = "the load waits for the gate"
"""Log text of a server that waits for the file in GATE before it loads the model."""

load, prepare, forward, render, decode, is_alive = (
    VAE.load,
    Pipeline.prepare,
    Pipeline.forward,
    Pipeline.render,
    VAE.decode,
    VAE.is_alive,
)
lost = False


def bug() -> None:
    raise ZeroDivisionError("a secret")


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def lose_device() -> None:
    global lost
    lost = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


CHUNK_FAULTS = {
    CHUNK_BUG: bug,
    CHUNK_OUT_OF_MEMORY: run_out_of_memory,
    CHUNK_NOT_FINITE: lambda: None,
    CHUNK_SLOW: lambda: None,
    CHUNK_LOSES_DEVICE: lose_device,
}


def faulty_load(*arguments: Any) -> VAE:
    if gate := os.environ.get("GATE"):
        print(LOAD_WAITS, flush=True)
        while not Path(gate).exists():
            time.sleep(0.02)
    return load(*arguments)


def faulty_prepare(self: Pipeline, request: Any) -> Any:
    if request.parameters.seed == PAYLOAD_HANGS:
        time.sleep(HANGS_SECONDS)
    if request.parameters.seed == PAYLOAD_BUG:
        raise KeyError("a secret")
    return prepare(self, request)


def faulty_forward(self: Pipeline, vae: VAE, batch: list[Any]) -> Any:
    fault = batch[0][0].parameters.seed
    if fault == SLOW:
        time.sleep(DEVICE_SECONDS)
    if fault == BUG:
        bug()
    if fault == THREAD_ENDS:
        sys.exit()
    if fault == DEVICE_LOST:
        lose_device()
    model_decode, chunks = vae.model.decode, count()

    def faulty_decode(z: torch.Tensor, **options: Any) -> Any:
        number = next(chunks)
        if fault in CHUNK_FAULTS and number == 1:
            time.sleep(DEVICE_SECONDS)
            CHUNK_FAULTS[fault]()
        if fault == NEVER_ENOUGH or (fault == OUT_OF_MEMORY and not vae.model.use_tiling):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if fault == THIRD_CHUNK_SLOW and number == 2:
            time.sleep(DEVICE_SECONDS)
        decoded = model_decode(z, **options)
        if fault == NOISE:
            return (torch.rand(1, 3, decoded[0].shape[2], 512, 512) * 2 - 1,)
        not_finite = fault == NOT_FINITE or (fault == CHUNK_NOT_FINITE and number == 1)
        return (decoded[0] * torch.nan,) if not_finite else decoded

    vae.model.decode = faulty_decode
    try:
        return forward(self, vae, batch)
    finally:
        vae.model.decode = model_decode


def faulty_render(self: Pipeline, request: Any, result: Any) -> Any:
    if request.parameters.seed == OUTPUT_HANGS:
        time.sleep(HANGS_SECONDS)
    if request.parameters.seed == DISK_FULL:
        raise OSError(28, "No space left on device")
    return render(self, request, result)


def main(kind: str, port: int = 8000, model: str = "sd-v1", weights: str = "random") -> None:
    Pipeline.prepare, Pipeline.forward, Pipeline.render = faulty_prepare, faulty_forward, faulty_render
    VAE.load = staticmethod(faulty_load)
    VAE.is_alive = lambda vae: not lost and is_alive(vae)
    if kind == "standalone":
        return serve.main(model=model, host="127.0.0.1", port=port, weights=weights)
    os.environ.update(VAE_MODEL=model, VAE_WEIGHTS=weights, HF_MODEL_DIR=str(Path(serve.__file__).parent.parent))
    toolkit = os.environ.get("TOOLKIT")
    sys.path.insert(0, f"{toolkit}/src" if toolkit else str(Path(__file__).parent / "toolkit"))
    app = "huggingface_inference_toolkit.webservice_starlette:app" if toolkit else "webservice_starlette:app"
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="info")


if __name__ == "__main__":
    typer.run(main)
