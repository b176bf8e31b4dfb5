"""Requirements of a stored student under a load on a device: its memory and latency, measured or predicted."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from autodistill.advisor.candidates import Candidate
from autodistill.advisor.measurements import Correction, Measured, correction
from autodistill.errors import InputError
from autodistill.estimates.serving_memory import memory
from autodistill.estimates.speed import PROMPT_TOKENS, limit_seconds
from autodistill.hardware.budget import CONTEXT, LatencyLimit
from autodistill.hardware.device import DISCRETE, Device
from autodistill.hardware.lookup import is_machine
from autodistill.models.spec import ModelSpec
from autodistill.runs.results.memory_correction import Overhead, Place, overhead_of
from autodistill.runs.results.row import Row, finite
from autodistill.strategy.deployment import Deployment

_FAR = math.log(1e12)  # excess over a limit that a missing figure counts as
_BY_DOUBTFUL = " by doubtful measurements alone"


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The hardware and load that are asked for.

    Attributes:
        memory_bytes: Limit of memory.
        context: Tokens of each stream. By default 2048, or the student's own context if that is less.
        streams: Sequences decoded at once. Raised to the streams of a latency limit if that has more.
        device: The device that limits of latency refer to. None if only memory is limited.
        latency: The limits of latency.
        gpu: Whether the limit is of a discrete GPU's memory although no device is named, as for a tier.
        measured: Stored measurements of students. Those on the device correct the predictions for it.
        overheads: Changes to predicted memory, by class of devices and runtime.
        runtime: The runtime that must serve the student, or None for its deployment's own.
        minimum: Minimum of the metric that ranks the runs if more of it is better, else of accuracy. None for no
            minimum.
    """

    memory_bytes: int
    context: int | None = None
    streams: int = 1
    device: Device | None = None
    latency: tuple[LatencyLimit, ...] = ()
    gpu: bool = False
    measured: tuple[Measured, ...] = ()
    overheads: Mapping[Place, Overhead] = field(default_factory=dict)
    runtime: str | None = None
    minimum: float | None = None
    _known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("context", "streams"):
            asked = getattr(self, name)
            if asked is not None and asked < 1:
                raise InputError(f"--{name} must be at least 1, not {asked}")
        if self.minimum is not None and not 0 <= self.minimum <= 1:
            raise InputError(f"--min-accuracy must be between 0 and 1, not {self.minimum}")
        object.__setattr__(self, "streams", max([self.streams, *(limit.streams for limit in self.latency)]))

    def with_streams(self, most: int) -> Conditions:
        """Return the same request with at most `most` streams, also in its latency limits."""
        limits = tuple(replace(limit, streams=min(limit.streams, most)) for limit in self.latency)
        return replace(self, streams=min(self.streams, most), latency=limits)

    def context_of(self, candidate: Candidate) -> int:
        """Return the context of each stream for this student."""
        if self.context is not None:
            return self.context
        shape = candidate.shape
        return CONTEXT if shape is None else min(CONTEXT, shape.config["max_position_embeddings"])

    def overhead(self, runtime: str) -> Overhead:
        """Return what is added to predicted memory in a runtime."""
        kind = self.device.kind.name if self.device else DISCRETE if self.gpu else None
        return overhead_of(self.overheads, runtime, kind)

    @property
    def on_gpu(self) -> bool:
        """Whether the memory is that of a discrete GPU, rather than a process's."""
        return self.device.discrete if self.device else self.gpu

    def is_on(self, machine: str | None) -> bool:
        """Return whether a machine's measurements count: it is the device, or no device was requested."""
        if self.device is None:
            return True
        key = (id(self.device), machine)
        if key not in self._known:
            self._known[key] = (machine is not None and is_machine(self.device, machine), self.device)
        return bool(self._known[key][0])

    def correction(self, runtime: str) -> Correction:
        """Return the factor for predicted times on the device."""
        key = (id(self.measured), id(self.device), runtime)
        if key not in self._known:
            assert self.device is not None
            # Keep the objects too, so that no other object can get their ids.
            self._known[key] = (correction(self.measured, self.device, runtime), self.measured, self.device)
        found: Correction = self._known[key][0]
        return found


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """A candidate with its requirements under the requested load.

    Attributes:
        candidate: The row.
        context: Tokens of each stream.
        needs: What the row needs for each limit, in bytes or seconds. For "accuracy", what it has.
        limits: The limits under the same names.
        sources: How each need is known. "measured", "predicted", or "corrected", which is a prediction scaled by
            measurements there, followed by " by doubtful measurements alone" if there are no others. "assumed" is a
            prediction for which nothing similar was measured. " at p95, an upper bound" follows if the percentile was
            not timed and a higher one replaces it. An accuracy is "simulated", or "missing" if the row has none, which
            meets no limit.
    """

    candidate: Candidate
    context: int
    needs: Mapping[str, float]
    limits: Mapping[str, float]
    sources: Mapping[str, str]

    @property
    def excess(self) -> dict[str, float]:
        """The value log(need / limit) for each limit. It is above 0 if the limit is exceeded."""
        found = {}
        for name, limit in self.limits.items():
            need = self.needs[name]
            if self.sources[name] == "missing":
                found[name] = _FAR
                continue
            over, under = (limit, need) if name == "accuracy" else (need, limit)
            # The ratio to zero is infinite, so it is limited to a large finite number.
            ratio = over / under if under else (math.inf if over else 1.0)
            found[name] = math.log(min(max(ratio, 1e-12), 1e12))
        return found

    @property
    def fits(self) -> bool:
        """Whether no limit is exceeded."""
        return max(self.excess.values()) <= 0

    def to_json(self) -> dict[str, Any]:
        """Return the answer as plain data: the row's figures, needs, limits and margins."""
        row = self.candidate.row
        return {
            "run": self.candidate.run,
            "row_id": row.row_id,
            "trial": row.trial,
            "kind": row.kind,
            "deployment": row.deployment_name,
            "runtime": row.deployment.runtime,
            "format": row.deployment.format,
            "metric": self.candidate.metric,
            "value": row.figure(self.candidate.metric),
            "score": self.candidate.score,
            "stderr": row.figure(f"{self.candidate.metric}_stderr"),
            "size_bytes": row.size_bytes,
            "context": self.context,
            "memory_bytes": int(self.needs["memory"]),
            "memory_source": self.sources["memory"],
            "sources": dict(self.sources),
            "needs": dict(self.needs),
            "limits": dict(self.limits),
            "margins": {name: 1 - math.exp(excess) for name, excess in self.excess.items()},
        }


def requirements_of(candidate: Candidate, conditions: Conditions) -> Requirements | None:
    """Return what a row needs under the requested load, or None if that is unknown."""
    row = candidate.row
    deployment = candidate.deployment
    context = conditions.context_of(candidate)
    there = row.memory_source != "measured" and (row.context, row.batch) == (context, conditions.streams)
    there = there and _of_gpu(row) == conditions.on_gpu
    spec = None if there and not conditions.latency else candidate.spec
    found = _memory(row, deployment, spec, conditions, context)
    if found is None:
        return None
    needs, limits = {"memory": float(found[0])}, {"memory": float(conditions.memory_bytes)}
    sources = {"memory": found[1]}
    for limit in conditions.latency:
        time = _latency(row, deployment, spec, conditions, context, limit)
        if time is None:
            return None
        name = limit.describe()
        (needs[name], sources[name]), limits[name] = time, limit.seconds
    if conditions.minimum is not None:
        score = row.figure(candidate.score)
        needs["accuracy"], limits["accuracy"] = score or 0.0, conditions.minimum
        sources["accuracy"] = "missing" if score is None else "simulated"
    return Requirements(candidate=candidate, context=context, needs=needs, limits=limits, sources=sources)


def _memory(
    row: Row, deployment: Deployment, spec: ModelSpec | None, conditions: Conditions, context: int
) -> tuple[int, str] | None:
    """Return the bytes, and "measured" or "predicted". For another load, a measurement corrects the prediction.

    Memory that was measured on another machine than the device says nothing about the device, so it is predicted again.
    """
    measured = row.memory_source == "measured" and conditions.is_on(_measured_on(row))
    if conditions.device is None and conditions.gpu:
        measured = measured and (row.other.get("memory_parts") or {}).get("device_class") == DISCRETE
    alike = _of_gpu(row) == conditions.on_gpu
    if (row.context, row.batch) == (context, conditions.streams):
        if measured and row.memory_bytes is not None:
            return row.memory_bytes, "measured"
        guess = row.figure("memory_bytes_predicted") if row.memory_source == "measured" else row.memory_bytes
        if not alike and spec is not None:
            guess = None
        elif guess is None and spec is None:
            # If a row's shape is not known, its measured memory is the best available figure.
            guess = row.memory_bytes
        if guess is not None:
            return int(guess) + conditions.overhead(deployment.runtime).total_bytes, "predicted"
    if spec is None or context > spec.max_context:
        return None
    weights = row.size_bytes
    fixed: dict[str, Any] = {"weights": weights, "on_gpu": conditions.on_gpu}
    need = memory(spec, deployment, context=context, batch=conditions.streams, **fixed).total_bytes
    if measured and row.memory_bytes is not None and row.context and row.batch:
        before = memory(spec, deployment, context=row.context, batch=row.batch, **fixed).total_bytes
        need += row.memory_bytes - before
        return need, "predicted"
    return need + conditions.overhead(deployment.runtime).total_bytes, "predicted"


def _of_gpu(row: Row) -> bool:
    """Return whether a row's predicted memory is a discrete GPU's. In rows of earlier versions it is a process's."""
    return row.other.get("memory_on") == DISCRETE


def _measured_on(row: Row) -> str | None:
    """Return the machine on which a row's memory was measured. Earlier rows only name where they were timed."""
    parts = row.other.get("memory_parts") or {}
    return parts.get("machine") or (row.machine if row.latency_source == "measured" else None)


def _latency(
    row: Row, deployment: Deployment, spec: ModelSpec | None, conditions: Conditions, context: int, limit: LatencyLimit
) -> tuple[float, str] | None:
    """Return the seconds, and how they are known.

    A measurement of the row in its runtime on the device itself takes precedence. One from another machine or runtime
    is never used. If the measured prompt, or the context before a step, has another length, the measurement is scaled
    by the ratio of the predictions for both loads. If the percentile was not timed, the next higher one replaces it,
    which is at least as large.
    """
    device = conditions.device
    if device is None:
        raise InputError("a latency limit depends on a device: name it with --device")
    timed = _timed(row, limit) if row.latency_source == "measured" and conditions.is_on(row.machine) else None
    limited = context if limit.quantity == "tpot" else min(PROMPT_TOKENS, context)
    bound = "" if timed is None or timed.percentile == limit.percentile else f" at p{timed.percentile}, an upper bound"
    if timed is not None and timed.tokens == limited:
        return timed.seconds, f"measured{bound}"
    if spec is None:
        return None
    seconds = limit_seconds(spec, deployment, device, limit, context=context)
    if timed is not None:
        before = limit_seconds(spec, deployment, device, limit, context=timed.tokens)
        return timed.seconds * seconds / before, f"corrected{bound}"
    known = conditions.correction(deployment.runtime)
    scale = known.decode if limit.quantity == "tpot" else known.prefill
    plain = "assumed" if device.shares(deployment.runtime).assumed else "predicted"
    return seconds * scale, f"corrected{_BY_DOUBTFUL if known.doubtful else ''}" if known.count else plain


class _Timed(NamedTuple):
    """A percentile of a row's own timing, in seconds, and the number of tokens that it was measured with.

    These are the tokens of the prompt if the first token was timed, else the tokens before a decoding step.
    """

    seconds: float
    tokens: int
    percentile: int


def _timed(row: Row, limit: LatencyLimit) -> _Timed | None:
    """Return the timing at the limit's number of streams: its own percentile, or the next higher one stored."""
    detail = row.other.get("latency_detail") or {}
    load = next((one for one in detail.get("loads", ()) if one["streams"] == limit.streams), None)
    if load is None:
        return None
    prompt = load["prompt_tokens"]
    # Rows of earlier versions lack the context before a step. The prompt is most of it.
    tokens = prompt if limit.quantity == "ttft" else load.get("behind_tokens", prompt)
    named = re.compile(rf"{limit.quantity}_p(\d+)_ms")
    timed = ((named.fullmatch(name), finite(value)) for name, value in load.items())
    stored = {int(found[1]): value for found, value in timed if found and value is not None}
    own = _limited(row, limit, stored)
    if own is not None:
        stored[limit.percentile] = own
    higher = min((percentile for percentile in stored if percentile >= limit.percentile), default=None)
    return None if higher is None else _Timed(stored[higher] / 1e3, tokens, higher)


def _limited(row: Row, limit: LatencyLimit, stored: Mapping[int, float]) -> float | None:
    """Return the milliseconds of the same limit in the row's own budget, if it was timed.

    Rows of earlier versions only have this figure among their other figures, where it may also be a prediction for
    another device. It counts as part of this timing if it lies between the stored percentiles on both sides.
    """
    timed = (row.other["latency_detail"].get("limits") or {}).get(limit.name)
    if timed is not None:
        return float(timed)
    beside = row.other.get(limit.name)
    below = [value for percentile, value in stored.items() if percentile < limit.percentile]
    above = [value for percentile, value in stored.items() if percentile > limit.percentile]
    if not isinstance(beside, (int, float)) or not below or not above:
        return None
    return float(beside) if max(below) <= beside <= min(above) else None
