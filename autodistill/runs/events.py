"""The events of a run's log: a frozen dataclass for each kind, written as a line of JSON and checked when read."""

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

# Ids of trials are used as names of folders.
_TRIAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\Z", re.ASCII)

Numbers = Mapping[str, float]
TrialKind = Literal["student", "baseline", "confirmation"]


class Step(TypedDict, total=False):
    """An optimiser step. A figure is None if it was not finite."""

    tokens: int
    loss: float | None
    learning_rate: float | None
    gradient_norm: float | None
    micro_batch: int


class Branch(TypedDict):
    """A decay that branches off a trunk, with the fields of `campaign.trunk.Branch`."""

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
        event: Name of the kind in the log.
        time: When it was written, in seconds since the epoch, or None if it is not written yet.
    """

    event: ClassVar[str]
    time: float | None = left_out(None)

    def to_json(self) -> dict[str, Any]:
        """Return the event as plain data, without the optional fields that have their default."""
        found: dict[str, Any] = {"event": self.event} | plain(self)
        if "time" in found:  # it is the first field of the class, and the last in the log
            found["time"] = found.pop("time")
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read an event; unknown fields are ignored, since a later version may have written them.

        Raises:
            InputError: A field is missing or has a wrong type.
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
    """The previous session ended. `session` is the time at which it began, and `seconds` are its seconds by phase."""

    event = "ended"
    session: float
    seconds: Numbers


@dataclass(frozen=True, kw_only=True)
class TeacherScored(RunEvent):
    """The teacher was scored on `tokens` tokens."""

    event = "teacher"
    teacher_accuracy: float
    tokens: int | None = left_out(None)


@dataclass(frozen=True, kw_only=True)
class TrialAdded(RunEvent):
    """A trial was added to the search.

    Attributes:
        trial: Id of the trial.
        number: Number of the proposal, or None if it was not proposed.
        name: Name to show to a person.
        point: Its point in the space, or None if it is outside of the space.
        parameters: Number of the student's parameters, or None if no such student can be made from the teacher.
        length: Number of tokens that it trains on, as a multiple of the plan's tokens.
        training: The resources that its training takes, as plain data.
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
        rung: Index of the rung.
        value, judged: The metric, and the value by which trials are compared. None if no deployment fits.
        further: The objectives other than the metric.
        seconds: Seconds by phase.
        trained: Tokens that this piece of work trained on.
        shared: Tokens that were not trained on, since another trial had trained on them.
        resumed: Tokens that this trial had trained on before an interruption, and that no event has recorded.
        workers: Number of workers whose time it took.
        unsaved: Why its checkpoint could not be written, or None if it was written.
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
        """Read a rung; in earlier versions trials were compared by the metric, so `judged` is then `value`."""
        return super().from_json({"judged": data.get("value"), **data})


@dataclass(frozen=True, kw_only=True)
class TrialEnded(RunEvent):
    """A trial ended: the reason, the kind of failure, and by how much it missed a limit."""

    event = "status"
    trial: str
    status: Status
    reason: str | None
    cause: str | None = left_out(None)
    miss: Miss | None = left_out(None)


@dataclass(frozen=True, kw_only=True)
class WorkBegan(RunEvent):
    """A piece of work began. It is recorded first, in case the work takes the whole search down.

    `kills` is the number of processes that the kernel had killed for lack of memory until then.
    """

    event = "begun"
    trial: str
    rung: int
    work: str | None
    kills: int


@dataclass(frozen=True, kw_only=True)
class WorkLost(RunEvent):
    """A piece of work ended without a result, after it had trained on `trained` tokens."""

    event = "lost"
    trial: str
    rung: int | None = left_out(None)
    work: str | None = None
    trained: int


@dataclass(frozen=True, kw_only=True)
class StudentKept(RunEvent):
    """A student was kept before the end of its training; `kept` says whether it may be exported."""

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
    """A piece of work was started again."""

    event = "retry"
    trial: str
    rung: int
    deployment: str | None
    cause: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointsRemoved(RunEvent):
    """Checkpoints were removed to stay within the disk limit."""

    event = "collected"
    checkpoints: tuple[str, ...] = ()
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class StudentsRemoved(RunEvent):
    """The students of some trials were removed to stay within the disk limit."""

    event = "students-collected"
    trials: tuple[str, ...]
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class TrunkDecided(RunEvent):
    """The trunk of a trial was planned, with the decays that branch off it. This is decided before the trunk begins."""

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
    """A row of the test split was measured. `row` is None in logs of earlier versions, which wrote several at once."""

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
"""Every kind of event, by its name in the log."""

E = TypeVar("E", bound=RunEvent)


def read_event(data: Mapping[str, Any]) -> RunEvent | None:
    """Read one line of a log, or return None if only a later version knows its kind.

    Raises:
        InputError: The line is invalid; the message says what is wrong.
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
    """Read the lines of a log, without those whose kind only a later version knows.

    Raises:
        InputError: As `read_event`.
    """
    return [event for line in lines if (event := read_event(line)) is not None]


def of_kind(events: Iterable[RunEvent], kind: type[E]) -> list[E]:
    """Return the events of one kind."""
    return [event for event in events if isinstance(event, kind)]


def rows_of(events: Iterable[RunEvent], kinds: Sequence[type[RowAdded | RowTested]] = ()) -> list[Row]:
    """Return the rows of some events. A later row replaces an earlier one with the same id and kind of event.

    Args:
        events: Events of a log.
        kinds: The kinds of events to read; by default `RowAdded`.
    """
    read = tuple(kinds) or (RowAdded,)
    found = {(event.event, event.row.row_id): event.row for event in events if isinstance(event, read) and event.row}
    return list(found.values())


def _read(value: Any, hint: Any, where: str) -> Any:
    """Read a field from plain data: with `from_json` if its class has one, else by a check of its type."""
    held = without_none(hint)
    if isinstance(held, type) and hasattr(held, "from_json"):
        check_typed(value, Mapping[str, Any] if held is hint else Mapping[str, Any] | None, where)
        return None if value is None else held.from_json(value)
    check_typed(value, hint, where)
    if isinstance(value, list):
        return tuple(value)
    return held(value) if isinstance(held, type) and issubclass(held, StrEnum) and value else value
