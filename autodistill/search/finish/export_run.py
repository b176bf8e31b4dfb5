"""Exports a row of a finished run once more: another row, another format, another folder."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from autodistill.data.dataset import load_split, open_prepared
from autodistill.data.general_text import PACKAGED, general_sequences, resolve_general
from autodistill.data.student_template import copy_license
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.distillation.teacher.stored_grids import stored_as
from autodistill.errors import DamagedError, InputError
from autodistill.export.base import Exporter, TakesAny, check_containers, load_exporter
from autodistill.export.model_card import Origin, model_card
from autodistill.export.promise import RECORD, promise_asked
from autodistill.export.proof import simulate
from autodistill.export.record import Exported
from autodistill.export.record import write as write_record
from autodistill.export.student_reader import replacing
from autodistill.export.verify import POSITIONS, prove, verify
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import read_config
from autodistill.options import cache_folder
from autodistill.quantization.formats import get_format
from autodistill.runs.events import RowAdded, RowTested, StudentsRemoved
from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.row import Row
from autodistill.runs.results.selection import contenders
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.standing import best_of, find_row, trained_student
from autodistill.runs.students import kept_after, listed
from autodistill.runtimes.launch_files import write_launch_files
from autodistill.strategy.deployment import IN_16_BITS, Deployment
from autodistill.utils.checksums import check_list

_LENGTH = 125  # tokens of a sequence
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
    *,
    verified: bool = True,
    threads: int = 1,
) -> dict[str, Path]:
    """Packs the model of a row into each container, holds the bytes on disk to the evaluated weights, and runs them.

    A model card lies beside each, the record of its proof, and the text of the teacher's licence where its folder has
    one. A container's folder appears once all of it is proven.

    A container other than the row's own takes the deployment that ranks best among the rows of the same trial in it;
    "huggingface" is the 16-bit folder, and a container without formats of its own takes the row's own weights.

    Args:
        run: The run.
        row_id: Of the row, or None for the run's best.
        containers: Names of exporters; a folder of that name is made in `out` for each.
        out: Folder for them.
        notify: Told what is done, and what a person must know of the student.
        verified: Whether each is run and compared with the evaluated student; else its card says that it was not.
        threads: CPU threads to run it with.

    Returns:
        For each container the file or folder that a runtime is given.

    Raises:
        InputError: An unknown or repeated container, an unknown row, a row without a student on disk, or with one that
            was changed, a teacher that is gone or has changed, a container that the trial has no row in or that cannot
            hold it, or a folder that is not empty.
        MissingDependencyError: A package that a container needs is not installed.
        VerificationError: What was written is not what was evaluated, or does not do the same.
    """
    check_containers(containers, out)
    asked = run.asked(*_NEEDED)
    every = run.events.rows(RowAdded, RowTested)
    rows = [row for row in every if row.split != "test"]
    ranked = [one.row for one in rank(contenders(rows), asked["metric"], asked["direction"])]
    best = best_of(run, rows)
    row = find_row(run, ranked, row_id or (best.row_id if best else None))
    student = model_folder(run, row, asked, notify)
    exporters = {name: load_exporter(name) for name in containers}
    deployments = {name: _deployment(exporters[name], row, ranked, asked, student) for name in containers}
    origin = Origin.of(asked)
    text = _text_of(asked, student) if verified else None
    paths = {}
    for name, deployment in deployments.items():
        with _told(out), replacing(out) as partial:
            folder = partial / name
            notify(f"writing {row.name} as {name}")
            artifact = exporters[name].export(student, deployment, folder, **origin.label(row))
            weights = verify(exporters[name], artifact, student, deployment)
            # Another container is another runtime, in which the row was not measured.
            promise = promise_asked(row, asked, deployment.name) if deployment.container == name else None
            found = Exported(row=row.row_id, deployment=deployment, weights=weights, promise=promise)
            inner = artifact.path.relative_to(folder)
            found = replace(found, artifact="" if inner == Path() else inner.as_posix())
            if text is not None:
                notify(f"running {name}, and beside it the evaluated student, on {text[1]}")
                expected = simulate(student, deployment, text[0], threads)
                check = prove(exporters[name], artifact.path, deployment, expected, threads, student)
                found = replace(found, expected=expected, check=check, text=text[1])
            if artifact.path.suffix == ".gguf":
                write_launch_files(artifact.path, deployment, *_load(asked, student))
            card = model_card(row, deployment, every, origin)
            (folder / "README.md").write_text(_said(card, exporters[name], found), encoding="utf-8")
            copy_license(student, folder)
            write_record(folder, exporters[name], found)
        paths[name] = out / name / inner
    return paths


@contextmanager
def _told(out: Path) -> Iterator[None]:
    """Say in one line what the disk refuses; what was half written is gone by then."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's writer of archives has no type of its own for what the disk refuses.
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        why = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise InputError(
            f"cannot write to {out}: {why}; nothing half-written is left, so make room and give the same command again"
        ) from error


def _said(card: str, exporter: Exporter, found: Exported) -> str:
    """A card with what is known of the files beside it."""
    lines = [card.rstrip(), "", "## Proof", ""]
    if isinstance(exporter, TakesAny):
        lines += [
            f"The format is {exporter.name}, with the weights of {found.deployment.name}; {exporter.runs_in} runs it."
        ]
        lines += [f"{name}: {told}." for name, told in exporter.notes.items()]
        if exporter.is_code:
            lines.append("Its file is code: whoever loads it runs what is in it, so load none that strangers made.")
    if (check := found.check) is None:
        lines.append(
            "**Unverified**: nobody ran these files (`--unverified`); their weights are those that were evaluated."
        )
    else:
        lines.append(
            f"Run on {found.text}, it chose the evaluated student's token in {check.agreement:.2%} of "
            f"{check.positions} clear positions, and in {check.raw_agreement:.2%} of all."
        )
        if check.divergence is not None:
            lines.append(f"It is {check.divergence:.2g} nats away from that student.")
        if check.same_written is not None:
            lines.append(f"It wrote {check.same_written} tokens as that student does, up to the first that differs.")
        if check.tokens_per_second is not None:
            took = "" if check.peak_bytes is None else f", in a process of {check.peak_bytes / 1e6:.0f} MB at most"
            lines.append(f"Meanwhile it wrote {check.tokens_per_second:.3g} tokens a second{took}, by the clock.")
    lines.append(f"`autodistill verify` repeats this from `{RECORD}`.")
    return "\n".join(lines) + "\n"


def _load(asked: Mapping[str, Any], student: Path) -> tuple[int, int]:
    """Return the tokens of a sequence, and sequences at once, that the run's budget is for."""
    budget = asked.get("budget") or {}
    longest = spec_from_config(read_config(student)).max_context
    return min(int(budget.get("context", longest)), longest), int(budget.get("batch", 1))


def _text_of(asked: Mapping[str, Any], student: Path) -> tuple[npt.NDArray[np.int32], str]:
    """Return what an export is run on, and what that is: validation text of the run, or general text where it is gone.

    Random tokens alone would not do: a runtime that quantises activations differs on them far more than on any text.
    """
    vocabulary = spec_from_config(read_config(student)).vocabulary
    folder = cache_folder() / "data" / str(asked["data"].get("fingerprint", ""))
    with suppress(InputError):
        data = open_prepared(folder)
        length = data.sequence_length
        tokens = load_split(folder, "validation").head(math.ceil(POSITIONS / length) * length).tokens
        if tokens.size and tokens.max() < vocabulary:
            return np.array(tokens, np.int32), f"validation text of {asked['data']['name']}"
    gone = "since the run's data are not in the cache any more"
    general = general_sequences(resolve_general(PACKAGED), student, _LENGTH, POSITIONS)
    if general is not None and general.tokens.max() < vocabulary:
        return np.array(general.tokens, np.int32), f"general text, {gone}"
    rows = -(-POSITIONS // _LENGTH)
    random = np.random.default_rng(0).integers(0, vocabulary, (rows, _LENGTH))
    return random.astype(np.int32), f"random tokens, {gone}"


def model_folder(run: RunFolder, row: Row, asked: Mapping[str, Any], notify: Callable[[str], None]) -> Path:
    """Return the folder of a row's model, which is the one whose figures the run has: a student's, or the teacher's.

    Args:
        run: The run.
        row: One of its rows.
        asked: Its `search.json`, with what `_NEEDED` names.
        notify: Told where nothing says whether the files were changed.

    Raises:
        InputError: It is not on this disk, or was changed.
    """
    if row.kind == "teacher":
        return _teacher(asked)
    student = _student(run, row, asked, _collected(run))
    _check_whole(student, run, row, asked, notify)
    return student


def _collected(run: RunFolder) -> set[str]:
    """Return the trials whose students the search itself removed."""
    return {trial for event in run.events.of(StudentsRemoved) for trial in event.trials}


def _student(run: RunFolder, row: Row, asked: Mapping[str, Any], collected: Collection[str]) -> Path:
    """The float32 student of a row."""
    folder = trained_student(run, row)
    if row.kind == "initial" and not folder.is_dir():
        raise InputError(
            f"the row {row.row_id} is an untrained student ({folder} is not there), which is kept where it does "
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
    """The folder of the teacher, as it was for the run, with its own scales where it had these."""
    stored, cache = asked["teacher"], cache_folder()
    found = resolve_teacher(stored["reference"])
    teacher = materialize(found, cache)
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
    """Return what to do where a row's student is not to be had."""
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


def _deployment(
    exporter: Exporter, row: Row, ranked: Sequence[Row], asked: Mapping[str, Any], student: Path
) -> Deployment:
    """Return how the row's student is packed in a container."""
    container = exporter.name
    if isinstance(exporter, TakesAny):
        # A cache of fewer bits is llama.cpp's alone.
        own = replace(row.deployment, cache_type_k="f16", cache_type_v="f16")
        if reason := exporter.refuses(student, own):
            raise InputError(f"the row {row.row_id} cannot leave as {container}: {reason}")
        return own
    if container == "huggingface":
        return IN_16_BITS
    form = get_format(row.deployment.format)
    if container == form.container != row.deployment.container:
        # The same codes, for the runtime that usually serves them.
        return replace(row.deployment, runtime=form.runtimes[0])
    for candidate in (row, *ranked):
        if candidate.trial == row.trial and candidate.deployment.container == container:
            return candidate.deployment
    offered = asked.get("space_definition", {}).get("deployments", ())
    if any(Deployment.from_json(deployment).container == container for deployment in offered):
        remedy = (
            "of the space's none fits the budget, or none had its turn; search with a larger --budget or more --time"
        )
    else:
        remedy = "the space has none; search a --space with one"
    raise InputError(
        f"the trial {row.trial} was evaluated under no {container} deployment, so none can be verified: {remedy}, or "
        "choose another container"
    )
