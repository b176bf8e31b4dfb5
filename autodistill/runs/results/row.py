"""A row of the leaderboard: one trial under one deployment, as a value and as JSON."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from typing import Any, Literal, NotRequired, TypedDict

from autodistill.errors import InputError
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy
from autodistill.units import with_error
from autodistill.utils.plain_dataclass import PlainDataclass, hints_of, plain, required, without_none
from autodistill.utils.typed_data import check_typed

SCHEMA_VERSION = 2
"""Of the rows that are written. A row that says none is of the first, which is read too: a field that it has not is at
its default. docs/leaderboards.md has what the versions have."""

_FIRST_VERSION = 1

LIKELIHOOD = "perplexity"
"""The figure by which a race is judged: it tells students apart on fewer tokens than an accuracy."""

KINDS = ("student", "baseline", "confirmation", "teacher", "initial")

SOLVED_TRIAL = "solved"
"""Under this name what was solved has its row before it is trained."""

REMOVED = "its student was removed before it might have been exported"
"""The reason of a row that would be chosen, were its student there."""

DAMAGED = "its student was changed or damaged after it was trained"
"""Likewise, were it as it was written."""

FORGOT = "it forgot general text, where the best row that needs no training did not"
"""Likewise, had the search the task alone for its goal."""

DIFFERS = "its runtime did not do what was evaluated"
"""Likewise, did its runtime compute what was evaluated."""

_SAID_BEFORE = (
    (re.compile(r"^undistilled student\b"), "untrained student"),
    (re.compile(r"^solved, without training\b"), "solved, untrained"),
    (re.compile(r"^(\w+) without training\b"), r"untrained \1"),
)
"""Names of untrained students as earlier versions stored them, and as they are now."""

_FORGOT_BEFORE = "it forgot general text, where the best row without training did not"

WITHIN_LIMITS = (REMOVED, DAMAGED, FORGOT, DIFFERS)
"""The reasons of rows that keep to the budget, and are not to be exported all the same."""


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
    scoring: str


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
        interpolation: The share of the way from where its training began to where it ended at which its weights lie;
            None where they are those of the end.
        documents: Paired data for ties: `ids`, `count` (tokens) and `sum` (of the metric) of each document, and
            optionally `metric`, the figure the sums are of ("accuracy" where absent).
        other: Figures of further evaluators by name, their standard errors under `<name>_stderr`;
            `approximate` says what the loss was where it was not the divergence that the strategy names, and
            `latency_assumed` why a predicted latency rests on nothing that was measured; `memory_on` is "discrete-gpu"
            where the memory is a GPU's and not a process's; `registered` has the names, and hashes of the source,
            of the divergence and the evaluators that a Python session registered; `scoring` is what products were
            computed in, where that was not float32.
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
    interpolation: float | None = None
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
        data = {"schema_version": _FIRST_VERSION, **data}
        check_version(data["schema_version"])
        missing = [name for name in required(Row) if data.get(name) is None]
        if missing:
            raise InputError(f"row {data.get('row_id')!r} lacks the field {', '.join(missing)}")
        if data.get("cut_short") is not None:
            raise InputError(
                f"row {data['row_id']!r} is of an evaluation that ended early, which earlier versions had: its figures "
                "are of a part of the data, so start that search again"
            )
        row = cls(**{name: _convert(data[name], name) for name in field_types() if data.get(name) is not None})
        if row.kind == "initial":
            row = replace(row, name=named_now(row.name))
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


def check_version(version: Any) -> None:
    """Hold a row's schema version to those that are read.

    Raises:
        InputError: It is a later one, or none.
    """
    check_typed(version, int, "schema_version")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"a row has schema version {version}, this version of autodistill reads up to {SCHEMA_VERSION}: "
            "upgrade autodistill to read it"
        )


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
    """Return whether a row with these fields was measured after all of the plan's tokens; see `Row.full`."""
    return kind in ("teacher", "initial") or (fidelity is not None and fidelity > 1 - 1e-9)


def task_figures(rows: Iterable[Row], metric: str) -> list[str]:
    """Return the names of the tasks' figures that rows have beside the metric, in the order in which they were asked
    for.
    """
    names = dict.fromkeys(name for row in rows for name in row.other if name.startswith("task:"))
    return [name for name in names if name != metric and not name.endswith("_stderr")]


def is_field(figure: str) -> bool:
    """Return whether a figure is a field of a row, not one of its `other` figures."""
    return field_types().get(figure) in (int, float)


def finite(value: Any) -> float | None:
    """Return a value that is a finite number, else None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


@cache
def field_types() -> dict[str, type]:
    """Return the type of each field of `Row`, None and the parameters of a mapping left out."""
    held = {name: without_none(hint) for name, hint in hints_of(Row).items()}
    return {name: typing.get_origin(hint) or hint for name, hint in held.items()}


def _convert(value: Any, name: str) -> Any:
    kind = field_types()[name]
    if issubclass(kind, PlainDataclass):
        return kind.from_json(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    # A bool is an int to Python, never to a reader of a row.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"the row's field {name} must be of type {kind.__name__}, not {value!r}")
    return FORGOT if value == _FORGOT_BEFORE else value


def named_now(name: str) -> str:
    """The name of an untrained student, which an earlier version may have stored in other words."""
    for before, now in _SAID_BEFORE:
        name = before.sub(now, name)
    return name


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
