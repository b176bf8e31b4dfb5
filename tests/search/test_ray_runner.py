"""The whole path through Ray: warm workers, relative paths, a folder that shadows the package, a worker that dies."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from autodistill.contracts import Status
from autodistill.records.row import rows_of
from autodistill.records.store import EventLog
from autodistill.search.prepare import Observer
from autodistill.search.request import SearchRequest
from autodistill.search.search import search
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.units import Budget


class Killer(Observer):
    """Kills all workers that are seen training, some times over."""

    def __init__(self, times: int) -> None:
        self.killed: list[int] = []
        self._times = times
        self._watch = threading.Thread(target=self._run, daemon=True)

    def phase(self, name: str) -> None:
        """Starts to watch when trials begin."""
        if name == "trials":
            self._watch.start()

    def _run(self) -> None:
        ends = time.monotonic() + 240
        while self._times and time.monotonic() < ends:
            found = False
            for child in psutil.Process().children(recursive=True):
                # A worker's title is the method that it runs; one may end while it is looked at.
                with contextlib.suppress(psutil.Error):
                    if child.pid not in self.killed and any("Trainable" in word for word in child.cmdline()):
                        os.kill(child.pid, signal.SIGKILL)
                        self.killed.append(child.pid)
                        found = True
            self._times -= found
            time.sleep(0.01)


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_search_through_ray_survives_the_death_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Work whose worker died is done by another one, and recorded as failed if that one dies too."""
    monkeypatch.chdir(tmp_path)
    # As in a checkout of a package that is installed elsewhere.
    (tmp_path / "autodistill").mkdir()
    (tmp_path / "autodistill" / "__init__.py").write_text(
        "raise ImportError('a worker looked where the command was typed')"
    )
    save_tiny_teacher(tmp_path / "teacher", layers=5)
    tiny_text(tmp_path / "text", documents=30, sentences=80)
    killer = Killer(times)
    outcome = search(
        SearchRequest(
            budget=Budget(memory_bytes=16 * 10**9, context=256),
            teacher="teacher",
            data="text",
            trials=4,
            tokens=2304,
            out=Path("runs"),
            name="run",
            cache=Path("cache"),
        ),
        killer,
    )
    events = EventLog(Path("runs/run/trials.jsonl")).read()
    states = {event["trial"]: event for event in events if event["event"] == "status"}
    assert killer.killed, "no worker was seen"
    failed = [event for event in states.values() if event["status"] == Status.FAILED]
    retried = [event for event in events if event["event"] == "retry"]
    assert {event["cause"] for event in retried} == {"worker-died"}
    assert {event["cause"] for event in failed} <= {"worker-died"}
    # Each death is in the log, once as a first failure or once as the end of a trial.
    assert len(retried) + len(failed) == len(killer.killed)
    assert {event["trial"] for event in failed} <= {event["trial"] for event in retried}
    if times == 1:
        assert not failed
    assert sum(event["status"] != Status.REJECTED for event in states.values()) == 5
    assert outcome.finish.best.feasible
    assert Path("runs/run/student/gguf/student.gguf").is_file()
    assert {row.trial for row in rows_of(events) if row.full and row.kind == "student"}
