"""A search whose teacher is divided over two processes: it says so, and has the rows of an undivided teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.estimates.teacher_fit import TeacherFit
from autodistill.runs.results.row import Row
from autodistill.search.campaign.observer import Observer
from autodistill.search.search import search
from autodistill.search.setup import loading
from tests.search.small_search import small_inputs, small_request


class Lines(Observer):
    """Keeps the lines that the user sees."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.slow
def test_a_teacher_that_one_device_does_not_hold_is_divided_and_its_rows_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine is made up: the predicted fit sets the number of processes, which meet over gloo."""
    inputs, fit_teacher = small_inputs(tmp_path), loading.fit_teacher

    def rows(processes: int) -> tuple[dict[str, Row], list[str]]:
        def fit(*given: Any, **more: Any) -> TeacherFit:
            found = fit_teacher(*given, **more)
            return replace(found, held_type="bfloat16", processes=processes)

        monkeypatch.setattr(loading, "fit_teacher", fit)
        told = Lines()
        request = small_request(inputs, tmp_path / f"runs-{processes}", cache=tmp_path / f"cache-{processes}")
        return {row.name: row for row in search(request, told).rows}, told.lines

    one, _ = rows(1)
    two, lines = rows(2)
    assert any("on each of 2 GPUs, over which it is divided" in line for line in lines)
    assert one.keys() == two.keys()
    for name, row in one.items():
        for metric in ("accuracy", "perplexity"):
            assert getattr(two[name], metric) == pytest.approx(getattr(row, metric), rel=0.02), (name, metric)
