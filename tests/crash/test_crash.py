"""A search on a disk that crashes or fails at a sample of its calls still finds what an undisturbed search finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.kernel import why_not

ROOT = Path(__file__).parents[2]
# Eight kinds in turn: four models of a crash and four of a failing disk. A seed that changes daily would find more, but
# would fail when nobody changed anything. `python -m tests.crash.report` tries as many as a time limit allows.
_MOST, _MINUTES = 32, 20


@pytest.mark.crash
def test_a_search_goes_on_from_whatever_a_crash_or_a_failing_disk_leaves(tmp_path: Path) -> None:
    if why := why_not():
        pytest.skip(why)
    # A separate process, because it is bound to one core and imports all that a search imports before it forks any.
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
