"""Moments of a clock that nobody can set, which other processes and nodes can read. Time budgets use them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A system's clock may be set while a search runs. So its difference from the monotonic clock is taken only once.
_EPOCH_OFFSET = time.time() - time.monotonic()


def now() -> float:
    """Return seconds since 1970: the system's clock when this process began, plus the time that has passed since."""
    return _EPOCH_OFFSET + time.monotonic()


@dataclass(frozen=True)
class Moment:
    """A moment that other processes can read too.

    Attributes:
        at: A value of `time.monotonic()`, which all processes of a machine share until it is restarted.
    """

    at: float

    @classmethod
    def after(cls, seconds: float) -> Moment:
        """Return the moment that many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """The seconds until then; negative once it has passed."""
        return self.at - time.monotonic()

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.at, time.monotonic(), time.time(), _machine())


def _arrived(at: float, sent: float, by_clock: float, machine: str) -> Moment:
    """Rebuild a moment in the process that receives it. On another node, the time of the transfer is subtracted."""
    if machine and machine == _machine():
        return Moment(at)
    return Moment.after(at - sent - max(0.0, time.time() - by_clock))


def _machine() -> str:
    """Return an id of this machine since it was started, or "" if the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
