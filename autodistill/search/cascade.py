"""Cascade of two rows of a run: both read the same held-out items, and a curve shows what deferring would give."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.data.chat_template import Renderer
from autodistill.data.dataset import Prepared, TokenSet, load_split, open_prepared
from autodistill.errors import InputError
from autodistill.estimates.teacher_fit import fit_teacher
from autodistill.evaluation.base import Subject, load_evaluator
from autodistill.evaluation.cascade import Items, curve, suggest
from autodistill.evaluation.evaluate import deployed_weights
from autodistill.hardware.budget import Budget, read_budget
from autodistill.hardware.environment import code
from autodistill.hardware.machine import detect_for_training
from autodistill.inference.generation import answer
from autodistill.inference.outputs import Answers, TokenScores
from autodistill.inference.scoring import score
from autodistill.inference.tensor_parallel import load_teacher
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import read_config
from autodistill.models.stored_tensors import stored_type
from autodistill.quantization.learned_scales import read_scales
from autodistill.runs.results.cascades import VERSION, write_cascade, write_items
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder
from autodistill.search.finish.export_run import export_run, model_folder
from autodistill.search.request.references import with_teacher
from autodistill.units import format_bytes, with_error

POSITION, ANSWER = "position", "answer"
_NEEDED = (
    *("metric", "direction", "budget", "plan.eval_tokens", "teacher.name", "teacher.reference", "teacher.fingerprint"),
    *("data.name", "data.reference", "data.fingerprint", "licences", "plan.batch_tokens", "plan.sequence_length"),
)


@dataclass(frozen=True, kw_only=True)
class _Speed:
    """How fast a row is served with one stream.

    Attributes:
        token_ms: Mean milliseconds per token after the first.
        first_ms: Milliseconds to the first token, by length of the prompt in tokens. Empty if unknown.
        source, machine: The same fields as in a row.
    """

    token_ms: float
    first_ms: Mapping[int, float]
    source: str
    machine: str

    def of(self, prompts: npt.NDArray[np.int32], tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float64] | None:
        """Compute the milliseconds that whole answers take, or return None if the time to the first token is unknown.

        Args:
            prompts: Tokens of each prompt.
            tokens: Tokens of each answer. An answer of 0 tokens was not written and takes 0 ms.
        """
        lengths = sorted(self.first_ms)
        if not lengths:
            return None
        first = np.interp(prompts, lengths, [self.first_ms[length] for length in lengths])
        if len(lengths) > 1:
            # Beyond the longest timed prompt, extrapolate with the slope between the two longest ones.
            last, longest = lengths[-2:]
            slope = (self.first_ms[longest] - self.first_ms[last]) / (longest - last)
            first += slope * np.maximum(0, prompts - longest)
        whole: npt.NDArray[np.float64] = np.where(tokens > 0, first + (tokens - 1) * self.token_ms, 0.0)
        return whole


@dataclass(frozen=True, kw_only=True)
class _Read:
    """Scores and answers of a row's model.

    Attributes:
        row: The row.
        scores: The scores of the predicted tokens.
        answers: The answers to the questions, or None if the data have no questions.
    """

    row: Row
    scores: TokenScores
    answers: Answers | None


def cascade(
    run: RunFolder,
    rows: tuple[Row, Row],
    cache: Path,
    notify: Callable[[str], None] = lambda line: None,
    *,
    measure: bool = False,
    threads: int = 1,
    teacher: str | Path | None = None,
) -> dict[str, Any]:
    """Let two rows read the validation split, and write the items and the curve into the run's folder `cascades`.

    The test split is not read, because a search opens it only once, for the row that it exports.

    Args:
        run: A finished or stopped run. Nothing else in it is changed.
        rows: The small row and the large row, as returned by `find_pair`.
        cache: Folder of prepared data.
        notify: Called with a line about each step.
        measure: Whether both rows are exported temporarily and timed in their runtimes.
        threads: CPU threads used for timing.
        teacher: Where the run's teacher is now, if it was moved.

    Returns:
        The document that is written, with the paths of both files.

    Raises:
        InputError: A model or the data are no longer on this disk, or have changed.
    """
    asked = with_teacher(run.read_settings(*_NEEDED), teacher)
    small, large = rows
    data = _data(run, asked, cache)
    folders = {row.row_id: model_folder(run, row, asked, notify) for row in (small, large)}
    budget, tokens = read_budget(asked["budget"]), int(asked["plan"]["eval_tokens"])
    read, prompts = [], np.zeros(0, np.int32)
    for row in (small, large):
        notify(f"{row.row_id} reads the validation split")
        split = load_split(data.folder, "validation", _rendering(row, folders[row.row_id], data)).head(tokens)
        read.append(_reads(row, folders[row.row_id], split, budget))
        if split.questions is not None and row is small:
            prompts = np.array([len(one.prompt) for one in split.questions.entries], np.int32)
    said: list[_Speed | None] = []
    memory: list[tuple[int, str] | None] = []
    for row in (small, large):
        speed, held = _speed_on_file(row), _memory_on_file(row)
        if measure:
            speed, held = _measured(run, row, folders[row.row_id], budget, threads, notify, teacher)
        said.append(speed)
        memory.append(held)
    notes = _notes(said, memory, read)
    timed: list[_Speed | None] = said if _comparable(said) else [None, None]
    columns = _columns(read[0], read[1])
    both = _both([one and one[0] for one in memory])
    units = {}
    for unit, found in columns.items():
        notify(f"the curve by {unit}")
        items = _items(unit, found, prompts, timed)
        units[unit] = {
            "items": len(items.small),
            "documents": len(np.unique(items.documents)),
            "small_accuracy": float(items.small.mean()),
            "large_accuracy": float(items.large.mean()),
            "curve": [point.to_json() for point in curve(items, both)],
            "suggestion": suggest(items).to_json(),
        }
    about = {"run": run.name, "split": "validation", "data": asked["data"]["fingerprint"], "code": code()}
    about |= {"small": small.row_id, "large": large.row_id}
    path = write_items(run.path, small.row_id, large.row_id, columns, about)
    document: dict[str, Any] = {
        "version": VERSION,
        "run": run.name,
        "split": "validation",
        "data": dict(asked["data"]),
        "small": _told(small, said[0], memory[0]),
        "large": _told(large, said[1], memory[1]),
        "units": units,
        "parquet": path.name,
        "notes": notes,
    }
    written = write_cascade(run.path, small.row_id, large.row_id, document)
    return document | {"paths": {"items": str(path), "curve": str(written)}}


def _data(run: RunFolder, asked: Mapping[str, Any], cache: Path) -> Prepared:
    folder = cache / "data" / str(asked["data"]["fingerprint"])
    if not folder.is_dir():
        raise InputError(
            f"the data that {run.name!r} read are not in {cache} any more: name another --cache, or have them prepared "
            f"again by autodistill reproduce with one of its rows, if {asked['data']['reference']} is as it was"
        )
    return open_prepared(folder)


def _rendering(row: Row, folder: Path, data: Prepared) -> str:
    if not data.renderings or row.strategy is None or not row.strategy.init.model:
        return ""
    template = Renderer(folder).template
    if template is None or template.name not in data.renderings:
        raise InputError(f"{row.row_id} has a chat template that the prepared data do not have: choose another row")
    return template.name


def _reads(row: Row, folder: Path, data: TokenSet, budget: Budget) -> _Read:
    """Score the data and answer the questions with a row's model, packed as in the row's deployment."""
    machine = detect_for_training()
    device = "cuda" if machine.gpus else "cpu"
    spec = spec_from_config(read_config(folder))
    fit = fit_teacher(spec, stored=stored_type(folder), sequence_length=data.tokens.shape[1], machine=machine)
    model = load_teacher(folder, fit.held_type, device, fit.processes)
    answers = None
    with deployed_weights(model, spec, row.deployment, read_scales(folder, row.deployment)):
        scores = score(model, data, device=device)[0]
        if data.questions is not None and data.questions.entries:
            answers = answer(model, data.questions, context=budget.context, device=device, confident=True)
    return _Read(row=row, scores=scores, answers=answers)


def _columns(small: _Read, large: _Read) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """Return the items of each kind as columns of the Parquet file."""
    if not np.array_equal(small.scores.documents, large.scores.documents):
        raise InputError(f"{small.row.row_id} and {large.row.row_id} do not predict the same tokens: choose other rows")
    found: dict[str, dict[str, npt.NDArray[Any]]] = {POSITION: {"document": small.scores.documents}}
    for name, one in (("small", small), ("large", large)):
        tokens = np.ones(len(one.scores.correct), np.int32)
        found[POSITION] |= {
            f"{name}_confidence": _known(one.scores.confidence),
            f"{name}_correct": one.scores.correct,
            f"{name}_tokens": tokens,
        }
    if small.answers is not None and large.answers is not None:
        found[ANSWER] = {"document": small.answers.documents}
        for name, written in (("small", small.answers), ("large", large.answers)):
            found[ANSWER] |= {
                f"{name}_confidence": _known(written.confidence),
                f"{name}_correct": written.marks >= 1,
                f"{name}_tokens": _known(written.tokens),
            }
    return found


def _known(values: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
    assert values is not None  # they were asked for
    return values


def _items(
    unit: str,
    columns: Mapping[str, npt.NDArray[Any]],
    prompts: npt.NDArray[np.int32],
    speeds: Sequence[_Speed | None],
) -> Items:
    """Return the items of one kind, with the milliseconds that each model takes for each item."""
    taken: list[npt.NDArray[np.float64] | None] = [None, None]
    for place, (name, speed) in enumerate(zip(("small", "large"), speeds, strict=True)):
        tokens = columns[f"{name}_tokens"]
        if speed is not None:
            taken[place] = np.full(len(tokens), speed.token_ms) if unit == POSITION else speed.of(prompts, tokens)
    return Items(
        documents=columns["document"],
        confidence=columns["small_confidence"],
        small=columns["small_correct"].astype(float),
        large=columns["large_correct"].astype(float),
        small_ms=taken[0],
        large_ms=taken[1],
    )


def _measured(
    run: RunFolder,
    row: Row,
    folder: Path,
    budget: Budget,
    threads: int,
    notify: Callable[[str], None],
    teacher: str | Path | None,
) -> tuple[_Speed, tuple[int, str]]:
    """Measure a row's speed and memory in its runtime, on a temporary export."""
    container, spec = row.deployment.container, spec_from_config(read_config(folder))
    with tempfile.TemporaryDirectory(prefix="autodistill-") as place:
        notify(f"{row.row_id} is timed in {row.deployment.runtime}")
        path = export_run(run, row.row_id, [container], Path(place), notify, verified=False, teacher=teacher)[container]
        subject = Subject(
            spec=spec,
            deployment=row.deployment,
            budget=budget,
            artifact=path,
            artifact_bytes=path.stat().st_size,
            threads=threads,
        )
        latency = load_evaluator("latency")
        if not latency.supports(row.deployment):
            raise InputError(
                f"{row.deployment.runtime} is not installed here, so {row.row_id} cannot be timed: leave --measure out"
            )
        timed = {one.name: one for one in latency.evaluate(subject)}
        memory = load_evaluator("memory").evaluate(subject)[0]
    detail = timed["tokens_per_second"].detail
    speed = _Speed(
        token_ms=1e3 / timed["tokens_per_second"].value,
        first_ms={int(length): float(ms) for length, ms in detail["ttft_ms"].items()},
        source="measured",
        machine=str(detail["machine"]),
    )
    return speed, (int(memory.value), memory.source)


def _speed_on_file(row: Row) -> _Speed | None:
    rate, first = row.figure("tokens_per_second"), row.figure("ttft_ms")
    if not rate or row.machine is None:
        return None
    # The latency evaluator times one prompt length only. A single entry makes `of` use its time for all lengths.
    known = {} if first is None else {1: first}
    return _Speed(token_ms=1e3 / rate, first_ms=known, source=row.latency_source or "", machine=row.machine)


def _memory_on_file(row: Row) -> tuple[int, str] | None:
    return None if row.memory_bytes is None else (row.memory_bytes, row.memory_source or "predicted")


def _comparable(speeds: Sequence[_Speed | None]) -> bool:
    """Return whether the speeds of both rows are known and were obtained in the same way on the same machine."""
    known = [speed for speed in speeds if speed is not None]
    return len(known) == 2 and known[0].machine == known[1].machine and known[0].source == known[1].source


def _both(values: Sequence[int | None]) -> tuple[int, int] | None:
    small, large = values
    return None if small is None or large is None else (small, large)


def _notes(
    speeds: Sequence[_Speed | None], memory: Sequence[tuple[int, str] | None], read: Sequence[_Read]
) -> list[str]:
    """Return sentences that a reader needs to interpret the figures."""
    notes = ["Both rows were chosen, or could have been, on the validation split that is read here."]
    if not _comparable(speeds):
        notes.append(
            "No latency is given: the run does not have both rows' speeds from one machine. --measure times both here."
        )
    else:
        notes.append(
            "By position, a deferred token costs one more token of the large model. That is the least it can cost, "
            "since the large model has to read the tokens before it too."
        )
    if None in memory:
        notes.append("No memory is given: the run does not have the memory of both rows. --measure measures it here.")
    if read[0].answers is None:
        notes.append("The data have no questions, so nothing is said about whole answers.")
    return notes


def _told(row: Row, speed: _Speed | None, memory: tuple[int, str] | None) -> dict[str, Any]:
    """Return the document's entry for one row."""
    found: dict[str, Any] = {"row_id": row.row_id, "name": row.name, "kind": row.kind}
    found |= {"deployment": row.deployment.name, "accuracy_on_file": row.accuracy}
    found |= (
        {"memory_bytes": None, "memory_source": None}
        if memory is None
        else dict(zip(("memory_bytes", "memory_source"), memory, strict=True))
    )
    found["token_ms"] = None if speed is None else speed.token_ms
    found["speed_source"], found["machine"] = (None, None) if speed is None else (speed.source, speed.machine)
    return found


def described(document: Mapping[str, Any]) -> str:
    """Return a cascade as text and tables for a person."""
    small, large = document["small"], document["large"]
    lines = [
        f"{small['row_id']} answers, and defers to {large['row_id']} below a confidence; {document['split']} split of "
        f"{document['run']}."
    ]
    for unit, found in document["units"].items():
        documents = f"{found['documents']:,} document{'s' if found['documents'] > 1 else ''}"
        lines += ["", f"By {unit}: {found['items']:,} of them, in {documents}."]
        lines += _table(found["curve"])
        lines.append(_suggested(found["suggestion"], large["row_id"]))
    lines += ["", *document["notes"]]
    lines += [f"{name}: {path}" for name, path in document.get("paths", {}).items()]
    return "\n".join(lines)


def _table(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return up to eleven evenly spaced points of the curve as lines of a table."""
    shown = [points[place] for place in sorted({round(step * (len(points) - 1) / 10) for step in range(11)})]
    cells = [("below", "deferred", "accuracy", "over chance", "ms", "memory")]
    for one in shown:
        cells.append(
            (
                f"{one['threshold']:.4f}",
                with_error(100 * one["deferred"], one["deferred_stderr"] and 100 * one["deferred_stderr"], ".1f") + "%",
                with_error(one["accuracy"], one["accuracy_stderr"], ".4f"),
                with_error(one["over_chance"], one["over_chance_stderr"], "+.4f"),
                with_error(one["latency_ms"], one["latency_stderr"], ".2f"),
                "-" if one["memory_bytes"] is None else format_bytes(one["memory_bytes"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _suggested(found: Mapping[str, Any], large: str) -> str:
    said = f"Below {found['threshold']:.4f} it is within one standard error of {large} alone."
    if found["deferred"] is None:
        return f"{said} One document alone says nothing about others."
    return (
        f"{said} On documents that were not used to choose a threshold, it defers "
        f"{with_error(100 * found['deferred'], 100 * (found['deferred_stderr'] or 0), '.1f')}%, with accuracy "
        f"{with_error(found['accuracy'], found['accuracy_stderr'], '.4f')}, "
        f"{with_error(found['over_large'], found['over_large_stderr'], '+.4f')} to {large} alone."
    )
