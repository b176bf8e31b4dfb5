"""What a search will spend: trials, rungs and tokens from a short measurement and the time box."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from autodistill.contracts import SEQUENCE_LENGTH, Plan
from autodistill.distillation.schedule import branch_point
from autodistill.errors import InputError
from autodistill.search.share import Workers
from autodistill.units import format_duration

_REDUCTION = 3
_DECAY = 0.2
# With fewer optimiser steps than this at full fidelity, strategies cannot be told apart.
_FEWEST_STEPS = 24
# The first rung, a ninth of these, then still has those.
ENOUGH_STEPS = _FEWEST_STEPS * _REDUCTION**2
"""Optimiser steps that a trial at full fidelity must keep where steps are made larger for speed."""
WORTH = 1.15
"""A step of twice as many sequences is worth it where it trains so many times the tokens in a second."""
_LEAST_STEPS = 3
_LEAST_EVALUATED = 1024  # tokens: the standard error of an accuracy of one half is then about 0.016
_TRIALS = 12
_FINALISTS = 2
CONFIRMED = 3  # students that are trained on further seeds, where that is asked for
# Share of the box that is planned; the rest absorbs a machine that slows down.
_PLANNED_SHARE = 0.93
EXPLORE = 0.5
"""Share of the time for training that goes to trials, by default; in the rest the best are trained on."""
WORTHWHILE = 1.25
"""Nothing is trained on to fewer than so many times the plan's tokens: more than half would go into a second decay."""
# Passes over the data up to which repeating it teaches about as much as new text (Muennighoff et al., 2023,
# arXiv:2305.16264).
_PASSES = 4
FURTHER = 2.0
"""So many times as far as planned the best may be trained on, where trials leave more of the box than was expected."""
# What caching and training take beyond what was timed: writing, the optimiser, reading.
_CACHING, _TRAINING = 1.4, 1.1
# Seconds a weight of the teacher, of a core of the two servers that this was read off: a trained student is loaded and
# packed; beside that, one is built, restored and saved for each stretch of training.
_PACKED, _BUILT = 1.5e-8, 2.5e-8


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the short measurement found, in tokens per second.

    Attributes:
        cache: Teacher forward in the cache's precision, on all threads.
        score: Teacher forward in float32, on all threads.
        worker_train: A training step of the largest student, as large as the plan's are, on one of all busy workers.
        worker_score: Its forward in float32, likewise.
        alone: A training step of one worker on all threads, with nothing beside it; 0 where that was not timed.
        asked: Seconds, not a rate: what is measured beside the scores takes so long for each evaluation, on a worker.
    """

    cache: float
    score: float
    worker_train: float
    worker_score: float
    asked: float = 0.0
    alone: float = 0.0

    @property
    def train_on(self) -> float:
        """Of a worker that trains the best on."""
        return max(self.alone, self.worker_train)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a plan is made for.

    Attributes:
        box_seconds: Time box, or None.
        spent_seconds: Of the box, before planning.
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
            the box has left.
        explore: Share of the time for training that goes to trials; in the rest the best are trained on.
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


def step_sequences(rates: Mapping[int, float], steps: Callable[[int], int]) -> int:
    """How many sequences an optimiser step has, for each process of a trial: one, or more where that is faster.

    The fewest of which twice as many would not be worth it; but no more than leave a trial at full fidelity
    `ENOUGH_STEPS` steps, so that a rate bought with few steps does not cost what is learnt.

    Args:
        rates: Training tokens per second by number of sequences, each twice the one before.
        steps: Optimiser steps of a trial at full fidelity where they have so many sequences.
    """
    sizes = sorted(rates)
    worth = sizes[:1]
    for small, large in pairwise(sizes):
        if rates[large] < WORTH * rates[small]:
            break
        worth.append(large)
    return next((size for size in reversed(worth) if steps(size) >= ENOUGH_STEPS), sizes[0])


def fewest_tokens(step_tokens: int, asked: int | None = None) -> int:
    """Training tokens of a trial, in whole steps, where so many are asked for, or else the fewest that are planned."""
    return max(step_tokens * _LEAST_STEPS, (asked or 0) // step_tokens * step_tokens)


def check_box(demand: Demand, speed: Speed, workers: Workers) -> None:
    """Refuses a time box that does not hold the training of the baselines, or of one trial, and all that it needs.

    Raises:
        InputError: The message has the least time that would do, with a tenth to spare.
    """

    def holds(box: float) -> bool:
        asked = replace(demand, box_seconds=box)
        tokens = fewest_tokens(demand.step_tokens, demand.tokens)
        _, evaluated, _ = _eval_tokens(asked, speed)
        rounds = max(1, math.ceil(demand.baselines / workers.count))
        training = rounds * trial_seconds(tokens, evaluated, demand.parameters, speed, judged=False)
        return sum(_fixed_seconds(asked, speed, int(demand.longest * tokens)).values()) + training <= box

    if demand.box_seconds is None or holds(demand.box_seconds):
        return
    low, high = demand.box_seconds, 2 * demand.box_seconds
    # What is evaluated grows with the box, but slower, and no further than there are tokens.
    while not holds(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    least = math.ceil(1.1 * high)
    remedy = f"--time {least}s" if least < 600 else f"--time {math.ceil(least / 60)}m"
    less = "" if demand.tokens is None else ", or fewer --tokens"
    raise InputError(
        f"a time box of {format_duration(demand.box_seconds)} does not hold the training of "
        f"{'the baseline' if demand.baselines else 'one trial'} and what goes with it: give {remedy} or more{less}"
    )


def make_plan(demand: Demand, speed: Speed, workers: Workers) -> Plan:
    """Fixes trials, rungs and tokens; `Plan.notes` says what the box could not hold.

    Baseline, evaluation and export are reserved first, and of what is left a share for training the best on. The rest
    goes to trials: as many tokens at full fidelity as it holds for a dozen trials, at most one pass over the data; then
    more trials.
    """
    notes = []
    batch = demand.step_tokens
    most = max(batch, demand.train_tokens // batch * batch)
    trials = _TRIALS if demand.trials is None else demand.trials
    if demand.tokens is not None:
        tokens = fewest_tokens(batch, demand.tokens)
        if tokens != demand.tokens:
            notes.append(
                f"a trial has {tokens:,} tokens and not the {demand.tokens:,} that were asked for: whole optimiser "
                f"steps of {batch:,}, and {_LEAST_STEPS} of them at least"
            )
        if demand.box_seconds is not None and demand.trials is None:
            trials = _most_trials(demand, speed, workers, tokens)
    elif demand.box_seconds is None:
        tokens = min(most, 64 * batch)
    else:
        tokens = _most_tokens(demand, speed, workers, trials)
        while demand.trials is None and tokens < _FEWEST_STEPS * batch and trials > 3:
            trials -= 1
            tokens = _most_tokens(demand, speed, workers, trials)
        # Trials too short to choose by would leave nothing that is worth training on.
        least = _FEWEST_STEPS // 2 * batch
        if tokens < least:
            tokens = max(tokens, min(least, _most_tokens(replace(demand, explore=1.0), speed, workers, trials)))
        # Data, or one trial's way to the end, may bound its tokens: then there is time for more trials.
        path, shared = _path(demand, speed, trials, tokens), _shared(demand, speed, trials, tokens)
        if demand.trials is None and (tokens > most or path > shared / workers.count):
            trials = max(trials, _most_trials(demand, speed, workers, min(tokens, most)))
        tokens = max(fewest_tokens(batch), min(tokens, most))
        if trials < _TRIALS and demand.trials is None:
            notes.append(f"the box holds {trials} trials; {_TRIALS} are usual: give it more --time")
        if tokens < _FEWEST_STEPS * batch:
            notes.append(f"{tokens // batch} optimiser steps a trial hardly tell strategies apart: give it more --time")
    plan = _build(demand, speed, workers, trials, tokens, tuple(notes))
    if demand.explore < 1 and plan.longest == 1:
        # What would be set aside is of no use to the best: trials have all of it.
        return make_plan(replace(demand, explore=1.0), speed, workers)
    expected = sum(plan.seconds.values())
    if demand.box_seconds is not None and expected > demand.box_seconds:
        short = format_duration(expected - demand.box_seconds)
        extra = f"the plan is expected to take {short} longer than the box; trials that do not fit will not start"
        plan = _build(demand, speed, workers, trials, tokens, (*notes, extra))
    return plan


def confirmed(trials: int, keep: Sequence[int], baselines: int) -> int:
    """How many strategies are trained on each further seed: the best few and the best baseline."""
    return min(CONFIRMED, keep[-1] if keep else trials) + min(1, baselines)


def extend(plan: Plan, trials: int) -> Plan:
    """The plan with another number of trials; tokens and rungs stay, so that all of its trials can be compared."""
    return replace(plan, trials=trials, keep=_keep(trials, len(plan.rungs)))


def more_trials(plan: Plan, parameters: int, speed: Speed, seconds: float, explore: float = 1.0) -> int:
    """How many more trials so many further seconds hold, export and test left out.

    What is not their share goes to training the best on, as long as was planned at most.
    """
    usable = seconds * _PLANNED_SHARE - sum(plan.seconds.get(phase, 0.0) for phase in ("workers", "export", "test"))
    usable -= min((1 - explore) * usable, plan.seconds.get("longer", 0.0))
    per_trial = 0.0
    # Of a good many trials the shares that go past each rung are those of `_keep`.
    shares = (1.0, *(kept / 900 for kept in _keep(900, len(plan.rungs))))
    for rung, reached, share in zip(plan.rungs, (0, *plan.rungs), shares, strict=False):
        last = rung == plan.tokens
        eval_tokens = plan.eval_tokens if last else plan.rung_eval_tokens
        per_trial += share * trial_seconds(rung - reached, eval_tokens, parameters, speed, judged=not last)
    return max(0, int(usable * plan.workers / per_trial))


def rung_tokens(tokens: int, batch: int) -> tuple[int, ...]:
    """Geometric rungs, each a whole number of steps: a ninth, a third and all of the tokens."""
    rungs = {max(2, round(tokens / batch / _REDUCTION**level)) * batch for level in (2, 1)}
    return (*sorted(rung for rung in rungs if rung < tokens), tokens)


def _keep(trials: int, rungs: int) -> tuple[int, ...]:
    """How many trials go past each rung: half of them past the first, two at least to the end."""
    keep = []
    left = trials
    for level in range(rungs - 1):
        left = -(-left // (2 if level == 0 else _REDUCTION))
        keep.append(min(trials, max(left, _FINALISTS)))
    return tuple(keep)


def _eval_tokens(demand: Demand, speed: Speed) -> tuple[int, int, int]:
    """Tokens read at a rung, at full fidelity and on test: what the box can pay, at least 4 sequences and 1,024."""
    if demand.box_seconds is None:
        return min(demand.validation_tokens, 2048), min(demand.validation_tokens, 4096), min(demand.test_tokens, 8192)
    # One forward over the validation tokens by the teacher takes this share of the box, whole sequences of it.
    length = demand.sequence_length
    affordable = int(0.007 * demand.box_seconds * speed.score) // length * length
    least = max(4 * length, -(-_LEAST_EVALUATED // length) * length)
    full = max(least, affordable)
    rung = max(least, affordable // 2 // length * length)
    return (
        min(demand.validation_tokens, rung),
        min(demand.validation_tokens, full),
        min(demand.test_tokens, 2 * full),
    )


def _build(demand: Demand, speed: Speed, workers: Workers, trials: int, tokens: int, notes: tuple[str, ...]) -> Plan:
    rungs = rung_tokens(tokens, demand.step_tokens)
    rung_eval, full_eval, test = _eval_tokens(demand, speed)
    longest, longer = _rest(demand, speed, workers, trials, tokens)
    data = _data_tokens(demand, tokens, longest)
    fixed = _fixed_seconds(demand, speed, data)
    seconds = {**fixed, "trials": _trial_seconds(demand, speed, workers, trials, tokens)}
    return Plan(
        trials=trials,
        tokens=tokens,
        rungs=rungs,
        keep=_keep(trials, len(rungs)),
        sequence_length=demand.sequence_length,
        batch_tokens=demand.step_tokens,
        warmup_tokens=min(8 * demand.step_tokens, tokens // 8),
        decay=_DECAY,
        rung_eval_tokens=rung_eval,
        eval_tokens=full_eval,
        test_tokens=test,
        workers=workers.count,
        threads=workers.threads,
        processes=workers.processes,
        gpus=workers.gpus,
        bf16=workers.bf16,
        seed=demand.seed,
        box_seconds=demand.box_seconds,
        seconds=seconds | ({"longer": longer} if longer else {}),
        notes=notes,
        longest=min(FURTHER * longest, _most_passes(demand)) / tokens if longer else 1.0,
        alone=workers.alone if longer and speed.alone > speed.worker_train else 0,
        data_tokens=data if longer else 0,
    )


def _longer(demand: Demand, speed: Speed, workers: Workers, trials: int, tokens: int) -> tuple[int, float]:
    """Tokens that the best is trained on to in its share of the time for training, and expected seconds of that."""
    if demand.box_seconds is None or demand.explore == 1:
        return tokens, 0.0
    share = (1 - demand.explore) / demand.explore
    return _trained_on(demand, speed, tokens, share * _trial_seconds(demand, speed, workers, trials, tokens))


def _rest(demand: Demand, speed: Speed, workers: Workers, trials: int, tokens: int) -> tuple[int, float]:
    """The same in all that a plan of these trials leaves of the box, as they and their tokens are whole numbers."""
    if demand.box_seconds is None or demand.explore == 1:
        return tokens, 0.0
    fixed = sum(_fixed_seconds(demand, speed, tokens).values())
    free = demand.box_seconds * _PLANNED_SHARE - fixed - _trial_seconds(demand, speed, workers, trials, tokens)
    # Every further token is cached as well, once, as far as there are any.
    caching, training = _CACHING / speed.cache, _TRAINING / speed.train_on
    most, seconds = _trained_on(demand, speed, tokens, free * training / (training + caching))
    data = _data_tokens(demand, tokens, most)
    if most <= data:
        return most, seconds
    return _trained_on(demand, speed, tokens, free - caching * (data - tokens))


def _data_tokens(demand: Demand, tokens: int, longest: int) -> int:
    """Training tokens of the text of a search whose trials have `tokens`, and whose best is trained on to `longest`."""
    held = int(min(longest, demand.train_tokens, demand.cached_tokens)) // demand.step_tokens * demand.step_tokens
    return max(tokens, int(demand.longest * tokens), held)


def _most_passes(demand: Demand) -> int:
    """Training tokens beyond which the text has been seen as often as is of use, in whole steps."""
    text = min(demand.train_tokens, max(demand.tokens or 0, demand.cached_tokens))
    return int(_PASSES * text) // demand.step_tokens * demand.step_tokens


def _trained_on(demand: Demand, speed: Speed, tokens: int, seconds: float) -> tuple[int, float]:
    """Tokens that a student of so many is trained on to in so many seconds of a worker, and what that takes.

    Its own tokens and 0.0 where that is not worth it.
    """
    _, evaluated, _ = _eval_tokens(demand, speed)
    branch = branch_point(tokens, _DECAY, demand.step_tokens)
    held = branch + trained_in(seconds, evaluated, demand.parameters, speed.train_on, speed)
    held = min(held // demand.step_tokens * demand.step_tokens, _most_passes(demand))
    if held < WORTHWHILE * tokens:
        return tokens, 0.0
    return held, _TRAINING * (held - branch) / speed.train_on + _beside_seconds(evaluated, demand.parameters, speed)


def _fixed_seconds(demand: Demand, speed: Speed, cached: int) -> Mapping[str, float]:
    """Expected seconds of all phases but training, with the teacher's outputs for so many tokens."""
    _, full_eval, test = _eval_tokens(demand, speed)
    # Packing, writing, reading back and running a student: seconds a weight, measured on one core of a server.
    per_weight = 1.6e-7
    return {
        "load": demand.spent_seconds,
        "cache": min(cached, demand.train_tokens) / speed.cache * _CACHING + full_eval / speed.score,
        "teacher": demand.teacher_deployments * (full_eval / speed.score + 8e-9 * demand.parameters + speed.asked),
        "workers": 15.0 if demand.ray else 0.0,
        "export": demand.exports * (12.0 + per_weight * demand.parameters),
        # The teacher up to three times, the undistilled student, the found one, that as it was after a trial's tokens
        # if it was trained on, and the baseline; each is loaded and packed.
        "test": (6 if demand.explore == 1 else 7) * (test / speed.score + 3e-8 * demand.parameters + speed.asked),
    }


def trial_seconds(tokens: int, eval_tokens: int, parameters: int, speed: Speed, *, judged: bool) -> float:
    """Expected seconds on one worker of a stretch of training and the evaluation of one deployment at its end.

    Args:
        tokens: Training tokens of the stretch.
        eval_tokens: Tokens that the evaluation reads.
        parameters: Of the teacher.
        speed: As measured.
        judged: Whether the stretch ends at a rung that trains on afterwards, so that its decay is extra work.
    """
    train = tokens * (1 + (_DECAY if judged else 0)) / speed.worker_train
    return _TRAINING * train + _beside_seconds(eval_tokens, parameters, speed)


def trained_in(seconds: float, eval_tokens: int, parameters: int, rate: float, speed: Speed) -> int:
    """Tokens that a worker trains on in so many seconds, of `rate` a second as timed, with an evaluation at the end."""
    return int((seconds - _beside_seconds(eval_tokens, parameters, speed)) * rate / _TRAINING)


def evaluation_seconds(eval_tokens: int, parameters: int, speed: Speed) -> float:
    """Expected seconds on one worker of one deployment: the student is loaded, packed and scored."""
    return eval_tokens / speed.worker_score + _PACKED * parameters + speed.asked


def _beside_seconds(eval_tokens: int, parameters: int, speed: Speed) -> float:
    """Expected seconds of a stretch of training but for its steps."""
    return evaluation_seconds(eval_tokens, parameters, speed) + _BUILT * parameters


def _trial_seconds(demand: Demand, speed: Speed, workers: Workers, trials: int, tokens: int) -> float:
    """Expected seconds of all trials, and of the best one's other deployments.

    Shared out over the workers, but never less than one trial takes to the end, and what follows it.
    """
    rows = _rows(demand, speed) / workers.count
    return max(_shared(demand, speed, trials, tokens) / workers.count, _path(demand, speed, trials, tokens) + rows)


def _rows(demand: Demand, speed: Speed) -> float:
    """Expected seconds of the best one's other deployments, one after another."""
    _, full_eval, _ = _eval_tokens(demand, speed)
    return (demand.deployments - 1) * evaluation_seconds(full_eval, demand.parameters, speed)


def _path(demand: Demand, speed: Speed, trials: int, tokens: int) -> float:
    """Expected seconds of one trial that passes every rung, or of a baseline where nothing else is trained."""
    rungs = rung_tokens(tokens, demand.step_tokens) if trials else (tokens,)
    rung_eval, full_eval, _ = _eval_tokens(demand, speed)
    stretches = [(rung - reached, rung == tokens) for rung, reached in zip(rungs, (0, *rungs), strict=False)]
    return sum(
        trial_seconds(stretch, full_eval if last else rung_eval, demand.parameters, speed, judged=not last)
        for stretch, last in stretches
    )


def _shared(demand: Demand, speed: Speed, trials: int, tokens: int) -> float:
    """Expected seconds of all trials, and of the best one's other deployments, one after another."""
    rungs = rung_tokens(tokens, demand.step_tokens)
    keep = _keep(trials, len(rungs))
    rung_eval, full_eval, _ = _eval_tokens(demand, speed)
    straight = trial_seconds(tokens, full_eval, demand.parameters, speed, judged=False)
    further = demand.confirm * confirmed(trials, keep, demand.baselines)
    total = (demand.baselines + further) * straight
    for rung, reached, count in zip(rungs, (0, *rungs), (trials, *keep), strict=False):
        last = rung == tokens
        eval_tokens = full_eval if last else rung_eval
        total += count * trial_seconds(rung - reached, eval_tokens, demand.parameters, speed, judged=not last)
    return total + _rows(demand, speed)


def _left(demand: Demand, speed: Speed, workers: Workers, trials: int, tokens: int) -> float:
    assert demand.box_seconds is not None
    longest, longer = _longer(demand, speed, workers, trials, tokens)
    fixed = sum(_fixed_seconds(demand, speed, _data_tokens(demand, tokens, longest)).values())
    training = _trial_seconds(demand, speed, workers, trials, tokens) + longer
    return demand.box_seconds * _PLANNED_SHARE - fixed - training


def _most_tokens(demand: Demand, speed: Speed, workers: Workers, trials: int) -> int:
    """Most tokens at full fidelity that the box holds for so many trials, in whole steps, at least one."""
    steps = 1
    ceiling = max(2, demand.train_tokens // demand.step_tokens + 1)
    low, high = 1, ceiling
    while low <= high:
        middle = (low + high) // 2
        if _left(demand, speed, workers, trials, middle * demand.step_tokens) >= 0:
            steps, low = middle, middle + 1
        else:
            high = middle - 1
    return steps * demand.step_tokens


def _most_trials(demand: Demand, speed: Speed, workers: Workers, tokens: int) -> int:
    """Most trials that the box holds at so many tokens, at least one and at most a thousand."""
    low, high, most = 1, 1000, 1
    while low <= high:
        middle = (low + high) // 2
        if _left(demand, speed, workers, middle, tokens) >= 0:
            most, low = middle, middle + 1
        else:
            high = middle - 1
    return most
