"""What a search exported of a row, and what lies of that in its run already."""

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
    """What was written of a row in one deployment, and how its runtime agrees; None where that was not run.

    Attributes:
        row: With what was measured in its runtime.
        deployment: How it is packed, which may be another one than the row's.
        path: What a runtime is given.
        check: What its runtime did.
        expected: What the evaluated student does.
        weights: What was found in its files.
    """

    row: Row
    deployment: Deployment
    path: Path
    check: RuntimeCheck | None = None
    expected: Expected | None = None
    weights: Verification | None = None


def exported_before(row: Row, deployment: Deployment, finisher: Finisher) -> ExportedRow | None:
    """What this run wrote of a row before its end was cut off, or it went on; None where it is to be written anew.

    A record is written last, once its files were held to the student, run and measured. So they need none of that
    again if their hashes are those of the record, and the row's figures those that were measured of them: the student
    of a row may be another one by now, and so may the machine. Its weights are held to the student once more all the
    same, since no hash of that is in the record.
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
    """Return whether what was measured of a row is of this machine, as far as the row says of which it is."""
    machine = detect()
    return row.machine in (None, *(machine_name(machine, accelerated=by_gpu) for by_gpu in (True, False)))
