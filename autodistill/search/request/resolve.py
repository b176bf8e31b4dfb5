"""Resolution of a request: each setting is as asked, or as in the resumed run, or the default."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, cast, get_args

from autodistill.data.dataset import SEQUENCE_LENGTH
from autodistill.data.documents import DataSource, resolve_data
from autodistill.data.general_text import PACKAGED, resolve_general
from autodistill.data.loaded import data_reference
from autodistill.distillation.teacher.loaded import teacher_reference
from autodistill.distillation.teacher.resolve import TeacherRef, resolve_teacher
from autodistill.errors import InputError
from autodistill.evaluation.base import Direction, Goal, Scoring
from autodistill.hardware.budget import CONTEXT, Budget, DeviceBudget, Limits, read_budget
from autodistill.hardware.catalog import device_from_json
from autodistill.hardware.device import LOCAL, Device
from autodistill.hardware.local import choose_device
from autodistill.models.config import spec_from_config
from autodistill.models.spec import ModelSpec
from autodistill.options import DEFAULT_DATA, DEFAULT_TEACHER, cache_folder, parsed
from autodistill.runs.results import selection as choice
from autodistill.runs.results.objectives import Objective
from autodistill.search.construction.construction import Construction, with_constructions
from autodistill.search.construction.plain import in_gguf
from autodistill.search.construction.recipe import first_prior
from autodistill.search.planning.plan import EXPLORE, race_share
from autodistill.search.prior.prior import Prior
from autodistill.search.request.earlier_runs import parse_runs
from autodistill.search.request.feasibility import on_its_device, shortest_context
from autodistill.search.request.given_space import first_of, given_space, under_budget
from autodistill.search.request.metrics import RequestedMetrics, requested_metrics
from autodistill.search.request.references import absolute, check_there
from autodistill.search.request.request import (
    DEFAULT_SAMPLER,
    SearchRequest,
    joined,
)
from autodistill.strategy.space import Space
from autodistill.utils.plain_dataclass import check_choice
from autodistill.utils.storage import Storage

_LEAST_EXPLORED = 0.1
# Metrics of predicting text. A student that learns a text may forget other text.
_OF_TEXT = ("accuracy", "agreement", "kl", "ece", "perplexity")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """The final settings of a search. Defaults and the settings of a resumed run are filled in.

    Attributes:
        name, named: Name of the run, and whether the user chose it. Other names may get a number appended.
        strategy: Reference of the single strategy to train, or None for a search.
        baselines: References of the strategies to beat, or None for the space's own.
        device: The device for which latencies are predicted, or None.
        declared: The space as it was read. `space` is the one that is searched.
        constructions: What a solved space offers within the budget. Until the teacher is loaded, by plain rules.
        kv_type: Type of all caches in llama.cpp. If None, a solver may choose, and other caches have 16 bits.
        served_by: The runtime of all deployments, or None if each deployment names its own.
        candidates: GGUF files of the teacher's model that may win, or be starts of training.
        trials, tokens, time_seconds, step_tokens, gpus_per_trial, cpus_per_trial, checkpoint_limit_bytes: If None, the
            plan decides, because it knows the machine. A resumed run keeps its plan.
        stored: The content of `search.json` of a resumed run, or None for a new run.
        notes: Sentences about the settings for the user.
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
    candidates: tuple[str, ...]
    space_reference: str
    baselines: tuple[str, ...] | None
    requested: RequestedMetrics
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
    scoring: Scoring
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
        """The metric that ranks rows and chooses the export: the first objective."""
        return self.objectives[0].name

    @property
    def direction(self) -> Direction:
        """Whether a higher or a lower value of the metric is better."""
        return self.objectives[0].direction

    def with_constructions(self, constructions: Sequence[Construction], prior: Prior | None = None) -> SearchConfig:
        """Return the settings with other constructions or another prior, and with a space that offers them."""
        believed = prior or first_prior(self.spec, batch_tokens=self.step_tokens or self.sequence_length)
        space = with_constructions(self.declared, constructions, believed, general=self.goal == "general")
        return replace(self, constructions=tuple(constructions), space=space)


def resolve(request: SearchRequest, stored: Mapping[str, Any] | None) -> SearchConfig:
    """Determine each setting: as asked, or as in the resumed run, or the default.

    Args:
        request: What is asked.
        stored: The content of `search.json` of a resumed run, or None for a new run.

    Raises:
        InputError: A reference does not exist, or settings contradict each other.
    """
    known = stored or {}
    cache = cache_folder(request.cache)
    asked, objectives = requested_metrics(request, known)
    limits = _limits(request, known, cache)
    named_teacher, named_data = _references(request, known, cache)
    teacher = resolve_teacher(_as_before(named_teacher, known.get("teacher", {})))
    source = resolve_data(_as_before(named_data, known.get("data", {})))
    named_general = absolute(first_of(request.general_text, known.get("general_text"), PACKAGED))
    if request.general_text is None:
        check_there(named_general, "general text", "--general-text")
    given = given_space(request, known, cache)
    searched = given.space
    spec = spec_from_config(teacher.config)
    budget, notes = _budget(limits, known, spec, searched)
    declared = on_its_device(searched, budget) if searched.solved else searched
    constructions, searched = under_budget(declared, spec, budget, known, given.kv_type)
    for model in known.get("pretrained", ()):
        check_there(model, "candidate" if model in known.get("candidates", ()) else "pretrained model")
    confirm = request.confirm if request.confirm is not None else known.get("confirm", 0)
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
        candidates=_candidates(request, known, declared, budget),
        space_reference=given.reference,
        baselines=given.baselines,
        requested=asked.with_divergences(searched.divergences),
        objectives=objectives,
        device=_device(request.device, budget, known, objectives, cache),
        sampler=first_of(request.sampler, known.get("sampler"), DEFAULT_SAMPLER),
        time_seconds=parsed(request.time),
        trials=request.trials,
        tokens=parsed(request.tokens),
        sequence_length=parsed(request.sequence_length)
        or known.get("plan", {}).get("sequence_length")
        or SEQUENCE_LENGTH,
        step_tokens=parsed(request.step_tokens),
        warm_start=_warm_start(request, known),
        explore=_explore(request, known, declared),
        confirm=confirm,
        students_only=_students_only(request, stored),
        goal=_goal(request, known, objectives[0].name, source),
        scoring=_scoring(request, known),
        general=resolve_general(named_general),
        general_reference=named_general,
        seed=request.seed if request.seed is not None else known.get("seed", 0),
        spec=spec,
        out=Path(request.runs),
        runner=request.runner,
        ray_address=request.ray_address,
        dashboard=request.dashboard,
        gpus_per_trial=request.gpus_per_trial,
        cpus_per_trial=request.cpus_per_trial,
        storage=None if storage is None else Storage(storage),
        cache=cache,
        cache_limit_bytes=parsed(request.cache_limit),
        checkpoint_limit_bytes=parsed(request.checkpoint_limit),
        command=request.command,
        started=request.started,
        stored=stored,
        notes=notes,
    )


def _teacher(request: SearchRequest, cache: Path) -> str | None:
    """Return the reference of the teacher that is asked for. A loaded model is saved in the cache."""
    if request.teacher is not None:
        return teacher_reference(cast(Any, request.teacher), cast(Any, request.tokenizer), cache)
    if request.tokenizer is not None:
        raise InputError("tokenizer is that of a loaded model: give the model as teacher, or leave tokenizer out")
    return None


def _references(request: SearchRequest, known: Mapping[str, Any], cache: Path) -> tuple[str, str]:
    """Return the references of the teacher and of the data: as asked, or as before, or the defaults.

    Raises:
        InputError: The run's teacher or data were moved away, and the request does not say where they are.
    """
    teacher = first_of(_teacher(request, cache), known.get("teacher", {}).get("reference"), DEFAULT_TEACHER)
    data = None if request.data is None else data_reference(cast(Any, request.data), cache)
    data = first_of(data, known.get("data", {}).get("reference"), DEFAULT_DATA)
    for what, reference in (("teacher", teacher), ("data", data)):
        if getattr(request, what) is None:
            check_there(reference, what, f"--{what}")
    return absolute(teacher), absolute(data)


def _warm_start(request: SearchRequest, known: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the runs to learn from. A resumed run keeps its own unless others are asked for."""
    names = joined(request.warm_start)
    return warmed_by(known) if names is None else parse_runs(names)


def _limits(request: SearchRequest, known: Mapping[str, Any], cache: Path) -> Limits:
    """Return the limits that are asked for. A latency without a device is for this machine, unless the run has one."""
    if isinstance(request.budget, Budget):
        return Limits.of(request.budget)
    memory, latency, named = parsed(request.budget), parsed(request.latency) or (), request.device
    if named is None and latency and known.get("budget", {}).get("device") is None:
        named = LOCAL
        # A resumed run keeps its memory limit.
        memory = memory or known.get("budget", {}).get("memory_bytes")
    device = None if named is None else choose_device(named, cache, [Path(file) for file in request.devices or ()])
    return Limits(
        memory_bytes=memory, context=parsed(request.context), batch=request.batch, device=device, latency=latency
    )


def _budget(limits: Limits, known: Mapping[str, Any], spec: ModelSpec, space: Space) -> tuple[Budget, tuple[str, ...]]:
    """Return the budget and notes about it. The default context is lowered to what all models can read."""
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
    """Return the device for which latencies are predicted, or None. A resumed run keeps its device and its figures."""
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
    """Return a reference to a teacher or data. If it is that of the resumed run, the run's hub commit is added."""
    revision = known.get("revision")
    if revision is None or reference != known.get("reference") or "@" in reference:
        return reference
    return f"{reference}@{revision}"


def _goal(request: SearchRequest, known: Mapping[str, Any], metric: str, source: DataSource) -> Goal:
    """Return the goal: whether students must keep what they knew of general text.

    By default they must if the metric is one of text and the data are not a task.
    """
    if known:
        # Earlier versions had no other goal.
        before: Goal = known.get("goal", "task")
        if request.goal not in (None, before):
            raise InputError(
                f"the run {request.name!r} was begun with --goal {before}, and rows were passed over for it: leave it "
                "out, export another row with `autodistill export --row`, or start a new run"
            )
        return before
    return request.goal or ("general" if metric in _OF_TEXT and source.task is None else "task")


def _candidates(request: SearchRequest, known: Mapping[str, Any], declared: Space, budget: Budget) -> tuple[str, ...]:
    """Return the candidate files that are compared with what is solved. A resumed run keeps its own."""
    before = tuple(known.get("candidates", ()))
    if request.candidate is None:
        return before
    found = tuple(absolute(str(one)) for one in request.candidate)
    if known and list(map(os.path.realpath, found)) != list(map(os.path.realpath, before)):
        raise InputError(
            f"the run {request.name!r} began with {'other candidates' if before else 'no candidate'}: leave "
            "--candidate out, or begin a new run"
        )
    names = [Path(one).name for one in found]
    if double := next((one for one in names if names.count(one) > 1), None):
        raise InputError(f"two candidates are called {double}, and their rows would have the same name: rename one")
    if found and not declared.solved:
        raise InputError(
            f"--candidate is compared with what is solved, and nothing is solved in the space {declared.name}: leave "
            "it out, or take --space default"
        )
    if found and not in_gguf(declared, budget):
        raise InputError("candidates are GGUF files, which none of the deployments serves: leave --candidate out")
    return found


def _scoring(request: SearchRequest, known: Mapping[str, Any]) -> Scoring:
    """Return the precision of scoring. Earlier versions had float32 only."""
    found: Scoring = request.scoring or known.get("scoring", "float32")
    check_choice("scoring", found, get_args(Scoring))
    return found


def _explore(request: SearchRequest, known: Mapping[str, Any], space: Space) -> float:
    """Return the share of the training time that goes to trials. A resumed run keeps its own.

    The share is 1 if no time is left in the budget for extended training of the best.
    """
    asked = request.explore
    if asked is not None and not _LEAST_EXPLORED <= asked <= 1:
        raise InputError(
            f"--explore is a share from {_LEAST_EXPLORED:g} to 1 (1: nothing is left for the best), not {asked:g}"
        )
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
                "--confirm repeats trainings of the plan's tokens, which cannot be compared with them: start a new run "
                "with --confirm"
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
    # A single strategy gets a short trial and then extended training until the time ends.
    return race_share(parsed(request.time)) if one or space.solved else EXPLORE


def _students_only(request: SearchRequest, stored: Mapping[str, Any] | None) -> bool:
    """Return whether only trained students may be chosen: if asked for, and always for a single strategy."""
    if request.students_only is None and stored is not None:
        return choice.students_only(stored)
    return bool(request.students_only) or request.strategy is not None


def warmed_by(stored: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of the runs that warm-started a stored run."""
    return tuple(stored.get("warm_start", {}).get("runs", ()))
