"""The end of a search: the best student is exported, verified, measured in its runtime and scored on test."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from autodistill import plugins
from autodistill.applied import initial_student, student_spec
from autodistill.budget import DeviceBudget
from autodistill.contracts import Artefact, Direction, Measurement, Status, Subject
from autodistill.distillation.grid_scales import read_scales
from autodistill.distillation.held import load_held
from autodistill.distillation.memory import give_back_memory
from autodistill.distillation.scoring import choices, refer
from autodistill.distillation.teacher import Teacher, load_model
from autodistill.errors import InputError, NothingFitsError, VerificationError
from autodistill.estimate import fits, holdable, too_late
from autodistill.evaluation import Evaluation, deployed_weights, evaluate
from autodistill.export.card import Origin, model_card
from autodistill.export.verify import CLEAR_SHARE, MIN_POSITIONS, RuntimeCheck, verify, verify_runtime
from autodistill.formats import get_format
from autodistill.quiet import free_cores
from autodistill.records.confirmation import Confirmation, confirmations
from autodistill.records.differences import paired
from autodistill.records.json_files import read_json
from autodistill.records.leaderboard import (
    DISTILLED,
    limits_of,
    nearest,
    paired_bootstrap,
    rank,
)
from autodistill.records.openings import openings_in, record_test_opening, recorded_test_openings
from autodistill.records.row import Row, rows_of
from autodistill.records.store import RunFolder
from autodistill.search.exportable import candidates, container_of, next_candidate, passed_over, trained_rows
from autodistill.search.rows import make_row
from autodistill.search.trials import Question
from autodistill.strategy import Deployment, Strategy
from autodistill.students import has_student, kept_after, trained_student
from autodistill.templates import copy_licence
from autodistill.token_sets import Prepared, load_split
from autodistill.trial_data import TrialSetting
from autodistill.units import Budget, format_bytes, format_duration

# Measured in the runtime, a student may turn out above the budget; this many are exported before giving up.
_CANDIDATES = 3
# What every student is exported as too, and the teacher is scored as beside the best student's deployment.
_FULL = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)


class Phases(Protocol):
    """Times the phases of a search."""

    def phase(self, name: str, shown: str) -> AbstractContextManager[None]:
        """Times the block."""
        ...


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What the end of a search produced.

    Attributes:
        best: The exported row, with what its runtime measured.
        paths: Exported students by container.
        checks: Agreement of runtime and simulation by container.
        test: Rows on the test split.
        confirmed: What was trained on further seeds, the chosen one first.
        gain: Best less baseline on test, paired by document, and its standard error, None of a single document; None
            where there is none.
        notes: What a reader must know, in sentences.
    """

    best: Row
    paths: Mapping[str, Path]
    checks: Mapping[str, RuntimeCheck]
    test: tuple[Row, ...]
    gain: tuple[float, float | None] | None
    confirmed: tuple[Confirmation, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Finisher:
    """Everything that the steps of the end share."""

    question: Question
    setting: TrialSetting
    run: RunFolder
    teacher: Teacher
    data: Prepared
    threads: int
    phases: Phases
    line: Callable[[str], None]

    def student(self, row: Row) -> Path:
        """Folder of the float32 student of a row."""
        return trained_student(self.run.checkpoints / row.trial, self.setting.storage, kept_after(row))

    def has(self, row: Row) -> bool:
        """Whether its student was kept."""
        return has_student(self.run.checkpoints / row.trial, self.setting.storage, kept_after(row))

    def load(self, row: Row) -> Any:
        """The float32 student of a row."""
        return load_model(self.student(row), torch.float32, self.setting.device)

    def write(self, kind: str, row: Row) -> None:
        """Appends a row to the log."""
        self.run.events.append({"event": kind, "row": row.to_json()})


def finish(rows: Sequence[Row], finisher: Finisher) -> Finish:
    """Exports the best student and everything that proves it.

    Args:
        rows: Of the validation split.
        finisher: What the steps share.

    Raises:
        NothingFitsError: No student that was kept, at full fidelity or short of it, fits the budget.
        VerificationError: An artefact is not what was evaluated.
    """
    question, phases = finisher.question, finisher.phases
    torch.set_num_threads(finisher.threads)
    students = candidates(rows, question.metric, finisher.has)
    confirmed = confirmations(rows, question.metric, question.direction)
    others = [row for row in rows if row.kind not in DISTILLED]
    choice = [*students, *others]
    paths: dict[str, Path] = {}
    checks: dict[str, RuntimeCheck] = {}
    rejected: list[Row] = []
    best = _first_that_fits(choice, rejected, finisher, paths, checks)
    for row in passed_over(choice, rejected, question.budget.memory_bytes):
        finisher.write("row", row)
    if best is None:
        judged = any(row.kind in DISTILLED for row in rows)
        raise NothingFitsError(_nothing(rejected or students, judged, finisher))
    packed = {container: (best, Deployment.from_json(best.deployment)) for container in paths}
    notes: tuple[str, ...] = ()
    if "gguf" not in paths:
        beside, notes = _gguf_beside(choice, rejected, finisher, paths, checks)
        if beside is not None:
            packed["gguf"] = (beside, Deployment.from_json(beside.deployment))
    if "huggingface" not in paths:
        with phases.phase("export", "exporting the 16-bit folder"):
            paths["huggingface"] = _pack(best, _FULL, finisher)[0].path
        packed["huggingface"] = (best, _FULL)
    with phases.phase("evaluate", "test split"):
        test = _test(best, rows, finisher)
    _describe(packed, test, finisher)
    return Finish(
        best=best,
        paths=paths,
        checks=checks,
        test=test,
        gain=_gain(test, question.metric, question.direction),
        confirmed=tuple(confirmed),
        notes=(*notes, *_notes(best, rows, finisher), *_spent(finisher)),
    )


def _describe(packed: Mapping[str, tuple[Row, Deployment]], test: Sequence[Row], finisher: Finisher) -> None:
    """Lays a model card beside each exported student, and the text of the licence that the teacher's folder has."""
    run = finisher.run
    rows = [row for row in rows_of(run.events.read()) if row.split != "test"]
    origin = Origin.of(read_json(run.search_file))
    for container, (row, deployment) in packed.items():
        folder = run.student(container)
        (folder / "README.md").write_text(model_card(row, deployment, [*rows, *test], origin), encoding="utf-8")
        copy_licence(finisher.student(row), folder)


def _first_that_fits(
    rows: Sequence[Row],
    rejected: list[Row],
    finisher: Finisher,
    paths: dict[str, Path],
    checks: dict[str, RuntimeCheck],
    container: str | None = None,
) -> Row | None:
    """Exports the best row that keeps to the budget when its runtime is measured; those that do not are `rejected`."""
    for _ in range(_CANDIDATES):
        candidate = next_candidate(rows, rejected, finisher.question, container)
        if candidate is None:
            return None
        found = _export(candidate, finisher, paths, checks)
        if found.feasible:
            return found
        rejected.append(found)
        written = container_of(found)
        # Nobody is to serve what breaks the budget.
        del paths[written], checks[written]
        shutil.rmtree(finisher.run.student(written))
        finisher.line(f"{found.name} as {found.deployment_name} does not fit once measured: {found.reason}")
    return None


def _gguf_beside(
    choice: Sequence[Row],
    rejected: list[Row],
    finisher: Finisher,
    paths: dict[str, Path],
    checks: dict[str, RuntimeCheck],
) -> tuple[Row | None, tuple[str, ...]]:
    """Exports the best GGUF file beside a best student of another kind, which stands whatever becomes of it.

    Returns:
        Its row, if any fits, and why there is no such file where it could not be written or was not what was evaluated.
    """
    try:
        return _first_that_fits(choice, rejected, finisher, paths, checks, "gguf"), ()
    except (InputError, VerificationError) as error:
        for kept in (paths, checks):
            kept.pop("gguf", None)
        shutil.rmtree(finisher.run.student("gguf"), ignore_errors=True)
        return None, (f"there is no GGUF file beside the best student: {error}",)


def _pack(row: Row, deployment: Deployment, finisher: Finisher) -> tuple[Artefact, str]:
    """Writes one deployment of a row's student and holds the bytes on disk to the evaluated weights."""
    container = get_format(deployment.format).container
    exporter = plugins.load("exporters", container)
    artefact = exporter.export(finisher.student(row), deployment, finisher.run.student(container))
    verify(exporter, artefact, finisher.student(row), deployment)
    return artefact, container


def _export(row: Row, finisher: Finisher, paths: dict[str, Path], checks: dict[str, RuntimeCheck]) -> Row:
    """Exports a row's student, verifies it in its runtime, and gives the row with what was measured there."""
    deployment = Deployment.from_json(row.deployment)
    spec = student_spec(Strategy.from_json(row.strategy), finisher.setting.teacher_spec)
    with finisher.phases.phase("export", f"exporting {row.name} as {deployment.name}"):
        artefact, container = _pack(row, deployment, finisher)
        length = finisher.question.plan.sequence_length
        sequences = math.ceil(MIN_POSITIONS / CLEAR_SHARE / (length - 1))
        rendering = finisher.setting.rendering(Strategy.from_json(row.strategy).init)
        data = load_split(finisher.data.folder, "validation", rendering).head(sequences * length)
        model = finisher.load(row)
        with deployed_weights(model, spec, deployment, read_scales(finisher.student(row), deployment)):
            simulated = choices(model, data, device=finisher.setting.device)
        # The runtime may take all that a GPU has.
        del model
        give_back_memory()
        threads = free_cores(finisher.threads)
        checks[container] = verify_runtime(
            artefact, deployment, simulated, data.tokens[:, :-1], threads, finisher.student(row)
        )
        paths[container] = artefact.path
    subject = Subject(
        spec=spec,
        deployment=deployment,
        budget=finisher.question.budget,
        artefact=artefact.path,
        threads=finisher.threads,
    )
    measured: dict[str, Measurement] = {}
    for name in ("memory", "size", "latency"):
        evaluator = plugins.load("evaluators", name)
        if evaluator.supports(deployment):
            with finisher.phases.phase("evaluate", f"{name} of the {deployment.name} student"):
                measured |= {item.name: item for item in evaluator.evaluate(subject)}
    updated = _with_measured(row, measured, finisher)
    finisher.write("row", updated)
    return updated


def _with_measured(row: Row, measured: Mapping[str, Measurement], finisher: Finisher) -> Row:
    """The row with the runtime's figures; the memory and size that were predicted stay beside the measured ones."""
    fields: dict[str, Any] = {"other": dict(row.other)}
    for name, item in measured.items():
        if name in ("memory_bytes", "size_bytes"):
            fields[name] = int(item.value)
        elif name in ("latency_ms", "tokens_per_second"):
            fields[name] = item.value
        elif "@" not in name:
            fields["other"][name] = item.value
    if "memory_bytes" in measured:
        fields["memory_source"] = measured["memory_bytes"].source
        if row.memory_source != "measured":
            fields["other"] |= {"memory_bytes_predicted": row.memory_bytes, "size_bytes_predicted": row.size_bytes}
        fields["other"]["memory_parts"] = dict(measured["memory_bytes"].detail)
    late: tuple[str, ...] = ()
    if "latency_ms" in measured:
        detail = measured["latency_ms"].detail
        fields |= {"latency_source": "measured", "machine": detail["machine"]}
        fields["other"] |= {"latency_detail": dict(detail), "latency_doubts": "; ".join(detail["doubts"]) or None}
        late = _too_late(measured, fields, finisher)
    updated = replace(row, **fields)
    limit = finisher.question.budget.memory_bytes
    over = (updated.memory_bytes or 0) - limit
    broken = [f"memory: {updated.memory_bytes} bytes, {over} over {limit}"] if over > 0 else [*late]
    return replace(updated, feasible=False, reason="; ".join(broken)) if broken else updated


def _too_late(measured: Mapping[str, Measurement], fields: Mapping[str, Any], finisher: Finisher) -> tuple[str, ...]:
    """The limits of latency that are broken, where it was measured on what they hold on.

    Elsewhere they stay predicted: what another machine does says nothing of them.
    """
    budget = finisher.question.budget
    if not isinstance(budget, DeviceBudget) or budget.device.name != fields["machine"]:
        return ()
    times = {limit: measured[limit.name].value / 1e3 for limit in budget.latency}
    fields["other"].update({limit.name: 1e3 * seconds for limit, seconds in times.items()})
    return too_late(times, "measured")


def _nothing(rows: Sequence[Row], judged: bool, finisher: Finisher) -> str:
    limits = limits_of(finisher.question.budget)
    needs = {f"{row.name} as {row.deployment_name}": {name: row.figure(name) for name in limits} for row in rows}
    closest = nearest(needs, limits)
    if closest is None and judged:
        return "no student that was judged is there to be exported: go on with --resume and more --time"
    if closest is None:
        return "nothing was trained as far as a rung: go on with --resume and more --time, or start with fewer --tokens"
    return f"nothing fits the budget: the nearest, {closest.candidate}, {closest.describe()}; raise --budget"


def _known_on_test(best: Row, compared: Sequence[tuple[Row, Deployment]], finisher: Finisher) -> tuple[Row, ...] | None:
    """The rows of an earlier opening of the test split, in its order, where they are of all that would be scored.

    The plan, and with it what is read of the split, never changes within a run.
    """
    deployment = Deployment.from_json(best.deployment)
    of_teacher = [("teacher", "teacher", packing.name, None, 0) for packing in dict.fromkeys((_FULL, deployment))]
    of_initial = ("initial", "initial", deployment.name, best.strategy, 0)
    of_students = [
        (row.kind, row.trial, packing.name, row.strategy, row.train_tokens or 0)
        for row, packing in ((best, deployment), *compared)
    ]
    logged = {(row.kind, row.trial, row.deployment_name): row for row in rows_of(finisher.run.events.read(), ("test",))}
    found = []
    for kind, trial, packing, strategy, tokens in (*of_teacher, of_initial, *of_students):
        row = logged.get((kind, trial, packing))
        if row is None or (row.strategy, row.train_tokens or 0) != (strategy, tokens):
            return None
        found.append(row)
    return tuple(found)


def _test(best: Row, rows: Sequence[Row], finisher: Finisher) -> tuple[Row, ...]:
    """Opens the test split, once, for the student, the baseline, the undistilled student and the teacher.

    A search that ends once more with what it had takes their rows from its log, and opens nothing.
    """
    question, setting = finisher.question, finisher.setting
    compared = _compared(best, rows, finisher)
    known = _known_on_test(best, compared, finisher)
    if known is not None:
        finisher.line("the test split is not opened again: what is exported has been scored on it")
        return known
    record_test_opening(finisher.run.path.parent, run=finisher.run.name, data=finisher.data.fingerprint)
    data = load_split(finisher.data.folder, "test").head(question.plan.test_tokens)
    deployment = Deployment.from_json(best.deployment)
    teacher = load_held(finisher.teacher.folder, setting.held, setting.device)
    _, reference = refer(teacher, data, device=setting.device)
    results: list[Row] = []

    def score(model: Any, row: Row | None, packing: Deployment, strategy: Strategy | None) -> Evaluation:
        """What one model is on test, under one deployment."""
        init = strategy.init if strategy else None
        return evaluate(
            model,
            student_spec(strategy, setting.teacher_spec) if strategy else setting.teacher_spec,
            packing,
            load_split(finisher.data.folder, "test", setting.rendering(init)).head(question.plan.test_tokens),
            reference,
            budget=question.budget,
            evaluators=setting.evaluators,
            metric=setting.metric,
            device=setting.device,
            scales=read_scales(finisher.student(row), packing) if row else None,
            split="test",
            share=setting.plan.example_share,
            tokenizer=setting.text(init),
        )[0]

    def write(evaluation: Evaluation, row: Row | None, kind: str, name: str, strategy: Strategy | None) -> None:
        """Makes a row of it, and writes that down."""
        made = make_row(
            evaluation,
            trial=row.trial if row else kind,
            kind=kind,
            name=name,
            strategy=strategy,
            spec=student_spec(strategy, setting.teacher_spec) if strategy else setting.teacher_spec,
            status=Status.COMPLETED,
            split="test",
            budget=question.budget,
            plan=question.plan,
            train_tokens=row.train_tokens or 0 if row else 0,
            train_seconds=row.train_seconds or 0.0 if row else 0.0,
            seed=question.plan.seed,
        )
        finisher.write("test", made)
        results.append(made)

    for packing in dict.fromkeys((_FULL, deployment)):
        evaluation = score(teacher, None, packing, None)
        write(evaluation, None, "teacher", "teacher", None)
    del teacher
    strategy = Strategy.from_json(best.strategy)
    if strategy.init.source != "teacher" or student_spec(strategy, setting.teacher_spec) != setting.teacher_spec:
        initial, _ = initial_student(setting, strategy.init, question.plan.seed)
        evaluation = score(initial.to(setting.device), None, deployment, strategy)
        del initial
    # Else it begins as the teacher, which was scored under that deployment last.
    write(evaluation, None, "initial", "undistilled student", strategy)
    for row, packing in ((best, deployment), *compared):
        strategy = Strategy.from_json(row.strategy)
        write(score(finisher.load(row), row, packing, strategy), row, row.kind, row.name, strategy)
    return tuple(results)


def _spent(finisher: Finisher) -> tuple[str, ...]:
    """Says so where this run was scored on test before."""
    run = finisher.run
    openings = recorded_test_openings(run.path.parent, data=finisher.data.fingerprint)
    here = sum(opening["run"] == run.name for opening in openings)
    earlier = max(here, openings_in(run.events.read())) - 1
    if earlier < 1:
        return ()
    return (
        f"this run's test split was opened before ({earlier} time{'s' if earlier > 1 else ''}): it is spent, and its "
        "figures no longer say how well a choice does on unseen documents",
    )


def _compared(best: Row, rows: Sequence[Row], finisher: Finisher) -> list[tuple[Row, Deployment]]:
    """What the best student is held to: the best baseline of as many tokens, under the deployment that suits it best.

    Where there is none, as the best was trained on, the best of those that had as many as it had before: and the best
    student as it was then, packed as it is now.
    """
    question = finisher.question
    trained = trained_rows(rows, question.metric, finisher.has)
    if best.kind == "baseline":
        return []

    def first(tokens: int | None = None) -> list[tuple[Row, Deployment]]:
        """The best baseline, of so many tokens."""
        found = [row for row in trained if row.kind == "baseline" and tokens in (None, row.train_tokens)]
        ranked = rank(found, question.metric, question.direction)[:1]
        return [(one.row, Deployment.from_json(one.row.deployment)) for one in ranked]

    if baseline := first(best.train_tokens):
        return baseline
    same = [row for row in trained if row.kind == best.kind and (row.strategy, row.seed) == (best.strategy, best.seed)]
    for row in sorted(same, key=lambda row: row.train_tokens or 0, reverse=True):
        if row.train_tokens != best.train_tokens and (baseline := first(row.train_tokens)):
            return [*baseline, (row, Deployment.from_json(best.deployment))]
    return first()


def _gain(test: Sequence[Row], metric: str, direction: Direction) -> tuple[float, float | None] | None:
    """By how much the found student is better than the baseline, paired by document, and its standard error.

    Where the best was trained on further than the baseline, it is the one of as many tokens that is compared. None
    without a baseline, and of a metric that is no mean, of which nothing can be paired.
    """
    students, baselines = ([row for row in test if row.kind == kind] for kind in ("student", "baseline"))
    pairs = [(one, other) for one in students for other in baselines if one.train_tokens == other.train_tokens]
    pairs = pairs or [(one, other) for one in students for other in baselines]
    if not pairs:
        return None
    found, baseline = (paired(row, metric) for row in pairs[0])
    if found is None or baseline is None:
        return None
    sign = 1 if direction == "max" else -1
    gaps = [sign * (mine - theirs) for mine, theirs in zip(found["sum"], baseline["sum"], strict=True)]
    differences, errors = paired_bootstrap(np.asarray([gaps], np.float64), np.asarray(found["count"], np.float64), 0)
    return float(differences[0]), float(errors[0]) if math.isfinite(errors[0]) else None


def _on_device(best: Row, budget: Budget) -> list[str]:
    """How the best stands to limits of latency, by what they are known, and why its latency is doubtful if it is."""
    notes = []
    if isinstance(budget, DeviceBudget) and budget.latency:
        here = best.machine == budget.device.name and best.latency_source == "measured"
        source = "measured" if here else "predicted"
        told = ", ".join(
            f"{limit.name} {format_duration((best.figure(limit.name) or 0) / 1e3)} of {format_duration(limit.seconds)}"
            for limit in budget.latency
        )
        notes.append(f"on {budget.device.name} the best student has, {source}: {told}")
        if not here:
            notes.append("its limits of latency are met by prediction only: measure it on the device itself")
    if best.figure("latency_ms") is not None and best.other.get("latency_doubts"):
        notes.append(f"the measured latency is doubtful: {best.other['latency_doubts']}")
    return notes


def _notes(best: Row, rows: Sequence[Row], finisher: Finisher) -> tuple[str, ...]:
    """Whether the budget binds, what is the tightest that the best meets, and whether the teacher beats it."""
    question = finisher.question
    metric = question.metric
    limit = question.budget.memory_bytes
    notes = []
    spec = finisher.setting.teacher_spec
    fitting = fits(spec, holdable(spec, question.deployments), question.budget)
    if fitting and max(fit.slack for fit in fitting) <= 0:
        most = max(fitting, key=lambda fit: fit.need)
        notes.append(
            f"the budget of {format_bytes(limit)} does not bind: the teacher fits in every packing, of which "
            f"{most.deployment.name} needs most, {format_bytes(most.need)}"
        )
    memory = best.memory_bytes or 0
    if not question.space.dimensions:
        # One strategy alone was trained: there was no budget to search under.
        notes = []
    notes.append(
        f"the tightest budget that the best student still meets is {format_bytes(memory)} ({memory} bytes, "
        f"{best.memory_source}), at context {question.budget.context} and batch {question.budget.batch}"
    )
    notes += _on_device(best, question.budget)
    teachers = [row for row in rows if row.kind == "teacher" and row.feasible]
    # A student short of the plan's end is one for a person to judge by its metric, as any other.
    whole = best if best.full else replace(best, fidelity=1.0)
    first = rank([whole, *teachers], metric, question.direction)[0].row
    if first.kind == "teacher":
        packed = first.deployment["bits"] < 16
        beats = "quantising the teacher beats distilling it here" if packed else "the teacher itself is better here"
        notes.append(
            f"{beats}: the teacher as {first.deployment_name} has {metric} "
            f"{first.figure(metric):.4f} in {format_bytes(first.memory_bytes or 0)}, the best student "
            f"{best.figure(metric):.4f} in {format_bytes(memory)}; of what is equal within one standard error, the "
            "smaller is better"
        )
    if best.fidelity is not None and best.fidelity > 1 + 1e-9:
        notes.append(
            f"the best student was trained for {best.fidelity:.0%} of a trial's tokens ({best.train_tokens:,}); the "
            "gain over the baseline is of students of equal tokens where both were trained to as many"
        )
    if best.kind == "baseline" and best.full and question.space.dimensions:
        notes.append("no searched strategy beat the baseline")
    return tuple(notes)
