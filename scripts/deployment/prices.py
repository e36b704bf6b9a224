"""What an instance of Inference Endpoints costs: USD an hour and replica, vendor aws, billed by the minute.

From https://huggingface.co/docs/inference-endpoints/support/pricing, read on 2026-11-21.
"""

from __future__ import annotations

PAGE = "https://huggingface.co/pricing#endpoints"

HOURLY: dict[str, dict[str, float]] = {
    "intel-spr": {"x1": 0.033, "x2": 0.067, "x4": 0.134, "x8": 0.268, "x16": 0.536},
    "nvidia-t4": {"x1": 0.5, "x4": 3.0},
    "nvidia-l4": {"x1": 0.8, "x4": 3.8},
    "nvidia-a10g": {"x1": 1.0, "x4": 5.0},
    "nvidia-l40s": {"x1": 1.8, "x4": 8.3, "x8": 23.5},
    "nvidia-a100": {"x1": 2.5, "x2": 5.0, "x4": 10.0, "x8": 20.0},
    "nvidia-h200": {"x1": 5.0, "x2": 10.0, "x4": 20.0, "x8": 40.0},
}


def hourly_price(vendor: str, instance: str, size: str) -> float | None:
    """USD an hour for one replica; None where this table does not know it."""
    return HOURLY.get(instance, {}).get(size) if vendor == "aws" else None


def dollars(amount: float) -> str:
    """`$0.80`, and `$0.033` where cents are too coarse."""
    return f"${amount:.3f}" if 0 < amount < 0.1 else f"${amount:.2f}"


def describe_price(price: float | None) -> str:
    return f"{dollars(price)} an hour" if price is not None else f"unknown here, see {PAGE}"


def describe_cost(price: float | None, min_replica: int, max_replica: int, scale_to_zero: int | None) -> list[str]:
    """What the endpoint costs at work, idle and in a month, a line each. `scale_to_zero` is in minutes."""
    if price is None:
        return [f"price unknown here, see {PAGE}"]
    lines = [f"{dollars(price)} an hour while a replica starts or runs, billed by the minute"]
    if max_replica > 1:
        lines.append(f"at most {dollars(price * max_replica)} an hour, with {max_replica} replicas")
    if scale_to_zero is not None:
        an_hour_a_day = price * (1 + scale_to_zero / 60)
        lines += [
            f"$0.00 after {scale_to_zero} minutes without a request (scale to zero); the next request starts it again",
            f"so an hour of work a day is about {dollars(an_hour_a_day)} a day, {dollars(an_hour_a_day * 30)} a month",
        ]
    else:
        always = price * min_replica
        lines.append(f"it never scales to zero: {dollars(always * 24)} a day, {dollars(always * 24 * 30)} a month")
    return lines
