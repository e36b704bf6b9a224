"""Where there is a machine for a plan, as the platform says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from huggingface_hub import InferenceEndpointHardware

from scripts.console import DeployError, note
from scripts.deployment.plan import Plan
from scripts.instances import check_memory

QUOTA_PAGE = "https://endpoints.huggingface.co/contact"
USABLE = ("available", "low_availability")
ASKED = {"vendor": "vendor", "instance": "instance_type", "size": "instance_size", "region": "region"}
"""What a plan says of its machine, and how the platform calls it."""
OFFSETS = {"us-east": -5, "us-central": -6, "us-west": -8, "eastus": -5, "westus": -8, "eu": 1, "europe": 1, "ap": 8}
"""Hours that clocks are ahead of UTC, by the beginning of a region's name: what is near, as far as a clock knows."""


def place(plan: Plan, offered: Sequence[InferenceEndpointHardware], new: bool) -> Plan:
    """The plan with the region and the price of today: of "auto" the nearest that has the machine, and quota for it.

    Raises `DeployError` where there is none; it says what there is, or whose quota is short.
    """
    if not offered:
        return replace(plan, region="us-east-1" if plan.region == "auto" else plan.region)
    fitting, so_far = sorted(offered, key=_far), ""
    for variable, name in ASKED.items():
        asked, others = getattr(plan, variable), [getattr(one, name) for one in fitting if one.status in USABLE]
        fitting = [one for one in fitting if asked in ("auto", getattr(one, name))]
        if not any(one.status in USABLE for one in fitting):
            status = fitting[0].status if fitting else "not there"
            also = ", or auto" if new else ", for another NAME=..., as an endpoint never moves"
            known = ", ".join(dict.fromkeys(others)) + also * (variable == "region")
            raise DeployError(f"{variable.upper()}={asked}{so_far} cannot be had ({status}): choose from {known}")
        so_far = f"{so_far or ' of'} {asked}"
    fitting = [one for one in fitting if one.status in USABLE]
    free = [(one.max_accelerators - one.used_accelerators) // one.num_accelerators for one in fitting]
    left, one = next(((left, one) for left, one in zip(free, fitting, strict=True) if left > 0), (0, fitting[0]))
    if left == 0:
        used = f"{one.used_accelerators} of {one.max_accelerators}, what has scaled to zero included"
        more = f"`make pause` frees it, and more is asked for at {QUOTA_PAGE}"
        raise DeployError(f"the quota for {plan.instance} in {one.region} is used up: {used}; {more}")
    if left < plan.max_replica:
        note(f"  the quota in {one.region} has {left} left: MAX_REPLICA={plan.max_replica} may not be reached")
    if one.status == "low_availability":
        note(f"  {plan.instance} is scarce in {one.region} at the moment: the endpoint may stay pending")
    memory = one.memory_gb if one.accelerator == "cpu" else (one.gpu_memory_gb or 0) / one.num_accelerators
    check_memory(plan.models, plan.instance, plan.size, memory)
    return replace(plan, region=one.region, price=one.price_per_hour)


def _far(one: InferenceEndpointHardware) -> float:
    """Hours between the clocks of here and there."""
    offset = next((hours for name, hours in OFFSETS.items() if one.region.startswith(name)), 0)
    apart = abs(offset - time.localtime().tm_gmtoff / 3600)
    return min(apart, 24 - apart)
