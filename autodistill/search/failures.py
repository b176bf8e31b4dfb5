"""Why a piece of work ended without a result, and whether it is worth another try."""

from __future__ import annotations

import errno

from autodistill.distillation.memory import is_out_of_memory
from autodistill.errors import AutoDistillError, TrialFailedError

RETRIED = ("worker-died", "disk-full", "error")
"""Causes that may lie with the worker or its machine: such work is given out once more, to another worker process.

Values that are not finite would come again, and out of memory has been met by training fewer sequences at once.
"""
# What says that there is no room for a file: the disk, a quota, or the largest file that is allowed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explained(error: Exception) -> TrialFailedError:
    """The failure that an error of a trial's work amounts to."""
    if isinstance(error, TrialFailedError):
        return error
    said = str(error).splitlines()
    if is_out_of_memory(error):
        return TrialFailedError("out-of-memory", said[0] if said else "the machine's memory is full")
    if is_disk_full(error):
        return TrialFailedError("disk-full", said[0])
    if isinstance(error, AutoDistillError):
        return TrialFailedError("refused", str(error))
    return TrialFailedError("error", f"{type(error).__name__}: {error}")


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of room, whichever library tried to."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    # safetensors writes in Rust, whose errors end with the number.
    return any(str(error).endswith(f"(os error {number})") for number in _FULL)
