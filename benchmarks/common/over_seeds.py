"""Statistics over seeds for the benchmarks: means with standard errors, and differences paired by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# Student's t by number of values: beyond this ratio of mean to standard error, chance is less likely than 5%.
_CLEAR = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def error(values: Sequence[float]) -> float:
    """Return the standard error of the mean, or NaN for one value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def mean(values: Sequence[float], digits: int = 4, *, factor: float = 1.0, sign: bool = False) -> str:
    """Return the mean and its standard error as text.

    Args:
        values: One value for each seed.
        digits: Digits after the point.
        factor: Multiplies the figures that are shown; 100 for percent.
        sign: Whether a plus is shown.
    """
    shown = f"{factor * float(np.mean(values)):{'+' if sign else ''}.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ± {factor * error(values):.{digits}f}"


def paired(found: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """Return the differences by seed from another case, for the seeds that both have."""
    return [found[seed] - base[seed] for seed in sorted(found.keys() & base.keys())]


def is_clear(values: Sequence[float]) -> bool:
    """Return whether chance explains a mean of differences with a probability below 5%, by Student's t."""
    return len(values) > 1 and abs(float(np.mean(values))) > _CLEAR.get(len(values), 2.0) * error(values)


def below(values: Sequence[float], bound: float) -> bool:
    """Return whether a mean is below a bound by more than chance, as judged by `is_clear`."""
    return float(np.mean(values)) < bound and is_clear([value - bound for value in values])
