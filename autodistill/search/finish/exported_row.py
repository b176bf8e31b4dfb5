"""The export of a row, and the lookup of an earlier one in the run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from autodistill.errors import VerificationError
from autodistill.export.base import Artifact, Expected, load_exporter
from autodistill.export.promise import promise_of
from autodistill.export.record import read_back
from autodistill.export.verify import RuntimeCheck, Verification, verify
from autodistill.hardware.machine import detect, machine_name
from autodistill.runs.results.row import Row
from autodistill.search.finish.context import Finisher
from autodistill.strategy.deployment import Deployment


@dataclass(frozen=True, kw_only=True)
class ExportedRow:
    """The export of a row in one deployment.

    Attributes:
        row: The row, with what was measured in its runtime.
        deployment: The deployment in which it is packed. It may differ from the row's.
        path: The file or folder to give to a runtime.
        check: How its runtime agrees with the evaluated student, or None if it was not run.
        expected: The choices of the evaluated student, or None if it was not run.
        weights: The result of comparing the files with the evaluated weights.
    """

    row: Row
    deployment: Deployment
    path: Path
    check: RuntimeCheck | None = None
    expected: Expected | None = None
    weights: Verification | None = None


def exported_before(row: Row, deployment: Deployment, finisher: Finisher) -> ExportedRow | None:
    """Return a row's export from an earlier end of this run, or None if the row has to be exported again.

    The record is written last, after the files were compared with the student, run and measured. So an export is reused
    if its files have the hashes in the record, the record is of this row and promise, and the row was measured on this
    machine. The record has no hash of the student, so the weights are compared with the student again.
    """
    folder, exporter = finisher.run.student(deployment.container), load_exporter(deployment.container)
    known = read_back(folder, exporter, deployment)
    if known is None or known.row != row.row_id or not _measured_here(row):
        return None
    if known.promise != promise_of(row, finisher.question.budget, deployment.name):
        return None
    path = folder / known.artifact if known.artifact else folder
    try:
        weights = verify(exporter, Artifact(path=path, size_bytes=0), finisher.student(row), deployment)
    except VerificationError:
        return None
    return ExportedRow(
        row=row, deployment=deployment, path=path, check=known.check, expected=known.expected, weights=weights
    )


def _measured_here(row: Row) -> bool:
    """Return whether a row was measured on this machine, or does not say on which one."""
    machine = detect()
    return row.machine in (None, *(machine_name(machine, accelerated=by_gpu) for by_gpu in (True, False)))
