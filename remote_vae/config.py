"""The response of `GET /config`, checked: it may come from a server that is none of this project."""

from __future__ import annotations

import json
import math
from typing import Any

ENTRIES: dict[str, Any] = {
    "version": str,
    "model": str,
    "checkpoint": str,
    "vae_class": str,
    "diffusers": str,
    "vae_config": dict,
    "buffers": dict,
    "dtype": ("float16", "float32", "bfloat16"),
    "device": str,
    "kind": ("image", "video"),
    "sample_modes": list,
    "latents": {"channels": int, "layout": ("BCHW", "BCFHW"), "pipeline_layout": str, "vae_scale_factor": int},
    "pixels": {"layout": ("BCHW", "BCFHW"), "frame_counts": list},
    "limits": {"max_batch": float, "max_pixels": float, "max_body_mb": float},
}
"""The entries that this package reads: for each its type, or the strings that it may be."""

LARGEST = 1 << 16
"""Of a count or a size of the VAE; that of published ones is 2048."""

MOST_LAYERS = 32
"""In one block of the VAE; published ones have up to 14."""

LONGEST = 512
"""Elements of a list in the VAE's config; published ones have up to 128."""


def read_config(content: bytes) -> dict[str, Any]:
    """The config in a response's body.

    Raises:
        ValueError: it is no JSON, or an entry is missing or of another type or size than any VAE has.
    """
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("the response is no JSON") from None
    _check("the response", config, ENTRIES)
    counts = config["pixels"]["frame_counts"]
    for count in counts:
        _check("pixels.frame_counts", count, int)
    if len(counts) != 3 or counts != sorted(counts):
        raise ValueError("pixels.frame_counts are not three ascending numbers")
    _check_sizes(config["vae_config"])
    return config


def _check(name: str, value: Any, kind: Any) -> None:
    """Raises `ValueError` unless the value is of this kind, as `ENTRIES` writes it."""
    if isinstance(kind, dict):
        _check(name, value, dict)
        for entry in kind:
            if entry not in value:
                raise ValueError(f"{name} has no entry {entry}")
            _check(entry, value[entry], kind[entry])
    elif isinstance(kind, tuple):
        if value not in kind:
            raise ValueError(f"{name} is not one of {', '.join(kind)}")
    elif kind is int:
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise ValueError(f"{name} is not a whole number from 1 to {LARGEST}")
    elif kind is float:
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{name} is not a number above 0")
    elif not isinstance(value, kind):
        words = {dict: "an object", list: "a list", str: "a string"}
        raise ValueError(f"{name} is not {words[kind]}")


def _check_sizes(vae_config: dict[str, Any]) -> None:
    """Raises `ValueError` for a VAE that is larger than any, whose modules could not be made here."""
    for name, value in vae_config.items():
        values = value if isinstance(value, list) else [value]
        most = MOST_LAYERS if "layers" in name or "blocks" in name else LARGEST
        too_large = any(isinstance(each, int) and abs(each) > most for each in values)
        if len(values) > LONGEST or too_large:
            raise ValueError(f"vae_config.{name} is larger than that of any VAE")
