"""Standard errors match closed forms, brute-force draws and simulated documents."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats

from autodistill.evaluation.statistics import (
    binned_difference,
    clustered_bootstrap,
    clustered_mean,
    paired_bootstrap,
    per_document,
    t_quantile,
    widening,
)


def test_independent_values_have_the_ordinary_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=200)
    mean, stderr = clustered_mean(values, np.arange(200, dtype=np.int32))
    assert mean == pytest.approx(np.mean(values))
    assert stderr == pytest.approx(scipy.stats.sem(values))
    assert clustered_mean(values[:9], np.arange(9, dtype=np.int32))[1] == pytest.approx(scipy.stats.sem(values[:9]))


def test_equal_clusters_of_equal_values_have_that_of_their_means() -> None:
    means = np.random.default_rng(1).normal(size=30)
    _, stderr = clustered_mean(np.repeat(means, 7), np.repeat(np.arange(30, dtype=np.int32), 7))
    assert stderr == pytest.approx(scipy.stats.sem(means))


def test_agrees_with_a_bootstrap_over_documents_of_unequal_length() -> None:
    dice = np.random.default_rng(2)
    lengths = dice.integers(20, 60, size=80)
    documents = np.repeat(np.arange(80, dtype=np.int32), lengths)
    correct = dice.random(documents.size) < np.repeat(dice.uniform(0.2, 0.8, size=80), lengths)
    _, stderr = clustered_mean(correct, documents)
    sums = np.bincount(documents, weights=correct)
    draws = dice.integers(0, 80, size=(4000, 80))
    bootstrapped = np.std(sums[draws].sum(axis=1) / lengths[draws].sum(axis=1))
    assert stderr == pytest.approx(bootstrapped, rel=0.05)


def test_quantiles_of_t_are_those_of_published_tables_and_of_scipy() -> None:
    """Two-sided 95% quantiles, from table 26.10 of Abramowitz and Stegun."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980}
    for degrees, value in table.items():
        assert t_quantile(0.95, degrees) == pytest.approx(value, abs=5e-4)
    for degrees in (1, 2, 3, 8, 61, 2000):
        for share in (0.01, 0.5, 0.6827, 0.999):
            assert t_quantile(share, degrees) == pytest.approx(scipy.stats.t.ppf((1 + share) / 2, degrees))
    for share, degrees in ((0.0, 3), (1.0, 3), (0.5, 0)):
        with pytest.raises(ValueError, match="degrees of freedom"):
            t_quantile(share, degrees)


def test_few_clusters_widen_an_error_and_many_do_not() -> None:
    assert [round(widening(clusters), 2) for clusters in (2, 4, 20)] == [1.84, 1.20, 1.03]
    assert widening(5000) == pytest.approx(1, abs=1e-3)


# Lengths of documents of a real validation split, which were few and very different, and others.
SIZES = [(765, 255, 52, 203), (60, 60), (40, 40, 40, 40), tuple(range(20, 120, 10)), (30,) * 19]
DRAWS = 1500


def drawn(sizes: tuple[int, ...], shared: float, seed: int) -> np.ndarray:
    """Draw [draws, values] around 0, with variance 1 within documents and `shared` more between them."""
    dice = np.random.default_rng(seed)
    own = dice.normal(size=(DRAWS, len(sizes))) * np.sqrt(shared)
    return dice.normal(size=(DRAWS, sum(sizes))) + np.repeat(own, sizes, axis=1)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_an_error_of_few_documents_covers_the_mean_as_often_as_it_says(sizes: tuple[int, ...], shared: float) -> None:
    """One error covers 68% and two cover 95%.

    Without the correction for few documents, it is 53% and 80% with the first documents.
    """
    documents = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    found = np.array([clustered_mean(values, documents) for values in drawn(sizes, shared, 5)])
    one, two = ((np.abs(found[:, 0]) <= times * found[:, 1]).mean() for times in (1, 2))
    # If one long document decides the mean, an error that is estimated from four documents is uncertain.
    lopsided = len(set(sizes)) == 4 and shared > 0
    assert (0.45 if lopsided else 0.63) <= one <= 0.84
    assert (0.74 if lopsided else 0.82) <= two


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_equal_models_are_tied_as_often_as_one_error_says(sizes: tuple[int, ...], shared: float) -> None:
    """Plain resampling ties 60% for the first documents, 54% for four equal ones and 40% for two."""
    values = drawn(sizes, shared, 6)
    starts = np.cumsum([0, *sizes[:-1]])
    gaps, errors = paired_bootstrap(np.add.reduceat(values, starts, axis=1), np.array(sizes, float))
    assert 0.58 <= (np.abs(gaps) <= errors).mean() <= 0.78
    assert (np.abs(gaps) <= 2 * errors).mean() >= 0.82


def test_an_error_is_never_less_than_that_of_independent_values_below_twenty_documents() -> None:
    """Documents that happen to agree exactly say nothing about the scatter of their tokens."""
    values = np.tile([0.0, 1.0], 20)
    _, stderr = clustered_mean(values, np.repeat(np.arange(4, dtype=np.int32), 10))
    assert stderr == pytest.approx(scipy.stats.sem(values))
    _, stderr = clustered_mean(values, np.repeat(np.arange(20, dtype=np.int32), 2))
    assert stderr == 0


def test_one_document_has_no_standard_error() -> None:
    assert clustered_mean(np.array([True, False]), np.zeros(2, dtype=np.int32)) == (0.5, None)


def test_no_values_have_no_mean() -> None:
    with pytest.raises(ValueError, match="no values"):
        clustered_mean(np.zeros(0), np.zeros(0, dtype=np.int32))


def test_the_bootstrap_of_a_mean_is_the_closed_form() -> None:
    dice = np.random.default_rng(4)
    documents = np.repeat(np.arange(60, dtype=np.int32), dice.integers(5, 40, size=60))
    values = dice.normal(size=documents.size) + np.repeat(dice.normal(size=60), np.bincount(documents))
    parts = np.column_stack([np.bincount(documents, weights=values), np.bincount(documents)])
    stderr = clustered_bootstrap(lambda sums: sums[:, 0] / sums[:, 1], parts)
    assert stderr == pytest.approx(clustered_mean(values, documents)[1], rel=0.1)
    assert clustered_bootstrap(lambda sums: sums[:, 0], parts[:1]) is None


def test_the_bootstrap_of_few_equal_clusters_is_the_closed_form_too() -> None:
    means = np.array([0.1, 0.5, 0.4, 0.9])
    documents, values = np.repeat(np.arange(4, dtype=np.int32), 25), np.repeat(means, 25)
    stderr = clustered_bootstrap(lambda sums: sums[:, 0] / 100, np.column_stack([25 * means]))
    assert stderr == pytest.approx(clustered_mean(values, documents)[1], rel=0.1)
    assert stderr == pytest.approx(scipy.stats.sem(means) * widening(4), rel=0.1)


def test_sums_by_document() -> None:
    documents = np.array([3, 3, 7], dtype=np.int32)
    assert per_document(np.array([True, True, False]), documents) == {"ids": [3, 7], "count": [2, 1], "sum": [2, 0]}
    assert per_document(np.array([0.1, 0.2, 1e-9]), documents)["sum"] == [0.3, 0.0]


def test_the_bootstrap_agrees_with_brute_force_and_with_the_closed_form() -> None:
    generator = np.random.default_rng(7)
    few = math.sqrt(30 / 29) * scipy.stats.t.ppf(scipy.stats.norm.cdf(1), 29)
    counts = generator.integers(20, 200, 30).astype(float)
    gaps = generator.normal(1, 8, (3, 30))
    estimates, errors = paired_bootstrap(gaps, counts)
    for gap, estimate, error in zip(gaps, estimates, errors, strict=True):
        draws = []
        for _ in range(4000):
            picked = [generator.integers(30) for _ in range(30)]
            draws.append(sum(gap[p] for p in picked) / sum(counts[p] for p in picked))
        assert estimate == pytest.approx(sum(gap) / sum(counts))
        assert error == pytest.approx(few * np.std(draws, ddof=1), rel=0.1)
    # For documents of one length, the standard error of the mean is sqrt(population variance / n) times the correction
    # for few documents.
    _, equal = paired_bootstrap(gaps, np.full(30, 50.0))
    assert equal == pytest.approx(few * gaps.std(axis=1) / 50 / math.sqrt(30), rel=0.1)


def test_the_bootstrap_does_not_depend_on_what_else_is_compared() -> None:
    gaps = np.random.default_rng(0).normal(size=(600, 12))
    counts = np.arange(1.0, 13)
    alone = [
        clustered_bootstrap(lambda sums: sums[:, 0] / sums[:, 1], np.stack([gap, counts], axis=1))
        for gap in gaps[::100]
    ]
    assert paired_bootstrap(gaps, counts)[1][::100] == pytest.approx(alone)


def test_two_binned_errors_differ_by_what_each_is_and_scatter_as_documents_are_drawn() -> None:
    dice = np.random.default_rng(6)
    mine, theirs, counts = dice.normal(size=(40, 3)), dice.normal(size=(40, 3)), dice.integers(5, 50, 40).astype(float)

    def error(part: np.ndarray[Any, Any], drawn: np.ndarray[Any, Any]) -> float:
        return float(np.abs(part[drawn].sum(axis=0)).sum() / counts[drawn].sum())

    value, stderr = binned_difference(mine, theirs, counts)
    every = np.arange(40)
    assert value == pytest.approx(error(mine, every) - error(theirs, every))
    assert binned_difference(theirs, mine, counts)[0] == pytest.approx(-value)
    drawn = [dice.integers(0, 40, 40) for _ in range(4_000)]
    assert stderr == pytest.approx(np.std([error(mine, one) - error(theirs, one) for one in drawn]), rel=0.1)
    assert binned_difference(mine[:1], theirs[:1], counts[:1])[1] is None
