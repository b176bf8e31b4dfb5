"""A request of which all that needs no model is known to be right."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from autodistill.data.dataset import SEQUENCE_LENGTH
from autodistill.data.documents import DataSource, resolve_data
from autodistill.distillation.student.check import check_strategy
from autodistill.distillation.teacher.resolve import TeacherRef, resolve_teacher
from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError
from autodistill.evaluation.base import Direction
from autodistill.evaluation.evaluate import ASKING_DATA
from autodistill.export.compressed_tensors import check_package
from autodistill.hardware.budget import Budget, DeviceBudget, completed, limits_as, read_budget, with_device_of
from autodistill.hardware.catalog import device_from_json
from autodistill.hardware.device import LOCAL, Device
from autodistill.hardware.local import choose_device
from autodistill.models.config import spec_from_config
from autodistill.models.spec import ModelSpec
from autodistill.runs.remote_copy import check_free, check_unheld, pull
from autodistill.runs.results import selection as choice
from autodistill.runs.results.objectives import Objective, objectives_of
from autodistill.runs.run_folder import RunFolder
from autodistill.search.algorithms.sampler import SAMPLERS
from autodistill.search.planning.durations import Speed, trial_seconds
from autodistill.search.planning.plan import EXPLORE
from autodistill.search.request.earlier_runs import check_asked, check_space, parse_runs
from autodistill.search.request.feasibility import check_teacher, narrowed, on_its_device, shortest_context
from autodistill.search.request.metrics import Asked, ask, content
from autodistill.search.request.request import (
    DEFAULT_DATA,
    DEFAULT_SAMPLER,
    DEFAULT_SPACE,
    DEFAULT_TEACHER,
    RUNNERS,
    SearchRequest,
)
from autodistill.strategy.space import Space, load_space, load_strategy
from autodistill.units import format_duration
from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import read_json
from autodistill.utils.storage import Storage, check_folder

# What `search.json` must say for a run to go on.
_RESUMED = (
    *("metric", "direction", "plan", "speed", "budget", "teacher.fingerprint"),
    *("data.fingerprint", "space_definition", "space_hash", "sampler", "seed"),
)
_SEEDS = 2**32
_MANY = 10_000
_LEAST_EXPLORED = 0.1
# More is a slip: a thousand times what the longest trainings took, and steps of more than any of them had.
_MOST = {"trials": 10**6, "tokens": 10**16, "confirm": 10**6, "step_tokens": 10**9}
_SHORTEST = 8  # tokens of a sequence: fewer give a model nothing to predict from


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A request of which everything that can be checked without a model is known to be right."""

    request: SearchRequest
    name: str
    teacher: TeacherRef
    teacher_reference: str
    source: DataSource
    data_reference: str
    space: Space
    space_reference: str
    baselines: tuple[str, ...] | None
    asked: Asked
    objectives: tuple[Objective, ...]
    device: Device | None
    sampler: str
    sequence_length: int
    warm_start: tuple[str, ...]
    explore: float
    confirm: int
    students_only: bool
    seed: int
    spec: ModelSpec
    stored: Mapping[str, Any] | None
    storage: Storage | None

    @property
    def metric(self) -> str:
        """What ranks, and chooses what is exported: the first of the objectives."""
        return self.objectives[0].name

    @property
    def direction(self) -> Direction:
        """Whether more or less of it is better."""
        return self.objectives[0].direction


def check_request(request: SearchRequest) -> Checked:
    """Checks all that can be checked before a model is loaded or a file written.

    Raises:
        InputError: Of each of its parts, in one line.
        NothingFitsError: Not even the student that needs least fits the budget.
    """
    _check_alone(request)
    storage = None if request.storage is None else Storage(request.storage)
    if storage is not None:
        storage.check()
    stored = _stored(request, storage)
    known = stored or {}
    request = replace(request, **{name: known.get(name, getattr(request, name)) for name in ("sharing", "forking")})
    length = request.sequence_length or known.get("plan", {}).get("sequence_length") or SEQUENCE_LENGTH
    if request.step_tokens is not None and (request.step_tokens < 1 or request.step_tokens % length):
        raise InputError(f"--step-tokens must be a multiple of {length}, a sequence, not {request.step_tokens}")
    asked, objectives = ask(request, known)
    sampler = _first(request.sampler, known.get("sampler"), DEFAULT_SAMPLER)
    if sampler not in SAMPLERS:
        raise InputError(f"there is no sampler {sampler!r}; the samplers are {', '.join(SAMPLERS)}")
    teacher_reference = _first(request.teacher, known.get("teacher", {}).get("reference"), DEFAULT_TEACHER)
    data_reference = _first(request.data, known.get("data", {}).get("reference"), DEFAULT_DATA)
    space_reference = _first(request.space, known.get("space"), DEFAULT_SPACE)
    teacher = resolve_teacher(_as_before(teacher_reference, known.get("teacher", {})))
    source = resolve_data(data_reference)
    if asked.written and not source.conversations:
        raise InputError(f"{asked.written} needs questions with answers: {ASKING_DATA}")
    space = load_space(space_reference)
    baselines = request.baselines or _named(known.get("baselines"))
    if baselines is not None:
        space = against(space, baselines)
    if request.strategy is not None:
        space = single(space, request.strategy)
    _check_cache(request.cache)
    spec = spec_from_config(teacher.config)
    request = _budget_as_before(_at_context(request, known, spec, space), known)
    space = _under_budget(space, spec, request.budget, known)
    _check_possible(space, request)
    for deployment in space.deployments:
        check_package(deployment)
    checked = Checked(
        request=request,
        name=request.name or datetime.now().strftime("search-%Y%m%d-%H%M%S"),
        teacher=teacher,
        teacher_reference=teacher_reference,
        source=source,
        data_reference=data_reference,
        space=space,
        space_reference=space_reference,
        baselines=baselines,
        asked=asked,
        objectives=objectives,
        device=_device(request, known, objectives),
        sampler=sampler,
        sequence_length=length,
        warm_start=parse_runs(request.warm_start) if request.warm_start is not None else _warmed_by(known),
        explore=_explore(request, known, space),
        confirm=request.confirm if request.confirm is not None else known.get("confirm", 0),
        students_only=_students_only(request, stored),
        seed=request.seed if request.seed is not None else known.get("seed", 0),
        spec=spec,
        stored=stored,
        storage=_of_run(request, storage, known),
    )
    if stored is not None:
        _check_kind(checked, stored)
        _check_same(checked, stored)
        _check_time(checked, stored)
    else:
        check_space(request.out, checked.warm_start, space)
        check_asked(request.out, checked.warm_start, asked.record, [one.name for one in objectives])
    check_students(checked, spec)
    return checked


def _check_alone(request: SearchRequest) -> None:
    """Refuses what is wrong whatever else is asked for, or was before."""
    for name, most in _MOST.items():
        value = getattr(request, name)
        if value is not None and not 1 <= value <= most:
            bound = "at least 1" if value < 1 else f"at most {most:,}"
            raise InputError(f"--{name.replace('_', '-')} must be {bound}, not {value}")
    if request.sequence_length is not None and request.sequence_length < _SHORTEST:
        raise InputError(f"--sequence-length must be at least {_SHORTEST} tokens, not {request.sequence_length}")
    if request.runner not in RUNNERS:
        raise InputError(f"there is no runner {request.runner!r}; the runners are {', '.join(RUNNERS)}")
    if request.ray_address is not None and request.runner == "inline":
        raise InputError("--ray-address names a Ray cluster, which --runner inline does not use: leave one of them out")
    for option, folder in (("--out", request.out), ("--cache", request.cache)):
        check_folder(folder, option)


def check_students(checked: Checked, spec: ModelSpec) -> None:
    """Refuses strategies that were asked for by name, and a budget, that a teacher of this shape does not allow.

    Raises:
        InputError, NothingFitsError: As `check_strategy` and `check_teacher`.
    """
    if checked.request.strategy is not None or checked.baselines is not None:
        for name, strategy in checked.space.baselines.items():
            try:
                check_strategy(strategy, spec)
            except InputError as error:
                raise InputError(f"the strategy {name} does not suit this teacher: {error}") from error
    check_teacher(spec, checked.space, checked.request.budget, checked.sequence_length)


def _first(*given: str | None) -> str:
    """What is asked, or was before, or is the default; an empty text is asked too, and refused for what it is."""
    return next(one for one in given if one is not None)


def _as_before(reference: str, known: Mapping[str, Any]) -> str:
    """A teacher's reference, on resuming with the commit of the hub's that the run was made with."""
    revision = known.get("revision")
    if revision is None or reference != known.get("reference") or "@" in reference:
        return reference
    return f"{reference}@{revision}"


def _explore(request: SearchRequest, known: Mapping[str, Any], space: Space) -> float:
    """Share of the time for training that goes to trials, on resuming as before; all of it where nothing is left of the
    box for training the best on.
    """
    asked = request.explore
    if asked is not None and not _LEAST_EXPLORED <= asked <= 1:
        raise InputError(f"--explore is a share from {_LEAST_EXPLORED:g} to 1, which trains nothing on, not {asked:g}")
    if known:
        before = known.get("explore", 1.0)
        if asked not in (None, before):
            raise InputError(
                f"the run {request.name!r} was planned with --explore {before:g}, not {asked:g}: resume it without it, "
                "or start a new run under another --name"
            )
        if known.get("plan", {}).get("longest", 1.0) > 1 and request.confirm:
            raise InputError(
                f"the run {request.name!r} trained its best on in the rest of its box, so that --confirm, which trains "
                "again what the plan's tokens gave, would not compare the same: start a new run with --confirm"
            )
        return float(before)
    taken = {
        "--confirm trains the best again on further seeds": bool(request.confirm),
        f"the space {space.name} says how far the best are trained further (lengths)": len(space.lengths) > 1,
        "--trials and --tokens fix the work, and there is no time budget": bool(
            request.trials and request.tokens and request.time_seconds is None
        ),
    }
    why = next((reason for reason, holds in taken.items() if holds), None)
    if why is not None and asked is not None and asked < 1:
        raise InputError(f"--explore {asked:g} leaves time to train the best further, but {why}: leave one of them out")
    if why is not None or request.strategy is not None:
        return 1.0
    return EXPLORE if asked is None else asked


def _students_only(request: SearchRequest, stored: Mapping[str, Any] | None) -> bool:
    """Whether trained students alone are chosen among: where that is asked for, and of one strategy alone always."""
    if request.students_only is None and stored is not None:
        return choice.students_only(stored)
    return bool(request.students_only) or request.strategy is not None


def _at_context(request: SearchRequest, known: Mapping[str, Any], spec: ModelSpec, space: Space) -> SearchRequest:
    """The request with the context that its budget has where none is asked for."""
    if not request.context_by_default:
        return request
    context = known.get("budget", {}).get("context") or min(request.budget.context, shortest_context(spec, space)[0])
    return replace(request, budget=replace(request.budget, context=context))


def _budget_as_before(request: SearchRequest, known: Mapping[str, Any]) -> SearchRequest:
    """The request with its budget as it was where nobody asked for another, if a run goes on."""
    if "budget" not in known:
        return request
    before, by_default = read_budget(known["budget"]), request.device_by_default
    budget = completed(
        request.budget, before, memory=request.memory_by_default, batch=request.batch_by_default, device=by_default
    )
    return replace(request, budget=with_device_of(budget, before, by_default=by_default))


def _under_budget(space: Space, spec: ModelSpec, budget: Budget, known: Mapping[str, Any]) -> Space:
    """The space that this budget is searched in, on resuming that which it was."""
    if known:
        whole = space if known.get("space_definition", {}).get("optional") else space.required()
        # Runs of earlier versions have deployments that their device does not serve.
        return whole if whole.hash == known.get("space_hash") else on_its_device(whole, budget)
    return narrowed(on_its_device(space, budget), spec, budget)


def _check_possible(space: Space, request: SearchRequest) -> None:
    """Refuses more trials than a finite space holds strategies, and seeds that no generator takes."""
    last = (request.seed or 0) + (request.confirm or 0)
    if not 0 <= (request.seed or 0) <= last < _SEEDS:
        raise InputError(f"seeds lie between 0 and {_SEEDS - 1}, and --seed with those of --confirm reaches {last}")
    grids = {dimension.path: dimension.domain.grid for dimension in space.dimensions}
    if request.trials is None or not grids or None in grids.values():
        return
    # Of a space of more points than anybody would try, it is enough to know that.
    wanted = min(request.trials, _MANY)
    points = sum(1 for _ in islice(space.points(lambda dimension: grids[dimension.path] or ()), wanted))
    if points < wanted:
        raise InputError(
            f"--trials {request.trials} are more than the space {space.name} holds, which is {points} strategies: ask "
            "for that many, or give another --space"
        )


def _check_cache(cache: Path) -> None:
    """Refuses a cache that cannot be written; it is made here, since nothing else would tell."""
    try:
        make_folder(cache)
        writable = os.access(cache, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"cannot write into {cache}: {error.strerror}; choose another folder with --cache") from error
    if not writable:
        raise InputError(f"cannot write into {cache}: it is not yours to write; choose another folder with --cache")


def _device(request: SearchRequest, known: Mapping[str, Any], objectives: tuple[Objective, ...]) -> Device | None:
    """Where latencies are predicted, if they are: on resuming the device as it was, with the figures it had."""
    if all(one.name != "latency" for one in objectives):
        return None
    before = device_from_json(known["device"]) if known.get("device") else None
    if isinstance(request.budget, DeviceBudget):
        found = request.budget.device
    elif request.device is None and before is not None:
        return before
    else:
        found = choose_device(request.device or LOCAL, request.cache)
    return before if before is not None and before.name == found.name else found


def _warmed_by(stored: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the runs that a stored one was warm-started by."""
    return tuple(stored.get("warm_start", {}).get("runs", ()))


def _named(stored: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if stored is None else tuple(stored)


def _choice(students_only: bool) -> str:
    return "students only" if students_only else "whatever is best"


def _told(baselines: Sequence[str] | None) -> str:
    return "the space's" if baselines is None else ", ".join(baselines)


def against(space: Space, references: Sequence[str]) -> Space:
    """The space with other baselines, each by the name of its file.

    Raises:
        InputError: No such strategy, or two of one name.
    """
    named = {Path(reference).stem: load_strategy(reference) for reference in references}
    if len(named) < len(references):
        raise InputError(f"each --baseline needs a name of its own, not {', '.join(references)}: rename a file")
    return replace(space, baselines=named)


def single(space: Space, reference: str) -> Space:
    """The space that holds one strategy alone, under the deployments of another space."""
    strategy = load_strategy(reference)
    return replace(
        space,
        name=Path(reference).stem,
        dimensions=(),
        starts={},
        optional={},
        baselines={Path(reference).stem: strategy},
    )


def _of_run(request: SearchRequest, storage: Storage | None, known: Mapping[str, Any]) -> Storage | None:
    """Where the run is kept; a resumed one where it was before."""
    before = known.get("storage")
    if request.resume and request.storage not in (None, before):
        raise InputError(
            f"the run {request.name!r} is kept on {before or 'this machine alone'}, not on {request.storage}: resume "
            "it with the same --storage, or start a new run under another --name"
        )
    return storage if before is None or storage is not None else Storage(before)


def _stored(request: SearchRequest, storage: Storage | None) -> Mapping[str, Any] | None:
    if not request.resume:
        if request.name is not None:
            # Refused here as well as on creation: no work may be spent before.
            RunFolder(request.out, request.name).check_free()
            if storage is not None:
                check_free(storage.at(request.name))
        return None
    if request.name is None:
        raise InputError("--resume goes on with a run: name it with --name")
    storage = _keeping(request, storage)
    if storage is not None:
        # Refused here as well as where the lease is taken: no work may be spent before.
        check_unheld(storage.at(request.name))
        if not pull(request.out / request.name, storage.at(request.name)):
            raise InputError(
                f"there is no run {request.name!r}, neither in {request.out} nor on {storage.uri}: check --name, "
                "and whether it was begun with this --storage"
            )
    return RunFolder.open(request.out, request.name).asked(*_RESUMED)


def _keeping(request: SearchRequest, storage: Storage | None) -> Storage | None:
    """The storage whose `search.json` counts for a run that goes on: its own, whether it is asked for or not.

    None where another one is asked for, which is refused once the run is known: what has its name there is another run.
    """
    assert request.name is not None
    file = RunFolder(request.out, request.name).search_file
    if not file.exists():
        return storage
    before = read_json(file).get("storage")
    if before is None or request.storage not in (None, before):
        return None
    if storage is None:
        storage = Storage(before)
        storage.check()
    return storage


def _check_kind(checked: Checked, stored: Mapping[str, Any]) -> None:
    """Refuses to go on with a run of one strategy as a search, or with a search as one of these."""
    was_search = stored.get("space_definition", {}).get("dimensions") != {}
    if was_search == (checked.request.strategy is None):
        return
    made, command = ("is a search", "search") if was_search else ("trained one strategy", "distill STRATEGY")
    raise InputError(
        f"the run {checked.name!r} {made}: resume it with autodistill {command} --resume --name {checked.name}, or "
        "start a new run under another --name"
    )


def _check_same(checked: Checked, stored: Mapping[str, Any]) -> None:
    budget = read_budget(stored["budget"])
    now = limits_as(checked.request.budget, budget)
    limits: tuple[object, object] = (now.to_json(), budget.to_json())
    if now.describe() != budget.describe():
        limits = (now.describe(), budget.describe())
    differing = {
        "teacher": (checked.teacher_reference, stored["teacher"]["reference"]),
        "data": (checked.data_reference, stored["data"]["reference"]),
        "objectives": (
            ",".join(one.name for one in checked.objectives),
            ",".join(one.name for one in objectives_of(stored)),
        ),
        "device": (checked.device and checked.device.name, (stored.get("device") or {}).get("name")),
        "task or command": (content(checked.asked.record), content(stored.get("asked", checked.asked.record))),
        "sampler": (checked.sampler, stored["sampler"]),
        "warm start": (", ".join(checked.warm_start), ", ".join(_warmed_by(stored))),
        "choice": (_choice(checked.students_only), _choice(choice.students_only(stored))),
        "seed": (checked.seed, stored["seed"]),
        "budget": limits,
        "baseline": (_told(checked.baselines), _told(stored.get("baselines"))),
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


def _check_time(checked: Checked, stored: Mapping[str, Any]) -> None:
    """Refuses time for a finished run that its end takes before anything is trained.

    One that has not finished may be given less: it is then ended with what it has.
    """
    given = checked.request.time_seconds
    if given is None or "seconds" not in stored:
        return
    plan = Plan.from_json(stored["plan"])
    first = trial_seconds(
        plan.rungs[0], plan.rung_eval_tokens, checked.spec.parameters, Speed(**stored["speed"]), judged=False
    )
    end = sum(plan.seconds.get(phase, 0.0) for phase in ("workers", "export", "test"))
    if given < end + first:
        raise InputError(
            f"--time {format_duration(given)} adds no training to the run {checked.name!r}: what begins and ends a "
            f"search is expected to take {format_duration(end)}, and the least training {format_duration(first)}: give "
            f"--time {math.ceil(1.1 * (end + first))}s or more"
        )
