"""`RemoteVAE`: ComfyUI's own VAE object, whose model runs on an endpoint.

ComfyUI crops, tiles, orders channels and scales pixels. The model takes pixels in [-1, 1] and returns latents, or the
reverse, as ComfyUI's own models do.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
from typing import Any, TypeVar

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor, nn

from remote_vae import Client
from remote_vae.threads import start_thread

from .latents import Latents

T = TypeVar("T")


class RemoteVAE(comfy.sd.VAE):
    """VAE for ComfyUI. It takes no memory. Its tensors stay on the CPU, from where they are sent."""

    def __init__(self, client: Client, config: dict[str, Any]) -> None:
        # the one kind of VAE that ComfyUI makes without weights; it sets defaults for everything else
        super().__init__(
            sd={"pixel_space_vae": torch.tensor(1.0)},
            device=torch.device("cpu"),
            dtype=getattr(torch, config["dtype"]),
        )
        latents = Latents(config)
        run_remotely(self.first_stage_model, client, latents)
        self.latent_channels = latents.channels
        self.latent_dim = latents.dimensions
        self.output_channels = config["pixels"]["channels"]
        self.not_video = not latents.is_video  # then images are a batch, not the frames of a video
        up, down = latents.decode_factor, latents.factor
        self.upscale_ratio, self.downscale_ratio = up, down
        self.upscale_index_formula = self.downscale_index_formula = None
        if latents.dimensions == 3:
            self.upscale_ratio = (latents.decoded_frames, up, up)
            self.downscale_ratio = (latents.encoded_frames, down, down)
            self.upscale_index_formula = (latents.frame_factor, up, up)
            self.downscale_index_formula = (latents.frame_factor, down, down)
        self.memory_used_encode = self.memory_used_decode = lambda shape, dtype: 1  # bytes: ComfyUI unloads nothing

    def get_sd(self) -> dict[str, Tensor]:
        """Raise an error for nodes that save a checkpoint."""
        raise ValueError("a remote VAE cannot be saved, because its weights are on the endpoint; connect a local VAE")


def run_remotely(model: nn.Module, client: Client, latents: Latents) -> None:
    """Give ComfyUI's placeholder the `encode` and `decode` of the endpoint, and the statistics of LTX's latents.

    The placeholder remains the VAE's model. ComfyUI's patcher holds the same object, and nodes such as Select VAE
    Device take the model from there. With another object, VAE Encode would return the pixels as latents.
    """
    remote: Any = model
    remote.latents = latents
    remote.encode = lambda pixels: run_cancellable(client, lambda: latents.encode(client, pixels))
    remote.decode = lambda samples: run_cancellable(client, lambda: latents.decode(client, samples))
    if latents.statistics:
        remote.per_channel_statistics = latents.statistics


def run_cancellable(client: Client, call: Callable[[], T]) -> T:
    """Return the result of a call. ComfyUI's Cancel ends the wait for it, and the retries of the client."""
    future = start_thread(call)
    while not wait([future], timeout=0.2).done:
        try:
            comfy.model_management.throw_exception_if_processing_interrupted()
        except BaseException:
            client.cancel()
            raise
    return future.result()
