"""Checks of a whole request that need no loaded model."""

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
from autodistill.search.request.earlier_runs import check_asked, check_scored_alike, check_space
from autodistill.search.request.early_checks import check_name, check_numbers
from autodistill.search.request.feasibility import check_teacher
from autodistill.search.request.given_space import under_budget
from autodistill.search.request.metrics import content
from autodistill.search.request.references import absolute, is_gone
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.resolve import SearchConfig, resolve, warmed_by
from autodistill.strategy.space import Space
from autodistill.units import format_duration
from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import read_json
from autodistill.utils.storage import Storage, check_folder

# Keys that `search.json` must have for a run to be resumed.
_RESUMED = (
    *("metric", "direction", "plan", "speed", "budget", "teacher.fingerprint"),
    *("data.fingerprint", "space_definition", "space_hash", "sampler", "seed"),
)
_SEEDS = 2**32
_MANY = 10_000


def check_request(request: SearchRequest) -> SearchConfig:
    """Resolve a request, and check all that can be checked before a model is loaded or a file written.

    Raises:
        InputError: A part of the request is wrong. The message is one line.
        NothingFitsError: Not even the student that needs the least memory fits the budget.
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
    if config.requested.written and not config.source.conversations:
        raise InputError(f"{config.requested.written} needs questions with answers: {ASKING_DATA}")
    _check_possible(config.space, request)
    for deployment in config.space.deployments:
        check_package(deployment)
    if stored is not None:
        _check_kind(config, stored)
        _check_same(request, config, stored)
        _check_time(config, stored)
    else:
        check_space(config.out, config.warm_start, config.space)
        check_asked(config.out, config.warm_start, config.requested.record, [one.name for one in config.objectives])
        check_scored_alike(config.out, config.warm_start, config.scoring)
    check_students(config, config.spec)
    return config


def _cache(request: SearchRequest) -> Path:
    return cache_folder(request.cache)


def check_students(config: SearchConfig, spec: ModelSpec) -> None:
    """Refuse a budget, or strategies asked for by name, that do not suit a teacher of this shape.

    Raises:
        InputError, NothingFitsError: See `check_strategy` and `check_teacher`.
    """
    if config.strategy is not None or config.baselines is not None:
        for name, strategy in config.space.baselines.items():
            try:
                check_strategy(strategy, spec, config.space.deployments)
            except InputError as error:
                raise InputError(f"the strategy {name} does not suit this teacher: {error}") from error
    space = config.space
    if spec.process_bytes and config.constructions and config.stored is None:
        # What the space offers was chosen before llama.cpp's process was measured.
        _, space = under_budget(config.declared, spec, config.budget, {}, config.kv_type)
    check_teacher(spec, space, config.budget, config.sequence_length)


def _check_possible(space: Space, request: SearchRequest) -> None:
    """Refuse more trials than a finite space has strategies, and seeds that random generators do not accept."""
    last = (request.seed or 0) + (request.confirm or 0)
    if not 0 <= (request.seed or 0) <= last < _SEEDS:
        raise InputError(f"seeds lie between 0 and {_SEEDS - 1}, and --seed with those of --confirm reaches {last}")
    grids = {dimension.path: dimension.domain.grid for dimension in space.dimensions}
    if request.trials is None or not grids or None in grids.values():
        return
    # Counting stops at a number of points that nobody would try.
    wanted = min(request.trials, _MANY)
    points = sum(1 for _ in islice(space.points(lambda dimension: grids[dimension.path] or ()), wanted))
    if points < wanted:
        raise InputError(
            f"--trials {request.trials} is more than the {points} strategies of the space {space.name}: ask for that "
            "many, or give another --space"
        )


def _check_cache(cache: Path) -> None:
    """Refuse a cache folder that cannot be written. It is created here, because only that shows whether it can be."""
    try:
        make_folder(cache)
        writable = os.access(cache, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"cannot write into {cache}: {error.strerror}; choose another folder with --cache") from error
    if not writable:
        raise InputError(f"cannot write into {cache}: it is not yours to write; choose another folder with --cache")


def _choice(students_only: bool) -> str:
    return "students only" if students_only else "whatever is best"


def _baseline_names(baselines: Sequence[str] | None) -> str:
    return "the space's" if baselines is None else ", ".join(Path(one).stem for one in baselines)


def _stored(request: SearchRequest, storage: Storage | None) -> Mapping[str, Any] | None:
    # Creating the run checks this too, but only after work is spent.
    check_name(request)
    if not request.resume:
        if request.name is not None and storage is not None:
            check_free(storage.at(request.name))
        return None
    assert request.name is not None
    storage = _keeping(request, storage)
    if storage is not None:
        # Taking the lease checks this too, but only after work is spent.
        check_unheld(storage.at(request.name))
        if not pull(Path(request.runs) / request.name, storage.at(request.name)):
            raise InputError(
                f"there is no run {request.name!r}, neither in {request.runs} nor on {storage.uri}: check --name, and "
                "whether it was begun with this --storage"
            )
    stored = RunFolder.open(Path(request.runs), request.name).read_settings(*_RESUMED)
    before = stored.get("storage")
    if request.storage not in (None, before):
        raise InputError(
            f"the run {request.name!r} is kept on {before or 'this machine alone'}, not on {request.storage}: resume "
            "it with the same --storage, or start a new run under another --name"
        )
    return stored


def _keeping(request: SearchRequest, storage: Storage | None) -> Storage | None:
    """Return the storage whose `search.json` counts for a resumed run: the run's own, even if the request names none.

    None if the request names another storage: a run of this name there is another run. The caller refuses it later.
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


def _place(stored: Mapping[str, Any], what: str, now: str) -> str:
    """Return where a run's teacher or data are: as stored, or where the request says if nothing is there any more.

    Whether they are the same is seen from their fingerprints, once they are loaded.
    """
    before: str = stored[what]["reference"]
    return now if is_gone(before, what) else absolute(before)


def _check_kind(config: SearchConfig, stored: Mapping[str, Any]) -> None:
    """Refuse to resume a run of a single strategy as a search, or a search as a run of a single strategy."""
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
        "teacher": (config.teacher_reference, _place(stored, "teacher", config.teacher_reference)),
        "data": (config.data_reference, _place(stored, "data", config.data_reference)),
        "objectives": (
            ",".join(one.name for one in config.objectives),
            ",".join(one.name for one in objectives_of(stored)),
        ),
        "device": (config.device and config.device.name, (stored.get("device") or {}).get("name")),
        "task or command": (content(config.requested.record), content(stored.get("asked", config.requested.record))),
        "sampler": (config.sampler, stored["sampler"]),
        "warm start": (", ".join(config.warm_start), ", ".join(warmed_by(stored))),
        "choice": (_choice(config.students_only), _choice(choice.students_only(stored))),
        "seed": (config.seed, stored["seed"]),
        "scoring": (config.scoring, stored.get("scoring", "float32")),
        "budget": limits,
        "baseline": (_baseline_names(config.baselines), _baseline_names(stored.get("baselines"))),
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
    """Refuse new time for a finished run if it does not hold any training besides the start and end of a search.

    An unfinished run may get less time: it then ends with what it has.
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
