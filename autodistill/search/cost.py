"""What a planned search will cost: hours of its machines, workers and GPUs, and money at a price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autodistill.contracts import Plan
from autodistill.hardware import Machine
from autodistill.units import Price


def cost(plan: Plan, machines: Sequence[Machine], price: Price | None) -> dict[str, Any]:
    """Hours and money as plain data.

    Args:
        plan: Has the expected seconds by phase.
        machines: That trials run on, each held from the start to the end; where any has GPUs, those without have none.
        price: Of an hour of a GPU, or of a machine where there is none; None where no cost is asked for.

    Returns:
        "machine_hours", of the whole search on all of its machines; "worker_hours", of trials, added over the workers;
        "gpu_hours", 0 without GPUs; and with a price "price_per_hour", "price_of" ("GPU" or "machine"), "cost",
        "currency" and "cost_shown".
    """
    whole = sum(plan.seconds.values()) / 3600
    gpus = sum(len(machine.gpus) for machine in machines)
    held = [machine for machine in machines if machine.gpus] if gpus else machines
    hours = {
        "machine_hours": len(held) * whole,
        "worker_hours": plan.workers * sum(plan.seconds.get(phase, 0.0) for phase in ("trials", "longer")) / 3600,
        "gpu_hours": gpus * whole,
    }
    if price is None:
        return hours
    paid = hours["gpu_hours" if gpus else "machine_hours"]
    return hours | {
        "price_per_hour": price.amount,
        "price_of": "GPU" if gpus else "machine",
        "cost": price.amount * paid,
        "currency": price.currency,
        "cost_shown": price.of(paid),
    }
