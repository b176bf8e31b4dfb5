"""Text such as "16GB" or "50ms" to numbers and back, and the budget that they make."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from autodistill.errors import InputError

_BYTES = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    # As batch systems write it; an "m" alone would be taken for minutes by some.
    "g": 10**9,
    "t": 10**12,
}
_SECONDS: dict[str, int | Fraction] = {
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": 1,
    "m": 60,
    "min": 60,
    "h": 3600,
    "d": 86400,
}
_TOO_LARGE = 10**30
_LONGEST = 100  # characters of a quantity: Python reads no number of some thousand digits
MOST_CONTEXT = 10**9
"""Tokens of context; more is a slip, since no model reads as many."""
_PARTS = re.compile(r"(\d+) *([a-zA-Z]+)", re.ASCII)
_COMPOUND = re.compile(r"\s*(?:\d+ *[a-zA-Z]+\s*)+\Z", re.ASCII)
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)\s*\Z", re.ASCII)


def _parse(text: str, units: Mapping[str, int | Fraction], what: str, examples: str) -> Fraction:
    match = _QUANTITY.match(text) if len(text) <= _LONGEST else None
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise InputError(f"{text!r} is not {what}: write a number and a unit, like {examples}")
    # As a fraction, since 1.005 kB would be 1004.999... bytes in binary.
    value = Fraction(match[1]) * factor
    if not 0 < value < _TOO_LARGE:
        raise InputError(f"{text!r} is not {what}: it must be above zero, like {examples}")
    return value


def parse_bytes(text: str) -> int:
    """Reads an amount of memory: GB, or G, is 10^9 bytes, GiB is 2^30.

    Raises:
        InputError: Not a positive number with a known unit, or below one byte.
    """
    value = int(_parse(text, _BYTES, "an amount of memory", "16GB or 900MiB"))
    if value < 1:
        raise InputError(f"{text!r} is less than one byte: write an amount like 16GB or 900MiB")
    return value


def parse_duration(text: str) -> float:
    """Reads a duration as seconds: units us, ms, s, m (or min), h, d; or several of them, like "1h30m" or "10m 00s".

    Raises:
        InputError: Not a positive number with a known unit, nor several of falling units.
    """
    parts = _PARTS.findall(text) if len(text) <= _LONGEST else []
    units = [_SECONDS.get(unit.lower(), 0) for _, unit in parts]
    falling = all(larger > smaller for larger, smaller in pairwise(units))
    if len(parts) < 2 or not _COMPOUND.match(text) or 0 in units or not falling:
        return float(_parse(text, _SECONDS, "a duration", "10m, 1h30m or 50ms"))
    total = sum(int(count) * unit for (count, _), unit in zip(parts, units, strict=True))
    if not 0 < total < _TOO_LARGE:
        raise InputError(f"{text!r} is not a duration: it must be above zero, like 10m, 1h30m or 50ms")
    return float(total)


MOST_STREAMS = 999_999
"""Sequences at once; more is a slip, since no machine decodes as many."""


def check_streams(count: int, name: str) -> int:
    """A number of sequences decoded at once, as it was given.

    Args:
        count: Of sequences.
        name: Of the option, like "--batch".

    Raises:
        InputError: None, or more than any machine decodes.
    """
    if not 1 <= count <= MOST_STREAMS:
        wrong = "at least 1" if count < 1 else f"at most {MOST_STREAMS}"
        raise InputError(f"{name} must be {wrong}, not {count}")
    return count


@dataclass(frozen=True, kw_only=True)
class LatencyLimit:
    """One limit of latency.

    Attributes:
        quantity: "tpot", time of a token after the first, or "ttft", time to the first one.
        percentile: Of the times that must lie within it.
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
        """What is limited, like "tpot_p95@streams=1"."""
        return f"{self.quantity}_p{self.percentile}@streams={self.streams}"

    def describe(self) -> str:
        """As it would be typed, like "tpot_p95=50.0ms@streams=1"."""
        return f"{self.quantity}_p{self.percentile}={format_duration(self.seconds)}@streams={self.streams}"

    def typed(self) -> str:
        """The same with a limit that is no shorter, by a tenth at most, in whole units: "tpot_p95=19ms@streams=1"."""
        exact = Fraction(self.seconds)
        unit = next((unit for unit in ("s", "ms") if exact >= 10 * _SECONDS[unit]), "us")
        return f"{self.quantity}_p{self.percentile}={-(-exact // _SECONDS[unit])}{unit}@streams={self.streams}"


LATENCY = LatencyLimit(quantity="tpot", percentile=95, seconds=math.inf, streams=1)
"""What "latency" means where nothing more is said, without a limit."""

_LATENCY = "50ms, or ttft_p95=300ms,tpot_p99=50ms@streams=16"
_LIMIT = re.compile(r"\s*(ttft|tpot)(?:_p([1-9]\d?))?\s*=(.*)", re.ASCII)
_MINUTES = re.compile(r"\s*[\d.]+\s*m\s*", re.ASCII | re.IGNORECASE)
_SHORTEST = 1e-7  # seconds; below it a limit would be written as 0
_STREAMS = re.compile(rf"\s*streams\s*=\s*([1-9]\d{{0,{len(str(MOST_STREAMS)) - 1}}})\s*\Z", re.ASCII)


def parse_latency(text: str, streams: int = 1) -> tuple[LatencyLimit, ...]:
    """Reads limits of latency: "50ms" is the 95th percentile of a token after the first.

    Args:
        text: A duration, or quantities with their limits, and perhaps "@streams=N" at the end.
        streams: Where the text does not say.

    Raises:
        InputError: Another form, a quantity that is not known or limited twice, no positive duration, or streams that
            cannot be.
    """
    check_streams(streams, "--streams")
    limits, at, load = text.partition("@")
    if at:
        found = _STREAMS.match(load)
        if found is None:
            raise InputError(f"{text!r} is no limit of latency: after @ comes streams=N; write {_LATENCY}")
        streams = int(found[1])
    parsed = []
    for part in limits.split(","):
        named = _LIMIT.match(part)
        if named is None and "=" in part:
            raise InputError(
                f"{text!r} is no limit of latency: ttft and tpot have percentiles 1 to 99; write {_LATENCY}"
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
    """What an hour costs: of a GPU where a search uses any, else of the machine.

    Attributes:
        amount: Of money.
        currency: As it was typed, like "EUR" or "$"; empty where nothing was said.
    """

    amount: float
    currency: str = ""

    def of(self, hours: float) -> str:
        """The cost of so many hours, like "1.25 EUR" or "$1.25"."""
        cost = f"{self.amount * hours:,.2f}"
        if not self.currency:
            return cost
        return f"{cost} {self.currency}" if self.currency.isalpha() else f"{self.currency}{cost}"


_PRICE = re.compile(r"\s*([$€£¥]?)\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]{3})?\s*/\s*h\s*\Z")


def parse_price(text: str) -> Price:
    """Reads a price an hour, like "2.5/h", "$2.5/h" or "2.5 EUR/h".

    Raises:
        InputError: Another form, two currencies, or an amount that is not above zero.
    """
    match = _PRICE.match(text)
    if match is None or (match[1] and match[3]):
        raise InputError(f"{text!r} is no price: write an amount an hour, like 2.5/h, $2.5/h or 2.5 EUR/h")
    amount = float(match[2])
    if not 0 < amount < 10**9:
        raise InputError(f"{text!r} is no price: the amount must be above zero, like 2.5/h")
    return Price(amount=amount, currency=match[1] or (match[3] or "").upper())


def format_bytes(count: float) -> str:
    """Writes bytes with three significant digits in decimal units, like "98.3 MB"."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # The limit lies where three digits would round up to the next unit's first.
        if abs(count) >= 0.9995 * factor:
            return f"{_three_digits(count / factor)} {unit}"
    return f"{count:.0f} B"


def written_bytes(count: int) -> str:
    """An amount of memory that is no less, by a tenth at most, as it is typed: like "99MB"."""
    unit = next((unit for unit in ("TB", "GB", "MB", "kB") if count >= 10 * _BYTES[unit.lower()]), "B")
    return f"{-(-count // _BYTES[unit.lower()])}{unit}"


def count_of(count: int, thing: str) -> str:
    """A count of things in words, like "1 stream" or "4 streams"."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def format_duration(seconds: float) -> str:
    """Writes seconds as a person says them, like "9m 05s", "12.3s", "48.0ms" or "1.50us"."""
    if seconds >= 3599.5:
        seconds = round(seconds)
        return f"{int(seconds // 3600)}h {int(seconds % 3600 // 60):02d}m"
    if seconds >= 59.95:
        return f"{int(round(seconds) // 60)}m {int(round(seconds) % 60):02d}s"
    if seconds >= 1:
        return f"{seconds:.1f}s"
    if seconds >= 1e-3 or seconds <= 0:
        return f"{seconds * 1e3:.1f}ms"
    return f"{_three_digits(seconds * 1e6)}us"


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"


NO_LIMIT = 10**18
"""Bytes of a budget that limits no memory: above any, and still a number that every file format holds."""
CONTEXT = 2048
"""Tokens of context where nobody says how many, unless a model reads fewer."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Hard limits of the deployed student.

    Attributes:
        memory_bytes: Limit of the memory that inference takes: weights, KV cache, compute buffers and overhead.
        context: Tokens of context the memory is stated at.
        batch: Sequences decoded at once, each with its own `context`.
    """

    memory_bytes: int
    context: int = CONTEXT
    batch: int = 1

    def __post_init__(self) -> None:
        if self.memory_bytes < 1:
            raise InputError(f"a budget of {self.memory_bytes} bytes holds nothing: give an amount like 16GB")
        if not 1 <= self.context <= MOST_CONTEXT:
            bound = "at least 1" if self.context < 1 else f"at most {MOST_CONTEXT:,}"
            raise InputError(f"--context must be {bound}, not {self.context}")
        check_streams(self.batch, "--batch")

    def describe(self) -> str:
        """Its memory in words, like "16.0 GB at context 2048, batch 1"."""
        memory = "no limit of memory" if self.memory_bytes >= NO_LIMIT else format_bytes(self.memory_bytes)
        return f"{memory} at context {self.context}, batch {self.batch}"

    def to_json(self) -> dict[str, Any]:
        """The budget as plain data."""
        return {"memory_bytes": self.memory_bytes, "context": self.context, "batch": self.batch}
