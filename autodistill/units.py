"""Text such as "16GB", "50ms" or "6k" to numbers and back."""

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
_LONGEST_COUNT = 1000  # of a count, whose options say themselves how much is too much

MOST_CONTEXT = 10**9
"""Tokens of context; more is a slip, since no model reads as many."""

_COUNTS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}

# Signs too: whoever takes a count says what is the least of it.
_COUNT = re.compile(r"\s*([+-]?)(\d+(?:_\d+)*(?:\.\d*)?|\.\d+)([kMB]?)\s*\Z", re.ASCII)

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
    """Read an amount of memory: GB, or G, is 10^9 bytes, GiB is 2^30.

    Raises:
        InputError: Not a positive number with a known unit, or below one byte.
    """
    value = int(_parse(text, _BYTES, "an amount of memory", "16GB or 900MiB"))
    if value < 1:
        raise InputError(f"{text!r} is less than one byte: write an amount like 16GB or 900MiB")
    return value


def parse_tokens(text: str) -> int:
    """Read a count of tokens, like "6144", "6_144", "6k", "1.5M" or "2B": k is 10^3, M is 10^6, B is 10^9.

    Zero and less are counts too, and whatever is too much: whoever takes one refuses it by the name of its option.

    Raises:
        InputError: Not a whole number of tokens.
    """
    match = _COUNT.match(text) if len(text) <= _LONGEST_COUNT else None
    count = Fraction(match[2].replace("_", "")) * _COUNTS[match[3]] if match else Fraction(1, 2)
    if match is None or count.denominator != 1:
        raise InputError(f"{text!r} is no count of tokens: write one like 6144, 6k or 69M")
    return -int(count) if match[1] == "-" else int(count)


def parse_duration(text: str) -> float:
    """Read a duration as seconds: units us, ms, s, m (or min), h, d; or several of them, like "1h30m" or "10m 00s".

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


def format_bytes(count: float) -> str:
    """Write bytes with three significant digits in decimal units, like "98.3 MB"."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # The limit lies where three digits would round up to the next unit's first.
        if abs(count) >= 0.9995 * factor:
            return f"{_three_digits(count / factor)} {unit}"
    return f"{count:.0f} B"


def written_bytes(count: int) -> str:
    """An amount of memory that is no less, by a tenth at most, as it is typed: like "99MB"."""
    unit = next((unit for unit in ("TB", "GB", "MB", "kB") if count >= 10 * _BYTES[unit.lower()]), "B")
    return f"{-(-count // _BYTES[unit.lower()])}{unit}"


def with_error(value: float | None, error: float | None, form: str = ".4f") -> str:
    """Write a value with its standard error, like "0.5000 ± 0.0100"; "-" where it is not known.

    Args:
        value: In any unit.
        error: In the same; None where there is none.
        form: Of both, as `format` takes it; a sign that it asks for is the value's alone.
    """
    if value is None:
        return "-"
    return f"{value:{form}}" if error is None else f"{value:{form}} ± {error:{form.lstrip('+')}}"


def count_of(count: int, thing: str) -> str:
    """A count of things in words, like "1 stream" or "4 streams"."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def format_rate(value: float, digits: int = 4) -> str:
    """Write a rate with so many significant digits and never a power of ten, like "3,416" or "0.3144"."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded >= 10 ** (digits - 1) else f"{rounded:.{digits}g}"


def format_duration(seconds: float) -> str:
    """Write seconds as a person says them, like "9m 05s", "12.3s", "48.0ms" or "1.50us"."""
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
