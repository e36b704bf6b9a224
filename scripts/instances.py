"""The instance types of Inference Endpoints, by a dated list: what they cost and what they hold.

For `make models`, and for a plan that is made without a network; deploying asks the platform (`Account.hardware`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from handlers import MODELS
from handlers.model import Model, did_you_mean
from scripts.console import DeployError

PAGE = "https://huggingface.co/pricing#endpoints"
AS_OF = "2026-08-20"
"""Day of the table below: vendor aws, from https://huggingface.co/docs/inference-endpoints/support/pricing."""
HOURLY: dict[str, dict[str, float]] = {
    "intel-spr": {"x1": 0.033, "x2": 0.067, "x4": 0.134, "x8": 0.268, "x16": 0.536},
    "nvidia-t4": {"x1": 0.5, "x4": 3.0},
    "nvidia-l4": {"x1": 0.8, "x4": 3.8},
    "nvidia-a10g": {"x1": 1.0, "x4": 5.0},
    "nvidia-l40s": {"x1": 1.8, "x4": 8.3, "x8": 23.5},
    "nvidia-a100": {"x1": 2.5, "x2": 5.0, "x4": 10.0, "x8": 20.0},
    "nvidia-h200": {"x1": 5.0, "x2": 10.0, "x4": 20.0, "x8": 40.0},
}
"""USD an hour and replica, by instance and size."""
REGIONS = {
    "aws": (r"[a-z]{2}(-[a-z]+)+-\d", "us-east-1"),
    "azure": (r"[a-z]+\d?", "eastus"),
    "gcp": (r"[a-z]+-[a-z]+\d+", "us-east4"),
}
"""The form of a region's name by vendor, and an example. Which regions have a machine, only the platform knows."""
MEMORY_GB = {"nvidia-t4": 14, "nvidia-l4": 24, "nvidia-a10g": 24, "nvidia-l40s": 48, "nvidia-a100": 80}
"""Of one GPU, which is what a VAE runs on: the others of a larger size stay idle."""
CPU_GB = 2
"""Of each CPU."""


def is_cpu(instance: str) -> bool:
    return instance.startswith(("intel", "amd"))


def table_price(vendor: str, instance: str, size: str) -> float | None:
    """USD an hour for one replica; None where the table does not know it."""
    return HOURLY.get(instance, {}).get(size) if vendor == "aws" else None


def check_place(vendor: str, region: str) -> None:
    """Raises `DeployError` for a vendor that there is not, and for a region that cannot be one of this vendor's."""
    if vendor not in REGIONS:
        raise DeployError(
            f"VENDOR={vendor} cannot be: it is one of {', '.join(REGIONS)}{did_you_mean(vendor, REGIONS)}"
        )
    form, example = REGIONS[vendor]
    if region != "auto" and not re.fullmatch(form, region):
        like = f"{vendor} names a region as in {example}; auto is the nearest that has the machine"
        raise DeployError(f"REGION={region} cannot be: {like}")


def describe_unlisted(vendor: str, instance: str) -> str:
    """Return what is said of an instance of aws that the table does not know; "" of any other."""
    if vendor != "aws" or instance in HOURLY:
        return ""
    return f"; {instance} is not in the list of {AS_OF}{did_you_mean(instance, HOURLY)}"


def table_memory(instance: str, size: str) -> float | None:
    """GB that a VAE can have; None where the table does not know it."""
    return CPU_GB * int(size[1:]) if is_cpu(instance) and size[1:].isdecimal() else MEMORY_GB.get(instance)


def by_price(model: type[Model]) -> float:
    """To order models by what their own instance costs."""
    return HOURLY.get(model.instance, {}).get("x1", 0)


def check_memory(keys: Sequence[str], instance: str, size: str, memory: float | None) -> None:
    """Raises `DeployError` where the machine is known to have less `memory`, in GB, than decoding in tiles takes.

    That is 1 GB for the machine and the process, measured at 0.6 to 0.8 GB; the weights; one tile of 512x512. On a CPU
    all is in float32.
    """
    models = [MODELS[key] for key in keys]
    width = {model: 4 if is_cpu(instance) or model.dtype == "float32" else 2 for model in models}
    stored = {model: 4 if model.dtype == "float32" else 2 for model in models}
    weights = sum((model.weights_mb or 0) * width[model] / stored[model] for model in models)
    tile = max(model.peak["decode"].first * width[model] for model in models) * 512 * 512
    needed = 1 + weights / 1e3 + tile / 1e9
    if memory and memory < needed:
        has = f"INSTANCE={instance} SIZE={size} has {memory:g} GB, and this needs {needed:.1f}"
        raise DeployError(f"{has}: choose a larger SIZE, or INSTANCE={max(models, key=by_price).instance}")


def dollars(amount: float | None) -> str:
    """`$0.80`, and `$0.033` where cents are too coarse."""
    return "?" if amount is None else f"${amount:.3f}" if 0 < amount < 0.1 else f"${amount:.2f}"


def describe_price(price: float | None) -> str:
    return f"{dollars(price)} an hour" if price is not None else f"a price unknown here, see {PAGE}"
