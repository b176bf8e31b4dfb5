"""How a command ends: it gives one reply on stdout, and SIGTERM stops it in the same way as Ctrl-C."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# The last reply of this process is kept, so that nothing else ends a process whose command has ended by itself.
_last: Reply | None = None


class Reply:
    """The reply of a command on stdout. It is given once.

    Args:
        as_json: Whether an error is also printed on stdout, as a JSON document.
    """

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        # The thread that gives the reply holds this for ever.
        self._taken = threading.Lock()
        # While a command works, its stdout is stderr. Another thread may need to write to the real stdout.
        self._stdout = os.dup(1)

    def give(self, text: str) -> None:
        """Print a result. This does not return if another thread is about to end the process."""
        self._take()
        # A path may contain bytes that are not text, and a terminal may support only a few characters.
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)

    def give_error(self, message: str, exit_code: int) -> None:
        """Print the error that ended the command, if errors are replies. Does not return if the process is ending."""
        self._take()
        if self._as_json:
            print(error_document(message, exit_code), flush=True)

    def _take(self) -> None:
        if not self._taken.acquire(blocking=False):
            threading.Event().wait()

    def seize(self, message: str, exit_code: int) -> bool:
        """Give an error from a thread other than the command's; return False if a reply was already given."""
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
        as_json: Whether an error is also printed on stdout, as a JSON document.
    """
    global _last
    reply = _last = Reply(as_json)
    try:
        yield reply
    finally:
        reply.close()


def end_process(message: str, exit_code: int) -> None:
    """End this process at once, from another thread than the stuck one, with an error on stderr and in the reply.

    Returns if the command has already given its reply, since it then ends by itself.

    Args:
        message: What is wrong, and what to do about it, in one line.
        exit_code: Exit code of the process.
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
    """Raise KeyboardInterrupt on SIGTERM within the block, unless other code handles or ignores the signal."""
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
    """Restore the SIGTERM handler after the block, even if a library changed it in any thread.

    When Ray's C++ code starts, it sets its own handler, which prints a trace and ends the process. When it shuts down,
    it leaves none. Python sees neither: `signal.getsignal` returns what Python set last.
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
    """Return the exit code of a command that may have been interrupted: 143 for SIGTERM."""
    return TERMINATED if code == INTERRUPTED and _received else code
