"""A command leaves one document on stdout and one exit code, that of whichever thread ends it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autodistill.cli.printing import show
from autodistill.errors import AutoDistillError, InputError
from autodistill.utils.process_exit import end_process

# A search whose main thread is stuck in a call to a Ray that has ended, as `show` and the watch see it.
STUCK = """
import sys, threading
from autodistill.cli.printing import show
from autodistill.search.runners import ray_session as cluster

cluster._STUCK_SECONDS = 0.05

class Ended(cluster.WatchedRay):
    look_seconds = 0.01

    def ended(self):
        return "the GCS has ended"

def work():
    print("by a library")
    ray = Ended()
    ray.to_go_on = lambda: "go on with --resume"
    threading.Thread(target=ray._watch, daemon=True).start()
    threading.Event().wait()

show(sys.argv[1] == "json", work, dict, str)
"""

# Another thread ends the process at the moment when the command ends by itself.
RACE = """
import sys, threading
from autodistill.errors import InputError
from autodistill.cli.printing import show
from autodistill.utils.process_exit import end_process

start = threading.Barrier(2)

def beside():
    start.wait()
    end_process("ended from the side", 1)

def work():
    sys.setswitchinterval(1e-6)
    threading.Thread(target=beside, daemon=True).start()
    start.wait()
    if sys.argv[1] == "error":
        raise InputError("ended by itself")
    return {"filler": "x" * 10_000}

try:
    show(True, work, dict, str)
except InputError:
    sys.exit(2)
"""


def in_a_process(program: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("output", ["json", "table"])
def test_a_process_that_is_stuck_is_ended_with_the_document_of_any_other_error(output: str) -> None:
    done = in_a_process(STUCK, output)
    said = "the GCS has ended; go on with --resume"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {said}"
    if output == "json":
        assert json.loads(done.stdout) == {"error": said, "exit_code": 1}
    else:
        assert done.stdout == ""


@pytest.mark.parametrize("ending", ["error", pytest.param("result", marks=pytest.mark.slow)])
def test_of_two_threads_that_end_a_command_at_once_one_has_the_word(ending: str) -> None:
    for _ in range(3):
        done = in_a_process(RACE, ending)
        document = json.loads(done.stdout)
        assert done.returncode == document.get("exit_code", 0)
        assert ("from the side" in done.stderr) == (document.get("error") == "ended from the side")


def test_a_command_that_has_ended_by_itself_is_not_ended_from_the_side(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail("the process was ended"))
    show(True, lambda: {"best": 1}, dict, str)
    end_process("too late", 1)
    captured = capfd.readouterr()
    assert json.loads(captured.out) == {"best": 1}
    assert captured.err == ""


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (InputError("wrong"), "wrong", 2),
        (AutoDistillError("no room"), "no room", 1),
        (KeyboardInterrupt(), "stopped", 130),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero", 1),
    ],
)
def test_every_error_is_a_document(
    error: BaseException, said: str, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    def work() -> Any:
        raise error

    with pytest.raises(type(error)):
        show(True, work, dict, str)
    assert json.loads(capfd.readouterr().out) == {"error": said, "exit_code": code}
    with pytest.raises(type(error)):
        show(False, work, dict, str)
    assert capfd.readouterr().out == ""


def test_no_descriptor_is_left_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        show(True, dict, dict, str)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_a_terminal_has_no_characters_for_is_shown_by_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    show(False, dict, dict, lambda result: "a\udcffb, é")
    assert shown.getvalue() == b"a\\udcffb, \\xe9\n"
