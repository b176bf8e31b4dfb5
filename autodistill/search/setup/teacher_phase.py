"""The teacher's part of a search: its scores and rows, its calibration and its cached outputs."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from autodistill.data.dataset import TokenSet, load_split
from autodistill.distillation.losses.attention import teacher_layer
from autodistill.distillation.losses.hidden_states import layer_map
from autodistill.distillation.student.build import kept_layers
from autodistill.distillation.student.check import student_spec
from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.distillation.teacher.importance import PartImportance, ensure_importance
from autodistill.distillation.teacher.output_cache import META, CacheSettings
from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError, TrialFailedError
from autodistill.evaluation.base import Evaluator, Scoring
from autodistill.evaluation.precision import scored_in
from autodistill.evaluators.tasks.command import NAME as COMMAND
from autodistill.evaluators.tasks.command import Command
from autodistill.hardware.device import Device
from autodistill.inference.outputs import TeacherReference, TokenScores
from autodistill.inference.scoring import score_teacher
from autodistill.models.model_folder import linked
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Scales
from autodistill.quantization.learned_scales import read_scales
from autodistill.runs.events import RowAdded, TeacherScored
from autodistill.runs.phase_clock import Clock
from autodistill.runs.results.differences import paired
from autodistill.runs.results.make_row import make_row
from autodistill.runs.results.row import SOLVED_TRIAL, Row, Status
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.students import student_folder
from autodistill.search.construction.construction import Construction
from autodistill.search.planning.plan import fewest_tokens
from autodistill.search.planning.representatives import alignment_cases, attention_cases, cases, signal_cases
from autodistill.search.request.metrics import RequestedMetrics
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.setup.candidates import init_of
from autodistill.search.setup.loading import Loaded
from autodistill.search.worker.begin import begun, codes_file
from autodistill.search.worker.messages import TrialSetting
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Strategy
from autodistill.units import format_bytes, written_bytes
from autodistill.utils.checksums import write_list
from autodistill.utils.durable import make_folder

CANDIDATE = "candidate"
"""Trial name of the untrained row of a file that the user named. Rows of further files have a number appended."""

EVALUATORS = ("accuracy", "perplexity", "agreement", "kl", "calibration", "memory", "size")


def calibration_file(config: SearchConfig, loaded: Loaded) -> Path | None:
    """Return the file of the teacher's calibration, made if necessary, or None if no strategy of the space uses it."""
    if not any(strategy.init.selective for strategy in config.space.extremes()):
        return None
    return ensure_importance(
        loaded.load_teacher,
        teacher_fingerprint=loaded.outputs_of,
        data_fingerprint=loaded.data.fingerprint,
        data=load_split(loaded.data.folder, "train"),
        root=config.cache / "calibrations",
        device=loaded.device,
    )


def cache_settings(space: Space, spec: ModelSpec, bf16: bool, calibration: Path | None) -> CacheSettings:
    """Return what the trials of a space may read from the teacher's cache.

    States of layers that a calibration chooses are left out if there is no calibration yet.
    """
    importance = PartImportance.load(calibration) if calibration else None
    cases = [
        (kept_layers(init, spec.layers, importance), item)
        for init, item in alignment_cases(space, spec.layers)
        if importance is not None or not init.by_influence
    ]
    states = {
        pair.teacher_state
        for kept, alignment in cases
        if alignment.count <= len(kept)
        for pair in layer_map(alignment, kept, spec.layers)
    }
    # A layer's attention is computed from its input, which is the output of the layer before.
    followed = {teacher_layer(attention, spec.layers) for attention in attention_cases(space, spec.layers)}
    states |= {layer - 1 for layer in followed if layer > 0}
    return CacheSettings.for_recipes(signal_cases(space), states, bf16)


def check_cache_limit(config: SearchConfig, loaded: Loaded) -> None:
    """Refuse a limit that cannot hold the outputs for the shortest trials, before anything is measured.

    Raises:
        InputError: The limit is too small. The message names the least sufficient one.
    """
    longest = max(config.space.lengths)
    tokens = fewest_tokens(loaded.step_tokens, config.tokens)
    length = config.sequence_length
    sequences = min(int(longest * tokens) // length, loaded.data.splits["train"].sequences)
    settings = cache_settings(config.space, loaded.spec, False, None)
    need = settings.bytes_of(sequences, length, loaded.spec.vocabulary, loaded.spec.width)
    if need > config.cache_limit_bytes and not settings.empty:
        raise InputError(
            f"the teacher cache needs at least {format_bytes(need)} for trials of {tokens:,} tokens, above its limit "
            f"of {format_bytes(config.cache_limit_bytes)}: give --cache-limit {written_bytes(need)} or more"
        )


def most_cached(config: SearchConfig, loaded: Loaded) -> int:
    """Return how many training tokens a trial may have if the limit must hold the teacher's outputs for them.

    These are all tokens if nothing is cached. On an accelerator, where trials may read that many, the states of layers
    that a calibration chooses are counted too. If the states of all layers would be too much, the calibration is made
    here. On a CPU, a lack of space for such states is only noticed when the cache is made.
    """
    space, spec = config.space, loaded.spec
    length, sequences = config.sequence_length, loaded.data.splits["train"].sequences
    settings = cache_settings(space, spec, loaded.workers.bf16, None)
    if settings.empty:
        return sequences * length

    def held(settings: CacheSettings) -> int:
        one = settings.bytes_of(1, length, spec.vocabulary, spec.width)
        return min(sequences, config.cache_limit_bytes // one)

    if settings.states and "cpu" not in (loaded.device, loaded.workers.device):
        every = replace(settings, states=tuple(range(spec.layers)))
        known = held(every) == sequences
        settings = every if known else cache_settings(space, spec, settings.bf16, calibration_file(config, loaded))
    return int(held(settings) * length / max(space.lengths))


def teacher_phase(config: SearchConfig, loaded: Loaded, plan: Plan, run: RunFolder, clock: Clock) -> TrialSetting:
    """Score the teacher, and write its rows under each deployment and as its own file, and the rows of candidates.

    This comes before all work on trials, so that from then on there is something to export. The teacher's outputs for
    trials are made later, by `cache_phase`.
    """
    validation = load_split(loaded.data.folder, "validation").head(plan.eval_tokens)
    # Loaded at most once, and only if something must be scored.
    teacher = functools.cache(partial(loaded.load_teacher, loaded.device))
    reference = run.path / "teacher_reference.npz"
    accuracy, own = _scored(teacher, reference, validation, loaded.device, config.scoring, run, clock)
    setting = TrialSetting(
        teacher=loaded.teacher.folder,
        teacher_spec=loaded.spec,
        teacher_reference=reference,
        teacher_accuracy=accuracy,
        data=loaded.data.folder,
        cache=None,
        checkpoints=run.checkpoints,
        codes=_codes_folder(config, loaded, run),
        budget=config.budget,
        plan=plan,
        evaluators=_evaluators(config.requested),
        metric=config.metric,
        direction=config.direction,
        device=loaded.device,
        pretrained=loaded.pretrained,
        held_type=loaded.teacher_fit.held_type,
        divided=loaded.teacher_fit.processes,
        renderings=loaded.renderings,
        divergences=config.requested.divergences,
        scoring=config.scoring,
    )
    rows = [row for row in run.events.rows(split="validation") if row.kind == "teacher"]
    setting = replace(setting, evaluators=_with_expected_counts(setting.evaluators, rows, validation))
    done = {row.deployment_name for row in rows}
    for deployment in loaded.teacher_deployments(config):
        if deployment.name in done:
            continue
        with clock.phase("evaluate", f"teacher as {deployment.name}"):
            row = _untrained_row(teacher(), deployment, setting, validation, config.device, loaded.spec, own=own)
            run.events.add(RowAdded(row=row))
            setting = replace(setting, evaluators=_with_expected_counts(setting.evaluators, [row], validation))
    del teacher
    for place, file in enumerate(config.candidates):
        _candidate_row(
            config, loaded, file, CANDIDATE if place == 0 else f"{CANDIDATE}-{place + 1}", setting, run, clock
        )
    return setting


def before_trials(row: Row) -> bool:
    """Return whether `teacher_phase` writes such a row."""
    return row.kind == "teacher" or row.trial.partition("-")[0] == CANDIDATE


def _candidate_row(
    config: SearchConfig,
    loaded: Loaded,
    reference: str,
    trial: str,
    setting: TrialSetting,
    run: RunFolder,
    clock: Clock,
) -> None:
    """Write the row of a file that the user named, as it is. From then on it may be exported if it fits."""
    if any(row.trial == trial for row in run.events.rows(split="validation")):
        return
    deployment, strategy = loaded.candidate_file(reference, config), Strategy(init=init_of(reference))
    name = f"{Path(reference).name}, untrained"
    with clock.phase("evaluate", f"{name}, as {deployment.name}"):
        model, _ = begun(setting, strategy, setting.plan.seed)
        spec = student_spec(strategy, setting.teacher_spec, setting.pretrained.get(reference))
        validation = load_split(setting.data, "validation").head(setting.plan.eval_tokens)
        row = _untrained_row(
            model, deployment, setting, validation, config.device, spec, strategy, {}, named=(trial, name)
        )
        _keep(setting.pretrained[reference], student_folder(run.checkpoints / trial))
        run.events.add(RowAdded(row=row))


def _keep(model: Path, student: Path) -> None:
    """Make a model that was converted from a file a student of the run, with the file itself, which is exported."""
    partial = student.with_name(f".{student.name}.partial")
    for left in (partial, student):
        shutil.rmtree(left, ignore_errors=True)
    make_folder(student.parent)
    shutil.copytree(model, partial, copy_function=linked)
    write_list(partial)
    os.replace(partial, student)


def _codes_folder(config: SearchConfig, loaded: Loaded, run: RunFolder) -> Path | None:
    """Return the folder of the codes that students keep, or None if no strategy of the space keeps codes."""
    asked = cases(config.space, {"finishing", "finishing.rounding"}, loaded.spec.layers)
    if not any(one.finishing and one.finishing.rounding == "compensated" for one in asked):
        return None
    make_folder(folder := run.path / "codes")
    return folder


def cache_phase(
    config: SearchConfig, loaded: Loaded, plan: Plan, run: RunFolder, clock: Clock, setting: TrialSetting
) -> TrialSetting:
    """Make the calibration and the cache of the teacher's outputs, if strategies of the space need them."""
    with clock.phase("cache", "calibration"):
        calibration = calibration_file(config, loaded)
    # A machine that only emulates bfloat16 makes the outputs in float32, since emulation may take many times as long.
    settings = cache_settings(config.space, loaded.spec, plan.bf16 and loaded.bf16, calibration)
    cache = None if settings.empty else _cache(config, loaded, settings, plan, run, clock)
    return replace(setting, cache=cache, calibration=calibration)


def _cache(
    config: SearchConfig, loaded: Loaded, settings: CacheSettings, plan: Plan, run: RunFolder, clock: Clock
) -> Path:
    """Return the folder of the teacher's outputs, made if it is missing. The run holds it from then on."""
    with clock.phase("cache", "teacher cache"):
        make = partial(
            ensure_cache,
            loaded.load_teacher,
            teacher_fingerprint=loaded.outputs_of,
            data_fingerprint=loaded.data.fingerprint,
            data=load_split(loaded.data.folder, "train").head(plan.most_tokens),
            vocabulary=loaded.spec.vocabulary,
            width=loaded.spec.width,
            settings=settings,
            root=config.cache / "teacher-outputs",
            limit_bytes=config.cache_limit_bytes,
            device=loaded.device,
        )
        # Between the two calls another search may remove the cache to make room.
        while not run.hold((cache := make()) / META):
            pass
    return cache


def _scored(
    teacher: Callable[[], Any],
    reference_file: Path,
    validation: TokenSet,
    device: str,
    scoring: Scoring,
    run: RunFolder,
    clock: Clock,
) -> tuple[float, TokenScores | None]:
    """Return the teacher's accuracy and its scores, and write the reference file for comparisons.

    If the teacher was scored before the search was resumed, the result is the stored accuracy, and None for the scores.
    """
    scored = run.events.of(TeacherScored)
    if scored and reference_file.exists():
        return scored[0].teacher_accuracy, None
    with clock.phase("evaluate", "scoring the teacher"):
        model = teacher()
        with scored_in(model, scoring, device):
            scores, reference = score_teacher(model, validation, device=device)
        reference.save(reference_file)
        accuracy = float(scores.correct.mean())
        run.events.add(TeacherScored(teacher_accuracy=accuracy, tokens=len(reference.top1)))
    return accuracy, scores


def _evaluators(asked: RequestedMetrics) -> tuple[str | Evaluator, ...]:
    return (*EVALUATORS, *(item for item in asked.evaluators if item not in EVALUATORS))


def _with_expected_counts(
    evaluators: tuple[str | Evaluator, ...], rows: Sequence[Row], data: TokenSet
) -> tuple[str | Evaluator, ...]:
    """Return the evaluators. A metric command must print as many scores as it printed for the teacher, by its rows."""
    found = [paired(row, COMMAND) for row in rows]
    given = len(data.tokens) if data.questions is None else len(data.questions.entries)
    counts = [sum(documents["count"]) for documents in found if documents]
    if not counts:
        return evaluators
    return tuple(
        replace(item, expected=(given, counts[0])) if isinstance(item, Command) else item for item in evaluators
    )


def solution_phase(config: SearchConfig, loaded: Loaded, setting: TrialSetting, run: RunFolder, clock: Clock) -> None:
    """Write the row of the first solution before any training, if its codes were rounded with error compensation.

    From then on it may be exported. If scales alone are trained, training begins with the same codes and keeps them.
    """
    starts = list(islice(config.space.starts.values(), setting.plan.trials))
    starts[:1] = [as_stored(start, config.constructions) for start in starts[:1]]
    raced = [start for start in starts if start.codes]
    # If there are rows of students, the codes were made before this search was resumed.
    if not raced or any(row.strategy is not None for row in run.events.rows(split="validation")):
        return
    # This uses all threads, while a trial's worker has only a part of them.
    with clock.phase("solve", "compensating the errors of rounding"):
        for start in raced:
            codes_file(setting, start, loaded.moments)
        loaded.moments.release()
    strategy = starts[0]
    deployments = [one.deployment for one in config.constructions if one.init == strategy.init]
    deployment = next((one for one in deployments if one.scheme == strategy.codes), None)
    if deployment is None:
        # Without training this is the teacher in a plain storage, which has its row already.
        return
    if strategy.init.whole and setting.held_type != "float32" and setting.device != "cpu":
        # The device does not hold it. The teacher has a row in this storage, without compensation.
        return
    validation = load_split(setting.data, "validation", setting.rendering(strategy.init)).head(setting.plan.eval_tokens)
    model, scales = begun(setting, strategy, setting.plan.seed)
    with clock.phase("evaluate", f"the solved student, untrained, as {deployment.name}"):
        spec = student_spec(strategy, setting.teacher_spec, setting.pretrained.get(strategy.init.model))
        row = _untrained_row(model, deployment, setting, validation, config.device, spec, strategy, scales)
        run.events.add(RowAdded(row=row))


def as_stored(start: Strategy, constructions: Sequence[Construction]) -> Strategy:
    """Return an arm with the codes that store it before any training, even if it then trains its weights.

    Args:
        start: The arm. It is returned unchanged if it is of no solved construction.
        constructions: Those of the search. For one that was not solved the teacher has a row already.
    """
    for one in constructions:
        if one.solved and one.init == start.init and start.finishing in (found := one.finishings()).values():
            return replace(start, finishing=next(iter(found.values())))
    return start


def _untrained_row(
    model: Any,
    deployment: Deployment,
    setting: TrialSetting,
    validation: TokenSet,
    served_on: Device | None,
    spec: ModelSpec,
    strategy: Strategy | None = None,
    scales: Mapping[str, Scales] | None = None,
    own: TokenScores | None = None,
    named: tuple[str, str] = (SOLVED_TRIAL, "solved, untrained"),
) -> Row:
    """Return the row of the unmodified teacher or of an untrained student, under one deployment.

    `own` are the teacher's scores, if they are known already. `named` has the trial and the name of a student.
    """
    what = "teacher" if strategy is None else "untrained student"
    try:
        evaluation = setting.evaluate(
            model,
            spec,
            deployment,
            validation,
            TeacherReference.load(setting.teacher_reference),
            strategy.init if strategy else None,
            scales=read_scales(setting.teacher, deployment) if scales is None else scales,
            unpacked=own,
        )
    except TrialFailedError as error:
        raise InputError(f"the {what} as {deployment.name} cannot be measured ({error.cause}): {error}") from error
    return make_row(
        evaluation,
        trial="teacher" if strategy is None else named[0],
        kind="teacher" if strategy is None else "initial",
        name="teacher" if strategy is None else named[1],
        strategy=strategy,
        spec=spec,
        status=Status.COMPLETED,
        split="validation",
        budget=setting.budget,
        plan=setting.plan,
        train_tokens=0,
        train_seconds=0.0,
        seed=setting.plan.seed,
        device=served_on,
    )
