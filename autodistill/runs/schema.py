"""What a run's records hold, each as one declaration, and `search.json` and the log held to these when read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError
from autodistill.evaluation.base import Direction
from autodistill.hardware.budget import read_budget
from autodistill.runs.results.gains import Gain
from autodistill.runs.results.row import SCHEMA_VERSION, Decision, Row, Status
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Strategy
from autodistill.utils.json_files import read_json
from autodistill.utils.typed_data import check_typed

# What is told of an exported row, all of it or nothing.
_GAINS = ("gain_over_untrained", "gain_over_baseline", "gain_unit")
# Names of trials become names of folders.
_TRIAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\Z", re.ASCII)

Numbers = Mapping[str, float]


class Source(TypedDict):
    """A teacher, or data, of a run."""

    name: NotRequired[str]
    reference: NotRequired[str]
    fingerprint: NotRequired[str]
    revision: NotRequired[str | None]
    quantised: NotRequired[str | None]
    tokens: NotRequired[Mapping[str, int]]


class Asked(TypedDict, total=False):
    """What a run measures beside its metric, and by which it is measured."""

    tasks: tuple[str, ...]
    fingerprints: Mapping[str, str]
    command: str | None
    command_direction: Direction | None
    command_seconds: float | None


class Box(TypedDict):
    """A run's time box."""

    seconds: float | None
    since: float


class Exported(TypedDict):
    """What a run exported."""

    row_id: str
    named: str
    trained: bool


class Search(TypedDict):
    """`search.json`. What not every reader needs may be missing: see `read_search`."""

    metric: NotRequired[str]
    direction: NotRequired[Direction]
    schema_version: NotRequired[int]
    name: NotRequired[str]
    command: NotRequired[str]
    budget: NotRequired[Mapping[str, Any]]
    teacher: NotRequired[Source]
    data: NotRequired[Source]
    templates: NotRequired[Mapping[str, str]]
    strategy: NotRequired[str | None]
    space: NotRequired[str]
    space_hash: NotRequired[str]
    baselines: NotRequired[tuple[str, ...] | None]
    space_definition: NotRequired[Mapping[str, Any]]
    constructions: NotRequired[tuple[Mapping[str, Any], ...]]
    rates: NotRequired[Mapping[str, Any]]
    kv_type: NotRequired[str | None]
    objectives: NotRequired[tuple[str, ...]]
    device: NotRequired[Mapping[str, Any] | None]
    directions: NotRequired[Mapping[str, Direction]]
    asked: NotRequired[Asked]
    sampler: NotRequired[str]
    explore: NotRequired[float]
    confirm: NotRequired[int]
    warm_start: NotRequired[Mapping[str, Any]]
    seed: NotRequired[int]
    runner: NotRequired[str]
    storage: NotRequired[str | None]
    sharing: NotRequired[bool]
    plan: NotRequired[Mapping[str, Any]]
    speed: NotRequired[Numbers]
    box: NotRequired[Box]
    licences: NotRequired[Mapping[str, str]]
    versions: NotRequired[Mapping[str, str]]
    seconds: NotRequired[Numbers]
    notes: NotRequired[tuple[str, ...]]
    saved: NotRequired[Mapping[str, Any]]
    test: NotRequired[tuple[str, ...]]
    exported: NotRequired[Exported]
    gain_over_untrained: NotRequired[Gain | None]
    gain_over_baseline: NotRequired[Gain | None]
    gain_unit: NotRequired[str]


class Session(TypedDict):
    """A session began."""

    time: NotRequired[float]


class Ended(TypedDict):
    """The session before ended."""

    session: float
    time: float
    seconds: Numbers


class TeacherScored(TypedDict):
    """The teacher was scored."""

    teacher_accuracy: float


class Entered(TypedDict):
    """A trial."""

    trial: str
    point: Mapping[str, Any] | None
    number: NotRequired[int | None]
    kind: NotRequired[Literal["student", "baseline", "confirmation"]]
    name: NotRequired[str]
    strategy: NotRequired[Mapping[str, Any]]
    seed: NotRequired[int]
    parameters: NotRequired[int | None]
    length: NotRequired[float]
    training: NotRequired[Mapping[str, Any] | None]


class Step(TypedDict, total=False):
    """An optimiser step. A figure that was not finite is None."""

    tokens: int
    loss: float | None
    micro_batch: int


class Reached(TypedDict):
    """A trial reached a rung."""

    trial: str
    rung: int
    tokens: int
    value: float | None
    seconds: NotRequired[Numbers]
    further: NotRequired[tuple[float | None, ...]]
    decision: NotRequired[Decision]
    steps: NotRequired[tuple[Step, ...]]
    trained: NotRequired[int]
    shared: NotRequired[int]
    resumed: NotRequired[int]
    workers: NotRequired[int]
    unsaved: NotRequired[str]
    student: NotRequired[str]


class Miss(TypedDict):
    """By how much a trial was too large."""

    limit: str
    slack: float


class TrialEnded(TypedDict):
    """A trial came to its end."""

    trial: str
    status: Status
    reason: str | None
    cause: NotRequired[str]
    miss: NotRequired[Miss]


class Begun(TypedDict):
    """Work began, with which the search might end."""

    trial: str
    rung: int
    work: str | None
    kills: int


class Lost(TypedDict):
    """Work was lost."""

    trial: str
    trained: int


class Kept(TypedDict):
    """A student was kept short of the end."""

    trial: str
    kept: bool | None
    trained: NotRequired[int]
    seconds: NotRequired[Numbers]
    tokens: NotRequired[int]
    student: NotRequired[str | None]


class Unevaluated(TypedDict):
    """A trained student could not be evaluated under a deployment."""

    trial: str
    deployment: str
    reason: NotRequired[str]


class Retry(TypedDict):
    """Work was given out once more."""

    trial: str
    rung: int
    deployment: str | None
    cause: NotRequired[str]


class Collected(TypedDict):
    """Checkpoints were removed."""

    checkpoints: NotRequired[tuple[str, ...]]
    bytes: NotRequired[int]


class StudentsCollected(TypedDict):
    """Students were removed."""

    trials: tuple[str, ...]
    bytes: NotRequired[int]


# What is needed beside that to go on with a run.
_RESUMED = {"trial": ("number", "kind", "name", "strategy", "seed"), "rung": ("seconds",), "session": ("time",)}
EVENTS: Mapping[str, Any] = {
    "session": Session,
    "ended": Ended,
    "teacher": TeacherScored,
    "trial": Entered,
    "rung": Reached,
    "status": TrialEnded,
    "begun": Begun,
    "lost": Lost,
    "kept": Kept,
    "unevaluated": Unevaluated,
    "retry": Retry,
    "collected": Collected,
    "students-collected": StudentsCollected,
}
"""What events hold, by kind; those of a later version are left alone. A row is held to `Row`."""


class Opening(TypedDict):
    """A line of the ledger of opened test splits."""

    run: str
    data: str
    time: NotRequired[str]


def check_opening(opening: Mapping[str, Any]) -> None:
    """Holds a line of the ledger of opened test splits to what it must have.

    Raises:
        InputError: Says what is wrong.
    """
    check_typed(opening, Opening, "the opening")


def check_event(event: Mapping[str, Any]) -> Row | None:
    """Holds one event of a run's log to what its kind must have, and gives the row that it holds.

    Raises:
        InputError: Says what is wrong.
    """
    kind: Any = event.get("event")
    check_typed(kind, str, "event")
    check_typed(event.get("time", 0.0), float, "time")
    if kind == "row" or (kind == "test" and "row" in event):
        check_typed(event.get("row"), Mapping[str, Any], "row")
        row = Row.from_json(event["row"])
        _check_trial(row.trial)
        return row
    check_typed(event, EVENTS.get(kind, dict[str, Any]), kind)
    if "trial" in event and kind in EVENTS:
        _check_trial(event["trial"])
    if kind == "trial" and "strategy" in event:
        Strategy.from_json(event["strategy"])
    return None


def _check_trial(name: str) -> None:
    if not _TRIAL.match(name):
        raise InputError(f"trial must be the name of one, like t003, not {name!r}")


def check_log(events: Iterable[Mapping[str, Any]], rungs: int, *, whole: bool = False) -> None:
    """Holds the events of a log to each other: what they tell of is known, and of a rung that the plan has.

    Args:
        events: Each as `check_event` has it.
        rungs: How many the plan has.
        whole: Whether the run is to go on, which needs all of them.

    Raises:
        InputError: Says what does not fit together.
    """
    known: set[str] = set()
    for event in events:
        missing = [name for name in _RESUMED.get(event["event"], ()) if whole and name not in event]
        if missing:
            raise InputError(f"an event {event['event']!r} of it lacks {', '.join(missing)}")
        if event["event"] == "trial":
            known.add(event["trial"])
        elif event["event"] in EVENTS:
            for name in (event["trial"],) if "trial" in event else event.get("trials", ()):
                if name not in known:
                    raise InputError(f"it tells of the trial {name!r}, which it has not told to begin")
            if not 0 <= event.get("rung", 0) < rungs and event["event"] == "rung":
                raise InputError(f"it tells of rung {event['rung']}, of which the plan has {rungs}")


def _has(found: Any, name: str) -> bool:
    first, _, rest = name.partition(".")
    return first in found and (not rest or _has(found[first], rest))


def _check_plan(plan: Plan) -> None:
    """Refuses a plan that nobody made: what is divided by, and indexed, is there."""
    least = {"trials": 0, "tokens": 1, "sequence_length": 1, "batch_tokens": 1, "eval_tokens": 1, "rung_eval_tokens": 1}
    least |= {"test_tokens": 1, "workers": 1, "threads": 1, "processes": 1, "micro_batch": 1, "warmup_tokens": 0}
    for name, value in least.items():
        if getattr(plan, name) < value:
            raise InputError(f"plan.{name} must be {value} or more, not {getattr(plan, name)}")
    rungs = plan.rungs
    if not rungs or list(rungs) != sorted(set(rungs)) or rungs[0] < 1 or rungs[-1] != plan.tokens:
        raise InputError(f"plan.rungs must rise to the plan's {plan.tokens} tokens, not {list(rungs)}")
    if len(plan.keep) != len(rungs) - 1 or not 0 <= plan.decay <= 1 or min(plan.lengths, default=0) <= 0:
        raise InputError("plan.keep, plan.decay and plan.lengths do not go with its rungs")


def read_search(path: Path, *needed: str) -> dict[str, Any]:
    """A run's `search.json`, each field held to what it must be.

    Args:
        path: The file.
        needed: Fields that must be there, like "metric" or "teacher.name".

    Raises:
        InputError: Names the file, and what is wrong with it.
    """
    found = read_json(path)
    version = found.get("schema_version", SCHEMA_VERSION)
    try:
        check_typed(version, int, "schema_version")
        if version > SCHEMA_VERSION:
            raise InputError(
                f"it is of version {version}, and this autodistill reads up to {SCHEMA_VERSION}: upgrade it"
            )
        check_typed(found, Search, "search")
        check_typed(found.get("plan", {}), Plan, "search.plan", whole="plan" in needed)
        missing = [name for name in (*needed, *(_GAINS if "exported" in found else ())) if not _has(found, name)]
        if missing:
            raise InputError(f"search lacks {', '.join(missing)}")
        if "budget" in found:
            read_budget(found["budget"])
        if "plan" in needed:
            _check_plan(Plan.from_json(found["plan"]))
        if "space_definition" in needed:
            Space.stored(found["space_definition"])
    except (InputError, ValueError, OverflowError) as error:
        raise InputError(f"{path} is not what a search writes: {error}; restore it, or leave that run out") from None
    return found
