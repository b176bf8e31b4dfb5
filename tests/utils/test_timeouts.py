"""Calls with a deadline: results and errors as without one, and a call that never ends is left alone."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from autodistill.utils.timeouts import CallTimeoutError, call_with_timeout, calls_left


def fail() -> None:
    raise OSError("gone")


def test_results_and_errors_come_as_without_a_deadline() -> None:
    assert call_with_timeout(lambda: 3, 60.0, "three") == 3
    assert call_with_timeout(lambda: None, 60.0, "nothing") is None
    with pytest.raises(OSError, match="gone"):
        call_with_timeout(fail, 60.0, "failing")


def test_what_does_not_end_is_left_alone_and_known_until_it_ends() -> None:
    goes_on = threading.Event()
    with pytest.raises(CallTimeoutError):
        call_with_timeout(goes_on.wait, 0.05, "endless")
    assert calls_left()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "endless")
    assert thread.daemon
    goes_on.set()
    thread.join(60.0)
    assert thread not in threading.enumerate()


def test_an_interrupt_ends_the_wait_and_the_call_counts_as_left() -> None:
    """Interrupt as Ctrl-C does, which reaches only the main thread."""
    goes_on = threading.Event()

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        goes_on.wait()

    with pytest.raises(KeyboardInterrupt):
        call_with_timeout(interrupt, 600.0, "interrupting")
    assert calls_left()
    goes_on.set()


def test_seconds_of_another_clock_may_be_counted() -> None:
    """For example, the CPU seconds of this process. Here the seconds are given by hand."""
    seconds = iter([0.0, 0.0, 0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    done = threading.Event()
    with pytest.raises(CallTimeoutError):
        call_with_timeout(done.wait, 0.25, "counted", clock=lambda: next(seconds))
    assert next(seconds) == 0.3
    done.set()
