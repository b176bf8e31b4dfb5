"""How long each part of a search is expected to take at the measured speed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from autodistill.data.dataset import SEQUENCE_LENGTH
from autodistill.search.algorithms.successive_halving import DECAY, confirmed, kept_at_rungs, rung_tokens
from autodistill.search.planning.placement import Workers

_GENERAL = 8192  # most tokens of the general text that shows what a student forgot
_LEAST_EVALUATED = 1024  # tokens: the standard error of an accuracy of one half is then about 0.016
# Tokens: the standard error of the difference between two students is then about 0.003. A smaller error would be worth
# less than more training.
_MOST_EVALUATED = 16384
CACHING, TRAINING = 1.4, 1.1
"""Factors by which caching and training take longer than what was timed: writing, the optimiser, reading."""
# Seconds for each weight of the teacher on one core, measured on two servers. `_PACKED`: loading and packing a trained
# student. `_BUILT`: building, restoring and saving a student, which each segment of training adds.
_PACKED, _BUILT = 1.5e-8, 2.5e-8
# Seconds of a row on test for any number of weights: its model is loaded and its evaluators begin.
_ON_TEST = 0.7
# As above: searching for scales, and spreading the errors of each column over the columns after it.
_MADE_UP = 1.5e-7
CALIBRATION_TOKENS = 4096
"""Tokens of training text used to compensate for rounding errors."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Results of the short measurement, in tokens per second.

    Attributes:
        cache: Teacher forward in the cache's precision, on all threads.
        score: Teacher forward in the precision of scoring, on all threads.
        worker_train: Training step of the largest student, as large as the plan's steps, on one worker while all are
            busy.
        worker_score: Its forward in the precision of scoring, also on one worker while all are busy.
        alone: Training step of one worker on all threads while nothing else runs; 0 if that was not timed.
        at_once: Sequences of such a step, in one pass.
        asked: Seconds, not a rate: time on a worker that each evaluation takes for what is measured in addition to the
            scores.
        labels_train, labels_alone: As `worker_train` and `alone`, for students that learn from the labels alone, if the
            teacher reads the tokens of each step for other students; 0 if it reads for none.
    """

    cache: float
    score: float
    worker_train: float
    worker_score: float
    asked: float = 0.0
    alone: float = 0.0
    at_once: int = 1
    labels_train: float = 0.0
    labels_alone: float = 0.0

    @property
    def train_on(self) -> float:
        """Speed of a worker that trains the best student further."""
        return max(self.alone, self.worker_train)

    def with_teacher_beside(self) -> Speed:
        """Return the speed of training if the teacher also reads the tokens of each step."""
        return replace(
            self,
            worker_train=1 / (1 / self.worker_train + 1 / self.worker_score),
            alone=self.alone and 1 / (1 / self.alone + 1 / self.score),
            labels_train=self.worker_train,
            labels_alone=self.alone,
        )

    def by_labels(self) -> Speed:
        """Return the speed of training by the labels alone, for which the teacher reads nothing."""
        if not self.labels_train:
            return self
        return replace(self, worker_train=self.labels_train, alone=self.labels_alone)

    def with_side_by_side(self, processes: int) -> Speed:
        """Return the speed if a worker that runs alone may train in so many processes.

        Each process is as fast as one of several workers.
        """
        return replace(
            self,
            alone=max(self.alone, processes * self.worker_train),
            labels_alone=max(self.labels_alone, processes * self.labels_train),
        )

    def with_steps_longer(self, seconds: float, tokens: int) -> Speed:
        """Return the speed if each training step of so many tokens takes so many seconds more than was timed."""
        names = ("worker_train", "alone", "labels_train", "labels_alone")
        timed = {name: getattr(self, name) for name in names}
        return replace(self, **{name: rate / (1 + rate * seconds / tokens) for name, rate in timed.items()})


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a plan is made for.

    Attributes:
        box_seconds: Time budget in seconds, or None.
        spent_seconds: Seconds of the time budget that were spent before planning.
        trials, tokens: Set by the user, or None.
        baselines: Strategies that run first, to the full plan.
        teacher_deployments: Deployments that the teacher is evaluated under.
        deployments: Most deployments that a student at full fidelity is evaluated under.
        train_tokens, validation_tokens, test_tokens: Tokens of each split.
        cached_tokens: Training tokens whose teacher outputs may be kept, at least as many as a trial has.
        parameters: Weights of the teacher.
        seed: Seed of the search.
        ray: Whether workers are processes of their own.
        sequence_length: Tokens of a sequence.
        step_tokens: Tokens of an optimiser step, in whole sequences.
        confirm: Number of further seeds for the best few and the best baseline.
        longest: Multiple of a trial's tokens that the best are trained to, if the space asks for that. It uses the time
            that the budget has left.
        explore: Share of the training time that goes to trials. In the rest, the best are trained further.
        rates: Share of the time budget that a test of learning rates takes.
        caches: Whether the teacher's outputs are cached before the first trial.
        arms: Number of a race's arms, which are proposed first; 0 for a search without a race.
        proposed: Whether other strategies are proposed in addition to the arms.
        made_up: How many arms begin with codes that make up for the errors of their rounding.
        exports: Kinds of files that are written and measured: that of the best student, and GGUF if it is another one.
    """

    box_seconds: float | None
    spent_seconds: float
    trials: int | None
    tokens: int | None
    baselines: int
    teacher_deployments: int
    deployments: int
    train_tokens: int
    validation_tokens: int
    test_tokens: int
    parameters: int
    seed: int
    ray: bool
    sequence_length: int = SEQUENCE_LENGTH
    step_tokens: int = SEQUENCE_LENGTH
    confirm: int = 0
    longest: float = 1.0
    explore: float = 1.0
    cached_tokens: float = math.inf
    exports: int = 1
    rates: float = 0.0
    caches: bool = True
    arms: int = 0
    proposed: bool = True
    made_up: int = 0


def evaluated_tokens(demand: Demand, speed: Speed) -> tuple[int, int, int]:
    """Return the tokens that are read at a rung, at full fidelity and on test.

    They depend on the time, but are at least 4 sequences and 1,024. At full fidelity they are at most 16,384.
    """
    if demand.box_seconds is None:
        return min(demand.validation_tokens, 2048), min(demand.validation_tokens, 4096), min(demand.test_tokens, 8192)
    # The teacher's forward over the validation tokens takes this share of the time budget, rounded to whole sequences.
    length = demand.sequence_length
    affordable = min(int(0.007 * demand.box_seconds * speed.score), _MOST_EVALUATED) // length * length
    least = max(4 * length, -(-_LEAST_EVALUATED // length) * length)
    full = max(least, affordable)
    rung = max(least, affordable // 2 // length * length)
    return (
        min(demand.validation_tokens, rung),
        min(demand.validation_tokens, full),
        min(demand.test_tokens, 2 * full),
    )


def fixed_seconds(demand: Demand, speed: Speed, cached: int) -> Mapping[str, float]:
    """Return the expected seconds of all phases except training, with the teacher's outputs for so many tokens."""
    _, full_eval, test = evaluated_tokens(demand, speed)
    # Packing, writing, reading back and running a student: seconds for each weight, measured on one core of a server
    # with models of 135M and 2M weights. A third of the time goes into 2,000 positions in the runtime. Then the student
    # serves once.
    written, served = 2.5 + 1.5e-7 * demand.parameters, 1.0 + 6e-8 * demand.parameters
    # The teacher, the student and the best untrained row read general text. The best is seldom written in a second
    # container.
    general = 3 * min(_GENERAL, full_eval) / speed.score + 2 * _PACKED * demand.parameters
    # Rows on test: the teacher, the teacher in the found student's storage, and that student. If the student did not
    # begin as the teacher, also its beginning, which is first evaluated on validation, and the best without training.
    # With a baseline, also the baseline, and the found student as it was after as many tokens.
    as_teacher = bool(demand.arms) and not demand.made_up
    rows = (3 if as_teacher else 5) + (0 if not demand.baselines else 2 if demand.explore == 1 else 3)
    beginning = 0.0 if as_teacher else full_eval / speed.score
    one_row = speed.asked + _ON_TEST + 2 * _PACKED * demand.parameters
    return {
        "load": demand.spent_seconds,
        "cache": caching_seconds(demand, speed, cached) + full_eval / speed.score,
        "teacher": demand.teacher_deployments * (full_eval / speed.score + 8e-9 * demand.parameters + speed.asked),
        "rates": demand.rates * (demand.box_seconds or 0.0),
        "codes": demand.made_up * codes_seconds(demand.parameters, speed),
        "workers": 15.0 if demand.ray else 0.0,
        "export": general + (1 + demand.exports) / 2 * written + served,
        "test": rows * (test / speed.score + one_row) + beginning + one_row,
    }


def codes_seconds(parameters: int, speed: Speed) -> float:
    """Return the expected seconds to compute a student's codes that make up for the errors of their rounding.

    The text passes through each block twice. What repairs a cut is known from the solver.
    """
    return 2 * CALIBRATION_TOKENS / speed.score + _MADE_UP * parameters


def caching_seconds(demand: Demand, speed: Speed, tokens: float) -> float:
    """Return the expected seconds to cache the teacher's outputs for so many tokens; 0 if none are cached."""
    return min(tokens, demand.train_tokens) / speed.cache * CACHING if demand.caches else 0.0


def trial_seconds(tokens: int, eval_tokens: int, parameters: int, speed: Speed, *, judged: bool) -> float:
    """Return a worker's expected seconds for a segment of training and the evaluation of one deployment at its end.

    Args:
        tokens: Training tokens of the segment.
        eval_tokens: Tokens that the evaluation reads.
        parameters: Weights of the teacher.
        speed: The measured speed.
        judged: Whether training goes on after the rung at the segment's end, so that its decay is extra work.
    """
    train = tokens * (1 + (DECAY if judged else 0)) / speed.worker_train
    return TRAINING * train + segment_overhead_seconds(eval_tokens, parameters, speed)


def trained_in(seconds: float, eval_tokens: int, parameters: int, rate: float, speed: Speed) -> int:
    """Return the tokens that a worker trains on in so many seconds, with an evaluation at the end.

    `rate` is its tokens per second as timed.
    """
    return int((seconds - segment_overhead_seconds(eval_tokens, parameters, speed)) * rate / TRAINING)


def evaluation_seconds(eval_tokens: int, parameters: int, speed: Speed) -> float:
    """Return a worker's expected seconds for one deployment: the student is loaded, packed and scored."""
    return eval_tokens / speed.worker_score + _PACKED * parameters + speed.asked


def segment_overhead_seconds(eval_tokens: int, parameters: int, speed: Speed) -> float:
    """Return the expected seconds of a segment of training without its steps."""
    return evaluation_seconds(eval_tokens, parameters, speed) + _BUILT * parameters


def trials_seconds(demand: Demand, speed: Speed, workers: Workers, trials: int, tokens: int) -> float:
    """Return the expected seconds of all trials, and of the best one's other deployments.

    The work is divided over the workers, but takes at least as long as one trial to the end and what follows it.
    """
    rows = _rows(demand, speed) / workers.count
    return max(
        shared_seconds(demand, speed, trials, tokens) / workers.count,
        path_seconds(demand, speed, trials, tokens) + rows,
    )


def _rows(demand: Demand, speed: Speed) -> float:
    """Return the expected seconds of the best student's other deployments, one after another."""
    _, full_eval, _ = evaluated_tokens(demand, speed)
    return (demand.deployments - 1) * evaluation_seconds(full_eval, demand.parameters, speed)


def path_seconds(demand: Demand, speed: Speed, trials: int, tokens: int) -> float:
    """Return the expected seconds of one trial that passes every rung, or of a baseline if nothing else is trained."""
    rungs = rung_tokens(tokens, demand.step_tokens) if trials else (tokens,)
    rung_eval, full_eval, _ = evaluated_tokens(demand, speed)
    segments = [(rung - reached, rung == tokens) for rung, reached in zip(rungs, (0, *rungs), strict=False)]
    return sum(
        trial_seconds(segment, full_eval if last else rung_eval, demand.parameters, speed, judged=not last)
        for segment, last in segments
    )


def shared_seconds(demand: Demand, speed: Speed, trials: int, tokens: int) -> float:
    """Return the expected seconds of all trials, and of the best one's other deployments, one after another."""
    rungs = rung_tokens(tokens, demand.step_tokens)
    keep = kept_at_rungs(trials, len(rungs))
    rung_eval, full_eval, _ = evaluated_tokens(demand, speed)
    straight = trial_seconds(tokens, full_eval, demand.parameters, speed, judged=False)
    further = demand.confirm * confirmed(trials, keep, demand.baselines)
    total = (demand.baselines + further) * straight
    for rung, reached, count in zip(rungs, (0, *rungs), (trials, *keep), strict=False):
        last = rung == tokens
        eval_tokens = full_eval if last else rung_eval
        total += count * trial_seconds(rung - reached, eval_tokens, demand.parameters, speed, judged=not last)
    return total + _rows(demand, speed)
