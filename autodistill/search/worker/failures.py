"""Why a piece of work ended without a result, and whether to try it again."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

from autodistill.errors import AutoDistillError, DamagedError, TrialFailedError
from autodistill.inference.torch_memory import is_out_of_memory
from autodistill.utils.durable import NO_ROOM

OUT_OF_MEMORY, WORKER_DIED = "out-of-memory", "worker-died"
KILLED = "killed-for-memory"
"""The kernel or Ray ended the worker, because the machine was short of memory.

Another trial may have been the cause. If it happens again, it counts as `OUT_OF_MEMORY`."""
RETRIED = (WORKER_DIED, KILLED, "disk-full", "error")
"""Causes that may lie in the worker or its machine: such work is given to another worker process once more.

Non-finite values would come again. Running out of memory has already been met by a smaller micro-batch."""
# What Ray's memory monitor says about a worker that it ended.
_BY_RAY = re.compile("OutOfMemoryError|memory usage threshold|low on memory")
# Errors of a disk that has failed or become read-only.
_BROKEN = (errno.EIO, errno.EROFS)


def explained(error: Exception) -> TrialFailedError:
    """Return the failure that an error in a trial's work amounts to."""
    if isinstance(error, TrialFailedError):
        return error
    said = str(error).splitlines()
    if is_out_of_memory(error):
        return TrialFailedError(OUT_OF_MEMORY, said[0] if said else "the machine's memory is full")
    if is_disk_full(error):
        return TrialFailedError("disk-full", said[0])
    # A damaged file may be intact elsewhere, or be gone by the next try.
    if isinstance(error, AutoDistillError) and not isinstance(error, DamagedError):
        return TrialFailedError("refused", str(error))
    return TrialFailedError("error", f"{type(error).__name__}: {error}")


def death(message: str, kills: int) -> tuple[str, str]:
    """Return the cause and message for a worker that has died.

    Args:
        message: Ray's message about it.
        kills: Processes of its machine that the kernel has ended for lack of memory meanwhile.
    """
    if _BY_RAY.search(message) or kills > 0:
        by = "the kernel" if kills > 0 else "Ray"
        return KILLED, f"its worker process was ended by {by}, since the machine's memory was short"
    return WORKER_DIED, "its worker process could not start, or ended: out of memory, or its node was lost?"


def is_disk_full(error: BaseException) -> bool:
    """Return whether a file could not be written for lack of room, whichever library tried it."""
    return _is_one_of(NO_ROOM, error)


def is_disk_broken(error: BaseException) -> bool:
    """Return whether a file could not be read or written because its disk does not work."""
    return _is_one_of(_BROKEN, error)


def _is_one_of(numbers: Sequence[int], error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in numbers
    # safetensors writes in Rust. Its error messages end with the number.
    return any(str(error).endswith(f"(os error {number})") for number in numbers)
