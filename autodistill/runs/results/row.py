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

from autodistill.errors import InputError, LaterVersionError
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy
from autodistill.units import with_error
from autodistill.utils.plain_dataclass import PlainDataclass, hints_of, plain, required, without_none
from autodistill.utils.typed_data import check_typed

SCHEMA_VERSION = 2
"""Schema version of written rows. A row without a version has the first one. It can be read too: fields that it lacks
get their defaults. docs/leaderboards.md lists the versions."""

_FIRST_VERSION = 1

LIKELIHOOD = "perplexity"
"""The figure by which a race is judged: it needs fewer tokens than an accuracy to tell students apart."""

RUNTIME_LOSS = "runtime_loss"
"""The nats a token that an exported file loses on held-out text in its runtime. It ranks finalists."""

KINDS = ("student", "baseline", "confirmation", "teacher", "initial")

SOLVED_TRIAL = "solved"
"""The trial name of a solution's row before training."""

REMOVED = "its student was removed before it might have been exported"
"""The reason of a row that cannot be chosen since its student was removed."""

DAMAGED = "its student was changed or damaged after it was trained"
"""The reason of a row that cannot be chosen since its student is damaged."""

FORGOT = "it forgot general text, where the best row that needs no training did not"
"""The reason of a row that is not chosen, unless the task alone is the goal of the search."""

DIFFERS = "its runtime did not do what was evaluated"
"""The reason of a row that cannot be chosen since its runtime computes something else than was evaluated."""

_EARLIER_NAMES = (
    (re.compile(r"^undistilled student\b"), "untrained student"),
    (re.compile(r"^solved, without training\b"), "solved, untrained"),
    (re.compile(r"^(\w+) without training\b"), r"untrained \1"),
)
"""Patterns for names of untrained students in earlier versions, and their current forms."""

_FORGOT_BEFORE = "it forgot general text, where the best row without training did not"

WITHIN_LIMITS = (REMOVED, DAMAGED, FORGOT, DIFFERS)
"""The reasons of rows that fit the budget but must not be exported."""


class _Paired(TypedDict):
    """A figure by document."""

    ids: tuple[Any, ...]
    count: tuple[float, ...]
    sum: NotRequired[tuple[float | None, ...]]
    bins: NotRequired[tuple[Any, ...]]
    metric: NotRequired[str]
    unit: NotRequired[str]


class _Documents(_Paired):
    """The metric by document, and further figures by name."""

    others: NotRequired[Mapping[str, _Paired]]


class _Load(TypedDict):
    """The conditions of a timing: streams and prompt length."""

    streams: int
    prompt_tokens: int
    behind_tokens: NotRequired[int]


class _Latency(TypedDict, total=False):
    """The timings in the runtime, and the limits on them."""

    loads: Sequence[_Load]
    limits: Mapping[str, float | None] | None


class _Memory(TypedDict, total=False):
    """The measured memory, by parts."""

    machine: str | None
    device_class: str
    weights_bytes: float
    kv_cache_bytes: float
    compute_bytes: float
    overhead_bytes: float


class _Other(TypedDict, total=False):
    """The entries of a row's `other` that are not plain numbers."""

    memory_on: str
    memory_parts: _Memory | None
    latency_detail: _Latency | None
    latency_assumed: str | None
    latency_doubts: str | None
    scoring: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the leaderboard: a trial under a deployment. Fields without a measurement are None.

    Attributes:
        row_id: Unique in a run. A later row with the same id replaces an earlier one.
        trial: Id of the trial, like "t003".
        kind: "student" (proposed), "baseline" (to be beaten), "confirmation" (a student or baseline on a further seed),
            "teacher" (unmodified), "initial" (an untrained student).
        name: Name to show to a person: that of the baseline or of the trial.
        deployment: How the student is packed and served.
        status: A `Status`.
        feasible: Whether it meets every limit of the budget.
        reason: Why it is not feasible, is not exported, or did not finish.
        strategy_id, strategy: Strategy of the student and its hash; None for the teacher. An untrained student has the
            strategy that begins like it.
        split: "validation" or "test".
        accuracy, accuracy_stderr: Fraction of correct tokens (or answers), and its standard error.
        perplexity: exp of the mean negative log-likelihood.
        agreement: Fraction of positions at which student and teacher have the same most likely token.
        retention: Accuracy divided by the teacher's on the same examples.
        memory_bytes, memory_source: Inference memory at `context` and `batch`; "measured" or "predicted".
        latency_ms, tokens_per_second, latency_source: Decode time per token (95th percentile) and rate at one stream.
        machine: The machine on which these were measured, or for which they were predicted. Latencies of rows are
            comparable only if machine and runtime are the same.
        size_bytes: Packed weights on disk.
        shape: A config that describes the student, as returned by `models.config.config_of`.
        params: Number of weights; a tied embedding is counted once.
        train_tokens, train_seconds, fidelity: Tokens and seconds of training; `fidelity` is the fraction of the plan's
            tokens.
        interpolation: If the weights are interpolated, their share of the way from the start of training to its end.
            None for the weights of the end.
        documents: Paired data for ties: `ids`, `count` (tokens) and `sum` (of the metric) of each document. Optionally
            `metric`, the figure of the sums ("accuracy" by default).
        other: Figures of further evaluators by name, with standard errors under `<name>_stderr`. In addition:
            `runtime_loss`, `runtime_accuracy` and `runtime_tokens` are of a finalist's file, read by its runtime, and
            `runtime_excess` is that loss less the one in torch, by documents that both have whole.
            `approximate` says what the loss computed if it was not exactly the strategy's divergence.
            `latency_assumed` says why a predicted latency is not based on any measurement. `memory_on` is
            "discrete-gpu" if the memory is that of a GPU, not of a process. `registered` has names and hashes of the
            source of the divergence and the evaluators that a Python session registered. `scoring` is the precision of
            products if it was not float32.
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
        """The row's id as shown in tables. `export --row` accepts it too."""
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
        """Return a figure with its standard error as text, or "-" if the row has none."""
        return with_error(self.figure(name), self.figure(f"{name}_stderr"))

    def figure(self, name: str) -> float | None:
        """Return a measured figure by name, or None if it is missing or not finite."""
        return finite(getattr(self, name) if is_field(name) else self.other.get(name))

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain data with all fields."""
        found: dict[str, Any] = plain(self)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Read what `to_json` wrote; fields that this version does not know are ignored.

        Raises:
            InputError: A newer schema, a missing field, or a value of a wrong type.
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
    """Check that a row's schema version can be read.

    Raises:
        LaterVersionError: The version is a later one.
        InputError: The version is not a number.
    """
    check_typed(version, int, "schema_version")
    if version > SCHEMA_VERSION:
        raise LaterVersionError(
            f"a row has schema version {version}, this version of autodistill reads up to {SCHEMA_VERSION}: "
            "upgrade autodistill to read it"
        )


def check_kind(kind: str, name: str = "a row") -> None:
    """Check that a row's kind is one of `KINDS`.

    Raises:
        InputError: It is not.
    """
    if kind not in KINDS:
        raise InputError(f"{name} is of kind {kind!r}; it can be {', '.join(KINDS)}")


def check_documents(documents: Any, where: str) -> None:
    """Check the types and lengths of a row's paired data.

    Raises:
        InputError: The data are invalid; the message says what is wrong.
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
    """Return the names of the rows' figures of tasks, other than the metric, in the order of the request."""
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
    """Return the type of each field of `Row`, without None and without the parameters of a mapping."""
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
    # In Python a bool is an int too, but here it is an error.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"the row's field {name} must be of type {kind.__name__}, not {value!r}")
    return FORGOT if value == _FORGOT_BEFORE else value


def named_now(name: str) -> str:
    """Return the current form of an untrained student's name, which an earlier version may have stored differently."""
    for before, now in _EARLIER_NAMES:
        name = before.sub(now, name)
    return name


class Status(StrEnum):
    """The outcome of a trial."""

    COMPLETED = "completed"  # trained to the plan's tokens and evaluated
    STOPPED = "stopped"  # judged at a rung and not taken further
    REJECTED = "rejected"  # no deployment can fit: never trained
    FAILED = "failed"


class Decision(StrEnum):
    """A scheduler's answer to a report."""

    PAUSE = "pause"
    STOP = "stop"
