"""The disk limit of a search: which checkpoints and trained students are removed, written down before they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from autodistill.records.event_log import EventLog
from autodistill.records.row import rows_of
from autodistill.search.stage_keeper import StageKeeper
from autodistill.search.student_keeper import StudentKeeper
from autodistill.search.trials import TrialState
from autodistill.stages import Checkpoint


class Collector:
    """Removes what nothing needs any more; the log says so before, so that a kill in between is made good.

    Args:
        stages: Checkpoints, and the limit that both share.
        students: Trained students.
        trials: Of the campaign, by id, as they are at any moment.
        log: The campaign's.
        write: Writes an event down there.
        notify: Called with a line for a person.
    """

    def __init__(
        self,
        stages: StageKeeper,
        students: StudentKeeper,
        trials: Mapping[str, TrialState],
        *,
        log: EventLog,
        write: Callable[[Mapping[str, Any]], None],
        notify: Callable[[str], None],
    ) -> None:
        self._stages = stages
        self._students = students
        self._trials = trials
        self._log = log
        self._write = write
        self._notify = notify

    def between(self, promotable: Collection[str]) -> None:
        """While a search goes on: what stands beyond the limit; a trial among `promotable` may go past its rung."""
        self.students()
        self._checkpoints(lambda: self._surplus(promotable))

    def at_the_end(self) -> None:
        """Once no trial of this session goes on: what nothing may continue from."""
        self._checkpoints(lambda: self._stages.spare(self._trials.values()))
        self.students()

    def students(self) -> None:
        """Students that nothing needs, where the limit asks for it."""
        if self._stages.limit is None:
            return
        try:
            sizes = self._students.sizes()
            over = self._stages.bytes() + sum(sizes.values()) - self._stages.limit
            again = any(name in self._trials and self._trials[name].collected for name in sizes)
            if over <= 0 and not again:
                return
            rows = [row for row in rows_of(self._log.read()) if row.split == "validation"]
            names = self._students.surplus(self._trials, rows, sizes, over)
            if not names:
                return
            self._write({"event": "students-collected", "trials": names, "bytes": sum(sizes[name] for name in names)})
            for name in names:
                self._trials[name].collected = True
            self._students.remove(names)
            self._notify(f"removed the trained students of {', '.join(names)}, to hold the disk limit for checkpoints")
        except OSError as error:
            self._notify(f"no students could be collected this time: {error}")

    def _surplus(self, promotable: Collection[str]) -> Sequence[Checkpoint]:
        # What was interrupted short of its first rung is begun again, from what it left.
        waiting = {one.task.id for one in self._trials.values() if one.status is None and one.rung < 0}
        beside = 0 if self._stages.limit is None else sum(self._students.sizes().values())
        return self._stages.surplus(self._trials.values(), waiting | set(promotable), beside)

    def _checkpoints(self, chosen: Callable[[], Sequence[Checkpoint]]) -> None:
        """Removes checkpoints of stages; what a storage does not let go of stays."""
        try:
            checkpoints = chosen()
            if not checkpoints:
                return
            gone = self._stages.left_without(checkpoints)
            keys = [checkpoint.key for checkpoint in checkpoints]
            size = sum(checkpoint.bytes for checkpoint in checkpoints)
            self._write({"event": "collected", "checkpoints": keys, "bytes": size, "gone": gone})
            self._stages.remove(checkpoints)
        except OSError as error:
            self._notify(f"no checkpoints could be collected this time: {error}")
