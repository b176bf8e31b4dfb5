"""The evaluators and objectives that a request asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autodistill import plugins
from autodistill.data.task_files import read_tasks
from autodistill.errors import InputError
from autodistill.evaluation.base import Evaluator, load_evaluator
from autodistill.evaluators.tasks.command import NAME as COMMAND
from autodistill.evaluators.tasks.command import Command, parse_command
from autodistill.evaluators.tasks.lm_eval import PREFIX, Harness, find_task
from autodistill.evaluators.tasks.task import evaluator_of
from autodistill.options import parsed
from autodistill.runs.results.objectives import OBJECTIVES, Objective, objectives_of, parse_objectives
from autodistill.search.request.references import absolute, check_there
from autodistill.search.request.registered import check_again, check_divergences, sources
from autodistill.search.request.request import DEFAULT_METRIC, SearchRequest, joined
from autodistill.strategy.divergence import Divergence

# What evaluators of ranking metrics may need. A ranking metric is measured at each rung, without an exported file.
_RANKING = ("scores", "answers", "student")


@dataclass(frozen=True, kw_only=True)
class RequestedMetrics:
    """What is measured in addition to the usual, because a request asks for it.

    Attributes:
        evaluators: Names of installed evaluators, and evaluators made by the request or registered in the session.
        written: The objective for which the model writes answers to questions, or "".
        record: What the evaluators were made from, for `search.json`.
        divergences: Divergences registered in the Python session that a strategy may use.
    """

    evaluators: tuple[str | Evaluator, ...]
    written: str
    record: Mapping[str, Any]
    divergences: tuple[Divergence, ...] = ()

    def with_divergences(self, used: Iterable[str]) -> RequestedMetrics:
        """Return a copy that includes those of the used divergences that are registered in this session.

        Raises:
            InputError: See `check_divergences`.
        """
        found = check_divergences(used)
        written = sources("divergences", used)
        record = {**self.record, "divergences": written} if written else self.record
        return replace(self, divergences=found, record=record)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that evaluators of a student read or run, as paths on this machine."""
        return tuple(file for item in self.evaluators if isinstance(item, Command | Harness) for file in item.files)


def requested_metrics(
    request: SearchRequest, known: Mapping[str, Any]
) -> tuple[RequestedMetrics, tuple[Objective, ...]]:
    """Return what a request wants measured, and the objectives that the search is judged by.

    Objectives are those asked for, or those of the resumed run, or the default metric.

    Args:
        request: What is asked.
        known: The content of `search.json` of a resumed run, empty for a new run.

    Raises:
        InputError: A task file, a command, a metric or an objective cannot be used.
    """
    before_this = known.get("asked", {})
    check_again(before_this, "resume")
    folder = known.get("folder", "")  # where the run was begun
    own, record = _own(request, before_this, folder)
    metric = request.metric
    if request.objectives is None:
        before = [one.name for one in objectives_of(known)] if known else []
        default = COMMAND if record["command"] is not None else DEFAULT_METRIC
        text = metric if metric is not None else ",".join(before) or default
    else:
        text = joined(request.objectives) or ""
    names = [name.strip() for name in text.split(",")]
    if request.objectives is not None and metric not in (None, names[0]):
        raise InputError(
            f"--metric {metric} contradicts --objectives {text}, whose first one ranks: leave --metric out"
        )
    asked_anew = request.metric is not None or request.objectives is not None
    own += [find_task(name, "" if asked_anew else folder) for name in names if name.startswith(PREFIX)]
    made = {name: quantity.direction for item in own for name, quantity in item.measures.items()}
    further = _further(request, before_this)
    ranking = _installed([name for name in names if name not in made and not _follows_from_shape(name)])
    wanted = {item.name: item for item in (*ranking, *further)}
    given = sources("evaluators", wanted)
    _check_given([wanted[name] for name in given])
    if further or given:
        record["evaluators"] = {name: given.get(name) for name in (*given, *(item.name for item in further))}
    installed = [item for name, item in wanted.items() if name not in given]
    own += [wanted[name] for name in given]
    ways = {name: quantity.direction for item in (*own, *installed) for name, quantity in item.measures.items()}
    if metric is not None and metric not in ways:
        known_ones = ", ".join(sorted({*made, *(name for item in _ranking() for name in item.measures)}))
        raise InputError(
            f"{metric!r} is no metric that can rank; the metrics are {known_ones}, task:NAME of a --task, and "
            "lm-eval:TASK"
        )
    asked = RequestedMetrics(
        evaluators=(*(item.name for item in installed), *own),
        written=next((item.name for item in installed if item.needs == "answers"), ""),
        record=record,
    )
    return asked, parse_objectives(text, ways)


def content(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `RequestedMetrics.record` without the paths of task files, because the same files may have moved."""
    return {name: value for name, value in record.items() if name != "tasks"}


def moved(record: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a note if the same task files are now in another place.

    Args:
        record: The record of `RequestedMetrics`.
        before: The record in the run's `search.json`.
    """
    now, then = record["tasks"], before.get("tasks", record["tasks"])
    return () if now == then else (f"the task files are read from {', '.join(now)}; before, from {', '.join(then)}",)


def _own(request: SearchRequest, before: Mapping[str, Any], folder: str) -> tuple[list[Evaluator], dict[str, Any]]:
    """Return the evaluators of task files and of a command, and their record for `search.json`."""
    files = tuple(map(Path, before.get("tasks", ()) if request.task is None else request.task))
    command = request.metric_command or before.get("command")
    direction = request.metric_direction or before.get("command_direction") or "max"
    seconds = parsed(request.metric_timeout) or before.get("command_seconds") or 600.0
    if command is None and (request.metric_direction or request.metric_timeout):
        raise InputError("--metric-direction and --metric-timeout are those of a command: give --metric-command")
    for file in files if request.task is None else ():
        check_there(str(file), "task file", "--task")
    tasks = [task for file in files for task in read_tasks(file)]
    doubled = next((task.name for task in tasks if sum(other.name == task.name for other in tasks) > 1), None)
    if doubled is not None:
        raise InputError(f"two of the task files have a task {doubled}: rename one")
    own: list[Evaluator] = [evaluator_of(task) for task in tasks]
    if command is not None:
        own.append(parse_command(command, direction, seconds, "" if request.metric_command else folder))
    return own, {
        "tasks": [absolute(str(file)) for file in files],
        "fingerprints": {task.name: task.fingerprint for task in tasks},
        "command": command,
        "command_direction": direction,
        "command_seconds": seconds,
    }


def _further(request: SearchRequest, before: Mapping[str, Any]) -> list[Evaluator]:
    """Return the evaluators that are asked for by name, or those of the resumed run."""
    asked = tuple(before.get("evaluators", ())) if request.evaluators is None else request.evaluators
    found = [load_evaluator(str(name)) for name in asked]
    late = next((item.name for item in found if item.needs == "artifact"), None)
    if late is not None:
        raise InputError(f"the evaluator {late} reads an exported file, and there is none at a rung: leave it out")
    return found


def _check_given(registered: Sequence[Evaluator]) -> None:
    """Refuse a registered evaluator that measures what an installed one measures."""
    if not registered:
        return
    here = plugins.registered("evaluators")
    installed = (load_evaluator(name) for name in plugins.names("evaluators") if name not in here)
    theirs = {figure: item.name for item in installed for figure in item.measures}
    taken = next((figure for item in registered for figure in item.measures if figure in theirs), None)
    if taken is not None:
        raise InputError(f"the evaluator {theirs[taken]} measures {taken} already: give yours another name")


def _follows_from_shape(name: str) -> bool:
    """Return whether an objective follows from shape and deployment alone, so that no evaluator measures it."""
    return name in OBJECTIVES and not OBJECTIVES[name].trained


def _ranking() -> Iterator[Evaluator]:
    found = (load_evaluator(name) for name in plugins.names("evaluators"))
    return (item for item in found if item.needs in _RANKING)


def _installed(metrics: Sequence[str]) -> list[Evaluator]:
    """Return the installed evaluators that measure these metrics. Unknown metrics are ignored.

    Most evaluators measure a metric of their own name, so these are tried first.
    """
    names = plugins.names("evaluators")
    found = [load_evaluator(name) for name in metrics if name in names]
    found = [item for item in found if item.needs in _RANKING and item.name in item.measures]
    left = set(metrics) - {name for item in found for name in item.measures}
    return [*found, *(item for item in (_ranking() if left else ()) if left & set(item.measures))]
