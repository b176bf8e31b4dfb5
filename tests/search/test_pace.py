"""Which sizes of a step are timed: doubled while that is worth it and memory holds it."""

from __future__ import annotations

import pytest
import torch

from autodistill.search.pace import _growing


@pytest.mark.parametrize(
    ("rates", "timed"),
    [
        ({1: 100.0}, [1]),
        ({1: 100.0, 2: 190.0, 4: 350.0}, [1, 2, 4]),
        # The second is not worth it: what would come after it is not looked at.
        ({1: 100.0, 2: 114.0, 4: 300.0}, [1, 2]),
        ({1: 100.0, 2: 116.0, 4: 120.0, 8: 400.0}, [1, 2, 4]),
        # Memory runs out at 4.
        ({1: 100.0, 2: 190.0, 4: None, 8: 700.0}, [1, 2]),
    ],
)
def test_sizes_are_timed_while_they_are_worth_it(rates: dict[int, float | None], timed: list[int]) -> None:
    def rate(size: int) -> float:
        found = rates[size]
        if found is None:
            raise torch.OutOfMemoryError("out of memory")
        return found

    assert _growing(rate, list(rates)) == {size: rates[size] for size in timed}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("a bug")])
def test_a_first_step_that_fails_is_told(error: RuntimeError) -> None:
    def fail(size: int) -> float:
        raise error

    with pytest.raises(type(error), match=str(error)):
        _growing(fail, (1, 2))
