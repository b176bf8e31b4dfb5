"""Which trials of a race are clearly behind: paired differences of likelihood by document, against the best."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autodistill.runs.results.differences import paired, paired_difference
from autodistill.runs.results.row import Row

CLEAR = 2.5
"""Standard errors of a paired difference beyond which a trial is out: the best of a few is compared with each other,
and each is looked at more than once."""


def clearly_behind(rows: Mapping[str, Row], figure: str) -> dict[str, tuple[float, float]]:
    """Return how far trials are clearly behind the best of them, and the standard error of that.

    Args:
        rows: Of each trial the row at one rung, all of the same documents.
        figure: A mean, of which less is better, whose sums by document the rows have.

    Returns:
        In the unit of the sums, a token: nats, of a perplexity. What cannot be paired is not behind.
    """
    found = {name: paired(row, figure) for name, row in rows.items()}
    known = {name: data for name, data in found.items() if data is not None and "sum" in data}
    means = {name: sum(data["sum"]) / sum(data["count"]) for name, data in known.items()}
    if len(means) < 2 or not all(map(math.isfinite, means.values())):
        return {}
    best = min(means, key=lambda name: (means[name], name))
    behind = {}
    for name, data in known.items():
        gap, error = paired_difference(data, known[best]) or (0.0, None)
        if name != best and error is not None and gap > CLEAR * error:
            behind[name] = (gap, error)
    return behind
