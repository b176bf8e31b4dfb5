"""A request resolved: what is asked, or was before, or is the default, for every setting and in this one place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from autodistill.data.dataset import SEQUENCE_LENGTH
from autodistill.data.documents import DataSource, resolve_data
from autodistill.data.general_text import PACKAGED, resolve_general
from autodistill.data.loaded import data_reference
from autodistill.distillation.teacher.loaded import teacher_reference
from autodistill.distillation.teacher.resolve import TeacherRef, resolve_teacher
from autodistill.errors import InputError
from autodistill.evaluation.base import Direction, Goal
from autodistill.hardware.budget import CONTEXT, Budget, DeviceBudget, Limits, read_budget
from autodistill.hardware.catalog import device_from_json
from autodistill.hardware.device import LOCAL, Device
from autodistill.hardware.local import choose_device
from autodistill.models.config import spec_from_config
from autodistill.models.spec import ModelSpec
from autodistill.options import DEFAULT_DATA, DEFAULT_TEACHER, cache_folder, parsed
from autodistill.quantization.formats import CACHE_BYTES
from autodistill.runs.results import selection as choice
from autodistill.runs.results.objectives import Objective
from autodistill.search.construction.construction import Construction, with_constructions
from autodistill.search.construction.plain import plain_constructions
from autodistill.search.construction.recipe import first_prior
from autodistill.search.planning.plan import EXPLORE, race_share
from autodistill.search.prior.prior import Prior
from autodistill.search.request.earlier_runs import parse_runs
from autodistill.search.request.feasibility import on_its_device, shortest_context
from autodistill.search.request.metrics import Asked, ask
from autodistill.search.request.request import (
    DEFAULT_SAMPLER,
    DEFAULT_SPACE,
    SearchRequest,
    joined,
)
from autodistill.strategy.deployment import serving
from autodistill.strategy.named import load_strategy
from autodistill.strategy.space import Space, load_space, space_reference
from autodistill.strategy.strategy import Strategy
from autodistill.utils.durable import make_folder
from autodistill.utils.json_files import replacing
from autodistill.utils.plain_dataclass import check_choice
from autodistill.utils.storage import Storage

T = TypeVar("T")
_LEAST_EXPLORED = 0.1
_LLAMA_CPP = "llama.cpp"
# Metrics of a text, which is learnt beside whatever else a student knows.
_OF_TEXT = ("accuracy", "agreement", "kl", "ece", "perplexity")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The settings of a search, final: nothing here is "as before" or "by default" any more.

    Attributes:
        name, named: Of the run, and whether somebody chose it; another one may get a number at its end.
        strategy: Reference of the strategy that alone is trained; None of a search.
        baselines: References of the strategies to beat; None where they are the space's own.
        device: Where latencies are predicted, if they are.
        declared: The space as it was read; `space` is what is searched.
        constructions: What a solved space offers under the budget, by plain rules until the teacher is there.
        kv_type: Of all caches in llama.cpp; None where a solver may choose, and others have 16 bits.
        served_by: The runtime of all deployments; None where these say it.
        trials, tokens, time_seconds, step_tokens, gpus_per_trial, cpus_per_trial, checkpoint_limit_bytes: None is left
            to the plan, which knows the machine; on resuming, to that which there is.
        stored: `search.json` of the run that goes on; None of a new one.
        notes: What a person must know of the settings, in sentences.
    """

    name: str
    named: bool
    strategy: str | None
    budget: Budget
    teacher: TeacherRef
    teacher_reference: str
    source: DataSource
    data_reference: str
    space: Space
    declared: Space
    constructions: tuple[Construction, ...]
    kv_type: str | None
    served_by: str | None
    space_reference: str
    baselines: tuple[str, ...] | None
    asked: Asked
    objectives: tuple[Objective, ...]
    device: Device | None
    sampler: str
    time_seconds: float | None
    trials: int | None
    tokens: int | None
    sequence_length: int
    step_tokens: int | None
    warm_start: tuple[str, ...]
    explore: float
    confirm: int
    students_only: bool
    goal: Goal
    general: DataSource
    general_reference: str
    seed: int
    spec: ModelSpec
    out: Path
    runner: str
    ray_address: str | None
    dashboard: bool
    gpus_per_trial: float | None
    cpus_per_trial: int | None
    storage: Storage | None
    cache: Path
    cache_limit_bytes: int
    checkpoint_limit_bytes: int | None
    command: str
    started: float
    stored: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """What ranks, and chooses what is exported: the first of the objectives."""
        return self.objectives[0].name

    @property
    def direction(self) -> Direction:
        """Whether more or less of it is better."""
        return self.objectives[0].direction

    def with_constructions(self, constructions: Sequence[Construction], prior: Prior | None = None) -> SearchConfig:
        """The settings with other constructions, or another prior, in the space that has them as choices."""
        believed = prior or first_prior(self.spec, batch_tokens=self.step_tokens or self.sequence_length)
        space = with_constructions(self.declared, constructions, believed)
        return replace(self, constructions=tuple(constructions), space=space)


def resolve(request: SearchRequest, stored: Mapping[str, Any] | None) -> SearchConfig:
    """Says of every setting what it is: what is asked for, or as it was before, or the default.

    Args:
        request: What is asked.
        stored: `search.json` of the run that goes on; None of a new one.

    Raises:
        InputError: A reference that names nothing, or settings that contradict each other.
    """
    known = stored or {}
    cache = cache_folder(request.cache)
    asked, objectives = ask(request, known)
    limits = _limits(request, known, cache)
    named_teacher = _first(_teacher(request, cache), known.get("teacher", {}).get("reference"), DEFAULT_TEACHER)
    data = None if request.data is None else data_reference(cast(Any, request.data), cache)
    named_data = _first(data, known.get("data", {}).get("reference"), DEFAULT_DATA)
    teacher = resolve_teacher(_as_before(named_teacher, known.get("teacher", {})))
    source = resolve_data(_as_before(named_data, known.get("data", {})))
    general = None if request.general_text is None else str(request.general_text)
    named_general = _first(general, known.get("general_text"), PACKAGED)
    given = _given_space(request, known, cache)
    searched = given.space
    spec = spec_from_config(teacher.config)
    budget, notes = _budget(limits, known, spec, searched)
    declared = on_its_device(searched, budget) if searched.solved else searched
    constructions, searched = _under_budget(declared, spec, budget, known, given.kv_type)
    confirm = request.confirm if request.confirm is not None else known.get("confirm", 0)
    warm_start = joined(request.warm_start)
    storage = request.storage or known.get("storage")
    return SearchConfig(
        name=request.name or datetime.now().strftime("search-%Y%m%d-%H%M%S"),
        named=request.name is not None,
        strategy=given.strategy,
        budget=budget,
        teacher=teacher,
        teacher_reference=named_teacher,
        source=source,
        data_reference=named_data,
        space=searched,
        declared=declared,
        constructions=constructions,
        kv_type=given.kv_type,
        served_by=given.served_by,
        space_reference=given.reference,
        baselines=given.baselines,
        asked=asked.with_divergences(searched.divergences),
        objectives=objectives,
        device=_device(request.device, budget, known, objectives, cache),
        sampler=_first(request.sampler, known.get("sampler"), DEFAULT_SAMPLER),
        time_seconds=parsed(request.time),
        trials=request.trials,
        tokens=request.tokens,
        sequence_length=request.sequence_length or known.get("plan", {}).get("sequence_length") or SEQUENCE_LENGTH,
        step_tokens=request.step_tokens,
        warm_start=warmed_by(known) if warm_start is None else parse_runs(warm_start),
        explore=_explore(request, known, declared),
        confirm=confirm,
        students_only=_students_only(request, stored),
        goal=_goal(request, known, objectives[0].name, source),
        general=resolve_general(named_general),
        general_reference=named_general,
        seed=request.seed if request.seed is not None else known.get("seed", 0),
        spec=spec,
        out=Path(request.out),
        runner=request.runner,
        ray_address=request.ray_address,
        dashboard=request.dashboard,
        gpus_per_trial=request.gpus_per_trial,
        cpus_per_trial=request.cpus_per_trial,
        storage=None if storage is None else Storage(storage),
        cache=cache,
        cache_limit_bytes=_number(request.cache_limit),
        checkpoint_limit_bytes=parsed(request.checkpoint_limit),
        command=request.command,
        started=request.started,
        stored=stored,
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True)
class _GivenSpace:
    """What is searched, as it was named and before any budget.

    Attributes:
        reference: Of the space.
        strategy: Of the one strategy that is distilled, or None.
        baselines: Of those that stand in the place of the space's own, or None.
        served_by: The runtime of all students, where one was named.
        kv_type: Of all caches in llama.cpp, where one was named.
        space: With all of these.
    """

    reference: str
    strategy: str | None
    baselines: tuple[str, ...] | None
    served_by: str | None
    kv_type: str | None
    space: Space


def _given_space(request: SearchRequest, known: Mapping[str, Any], cache: Path) -> _GivenSpace:
    """Load the space that is asked for, or was searched before, or the default one."""
    asked = None if request.space is None else space_reference(request.space, cache)
    reference = _first(asked, known.get("space"), DEFAULT_SPACE)
    strategy = _reference(request.strategy, cache)
    space = load_space(reference)
    baselines = tuple(map(str, request.baseline)) if request.baseline else _named(known.get("baselines"))
    if baselines is not None:
        space = against(space, baselines)
    if strategy is not None:
        space = single(space, strategy)
    served_by = _as_begun("--runtime", request.runtime, known, "served_by")
    kv_type = _as_begun("--kv-type", request.kv_type, known, "kv_type")
    return _GivenSpace(
        reference=reference,
        strategy=strategy,
        baselines=baselines,
        served_by=served_by,
        kv_type=kv_type,
        space=_cached(_served_by(space, served_by), kv_type),
    )


def _first(*given: str | Path | None) -> str:
    """What is asked, or was before, or is the default; an empty text is asked too, and refused for what it is."""
    return str(next(one for one in given if one is not None))


def _teacher(request: SearchRequest, cache: Path) -> str | None:
    """The reference of the teacher that is asked for; a loaded model is saved in the cache."""
    if request.teacher is not None:
        return teacher_reference(cast(Any, request.teacher), cast(Any, request.tokenizer), cache)
    if request.tokenizer is not None:
        raise InputError("tokenizer is that of a loaded model: give the model as teacher, or leave tokenizer out")
    return None


def _number(value: str | int) -> int:
    assert not isinstance(value, str)  # a request has read it
    return value


def _reference(strategy: str | Path | Strategy | None, cache: Path) -> str | None:
    """The name or file of a strategy; one that is given as an object is kept as a file, so that its run can go on."""
    if not isinstance(strategy, Strategy):
        return None if strategy is None else str(strategy)
    path = cache / "strategies" / f"{strategy.id}.yaml"
    if not path.exists():
        make_folder(path.parent)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(strategy.to_json()), encoding="utf-8")
    return str(path)


def _limits(request: SearchRequest, known: Mapping[str, Any], cache: Path) -> Limits:
    """The limits that are asked for; a latency without a device is of this machine, where the run had no other."""
    if isinstance(request.budget, Budget):
        return Limits.of(request.budget)
    memory, latency, named = parsed(request.budget), parsed(request.latency) or (), request.device
    if named is None and latency and known.get("budget", {}).get("device") is None:
        named = LOCAL
        # A run that goes on has the memory that it had.
        memory = memory or known.get("budget", {}).get("memory_bytes")
    device = None if named is None else choose_device(named, cache, [Path(file) for file in request.devices or ()])
    return Limits(memory_bytes=memory, context=request.context, batch=request.batch, device=device, latency=latency)


def _budget(limits: Limits, known: Mapping[str, Any], spec: ModelSpec, space: Space) -> tuple[Budget, tuple[str, ...]]:
    """The budget, and what a person must know of it; its context is lowered to what the models read where nobody asks
    for another.
    """
    if "budget" in known:
        return limits.resumed(read_budget(known["budget"])), ()
    budget = limits.budget(CONTEXT)
    if limits.context is not None:
        return budget, ()
    context = min(CONTEXT, shortest_context(spec, space)[0])
    told = f"the budget is stated at a context of {context} tokens: a model of this search reads no more"
    return replace(budget, context=context), (told,) if context < CONTEXT else ()


def _device(
    named: str | None, budget: Budget, known: Mapping[str, Any], objectives: Sequence[Objective], cache: Path
) -> Device | None:
    """Where latencies are predicted, if they are: on resuming the device as it was, with the figures it had."""
    if all(one.name != "latency" for one in objectives):
        return None
    before = device_from_json(known["device"]) if known.get("device") else None
    if isinstance(budget, DeviceBudget):
        found = budget.device
    elif named is None and before is not None:
        return before
    else:
        found = choose_device(named or LOCAL, cache)
    return before if before is not None and before.name == found.name else found


def _as_before(reference: str, known: Mapping[str, Any]) -> str:
    """A reference to a teacher or data, on resuming with the commit of the hub's that the run was made with."""
    revision = known.get("revision")
    if revision is None or reference != known.get("reference") or "@" in reference:
        return reference
    return f"{reference}@{revision}"


def _goal(request: SearchRequest, known: Mapping[str, Any], metric: str, source: DataSource) -> Goal:
    """Whether students must keep what they knew of general text: by default where the metric is of text, and the data
    are no task.

    Raises:
        InputError: Another goal than the run began with.
    """
    if known:
        # Runs of earlier versions knew no other.
        before: Goal = known.get("goal", "task")
        if request.goal not in (None, before):
            raise InputError(
                f"the run {request.name!r} was begun with --goal {before}, by which rows were passed over: leave it "
                "out, export another row with `autodistill export --row`, or start a new run"
            )
        return before
    return request.goal or ("general" if metric in _OF_TEXT and source.task is None else "task")


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
                f"the run {request.name!r} spent the rest of its time on training its best trials further, and "
                "--confirm repeats trainings of the plan's tokens, which do not compare: start a new run with --confirm"
            )
        return float(before)
    taken = {
        "--confirm trains the best again on further seeds": bool(request.confirm),
        f"the space {space.name} says how far the best are trained further (lengths)": len(space.lengths) > 1,
        "--trials and --tokens fix the work, and there is no time budget": bool(
            request.trials and request.tokens and request.time is None
        ),
    }
    why = next((reason for reason, holds in taken.items() if holds), None)
    if why is not None and asked is not None and asked < 1:
        raise InputError(f"--explore {asked:g} leaves time to train the best further, but {why}: leave one of them out")
    one = request.strategy is not None
    if why is not None or (one and request.tokens is not None):
        return 1.0
    if asked is not None:
        return asked
    # A single strategy has a short trial, and is then trained on to the end of the time.
    return race_share(parsed(request.time)) if one or space.solved else EXPLORE


def _students_only(request: SearchRequest, stored: Mapping[str, Any] | None) -> bool:
    """Whether trained students alone are chosen among: where that is asked for, and of one strategy alone always."""
    if request.students_only is None and stored is not None:
        return choice.students_only(stored)
    return bool(request.students_only) or request.strategy is not None


def _served_by(space: Space, runtime: str | None) -> Space:
    """The space whose students one runtime serves, where that is asked for; what it cannot serve is left out.

    Raises:
        InputError: It serves none of the deployments, or types are solved, which is for llama.cpp.
    """
    if runtime is None:
        return space
    if space.solved and space.types_solved and runtime != _LLAMA_CPP:
        raise InputError(
            f"--runtime {runtime}: the space {space.name} solves types for llama.cpp; give --space declared, or one "
            "that lists its deployments"
        )
    usual: dict[str, Any] = {} if runtime == _LLAMA_CPP else {"cache_type_k": "f16", "cache_type_v": "f16"}
    found = [replace(one, runtime=runtime, **usual) for one in space.deployments if runtime in serving(one)]
    if not found:
        named = ", ".join(one.name for one in space.deployments)
        raise InputError(f"--runtime {runtime} serves no deployment of the space {space.name}, which has {named}")
    return replace(space, deployments=tuple(dict.fromkeys(found)))


def _cached(space: Space, kind: str | None) -> Space:
    """The space whose students llama.cpp serves with a cache of one type, where that is asked for.

    Raises:
        InputError: No such type, or no deployment in llama.cpp.
    """
    if kind is None:
        return space
    check_choice("--kv-type", kind, tuple(CACHE_BYTES))
    if not any(one.runtime == _LLAMA_CPP for one in space.deployments):
        raise InputError(f"--kv-type is llama.cpp's, in which the space {space.name} deploys nothing: leave it out")
    for one in space.deployments if space.solved and not space.types_solved else ():
        if one.cache_types not in (("f16", "f16"), (kind, kind)):
            raise InputError(f"--kv-type {kind} and the deployment {one.name} contradict each other: leave one out")
    held = (
        replace(one, cache_type_k=kind, cache_type_v=kind) if one.runtime == _LLAMA_CPP else one
        for one in space.deployments
    )
    return replace(space, deployments=tuple(dict.fromkeys(held)))


def _as_begun(option: str, asked: str | None, known: Mapping[str, Any], name: str) -> str | None:
    """What is asked for, on resuming as before.

    Args:
        option: Of the command line.
        asked: Its value.
        known: `search.json` of the run that goes on; empty of a new one.
        name: Of what it says there.

    Raises:
        InputError: Another value than the run began with.
    """
    before: str | None = known.get(name)
    if known and asked not in (None, before):
        raise InputError(f"the run began without {option} {asked}: leave it out, or begin a new run")
    return asked or before


def _under_budget(
    space: Space, spec: ModelSpec, budget: Budget, known: Mapping[str, Any], kv_type: str | None
) -> tuple[tuple[Construction, ...], Space]:
    """The constructions and the space that this budget is searched with, on resuming those of before.

    Raises:
        NothingFitsError: Of a solved space nothing fits.
    """
    if known.get("constructions"):
        constructions = tuple(map(Construction.from_json, known["constructions"]))
        return constructions, replace(Space.stored(known["space_definition"]), narrowed_from=space.hash)
    if known:
        # Runs of earlier versions have deployments that their device does not serve.
        return (), space if space.hash == known.get("space_hash") else on_its_device(space, budget)
    if space.solved:
        constructions = plain_constructions(spec, space, budget, kv_type)
        return constructions, with_constructions(space, constructions, first_prior(spec, batch_tokens=SEQUENCE_LENGTH))
    return (), on_its_device(space, budget)


def warmed_by(stored: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the runs that a stored one was warm-started by."""
    return tuple(stored.get("warm_start", {}).get("runs", ()))


def _named(stored: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if stored is None else tuple(stored)


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
        solved=False,
        restrictions=(),
        types_solved=False,
        baselines={Path(reference).stem: strategy},
    )
