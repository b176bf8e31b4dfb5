"""The end of a search: the best row is exported, verified, measured in its runtime and scored on test."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import torch

from autodistill import plugins
from autodistill.data.student_template import copy_license
from autodistill.errors import InputError, NothingFitsError, RuntimeDiffersError, VerificationError
from autodistill.export.base import load_exporter
from autodistill.export.model_card import Origin, model_card
from autodistill.export.promise import promise_of
from autodistill.export.record import CARD, Exported
from autodistill.export.record import write as write_record
from autodistill.export.verify import RuntimeCheck
from autodistill.runs.results.gains import Gains
from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED
from autodistill.runs.results.row import DAMAGED, DIFFERS, REMOVED, Row
from autodistill.runs.results.selection import Confirmation, confirmations, in_order
from autodistill.runtimes.launch_files import write_launch_files
from autodistill.search.finish.beginnings import settle, settled_candidate
from autodistill.search.finish.context import Finisher
from autodistill.search.finish.export_choice import candidates, passed_over
from autodistill.search.finish.export_row import export_packed, export_row
from autodistill.search.finish.exported_row import ExportedRow
from autodistill.search.finish.forgetting import Forgotten, Gate
from autodistill.search.finish.notes import notes_on, nothing_fits
from autodistill.search.finish.test_split import best_untrained, gains_on_test, score_on_test, spent
from autodistill.strategy.deployment import IN_16_BITS
from autodistill.utils.durable import sync_below
from autodistill.utils.json_files import read_json, replacing

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
        raise NothingFitsError(nothing_fits(rejected or students or missing, judged, finisher))
    best, exports = exported.row, {exported.deployment.container: exported}
    notes: tuple[str, ...] = ()
    if "gguf" not in exports:
        beside, notes = _gguf_beside(choice, rejected, finisher, gate)
        exports |= {"gguf": beside} if beside is not None else {}
    if "huggingface" not in exports:
        exports["huggingface"] = export_packed(best, IN_16_BITS, finisher)
    clear_others(exports, finisher)
    # Written down before the test split is read, so that a search that is ended there finds it done.
    describe(exports.values(), (), finisher)
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
        notes=(*notes, *notes_on(best, rows, finisher), *told, *spent(finisher)),
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
        with replacing(folder / CARD) as card:
            card.write_text(model_card(one.row, one.deployment, [*rows, *test], origin), encoding="utf-8")
        copy_license(finisher.student(one.row), folder)
        if one.path.suffix == ".gguf":
            budget = finisher.question.budget
            longest = finisher.spec(one.row.strategy).max_context
            write_launch_files(one.path, one.deployment, min(budget.context, longest), budget.batch)
        known = Exported(
            row=one.row.row_id,
            deployment=one.deployment,
            artifact="" if one.path == folder else one.path.name,
            weights=one.weights,
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
            if (nearer := gate.instead_of(candidate, rows)) is not None:
                finisher.write(nearer)
                rows.append(nearer)
            candidate = settled_candidate(rows, rejected, finisher, container)
        if candidate is None:
            break
        try:
            found = export_row(candidate, finisher)
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
