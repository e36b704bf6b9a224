"""A server in which things go wrong on request: `python -m tests.faulty_server standalone|toolkit --port N`.

`seed`, which decoding ignores, names what goes wrong. The toolkit is its stand-in in `tests/toolkit`, or the real one,
from the checkout that the variable TOOLKIT names.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import typer
import uvicorn

from handlers.serving.pipeline import Pipeline
from handlers.serving.vae import VAE
from scripts import serve

SLOW, BUG, OUT_OF_MEMORY, NEVER_ENOUGH, THREAD_ENDS, DEVICE_LOST, NOT_FINITE = range(901, 908)
"""On the device; a slow one takes `DEVICE_SECONDS`."""
PAYLOAD_HANGS, PAYLOAD_BUG, OUTPUT_HANGS, DISK_FULL = range(911, 915)
DEVICE_SECONDS = float(os.environ.get("DEVICE_SECONDS", "1"))
HANGS_SECONDS = 30

prepare, forward, render, decode, is_alive = (
    Pipeline.prepare,
    Pipeline.forward,
    Pipeline.render,
    VAE.decode,
    VAE.is_alive,
)
lost = False


def faulty_prepare(self: Pipeline, request: Any) -> Any:
    if request.parameters.seed == PAYLOAD_HANGS:
        time.sleep(HANGS_SECONDS)
    if request.parameters.seed == PAYLOAD_BUG:
        raise KeyError("a secret")
    return prepare(self, request)


def faulty_forward(self: Pipeline, vae: VAE, batch: list[Any]) -> Any:
    global lost
    fault = batch[0][0].parameters.seed
    if fault == SLOW:
        time.sleep(DEVICE_SECONDS)
    if fault == BUG:
        raise ZeroDivisionError("a secret")
    if fault == THREAD_ENDS:
        sys.exit()
    if fault == DEVICE_LOST:
        lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    model_decode = vae.model.decode

    def short_of_memory(z: torch.Tensor, **options: Any) -> Any:
        if fault == NEVER_ENOUGH or (fault == OUT_OF_MEMORY and not vae.model.use_tiling):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        decoded = model_decode(z, **options)
        return (decoded[0] * torch.nan,) if fault == NOT_FINITE else decoded

    vae.model.decode = short_of_memory
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
