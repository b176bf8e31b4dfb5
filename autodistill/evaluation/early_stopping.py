"""Whether a trial is certain to miss its rung's places before all of its evaluation is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.evaluation.base import Measurement
from autodistill.evaluation.statistics import t_quantile

PARTS = 4
"""An evaluation at a rung is read in so many parts, and looked at after each but the last."""
WRONG = 1e-3
"""The probability, of a trial as good as the bar's, that it is held for certain to fall short at any of the looks."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What a trial must reach to go on from a rung: the last that holds a place there, of those that reported so far.

    Attributes:
        trial: Its id.
        value: Of the metric, over all that an evaluation there reads.
        looks: The metric's documents, as `Measurement.documents`, after each part that is read; the last is of all.
    """

    trial: str
    value: float
    looks: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What an evaluation at a rung read.

    Attributes:
        unit: What the metric is a mean of: "tokens" or "questions".
        read, of: How many of them were read, and there are.
        looks: As those of a `Bar`; none where the evaluation ended early, which is nobody's bar.
        bar: The trial that this one is certain to fall short of, so that it ended early; None where all was read.
        estimate: What the metric then is taken to be over all of them; None where all was read.
    """

    unit: str
    read: int
    of: int
    looks: tuple[Mapping[str, Any], ...] = ()
    bar: str | None = None
    estimate: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"looks": list(self.looks)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reading:
        """Reads what `to_json` wrote."""
        return cls(**(dict(data) | {"looks": tuple(data["looks"])}))


def ends(count: int, least: int = 1) -> tuple[int, ...]:
    """How many of `count` items have been read after each of `PARTS` parts: quarters of them, in whole passes.

    Args:
        count: Of the items.
        least: Items of a pass. A part may have none, where all were in passes before it.
    """
    passes = -(-count // least)
    return tuple(min(count, least * -(-passes * part // PARTS)) for part in range(1, PARTS + 1))


def order(count: int) -> npt.NDArray[np.int64]:
    """The order that `count` questions are read in: at random, since sources may be sorted, and always the same."""
    return np.random.default_rng(0).permutation(count)


def counted(documents: Mapping[str, Any]) -> int:
    """How many values documents have together."""
    return int(sum(documents["count"]))


def expected(found: Measurement, bar: Bar, look: int) -> float | None:
    """What a trial's metric is taken to be over all, where it is certain to fall short of the bar; else None.

    It is so in either of two ways. What is unread cannot make up for it, were every value of it the best there is
    (`Measurement.bound`). Or the difference to the bar, paired on what was read, is as far below 0 as chance hardly
    makes it: by Student's t of its mean over clustered documents, and by the exact sign test of McNemar (Psychometrika
    12, 1947) on the documents that differ. t is for the sizes of differences, with the sandwich estimator of
    `statistics.clustered_mean` and G - 1 degrees of freedom; of documents that are few, or of differences of one size,
    its own error is too small, and the signs need twelve that differ at the least. Both are to hold at a probability of
    `WRONG` over the number of looks (Bonferroni).

    The estimate is the bar's value and the paired difference (a control variate), on the footing of all that others
    read: that the part read was easy does not raise it, and it is always worse than the bar.

    Args:
        found: The metric, over what was read.
        bar: What is to be reached.
        look: Number of the part that was read last, from 0.
    """
    if look >= len(bar.looks) - 1:
        return None
    mine, theirs, whole = found.documents, bar.looks[look], bar.looks[-1]
    same = bool(mine) and all(mine[key] == theirs.get(key) for key in ("ids", "count"))
    if not same or counted(mine) == counted(whole):
        return None
    sign = 1.0 if found.direction == "max" else -1.0
    counts = np.array(mine["count"], float)
    gaps = sign * (np.array(mine["sum"], float) - np.array(theirs["sum"], float))
    if not np.isfinite(gaps).all():
        return None
    if not (_out_of_reach(found, whole, sign) or _below(gaps, counts, WRONG / (len(bar.looks) - 1))):
        return None
    gap = sign * float(gaps.sum() / counts.sum())
    if found.unit == "perplexity":  # whose documents are of its logarithm
        return bar.value * math.exp(gap)
    # Where the part read is one that the bar's trial did better in than in the rest, no share is below 0.
    return max(0.0, bar.value + gap) if found.unit == "fraction" else bar.value + gap


def _out_of_reach(found: Measurement, whole: Mapping[str, Any], sign: float) -> bool:
    """Whether what is unread cannot bring the mean to that of the whole of the bar, whatever it is."""
    if found.bound is None:
        return False
    unread = counted(whole) - counted(found.documents)
    most = sign * (sum(found.documents["sum"]) + found.bound * unread)
    # Sums that are not of whole values are stored rounded to 6 digits.
    rounded = 0.0 if all(isinstance(one, int) for one in whole["sum"]) else 1e-6 * len(whole["sum"])
    return most + rounded < sign * sum(whole["sum"])


def _below(gaps: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], wrong: float) -> bool:
    """Whether a mean difference is below 0, but for so small a probability of as much by chance.

    Args:
        gaps: [documents], what each adds to the difference; more is better.
        counts: [documents], values in each.
        wrong: The probability.
    """
    clusters = len(gaps)
    if clusters < 2 or _signs(int((gaps > 0).sum()), int((gaps != 0).sum())) > wrong:
        return False
    mean = gaps.sum() / counts.sum()
    spread = math.sqrt(clusters / (clusters - 1) * float(np.sum((gaps - mean * counts) ** 2))) / counts.sum()
    return bool(mean + t_quantile(1 - 2 * wrong, clusters - 1) * spread < 0)


def _signs(better: int, differing: int) -> float:
    """The probability that of so many fair coins no more than `better` show heads."""
    whole = math.lgamma(differing + 1) - differing * math.log(2)
    return sum(
        math.exp(whole - math.lgamma(heads + 1) - math.lgamma(differing - heads + 1)) for heads in range(better + 1)
    )
