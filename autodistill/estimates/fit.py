"""Whether a student fits a budget under a deployment, and by how much it misses. Loads nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from autodistill.errors import InputError
from autodistill.estimates.block_times import BlockTimes
from autodistill.estimates.serving_memory import MemoryEstimate, check_evaluated_cache, memory
from autodistill.estimates.speed import limit_seconds
from autodistill.hardware.budget import Budget, DeviceBudget, LatencyLimit, on_gpu
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import Format, all_formats, get_format, key_of
from autodistill.quantization.grids import Grid
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.strategy.deployment import Deployment
from autodistill.units import format_bytes, format_duration


def in_blocks(config: Mapping[str, Any], scheme: QuantizationScheme) -> tuple[bool, ...]:
    """Return, for each row length of a model's matrices, whether super-blocks divide it; empty without super-blocks.

    Args:
        config: The config that `config_of` returns.
        scheme: The scheme in which the model is packed.
    """
    grid = scheme.linear
    if not isinstance(grid, Grid) or not grid.fallback:
        return ()
    queries = config["num_attention_heads"] * config["head_dim"]
    own = (length for sizes in config.get("per_layer_config", {}).values() for length in sizes.values())
    lengths = (config["hidden_size"], config["intermediate_size"], queries, *own)
    return tuple(grid.divides(length) for length in lengths)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How one deployment compares with a budget.

    Attributes:
        deployment: The deployment.
        estimate: Its memory by parts.
        need, limit: Bytes needed, and the memory limit.
        slack: The largest log(need / limit) of memory and latencies. The deployment fits if it is at most 0.
        late: For each latency limit that is broken, the predicted time and the limit, in words.
    """

    deployment: Deployment
    estimate: MemoryEstimate
    need: int
    limit: int
    slack: float
    late: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Miss:
    """A limit that is exceeded.

    Attributes:
        limit: The kind of limit.
        slack: log(need / limit), above 0.
        text: By how much the limit is missed, in one line.
    """

    limit: Literal["memory", "latency", "training memory"]
    slack: float
    text: str


def latencies(
    spec: ModelSpec, deployment: Deployment, budget: Budget, times: BlockTimes | None = None
) -> dict[LatencyLimit, float]:
    """Return the predicted seconds for each latency limit of a budget.

    Args:
        spec, deployment, budget: A model, its packing, and the limits.
        times: Measured times of blocks on the budget's device, if any. The roofline predicts what they do not cover.
    """
    if not isinstance(budget, DeviceBudget):
        return {}
    found = {}
    for limit in budget.latency:
        seconds = None if times is None else times.limit_seconds(spec, deployment, limit, context=budget.context)
        if seconds is None:
            seconds = limit_seconds(spec, deployment, budget.device, limit, context=budget.context)
        found[limit] = seconds
    return found


def too_late(seconds: Mapping[LatencyLimit, float], source: str) -> tuple[str, ...]:
    """Describe each latency limit that is exceeded.

    Args:
        seconds: The time for each limit.
        source: How the times are known: "predicted" or "measured".
    """
    return tuple(
        f"latency: {limit.name} is {source} {format_duration(found)}, over {format_duration(limit.seconds)}"
        for limit, found in seconds.items()
        if found > limit.seconds
    )


def fits(spec: ModelSpec, deployments: Sequence[Deployment], budget: Budget) -> tuple[Fit, ...]:
    """Compare each deployment with the budget's memory limit, and on a device with its latency limits.

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
    """Return the deployment furthest within the budget, or the nearest to it; on a tie, the first."""
    return min(fitting, key=lambda fit: fit.slack)


def nearest_miss(fitting: Sequence[Fit], budget: Budget) -> Miss | None:
    """Return the smallest miss if nothing fits, or None if something fits."""
    fit = smallest(fitting)
    if fit.slack <= 0:
        return None
    at = f"context {budget.context}" + (f" and batch {budget.batch}" if budget.batch > 1 else "")
    if fit.late and isinstance(budget, DeviceBudget):
        late = "; ".join(fit.late)
        said = f"the nearest deployment, {fit.deployment.name}, is too slow for {budget.device.name}: {late}"
        return Miss(limit="latency", slack=fit.slack, text=said)
    said = (
        f"the smallest deployment, {fit.deployment.name}, needs {format_bytes(fit.need)} at {at}, "
        f"{format_bytes(fit.need - fit.limit)} over the {format_bytes(fit.limit)} budget"
    )
    return Miss(limit="memory", slack=fit.slack, text=said)


def check_holds(spec: ModelSpec, scheme: QuantizationScheme) -> None:
    """Refuse a quantisation scheme that cannot hold a model at all, whatever the memory.

    Raises:
        InputError: The format cannot hold such a model, with the reason, or as `QuantizationScheme.check_model` and
            `check_evaluated_cache` say.
    """
    held = get_format(scheme.format)
    if spec.ffn_widths and held.layer_widths == "one":
        raise InputError(
            f"{held.name} holds models of one FFN width in all layers, and these have {min(spec.ffn_widths)} to "
            f"{max(spec.ffn_widths)} neurons: give all layers the same number, or choose another format"
        )
    # A reason against the format's own container does not apply to another container.
    if scheme.container == held.container and (reason := held.refuses(spec)):
        raise InputError(reason)
    scheme.check_model(spec.tensors)
    if isinstance(scheme, Deployment):
        check_evaluated_cache(spec, scheme.runtime, scheme.cache_types)


def holdable(spec: ModelSpec, deployments: Iterable[Deployment]) -> tuple[Deployment, ...]:
    """Return the deployments that can hold a model, whatever the memory."""
    return tuple(deployment for deployment in deployments if not cannot_hold(spec, deployment))


def cannot_hold(spec: ModelSpec, deployment: Deployment) -> str:
    """Return why a deployment cannot hold a model, or "" if it can."""
    try:
        check_holds(spec, deployment)
    except InputError as error:
        return str(error)
    return ""


def nearest(spec: ModelSpec, formats: Sequence[Format], own: Deployment) -> Deployment:
    """Return the way to store a model in some formats that is most like the way it is stored now.

    The same bits, group and offset come first, then the fewest bits that are not fewer than now, then the most bits.
    Among equals, an offset as now, the smallest group and what is kept in 16 bits now are preferred, and grids with
    evenly spaced codes whose scales need no search. Each format's usual runtime serves it, with a cache in 16 bits.

    Args:
        spec: The model.
        formats: Formats of one container.
        own: How it is stored now.

    Raises:
        InputError: None of the formats can hold the model; the message has the reason, and containers that can.
    """
    key = own.bits, own.group_size, own.symmetric

    def order(one: Deployment) -> tuple[object, ...]:
        here, grid = (one.bits, one.group_size, one.symmetric), one.linear
        bits = one.bits < own.bits, abs(one.bits - own.bits)
        preferred = one.symmetric != own.symmetric, one.group_size or math.inf, one.keep != own.keep
        return here != key, *bits, *preferred, isinstance(grid, Grid) and grid.searched

    found = sorted(_packings(formats, own.keep), key=order)
    if held := holdable(spec, found):
        return held[0]
    why = cannot_hold(spec, found[0]) if found else "no runtime serves it"
    can = {form.container: 0 for form in all_formats().values() if holdable(spec, _packings([form]))}
    raise InputError(f"{why}; {', '.join(can)} can hold it")


def _packings(formats: Iterable[Format], keep: tuple[str, ...] = ()) -> Iterator[Deployment]:
    """Yield the deployments of formats in their usual runtimes, also with some parts kept in 16 bits."""
    for form in formats:
        for bits, group_size, symmetric in map(key_of, form.linears):
            for kept in {keep, ()}:
                with suppress(InputError):
                    yield Deployment(
                        runtime=form.runtimes[0],
                        format=form.name,
                        bits=bits,
                        group_size=group_size,
                        symmetric=symmetric,
                        keep=kept,
                    )
