"""What a plan takes before anything of it is carried out: hours, money, and disk for students."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autodistill.distillation.training.plan import Plan
from autodistill.hardware.budget import Price
from autodistill.hardware.machine import Machine
from autodistill.search.algorithms.successive_halving import BEST, confirmed
from autodistill.search.planning.plan import BRANCHES

_FLOAT32 = 4


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


def students_disk(plan: Plan, parameters: int, *, baselines: int, confirm: int) -> dict[str, int]:
    """Return what the students that are trained to the end take, each of which is kept in float32.

    Args:
        plan: How many there are.
        parameters: Weights of the largest; smaller ones take less.
        baselines: Strategies that run first.
        confirm: Further seeds of the best.

    Returns:
        "students", at most so many, and "students_bytes".
    """
    few = min(BEST, plan.keep[-1] if plan.keep else plan.trials) + min(1, baselines)
    longer = (len(plan.lengths) - 1) * few
    if plan.longest > 1:
        # The best alone on the cores of one machine; elsewhere the next best, and the baseline, beside it.
        longer += (1 + len(BRANCHES)) * (1 if plan.alone else few)
    count = (plan.keep[-1] if plan.keep else plan.trials) + baselines + longer
    count += confirm * confirmed(plan.trials, plan.keep, baselines)
    return {"students": count, "students_bytes": count * parameters * _FLOAT32}
