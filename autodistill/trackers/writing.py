"""Send the trials of a run to trackers: all at once from its log, or live while a search runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

from autodistill.errors import AutoDistillError, InputError
from autodistill.runs.run_folder import RunFolder
from autodistill.search.callbacks import Callback, RungReached, SearchStarted, TrialFinished
from autodistill.trackers.base import Destination, Tracker
from autodistill.trackers.trials import tracked_trials

# Seconds that the end of a search waits for a slow tracker, and for one that has failed before.
_LAST_SECONDS, _LAST_SECONDS_AFTER_A_FAILURE = 60.0, 5.0


def send_run(run: RunFolder, to: str) -> tuple[int, str]:
    """Send the trials of a run to a tracker.

    Args:
        run: The run, finished or not. It is only read.
        to: NAME or NAME=PLACE, as for `Destination.parse`.

    Returns:
        Number of trials that were sent, and the command or address that shows them.

    Raises:
        InputError: The destination is invalid, or the run has no trials or unreadable records.
        MissingDependencyError: The tracker's package is not installed.
        AutoDistillError: The tracker did not accept them.
    """
    destination = Destination.parse(to)
    trials = tracked_trials(run)
    if not trials:
        raise InputError(f"the run {run.name!r} has no trial yet: there is nothing to log")
    tracker = destination.open(run)
    try:
        tracker.update(trials, last=True)
        tracker.close()
    except AutoDistillError:
        raise
    except Exception as error:  # the tracker's client may raise anything
        raise AutoDistillError(
            f"{to} did not take the trials ({_said(error)}): is it running, and is this its place?"
        ) from error
    return len(trials), tracker.opened_by


class Live(Callback):
    """Sends trials to trackers while a search runs. A failing tracker is reported once, and never ends the search.

    Each tracker has its own thread, so a search waits for them only at its end.

    Args:
        to: Destinations, as for `Destination.parse`.

    Raises:
        InputError: A destination is invalid.
        MissingDependencyError: A tracker's package is not installed.
    """

    def __init__(self, to: Sequence[str]) -> None:
        self._destinations = {text: Destination.parse(text) for text in to}
        self._senders: list[_Sender] = []

    def search_started(self, event: SearchStarted) -> None:
        """Begin with what the log has from earlier sessions."""
        for text, destination in self._destinations.items():
            # The run is opened again for each tracker, since only one thread may read a log.
            tracker = destination.open(RunFolder.open(event.run.parent, event.run.name))
            self._senders.append(_Sender(text, tracker, event.run))

    def rung_reached(self, event: RungReached) -> None:
        """Send what is new."""
        self._wake()

    def trial_finished(self, event: TrialFinished) -> None:
        """Send what is new."""
        self._wake()

    def _wake(self) -> None:
        for sender in self._senders:
            sender.wake()

    def close(self) -> None:
        """Send the rest after a search has ended, however it ended."""
        for sender in self._senders:
            sender.close()


class _Sender:
    """The thread that keeps one tracker up to date with the log of a run."""

    def __init__(self, text: str, tracker: Tracker, run: Path) -> None:
        self._text, self._tracker, self._run = text, tracker, run
        self._news, self._ended, self._failed = threading.Event(), False, False
        self._thread = threading.Thread(target=self._work, name=f"tracker {text}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tell the thread that the log has something new."""
        self._news.set()

    def close(self) -> None:
        """Wait until everything was sent, but not for long."""
        self._ended = True
        self._news.set()
        seconds = _LAST_SECONDS_AFTER_A_FAILURE if self._failed else _LAST_SECONDS
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._tell(TimeoutError(f"it took more than {seconds:.0f} s at the end"))

    def _work(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            ended = self._ended  # read before the log, so that the log's last events are sent
            try:
                self._tracker.update(tracked_trials(self._tracker.run), last=ended)
                if ended:
                    self._tracker.close()
            except Exception as error:  # a tracker must not end hours of training
                self._tell(error)
            if ended:
                return

    def _tell(self, error: Exception) -> None:
        if not self._failed:
            logging.getLogger("autodistill").warning(
                "%s takes no trials (%s); the search goes on, and further failures of it are not reported: "
                "autodistill log %s --to %s sends them later",
                *(self._text, _said(error), self._run, self._text),
            )
        self._failed = True


def _said(error: Exception) -> str:
    """Return the first line of an error, since clients write long ones."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
