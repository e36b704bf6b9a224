"""Block for Modular Diffusers: it encodes images on a remote VAE endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from remote_vae import Client, tensors
from remote_vae.pool import connect


class RemoteEncodeStep(ModularPipelineBlocks):
    """Encodes images to the normalized latents of a pipeline. It needs no VAE in the pipeline.

    Args:
        endpoint: URL of the endpoint, or several URLs of one model.
        token: token of an endpoint that is not public. None: the Hugging Face login, for Hugging Face's own hosts.
    """

    def __init__(self, endpoint: str | Sequence[str], token: str | None = None) -> None:
        super().__init__()
        self.client: Client = connect(endpoint, token)
        self.served = self.client.config()

    @property
    def description(self) -> str:
        return "Encodes images to normalized latents on a remote VAE endpoint"

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("image", required=True, description="PIL image, or a list of images, which get one size."),
            InputParam("height", description="Height in pixels. Default: that of the image, as the VAE can encode it."),
            InputParam("width", description="Width in pixels. Default: that of the image, as the VAE can encode it."),
            InputParam("generator", type_hint=torch.Generator, description="Generator that draws the sample's seed."),
            InputParam("sample_mode", default="sample", description="sample, or argmax for the mode."),
            InputParam("latents_layout", description="Layout of the latents, such as packed. Default: the VAE's own."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("image_latents", type_hint=torch.Tensor, description="Normalized latents, float32.")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block_state = self.get_block_state(state)
        images = block_state.image if isinstance(block_state.image, list) else [block_state.image]
        processor = VaeImageProcessor(vae_scale_factor=self.served["latents"]["vae_scale_factor"])
        height, width = processor.get_default_height_width(images[0], block_state.height, block_state.width)
        pixels = [np.array(processor.resize(image.convert("RGB"), height, width)) for image in images]
        batch = torch.from_numpy(np.stack(pixels))
        if self.served["kind"] == "video":  # an image is a video of one frame
            batch = batch.movedim(-1, 1).unsqueeze(2).contiguous()
        seed = None
        if block_state.sample_mode == "sample" and block_state.generator:
            seed = int(torch.randint(1 << 31, (1,), generator=block_state.generator))
        block_state.image_latents = tensors.encode(
            self.client,
            batch,
            do_scaling=True,
            sample_mode=block_state.sample_mode,
            latents_layout=block_state.latents_layout or self.served["latents"]["layout"],
            seed=seed,
        )
        self.set_block_state(state, block_state)
        return components, state
