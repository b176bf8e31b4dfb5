"""Moving averages of what was observed of a server within a window of time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One look at a server, and what it found.

    Attributes:
        at: Time in seconds, from any starting point.
        first_seconds, token_seconds: Times of the answer to a probe; None and empty if there was no answer.
        streams: Sequences that the server answered at that time, including the probe.
        failed: Whether the probe had no answer.
        answer_tokens: Tokens written since the server started, or None if it does not report them.
        running, waiting: Requests that were being answered, and requests that waited for a slot; None if not reported.
        memory_bytes: Memory of the server's processes; None if they are not on this machine.
        acceptance: Share of the draft's tokens that were accepted since the server started; None without a draft.
    """

    at: float
    first_seconds: float | None = None
    token_seconds: tuple[float, ...] = ()
    streams: int = 1
    failed: bool = False
    answer_tokens: float | None = None
    running: float | None = None
    waiting: float | None = None
    memory_bytes: int | None = None
    acceptance: float | None = None


@dataclass(frozen=True, kw_only=True)
class Times:
    """Latencies of requests within a window, in seconds.

    Attributes:
        count: Number of times. If it is 0, all other fields are None.
        mean, p50, p95, p99: Mean and percentiles of the times.
    """

    count: int
    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of a window. A field is None if nothing is known about it.

    Attributes:
        seconds: Time that the window spans.
        first_token, token: Times to the first token, and of each later token.
        tokens_per_second: Rate of all answers together, by the server's own count.
        memory_bytes, most_memory_bytes: Mean and largest memory.
        running, waiting: Mean number of requests that were being answered, and that waited.
        probes, failed: Number of probes, and of those without an answer.
        acceptance: Acceptance of the draft since the server started.
    """

    seconds: float
    first_token: Times
    token: Times
    tokens_per_second: float | None
    memory_bytes: float | None
    most_memory_bytes: int | None
    running: float | None
    waiting: float | None
    probes: int
    failed: int
    acceptance: float | None

    def to_json(self) -> dict[str, Any]:
        """Return them as plain data."""
        return asdict(self)


class Window:
    """A window of the last seconds, with all that was observed of a server in it.

    Args:
        seconds: Time after which a look is dropped.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._probes: deque[Probe] = deque()

    def add(self, probe: Probe) -> None:
        """Add a look, which must be later than all others, and drop those that are too old."""
        self._probes.append(probe)
        while probe.at - self._probes[0].at > self._seconds:
            self._probes.popleft()

    def times(self, quantity: str, most_streams: int | None = None) -> list[float]:
        """Return the times to first tokens ("ttft") or of later ones ("tpot").

        Args:
            quantity: "ttft" or "tpot".
            most_streams: Leave out times that were measured next to more sequences than this.
        """
        found: list[float] = []
        for one in self._probes:
            if most_streams is None or one.streams <= most_streams:
                first = () if one.first_seconds is None else (one.first_seconds,)
                found += first if quantity == "ttft" else one.token_seconds
        return found

    def figures(self) -> Figures:
        """Return the averages of the window."""
        probes = list(self._probes)
        memory = [one.memory_bytes for one in probes if one.memory_bytes is not None]
        probed = [one for one in probes if one.failed or one.first_seconds is not None]
        return Figures(
            seconds=probes[-1].at - probes[0].at if probes else 0.0,
            first_token=times(self.times("ttft")),
            token=times(self.times("tpot")),
            tokens_per_second=_rate(probes),
            memory_bytes=_mean(memory),
            most_memory_bytes=max(memory, default=None),
            running=_mean([one.running for one in probes if one.running is not None]),
            waiting=_mean([one.waiting for one in probes if one.waiting is not None]),
            probes=len(probed),
            failed=sum(one.failed for one in probed),
            acceptance=probes[-1].acceptance if probes else None,
        )


def times(seconds: Sequence[float]) -> Times:
    """Return mean and percentiles of some times."""
    if not seconds:
        return Times(count=0)
    shares = {f"p{one}": float(np.percentile(seconds, one)) for one in PERCENTILES}
    return Times(count=len(seconds), mean=float(np.mean(seconds)), **shares)


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _rate(probes: Sequence[Probe]) -> float | None:
    """Return tokens per second over the window. A server that was restarted counts from 0 again."""
    counted = [(one.at, one.answer_tokens) for one in probes if one.answer_tokens is not None]
    if len(counted) < 2 or counted[-1][0] <= counted[0][0]:
        return None
    written = 0.0
    for (_, before), (_, after) in pairwise(counted):
        written += after - before if after >= before else after
    return written / (counted[-1][0] - counted[0][0])
