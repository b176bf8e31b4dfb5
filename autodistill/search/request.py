"""What a person asks of a search, and every check of it that needs no model."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from autodistill import plugins
from autodistill.applied import check_strategy, student_spec
from autodistill.budget import DeviceBudget, limits_as, read_budget
from autodistill.contracts import SEQUENCE_LENGTH, Direction, Evaluator, ModelSpec
from autodistill.devices import Device
from autodistill.distillation.teacher import TeacherRef, resolve_teacher
from autodistill.documents import Source, resolve_data
from autodistill.errors import InputError, NothingFitsError
from autodistill.estimate import cannot_hold, fits, holdable, shortfall, smallest, spec_from_config
from autodistill.evaluation import ASKING_DATA
from autodistill.evaluators.command import NAME as COMMAND
from autodistill.evaluators.command import parse_command
from autodistill.evaluators.harness import PREFIX, find_task
from autodistill.evaluators.task import evaluator_of
from autodistill.local_device import LOCAL, choose_device
from autodistill.records.objectives import OBJECTIVES, Objective, objectives_of, parse_objectives
from autodistill.records.store import RunFolder, default_cache, read_json
from autodistill.records.stored_run import check_free, pull
from autodistill.search.sampler import SAMPLERS
from autodistill.search.warm_start import check_space, parse_runs
from autodistill.space import Space, load_space, load_strategy
from autodistill.storage import Storage
from autodistill.strategy import Strategy
from autodistill.task_files import read_tasks
from autodistill.units import Budget, Price

DEFAULT_TEACHER, DEFAULT_DATA, DEFAULT_SPACE = "smollm2", "pydoc", "default"
DEFAULT_METRIC, DEFAULT_SAMPLER = "accuracy", "tpe"
RUNNERS = ("ray", "inline")
_SEEDS = 2**32
_MANY = 10_000
_SHORTEST = 8  # tokens of a sequence: fewer give a model nothing to predict from
# What may rank is measured at every rung, so it must come from the simulated student alone.
_RANKING = ("scores", "answers", "student")


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What a person asks of a search; None is "the default", or on resuming "as before".

    Attributes:
        budget: Limits of the deployed student.
        strategy: Name or file of a strategy: it alone is trained, to the plan's tokens, and nothing is searched.
        teacher, data, space, metric, sampler: References and names.
        tasks: Task files, whose tasks are measured beside the metric; one of them may be the metric, as "task:NAME".
        metric_command: A command that scores the student's folder; it ranks unless `metric` says otherwise.
        metric_direction: Whether more or less of its scores is better; more by default.
        metric_seconds: After which it is ended; ten minutes by default.
        objectives: Names parted by commas, where a search has more than its metric.
        device: Name of the one that the student is for, or None for this machine; a predicted latency is there.
        trials, tokens: Fixed instead of planned; with both, there is no time box unless `time_seconds` gives one. On
            resuming, more trials than were planned extend the search.
        sequence_length: Tokens of a training or evaluated sequence; 256 by default.
        warm_start: Names of earlier runs of the same space, teacher and data, parted by commas, to learn from.
        step_tokens: Training tokens of an optimiser step, whole sequences; one sequence by default.
        time_seconds: The time box; on resuming a finished search, of what it is extended by.
        confirm: Further seeds on which the best few are trained before one is chosen; none by default.
        seed: Of data order, projections and proposals.
        name: Of the run; a date and time by default.
        out: Folder of the runs.
        resume: Go on with the run `name`.
        runner: "ray" or "inline".
        ray_address: Of a running cluster to join, "auto" or host:port; by default a Ray is started here.
        gpus_per_trial: A fraction, so that several trials share a GPU, or a whole number; one by default.
        cpus_per_trial: Cores of a trial, where there are GPUs of each of its processes; planned by default.
        storage: URI below which events, checkpoints, students and what trials read are kept, so that the search, and
            each of its trials, can go on from any node that reaches it; by default they lie in `out` and `cache` alone.
        cache: Folder of everything that later searches may use again.
        cache_limit_bytes: Disk that cached teacher outputs may take, and on each node the copies of what a storage has.
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
    objectives: str | None = None
    device: str | None = None
    sampler: str | None = None
    tasks: tuple[Path, ...] | None = None
    metric_command: str | None = None
    metric_direction: Direction | None = None
    metric_seconds: float | None = None
    trials: int | None = None
    tokens: int | None = None
    sequence_length: int | None = None
    step_tokens: int | None = None
    warm_start: str | None = None
    time_seconds: float | None = None
    confirm: int | None = None
    seed: int | None = None
    name: str | None = None
    out: Path = Path("results/runs")
    resume: bool = False
    runner: str = "ray"
    ray_address: str | None = None
    gpus_per_trial: float | None = None
    cpus_per_trial: int | None = None
    storage: str | None = None
    cache: Path = field(default_factory=default_cache)
    cache_limit_bytes: int = 8 * 10**9
    checkpoint_limit_bytes: int | None = None
    sharing: bool = True
    forking: bool = True
    price: Price | None = None
    command: str = "autodistill search"
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured beside the usual, because a request asks for it.

    Attributes:
        evaluators: Names of installed ones, and evaluators that a request made.
        written: The objective for which questions are answered in writing, or "".
        record: For `search.json`: what they were made from.
    """

    evaluators: tuple[str | Evaluator, ...]
    written: str
    record: Mapping[str, Any]


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
    asked: Asked
    objectives: tuple[Objective, ...]
    device: Device | None
    sampler: str
    sequence_length: int
    warm_start: tuple[str, ...]
    confirm: int
    seed: int
    spec: ModelSpec | None
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
    for name in ("trials", "tokens", "confirm"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    if request.sequence_length is not None and request.sequence_length < _SHORTEST:
        raise InputError(f"--sequence-length must be at least {_SHORTEST} tokens, not {request.sequence_length}")
    if request.runner not in RUNNERS:
        raise InputError(f"there is no runner {request.runner!r}; the runners are {', '.join(RUNNERS)}")
    if request.ray_address is not None and request.runner == "inline":
        raise InputError("--ray-address names a Ray cluster, which --runner inline does not use: leave one of them out")
    storage = Storage(request.storage) if request.storage else None
    if storage is not None:
        storage.check()
    stored = _stored(request, storage)
    known = stored or {}
    request = replace(request, **{name: known.get(name, getattr(request, name)) for name in ("sharing", "forking")})
    length = request.sequence_length or known.get("plan", {}).get("sequence_length") or SEQUENCE_LENGTH
    if request.step_tokens is not None and (request.step_tokens < 1 or request.step_tokens % length):
        raise InputError(f"--step-tokens must be a multiple of {length}, a sequence, not {request.step_tokens}")
    asked, objectives = ask(request, known)
    sampler = request.sampler or known.get("sampler") or DEFAULT_SAMPLER
    if sampler not in SAMPLERS:
        raise InputError(f"there is no sampler {sampler!r}; the samplers are {', '.join(SAMPLERS)}")
    teacher_reference = request.teacher or known.get("teacher", {}).get("reference") or DEFAULT_TEACHER
    data_reference = request.data or known.get("data", {}).get("reference") or DEFAULT_DATA
    space_reference = request.space or known.get("space") or DEFAULT_SPACE
    teacher = resolve_teacher(teacher_reference)
    source = resolve_data(data_reference)
    if asked.written and not source.conversations:
        raise InputError(f"{asked.written} needs questions with answers: {ASKING_DATA}")
    space = load_space(space_reference)
    if request.strategy is not None:
        space = single(space, request.strategy)
    _check_possible(space, request)
    _check_cache(request.cache)
    checked = Checked(
        request=request,
        name=request.name or datetime.now().strftime("search-%Y%m%d-%H%M%S"),
        teacher=teacher,
        teacher_reference=teacher_reference,
        source=source,
        data_reference=data_reference,
        space=space,
        space_reference=space_reference,
        asked=asked,
        objectives=objectives,
        device=_device(request, known, objectives),
        sampler=sampler,
        sequence_length=length,
        warm_start=parse_runs(request.warm_start) if request.warm_start is not None else _warmed_by(known),
        confirm=request.confirm if request.confirm is not None else known.get("confirm", 0),
        seed=request.seed if request.seed is not None else known.get("seed", 0),
        spec=spec_from_config(teacher.config) if teacher.config else None,
        stored=stored,
        storage=_of_run(request, storage, known),
    )
    if stored is not None:
        _check_same(checked, stored)
    else:
        check_space(request.out, checked.warm_start, space)
    if checked.spec is not None:
        if request.strategy is not None:
            for strategy in space.baselines.values():
                check_strategy(strategy, checked.spec)
        check_teacher(checked, checked.spec)
    return checked


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
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK | os.X_OK)
    except OSError as error:
        raise InputError(f"cannot write into {cache}: {error.strerror}; choose another folder with --cache") from error
    if not writable:
        raise InputError(f"cannot write into {cache}: it is not yours to write; choose another folder with --cache")


def _device(request: SearchRequest, known: Mapping[str, Any], objectives: tuple[Objective, ...]) -> Device | None:
    """Where latencies are predicted, if they are: on resuming the device as it was, with the figures it had."""
    if all(one.name != "latency" for one in objectives):
        return None
    if isinstance(request.budget, DeviceBudget):
        return request.budget.device
    if request.device is None and known.get("device"):
        return Device.from_json(known["device"])
    return choose_device(request.device or LOCAL, request.cache)


def _warmed_by(stored: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the runs that a stored one was warm-started by."""
    return tuple(stored.get("warm_start", {}).get("runs", ()))


def ask(request: SearchRequest, known: Mapping[str, Any]) -> tuple[Asked, tuple[Objective, ...]]:
    """Finds what a request wants measured, and what a search is judged by: what is asked, on resuming what was asked
    before, or the default metric.

    Args:
        request: What is asked.
        known: `search.json` of the run that is resumed; else empty.

    Raises:
        InputError: A task file, a command, a metric or an objective that cannot be used.
    """
    own, record = _own(request, known.get("asked", {}))
    metric = request.metric
    if request.objectives is None:
        before = [one.name for one in objectives_of(known)] if known else []
        text = metric or ",".join(before) or (COMMAND if record["command"] is not None else DEFAULT_METRIC)
    else:
        text = request.objectives
    names = [name.strip() for name in text.split(",")]
    if request.objectives is not None and metric not in (None, names[0]):
        raise InputError(
            f"--metric {metric} contradicts --objectives {request.objectives}, whose first one ranks: leave --metric "
            "out"
        )
    own += [find_task(name) for name in names if name.startswith(PREFIX)]
    made = {name: quantity.direction for item in own for name, quantity in item.measures.items()}
    installed = _installed([name for name in names if name not in made and not _follows(name)])
    ways = made | {name: quantity.direction for item in installed for name, quantity in item.measures.items()}
    if metric is not None and metric not in ways:
        known_ones = ", ".join(sorted({*made, *(name for item in _ranking() for name in item.measures)}))
        raise InputError(
            f"{metric!r} is no metric that can rank; the metrics are {known_ones}, task:NAME of a --task, and "
            "lm-eval:TASK"
        )
    asked = Asked(
        evaluators=(*(item.name for item in installed), *own),
        written=next((item.name for item in installed if item.needs == "answers"), ""),
        record=record,
    )
    return asked, parse_objectives(text, ways)


def _own(request: SearchRequest, before: Mapping[str, Any]) -> tuple[list[Evaluator], dict[str, Any]]:
    """The evaluators of task files and of a command, and what they were made from, as `search.json` has it."""
    files = request.tasks if request.tasks is not None else tuple(map(Path, before.get("tasks", ())))
    command = request.metric_command or before.get("command")
    direction = request.metric_direction or before.get("command_direction") or "max"
    seconds = request.metric_seconds or before.get("command_seconds") or 600.0
    if command is None and (request.metric_direction or request.metric_seconds):
        raise InputError("--metric-direction and --metric-timeout are those of a command: give --metric-command")
    tasks = [task for file in files for task in read_tasks(file)]
    doubled = next((task.name for task in tasks if sum(other.name == task.name for other in tasks) > 1), None)
    if doubled is not None:
        raise InputError(f"two of the task files have a task {doubled}: rename one")
    own: list[Evaluator] = [evaluator_of(task) for task in tasks]
    if command is not None:
        own.append(parse_command(command, direction, seconds))
    return own, {
        "tasks": [str(file.resolve()) for file in files],
        "fingerprints": {task.name: task.fingerprint for task in tasks},
        "command": command,
        "command_direction": direction,
        "command_seconds": seconds,
    }


def _follows(name: str) -> bool:
    """Whether an objective follows from shape and packing, so that no evaluator of students measures it."""
    return name in OBJECTIVES and not OBJECTIVES[name].trained


def _ranking() -> Iterator[Evaluator]:
    """Every installed evaluator that may rank."""
    found = (plugins.load("evaluators", name) for name in plugins.names("evaluators"))
    return (item for item in found if item.needs in _RANKING)


def _installed(metrics: Sequence[str]) -> list[Evaluator]:
    """The installed evaluators that measure these; most measure one of their own name. Unknown ones are left out."""
    names = plugins.names("evaluators")
    found = [plugins.load("evaluators", name) for name in metrics if name in names]
    found = [item for item in found if item.needs in _RANKING and item.name in item.measures]
    left = set(metrics) - {name for item in found for name in item.measures}
    return [*found, *(item for item in (_ranking() if left else ()) if left & set(item.measures))]


def single(space: Space, reference: str) -> Space:
    """The space that holds one strategy alone, under the deployments of another space."""
    strategy = load_strategy(reference)
    return replace(
        space, name=Path(reference).stem, dimensions=(), starts={}, baselines={Path(reference).stem: strategy}
    )


def _of_run(request: SearchRequest, storage: Storage | None, known: Mapping[str, Any]) -> Storage | None:
    """Where the run is kept; a resumed one where it was before."""
    before = known.get("storage")
    if request.resume and request.storage not in (None, before):
        raise InputError(
            f"the run {request.name!r} is kept on {before or 'this machine alone'}, not on {request.storage}: resume "
            "it with the same --storage, or start a new run under another --name"
        )
    if before is not None and storage is None:
        storage = Storage(before)
        storage.check()
    return storage


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
    if storage is not None:
        pull(request.out / request.name, storage.at(request.name))
    return read_json(RunFolder.open(request.out, request.name).search_file)


def _check_same(checked: Checked, stored: Mapping[str, Any]) -> None:
    budget = read_budget(stored["budget"])
    differing = {
        "teacher": (checked.teacher_reference, stored["teacher"]["reference"]),
        "data": (checked.data_reference, stored["data"]["reference"]),
        "objectives": (
            ",".join(one.name for one in checked.objectives),
            ",".join(one.name for one in objectives_of(stored)),
        ),
        "device": (checked.device and checked.device.name, (stored.get("device") or {}).get("name")),
        "task or command": (checked.asked.record, stored.get("asked", checked.asked.record)),
        "sampler": (checked.sampler, stored["sampler"]),
        "warm start": (", ".join(checked.warm_start), ", ".join(_warmed_by(stored))),
        "seed": (checked.seed, stored["seed"]),
        "budget": (limits_as(checked.request.budget, budget).to_json(), budget.to_json()),
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
    """Refuses sequences and a context that the teacher cannot read, and a budget that no student of it meets."""
    if checked.sequence_length > spec.max_context:
        raise InputError(
            f"the teacher reads at most {spec.max_context} tokens at once, and sequences have "
            f"{checked.sequence_length}: give --sequence-length {spec.max_context} or less"
        )
    _check_context(checked, spec)
    check_budget(checked, spec)


def _check_context(checked: Checked, spec: ModelSpec) -> None:
    """Refuses a budget at a context that some student could not be served at."""
    context = checked.request.budget.context
    models = {strategy.init.model: student for strategy, student in by_size(checked.space, spec) if strategy.init.model}
    for model, read in {"": spec, **models}.items():
        if context > read.max_context:
            which = f"the pretrained {model}" if model else "the teacher"
            raise InputError(
                f"{which} has a context of {read.max_context} tokens, and the budget is stated at {context}: give "
                f"--context {read.max_context} or less"
            )


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
        remedy = (
            "--latency, or name a faster --device" if smallest(held[least]).late else "--budget, or lower --context"
        )
        raise NothingFitsError(
            f"nothing fits: of the student that needs least ({least.init.describe()}), {reason}; raise {remedy}"
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
