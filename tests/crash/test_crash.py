"""A search on a disk that crashes, or fails, at a sample of its calls: it goes on to what is found undisturbed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.kernel import why_not

ROOT = Path(__file__).parents[2]
# Of eight kinds in turn: four models of a crash, and four of a failing disk. A day's seed would find more, and fail
# where nobody changed anything; `python -m tests.crash.report` tries as many as a time allows.
_MOST, _MINUTES = 32, 20


@pytest.mark.crash
def test_a_search_goes_on_from_whatever_a_crash_or_a_failing_disk_leaves(tmp_path: Path) -> None:
    if why := why_not():
        pytest.skip(why)
    # A process of its own: it is bound to a core, and all that a search imports is imported before any is forked of it.
    words = ["--work", str(tmp_path), "--most", str(_MOST), "--minutes", str(_MINUTES), "--no-report"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.crash.report", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "**Held**" in done.stdout
