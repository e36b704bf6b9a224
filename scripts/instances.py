"""The prices and the memory of instance types of Inference Endpoints, from a dated list.

`make models` and a plan without a network use it. Deploying asks the platform (`Account.hardware`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from handlers import MODELS
from handlers.model import Model, did_you_mean
from scripts.console import DeployError

PAGE = "https://huggingface.co/pricing#endpoints"
AS_OF = "2026-08-20"
"""The day of the table below, for vendor aws: https://huggingface.co/docs/inference-endpoints/support/pricing"""
HOURLY: dict[str, dict[str, float]] = {
    "intel-spr": {"x1": 0.033, "x2": 0.067, "x4": 0.134, "x8": 0.268, "x16": 0.536},
    "nvidia-t4": {"x1": 0.5, "x4": 3.0},
    "nvidia-l4": {"x1": 0.8, "x4": 3.8},
    "nvidia-a10g": {"x1": 1.0, "x4": 5.0},
    "nvidia-l40s": {"x1": 1.8, "x4": 8.3, "x8": 23.5},
    "nvidia-a100": {"x1": 2.5, "x2": 5.0, "x4": 10.0, "x8": 20.0},
    "nvidia-h200": {"x1": 5.0, "x2": 10.0, "x4": 20.0, "x8": 40.0},
}
"""USD an hour for one replica, by instance and size."""
REGIONS = {
    "aws": (r"[a-z]{2}(-[a-z]+)+-\d", "us-east-1"),
    "azure": (r"[a-z]+\d?", "eastus"),
    "gcp": (r"[a-z]+-[a-z]+\d+", "us-east4"),
}
"""The pattern of a region's name, and an example, by vendor. Only the platform knows which regions it has."""
MEMORY_GB = {"nvidia-t4": 14, "nvidia-l4": 24, "nvidia-a10g": 24, "nvidia-l40s": 48, "nvidia-a100": 80}
"""Memory of one GPU. A VAE runs on one; the other GPUs of a larger size stay idle."""
CPU_GB = 2
"""Memory of each CPU."""


def is_cpu(instance: str) -> bool:
    return instance.startswith(("intel", "amd"))


def table_price(vendor: str, instance: str, size: str) -> float | None:
    """Return USD an hour for one replica; None for an instance that is not in the table."""
    return HOURLY.get(instance, {}).get(size) if vendor == "aws" else None


def check_region(vendor: str, region: str) -> None:
    """Raise `DeployError` for an unknown vendor, and for a region whose name does not fit the vendor."""
    if vendor not in REGIONS:
        raise DeployError(
            f"VENDOR={vendor} is not valid: choose one of {', '.join(REGIONS)}{did_you_mean(vendor, REGIONS)}"
        )
    form, example = REGIONS[vendor]
    if region != "auto" and not re.fullmatch(form, region):
        expected = f"a region of {vendor} looks like {example}; auto takes one that has the instance"
        raise DeployError(f"REGION={region} is not valid: {expected}")


def describe_unlisted(vendor: str, instance: str) -> str:
    """Return a remark on an instance of aws that is not in the table; "" for any other instance."""
    if vendor != "aws" or instance in HOURLY:
        return ""
    return f"; {instance} is not in the list of {AS_OF}{did_you_mean(instance, HOURLY)}"


def table_memory(instance: str, size: str) -> float | None:
    """Return the GB that a VAE can use; None for an instance that is not in the table."""
    return CPU_GB * int(size[1:]) if is_cpu(instance) and size[1:].isdecimal() else MEMORY_GB.get(instance)


def instance_price(model: type[Model]) -> float:
    """Return USD an hour for the model's own instance, 0 for one that is not in the table."""
    return HOURLY.get(model.instance, {}).get("x1", 0)


def needed_memory(models: Sequence[type[Model]], instance: str) -> float:
    """Return the GB for decoding in tiles: 1 GB for the system and the process, the weights, one tile of 512x512.

    The process was measured at 0.6 to 0.8 GB. On a CPU all values are float32.
    """
    weights = tile = 0.0
    for model in models:
        stored_bytes = 4 if model.dtype == "float32" else 2
        value_bytes = 4 if is_cpu(instance) else stored_bytes
        weights += (model.weights_mb or 0) * value_bytes / stored_bytes
        tile = max(tile, model.peak["decode"].first * value_bytes * 512 * 512)
    return 1 + weights / 1e3 + tile / 1e9


def check_memory(keys: Sequence[str], instance: str, size: str, memory: float | None) -> None:
    """Raise `DeployError` for an instance that is known to have less `memory`, in GB, than decoding in tiles needs."""
    models = [MODELS[key] for key in keys]
    needed = needed_memory(models, instance)
    if memory and memory < needed:
        has = f"INSTANCE={instance} SIZE={size} has {memory:g} GB, and this needs {needed:.1f}"
        raise DeployError(f"{has}: choose a larger SIZE, or INSTANCE={max(models, key=instance_price).instance}")


def dollars(amount: float | None) -> str:
    """Return `$0.80`, or `$0.033` for a few cents, or `?`."""
    return "?" if amount is None else f"${amount:.3f}" if 0 < amount < 0.1 else f"${amount:.2f}"


def describe_price(price: float | None) -> str:
    return f"{dollars(price)} an hour" if price is not None else f"a price unknown here, see {PAGE}"
