"""What a planned search will cost: hours of the machine, its workers and GPUs, and money at a price."""

from __future__ import annotations

from typing import Any

from autodistill.contracts import Plan
from autodistill.units import Price


def cost(plan: Plan, gpus: int, price: Price | None) -> dict[str, Any]:
    """Hours and money as plain data.

    Args:
        plan: Has the expected seconds by phase.
        gpus: That the search holds, from its start to its end; 0 where it trains on CPUs.
        price: Of an hour of a GPU, or of the machine where there is none; None where no cost is asked for.

    Returns:
        "machine_hours", of the whole search; "worker_hours", of trials, added over the workers; "gpu_hours", 0 without
        GPUs; and with a price "price_per_hour", "price_of" ("GPU" or "machine"), "cost", "currency" and "cost_shown".
    """
    machine = sum(plan.seconds.values()) / 3600
    hours = {
        "machine_hours": machine,
        "worker_hours": plan.workers * plan.seconds.get("trials", 0.0) / 3600,
        "gpu_hours": gpus * machine,
    }
    if price is None:
        return hours
    paid = hours["gpu_hours"] if gpus else machine
    return hours | {
        "price_per_hour": price.amount,
        "price_of": "GPU" if gpus else "machine",
        "cost": price.amount * paid,
        "currency": price.currency,
        "cost_shown": price.of(paid),
    }
