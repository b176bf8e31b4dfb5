"""A program that answers lines of JSON, and that is ended whatever it does and however often Ctrl-C is pressed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from autodistill.runtimes.json_child import JsonChild

DEAF = """
import json, signal, time
print(json.dumps({"ready": True}), flush=True)
while True:
    time.sleep(60)  # does not look whether anything is asked, or nobody is there any more
"""


@pytest.fixture
def deaf(tmp_path: Path) -> JsonChild:
    program = tmp_path / "deaf.py"
    program.write_text(DEAF)
    return JsonChild(program, {}, dict(os.environ), "it failed", lambda log: log)


def test_a_child_that_does_not_end_is_ended_by_force(deaf: JsonChild, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodistill.runtimes.json_child._STOP_SECONDS", 0.05)
    assert deaf.ready == {"ready": True}
    deaf.stop()
    assert not psutil.pid_exists(deaf.pid)


def test_a_second_interrupt_while_it_is_stopped_leaves_no_child(
    deaf: JsonChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first Ctrl-C has requested its end. No Ctrl-C reaches the program, which has a session of its own."""
    wait = subprocess.Popen.wait
    times: list[float | None] = []

    def interrupted(process: subprocess.Popen[str], timeout: float | None = None) -> int:
        times.append(timeout)
        if len(times) == 1:
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        deaf.stop()
    assert not psutil.pid_exists(deaf.pid)
    assert not Path(deaf._folder.name).exists()
