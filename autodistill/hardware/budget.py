"""The limits of a deployed student: memory, and on a device optionally latency."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from autodistill.errors import InputError
from autodistill.hardware.catalog import device_from_json
from autodistill.hardware.device import Device
from autodistill.strategy.deployment import Deployment
from autodistill.units import _SECONDS, MOST_CONTEXT, _parse, format_bytes, format_duration

CONTEXT = 2048
"""Tokens of context by default, unless a model reads fewer."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Hard limits of a deployed student: its memory at a context and a batch.

    Attributes:
        memory_bytes: Limit of the memory of inference: weights, KV cache, compute buffers and overhead.
        context: Tokens of context for which the memory is stated.
        batch: Sequences decoded at once, each with its own `context`.
    """

    memory_bytes: int
    context: int = CONTEXT
    batch: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.memory_bytes, str):
            raise InputError(f"memory_bytes is a number, not {self.memory_bytes!r}: parse_bytes reads such a text")
        if self.memory_bytes < 1:
            raise InputError(f"a budget of {self.memory_bytes} bytes holds nothing: give an amount like 16GB")
        if not 1 <= self.context <= MOST_CONTEXT:
            bound = "at least 1" if self.context < 1 else f"at most {MOST_CONTEXT:,}"
            raise InputError(f"--context must be {bound}, not {self.context}")
        check_streams(self.batch, "--batch")

    def describe(self) -> str:
        """Return the memory limit in words, like "16.0 GB at context 2048, batch 1"."""
        memory = "no limit of memory" if self.memory_bytes >= NO_LIMIT else format_bytes(self.memory_bytes)
        return f"{memory} at context {self.context}, batch {self.batch}"

    def to_json(self) -> dict[str, Any]:
        """Return the budget as plain data."""
        return {"memory_bytes": self.memory_bytes, "context": self.context, "batch": self.batch}


@dataclass(frozen=True, kw_only=True)
class DeviceBudget(Budget):
    """A budget on a device, to which its latency limits apply.

    A limit at several streams needs memory for as many streams, so `batch` is raised to the largest number of streams.

    Attributes:
        device: The device that serves the student.
        latency: Hard limits in addition to the memory limit; possibly empty.
    """

    device: Device
    latency: tuple[LatencyLimit, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "batch", max([self.batch, *(limit.streams for limit in self.latency)]))

    def describe(self) -> str:
        """Return all limits in words."""
        limits = (limit.describe() for limit in self.latency)
        return ", ".join([f"{super().describe()}, on {self.device.name}", *limits])

    def to_json(self) -> dict[str, Any]:
        """Return the budget as plain data."""
        limits = [asdict(limit) for limit in self.latency]
        return super().to_json() | {"device": self.device.to_json(), "latency": limits}


@dataclass(frozen=True, kw_only=True)
class TierBudget(Budget):
    """A budget on every discrete GPU of a class.

    Attributes:
        tier_bytes: The memory that GPUs of the class are sold with.
        least_device: The GPU that leaves the least memory free, or None if no GPU of this size is known.
    """

    tier_bytes: int
    least_device: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the budget as plain data."""
        return super().to_json() | {"tier_bytes": self.tier_bytes, "least_device": self.least_device}


def on_gpu(budget: Budget) -> bool:
    """Return whether the budget's memory is that of a discrete GPU, rather than that of a process."""
    if isinstance(budget, TierBudget):
        return True
    return isinstance(budget, DeviceBudget) and budget.device.discrete


def served(deployments: Iterable[Deployment], budget: Budget) -> tuple[Deployment, ...]:
    """Return the deployments whose runtime the budget's device has, or all of them if no device is named."""
    if not isinstance(budget, DeviceBudget):
        return tuple(deployments)
    return tuple(one for one in deployments if not budget.device.lacks(one.runtime))


def memory_on(device: Device, requested: int | None) -> int:
    """Return the bytes that a student may use on a device: those asked for, or the usable part of its memory.

    Raises:
        InputError: The device has less memory than asked for.
    """
    if requested is not None and requested > device.memory_bytes:
        raise InputError(
            f"a budget of {format_bytes(requested)} is more than the {format_bytes(device.memory_bytes)} that "
            f"{device.name} has, of which {format_bytes(device.usable_bytes)} are usable: lower --budget"
        )
    return device.usable_bytes if requested is None else requested


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits that a user asks for. If one is None, the run's stored limit or the default applies.

    Attributes:
        memory_bytes, context, batch, latency: As in a budget.
        device: The device that serves the student.
    """

    memory_bytes: int | None = None
    context: int | None = None
    batch: int | None = None
    device: Device | None = None
    latency: tuple[LatencyLimit, ...] = ()

    @classmethod
    def of(cls, budget: Budget) -> Limits:
        """Return the limits of a whole budget."""
        limits = cls(memory_bytes=budget.memory_bytes, context=budget.context, batch=budget.batch)
        if not isinstance(budget, DeviceBudget):
            return limits
        return replace(limits, device=budget.device, latency=budget.latency)

    def budget(self, context: int) -> Budget:
        """Return the budget of a new run.

        Args:
            context: Tokens of context, unless the user asks for another number.

        Raises:
            InputError: As `memory_on`.
        """
        given = {"context": self.context or context, "batch": self.batch or 1}
        if self.device is None:
            return Budget(memory_bytes=self.memory_bytes or NO_LIMIT, **given)
        memory = memory_on(self.device, self.memory_bytes)
        return DeviceBudget(memory_bytes=memory, device=self.device, latency=self.latency, **given)

    def resumed(self, before: Budget) -> Budget:
        """Return the budget of a run that is resumed.

        A stored device keeps its figures. They change as soon as the device is measured again, but the predictions that
        a run made so far must be comparable with its later ones.

        Args:
            before: The budget as the run stored it.

        Raises:
            InputError: As `memory_on`.
        """
        given = {"context": self.context or before.context, "batch": self.batch or before.batch}
        placed = before if isinstance(before, DeviceBudget) else None
        memory, device = self.memory_bytes, self.device
        if device is None:
            memory = memory or before.memory_bytes
            device = placed.device if placed else None
        elif placed and device.name == placed.device.name:
            if memory in (None, device.usable_bytes):
                memory = placed.device.usable_bytes
            device = placed.device
        if device is None:
            return Budget(memory_bytes=memory or before.memory_bytes, **given)
        latency = self.latency or (placed.latency if placed else ())
        return DeviceBudget(memory_bytes=memory_on(device, memory), device=device, latency=latency, **given)


def limits_as(budget: Budget, before: Budget) -> Budget:
    """Return a budget in a form that can be compared with `before`, which may name no device and limit only memory.

    Runs that were stored before latency limits existed name no device, whatever device's memory they used.
    """
    if isinstance(before, DeviceBudget) or not isinstance(budget, DeviceBudget) or budget.latency:
        return budget
    return Budget(memory_bytes=budget.memory_bytes, context=budget.context, batch=budget.batch)


def read_budget(data: Mapping[str, Any]) -> Budget:
    """Read what a budget's `to_json` wrote. A field that did not exist at that time limits nothing.

    Raises:
        InputError: The data is not a budget.
    """
    try:
        plain = {name: data[name] for name in ("memory_bytes", "context", "batch") if name in data}
        if data.get("device") is None:
            return Budget(**plain)
        limits = tuple(LatencyLimit(**limit) for limit in data["latency"])
        return DeviceBudget(**plain, device=device_from_json(data["device"]), latency=limits)
    except (KeyError, TypeError) as error:
        raise InputError(f"this is no budget as a run stores it ({error}): {dict(data)}") from None


MOST_STREAMS = 999_999
"""Most sequences at once. A larger number is a typing error, because no machine decodes as many."""


def check_streams(count: int, name: str) -> int:
    """Check a number of sequences decoded at once, and return it.

    Args:
        count: Number of sequences.
        name: Name of the option, like "--batch".

    Raises:
        InputError: The number is below 1, or more than any machine decodes.
    """
    if not 1 <= count <= MOST_STREAMS:
        wrong = "at least 1" if count < 1 else f"at most {MOST_STREAMS}"
        raise InputError(f"{name} must be {wrong}, not {count}")
    return count


@dataclass(frozen=True, kw_only=True)
class LatencyLimit:
    """One latency limit.

    Attributes:
        quantity: "tpot", the time of a token after the first, or "ttft", the time to the first token.
        percentile: The percentile of the times that must lie within the limit.
        seconds: The limit.
        streams: Sequences decoded at once.
    """

    quantity: str
    percentile: int
    seconds: float
    streams: int

    def __post_init__(self) -> None:
        check_streams(self.streams, "the streams of a limit of latency")

    @property
    def name(self) -> str:
        """Name of the limited figure, like "tpot_p95@streams=1"."""
        return f"{self.quantity}_p{self.percentile}@streams={self.streams}"

    def describe(self) -> str:
        """Return the limit as a user types it, like "tpot_p95=50.0ms@streams=1"."""
        return f"{self.quantity}_p{self.percentile}={format_duration(self.seconds)}@streams={self.streams}"

    def typed(self) -> str:
        """Return the limit in whole units, rounded up by at most a tenth: "tpot_p95=19ms@streams=1"."""
        exact = Fraction(self.seconds)
        unit = next((unit for unit in ("s", "ms") if exact >= 10 * _SECONDS[unit]), "us")
        return f"{self.quantity}_p{self.percentile}={-(-exact // _SECONDS[unit])}{unit}@streams={self.streams}"


LATENCY = LatencyLimit(quantity="tpot", percentile=95, seconds=math.inf, streams=1)
"""The meaning of "latency" if nothing more is said, without a limit."""

_LATENCY = "50ms, or ttft_p95=300ms,tpot_p99=50ms@streams=16"

_LIMIT = re.compile(r"\s*(ttft|tpot)(?:_p([1-9]\d?))?\s*=(.*)", re.ASCII)

_MINUTES = re.compile(r"\s*[\d.]+\s*m\s*", re.ASCII | re.IGNORECASE)

_SHORTEST = 1e-7  # seconds; below it a limit would be written as 0

_STREAMS = re.compile(rf"\s*streams\s*=\s*([1-9]\d{{0,{len(str(MOST_STREAMS)) - 1}}})\s*\Z", re.ASCII)


def parse_latency(text: str, streams: int = 1) -> tuple[LatencyLimit, ...]:
    """Read latency limits: "50ms" alone is the 95th percentile of the time per token after the first.

    Args:
        text: A duration, or quantities with their limits, optionally followed by "@streams=N".
        streams: Number of streams if the text does not state one.

    Raises:
        InputError: The text has another form, a quantity is unknown or limited twice, a duration is not positive, or
            the number of streams is impossible.
    """
    check_streams(streams, "--streams")
    limits, at, load = text.partition("@")
    if at:
        found = _STREAMS.match(load)
        if found is None:
            raise InputError(f"{text!r} is not a latency limit: after @ comes streams=N; write {_LATENCY}")
        streams = int(found[1])
    parsed = []
    for part in limits.split(","):
        named = _LIMIT.match(part)
        if named is None and "=" in part:
            raise InputError(
                f"{text!r} is not a latency limit: ttft and tpot have percentiles 1 to 99; write {_LATENCY}"
            )
        quantity, percentile, duration = named.groups() if named else ("tpot", None, part)
        if _MINUTES.fullmatch(duration):
            raise InputError(f"{text!r} would be minutes: write ms for milliseconds, or min, like {_LATENCY}")
        seconds = float(_parse(duration, _SECONDS, "a limit of latency", _LATENCY))
        if seconds < _SHORTEST:
            raise InputError(f"{text!r} is shorter than any answer: write a limit like {_LATENCY}")
        parsed.append(
            LatencyLimit(quantity=quantity, percentile=int(percentile or 95), seconds=seconds, streams=streams)
        )
    if len({(limit.quantity, limit.percentile) for limit in parsed}) < len(parsed):
        raise InputError(f"{text!r} limits one latency twice: write {_LATENCY}")
    return tuple(parsed)


@dataclass(frozen=True, kw_only=True)
class Price:
    """The price of an hour: of a GPU if a search uses any, else of the machine.

    Attributes:
        amount: Amount of money.
        currency: The currency as it was typed, like "EUR" or "$", or "" if none was given.
    """

    amount: float
    currency: str = ""

    def of(self, hours: float) -> str:
        """Return the cost of a number of hours, like "1.25 EUR" or "$1.25"."""
        cost = f"{self.amount * hours:,.2f}"
        if not self.currency:
            return cost
        return f"{cost} {self.currency}" if self.currency.isalpha() else f"{self.currency}{cost}"


_PRICE = re.compile(r"\s*([$€£¥]?)\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]{3})?\s*/\s*h\s*\Z")


def parse_price(text: str) -> Price:
    """Read a price per hour, like "2.5/h", "$2.5/h" or "2.5 EUR/h".

    Raises:
        InputError: The text has another form or two currencies, or the amount is not above zero.
    """
    match = _PRICE.match(text)
    if match is None or (match[1] and match[3]):
        raise InputError(f"{text!r} is not a price: write an amount an hour, like 2.5/h, $2.5/h or 2.5 EUR/h")
    amount = float(match[2])
    if not 0 < amount < 10**9:
        raise InputError(f"{text!r} is not a price: the amount must be above zero, like 2.5/h")
    return Price(amount=amount, currency=match[1] or (match[3] or "").upper())


NO_LIMIT = 10**18
"""Bytes of a budget without a memory limit: above any memory, and still a number that every file format holds."""
