"""Start the processes of a local Ray without running Python code between the fork and their program."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# This runs as a program of its own. It asks Linux to end it together with the process that started it (Ray's fate
# sharing), whose number comes first. Then it becomes the command that follows.
_SHARE_FATE = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def without_python() -> Iterator[None]:
    """Make Ray start its processes in this block by a plain spawn, without Python code in a fork of this process.

    Ray's own way runs Python in the fork, which has only one of the many threads here. Anything that is freed there, or
    waits for another thread, can end the child without a message before it becomes Ray. Ray then waits in vain for a
    file. An abandoned gloo process group of this process has caused this.

    Two things replace what Ray's code does there. The child inherits a signal mask, so that it ignores Ctrl-C. On
    Linux, a program of four lines makes it end with this process.
    """
    from ray._private import services as ray_services

    services: Any = ray_services
    ray_s_own = services.ConsolePopen

    class Spawned(ray_s_own):  # type: ignore[misc, valid-type, unused-ignore]
        def __init__(
            self, command: Sequence[str], *, preexec_fn: Callable[[], None] | None = None, **options: Any
        ) -> None:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                super().__init__([*_sharing_fate(), *command], **options)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    services.ConsolePopen = Spawned
    try:
        yield
    finally:
        services.ConsolePopen = ray_s_own


def _sharing_fate() -> list[str]:
    return [sys.executable, "-I", "-S", "-c", _SHARE_FATE, str(os.getpid())] if sys.platform == "linux" else []
