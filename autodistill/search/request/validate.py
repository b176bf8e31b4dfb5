"""A request of which all that needs no model is known to be right."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from autodistill.distillation.student.check import check_strategy
from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError
from autodistill.evaluation.evaluate import ASKING_DATA
from autodistill.export.compressed_tensors import check_package
from autodistill.hardware.budget import limits_as, read_budget
from autodistill.models.spec import ModelSpec
from autodistill.options import cache_folder, parsed
from autodistill.runs.remote_copy import check_free, check_unheld, pull
from autodistill.runs.results import selection as choice
from autodistill.runs.results.objectives import objectives_of
from autodistill.runs.run_folder import RunFolder
from autodistill.search.algorithms.names import check_sampler
from autodistill.search.planning.durations import Speed, trial_seconds
from autodistill.search.request.alone import check_name, check_numbers
from autodistill.search.request.earlier_runs import check_asked, check_scored_alike, check_space
from autodistill.search.request.feasibility import check_teacher
from autodistill.search.request.metrics import content
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.resolve import SearchConfig, resolve, warmed_by
from autodistill.strategy.space import Space
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


def check_request(request: SearchRequest) -> SearchConfig:
    """Resolve a request, and check all that can be checked before a model is loaded or a file written.

    Raises:
        InputError: Of each of its parts, in one line.
        NothingFitsError: Not even the student that needs least fits the budget.
    """
    check_numbers(request)
    for option, folder in (("--runs", Path(request.runs)), ("--cache", _cache(request))):
        check_folder(folder, option)
    storage = None if request.storage is None else Storage(request.storage)
    if storage is not None:
        storage.check()
    stored = _stored(request, storage)
    _check_cache(_cache(request))
    config = resolve(request, stored)
    check_sampler(config.sampler)
    length = config.sequence_length
    step_tokens = parsed(request.step_tokens)
    if step_tokens is not None and step_tokens % length:
        raise InputError(f"--step-tokens must be a multiple of {length}, a sequence, not {step_tokens}")
    if config.asked.written and not config.source.conversations:
        raise InputError(f"{config.asked.written} needs questions with answers: {ASKING_DATA}")
    _check_possible(config.space, request)
    for deployment in config.space.deployments:
        check_package(deployment)
    if stored is not None:
        _check_kind(config, stored)
        _check_same(request, config, stored)
        _check_time(config, stored)
    else:
        check_space(config.out, config.warm_start, config.space)
        check_asked(config.out, config.warm_start, config.asked.record, [one.name for one in config.objectives])
        check_scored_alike(config.out, config.warm_start, config.scoring)
    check_students(config, config.spec)
    return config


def _cache(request: SearchRequest) -> Path:
    return cache_folder(request.cache)


def check_students(config: SearchConfig, spec: ModelSpec) -> None:
    """Refuse strategies that were asked for by name, and a budget, that a teacher of this shape does not allow.

    Raises:
        InputError, NothingFitsError: As `check_strategy` and `check_teacher`.
    """
    if config.strategy is not None or config.baselines is not None:
        for name, strategy in config.space.baselines.items():
            try:
                check_strategy(strategy, spec, config.space.deployments)
            except InputError as error:
                raise InputError(f"the strategy {name} does not suit this teacher: {error}") from error
    check_teacher(spec, config.space, config.budget, config.sequence_length)


def _check_possible(space: Space, request: SearchRequest) -> None:
    """Refuse more trials than a finite space holds strategies, and seeds that no generator takes."""
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
    """Refuse a cache that cannot be written; it is made here, since nothing else would tell."""
    try:
        make_folder(cache)
        writable = os.access(cache, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"cannot write into {cache}: {error.strerror}; choose another folder with --cache") from error
    if not writable:
        raise InputError(f"cannot write into {cache}: it is not yours to write; choose another folder with --cache")


def _choice(students_only: bool) -> str:
    return "students only" if students_only else "whatever is best"


def _told(baselines: Sequence[str] | None) -> str:
    return "the space's" if baselines is None else ", ".join(baselines)


def _stored(request: SearchRequest, storage: Storage | None) -> Mapping[str, Any] | None:
    # Refused here as well as on creation: no work may be spent before.
    check_name(request)
    if not request.resume:
        if request.name is not None and storage is not None:
            check_free(storage.at(request.name))
        return None
    assert request.name is not None
    storage = _keeping(request, storage)
    if storage is not None:
        # Refused here as well as where the lease is taken: no work may be spent before.
        check_unheld(storage.at(request.name))
        if not pull(Path(request.runs) / request.name, storage.at(request.name)):
            raise InputError(
                f"there is no run {request.name!r}, neither in {request.runs} nor on {storage.uri}: check --name, and "
                "whether it was begun with this --storage"
            )
    stored = RunFolder.open(Path(request.runs), request.name).asked(*_RESUMED)
    before = stored.get("storage")
    if request.storage not in (None, before):
        raise InputError(
            f"the run {request.name!r} is kept on {before or 'this machine alone'}, not on {request.storage}: resume "
            "it with the same --storage, or start a new run under another --name"
        )
    return stored


def _keeping(request: SearchRequest, storage: Storage | None) -> Storage | None:
    """The storage whose `search.json` counts for a run that goes on: its own, whether it is asked for or not.

    None where another one is asked for, which is refused once the run is known: what has its name there is another run.
    """
    assert request.name is not None
    file = RunFolder(Path(request.runs), request.name).search_file
    if not file.exists():
        return storage
    before = read_json(file).get("storage")
    if before is None or request.storage not in (None, before):
        return None
    if storage is None:
        storage = Storage(before)
        storage.check()
    return storage


def _check_kind(config: SearchConfig, stored: Mapping[str, Any]) -> None:
    """Refuse to go on with a run of one strategy as a search, or with a search as one of these."""
    was_search = stored.get("space_definition", {}).get("dimensions") != {}
    if was_search == (config.strategy is None):
        return
    made, command = ("is a search", "search") if was_search else ("trained one strategy", "distill STRATEGY")
    raise InputError(
        f"the run {config.name!r} {made}: resume it with autodistill {command} --resume --name {config.name}, or "
        "start a new run under another --name"
    )


def _check_same(request: SearchRequest, config: SearchConfig, stored: Mapping[str, Any]) -> None:
    budget = read_budget(stored["budget"])
    now = limits_as(config.budget, budget)
    limits: tuple[object, object] = (now.to_json(), budget.to_json())
    if now.describe() != budget.describe():
        limits = (now.describe(), budget.describe())
    differing = {
        "teacher": (config.teacher_reference, stored["teacher"]["reference"]),
        "data": (config.data_reference, stored["data"]["reference"]),
        "objectives": (
            ",".join(one.name for one in config.objectives),
            ",".join(one.name for one in objectives_of(stored)),
        ),
        "device": (config.device and config.device.name, (stored.get("device") or {}).get("name")),
        "task or command": (content(config.asked.record), content(stored.get("asked", config.asked.record))),
        "sampler": (config.sampler, stored["sampler"]),
        "warm start": (", ".join(config.warm_start), ", ".join(warmed_by(stored))),
        "choice": (_choice(config.students_only), _choice(choice.students_only(stored))),
        "seed": (config.seed, stored["seed"]),
        "scoring": (config.scoring, stored.get("scoring", "float32")),
        "budget": limits,
        "baseline": (_told(config.baselines), _told(stored.get("baselines"))),
        "space": (config.space.hash, stored["space_hash"]),
    }
    for name, (asked, before) in differing.items():
        if asked != before:
            raise InputError(
                f"the run {config.name!r} was made with another {name} ({before}, now {asked}): resume it with the "
                "same one, or start a new run under another --name"
            )
    trials = config.trials
    if trials is not None and trials < stored["plan"]["trials"]:
        raise InputError(
            f"the run {config.name!r} was planned with {stored['plan']['trials']} trials, not {trials}: resume it "
            "with as many or more, or start a new run under another --name"
        )
    planned_as = {"tokens": "tokens", "step_tokens": "batch_tokens", "sequence_length": "sequence_length"}
    for name, planned in planned_as.items():
        asked, option = getattr(request, name), name.replace("_", "-")
        if asked is not None and asked != stored["plan"][planned]:
            raise InputError(
                f"the run {config.name!r} was planned with {stored['plan'][planned]} {option}, not {asked}: resume it "
                f"without --{option}, or start a new run under another --name"
            )


def _check_time(config: SearchConfig, stored: Mapping[str, Any]) -> None:
    """Refuse time for a finished run that its end takes before anything is trained.

    One that has not finished may be given less: it is then ended with what it has.
    """
    given = config.time_seconds
    if given is None or "seconds" not in stored:
        return
    plan = Plan.from_json(stored["plan"])
    first = trial_seconds(
        plan.rungs[0], plan.rung_eval_tokens, config.spec.parameters, Speed(**stored["speed"]), judged=False
    )
    end = sum(plan.seconds.get(phase, 0.0) for phase in ("workers", "export", "test"))
    if given < end + first:
        raise InputError(
            f"--time {format_duration(given)} adds no training to the run {config.name!r}: what begins and ends a "
            f"search is expected to take {format_duration(end)}, and the least training {format_duration(first)}: give "
            f"--time {math.ceil(1.1 * (end + first))}s or more"
        )
