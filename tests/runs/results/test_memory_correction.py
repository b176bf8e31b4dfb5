"""What pairs of predicted and measured memory show about the overhead."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from autodistill.runs.results.memory_correction import Overhead, overheads, recalibrate
from autodistill.runs.results.row import Row

LLAMA = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}


def row(predicted: float | None, measured: int, **fields: Any) -> Row:
    least: dict[str, Any] = {
        "row_id": "a",
        "trial": "a",
        "kind": "student",
        "name": "a",
        "deployment": LLAMA,
        "status": "completed",
        "feasible": True,
        "memory_bytes": measured,
        "memory_source": "measured",
        "other": {"memory_bytes_predicted": predicted, "memory_parts": {"device_class": "cpu"}},
    }
    return Row.from_json(least | fields)


def test_it_is_the_median_and_the_margin_reaches_the_largest() -> None:
    assert recalibrate([(100, 110), (200, 215), (300, 330), (400, 412), (50, 1050)]) == Overhead(
        correction_bytes=15, margin_bytes=985, pairs=5
    )
    assert recalibrate([]) == Overhead()


def test_few_pairs_raise_a_prediction_and_never_lower_it() -> None:
    assert recalibrate([(100, 90)]) == Overhead(correction_bytes=0, margin_bytes=0, pairs=1)
    assert recalibrate([(100, 90), (100, 96)]).total_bytes == 0
    assert recalibrate([(100, 107)]).correction_bytes == 7
    assert recalibrate([(100, 90)] * 3).correction_bytes == -10


@given(st.lists(st.tuples(st.floats(1, 1e12), st.floats(1, 1e12)), max_size=12))
def test_no_pair_is_above_what_is_then_predicted(pairs: list[tuple[float, float]]) -> None:
    found = recalibrate(pairs)
    assert found.margin_bytes >= 0
    assert all(measured <= predicted + found.total_bytes + 1 for predicted, measured in pairs)


def test_pairs_are_those_of_one_class_and_runtime() -> None:
    gpu = {"memory_bytes_predicted": 100, "memory_parts": {"device_class": "discrete-gpu", "predicted_bytes": 100}}
    # An earlier version predicted a process's memory there, but measured a GPU's.
    old = {"memory_bytes_predicted": 100, "memory_parts": {"device_class": "discrete-gpu"}}
    vllm = {"runtime": "vllm", "format": "huggingface", "bits": 16, "group_size": 0}
    rows = [
        row(100, 105),
        row(200, 207),
        row(100, 190, other=gpu),
        row(100, 999, other=old),
        row(100, 150, deployment=vllm),
        row(100, 999, memory_source="predicted"),
        row(None, 999),
        row(100, 999, other={"memory_bytes_predicted": 100}),
    ]
    found = overheads(rows)
    assert {place: one.pairs for place, one in found.items()} == {
        ("cpu", "llama.cpp"): 2,
        ("discrete-gpu", "llama.cpp"): 1,
        ("cpu", "vllm"): 1,
    }
    assert found["cpu", "llama.cpp"] == Overhead(correction_bytes=6, margin_bytes=1, pairs=2)
