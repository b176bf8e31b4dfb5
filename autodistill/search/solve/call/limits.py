"""Finds which limits bind a solution, in that there is a better one without them, and how much room each leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

from autodistill.hardware.budget import NO_LIMIT, DeviceBudget
from autodistill.search.solve.options import Options
from autodistill.strategy.deployment import Deployment

MEMORY, FILE_SIZE = "memory", "file size"
"""Names of two limits. Limits of latency have the names that the request gives them."""

_NOTHING = 1e-6  # nats: no limit binds for less


def limits_of(
    options: Options,
    deployment: Deployment,
    here: float,
    predicted: Callable[[frozenset[str]], float | None],
) -> list[dict[str, Any]]:
    """Return each limit of a solution as plain data: how much is taken, how much is left, and whether it binds.

    A limit binds if the best storage without it, but within all others, has a lower sum of scores. If no single limit
    binds, but all together do, all of them count as binding.

    Args:
        options: The options for the solution's shape.
        deployment: The solution.
        here: The least sum of scores within all limits, in nats.
        predicted: Returns the same without the named limits, or None if nothing fits.
    """
    limits = list(_limits(options, deployment))
    gains = {one["name"]: _gain(here, predicted(frozenset((one["name"],)))) for one in limits}
    together = len(limits) > 1 and not any(gains.values()) and _gain(here, predicted(frozenset(gains))) > 0
    return [
        {
            **one,
            "left": one["limit"] - one["taken"],
            "binds": together or gains[one["name"]] > 0,
            "predicted_gain": gains[one["name"]],
        }
        for one in limits
    ]


def without(options: Options, names: Collection[str]) -> Options:
    """Return the same options without the named limits."""
    budget = options.budget
    if MEMORY in names:
        budget = replace(budget, memory_bytes=NO_LIMIT)
    if isinstance(budget, DeviceBudget):
        budget = replace(budget, latency=tuple(one for one in budget.latency if one.name not in names))
    return replace(options, budget=budget, file_bytes=None if FILE_SIZE in names else options.file_bytes)


def _limits(options: Options, deployment: Deployment) -> Iterator[dict[str, Any]]:
    """Yield each limit, with the amount that the solution is predicted to take."""
    need = options.memory(deployment)
    yield {"name": MEMORY, "unit": "bytes", "limit": options.budget.memory_bytes, "taken": need.total_bytes}
    if options.file_bytes is not None:
        yield {"name": FILE_SIZE, "unit": "bytes", "limit": options.file_bytes, "taken": need.weights_bytes}
    for limit, seconds in options.latencies(deployment).items():
        yield {"name": limit.name, "unit": "seconds", "limit": limit.seconds, "taken": seconds}


def _gain(here: float, other: float | None) -> float:
    """Return by how much a sum of scores is lower without a limit, or 0 if the difference is negligible."""
    gain = here - (math.inf if other is None else other)
    return gain if gain > _NOTHING else 0.0
