"""How long each part of a search is expected to take, from the speed that was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from autodistill.data.dataset import SEQUENCE_LENGTH
from autodistill.search.algorithms.successive_halving import DECAY, confirmed, kept_at_rungs, rung_tokens
from autodistill.search.planning.placement import Workers

_GENERAL = 8192  # tokens at most of the general text by which is told what a student forgot
_LEAST_EVALUATED = 1024  # tokens: the standard error of an accuracy of one half is then about 0.016
# Tokens: of the difference of two students it is then about 0.003, and training is of more use than a smaller one.
_MOST_EVALUATED = 16384
CACHING, TRAINING = 1.4, 1.1
"""What caching and training take beyond what was timed: writing, the optimiser, reading."""
# Seconds a weight of the teacher, of a core of the two servers that this was read off: a trained student is loaded and
# packed; beside that, one is built, restored and saved for each segment of training.
_PACKED, _BUILT = 1.5e-8, 2.5e-8
# Likewise: scales are searched for, and the errors of each column spread over those behind it.
_MADE_UP = 1.5e-7
CALIBRATION_TOKENS = 4096
"""Of training text, by which the errors of rounding are made up for."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the short measurement found, in tokens per second.

    Attributes:
        cache: Teacher forward in the cache's precision, on all threads.
        score: Teacher forward in the precision of scoring, on all threads.
        worker_train: A training step of the largest student, as large as the plan's are, on one of all busy workers.
        worker_score: Its forward in the precision of scoring, likewise.
        alone: A training step of one worker on all threads, with nothing beside it; 0 where that was not timed.
        at_once: Sequences of such a step, in one pass.
        asked: Seconds, not a rate: what is measured beside the scores takes so long for each evaluation, on a worker.
        labels_train, labels_alone: As `worker_train` and `alone`, of students that learn from the labels alone, where
            the teacher reads the tokens of others in each step; 0 where it reads for none.
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
        """Of a worker that trains the best on."""
        return max(self.alone, self.worker_train)

    def with_teacher_beside(self) -> Speed:
        """The speed of training where the teacher reads each step's tokens too."""
        return replace(
            self,
            worker_train=1 / (1 / self.worker_train + 1 / self.worker_score),
            alone=self.alone and 1 / (1 / self.alone + 1 / self.score),
            labels_train=self.worker_train,
            labels_alone=self.alone,
        )

    def by_labels(self) -> Speed:
        """The speed of training by the labels alone, for which the teacher reads nothing."""
        if not self.labels_train:
            return self
        return replace(self, worker_train=self.labels_train, alone=self.labels_alone)

    def with_side_by_side(self, processes: int) -> Speed:
        """The speed where one worker that is alone may train in so many processes, each as fast as one of several."""
        return replace(
            self,
            alone=max(self.alone, processes * self.worker_train),
            labels_alone=max(self.labels_alone, processes * self.labels_train),
        )

    def with_steps_longer(self, seconds: float, tokens: int) -> Speed:
        """The speed of training whose steps, of so many tokens, take so many seconds more than was timed."""
        names = ("worker_train", "alone", "labels_train", "labels_alone")
        timed = {name: getattr(self, name) for name in names}
        return replace(self, **{name: rate / (1 + rate * seconds / tokens) for name, rate in timed.items()})


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a plan is made for.

    Attributes:
        box_seconds: Time budget, or None.
        spent_seconds: Of the time budget, before planning.
        trials, tokens: Fixed by the user, or None.
        baselines: Strategies that run first, to the full plan.
        teacher_deployments: That the teacher is evaluated under.
        deployments: That a student at full fidelity is evaluated under, at most.
        train_tokens, validation_tokens, test_tokens: Tokens there are.
        cached_tokens: Training tokens of which the teacher's outputs may be kept, as many as of a trial at least.
        parameters: Of the teacher.
        seed: Of the search.
        ray: Whether workers are processes of their own.
        sequence_length: Tokens of a sequence.
        step_tokens: Of an optimiser step, whole sequences.
        confirm: Further seeds that the best few and the best baseline are trained on.
        longest: How many times a trial's tokens the best are trained on to, as the space asks for; their time is what
            the time budget has left.
        explore: Share of the time for training that goes to trials; in the rest the best are trained on.
        rates: Share of the time budget that a test of learning rates takes.
        caches: Whether outputs of the teacher are cached before the first trial.
        arms: Of a race, that are proposed first; 0 of a search without one.
        proposed: Whether others are proposed beside these.
        made_up: How many of these begin with codes that make up for the errors of their rounding.
        exports: Kinds of files that are written and measured: of the best student, and as GGUF where it is another.
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
    """Return the tokens read at a rung, at full fidelity and on test: what the time allows, at least 4 sequences and
    1,024, at full fidelity 16,384 at most.
    """
    if demand.box_seconds is None:
        return min(demand.validation_tokens, 2048), min(demand.validation_tokens, 4096), min(demand.test_tokens, 8192)
    # One forward over the validation tokens by the teacher takes this share of the time budget, whole sequences of it.
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
    """Expected seconds of all phases but training, with the teacher's outputs for so many tokens."""
    _, full_eval, test = evaluated_tokens(demand, speed)
    # Packing, writing, reading back and running a student: seconds a weight, measured on one core of a server, of 135M
    # weights and of 2M. A third of them goes into 2,000 positions in the runtime. It then serves once.
    written, served = 2.5 + 1.5e-7 * demand.parameters, 1.0 + 6e-8 * demand.parameters
    # Teacher, student and what is best untrained read general text. The best is seldom written in a second container.
    general = 3 * min(_GENERAL, full_eval) / speed.score + 2 * _PACKED * demand.parameters
    # The teacher as it is and in the found student's storage, and that student; where it did not begin as the teacher,
    # also what it began with, before that on validation too, and the best without training. With a baseline that, and
    # the found one as it was after as many tokens.
    as_teacher = bool(demand.arms) and not demand.made_up
    rows = (3 if as_teacher else 5) + (0 if not demand.baselines else 2 if demand.explore == 1 else 3)
    beginning = 0.0 if as_teacher else full_eval / speed.score
    one_row = speed.asked + _PACKED * demand.parameters
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
    """Expected seconds in which the codes of a student are found that make up for the errors of their rounding.

    Of the text two passes are made through each block. What a cut is repaired by is known from where it was solved.
    """
    return 2 * CALIBRATION_TOKENS / speed.score + _MADE_UP * parameters


def caching_seconds(demand: Demand, speed: Speed, tokens: float) -> float:
    """Expected seconds in which the teacher's outputs for so many tokens are cached; 0 where none are."""
    return min(tokens, demand.train_tokens) / speed.cache * CACHING if demand.caches else 0.0


def trial_seconds(tokens: int, eval_tokens: int, parameters: int, speed: Speed, *, judged: bool) -> float:
    """Expected seconds on one worker of a segment of training and the evaluation of one deployment at its end.

    Args:
        tokens: Training tokens of the segment.
        eval_tokens: Tokens that the evaluation reads.
        parameters: Of the teacher.
        speed: As measured.
        judged: Whether the segment ends at a rung that trains on afterwards, so that its decay is extra work.
    """
    train = tokens * (1 + (DECAY if judged else 0)) / speed.worker_train
    return TRAINING * train + beside_seconds(eval_tokens, parameters, speed)


def trained_in(seconds: float, eval_tokens: int, parameters: int, rate: float, speed: Speed) -> int:
    """Return the tokens that a worker trains on in so many seconds, of `rate` a second as timed, with an evaluation at
    the end.
    """
    return int((seconds - beside_seconds(eval_tokens, parameters, speed)) * rate / TRAINING)


def evaluation_seconds(eval_tokens: int, parameters: int, speed: Speed) -> float:
    """Expected seconds on one worker of one deployment: the student is loaded, packed and scored."""
    return eval_tokens / speed.worker_score + _PACKED * parameters + speed.asked


def beside_seconds(eval_tokens: int, parameters: int, speed: Speed) -> float:
    """Expected seconds of a segment of training but for its steps."""
    return evaluation_seconds(eval_tokens, parameters, speed) + _BUILT * parameters


def trials_seconds(demand: Demand, speed: Speed, workers: Workers, trials: int, tokens: int) -> float:
    """Expected seconds of all trials, and of the best one's other deployments.

    Shared out over the workers, but never less than one trial takes to the end, and what follows it.
    """
    rows = _rows(demand, speed) / workers.count
    return max(
        shared_seconds(demand, speed, trials, tokens) / workers.count,
        path_seconds(demand, speed, trials, tokens) + rows,
    )


def _rows(demand: Demand, speed: Speed) -> float:
    """Expected seconds of the best one's other deployments, one after another."""
    _, full_eval, _ = evaluated_tokens(demand, speed)
    return (demand.deployments - 1) * evaluation_seconds(full_eval, demand.parameters, speed)


def path_seconds(demand: Demand, speed: Speed, trials: int, tokens: int) -> float:
    """Expected seconds of one trial that passes every rung, or of a baseline where nothing else is trained."""
    rungs = rung_tokens(tokens, demand.step_tokens) if trials else (tokens,)
    rung_eval, full_eval, _ = evaluated_tokens(demand, speed)
    segments = [(rung - reached, rung == tokens) for rung, reached in zip(rungs, (0, *rungs), strict=False)]
    return sum(
        trial_seconds(segment, full_eval if last else rung_eval, demand.parameters, speed, judged=not last)
        for segment, last in segments
    )


def shared_seconds(demand: Demand, speed: Speed, trials: int, tokens: int) -> float:
    """Expected seconds of all trials, and of the best one's other deployments, one after another."""
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
