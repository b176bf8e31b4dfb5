"""A page about several runs combines comparable results, and says what each run was asked for and found."""

from __future__ import annotations

from pathlib import Path

import pytest

from autodistill.cli.app import main
from autodistill.errors import InputError
from autodistill.report.comparison import comparison
from tests.report.test_page import POSTGRESQL, README, Page, contents, exported_megabytes

BUDGET = README.parent / "budget-210MB"


def test_runs_of_several_texts_stand_in_charts_of_their_own() -> None:
    found = Page(comparison([contents(README), contents(POSTGRESQL)]))
    assert len(found.data["charts"]) == 2
    assert "measured on different examples" in found.text
    rows = {row["run"]: row for row in found.table("run", "teacher", "budget")}
    assert rows[README.name]["gain on test over the best that needs no training"].startswith("+0.0439 ± 0.0170")
    assert rows[POSTGRESQL.name]["memory"] == exported_megabytes(POSTGRESQL)
    assert rows[POSTGRESQL.name]["text"] == "postgresql-doc-17"


def test_every_row_with_both_figures_is_a_point() -> None:
    runs = [contents(README), contents(BUDGET)]
    found = Page(comparison(runs))
    points = [point for values in found.data["data"].values() for point in values if "value" in point]
    known = [row for run in runs for row in run.rows if row.full and row.memory_bytes and row.accuracy is not None]
    assert sorted(point["row"] for point in points) == sorted(row.row_id for row in known)


def test_what_cannot_be_compared_is_said() -> None:
    with pytest.raises(InputError, match="compare takes two runs or more"):
        comparison([contents(README)])
    with pytest.raises(InputError, match="is named twice"):
        comparison([contents(README), contents(README)])


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", README.name, BUDGET.name, "--runs", str(README.parent), "--out", str(tmp_path / "both.html")]
    assert main(words) == 0
    assert capsys.readouterr().out == f"page: {tmp_path / 'both.html'}\n"
    assert "Budget curves" in (tmp_path / "both.html").read_text()
