"""Passes before the first request, which would wait for them otherwise.

On a GPU the first pass starts libraries and loads kernels, and the first pass of each shape chooses algorithms. torch
keeps cuDNN's choices for each thread, so these passes run on the device's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from time import perf_counter

import torch
from torch import Tensor

from handlers.model import Task
from handlers.serving.layout import Layout
from handlers.serving.vae.vae import VAE

logger = logging.getLogger(__name__)

SIDE = 256
"""Height and width in pixels of the pass that tells how long the usual size takes."""
LATENT_FRAMES = 3
"""Latent frames of a video: the first one, and others after it."""


def warm_up(vae: VAE, seconds: float) -> Iterator[None]:
    """Decode and encode at the model's usual size, one pass a step.

    Args:
        seconds: leave out a pass that should take longer.
    """
    tasks: tuple[Task, ...] = ("decode", "encode")
    for task in tasks:
        try:
            yield from _warm_up(vae, task, seconds)
        except Exception as error:
            reason = str(error).splitlines() or [""]
            logger.warning("no warm-up of %s on %s: %s: %s", task, vae.device, type(error).__name__, reason[0])


def _warm_up(vae: VAE, task: Task, seconds: float) -> Iterator[None]:
    height, width = vae.declared.usual_size[:2]
    yield
    first = _seconds_of_a_pass(vae, task, SIDE, SIDE)  # it starts the libraries
    yield
    expected = _seconds_of_a_pass(vae, task, SIDE, SIDE) * height * width / SIDE**2
    if expected > seconds:
        logger.warning(
            "no warm-up of %s at %dx%d on %s: it should take %.1f s, and VAE_WARM_UP is %g",
            *(task, width, height, vae.device, expected, seconds),
        )
        return
    yield
    taken = _seconds_of_a_pass(vae, task, height, width)
    logger.info(
        "warm-up of %s at %dx%d on %s took %.1f s, and %.1f s the first pass, at %dx%d",
        *(task, width, height, vae.device, taken, first, SIDE, SIDE),
    )


def _seconds_of_a_pass(vae: VAE, task: Task, height: int, width: int) -> float:
    """Run a pass as a request does. It ends when its result is finite, so the device has finished too."""
    inputs = example_inputs(vae.layout, task, height, width)
    start = perf_counter()
    if task == "decode":
        vae.decode(inputs)
    else:
        vae.encode(inputs)
    return perf_counter() - start


def example_inputs(layout: Layout, task: Task, height: int, width: int) -> Tensor:
    """Return one item: normal latents, or pixels in [-1, 1]."""
    side = layout.decode_factor if task == "decode" else layout.vae_scale_factor
    rows, columns = height // side, width // side
    if task == "decode":
        latent_frames = LATENT_FRAMES if layout.kind == "video" else 1
        time = (latent_frames,) if layout.ndim == 5 else ()
        return torch.randn(1, layout.latent_channels, *time, rows, columns)
    frames, _ = layout.fitting_frames(layout.decoded_frames(LATENT_FRAMES))
    time = (frames,) if layout.pixels_ndim == 5 else ()
    return torch.rand(1, layout.pixel_channels, *time, rows * side, columns * side) * 2 - 1
