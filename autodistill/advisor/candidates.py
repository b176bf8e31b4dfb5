"""The rows of a results folder that `pick` can choose: students trained to the end, and models without training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from autodistill.errors import InputError
from autodistill.models.config import comparable, spec_from_config
from autodistill.models.spec import ModelSpec
from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED
from autodistill.runs.results.memory_correction import Overhead, Place, overheads
from autodistill.runs.results.row import (
    WITHIN_LIMITS,
    Row,
    check_documents,
    check_kind,
    check_version,
    finite,
    is_field,
    trained_fully,
)
from autodistill.runs.results.selection import students_only
from autodistill.runs.results.table import arrow_schema
from autodistill.runs.run_folder import RunFolder, no_runs, read_each
from autodistill.strategy.deployment import Deployment
from autodistill.utils.json_files import plain_json
from autodistill.utils.plain_dataclass import required
from autodistill.utils.typed_data import check_typed

T = TypeVar("T")
_COLUMNS = (
    *("row_id", "trial", "kind", "name", "deployment", "status", "feasible", "reason", "split", "params", "shape"),
    *("accuracy", "accuracy_stderr", "perplexity", "agreement", "memory_bytes", "memory_source", "size_bytes"),
    *("latency_ms", "latency_source", "machine", "context", "batch", "fidelity", "other", "schema_version"),
)
_AGAINST_TEACHER = ("agreement", "kl")  # metrics that compare a student with its teacher


class Shape:
    """A student's shape. All rows of the student share one object.

    Attributes:
        config: The config that describes the student, as `models.config.config_of` returns it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        check_typed(config, dict[str, Any], "a shape")
        self.config = config

    @cached_property
    def sizes(self) -> tuple[tuple[Any, ...], tuple[int, ...]]:
        """The sizes, as `config.comparable` returns them."""
        return comparable(self.config)

    @property
    def spec(self) -> ModelSpec:
        """The model's description. Only the last 256 are cached, because ten thousand would take much memory."""
        return _spec(self)


@lru_cache(256)
def _spec(shape: Shape) -> ModelSpec:
    return spec_from_config(shape.config)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A stored row in a compact form: only the fields by which most rows are rejected are built at once.

    Attributes:
        run: Name of its run.
        cells: The row's fields by name, without those that are None. The deployment and other figures are JSON text.
        metric, value: The metric that ranked in its run, and the row's value of it.
        direction: "max" or "min": which value is better.
        shape: The student's shape, or None if the row has none.
        folder: The folder of its run, or None if it is not stored.
        forgetting_limited: Whether the search limited what training made the student forget, or the row has no
            training. Older versions did not look at forgetting, and their metric on the text alone is too favourable.
    """

    run: str
    cells: Mapping[str, Any]
    metric: str
    value: float | None
    direction: str
    shape: Shape | None = None
    folder: RunFolder | None = None
    forgetting_limited: bool = True

    @classmethod
    def of(cls, row: Row, run: str, metric: str, direction: str, folder: RunFolder | None = None) -> Candidate:
        """Make a candidate from a complete row."""
        fields = {name: getattr(row, name) for name in _COLUMNS if name != "shape"}
        cells = {name: value for name, value in fields.items() if value is not None}
        cells |= {"deployment": json.dumps(row.deployment.to_json()), "other": json.dumps(row.other)}
        shape = None if row.shape is None else Shape(row.shape)
        return cls(
            run=run,
            cells=cells,
            metric=metric,
            value=row.figure(metric),
            direction=direction,
            shape=shape,
            folder=folder,
        )

    @cached_property
    def row(self) -> Row:
        """The row, without its documents, strategy and shape."""
        return _row(self.cells, self.folder)

    @property
    def worth(self) -> float:
        """The metric, signed so that more is better."""
        return -math.inf if self.value is None else self.value if self.direction == "max" else -self.value

    @property
    def score(self) -> str:
        """The figure that `--min-accuracy` limits: the metric if more of it is better, else the accuracy."""
        return self.metric if self.direction == "max" else "accuracy"

    @property
    def deployment(self) -> Deployment:
        """How it is quantised and served."""
        return _deployment(self.cells["deployment"])

    @property
    def spec(self) -> ModelSpec | None:
        """The description of the student."""
        return None if self.shape is None else self.shape.spec


@lru_cache(1024)
def _deployment(text: str) -> Deployment:
    return Deployment.from_json(plain_json(text))


def stored(out: Path, runs: Sequence[str] = ()) -> list[Candidate]:
    """Return the validation rows of runs: students that were trained to the end, and models without training.

    Args:
        out: Folder of the runs.
        runs: Names of runs; all by default.

    Raises:
        InputError: There is no such run, or no run at all; a named run cannot be read; or the runs ranked by different
            metrics or on different data.
    """
    found = read_each(out, _of_run, runs)
    if not found:
        raise no_runs(out)
    if len({one.metric for one in found.values()}) > 1:
        told = ", ".join(f"{name} by {one.metric[0]}" for name, one in found.items())
        raise InputError(f"runs that rank by different metrics cannot be compared ({told}): name those of one")
    if len({tuple(one.source.values()) for one in found.values()}) > 1:
        told = ", ".join(f"{name} on {' of '.join(map(' '.join, one.source.items()))}" for name, one in found.items())
        raise InputError(f"runs that were measured on different data cannot be compared ({told}): name those of one")
    return [row for one in found.values() for row in one.rows]


class _OfRun(NamedTuple):
    """The metric that ranked in a run, the data that it was measured on, and the run's candidates."""

    metric: tuple[str, str]
    source: Mapping[str, str]
    rows: list[Candidate]


def _of_run(run: RunFolder) -> _OfRun:
    asked = run.read_settings()
    try:
        metric, source = (asked["metric"], asked["direction"]), _measured_on(asked)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{run.search_file} does not say by which metric and on which data {run.name} was ranked, perhaps because "
            "another version wrote it: leave that run out"
        ) from error
    kinds = DISTILLED if students_only(asked) else (*DISTILLED, *UNTRAINED)
    looked = "goal" in asked
    rows = [
        one if looked or one.cells["kind"] in UNTRAINED else replace(one, forgetting_limited=False)
        for one in _candidates(run, kinds, *metric)
    ]
    return _OfRun(metric, source, rows)


def _measured_on(asked: Mapping[str, Any]) -> dict[str, str]:
    """Return names and fingerprints of what a run's metric was measured on: task questions, or the tokens of its data.

    Args:
        asked: The run's `search.json`.
    """
    kind, _, task = asked["metric"].partition(":")
    if kind == "task":
        return {task: asked["asked"]["fingerprints"][task]}
    if task:
        # The name of an installed task identifies its questions.
        return {}
    parts = ("data", "teacher") if kind in _AGAINST_TEACHER else ("data",)
    return {asked[part]["name"]: asked[part]["fingerprint"] for part in parts}


def with_documents(candidates: Sequence[Candidate]) -> list[Row]:
    """Return the candidates' rows, with the scores of single documents if they are stored."""
    wanted: dict[str, set[str]] = {}
    folders = {one.run: one.folder for one in candidates}
    for one in candidates:
        wanted.setdefault(one.run, set()).add(one.cells["row_id"])
    found = {run: _documents(folder, wanted[run]) for run, folder in folders.items() if folder is not None}
    return [replace(one.row, documents=found.get(one.run, {}).get(one.cells["row_id"])) for one in candidates]


def _documents(run: RunFolder, ids: set[str]) -> dict[str, Any]:
    """Return the scores by document of some rows of a run, by id."""
    if not run.tabled:
        return {row.row_id: row.documents for row in run.events.rows() if row.row_id in ids}
    with _table(run) as file:
        if "documents" not in file.schema_arrow.names:
            return {}
        columns = file.read(columns=["row_id", "documents"], use_threads=False)
        pairs = zip(columns.column("row_id").to_pylist(), columns.column("documents"), strict=True)
        found = {name: plain_json(text.as_py()) for name, text in pairs if name in ids and text.is_valid}
        for documents in found.values():
            check_documents(documents, "documents")
    return found


def recalibrated(out: Path) -> dict[Place, Overhead]:
    """Return the corrections of predicted memory from the measured students of a folder's runs; often none."""
    return overheads(row for rows in read_each(out, lambda run: list(_measured(run))).values() for row in rows)


def recalibrated_by(candidates: Iterable[Candidate]) -> dict[Place, Overhead]:
    """Return the corrections of predicted memory from the measured ones among some candidates."""
    return overheads(one.row for one in candidates if one.cells.get("memory_source") == "measured")


def _candidates(run: RunFolder, kinds: Sequence[str], metric: str, direction: str) -> Iterator[Candidate]:
    """Yield a run's validation rows of these kinds that have the metric, and were trained to the end or not at all.

    Rows that the search passed over for reasons other than hardware limits are left out: the student forgot too much,
    or is gone.
    """
    if not run.tabled:
        for row in run.events.rows():
            if row.reason in WITHIN_LIMITS:
                continue
            if row.kind in kinds and row.split != "test" and row.full and row.figure(metric) is not None:
                yield Candidate.of(row, run.name, metric, direction, run)
        return
    columns = _columns(run, *filter(is_field, [metric]))
    count = len(columns["row_id"])
    with _naming_damaged_table(run):
        shapes = _parsed(columns.pop("shape", [None] * count), Shape)
        if is_field(metric):
            values = columns.get(metric, [None] * count)
        else:
            values = [other and other.get(metric) for other in _parsed(columns.get("other", [None] * count), _figures)]
    names = tuple(columns)
    for found, shape, *cells in zip(values, shapes, *columns.values(), strict=True):
        value, fields = finite(found), {key: cell for key, cell in zip(names, cells, strict=True) if cell is not None}
        if value is None or fields["kind"] not in kinds or fields.get("split") == "test":
            continue
        if fields.get("reason") in WITHIN_LIMITS:
            continue
        if trained_fully(fields["kind"], fields.get("fidelity")):
            yield Candidate(
                run=run.name, cells=fields, metric=metric, value=value, direction=direction, shape=shape, folder=run
            )


def _measured(run: RunFolder) -> Iterator[Row]:
    """Yield the rows of a run whose memory was measured."""
    if not run.tabled:
        yield from (row for row in run.events.rows() if row.memory_source == "measured")
        return
    columns = _columns(run)
    for cells in zip(*columns.values(), strict=True):
        fields = {key: cell for key, cell in zip(columns, cells, strict=True) if cell is not None and key != "shape"}
        if fields.get("memory_source") == "measured":
            yield _row(fields, run)


def _row(cells: Mapping[str, Any], run: RunFolder | None) -> Row:
    with _naming_damaged_table(run):
        other = _figures(plain_json(cells.get("other", "{}")))
        return Row(**dict(cells) | {"deployment": _deployment(cells["deployment"]), "other": other})


def _figures(data: Any) -> dict[str, Any]:
    check_typed(data, dict[str, Any], "a cell")
    return dict(data)


@contextmanager
def _naming_damaged_table(run: RunFolder | None) -> Iterator[None]:
    """Turn errors from reading a run's table into an InputError that names the file."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException, ValueError, InputError) as error:
        if run is None:
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{run.leaderboard_file} is not what a search writes ({said}): remove it, and the rows are read from the "
            "run's log, or leave that run out"
        ) from None


@contextmanager
def _table(run: RunFolder, *needed: str) -> Iterator[Any]:
    """Open a run's table, and check the types of its columns. The columns in `needed` must exist too."""
    import pyarrow.parquet as pq

    # Do not use `read_table`: it imports pandas if that is installed, which takes longer than everything else here.
    with _naming_damaged_table(run), pq.ParquetFile(run.leaderboard_file) as file:
        written = arrow_schema()
        for field in file.schema_arrow:
            if field.name in written.names and not field.type.equals(written.field(field.name).type):
                raise InputError(f"the column {field.name} is of {field.type}")
        missing = [name for name in (*required(Row), *needed) if name not in file.schema_arrow.names]
        if missing:
            raise InputError(f"it lacks the column {missing[0]}")
        yield file


def _columns(run: RunFolder, *needed: str) -> dict[str, list[Any]]:
    """Read a run's table without its largest columns (documents and strategies), and without empty ones."""
    with _table(run, *needed) as file:
        # Runs of earlier versions lack some columns.
        names = [name for name in _COLUMNS if name in file.schema_arrow.names]
        table = file.read(columns=names, use_threads=False)
        for name in required(Row):
            if table.column(name).null_count:
                raise InputError(f"the column {name} has rows without it")
        for kind in table.column("kind").unique().to_pylist():
            check_kind(kind)
        for version in table.column("schema_version").unique().to_pylist() if "schema_version" in names else ():
            check_version(version)
        for text in table.column("deployment").unique().to_pylist():
            Deployment.from_json(plain_json(text))
    columns = {name: table.column(name) for name in names}
    return {name: one.to_pylist() for name, one in columns.items() if name == "row_id" or one.null_count < len(one)}


def _parsed(texts: Sequence[str | None], made: Callable[[Any], T]) -> list[T | None]:
    """Return the value of each JSON text. Equal texts are parsed once, and all as one list, in a tenth of the time."""
    distinct = list(dict.fromkeys(text for text in texts if text is not None))
    found = dict(zip(distinct, map(made, plain_json(f"[{','.join(distinct)}]")), strict=True))
    return [None if text is None else found[text] for text in texts]
