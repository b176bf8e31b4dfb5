"""The order of candidates against brute force, against Optuna's ranks, and against the definition of the spread."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.study._multi_objective import _fast_non_domination_rank

from autodistill.search.algorithms.pareto import best_first, fronts, spread

# Only a few values, so that many costs are equal.
COST = st.sampled_from([-1.0, 0.0, 0.5, 2.0])


@st.composite
def tables(draw, most=14):
    count = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(COST, min_size=count, max_size=count), min_size=1, max_size=most))
    return {f"t{index:02d}": tuple(row) for index, row in enumerate(rows)}


def beats(one, other):
    return all(a <= b for a, b in zip(one, other, strict=True)) and one != other


@given(costs=tables())
@settings(max_examples=200, deadline=None)
def test_fronts_are_what_is_left_when_the_better_ones_are_taken_away(costs):
    left, expected = dict(costs), []
    while left:
        front = {name for name in left if not any(beats(left[other], left[name]) for other in left)}
        expected.append(front)
        left = {name: value for name, value in left.items() if name not in front}
    assert [set(front) for front in fronts(costs)] == expected


@given(costs=tables())
@settings(max_examples=100, deadline=None)
def test_fronts_are_optunas_ranks(costs):
    ranks = _fast_non_domination_rank(np.array(list(costs.values())))
    mine = {name: rank for rank, front in enumerate(fronts(costs)) for name in front}
    assert [mine[name] for name in costs] == ranks.tolist()


@given(costs=tables())
@settings(max_examples=200, deadline=None)
def test_within_a_front_each_is_the_farthest_from_all_before_it(costs):
    for front in fronts(costs):
        order = spread({name: costs[name] for name in front})
        assert sorted(order) == sorted(front)
        assert costs[order[0]][0] == min(costs[name][0] for name in front)
        columns = np.array([costs[name] for name in order])
        ranges = np.ptp(columns, axis=0)
        scaled = np.divide(columns, ranges, out=np.zeros_like(columns), where=ranges > 0)
        distances = np.linalg.norm(scaled[:, None] - scaled[None], axis=-1)
        for place in range(1, len(order)):
            nearest = distances[:, :place].min(axis=1)
            assert nearest[place] >= nearest[place:].max() - 1e-12


@given(values=st.lists(COST, min_size=1, max_size=10))
def test_of_one_cost_the_order_is_ascending_and_then_by_name(values):
    costs = {f"t{index}": (value,) for index, value in enumerate(values)}
    assert best_first(costs) == sorted(costs, key=lambda name: (costs[name], name))


def test_the_order_does_not_depend_on_how_they_come():
    costs = {f"t{index}": (float(a), float(b)) for index, (a, b) in enumerate(product(range(3), repeat=2))}
    assert best_first(costs) == best_first(dict(reversed(costs.items())))


def test_extreme_costs_have_places_too():
    costs = {"a": (1e308, -1e308), "b": (-1e308, 1e308), "c": (0.0, 0.0), "d": (5e-324, math.pi)}
    assert best_first(costs) == ["b", "a", "c", "d"]


def test_nothing_is_ordered_as_nothing():
    assert best_first({}) == []
