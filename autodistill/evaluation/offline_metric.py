"""Runs an `evaluate.Metric` in memory: nothing is fetched, nothing is left behind."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import evaluate
import numpy.typing as npt


def compute(metric: type[evaluate.Metric], **columns: npt.NDArray[Any]) -> dict[str, Any]:
    """Makes the metric, gives it the columns that its features name, and returns what it computes.

    A metric always makes a folder for its cache, even where it keeps its data in memory; this one is gone afterwards.

    Args:
        metric: The class.
        columns: Arrays of equal length [n].
    """
    with TemporaryDirectory(prefix="autodistill-metric-") as folder:
        result: dict[str, Any] = metric(cache_dir=folder, keep_in_memory=True).compute(**columns)
    return result
