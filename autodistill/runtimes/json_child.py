"""A program in a child process that answers requests, one JSON object per line, and whose log can be read."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from autodistill.errors import VerificationError
from autodistill.utils.timeouts import end_within

_STOP_SECONDS = 10


class JsonChild:
    """A running child program that got its settings and has reported that it is ready.

    If it crashes, nothing else does, and its memory is freed when it ends. It ends with `stop`, or with the caller,
    since its stdin closes then.

    Args:
        program: A Python file, run by path.
        settings: The settings that it is given as JSON.
        environment: Variables of the process.
        failure: What failed, in words for the user, if it does not become ready.
        last_words: Returns the part of its log that says why it died.

    Attributes:
        ready: Its first answer.
        pid: Id of the process.

    Raises:
        VerificationError: It died before it was ready. The message has its last words.
    """

    def __init__(
        self,
        program: Path,
        settings: Mapping[str, Any],
        environment: Mapping[str, str],
        failure: str,
        last_words: Callable[[str], str],
    ) -> None:
        self._last_words = last_words
        self._folder = tempfile.TemporaryDirectory(prefix="autodistill-serve-")
        self._log = Path(self._folder.name, "log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(program), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self._folder.name,
                env=environment,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C reaches only the caller, which then stops the child properly
            )
        self.pid = self._process.pid
        try:
            self.ready = self._answer(failure)
        except BaseException:
            self.stop()
            raise

    def ask(self, request: Mapping[str, Any], failure: str) -> Any:
        """Return the answer to a request.

        Args:
            request: The request, which is sent as JSON.
            failure: What failed, in words for the user, if the child dies of it.

        Raises:
            VerificationError: The child died. The message has its last words.
        """
        assert self._process.stdin is not None
        # If the child has died, the missing answer is reported with its last words.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer(failure)

    def log(self) -> str:
        """Return everything that it has logged so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def used_seconds(self) -> float:
        """Return the CPU seconds that the child and this process have used."""
        times = psutil.Process(self.pid).cpu_times()
        return times.user + times.system + time.process_time()

    def stop(self) -> None:
        """Stop the program. Use force if it does not end by itself, or if an interrupt leaves no time to wait."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                # A dead child may have left unread data in the pipe.
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            end_within(self._process, _STOP_SECONDS)
        finally:
            self._folder.cleanup()

    def _answer(self, failure: str) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise VerificationError(f"{failure}: {self._last_words(self.log())} (exit status {code})")
        return json.loads(line)
