"""Hours and cost of a plan, against values computed by hand."""

from __future__ import annotations

from typing import Any

import pytest

from autodistill.hardware.budget import Price
from autodistill.hardware.machine import Gpu, Machine
from autodistill.search.planning.cost import cost, students_disk
from autodistill.testing import small_plan

# An hour in all. Three quarters of it are for trials, on two workers.
PLAN = small_plan(seconds={"load": 600.0, "trials": 2700.0, "export": 300.0}, workers=2)
GPU = Gpu(name="any", memory_bytes=10**9)


def machines(*gpus: int) -> list[Machine]:
    return [Machine(cpus=4, memory_bytes=10**9, gpus=(GPU,) * count) for count in gpus]


def test_hours_are_of_the_whole_search_and_of_its_trials() -> None:
    assert cost(PLAN, machines(0), None) == {"machine_hours": 1.0, "worker_hours": 1.5, "gpu_hours": 0.0}
    assert cost(PLAN, machines(4), None)["gpu_hours"] == 4.0


@pytest.mark.parametrize(
    ("gpus", "of_machines", "of_gpus"),
    [((0, 0, 0), 3.0, 0.0), ((2, 2), 2.0, 4.0), ((0, 4), 1.0, 4.0)],  # a machine without GPUs then trains nothing
)
def test_hours_on_a_cluster_are_of_all_nodes_that_train(
    gpus: tuple[int, ...], of_machines: float, of_gpus: float
) -> None:
    found = cost(PLAN, machines(*gpus), Price(amount=2.0))
    assert (found["machine_hours"], found["gpu_hours"]) == (of_machines, of_gpus)
    assert found["cost"] == 2.0 * (of_gpus or of_machines)


@pytest.mark.parametrize(("gpus", "paid", "what"), [(0, 2.5, "machine"), (1, 2.5, "GPU"), (8, 20.0, "GPU")])
def test_a_price_is_of_each_gpu_or_else_of_the_machine(gpus: int, paid: float, what: str) -> None:
    found = cost(PLAN, machines(gpus), Price(amount=2.5, currency="USD"))
    assert (found["cost"], found["price_of"], found["currency"]) == (paid, what, "USD")
    assert found["cost_shown"] == f"{paid:.2f} USD"


@pytest.mark.parametrize(
    ("more", "baselines", "confirm", "count"),
    [
        ({"keep": (4, 2)}, 1, 0, 2 + 1),
        # The best two and the baseline are trained again on each of two seeds.
        ({"keep": (4, 2)}, 1, 2, 2 + 1 + 2 * 3),
        ({"keep": (4, 2), "lengths": (1.0, 2.0)}, 0, 0, 2 + 2),
        ({"keep": (9, 5), "longest": 4.0, "alone": 2}, 1, 0, 5 + 1 + 3),
        # Decays are kept at a quarter, at half and at the end of each further training.
        ({"keep": (9, 5), "longest": 4.0}, 2, 0, 5 + 2 + 3 * (3 + 1)),
        ({"keep": (), "rungs": (9216,), "trials": 7}, 0, 0, 7),
    ],
)
def test_students_that_are_trained_to_the_end_are_kept_in_float32(
    more: dict[str, Any], baselines: int, confirm: int, count: int
) -> None:
    found = students_disk(small_plan(**more), 10**6, baselines=baselines, confirm=confirm)
    assert found == {"students": count, "students_bytes": count * 4 * 10**6}
