"""Reference results of diffusers' own pipelines for latents and pixels. Their source runs here without a copy.

A pipeline has no text encoder and no transformer. Its decoding is the end of its `__call__`, cut out of the source: all
statements after the denoising loop. Its encoding is the method that img2img or image-to-video calls.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import diffusers
import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.video_processor import VideoProcessor
from torch import Tensor


class Unavailable(LookupError):
    """The installed diffusers (or transformers) has no such pipeline, or it does not accept such a VAE."""


class Changed(AssertionError):
    """The source of a pipeline has changed, and this module cannot cut it."""


@dataclass(frozen=True)
class PipelineResult:
    """Result of a pipeline for the latents at the end of its denoising loop."""

    latent: Tensor
    """Its output with `output_type="latent"`."""
    decoded: Tensor
    """Output of `vae.decode`, concatenated along the batch if the pipeline decoded in chunks."""
    pixels: np.ndarray
    """Its images as uint8 [B, H, W, 3], or videos as [B, F, H, W, 3]."""


@torch.no_grad()
def decode(pipeline: str, vae: Any, latents: Tensor, **arguments: Any) -> PipelineResult:
    """Run the end of the pipeline's `__call__` on plain latents, [B, C, h, w] or [B, C, F, h, w].

    A name that ends with "Step" is a block of a modular pipeline.

    The latents are packed as in the pipeline. `arguments` are further arguments or local variables of `__call__`:
    `generator`, `decode_timestep`, `decode_noise_scale`, `decode_chunk_size`, `additional_frames`...
    """
    if pipeline.endswith("Step"):
        return _decode_in_a_step(pipeline, vae, latents)
    pipe = make(pipeline, vae)
    names = {**_defaults(pipe), **_locals(pipe, latents), **arguments, "self": pipe, "latents": pack(pipe, latents)}
    latent = names["latents"] if pipeline in RETURNS_NO_LATENTS else _finish(pipe, {**names, "output_type": "latent"})
    decoded: list[Tensor] = []

    def recorded(*args: Any, decode: Callable[..., Any] = vae.decode, **kwargs: Any) -> Any:
        result = decode(*args, **kwargs)
        decoded.append(result[0])
        return result

    with patch.object(vae, "decode", recorded):
        images = _finish(pipe, {**names, "output_type": "pil"})
    return PipelineResult(latent, torch.cat(decoded), np.array(images))


@torch.no_grad()
def encode(pipeline: str, vae: Any, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Encode pixels in [-1, 1] as the pipeline does: [B, 3, H, W] for an image VAE, else [B, 3, F, H, W].

    Latents have the layout of the pipeline's method. Without a generator, the distribution's mode replaces its sample.
    Pipelines in `FIRST_FRAME` encode one frame only.
    """
    if pipeline not in ENCODERS:
        raise Unavailable(f"{pipeline} has no entry among the encoders")
    if pipeline in FIRST_FRAME and pixels.shape[2] != 1:
        raise ValueError(f"{pipeline} encodes one frame, not {pixels.shape[2]}")
    pipe = SimpleNamespace(vae=vae) if pipeline == "MiniMaxH3" else make(pipeline, vae)
    if generator is not None:
        return ENCODERS[pipeline](pipe, pixels, generator)
    with patch.object(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()):
        return ENCODERS[pipeline](pipe, pixels, None)


def _decode_in_a_step(name: str, vae: Any, latents: Tensor) -> PipelineResult:
    """Run MiniMax-H3's block that decodes. Its `vae.decode` gives pixels normalized as for ImageNet."""
    try:
        module = importlib.import_module("diffusers.modular_pipelines.minimax_h3.decoders")
    except ImportError as error:
        raise Unavailable(name) from error
    step, decoded = getattr(module, name)(), []
    mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in IMAGENET)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        decoded.append(vae.decode(*args, **kwargs)[0] * deviation + mean)
        return vae.decode(*args, **kwargs)

    components = SimpleNamespace(
        vae=SimpleNamespace(decode=recorded, config=vae.config),
        pixel_mean=IMAGENET[0],
        pixel_std=IMAGENET[1],
        video_processor=VideoProcessor(vae_scale_factor=16, do_normalize=False),
        _execution_device=latents.device,
    )
    state = SimpleNamespace(latents=latents, output_type="np")
    with (
        patch.object(type(step), "get_block_state", lambda self, state: state),
        patch.object(type(step), "set_block_state", lambda *_: None),
    ):
        step(components, state)
    return PipelineResult(latents, decoded[0] * 2 - 1, (state.videos * 255).round().astype(np.uint8))


def make(pipeline: str, vae: Any) -> Any:
    """Build the pipeline with its own `__init__`. Other components are None or come from `COMPONENTS`."""
    try:
        cls = getattr(diffusers, pipeline)
        required = [
            name
            for name, parameter in inspect.signature(cls.__init__).parameters.items()
            if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        pipe = cls(**{**dict.fromkeys(required[1:]), **ARGUMENTS.get(pipeline, {}), "vae": vae})
    except (AttributeError, ImportError, RuntimeError) as error:
        raise Unavailable(f"{pipeline} of diffusers {diffusers.__version__} with {type(vae).__name__}") from error
    for name, component in COMPONENTS.get(pipeline, {}).items():
        setattr(pipe, name, component)
    return pipe


def pack(pipeline: Any, latents: Tensor) -> Tensor:
    """Convert plain latents to the form in which this pipeline (from `make`) denoises them."""
    return PACKERS.get(type(pipeline).__name__, lambda pipe, z: z)(pipeline, latents)


def _finish(pipe: Any, names: dict[str, Any]) -> Any:
    """Run all statements after the denoising loop in the pipeline's `__call__`, with these local variables."""
    call = inspect.unwrap(type(pipe).__call__)
    body = _source(call).body
    loops = [index for index, statement in enumerate(body) if "self.scheduler.step(" in ast.unparse(statement)]
    tail = body[loops[-1] + 1 :] if loops else []
    if "decode" not in "".join(map(ast.unparse, tail)):
        raise Changed(f"{call.__qualname__}: no decoding after a denoising loop")
    result = _run(call, tail, names)
    return result[0] if isinstance(result, tuple) else result


def _inline(method: str, pixels: str, *needed: str) -> Callable[..., Tensor]:
    """Return an encoder from the middle of a method: `x = ...self.vae.encode(pixels)...` and the next `x = ...`.

    The assignments to `needed` before it run first.
    """

    def encoded(pipe: Any, values: Tensor, generator: torch.Generator | None) -> Tensor:
        function = inspect.unwrap(getattr(type(pipe), method))
        assignments = [node for node in ast.walk(_source(function)) if isinstance(node, ast.Assign)]
        assignments.sort(key=lambda node: node.lineno)
        targets = [ast.unparse(node.targets[0]) for node in assignments]
        encodings = [i for i, node in enumerate(assignments) if f"self.vae.encode({pixels})" in ast.unparse(node)]
        if len(encodings) != 1 or targets[encodings[0] :].count(targets[encodings[0]]) < 2:
            raise Changed(f"{function.__qualname__}: not one encoding of {pixels} and its scaling")
        first = encodings[0]
        second = targets.index(targets[first], first + 1)
        before = [node for node, target in zip(assignments[:first], targets, strict=False) if target in needed]
        returned = ast.parse(f"return {targets[first]}").body
        names = {"self": pipe, pixels: values, "generator": generator, "prompt_embeds": values}
        names |= {"device": values.device, "dtype": values.dtype}
        return _run(function, [*before, assignments[first], assignments[second], *returned], names)

    return encoded


def _source(function: Callable[..., Any]) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    return tree.body[0]  # type: ignore[return-value]


def _run(function: Callable[..., Any], statements: list[ast.stmt], names: dict[str, Any]) -> Any:
    """Execute statements of a function with the names of its module. A traceback shows the lines of its file."""
    piece: Any = ast.parse(f"def piece({', '.join(names)}): ...").body[0]
    piece.body = statements
    code = compile(ast.fix_missing_locations(ast.Module([piece], [])), str(inspect.getsourcefile(function)), "exec")
    scope: dict[str, Any] = {}
    exec(code, function.__globals__, scope)
    try:
        return scope["piece"](**names)
    except NameError as error:
        raise Changed(f"{function.__qualname__}: {error}") from error


def _defaults(pipe: Any) -> dict[str, Any]:
    parameters = inspect.signature(type(pipe).__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def _locals(pipe: Any, latents: Tensor) -> dict[str, Any]:
    """Return the local variables of `__call__` after the denoising loop, for one prompt to each item of the batch."""
    batch, channels, *frames, rows, columns = latents.shape
    factors = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")
    spatial = next((getattr(pipe, name) for name in factors if hasattr(pipe, name)), None) or pipe.vae_scale_factor
    height, width = rows * spatial, columns * spatial
    names = {
        "return_dict": False,
        "device": latents.device,
        "prompt_embeds": latents,  # the pipeline reads its dtype
        "batch_size": batch,
        "num_channels_latents": channels,
        "height": height,
        "width": width,
        "num_frames": (frames[0] - 1) * getattr(pipe, "vae_scale_factor_temporal", 1) + 1 if frames else 1,
        "orig_height": height,
        "orig_width": width,
        "latent_num_frames": frames[0] if frames else 1,
        "latent_height": rows,
        "latent_width": columns,
        "decode_chunk_size": 14,
        "use_resolution_binning": False,
        "needs_upcasting": False,
        "additional_frames": 0,
        "is_conditioning_image_or_video": False,
        "extra_conditioning_num_latents": 0,
        "revised_prompts": None,
        "kv_caches": MagicMock(),
        **dict.fromkeys(("audio_latents", "audio_num_frames", "latent_mel_bins"), MagicMock()),
    }
    if hasattr(pipe, "_prepare_latent_ids"):
        names["latent_ids"] = pipe._prepare_latent_ids(pipe._patchify_latents(latents))
    return names


def _unit(pixels: Tensor) -> Tensor:
    """Convert pixels to [0, 1], the input of a pipeline's `preprocess`."""
    return pixels / 2 + 0.5


def _prepare(pipe: Any, pixels: Tensor, generator: torch.Generator | None, *conditions: Any) -> Any:
    """Run the pipeline's `prepare_latents` for exactly the given frames, so that its output has no others."""
    batch, _, *frames, height, width = pixels.shape
    arguments = {
        "batch_size": batch,
        "num_channels_latents": pipe.vae.config.get("latent_channels") or pipe.vae.config.z_dim,
        "height": height,
        "width": width,
        "num_frames": frames[0] if frames else 1,
        "dtype": pixels.dtype,
        "device": pixels.device,
        "generator": generator,
    }
    accepted = inspect.signature(pipe.prepare_latents).parameters
    accepted_arguments = {name: value for name, value in arguments.items() if name in accepted}
    return pipe.prepare_latents(*(conditions or (pixels,)), **accepted_arguments)


PACKERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **dict.fromkeys(
        ("FluxPipeline", "QwenImagePipeline", "QwenImageEditPipeline", "QwenImage21Pipeline"),
        lambda pipe, z: pipe._pack_latents(z, *z.shape),
    ),
    **dict.fromkeys(
        ("Flux2Pipeline", "Flux2KleinPipeline"), lambda pipe, z: pipe._pack_latents(pipe._patchify_latents(z))
    ),
    "QwenImageLayeredPipeline": lambda pipe, z: pipe._pack_latents(
        z.movedim(2, 1).contiguous(), len(z), z.shape[1], *z.shape[-2:], z.shape[2]
    ),
    "ErnieImagePipeline": lambda pipe, z: pipe._patchify_latents(z),
    **dict.fromkeys(
        ("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline", "LTX2Pipeline"),
        lambda pipe, z: pipe._pack_latents(
            z, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
        ),
    ),
    **dict.fromkeys(("CogVideoXPipeline", "StableVideoDiffusionPipeline"), lambda pipe, z: z.permute(0, 2, 1, 3, 4)),
    "Kandinsky5T2VPipeline": lambda pipe, z: z.permute(0, 2, 3, 4, 1),
    "Kandinsky5T2IPipeline": lambda pipe, z: z.unsqueeze(2).permute(0, 2, 3, 4, 1),
}
"""Latent layouts of pipelines. The last four have no method for it: their noise has that shape."""

RETURNS_NO_LATENTS = {"QwenImageLayeredPipeline"}
"""Pipelines that fail with `output_type="latent"`, in diffusers up to 0.42. Their callbacks have the latents."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of MiniMax-H3's pixels, as its modular pipeline has them."""

CLEAN = SimpleNamespace(add_noise=lambda latents, noise, timestep: latents, init_noise_sigma=1.0)
"""Scheduler that adds no noise to encoded latents."""
EDM = {"scheduler": diffusers.EDMEulerScheduler(), "safety_checker": None}
COMPONENTS: dict[str, dict[str, Any]] = {
    "CosmosTextToWorldPipeline": EDM,
    "CosmosVideoToWorldPipeline": EDM,
    "WanVideoToVideoPipeline": {"scheduler": CLEAN},
    "CogVideoXVideoToVideoPipeline": {"scheduler": CLEAN},
    "CogVideoXImageToVideoPipeline": {"scheduler": CLEAN, "transformer": MagicMock(**{"config.patch_size_t": None})},
    "Kandinsky5I2VPipeline": {"transformer": SimpleNamespace(visual_cond=False)},
    "LTX2Pipeline": {"audio_vae": MagicMock(), "vocoder": MagicMock()},
}
"""Components that are set after `__init__`, which the executed code needs."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "CosmosTextToWorldPipeline": {"safety_checker": torch.nn.Module()},
    "CosmosVideoToWorldPipeline": {"safety_checker": torch.nn.Module()},
    "QwenImage21Pipeline": {"processor": MagicMock()},
    "StableDiffusionPipeline": {"requires_safety_checker": False},
    "StableDiffusionInpaintPipeline": {"requires_safety_checker": False},
}
"""Arguments of `__init__` that prevent the download of a safety checker, or a warning."""

ENCODERS: dict[str, Callable[[Any, Tensor, torch.Generator | None], Tensor]] = {
    "StableDiffusionInpaintPipeline": lambda pipe, x, g: pipe._encode_vae_image(x, g),
    "StableDiffusionXLImg2ImgPipeline": lambda pipe, x, g: pipe.prepare_latents(
        x, None, len(x), 1, x.dtype, x.device, g, add_noise=False
    ),
    "StableDiffusion3InpaintPipeline": lambda pipe, x, g: pipe._encode_vae_image(x, g),
    "FluxImg2ImgPipeline": lambda pipe, x, g: pipe._encode_vae_image(x, g),
    "Flux2Pipeline": lambda pipe, x, g: pipe._encode_vae_image(x, g),
    "Flux2KleinPipeline": lambda pipe, x, g: pipe._encode_vae_image(x, g),
    "QwenImage21Pipeline": lambda pipe, x, g: pipe._encode_vae_image(x.unsqueeze(2), g),
    "QwenImageLayeredPipeline": lambda pipe, x, g: pipe._encode_vae_image(x.unsqueeze(2), g),
    "QwenImageEditPipeline": lambda pipe, x, g: pipe._encode_vae_image(x.unsqueeze(2), g),
    "QwenImageImg2ImgPipeline": lambda pipe, x, g: pipe._encode_vae_image(x.unsqueeze(2), g),
    "CogView4ControlPipeline": _inline("__call__", "control_image", "vae_shift_factor"),
    "GlmImagePipeline": _inline("__call__", "condition_image", "latents_mean", "latents_std"),
    "SanaControlNetPipeline": _inline("__call__", "control_image"),
    "Kandinsky5I2IPipeline": lambda pipe, x, g: _prepare(pipe, x, g, _unit(x))[..., 16:32],
    "StableVideoDiffusionPipeline": lambda pipe, x, g: pipe._encode_vae_image(x, x.device, 1, False),
    "WanVideoToVideoPipeline": _prepare,
    "CogVideoXVideoToVideoPipeline": _prepare,
    "CosmosVideoToWorldPipeline": lambda pipe, x, g: _prepare(pipe, x, g)[1],
    "LTXConditionPipeline": lambda pipe, x, g: _prepare(pipe, x, g, [x], [1.0], [0])[0],
    "LTX2ConditionPipeline": _inline("prepare_latents", "condition_tensor"),
    "MiniMaxH3": lambda pipe, x, g: importlib.import_module(
        "diffusers.modular_pipelines.minimax_h3.encoders"
    ).encode_vae_condition(pipe.vae, _unit(x) * 255, *IMAGENET),
    "EasyAnimateControlPipeline": lambda pipe, x, g: pipe.prepare_control_latents(
        x, None, len(x), *x.shape[-2:], x.dtype, x.device, g, False
    )[0],
    "LTXImageToVideoPipeline": lambda pipe, x, g: _prepare(pipe, x[:, :, 0], g)[0],
    "CogVideoXImageToVideoPipeline": lambda pipe, x, g: _prepare(pipe, x[:, :, 0], g)[1],
    "HunyuanVideoImageToVideoPipeline": lambda pipe, x, g: _prepare(pipe, x[:, :, 0], g)[1],
    "HunyuanVideo15ImageToVideoPipeline": lambda pipe, x, g: pipe._get_image_latents(
        pipe.vae, pipe.video_processor, _unit(x[:, :, 0]), *x.shape[-2:], x.device
    ),
    "Kandinsky5I2VPipeline": lambda pipe, x, g: _prepare(pipe, x[:, :, 0], g, _unit(x[:, :, 0])),
    "SanaImageToVideoPipeline": lambda pipe, x, g: torch.cat(
        [_prepare(pipe, video[:, :, 0], g) for video in x.split(1)]
    ),
}
FIRST_FRAME = {name for name in ENCODERS if name.endswith("ImageToVideoPipeline")} | {"Kandinsky5I2VPipeline"}
"""Image-to-video pipelines, which encode only their first frame."""

LTX = ("LTXPipeline", "LTXConditionPipeline"), ("LTXConditionPipeline", "LTXImageToVideoPipeline")
SDXL = ("StableDiffusionXLPipeline",), ("StableDiffusionXLImg2ImgPipeline",)
COGVIDEOX = ("CogVideoXPipeline",), ("CogVideoXVideoToVideoPipeline", "CogVideoXImageToVideoPipeline")
PIPELINES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "sd-v1": (("StableDiffusionPipeline",), ("StableDiffusionInpaintPipeline",)),
    "taesd": (("StableDiffusionPipeline",), ("StableDiffusionInpaintPipeline",)),
    "sdxl": SDXL,
    "taesdxl": SDXL,
    "playground-v2.5": SDXL,
    "sd3": (("StableDiffusion3Pipeline",), ("StableDiffusion3InpaintPipeline",)),
    "taesd3": (("StableDiffusion3Pipeline",), ("StableDiffusion3InpaintPipeline",)),
    "flux": (("FluxPipeline", "Kandinsky5T2IPipeline"), ("FluxImg2ImgPipeline", "Kandinsky5I2IPipeline")),
    "taef1": (("FluxPipeline",), ("FluxImg2ImgPipeline",)),
    "cogview4": (("CogView4Pipeline",), ("CogView4ControlPipeline",)),
    "glm-image": (("GlmImagePipeline",), ("GlmImagePipeline",)),
    "flux2": (("Flux2Pipeline", "Flux2KleinPipeline", "ErnieImagePipeline"), ("Flux2Pipeline", "Flux2KleinPipeline")),
    "qwen-image-2.1": (("QwenImage21Pipeline",), ("QwenImage21Pipeline",)),
    "qwen-image-layered": ((), ("QwenImageLayeredPipeline",)),
    "flux2-small": (("Flux2Pipeline", "Flux2KleinPipeline"), ("Flux2Pipeline", "Flux2KleinPipeline")),
    "qwen-image": (("QwenImagePipeline",), ("QwenImageEditPipeline", "QwenImageImg2ImgPipeline")),
    "hunyuan-image": (("HunyuanImagePipeline",), ()),
    "sana": (("SanaPipeline",), ("SanaControlNetPipeline",)),
    "taef2": ((), ()),
    "taew2.1": ((), ()),
    "wan-2.1": (("WanPipeline",), ("WanVideoToVideoPipeline",)),
    "wan-2.1-2x": ((), ("WanVideoToVideoPipeline",)),
    "wan-2.2": (("WanPipeline",), ("WanVideoToVideoPipeline",)),
    "hunyuan-video": (
        ("HunyuanVideoPipeline", "Kandinsky5T2VPipeline"),
        ("HunyuanVideoImageToVideoPipeline", "Kandinsky5I2VPipeline"),
    ),
    "hunyuan-video-1.5": (("HunyuanVideo15Pipeline",), ("HunyuanVideo15ImageToVideoPipeline",)),
    "ltx-video": LTX,
    "ltx-video-0.9.1": LTX,
    "ltx-video-0.9.5": LTX,
    "ltx-2": (("LTX2Pipeline", "SanaVideoPipeline"), ("LTX2ConditionPipeline", "SanaImageToVideoPipeline")),
    "ltx-2.3": (("LTX2Pipeline", "SanaVideoPipeline"), ("LTX2ConditionPipeline", "SanaImageToVideoPipeline")),
    "minimax-h3": (("MiniMaxH3VideoDecodeStep",), ("MiniMaxH3",)),
    "cogvideox": COGVIDEOX,
    "cogvideox-1.5": COGVIDEOX,
    "mochi": (("MochiPipeline",), ()),
    "svd": (("StableVideoDiffusionPipeline",), ("StableVideoDiffusionPipeline",)),
    "easyanimate": (("EasyAnimatePipeline",), ("EasyAnimateControlPipeline",)),
    "cosmos-1.0": (("CosmosTextToWorldPipeline",), ("CosmosVideoToWorldPipeline",)),
}
"""Pipelines that decode with a model's VAE, and pipelines that encode.

None encodes for HunyuanImage and Mochi, none decodes to twice the size, and none has taef2 or a VAE of the TAEHV
family.
"""
