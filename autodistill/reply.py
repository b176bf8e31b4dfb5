"""The one reply of a command on stdout, given by whichever thread ends the command: its own, or one beside it."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# A reply that was given stays the last one, so that nothing ends a process whose command has ended by itself.
_last: Reply | None = None


class Reply:
    """What a command says on stdout, once.

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
        """Prints a result. Where another thread is about to end the process, does not return."""
        self._take()
        print(text, flush=True)

    def give_error(self, message: str, exit_code: int) -> None:
        """Prints the error that ended the command, if errors are replies; likewise."""
        self._take()
        if self._as_json:
            print(error_document(message, exit_code), flush=True)

    def _take(self) -> None:
        if not self._taken.acquire(blocking=False):
            threading.Event().wait()

    def seize(self, message: str, exit_code: int) -> bool:
        """Gives an error from beside the command's own thread, whatever that is doing; False where it was given."""
        if not self._taken.acquire(blocking=False):
            return False
        if self._as_json:
            left = f"{error_document(message, exit_code)}\n".encode()
            with suppress(OSError):  # nobody may be reading any more
                while left:
                    left = left[os.write(self._stdout, left) :]
        return True

    def close(self) -> None:
        """Gives the real stdout up, once the reply was given."""
        self._taken.acquire(blocking=False)
        os.close(self._stdout)


def error_document(message: str, exit_code: int) -> str:
    """An error as the JSON document that a command gives in the place of its result."""
    return json.dumps({"error": message, "exit_code": exit_code}, indent=2)


@contextmanager
def replying(as_json: bool) -> Iterator[Reply]:
    """The reply of a command, which is to be given in the block, whatever becomes of its work.

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
    """Ends this process at once, from a thread beside one that is stuck, with an error on stderr and in its reply.

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
