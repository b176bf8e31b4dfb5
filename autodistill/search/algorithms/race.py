"""Which trials of a race are clearly behind the best: paired differences of likelihood by document."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autodistill.runs.results.differences import paired, paired_difference
from autodistill.runs.results.row import Row

CLEAR = 2.5
"""Standard errors of a paired difference beyond which a trial is out. There are so many because the best of a few is
compared with the others, and each is tested more than once."""


def clearly_behind(rows: Mapping[str, Row], figure: str) -> dict[str, tuple[float, float]]:
    """Return how far trials are clearly behind the best of them, and the standard error of each gap.

    Args:
        rows: The row of each trial at one rung, all of the same documents.
        figure: A mean that is better when lower, with sums by document in the rows.

    Returns:
        Gap and error per token, in the unit of the sums (nats for a perplexity). A trial that cannot be paired is not
        behind.
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
