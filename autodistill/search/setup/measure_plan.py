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
from autodistill.search.planning.plan import ENOUGH_STEPS, check_time_budget, make_plan, step_sequences
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
"""Least seconds of time budget for which it pays to solve for a small gain, and to race recipes of one construction."""

_NO_RACE = (
    "only one construction is left, and it is trained without a race: so short a search cannot tell similar recipes "
    "apart; --time 30m or more, or --trials, races other recipes too"
)
_NEAREST = (
    "only the construction that is nearest to its teacher is trained, without a race: so short a search cannot tell "
    "which one learns most from many tokens for each weight; --time 30m or more, or --trials, races the others too"
)
_SHORT_RACE = (
    "only constructions are raced: so short a search cannot tell similar recipes apart; --time 30m or more, or "
    "--trials, races other recipes too"
)

# Most sequences in a pass of a worker that trains on all cores. With a model of two million weights, steps of one, two,
# four and eight sequences take 57, 60, 92 and 161 ms.
_MOST_ALONE = 4

# Default time budget in seconds.
BOX_CPU, BOX_GPU = 600.0, 1800.0


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Measurements of this machine.

    Attributes:
        speed: The speed with an optimiser step of one sequence.
        rates: Training tokens a second, by the number of sequences in a step.
        share: Share of the tasks' examples that an evaluation reads.
        notes: Sentences about these figures.
    """

    speed: Speed
    rates: Mapping[int, float]
    share: float
    notes: tuple[str, ...]


Paces: TypeAlias = dict[Hashable, Pace]
"""Measurements, by everything that they depend on. Plans for several budgets share a measurement if this is equal."""


def plan_from_measurement(
    config: SearchConfig, loaded: Loaded, spent: float, paces: Paces | None = None
) -> tuple[Plan, Speed]:
    """Measure this machine for a few seconds and make a plan for it.

    On an accelerator `step_sequences` chooses the size of an optimiser step, unless the user sets it.

    Args:
        config: The checked request.
        loaded: Teacher and data.
        spent: Seconds of the time budget that are gone.
        paces: Earlier measurements, which are not repeated. New ones are added.

    Raises:
        InputError: The time budget allows no training at all, or a task or command cannot be used. Or memory is too
            small for a pass of the teacher, or for a step of the largest student.
    """
    all_tokens = loaded.data.splits["train"].sequences * config.sequence_length
    # The cache does not limit a trial's tokens if they are fixed and no student is trained further.
    cached = all_tokens if config.tokens and config.explore == 1 else most_cached(config, loaded)
    train_tokens = all_tokens if config.tokens else min(all_tokens, cached)
    students = by_size(config.space, loaded.spec)
    time_budget = time_budget_of(config, loaded)
    sizes = _sizes(config, loaded, train_tokens)
    paces = {} if paces is None else paces
    caches = not cache_settings(config.space, loaded.spec, loaded.workers.bf16, None).empty
    key = (loaded.largest[0].init, loaded.fit.checkpointing, sizes, loaded.workers, config.explore < 1, caches)
    if key not in paces:
        paces[key] = _measured(config, loaded, sizes, time_budget, caches)
    speed, rates, share, notes = (getattr(paces[key], name) for name in ("speed", "rates", "share", "notes"))
    short = _short(config, time_budget)
    many = short and _many(config, loaded, time_budget, max(rates.values()))
    sure = many or (short and len(config.space.starts) == 1)
    speeds = _speeds(config, loaded, speed, rates, sure=sure)
    demand = _demand(
        config,
        loaded,
        students,
        box_seconds=time_budget,
        spent=spent,
        train_tokens=train_tokens,
        cached=cached,
        short=short,
        sure=sure,
    )
    demand, speed, stepped = _with_step(config, loaded, demand, speeds, rates)
    demand = replace(demand, rates=share_for(config, loaded.workers, demand, speed))
    fit = loaded.fit_step(demand.step_tokens)
    moving = moving_seconds(fit.optimizer_state, loaded.device, loaded.workers.threads)
    # Each process updates the weights whose gradients it has.
    speed = speed.with_steps_longer(moving * fit.estimate.gradients_bytes / 4, demand.step_tokens)
    check_time_budget(demand, speed, loaded.workers)
    plan = make_plan(demand, speed, loaded.workers)
    if train_tokens < all_tokens and plan.tokens > train_tokens - demand.step_tokens:
        notes = (*notes, "the teacher's outputs for more tokens of a trial would not fit --cache-limit")
    models = (loaded.spec, *(student for _, student in students))
    # A deployment that was solved for one shape need not be able to hold another.
    solved = {one.deployment for one in config.constructions}
    asked = [one for one in config.space.deployments if one not in solved]
    left_out = [cannot_hold(model, deployment) for model in models for deployment in asked]
    plan = replace(
        plan,
        notes=(
            *plan.notes,
            *([loaded.untrained] if loaded.untrained else []),
            *([_why_short(config, sure)] if short else []),
            *_planned_elsewhere(loaded),
            *stepped,
            *notes,
            *filter(None, dict.fromkeys([loaded.teacher_fit.note, *left_out])),
        ),
        example_share=share,
        micro_batch=fit.micro_batch,
        checkpointing=fit.checkpointing,
        optimizer_state=fit.optimizer_state,
        lengths=config.space.lengths,
    )
    return plan, speed


def _speeds(
    config: SearchConfig, loaded: Loaded, timed: Speed, rates: Mapping[int, float], *, sure: bool
) -> dict[int, Speed]:
    """Return the speeds that a plan uses, by the number of sequences in a step.

    They are the timed speeds, adjusted for the teacher's part in a step and for training in several processes.

    Args:
        config: The checked request.
        loaded: Teacher and data.
        timed: The speed with steps of the first size.
        rates: Timed training tokens a second, by the number of sequences in a step.
        sure: Whether the search trains nothing except one start.
    """
    starts = config.space.starts.values()
    recipes = [start.distillation for start in starts] if sure else signal_cases(config.space)
    speeds = {size: replace(timed, worker_train=rate) for size, rate in rates.items()}
    if any(one.signal == "online" and one.reads_teacher for one in recipes):
        speeds = {size: one.with_teacher_beside() for size, one in speeds.items()}
    if loaded.workers.alone and any(start.scales_alone for start in starts):
        # A single worker trains in as many processes as there were workers.
        processes = min(MOST, loaded.workers.processes_sharing)
        speeds = {size: one.with_side_by_side(processes) for size, one in speeds.items()}
    return speeds


def time_budget_of(config: SearchConfig, loaded: Loaded) -> float | None:
    """Return the seconds of the time budget, or None if trials and tokens are fixed and the user sets no time."""
    fixed = (config.trials or config.strategy) and config.tokens
    return box_by_default(loaded) if config.time_seconds is None and not fixed else config.time_seconds


def box_by_default(loaded: Loaded) -> float:
    """Return the default time budget in seconds."""
    return BOX_CPU if loaded.workers.device == "cpu" else BOX_GPU


def _measured(
    config: SearchConfig,
    loaded: Loaded,
    sizes: tuple[int, ...],
    time_budget: float | None,
    caches: bool,
) -> Pace:
    """Time the teacher, the largest student and the tasks, for a time budget of `time_budget` seconds."""
    init = loaded.largest[0].init

    def largest(model: Any) -> Any:
        if init.model:
            return load_model(loaded.pretrained[init.model], torch.float32)
        if is_divided(model):
            model = load_held(loaded.teacher.folder, loaded.teacher_fit.held_type)
        # The choice of layers and neurons does not affect speed.
        return cut_student(model, replace(init, layers="even"), None)[0]

    with _enough_memory(loaded):
        teacher = loaded.load_teacher()
        outputs = None if loaded.device == "cpu" else time_outputs(config, loaded, teacher)
        speed, rates = measure_speed(
            teacher,
            loaded.spec,
            largest,
            replace(loaded.workers, bf16=loaded.workers.bf16 and loaded.bf16),
            loaded.threads,
            device=loaded.device,
            sequence_length=config.sequence_length,
            checkpointing=loaded.fit.checkpointing,
            sizes=sizes,
            alone=_alone(config, loaded, time_budget),
            caches=caches,
            scoring=config.scoring,
        )
        if outputs is not None:
            speed = outputs.into(speed)
        elif config.requested.written:
            # Answering the questions of some tokens takes about as long as scoring these tokens.
            speed = replace(speed, score=speed.score / 2, worker_score=speed.worker_score / 2)
        speed, share, notes = time_asked(config, loaded, teacher, speed, time_budget)
    return Pace(speed=speed, rates=rates, share=share, notes=notes)


@contextmanager
def _enough_memory(loaded: Loaded) -> Iterator[None]:
    """Within the context, a lack of memory becomes an error that names the memory of teacher and training."""
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
    """Return a note if the plan was made, and the teacher runs, on another kind of device than the trials."""
    if loaded.device == loaded.workers.device:
        return ()
    here, there = ("CPU", "GPUs") if loaded.device == "cpu" else ("GPU", "CPUs")
    return (
        f"trials train on the {there} of other machines, but were planned at the speed of this one's {here}, which "
        "runs the teacher too: start the search on a machine with the same devices as theirs, or fix --trials and "
        "--tokens",
    )


def _demand(
    config: SearchConfig,
    loaded: Loaded,
    students: Sequence[tuple[Strategy, ModelSpec]],
    *,
    box_seconds: float | None,
    spent: float,
    train_tokens: int,
    cached: int,
    short: bool,
    sure: bool,
) -> Demand:
    """Return the demand that a plan must meet.

    Args:
        config: The checked request.
        loaded: Teacher and data.
        students: Students of the space, with their shapes.
        box_seconds: Time budget, or None.
        spent: Seconds of it that are gone.
        train_tokens: Training tokens that a trial may have.
        cached: Training tokens whose teacher outputs may be cached.
        short: Whether no arms are proposed in addition to those that begin the race.
        sure: Whether only the first of them is trained.
    """
    splits = loaded.data.splits
    allowed = [
        [
            fit.deployment
            for fit in fits(student, holdable(student, config.space.deployments), config.budget)
            if fit.slack <= 0
        ]
        for _, student in students
    ]
    # A student that is trained on a grid is only packed on this grid.
    raced = [start for start in config.space.starts.values() if config.constructions][: 1 if sure else None]
    on_grids = bool(raced) and all(start.finishing is not None for start in raced)
    return Demand(
        box_seconds=box_seconds,
        spent_seconds=spent,
        trials=0 if config.strategy else config.trials,
        proposed=not short,
        tokens=config.tokens,
        baselines=len(config.space.baselines),
        # Evaluating an untrained candidate file takes as long. The teacher's own file takes nothing with a cache of 16
        # bits: it is the teacher, whose scores are known.
        teacher_deployments=len(config.candidates)
        + sum(one.file is None or one.cache_types != ("f16", "f16") for one in loaded.teacher_deployments(config)),
        deployments=1 if on_grids else max(map(len, allowed)),
        caches=not cache_settings(config.space, loaded.spec, loaded.workers.bf16, None).empty,
        arms=len(raced),
        made_up=sum(start.codes is not None for start in raced),
        train_tokens=train_tokens,
        validation_tokens=splits["validation"].sequences * config.sequence_length,
        test_tokens=splits["test"].sequences * config.sequence_length,
        parameters=loaded.spec.parameters,
        seed=config.seed,
        ray=config.runner == "ray",
        sequence_length=config.sequence_length,
        step_tokens=loaded.step_tokens,
        confirm=config.confirm,
        longest=max(config.space.lengths),
        explore=config.explore,
        cached_tokens=cached,
        exports=max(1, len({get_format(one.format).container == "gguf" for every in allowed for one in every})),
    )


def _short(config: SearchConfig, box_seconds: float | None) -> bool:
    """Return whether recipes are not raced, because the time is short and the user does not ask for more.

    Then only constructions are raced, and a single one is trained without a race. The proposed recipes are so close to
    the known one that a few thousand tokens cannot tell them apart, and a race takes a sixth of the training. With many
    tokens for each weight, constructions are not raced either: the race reads less than a hundredth of the tokens of
    the training that it decides on.
    """
    asked = config.trials or config.tokens or config.strategy or config.space_reference != DEFAULT_SPACE
    return bool(config.constructions) and not asked and box_seconds is not None and box_seconds < LONG


def _why_short(config: SearchConfig, sure: bool) -> str:
    """Return why a short search races no recipes, and what it trains."""
    if not sure:
        return _SHORT_RACE
    return _NO_RACE if len(config.space.starts) == 1 else _NEAREST


def _many(config: SearchConfig, loaded: Loaded, time_budget: float | None, rate: float) -> bool:
    """Return whether the time, at `rate` training tokens a second, holds many tokens for each weight."""
    return many_tokens(config.tokens or int((time_budget or 0.0) * rate), loaded.spec.parameters)


def _sizes(config: SearchConfig, loaded: Loaded, train_tokens: int) -> tuple[int, ...]:
    """Return the numbers of sequences of the training steps that are timed.

    On a CPU this is only 1, since larger steps are no faster. On an accelerator memory must hold a pass with the usual
    reserve, and a trial must have enough steps within the training tokens.
    """
    if "cpu" in (loaded.device, loaded.workers.device):
        return (1,)
    if config.step_tokens:
        # Timing stops at the first size that is not worth it, and its rate then stands for larger sizes.
        return tuple(sorted({*_doubled(loaded.fit.micro_batch), loaded.fit.micro_batch}))
    tokens = config.tokens or train_tokens
    most = min(PASS_TOKENS // config.sequence_length, tokens // (ENOUGH_STEPS * loaded.step_tokens))

    return tuple(size for size in _doubled(max(1, most)) if size == 1 or _held(loaded, size))


def _alone(config: SearchConfig, loaded: Loaded, time_budget: float | None) -> Callable[[float], int] | None:
    """Return a function for the sequences in a pass of a worker on all CPU cores, or None if no worker trains so.

    If weights are trained, a pass has several sequences, as far as memory allows: much of a small model's step takes as
    long for four sequences as for one. If scales alone are trained, several processes have one sequence each. Which of
    the two a search trains depends on the tokens that its time allows. The function's argument is the rate of training
    in tokens a second.
    """
    if config.explore == 1:
        return None
    given = [] if config.constructions else [*config.space.starts.values(), *config.space.baselines.values()]

    def sequences(rate: float) -> int:
        many = _many(config, loaded, time_budget, rate)
        if config.step_tokens or not (many or any(not one.scales_alone for one in given)):
            return 1
        return max(size for size in _doubled(_MOST_ALONE) if size == 1 or _held(loaded, size))

    return sequences


def _held(loaded: Loaded, size: int) -> bool:
    """Return whether memory holds a step of `size` times the sequences in a single pass."""
    try:
        return loaded.fit_step(size * loaded.step_tokens).micro_batch == size
    except InputError:
        # With several passes a step holds gradients in addition to the activations of its last pass.
        return False


def _doubled(most: int) -> list[int]:
    """Return 1, 2, 4, ... up to `most`."""
    return [2**power for power in range(most.bit_length())]


def _with_step(
    config: SearchConfig,
    loaded: Loaded,
    demand: Demand,
    speeds: Mapping[int, Speed],
    rates: Mapping[int, float],
) -> tuple[Demand, Speed, tuple[str, ...]]:
    """Choose the size of an optimiser step.

    Args:
        config: The checked request.
        loaded: Teacher and data.
        demand: The demand with the tokens of the smallest step.
        speeds: Speeds by the number of sequences in a step, with the teacher's part included.
        rates: Timed training tokens a second, by the number of sequences in a step.

    Returns:
        The demand with the tokens of a step, the speed of such steps, and a note if the size was chosen here.
    """
    if len(rates) == 1 or config.step_tokens:
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
