"""Trials that are clearly behind the best. The tests compute the paired differences independently."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from autodistill.runs.results.row import Row
from autodistill.search.algorithms.race import CLEAR, clearly_behind
from autodistill.strategy.deployment import IN_16_BITS

DICE = np.random.default_rng(0)
COUNTS = np.full(40, 50.0)
HARD = DICE.normal(3.0, 1.0, 40)


def row(name: str, means: np.ndarray, ids: range = range(40)) -> Row:
    documents = {
        "ids": list(ids),
        "count": COUNTS[: len(ids)].tolist(),
        "sum": [0.0] * len(ids),
        "others": {"perplexity": {"ids": list(ids), "count": COUNTS.tolist(), "sum": (means * COUNTS).tolist()}},
    }
    return Row(
        row_id=name,
        trial=name,
        kind="student",
        name=name,
        deployment=IN_16_BITS,
        status="stopped",
        feasible=True,
        documents=documents,
    )


def test_a_small_steady_difference_is_clear_though_documents_differ_far_more() -> None:
    steady = HARD + 0.05 + DICE.normal(0, 0.02, 40)
    found = clearly_behind({"best": row("best", HARD), "steady": row("steady", steady)}, "perplexity")
    gap, error = found["steady"]
    assert gap == pytest.approx(np.mean(steady - HARD))
    assert error == pytest.approx(stats.sem(steady - HARD), rel=0.15)
    # An unpaired test cannot tell the two apart.
    assert stats.ttest_ind(HARD, steady).pvalue > 0.5


def test_what_may_be_chance_goes_on() -> None:
    noise = DICE.normal(0, 0.3, 40)
    noise += (0.9 * CLEAR * stats.sem(noise) * 0.5) - noise.mean()
    assert clearly_behind({"a": row("a", HARD), "b": row("b", HARD + noise)}, "perplexity") == {}


def test_one_alone_other_documents_and_missing_figures_are_not_behind() -> None:
    far = HARD + 1.0
    assert clearly_behind({"a": row("a", far)}, "perplexity") == {}
    assert clearly_behind({"a": row("a", HARD), "b": row("b", far, range(1, 41))}, "perplexity") == {}
    assert clearly_behind({"a": row("a", HARD), "b": row("b", far)}, "no such figure") == {}
    assert clearly_behind({"a": row("a", HARD), "b": row("b", far * np.nan)}, "perplexity") == {}
