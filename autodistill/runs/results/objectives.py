"""What a search may be judged by: names, the figures of rows that they stand for, and which way is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autodistill.errors import InputError
from autodistill.evaluation.base import Direction
from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED, Ranked, pareto
from autodistill.runs.results.row import Row

# What may rank is measured at every rung, so it must come from the simulated student alone.
METRICS: Mapping[str, Direction] = {
    "accuracy": "max",
    "agreement": "max",
    "kl": "min",
    "ece": "min",
    "perplexity": "min",
    "exact_match": "max",
}
PREDICTED_LATENCY = "latency_ms_predicted"
"""Under this name a row has the 95th percentile of decode time per token that a roofline predicts, in milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One thing that a search makes better.

    Attributes:
        name: As a person types it.
        figure: Of a row.
        direction: Whether more or less of it is better.
        trained: Whether it is known only of a trained student; the others follow from its shape and packing.
    """

    name: str
    figure: str
    direction: Direction
    trained: bool = False


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        *(Objective(name=name, figure=name, direction=way, trained=True) for name, way in METRICS.items()),
        Objective(name="memory", figure="memory_bytes", direction="min"),
        Objective(name="size", figure="size_bytes", direction="min"),
        Objective(name="latency", figure=PREDICTED_LATENCY, direction="min"),
    )
}


def _metrics(directions: Mapping[str, Direction]) -> dict[str, Objective]:
    return {name: Objective(name=name, figure=name, direction=way, trained=True) for name, way in directions.items()}


def parse_objectives(text: str, own: Mapping[str, Direction] | None = None) -> tuple[Objective, ...]:
    """Read names separated by commas; the first is the metric that ranks, and chooses what is exported.

    Args:
        text: The names.
        own: Further metrics, of a search's tasks and command or of installed evaluators, and their directions.

    Raises:
        InputError: A name without a known direction or given twice, or a first one that no student could be chosen by.
    """
    names = [name.strip() for name in text.split(",")]
    known = OBJECTIVES | _metrics(own or {})
    for name in names:
        if name not in known:
            raise InputError(
                f"--objectives names {name!r}, whose direction is not known: name some of {', '.join(known)}, "
                "separated by commas"
            )
    if len(set(names)) < len(names):
        raise InputError(f"--objectives names one twice ({text}): give each once")
    if not known[names[0]].trained:
        raise InputError(
            f"the first of --objectives chooses what is exported, and {names[0]!r} does not say how well a student "
            f"does: put one of {', '.join(name for name, one in known.items() if one.trained)} first"
        )
    return tuple(known[name] for name in names)


def objectives_of(search: Mapping[str, Any]) -> tuple[Objective, ...]:
    """The objectives of a run, from its `search.json`; one that names none has its metric alone."""
    known = OBJECTIVES | _metrics(search.get("directions", {}))
    names = search.get("objectives", [search.get("metric", "accuracy")])
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"the run was judged by {unknown[0]!r}, of which its search.json has no direction: restore it")
    return tuple(known[name] for name in names)


def front(rows: Sequence[Row], objectives: Sequence[Objective]) -> list[Row]:
    """The rows that no other one beats in one objective without losing in another, ordered by the first one.

    Candidates are students, baselines and what needs no training, at full fidelity, that keep to the budget and lack no
    objective. A memory that was measured counts as it was measured; latencies are all predicted, so that they compare.
    """
    candidates = [row for row in rows if row.kind in (*DISTILLED, *UNTRAINED) and row.full and row.feasible]
    return pareto(candidates, {objective.figure: objective.direction for objective in objectives})


def with_front(ranked: Sequence[Ranked], objectives: Sequence[Objective]) -> list[Ranked]:
    """The leaderboard with the rows of the front marked, where there are several objectives."""
    if len(objectives) < 2:
        return list(ranked)
    members = {row.row_id for row in front([one.row for one in ranked], objectives)}
    return [replace(one, front=one.row.row_id in members) for one in ranked]
