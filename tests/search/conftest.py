"""Make searches of these tests faster, unless a test is marked `timed`.

What is left out takes seconds in each search and has tests of its own. The searches time neither this machine nor a
student in its runtime, predict the memory of its process, and draw no charts. Their runtimes have one thread, because
the threads of llama.cpp spin while they wait for each other, whatever else is running. They choose tokens at fewer
positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autodistill.evaluation.base import Measurement, Subject
from autodistill.evaluators.latency import Latency
from autodistill.evaluators.memory import Memory
from autodistill.export.process_memory import measured_process_bytes
from autodistill.report import page
from autodistill.report.document import specifications
from autodistill.search.finish import export_row, in_runtime
from autodistill.search.planning.durations import Speed
from autodistill.search.setup import loading, measure_plan
from autodistill.search.solve.call import export as solve_export
from autodistill.search.solve.call import opened
from autodistill.strategy.deployment import Deployment

_timing = False


@contextmanager
def untimed() -> Iterator[None]:
    """Behave as if no runtime and nothing that draws charts were installed, on a machine whose speed is known."""
    supports, evaluate = Latency.supports, Memory.evaluate
    measure_speed = measure_plan.measure_speed

    def speed(*given: Any, sizes: Sequence[int] = (1,), **more: Any) -> tuple[Speed, dict[int, float]]:
        if _timing:
            return measure_speed(*given, sizes=sizes, **more)
        rate = 2e4
        known = Speed(cache=1e5, score=1e5, worker_train=rate, worker_score=5e4, alone=rate * bool(more.get("alone")))
        return known, dict.fromkeys(sizes, rate)

    def process(folder: Path, vocabulary: int, cache: Path) -> int:
        return measured_process_bytes(folder, vocabulary, cache) if _timing else 0

    def timed(self: Latency, deployment: Deployment) -> bool:
        return _timing and supports(self, deployment)

    def predicted(self: Memory, subject: Subject) -> tuple[Measurement, ...]:
        return evaluate(self, subject if _timing else replace(subject, artifact=None))

    def drawn(charts: Callable[[], Mapping[str, Any]]) -> dict[str, dict[str, Any]] | None:
        return specifications(charts) if _timing else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "specifications", drawn)
        patch.setattr(Latency, "supports", timed)
        patch.setattr(Memory, "evaluate", predicted)
        patch.setattr(in_runtime, "free_cores", lambda most: 1)
        patch.setattr(export_row, "POSITIONS", 160)
        patch.setattr(solve_export, "POSITIONS", 160)
        patch.setattr(measure_plan, "measure_speed", speed)
        patch.setattr(loading, "measured_process_bytes", process)
        patch.setattr(opened, "measured_process_bytes", process)
        yield


@pytest.fixture(scope="module", autouse=True)
def unless_timed() -> Iterator[None]:
    with untimed():
        yield


@pytest.fixture(autouse=True)
def timed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a test marked `timed` time and measure as every search does."""
    global _timing
    _timing = request.node.get_closest_marker("timed") is not None
    yield
    _timing = False
