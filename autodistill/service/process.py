"""A server in a child process. Its output is passed on line by line, and the last lines are kept in case it dies."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from autodistill.utils.timeouts import end_within

_STOP_SECONDS = 10
_KEPT = 40  # lines of its output
_TROUBLE = re.compile(r"^[\d.]+ E (?P<said>.*)|(?P<abort>.*(?:GGML_ASSERT|GGML_ABORT).*)|(?P<error>\w*Error: .*)")


class ServerProcess:
    """A running server.

    Args:
        command: The command to run. It must not contain a secret, since others on the machine could read it.
        environment: Variables of the process.
        first_line: Line that is written to stdin, which then stays open until `stop`; None if the server reads nothing.
        relay: Called with each line of output, from another thread.

    Attributes:
        pid: Id of the process.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        first_line: str | None,
        relay: Callable[[str], None],
    ) -> None:
        self._kept: deque[str] = deque(maxlen=_KEPT)
        self._relay = relay
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if first_line is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches only the caller, which then stops the child properly
        )
        self.pid = self._process.pid
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if first_line is not None:
            assert self._process.stdin is not None
            # If it has died, `alive` says so.
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(first_line + "\n")
                self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip():
                self._kept.append(line.strip())
                self._relay(line.rstrip())

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Wait until it ends, and return its exit status, which is negative if a signal ended it."""
        return self._process.wait()

    def last_words(self) -> str:
        """Return the errors among the last lines of output, or the very last line if there are none."""
        self._reader.join(2)
        found = [_TROUBLE.match(line) for line in self._kept]
        errors = [(one["said"] or one["abort"] or one["error"]).strip() for one in found if one]
        return "; ".join(errors[:2]) or (self._kept[-1] if self._kept else "it said nothing")

    def stop(self) -> None:
        """Stop the process properly, or by force if that takes too long."""
        pipe = self._process.stdin
        if pipe is None:
            self._process.terminate()
        else:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            end_within(self._process, _STOP_SECONDS)
        finally:
            self._reader.join(2)
            if self._process.stdout is not None and not self._reader.is_alive():
                self._process.stdout.close()
