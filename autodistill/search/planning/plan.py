"""What a search will spend: trials, rungs and tokens, from a short measurement and the time budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from autodistill.distillation.training.learning_rate import branch_point
from autodistill.distillation.training.plan import Plan
from autodistill.errors import ShortTimeError
from autodistill.search.algorithms.successive_halving import (
    DECAY,
    REDUCTION,
    kept_at_rungs,
    rung_tokens,
)
from autodistill.search.planning.durations import (
    CACHING,
    TRAINING,
    Demand,
    Speed,
    evaluated_tokens,
    fixed_seconds,
    path_seconds,
    segment_overhead_seconds,
    shared_seconds,
    trained_in,
    trial_seconds,
    trials_seconds,
)
from autodistill.search.planning.placement import Workers
from autodistill.units import format_duration

# With fewer optimiser steps than this at full fidelity, strategies cannot be told apart. A race needs only a third of
# them, because it compares likelihoods by document and trains the winner further.
_FEWEST_STEPS, _FEWEST_RACED = 24, 8

# The first rung has a ninth of these steps, which is then still enough.
ENOUGH_STEPS = _FEWEST_STEPS * REDUCTION**2
"""Optimiser steps that a trial at full fidelity must keep when steps are made larger for speed."""

WORTH = 1.15
"""A step with twice as many sequences is used if it trains at least this many times as many tokens per second."""

_LEAST_STEPS = 3

_TRIALS, _FEWEST_TRIALS = 12, 3


def _fewest_steps(demand: Demand) -> int:
    return _FEWEST_RACED if demand.arms else _FEWEST_STEPS


# Share of the time budget that is planned. The rest absorbs a slowdown of the machine.
_PLANNED_SHARE = 0.93

EXPLORE = 0.5
"""Share of the training time that goes to trials, by default. In the rest, the best are trained further."""

RATES = 0.1
"""Share of the time budget that a test of learning rates may take, if there is one."""

_RACE, _RACE_LONG, _LONG = 0.2, 0.25, 3600.0


def race_share(box_seconds: float | None) -> float:
    """Return the share of training time for trials if constructions are solved, so that they race what is uncertain."""
    return _RACE_LONG if (box_seconds or 0.0) >= _LONG else _RACE


WORTHWHILE = 1.25
"""Least multiple of the plan's tokens for further training: below it, more than half would go into a second decay."""

BRANCHES = (0.25, 0.5)
"""Shares of the tokens that the best is trained to, after which a decay branches off if there is time for it."""

# Up to this many passes, repeating the data teaches about as much as new text (Muennighoff et al., 2023,
# arXiv:2305.16264).
_PASSES = 4

FURTHER = 2.0
"""The best may be trained to this many times the planned tokens, if trials leave more time than expected."""

# The same if no teacher outputs are cached. Text costs nothing then, and a machine may turn out to train several times
# as many tokens per second as it did next to other work.
_FURTHER_UNCACHED = 8.0


def step_sequences(rates: Mapping[int, float], steps: Callable[[int], int]) -> int:
    """Return how many sequences an optimiser step has for each process of a trial: one, or more if that is faster.

    It is the smallest number that is not worth doubling. It also leaves a trial at full fidelity at least
    `ENOUGH_STEPS` steps, so that speed does not cost what is learned.

    Args:
        rates: Training tokens per second by number of sequences. Each number is twice the one before.
        steps: Returns the optimiser steps of a trial at full fidelity for a number of sequences.
    """
    sizes = sorted(rates)
    worth = sizes[:1]
    for small, large in pairwise(sizes):
        if rates[large] < WORTH * rates[small]:
            break
        worth.append(large)
    return next((size for size in reversed(worth) if steps(size) >= ENOUGH_STEPS), sizes[0])


def fewest_tokens(step_tokens: int, requested: int | None = None) -> int:
    """Return the training tokens of a trial in whole steps: as many as asked for, or the fewest that are planned."""
    return max(step_tokens * _LEAST_STEPS, (requested or 0) // step_tokens * step_tokens)


def check_time_budget(demand: Demand, speed: Speed, workers: Workers) -> None:
    """Refuse a time budget that is too short to train the baselines, or one trial, and to do all that goes with it.

    Raises:
        ShortTimeError: It has the least time that would be enough, with a tenth to spare.
    """

    def holds(seconds: float) -> bool:
        """Return whether a time budget holds the shortest plan."""
        asked = replace(demand, box_seconds=seconds)
        tokens = fewest_tokens(demand.step_tokens, demand.tokens)
        _, evaluated, _ = evaluated_tokens(asked, speed)
        rounds = max(1, math.ceil(demand.baselines / workers.count))
        training = rounds * trial_seconds(tokens, evaluated, demand.parameters, speed, judged=False)
        return sum(fixed_seconds(asked, speed, int(demand.longest * tokens)).values()) + training <= seconds

    if demand.box_seconds is None or holds(demand.box_seconds):
        return
    low, high = demand.box_seconds, 2 * demand.box_seconds
    # Evaluation grows with the time budget, but more slowly, and no further than there are tokens.
    while not holds(high):
        low, high = high, 2 * high
    # Beyond 2^53 seconds, a float cannot tell single seconds apart.
    while high - low > max(1.0, 1e-9 * high):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    least = math.ceil(1.1 * high)
    remedy = f"--time {least}s" if least < 600 else f"--time {math.ceil(least / 60)}m"
    less = "" if demand.tokens is None else ", or fewer --tokens"
    raise ShortTimeError(
        f"a time budget of {format_duration(demand.box_seconds)} is too short for the training of "
        f"{'the baseline' if demand.baselines else 'one trial'} and what goes with it: give {remedy} or more{less}",
        least,
    )


def make_plan(demand: Demand, speed: Speed, workers: Workers) -> Plan:
    """Choose trials, rungs and tokens; `Plan.notes` says what the time budget could not hold.

    Baseline, evaluation and export are reserved first, and then a share of the rest for training the best further. What
    is left goes to trials: first as many tokens at full fidelity as it holds for a dozen trials, at most one pass over
    the data; then more trials.
    """
    notes: tuple[str, ...] = ()
    if demand.tokens is not None:
        trials, tokens, notes = _as_asked(demand, speed, workers)
    elif demand.box_seconds is None:
        trials, tokens = _usual_trials(demand), min(_one_pass(demand), 64 * demand.step_tokens)
    else:
        demand, trials, tokens = _within_time_budget(demand, speed, workers)
        notes = _short_of(demand, trials, tokens)
    plan = _build(demand, speed, workers, trials, tokens, notes)
    if demand.explore < 1 and plan.longest == 1:
        # The time set aside would be too short for the best, so trials get all of it.
        return make_plan(replace(demand, explore=1.0), speed, workers)
    expected = sum(plan.seconds.values())
    if demand.box_seconds is not None and expected > demand.box_seconds:
        short = format_duration(expected - demand.box_seconds)
        extra = (
            f"the plan is expected to take {short} longer than the time budget; trials that do not fit will not start"
        )
        plan = _build(demand, speed, workers, trials, tokens, (*notes, extra))
    return plan


def _usual_trials(demand: Demand) -> int:
    return _TRIALS if demand.trials is None else demand.trials


def _one_pass(demand: Demand) -> int:
    """Return the training tokens of one pass over the data, in whole steps, at least one."""
    return max(demand.step_tokens, demand.train_tokens // demand.step_tokens * demand.step_tokens)


def _as_asked(demand: Demand, speed: Speed, workers: Workers) -> tuple[int, int, tuple[str, ...]]:
    """Return trials and tokens if the user set the tokens, and a note if the number had to change."""
    assert demand.tokens is not None, "no tokens are asked for"
    batch = demand.step_tokens
    tokens = fewest_tokens(batch, demand.tokens)
    notes: tuple[str, ...] = ()
    if tokens != demand.tokens:
        notes = (
            f"a trial has {tokens:,} tokens instead of the {demand.tokens:,} that were asked for: it takes whole "
            f"optimiser steps of {batch:,}, and at least {_LEAST_STEPS} of them",
        )
    if demand.box_seconds is not None and demand.trials is None:
        return _most_trials(demand, speed, workers, tokens), tokens, notes
    return _usual_trials(demand), tokens, notes


def _within_time_budget(demand: Demand, speed: Speed, workers: Workers) -> tuple[Demand, int, int]:
    """Return the demand with the arms that begin, the trials that a time budget holds, and their tokens."""
    batch, most = demand.step_tokens, _one_pass(demand)
    # Trials that are too short for a choice would leave nothing that is worth training further.
    least = _FEWEST_STEPS // 2 * batch
    trials, tokens = _trials_held(demand, speed, workers)
    if not demand.proposed:
        # They keep the tokens that they would have among more trials, so that the time of those trials goes to the
        # best.
        trials = min(trials, max(1, demand.arms))
    # If a race could tell nothing apart, its other arms do not begin. Their codes would have to be computed.
    races = trials >= demand.arms
    if trials < demand.made_up:
        demand = replace(demand, made_up=trials)
        tokens = _most_tokens(demand, speed, workers, trials)
    if tokens < least and not demand.arms:
        tokens = max(tokens, min(least, _most_tokens(replace(demand, explore=1.0), speed, workers, trials)))
    # The data, or one trial's way to the end, may limit its tokens. Then there is time for more trials.
    path, shared = path_seconds(demand, speed, trials, tokens), shared_seconds(demand, speed, trials, tokens)
    if demand.trials is None and demand.proposed and races and (tokens > most or path > shared / workers.count):
        trials = max(trials, _most_trials(demand, speed, workers, min(tokens, most)))
    tokens = max(fewest_tokens(batch), min(tokens, most))
    if trials == 1 and demand.explore < 1:
        # A single trial is compared with nothing. It is only the beginning of the trunk, and a first student to export.
        tokens = min(tokens, _FEWEST_RACED * batch)
    return demand, trials, tokens


def _short_of(demand: Demand, trials: int, tokens: int) -> tuple[str, ...]:
    """Return notes on what is usual but does not fit the time budget, given its trials and their tokens."""
    notes = []
    if trials < _TRIALS and demand.trials is None and not demand.arms:
        notes.append(f"the time budget holds {trials} trials; {_TRIALS} are usual: give it more --time")
    if demand.arms > trials:
        notes.append(
            "the time budget holds no race: only the construction that is nearest to its teacher is trained; give "
            "it more --time"
        )
    elif trials > 1 and tokens < _fewest_steps(demand) * demand.step_tokens:
        steps = tokens // demand.step_tokens
        notes.append(f"{steps} optimiser steps a trial hardly tell strategies apart: give it more --time")
    return tuple(notes)


def extend(plan: Plan, trials: int, passed: Sequence[int] = ()) -> Plan:
    """Return the plan with another number of trials. Tokens and rungs stay, so that all trials can be compared.

    With the same number of trials the plan itself is returned, even if another version let a different share pass the
    rungs. Trials that went on in spare time take no place from the added trials, however good the added ones are.

    Args:
        plan: The plan so far.
        trials: Number of trials, including those that are added.
        passed: How many trials went past each rung except the last; none by default.
    """
    if trials == plan.trials:
        return plan
    keep = kept_at_rungs(trials, len(plan.rungs))
    if trials > plan.trials and passed:
        added = kept_at_rungs(trials - plan.trials, len(plan.rungs))
        keep = tuple(max(kept, gone + more) for kept, gone, more in zip(keep, passed, added, strict=True))
    return replace(plan, trials=trials, keep=keep)


def more_trials(plan: Plan, parameters: int, speed: Speed, seconds: float, explore: float = 1.0) -> int:
    """Return how many more trials fit into so many more seconds, with export and test reserved.

    The time outside their share goes to training the best further, at most as long as planned.
    """
    usable = seconds * _PLANNED_SHARE - sum(plan.seconds.get(phase, 0.0) for phase in ("workers", "export", "test"))
    usable -= min((1 - explore) * usable, plan.seconds.get("longer", 0.0))
    per_trial = 0.0
    # For many trials, the shares that go past each rung are those of `kept_at_rungs`.
    shares = (1.0, *(kept / 900 for kept in kept_at_rungs(900, len(plan.rungs))))
    for rung, reached, share in zip(plan.rungs, (0, *plan.rungs), shares, strict=False):
        last = rung == plan.tokens
        eval_tokens = plan.eval_tokens if last else plan.rung_eval_tokens
        per_trial += share * trial_seconds(rung - reached, eval_tokens, parameters, speed, judged=not last)
    return max(0, int(usable * plan.workers / per_trial))


def _build(demand: Demand, speed: Speed, workers: Workers, trials: int, tokens: int, notes: tuple[str, ...]) -> Plan:
    rungs = rung_tokens(tokens, demand.step_tokens)
    rung_eval, full_eval, test = evaluated_tokens(demand, speed)
    longest, longer = _trained_on_in_the_rest(demand, speed, workers, trials, tokens)
    data = _data_tokens(demand, tokens, longest)
    fixed = fixed_seconds(demand, speed, data)
    seconds = {**fixed, "trials": trials_seconds(demand, speed, workers, trials, tokens)}
    at_once = speed.at_once
    while at_once > 1 and longest < ENOUGH_STEPS * at_once * demand.step_tokens:
        at_once //= 2
    gains = speed.alone > speed.worker_train and (workers.processes_sharing > 1 or at_once > 1)
    return Plan(
        trials=trials,
        tokens=tokens,
        rungs=rungs,
        keep=kept_at_rungs(trials, len(rungs)),
        sequence_length=demand.sequence_length,
        batch_tokens=demand.step_tokens,
        # A trial that is only the beginning of a trunk may spend more of its tokens on the warm-up.
        warmup_tokens=min(8 * demand.step_tokens, tokens // (2 if trials == 1 and longer else 8)),
        decay=DECAY,
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
        expected=longest / tokens if longer else 1.0,
        by_labels=_by_labels(demand, speed, tokens, longer) / tokens if longer else 0.0,
        longest=min(_further(demand) * longest, _most_passes(demand)) / tokens if longer else 1.0,
        alone=workers.alone if longer and gains else 0,
        at_once=at_once if longer and gains else 1,
        data_tokens=data if longer else 0,
    )


def _trained_on_in_its_share(
    demand: Demand, speed: Speed, workers: Workers, trials: int, tokens: int
) -> tuple[int, float]:
    """Return the tokens that the best is trained to in its share of the training time, and the seconds for that."""
    if demand.box_seconds is None or demand.explore == 1:
        return tokens, 0.0
    share = (1 - demand.explore) / demand.explore
    return _trained_on(demand, speed, tokens, share * trials_seconds(demand, speed, workers, trials, tokens))


def _trained_on_in_the_rest(
    demand: Demand, speed: Speed, workers: Workers, trials: int, tokens: int
) -> tuple[int, float]:
    """Return the same for all the time that a plan of these trials leaves.

    That is more, because trials and tokens are whole numbers.
    """
    if demand.box_seconds is None or demand.explore == 1:
        return tokens, 0.0
    fixed = sum(fixed_seconds(demand, speed, tokens).values())
    free = demand.box_seconds * _PLANNED_SHARE - fixed - trials_seconds(demand, speed, workers, trials, tokens)
    # Every further token is also cached, once, as long as there are any.
    caching, training = (CACHING / speed.cache if demand.caches else 0.0), TRAINING / speed.train_on
    most, seconds = _trained_on(demand, speed, tokens, free * training / (training + caching))
    data = _data_tokens(demand, tokens, most)
    if most <= data:
        return most, seconds
    return _trained_on(demand, speed, tokens, free - caching * (data - tokens))


def _data_tokens(demand: Demand, tokens: int, longest: int) -> int:
    """Return the training tokens of a search's text: trials have `tokens`, and the best is trained to `longest`."""
    # Text that is not cached costs nothing.
    most = longest if demand.caches else _further(demand) * longest
    held = int(min(most, demand.train_tokens, demand.cached_tokens)) // demand.step_tokens * demand.step_tokens
    return max(tokens, int(demand.longest * tokens), held)


def _further(demand: Demand) -> float:
    """Return how many times the planned tokens the best may be trained to."""
    return FURTHER if demand.caches else _FURTHER_UNCACHED


def _most_passes(demand: Demand) -> int:
    """Return the training tokens, in whole steps, beyond which repeating the text is of no more use."""
    text = min(demand.train_tokens, max(demand.tokens or 0, demand.cached_tokens))
    return int(_PASSES * text) // demand.step_tokens * demand.step_tokens


def _trained_on(demand: Demand, speed: Speed, tokens: int, seconds: float) -> tuple[int, float]:
    """Return the tokens that a student is trained to in so many seconds of a worker, and the seconds that this takes.

    If that is not worth it, return the student's own tokens and 0.0.
    """
    _, evaluated, _ = evaluated_tokens(demand, speed)
    branch = branch_point(tokens, DECAY, demand.step_tokens)
    held = branch + trained_in(seconds, evaluated, demand.parameters, speed.train_on, speed)
    held = min(held // demand.step_tokens * demand.step_tokens, _most_passes(demand))
    if held < WORTHWHILE * tokens:
        return tokens, 0.0
    return held, TRAINING * (held - branch) / speed.train_on + segment_overhead_seconds(
        evaluated, demand.parameters, speed
    )


def _by_labels(demand: Demand, speed: Speed, tokens: int, seconds: float) -> int:
    """Return the tokens that a student is trained to in so many seconds if it learns from the labels alone.

    It is 0 if that makes no difference.
    """
    labels = speed.by_labels()
    return 0 if labels == speed else _trained_on(demand, labels, tokens, seconds)[0]


def _trials_held(demand: Demand, speed: Speed, workers: Workers) -> tuple[int, int]:
    """Return how many trials the time budget holds, at most a dozen, and their tokens.

    It is the largest number whose trials are long enough to be told apart. If not even the fewest trials are, half of
    the steps must do. If a race could tell nothing apart, the trial that is believed to be best runs alone, so that it
    is trained further for longer.
    """
    if demand.trials is not None:
        return demand.trials, _most_tokens(demand, speed, workers, demand.trials)
    fewest = demand.arms or _FEWEST_TRIALS
    held = [(trials, _most_tokens(demand, speed, workers, trials)) for trials in range(_TRIALS, fewest - 1, -1)]
    least = _fewest_steps(demand)
    for steps in (least,) if demand.arms > 1 else (least, least // 2):
        enough = [item for item in held if item[1] >= steps * demand.step_tokens]
        if enough:
            return enough[0]
    return (1, _most_tokens(demand, speed, workers, 1)) if demand.arms > 1 else held[-1]


def _seconds_left(demand: Demand, speed: Speed, workers: Workers, trials: int, tokens: int) -> float:
    """Return the seconds of the time budget that so many trials leave; below 0 if it does not hold them."""
    assert demand.box_seconds is not None
    longest, longer = _trained_on_in_its_share(demand, speed, workers, trials, tokens)
    fixed = sum(fixed_seconds(demand, speed, _data_tokens(demand, tokens, longest)).values())
    training = trials_seconds(demand, speed, workers, trials, tokens) + longer
    return demand.box_seconds * _PLANNED_SHARE - fixed - training


def _most_tokens(demand: Demand, speed: Speed, workers: Workers, trials: int) -> int:
    """Return the most tokens at full fidelity that the time budget holds for so many trials, at least one step.

    They are whole steps.
    """
    steps = 1
    ceiling = max(2, demand.train_tokens // demand.step_tokens + 1)
    low, high = 1, ceiling
    while low <= high:
        middle = (low + high) // 2
        if _seconds_left(demand, speed, workers, trials, middle * demand.step_tokens) >= 0:
            steps, low = middle, middle + 1
        else:
            high = middle - 1
    return steps * demand.step_tokens


def _most_trials(demand: Demand, speed: Speed, workers: Workers, tokens: int) -> int:
    """Return the most trials that the time budget holds with so many tokens, at least one and at most a thousand."""
    low, high, most = 1, 1000, 1
    while low <= high:
        middle = (low + high) // 2
        if _seconds_left(demand, speed, workers, middle, tokens) >= 0:
            most, low = middle, middle + 1
        else:
            high = middle - 1
    return most
