"""Searches that run at the same time in one results folder and share a cache that is empty at first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autodistill.runs.events import RowAdded, RowTested
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import known_runs
from autodistill.runs.run_log import RunLog
from autodistill.runs.test_split_ledger import recorded_test_openings
from autodistill.testing import save_tiny_teacher, tiny_text
from benchmarks.reliability.kill import differences

SEARCHES = 5


def start(inputs: Path, home: Path) -> subprocess.Popen[bytes]:
    """Start a search without a name, whose results and cache lie in `home`."""
    words = ["search", "--budget", "16GB", "--context", "256", "--space", "declared", "--runner", "inline", "--json"]
    words += ["--teacher", str(inputs / "teacher"), "--data", str(inputs / "text"), "--trials", "2", "--tokens", "1024"]
    return subprocess.Popen(
        [sys.executable, "-m", "autodistill", *words],
        cwd=home,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def ended(process: subprocess.Popen[bytes]) -> str:
    """Return the name that its run was given."""
    output, errors = process.communicate(timeout=1800)
    assert process.returncode == 0, errors.decode()
    return str(json.loads(output)["name"])


def rows(runs: Path, name: str) -> dict[str, Row]:
    """Return the rows of validation and test that a search found."""
    log = RunLog(runs / name / "trials.jsonl")
    return {f"{kind.__name__} {row.row_id}": row for kind in (RowAdded, RowTested) for row in log.rows(kind)}


@pytest.mark.slow
def test_searches_that_begin_at_once_find_what_one_finds_alone(tmp_path: Path) -> None:
    """None is given a name. They make the same splits, outputs and students, and meet each other's unfinished files."""
    save_tiny_teacher(tmp_path / "teacher", layers=5)
    tiny_text(tmp_path / "text", documents=30, sentences=24)
    one, all_ = tmp_path / "alone", tmp_path / "together"
    one.mkdir()
    all_.mkdir()
    alone = rows(one / "results" / "runs", ended(start(tmp_path, one)))
    runs = all_ / "results" / "runs"
    names = [ended(process) for process in [start(tmp_path, all_) for _ in range(SEARCHES)]]
    assert len(set(names)) == SEARCHES
    assert set(known_runs(runs)) == set(names)
    assert sorted(opening["run"] for opening in recorded_test_openings(runs)) == sorted(names)
    for name in names:
        assert [*differences(rows(runs, name), alone)] == []
    cache = all_ / ".cache" / "autodistill"
    for folder in ("data", "teacher-outputs", "calibrations"):
        assert len([path for path in (cache / folder).iterdir() if not path.name.startswith(".")]) == 1, folder
    assert not [path for path in cache.rglob(".*") if path.name.endswith((".lock", "partial"))]
