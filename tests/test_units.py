"""Units: text to numbers against exact fractions, and back."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodistill.errors import InputError
from autodistill.units import Budget, format_bytes, format_duration, parse_bytes, parse_duration

BYTES = {
    "B": 1,
    "kB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
    "TiB": 1024**4,
}
SECONDS = {
    "us": Fraction(1, 10**6),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "min": Fraction(60),
    "h": Fraction(3600),
    "d": Fraction(86400),
}
numbers = st.tuples(st.integers(1, 9999), st.integers(0, 999)).map(lambda pair: f"{pair[0]}.{pair[1]:03d}")
spaces = st.sampled_from(["", " ", "  "])
cases = st.sampled_from([str, str.upper, str.lower])


@given(number=numbers, unit=st.sampled_from(sorted(BYTES)), space=spaces, case=cases)
def test_bytes_are_what_the_fraction_says(number, unit, space, case):
    exact = Fraction(number) * BYTES[unit]
    assert parse_bytes(f"{space}{number}{space}{case(unit)}{space}") == int(exact)


@given(number=st.integers(1, 10**6), unit=st.sampled_from(sorted(BYTES)))
def test_whole_amounts_are_exact(number, unit):
    assert parse_bytes(f"{number}{unit}") == number * BYTES[unit]


@given(number=numbers, unit=st.sampled_from(sorted(SECONDS)), space=spaces, case=cases)
def test_seconds_are_what_the_fraction_says(number, unit, space, case):
    exact = float(Fraction(number) * SECONDS[unit])
    assert parse_duration(f"{number}{space}{case(unit)}") == pytest.approx(exact, rel=1e-12)


@given(count=st.integers(1, 10**15))
def test_bytes_written_read_back_to_three_digits(count):
    text = format_bytes(count)
    assert abs(parse_bytes(text) - count) <= count * 0.00501 + 0.5
    assert sum(character.isdigit() for character in text) <= 3 or count >= 10**15 - 10**12 // 2


@pytest.mark.parametrize(
    ("text", "count"),
    [("16GB", 16 * 10**9), ("16 gb", 16 * 10**9), ("16GiB", 16 * 2**30), (".5MB", 500_000), ("2.kB", 2000), ("1b", 1)],
)
def test_amounts_as_people_write_them(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (98_304_000, "98.3 MB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (16 * 10**9, "16.0 GB"),
        (-2_000_000, "-2.00 MB"),
    ],
)
def test_amounts_as_they_are_shown(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.048, "48.0ms"),
        (1, "1.0s"),
        (12.34, "12.3s"),
        (59.9, "59.9s"),
        (59.96, "1m 00s"),
        (545, "9m 05s"),
        (3599.4, "59m 59s"),
        (3599.7, "1h 00m"),
        (7380, "2h 03m"),
    ],
)
def test_durations_as_they_are_shown(seconds, text):
    assert format_duration(seconds) == text


BAD = [
    "16 gigs",
    "-1GB",
    "0",
    "0GB",
    "16",
    "GB",
    "",
    " ",
    "1.2.3GB",
    "1e3GB",
    "nanGB",
    "infGB",
    "1_000MB",
    "16GB!",
    "١GB",
]


@pytest.mark.parametrize("text", [*BAD, "10m", "0.2B", "9" * 400 + "GB"])
def test_what_is_no_amount_of_memory(text):
    with pytest.raises(InputError) as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)
    assert "16GB" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["10", "10GB", "-5m", "0s", "ten minutes", "", "1h30m", "m"])
def test_what_is_no_duration(text):
    with pytest.raises(InputError, match="is not a duration"):
        parse_duration(text)


@given(text=st.text(max_size=12))
def test_any_text_is_read_or_refused(text):
    for parse in (parse_bytes, parse_duration):
        try:
            value = parse(text)
        except InputError:
            continue
        assert value > 0


def test_a_budget_is_plain_data():
    budget = Budget(memory_bytes=16 * 10**9, latency_seconds=0.05)
    assert Budget(**json.loads(json.dumps(budget.to_json()))) == budget


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"memory_bytes": 0}, "holds nothing"),
        ({"context": 0}, "--context"),
        ({"batch": -1}, "--batch"),
        ({"latency_seconds": 0.0}, "latency"),
    ],
)
def test_budgets_that_cannot_be(fields, said):
    with pytest.raises(InputError, match=said):
        Budget(**({"memory_bytes": 10**9} | fields))
