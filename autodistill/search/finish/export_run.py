"""Export of any row of a run after the search, in any format, into any folder."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

from autodistill.data.dataset import load_split, open_prepared
from autodistill.data.general_text import PACKAGED, general_sequences, resolve_general
from autodistill.data.student_template import copy_license
from autodistill.distillation.teacher.given_file import codes_of
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.distillation.teacher.stored_grids import stored_as
from autodistill.errors import DamagedError, InputError, VerificationError
from autodistill.estimates.fit import nearest
from autodistill.estimates.serving_memory import memory
from autodistill.export.base import Artifact, Expected, Exporter, TakesAny, check_containers, load_exporter
from autodistill.export.model_card import Origin, model_card
from autodistill.export.promise import RECORD, promise_asked
from autodistill.export.proof import simulate
from autodistill.export.record import Exported, read_back
from autodistill.export.record import write as write_record
from autodistill.export.student_reader import replacing
from autodistill.export.verify import POSITIONS, prove, verify
from autodistill.hardware.budget import on_gpu, read_budget
from autodistill.models.config import spec_from_config
from autodistill.models.gguf_to_transformers import is_whole
from autodistill.models.model_folder import read_config
from autodistill.models.spec import ModelSpec
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
from autodistill.search.finish.same_codes import with_codes_of
from autodistill.search.request.references import check_there, with_teacher
from autodistill.strategy.deployment import IN_16_BITS, Deployment
from autodistill.units import format_bytes
from autodistill.utils.checksums import check_list

_LENGTH = 125  # tokens of a sequence
_REFUSED_WRITES = ("PytorchStreamWriter failed", "unexpected pos")
_AS_GIVEN = "it is a file as it was given, in types that only gguf holds: choose another row"
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
    teacher: str | Path | None = None,
) -> dict[str, Path]:
    """Pack a row's model into each container, compare the bytes on disk with the evaluated weights, and run the files.

    Each container's folder also gets a model card, the record of its proof, and the teacher's licence if the model's
    folder has its text. A container's folder appears only once all of it is proven. If it is there already, from an
    export of the same row by the same versions, and nothing in it has changed, it is kept.

    Args:
        run: The run.
        row_id: The id of the row, or None for the run's best row.
        containers: Names of exporters. For each, a folder of that name is made in `out`.
        out: The folder for all containers.
        notify: Called with a line about each step, and with warnings about the student.
        verified: Whether each export is run and compared with the evaluated student. If not, its card says so.
        threads: CPU threads to run it with.
        teacher: Where the run's teacher is now, if it was moved.

    Returns:
        For each container, the file or folder to give to a runtime.

    Raises:
        InputError: An unknown or repeated container; an unknown row; a row whose student is not on disk or was changed;
            a teacher that is missing or has changed; a container that cannot hold the row; or a folder that is not
            empty and has no such export.
        MissingDependencyError: A package that a container needs is not installed.
        VerificationError: The written weights or their behaviour differ from what was evaluated.
    """
    check_containers(containers, out)
    model = _Model.of(run, row_id, notify, teacher)
    exporters = {name: load_exporter(name) for name in containers}
    deployments = {name: model.deployment(exporter) for name, exporter in exporters.items()}
    paths = {
        name: path
        for name, deployment in deployments.items()
        if (path := model.exported(out / name, exporters[name], deployment, verified=verified)) is not None
    }
    for name, path in paths.items():
        notify(f"{model.row.name} is already exported as {name}, and nothing has changed: {path} is kept")
    for name in [name for name in containers if name not in paths]:
        with _disk_errors_as_input_errors(out), replacing(out) as partial:
            notify(f"writing {model.row.name} as {name}")
            folder, how = partial / name, deployments[name]
            file = model.write(folder, exporters[name], how, notify, verified=verified, threads=threads)
        paths[name] = out / name / file
    return {name: paths[name] for name in containers}


@dataclass(frozen=True, kw_only=True)
class _Model:
    """The model of a row, which is exported.

    Attributes:
        row: The row.
        folder: The model in float32: a student, or the teacher.
        ranked: All rows of the run by rank, without those of the test split.
        rows: All rows of the run.
        settings: The content of the run's `search.json`, with the keys of `_NEEDED`.
    """

    row: Row
    folder: Path
    ranked: Sequence[Row]
    rows: Sequence[Row]
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls, run: RunFolder, row_id: str | None, notify: Callable[[str], None], teacher: str | Path | None
    ) -> _Model:
        """Return the model of a row, or of the run's best row, after checking that it is the evaluated one."""
        settings = with_teacher(run.read_settings(*_NEEDED), teacher)
        every = run.events.rows(RowAdded, RowTested)
        rows = [row for row in every if row.split != "test"]
        ranked = [one.row for one in rank(contenders(rows), settings["metric"], settings["direction"])]
        best = best_of(run, rows)
        row = find_row(run, ranked, row_id or (best.row_id if best else None))
        folder = model_folder(run, row, settings, notify)
        return cls(row=row, folder=folder, ranked=ranked, rows=every, settings=settings)

    def deployment(self, exporter: Exporter) -> Deployment:
        """Return the deployment in which the model is packed in a container.

        The row's own container uses the row's deployment. "huggingface" is the 16-bit folder. A container without its
        own formats takes the row's own weights. Any other container uses the deployment that ranks best among the rows
        of the same trial in that container, or without one, the deployment that is most like the row's.

        Raises:
            InputError: The container cannot hold the row.
        """
        container = exporter.name
        if isinstance(exporter, TakesAny):
            # Only llama.cpp supports a KV cache of fewer bits.
            own = replace(self.packed, cache_type_k="f16", cache_type_v="f16")
            if reason := _AS_GIVEN if own.file else exporter.refuses(self.folder, own):
                raise InputError(f"the row {self.row.row_id} cannot be exported as {container}: {reason}")
            return own
        if container == "huggingface":
            return IN_16_BITS
        form = get_format(self.row.deployment.format)
        if container == form.container != self.row.deployment.container:
            # The same codes in the format's usual container, for the runtime that usually serves them.
            return replace(self.row.deployment, runtime=form.runtimes[0])
        for candidate in (self.row, *self.ranked):
            if candidate.trial == self.row.trial and candidate.deployment.container == container:
                return candidate.deployment
        try:
            return nearest(self.spec, exporter.formats, self.packed)
        except InputError as error:
            raise InputError(f"the row {self.row.row_id} cannot be exported as {container}: {error}") from None

    @cached_property
    def packed(self) -> Deployment:
        """The row's deployment; for a file as it was given the one that packs the file's codes, if there is any."""
        own = self.row.deployment
        return (codes_of(self.folder, self.spec) if own.file else None) or own

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's shape."""
        return spec_from_config(read_config(self.folder))

    def exported(self, out: Path, exporter: Exporter, deployment: Deployment, *, verified: bool) -> Path | None:
        """Return the path of a finished export of this row, or None if there is no export in the folder.

        Raises:
            InputError: The folder has another export, one that was not run although that is asked, or one that was
                changed.
        """
        if not (out / RECORD).is_file():
            return None
        known = read_back(out, exporter, deployment)
        if known is not None and known.row == self.row.row_id and not (verified and known.check is None):
            path = out / known.artifact if known.artifact else out
            with suppress(VerificationError), self._packed_as(deployment) as folder:
                verify(exporter, Artifact(path=path, size_bytes=0), folder, deployment)
                return path
        raise InputError(
            f"{out} is not an empty folder, and its export is of another row or version, or was changed: choose "
            "another one with --out"
        )

    @cached_property
    def text(self) -> tuple[npt.NDArray[np.int32], str]:
        """The tokens that an export is run on, and their description.

        They are validation text of the run, or general text if the run's data are no longer in the cache. Random tokens
        are the last resort: on them, a runtime that quantises activations differs far more than on any text.
        """
        vocabulary = self.spec.vocabulary
        folder = cache_folder() / "data" / str(self.settings["data"].get("fingerprint", ""))
        with suppress(InputError):
            data = open_prepared(folder)
            length = data.sequence_length
            tokens = load_split(folder, "validation").head(math.ceil(POSITIONS / length) * length).tokens
            if tokens.size and tokens.max() < vocabulary:
                return np.array(tokens, np.int32), f"validation text of {self.settings['data']['name']}"
        gone = "since the run's data are not in the cache any more"
        general = general_sequences(resolve_general(PACKAGED), self.folder, _LENGTH, POSITIONS)
        if general is not None and general.tokens.max() < vocabulary:
            return np.array(general.tokens, np.int32), f"general text, {gone}"
        rows = -(-POSITIONS // _LENGTH)
        random = np.random.default_rng(0).integers(0, vocabulary, (rows, _LENGTH))
        return random.astype(np.int32), f"random tokens, {gone}"

    def write(
        self,
        out: Path,
        exporter: Exporter,
        deployment: Deployment,
        notify: Callable[[str], None],
        *,
        verified: bool,
        threads: int,
    ) -> Path:
        """Export the model into the folder `out` with its card and record, and return the file's path within it."""
        origin = Origin.of(self.settings)
        with self._packed_as(deployment) as folder:
            artifact = exporter.export(folder, deployment, out, **origin.label(self.row))
            weights = verify(exporter, artifact, folder, deployment)
            # The row was measured only in its own container's runtime, so only that one gets its promise.
            own = deployment.container == exporter.name
            promise = promise_asked(self.row, self.settings, deployment.name) if own else None
            found = Exported(row=self.row.row_id, deployment=deployment, weights=weights, promise=promise)
            file = artifact.path.relative_to(out)
            found = replace(found, artifact="" if file == Path() else file.as_posix())
            if verified:
                tokens, text = self.text
                notify(f"running {exporter.name} and the evaluated student on {text}")
                expected = simulate(folder, deployment, tokens, threads)
                check = prove(exporter, artifact.path, deployment, expected, threads, folder, weights)
                found = replace(found, expected=expected, check=check, text=text)
        if note := self._note(found, threads):
            notify(note)
        if artifact.path.suffix == ".gguf":
            write_launch_files(artifact.path, deployment, *self._context_and_batch())
        card = model_card(self.row, deployment, self.rows, origin)
        (out / "README.md").write_text(_card_with_proof(card, exporter, found, note), encoding="utf-8")
        copy_license(self.folder, out)
        write_record(out, exporter, found)
        return file

    def _evaluated(self, deployment: Deployment) -> Row | None:
        """Return the row of the same trial whose weights are stored as a deployment stores them, or None."""
        rows = [one for one in (self.row, *self.ranked) if one.trial == self.row.trial]
        return next((one for one in rows if one.deployment.scheme == deployment.scheme), None)

    @contextmanager
    def _packed_as(self, deployment: Deployment) -> Iterator[Path]:
        """Yield the model's folder; if the search did not evaluate the deployment, with scales that keep its codes."""
        if self._evaluated(deployment) is not None:
            yield self.folder
            return
        with with_codes_of(self.folder, self.packed, deployment) as folder:
            yield folder

    def _note(self, found: Exported, threads: int) -> str:
        """Return the loss and memory of an export that the search did not evaluate, or found not to fit; else ""."""
        deployment, evaluated = found.deployment, self._evaluated(found.deployment)
        if evaluated is not None and evaluated.feasible:
            return ""
        why = "not evaluated in the search" if evaluated is None else evaluated.reason or "it is not feasible"
        told = [f"{self.row.name} as {deployment.name}: {why}."]
        if found.expected is not None:
            own = simulate(self.folder, self.row.deployment, found.expected.sequences, threads)
            told.append(
                f"On {own.top1.size:,} tokens of {found.text}, it {_figures(found.expected)}; as "
                f"{self.row.deployment_name} it {_figures(own)}."
            )
        budget = read_budget(self.settings["budget"]) if self.settings.get("budget") else None
        context, batch = self._context_and_batch()
        gpu = budget is not None and on_gpu(budget)
        need = memory(self.spec, deployment, context=context, batch=batch, on_gpu=gpu).total_bytes
        least = (
            f"At context {context} and batch {batch} it needs {format_bytes(need)} in {deployment.runtime}, predicted"
        )
        if budget is not None and need > (most := budget.memory_bytes):
            least += f": {format_bytes(need - most)} over the budget of {format_bytes(most)}"
        return " ".join([*told, f"{least}."])

    def _context_and_batch(self) -> tuple[int, int]:
        """Return the context in tokens and the batch that the run's budget is for."""
        budget = self.settings.get("budget") or {}
        longest = self.spec.max_context
        return min(int(budget.get("context", longest)), longest), int(budget.get("batch", 1))


@contextmanager
def _disk_errors_as_input_errors(out: Path) -> Iterator[None]:
    """Turn an error of the disk into an InputError of one line. Partly written files are already removed then."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's archive writer raises a plain RuntimeError if the disk refuses a write.
        if isinstance(error, RuntimeError) and not any(one in str(error) for one in _REFUSED_WRITES):
            raise
        why = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise InputError(
            f"cannot write to {out}: {why}; nothing half-written is left, so make room and give the same command again"
        ) from error


def _figures(expected: Expected) -> str:
    """Return the loss and the accuracy on the text that was read, as a clause."""
    right = (expected.top1 == expected.sequences[:, 1:]).mean()
    return f"loses {expected.nll.mean():.4f} nats a token and predicts {right:.2%} of them"


def _card_with_proof(card: str, exporter: Exporter, found: Exported, note: str) -> str:
    """Return a model card with a section about the proof of the exported files."""
    lines = [card.rstrip(), "", "## Proof", "", *([note] if note else [])]
    if isinstance(exporter, TakesAny):
        lines += [
            f"The format is {exporter.name}, with the weights of {found.deployment.name}; {exporter.runs_in} runs it."
        ]
        lines += [f"{name}: {told}." for name, told in exporter.notes.items()]
        if exporter.is_code:
            lines.append(
                "Its file is code: whoever loads it runs what is in it, so load only files from people you trust."
            )
    if (check := found.check) is None:
        lines.append(
            "**Unverified**: nobody ran these files (`--unverified`); their weights are those that were evaluated."
        )
    else:
        lines.append(f"Run on {found.text}, it has {check.describe()}.")
        if check.same_written is not None:
            lines.append(f"It wrote {check.same_written} tokens as that student does, up to the first that differs.")
        if check.tokens_per_second is not None:
            took = "" if check.peak_bytes is None else f", in a process of {check.peak_bytes / 1e6:.0f} MB at most"
            lines.append(f"Meanwhile it wrote {check.tokens_per_second:.3g} tokens a second{took}, by the clock.")
    lines.append(f"`autodistill verify` repeats this from `{RECORD}`.")
    return "\n".join(lines) + "\n"


def model_folder(run: RunFolder, row: Row, settings: Mapping[str, Any], notify: Callable[[str], None]) -> Path:
    """Return the folder of a row's model, a student or the teacher, after checking that it is the evaluated one.

    Args:
        run: The run.
        row: One of its rows.
        settings: The content of its `search.json`, with the keys of `_NEEDED`.
        notify: Called with a warning if no checksums can show whether the files were changed.

    Raises:
        InputError: The model is not on this disk, or was changed.
    """
    if row.kind == "teacher":
        return _teacher(settings)
    student = _student(run, row, settings, _collected(run))
    _check_whole(student, run, row, settings, notify)
    return student


def _collected(run: RunFolder) -> set[str]:
    """Return the trials whose students the search itself removed."""
    return {trial for event in run.events.of(StudentsRemoved) for trial in event.trials}


def _student(run: RunFolder, row: Row, asked: Mapping[str, Any], collected: Collection[str]) -> Path:
    """Return the folder of a row's float32 student.

    Raises:
        InputError: The folder does not exist. The message gives the reason.
    """
    folder = trained_student(run, row)
    if row.kind == "initial" and not folder.is_dir():
        raise InputError(
            f"the row {row.row_id} is an untrained student ({folder} is not there), which is kept only if it does "
            "better than after training: choose another row"
        )
    if not folder.is_dir() and row.full and row.trial in collected:
        raise InputError(
            f"the student of the row {row.row_id} was removed by the search, to hold --checkpoint-limit: "
            f"{_advice_without_student(run, row, asked)}"
        )
    if not folder.is_dir():
        why = "was removed" if row.full else "was not trained to the end, so none was kept"
        raise InputError(
            f"the student of the row {row.row_id} {why} ({folder} is not there): choose another row, or resume the "
            "run with more --time"
        )
    return folder


def _teacher(asked: Mapping[str, Any]) -> Path:
    """Return the folder of the run's teacher, with its own scales if it was stored with scales.

    Raises:
        InputError: The teacher was moved away, or has changed since the run.
    """
    stored, cache = asked["teacher"], cache_folder()
    kept = cache / "teachers" / str(stored.get("fingerprint"))
    if stored.get("file") and is_whole(kept) and not Path(stored["reference"]).expanduser().exists():
        return kept  # its user has moved the file
    check_there(stored["reference"], "teacher", "--teacher")
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
    """Compare the student's files with the checksums recorded when its figures were measured.

    Raises:
        DamagedError: A file differs.
    """
    known = listed(run.events.all()).get((row.trial, kept_after(row)))
    try:
        if not check_list(student, known):
            notify("an earlier version kept no checksums of this student: its files are used without a check")
    except DamagedError as error:
        raise DamagedError(
            f"the student of the row {row.row_id} is not the one whose figures the run has ({error}): "
            f"{_advice_without_student(run, row, asked)}"
        ) from None


def _advice_without_student(run: RunFolder, row: Row, asked: Mapping[str, Any]) -> str:
    """Return advice for a row whose student is not available."""
    command = _retraining_command(row, asked)
    return (
        f"choose another row, or make one like it with {command}, where FILE has the strategy of {row.trial} as "
        f"`autodistill leaderboard {run.name} --json` gives it"
    )


def _retraining_command(row: Row, asked: Mapping[str, Any]) -> str:
    """Return the command that trains a student with a row's strategy, tokens and seed."""
    words = ["autodistill", "distill", "FILE"]
    words += ["--teacher", asked["teacher"]["reference"], "--data", asked["data"]["reference"]]
    plan = asked["plan"]
    words += ["--tokens", str(row.train_tokens), "--step-tokens", str(plan["batch_tokens"])]
    words += ["--sequence-length", str(plan["sequence_length"]), "--seed", str(row.seed or 0)]
    return f"`{shlex.join(words)}`"
