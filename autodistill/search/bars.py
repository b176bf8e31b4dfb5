"""What a trial must reach at a rung to go on, by what others have reached there."""

from __future__ import annotations

from autodistill.certainty import Bar, Reading
from autodistill.search.scheduler import SuccessiveHalving
from autodistill.search.trials import Assignment, Question, TrialState


class Bars:
    """The bars of a search, as its reports stand: what its log says so far.

    Args:
        question: What is searched for.
        scheduler: Knows who holds the places of a rung.
    """

    def __init__(self, question: Question, scheduler: SuccessiveHalving) -> None:
        self._question = question
        self._scheduler = scheduler
        # By trial and rung.
        self._known: dict[tuple[str, int], Bar] = {}

    def note(self, trial: TrialState, reading: Reading | None) -> None:
        """Remembers what a trial reached at its rung, if all of it was read there."""
        if reading is not None and reading.looks and trial.value is not None:
            self._known[trial.task.id, trial.rung] = Bar(trial=trial.task.id, value=trial.value, looks=reading.looks)

    def of(self, assignment: Assignment) -> Bar | None:
        """What a trial must reach at the rung that it is taken to; None where it is held to nothing."""
        below = assignment.rung < len(self._question.plan.rungs) - 1
        # What is kept short of the end is to be known as well as it can be; with several objectives no figure decides.
        if not below or assignment.task.straight or assignment.keep or self._question.further:
            return None
        last = self._scheduler.last_kept(assignment.rung)
        return self._known.get((last, assignment.rung)) if last is not None else None
