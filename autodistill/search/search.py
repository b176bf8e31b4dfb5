"""The search from request to exported student: the one function that puts all rooms in order."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.contracts import Direction, ModelSpec, Plan, Status
from autodistill.data import Prepared, load_split, prepare
from autodistill.distillation.alignment import layer_map
from autodistill.distillation.scoring import score
from autodistill.distillation.student import kept_layers
from autodistill.distillation.teacher import (
    Teacher,
    TeacherRef,
    load_model,
    materialise,
    resolve_teacher,
    tokenizer_fingerprint,
)
from autodistill.distillation.teacher_cache import CacheSettings, ensure_cache
from autodistill.documents import Source, resolve_data
from autodistill.errors import InputError, InterruptedSearchError, NothingFitsError
from autodistill.estimate import fits, holdable, shortfall, spec_from_config, training_memory
from autodistill.hardware import detect
from autodistill.records.leaderboard import rank, rows_of, to_parquet
from autodistill.records.report import write_report
from autodistill.records.row import Row
from autodistill.records.store import RunFolder, read_json, write_json
from autodistill.search.campaign import Campaign, Question
from autodistill.search.finish import Finish, Finisher, finish
from autodistill.search.inline_runner import run_inline
from autodistill.search.plan import SEQUENCE_LENGTH, Demand, Speed, Workers, make_plan, measure_speed, share_out
from autodistill.search.rows import make_row
from autodistill.search.sampler import Sampler
from autodistill.space import Space, load_space, load_strategy
from autodistill.strategy import Deployment, Strategy
from autodistill.trial import TrialSetting, evaluate, student_spec
from autodistill.units import Budget, format_bytes

DEFAULT_TEACHER, DEFAULT_DATA, DEFAULT_SPACE, DEFAULT_METRIC = "smollm2", "pydoc", "default", "accuracy"
RUNNERS = ("ray", "inline")
# What may rank is measured at every rung, so it must come from scores alone.
METRICS: Mapping[str, Direction] = {"accuracy": "max", "agreement": "max", "perplexity": "min"}
_EVALUATORS = ("accuracy", "perplexity", "agreement", "memory", "size")
_BOX_CPU, _BOX_GPU = 600.0, 1800.0


def default_cache() -> Path:
    """Where teachers, prepared data and teacher outputs are kept for all searches."""
    return Path.home() / ".cache" / "autodistill"


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What a person asks of a search; None is "the default", or on resuming "as before".

    Attributes:
        budget: Limits of the deployed student.
        strategy: Name or file of a strategy: it alone is trained, to the plan's tokens, and nothing is searched.
        teacher, data, space, metric: References and names.
        trials, tokens: Fixed instead of planned; with both, there is no time box unless `time_seconds` gives one.
        time_seconds: The time box.
        seed: Of data order, projections and proposals.
        name: Of the run; a date and time by default.
        out: Folder of the runs.
        resume: Go on with the run `name`.
        runner: "ray" or "inline".
        cache: Folder of everything that later searches may use again.
        cache_limit_bytes: Disk that cached teacher outputs may take.
        command: As typed, for the record.
        started: `time.monotonic()` at which the time box began.
    """

    budget: Budget
    strategy: str | None = None
    teacher: str | None = None
    data: str | None = None
    space: str | None = None
    metric: str | None = None
    trials: int | None = None
    tokens: int | None = None
    time_seconds: float | None = None
    seed: int | None = None
    name: str | None = None
    out: Path = Path("results/runs")
    resume: bool = False
    runner: str = "ray"
    cache: Path = field(default_factory=default_cache)
    cache_limit_bytes: int = 8 * 10**9
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
    seed: int
    spec: ModelSpec | None
    stored: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search found.

    Attributes:
        document: The one JSON document of `--format json`.
        rows: Of the validation split.
        finish: The exported student, its verification and the test split.
    """

    document: Mapping[str, Any]
    rows: tuple[Row, ...]
    finish: Finish


class Clock:
    """Adds up wall-clock seconds by phase."""

    def __init__(self, started: float, notify: Callable[[str], None]) -> None:
        self.started = started
        self.seconds: dict[str, float] = {}
        self._notify = notify

    @contextmanager
    def phase(self, name: str, shown: str) -> Iterator[None]:
        """Times the block, whatever ends it."""
        self._notify(shown)
        began = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - began)

    def add(self, name: str, seconds: float) -> None:
        """Adds seconds to a phase."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def summary(self) -> dict[str, float]:
        """Seconds by phase; what is in none of them is overhead."""
        total = time.monotonic() - self.started
        known = {name: self.seconds.get(name, 0.0) for name in ("load", "cache", "train", "evaluate", "export")}
        return {**known, "overhead": max(0.0, total - sum(known.values())), "total": total}


class Observer:
    """What a search tells a person while it runs; the default tells nothing."""

    def phase(self, name: str) -> None:
        """A phase began."""

    def line(self, text: str) -> None:
        """Something worth a line happened."""

    def campaign(self, campaign: Campaign, best: float | None, baseline: float | None) -> None:
        """Trials changed."""


def check_request(request: SearchRequest) -> Checked:
    """Checks all that can be checked before a model is loaded or a file written.

    Raises:
        InputError: Of each of its parts, in one line.
        NothingFitsError: Not even the smallest student of the space fits the budget.
    """
    for name in ("trials", "tokens"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    if request.runner not in RUNNERS:
        raise InputError(f"there is no runner {request.runner!r}; the runners are {', '.join(RUNNERS)}")
    stored = _stored(request)
    known = stored or {}
    metric = request.metric or known.get("metric") or DEFAULT_METRIC
    if metric not in METRICS:
        raise InputError(f"{metric!r} is no metric that can rank; the metrics are {', '.join(METRICS)}")
    teacher_reference = request.teacher or known.get("teacher", {}).get("reference") or DEFAULT_TEACHER
    data_reference = request.data or known.get("data", {}).get("reference") or DEFAULT_DATA
    space_reference = request.space or known.get("space") or DEFAULT_SPACE
    teacher = resolve_teacher(teacher_reference)
    source = resolve_data(data_reference)
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
        seed=request.seed if request.seed is not None else known.get("seed", 0),
        spec=spec_from_config(teacher.config) if teacher.config else None,
        stored=stored,
    )
    if stored is not None:
        _check_same(checked, stored)
    if checked.spec is not None:
        _check_budget(checked, checked.spec)
    return checked


def single(space: Space, reference: str) -> Space:
    """The space that holds one strategy alone, under the deployments of another space."""
    strategy = load_strategy(reference)
    return replace(space, name=Path(reference).stem, dimensions=(), baselines={Path(reference).stem: strategy})


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
    for name in ("trials", "tokens"):
        asked = getattr(checked.request, name)
        if asked is not None and asked != stored["plan"][name]:
            raise InputError(
                f"the run {checked.name!r} was planned with {stored['plan'][name]} {name}, not {asked}: resume it "
                f"without --{name}, or start a new run under another --name"
            )


def _check_budget(checked: Checked, spec: ModelSpec) -> None:
    """Refuses a budget that not even the smallest student meets."""
    deployments = holdable(spec, checked.space.deployments)
    if not deployments:
        raise InputError(
            f"no deployment of the space {checked.space.name} can hold this teacher: its rows are not divisible by "
            "their groups; add a 16-bit deployment to the space"
        )
    smallest = student_spec(_by_depth(checked.space)[0], spec)
    fitting = fits(smallest, deployments, checked.request.budget)
    reason = shortfall(fitting, checked.request.budget)
    if reason is not None:
        raise NothingFitsError(
            f"nothing fits: of the smallest student ({smallest.layers} of {spec.layers} layers), {reason}; "
            "raise --budget, or lower --context"
        )


def _by_depth(space: Space) -> list[Strategy]:
    """The baselines and the extremes of the space, the shallowest student first."""
    points = [space.smallest_point(), space.largest_point()] if space.dimensions else []
    strategies = [*map(space.strategy, points), *space.baselines.values()]
    return sorted(strategies, key=lambda strategy: strategy.init.depth)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Teacher and data on this machine's disk."""

    teacher: Teacher
    data: Prepared
    spec: ModelSpec
    workers: Workers
    threads: int


def _load(checked: Checked) -> Loaded:
    request = checked.request
    teacher = materialise(checked.teacher, request.cache)
    spec = spec_from_config(read_json(teacher.folder / "config.json"))
    if checked.spec is None:
        _check_budget(checked, spec)
    data = prepare(
        checked.source,
        teacher.folder,
        tokenizer_fingerprint(teacher.folder),
        SEQUENCE_LENGTH,
        request.cache,
    )
    machine = detect()
    deepest = student_spec(_by_depth(checked.space)[-1], spec)
    need = training_memory(deepest, tokens=SEQUENCE_LENGTH).total_bytes
    limit = machine.gpus[0].memory_bytes if machine.gpus else machine.memory_bytes
    if need > limit:
        raise InputError(
            f"training a student of {deepest.layers} layers takes {format_bytes(need)}, this machine has "
            f"{format_bytes(limit)}: choose a smaller teacher, or a space with smaller students"
        )
    return Loaded(
        teacher=teacher,
        data=data,
        spec=spec,
        workers=share_out(machine, need, request.runner),
        threads=machine.cpus,
    )


def _plan(checked: Checked, loaded: Loaded, spent: float) -> tuple[Plan, Speed]:
    request = checked.request
    teacher = load_model(loaded.teacher.folder, _float32())
    deepest = _by_depth(checked.space)[-1].init.depth
    speed = measure_speed(teacher, loaded.spec, deepest, loaded.workers, loaded.threads)
    box = request.time_seconds
    if box is None and not ((request.trials or request.strategy) and request.tokens):
        box = _BOX_CPU if loaded.workers.device == "cpu" else _BOX_GPU
    splits = loaded.data.splits
    demand = Demand(
        box_seconds=box,
        spent_seconds=spent,
        trials=0 if request.strategy else request.trials,
        tokens=request.tokens,
        baselines=len(checked.space.baselines),
        deployments=len(holdable(loaded.spec, checked.space.deployments)),
        train_tokens=splits["train"].sequences * SEQUENCE_LENGTH,
        validation_tokens=splits["validation"].sequences * SEQUENCE_LENGTH,
        test_tokens=splits["test"].sequences * SEQUENCE_LENGTH,
        parameters=loaded.spec.parameters,
        seed=checked.seed,
        ray=request.runner == "ray",
    )
    return make_plan(demand, speed, loaded.workers), speed


def _float32() -> Any:
    import torch

    return torch.float32


def cache_settings(space: Space, spec: ModelSpec, bf16: bool) -> CacheSettings:
    """What the trials of a space may ask of the teacher's cache."""
    states = {
        pair.teacher_state
        for init, alignment in space.alignment_cases(spec.layers)
        if alignment.count <= len(kept_layers(init, spec.layers))
        for pair in layer_map(alignment, kept_layers(init, spec.layers), spec.layers)
    }
    return CacheSettings(states=tuple(sorted(states)), bf16=bf16)


def plan_search(request: SearchRequest, observer: Observer | None = None) -> dict[str, Any]:
    """What a search would do, as plain data; nothing but the shared cache of teacher and data is written."""
    checked = check_request(request)
    (observer or Observer()).phase("loading teacher and data")
    loaded = _load(checked)
    (observer or Observer()).phase("measuring this machine")
    plan, speed = _plan(checked, loaded, time.monotonic() - request.started)
    settings = cache_settings(checked.space, loaded.spec, plan.bf16)
    tokens = min(plan.tokens, loaded.data.splits["train"].sequences * SEQUENCE_LENGTH)
    per_token = settings.bytes_per_token(loaded.spec.vocabulary, loaded.spec.width)
    return {
        "plan": plan.to_json(),
        "speed": asdict(speed),
        "cache_bytes": tokens * per_token,
        "budget": request.budget.to_json(),
        "expected_seconds": sum(plan.seconds.values()),
    }


def search(request: SearchRequest, observer: Observer | None = None) -> Outcome:
    """Finds, exports and verifies the best student that fits the budget.

    Raises:
        InputError: Bad input, before any work is spent.
        NothingFitsError: No student fits the budget.
        InterruptedSearchError: Ctrl-C; everything finished so far is kept, and the message says how to resume.
        VerificationError: What was exported is not what was evaluated.
    """
    observer = observer or Observer()
    checked = check_request(request)
    out, name = request.out, checked.name
    run = RunFolder.open(out, name, lock=True) if request.resume else RunFolder.create(out, name)
    with run:
        try:
            return _search(checked, run, observer)
        except KeyboardInterrupt:
            if not run.search_file.exists():
                raise InterruptedSearchError("stopped before the first trial: nothing to resume") from None
            resume = request.command if request.resume else f"{request.command} --resume"
            if request.name is None:
                resume += f" --name {name}"
            raise InterruptedSearchError(f"stopped; every finished trial is kept. To go on: {resume}") from None


def _search(checked: Checked, run: RunFolder, observer: Observer) -> Outcome:
    request = checked.request
    clock = Clock(request.started, observer.phase)
    clock.add("load", time.monotonic() - request.started)
    earlier = run.events.read()
    runner = _start_runner(request)
    ready = make_ready(checked, run, clock, observer)
    loaded, plan, question, setting = ready.loaded, ready.question.plan, ready.question, ready.setting
    deadline = _deadline(request, plan, earlier)
    campaign = Campaign(
        question,
        sampler=Sampler(checked.space, seed=checked.seed, direction=question.direction),
        log=run.events,
        checkpoints=run.checkpoints,
        deadline=deadline,
        notify=observer.line,
    )
    campaign.replay(earlier)
    campaign.watch = lambda: observer.campaign(campaign, *campaign.standing())
    began = time.monotonic()
    observer.phase("trials")
    before = campaign.worker_seconds()
    until = None if deadline is None else time.time() + deadline - time.monotonic() + 15
    runner(campaign, setting, until)
    spent = time.monotonic() - began
    after = campaign.worker_seconds()
    for phase in ("train", "evaluate"):
        clock.add(phase, min(spent, (after[phase] - before[phase]) / plan.workers))
    campaign.close()
    rows = [row for row in rows_of(run.events.read()) if row.split == "validation"]
    finisher = Finisher(
        question=question,
        setting=setting,
        run=run,
        teacher=loaded.teacher,
        data=loaded.data,
        threads=loaded.threads,
        phases=clock,
        line=observer.line,
    )
    finished = finish(rows, finisher)
    rows = [row for row in rows_of(run.events.read()) if row.split == "validation"]
    seconds = clock.summary()
    result = _result(checked, campaign, rows, finished, plan, seconds, run)
    write_json(run.search_file, {**ready.document, "seconds": seconds, "notes": result["notes"]})
    to_parquet(rows, run.leaderboard_file)
    write_report(run)
    return Outcome(document=result, rows=tuple(rows), finish=finished)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Everything that stands before the first trial; `document` is the content of `search.json`."""

    loaded: Loaded
    question: Question
    setting: TrialSetting
    document: Mapping[str, Any]


def make_ready(checked: Checked, run: RunFolder, clock: Clock, observer: Observer) -> Ready:
    """Loads, plans, caches and scores the teacher, and writes `search.json`; what a resumed run has, it keeps.

    Args:
        checked: What is asked.
        run: Its folder, locked.
        clock: Times the phases.
        observer: Is told of them.

    Raises:
        InputError: Bad input that only the loaded teacher or data could show.
    """
    earlier = run.events.read()
    with clock.phase("load", "loading teacher and data"):
        loaded = _load(checked)
    if checked.stored is not None:
        plan, speed = Plan.from_json(checked.stored["plan"]), Speed(**checked.stored["speed"])
        _check_fingerprints(checked, loaded)
    else:
        with clock.phase("plan", "measuring this machine"):
            plan, speed = _plan(checked, loaded, time.monotonic() - checked.request.started)
    document = _describe(checked, loaded, plan, speed)
    if checked.stored is None:
        write_json(run.search_file, document)
    for note in plan.notes:
        observer.line(note)
    run.events.append({"event": "session", "time": time.time()})
    setting = _teacher_phase(checked, loaded, plan, run, clock, earlier)
    question = Question(
        space=checked.space,
        deployments=holdable(loaded.spec, checked.space.deployments),
        budget=checked.request.budget,
        plan=plan,
        speed=speed,
        teacher_spec=loaded.spec,
        teacher_accuracy=setting.teacher_accuracy,
        metric=checked.metric,
        direction=METRICS[checked.metric],
    )
    return Ready(loaded=loaded, question=question, setting=setting, document=document)


def _start_runner(request: SearchRequest) -> Callable[[Campaign, TrialSetting, float | None], None]:
    """The function that drives a campaign; Ray starts in the background while teacher and data are loaded."""
    if request.runner == "inline":
        return run_inline
    from autodistill.search.ray_runner import RayRunner

    return RayRunner(detect()).run


def _check_fingerprints(checked: Checked, loaded: Loaded) -> None:
    assert checked.stored is not None
    for name, now in (("teacher", loaded.teacher.fingerprint), ("data", loaded.data.fingerprint)):
        before = checked.stored[name]["fingerprint"]
        if now != before:
            raise InputError(
                f"the {name} of the run {checked.name!r} has changed since ({before}, now {now}): restore it, or start "
                "a new run under another --name"
            )


def _describe(checked: Checked, loaded: Loaded, plan: Plan, speed: Speed) -> dict[str, Any]:
    """`search.json`: all that is needed to run the search again."""
    if checked.stored is not None:
        return dict(checked.stored)
    packages = ("autodistill-search", "torch", "transformers", "optuna", "ray", "xllamacpp", "gguf")
    return {
        "schema_version": 1,
        "name": checked.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": checked.request.command,
        "budget": checked.request.budget.to_json(),
        "teacher": {
            "reference": checked.teacher_reference,
            "name": loaded.teacher.name,
            "fingerprint": loaded.teacher.fingerprint,
            "parameters": loaded.spec.parameters,
            "layers": loaded.spec.layers,
        },
        "data": {
            "reference": checked.data_reference,
            "name": loaded.data.name,
            "fingerprint": loaded.data.fingerprint,
            "tokens": {name: split.tokens for name, split in loaded.data.splits.items()},
        },
        "space": checked.space_reference,
        "space_hash": checked.space.hash,
        "space_definition": checked.space.to_json(),
        "metric": checked.metric,
        "direction": METRICS[checked.metric],
        "seed": checked.seed,
        "runner": checked.request.runner,
        "plan": plan.to_json(),
        "speed": asdict(speed),
        "licences": _licences(loaded),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
    }


def _licences(loaded: Loaded) -> dict[str, str]:
    named = {loaded.teacher.name: loaded.teacher.licence, loaded.data.name: loaded.data.licence}
    return {name: licence or "not stated: ask its author" for name, licence in named.items()}


def _deadline(request: SearchRequest, plan: Plan, earlier: list[dict[str, Any]]) -> float | None:
    """`time.monotonic()` after which no trial may run, so that export and test still fit the box."""
    box = request.time_seconds or plan.box_seconds
    if box is None:
        return None
    if request.time_seconds is None:
        box -= sum(_session_seconds(earlier))
    return request.started + box - plan.seconds["export"] - plan.seconds["test"]


def _session_seconds(events: list[dict[str, Any]]) -> Iterator[float]:
    """How long each earlier session of the run lasted, from its start to its last event."""
    starts = [index for index, event in enumerate(events) if event["event"] == "session"]
    for start, end in zip(starts, [*starts[1:], len(events)], strict=True):
        times = [event["time"] for event in events[start:end] if "time" in event]
        yield times[-1] - times[0]


def _teacher_phase(
    checked: Checked,
    loaded: Loaded,
    plan: Plan,
    run: RunFolder,
    clock: Clock,
    earlier: list[dict[str, Any]],
) -> TrialSetting:
    """Caches the teacher's outputs, scores it, and writes its rows under each deployment."""
    request, device = checked.request, loaded.workers.device
    train = load_split(loaded.data.folder, "train").head(plan.tokens)
    validation = load_split(loaded.data.folder, "validation").head(plan.eval_tokens)
    with clock.phase("cache", "teacher cache"):
        cache = ensure_cache(
            lambda: load_model(loaded.teacher.folder, _float32()),
            teacher_fingerprint=loaded.teacher.fingerprint,
            data_fingerprint=loaded.data.fingerprint,
            data=train,
            vocabulary=loaded.spec.vocabulary,
            width=loaded.spec.width,
            settings=cache_settings(checked.space, loaded.spec, plan.bf16),
            root=request.cache / "teacher-outputs",
            limit_bytes=request.cache_limit_bytes,
            device=device,
        )
    model = None
    top1_file, accuracy_key = run.path / "teacher_top1.npy", "teacher_accuracy"
    accuracy = next((event[accuracy_key] for event in earlier if event["event"] == "teacher"), None)
    if accuracy is None or not top1_file.exists():
        with clock.phase("evaluate", "scoring the teacher"):
            model = load_model(loaded.teacher.folder, _float32(), device)
            scores, top1 = score(model, validation, device=device)
            np.save(top1_file, top1)
            accuracy = float(scores.correct.mean())
            run.events.append({"event": "teacher", accuracy_key: accuracy, "tokens": len(top1), "time": time.time()})
    setting = TrialSetting(
        teacher=loaded.teacher.folder,
        teacher_spec=loaded.spec,
        teacher_top1=top1_file,
        teacher_accuracy=accuracy,
        data=loaded.data.folder,
        cache=cache,
        checkpoints=run.checkpoints,
        budget=request.budget,
        plan=plan,
        evaluators=_EVALUATORS,
        metric=checked.metric,
        direction=METRICS[checked.metric],
        device=device,
    )
    done = {row.deployment_name for row in rows_of(earlier) if row.kind == "teacher" and row.split == "validation"}
    for deployment in holdable(loaded.spec, checked.space.deployments):
        if deployment.name in done:
            continue
        with clock.phase("evaluate", f"teacher as {deployment.name}"):
            model = model or load_model(loaded.teacher.folder, _float32(), device)
            row = teacher_row(model, deployment, setting, "validation", validation, np.load(top1_file), accuracy)
            run.events.append({"event": "row", "row": row.to_json(), "time": time.time()})
    return setting


def teacher_row(
    model: Any,
    deployment: Deployment,
    setting: TrialSetting,
    split: str,
    data: Any,
    top1: Any,
    accuracy: float,
) -> Row:
    """The unmodified teacher under one deployment."""
    evaluation, _ = evaluate(
        model,
        setting.teacher_spec,
        deployment,
        data,
        top1,
        budget=setting.budget,
        evaluators=setting.evaluators,
        device=setting.device,
    )
    return make_row(
        evaluation,
        trial="teacher",
        kind="teacher",
        name="teacher",
        strategy=None,
        spec=setting.teacher_spec,
        status=Status.COMPLETED,
        split=split,
        teacher_accuracy=accuracy,
        budget=setting.budget,
        plan=setting.plan,
        train_tokens=0,
        train_seconds=0.0,
        seed=setting.plan.seed,
    )


def _result(
    checked: Checked,
    campaign: Campaign,
    rows: list[Row],
    finished: Finish,
    plan: Plan,
    seconds: Mapping[str, float],
    run: RunFolder,
) -> dict[str, Any]:
    """The search's one JSON document."""
    ranked = rank(rows, checked.metric, METRICS[checked.metric])
    trials = campaign.trials.values()
    notes = [*plan.notes, *finished.notes, *_fell_short(campaign, plan)]
    return {
        "name": run.name,
        "best": finished.best.to_json(),
        "rows": [one.row.to_json() for one in ranked],
        "baseline": next((one.row.to_json() for one in ranked if one.row.kind == "baseline"), None),
        "teacher": [one.row.to_json() for one in ranked if one.row.kind == "teacher"],
        "rejected": [
            {"trial": trial.task.id, "strategy": trial.task.strategy.to_json(), "reason": trial.reason}
            for trial in trials
            if trial.status is Status.REJECTED
        ],
        "failed": [
            {"trial": trial.task.id, "strategy": trial.task.strategy.to_json(), "reason": trial.reason}
            for trial in trials
            if trial.status is Status.FAILED
        ],
        "test": [row.to_json() for row in finished.test],
        "gain_on_test": finished.gain,
        "runtime": {name: asdict(check) for name, check in finished.checks.items()},
        "budget": checked.request.budget.to_json(),
        "plan": plan.to_json(),
        "seconds": dict(seconds),
        "notes": notes,
        "paths": {"run": str(run.path), **{name: str(path) for name, path in finished.paths.items()}},
    }


def _fell_short(campaign: Campaign, plan: Plan) -> list[str]:
    """What the plan held and the box did not, in sentences."""
    proposed = sum(trial.number is not None and trial.rung >= 0 for trial in campaign.trials.values())
    whole = sum(trial.kind == "student" and trial.status is Status.COMPLETED for trial in campaign.trials.values())
    planned = plan.keep[-1] if plan.keep else plan.trials
    notes = []
    if proposed < plan.trials and not campaign.exhausted:
        notes.append(f"the box held {proposed} of the {plan.trials} planned trials: give it more --time")
    if whole < min(planned, plan.trials):
        notes.append(f"the box took {whole} of {planned} trials to full fidelity: give it more --time")
    return notes
