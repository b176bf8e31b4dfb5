"""The end of a search: export the best row, verify it, measure it in its runtime, and score it on the test split."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

import torch

from autodistill import plugins
from autodistill.data.student_template import copy_license
from autodistill.errors import (
    AutoDistillError,
    InputError,
    MissingDependencyError,
    NothingFitsError,
    RuntimeDiffersError,
    VerificationError,
)
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
from autodistill.search.finish.beginnings import plain_rows, settle, settled_candidate
from autodistill.search.finish.context import Finisher
from autodistill.search.finish.export_choice import candidates, passed_over
from autodistill.search.finish.export_row import export_packed, export_row
from autodistill.search.finish.exported_row import ExportedRow
from autodistill.search.finish.forgetting import Forgotten, Gate
from autodistill.search.finish.in_runtime import pack, unread, with_runtime_loss
from autodistill.search.finish.notes import notes_on, nothing_fits
from autodistill.search.finish.test_split import best_untrained, gains_on_test, score_on_test, spent
from autodistill.strategy.deployment import IN_16_BITS
from autodistill.utils.durable import sync_below
from autodistill.utils.json_files import read_json, replacing

# Rows that are tried before plain types are: what refuses one often refuses those like it.
_TRIED = 6


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What the end of a search produced.

    Attributes:
        best: The exported row, with what its runtime measured.
        paths: Exported students by container.
        checks: How each file's runtime compares with the evaluated student, by container.
        test: Rows on the test split.
        confirmed: Strategies that were trained on further seeds, the chosen one first.
        gains: Its gains on the test split over the best untrained row and over the baseline.
        forgotten: What it forgot of general text. If an untrained row is exported because students forgot, what the
            best of them forgot. None if nothing was trained, or if it is unknown.
        notes: Sentences for the reader of the result.
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
    """Export the best row and everything that proves it.

    Args:
        rows: The rows of the validation split.
        finisher: What the final steps share.

    Raises:
        NothingFitsError: Nothing that may be exported fits the budget.
        VerificationError: An exported file differs from what was evaluated.
    """
    question, phases, run = finisher.question, finisher.phases, finisher.run
    torch.set_num_threads(finisher.threads)
    choice = choice_of(rows, finisher)
    confirmed = confirmations(rows, question.metric, question.direction)
    first = next(iter(in_order(choice, question.metric, question.direction, students_only=True)), None)
    while first is not None and settle(first, choice, finisher):
        # The best student is compared with its own beginning, whatever is exported, to know what training gained.
        first = next((row for row in choice if row.row_id == first.row_id), None)
    gate = Gate(finisher)
    exported, rejected, failures = export_best(choice, finisher, gate)
    if exported is None:
        judged = any(row.kind in DISTILLED for row in rows)
        distilled = [row for row in rows if row.kind in DISTILLED]
        # Students that do not fit are removed first when disk space is short, so `choice` may lack them.
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
    # The records are written before the test split is read. If the search is killed there, it finds the exports done.
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
        notes=(*failures, *notes, *notes_on(best, rows, finisher), *told, *spent(finisher)),
    )


def choice_of(rows: Sequence[Row], finisher: Finisher) -> list[Row]:
    """Return the rows to choose among: students that may be exported, and all rows that were not distilled.

    Args:
        rows: The rows of the validation split.
        finisher: What the final steps share.
    """
    students = candidates(rows, finisher.question.metric, finisher.has)
    return [*students, *(row for row in rows if row.kind not in DISTILLED)]


def export_best(choice: list[Row], finisher: Finisher, gate: Gate) -> tuple[ExportedRow | None, list[Row], list[str]]:
    """Export the best row that fits the budget when measured in its runtime, and record the rows that are passed over.

    What the runtime does not prove is followed by the next row, at last by plain types with a 16-bit cache. If nothing
    is proven, the best row is exported whose weights on disk are right.

    Args:
        choice: The rows of `choice_of`. New evaluations are added.
        finisher: What the final steps share.
        gate: Checks students on general text.

    Returns:
        The export, or None if nothing fits; the rows that were passed over; and notes on what failed.

    Raises:
        AutoDistillError: Rows fit, but no file of any can be written.
    """
    refused: list[_Refused] = []
    exported, rejected = _first_that_fits(choice, (), finisher, gate, refused)
    for row in passed_over(choice, rejected, finisher.question.budget.memory_bytes):
        finisher.write(row)
    if exported is None and refused:
        exported = _fallback(choice, refused, finisher)
    if exported is not None:
        _leave_out_removed(exported.row, finisher)
    return exported, rejected, [one.note for one in refused]


def clear_others(exports: Collection[str], finisher: Finisher) -> None:
    """Remove exports in other containers. They may be of an earlier best student, from before the run was resumed."""
    for container in set(plugins.names("exporters")) - set(exports):
        shutil.rmtree(finisher.run.student(container), ignore_errors=True)


def _leave_out_removed(best: Row, finisher: Finisher) -> None:
    """Record that rows ranked above the best cannot be exported because their students were removed.

    A later reader of the log then chooses the exported row. This happens after several students turned out too large,
    or if a user removed one.
    """
    rows, question = finisher.run.events.rows(), finisher.question
    order = in_order(rows, question.metric, question.direction, students_only=question.students_only)
    for row in takewhile(lambda one: one.row_id != best.row_id, order):
        if row.full and not finisher.has(row):
            finisher.write(replace(row, feasible=False, reason=REMOVED))


def describe(exports: Iterable[ExportedRow], test: Sequence[Row], finisher: Finisher) -> None:
    """Add a model card, the text of the licence and the record of its proof to the folder of each export."""
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


class _Refused(NamedTuple):
    """A row that fits and was not exported, and why."""

    row: Row
    error: AutoDistillError

    @property
    def note(self) -> str:
        """The reason as a sentence."""
        return f"{self.row.name} as {self.row.deployment_name} is passed over: {self.error}"


def _first_that_fits(
    rows: list[Row],
    rejected: Sequence[Row],
    finisher: Finisher,
    gate: Gate,
    refused: list[_Refused],
    container: str | None = None,
) -> tuple[ExportedRow | None, list[Row]]:
    """Export the row with the least loss in its runtime that fits the budget when measured there.

    Args:
        rows: The rows to choose among. New evaluations are added.
        rejected: Rows that are left out.
        finisher, gate: As for `export_best`.
        refused: Receives the rows that their runtimes or exporters refused.
        container: The container of the row's deployment. None allows any.

    Returns:
        The export, or None if nothing fits or is proven, and the rejected rows: those that did not fit, whose student
        was damaged or forgot, or that were refused.
    """
    rejected, run = list(rejected), set[str]()

    def leave_out(row: Row) -> None:
        finisher.write(row)
        rejected.append(row)

    while len(refused) < _TRIED:
        out = {row.row_id for row in rejected}
        left = [row for row in rows if row.row_id not in out]
        finalist = next((row for row in unread(left, finisher, container) if row.row_id not in run), None)
        candidate = finalist or settled_candidate(rows, rejected, finisher, container)
        if candidate is None:
            break
        if passed := _passed(candidate, rows, finisher, gate):
            for row in passed:
                leave_out(row)
            if (nearer := gate.instead_of(candidate, rows)) is not None:
                finisher.write(nearer)
                rows.append(nearer)
            continue
        run.add(candidate.row_id)
        try:
            if finalist is not None:
                if (read := with_runtime_loss(finalist, finisher)) is not finalist:
                    finisher.write(read)
                    rows[:] = [*(row for row in rows if row.row_id != read.row_id), read]
                continue
            found = export_row(candidate, finisher)
        except AutoDistillError as error:
            # The row is recorded as infeasible, so that later readers of the log pass it over too.
            leave_out(replace(candidate, feasible=False, reason=DIFFERS))
            refused.append(_Refused(candidate, error))
            shutil.rmtree(finisher.run.student(candidate.deployment.container), ignore_errors=True)
            finisher.line(refused[-1].note)
            continue
        if found.row.feasible:
            return found, rejected
        rejected.append(found.row)
        # The export breaks the budget, so nobody should serve it.
        shutil.rmtree(finisher.run.student(found.deployment.container))
        finisher.line(f"{candidate.name} as {found.deployment.name} does not fit once measured: {found.row.reason}")
    return None, rejected


def _fallback(rows: Sequence[Row], refused: list[_Refused], finisher: Finisher) -> ExportedRow | None:
    """Export the teacher in plain types, or else a refused row without proof: one whose runtime only did not answer.

    Raises:
        AutoDistillError: No file can be written either.
    """
    question = finisher.question
    if not (question.students_only or all(isinstance(one.error, MissingDependencyError) for one in refused)):
        for row in islice(plain_rows(rows, finisher), _TRIED):
            try:
                finisher.write(row)
                if (found := export_row(row, finisher)).row.feasible:
                    return found
            except AutoDistillError as error:
                finisher.write(replace(row, feasible=False, reason=DIFFERS))
                refused.append(_Refused(row, error))
                finisher.line(refused[-1].note)
    fitting = [one.row for one in refused if not isinstance(one.error, RuntimeDiffersError)]
    fitting = fitting or [one.row for one in refused if one.row.kind in UNTRAINED] or [one.row for one in refused]
    order = in_order(fitting, question.metric, question.direction, students_only=False, simulated=True)
    for row in order:
        try:
            artifact, weights = pack(row, row.deployment, finisher)
        except AutoDistillError:
            continue
        finisher.write(row)
        finisher.line(f"{row.name} as {row.deployment_name} is exported without proof: its weights are as evaluated")
        return ExportedRow(row=row, deployment=row.deployment, path=artifact.path, weights=weights)
    raise refused[0].error


def _passed(row: Row, rows: Sequence[Row], finisher: Finisher, gate: Gate) -> list[Row]:
    """Return the rows to pass over if this candidate may not be exported, with the reason. Empty if it may."""
    if not finisher.whole(row):
        return [replace(row, feasible=False, reason=DAMAGED)]
    return gate.refused_with(row, rows)


def _gguf_beside(
    choice: list[Row], rejected: Sequence[Row], finisher: Finisher, gate: Gate
) -> tuple[ExportedRow | None, tuple[str, ...]]:
    """Export the best GGUF file in addition to a best student in another container. A failure does not end the search.

    Returns:
        The export, or None if nothing fits, and a note if the file could not be written or failed its verification.
    """
    try:
        refused: list[_Refused] = []
        found, _ = _first_that_fits(choice, rejected, finisher, gate, refused, "gguf")
        return found, tuple(one.note for one in refused)
    except (InputError, VerificationError) as error:
        shutil.rmtree(finisher.run.student("gguf"), ignore_errors=True)
        return None, (f"there is no GGUF file beside the best student: {error}",)
