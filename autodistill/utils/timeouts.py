"""Deadlines: a library call that never returns is abandoned in a thread of its own, a process is killed."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_LEAST_WAIT = 0.01  # seconds
# Of each call that was left alone, whether it has ended. A thread's own word counts for nothing once an interrupt has
# met `Thread.join`, which takes it for ended then (Python 3.11).
_left: list[threading.Event] = []


class CallTimeoutError(Exception):
    """A call did not end in time; its state is unknown."""


def call_with_timeout(
    call: Callable[[], _Result], seconds: float | None, name: str, clock: Callable[[], float] = time.monotonic
) -> _Result:
    """Return or raise what a call does; an interrupt or SIGTERM reaches this thread while it waits.

    Args:
        call: Made in a daemon thread.
        seconds: It may take; None where it is left alone on an interrupt only.
        name: Of the thread.
        clock: Counts the seconds; `time.process_time` those that this process works, so that a busy machine does not
            shorten them.

    Raises:
        CallTimeoutError: It takes longer, and goes on.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        """Keep what the call returns or raises."""
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()

    try:
        threading.Thread(target=run, name=name, daemon=True).start()
        began = clock()
        while not ended.is_set() and (seconds is None or clock() - began < seconds):
            ended.wait(None if seconds is None else max(seconds - (clock() - began), _LEAST_WAIT))
    finally:
        if not ended.is_set():
            _left.append(ended)
    if errors:
        raise errors[0]
    if not results:
        raise CallTimeoutError
    return results[0]


def calls_left() -> bool:
    """Return whether an abandoned call is still running; what a library cleans up at exit may wait for it."""
    return not all(ended.is_set() for ended in _left)


def end_within(process: subprocess.Popen[Any], seconds: float) -> None:
    """Wait for a process to end; kill it after so many seconds, or where an interrupt does not allow to wait."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
