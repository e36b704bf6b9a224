"""The accuracy of the passes on a CPU: `python -m benchmarks.accuracy [MODELS] [--side=64]`.

Each pass decodes the same normal latents. The peak signal-to-noise ratio of its 8-bit image is against diffusers' own
pass in float32. Weights are random, with a seed (`tiny`: its own). A processor without instructions for a half dtype
emulates it, which gives the same values slowly.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor

from benchmarks.forward import fast_call, inputs, plain_call
from benchmarks.report import table
from handlers import get_model
from handlers.serving.settings import Settings
from handlers.serving.vae.fast.check import fast_pass, half_pass, image_psnr
from handlers.serving.vae.vae import VAE

KEYS = "tiny,sd-v1,flux,flux2,flux2-small,qwen-image,qwen-image-2.1,hunyuan-image,sana,taesd,wan-2.1,wan-2.2,taew2.1"
FRAMES = 5
HEAD = ("model", "fast pass, float32", "fast pass, bfloat16", "diffusers, bfloat16", "diffusers, float16")


def main(
    models: Annotated[str, typer.Argument(help="keys of models, separated by commas")] = KEYS,
    side: Annotated[int, typer.Option(help="height and width in pixels")] = 64,
) -> None:
    """Print the decibels of each pass. By default, a CPU with instructions for bfloat16 takes the second."""
    rows = [(key, *decibels(key, side)) for key in track(models.split(","), "models")]
    print(table(HEAD, rows))


def decibels(key: str, side: int) -> list[str]:
    """Return the decibels of each pass; "none" for an architecture without a fast pass in float32."""
    declared = get_model(key)
    model = VAE.load(declared, "", Settings(weights=None if key == "tiny" else "random", fast=False), "cpu").model
    latents = inputs(key, "decode", (side, side, FRAMES if declared.kind == "video" else None))
    exact = plain_call(model, "decode", latents)()
    fast = fast_pass(model)

    def diffusers(dtype: torch.dtype) -> Tensor:
        return plain_call(deepcopy(model).to(dtype), "decode", latents.to(dtype))()

    results = (
        fast_call(fast, "decode", latents)() if fast else None,
        fast_call(half_pass(model), "decode", latents)(),
        diffusers(torch.bfloat16),
        diffusers(torch.float16),
    )
    return ["none" if result is None else f"{image_psnr(result, exact):.0f}" for result in results]


if __name__ == "__main__":
    typer.run(main)
