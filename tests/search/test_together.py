"""Searches that run at the same time in one results folder, with one empty cache between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from autodistill.runs.run_folder import known_runs
from autodistill.runs.run_log import RunLog
from autodistill.runs.test_split_ledger import recorded_test_openings
from autodistill.testing import save_tiny_teacher, tiny_text

SEARCHES = 10


@pytest.mark.slow
def test_ten_searches_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    """None is given a name, all begin in the same second or two, and each must find what it would find alone."""
    save_tiny_teacher(tmp_path / "teacher", layers=5)
    tiny_text(tmp_path / "text", documents=30, sentences=24)
    words = ["search", "--budget", "16GB", "--context", "256", "--teacher", "teacher", "--data", "text"]
    words += ["--trials", "1", "--tokens", "1024", "--runner", "inline", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    searches = [
        subprocess.Popen(
            [sys.executable, "-m", "autodistill", *words],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(SEARCHES)
    ]
    documents = []
    for process in searches:
        output, errors = process.communicate(timeout=1800)
        assert process.returncode == 0, errors.decode()
        documents.append(json.loads(output))
    runs = tmp_path / "results" / "runs"
    names = {document["name"] for document in documents}
    assert len(names) == SEARCHES
    assert set(known_runs(runs)) == names
    assert sorted(opening["run"] for opening in recorded_test_openings(runs)) == sorted(names)
    found = [
        {row.row_id: (row.accuracy, row.perplexity) for row in RunLog(runs / name / "trials.jsonl").rows()}
        for name in names
    ]
    assert all(rows == found[0] for rows in found)
    cache = tmp_path / ".cache" / "autodistill"
    for folder in ("data", "teacher-outputs", "calibrations"):
        assert len([path for path in (cache / folder).iterdir() if not path.name.startswith(".")]) == 1, folder
    assert not [path for path in cache.rglob(".*") if path.name.endswith((".lock", "partial"))]
