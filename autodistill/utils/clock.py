"""Moments by a clock that nobody sets: what a search's time box counts by, also in another process, on another node."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# A system's clock may be set while a search runs; how far it is from the one that only runs is looked up once.
_APART = time.time() - time.monotonic()


def now() -> float:
    """Seconds since 1970, as the system's clock had them when this process began, and as many more as have passed."""
    return _APART + time.monotonic()


@dataclass(frozen=True)
class Moment:
    """A moment that other processes know too.

    Attributes:
        at: `time.monotonic()`, which all processes of a machine share since its start.
    """

    at: float

    @classmethod
    def after(cls, seconds: float) -> Moment:
        """The moment so many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds until then; below 0 once it has passed."""
        return self.at - time.monotonic()

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.at, time.monotonic(), time.time(), _machine())


def _arrived(at: float, sent: float, by_clock: float, machine: str) -> Moment:
    """A moment in the process that it was sent to; another node's is as far off as it was, less what the way took."""
    if machine and machine == _machine():
        return Moment(at)
    return Moment.after(at - sent - max(0.0, time.time() - by_clock))


def _machine() -> str:
    """This machine since its start; "" where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
