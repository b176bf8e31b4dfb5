"""What is kept of solutions, and what `pick` gets of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autodistill.advisor.solved import Solved, keep_solved, solved_within
from autodistill.cli.hardware_summary import pick_text

ONE = Solved(
    teacher="tiny",
    data="text",
    budget_bytes=200,
    context=512,
    batch=1,
    on_gpu=False,
    name="gguf-q4_0",
    bytes=190,
    kl=0.2,
    nll=3.0,
    accuracy=0.25,
    tokens=100,
)


def solved(**changes: Any) -> Solved:
    return {**ONE, **changes}  # type: ignore[typeddict-item]


def within(cache: Path, limit: int, **changes: Any) -> Solved | None:
    return solved_within(cache, "print", limit, **{"context": 512, "batch": 1, "on_gpu": False, **changes})


def test_the_best_that_fits_at_the_same_load_is_named(tmp_path: Path) -> None:
    larger = solved(budget_bytes=300, bytes=280, kl=0.1)
    gpu = solved(on_gpu=True, kl=0.05)
    keep_solved(tmp_path, "print", [larger, ONE])
    keep_solved(tmp_path, "print", [gpu])
    assert within(tmp_path, 189) is None
    assert within(tmp_path, 200) == ONE
    assert within(tmp_path, 10**9) == larger
    assert within(tmp_path, 10**9, on_gpu=True) == gpu
    assert within(tmp_path, 10**9, context=1024) is None
    assert solved_within(tmp_path, "other", 10**9, context=512, batch=1, on_gpu=False) is None


@pytest.mark.slow
def test_the_newest_of_a_budget_and_of_the_texts_counts(tmp_path: Path) -> None:
    keep_solved(tmp_path, "print", [ONE, solved(data="manual", kl=0.9)])
    assert within(tmp_path, 200) == solved(data="manual", kl=0.9)
    again = solved(kl=0.3)
    keep_solved(tmp_path, "print", [again])
    assert within(tmp_path, 200) == again
    for number in range(300):
        keep_solved(tmp_path, "print", [solved(budget_bytes=1000 + number, kl=float(number))])
    assert within(tmp_path, 200) == solved(budget_bytes=1044, kl=44.0)


def test_a_damaged_file_is_none_and_made_again(tmp_path: Path) -> None:
    keep_solved(tmp_path, "print", [ONE])
    (path,) = (tmp_path / "solve" / "found").glob("*.json")
    for damaged in ("", "[]", '{"solutions": [{"kl": "low"}]}', '{"solutions": 3}'):
        path.write_text(damaged)
        assert within(tmp_path, 200) is None
    keep_solved(tmp_path, "print", [ONE])
    assert within(tmp_path, 200) == ONE


def test_a_person_reads_it_below_the_pick() -> None:
    picked = {
        "run": "a",
        "row_id": "t000",
        "metric": "accuracy",
        "value": 0.4,
        "stderr": 0.01,
        "memory_bytes": 180,
        "memory_source": "measured",
        "size_bytes": 90,
        "margins": {"memory": 0.1},
        "sources": {"memory": "measured"},
    }
    document = {
        "pick": picked,
        "runner_up": None,
        "better_left_out": None,
        "binds": None,
        "tied": 1,
        "better_unknown": 0,
        "last": [],
        "not_held": False,
        "other_runtimes": {},
        "memory_basis": None,
        "memory_overhead": {"pairs": 0, "correction_bytes": 0, "margin_bytes": 0},
    }
    said = pick_text({**document, "solved": ONE})
    assert (
        "Solved before for 200 B, without training: tiny as gguf-q4_0 takes 190 B, with an accuracy of 0.2500" in said
    )
    said = pick_text({**document, "solved": None, "solve": "autodistill solve tiny --budget 200B"})
    assert "Solved" not in said
    assert said.endswith("for this memory, without training: autodistill solve tiny --budget 200B")
