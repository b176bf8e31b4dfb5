"""The end of a search: the best row is exported, verified, measured in its runtime and scored on test."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodistill import plugins
from autodistill.data.dataset import load_split
from autodistill.data.student_template import copy_license
from autodistill.errors import InputError, NothingFitsError, RuntimeDiffersError, VerificationError
from autodistill.estimates.fit import fits, holdable, too_late
from autodistill.evaluation.base import Measurement, Subject, load_evaluator
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.export.base import Artifact, Expected, load_exporter
from autodistill.export.model_card import Origin, model_card
from autodistill.export.promise import promise_of
from autodistill.export.record import Exported
from autodistill.export.record import write as write_record
from autodistill.export.verify import POSITIONS, RuntimeCheck, prove, verify
from autodistill.hardware.background_load import free_cores
from autodistill.hardware.budget import Budget, DeviceBudget, on_gpu
from autodistill.hardware.device import DISCRETE
from autodistill.hardware.lookup import is_machine
from autodistill.inference.scoring import choices
from autodistill.inference.torch_memory import give_back_memory
from autodistill.quantization.learned_scales import read_scales
from autodistill.runs.events import TrialEnded
from autodistill.runs.results.beginnings import worsened
from autodistill.runs.results.gains import Gains, named
from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED, limits_of, nearest
from autodistill.runs.results.row import DAMAGED, DIFFERS, FORGOT, REMOVED, Row, Status
from autodistill.runs.results.selection import Confirmation, confirmations, in_order, untrained_in_order
from autodistill.runtimes.launch_files import write_launch_files
from autodistill.search.finish.beginnings import settle, settled_candidate
from autodistill.search.finish.context import Finisher
from autodistill.search.finish.export_choice import candidates, passed_over
from autodistill.search.finish.forgetting import Forgotten, Gate
from autodistill.search.finish.test_split import best_untrained, gains_on_test, score_on_test, spent
from autodistill.strategy.deployment import IN_16_BITS, Deployment
from autodistill.units import format_bytes, format_duration
from autodistill.utils.durable import sync_below
from autodistill.utils.json_files import read_json

# Measured in the runtime, a student may turn out above the budget; this many are exported before giving up.
_CANDIDATES = 3


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What the end of a search produced.

    Attributes:
        best: The exported row, with what its runtime measured.
        paths: Exported students by container.
        checks: Agreement of runtime and simulation by container.
        test: Rows on the test split.
        confirmed: What was trained on further seeds, the chosen one first.
        gains: By how much it is better on test than what needs no training, and than the baseline.
        forgotten: What it forgot of general text, or what the best student that was passed over for that did; None
            where nothing was trained, or that is not known.
        notes: What a reader must know, in sentences.
    """

    best: Row
    paths: Mapping[str, Path]
    checks: Mapping[str, RuntimeCheck]
    test: tuple[Row, ...]
    gains: Gains
    confirmed: tuple[Confirmation, ...]
    forgotten: Forgotten | None
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ExportedRow:
    """What was written of a row in one deployment, and how its runtime agrees; None where that was not run."""

    row: Row
    deployment: Deployment
    path: Path
    check: RuntimeCheck | None = None
    expected: Expected | None = None


def finish(rows: Sequence[Row], finisher: Finisher) -> Finish:
    """Exports the best row and everything that proves it.

    Args:
        rows: Of the validation split.
        finisher: What the steps share.

    Raises:
        NothingFitsError: Nothing that may be exported fits the budget.
        VerificationError: An artifact is not what was evaluated.
    """
    question, phases, run = finisher.question, finisher.phases, finisher.run
    torch.set_num_threads(finisher.threads)
    choice = choice_of(rows, finisher)
    confirmed = confirmations(rows, question.metric, question.direction)
    first = next(iter(in_order(choice, question.metric, question.direction, students_only=True)), None)
    while first is not None and settle(first, choice, finisher):
        # What distilling came to is known by what it began with, whatever is exported.
        first = next((row for row in choice if row.row_id == first.row_id), None)
    gate = Gate(finisher)
    exported, rejected = export_best(choice, finisher, gate)
    if exported is None:
        judged = any(row.kind in DISTILLED for row in rows)
        distilled = [row for row in rows if row.kind in DISTILLED]
        # Students of which none fits are removed first where disk is short.
        missing = [] if any(row.feasible for row in distilled) else distilled
        students = [row for row in choice if row.kind in DISTILLED]
        raise NothingFitsError(_nothing(rejected or students or missing, judged, finisher))
    best, exports = exported.row, {exported.deployment.container: exported}
    notes: tuple[str, ...] = ()
    if "gguf" not in exports:
        beside, notes = _gguf_beside(choice, rejected, finisher, gate)
        exports |= {"gguf": beside} if beside is not None else {}
    if "huggingface" not in exports:
        with phases.phase("export", "exporting the 16-bit folder"):
            path = _pack(best, IN_16_BITS, finisher).path
        exports["huggingface"] = ExportedRow(row=best, deployment=IN_16_BITS, path=path)
    clear_others(exports, finisher)
    rows = run.events.rows(split="validation")
    forgotten, told = gate.notes(best, rows)
    untrained = best_untrained(rows, finisher)
    with phases.phase("evaluate", "test split"):
        test = score_on_test(best, untrained, rows, finisher)
    describe(exports.values(), test, finisher)
    return Finish(
        best=best,
        paths={container: one.path for container, one in exports.items()},
        checks={container: one.check for container, one in exports.items() if one.check is not None},
        test=test,
        gains=replace(
            gains_on_test(best, untrained, test, question.metric, question.direction),
            forgot=best.kind in UNTRAINED and bool(gate.refused),
        ),
        confirmed=tuple(confirmed),
        forgotten=forgotten,
        notes=(*notes, *_notes(best, rows, finisher), *told, *spent(finisher)),
    )


def choice_of(rows: Sequence[Row], finisher: Finisher) -> list[Row]:
    """The rows that are chosen among: students that may be exported, and all that were not distilled.

    Args:
        rows: Of the validation split.
        finisher: What the steps of the end share.
    """
    students = candidates(rows, finisher.question.metric, finisher.has)
    return [*students, *(row for row in rows if row.kind not in DISTILLED)]


def export_best(choice: list[Row], finisher: Finisher, gate: Gate) -> tuple[ExportedRow | None, list[Row]]:
    """Exports the best row that keeps to the budget when its runtime is measured, and writes down what does not.

    Args:
        choice: Of `choice_of`; what is evaluated on the way is added.
        finisher: What the steps of the end share.
        gate: Holds students to general text.

    Returns:
        What was exported, if anything fits, and the rows that were rejected.
    """
    exported, rejected = _first_that_fits(choice, (), finisher, gate)
    for row in passed_over(choice, rejected, finisher.question.budget.memory_bytes):
        finisher.write(row)
    if exported is not None:
        _leave_out_removed(exported.row, finisher)
    return exported, rejected


def clear_others(exports: Collection[str], finisher: Finisher) -> None:
    """Removes what lies in other containers: of the best student that this run had before it went on, perhaps."""
    for container in set(plugins.names("exporters")) - set(exports):
        shutil.rmtree(finisher.run.student(container), ignore_errors=True)


def _leave_out_removed(best: Row, finisher: Finisher) -> None:
    """Writes down that rows which would be chosen before the best are not to be had, since their student is gone.

    Whoever reads the log later then chooses what was exported. It takes several students that turned out too large, or
    one that a person removed.
    """
    rows, question = finisher.run.events.rows(), finisher.question
    order = in_order(rows, question.metric, question.direction, students_only=question.students_only)
    for row in takewhile(lambda one: one.row_id != best.row_id, order):
        if row.full and not finisher.has(row):
            finisher.write(replace(row, feasible=False, reason=REMOVED))


def describe(exports: Iterable[ExportedRow], test: Sequence[Row], finisher: Finisher) -> None:
    """Lays beside each exported student a model card, the text of its licence, and the record of its proof."""
    run = finisher.run
    rows = run.events.rows()
    origin = Origin.of(read_json(run.search_file))
    for one in exports:
        folder = run.student(one.deployment.container)
        (folder / "README.md").write_text(model_card(one.row, one.deployment, [*rows, *test], origin), encoding="utf-8")
        copy_license(finisher.student(one.row), folder)
        if one.path.suffix == ".gguf":
            budget = finisher.question.budget
            longest = finisher.spec(one.row.strategy).max_context
            write_launch_files(one.path, one.deployment, min(budget.context, longest), budget.batch)
        known = Exported(
            row=one.row.row_id,
            deployment=one.deployment,
            artifact="" if one.path == folder else one.path.name,
            expected=one.expected,
            check=one.check,
            text=f"validation text of {origin.data}",
            promise=promise_of(one.row, finisher.question.budget, one.deployment.name),
        )
        write_record(folder, load_exporter(one.deployment.container), known)
        sync_below(folder)


def _first_that_fits(
    rows: list[Row], rejected: Sequence[Row], finisher: Finisher, gate: Gate, container: str | None = None
) -> tuple[ExportedRow | None, list[Row]]:
    """Exports the best row that keeps to the budget when its runtime is measured.

    Returns:
        What was exported, if anything fits; and the rejected rows, with those that did not fit, those whose student was
        damaged, those that forgot, and those with which their runtime does something else.

    Raises:
        RuntimeDiffersError: Of what was tried, some only did something else in its runtime.
    """
    rejected = list(rejected)
    failed: RuntimeDiffersError | None = None
    for _ in range(_CANDIDATES):
        candidate = settled_candidate(rows, rejected, finisher, container)
        while candidate is not None and (passed := _passed(candidate, rows, finisher, gate)):
            for row in passed:
                finisher.write(row)
            rejected += passed
            candidate = settled_candidate(rows, rejected, finisher, container)
        if candidate is None:
            break
        try:
            found = _export(candidate, finisher)
        except RuntimeDiffersError as error:
            # Whoever reads the log later passes it over too.
            finisher.write(out := replace(candidate, feasible=False, reason=DIFFERS))
            rejected.append(out)
            shutil.rmtree(finisher.run.student(candidate.deployment.container))
            finisher.line(f"{candidate.name} as {candidate.deployment_name} is passed over: {error}")
            failed = failed or error
            continue
        if found.row.feasible:
            return found, rejected
        rejected.append(found.row)
        # Nobody is to serve what breaks the budget.
        shutil.rmtree(finisher.run.student(found.deployment.container))
        finisher.line(f"{candidate.name} as {found.deployment.name} does not fit once measured: {found.row.reason}")
    if failed is not None:
        raise failed
    return None, rejected


def _passed(row: Row, rows: Sequence[Row], finisher: Finisher, gate: Gate) -> list[Row]:
    """The rows that are passed over with one that would be chosen, with the reason; none where it may be exported."""
    if not finisher.whole(row):
        return [replace(row, feasible=False, reason=DAMAGED)]
    return gate.refused_with(row, rows)


def _gguf_beside(
    choice: list[Row], rejected: Sequence[Row], finisher: Finisher, gate: Gate
) -> tuple[ExportedRow | None, tuple[str, ...]]:
    """Exports the best GGUF file beside a best student of another kind, which stands whatever becomes of it.

    Returns:
        It, if any fits, and why there is no such file where it could not be written or was not what was evaluated.
    """
    try:
        return _first_that_fits(choice, rejected, finisher, gate, "gguf")[0], ()
    except (InputError, VerificationError) as error:
        shutil.rmtree(finisher.run.student("gguf"), ignore_errors=True)
        return None, (f"there is no GGUF file beside the best student: {error}",)


def _pack(row: Row, deployment: Deployment, finisher: Finisher) -> Artifact:
    """Writes one deployment of a row's model and holds the bytes on disk to the evaluated weights."""
    exporter = load_exporter(deployment.container)
    origin = Origin.of(read_json(finisher.run.search_file))
    artifact = exporter.export(
        finisher.student(row),
        deployment,
        finisher.run.student(deployment.container),
        teacher=origin.teacher,
        license=origin.teacher_license,
        name=origin.name_of(row),
    )
    verify(exporter, artifact, finisher.student(row), deployment)
    return artifact


def _export(row: Row, finisher: Finisher) -> ExportedRow:
    """Exports a row's model and verifies it in its runtime; its row then has what was measured there."""
    deployment, strategy = row.deployment, row.strategy
    spec = finisher.spec(strategy)
    with finisher.phases.phase("export", f"exporting {row.name} as {deployment.name}"):
        artifact = _pack(row, deployment, finisher)
        length = finisher.question.plan.sequence_length
        sequences = math.ceil(POSITIONS / (length - 1))
        rendering = finisher.setting.rendering(strategy.init if strategy else None)
        data = load_split(finisher.data.folder, "validation", rendering).head(sequences * length)
        model = finisher.load(row)
        with deployed_weights(model, spec, deployment, read_scales(finisher.student(row), deployment)):
            simulated = choices(model, data, device=finisher.setting.device)
        # The runtime may take all that a GPU has.
        del model
        give_back_memory()
        threads = free_cores(finisher.threads)
        exporter = load_exporter(deployment.container)
        expected = Expected(np.array(data.tokens[:, :-1]), *simulated)
        check = prove(exporter, artifact.path, deployment, expected, threads, finisher.student(row))
    subject = Subject(
        spec=spec,
        deployment=deployment,
        budget=finisher.question.budget,
        artifact=artifact.path,
        artifact_bytes=artifact.size_bytes,
        threads=finisher.threads,
    )
    measured: dict[str, Measurement] = {}
    for name in ("memory", "size", "latency"):
        evaluator = load_evaluator(name)
        if evaluator.supports(deployment):
            with finisher.phases.phase("evaluate", f"{name} of the {deployment.name} student"):
                measured |= {item.name: item for item in evaluator.evaluate(subject)}
    updated = _with_measured(row, measured, finisher)
    finisher.write(updated)
    return ExportedRow(row=updated, deployment=deployment, path=artifact.path, check=check, expected=expected)


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
        detail = measured["memory_bytes"].detail
        fields["other"]["memory_parts"] = dict(detail)
        if "predicted_bytes" in detail:
            # Of where it was measured: of a GPU it is another figure than of the process that was budgeted for.
            fields["other"]["memory_bytes_predicted"] = detail["predicted_bytes"]
            fields["other"].pop("memory_on", None)
            fields["other"] |= {"memory_on": DISCRETE} if detail["on_gpu"] else {}
    late: tuple[str, ...] = ()
    if "latency_ms" in measured:
        detail = measured["latency_ms"].detail
        fields |= {"latency_source": "measured", "machine": detail["machine"]}
        fields["other"].pop("latency_assumed", None)
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
    if not isinstance(budget, DeviceBudget) or not is_machine(budget.device, fields["machine"]):
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
    failed = [event for event in finisher.run.events.of(TrialEnded) if event.status is Status.FAILED]
    if closest is None and failed:
        return (
            f"no student was trained, since {len(failed)} training{'s' if len(failed) > 1 else ''} failed, the first "
            f"by {failed[0].reason}: change the strategy, its distillation.learning_rate say, and start a new run"
        )
    if closest is None:
        return "nothing was trained as far as a rung: go on with --resume and more --time, or start with fewer --tokens"
    return f"nothing fits the budget: the nearest candidate, {closest.candidate}, {closest.describe()}; raise --budget"


def _on_device(best: Row, budget: Budget) -> list[str]:
    """How the best stands to limits of latency, by what they are known, and why its latency is doubtful if it is."""
    notes = []
    if isinstance(budget, DeviceBudget) and budget.latency:
        here = best.latency_source == "measured" and is_machine(budget.device, best.machine or "")
        source = "measured" if here else "predicted"
        told = ", ".join(
            f"{limit.name} {format_duration((best.figure(limit.name) or 0) / 1e3)} of {format_duration(limit.seconds)}"
            for limit in budget.latency
        )
        notes.append(f"on {budget.device.name} the best student has, {source}: {told}")
        if best.other.get("latency_assumed"):
            notes.append(f"these are assumed, at the slow end of a wide band: {best.other['latency_assumed']}")
        if not here:
            notes.append("its limits of latency are met by prediction only: measure it on the device itself")
    if best.figure("latency_ms") is not None and best.other.get("latency_doubts"):
        notes.append(f"the measured latency is doubtful: {best.other['latency_doubts']}")
    return notes


def _notes(best: Row, rows: Sequence[Row], finisher: Finisher) -> tuple[str, ...]:
    """Whether the budget binds, what is the tightest that the best meets, and what training came to.

    Args:
        best: What is exported.
        rows: Of the validation split, as they are at the end.
        finisher: What the steps of the end share.
    """
    question = finisher.question
    limit = question.budget.memory_bytes
    notes = []
    spec = finisher.setting.teacher_spec
    fitting = fits(spec, holdable(spec, question.deployments), question.budget)
    if fitting and max(fit.slack for fit in fitting) <= 0:
        most = max(fitting, key=lambda fit: fit.need)
        notes.append(
            f"the budget of {format_bytes(limit)} excludes nothing: the teacher fits under every quantisation scheme; "
            f"{most.deployment.name} needs most, {format_bytes(most.need)}"
        )
    memory = best.memory_bytes or 0
    if not question.space.dimensions:
        # One strategy alone was trained: there was no budget to search under.
        notes = []
    what = named(best) if best.kind in UNTRAINED else "the best student"
    notes.append(
        f"the tightest budget that {what} still meets is {format_bytes(memory)} ({memory} bytes, "
        f"{best.memory_source}), at context {question.budget.context} and batch {question.budget.batch}"
    )
    if on_gpu(question.budget) and best.memory_source != "measured":
        notes.append("its memory is that of the GPU: predicted, not measured on a GPU")
    notes += _on_device(best, question.budget)
    notes += _without_training(best, rows, finisher)
    notes += _worsened(rows, finisher)
    if best.fidelity is not None and best.fidelity > 1 + 1e-9:
        further = f"the best student was trained for {best.fidelity:.0%} of a trial's tokens ({best.train_tokens:,})"
        if any(row.kind == "baseline" for row in rows):
            further += "; the gain over the baseline is of students of equal tokens where both were trained to as many"
        notes.append(further)
    if best.kind == "baseline" and best.full and question.space.dimensions:
        notes.append("no searched strategy beat the baseline")
    return tuple(notes)


def _without_training(best: Row, rows: Sequence[Row], finisher: Finisher) -> list[str]:
    """That what is exported was not trained, or is no better than what needs no training, where that is so."""
    metric, direction = finisher.question.metric, finisher.question.direction

    def told(row: Row) -> str:
        return f"{metric} {row.figure(metric) or 0.0:.4f} in {format_bytes(row.memory_bytes or 0)}"

    ties = "of what is equal within one standard error, the smaller is better"
    if best.kind in UNTRAINED and any(row.reason == FORGOT for row in rows):
        # Said where what was forgotten is.
        return []
    if best.kind in UNTRAINED:
        students = in_order([row for row in rows if row.kind not in UNTRAINED], metric, direction, students_only=True)
        said = f"{named(best)} is exported, {told(best)}: no trained student is better"
        if not students:
            return [f"{said}, and no trained student fits"]
        return [f"{said}; the best trained student, {named(students[0])}, has {told(students[0])}; {ties}"]
    # A student short of the plan's end is one for a person to judge by its metric, as any other.
    beside = [best if best.full else replace(best, fidelity=1.0), *untrained_in_order(rows, metric, direction)]
    first = in_order(beside, metric, direction, students_only=False)[0]
    if first.kind not in UNTRAINED:
        return []
    whole = first.kind == "teacher" and first.deployment.bits == 16
    beats = "the teacher is better here as it is" if whole else "quantising the teacher beats distilling it here"
    beats = beats if first.kind == "teacher" else "a student without training is better here"
    return [f"{beats}: {named(first)} has {told(first)}, the best student {told(best)}; {ties}"]


def _worsened(rows: Sequence[Row], finisher: Finisher) -> list[str]:
    """Whose training ended below its own beginning, with both figures, the best such student first."""
    metric, direction = finisher.question.metric, finisher.question.direction
    pairs = [(row, before) for row, before in worsened(rows, metric, direction) if row.full and row.kind in DISTILLED]
    if not pairs:
        return []
    best = in_order([row for row, _ in pairs], metric, direction, students_only=True)
    row, before = next((pair for pair in pairs if best and pair[0] == best[0]), pairs[0])
    others = len({one.trial for one, _ in pairs} - {row.trial})
    more = f", and so did that of {others} other trial{'s' * (others > 1)}" if others else ""
    passed = "" if finisher.question.students_only else ", which is why it was passed over"
    return [
        f"the training of {named(row)} ended below its own untrained beginning: {metric} {row.figure(metric):.4f} "
        f"after it, {before.figure(metric):.4f} before ({named(before)}){passed}{more}"
    ]
