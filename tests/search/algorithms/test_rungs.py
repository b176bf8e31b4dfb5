"""The rungs at which trials are judged, against values computed by hand."""

from __future__ import annotations

import pytest

from autodistill.search.algorithms.successive_halving import rung_tokens


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (90, (10, 30, 90)),
        (36, (4, 12, 36)),
        (27, (9, 27)),  # a ninth would be only three steps
        (18, (6, 18)),
        (12, (4, 12)),
        (2, (2,)),
        (1, (1,)),
    ],
)
def test_rungs_are_a_ninth_and_a_third_of_the_steps_where_these_are_enough(
    steps: int, expected: tuple[int, ...]
) -> None:
    assert rung_tokens(steps * 256, 256) == tuple(256 * rung for rung in expected)
