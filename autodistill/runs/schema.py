"""What a run's records hold, each as one declaration, and `search.json` and the log held to these when read."""

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

_VERSION = 1  # of `search.json`, up to which it is read

# What is told of an exported row, all of it or nothing.
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
    """What a run measures beside its metric, and by which it is measured."""

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


# What is needed beside that to go on with a run.
_RESUMED = {"trial": ("number", "kind", "name", "strategy", "seed"), "rung": ("seconds",), "session": ("time",)}


class Opening(TypedDict):
    """A line of the ledger of opened test splits."""

    run: str
    data: str
    time: NotRequired[str]


def check_opening(opening: Mapping[str, Any]) -> None:
    """Hold a line of the ledger of opened test splits to what it must have.

    Raises:
        InputError: Says what is wrong.
    """
    check_typed(opening, Opening, "the opening")


def check_log(events: Iterable[Mapping[str, Any]], rungs: int, *, whole: bool = False) -> None:
    """Hold the events of a log to each other: what they tell of is known, and of a rung that the plan has.

    Args:
        events: Each as `read_event` has it.
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
        elif event["event"] in KINDS and "row" not in event:
            for name in (event["trial"],) if "trial" in event else event.get("trials", ()):
                if name not in known:
                    raise InputError(f"it tells of the trial {name!r}, which it has not told to begin")
            if not 0 <= event.get("rung", 0) < rungs and event["event"] == "rung":
                raise InputError(f"it tells of rung {event['rung']}, of which the plan has {rungs}")


def about(search: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a table says of its run: what ranked, and what was measured on what, and by which code.

    Args:
        search: `search.json`.
    """
    names = ("metric", "direction", "teacher", "data", "budget", "command", "versions", "code", "machine", "licences")
    return {name: search[name] for name in names if name in search}


def _has(found: Any, name: str) -> bool:
    first, _, rest = name.partition(".")
    return first in found and (not rest or _has(found[first], rest))


def _check_plan(plan: Plan) -> None:
    """Refuse a plan that nobody made: what is divided by, and indexed, is there."""
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
