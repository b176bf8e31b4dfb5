"""SIGTERM, which batch systems and containers send, stops a command as Ctrl-C does, with an exit code of its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED, TERMINATED = 130, 143

_met = False
_received = False


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raises KeyboardInterrupt on SIGTERM within the block, where nobody else meets or ignores it."""
    global _met, _received
    _received = False
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    _met = True
    meet_again()
    try:
        yield
    finally:
        _met = False
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def meet_again() -> None:
    """Takes SIGTERM back from a library that set a handler of its own, as Ray does, which prints a C++ trace."""
    if _met and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> None:
    global _received
    _received = True
    raise KeyboardInterrupt


def ended_by(code: int) -> int:
    """The exit code of a command that an interrupt may have ended: 143 where that was a SIGTERM."""
    return TERMINATED if code == INTERRUPTED and _received else code
