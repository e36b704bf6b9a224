"""`RemoteVAE`: ComfyUI's own VAE object, whose model runs elsewhere.

Cropping, tiling, the order of channels and the range of pixels are ComfyUI's. The model in it takes pixels in [-1, 1]
and returns latents, or the reverse, as ComfyUI's own models do.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from threading import Thread
from typing import Any, TypeVar

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor, nn

from remote_vae import Client

from .latents import Latents

T = TypeVar("T")


class RemoteVAE(comfy.sd.VAE):
    """What ComfyUI calls a VAE. It takes no memory, and its tensors stay on the CPU, from where they are sent."""

    def __init__(self, client: Client, config: dict[str, Any]) -> None:
        # the one kind of VAE that ComfyUI makes without weights; all that it sets for others keeps its default
        super().__init__(
            sd={"pixel_space_vae": torch.tensor(1.0)},
            device=torch.device("cpu"),
            dtype=getattr(torch, config["dtype"]),
        )
        latents = Latents(config)
        run_remotely(self.first_stage_model, client, latents)
        self.latent_channels = latents.channels
        self.latent_dim = latents.dimensions
        self.not_video = not latents.video  # pictures are a batch, and not the frames of a video
        self.upscale_ratio = self.downscale_ratio = latents.factor
        self.upscale_index_formula = self.downscale_index_formula = None
        if latents.dimensions == 3:
            self.upscale_ratio = (latents.decoded_frames, latents.factor, latents.factor)
            self.downscale_ratio = (latents.encoded_frames, latents.factor, latents.factor)
            formula = (latents.frames_each, latents.factor, latents.factor)
            self.upscale_index_formula = self.downscale_index_formula = formula
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: 1  # bytes; nothing is unloaded for it

    def get_sd(self) -> dict[str, Tensor]:
        """For nodes that save a checkpoint."""
        raise ValueError("a remote VAE cannot be saved: its weights are on the endpoint")


def run_remotely(model: nn.Module, client: Client, latents: Latents) -> None:
    """Give ComfyUI's placeholder the `encode` and `decode` of the endpoint, and the statistics of LTX's latents.

    The placeholder stays the VAE's model: ComfyUI's patcher holds the same object, and nodes such as Select VAE Device
    take the model from there. Another object would be lost, and VAE Encode return the pixels as latents.
    """
    remote: Any = model
    remote.latents = latents
    remote.encode = lambda pixels: cancellable(lambda: latents.encode(client, pixels))
    remote.decode = lambda samples: cancellable(lambda: latents.decode(client, samples))
    if latents.statistics:
        remote.per_channel_statistics = latents.statistics


def cancellable(call: Callable[[], T]) -> T:
    """The call's result; ComfyUI's Cancel ends the wait for it, which may be one for a replica that starts."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # whatever it is, who waits gets it
            future.set_exception(error)

    Thread(target=run, name="remote_vae", daemon=True).start()
    while not wait([future], timeout=0.2).done:
        comfy.model_management.throw_exception_if_processing_interrupted()
    return future.result()
