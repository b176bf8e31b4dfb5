"""SIGTERM, which batch systems and containers send, stops a command as Ctrl-C does, with an exit code of its own."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED, TERMINATED = 130, 143

_received = False


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raises KeyboardInterrupt on SIGTERM within the block, where nobody else meets or ignores it."""
    global _received
    _received = False
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Who meets SIGTERM before the block meets it after it, whatever a library did in it, in any thread.

    Ray's C++ sets a handler of its own when it starts, which prints a trace and ends the process, and none when it is
    shut down. Python sees neither: `signal.getsignal` gives what Python set last.
    """
    get, put = ctypes.pythonapi.PyOS_getsig, ctypes.pythonapi.PyOS_setsig
    get.argtypes, get.restype = (ctypes.c_int,), ctypes.c_void_p
    put.argtypes, put.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = get(signal.SIGTERM)
    try:
        yield
    finally:
        put(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    global _received
    _received = True
    raise KeyboardInterrupt


def ended_by(code: int) -> int:
    """The exit code of a command that an interrupt may have ended: 143 where that was a SIGTERM."""
    return TERMINATED if code == INTERRUPTED and _received else code
