"""Whether a machine was quiet while something was timed: other processes, and CPU time that the host took away."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import psutil

# Cores that others may take beyond those that are free: the load of an idle system.
_IDLE_CORES = 0.25
_STEAL = 0.05
_LOOK_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The disturbance of a measurement: other processes, and CPU time that the host took.

    Attributes:
        load_average: Load average of the minute before the measurement.
        others: Number of cores that other processes took.
        steal: Share of the cores' time that the machine's host gave to others.
        doubts: Why figures from this time are doubtful, in words; empty if the machine was quiet.
    """

    load_average: float
    others: float
    steal: float
    doubts: tuple[str, ...]


class Watch:
    """Watch the machine's cores during a `with` block.

    Args:
        threads: Number of cores that the timed work needs.
        own: Returns the CPU seconds that the timed work has used so far, in all of its processes.
    """

    def __init__(self, threads: int, own: Callable[[], float] = time.process_time) -> None:
        self._threads = threads
        self._own = own

    def __enter__(self) -> Self:
        self._load = psutil.getloadavg()[0]
        self._times, self._used, self._began = psutil.cpu_times(), self._own(), time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        wall = max(1e-3, time.monotonic() - self._began)
        before, after = _busy(self._times), _busy(psutil.cpu_times())
        cores = psutil.cpu_count() or 1
        others = max(0.0, after[0] - before[0] - (self._own() - self._used)) / wall
        steal = max(0.0, after[1] - before[1]) / wall / cores
        self.noise = noise(load_average=self._load, others=others, steal=steal, threads=self._threads, cores=cores)


def noise(*, load_average: float, others: float, steal: float, threads: int, cores: int) -> Noise:
    """Return what was observed, and the resulting doubts: cores that were not free, or time that the host took."""
    doubts = []
    if others + threads > cores + _IDLE_CORES:
        doubts.append(
            f"other work took {others:.1f} of {cores} cores, and {threads} {'was' if threads == 1 else 'were'} needed"
        )
    if steal > _STEAL:
        doubts.append(f"the machine's host held back {steal:.0%} of its time")
    return Noise(load_average=load_average, others=others, steal=steal, doubts=tuple(doubts))


def current_load(threads: int) -> Noise:
    """Return how busy the machine is now, before anything is timed."""
    with Watch(threads) as watch:
        time.sleep(_LOOK_SECONDS)
    return watch.noise


def free_cores(most: int) -> int:
    """Return the number of cores that nothing else uses now: at least one, at most the given number.

    This is for runtimes whose threads spin while they wait for each other. If they have fewer cores than threads, most
    of their time is spent waiting.
    """
    return max(1, min(most, int((psutil.cpu_count() or 1) - current_load(0).others + _IDLE_CORES)))


def _busy(times: Any) -> tuple[float, float]:
    """Return the seconds of all cores: the used ones, and those taken by the host."""
    used = sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
    return used, float(getattr(times, "steal", 0.0))
