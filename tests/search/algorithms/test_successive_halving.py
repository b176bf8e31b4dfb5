"""The scheduler against a brute-force successive halving and against the definition of ASHA, on recorded tables."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill.runs.results.row import Decision
from autodistill.search.algorithms.successive_halving import SuccessiveHalving, kept_at_rungs

RUNGS = (100, 200, 400)


def table(seed: int, trials: int, rungs: int) -> dict[str, list[float]]:
    source = random.Random(seed)
    return {f"t{index:02d}": [source.randrange(20) / 20 for _ in range(rungs)] for index in range(trials)}


def make(**changes):
    settings = {"trials": 4, "rungs": RUNGS, "keep": (2, 1)} | changes
    return SuccessiveHalving(**settings)


def test_words():
    scheduler = make()
    assert scheduler.report("a", 0, 0.5) is Decision.PAUSE
    assert scheduler.report("a", 1, 0.5) is Decision.PAUSE
    assert scheduler.report("a", 2, 0.5) is Decision.STOP


@given(seed=st.integers(0, 10**6), trials=st.integers(1, 12), data=st.data(), direction=st.sampled_from(["max", "min"]))
@settings(max_examples=60, deadline=None)
def test_in_lockstep_it_is_plain_successive_halving(seed, trials, data, direction):
    keep = sorted((data.draw(st.integers(0, trials)) for _ in range(2)), reverse=True)
    curves = table(seed, trials, 3)
    scheduler = make(trials=trials, keep=keep, direction=direction)
    # Brute force: at each rung, sort all trials, keep the best, and go on with them.
    sign = -1 if direction == "max" else 1
    survivors = list(curves)
    expected = []
    for rung, places in enumerate(keep):
        survivors = sorted(survivors, key=lambda name: (sign * curves[name][rung], name))[:places]
        expected.append(survivors)

    for name in curves:
        scheduler.report(name, 0, curves[name][0])
    for rung in range(2):
        promoted = []
        while (name := scheduler.next_to_promote(promoted, all_proposed=True)) is not None:
            promoted.append(name)
        assert promoted == expected[rung]
        for name in promoted:
            scheduler.report(name, rung + 1, curves[name][rung + 1])
    assert scheduler.next_to_promote([], all_proposed=True) is None


def simulate(curves, scheduler, workers, source, extra=False):
    """Run recorded curves on workers of random speed; yield each choice with what was known when it was made."""
    todo = list(curves)
    flying: dict[str, tuple[float, int]] = {}
    log = []
    now = 0.0
    while True:
        while len(flying) < workers:
            chosen = scheduler.next_to_promote(list(flying), not todo, extra)
            if chosen is not None:
                rung = max(rung for name, rung, _ in log if name == chosen) + 1
                yield ("promote", chosen, rung - 1, list(log), set(flying), not todo)
                flying[chosen] = (now + source.random(), rung)
            elif todo:
                flying[todo.pop(0)] = (now + source.random(), 0)
            else:
                break
        if not flying:
            yield ("end", None, None, list(log), set(), True)
            return
        name = min(flying, key=lambda item: flying[item])
        now, rung = flying.pop(name)
        scheduler.report(name, rung, curves[name][rung])
        log.append((name, rung, curves[name][rung]))


@given(seed=st.integers(0, 10**6), trials=st.integers(1, 14), workers=st.integers(1, 4), data=st.data())
@settings(max_examples=80, deadline=None)
def test_asynchronous_promotions_keep_the_definition(seed, trials, workers, data):
    keep = sorted((data.draw(st.integers(0, trials)) for _ in range(2)), reverse=True)
    curves = table(seed, trials, 3)
    promoted: list[list[str]] = [[], []]
    arriving = (trials, keep[0])
    for kind, name, rung, log, flying, all_proposed in simulate(
        curves, make(trials=trials, keep=keep), workers, random.Random(seed)
    ):
        values = [{who: value for who, at, value in log if at == level} for level in range(2)]
        ranked = [sorted(level, key=lambda who: (-level[who], who)) for level in values]
        if kind == "end":
            assert [len(names) for names in promoted] == keep  # no place is left unused
            continue
        waiting = [who for who in ranked[rung] if who not in promoted[rung]]
        assert name == waiting[0]
        more_may_come = not all_proposed or any(who not in values[rung] for who in flying)
        more_may_come |= any(len(promoted[below]) < keep[below] for below in range(rung))
        if more_may_come:
            assert name in ranked[rung][: math.floor(len(ranked[rung]) * keep[rung] / arriving[rung] + 1e-9)]
        if rung == 0:  # no trial from a higher rung could have been promoted instead
            share = len(ranked[1]) * keep[1] // max(keep[0], 1)
            above = [who for who in ranked[1][:share] if who not in promoted[1]]
            assert not above or len(promoted[1]) >= keep[1]
        promoted[rung].append(name)
        assert len(promoted[rung]) <= keep[rung]


@given(seed=st.integers(0, 10**6), workers=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_left_over_time_takes_every_trial_to_the_end(seed, workers):
    curves = table(seed, 7, 3)
    *_, (_, _, _, log, _, _) = simulate(curves, make(trials=7, keep=(2, 1)), workers, random.Random(seed), extra=True)
    assert sorted(name for name, rung, _ in log if rung == 2) == sorted(curves)


def test_extra_waits_until_all_are_proposed():
    scheduler = make(keep=(0, 0))
    scheduler.report("a", 0, 0.5)
    assert scheduler.next_to_promote([], all_proposed=False, extra=True) is None
    assert scheduler.next_to_promote([], all_proposed=True) is None
    assert scheduler.next_to_promote([], all_proposed=True, extra=True) == "a"


@pytest.mark.parametrize("direction", ["max", "min"])
@pytest.mark.parametrize("value", [math.nan, None, math.inf, -math.inf])
def test_without_a_value_nobody_goes_on(value, direction):
    scheduler = make(direction=direction)
    assert scheduler.report("a", 0, value) is Decision.PAUSE
    scheduler.report("b", 0, 0.1)
    assert scheduler.next_to_promote([], all_proposed=True) == "b"
    assert scheduler.next_to_promote(["b"], all_proposed=True, extra=True) is None


def test_a_tie_goes_to_the_first_name():
    scheduler = make()
    for name in "cab":
        scheduler.report(name, 0, 0.5)
    assert scheduler.next_to_promote([], all_proposed=True) == "a"


def test_promotable_are_as_many_as_have_a_place_above_them():
    scheduler = make()  # four trials: two go past the first rung, one past the second
    for name, value in (("a", 0.9), ("b", 0.8), ("c", 0.7)):
        scheduler.report(name, 0, value)
    assert scheduler.promotable([]) == {"a", "b"}
    assert scheduler.promotable(["b"]) == {"a"}
    scheduler.report("a", 1, 0.5)
    assert scheduler.promotable([]) == {"a", "b"}  # "a" from the second rung, "b" from the first
    assert scheduler.promotable(["a", "b"]) == set()


def test_where_more_went_on_than_have_a_place_none_has_one():
    """Two trials went past a rung that one may pass, as when time is left. Two more wait below them."""
    scheduler = make(keep=(1, 1))
    for name, value in (("a", 0.9), ("b", 0.8), ("c", 0.7), ("d", 0.6)):
        scheduler.report(name, 0, value)
    assert scheduler.promotable(["a"]) == set()
    assert scheduler.promotable(["a", "b"]) == set()


def test_of_those_that_wait_furthest_the_best_is_first():
    scheduler = make()
    assert scheduler.furthest([]) is None
    for name, value in (("a", 0.9), ("b", 0.8), ("c", 0.7)):
        scheduler.report(name, 0, value)
    assert [scheduler.furthest(gone) for gone in ([], ["a"], ["a", "b", "c"])] == ["a", "b", None]
    scheduler.report("a", 1, 0.3)
    scheduler.report("b", 1, 0.4)
    assert [scheduler.furthest(gone) for gone in ([], ["b"], ["a", "b"])] == ["b", "a", "c"]


def test_a_failed_trial_frees_its_place():
    scheduler = make(keep=(1, 1))
    scheduler.report("a", 0, 0.9)
    scheduler.report("b", 0, 0.5)
    assert scheduler.next_to_promote([], all_proposed=True) == "a"
    assert scheduler.next_to_promote(["a"], all_proposed=True) is None
    scheduler.discard("a")
    assert scheduler.next_to_promote([], all_proposed=True) == "b"


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_replaying_reports_rebuilds_it(seed):
    source = random.Random(seed)
    curves = table(seed, 8, 3)
    original = make(trials=8, keep=(4, 2))
    for _, _, _, log, flying, all_proposed in simulate(curves, original, 3, source):
        copy = make(trials=8, keep=(4, 2))
        for name, rung, value in log:
            copy.report(name, rung, value)
        assert copy.next_to_promote(flying, all_proposed) == original.next_to_promote(flying, all_proposed)
        assert copy.promotable(flying) == original.promotable(flying)


@given(data=st.data(), trials=st.integers(1, 10))
@settings(max_examples=60, deadline=None)
def test_of_several_values_the_places_go_to_the_first_fronts(data, trials):
    value = st.sampled_from([0.1, 0.2, 0.3])
    table = {f"t{n}": (data.draw(value), data.draw(value), data.draw(value)) for n in range(trials)}
    places = data.draw(st.integers(1, trials))
    scheduler = SuccessiveHalving(trials=trials, rungs=(1, 2), keep=(places,), direction="max", further=("min", "min"))
    for name, (value, *further) in table.items():
        scheduler.report(name, 0, value, further=further)
    promoted = []
    while (name := scheduler.next_to_promote(promoted, all_proposed=True)) is not None:
        promoted.append(name)
    assert len(promoted) == places
    costs = {name: (-a, b, c) for name, (a, b, c) in table.items()}
    for left, gone in itertools.product(set(table) - set(promoted), promoted):
        beaten = all(x <= y for x, y in zip(costs[left], costs[gone], strict=True))
        assert not beaten or costs[left] == costs[gone]
    # The trial that would be exported goes on first: no trial has a larger first value.
    assert table[promoted[0]][0] == max(row[0] for row in table.values())


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_without_one_of_its_values_a_trial_does_not_go_on(missing, place):
    scheduler = make(further=("min",))
    values = [0.9, 0.0]
    values[place] = missing
    scheduler.report("a", 0, values[0], further=values[1:])
    scheduler.report("b", 0, 0.1, further=[5.0])
    assert scheduler.next_to_promote([], all_proposed=True) == "b"
    assert scheduler.next_to_promote(["b"], all_proposed=True, extra=True) is None


@pytest.mark.parametrize(
    ("trials", "rungs", "kept"),
    [(20, 3, (10, 5)), (9, 3, (5, 3)), (18, 2, (6,)), (5, 3, (3, 2)), (3, 2, (2,)), (1, 3, (1, 1)), (7, 1, ())],
)
def test_how_many_go_past_each_rung(trials, rungs, kept):
    """Half of the trials, rounded up, pass each of two rungs, and a third pass a single one.

    At least two pass if so many exist.
    """
    assert kept_at_rungs(trials, rungs) == kept


def test_as_many_values_as_directions():
    with pytest.raises(ValueError, match="2 directions need as many values, not 1"):
        make(further=("min",)).report("a", 0, 0.5)


@pytest.mark.parametrize(
    "changes",
    [{"rungs": ()}, {"rungs": (2, 1, 3)}, {"keep": (2,)}, {"keep": (1, 2)}, {"keep": (5, 1)}, {"keep": (1, -1)}],
)
def test_plans_that_do_not_hold_together(changes):
    with pytest.raises(ValueError):
        make(**changes)


def test_reports_out_of_order():
    with pytest.raises(ValueError, match="no rung 3"):
        make().report("a", 3, 0.5)
    with pytest.raises(ValueError, match="no rung -1"):
        make().report("a", -1, 0.5)
    with pytest.raises(ValueError, match="never did at rung 0"):
        make().report("a", 1, 0.5)
