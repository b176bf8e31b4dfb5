"""What the log of a run says about each trial, in a tracker's terms: parameters, metrics by step, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autodistill.hardware.budget import read_budget
from autodistill.runs.events import RowAdded, RowTested, RunEvent, RungReached, TrialAdded, TrialEnded, of_kind, rows_of
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder
from autodistill.utils.hashing import content_hash

# Figures of a step. Others, which a later version may write, are ignored.
_STEP_FIGURES = (
    *("loss", "divergence", "cross_entropy", "alignment", "attention"),
    *("learning_rate", "gradient_norm", "temperature", "tokens_per_second"),
)
_ROW_FIGURES = (
    *("accuracy", "accuracy_stderr", "perplexity", "agreement", "retention", "memory_bytes", "latency_ms"),
    *("size_bytes", "params", "train_tokens", "train_seconds", "fidelity"),
)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured of a trial after a number of tokens.

    Attributes:
        tokens: Tokens that it was trained on by then, which is the step in a tracker.
        time: When it was recorded, in seconds since the epoch.
        values: Finite figures by name, like "train/loss" and "rung/accuracy".
    """

    tokens: int
    time: float
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrackedTrial:
    """One trial, as far as the log describes it.

    Attributes:
        trial: Its id, like "t003"; "teacher" for a student that is served without training.
        title: Its id and its name, for the user.
        began, ended: Times in seconds since the epoch; `ended` is None if it has not ended.
        params: Settings of its strategy by their dotted names, and its seed.
        tags: What it belongs to (run, teacher, data, budget), and how it ended.
        points: Its points by tokens, the fewest first.
        final: Figures of the best of its rows, like "final/accuracy", and those of the test split.
        status: "completed", "stopped", "rejected" or "failed"; None if it has not ended.
    """

    trial: str
    title: str
    began: float
    ended: float | None
    params: Mapping[str, str | float | int | bool]
    tags: Mapping[str, str]
    points: tuple[Point, ...]
    final: Mapping[str, float]
    status: str | None


def identity_of(run: RunFolder) -> str:
    """Return a short hash that differs between runs of the same name.

    Raises:
        InputError: The records of the run cannot be read.
    """
    first = next(iter(run.events.all()), None)
    return content_hash([run.name, first.time if first is not None else None])


def tracked_trials(run: RunFolder) -> list[TrackedTrial]:
    """Read all trials of a run, finished or running, in the order in which they were added. The teacher comes first.

    Raises:
        InputError: The records of the run cannot be read.
    """
    asked = run.read_settings("metric", "direction", "teacher", "data", "budget")
    about = {
        "run": run.name,
        "teacher": str(asked["teacher"].get("name", "")),
        "data": str(asked["data"].get("name", "")),
        "budget": read_budget(asked["budget"]).describe(),
        "metric": str(asked["metric"]),
    }
    events = run.events.all()
    rows = [row for row in rows_of(events, (RowAdded, RowTested)) if row.kind != "initial"]
    added = {trial.trial: trial for trial in of_kind(events, TrialAdded)}
    names = dict.fromkeys([*(row.trial for row in rows if row.kind == "teacher"), *added])
    ends = {end.trial: end for end in of_kind(events, TrialEnded)}
    found = []
    for name in names:
        own = [row for row in rows if row.trial == name]
        best = _best(own, asked["metric"], asked["direction"])
        rungs = [rung for rung in of_kind(events, RungReached) if rung.trial == name]
        end, trial = ends.get(name), added.get(name)
        times = [event.time for event in _of_trial(events, name) if event.time is not None]
        status = "completed" if trial is None else None if end is None else str(end.status)
        tags = (
            about | {"trial": name, "kind": trial.kind if trial else "teacher"} | ({"status": status} if status else {})
        )
        tags |= {"reason": end.reason} if end is not None and end.reason else {}
        tags |= {"row": best.row_id, "deployment": best.deployment_name} if best is not None else {}
        found.append(
            TrackedTrial(
                trial=name,
                title=f"{name} {trial.name}".strip() if trial else name,
                began=min(times, default=0.0),
                ended=max(times, default=0.0) if status else None,
                params=_params(trial),
                tags=tags,
                points=_points(rungs, asked["metric"]),
                final=_final(best, own),
                status=status,
            )
        )
    return found


def _of_trial(events: Sequence[RunEvent], name: str) -> list[RunEvent]:
    return [event for event in events if getattr(getattr(event, "row", None) or event, "trial", None) == name]


def _best(rows: Sequence[Row], metric: str, direction: Any) -> Row | None:
    """Return the best row by the metric, among those that keep to the budget if there are any."""
    sign = 1.0 if direction == "max" else -1.0
    having = [(row, value) for row in rows if row.split != "test" and (value := row.figure(metric)) is not None]
    return max(having, key=lambda one: (one[0].feasible, one[0].fidelity or 0.0, sign * one[1]), default=(None, 0.0))[0]


def _params(trial: TrialAdded | None) -> dict[str, str | float | int | bool]:
    """Return a trial's settings as a flat mapping. Settings that are None have no effect and are left out."""
    if trial is None:
        return {}
    held = dict(trial.point or {}) if trial.strategy is None else trial.strategy.to_json()
    about = {"seed": trial.seed, "length": trial.length, "parameters": trial.parameters}
    return {
        name: value if isinstance(value, str | float | int | bool) else str(value)
        for name, value in (_flat(held) | about).items()
        if value is not None
    }


def _flat(value: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= _flat(item, f"{under}{name}.") if isinstance(item, Mapping) else {f"{under}{name}": item}
    return found


def _points(rungs: Sequence[RungReached], metric: str) -> tuple[Point, ...]:
    """Return steps and rungs by their tokens. If something was repeated after a crash, the last time counts."""
    found: dict[int, Point] = {}

    def put(tokens: int, time: float | None, values: Mapping[str, Any]) -> None:
        """Add finite values to the point at a number of tokens."""
        finite = {name: float(value) for name, value in values.items() if _is_finite(value)}
        before = found[tokens].values if tokens in found else {}
        if finite:
            found[tokens] = Point(tokens=tokens, time=time or 0.0, values={**before, **finite})

    for rung in rungs:
        for step in rung.steps:
            values: Mapping[str, Any] = step
            if "tokens" in step:
                put(step["tokens"], rung.time, {f"train/{name}": values.get(name) for name in _STEP_FIGURES})
        put(rung.tokens, rung.time, {f"rung/{metric}": rung.value, "rung/judged": rung.judged})
    return tuple(found[tokens] for tokens in sorted(found))


def _final(best: Row | None, rows: Sequence[Row]) -> dict[str, float]:
    named = {} if best is None else {f"final/{name}": best.figure(name) for name in _ROW_FIGURES}
    for row in rows:
        if row.split == "test" and (best is None or row.deployment == best.deployment):
            named |= {f"test/{name}": row.figure(name) for name in ("accuracy", "accuracy_stderr", "perplexity")}
    return {name: float(value) for name, value in named.items() if value is not None}


def _is_finite(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)
