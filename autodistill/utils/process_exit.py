"""How a command ends: one reply on stdout, and SIGTERM stops it in the way that Ctrl-C does."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# A reply that was given stays the last one, so that nothing ends a process whose command has ended by itself.
_last: Reply | None = None


class Reply:
    """The reply of a command on stdout, given once.

    Args:
        as_json: Whether an error is said there too, as a JSON document.
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        # Held for ever by the thread that gives the reply.
        self._taken = threading.Lock()
        # While a command works its stdout is stderr; a thread beside it may have to write to the real one.
        self._stdout = os.dup(1)

    def give(self, text: str) -> None:
        """Print a result; does not return if another thread is about to end the process."""
        self._take()
        # A path may hold bytes that are no text, and a terminal may have few characters.
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)

    def give_error(self, message: str, exit_code: int) -> None:
        """Print the error that ended the command, if errors are replies; does not return if the process is ending."""
        self._take()
        if self._as_json:
            print(error_document(message, exit_code), flush=True)

    def _take(self) -> None:
        if not self._taken.acquire(blocking=False):
            threading.Event().wait()

    def seize(self, message: str, exit_code: int) -> bool:
        """Give an error from another thread than the command's own; return False if a reply was given already."""
        if not self._taken.acquire(blocking=False):
            return False
        if self._as_json:
            left = f"{error_document(message, exit_code)}\n".encode()
            with suppress(OSError):  # nobody may be reading any more
                while left:
                    left = left[os.write(self._stdout, left) :]
        return True

    def close(self) -> None:
        """Restore the real stdout after the reply was given."""
        self._taken.acquire(blocking=False)
        os.close(self._stdout)


def error_document(message: str, exit_code: int) -> str:
    """Return an error as the JSON document that replaces a command's result."""
    return json.dumps({"error": message, "exit_code": exit_code}, indent=2)


@contextmanager
def replying(as_json: bool) -> Iterator[Reply]:
    """Yield the reply of a command, which must be given in the block, however its work ends.

    Args:
        as_json: Whether an error is said on stdout too, as a JSON document.
    """
    global _last
    reply = _last = Reply(as_json)
    try:
        yield reply
    finally:
        reply.close()


def end_process(message: str, exit_code: int) -> None:
    """End this process at once, from a thread beside a stuck one, with an error on stderr and in the reply.

    Returns where the command has given its reply, since it ends by itself then.

    Args:
        message: What is wrong, and what to do about it, in one line.
        exit_code: Of the process.
    """
    if _last is not None and not _last.seize(message, exit_code):
        return
    try:
        print(f"error: {message}", file=sys.stderr, flush=True)
    finally:
        os._exit(exit_code)


INTERRUPTED, TERMINATED = 130, 143

_received = False


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM within the block, unless something else handles or ignores it."""
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
    """Restore the SIGTERM handler after the block, whatever a library did within it, in any thread.

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
    """Return the exit code of a command that an interrupt may have ended: 143 for SIGTERM."""
    return TERMINATED if code == INTERRUPTED and _received else code
