"""Block for Modular Diffusers: it decodes latents on a remote VAE endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam
from diffusers.video_processor import VideoProcessor

from remote_vae import RemoteVAE, tensors


class RemoteDecodeStep(ModularPipelineBlocks):
    """Decodes the latents of a pipeline, in its own layout and normalization. It needs no VAE in the pipeline.

    PIL images arrive in 8 bits, a half or a quarter of the bytes of floats.

    Args:
        endpoint: URL of the endpoint, or several URLs of one model.
        token: token of an endpoint that is not public. None: the Hugging Face login, for Hugging Face's own hosts.
    """

    def __init__(self, endpoint: str | Sequence[str], token: str | None = None) -> None:
        super().__init__()
        self.remote = RemoteVAE(endpoint, token).remote

    @property
    def description(self) -> str:
        return "Decodes the denoised latents to images or videos on a remote VAE endpoint"

    @property
    def output_name(self) -> str:
        return "videos" if self.remote.is_video else "images"

    @property
    def inputs(self) -> list[InputParam]:
        return [
            InputParam("latents", required=True, type_hint=torch.Tensor, description="Latents of the denoising step."),
            InputParam("output_type", default="pil", description="pil, pt, np or latent."),
            InputParam("height", description="Height in pixels. Only packed latents need it."),
            InputParam("width", description="Width in pixels. Only packed latents need it."),
            InputParam("num_frames", description="Frames. Only packed latents of a video need them."),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam(self.output_name, description="Images, or a list of frames for each video.")]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        block_state = self.get_block_state(state)
        setattr(block_state, self.output_name, self.decode(block_state))
        self.set_block_state(state, block_state)
        return components, state

    def decode(self, block_state: Any) -> Any:
        latents = block_state.latents
        if block_state.output_type == "latent":
            return latents
        sizes = {name: getattr(block_state, name) for name in ("height", "width", "num_frames")}
        parameters = sizes if latents.ndim == 3 else {}
        if block_state.output_type == "pil":
            return self.remote.decode_async(latents, **parameters).result()
        pieces = latents.split(1 if self.remote.is_video else self.remote.config["limits"]["max_batch"])
        pixels = torch.cat(
            [tensors.decode(self.remote.client, piece, do_scaling=True, **parameters) for piece in pieces]
        )
        if self.remote.is_video:
            return VideoProcessor().postprocess_video(pixels, output_type=block_state.output_type)
        return VaeImageProcessor().postprocess(pixels, output_type=block_state.output_type)
