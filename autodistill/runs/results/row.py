"""A row of the leaderboard: one trial under one deployment, as a value, as JSON and as Parquet."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from autodistill.errors import InputError
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy
from autodistill.units import with_error
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import replacing, strict_json
from autodistill.utils.plain_dataclass import PlainDataclass, hints_of, plain, required, without_none
from autodistill.utils.typed_data import check_typed

if TYPE_CHECKING:
    import pyarrow as pa


SCHEMA_VERSION = 1
TABLE_VERSION = 2
"""Of a stored table: the second has `run`, `examples`, and what the file says of its runs."""
_SAID = b"autodistill"

LIKELIHOOD = "perplexity"
"""The figure by which a race is judged: it tells students apart on fewer tokens than an accuracy."""

KINDS = ("student", "baseline", "confirmation", "teacher", "initial")

REMOVED = "its student was removed before it might have been exported"
"""The reason of a row that would be chosen, were its student there."""

DAMAGED = "its student was changed or damaged after it was trained"
"""Likewise, were it as it was written."""

FORGOT = "it forgot general text, where the best row without training did not"
"""Likewise, had the search the task alone for its goal."""

DIFFERS = "its runtime did not do what was evaluated"
"""Likewise, did its runtime compute what was evaluated."""

WITHIN_LIMITS = (REMOVED, DAMAGED, FORGOT, DIFFERS)
"""The reasons of rows that keep to the budget, and are not to be exported all the same."""


class _Said(TypedDict):
    """What a stored table says of itself."""

    table: int
    runs: Mapping[str, Any]


class _Paired(TypedDict):
    """A figure by document."""

    ids: tuple[Any, ...]
    count: tuple[float, ...]
    sum: NotRequired[tuple[float | None, ...]]
    bins: NotRequired[tuple[Any, ...]]
    metric: NotRequired[str]
    unit: NotRequired[str]


class _Documents(_Paired):
    """The metric by document, and further figures by their names."""

    others: NotRequired[Mapping[str, _Paired]]


class _Load(TypedDict):
    """What was timed with so many streams."""

    streams: int
    prompt_tokens: int
    behind_tokens: NotRequired[int]


class _Latency(TypedDict, total=False):
    """What was timed in the runtime."""

    loads: Sequence[_Load]
    limits: Mapping[str, float | None] | None


class _Memory(TypedDict, total=False):
    """The memory that was measured, by parts."""

    machine: str | None
    device_class: str
    weights_bytes: float
    kv_cache_bytes: float
    compute_bytes: float
    overhead_bytes: float


class _Other(TypedDict, total=False):
    """Those of a row's further figures that are more than a number."""

    memory_on: str
    memory_parts: _Memory | None
    latency_detail: _Latency | None
    latency_assumed: str | None
    latency_doubts: str | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """Trial x deployment: one line of the leaderboard. Fields are None where nothing was measured.

    Attributes:
        row_id: Unique in a run; a later row of the same id supersedes an earlier one.
        trial: Id of the trial, like "t003".
        kind: "student" (proposed), "baseline" (to be beaten), "confirmation" (one of these on a further seed),
            "teacher" (unmodified), "initial" (a student without its training).
        name: For people: the baseline's name, or the trial's.
        deployment: How the student is packed and served.
        status: A `Status`.
        feasible: Whether it meets every limit of the budget.
        reason: Why it is not feasible or did not finish.
        strategy_id, strategy: What was trained, or begins so, and its hash; None for the teacher.
        split: "validation" or "test".
        accuracy, accuracy_stderr: Fraction of tokens (or answers) that are right, and its standard error.
        perplexity: exp of the mean negative log-likelihood.
        agreement: Fraction of tokens whose most likely one is also the teacher's.
        retention: Accuracy over the teacher's on the same examples.
        memory_bytes, memory_source: Inference memory at `context` and `batch`; measured or predicted.
        latency_ms, tokens_per_second, latency_source: Decode time per token (95th percentile) and rate at one stream.
        machine: What those were measured on, or predicted for. With the deployment's runtime it says which rows'
            latencies may be compared.
        size_bytes: Packed weights on disk.
        shape: A config that describes the student, as `estimate.config_of` gives it.
        params: Weights, a tied embedding counted once.
        train_tokens, train_seconds, fidelity: What training took; `fidelity` is the fraction of the plan's tokens.
        documents: Paired data for ties: `ids`, `count` (tokens) and `sum` (of the metric) of each document, and
            optionally `metric`, the figure the sums are of ("accuracy" where absent).
        other: Figures of further evaluators by name, their standard errors under `<name>_stderr`;
            `approximate` says what the loss was where it was not the divergence that the strategy names, and
            `latency_assumed` why a predicted latency rests on nothing that was measured; `memory_on` is "discrete-gpu"
            where the memory is a GPU's and not a process's; `registered` has the names, and hashes of the source,
            of the divergence and the evaluators that a Python session registered.
    """

    row_id: str
    trial: str
    kind: str
    name: str
    deployment: Deployment
    status: str
    feasible: bool
    reason: str | None = None
    strategy_id: str | None = None
    strategy: Strategy | None = None
    split: str | None = None
    accuracy: float | None = None
    accuracy_stderr: float | None = None
    perplexity: float | None = None
    agreement: float | None = None
    retention: float | None = None
    memory_bytes: int | None = None
    memory_source: str | None = None
    latency_ms: float | None = None
    tokens_per_second: float | None = None
    latency_source: str | None = None
    machine: str | None = None
    size_bytes: int | None = None
    shape: Mapping[str, Any] | None = None
    params: int | None = None
    context: int | None = None
    batch: int | None = None
    train_tokens: int | None = None
    train_seconds: float | None = None
    fidelity: float | None = None
    seed: int | None = None
    documents: Mapping[str, Any] | None = None
    other: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def short_id(self) -> str:
        """The row's id as tables show it, which `export --row` reads as well."""
        return self.row_id.replace("-compressed-tensors-", "-ct-")

    @property
    def full(self) -> bool:
        """Whether its measurements were taken after all of the plan's tokens, or it needs no training at all."""
        return trained_fully(self.kind, self.fidelity)

    @property
    def deployment_name(self) -> str:
        """Short readable name, like "gguf-q4_0"."""
        return self.deployment.name

    def shown(self, name: str) -> str:
        """Return a figure with its standard error, for a person; "-" where the row has none."""
        return with_error(self.figure(name), self.figure(f"{name}_stderr"))

    def figure(self, name: str) -> float | None:
        """Return a measured figure by name, or None where it is missing or not finite."""
        return finite(getattr(self, name) if is_field(name) else self.other.get(name))

    def to_json(self) -> dict[str, Any]:
        """The row as plain data, every field written out."""
        found: dict[str, Any] = plain(self)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Read what `to_json` wrote; fields this version does not know are left out.

        Raises:
            InputError: A newer schema, a missing field, or a value of another type.
        """
        version = data.get("schema_version", SCHEMA_VERSION)
        if not isinstance(version, int) or version > SCHEMA_VERSION:
            raise InputError(
                f"a row has schema version {version}, this version of autodistill reads up to {SCHEMA_VERSION}: "
                "upgrade autodistill to read it"
            )
        missing = [name for name in required(Row) if data.get(name) is None]
        if missing:
            raise InputError(f"row {data.get('row_id')!r} lacks the field {', '.join(missing)}")
        check_typed(data.get("schema_version", SCHEMA_VERSION), int, "schema_version")
        if data.get("cut_short") is not None:
            raise InputError(
                f"row {data['row_id']!r} is of an evaluation that ended early, which earlier versions had: its figures "
                "are of a part of the data, so start that search again"
            )
        row = cls(**{name: _convert(data[name], name) for name in _types() if data.get(name) is not None})
        row._check()
        return row

    def _check(self) -> None:
        name = f"row {self.row_id!r}"
        check_kind(self.kind, name)
        check_typed(self.status, Status, f"the status of {name}")
        check_typed(self.split, Literal["validation", "test"] | None, f"the split of {name}")
        check_typed(dict(self.other), _Other, f"the figures of {name}")
        if self.documents is not None:
            check_documents(dict(self.documents), f"the documents of {name}")


def check_kind(kind: str, name: str = "a row") -> None:
    """Hold a row's kind to those that there are.

    Raises:
        InputError: It is none of them.
    """
    if kind not in KINDS:
        raise InputError(f"{name} is of kind {kind!r}; it can be {', '.join(KINDS)}")


def check_documents(documents: Any, where: str) -> None:
    """Hold a row's paired data to what they must be.

    Raises:
        InputError: Says what is wrong.
    """
    check_typed(documents, _Documents, where)
    for data in (documents, *documents.get("others", {}).values()):
        lengths = [len(data.get(part, ())) for part in ("ids", "count", "bins" if "bins" in data else "sum")]
        if len(set(lengths)) > 1:
            raise InputError(f"{where} have {lengths} ids, counts and sums, not as many")


def trained_fully(kind: str, fidelity: float | None) -> bool:
    """Whether a row with these fields was measured after all of the plan's tokens; see `Row.full`."""
    return kind in ("teacher", "initial") or (fidelity is not None and fidelity > 1 - 1e-9)


def task_figures(rows: Iterable[Row], metric: str) -> list[str]:
    """Names of the tasks' figures that rows have beside the metric, in the order in which they were asked for."""
    names = dict.fromkeys(name for row in rows for name in row.other if name.startswith("task:"))
    return [name for name in names if name != metric and not name.endswith("_stderr")]


def is_field(figure: str) -> bool:
    """Whether a figure is a field of a row, not one of its `other` figures."""
    return _types().get(figure) in (int, float)


def finite(value: Any) -> float | None:
    """Return a value that is a finite number, else None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


@cache
def _types() -> dict[str, type]:
    """Type of each field of `Row`, None and the parameters of a mapping left out."""
    held = {name: without_none(hint) for name, hint in hints_of(Row).items()}
    return {name: typing.get_origin(hint) or hint for name, hint in held.items()}


def _convert(value: Any, name: str) -> Any:
    kind = _types()[name]
    if issubclass(kind, PlainDataclass):
        return kind.from_json(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    # A bool is an int to Python, never to a reader of a row.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"the row's field {name} must be of type {kind.__name__}, not {value!r}")
    return value


def to_parquet(rows: Sequence[Row], path: Path, run: str = "", about: Mapping[str, Any] | None = None) -> None:
    """Write rows as a Parquet file, atomically; docs/leaderboards.md says what it holds.

    Args:
        rows: Of one run.
        path: The file.
        run: The run's name.
        about: What the file says of the run: what ranked, and what was measured on what.
    """
    write_table(table_of(rows, run), path, {run: about} if about is not None else {})


def table_of(rows: Sequence[Row], run: str) -> pa.Table:
    """Return rows as a table: a column for each field, a mapping as JSON text; and `run`, and `examples`."""
    import pyarrow as pa

    columns = {name: [_cell(getattr(row, name)) for row in rows] for name in _types()}
    columns |= {"run": [run] * len(rows), "examples": [examples_of(row.split, row.documents) for row in rows]}
    return pa.table(columns, schema=_table_schema())


def write_table(table: pa.Table, path: Path, about: Mapping[str, Any]) -> None:
    """Write a table that `table_of` made, atomically, with what is to be said of each of its runs."""
    import pyarrow.parquet as pq

    said = json.dumps({"table": TABLE_VERSION, "runs": strict_json(about)}, allow_nan=False)
    with replacing(path) as temporary:
        pq.write_table(table.replace_schema_metadata({_SAID: said.encode()}), temporary)


def examples_of(split: str | None, documents: Mapping[str, Any] | None) -> str | None:
    """Return a hash of the documents that a row was measured on, and of their numbers of tokens; None without any."""
    if documents is None or "ids" not in documents or "count" not in documents:
        return None
    return content_hash([split, list(documents["ids"]), [float(count) for count in documents["count"]]])


@cache
def arrow_schema() -> pa.Schema:
    """The columns of a table of rows."""
    import pyarrow as pa

    arrow = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return pa.schema([(name, arrow.get(kind, pa.string())) for name, kind in _types().items()])


@cache
def _table_schema() -> pa.Schema:
    """The columns of a stored table: those of the rows, their run, and what they were measured on."""
    import pyarrow as pa

    return pa.schema([*arrow_schema(), ("run", pa.string()), ("examples", pa.string())])


def _cell(value: Any) -> Any:
    value = plain(value)
    if not isinstance(value, Mapping):
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:  # a value that is not finite; looking for one in every row would take longer than writing
        return json.dumps(strict_json(value), allow_nan=False)


def read_parquet(path: Path) -> list[Row]:
    """Read what `to_parquet` wrote.

    Raises:
        InputError: The file is missing or no Parquet file, or see `Row.from_json`.
    """
    return read_rows(read_table(path)[0], str(path))


def read_table(path: Path) -> tuple[pa.Table, Mapping[str, Any]]:
    """Read the table of a file, and what it says of its runs by name; an earlier version is brought up to this one.

    Raises:
        InputError: The file is missing or damaged, of a later version, or not a table of rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path} as a leaderboard: {str(error).splitlines()[0]}") from error
    said = _said(table, path)
    if (lacking := sorted(set(required(Row)) - set(table.column_names))) != []:
        raise InputError(f"{path} is no leaderboard: it lacks the column {', '.join(lacking)}")
    schema, count = _table_schema(), len(table)
    columns = {}
    for column in schema:
        if column.name not in table.column_names:
            columns[column.name] = pa.nulls(count, column.type)
            continue
        try:
            columns[column.name] = table.column(column.name).cast(column.type)
        except pa.ArrowException as error:
            raise InputError(f"{path} is no leaderboard: its column {column.name} is not of {column.type}") from error
    if "examples" not in table.column_names:
        parts = zip(columns["split"].to_pylist(), columns["documents"].to_pylist(), strict=True)
        try:
            found = [examples_of(split, text and json.loads(text)) for split, text in parts]
        except (ValueError, TypeError) as error:
            raise InputError(f"{path} has documents that cannot be read ({error}): make it again") from None
        columns["examples"] = pa.array(found, pa.string())
    if "run" not in table.column_names:
        columns["run"] = pa.array([""] * count, pa.string())
    return pa.table(columns, schema=schema), said


def _said(table: pa.Table, path: Path) -> Mapping[str, Any]:
    """What a file says of its runs, by name."""
    text = (table.schema.metadata or {}).get(_SAID)
    if text is None:  # the first version said nothing
        return {}
    try:
        held = json.loads(text)
        check_typed(held, _Said, "its description")
    except (ValueError, InputError) as error:
        raise InputError(f"{path} is no leaderboard: {error}") from None
    if held["table"] > TABLE_VERSION:
        raise InputError(
            f"{path} is a table of version {held['table']}, and this autodistill reads up to {TABLE_VERSION}: "
            "upgrade it"
        )
    runs: Mapping[str, Any] = held["runs"]
    return runs


def read_rows(table: pa.Table, where: str) -> list[Row]:
    """The rows of a table.

    Args:
        table: As `table_of` makes it.
        where: What is named where a row cannot be read.

    Raises:
        InputError: See `Row.from_json`.
    """
    nested = {name for name, kind in _types().items() if kind not in (str, bool, int, float)}
    try:
        return [
            Row.from_json({k: json.loads(v) if k in nested and v is not None else v for k, v in record.items()})
            for record in table.select(list(_types())).to_pylist()
        ]
    except ValueError as error:
        raise InputError(f"{where} has a row that cannot be read ({error}): make it again") from None


class Status(StrEnum):
    """What became of a trial."""

    COMPLETED = "completed"  # trained to the plan's tokens and evaluated
    STOPPED = "stopped"  # judged at a rung and not taken further
    REJECTED = "rejected"  # no deployment can fit: never trained
    FAILED = "failed"


class Decision(StrEnum):
    """A scheduler's answer to a report."""

    PAUSE = "pause"
    STOP = "stop"
