"""Conversion of text such as "16GB", "50ms" or "6k" to numbers and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise

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
    # Batch systems write these units. A single "m" is left out, because it could be read as minutes.
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

_LONGEST = 100  # characters of a quantity: Python refuses numbers of several thousand digits
_LONGEST_COUNT = 1000  # characters of a count, whose options check the largest value themselves

MOST_CONTEXT = 10**9
"""Largest context in tokens. More is a typing error, because no model reads that many."""

_COUNTS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}

# Signs are accepted, because each option checks its own smallest value.
_COUNT = re.compile(r"\s*([+-]?)(\d+(?:_\d+)*(?:\.\d*)?|\.\d+)([kMB]?)\s*\Z", re.ASCII)

_PARTS = re.compile(r"(\d+) *([a-zA-Z]+)", re.ASCII)

_COMPOUND = re.compile(r"\s*(?:\d+ *[a-zA-Z]+\s*)+\Z", re.ASCII)

_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]+)\s*\Z", re.ASCII)


def _parse(text: str, units: Mapping[str, int | Fraction], what: str, examples: str) -> Fraction:
    match = _QUANTITY.match(text) if len(text) <= _LONGEST else None
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise InputError(f"{text!r} is not {what}: write a number and a unit, like {examples}")
    # A fraction is exact. In floating point, 1.005 kB would be 1004.999... bytes.
    value = Fraction(match[1]) * factor
    if not 0 < value < _TOO_LARGE:
        raise InputError(f"{text!r} is not {what}: it must be above zero, like {examples}")
    return value


def parse_bytes(text: str) -> int:
    """Read an amount of memory. GB or G is 10^9 bytes, GiB is 2^30.

    Raises:
        InputError: The text is not a positive number with a known unit, or is less than one byte.
    """
    value = int(_parse(text, _BYTES, "an amount of memory", "16GB or 900MiB"))
    if value < 1:
        raise InputError(f"{text!r} is less than one byte: write an amount like 16GB or 900MiB")
    return value


def parse_tokens(text: str) -> int:
    """Read a number of tokens, like "6144", "6_144", "6k", "1.5M" or "2B". k is 10^3, M is 10^6, B is 10^9.

    Zero, negative and very large numbers are accepted. The caller refuses them in a message that names its option.

    Raises:
        InputError: The text is not a whole number of tokens.
    """
    match = _COUNT.match(text) if len(text) <= _LONGEST_COUNT else None
    count = Fraction(match[2].replace("_", "")) * _COUNTS[match[3]] if match else Fraction(1, 2)
    if match is None or count.denominator != 1:
        raise InputError(f"{text!r} is no count of tokens: write one like 6144, 6k or 69M")
    return -int(count) if match[1] == "-" else int(count)


def parse_duration(text: str) -> float:
    """Read a duration in seconds. Units are us, ms, s, m (or min), h and d, also combined: "1h30m" or "10m 00s".

    Raises:
        InputError: The text is not a positive number with a known unit, nor several of them in falling order.
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


def format_bytes(count: float) -> str:
    """Write bytes with three significant digits in decimal units, like "98.3 MB"."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # From 0.9995 of a unit, three digits round up to 1.00 of it.
        if abs(count) >= 0.9995 * factor:
            return f"{_three_digits(count / factor)} {unit}"
    return f"{count:.0f} B"


def written_bytes(count: int) -> str:
    """Write bytes in the form that a user types, like "99MB", rounded up by at most a tenth."""
    unit = next((unit for unit in ("TB", "GB", "MB", "kB") if count >= 10 * _BYTES[unit.lower()]), "B")
    return f"{-(-count // _BYTES[unit.lower()])}{unit}"


def with_error(value: float | None, error: float | None, form: str = ".4f") -> str:
    """Write a value with its standard error, like "0.5000 ± 0.0100", or "-" if the value is None.

    Args:
        value: The value, in any unit.
        error: The standard error in the same unit, or None.
        form: The format specification of both. A sign in it applies only to the value.
    """
    if value is None:
        return "-"
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form.lstrip('+')}}"


def count_of(count: int, thing: str) -> str:
    """Write a count of things, like "1 stream" or "4 streams"."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def format_rate(value: float, digits: int = 4) -> str:
    """Write a rate with this many significant digits and without an exponent, like "3,416" or "0.3144"."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded >= 10 ** (digits - 1) else f"{rounded:.{digits}g}"


def format_duration(seconds: float) -> str:
    """Write seconds for a person, like "9m 05s", "12.3s", "48.0ms" or "1.50us"."""
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
