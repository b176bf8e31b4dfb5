"""Searches that begin at once with one cache: each finds what it finds alone."""

from __future__ import annotations

from pathlib import Path
from subprocess import Popen

import pytest

from benchmarks.reliability.kill import differences
from tests.search.test_kill import command, inputs, rows, start

__all__ = ["inputs"]


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
