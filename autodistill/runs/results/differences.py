"""Differences between the exported row and teacher, baseline and others in every figure, paired by document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autodistill.evaluation.statistics import binned_difference, paired_bootstrap
from autodistill.runs.results.leaderboard import DISTILLED
from autodistill.runs.results.row import Row
from autodistill.units import with_error
from autodistill.utils.plain_dataclass import ToJson


@dataclass(frozen=True, kw_only=True)
class Difference(ToJson):
    """The exported row's figure minus that of another row, on the same examples.

    Attributes:
        metric: The figure.
        to: What the other row is: "teacher", "quantised teacher", "baseline" or "untrained student". If it was trained
            on another number of tokens than the exported student, its fidelity is added, as in "baseline at 100%". If
            two rows would have the same name, their deployments are added, as in "teacher as gguf-f16".
        difference, stderr: In `unit`. The error is bootstrapped by document, and None for a single document.
        unit: "" if it is the figure's own unit. For a perplexity it is nats, the unit of its logarithm.
        documents: Number of documents.
    """

    metric: str
    to: str
    difference: float
    stderr: float | None
    unit: str
    documents: int


def paired(row: Row, metric: str) -> Mapping[str, Any] | None:
    """Return ids, counts and sums by document for one of a row's figures, or None if the row has none.

    A mean has them as `sum`, and the test split's "ece" as `bins`, as in `evaluation.base.Measurement`.
    """
    data = row.documents
    if data is None:
        return None
    found: Mapping[str, Any] | None = data if data.get("metric", "accuracy") == metric else None
    return found or data.get("others", {}).get(metric)


def differences(rows: Sequence[Row], exported: str | None = None) -> list[Difference]:
    """Return the differences between the exported row and each other row, in every figure that both have by document.

    Args:
        rows: Rows of the test split, including the exported one.
        exported: Id of the exported row on the validation split. By default, the first "student" is the exported row,
            or else the first "baseline".
    """
    found = next((row for kind in DISTILLED for row in rows if row.kind == kind), None)
    if exported is not None:
        found = next((row for row in rows if row.row_id == f"{exported}-test"), None)
    if found is None or found.documents is None:
        return []
    metrics = [found.documents.get("metric", "accuracy"), *found.documents.get("others", {})]
    others = _titled([row for row in rows if row is not found], found)
    made = (_difference(metric, title, found, row) for metric in metrics for title, row in others)
    return [item for item in made if item is not None]


def paired_difference(
    mine: Mapping[str, Any] | None, theirs: Mapping[str, Any] | None
) -> tuple[float, float | None] | None:
    """Return the difference `mine` - `theirs` of two rows' figures and its standard error.

    Args:
        mine, theirs: The figure of each row by document, as returned by `paired`.

    Returns:
        None if the figures are not of the same tokens, or if one row has means by document and the other has bins. The
        error is None for a single document.
    """
    if not mine or not theirs or mine["ids"] != theirs["ids"] or mine["count"] != theirs["count"]:
        return None
    if ("bins" in mine) != ("bins" in theirs):
        return None
    counts = np.asarray(mine["count"], np.float64)
    if "bins" in mine:
        return binned_difference(np.asarray(mine["bins"], np.float64), np.asarray(theirs["bins"], np.float64), counts)
    gaps = np.asarray(mine["sum"], np.float64) - np.asarray(theirs["sum"], np.float64)
    values, errors = paired_bootstrap(gaps[None], counts)
    return float(values[0]), float(errors[0]) if len(counts) > 1 else None


def _difference(metric: str, title: str, found: Row, other: Row) -> Difference | None:
    mine = paired(found, metric)
    made = paired_difference(mine, paired(other, metric))
    if mine is None or made is None:
        return None
    value, stderr = made
    return Difference(
        metric=metric,
        to=title,
        difference=value,
        stderr=stderr,
        unit=str(mine.get("unit", "")),
        documents=len(mine["count"]),
    )


def _titled(rows: Sequence[Row], found: Row) -> list[tuple[str, Row]]:
    """Return the rows with their titles; titles that are equal get the deployment added."""
    titles = [_title(row, found) for row in rows]
    return [
        (f"{title} as {row.deployment_name}" if titles.count(title) > 1 else title, row)
        for title, row in zip(titles, rows, strict=True)
    ]


def _title(row: Row, found: Row) -> str:
    if row.kind == "teacher":
        return "teacher" if row.deployment.bits == 16 else "quantised teacher"
    if row.kind == "initial":
        return "untrained student"
    return row.kind if row.train_tokens == found.train_tokens else f"{row.kind} at {row.fidelity or 0.0:.0%}"


def shown(items: Iterable[Difference]) -> list[list[str]]:
    """Return the lines of a table: for each figure, its difference to each other row, with the error."""
    table: dict[str, dict[str, str]] = {}
    titles: dict[str, None] = {}
    for item in items:
        titles[item.to] = None
        name = f"{item.metric} [{item.unit}]" if item.unit else item.metric
        table.setdefault(name, {})[item.to] = with_error(item.difference, item.stderr, "+.4f")
    lines = [[name, *(cells.get(title, "-") for title in titles)] for name, cells in table.items()]
    return [["exported less", *titles], *lines] if lines else []
