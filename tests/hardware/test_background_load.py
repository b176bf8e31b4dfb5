"""Load that disturbs a measurement is distinguished from the load that is measured."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from autodistill.hardware import background_load as quiet
from autodistill.hardware.background_load import Watch, free_cores, noise


@pytest.mark.parametrize(
    ("seen", "doubts"),
    [
        ({"others": 0.1, "steal": 0.01, "threads": 4, "cores": 4}, []),
        ({"others": 1.0, "steal": 0.0, "threads": 3, "cores": 4}, []),
        ({"others": 1.0, "steal": 0.0, "threads": 4, "cores": 4}, ["other work took 1.0 of 4 cores, and 4 were"]),
        ({"others": 1.0, "steal": 0.0, "threads": 1, "cores": 1}, ["other work took 1.0 of 1 cores, and 1 was needed"]),
        ({"others": 0.0, "steal": 0.2, "threads": 1, "cores": 4}, ["held back 20%"]),
    ],
)
def test_cores_that_are_not_free_and_stolen_time_are_doubts(seen, doubts) -> None:
    found = noise(load_average=0.0, **seen).doubts
    assert len(found) == len(doubts)
    assert all(said in doubt for said, doubt in zip(doubts, found, strict=True))


def test_own_work_is_not_other_work() -> None:
    busy = "import time\nends = time.monotonic() + 1.5\nwhile time.monotonic() < ends: pass"
    worker = subprocess.Popen([sys.executable, "-c", busy])
    process = psutil.Process(worker.pid)
    with Watch(1, lambda: sum(process.cpu_times()[:2])) as mine, Watch(1) as theirs:
        time.sleep(1.0)
    worker.wait()
    assert theirs.noise.others - mine.noise.others > 0.1


@pytest.mark.parametrize(
    ("others", "most", "free"), [(0.1, 4, 4), (0.1, 2, 2), (1.1, 4, 3), (1.6, 4, 2), (3.9, 4, 1), (9.0, 4, 1)]
)
def test_threads_are_as_many_as_cores_are_free(monkeypatch, others, most, free) -> None:
    seen = noise(load_average=0.0, others=others, steal=0.0, threads=0, cores=4)
    monkeypatch.setattr(quiet, "current_load", lambda threads: seen)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    assert free_cores(most) == free
