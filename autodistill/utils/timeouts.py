"""Deadlines: a library call that never returns is abandoned in its own thread, and a process is killed."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

_Result = TypeVar("_Result")
_LEAST_WAIT = 0.01  # seconds
# For each abandoned call, whether it has ended. `Thread.is_alive` is not used: after an interrupt of `Thread.join` it
# reports a running thread as ended (Python 3.11).
_abandoned: list[threading.Event] = []


class CallTimeoutError(Exception):
    """A call did not end in time. Its state is unknown."""


def call_with_timeout(
    call: Callable[[], _Result], seconds: float | None, name: str, clock: Callable[[], float] = time.monotonic
) -> _Result:
    """Return or raise the result of a call. An interrupt or SIGTERM reaches this thread while it waits.

    Args:
        call: The call, which is made in a daemon thread.
        seconds: Time limit; None if only an interrupt abandons the call.
        name: Name of the thread.
        clock: Clock that counts the seconds. `time.process_time` counts those in which this process works, so that a
            busy machine does not shorten the limit.

    Raises:
        CallTimeoutError: The call takes longer. It goes on running.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def run() -> None:
        """Keep the result or the exception of the call."""
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
            _abandoned.append(ended)
    if errors:
        raise errors[0]
    if not results:
        raise CallTimeoutError
    return results[0]


def calls_left() -> bool:
    """Return whether an abandoned call is still running. Clean-up of a library at exit may wait for it."""
    return not all(ended.is_set() for ended in _abandoned)


def end_within(process: subprocess.Popen[Any], seconds: float) -> None:
    """Wait for a process to end. Kill it after a number of seconds, or if an interrupt leaves no time to wait."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        pass
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
