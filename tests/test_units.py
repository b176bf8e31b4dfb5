"""Units: text to numbers, against exact fractions, and back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodistill.errors import InputError
from autodistill.hardware.budget import (
    LATENCY,
    MOST_STREAMS,
    Budget,
    LatencyLimit,
    check_streams,
    parse_latency,
    parse_price,
)
from autodistill.units import (
    format_bytes,
    format_duration,
    format_rate,
    parse_bytes,
    parse_duration,
    parse_tokens,
    with_error,
    written_bytes,
)

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


@given(count=st.integers(1, 10**16))
def test_an_amount_as_it_is_typed_is_no_less_and_hardly_more(count: int) -> None:
    assert count <= parse_bytes(written_bytes(count)) < 1.1 * count + 1


@given(seconds=st.floats(1e-5, 1e5), streams=st.integers(1, 99))
def test_a_limit_as_it_is_typed_is_no_shorter_and_hardly_longer(seconds: float, streams: int) -> None:
    limit = LatencyLimit(quantity="ttft", percentile=50, seconds=seconds, streams=streams)
    (read,) = parse_latency(limit.typed())
    assert (read.name, seconds <= read.seconds < 1.11 * seconds) == (limit.name, True)


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
    [
        ("16GB", 16 * 10**9),
        ("16 gb", 16 * 10**9),
        ("16GiB", 16 * 2**30),
        (".5MB", 500_000),
        ("2.kB", 2000),
        ("1b", 1),
        ("16G", 16 * 10**9),
    ],
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
        (1.5e-6, "1.50us"),
        (0.0009, "900us"),
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


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("6144", 6144),
        ("6_144", 6144),
        (" 6144 ", 6144),
        ("6k", 6000),
        ("0.128k", 128),
        (".5k", 500),
        ("1.5M", 1_500_000),
        ("2B", 2 * 10**9),
        ("0", 0),
        ("-1k", -1000),
        ("1" + "0" * 20, 10**20),
        ("9" * 400 + "B", (10**400 - 1) * 10**9),
    ],
)
def test_counts_of_tokens_as_people_write_them(text: str, count: int) -> None:
    assert parse_tokens(text) == count


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "nan", "inf", "1.5", "0.0001k", "1e3", "1e400k", "6K", "69m", "6 k", "6kM", "69MB", "6,144", "6__1"),
        *("٦", "9" * 5000, "9" * 5000 + "k"),
    ],
)
def test_what_is_no_count_of_tokens(text: str) -> None:
    with pytest.raises(InputError, match="write one like 6144, 6k or 69M"):
        parse_tokens(text)


@pytest.mark.parametrize("text", ["10", "10GB", "-5m", "0s", "ten minutes", "", "30m1h", "m"])
def test_what_is_no_duration(text):
    with pytest.raises(InputError, match="is not a duration"):
        parse_duration(text)


@given(text=st.text(max_size=12))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(InputError):
        assert isinstance(parse_tokens(text), int)
    for parse in (parse_bytes, parse_duration):
        try:
            value = parse(text)
        except InputError:
            continue
        assert value > 0


def test_a_budget_is_plain_data():
    budget = Budget(memory_bytes=16 * 10**9, context=512, batch=3)
    assert Budget(**json.loads(json.dumps(budget.to_json()))) == budget


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"memory_bytes": 0}, "holds nothing"),
        ({"context": 0}, "--context"),
        ({"batch": -1}, "--batch must be at least 1"),
        ({"batch": 10**6}, "--batch must be at most 999999, not 1000000"),
    ],
)
def test_budgets_that_cannot_be(fields, said):
    with pytest.raises(InputError, match=said):
        Budget(**({"memory_bytes": 10**9} | fields))


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("50ms", [("tpot", 95, 0.05, 1)]),
        ("ttft=2s", [("ttft", 95, 2.0, 1)]),
        ("ttft_p95=300ms,tpot_p99=50ms@streams=16", [("ttft", 95, 0.3, 16), ("tpot", 99, 0.05, 16)]),
        (" tpot_p50 = 20 ms @ streams = 4 ", [("tpot", 50, 0.02, 4)]),
    ],
)
def test_a_limit_of_latency_names_quantity_percentile_and_load(text: str, limits: list[tuple[Any, ...]]) -> None:
    found = parse_latency(text)
    assert [(one.quantity, one.percentile, one.seconds, one.streams) for one in found] == limits


def test_a_limit_of_minutes_is_written_out() -> None:
    assert parse_latency("ttft=2min")[0].seconds == 120


def test_streams_are_the_caller_s_where_the_text_does_not_say() -> None:
    assert parse_latency("50ms", 4)[0].streams == 4
    assert parse_latency("50ms@streams=2", 4)[0].streams == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a limit of latency"),
        ("50", "write a number and a unit"),
        ("0ms", "above zero"),
        ("ttft_p0=1s", "percentiles 1 to 99"),
        ("ttft_p100=1s", "percentiles 1 to 99"),
        ("latency=1s", "ttft and tpot"),
        ("50ms@16", "after @ comes streams=N"),
        ("50ms@streams=0", "after @ comes streams=N"),
        ("50ms,tpot=40ms", "limits one latency twice"),
        ("50ms,", "is not a limit of latency"),
        ("50m", "would be minutes: write ms for milliseconds, or min"),
        ("ttft_p95=1s,tpot=5 M", "would be minutes"),
        ("0.0000001us", "shorter than any answer"),
    ],
)
def test_other_limits_of_latency_are_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_latency(text)


@given(text=st.text(alphabet="tpo_f=,@streams 0123456789.mus", max_size=40), streams=st.integers(-(10**12), 10**12))
def test_any_text_is_limits_of_latency_or_is_refused(text: str, streams: int) -> None:
    with contextlib.suppress(InputError):
        for limit in parse_latency(text, streams):
            assert limit.seconds > 0
            assert 1 <= limit.percentile <= 99
            assert 1 <= limit.streams <= MOST_STREAMS


@given(count=st.integers(-(10**30), 10**30) | st.integers(-3, 3) | st.integers(MOST_STREAMS - 3, MOST_STREAMS + 3))
def test_streams_are_as_many_wherever_they_are_given_or_refused_everywhere(count: int) -> None:
    """The text of a limit, the caller's number, a limit made in Python and a budget accept the same numbers."""
    ways: list[Callable[[], int]] = [
        lambda: check_streams(count, "--streams"),
        lambda: parse_latency(f"50ms@streams={count}")[0].streams,
        lambda: parse_latency("50ms", count)[0].streams,
        lambda: replace(LATENCY, streams=count).streams,
        lambda: Budget(memory_bytes=1, batch=count).batch,
    ]
    for way in ways:
        if 1 <= count <= 999_999:
            assert way() == count
        else:
            with pytest.raises(InputError, match=r"at least 1|at most 999999|after @ comes streams=N"):
                way()


@given(
    quantity=st.sampled_from(["tpot", "ttft"]),
    percentile=st.integers(1, 99),
    tenths=st.integers(1, 9999),
    streams=st.integers(1, 999),
)
def test_a_limit_of_latency_reads_what_it_writes(quantity: str, percentile: int, tenths: int, streams: int) -> None:
    limit = LatencyLimit(quantity=quantity, percentile=percentile, seconds=tenths / 1e4, streams=streams)
    assert parse_latency(limit.describe()) == (limit,)


@pytest.mark.parametrize(
    ("text", "amount", "currency", "cost"),
    [
        ("2.5/h", 2.5, "", "5.00"),
        ("$2.5/h", 2.5, "$", "$5.00"),
        (" .75 eur / h ", 0.75, "EUR", "1.50 EUR"),
        ("€1200/h", 1200.0, "€", "€2,400.00"),
    ],
)
def test_a_price_is_an_amount_an_hour(text, amount, currency, cost):
    price = parse_price(text)
    assert (price.amount, price.currency) == (amount, currency)
    assert price.of(2) == cost


@pytest.mark.parametrize(
    "text", ["", "2.5", "2.5/d", "/h", "-1/h", "0/h", "nan/h", "1e3/h", "$2 EUR/h", "2.5 euros/h", "2,5/h"]
)
def test_no_price(text):
    with pytest.raises(InputError, match=r"is not a price.*2\.5/h"):
        parse_price(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1h30m", 5400), ("10m 00s", 600), ("1h 05m", 3900), ("1d 2h 3m 4s", 93784), ("2m500ms", 120.5)],
)
def test_a_duration_of_several_units_is_their_sum(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["30m1h", "1h1h", "1h30", "0h00m", "1h 30x", "1.5h30m", "1h-30m"])
def test_a_duration_of_several_units_has_them_in_order_and_whole(text: str) -> None:
    with pytest.raises(InputError, match="is not a duration"):
        parse_duration(text)


@given(st.integers(1, 10**6))
def test_a_duration_that_is_printed_is_read(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=60)


@pytest.mark.parametrize(
    ("value", "error", "form", "shown"),
    [
        (0.5, 0.01, ".4f", "0.5000 ± 0.0100"),
        (0.5, None, ".4f", "0.5000"),
        (0.5, 0.01, "+.2f", "+0.50 ± 0.01"),
        (-0.5, 0.01, "+.2f", "-0.50 ± 0.01"),
        (None, 0.01, ".4f", "-"),
    ],
)
def test_a_value_is_written_with_its_error(value, error, form, shown):
    assert with_error(value, error, form) == shown


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (11268.9, 4, "11,270"),
        (3416.2, 4, "3,416"),
        (999.96, 4, "1,000"),
        (23.456, 4, "23.46"),
        (0.31444, 4, "0.3144"),
        (1480.3, 3, "1,480"),
        (99.96, 3, "100"),
        (123456.0, 3, "123,000"),
        (8.251, 3, "8.25"),
        (0.0456, 3, "0.0456"),
    ],
)
def test_a_rate_has_no_power_of_ten(value: float, digits: int, text: str) -> None:
    assert format_rate(value, digits) == text
