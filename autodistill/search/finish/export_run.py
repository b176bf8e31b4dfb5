"""Exports a row of a finished run once more: another row, another container, another folder."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from autodistill import plugins
from autodistill.data.student_template import copy_license
from autodistill.distillation.teacher.resolve import materialise, resolve_teacher
from autodistill.distillation.teacher.stored_grids import stored_as
from autodistill.errors import DamagedError, InputError
from autodistill.export.base import load_exporter
from autodistill.export.model_card import Origin, model_card
from autodistill.export.student_reader import PARTIAL
from autodistill.export.verify import verify
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import read_config
from autodistill.quantization.formats import get_format
from autodistill.runs.events import RowAdded, RowTested, StudentsRemoved
from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.row import Row
from autodistill.runs.results.selection import contenders
from autodistill.runs.run_folder import RunFolder, default_cache
from autodistill.runs.standing import best_of, trained_student
from autodistill.runs.students import kept_after, listed
from autodistill.strategy.deployment import IN_16_BITS, Deployment
from autodistill.utils.checksums import check_list

_NEEDED = (
    *("metric", "direction", "teacher.name", "teacher.reference", "data.name"),
    *("data.reference", "licences", "plan.batch_tokens", "plan.sequence_length"),
)


def export_run(
    run: RunFolder,
    row_id: str | None,
    containers: Sequence[str],
    out: Path,
    notify: Callable[[str], None] = lambda line: None,
) -> dict[str, Path]:
    """Packs the model of a row into each container, and holds the bytes on disk to the evaluated weights.

    A model card lies beside each, and the text of the teacher's licence where its folder has one.

    A container other than the row's own takes the deployment that ranks best among the rows of the same trial in it;
    "huggingface" is the 16-bit folder.

    Args:
        run: The run.
        row_id: Of the row, or None for the run's best.
        containers: Names of exporters; a folder of that name is made in `out` for each.
        out: Folder for them.
        notify: Told what a person must know of the student.

    Returns:
        For each container the file or folder that a runtime is given.

    Raises:
        InputError: An unknown or repeated container, an unknown row, a row without a student on disk, or with one that
            was changed, a teacher that is gone or has changed, a container that the trial has no row in, or a folder
            that is not empty.
        VerificationError: What was written is not what was evaluated.
    """
    _check_containers(containers)
    asked = run.asked(*_NEEDED)
    every = run.events.rows(RowAdded, RowTested)
    rows = [row for row in every if row.split != "test"]
    ranked = [one.row for one in rank(contenders(rows), asked["metric"], asked["direction"])]
    best = best_of(run, rows)
    row = _find(run, ranked, row_id or (best.row_id if best else None))
    if row.kind == "teacher":
        student = _teacher(asked)
    else:
        student = _student(run, row, asked, _collected(run))
        _check_whole(student, run, row, asked, notify)
    deployments = {name: _deployment(name, row, ranked, asked) for name in containers}
    for name in containers:
        folder = out / name
        # What an interrupted export may have left is removed by the next one.
        if folder.exists() and not (folder.is_dir() and all(one.name.startswith(PARTIAL) for one in folder.iterdir())):
            raise InputError(f"{folder} exists and is not an empty folder: choose another one with --out")
    origin = Origin.of(asked)
    paths = {name: _pack(student, row, deployment, out / name, origin) for name, deployment in deployments.items()}
    for name, deployment in deployments.items():
        card = model_card(row, deployment, every, origin)
        (out / name / "README.md").write_text(card, encoding="utf-8")
        copy_license(student, out / name)
    return paths


def _check_containers(containers: Sequence[str]) -> None:
    known = plugins.names("exporters")
    listed = f"the containers are {', '.join(known)}"
    if not containers:
        raise InputError(f"--to names no container; {listed}")
    for name in containers:
        if name not in known:
            raise InputError(f"there is no container {name!r}; {listed}")
    if len(set(containers)) < len(containers):
        raise InputError(f"--to names a container twice: {', '.join(containers)}")


def _find(run: RunFolder, ranked: Sequence[Row], row_id: str | None) -> Row:
    ids = [row.row_id for row in ranked if row.kind == "teacher" or trained_student(run, row).is_dir()]
    listed = f"the rows that can be exported are {', '.join(ids)}" if ids else "it has no student on disk"
    if row_id is None:
        raise InputError(f"the run {run.name!r} has nothing that fits its budget to export: {listed}")
    for row in ranked:
        if row_id in (row.row_id, row.short_id):
            return row
    raise InputError(
        f"the run {run.name!r} has no row {row_id!r} (autodistill leaderboard {run.name} shows its rows); {listed}"
    )


def _collected(run: RunFolder) -> set[str]:
    """Trials whose students the search itself removed."""
    return {trial for event in run.events.of(StudentsRemoved) for trial in event.trials}


def _student(run: RunFolder, row: Row, asked: Mapping[str, Any], collected: Collection[str]) -> Path:
    """The float32 student of a row."""
    folder = trained_student(run, row)
    if row.kind == "initial" and not folder.is_dir():
        raise InputError(
            f"the row {row.row_id} is a student without training ({folder} is not there), which is kept where it does "
            "better than after training: choose another row"
        )
    if not folder.is_dir() and row.full and row.trial in collected:
        raise InputError(
            f"the student of the row {row.row_id} was removed by the search, to hold --checkpoint-limit: "
            f"{_another(run, row, asked)}"
        )
    if not folder.is_dir():
        why = "was removed" if row.full else "was not trained to the end, so none was kept"
        raise InputError(
            f"the student of the row {row.row_id} {why} ({folder} is not there): choose another row, or resume the "
            "run with more --time"
        )
    return folder


def _teacher(asked: Mapping[str, Any]) -> Path:
    """The folder of the teacher, as it was for the run, with its own scales where it had these.

    Raises:
        InputError: It is gone, or is another one now.
    """
    stored, cache = asked["teacher"], default_cache()
    found = resolve_teacher(stored["reference"])
    teacher = materialise(found, cache)
    if teacher.fingerprint != stored["fingerprint"]:
        raise InputError(
            f"the teacher {stored['reference']} has changed since the run ({stored['fingerprint']}, now "
            f"{teacher.fingerprint}): restore it, or choose a student's row"
        )
    if "stored_as" in stored:
        teacher, _ = stored_as(found, teacher, spec_from_config(read_config(teacher.folder)), cache)
    return teacher.folder


def _check_whole(
    student: Path, run: RunFolder, row: Row, asked: Mapping[str, Any], notify: Callable[[str], None]
) -> None:
    """Holds the student's files to the checksums that they had when its figures were measured."""
    known = listed(run.events.all()).get((row.trial, kept_after(row)))
    try:
        if not check_list(student, known):
            notify("an earlier version kept no checksums of this student: its files are taken as they are")
    except DamagedError as error:
        raise DamagedError(
            f"the student of the row {row.row_id} is not the one whose figures the run has ({error}): "
            f"{_another(run, row, asked)}"
        ) from None


def _another(run: RunFolder, row: Row, asked: Mapping[str, Any]) -> str:
    """What to do where a row's student is not to be had."""
    return (
        f"choose another row, or make one like it with {_again(row, asked)}, where FILE has the strategy of "
        f"{row.trial} as `autodistill leaderboard {run.name} --json` gives it"
    )


def _again(row: Row, asked: Mapping[str, Any]) -> str:
    """A command that trains a student of a row's strategy, tokens and seed."""
    words = ["autodistill", "distill", "FILE"]
    words += ["--teacher", asked["teacher"]["reference"], "--data", asked["data"]["reference"]]
    plan = asked["plan"]
    words += ["--tokens", str(row.train_tokens), "--step-tokens", str(plan["batch_tokens"])]
    words += ["--sequence-length", str(plan["sequence_length"]), "--seed", str(row.seed or 0)]
    return f"`{shlex.join(words)}`"


def _deployment(container: str, row: Row, ranked: Sequence[Row], asked: Mapping[str, Any]) -> Deployment:
    """How the row's student is packed in a container."""
    if container == "huggingface":
        return IN_16_BITS
    for candidate in (row, *ranked):
        if candidate.trial == row.trial and candidate.deployment.container == container:
            return candidate.deployment
    offered = asked.get("space_definition", {}).get("deployments", ())
    if any(get_format(deployment["format"]).container == container for deployment in offered):
        remedy = (
            "of the space's none fits the budget, or none had its turn; search with a larger --budget or more --time"
        )
    else:
        remedy = "the space has none; search a --space with one"
    raise InputError(
        f"the trial {row.trial} was evaluated under no {container} deployment, so none can be verified: {remedy}, or "
        "choose another container"
    )


def _pack(student: Path, row: Row, deployment: Deployment, out: Path, origin: Origin) -> Path:
    exporter = load_exporter(get_format(deployment.format).container)
    named = {"teacher": origin.teacher, "license": origin.teacher_license, "name": origin.name_of(row)}
    artifact = exporter.export(student, deployment, out, **named)
    verify(exporter, artifact, student, deployment)
    return artifact.path
