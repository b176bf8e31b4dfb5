"""The objectives of a search: their names, the figures of rows that they mean, and which direction is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from autodistill.errors import InputError
from autodistill.evaluation.base import Direction
from autodistill.runs.results.leaderboard import DISTILLED, UNTRAINED, Ranked, pareto
from autodistill.runs.results.row import Row

# A metric that ranks is measured at every rung, so it must be computable on the simulated student alone.
METRICS: Mapping[str, Direction] = {
    "accuracy": "max",
    "agreement": "max",
    "kl": "min",
    "ece": "min",
    "perplexity": "min",
    "exact_match": "max",
}
PREDICTED_LATENCY = "latency_ms_predicted"
"""The row's figure with the 95th percentile of decode time per token, predicted by a roofline, in milliseconds."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A figure that a search improves.

    Attributes:
        name: The name that a person types.
        figure: Name of the figure in a row.
        direction: Whether more or less of it is better.
        trained: Whether it is known only after training. Other objectives follow from the student's shape and packing.
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
    """Read the names of objectives, separated by commas. The first one ranks rows and chooses what is exported.

    Args:
        text: The names.
        own: Directions of further metrics, from a search's tasks and command or from installed evaluators.

    Raises:
        InputError: A name has no known direction or is given twice, or the first one does not measure quality.
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
    """Return the objectives of a run, from its `search.json`; by default its metric alone."""
    known = OBJECTIVES | _metrics(search.get("directions", {}))
    names = search.get("objectives", [search.get("metric", "accuracy")])
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(
            f"the run was judged by {unknown[0]!r}, but its search.json has no direction for it: restore it"
        )
    return tuple(known[name] for name in names)


def front(rows: Sequence[Row], objectives: Sequence[Objective]) -> list[Row]:
    """Return the rows that no other row beats in one objective without losing in another, by the first objective.

    Candidates are students, baselines and untrained rows of full fidelity that fit the budget and have all objectives.
    Memory is the measured value if there is one. Latencies are always predicted ones, so that they are comparable.
    """
    candidates = [row for row in rows if row.kind in (*DISTILLED, *UNTRAINED) and row.full and row.feasible]
    return pareto(candidates, {objective.figure: objective.direction for objective in objectives})


def with_front(ranked: Sequence[Ranked], objectives: Sequence[Objective]) -> list[Ranked]:
    """Return the leaderboard with the rows of the Pareto front marked, if there are several objectives."""
    if len(objectives) < 2:
        return list(ranked)
    members = {row.row_id for row in front([one.row for one in ranked], objectives)}
    return [replace(one, front=one.row.row_id in members) for one in ranked]
