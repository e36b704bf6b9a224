"""Response of `GET /config`, which describes the model and the service to clients."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from handlers.model import Task
from handlers.serving.limits import Limits
from handlers.serving.media.request import ImageFormat
from handlers.serving.pipeline import Pipeline
from handlers.version import VERSION


def describe(pipeline: Pipeline) -> dict[str, Any]:
    """Describe a pipeline in types of JSON, without paths of this machine. `docs/http-api.md` explains each entry."""
    vae, declared, layout, settings = pipeline.vae, pipeline.vae.declared, pipeline.layout, pipeline.settings
    tasks: list[Task] = ["decode", "encode"]
    stored = json.loads(vae.model.to_json_string())
    return {
        "version": VERSION,
        "model": settings.model,
        "checkpoint": public_name(declared.checkpoint),
        "subfolder": declared.subfolder,
        "revision": settings.revision,
        "weights": settings.weights if settings.weights in (None, "random") else "local",
        "vae_class": declared.vae_class.rpartition(":")[2],
        "diffusers": version("diffusers"),
        "vae_config": {name: value for name, value in stored.items() if name != "_name_or_path"},
        "buffers": vae.statistics,
        "dtype": str(vae.dtype).removeprefix("torch."),
        "device": str(vae.device),
        "fast": vae.fast.verdicts,
        "exact": settings.exact,
        "kind": layout.kind,
        "tasks": tasks,
        "sample_modes": ["argmax", "sample", "moments"] if layout.variational else ["argmax"],
        "latents": {
            "channels": layout.latent_channels,
            "layout": pipeline.latents_layouts.own,
            "pipeline_layout": declared.pipeline_layout or pipeline.latents_layouts.own,
            "layouts": list(pipeline.latents_layouts.names),
            "patch": declared.patch,
            "vae_scale_factor": layout.vae_scale_factor,
            "clip": layout.clip or 1,
            "least_frames": declared.least_latent_frames,
            "takes_scaled": declared.takes_scaled,
            "comfyui": declared.comfyui_latents,
        },
        "pixels": {
            "layout": "BCFHW" if layout.kind == "video" else "BCHW",
            "channels": layout.pixel_channels,
            "upscale": layout.upscale,
            "range": [-1, 1],
            "frame_counts": list(layout.frame_counts),
            "statistics": declared.pixel_statistics,
            "fps": declared.fps,
        },
        "normalization": _normalization(pipeline),
        "outputs": {
            "output_type": ["pil", "pt", "mp4"] if layout.kind == "video" else ["pil", "pt"],
            "image_format": list(get_args(ImageFormat)) if layout.kind == "image" else [],
        },
        "limits": {name: getattr(settings, name) for name in Limits.model_fields},
    }


def public_name(checkpoint: str) -> str:
    """Return the name of a repository, or the last component of a local folder."""
    return Path(checkpoint).name if Path(checkpoint).is_absolute() else checkpoint


def _normalization(pipeline: Pipeline) -> dict[str, Any]:
    """Describe ``raw = scaled * std / factor + mean``, or ``scaled / factor + shift``, per channel."""
    normalization, declared = pipeline.normalization, pipeline.vae.declared
    statistics = {"mean": normalization.mean, "std": normalization.std}
    return {
        "factor": normalization.factor if declared.uses_scaling_factor or normalization.mean is None else None,
        "shift": normalization.shift,
        **{name: None if values is None else values[0].tolist() for name, values in statistics.items()},
        "raw_layouts": list(declared.raw_layouts),
        "unshifted_layouts": list(declared.unshifted_layouts),
    }
