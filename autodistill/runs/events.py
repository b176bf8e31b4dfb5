"""The events of a run's log: a frozen value for each kind, written as a line of JSON and checked when read back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Literal, Self, TypedDict, TypeVar

from autodistill.errors import InputError
from autodistill.runs.results.row import Decision, Row, Status
from autodistill.strategy.strategy import Strategy
from autodistill.utils.plain_dataclass import hints_of, left_out, plain, required, without_none
from autodistill.utils.typed_data import check_typed

# Names of trials become names of folders.
_TRIAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\Z", re.ASCII)

Numbers = Mapping[str, float]
TrialKind = Literal["student", "baseline", "confirmation"]


class Step(TypedDict, total=False):
    """An optimiser step. A figure that was not finite is None."""

    tokens: int
    loss: float | None
    learning_rate: float | None
    gradient_norm: float | None
    micro_batch: int


class Branch(TypedDict):
    """A decay that branches off a trunk, as `campaign.trunk.Branch` has it."""

    share: float
    tokens: int
    cost: float
    kept: bool


class Miss(TypedDict):
    """The limit that a trial exceeds, and by how much, as log(need / limit)."""

    limit: str
    slack: float


@dataclass(frozen=True, kw_only=True)
class RunEvent:
    """Something that happened in a run.

    Attributes:
        event: What the log calls it.
        time: When it was written, in seconds since the epoch; None before that.
    """

    event: ClassVar[str]
    time: float | None = left_out(None)

    def to_json(self) -> dict[str, Any]:
        """Return the event as plain data; a field that may be left out is, while it has its default."""
        found: dict[str, Any] = {"event": self.event} | plain(self)
        if "time" in found:  # the first among the fields, and the last in the log
            found["time"] = found.pop("time")
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read an event; fields that are not its own, which a later version may have written, are passed over.

        Raises:
            InputError: A field is missing, or is not what it must be.
        """
        if lacking := sorted(set(required(cls)) - set(data)):
            raise InputError(f"{cls.event} lacks {', '.join(lacking)}")
        names, hints = [one.name for one in dataclasses.fields(cls) if one.name in data], hints_of(cls)
        return cls(**{name: _read(data[name], hints[name], f"{cls.event}.{name}") for name in names})


@dataclass(frozen=True, kw_only=True)
class SessionBegan(RunEvent):
    """A process began to work on the run."""

    event = "session"


@dataclass(frozen=True, kw_only=True)
class SessionEnded(RunEvent):
    """The session before ended: when it had begun, and its seconds by phase."""

    event = "ended"
    session: float
    seconds: Numbers


@dataclass(frozen=True, kw_only=True)
class TeacherScored(RunEvent):
    """The teacher was scored, on so many tokens."""

    event = "teacher"
    teacher_accuracy: float
    tokens: int | None = left_out(None)


@dataclass(frozen=True, kw_only=True)
class TrialAdded(RunEvent):
    """A trial was added to the search.

    Attributes:
        trial: Its id.
        number: Of the proposal; None where it was not proposed.
        name: For a person.
        point: Where it lies in the space; None where it lies outside.
        parameters: Of its student; None where the teacher has no such shape.
        length: How many times the plan's tokens it trains on.
        training: What its training takes, as plain data.
    """

    event = "trial"
    trial: str
    number: int | None = None
    kind: TrialKind = "student"
    name: str = ""
    point: Mapping[str, Any] | None
    parameters: int | None = None
    strategy: Strategy | None = left_out(None)
    seed: int = 0
    length: float = 1.0
    training: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the event as plain data, with the id of its strategy."""
        return super().to_json() | ({"strategy_id": self.strategy.id} if self.strategy else {})


@dataclass(frozen=True, kw_only=True)
class RungReached(RunEvent):
    """A trial reached a rung.

    Attributes:
        rung: Its index.
        value, judged: The metric, and what trials are compared by; None where no deployment fits.
        further: The objectives beside the metric.
        seconds: By phase.
        trained, shared, resumed: Tokens that were trained on, that another trial had trained on, and that this one had
            before it was interrupted without a word.
        workers: Whose time it took.
        unsaved: Why its checkpoint could not be written.
        student: Hash of the list of its student's files.
    """

    event = "rung"
    trial: str
    rung: int
    tokens: int
    value: float | None
    judged: float | None = None
    further: tuple[float | None, ...] = ()
    decision: Decision | None = left_out(None)
    seconds: Numbers = field(default_factory=dict)
    steps: tuple[Step, ...] = ()
    trained: int = 0
    shared: int = 0
    unsaved: str | None = left_out(None)
    resumed: int = left_out(0)
    workers: int = left_out(1)
    student: str | None = left_out(None)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a rung; trials of earlier versions were compared by the metric."""
        return super().from_json({"judged": data.get("value"), **data})


@dataclass(frozen=True, kw_only=True)
class TrialEnded(RunEvent):
    """A trial came to its end: why, by which failure, and by how much it missed a limit."""

    event = "status"
    trial: str
    status: Status
    reason: str | None
    cause: str | None = left_out(None)
    miss: Miss | None = left_out(None)


@dataclass(frozen=True, kw_only=True)
class WorkBegan(RunEvent):
    """A piece of work began, with which the search might end; so many processes had been killed for memory by then."""

    event = "begun"
    trial: str
    rung: int
    work: str | None
    kills: int


@dataclass(frozen=True, kw_only=True)
class WorkLost(RunEvent):
    """A piece of work ended without a result, after so many tokens."""

    event = "lost"
    trial: str
    rung: int | None = left_out(None)
    work: str | None = None
    trained: int


@dataclass(frozen=True, kw_only=True)
class StudentKept(RunEvent):
    """A student was kept short of the end; `kept` says whether it may be exported."""

    event = "kept"
    trial: str
    kept: bool | None
    trained: int = 0
    seconds: Numbers = field(default_factory=dict)
    tokens: int = 0
    student: str | None = None


@dataclass(frozen=True, kw_only=True)
class NotEvaluated(RunEvent):
    """A trained student could not be evaluated under a deployment."""

    event = "unevaluated"
    trial: str
    deployment: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkRetried(RunEvent):
    """A piece of work was given out once more."""

    event = "retry"
    trial: str
    rung: int
    deployment: str | None
    cause: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointsRemoved(RunEvent):
    """Checkpoints were removed to hold the disk limit."""

    event = "collected"
    checkpoints: tuple[str, ...] = ()
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class StudentsRemoved(RunEvent):
    """The students of these trials were removed to hold the disk limit."""

    event = "students-collected"
    trials: tuple[str, ...]
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class TrunkDecided(RunEvent):
    """Which decays branch off what a trial is trained on to, decided before that begins."""

    event = "trunk"
    trial: str
    tokens: int
    branches: tuple[Branch, ...]


@dataclass(frozen=True, kw_only=True)
class RowAdded(RunEvent):
    """A student was measured under a deployment."""

    event = "row"
    row: Row


@dataclass(frozen=True, kw_only=True)
class RowTested(RunEvent):
    """A row of the test split was measured; earlier versions wrote several at once, in fields that nothing reads."""

    event = "test"
    row: Row | None = left_out(None)


KINDS: Mapping[str, type[RunEvent]] = {
    kind.event: kind
    for kind in (
        *(SessionBegan, SessionEnded, TeacherScored, TrialAdded, RungReached, TrialEnded, WorkBegan, WorkLost),
        *(StudentKept, NotEvaluated, WorkRetried, CheckpointsRemoved, StudentsRemoved, TrunkDecided),
        *(RowAdded, RowTested),
    )
}
"""Every kind, by what the log calls it."""

E = TypeVar("E", bound=RunEvent)


def read_event(data: Mapping[str, Any]) -> RunEvent | None:
    """Read one line of a log; None where it is of a kind that a later version has.

    Raises:
        InputError: Says what is wrong.
    """
    kind: Any = data.get("event")
    check_typed(kind, str, "event")
    check_typed(data.get("time", 0.0), float, "time")
    if kind not in KINDS:
        return None
    event = KINDS[kind].from_json(data)
    trial: str | None = getattr(getattr(event, "row", None) or event, "trial", None)
    if trial is not None and not _TRIAL.match(trial):
        raise InputError(f"trial must be the name of one, like t003, not {trial!r}")
    return event


def read_events(lines: Iterable[Mapping[str, Any]]) -> list[RunEvent]:
    """Read the lines of a log, without those of kinds that a later version has.

    Raises:
        InputError: As `read_event`.
    """
    return [event for line in lines if (event := read_event(line)) is not None]


def of_kind(events: Iterable[RunEvent], kind: type[E]) -> list[E]:
    """Return those events that are of one kind."""
    return [event for event in events if isinstance(event, kind)]


def rows_of(events: Iterable[RunEvent], kinds: Sequence[type[RowAdded | RowTested]] = ()) -> list[Row]:
    """The rows of some events, a later one in the place of an earlier one of its kind with the same id.

    Args:
        events: Of a log.
        kinds: Of the events that are read; those of rows that were added by default.
    """
    read = tuple(kinds) or (RowAdded,)
    found = {(event.event, event.row.row_id): event.row for event in events if isinstance(event, read) and event.row}
    return list(found.values())


def _read(value: Any, hint: Any, where: str) -> Any:
    """A field from plain data: a part of its own by its own reader, all else held to its type."""
    held = without_none(hint)
    if isinstance(held, type) and hasattr(held, "from_json"):
        check_typed(value, Mapping[str, Any] if held is hint else Mapping[str, Any] | None, where)
        return None if value is None else held.from_json(value)
    check_typed(value, hint, where)
    if isinstance(value, list):
        return tuple(value)
    return held(value) if isinstance(held, type) and issubclass(held, StrEnum) and value else value
