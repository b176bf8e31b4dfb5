"""The chart of solutions: its points, its files, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autodistill as ad
from autodistill.errors import InputError
from autodistill.objects.solutions import Solutions
from autodistill.report.solved import check_chart, write_chart


def stored(name: str, size: int, kl: float | None, **more: Any) -> dict[str, Any]:
    errors = {f"{figure}_stderr": None if kl is None else 0.01 for figure in ("kl", "nll", "accuracy")}
    return {"name": name, "bytes": size, "kl": kl, "nll": 2.0, "accuracy": 0.3, **errors, **more}


DEPLOYMENT = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}


def rival(what: str, name: str, size: int, kl: float | None, **more: Any) -> dict[str, Any]:
    above = {"kl_above_solution": None, "kl_above_solution_stderr": None}
    said = {"what": what, "deployment": None, "fits": True, "predicted_kl": None, **above, **more}
    return stored(name, size, kl, **said)


def document(*sizes: int) -> dict[str, Any]:
    rivals = [
        rival("teacher's own codes", "gguf-q4_1", 2 * 10**8, 0.0),
        rival("uniform, smaller table or cache", "gguf-q4_0", 16 * 10**7, 0.3),
        rival("uniform", "gguf-q8_0", 3 * 10**8, None),
        rival("narrow", "cut", 10**8, 0.5, init={}),
    ]
    solutions = [
        {
            "budget": {"memory_bytes": size, "context": 256, "batch": 1},
            "solution": stored(f"solved-{size}", size, 1e7 / size, deployment=DEPLOYMENT, predicted_kl=0.1),
            "rivals": rivals,
            "as_good": None,
            "plain": None,
            "limits": [],
            "winner": None,
        }
        for size in sizes
    ]
    return {
        "teacher": {"name": "tiny"},
        "data": {"name": "text"},
        "held_out_tokens": 512,
        "solutions": solutions,
        "exported": None,
    }


def test_labels_that_would_lie_on_one_another_are_left_out() -> None:
    close = document(10**8)
    near = [rival("uniform", f"gguf-near-{number}", 2 * 10**8 - number, 1e-4 * number) for number in range(1, 4)]
    close["solutions"][0]["rivals"] = [*close["solutions"][0]["rivals"], *near]
    values = Solutions(close).plot().to_dict()["data"]["values"]
    labels = {one["name"]: one["label"] for one in values}
    assert labels["gguf-q4_1"] == "q4_1"
    assert labels["gguf-q4_0"] == "q4_0"
    assert not any(labels[one["name"]] for one in near)


def test_points_are_solutions_and_each_whole_storage_that_was_measured_once() -> None:
    chart = Solutions(document(10**8, 15 * 10**7)).plot().to_dict()
    points = {one["name"]: (one["what"], one["memory"], one["kl"]) for one in chart["data"]["values"]}
    assert points == {
        "solved-100000000": ("solved", 100.0, 0.1),
        "solved-150000000": ("solved", 150.0, pytest.approx(1 / 15)),
        "gguf-q4_1": ("teacher's own codes", 200.0, 0.0),
        "gguf-q4_0": ("plain format", 160.0, 0.3),
    }


def test_a_solution_in_python_says_what_binds_and_whether_it_is_plain() -> None:
    found = document(10**8)
    limits = [{"name": "memory", "left": 9, "binds": True}, {"name": "tpot_p95@streams=1", "left": 0.5, "binds": False}]
    found["solutions"][0] |= {"limits": limits, "plain": "uniform"}
    best = Solutions(found).best
    assert (best.plain, best.binds) == ("uniform", ("memory",))
    assert best.room == {"memory": 9, "tpot_p95@streams=1": 0.5}
    assert (Solutions(document(10**8)).best.plain, Solutions(document(10**8)).best.binds) == (None, ())


def test_a_chart_is_written_as_its_file_is_called(tmp_path: Path) -> None:
    chart = Solutions(document(10**8)).plot()
    write_chart(chart, tmp_path / "new" / "curve.svg")
    assert "KL to the teacher" in (tmp_path / "new" / "curve.svg").read_text()
    write_chart(chart, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends with '.gif': name a chart like curve.svg"):
        check_chart(Path("curve.gif"))
    with pytest.raises(InputError, match="nothing was solved that a chart could show"):
        Solutions(document()).plot()
    with pytest.raises(InputError, match="--plan solves nothing that --plot could draw"):
        ad.solve("smollm2", budget="200MB", plan=True, plot=tmp_path / "a.svg")
    with pytest.raises(InputError, match=r"ends with '.gif'"):
        ad.solve("smollm2", budget="200MB", plot=tmp_path / "a.gif")
