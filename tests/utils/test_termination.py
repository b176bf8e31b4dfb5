"""SIGTERM reaches this process, whatever a library does below Python."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time

import pytest

from autodistill.utils.process_exit import sigterm_as_interrupt, sigterm_kept


def _terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


def test_who_meets_sigterm_before_a_library_takes_it_meets_it_afterwards() -> None:
    def library() -> None:
        with sigterm_kept():
            ignore = ctypes.c_void_p(1)  # SIG_IGN in C, which Python does not notice
            ctypes.pythonapi.PyOS_setsig(signal.SIGTERM, ignore)

    with sigterm_as_interrupt():
        thread = threading.Thread(target=library)
        thread.start()
        thread.join()
        with pytest.raises(KeyboardInterrupt):
            _terminated()
