"""Searches of these tests time no student in its runtime, which takes seconds each, unless they are marked `timed`.

Their runtimes have one thread, since those of llama.cpp spin while they wait for each other, whatever else is running.
They choose tokens at fewer positions, and nothing waits for the disk: what a power cut leaves is tested in `utils` and
`crash`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from autodistill.evaluators.latency import Latency
from autodistill.evaluators.memory import Memory

from autodistill.evaluation.base import Measurement, Subject
from autodistill.search.finish import finish
from autodistill.strategy.deployment import Deployment

_timing = False


@contextmanager
def untimed() -> Iterator[None]:
    """As where a runtime is not installed: latencies are left out, and memory is predicted."""
    supports, evaluate = Latency.supports, Memory.evaluate

    def timed(self: Latency, deployment: Deployment) -> bool:
        return _timing and supports(self, deployment)

    def predicted(self: Memory, subject: Subject) -> tuple[Measurement, ...]:
        return evaluate(self, subject if _timing else replace(subject, artifact=None))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Latency, "supports", timed)
        patch.setattr(Memory, "evaluate", predicted)
        patch.setattr(finish, "free_cores", lambda most: 1)
        patch.setattr(finish, "POSITIONS", 800)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def unless_timed() -> Iterator[None]:
    with untimed():
        yield


@pytest.fixture(autouse=True)
def timed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Lets a test that is marked so time and measure as every search does."""
    global _timing
    _timing = request.node.get_closest_marker("timed") is not None
    yield
    _timing = False
