"""Cases of which `make check` runs a share; `make slow` runs the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], every: int = 2) -> list[Any]:
    """Return parameters of a test. All but the first, and each `every`-th after it, are slow.

    Args:
        cases: Values, or tuples of values for several names.
        every: 2 for each second case.
    """
    found: list[Any] = []
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        found.append(case if number % every == 0 else pytest.param(*values, marks=pytest.mark.slow))
    return found
