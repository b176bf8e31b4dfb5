"""What a plan costs, known before any of it is carried out: hours, money, and disk for students."""

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
    """Return hours and money as plain data.

    Args:
        plan: Has the expected seconds by phase.
        machines: The machines that trials run on, each held from start to end. If any of them has GPUs, only those with
            GPUs count.
        price: Price of an hour of a GPU, or of a machine if there is no GPU; None if no cost is asked for.

    Returns:
        "machine_hours" of the whole search on all of its machines; "worker_hours" of trials, added over the workers;
        "gpu_hours", 0 without GPUs. With a price also "price_per_hour", "price_of" ("GPU" or "machine"), "cost",
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
    """Return the disk space of the students that are trained to the end. Each is kept in float32.

    Args:
        plan: Says how many students there are.
        parameters: Weights of the largest student; smaller ones take less.
        baselines: Strategies that run first.
        confirm: Further seeds of the best.

    Returns:
        "students", the largest number that there can be, and "students_bytes".
    """
    few = min(BEST, plan.keep[-1] if plan.keep else plan.trials) + min(1, baselines)
    longer = (len(plan.lengths) - 1) * few
    if plan.longest > 1:
        # On the cores of one machine only the best is trained further. Elsewhere the next best and the baseline are
        # too.
        longer += (1 + len(BRANCHES)) * (1 if plan.alone else few)
    count = (plan.keep[-1] if plan.keep else plan.trials) + baselines + longer
    count += confirm * confirmed(plan.trials, plan.keep, baselines)
    return {"students": count, "students_bytes": count * parameters * _FLOAT32}
