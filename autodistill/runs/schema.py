"""Declarations of a run's records, and the checks of `search.json` and the log against them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from autodistill.distillation.training.plan import Plan
from autodistill.errors import InputError
from autodistill.evaluation.base import Direction
from autodistill.hardware.budget import read_budget
from autodistill.runs.events import KINDS, Numbers
from autodistill.runs.results.gains import Gain
from autodistill.strategy.space import Space
from autodistill.utils.json_files import read_json
from autodistill.utils.typed_data import check_typed

_VERSION = 1  # the newest version of `search.json` that this code reads

# Fields about an exported row. Either all of them are there, or none.
_GAINS = ("gain_over_untrained", "gain_over_baseline", "gain_unit")


class Source(TypedDict):
    """A teacher, or data, of a run."""

    name: NotRequired[str]
    reference: NotRequired[str]
    fingerprint: NotRequired[str]
    revision: NotRequired[str | None]
    quantised: NotRequired[str | None]
    tokens: NotRequired[Mapping[str, int]]


class Asked(TypedDict, total=False):
    """The tasks and the command with which a run measures further figures in addition to its metric."""

    tasks: tuple[str, ...]
    fingerprints: Mapping[str, str]
    command: str | None
    command_direction: Direction | None
    command_seconds: float | None


class Box(TypedDict):
    """A run's time budget."""

    seconds: float | None
    since: float


class Exported(TypedDict):
    """The row that a run exported."""

    row_id: str
    named: str
    trained: bool


class Search(TypedDict):
    """The fields of `search.json`. Each may be missing; `read_search` checks those that its caller needs."""

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
    served_by: NotRequired[str | None]
    candidates: NotRequired[tuple[str, ...]]
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
    plan: NotRequired[Mapping[str, Any]]
    speed: NotRequired[Numbers]
    box: NotRequired[Box]
    licences: NotRequired[Mapping[str, str]]
    versions: NotRequired[Mapping[str, str]]
    code: NotRequired[Mapping[str, Any]]
    machine: NotRequired[Mapping[str, Any]]
    seconds: NotRequired[Numbers]
    notes: NotRequired[tuple[str, ...]]
    saved: NotRequired[Mapping[str, Any]]
    test: NotRequired[tuple[str, ...]]
    exported: NotRequired[Exported]
    gain_over_untrained: NotRequired[Gain | None]
    gain_over_baseline: NotRequired[Gain | None]
    gain_unit: NotRequired[str]


# Fields of events that must also be there to resume a run, by kind of event.
_RESUMED = {"trial": ("number", "kind", "name", "strategy", "seed"), "rung": ("seconds",), "session": ("time",)}


class Opening(TypedDict):
    """A line of the ledger of opened test splits."""

    run: str
    data: str
    time: NotRequired[str]


def check_opening(opening: Mapping[str, Any]) -> None:
    """Check the fields of a line of the ledger of opened test splits.

    Raises:
        InputError: The line is invalid; the message says what is wrong.
    """
    check_typed(opening, Opening, "the opening")


def check_log(events: Iterable[Mapping[str, Any]], rungs: int, *, whole: bool = False) -> None:
    """Check that the events of a log fit together: each trial was added before, and each rung is in the plan.

    Args:
        events: The events as plain data, each as `read_event` takes it.
        rungs: Number of rungs in the plan.
        whole: Whether to check that events have all fields that are needed to resume the run.

    Raises:
        InputError: The events do not fit together; the message says what is wrong.
    """
    known: set[str] = set()
    for event in events:
        missing = [name for name in _RESUMED.get(event["event"], ()) if whole and name not in event]
        if missing:
            raise InputError(f"an event {event['event']!r} of it lacks {', '.join(missing)}")
        if event["event"] == "trial":
            known.add(event["trial"])
        elif event["event"] in KINDS and "row" not in event:
            for name in (event["trial"],) if "trial" in event else event.get("trials", ()):
                if name not in known:
                    raise InputError(f"an event names the trial {name!r}, which did not begin")
            if not 0 <= event.get("rung", 0) < rungs and event["event"] == "rung":
                raise InputError(f"an event is for rung {event['rung']}, but the plan has {rungs} rungs")


def about(search: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a run for a table of rows: metric, teacher, data, budget, machine, code and versions.

    Args:
        search: `search.json`.
    """
    names = ("metric", "direction", "teacher", "data", "budget", "command", "versions", "code", "machine", "licences")
    return {name: search[name] for name in names if name in search}


def _has(found: Any, name: str) -> bool:
    first, _, rest = name.partition(".")
    return first in found and (not rest or _has(found[first], rest))


def _check_plan(plan: Plan) -> None:
    """Refuse an impossible plan, so that later code can divide by its numbers and index its rungs."""
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
    """Read a run's `search.json` and check each field.

    Args:
        path: The file.
        needed: Fields that must be there, like "metric" or "teacher.name".

    Raises:
        InputError: The file is invalid; the message names it and says what is wrong.
    """
    found = read_json(path)
    version = found.get("schema_version", _VERSION)
    try:
        check_typed(version, int, "schema_version")
        if version > _VERSION:
            raise InputError(f"it is of version {version}, and this autodistill reads up to {_VERSION}: upgrade it")
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
