"""The plan of a search from a short measurement of this machine."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from autodistill.distillation.student.build import cut_student
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.side_by_side import MOST
from autodistill.errors import InputError
from autodistill.estimates.fit import cannot_hold, fits, holdable
from autodistill.inference.batching import PASS_TOKENS
from autodistill.inference.half_precision import load_held
from autodistill.inference.tensor_parallel import is_divided
from autodistill.inference.torch_memory import is_out_of_memory
from autodistill.models.loading import load_model
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import get_format
from autodistill.search.planning.durations import Demand, Speed
from autodistill.search.planning.plan import ENOUGH_STEPS, check_box, make_plan, step_sequences
from autodistill.search.planning.representatives import signal_cases
from autodistill.search.prior.prior import many_tokens
from autodistill.search.request.feasibility import by_size
from autodistill.search.request.request import DEFAULT_SPACE
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.setup.answering import time_asked, time_outputs
from autodistill.search.setup.loading import Loaded
from autodistill.search.setup.rate_phase import share_for
from autodistill.search.setup.teacher_phase import cache_settings, most_cached
from autodistill.search.setup.throughput import measure_speed, moving_seconds
from autodistill.strategy.strategy import Strategy
from autodistill.units import format_bytes

LONG = 1800.0
"""Seconds of the time budget from which solving for a little, and racing recipes of one construction, are worth it."""

_NO_RACE = (
    "one construction is left, and recipes near to what is known cannot be told apart in so short a time: it is "
    "trained alone; --time 30m or more, or --trials, races others beside it"
)
_SHORT_RACE = (
    "recipes near to what is known cannot be told apart in so short a time: constructions alone are raced; --time 30m "
    "or more, or --trials, races other recipes beside them"
)

# Sequences of a pass at the most of what trains on all cores. Of a model of two million weights steps of one, two, four
# and eight take 57, 60, 92 and 161 ms.
_MOST_ALONE = 4

# Seconds of the time budget where none is given.
BOX_CPU, BOX_GPU = 600.0, 1800.0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What this machine was measured to do.

    Attributes:
        speed: Of an optimiser step of one sequence.
        rates: Training tokens a second, by sequences of a step.
        share: Of the examples of tasks that an evaluation reads.
        notes: On these, in sentences.
    """

    speed: Speed
    rates: Mapping[int, float]
    share: float
    notes: tuple[str, ...]


Paces: TypeAlias = dict[Hashable, Pace]
"""What was measured, by all that it depends on: plans for several budgets that agree in that measure once."""


def plan_from_measurement(
    checked: SearchConfig, loaded: Loaded, spent: float, paces: Paces | None = None
) -> tuple[Plan, Speed]:
    """Measures this machine for a few seconds and plans for it; `spent` seconds of the time budget are gone.

    On an accelerator an optimiser step has as many sequences as `step_sequences` finds, unless its size was asked for.

    Args:
        checked: What is asked.
        loaded: Teacher and data.
        spent: Seconds.
        paces: What was measured before, which is not measured again; what is measured now is added.

    Raises:
        InputError: A time budget that holds no training at all, a task or command that cannot be used, or memory that
            holds no pass of the teacher, or no step of the largest student.
    """
    all_tokens = loaded.data.splits["train"].sequences * checked.sequence_length
    # How many tokens a trial may have is not asked where that is fixed and nothing is trained on.
    cached = all_tokens if checked.tokens and checked.explore == 1 else most_cached(checked, loaded)
    train_tokens = all_tokens if checked.tokens else min(all_tokens, cached)
    students = by_size(checked.space, loaded.spec)
    box = box_of(checked, loaded)
    sizes = _sizes(checked, loaded, train_tokens)
    paces = {} if paces is None else paces
    caches = not cache_settings(checked.space, loaded.spec, loaded.workers.bf16, None).empty
    key = (loaded.largest[0].init, loaded.fit.checkpointing, sizes, loaded.workers, checked.explore < 1, caches)
    if key not in paces:
        paces[key] = _measured(checked, loaded, sizes, box, caches)
    speed, rates, share, notes = (getattr(paces[key], name) for name in ("speed", "rates", "share", "notes"))
    short = _short(checked, box)
    sure = short and len(checked.space.starts) == 1
    speeds = _speeds(checked, loaded, speed, rates, sure=sure)
    demand = _demand(
        checked, loaded, students, box_seconds=box, spent=spent, train_tokens=train_tokens, cached=cached, short=short
    )
    demand, speed, stepped = _with_step(checked, loaded, demand, speeds, rates)
    demand = replace(demand, rates=share_for(checked, loaded.workers, demand, speed))
    fit = loaded.fit_step(demand.step_tokens)
    moving = moving_seconds(fit.optimizer_state, loaded.device, loaded.workers.threads)
    # Each process moves the weights that it has gradients of.
    speed = speed.with_steps_longer(moving * fit.estimate.gradients_bytes / 4, demand.step_tokens)
    check_box(demand, speed, loaded.workers)
    plan = make_plan(demand, speed, loaded.workers)
    if train_tokens < all_tokens and plan.tokens > train_tokens - demand.step_tokens:
        notes = (*notes, "the teacher's outputs for more tokens of a trial would not fit --cache-limit")
    models = (loaded.spec, *(student for _, student in students))
    # What was solved for one shape need not hold another.
    solved = {one.deployment for one in checked.constructions}
    asked = [one for one in checked.space.deployments if one not in solved]
    left_out = [cannot_hold(model, deployment) for model in models for deployment in asked]
    plan = replace(
        plan,
        notes=(
            *plan.notes,
            *([loaded.untrained] if loaded.untrained else []),
            *([_NO_RACE if sure else _SHORT_RACE] if short else []),
            *_planned_elsewhere(loaded),
            *stepped,
            *notes,
            *filter(None, dict.fromkeys([loaded.teacher_fit.note, *left_out])),
        ),
        example_share=share,
        micro_batch=fit.micro_batch,
        checkpointing=fit.checkpointing,
        optimizer_state=fit.optimizer_state,
        lengths=checked.space.lengths,
    )
    return plan, speed


def _speeds(
    checked: SearchConfig, loaded: Loaded, timed: Speed, rates: Mapping[int, float], *, sure: bool
) -> dict[int, Speed]:
    """The speed that a plan reckons with, by sequences of a step: as timed, with what trials do beside such a step.

    Args:
        checked: What is asked.
        loaded: Teacher and data.
        timed: The speed with steps of the first size.
        rates: Training tokens a second as they were timed, by sequences of a step.
        sure: Whether nothing is trained but what the search begins with.
    """
    starts = checked.space.starts.values()
    recipes = [start.distillation for start in starts] if sure else signal_cases(checked.space)
    speeds = {size: replace(timed, worker_train=rate) for size, rate in rates.items()}
    if any(one.signal == "online" and one.reads_teacher for one in recipes):
        speeds = {size: one.with_teacher_beside() for size, one in speeds.items()}
    if loaded.workers.alone and any(start.scales_alone for start in starts):
        # One that is alone trains in as many processes as there were workers.
        processes = min(MOST, loaded.workers.beside)
        speeds = {size: one.with_side_by_side(processes) for size, one in speeds.items()}
    return speeds


def box_of(checked: SearchConfig, loaded: Loaded) -> float | None:
    """Seconds of the time budget; None where trials and their tokens are fixed, and no time is asked for."""
    fixed = (checked.trials or checked.strategy) and checked.tokens
    return box_by_default(loaded) if checked.time_seconds is None and not fixed else checked.time_seconds


def box_by_default(loaded: Loaded) -> float:
    """Seconds of the time budget where none is given."""
    return BOX_CPU if loaded.workers.device == "cpu" else BOX_GPU


def _measured(
    checked: SearchConfig,
    loaded: Loaded,
    sizes: tuple[int, ...],
    box: float | None,
    caches: bool,
) -> Pace:
    """Times the teacher and the largest student, and asks the teacher of the tasks, in a time budget of `box`."""
    init = loaded.largest[0].init

    def largest(model: Any) -> Any:
        if init.model:
            return load_model(loaded.pretrained[init.model], torch.float32)
        if is_divided(model):
            model = load_held(loaded.teacher.folder, loaded.teacher_fit.held)
        # Which layers and neurons are kept does not bear on speed.
        return cut_student(model, replace(init, layers="even"), None)[0]

    with _enough_memory(loaded):
        teacher = loaded.load_teacher()
        outputs = None if loaded.device == "cpu" else time_outputs(checked, loaded, teacher)
        speed, rates = measure_speed(
            teacher,
            loaded.spec,
            largest,
            replace(loaded.workers, bf16=loaded.workers.bf16 and loaded.bf16),
            loaded.threads,
            device=loaded.device,
            sequence_length=checked.sequence_length,
            checkpointing=loaded.fit.checkpointing,
            sizes=sizes,
            alone=_alone(checked, loaded, box),
            caches=caches,
            scoring=checked.scoring,
        )
        if outputs is not None:
            speed = outputs.into(speed)
        elif checked.asked.written:
            # Answering the questions of so many tokens takes about as long again as scoring them.
            speed = replace(speed, score=speed.score / 2, worker_score=speed.worker_score / 2)
        speed, share, notes = time_asked(checked, loaded, teacher, speed, box)
    return Pace(speed=speed, rates=rates, share=share, notes=notes)


@contextmanager
def _enough_memory(loaded: Loaded) -> Iterator[None]:
    """Says what teacher and training take, where memory runs out in either."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        where, more = ("memory", "") if loaded.device == "cpu" else ("the GPU's memory", "a larger --gpus-per-trial, ")
        raise InputError(
            f"{where} ran out when this machine was measured: by prediction the teacher takes "
            f"{format_bytes(loaded.teacher_fit.total_bytes)}, and training the largest student then "
            f"{format_bytes(loaded.fit.estimate.total_bytes)}: end what else uses it, or choose {more}a lower "
            "--sequence-length, a smaller teacher, or a space with smaller students"
        ) from error


def _planned_elsewhere(loaded: Loaded) -> tuple[str, ...]:
    """That the plan, and the teacher, are of another kind of device than trials train on, if that is so."""
    if loaded.device == loaded.workers.device:
        return ()
    here, there = ("CPU", "GPUs") if loaded.device == "cpu" else ("GPU", "CPUs")
    return (
        f"trials train on the {there} of other machines, but were planned at the speed of this one's {here}, which "
        "runs the teacher too: start the search on a machine that has what they have, or fix --trials and --tokens",
    )


def _demand(
    checked: SearchConfig,
    loaded: Loaded,
    students: Sequence[tuple[Strategy, ModelSpec]],
    *,
    box_seconds: float | None,
    spent: float,
    train_tokens: int,
    cached: int,
    short: bool,
) -> Demand:
    """What a plan is made for.

    Args:
        checked: The request.
        loaded: Teacher and data.
        students: Of the space, with their shapes.
        box_seconds: Time budget, or None.
        spent: Seconds of it that are gone.
        train_tokens: That a trial may have.
        cached: Training tokens of which the teacher's outputs may be kept.
        short: Whether no arm is proposed beside those that begin the race.
    """
    splits = loaded.data.splits
    allowed = [
        [
            fit.deployment
            for fit in fits(student, holdable(student, checked.space.deployments), checked.budget)
            if fit.slack <= 0
        ]
        for _, student in students
    ]
    # What is trained on a grid is packed on that one alone.
    raced = [start for start in checked.space.starts.values() if checked.constructions]
    on_grids = bool(raced) and all(start.finishing is not None for start in raced)
    return Demand(
        box_seconds=box_seconds,
        spent_seconds=spent,
        trials=0 if checked.strategy else checked.trials,
        proposed=not short,
        tokens=checked.tokens,
        baselines=len(checked.space.baselines),
        # Files that are rivals as they are take as long.
        teacher_deployments=len(loaded.teacher_deployments(checked))
        + sum(one.candidate for one in checked.constructions),
        deployments=1 if on_grids else max(map(len, allowed)),
        caches=not cache_settings(checked.space, loaded.spec, loaded.workers.bf16, None).empty,
        arms=len(raced),
        made_up=sum(start.codes is not None for start in raced),
        train_tokens=train_tokens,
        validation_tokens=splits["validation"].sequences * checked.sequence_length,
        test_tokens=splits["test"].sequences * checked.sequence_length,
        parameters=loaded.spec.parameters,
        seed=checked.seed,
        ray=checked.runner == "ray",
        sequence_length=checked.sequence_length,
        step_tokens=loaded.step_tokens,
        confirm=checked.confirm,
        longest=max(checked.space.lengths),
        explore=checked.explore,
        cached_tokens=cached,
        exports=max(1, len({get_format(one.format).container == "gguf" for every in allowed for one in every})),
    )


def _short(checked: SearchConfig, box_seconds: float | None) -> bool:
    """Whether constructions alone are worth a race, and one alone none: in a short time, where nobody asked for more.

    Recipes as near to what is known as those that are proposed differ by less than a few thousand tokens can tell, and
    a race takes a sixth of the training.
    """
    asked = checked.trials or checked.tokens or checked.strategy or checked.space_reference != DEFAULT_SPACE
    return bool(checked.constructions) and not asked and box_seconds is not None and box_seconds < LONG


def _sizes(checked: SearchConfig, loaded: Loaded, train_tokens: int) -> tuple[int, ...]:
    """Sequences of the training steps that are timed: 1 alone on a CPU, where more train no faster.

    On an accelerator, up to as many as memory holds in a pass with what a fit leaves to spare, and as can leave a trial
    enough steps of so many training tokens.
    """
    if "cpu" in (loaded.device, loaded.workers.device):
        return (1,)
    if checked.step_tokens:
        # Past the size from which more is not worth it, the rate is that of all.
        return tuple(sorted({*_doubled(loaded.fit.micro_batch), loaded.fit.micro_batch}))
    tokens = checked.tokens or train_tokens
    most = min(PASS_TOKENS // checked.sequence_length, tokens // (ENOUGH_STEPS * loaded.step_tokens))

    return tuple(size for size in _doubled(max(1, most)) if size == 1 or _held(loaded, size))


def _alone(checked: SearchConfig, loaded: Loaded, box: float | None) -> Callable[[float], int] | None:
    """What gives the sequences of a pass of a worker that trains on all of a CPU's cores; None where none does.

    Several where weights are trained, as memory holds them: much of a small model's step takes as long for four
    sequences as for one. Scales alone are trained by processes, with a sequence each. Which of them a search trains
    follows from the tokens that its time holds.
    """
    if checked.explore == 1:
        return None
    given = [] if checked.constructions else [*checked.space.starts.values(), *checked.space.baselines.values()]

    def sequences(rate: float) -> int:
        many = many_tokens(checked.tokens or int((box or 0.0) * rate), loaded.spec.parameters)
        if checked.step_tokens or not (many or any(not one.scales_alone for one in given)):
            return 1
        return max(size for size in _doubled(_MOST_ALONE) if size == 1 or _held(loaded, size))

    return sequences


def _held(loaded: Loaded, size: int) -> bool:
    """Whether memory holds a pass of so many times a step's sequences."""
    try:
        return loaded.fit_step(size * loaded.step_tokens).micro_batch == size
    except InputError:
        # A step of several passes has gradients beside what its last one keeps.
        return False


def _doubled(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**power for power in range(most.bit_length())]


def _with_step(
    checked: SearchConfig,
    loaded: Loaded,
    demand: Demand,
    speeds: Mapping[int, Speed],
    rates: Mapping[int, float],
) -> tuple[Demand, Speed, tuple[str, ...]]:
    """The demand with the tokens of an optimiser step, the speed of such steps, and a note where they were chosen.

    Args:
        checked: What is asked.
        loaded: Teacher and data.
        demand: With the tokens of the smallest step.
        speeds: By sequences of a step, with what the teacher takes beside each.
        rates: Training tokens a second as they were timed, likewise.
    """
    if len(rates) == 1 or checked.step_tokens:
        return demand, speeds[max(speeds)], ()

    def stepping(size: int) -> tuple[Demand, Speed]:
        return replace(demand, step_tokens=size * demand.step_tokens), speeds[size]

    def steps(size: int) -> int:
        plan = make_plan(*stepping(size), loaded.workers)
        return plan.tokens // plan.batch_tokens

    size = step_sequences(rates, steps)
    measured = ", ".join(f"{rate:,.0f} tokens a second with {count}" for count, rate in rates.items())
    few = size < step_sequences(rates, lambda _: ENOUGH_STEPS)
    why = ", and a trial has too few tokens for larger ones" if few else ""
    note = (
        f"an optimiser step has {size} sequence{'s' if size > 1 else ''} for each process of a trial: training ran at "
        f"{measured}{why}; --step-tokens sets another size"
    )
    return *stepping(size), (note,)
