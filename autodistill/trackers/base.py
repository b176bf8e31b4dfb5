"""The interface of a tracker, and the list of trackers: their names, their packages and where they write to."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from autodistill.errors import InputError, MissingDependencyError
from autodistill.runs.run_folder import RunFolder
from autodistill.trackers.trials import Point, TrackedTrial

_CLASSES = {"mlflow": "MlflowTracker", "tensorboard": "TensorBoardTracker", "wandb": "WandbTracker"}
NAMES = tuple(_CLASSES)


class Tracker(ABC):
    """Keeps a copy of a run's trials in an experiment tracker. Each trial is one run of the tracker.

    The run's log is authoritative. A copy may be made any number of times, and only grows.

    Args:
        run: The run.
        place: Where to write, in the tracker's own terms; None for its default.
    """

    def __init__(self, run: RunFolder, place: str | None) -> None:
        self.run, self.place = run, place
        self._sent: dict[str, TrackedTrial] = {}

    def update(self, trials: Sequence[TrackedTrial], *, last: bool) -> None:
        """Bring the copy up to date with the current log.

        Args:
            trials: All trials of the run.
            last: Whether this is the end of the session. Until then, the figures of ended trials may still change.
        """
        for trial in trials:
            before = self._sent.get(trial.trial)
            if trial == before and not last:
                continue
            sent = before.points[-1].tokens if before and before.points else -1
            new = [point for point in trial.points if point.tokens > sent]
            self.send(trial, new, first=before is None, last=last)
            self._sent[trial.trial] = trial  # only after the tracker took it; otherwise it is sent again

    @classmethod
    @abstractmethod
    def check(cls, place: str | None) -> None:
        """Check that the tracker can write to a place, before any work.

        Raises:
            InputError: It cannot. The message says what is wrong.
        """

    @abstractmethod
    def send(self, trial: TrackedTrial, points: Sequence[Point], *, first: bool, last: bool) -> None:
        """Write what is new about a trial.

        Args:
            trial: The trial as it is now.
            points: The points that were not sent before.
            first, last: Whether this is the first time in this session that the trial is sent, and the last time.
        """

    @property
    @abstractmethod
    def opened_by(self) -> str:
        """The command, or the address, that shows what was written."""

    @abstractmethod
    def close(self) -> None:
        """Release resources. Trials that have not ended stay open if the tracker supports that."""


@dataclass(frozen=True, kw_only=True)
class Destination:
    """A tracker's name, and where it writes to in its own terms; None for its default."""

    name: str
    place: str | None

    @classmethod
    def parse(cls, text: str) -> Destination:
        """Read NAME or NAME=PLACE.

        Raises:
            InputError: There is no tracker of that name, or its place is empty or not one that it can write to.
            MissingDependencyError: Its package is not installed.
        """
        name, given, place = text.strip().partition("=")
        if name not in _CLASSES:
            raise InputError(f"{name!r} is not a known tracker: choose one of {', '.join(NAMES)}")
        if given and not place.strip():
            raise InputError(f"{text!r} names no place: write {name} alone, or {name}=PLACE")
        if place.rpartition(",")[2].partition("=")[0].strip() in _CLASSES:
            raise InputError(f"{text!r} names more than one tracker: give one at a time")
        if place != place.encode("utf-8", "replace").decode():
            raise InputError(f"the place of {text!r} is not UTF-8 text, which trackers need: name another")
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(f"{name} is not installed: pip install 'autodistill-search[{name}]'")
        found = cls(name=name, place=place.strip() or None)
        found._class().check(found.place)
        return found

    def open(self, run: RunFolder) -> Tracker:
        """Return the tracker for a run. Nothing is written yet."""
        made: Tracker = self._class()(run, self.place)
        return made

    def _class(self) -> Any:
        return getattr(import_module(f"autodistill.trackers.to_{self.name}"), _CLASSES[self.name])
