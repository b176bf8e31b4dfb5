"""What stands before the first trial: teacher and data on disk, the plan, and the teacher's outputs and rows."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from autodistill.contracts import Evaluator, ModelSpec, Plan, Status, TeacherReference
from autodistill.data import Prepared, TokenSet, load_split, prepare
from autodistill.devices import Device
from autodistill.distillation.alignment import layer_map
from autodistill.distillation.attention import teacher_layer
from autodistill.distillation.calibration import Calibration, ensure_calibration
from autodistill.distillation.held import load_held
from autodistill.distillation.pretrained import token_rows
from autodistill.distillation.scoring import refer
from autodistill.distillation.sharding import check_sharded
from autodistill.distillation.student import cut_student, kept_layers
from autodistill.distillation.teacher import (
    Teacher,
    load_model,
    materialise,
    resolve_teacher,
    stored_type,
    tokenizer_fingerprint,
)
from autodistill.distillation.teacher_cache import META, CacheSettings, ensure_cache
from autodistill.errors import InputError, TrialFailedError
from autodistill.estimate import adapted_tensors, cannot_hold, fits, holdable, spec_from_config
from autodistill.evaluators.command import NAME as COMMAND
from autodistill.evaluators.command import Command
from autodistill.hardware import Machine
from autodistill.records.differences import paired
from autodistill.records.leaderboard import rows_of
from autodistill.records.row import Row
from autodistill.records.store import RunFolder, read_json, write_json
from autodistill.search.campaign import Campaign
from autodistill.search.plan import (
    Demand,
    Speed,
    extend,
    make_plan,
    measure_speed,
    more_trials,
)
from autodistill.search.request import (
    Asked,
    Checked,
    by_size,
    check_teacher,
)
from autodistill.search.rows import make_row
from autodistill.search.share import Share, Workers, share_out, supports_bf16
from autodistill.search.trials import Question
from autodistill.search.warm_start import WarmStart, check_fingerprints, warm_start
from autodistill.space import Space
from autodistill.strategy import Alignment, Attention, Deployment, Distillation, Lora
from autodistill.training_fit import TeacherFit, TrainingFit, fit_teacher, fit_training
from autodistill.trial import TrialSetting, evaluate

# Share of the time box that one evaluation's tasks may take on a worker, beside the scores of its tokens.
_ASKED_SHARE = 0.02
EVALUATORS = ("accuracy", "perplexity", "agreement", "kl", "calibration", "memory", "size")
# Seconds of the time box where none is given.
BOX_CPU, BOX_GPU = 600.0, 1800.0


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


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Teacher, data and the pretrained models that students may start from, on this machine's disk.

    `device` is where this process runs models, which of a cluster may be another than its trials' one.
    """

    teacher: Teacher
    data: Prepared
    spec: ModelSpec
    workers: Workers
    device: str
    threads: int
    step_tokens: int
    fit: TrainingFit
    teacher_fit: TeacherFit
    pretrained: Mapping[str, Path]

    @property
    def outputs_of(self) -> str:
        """What the teacher's outputs are known by."""
        return self.teacher_fit.of(self.teacher.fingerprint)

    def load_teacher(self, device: str = "cpu") -> Any:
        """The teacher, held as it fits and computing in float32."""
        return load_held(self.teacher.folder, self.teacher_fit.held, device)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a search runs.

    Attributes:
        here: This machine.
        machines: Those that trials run on: this one, or the nodes of a cluster.
        share: What of them each trial is given.
    """

    here: Machine
    machines: tuple[Machine, ...]
    share: Share


def load(checked: Checked, place: Place) -> Loaded:
    """Teacher and data on this machine's disk, and how the machines are shared out.

    Raises:
        InputError: Data too short, a pretrained model of other tokens, or training that cannot be made to fit.
    """
    request = checked.request
    if place.share.processes > 1 and request.strategy is not None:
        for strategy in checked.space.baselines.values():
            check_sharded(strategy, "float32")
    teacher = materialise(checked.teacher, request.cache)
    spec = spec_from_config(read_json(teacher.folder / "config.json"))
    length = checked.sequence_length
    if checked.spec is None:
        check_teacher(checked, spec)
    data = prepare(
        checked.source,
        teacher.folder,
        tokenizer_fingerprint(teacher.folder),
        length,
        request.cache,
    )
    models = dict.fromkeys(strategy.init.model for strategy in checked.space.extremes() if strategy.init.model)
    pretrained = {model: materialise(resolve_teacher(model), request.cache).folder for model in models}
    for folder in pretrained.values():
        token_rows(folder, teacher.folder)
    teacher_fit = fit_teacher(spec, stored=stored_type(teacher.folder), sequence_length=length, machine=place.here)
    _, largest = by_size(checked.space, spec)[-1]
    processes = place.share.processes
    step_tokens = request.step_tokens or processes * length
    if checked.stored:
        step_tokens = checked.stored["plan"]["batch_tokens"]
    if step_tokens % (processes * length):
        raise InputError(
            f"a step of {step_tokens} tokens does not divide over the {processes} processes of a trial: give "
            f"--step-tokens a multiple of {processes * length}"
        )
    online = any(recipe.weighs_teacher and recipe.signal == "online" for recipe in checked.space.signal_cases())
    memory = _trial_memory(place)
    fit = fit_training(
        largest,
        teacher=spec,
        alignments=_alignments(checked.space, spec),
        lora=_lora(checked.space, spec, largest),
        train_embeddings=any(recipe.train_embeddings for recipe in _recipes(checked.space, spec, "train_embeddings")),
        sequence_length=length,
        sequences=step_tokens // length,
        # Run in the trial, the teacher lies beside the student.
        limit_bytes=memory - (_online_bytes(spec, place.machines[0], teacher_fit) if online else 0),
        processes=processes,
    )
    return Loaded(
        teacher=teacher,
        data=data,
        spec=spec,
        workers=share_out(place.machines, fit.estimate.total_bytes, request.runner, place.share),
        device="cuda" if place.here.gpus else "cpu",
        threads=place.here.cpus,
        step_tokens=step_tokens,
        fit=fit,
        teacher_fit=teacher_fit,
        pretrained=pretrained,
    )


def _trial_memory(place: Place) -> int:
    """Bytes that a process of a trial may take: of a machine, or its share of a GPU."""
    gpus = [gpu.memory_bytes for machine in place.machines for gpu in machine.gpus]
    if not gpus:
        return min(machine.memory_bytes for machine in place.machines)
    return int(min(gpus) * min(1.0, place.share.gpus))


def _online_bytes(spec: ModelSpec, machine: Machine, fit: TeacherFit) -> int:
    """Of the teacher's weights in a trial, which computes in bfloat16 where the machine does."""
    return 2 * spec.parameters if supports_bf16(machine) else fit.held_bytes


def _recipes(space: Space, spec: ModelSpec, *fields: str) -> Iterator[Distillation]:
    """Of the space, with all that these fields may be."""
    paths = {"distillation", *(f"distillation.{name}" for name in fields)}
    # Without dimensions nothing is proposed, and the baselines are all there is.
    strategies = space.cases(paths, spec.layers) if space.dimensions else iter(space.baselines.values())
    return (strategy.distillation for strategy in strategies)


def _lora(space: Space, spec: ModelSpec, student: ModelSpec) -> Lora | None:
    """The low-rank changes of a trial that take most memory; None where a trial trains the weights themselves."""
    found = {recipe.lora for recipe in _recipes(space, spec, "lora", "lora.rank", "lora.layers")}
    changes = [lora for lora in found if lora is not None]
    if len(changes) < len(found):
        return None
    return max(changes, key=lambda lora: lora.rank * sum(sum(item.shape) for item in adapted_tensors(student, lora)))


def _alignments(space: Space, spec: ModelSpec) -> set[tuple[Alignment | None, Attention | None]]:
    """All that a trial of the space may align, as far as its memory depends on it."""
    fields = ("", ".layers", ".count", ".projection", ".rank", ".kind")
    recipes = _recipes(space, spec, *(f"{part}{name}" for part in ("alignment", "attention") for name in fields))
    return {(recipe.alignment, recipe.attention) for recipe in recipes}


def plan_from_measurement(checked: Checked, loaded: Loaded, spent: float) -> tuple[Plan, Speed]:
    """Measures this machine for a few seconds and plans for it; `spent` seconds of the box are gone."""
    request = checked.request
    teacher = loaded.load_teacher()
    students = by_size(checked.space, loaded.spec)
    init = students[-1][0].init

    def largest(model: Any) -> Any:
        if init.model:
            return load_model(loaded.pretrained[init.model], torch.float32)
        # Which layers and neurons are kept does not bear on speed.
        return cut_student(model, replace(init, layers="even"), None)[0]

    speed = measure_speed(
        teacher,
        loaded.spec,
        largest,
        loaded.workers,
        loaded.threads,
        device=loaded.device,
        sequence_length=checked.sequence_length,
        checkpointing=loaded.fit.checkpointing,
    )
    if checked.asked.written:
        # Answering the questions of so many tokens takes about as long again as scoring them.
        speed = replace(speed, score=speed.score / 2, worker_score=speed.worker_score / 2)
    box = request.time_seconds
    if box is None and not ((request.trials or request.strategy) and request.tokens):
        box = BOX_CPU if loaded.workers.device == "cpu" else BOX_GPU
    speed, share, notes = _time_asked(checked, loaded, speed, box)
    splits = loaded.data.splits
    deployments = holdable(loaded.spec, checked.space.deployments)
    demand = Demand(
        box_seconds=box,
        spent_seconds=spent,
        trials=0 if request.strategy else request.trials,
        tokens=request.tokens,
        baselines=len(checked.space.baselines),
        teacher_deployments=len(deployments),
        deployments=max(
            sum(fit.slack <= 0 for fit in fits(student, holdable(student, checked.space.deployments), request.budget))
            for _, student in students
        ),
        train_tokens=splits["train"].sequences * checked.sequence_length,
        validation_tokens=splits["validation"].sequences * checked.sequence_length,
        test_tokens=splits["test"].sequences * checked.sequence_length,
        parameters=loaded.spec.parameters,
        seed=checked.seed,
        ray=request.runner == "ray",
        sequence_length=checked.sequence_length,
        step_tokens=loaded.step_tokens,
        confirm=checked.confirm,
        longest=max(checked.space.lengths),
    )
    plan = make_plan(demand, speed, loaded.workers)
    plan = replace(
        plan,
        notes=(*plan.notes, *notes, *filter(None, [loaded.teacher_fit.note])),
        example_share=share,
        micro_batch=loaded.fit.micro_batch,
        checkpointing=loaded.fit.checkpointing,
        optimizer_state=loaded.fit.optimizer_state,
        lengths=checked.space.lengths,
    )
    return plan, speed


def _time_asked(
    checked: Checked, loaded: Loaded, speed: Speed, box: float | None
) -> tuple[Speed, float, tuple[str, ...]]:
    """Asks the teacher a few examples of each task, and says how many of them the box pays for at an evaluation.

    Returns:
        The speed with the seconds of an evaluation; the share of the examples that is read; notes.

    Raises:
        InputError: A task, or a command, that cannot be used even on the teacher.
    """
    asking = [item for item in checked.asked.evaluators if not isinstance(item, str)]
    if not asking:
        return speed, 1.0, ()
    model = loaded.load_teacher(loaded.workers.device)
    data = load_split(loaded.data.folder, "validation").head(checked.sequence_length)
    full = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(loaded.workers.threads)
    fixed = scaled = 0.0
    notes = []
    try:
        for item in asking:
            began = time.perf_counter()
            evaluation, _ = evaluate(
                model,
                loaded.spec,
                full,
                data,
                None,
                budget=checked.request.budget,
                evaluators=(item,),
                device=loaded.workers.device,
                share=0.0,
                tokenizer=loaded.teacher.folder,
            )
            seconds = time.perf_counter() - began
            for measurement in evaluation.measurements.values():
                read, all_of = measurement.detail.get("examples"), measurement.detail.get("of")
                if all_of is None:
                    fixed += seconds
                else:
                    scaled += seconds * all_of / read
    except TrialFailedError as error:
        raise InputError(f"the metric command does not work on the teacher: {error}") from error
    finally:
        torch.set_num_threads(threads)
    share = 1.0 if box is None or not scaled else min(1.0, max(0.0, _ASKED_SHARE * box - fixed) / scaled)
    if share < 1:
        notes.append(
            f"an evaluation reads {share:.0%} of the tasks' examples, 8 at least of each: the box pays for no more; "
            "give it more --time"
        )
    return replace(speed, asked=fixed + scaled * share), share, tuple(notes)


def calibration_file(checked: Checked, loaded: Loaded) -> Path | None:
    """File of the teacher's calibration, made if a strategy of the space chooses by it."""
    if not any(strategy.init.selective for strategy in checked.space.extremes()):
        return None
    return ensure_calibration(
        loaded.load_teacher,
        teacher_fingerprint=loaded.outputs_of,
        data_fingerprint=loaded.data.fingerprint,
        data=load_split(loaded.data.folder, "train"),
        root=checked.request.cache / "calibrations",
        device=loaded.device,
    )


def cache_settings(space: Space, spec: ModelSpec, bf16: bool, calibration: Path | None) -> CacheSettings:
    """What the trials of a space may ask of the teacher's cache."""
    importance = Calibration.load(calibration) if calibration else None
    cases = [(kept_layers(init, spec.layers, importance), item) for init, item in space.alignment_cases(spec.layers)]
    states = {
        pair.teacher_state
        for kept, alignment in cases
        if alignment.count <= len(kept)
        for pair in layer_map(alignment, kept, spec.layers)
    }
    # A layer's attention is computed from its input, the output of the layer before.
    followed = {teacher_layer(attention, spec.layers) for attention in space.attention_cases(spec.layers)}
    states |= {layer - 1 for layer in followed if layer > 0}
    return CacheSettings.for_recipes(space.signal_cases(), states, bf16)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A loaded and planned run; `document` is the content of `search.json`."""

    loaded: Loaded
    plan: Plan
    speed: Speed
    document: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Everything that stands before the first trial; `document` is the content of `search.json`."""

    question: Question
    setting: TrialSetting
    warm: WarmStart
    document: Mapping[str, Any]


def plan_run(checked: Checked, place: Place, run: RunFolder, clock: Clock, observer: Observer) -> Planned:
    """Loads teacher and data, plans, and writes `search.json`; what a resumed run has planned, it keeps,
    but for more trials.

    Args:
        checked: What is asked.
        place: Where it runs.
        run: Its folder, locked.
        clock: Times the phases.
        observer: Is told of them.

    Raises:
        InputError: Bad input that only the loaded teacher or data could show.
    """
    with clock.phase("load", "loading teacher and data"):
        loaded = load(checked, place)
    if checked.stored is not None:
        speed = Speed(**checked.stored["speed"])
        plan = _extended(checked, Plan.from_json(checked.stored["plan"]), loaded.spec, speed)
        plan = _here(plan, loaded)
        _check_fingerprints(checked, loaded)
    else:
        fingerprints = {"teacher": loaded.teacher.fingerprint, "data": loaded.data.fingerprint}
        check_fingerprints(checked.request.out, checked.warm_start, fingerprints)
        with clock.phase("plan", "measuring this machine"):
            plan, speed = plan_from_measurement(checked, loaded, time.monotonic() - checked.request.started)
    document = _describe(checked, loaded, plan, speed)
    write_json(run.search_file, document)
    left_out = (cannot_hold(loaded.spec, deployment) for deployment in checked.space.deployments)
    for note in (*loaded.data.notes, *plan.notes, *dict.fromkeys(filter(None, left_out))):
        observer.line(note)
    return Planned(loaded=loaded, plan=plan, speed=speed, document=document)


def prepare_trials(checked: Checked, planned: Planned, run: RunFolder, clock: Clock) -> Ready:
    """Caches the teacher's outputs, scores it, and writes its rows; what a resumed run has of that, it keeps."""
    setting = _teacher_phase(checked, planned.loaded, planned.plan, run, clock, run.events.read())
    question = Question(
        space=checked.space,
        deployments=checked.space.deployments,
        budget=checked.request.budget,
        plan=planned.plan,
        speed=planned.speed,
        teacher_spec=planned.loaded.spec,
        teacher_accuracy=setting.teacher_accuracy,
        metric=checked.metric,
        direction=checked.direction,
        confirm=checked.confirm,
        further=checked.objectives[1:],
        served_on=checked.device,
        device=setting.device,
        sharing=checked.request.sharing,
    )
    document = dict(planned.document)
    if "observations" not in document["warm_start"]:
        # Written down, since the earlier runs may go on, or away, before this one is resumed.
        document["warm_start"] = warm_start(checked.request.out, checked.warm_start, question).to_json()
        write_json(run.search_file, document)
    warm = WarmStart.from_json(document["warm_start"])
    return Ready(question=question, setting=setting, warm=warm, document=document)


def _extended(checked: Checked, plan: Plan, spec: ModelSpec, speed: Speed) -> Plan:
    """The plan of a resumed run with the trials that were asked for, or that more time for a finished one holds."""
    request = checked.request
    assert checked.stored is not None
    trials = request.trials or plan.trials
    if request.trials is None and request.time_seconds is not None and "seconds" in checked.stored:
        trials += more_trials(plan, spec.parameters, speed, request.time_seconds)
    return extend(plan, trials)


def _here(plan: Plan, loaded: Loaded) -> Plan:
    """The plan on the machines that a resumed run has now, which may be others; what its figures mean stays.

    Raises:
        InputError: Trials were to be trained by more processes, or fewer, whose figures would differ.
    """
    workers = loaded.workers
    if plan.processes != workers.processes:
        raise InputError(
            f"the run's trials are trained by {plan.processes} processes each, not {workers.processes}: resume it with "
            "the same --gpus-per-trial, or --cpus-per-trial"
        )
    return replace(plan, workers=workers.count, gpus=workers.gpus, threads=min(plan.threads, workers.threads))


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
        warm = checked.stored.get("warm_start", {"runs": []})
        return {**checked.stored, "plan": plan.to_json(), "confirm": checked.confirm, "warm_start": warm}
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
            "held": loaded.teacher_fit.held,
            "rounded": loaded.teacher_fit.rounded,
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
        "direction": checked.direction,
        "objectives": [objective.name for objective in checked.objectives],
        "device": checked.device and checked.device.to_json(),
        "directions": {one.name: one.direction for one in checked.objectives if one.trained},
        "asked": dict(checked.asked.record),
        "sampler": checked.sampler,
        "confirm": checked.confirm,
        "warm_start": {"runs": list(checked.warm_start)},
        "seed": checked.seed,
        "runner": checked.request.runner,
        "storage": checked.storage.uri if checked.storage else None,
        "sharing": checked.request.sharing,
        "forking": checked.request.forking,
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


def _teacher_phase(
    checked: Checked,
    loaded: Loaded,
    plan: Plan,
    run: RunFolder,
    clock: Clock,
    earlier: list[dict[str, Any]],
) -> TrialSetting:
    """Caches the teacher's outputs, scores it, and writes its rows under each deployment."""
    request, device = checked.request, loaded.device
    train = load_split(loaded.data.folder, "train").head(plan.most_tokens)
    validation = load_split(loaded.data.folder, "validation").head(plan.eval_tokens)
    with clock.phase("cache", "calibration"):
        calibration = calibration_file(checked, loaded)
    settings = cache_settings(checked.space, loaded.spec, plan.bf16, calibration)
    cache = None
    if not settings.empty:
        with clock.phase("cache", "teacher cache"):
            make = partial(
                ensure_cache,
                loaded.load_teacher,
                teacher_fingerprint=loaded.outputs_of,
                data_fingerprint=loaded.data.fingerprint,
                data=train,
                vocabulary=loaded.spec.vocabulary,
                width=loaded.spec.width,
                settings=settings,
                root=request.cache / "teacher-outputs",
                limit_bytes=request.cache_limit_bytes,
                device=device,
            )
            # Another search may make room just between the two.
            while not run.hold((cache := make()) / META):
                pass
    model = None
    reference_file, accuracy_key = run.path / "teacher_reference.npz", "teacher_accuracy"
    accuracy = next((event[accuracy_key] for event in earlier if event["event"] == "teacher"), None)
    if accuracy is None or not reference_file.exists():
        with clock.phase("evaluate", "scoring the teacher"):
            model = loaded.load_teacher(device)
            scores, reference = refer(model, validation, device=device)
            reference.save(reference_file)
            accuracy = float(scores.correct.mean())
            run.events.append(
                {"event": "teacher", accuracy_key: accuracy, "tokens": len(reference.top1), "time": time.time()}
            )
    setting = TrialSetting(
        teacher=loaded.teacher.folder,
        teacher_spec=loaded.spec,
        teacher_reference=reference_file,
        teacher_accuracy=accuracy,
        data=loaded.data.folder,
        cache=cache,
        checkpoints=run.checkpoints,
        budget=request.budget,
        plan=plan,
        evaluators=_evaluators(checked.asked),
        metric=checked.metric,
        direction=checked.direction,
        device=device,
        calibration=calibration,
        pretrained=loaded.pretrained,
        held=loaded.teacher_fit.held,
    )
    setting = replace(setting, evaluators=_expecting(setting.evaluators, rows_of(earlier), validation))
    done = {row.deployment_name for row in rows_of(earlier) if row.kind == "teacher" and row.split == "validation"}
    for deployment in holdable(loaded.spec, checked.space.deployments):
        if deployment.name in done:
            continue
        with clock.phase("evaluate", f"teacher as {deployment.name}"):
            model = model or loaded.load_teacher(device)
            reference = TeacherReference.load(reference_file)
            try:
                row = teacher_row(
                    model, deployment, setting, "validation", validation, reference, accuracy, checked.device
                )
            except TrialFailedError as error:
                name = deployment.name
                raise InputError(f"the teacher as {name} cannot be measured ({error.cause}): {error}") from error
            run.events.append({"event": "row", "row": row.to_json(), "time": time.time()})
            setting = replace(setting, evaluators=_expecting(setting.evaluators, [row], validation))
    return setting


def _evaluators(asked: Asked) -> tuple[str | Evaluator, ...]:
    return (*EVALUATORS, *(item for item in asked.evaluators if item not in EVALUATORS))


def _expecting(
    evaluators: tuple[str | Evaluator, ...], rows: Sequence[Row], data: TokenSet
) -> tuple[str | Evaluator, ...]:
    """The evaluators, of which a command is held to as many scores as it printed for the teacher."""
    found = [paired(row, COMMAND) for row in rows if row.kind == "teacher" and row.split == "validation"]
    given = len(data.tokens) if data.questions is None else len(data.questions.entries)
    counts = [sum(documents["count"]) for documents in found if documents]
    if not counts:
        return evaluators
    return tuple(
        replace(item, expected=(given, counts[0])) if isinstance(item, Command) else item for item in evaluators
    )


def teacher_row(
    model: Any,
    deployment: Deployment,
    setting: TrialSetting,
    split: str,
    data: Any,
    reference: TeacherReference,
    accuracy: float,
    served_on: Device | None = None,
) -> Row:
    """The unmodified teacher under one deployment."""
    evaluation, _ = evaluate(
        model,
        setting.teacher_spec,
        deployment,
        data,
        reference,
        budget=setting.budget,
        evaluators=setting.evaluators,
        metric=setting.metric,
        device=setting.device,
        split=split,
        share=setting.plan.example_share,
        tokenizer=setting.teacher,
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
        device=served_on,
    )
