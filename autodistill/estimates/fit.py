"""Whether a student fits a budget in a deployment, and what it misses by; nothing is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from autodistill.errors import InputError
from autodistill.estimates.serving_memory import MemoryEstimate, check_cache, memory
from autodistill.estimates.speed import limit_seconds
from autodistill.hardware.budget import Budget, DeviceBudget, LatencyLimit, on_gpu
from autodistill.models.llama_cpp_graphs import cannot_run
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import Packing
from autodistill.quantization.grids import Grid
from autodistill.strategy.deployment import Deployment
from autodistill.units import format_bytes, format_duration


def in_blocks(config: Mapping[str, Any], packing: Packing) -> tuple[bool, ...]:
    """Of each length of rows that a model's matrices have, whether super-blocks divide it; nothing without those.

    Args:
        config: As `config_of` gives it.
        packing: What the model is packed in.
    """
    grid = packing.linear
    if not isinstance(grid, Grid) or not grid.fallback:
        return ()
    queries = config["num_attention_heads"] * config["head_dim"]
    return tuple(grid.divides(length) for length in (config["hidden_size"], config["intermediate_size"], queries))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How one deployment stands to a budget.

    Attributes:
        deployment: Which one.
        estimate: Its memory by parts.
        need, limit: Bytes.
        slack: The largest log(need / limit) of memory and latencies: it fits at 0 and below.
        late: Of each limit of latency that is broken, what it is predicted to take and the limit, in words.
    """

    deployment: Deployment
    estimate: MemoryEstimate
    need: int
    limit: int
    slack: float
    late: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A limit that something does not keep to.

    Attributes:
        limit: Of which kind.
        slack: log(need / limit), above 0.
        said: What it misses the limit by, in one line.
    """

    limit: Literal["memory", "latency", "training memory"]
    slack: float
    said: str


def latencies(spec: ModelSpec, deployment: Deployment, budget: Budget) -> dict[LatencyLimit, float]:
    """Seconds that are predicted for each limit of latency that a budget has."""
    if not isinstance(budget, DeviceBudget):
        return {}
    return {
        limit: limit_seconds(spec, deployment, budget.device, limit, context=budget.context) for limit in budget.latency
    }


def too_late(seconds: Mapping[LatencyLimit, float], source: str) -> tuple[str, ...]:
    """In words, each limit of latency that is broken.

    Args:
        seconds: What each takes.
        source: How that is known: "predicted" or "measured".
    """
    return tuple(
        f"latency: {limit.name} is {source} {format_duration(found)}, over {format_duration(limit.seconds)}"
        for limit, found in seconds.items()
        if found > limit.seconds
    )


def fits(spec: ModelSpec, deployments: Sequence[Deployment], budget: Budget) -> tuple[Fit, ...]:
    """Holds each deployment against the budget's memory, and against its latencies where it has a device.

    Raises:
        InputError: As `memory`.
    """
    found = []
    for deployment in deployments:
        estimate = memory(spec, deployment, context=budget.context, batch=budget.batch, on_gpu=on_gpu(budget))
        times = latencies(spec, deployment, budget)
        ratios = [estimate.total_bytes / budget.memory_bytes, *(taken / one.seconds for one, taken in times.items())]
        found.append(
            Fit(
                deployment=deployment,
                estimate=estimate,
                need=estimate.total_bytes,
                limit=budget.memory_bytes,
                slack=math.log(max(ratios)),
                late=too_late(times, "predicted"),
            )
        )
    return tuple(found)


def smallest(fitting: Sequence[Fit]) -> Fit:
    """The one that is nearest to the budget, or furthest within it, the first of equals."""
    return min(fitting, key=lambda fit: fit.slack)


def nearest_miss(fitting: Sequence[Fit], budget: Budget) -> Miss | None:
    """Why nothing fits: what that misses which is nearest to the budget, or None where something fits."""
    fit = smallest(fitting)
    if fit.slack <= 0:
        return None
    at = f"context {budget.context}" + (f" and batch {budget.batch}" if budget.batch > 1 else "")
    if fit.late and isinstance(budget, DeviceBudget):
        said = f"the nearest, {fit.deployment.name}, is too slow for {budget.device.name}: {'; '.join(fit.late)}"
        return Miss(limit="latency", slack=fit.slack, said=said)
    said = (
        f"the smallest, {fit.deployment.name}, needs {format_bytes(fit.need)} at {at}, "
        f"{format_bytes(fit.need - fit.limit)} over the {format_bytes(fit.limit)} budget"
    )
    return Miss(limit="memory", slack=fit.slack, said=said)


def check_holds(spec: ModelSpec, packing: Packing) -> None:
    """Refuses a packing that cannot hold a model, whatever memory it needs.

    Raises:
        InputError: What llama.cpp would not compute of it, or as `Packing.check_model` and `check_cache`.
    """
    if packing.container == "gguf" and (reason := cannot_run(spec)):
        raise InputError(f"GGUF cannot hold this {spec.architecture}: {reason}")
    packing.check_model(spec.tensors)
    if isinstance(packing, Deployment):
        check_cache(spec, packing.runtime, packing.cache_types)


def holdable(spec: ModelSpec, deployments: Iterable[Deployment]) -> tuple[Deployment, ...]:
    """Those deployments that can hold a model, whatever memory they need."""
    return tuple(deployment for deployment in deployments if not cannot_hold(spec, deployment))


def cannot_hold(spec: ModelSpec, deployment: Deployment) -> str:
    """Why a deployment cannot hold a model, or nothing where it can."""
    try:
        check_holds(spec, deployment)
    except InputError as error:
        return str(error)
    return ""
