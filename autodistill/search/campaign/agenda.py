"""What a search does next: what was begun, baselines, promotions, proposals, and what the time budget has left for."""

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

# A space of which nearly nothing fits must not keep the sampler proposing for ever.
REJECTIONS_IN_A_ROW = 200

# log(need / memory) of a training that ran out of memory, as the sampler is told it: nobody knows by how much.
_TOO_MUCH = 0.1

# What is reserved for the first trial to reach the end, in what that is expected to take.
_SPARE = 1.1

# Students short of the end that could not be kept: a disk that is full, say, holds the next no better.
_TRIED = 3


class Agenda:
    """Chooses the next piece of work from where the trials of a campaign stand; writes nothing down itself.

    Args:
        question: What is searched for.
        trials: Of the campaign, by id, as they are at any moment.
        box: The time that is left.
        sampler: Proposes points.
        scheduler: Says which trial goes on past its rung.
        stages: Knows which trials wait for another's checkpoint.
        enter: Makes a new trial of a strategy, and writes it down.
        evaluating: Whether a trained student is being evaluated.
        decide: Writes down what is decided of a trunk, before it is acted on.
        behind: Ids of those trials that are clearly behind the best of them.
        notify: Told of what is left out.

    Attributes:
        exhausted: Whether the space has nothing left to propose.
        resumed: Whether earlier sessions took of the time budget.
    """

    def __init__(
        self,
        question: Question,
        *,
        trials: dict[str, TrialState],
        box: TimeBudget,
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
        self._box = box
        self._rest = TrainingOn(question, trials, box, stages.checkpoints)
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
        """The next piece of work, None while there is none.

        Training comes first. Once nothing is left to be trained, trained students are evaluated under the deployments
        that their rungs were not judged on, the best student first: small pieces, which keep every worker busy while
        the last trial trains. Where no trial reaches the end, the best one is kept as its last rung judged it. Beside a
        trial that has all threads nothing runs.
        """
        if any(trial.running and self._rest.threads(trial.task) for trial in self._trials.values()):
            return None
        assignment = (
            self._interrupted()
            or self._baseline()
            or self._promotion(extra=False)
            or self._proposal()
            # Where the space has no more, rungs are closed that were not.
            or self._promotion(extra=False)
            or self._longer()
        )
        if assignment is None and self._question.plan.alone and self._evaluating() and self._to_train_on() is not None:
            # It begins once what is evaluated has ended; no more of that is given out.
            return None
        assignment = assignment or self._training_on() or self._confirmation()
        if assignment is None and self._box.deadline is not None:
            # Time is left: trials beyond the plan's number may go on, if it is not for the best.
            idle = not any(trial.running for trial in self._trials.values())
            if idle or not self._rest.sets_aside(self._trained()):
                assignment = self._promotion(extra=True)
        return assignment or self._evaluation() or self._early()

    def _interrupted(self) -> Assignment | None:
        """A trial that was proposed but has not reached its first rung: its worker, or the whole search, was killed."""
        for trial in self._trials.values():
            waits = trial.status is None and not trial.running and trial.rung < 0
            if not waits or self._rest.is_one(trial.task):
                continue
            # One that goes straight to the end is itself on its way there.
            straight = trial.task.straight
            if self._affordable(trial, reserved=0.0 if straight else self._reserve(), whole=straight):
                return self._assign(trial)
        return None

    def _baseline(self) -> Assignment | None:
        for trial_id, (name, strategy) in self._baselines():
            if trial_id in self._trials or trial_id in self._left_out:
                continue
            # A new search was refused where its box does not hold them; of a resumed one too little may be left, and
            # the machine may have become slower since the first of them began.
            begun = self.resumed or any(t.kind == "baseline" and not t.running for t in self._trials.values())
            known = any(t.kind == "baseline" and t.status is Status.COMPLETED for t in self._trials.values())
            if begun and not self._holds(self._box.whole(), whole=not known):
                self._left_out.add(trial_id)
                takes, left = (format_duration(max(0.0, time)) for time in (self._box.whole(), self._box.left()))
                self._notify(
                    f"{trial_id} {name} is left out: its training is expected to take {takes}, and of the time budget "
                    f"{left} are left for trials, with export and test set aside; give it more --time"
                )
                continue
            point = self._question.space.point(strategy)
            trial = self._enter(strategy, trial_id=trial_id, number=None, kind="baseline", name=name, point=point)
            if trial.status is None:
                return self._assign(trial)
        return None

    def _baselines(self) -> Iterator[tuple[str, tuple[str, Strategy]]]:
        """Ids, names and strategies of the space's baselines."""
        for index, item in enumerate(self._question.space.baselines.items()):
            yield f"b{index:03d}", item

    def untrained_baselines(self) -> list[str]:
        """Return the names of the baselines that the time budget ended before."""
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
        first = self._first()
        if first is not None and first.rung > trial.rung:
            beside = self._affordable(trial) and self._affordable(trial, self._reserve(), whole=True)
            trial = trial if beside else first
        if self._stages.busy(trial, self._trials.values()):
            return None
        # What is trained beyond the plan must leave time for what the best student's rows are read for.
        reserved = self._rest.rows() if extra and first is None else 0.0
        if not self._affordable(trial, reserved, whole=trial is first or extra):
            return None
        return self._assign(trial)

    def _first(self) -> TrialState | None:
        """While no student has reached the end, or is on its way there: the one that is to, the nearest to it."""
        running = [trial for trial in self._trials.values() if trial.running and trial.kind == "student"]
        last = len(self._question.plan.rungs) - 1
        ended = any(trial.kind == "student" for trial in self._trained())
        if ended or any(self._assign(trial).rung == last for trial in running):
            return None
        trial_id = self._scheduler.furthest(self.in_flight())
        if trial_id is None:
            return None
        waiting = self._trials[trial_id]
        # What is on its way further than this has a worker, and is the one to get there.
        return None if any(self._assign(trial).rung > waiting.rung + 1 for trial in running) else waiting

    def _reserve(self) -> float:
        """Return the seconds that this trial takes to the end, or else to the highest rung up to which the time still
        holds it.

        On a machine that became slower the plan may no longer hold; nothing else begins that would take this time.
        """
        first = self._first()
        if first is None:
            return 0.0
        above = range(first.rung + 1, len(self._question.plan.rungs))
        needs = (self._box.up_to(first.task, first.rung, rung) for rung in reversed(above))
        return next((_SPARE * seconds for seconds in needs if self._box.holds(seconds, whole=True)), 0.0)

    def _early(self) -> Assignment | None:
        """Return where no trial reaches the end, and nothing else is left: the best, to be kept as its last rung judged
        it.

        Its decay is trained once more, since decayed weights of rungs are not kept. Where none was judged, one that was
        to go straight to the end is judged at the furthest rung that it passed.
        """
        trials = self._trials.values()
        if self._trained() or any(trial.running or trial.kept for trial in trials):
            return None
        if sum(trial.kept is False for trial in trials) >= _TRIED:
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
        """The best few and the best baseline trained on, where the space asks for that, once all others have ended."""
        under_way = any(trial.running and trial.task.length == 1 for trial in self._trials.values())
        if under_way or not self._proposals_over():
            return None
        found = next_longer(self._trained(), self._question.plan.lengths, self._trials)
        if found is None or any(t.running and t.task.stage == found[0].task.stage != "" for t in self._trials.values()):
            return None
        original, length = found
        task = replace(original.task, length=length)
        if not self._box.holds(self._box.expected(Assignment(task=task, rung=original.rung), -1)):
            return None
        return self._assign(self._once_more(original, lengthened(task.id, length), original.kind, length))

    def _once_more(self, original: TrialState, trial_id: str, kind: str, length: float, **fields: Any) -> TrialState:
        """Enter a trial of the same strategy as another one: a longer training, or one with another seed."""
        task = original.task
        place = {"number": None, "name": original.name, "point": None}
        return self._enter(task.strategy, trial_id=trial_id, kind=kind, length=length, **place, **fields)

    def _to_train_on(self) -> Continuation | None:
        """The best, to be trained on in what time is left once all others have ended: alone on all threads of a
        machine without an accelerator, elsewhere with the next best beside it.
        """
        plan, first = self._question.plan, self._first()
        if plan.longest <= 1 or not self._proposals_over() or (first and self._affordable(first, whole=True)):
            return None
        running = [trial for trial in self._trials.values() if trial.running]
        if any(plan.alone or trial.task.length == 1 for trial in running):
            return None
        return self._rest.next(self._believed_first(), {trial.task.stage for trial in running} - {""})

    def _training_on(self) -> Assignment | None:
        found = self._to_train_on()
        if found is None:
            return None
        original, assignment = found.original, found.assignment
        if found.decided is not None:
            self._decide(found.decided)
            self.take(found.decided)
        trial_id, length = trained_on(original.task.id), assignment.task.length
        # One that was begun before the search was killed goes on.
        trial = self._trials.get(trial_id) or self._once_more(original, trial_id, original.kind, length)
        return replace(assignment, task=replace(trial.task, length=length, decay=assignment.task.decay))

    def take(self, trunk: Trunk) -> None:
        """Keep to what was decided of a trunk, in this session or an earlier one."""
        self._rest.trunks[trunk.trial] = trunk

    def _confirmation(self) -> Assignment | None:
        """The best few and the best baseline on further seeds, once the trials of the plan have ended."""
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
                if not self._box.holds(self._box.expected(Assignment(task=task, rung=original.rung), -1)):
                    return None
                return self._assign(self._once_more(original, trial_id, CONFIRMATION, task.length, seed=seed))
        return None

    def _evaluation(self) -> Assignment | None:
        """A deployment of a trained student that nobody has looked at, of the best student first."""
        if not self._box.holds(self._box.evaluation(), whole=True):
            return None
        for trial in self._trained():
            further = self._trials.get(trained_on(trial.task.id))
            if further and further.status is Status.COMPLETED and not self._question.further:
                # What it became after more training stands for it, under each deployment.
                continue
            for deployment in trial.unseen:
                return Assignment(task=trial.task, rung=trial.rung, deployment=deployment)
        return None

    def _trained(self) -> list[TrialState]:
        """Return the trials at full fidelity, the best first."""
        return self._best_first(trial for trial in self._trials.values() if trial.status is Status.COMPLETED)

    def _believed_first(self) -> list[TrialState]:
        """As `_trained`; of what a race could not tell apart what was believed to be best beforehand comes first.

        The few steps of a race favour what is learnt soonest, and it is a long training that is decided here.
        """
        trained = self._trained()
        if not self._question.raced or not trained or trained[0].task.length > 1:
            return trained
        level = [one for one in trained if one.kind == "student" and one.task.length == 1]
        behind = self._behind(level)
        first = min((one for one in level if one.task.id not in behind), key=_proposed, default=trained[0])
        return [first, *(one for one in trained if one is not first)]

    def _best_first(self, trials: Iterable[TrialState]) -> list[TrialState]:
        """Return those that have a value, from the highest rung downwards, and of a rung the best first."""
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
        """Of the latest proposals, those of earlier sessions among them."""
        proposed = (trial for trial in reversed(self._trials.values()) if trial.number is not None)
        return sum(1 for _ in takewhile(lambda trial: trial.status is Status.REJECTED, proposed))

    def _all_proposed(self) -> bool:
        # Rejected trials cost nothing and do not count.
        counted = sum(t.number is not None and t.status is not Status.REJECTED for t in self._trials.values())
        return self.exhausted or counted >= self._question.plan.trials

    def _proposals_over(self) -> bool:
        first, reserve = self._box.first_segment(), self._reserve()
        if not any(trial.number is not None and not trial.reason for trial in self._trials.values()):
            # Something is to be trained, whatever is set aside for training it on.
            return self._all_proposed() or not self._box.holds(first, whole=True)
        return self._all_proposed() or not (self._holds(first) and self._box.holds(first + reserve, whole=True))

    def _holds(self, seconds: float, *, whole: bool = False) -> bool:
        """Return whether the time holds so many seconds of work, all or without what is set aside for the best."""
        if whole or self._rest.sets_aside(self._trained()):
            return self._box.holds(seconds, whole=whole)
        # Once the best was trained on, its rows have what it left.
        after = self._rest.rows() if any(self._rest.is_one(trial.task) for trial in self._trials.values()) else 0.0
        return self._box.holds(seconds + after, whole=True)

    def in_flight(self) -> set[str]:
        """Return the ids of the trials that a worker takes to a rung."""
        return {t.task.id for t in self._trials.values() if t.running and not t.task.straight}

    def idle(self) -> bool:
        """Return whether nothing will be begun any more, while nothing runs."""
        started = all(trial_id in self._trials or trial_id in self._left_out for trial_id, _ in self._baselines())
        extra = self._box.deadline is not None
        waiting = self._scheduler.next_to_promote(self.in_flight(), True, extra=extra)
        untouched = [t for t in self._trials.values() if t.status is None and t.rung < 0]
        untouched = [t for t in untouched if not self._rest.is_one(t.task)]
        paused = [self._trials[waiting], self._first() or self._trials[waiting]] if waiting else []
        affordable = [t for t in (*untouched, *paused) if self._affordable(t)]
        over = started and self._proposals_over() and not affordable
        over = over and self._rest.next(self._trained(), ()) is None
        return over and self._evaluation() is None and self._early() is None

    def _assign(self, trial: TrialState) -> Assignment:
        last = len(self._question.plan.rungs) - 1
        return Assignment(task=trial.task, rung=last if trial.task.straight else trial.rung + 1)

    def _affordable(self, trial: TrialState, reserved: float = 0.0, *, whole: bool = False) -> bool:
        return self._holds(self._box.expected(self._assign(trial), trial.rung) + reserved, whole=whole)

    def _observations(self) -> list[Observation]:
        return [observation(trial, self._question) for trial in self._trials.values() if trial.point is not None]


def _proposed(trial: TrialState) -> float:
    """The order of proposals, in which what is believed comes first."""
    return math.inf if trial.number is None else trial.number


def observation(trial: TrialState, question: Question) -> Observation:
    """Return what the sampler is told of a trial that lies in the space."""
    assert trial.point is not None
    plan = question.plan
    # A strategy that contradicts this teacher is out of bounds, whatever memory it would need.
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
