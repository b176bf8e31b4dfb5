"""The processes of a local Ray, begun without Python code between a fork and their program."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

# Runs as its own program: it asks Linux to end it with the process that began it (Ray's fate sharing), whose number
# comes first, and becomes what follows.
_SHARE_FATE = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@contextmanager
def without_python() -> Iterator[None]:
    """Ray starts its processes in this block by a plain spawn, and not by Python code in a fork of this process.

    Ray's own way runs Python in the fork, which has one thread of the many here. Whatever is freed there, or waits for
    another thread, can end the child without a word before it is Ray, and Ray then waits in vain for a file: a process
    group of gloo that this process had given up has done so. What Ray's code does there is done here by a signal mask
    that the child inherits (it ignores Ctrl-C), and on Linux by a program of four lines (it ends with this process).
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
