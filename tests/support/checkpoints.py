"""Small random checkpoints of every VAE: the class and the features of the published config, with few channels.

Factors and latent channels are the published ones. Only widths and numbers of layers are smaller.
"""

from __future__ import annotations

from math import cos, sin
from pathlib import Path
from typing import Any

import diffusers
import torch
from filelock import FileLock
from packaging.version import Version
from torch import nn

from handlers import MODELS, EndpointHandler
from handlers.serving.vae.weights import find_class
from scripts.local_server import ROOT
from tests.support.tiny_videos import seeded_weights


def _means(channels: int) -> list[float]:
    return [round(0.6 * sin(3 * channel), 4) for channel in range(channels)]


def _deviations(channels: int) -> list[float]:
    return [round(1.2 + 0.7 * cos(5 * channel), 4) for channel in range(channels)]


KL = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [8, 8, 16, 16],
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
KL_16 = {**KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
WAN = {"base_dim": 8, "num_res_blocks": 1}
TINY = {
    "encoder_block_out_channels": [8] * 4,
    "decoder_block_out_channels": [8] * 4,
    "num_encoder_blocks": [1] * 4,
    "num_decoder_blocks": [1] * 4,
}
VIDEO = {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4, "layers_per_block": 1}
DOWN_095 = {
    "block_out_channels": [8, 8, 16, 16, 32],
    "down_block_types": ["LTXVideo095DownBlock3D"] * 4,
    "layers_per_block": [1] * 5,
    "spatio_temporal_scaling": [True] * 4,
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
UP_091 = {
    "decoder_block_out_channels": [8, 16, 32],
    "decoder_layers_per_block": [1] * 4,
    "decoder_spatio_temporal_scaling": [True] * 3,
    "upsample_residual": [True] * 3,
    "upsample_factor": [2] * 3,
}

SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "sd-v1": ("AutoencoderKL", {**KL, "scaling_factor": 0.18215}),
    "sdxl": ("AutoencoderKL", {**KL, "scaling_factor": 0.13025}),
    "playground-v2.5": (
        "AutoencoderKL",
        {
            **KL,
            "scaling_factor": 0.5,
            "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
            "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
        },
    ),
    "sd3": ("AutoencoderKL", {**KL_16, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "flux": ("AutoencoderKL", {**KL_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "cogview4": ("AutoencoderKL", {**KL_16, "scaling_factor": 1.0, "mid_block_add_attention": False}),
    "glm-image": (
        "AutoencoderKL",
        {
            **KL_16,
            "mid_block_add_attention": False,
            "scaling_factor": 0.18215,
            "latents_mean": _means(16),
            "latents_std": _deviations(16),
        },
    ),
    "taesd": ("AutoencoderTiny", TINY),
    "taesdxl": ("AutoencoderTiny", TINY),
    "taesd3": ("AutoencoderTiny", {**TINY, "latent_channels": 16}),
    "taef1": ("AutoencoderTiny", {**TINY, "latent_channels": 16}),
    "taef2": ("handlers.serving.vae.taef2:TinyFlux2Autoencoder", {}),  # as small as it is published
    "flux2": ("AutoencoderKLFlux2", KL),
    "flux2-small": ("AutoencoderKLFlux2", {**KL, "decoder_block_out_channels": [4, 8, 12, 12]}),
    "qwen-image": ("AutoencoderKLQwenImage", WAN),
    "qwen-image-2.1": (
        "AutoencoderKLQwenImage21",
        {"base_dim": 8, "decoder_base_dim": 8, "num_res_blocks": 1, "dim_mult": [1, 2, 2, 2, 2]},
    ),
    "qwen-image-layered": ("AutoencoderKLQwenImage", {**WAN, "input_channels": 4}),
    "hunyuan-image": (
        "AutoencoderKLHunyuanImage",
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 64,
            "block_out_channels": [32, 32, 64, 64, 128, 128],
            "layers_per_block": 1,
            "spatial_compression_ratio": 32,
            "sample_size": 384,
            "scaling_factor": 0.75289,
        },
    ),
    "sana": (
        "AutoencoderDC",
        {
            "attention_head_dim": 8,
            "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
            "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
            "encoder_block_out_channels": [8, 8, 16, 16, 32, 32],
            "decoder_block_out_channels": [8, 8, 16, 16, 32, 32],
            "encoder_layers_per_block": [1] * 6,
            "decoder_layers_per_block": [1] * 6,
            "downsample_block_type": "Conv",
            "upsample_block_type": "interpolate",
            "scaling_factor": 0.41407,
        },
    ),
    "wan-2.1": ("AutoencoderKLWan", WAN),
    "wan-2.1-2x": ("AutoencoderKLWan", {**WAN, "out_channels": 12}),
    "taew2.1": ("handlers.serving.vae.taehv:TinyVideoAutoencoder", {}),  # as small as it is published
    "wan-2.2": (
        "AutoencoderKLWan",
        {
            **WAN,
            "decoder_base_dim": 16,
            "z_dim": 48,
            "is_residual": True,
            "in_channels": 12,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "latents_mean": _means(48),
            "latents_std": _deviations(48),
        },
    ),
    "hunyuan-video": ("AutoencoderKLHunyuanVideo", VIDEO),
    "hunyuan-video-1.5": (
        "AutoencoderKLHunyuanVideo15",
        {"block_out_channels": [8, 8, 16, 32, 64], "layers_per_block": 1},
    ),
    "ltx-video": (
        "AutoencoderKLLTXVideo",
        {
            "block_out_channels": [8, 16, 16, 16],
            "decoder_block_out_channels": [8, 16, 16, 16],
            "layers_per_block": [1] * 5,
            "decoder_layers_per_block": [1] * 5,
        },
    ),
    "ltx-video-0.9.1": (
        "AutoencoderKLLTXVideo",
        {
            **UP_091,
            "block_out_channels": [8, 16, 16, 16],
            "layers_per_block": [1] * 5,
            "decoder_inject_noise": [True, True, True, False],
            "timestep_conditioning": True,
        },
    ),
    "ltx-video-0.9.5": (
        "AutoencoderKLLTXVideo",
        {**DOWN_095, **UP_091, "decoder_inject_noise": [False] * 4, "timestep_conditioning": True},
    ),
    "ltx-2": (
        "AutoencoderKLLTX2Video",
        {
            **DOWN_095,
            **UP_091,
            "block_out_channels": [8, 16, 16, 32],
            "down_block_types": ["LTX2VideoDownBlock3D"] * 4,
            "decoder_causal": False,
        },
    ),
    "ltx-2.3": (
        "AutoencoderKLLTX2Video",
        {
            **DOWN_095,
            "block_out_channels": [8, 16, 16, 16],
            "down_block_types": ["LTX2VideoDownBlock3D"] * 4,
            "decoder_block_out_channels": [8, 16, 16, 32],
            "decoder_layers_per_block": [1] * 5,
            "decoder_spatio_temporal_scaling": [True] * 4,
            "decoder_inject_noise": [False] * 5,
            "upsample_type": ["spatiotemporal", "spatiotemporal", "temporal", "spatial"],
            "upsample_residual": [False] * 4,
            "upsample_factor": [2, 2, 1, 2],
            "decoder_causal": False,
            "decoder_spatial_padding_mode": "zeros",
        },
    ),
    "minimax-h3": (
        "AutoencoderKLMiniMaxH3",
        {
            "block_out_channels": [4, 8, 8, 8, 8, 8],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "decoder_num_layers": 2,
            "decoder_num_attention_heads": 2,
            "decoder_attention_head_dim": 16,
            "decoder_ffn_mult": 2,
            "latents_mean": _means(24),
            "latents_std": _deviations(24),
        },
    ),
    "cogvideox": ("AutoencoderKLCogVideoX", {**VIDEO, "scaling_factor": 1.15258426}),
    "cogvideox-1.5": ("AutoencoderKLCogVideoX", {**VIDEO, "scaling_factor": 0.7, "invert_scale_latents": True}),
    "mochi": (
        "AutoencoderKLMochi",
        {
            "encoder_block_out_channels": [32, 32, 32, 64],
            "decoder_block_out_channels": [32, 32, 32, 64],
            "layers_per_block": [1] * 5,
        },
    ),
    "svd": (
        "AutoencoderKLTemporalDecoder",
        {
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "block_out_channels": [32] * 4,
            "layers_per_block": 1,
            "scaling_factor": 0.18215,
        },
    ),
    "easyanimate": ("AutoencoderKLMagvit", VIDEO),
    "cosmos-1.0": (
        "AutoencoderKLCosmos",
        {
            "encoder_block_out_channels": [8, 16, 16, 16],
            "decode_block_out_channels": [16, 16, 16, 16],
            "num_layers": 1,
        },
    ),
}

IMAGE_CLASSES = {
    "AutoencoderKL",
    "AutoencoderTiny",
    "handlers.serving.vae.taef2:TinyFlux2Autoencoder",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
    "AutoencoderDC",
    "AutoencoderKLTemporalDecoder",
}
"""Classes that encode [B, 3, H, W]. The others encode [B, 3, F, H, W]."""
ZEROS = ("scale1", "scale2", "register_tokens")
"""Parameters that are zero before a training, so that MiniMax-H3's blocks would do nothing."""
LAST_LAYERS = ("time_conv_out", "conv_out", "proj_out", "proj")


def build(key: str) -> Any:
    """Build the small model in float32. Latents of an image are of order 1, and decoded values exceed [-1, 1].

    The weights are always the same on one computer. Buffers of a checkpoint (LTX's mean and deviation of the latents,
    Flux2's BatchNorm) are as far from 0 and 1 as published ones.
    """
    vae_class, config = SMALL[key]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(sum(key.encode()))
        vae = find_class(vae_class).from_config(config).eval()
        if vae_class.endswith("TinyVideoAutoencoder"):
            vae.load_state_dict(seeded_weights(vae.state_dict()))
            return vae
        for name, parameter in vae.named_parameters():
            if name.rpartition(".")[2] in ZEROS:
                parameter.normal_()
        frames = () if vae_class in IMAGE_CLASSES else (22 if vae_class == "AutoencoderKLMiniMaxH3" else 9,)
        channels = getattr(model_for(key), "pixel_channels", 3)
        if channels == 4:  # images of a class with frames
            frames = (1,)
        pixels = torch.rand(1, channels, *frames, 64, 64) * 2 - 1
        for _ in range(3):  # a skip connection around the last layer is not rescaled, so one round is not enough
            latents = _latents(vae.encode(pixels))
            _rescale(vae.encoder, latents, 1.0)
            _rescale(vae.decoder, vae.decode(torch.randn_like(latents), **_conditions(vae))[0], 0.9)
        for mean, deviation in _statistics(vae):
            mean.copy_(torch.tensor(_means(len(mean))))
            deviation.copy_(torch.tensor(_deviations(len(deviation))))
    return vae


def checkpoint(folder: Path, key: str) -> Path:
    """Return the checkpoint of a small model, or of `tiny`, in a folder that processes share.

    The first use makes it as `save_pretrained` does.
    """
    path = folder / key
    with FileLock(folder / f"{key}.lock"):
        if not path.exists() and key == "tiny":
            path.symlink_to(ROOT / "models" / "tiny")
        elif not path.exists():
            build(key).save_pretrained(path)
    return path


def _latents(encoded: Any) -> torch.Tensor:
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]


def _conditions(vae: Any) -> dict[str, Any]:
    """Return the inputs that the class's `decode` needs besides latents."""
    if vae.config.get("timestep_conditioning"):
        return {"temb": torch.tensor([0.05])}
    return {"num_frames": 1} if type(vae).__name__ == "AutoencoderKLTemporalDecoder" else {}


def _rescale(coder: torch.nn.Module, result: torch.Tensor, deviation: float) -> None:
    """Rescale the last layer so that results have mean 0 and about this standard deviation."""
    last = next((getattr(coder, name) for name in LAST_LAYERS if hasattr(coder, name)), coder)
    layer = [layer for layer in last.modules() if isinstance(layer, (nn.Conv2d, nn.Conv3d, nn.Linear))][-1]
    factor = deviation / result.std()
    layer.weight.mul_(factor)
    if layer.bias is not None:
        layer.bias.sub_(result.mean() / 2).mul_(factor)


def _statistics(vae: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    buffers = dict(vae.named_buffers())
    pairs = (("latents_mean", "latents_std"), ("bn.running_mean", "bn.running_var"))
    return [(buffers[mean], buffers[deviation]) for mean, deviation in pairs if mean in buffers]


def model_for(key: str) -> type[EndpointHandler] | None:
    """Return a served model for a small checkpoint. Some checkpoints have more than one model."""
    return MODELS.get(max((name for name in MODELS if key.startswith(name)), key=len, default=""))


SERVED = [
    key for key in SMALL if (model := model_for(key)) and Version(diffusers.__version__) >= Version(model.diffusers)
]
"""Checkpoints that this version of diffusers can load."""


def small_tiles(vae: Any, scale: int) -> None:
    """Set tiles of 4x4 latents, 3 apart, so that small images take several tiles.

    CogVideoX has 6x5 latents, 5 and 4 apart.
    """
    height, width = (6, 5) if hasattr(vae, "tile_overlap_factor_height") else (4, 4)
    for side, latents in (("size", 4), ("height", height), ("width", width)):
        sizes = {
            f"sample_min_{side}": latents * scale,
            f"sample_stride_{side}": 3 * scale,
            f"latent_min_{side}": latents,
            f"sample_min_overlap_{side}": scale,
        }
        for name, value in sizes.items():
            if hasattr(vae, f"tile_{name}"):
                setattr(vae, f"tile_{name}", value)
