"""Hours and money of a plan, by arithmetic."""

from __future__ import annotations

import pytest

from autodistill.search.cost import cost
from autodistill.testing import small_plan
from autodistill.units import Price

# An hour in all, of which three quarters are trials, on two workers.
PLAN = small_plan(seconds={"load": 600.0, "trials": 2700.0, "export": 300.0}, workers=2)


def test_hours_are_of_the_whole_search_and_of_its_trials() -> None:
    assert cost(PLAN, 0, None) == {"machine_hours": 1.0, "worker_hours": 1.5, "gpu_hours": 0.0}
    assert cost(PLAN, 4, None)["gpu_hours"] == 4.0


@pytest.mark.parametrize(("gpus", "paid", "what"), [(0, 2.5, "machine"), (1, 2.5, "GPU"), (8, 20.0, "GPU")])
def test_a_price_is_of_each_gpu_or_else_of_the_machine(gpus: int, paid: float, what: str) -> None:
    found = cost(PLAN, gpus, Price(amount=2.5, currency="USD"))
    assert (found["cost"], found["price_of"], found["currency"]) == (paid, what, "USD")
    assert found["cost_shown"] == f"{paid:.2f} USD"
