"""Searches that begin at once with one cache: each finds what it finds alone."""

from __future__ import annotations

from pathlib import Path
from subprocess import Popen

import pytest

from autodistill.runs.events import RowAdded, RowTested, read_events, rows_of
from autodistill.runs.results.row import Row
from benchmarks.reliability.kill import differences
from tests.search.test_kill import command, events, inputs, start

__all__ = ["inputs"]


def rows(process: Popen[bytes], folder: Path) -> dict[str, Row]:
    """What a search has found once it has ended, of validation and test."""
    errors = process.communicate(timeout=900)[1].decode()
    assert process.returncode == 0, errors
    return {
        f"{kind.__name__} {row.row_id}": row
        for kind in (RowAdded, RowTested)
        for row in rows_of(read_events(events(folder)), [kind])
    }


@pytest.mark.slow
def test_five_searches_at_once_with_one_cache_find_what_one_finds_alone(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """They make the same splits, outputs of the teacher and students, and meet what others have half made."""

    def begun(name: str, cache: str) -> tuple[Popen[bytes], Path]:
        (tmp_path / name).mkdir()
        return start(command(inputs, "inline", "--cache", str(tmp_path / cache)), tmp_path / name), tmp_path / name

    alone = rows(*begun("alone", "its own"))
    together = [begun(f"search {number}", "one of all") for number in range(5)]
    for one in together:
        assert [*differences(rows(*one), alone)] == []
