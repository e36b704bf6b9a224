"""The response of `GET /config`. It is checked, because it may come from a server of another project."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_SIZE = 1 << 16
"""Largest count or size of a VAE; published ones have up to 2048."""

MAX_LAYERS = 32
"""Most layers in one block of a VAE; published ones have up to 14."""

MAX_ELEMENTS = 512
"""Most elements of a list in a VAE's config; published ones have up to 128."""


@dataclass(frozen=True)
class Kind:
    """The values that an entry may have."""

    description: str
    matches: Callable[[Any], bool]


def one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda value: value in names)


def is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_SIZE


def is_ascending(value: Any) -> bool:
    return isinstance(value, list) and 3 <= len(value) <= 32 and all(map(is_size, value)) and value == sorted(value)


TEXT = Kind("a string", lambda value: isinstance(value, str))
LIST = Kind("a list", lambda value: isinstance(value, list))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
SIZE = Kind(f"a whole number from 1 to {MAX_SIZE}", is_size)
LIMIT = Kind("a number above 0", lambda value: type(value) in (int, float) and 0 < value < math.inf)
COUNTS = Kind(f"3 to 32 ascending whole numbers from 1 to {MAX_SIZE}", is_ascending)


def is_statistics(value: Any) -> bool:
    """Return whether a value is null, or a mean and a deviation of each channel."""
    if value is None:
        return True
    rows = list(value) if isinstance(value, list) else []
    return len(rows) == 2 and all(
        isinstance(row, list) and 3 <= len(row) <= 4 and all(map(is_finite, row)) for row in rows
    )


def is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


STATISTICS = Kind("null, or two lists of numbers", is_statistics)

ENTRIES: dict[str, Any] = {
    "version": TEXT,
    "model": TEXT,
    "checkpoint": TEXT,
    "vae_class": TEXT,
    "diffusers": TEXT,
    "vae_config": OBJECT,
    "buffers": OBJECT,
    "dtype": one_of("float16", "float32", "bfloat16"),
    "device": TEXT,
    "kind": one_of("image", "video"),
    "sample_modes": LIST,
    "latents": {
        "channels": SIZE,
        "layout": one_of("BCHW", "BCFHW"),
        "pipeline_layout": TEXT,
        "vae_scale_factor": SIZE,
        "clip": SIZE,
        "least_frames": SIZE,
        "takes_scaled": Kind("true or false", lambda value: isinstance(value, bool)),
        "comfyui": Kind("raw, normalized or null", lambda value: value in ("raw", "normalized", None)),
    },
    "pixels": {
        "layout": one_of("BCHW", "BCFHW"),
        "channels": SIZE,
        "upscale": SIZE,
        "frame_counts": COUNTS,
        "statistics": STATISTICS,
    },
    "limits": {"max_batch": LIMIT, "max_pixels": LIMIT, "max_body_mb": LIMIT},
}
"""Entries that this package reads."""


def read_config(content: bytes) -> dict[str, Any]:
    """Return the config in a response's body.

    Raises:
        ValueError: it is no JSON, or an entry is missing, or has another type or size than in any VAE.
    """
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("the response is not JSON") from None
    _check("the response", config, ENTRIES)
    for name, value in config["vae_config"].items():
        _check_size(name, value)
    return config


def _check(name: str, value: Any, kind: Kind | dict[str, Any]) -> None:
    """Raise `ValueError` unless the value is of this kind, or is an object with these entries."""
    if isinstance(kind, Kind):
        if not kind.matches(value):
            raise ValueError(f"{name} is not {kind.description}")
        return
    _check(name, value, OBJECT)
    for entry, entry_kind in kind.items():
        if entry not in value:
            raise ValueError(f"{name} has no entry {entry}")
        _check(entry, value[entry], entry_kind)


def _check_size(name: str, value: Any) -> None:
    """Raise `ValueError` for an entry that is larger than in any VAE: its modules would fill the memory."""
    values = value if isinstance(value, list) else [value]
    largest = MAX_LAYERS if "layers" in name or "blocks" in name else MAX_SIZE
    if len(values) > MAX_ELEMENTS or any(isinstance(each, int) and abs(each) > largest for each in values):
        raise ValueError(f"vae_config.{name} is larger than in any VAE")
