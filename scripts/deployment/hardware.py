"""The region and the price of a plan's instance, according to the platform."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from huggingface_hub import InferenceEndpointHardware

from scripts.console import DeployError, note
from scripts.deployment.plan import Plan
from scripts.instances import check_memory

QUOTA_PAGE = "https://endpoints.huggingface.co/contact"
USABLE = ("available", "low_availability")
ATTRIBUTES = {"vendor": "vendor", "instance": "instance_type", "size": "instance_size", "region": "region"}
"""Fields of a plan, and the attributes of the platform's hardware with the same meaning."""

Offers = Sequence[InferenceEndpointHardware]


def choose_hardware(plan: Plan, offers: Offers, is_new: bool) -> Plan:
    """Return the plan with its region and today's price.

    REGION=auto becomes the default region if it has the instance and quota for it, else the first region that has both.

    Raises:
        DeployError: the platform does not offer the instance, the quota is used up, or the memory is too small.
    """
    if not offers:  # the platform did not respond
        return replace(plan, region=Plan.region if plan.region == "auto" else plan.region)
    offers = _usable(plan, sorted(offers, key=lambda offer: offer.region != Plan.region), is_new)
    offer = next((offer for offer in offers if _free_replicas(offer) > 0), offers[0])
    free = _free_replicas(offer)
    if free <= 0:
        used = f"{offer.used_accelerators} of {offer.max_accelerators}, endpoints that have scaled to zero included"
        more = f"`make pause` frees it, or ask for more at {QUOTA_PAGE}"
        raise DeployError(f"the quota for {plan.instance} in {offer.region} is used up: {used}; {more}")
    if free < plan.max_replica:
        note(f"  the quota in {offer.region} has {free} left: MAX_REPLICA={plan.max_replica} may not be reached")
    if offer.status == "low_availability":
        note(f"  {plan.instance} is scarce in {offer.region} at the moment: the endpoint may stay pending")
    memory = offer.memory_gb if offer.accelerator == "cpu" else (offer.gpu_memory_gb or 0) / offer.num_accelerators
    check_memory(plan.models, plan.instance, plan.size, memory)
    return replace(plan, region=offer.region, price=offer.price_per_hour)


def _usable(plan: Plan, offers: Offers, is_new: bool) -> Offers:
    """Return the available offers for a plan. `DeployError` names the first field that has none, and its choices."""
    chosen: list[str] = []
    for field, attribute in ATTRIBUTES.items():
        wanted = getattr(plan, field)
        choices = dict.fromkeys(getattr(offer, attribute) for offer in offers if offer.status in USABLE)
        offers = [offer for offer in offers if wanted in ("auto", getattr(offer, attribute))]
        if not any(offer.status in USABLE for offer in offers):
            status = offers[0].status if offers else "not listed"
            context = f" for {' '.join(chosen)}" if chosen else ""
            advice = ""
            if field == "region":
                advice = ", or auto" if is_new else ", for another NAME=..., as an endpoint never moves"
            unavailable = f"{field.upper()}={wanted}{context} is not available ({status})"
            raise DeployError(f"{unavailable}: choose from {', '.join(choices)}{advice}")
        chosen.append(wanted)
    return [offer for offer in offers if offer.status in USABLE]


def _free_replicas(offer: InferenceEndpointHardware) -> int:
    return (offer.max_accelerators - offer.used_accelerators) // offer.num_accelerators
