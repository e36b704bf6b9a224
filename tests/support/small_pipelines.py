"""Whole pipelines of diffusers with small random components. Embeddings replace the text encoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor

STEPS = 2


def _random_values(*shape: int) -> Tensor:
    """Return random values that depend on the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _unet(**more: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


def stable_diffusion() -> dict[str, Any]:
    components = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return {
        **components,
        "unet": _unet(),
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        "requires_safety_checker": False,
    }


def sdxl() -> dict[str, Any]:
    components = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    unet = _unet(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=56)
    return {**components, "unet": unet, "scheduler": diffusers.EulerDiscreteScheduler(), "add_watermarker": False}


def sd3() -> dict[str, Any]:
    names = [f"{name}{number}" for name in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        pos_embed_max_size=16,
    )
    return {**dict.fromkeys(names), "transformer": transformer, "scheduler": _euler()}


def flux() -> dict[str, Any]:
    transformer = diffusers.FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    components = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return {**components, "transformer": transformer, "scheduler": _euler()}


def flux2() -> dict[str, Any]:
    transformer = diffusers.Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return {**dict.fromkeys(("text_encoder", "tokenizer")), "transformer": transformer, "scheduler": _euler()}


def _wan_transformer(in_channels: int) -> Any:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


def wan() -> dict[str, Any]:
    components = dict.fromkeys(("text_encoder", "tokenizer"))
    return {**components, "transformer": _wan_transformer(16), "scheduler": diffusers.UniPCMultistepScheduler()}


def wan_from_image() -> dict[str, Any]:
    components = dict.fromkeys(("text_encoder", "tokenizer", "image_encoder", "image_processor"))
    return {**components, "transformer": _wan_transformer(36), "scheduler": diffusers.UniPCMultistepScheduler()}


def qwen_image() -> dict[str, Any]:
    transformer = diffusers.QwenImageTransformer2DModel(
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return {**dict.fromkeys(("text_encoder", "tokenizer")), "transformer": transformer, "scheduler": _euler()}


def ltx() -> dict[str, Any]:
    transformer = diffusers.LTXVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    return {**dict.fromkeys(("text_encoder", "tokenizer")), "transformer": transformer, "scheduler": _euler()}


PROMPT = {"prompt_embeds": _random_values(1, 4, 8), "negative_prompt_embeds": _random_values(1, 4, 8) + 1}
WIDER = {"prompt_embeds": _random_values(1, 4, 16)}
POOLED = {"pooled_prompt_embeds": _random_values(1, 8)}
BOTH_POOLED = {**POOLED, "negative_pooled_prompt_embeds": _random_values(1, 8) + 1}
MASKED = {**WIDER, "prompt_embeds_mask": torch.ones(1, 4, dtype=torch.long)}
ATTENDED = {
    **{"prompt_embeds": _random_values(1, 4, 16), "negative_prompt_embeds": _random_values(1, 4, 16) + 1},
    **{f"{name}prompt_attention_mask": torch.ones(1, 4, dtype=torch.long) for name in ("", "negative_")},
}
CLASSIFIED = {"prompt_embeds": _random_values(1, 4, 16), "negative_prompt_embeds": _random_values(1, 4, 16) + 1}
VIDEO = {"num_frames": 5, "output_type": "pil"}
START = "image"
MASK = "mask_image"


@dataclass(frozen=True)
class Case:
    """A pipeline, the model key of its VAE, and the arguments of a call."""

    pipeline: str
    key: str
    components: Callable[[], dict[str, Any]]
    arguments: dict[str, Any]
    image_arguments: tuple[str, ...] = ()
    """Names of arguments that are an image or a mask."""
    side: int = 64
    """Height and width in pixels."""


CASES = [
    Case("StableDiffusionPipeline", "sd-v1", stable_diffusion, PROMPT),
    Case("StableDiffusionImg2ImgPipeline", "sd-v1", stable_diffusion, {**PROMPT, "strength": 1.0}, (START,)),
    Case("StableDiffusionInpaintPipeline", "sd-v1", stable_diffusion, PROMPT, (START, MASK)),
    Case("StableDiffusionXLPipeline", "sdxl", sdxl, {**PROMPT, **BOTH_POOLED}),
    Case("StableDiffusionXLImg2ImgPipeline", "sdxl", sdxl, {**PROMPT, **BOTH_POOLED, "strength": 1.0}, (START,)),
    Case("StableDiffusionXLInpaintPipeline", "sdxl", sdxl, {**PROMPT, **BOTH_POOLED}, (START, MASK)),
    Case("StableDiffusion3Pipeline", "sd3", sd3, {**CLASSIFIED, **BOTH_POOLED}),
    Case("StableDiffusion3Img2ImgPipeline", "sd3", sd3, {**CLASSIFIED, **BOTH_POOLED, "strength": 1.0}, (START,)),
    Case("StableDiffusion3InpaintPipeline", "sd3", sd3, {**CLASSIFIED, **BOTH_POOLED}, (START, MASK)),
    Case("FluxPipeline", "flux", flux, {**WIDER, **POOLED}),
    Case("FluxImg2ImgPipeline", "flux", flux, {**WIDER, **POOLED, "strength": 1.0}, (START,)),
    Case("FluxInpaintPipeline", "flux", flux, {**WIDER, **POOLED, "strength": 1.0}, (START, MASK)),
    Case("Flux2Pipeline", "flux2", flux2, WIDER),
    Case("Flux2Pipeline", "flux2", flux2, WIDER, (START,)),
    Case("WanPipeline", "wan-2.1", wan, {**CLASSIFIED, **VIDEO}),
    Case("WanImageToVideoPipeline", "wan-2.1", wan_from_image, {**CLASSIFIED, **VIDEO}, (START,)),
    Case("QwenImagePipeline", "qwen-image", qwen_image, MASKED),
    Case("QwenImageImg2ImgPipeline", "qwen-image", qwen_image, {**MASKED, "strength": 1.0}, (START,)),
    Case("QwenImageInpaintPipeline", "qwen-image", qwen_image, {**MASKED, "strength": 1.0}, (START, MASK)),
    Case("LTXPipeline", "ltx-video", ltx, {**ATTENDED, "num_frames": 9}),
    Case("LTXImageToVideoPipeline", "ltx-video", ltx, {**ATTENDED, "num_frames": 9}, (START,)),
]


def make(case: Case, vae: Any) -> Any:
    """Build the pipeline with the same random weights each time."""
    torch.manual_seed(0)
    pipeline = getattr(diffusers, case.pipeline)(**case.components(), vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline: Any, case: Case, **more: Any) -> list[Image.Image]:
    """Run the pipeline. Return its images, or the frames of its video."""
    size = (case.side, case.side)
    image = Image.radial_gradient("L").resize(size).convert("RGB")
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, case.side // 2, case.side))
    images = {name: mask if name == MASK else image for name in case.image_arguments}
    arguments = {
        "height": case.side,
        "width": case.side,
        "num_inference_steps": STEPS,
        **case.arguments,
        **images,
        **more,
    }
    result = pipeline(generator=torch.Generator().manual_seed(0), **arguments)
    frames = result.frames[0] if "frames" in result else result.images
    return list(frames)
