"""What a search does next: interrupted work, baselines, promotions, proposals, then further training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, Literal

from autodistill.runs.results.row import Status
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.runs.results.selection import confirming
from autodistill.search.algorithms.optuna_study import Observation
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.algorithms.successive_halving import CONFIRMED, SuccessiveHalving
from autodistill.search.campaign.disk_limit import StageKeeper
from autodistill.search.campaign.extended_training import Continuation, TrainingOn, lengthened, next_longer, trained_on
from autodistill.search.campaign.state import Question, TrialState
from autodistill.search.campaign.time_budget import TimeBudget
from autodistill.search.campaign.trunk import Trunk
from autodistill.search.worker.attempt import Assignment
from autodistill.strategy.strategy import Strategy
from autodistill.units import format_duration

# If almost nothing in a space fits, the sampler must still stop proposing.
REJECTIONS_IN_A_ROW = 200

# The log(need / memory) that the sampler gets for a training that ran out of memory. The true value is unknown.
_TOO_MUCH = 0.1

# Time reserved for the first trial to reach the end, as a multiple of the expected time.
_RESERVE_FACTOR = 1.1

# Failed attempts to keep a student that has not reached the end. After these, the cause (a full disk, say) is likely to
# stop the next one too.
_MOST_KEEP_ATTEMPTS = 3


class Agenda:
    """Chooses the next piece of work from the state of a campaign's trials. It writes nothing itself.

    Args:
        question: What is searched for.
        trials: The campaign's trials by id, always up to date.
        time_budget: The time that is left.
        sampler: Proposes points.
        scheduler: Says which trial goes past its rung.
        stages: Knows which trials wait for another's checkpoint.
        enter: Makes a new trial of a strategy and records it.
        evaluating: Returns whether a trained student is being evaluated.
        decide: Records what is decided about a trunk, before the decision takes effect.
        behind: Returns the ids of those trials that are clearly behind the best of them.
        notify: Called with a line about each thing that is left out.

    Attributes:
        exhausted: Whether the space has nothing left to propose.
        resumed: Whether earlier sessions used some of the time budget.
    """

    def __init__(
        self,
        question: Question,
        *,
        trials: dict[str, TrialState],
        time_budget: TimeBudget,
        sampler: Sampler,
        scheduler: SuccessiveHalving,
        stages: StageKeeper,
        enter: Callable[..., TrialState],
        evaluating: Callable[[], bool],
        decide: Callable[[Trunk], None],
        behind: Callable[[Sequence[TrialState]], Collection[str]],
        notify: Callable[[str], None],
    ) -> None:
        self.exhausted = False
        self.resumed = False
        self._question = question
        self._trials = trials
        self._time_budget = time_budget
        self._further_training = TrainingOn(question, trials, time_budget, stages.checkpoints)
        self._sampler = sampler
        self._scheduler = scheduler
        self._stages = stages
        self._enter = enter
        self._evaluating = evaluating
        self._decide = decide
        self._behind = behind
        self._notify = notify
        self._left_out: set[str] = set()

    def next(self) -> Assignment | None:
        """Return the next piece of work, or None if there is none at the moment.

        Training comes first. When nothing is left to train, trained students are evaluated under the deployments that
        did not judge their rungs, the best student first. These small pieces keep every worker busy while the last
        trial trains. If no trial reaches the end, the best one is kept as its last rung judged it. While a trial has
        all threads, nothing else runs.
        """
        if any(trial.running and self._further_training.threads(trial.task) for trial in self._trials.values()):
            return None
        assignment = (
            self._interrupted()
            or self._baseline()
            or self._promotion(extra=False)
            or self._proposal()
            # When the space has no more, rungs are closed that were open before.
            or self._promotion(extra=False)
            or self._longer()
        )
        if assignment is None and self._question.plan.alone and self._evaluating() and self._to_train_on() is not None:
            # Training begins when the running evaluations have ended. No further evaluation is given out.
            return None
        assignment = assignment or self._training_on() or self._confirmation()
        if assignment is None and self._time_budget.deadline is not None:
            # Time is left. Trials beyond the plan's number may go on, unless this time is set aside for the best.
            idle = not any(trial.running for trial in self._trials.values())
            if idle or not self._further_training.sets_aside(self._trained()):
                assignment = self._promotion(extra=True)
        return assignment or self._evaluation() or self._keep_unfinished_best()

    def _interrupted(self) -> Assignment | None:
        """Return a trial that was interrupted before its first rung, because its worker or the search was killed."""
        for trial in self._trials.values():
            waits = trial.status is None and not trial.running and trial.rung < 0
            if not waits or self._further_training.is_further_training(trial.task):
                continue
            # A trial that goes straight to the end needs no reserve for another to get there.
            straight = trial.task.straight
            if self._affordable(trial, reserved=0.0 if straight else self._reserve(), whole=straight):
                return self._assign(trial)
        return None

    def _baseline(self) -> Assignment | None:
        for trial_id, (name, strategy) in self._baselines():
            if trial_id in self._trials or trial_id in self._left_out:
                continue
            # A new search is refused if its time budget does not hold the baselines. A resumed search may have too
            # little time left, and the machine may have become slower since the first baseline began.
            begun = self.resumed or any(t.kind == "baseline" and not t.running for t in self._trials.values())
            known = any(t.kind == "baseline" and t.status is Status.COMPLETED for t in self._trials.values())
            if begun and not self._holds(self._time_budget.whole(), whole=not known):
                self._left_out.add(trial_id)
                takes, left = (
                    format_duration(max(0.0, time)) for time in (self._time_budget.whole(), self._time_budget.left())
                )
                self._notify(
                    f"{trial_id} {name} is left out: its training is expected to take {takes}, and {left} of the time "
                    "budget are left for trials, with export and test set aside; give it more --time"
                )
                continue
            point = self._question.space.point(strategy)
            trial = self._enter(strategy, trial_id=trial_id, number=None, kind="baseline", name=name, point=point)
            if trial.status is None:
                return self._assign(trial)
        return None

    def _baselines(self) -> Iterator[tuple[str, tuple[str, Strategy]]]:
        """Yield the ids, names and strategies of the space's baselines."""
        for index, item in enumerate(self._question.space.baselines.items()):
            yield f"b{index:03d}", item

    def untrained_baselines(self) -> list[str]:
        """Return the names of the baselines that were not trained before the time budget ended."""
        found = []
        for trial_id, (name, _) in self._baselines():
            trial = self._trials.get(trial_id)
            if trial is None or trial.status in (None, Status.STOPPED):
                found.append(name)
        return found

    def _promotion(self, *, extra: bool) -> Assignment | None:
        trial_id = self._scheduler.next_to_promote(self.in_flight(), self._proposals_over(), extra=extra)
        if trial_id is None:
            return None
        trial = self._trials[trial_id]
        first = self._first_to_finish()
        if first is not None and first.rung > trial.rung:
            beside = self._affordable(trial) and self._affordable(trial, self._reserve(), whole=True)
            trial = trial if beside else first
        if self._stages.busy(trial, self._trials.values()):
            return None
        # Training beyond the plan must leave time to evaluate the best student's rows.
        reserved = self._further_training.rows() if extra and first is None else 0.0
        if not self._affordable(trial, reserved, whole=trial is first or extra):
            return None
        return self._assign(trial)

    def _first_to_finish(self) -> TrialState | None:
        """Return the waiting trial that is nearest to the end, which is to be the first student to get there.

        Return None if a student has reached the end, is on its way there, or is running further ahead than this trial.
        """
        running = [trial for trial in self._trials.values() if trial.running and trial.kind == "student"]
        last = len(self._question.plan.rungs) - 1
        ended = any(trial.kind == "student" for trial in self._trained())
        if ended or any(self._assign(trial).rung == last for trial in running):
            return None
        trial_id = self._scheduler.furthest(self.in_flight())
        if trial_id is None:
            return None
        waiting = self._trials[trial_id]
        # A running trial that is further ahead will reach the end first.
        return None if any(self._assign(trial).rung > waiting.rung + 1 for trial in running) else waiting

    def _reserve(self) -> float:
        """Return the seconds to reserve for the first trial that is to reach the end.

        If the time no longer holds its way to the end, it is the way to the highest rung that the time holds. On a
        machine that became slower, the plan may no longer hold. Nothing else may then begin that would take this time.
        """
        first = self._first_to_finish()
        if first is None:
            return 0.0
        above = range(first.rung + 1, len(self._question.plan.rungs))
        needs = (self._time_budget.up_to(first.task, first.rung, rung) for rung in reversed(above))
        return next(
            (_RESERVE_FACTOR * seconds for seconds in needs if self._time_budget.holds(seconds, whole=True)), 0.0
        )

    def _keep_unfinished_best(self) -> Assignment | None:
        """Return work that keeps the best student as its last rung judged it, as the last resort.

        This happens if no trial reaches the end and nothing else is left. Its decay is trained once more, because the
        decayed weights of rungs are not kept. If no trial was judged, one that was to go straight to the end is judged
        at the furthest rung that it passed.
        """
        trials = self._trials.values()
        if self._trained() or any(trial.running or trial.kept for trial in trials):
            return None
        if sum(trial.kept is False for trial in trials) >= _MOST_KEEP_ATTEMPTS:
            return None
        left = [trial for trial in trials if trial.status is None and trial.kept is None and trial.task.length == 1]
        left = [trial for trial in left if trial.kind != CONFIRMATION]
        judged = [(trial, trial.rung) for trial in self._best_first(left)]
        passed = [(trial, rung) for rung in reversed(range(len(self._question.plan.rungs) - 1)) for trial in left]
        for trial, rung in (*judged, *((trial, rung) for trial, rung in passed if trial.rung < 0)):
            if self._stages.branched(trial, rung):
                return Assignment(task=trial.task, rung=rung, keep=True)
        return None

    def _longer(self) -> Assignment | None:
        """Return extended training of the best few and the best baseline.

        This happens if the space asks for it, once all other trials have ended.
        """
        under_way = any(trial.running and trial.task.length == 1 for trial in self._trials.values())
        if under_way or not self._proposals_over():
            return None
        found = next_longer(self._trained(), self._question.plan.lengths, self._trials)
        if found is None or any(t.running and t.task.stage == found[0].task.stage != "" for t in self._trials.values()):
            return None
        original, length = found
        task = replace(original.task, length=length)
        if not self._time_budget.holds(self._time_budget.expected(Assignment(task=task, rung=original.rung), -1)):
            return None
        return self._assign(self._once_more(original, lengthened(task.id, length), original.kind, length))

    def _once_more(self, original: TrialState, trial_id: str, kind: str, length: float, **fields: Any) -> TrialState:
        """Enter a trial of the same strategy as another one: a longer training, or one with another seed."""
        task = original.task
        place = {"number": None, "name": original.name, "point": None}
        return self._enter(task.strategy, trial_id=trial_id, kind=kind, length=length, **place, **fields)

    def _to_train_on(self) -> Continuation | None:
        """Return the best trial to train further in the time left, once all others have ended.

        On a machine without an accelerator it trains alone, on all threads. On others the next best trains at the same
        time.
        """
        plan, first = self._question.plan, self._first_to_finish()
        if plan.longest <= 1 or not self._proposals_over() or (first and self._affordable(first, whole=True)):
            return None
        running = [trial for trial in self._trials.values() if trial.running]
        if any(plan.alone or trial.task.length == 1 for trial in running):
            return None
        return self._further_training.next(self._believed_first(), {trial.task.stage for trial in running} - {""})

    def _training_on(self) -> Assignment | None:
        found = self._to_train_on()
        if found is None:
            return None
        original, assignment = found.original, found.assignment
        if found.decided is not None:
            self._decide(found.decided)
            self.take(found.decided)
        trial_id, length = trained_on(original.task.id), assignment.task.length
        # A training that began before the search was killed goes on.
        trial = self._trials.get(trial_id) or self._once_more(original, trial_id, original.kind, length)
        return replace(assignment, task=replace(trial.task, length=length, decay=assignment.task.decay))

    def take(self, trunk: Trunk) -> None:
        """Keep to what was decided about a trunk, in this session or an earlier one."""
        self._further_training.trunks[trunk.trial] = trunk

    def _confirmation(self) -> Assignment | None:
        """Return a training of one of the best on a further seed, once the trials of the plan have ended.

        The best few students and the best baseline are trained on each further seed.
        """
        seeds = range(self._question.plan.seed + 1, self._question.plan.seed + 1 + self._question.confirm)
        under_way = any(trial.running and trial.kind != CONFIRMATION for trial in self._trials.values())
        if not seeds or under_way or not self._proposals_over():
            return None
        trained = self._trained()
        students = [trial for trial in trained if trial.kind == "student"][:CONFIRMED]
        baselines = [trial for trial in trained if trial.kind == "baseline"][:1]
        for seed in seeds:
            for original in (*students, *baselines):
                trial_id = confirming(original.task.id, seed)
                if trial_id in self._trials:
                    continue
                task = replace(original.task, stage="")
                if not self._time_budget.holds(
                    self._time_budget.expected(Assignment(task=task, rung=original.rung), -1)
                ):
                    return None
                return self._assign(self._once_more(original, trial_id, CONFIRMATION, task.length, seed=seed))
        return None

    def _evaluation(self) -> Assignment | None:
        """Return an evaluation of a trained student under a deployment without a row, the best student first."""
        if not self._time_budget.holds(self._time_budget.evaluation(), whole=True):
            return None
        for trial in self._trained():
            further = self._trials.get(trained_on(trial.task.id))
            if further and further.status is Status.COMPLETED and not self._question.further:
                # The student that was trained further stands for this one, under each deployment.
                continue
            for deployment in trial.unseen:
                return Assignment(task=trial.task, rung=trial.rung, deployment=deployment)
        return None

    def _trained(self) -> list[TrialState]:
        """Return the trials at full fidelity, the best first."""
        return self._best_first(trial for trial in self._trials.values() if trial.status is Status.COMPLETED)

    def _believed_first(self) -> list[TrialState]:
        """Return the trained trials, the best first; after a race, the earliest proposal among its best leads.

        These are the students that the race cannot tell apart. A race has few steps, which favour what is learned
        early. But this choice is about a long training, so the belief from before the race decides.
        """
        trained = self._trained()
        if not self._question.raced or not trained or trained[0].task.length > 1:
            return trained
        level = [one for one in trained if one.kind == "student" and one.task.length == 1]
        behind = self._behind(level)
        first = min((one for one in level if one.task.id not in behind), key=_proposed, default=trained[0])
        return [first, *(one for one in trained if one is not first)]

    def _best_first(self, trials: Iterable[TrialState]) -> list[TrialState]:
        """Return the trials that have a value, from the highest rung downwards, and within a rung the best first."""
        sign = -1.0 if self._question.judge_direction == "max" else 1.0
        ranked = sorted((-t.rung, sign * t.judged, t.task.id) for t in trials if t.judged is not None)
        return [self._trials[trial_id] for _, _, trial_id in ranked]

    def _proposal(self) -> Assignment | None:
        while self._rejected_in_a_row() < REJECTIONS_IN_A_ROW:
            if self._proposals_over():
                return None
            number = sum(trial.number is not None for trial in self._trials.values())
            point = self._sampler.propose(number, self._observations())
            if point is None:
                self.exhausted = True
                return None
            strategy = self._question.space.strategy(point)
            trial = self._enter(
                strategy,
                trial_id=f"t{number:03d}",
                number=number,
                kind="student",
                name=strategy.describe(),
                point=point,
            )
            if trial.status is None:
                return self._assign(trial)
        self.exhausted = True
        return None

    def _rejected_in_a_row(self) -> int:
        """Count how many of the latest proposals were rejected in a row, including those of earlier sessions."""
        proposed = (trial for trial in reversed(self._trials.values()) if trial.number is not None)
        return sum(1 for _ in takewhile(lambda trial: trial.status is Status.REJECTED, proposed))

    def _all_proposed(self) -> bool:
        # Rejected trials cost nothing and do not count.
        counted = sum(t.number is not None and t.status is not Status.REJECTED for t in self._trials.values())
        return self.exhausted or counted >= self._question.plan.trials

    def _proposals_over(self) -> bool:
        first, reserve = self._time_budget.first_segment(), self._reserve()
        if not any(trial.number is not None and not trial.reason for trial in self._trials.values()):
            # At least one trial must be trained, even in the time that is set aside for further training.
            return self._all_proposed() or not self._time_budget.holds(first, whole=True)
        return self._all_proposed() or not (self._holds(first) and self._time_budget.holds(first + reserve, whole=True))

    def _holds(self, seconds: float, *, whole: bool = False) -> bool:
        """Return whether the time left holds so many seconds of work.

        Args:
            seconds: Expected time of the work.
            whole: Whether the work may use the time that is set aside for training the best further.
        """
        if whole or self._further_training.sets_aside(self._trained()):
            return self._time_budget.holds(seconds, whole=whole)
        # After the further training, the rows of the best student get the time that it left.
        after = (
            self._further_training.rows()
            if any(self._further_training.is_further_training(trial.task) for trial in self._trials.values())
            else 0.0
        )
        return self._time_budget.holds(seconds + after, whole=True)

    def in_flight(self) -> set[str]:
        """Return the ids of the trials that a worker is training towards a rung."""
        return {t.task.id for t in self._trials.values() if t.running and not t.task.straight}

    def idle(self) -> bool:
        """Return whether nothing more will begin, given that nothing is running."""
        started = all(trial_id in self._trials or trial_id in self._left_out for trial_id, _ in self._baselines())
        extra = self._time_budget.deadline is not None
        waiting = self._scheduler.next_to_promote(self.in_flight(), True, extra=extra)
        untouched = [t for t in self._trials.values() if t.status is None and t.rung < 0]
        untouched = [t for t in untouched if not self._further_training.is_further_training(t.task)]
        paused = [self._trials[waiting], self._first_to_finish() or self._trials[waiting]] if waiting else []
        affordable = [t for t in (*untouched, *paused) if self._affordable(t)]
        over = started and self._proposals_over() and not affordable
        over = over and self._further_training.next(self._trained(), ()) is None
        return over and self._evaluation() is None and self._keep_unfinished_best() is None

    def _assign(self, trial: TrialState) -> Assignment:
        last = len(self._question.plan.rungs) - 1
        return Assignment(task=trial.task, rung=last if trial.task.straight else trial.rung + 1)

    def _affordable(self, trial: TrialState, reserved: float = 0.0, *, whole: bool = False) -> bool:
        return self._holds(self._time_budget.expected(self._assign(trial), trial.rung) + reserved, whole=whole)

    def _observations(self) -> list[Observation]:
        return [observation(trial, self._question) for trial in self._trials.values() if trial.point is not None]


def _proposed(trial: TrialState) -> float:
    """Return the sort key of a trial by proposal: what is believed to be best is proposed first."""
    return math.inf if trial.number is None else trial.number


def observation(trial: TrialState, question: Question) -> Observation:
    """Return what the sampler learns from a trial that lies in the space."""
    assert trial.point is not None
    plan = question.plan
    # A strategy that conflicts with this teacher is out of bounds, whatever memory it would need.
    slack = trial.candidate.slack
    if trial.status is Status.REJECTED:
        slack = max(1e-9, slack)
    elif trial.cause == "out-of-memory":
        slack = max(_TOO_MUCH, slack)
    waiting: Literal["paused", "running"] = "paused" if trial.rung >= 0 and not trial.running else "running"
    return Observation(
        point=trial.point,
        state=trial.status or waiting,
        value=trial.judged,
        further=trial.further,
        fidelity=plan.rungs[trial.rung] / plan.tokens if trial.rung >= 0 else 0.0,
        constraint=slack,
    )
