"""A budget on a device: as plain data, and what it refuses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill.advisor.describe import deployment_named, shape
from autodistill.errors import InputError
from autodistill.estimates.fit import fits, latencies, nearest_miss
from autodistill.estimates.speed import limit_seconds, speed
from autodistill.hardware.budget import (
    LATENCY,
    NO_LIMIT,
    Budget,
    DeviceBudget,
    LatencyLimit,
    Limits,
    TierBudget,
    check_streams,
    limits_as,
    memory_on,
    on_gpu,
    parse_latency,
    parse_price,
    read_budget,
    served,
)
from autodistill.hardware.catalog import devices
from autodistill.hardware.lookup import find_device

PI = find_device("pi 4", devices())
SPEC = shape({"layers": 12, "width": 512, "heads": 8, "kv_heads": 4, "ffn": 1024, "vocab": 8000}).spec
FORMS = tuple(deployment_named(name) for name in ("gguf-f16", "gguf-q8_0", "gguf-q4_0"))


def test_both_budgets_read_back_as_they_were_written() -> None:
    plain = Budget(memory_bytes=10**9, context=100, batch=2)
    for budget in (plain, DeviceBudget(**plain.to_json(), device=PI, latency=parse_latency("ttft_p50=1s,50ms"))):
        assert read_budget(json.loads(json.dumps(budget.to_json()))) == budget


def test_a_budget_of_a_class_says_the_class() -> None:
    budget = TierBudget(memory_bytes=7 * 10**9, tier_bytes=8 * 10**9, least_device="RTX 4060", context=100, batch=2)
    assert budget.to_json() == {
        "memory_bytes": 7 * 10**9,
        "context": 100,
        "batch": 2,
        "tier_bytes": 8 * 10**9,
        "least_device": "RTX 4060",
    }


def test_what_an_older_run_says_of_no_device_is_compared_by_memory_alone() -> None:
    plain = Budget(memory_bytes=10**9, context=100, batch=2)
    placed = DeviceBudget(**plain.to_json(), device=PI)
    late = replace(placed, latency=parse_latency("50ms"))
    assert limits_as(placed, plain) == plain
    for budget, before in ((placed, placed), (late, plain), (plain, plain)):
        assert limits_as(budget, before) is budget


def test_sequences_at_once_are_counted_from_one_to_what_any_machine_decodes() -> None:
    assert [check_streams(count, "--batch") for count in (1, 2, 999_999)] == [1, 2, 999_999]
    for count, bound in ((0, "at least 1"), (-3, "at least 1"), (10**6, "at most 999999")):
        with pytest.raises(InputError, match=f"^--batch must be {bound}, not {count}$"):
            check_streams(count, "--batch")


def test_contexts_are_counted_from_one_to_what_any_model_reads() -> None:
    assert [Budget(memory_bytes=1, context=tokens).context for tokens in (1, 10**9)] == [1, 10**9]
    for tokens, bound in ((0, "at least 1"), (-1, "at least 1"), (10**9 + 1, "at most 1,000,000,000")):
        with pytest.raises(InputError, match=f"^--context must be {bound}, not {tokens}$"):
            Budget(memory_bytes=1, context=tokens)
    for budget in (Budget, partial(DeviceBudget, device=PI)):
        with pytest.raises(InputError, match=r"^--batch must be at least 1, not 0$"):
            budget(memory_bytes=1, batch=0)


def test_a_discrete_gpu_s_memory_is_its_own_and_every_other_one_is_a_process_s() -> None:
    plain = Budget(memory_bytes=10**9)
    gpu = find_device("rtx 4090", devices())
    budgets = [plain, *(DeviceBudget(memory_bytes=10**9, device=one) for one in (PI, gpu))]
    assert [on_gpu(one) for one in (*budgets, TierBudget(memory_bytes=10**9, tier_bytes=10**9))] == [
        False,
        False,
        True,
        True,
    ]


def test_a_device_serves_what_its_runtimes_read_and_no_device_serves_all() -> None:
    phone = find_device("snapdragon 8 gen 2", devices())  # only llama.cpp runs there
    forms = [deployment_named(name) for name in ("huggingface", "gguf-q8_0")]
    assert served(forms, Budget(memory_bytes=10**9)) == tuple(forms)
    assert served(forms, DeviceBudget(memory_bytes=10**9, device=phone)) == (forms[1],)


def test_streams_of_a_limit_are_checked_wherever_they_are_given() -> None:
    with pytest.raises(InputError, match=r"^--streams must be at least 1, not 0$"):
        parse_latency("50ms@streams=2", streams=0)
    with pytest.raises(InputError, match=r"^the streams of a limit of latency must be at most 999999, not 1000000$"):
        LatencyLimit(quantity="tpot", percentile=95, seconds=1.0, streams=10**6)
    # "latency" alone is what a duration alone limits.
    assert LATENCY.name == parse_latency("50ms")[0].name == "tpot_p95@streams=1"
    assert LATENCY.seconds == math.inf


def test_a_limit_of_latency_is_at_least_a_tenth_of_a_microsecond() -> None:
    assert parse_latency("0.1us")[0].seconds == 1e-7
    with pytest.raises(InputError, match="shorter than any answer"):
        parse_latency("0.0999us")


def test_a_budget_without_a_limit_of_memory_says_so() -> None:
    assert NO_LIMIT == 10**18
    assert Budget(memory_bytes=NO_LIMIT).describe() == "no limit of memory at context 2048, batch 1"
    assert Budget(memory_bytes=NO_LIMIT // 10).describe().startswith("100")


@pytest.mark.parametrize("data", [{}, {"memory_bytes": 1, "device": {}}, {"memory_bytes": 1, "device": {"name": "x"}}])
def test_what_is_no_budget_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(InputError, match="no budget as a run stores it"):
        read_budget(data)


def test_a_budget_of_no_memory_is_refused() -> None:
    assert Budget(memory_bytes=1).memory_bytes == 1
    for size in (0, -1):
        with pytest.raises(InputError, match=f"a budget of {size} bytes holds nothing: give an amount like 16GB"):
            Budget(memory_bytes=size)
    with pytest.raises(InputError, match="memory_bytes is a number, not '8GB': parse_bytes reads such a text"):
        Budget(memory_bytes="8GB")  # type: ignore[arg-type]


@pytest.mark.parametrize(("seconds", "typed"), [(10.0, "10s"), (9.5, "9500ms"), (0.25, "250ms"), (0.0078125, "7813us")])
def test_a_limit_is_typed_in_the_largest_unit_of_which_it_has_ten(seconds: float, typed: str) -> None:
    limit = LatencyLimit(quantity="ttft", percentile=50, seconds=seconds, streams=1)
    assert limit.typed() == f"ttft_p50={typed}@streams=1"


def test_a_budget_without_limits_of_latency_is_one_of_memory() -> None:
    plain = Budget(memory_bytes=10**8)
    placed = DeviceBudget(memory_bytes=10**8, device=PI)
    assert fits(SPEC, FORMS, placed) == fits(SPEC, FORMS, plain)
    assert latencies(SPEC, FORMS[0], placed) == latencies(SPEC, FORMS[0], plain) == {}


def test_the_memory_is_that_of_as_many_streams_as_a_limit_has() -> None:
    budget = DeviceBudget(memory_bytes=10**9, device=PI, batch=2, latency=parse_latency("ttft_p95=9s,9s@streams=16"))
    assert budget.batch == 16
    assert "batch 16" in budget.describe()
    # A key and a value in 16 bits, for 4 heads of 64 in 12 layers, for 2048 tokens of each stream.
    assert fits(SPEC, FORMS[:1], budget)[0].estimate.kv_cache_bytes == 16 * 2048 * 12 * 2 * 4 * 64 * 2
    assert replace(budget, batch=20).batch == 20
    assert DeviceBudget(memory_bytes=10**9, device=PI, batch=2).batch == 2


def test_a_device_holds_no_more_than_it_has() -> None:
    assert memory_on(PI, None) == PI.usable_bytes < PI.memory_bytes
    assert memory_on(PI, PI.memory_bytes) == PI.memory_bytes
    with pytest.raises(InputError, match=r"24\.0 GB is more than the 8\.59 GB that Raspberry Pi 4B 8GB has"):
        memory_on(PI, 24 * 10**9)


def test_of_a_jetson_s_memory_what_is_left_beside_its_system_is_the_budget() -> None:
    """An Orin Nano has 5.2 of 8 GB free for a model in each of its modes; its processor and GPU share them."""
    nanos = [one for one in devices() if one.name.startswith("Jetson Orin Nano") and one.memory_bytes == 8 * 10**9]
    assert len(nanos) == 5
    assert {memory_on(one, None) for one in nanos} == {5_200_000_000}


def test_the_first_token_at_several_streams_is_that_of_the_last_prompt() -> None:
    (alone,), (four,) = (parse_latency(f"ttft_p95=1s@streams={count}") for count in (1, 4))
    one = limit_seconds(SPEC, FORMS[1], PI, alone, context=1024)
    assert one == speed(SPEC, FORMS[1], PI, context=1024).time_to_first_token_ms_high / 1e3
    assert limit_seconds(SPEC, FORMS[1], PI, four, context=1024) == 4 * one


@settings(deadline=None, max_examples=60)
@given(
    memory=st.integers(10**7, 10**9),
    milliseconds=st.integers(1, 400),
    quantity=st.sampled_from(["tpot", "ttft"]),
    streams=st.integers(1, 8),
    device=st.sampled_from(devices()),
)
def test_what_fits_exceeds_no_limit_and_what_does_not_exceeds_one(memory, milliseconds, quantity, streams, device):
    limits = parse_latency(f"{quantity}_p95={milliseconds}ms@streams={streams}")
    budget = DeviceBudget(memory_bytes=memory, device=device, latency=limits)
    found = fits(SPEC, FORMS, budget)
    for fit in found:
        (seconds,) = latencies(SPEC, fit.deployment, budget).values()
        assert (fit.slack <= 0) == (fit.need <= memory and seconds <= limits[0].seconds)
        assert bool(fit.late) == (seconds > limits[0].seconds)
        assert fit.slack == pytest.approx(math.log(max(fit.need / memory, seconds / limits[0].seconds)))
    miss = nearest_miss(found, budget)
    assert (miss is None) == any(fit.slack <= 0 for fit in found)
    if miss is not None:
        nearest = min(found, key=lambda fit: fit.slack)
        assert (miss.limit, miss.slack) == ("latency" if nearest.late else "memory", nearest.slack)
    wider = replace(budget, memory_bytes=2 * memory)
    assert all(a.slack <= b.slack for a, b in zip(fits(SPEC, FORMS, wider), found, strict=True))


def test_a_resumed_run_keeps_the_limits_that_are_not_given_again() -> None:
    plain = Budget(memory_bytes=10**9, context=100, batch=2)
    placed = DeviceBudget(**plain.to_json(), device=PI, latency=parse_latency("50ms"))
    other = find_device("pi 5 8gb", devices())
    for before in (plain, placed):
        assert Limits().resumed(before) == before
        assert Limits.of(before).resumed(before) == before
        assert Limits.of(before).budget(7) == before
    changed = Limits(memory_bytes=10**8, context=7, batch=3).resumed(plain)
    assert changed == Budget(memory_bytes=10**8, context=7, batch=3)
    # Limits of latency hold on another device, and on a device that is named for the first time there are none.
    assert Limits(device=other, memory_bytes=10**9).resumed(placed) == replace(placed, device=other)
    assert Limits(device=other).resumed(plain) == DeviceBudget(
        memory_bytes=other.usable_bytes, context=100, batch=2, device=other
    )
    late = parse_latency("70ms")
    assert Limits(latency=late).resumed(placed) == replace(placed, latency=late)


def test_a_device_that_was_measured_again_keeps_the_figures_of_the_run() -> None:
    placed = DeviceBudget(memory_bytes=PI.usable_bytes, context=100, batch=2, device=PI)
    again = replace(PI, bandwidth=2 * PI.bandwidth)
    assert Limits(device=again).resumed(placed) == placed
    assert Limits(device=again, memory_bytes=PI.usable_bytes).resumed(placed) == placed
    assert Limits(device=again, memory_bytes=10**9).resumed(placed) == replace(placed, memory_bytes=10**9)


def test_a_new_run_has_no_limit_but_what_is_given() -> None:
    assert Limits().budget(7) == Budget(memory_bytes=10**18, context=7, batch=1)
    assert Limits(device=PI).budget(7) == DeviceBudget(memory_bytes=PI.usable_bytes, context=7, device=PI)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5m", "'5m' would be minutes: write ms for milliseconds, or min, like 50ms"),
        ("ttft=0.5 M ", "would be minutes"),
        ("5ms@16", "after @ comes streams=N"),
        ("5ms@streams=0", "after @ comes streams=N"),
        ("5ms@streams=1000000", "must be at most 999999, not 1000000|after @ comes streams=N"),
        ("ttft_p100=5ms", "have percentiles 1 to 99"),
        ("ttft_p0=5ms", "have percentiles 1 to 99"),
        ("total=5ms", "have percentiles 1 to 99"),
        ("5ms,tpot_p95=6ms", "limits one latency twice"),
        ("0ms", "above zero"),
    ],
)
def test_what_is_no_limit_of_latency_is_refused_in_its_own_words(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_latency(text)


def test_limits_of_latency_are_read_with_their_defaults() -> None:
    def limit(quantity: str, percentile: int, seconds: float, streams: int) -> LatencyLimit:
        return LatencyLimit(quantity=quantity, percentile=percentile, seconds=seconds, streams=streams)

    assert parse_latency("2min") == (limit("tpot", 95, 120.0, 1),)
    assert parse_latency("ttft=1s", streams=4) == (limit("ttft", 95, 1.0, 4),)
    both = (limit("ttft", 1, 0.3, 999_999), limit("tpot", 99, 0.05, 999_999))
    assert parse_latency("ttft_p1=300ms, tpot_p99=50ms@streams=999999", streams=4) == both
    assert [one.name for one in both] == ["ttft_p1@streams=999999", "tpot_p99@streams=999999"]


def test_prices_are_read_as_they_are_written_and_bounded() -> None:
    cases = {
        "2.5/h": ("5.00", 2.0),
        "$2.5/h": ("$2,500.00", 1000.0),
        " 2.5 eur / h": ("1.25 EUR", 0.5),
        "999999999/h": ("999,999,999.00", 1.0),
        ".5/h": ("0.50", 1.0),
    }
    assert {text: (parse_price(text).of(hours), hours) for text, (_, hours) in cases.items()} == cases
    for text in ("0/h", "1000000000/h", "$2 EUR/h", "2.5", "2.5 EURO/h", "-1/h"):
        with pytest.raises(InputError, match="is not a price"):
            parse_price(text)
