"""Callbacks: report events to a Python user while a search runs, in the process that drives it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from autodistill.errors import InputError

if TYPE_CHECKING:
    from autodistill.runs.results.row import Row
    from autodistill.strategy.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class SearchStarted:
    """The search has a plan and a folder, and its trials are about to begin.

    Attributes:
        run: The folder.
    """

    run: Path


@dataclass(frozen=True, kw_only=True)
class TrialStarted:
    """A trial is given to a worker for the first time in this session.

    Attributes:
        trial: Its id, like "t003".
        name: The baseline's name, or the trial's.
        kind: "student", "baseline" or "confirmation".
        strategy: How its student is made.
        seed: The seed of its data order and projections.
        parameters: Number of weights of its student, or None if unknown.
    """

    trial: str
    name: str
    kind: str
    strategy: Strategy
    seed: int
    parameters: int | None


@dataclass(frozen=True, kw_only=True)
class Step:
    """An optimiser step of a trial. Workers keep at most 20 between two rungs, and report them with the rung.

    Attributes:
        trial: Its id.
        tokens: Tokens trained on so far, including this step.
        loss: The training loss.
        learning_rate: The student's learning rate.
        gradient_norm: The norm of the gradient before clipping.
        tokens_per_second: The speed of this step.
    """

    trial: str
    tokens: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float


@dataclass(frozen=True, kw_only=True)
class RungReached:
    """A trial was evaluated at a rung.

    Attributes:
        trial: Its id.
        rung: Index of the rung, from 0.
        tokens: Tokens trained on so far.
        metric: Name of the metric that ranks students.
        value: The metric at this rung, or None if the student does not fit the budget.
        decision: "continue", "pause" or "stop".
    """

    trial: str
    rung: int
    tokens: int
    metric: str
    value: float | None
    decision: str


@dataclass(frozen=True, kw_only=True)
class TrialFinished:
    """A trial ended, or was rejected before it began.

    Attributes:
        trial: Its id.
        name: The baseline's name, or the trial's.
        status: "completed", "stopped", "rejected" or "failed".
        reason: Why it did not complete, or None if it did.
        value: The metric at its last rung, or None if it reached no rung.
    """

    trial: str
    name: str
    status: str
    reason: str | None
    value: float | None


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A student was exported and verified.

    Attributes:
        container: "gguf", "compressed-tensors" or "huggingface".
        path: The file or folder.
        best: The row of the best student. A GGUF file that is exported with it may hold another student.
    """

    container: str
    path: Path
    best: Row


@dataclass(frozen=True, kw_only=True)
class SearchFinished:
    """The search has ended, and all of its files are written.

    Attributes:
        run: Its folder.
        best: The exported row.
        rows: The rows of the validation split.
    """

    run: Path
    best: Row
    rows: tuple[Row, ...]


Event: TypeAlias = SearchStarted | TrialStarted | Step | RungReached | TrialFinished | Exported | SearchFinished


class Callback:
    """Receives the events of a search while it runs. Subclass it, and write the methods that you need.

    The methods run in the process that drives the search, and the search waits for them. An exception in a callback is
    logged once, with the callback's name, and does not end the search. KeyboardInterrupt does end it.
    """

    def search_started(self, event: SearchStarted) -> None:
        """The search has a plan and a folder."""

    def trial_started(self, event: TrialStarted) -> None:
        """A trial is given to a worker."""

    def step(self, event: Step) -> None:
        """A trial took an optimiser step. Steps are reported together with the next rung."""

    def rung_reached(self, event: RungReached) -> None:
        """A trial was evaluated at a rung."""

    def trial_finished(self, event: TrialFinished) -> None:
        """A trial ended."""

    def exported(self, event: Exported) -> None:
        """A student was exported and verified."""

    def search_finished(self, event: SearchFinished) -> None:
        """The search has ended."""


_METHODS = {
    SearchStarted: "search_started",
    TrialStarted: "trial_started",
    Step: "step",
    RungReached: "rung_reached",
    TrialFinished: "trial_finished",
    Exported: "exported",
    SearchFinished: "search_finished",
}


class Callbacks:
    """Passes each event to all callbacks, in order. A callback that fails does not end the search.

    Args:
        callbacks: Instances of `Callback`.

    Raises:
        InputError: One of them is not a `Callback`.
    """

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        for number, callback in enumerate(callbacks):
            if not isinstance(callback, Callback):
                raise InputError(
                    f"callbacks[{number}] is of type {type(callback).__name__}: give objects of classes that inherit "
                    "from autodistill.Callback"
                )
        self._callbacks = tuple(callbacks)
        self._failed: set[int] = set()

    def __call__(self, event: Event) -> None:
        method = _METHODS[type(event)]
        for number, callback in enumerate(self._callbacks):
            try:
                getattr(callback, method)(event)
            except Exception:  # no error in a user's code may end hours of training
                if number not in self._failed:
                    self._failed.add(number)
                    logging.getLogger("autodistill").exception(
                        "the callback %s failed in %s; the search goes on, and further failures of it are not reported",
                        type(callback).__qualname__,
                        method,
                    )
