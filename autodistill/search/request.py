"""What a person asks of a search, and every check of it that needs no model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from autodistill.contracts import SEQUENCE_LENGTH, Direction, ModelSpec
from autodistill.distillation.teacher import (
    TeacherRef,
    resolve_teacher,
)
from autodistill.documents import Source, resolve_data
from autodistill.errors import InputError, NothingFitsError
from autodistill.estimate import cannot_hold, fits, holdable, shortfall, spec_from_config
from autodistill.records.store import RunFolder, default_cache, read_json
from autodistill.search.sampler import SAMPLERS
from autodistill.space import Space, load_space, load_strategy
from autodistill.strategy import Strategy
from autodistill.trial import ASKING_DATA, check_strategy, student_spec
from autodistill.units import Budget, Price

DEFAULT_TEACHER, DEFAULT_DATA, DEFAULT_SPACE = "smollm2", "pydoc", "default"
DEFAULT_METRIC, DEFAULT_SAMPLER = "accuracy", "tpe"
RUNNERS = ("ray", "inline")
_SHORTEST = 8  # tokens of a sequence: fewer give a model nothing to predict from
# What may rank is measured at every rung, so it must come from the simulated student alone.
METRICS: Mapping[str, Direction] = {"accuracy": "max", "agreement": "max", "perplexity": "min", "exact_match": "max"}
WRITTEN = ("exact_match",)  # those for which the student answers questions in writing


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What a person asks of a search; None is "the default", or on resuming "as before".

    Attributes:
        budget: Limits of the deployed student.
        strategy: Name or file of a strategy: it alone is trained, to the plan's tokens, and nothing is searched.
        teacher, data, space, metric, sampler: References and names.
        trials, tokens: Fixed instead of planned; with both, there is no time box unless `time_seconds` gives one. On
            resuming, more trials than were planned extend the search.
        sequence_length: Tokens of a training or evaluated sequence; 256 by default.
        step_tokens: Training tokens of an optimiser step, whole sequences; one sequence by default.
        time_seconds: The time box; on resuming a finished search, of what it is extended by.
        confirm: Further seeds on which the best few are trained before one is chosen; none by default.
        seed: Of data order, projections and proposals.
        name: Of the run; a date and time by default.
        out: Folder of the runs.
        resume: Go on with the run `name`.
        runner: "ray" or "inline".
        cache: Folder of everything that later searches may use again.
        cache_limit_bytes: Disk that cached teacher outputs may take.
        checkpoint_limit_bytes: Disk that checkpoints of stages may take in the run's folder; by default a quarter of
            what is free.
        sharing, forking: Whether trials continue each other's stages, and whether every fourth proposal forks one on
            purpose; off to measure what each is worth. On resuming as before.
        price: Of an hour, for the cost of a plan.
        command: As typed, for the record.
        started: `time.monotonic()` at which the time box began.
    """

    budget: Budget
    strategy: str | None = None
    teacher: str | None = None
    data: str | None = None
    space: str | None = None
    metric: str | None = None
    sampler: str | None = None
    trials: int | None = None
    tokens: int | None = None
    sequence_length: int | None = None
    step_tokens: int | None = None
    time_seconds: float | None = None
    confirm: int | None = None
    seed: int | None = None
    name: str | None = None
    out: Path = Path("results/runs")
    resume: bool = False
    runner: str = "ray"
    cache: Path = field(default_factory=default_cache)
    cache_limit_bytes: int = 8 * 10**9
    checkpoint_limit_bytes: int | None = None
    sharing: bool = True
    forking: bool = True
    price: Price | None = None
    command: str = "autodistill search"
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A request of which everything that can be checked without a model is known to be right."""

    request: SearchRequest
    name: str
    teacher: TeacherRef
    teacher_reference: str
    source: Source
    data_reference: str
    space: Space
    space_reference: str
    metric: str
    sampler: str
    sequence_length: int
    confirm: int
    seed: int
    spec: ModelSpec | None
    stored: Mapping[str, Any] | None


def check_request(request: SearchRequest) -> Checked:
    """Checks all that can be checked before a model is loaded or a file written.

    Raises:
        InputError: Of each of its parts, in one line.
        NothingFitsError: Not even the student that needs least fits the budget.
    """
    for name in ("trials", "tokens", "confirm"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    if request.sequence_length is not None and request.sequence_length < _SHORTEST:
        raise InputError(f"--sequence-length must be at least {_SHORTEST} tokens, not {request.sequence_length}")
    if request.runner not in RUNNERS:
        raise InputError(f"there is no runner {request.runner!r}; the runners are {', '.join(RUNNERS)}")
    stored = _stored(request)
    known = stored or {}
    request = replace(request, **{name: known.get(name, getattr(request, name)) for name in ("sharing", "forking")})
    length = request.sequence_length or known.get("plan", {}).get("sequence_length") or SEQUENCE_LENGTH
    if request.step_tokens is not None and (request.step_tokens < 1 or request.step_tokens % length):
        raise InputError(f"--step-tokens must be a multiple of {length}, a sequence, not {request.step_tokens}")
    metric = request.metric or known.get("metric") or DEFAULT_METRIC
    if metric not in METRICS:
        raise InputError(f"{metric!r} is no metric that can rank; the metrics are {', '.join(METRICS)}")
    sampler = request.sampler or known.get("sampler") or DEFAULT_SAMPLER
    if sampler not in SAMPLERS:
        raise InputError(f"there is no sampler {sampler!r}; the samplers are {', '.join(SAMPLERS)}")
    teacher_reference = request.teacher or known.get("teacher", {}).get("reference") or DEFAULT_TEACHER
    data_reference = request.data or known.get("data", {}).get("reference") or DEFAULT_DATA
    space_reference = request.space or known.get("space") or DEFAULT_SPACE
    teacher = resolve_teacher(teacher_reference)
    source = resolve_data(data_reference)
    if metric in WRITTEN and not source.conversations:
        raise InputError(f"--metric {metric} needs questions with answers: {ASKING_DATA}")
    space = load_space(space_reference)
    if request.strategy is not None:
        space = single(space, request.strategy)
    checked = Checked(
        request=request,
        name=request.name or datetime.now().strftime("search-%Y%m%d-%H%M%S"),
        teacher=teacher,
        teacher_reference=teacher_reference,
        source=source,
        data_reference=data_reference,
        space=space,
        space_reference=space_reference,
        metric=metric,
        sampler=sampler,
        sequence_length=length,
        confirm=request.confirm if request.confirm is not None else known.get("confirm", 0),
        seed=request.seed if request.seed is not None else known.get("seed", 0),
        spec=spec_from_config(teacher.config) if teacher.config else None,
        stored=stored,
    )
    if stored is not None:
        _check_same(checked, stored)
    if checked.spec is not None:
        if request.strategy is not None:
            for strategy in space.baselines.values():
                check_strategy(strategy, checked.spec)
        check_teacher(checked, checked.spec)
    return checked


def single(space: Space, reference: str) -> Space:
    """The space that holds one strategy alone, under the deployments of another space."""
    strategy = load_strategy(reference)
    return replace(
        space, name=Path(reference).stem, dimensions=(), starts={}, baselines={Path(reference).stem: strategy}
    )


def _stored(request: SearchRequest) -> Mapping[str, Any] | None:
    if not request.resume:
        if request.name is not None:
            # Refused here as well as on creation: no work may be spent before.
            RunFolder(request.out, request.name).check_free()
        return None
    if request.name is None:
        raise InputError("--resume goes on with a run: name it with --name")
    return read_json(RunFolder.open(request.out, request.name).search_file)


def _check_same(checked: Checked, stored: Mapping[str, Any]) -> None:
    differing = {
        "teacher": (checked.teacher_reference, stored["teacher"]["reference"]),
        "data": (checked.data_reference, stored["data"]["reference"]),
        "metric": (checked.metric, stored["metric"]),
        "sampler": (checked.sampler, stored["sampler"]),
        "seed": (checked.seed, stored["seed"]),
        "budget": (checked.request.budget.to_json(), stored["budget"]),
        "space": (checked.space.hash, stored["space_hash"]),
    }
    for name, (asked, before) in differing.items():
        if asked != before:
            raise InputError(
                f"the run {checked.name!r} was made with another {name} ({before}, now {asked}): resume it with the "
                "same one, or start a new run under another --name"
            )
    trials = checked.request.trials
    if trials is not None and trials < stored["plan"]["trials"]:
        raise InputError(
            f"the run {checked.name!r} was planned with {stored['plan']['trials']} trials, not {trials}: resume it "
            "with as many or more, or start a new run under another --name"
        )
    planned_as = {"tokens": "tokens", "step_tokens": "batch_tokens", "sequence_length": "sequence_length"}
    for name, planned in planned_as.items():
        asked, option = getattr(checked.request, name), name.replace("_", "-")
        if asked is not None and asked != stored["plan"][planned]:
            raise InputError(
                f"the run {checked.name!r} was planned with {stored['plan'][planned]} {option}, not {asked}: resume it "
                f"without --{option}, or start a new run under another --name"
            )


def check_teacher(checked: Checked, spec: ModelSpec) -> None:
    """Refuses sequences that the teacher cannot read, and a budget that no student of it meets."""
    if checked.sequence_length > spec.max_context:
        raise InputError(
            f"the teacher reads at most {spec.max_context} tokens at once, and sequences have "
            f"{checked.sequence_length}: give --sequence-length {spec.max_context} or less"
        )
    check_budget(checked, spec)


def check_budget(checked: Checked, spec: ModelSpec) -> None:
    """Refuses a budget that no student meets, not even that which needs least."""
    students = by_size(checked.space, spec)
    fitting = {
        strategy: fits(student, holdable(student, checked.space.deployments), checked.request.budget)
        for strategy, student in students
    }
    held = {strategy: found for strategy, found in fitting.items() if found}
    if not held:
        cause = cannot_hold(students[0][1], checked.space.deployments[0])
        raise InputError(f"no deployment of the space {checked.space.name} can hold the smallest student: {cause}")
    # Fewer weights are not always less memory: the KV cache goes with the layers.
    least = min(held, key=lambda strategy: min(fit.slack for fit in held[strategy]))
    reason = shortfall(held[least], checked.request.budget)
    if reason is not None:
        raise NothingFitsError(
            f"nothing fits: of the student that needs least ({least.init.describe()}), {reason}; raise --budget, or "
            "lower --context"
        )


def by_size(space: Space, teacher: ModelSpec) -> list[tuple[Strategy, ModelSpec]]:
    """The extremes of the space that this teacher can be distilled by, and their shapes, the smallest student first.

    Raises:
        InputError: There is none; the message is that of the first.
    """
    found, refused = [], None
    for strategy in space.extremes():
        try:
            check_strategy(strategy, teacher)
            found.append((strategy, student_spec(strategy, teacher)))
        except InputError as error:
            refused = refused or error
    if not found and refused is not None:
        raise refused
    return sorted(found, key=lambda item: item[1].parameters)
