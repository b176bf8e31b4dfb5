"""Why a piece of work ended without a result, and whether it is worth another try."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

from autodistill.errors import AutoDistillError, DamagedError, TrialFailedError
from autodistill.inference.torch_memory import is_out_of_memory
from autodistill.utils.durable import NO_ROOM

OUT_OF_MEMORY, WORKER_DIED = "out-of-memory", "worker-died"
KILLED = "killed-for-memory"
"""The worker was ended by the kernel, or by Ray, since the machine's memory was short.

Another trial may have been the reason; where it comes again it counts as `OUT_OF_MEMORY`.
"""
RETRIED = (WORKER_DIED, KILLED, "disk-full", "error")
"""Causes that may lie with the worker or its machine: such work is given out once more, to another worker process.

Values that are not finite would come again, and out of memory has been met by training fewer sequences at once.
"""
# What Ray's memory monitor says of a worker that it ended.
_BY_RAY = re.compile("OutOfMemoryError|memory usage threshold|low on memory")
# What says that a disk does not work, or lets nothing be written any more.
_BROKEN = (errno.EIO, errno.EROFS)


def explained(error: Exception) -> TrialFailedError:
    """The failure that an error of a trial's work amounts to."""
    if isinstance(error, TrialFailedError):
        return error
    said = str(error).splitlines()
    if is_out_of_memory(error):
        return TrialFailedError(OUT_OF_MEMORY, said[0] if said else "the machine's memory is full")
    if is_disk_full(error):
        return TrialFailedError("disk-full", said[0])
    # What is damaged may be whole elsewhere, or is gone by the next try.
    if isinstance(error, AutoDistillError) and not isinstance(error, DamagedError):
        return TrialFailedError("refused", str(error))
    return TrialFailedError("error", f"{type(error).__name__}: {error}")


def death(said: str, kills: int) -> tuple[str, str]:
    """The failure of a worker that is gone.

    Args:
        said: What Ray says of it.
        kills: Processes of its machine that the kernel has ended for want of memory meanwhile.
    """
    if _BY_RAY.search(said) or kills > 0:
        by = "the kernel" if kills > 0 else "Ray"
        return KILLED, f"its worker process was ended by {by}, since the machine's memory was short"
    return WORKER_DIED, "its worker process could not start, or ended: out of memory, or its node was lost?"


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of room, whichever library tried to."""
    return _is_one_of(NO_ROOM, error)


def is_disk_broken(error: BaseException) -> bool:
    """Whether a file could not be read or written since its disk does not work."""
    return _is_one_of(_BROKEN, error)


def _is_one_of(numbers: Sequence[int], error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in numbers
    # safetensors writes in Rust, whose errors end with the number.
    return any(str(error).endswith(f"(os error {number})") for number in numbers)
