"""The machines of Inference Endpoints: what they cost, what they hold, where there is one. Needs no network.

What is true today is asked of the platform (`Account.hardware`); the table is for a plan made without it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from handlers.model import Model
from scripts.deployment.console import DeployError, note

if TYPE_CHECKING:
    from huggingface_hub import InferenceEndpointHardware

PAGE = "https://huggingface.co/pricing#endpoints"
QUOTA_PAGE = "https://endpoints.huggingface.co/contact"
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
MEMORY_GB = {"nvidia-t4": 14, "nvidia-l4": 24, "nvidia-a10g": 24, "nvidia-l40s": 48, "nvidia-a100": 80}
"""Of one GPU, which is what a VAE runs on: the others of a larger size stay idle."""
CPU_GB = 2
"""Of each CPU."""
USABLE = ("available", "low_availability")
OFFSETS = {"us-east": -5, "us-central": -6, "us-west": -8, "eastus": -5, "westus": -8, "eu": 1, "europe": 1, "ap": 8}
"""Hours that clocks are ahead of UTC, by the beginning of a region's name: what is near, as far as a clock knows."""


def is_cpu(instance: str) -> bool:
    return instance.startswith(("intel", "amd"))


def table_price(vendor: str, instance: str, size: str) -> float | None:
    """USD an hour for one replica; None where the table does not know it."""
    return HOURLY.get(instance, {}).get(size) if vendor == "aws" else None


def table_memory(instance: str, size: str) -> float | None:
    """GB that a VAE can take; None where the table does not know it."""
    if is_cpu(instance):
        return CPU_GB * int(size[1:]) if size[1:].isdecimal() else None
    return MEMORY_GB.get(instance)


def check_size(instance: str, size: str) -> None:
    """Raises `DeployError` for a size that an instance of the table does not have."""
    if instance in HOURLY and size not in HOURLY[instance]:
        raise DeployError(f"SIZE={size} cannot be: {instance} has {', '.join(HOURLY[instance])}")


def needed_gb(models: Sequence[type[Model]], instance: str) -> float:
    """The least memory that decodes in tiles: 1 GB for the process and the machine, the weights, one tile of 512x512.

    On a CPU everything is in float32. The process alone was measured at 0.6 to 0.8 GB.
    """
    full = is_cpu(instance)
    width = {model: 4 if full or model.dtype == "float32" else 2 for model in models}
    weights = sum((model.weights_mb or 0) * (2 if full and model.dtype != "float32" else 1) for model in models)
    tile = max(model.peak["decode"].first * width[model] for model in models) * 512 * 512
    return 1 + weights / 1e3 + tile / 1e9


def check_memory(models: Sequence[type[Model]], instance: str, size: str, memory: float | None) -> None:
    """Raises `DeployError` where it is known to be too little."""
    needed = needed_gb(models, instance)
    if memory is not None and memory < needed:
        raise DeployError(
            f"INSTANCE={instance} SIZE={size} has {memory:g} GB, and this needs {needed:.1f}: "
            f"choose a larger SIZE, or INSTANCE={max(models, key=by_price).instance}"
        )


def by_price(model: type[Model]) -> float:
    """To order models by what their own instance costs."""
    return table_price("aws", model.instance, "x1") or 0


def choose(
    offered: list[InferenceEndpointHardware], vendor: str, region: str, instance: str, size: str, replicas: int
) -> InferenceEndpointHardware:
    """The one that was asked for, in the nearest region that has it and quota for it where `region` is "auto".

    Raises:
        DeployError: there is none; the message says where there is one, or whose quota is short.
    """
    same = [one for one in offered if (one.vendor, one.instance_type, one.instance_size) == (vendor, instance, size)]
    if not same:
        sizes = sorted({one.instance_size for one in offered if (one.vendor, one.instance_type) == (vendor, instance)})
        types = sorted({one.instance_type for one in offered if one.vendor == vendor and one.status in USABLE})
        what = f"SIZE={size}: {instance} has {', '.join(sizes)}" if sizes else f"INSTANCE={instance}: {vendor} has "
        raise DeployError(f"there is no {what}{'' if sizes else ', '.join(types)}")
    usable = [one for one in same if one.status in USABLE]
    there = [one for one in usable if region in ("auto", one.region)]
    if not there:
        status = next((f"{one.status} there" for one in same if one.region == region), "not there")
        others = ", ".join(one.region for one in sorted(usable, key=_far)) or "none at the moment"
        raise DeployError(
            f"REGION={region} has no {instance} {size} to give ({status}); regions of {vendor} that have: {others}. "
            "REGION=auto takes the nearest"
        )
    granted = [one for one in there if one.max_accelerators - one.used_accelerators >= one.num_accelerators]
    if not granted:
        one = min(there, key=_far)
        raise DeployError(
            f"the quota for {instance} in {one.region} is used up: {one.used_accelerators} of {one.max_accelerators}, "
            f"what has scaled to zero included; `make pause` frees it, and more is asked for at {QUOTA_PAGE}"
        )
    chosen = min(granted, key=_far)
    free = chosen.max_accelerators - chosen.used_accelerators
    if free < chosen.num_accelerators * replicas:
        note(f"  the quota in {chosen.region} has {free} left of {instance}: MAX_REPLICA={replicas} may not be reached")
    if chosen.status == "low_availability":
        note(f"  {instance} is scarce in {chosen.region} at the moment: the endpoint may stay pending")
    return chosen


def _far(one: InferenceEndpointHardware) -> float:
    """Hours between the clocks of here and there."""
    offset = next((hours for name, hours in OFFSETS.items() if one.region.startswith(name)), 0)
    apart = abs(offset - time.localtime().tm_gmtoff / 3600)
    return min(apart, 24 - apart)


def dollars(amount: float) -> str:
    """`$0.80`, and `$0.033` where cents are too coarse."""
    return f"${amount:.3f}" if 0 < amount < 0.1 else f"${amount:.2f}"


def describe_price(price: float | None) -> str:
    return f"{dollars(price)} an hour" if price is not None else f"a price that is unknown here, see {PAGE}"


def describe_cost(price: float | None, min_replica: int, max_replica: int, scale_to_zero: int | None) -> list[str]:
    """What the endpoint costs at work, idle and in a month, a line each. `scale_to_zero` is in minutes."""
    if price is None:
        return [f"price unknown here, see {PAGE}"]
    lines = [f"{dollars(price)} an hour while a replica starts or runs, billed by the minute"]
    if max_replica > 1:
        lines.append(f"at most {dollars(price * max_replica)} an hour, with {max_replica} replicas")
    if scale_to_zero is None:
        always = price * min_replica
        return [*lines, f"it never scales to zero: {dollars(always * 24)} a day, {dollars(always * 24 * 30)} a month"]
    day = price * (1 + scale_to_zero / 60)
    return [
        *lines,
        f"$0.00 once it has scaled to zero, {scale_to_zero} minutes after the last request or later (44 were measured "
        "once where 15 were set); the next request starts it again, and it counts against the quota meanwhile",
        f"so an hour of work a day costs that hour and {scale_to_zero} idle minutes after it: {dollars(day)} a day, "
        f"{dollars(day * 30)} a month",
    ]
