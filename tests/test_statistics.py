from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from autodistill.statistics import clustered_bootstrap, clustered_mean, per_document


def test_independent_values_have_the_ordinary_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=200)
    mean, stderr = clustered_mean(values, np.arange(200, dtype=np.int32))
    assert mean == pytest.approx(np.mean(values))
    assert stderr == pytest.approx(scipy.stats.sem(values))


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


def test_sums_by_document() -> None:
    documents = np.array([3, 3, 7], dtype=np.int32)
    assert per_document(np.array([True, True, False]), documents) == {"ids": [3, 7], "count": [2, 1], "sum": [2, 0]}
    assert per_document(np.array([0.1, 0.2, 1e-9]), documents)["sum"] == [0.3, 0.0]
