"""Curves of cascades against counting by hand, the analytic error of a mean, and confidences of known worth."""

from __future__ import annotations

import numpy as np
import pytest

from autodistill.evaluation.cascade import Items, at, curve, suggest, thresholds
from autodistill.evaluation.statistics import clustered_mean

SMALL_BYTES, LARGE_BYTES = 100, 900


def items(count: int = 2000, documents: int = 50, seed: int = 0, **changes: np.ndarray) -> Items:
    """Make items where the small model is right as often as it is confident, and the large one nine times in ten."""
    dice = np.random.default_rng(seed)
    confidence = dice.random(count)
    fields = {
        "documents": dice.integers(0, documents, count).astype(np.int32),
        "confidence": confidence,
        "small": (dice.random(count) < confidence).astype(float),
        "large": (dice.random(count) < 0.9).astype(float),
        "small_ms": np.full(count, 2.0),
        "large_ms": dice.random(count) + 10,
    }
    return Items(**(fields | changes))


def test_each_point_is_what_counting_gives() -> None:
    given = items()
    for one in at(given, [0.25, 0.5, 0.9], (SMALL_BYTES, LARGE_BYTES)):
        right = deferred = spent = 0.0
        for place, sure in enumerate(given.confidence):
            later = sure < one.threshold
            deferred += later
            right += given.large[place] if later else given.small[place]
            spent += given.small_ms[place] + (given.large_ms[place] if later else 0)
        assert one.deferred == pytest.approx(deferred / 2000)
        assert one.accuracy == pytest.approx(right / 2000)
        assert one.latency_ms == pytest.approx(spent / 2000)
        assert one.over_small == pytest.approx(right / 2000 - given.small.mean())
        assert one.over_large == pytest.approx(right / 2000 - given.large.mean())
        expected = (1 - one.deferred) * given.small.mean() + one.deferred * given.large.mean()
        assert one.over_chance == pytest.approx(one.accuracy - expected)
        assert one.memory_bytes == SMALL_BYTES + LARGE_BYTES


def test_its_ends_are_the_two_models_alone() -> None:
    given = items()
    first, *_, last = curve(given, (SMALL_BYTES, LARGE_BYTES))
    assert (first.deferred, first.accuracy, first.memory_bytes) == (0, given.small.mean(), SMALL_BYTES)
    assert (last.deferred, last.accuracy, last.memory_bytes) == (1, pytest.approx(given.large.mean()), LARGE_BYTES)
    # No model is asked whose answer is thrown away.
    assert last.latency_ms == pytest.approx(given.large_ms.mean())
    assert first.over_small == 0
    assert last.over_large == 0


def test_errors_are_those_of_documents() -> None:
    # Items of a document are all alike, so there are as many independent facts as documents.
    dice = np.random.default_rng(1)
    documents = np.repeat(np.arange(60), 20).astype(np.int32)
    confidence = np.repeat(dice.random(60), 20)
    given = items(1200, documents=60, confidence=confidence)
    given = Items(**{**vars(given), "documents": documents})
    (point,) = at(given, [0.5])
    _, expected = clustered_mean((confidence < 0.5).astype(float), documents)
    assert point.deferred_stderr == pytest.approx(expected, rel=0.1)
    assert point.deferred_stderr > 3 * np.std(confidence < 0.5) / np.sqrt(1200)


def test_a_confidence_that_says_nothing_gains_nothing_over_chance() -> None:
    blind = items(confidence=np.random.default_rng(9).random(2000))
    points = curve(blind)
    assert sum(abs(one.over_chance) <= 3 * one.over_chance_stderr for one in points[1:-1]) == len(points) - 2
    middle = curve(items())[50]
    assert middle.over_chance > 5 * middle.over_chance_stderr


def test_without_times_or_memory_nothing_is_said_of_them() -> None:
    (point,) = at(items(small_ms=None), [0.5])
    assert (point.latency_ms, point.latency_stderr, point.memory_bytes) == (None, None, None)


def test_thresholds_part_items_by_equal_shares() -> None:
    confidence = np.random.default_rng(0).random(1000)
    found = thresholds(confidence)
    assert found[0] == 0
    assert [(confidence < one).mean() for one in found] == pytest.approx(np.linspace(0, 1, 101), abs=0.002)
    # Few values give few thresholds.
    assert len(thresholds(np.array([0.5, 0.5, 1.0]))) == 4
    with pytest.raises(ValueError, match="no items"):
        thresholds(np.zeros(0))


@pytest.mark.slow
def test_the_suggestion_defers_what_the_small_model_does_not_know() -> None:
    dice = np.random.default_rng(3)
    confidence = dice.random(4000)
    given = Items(
        documents=np.arange(4000, dtype=np.int32),
        confidence=confidence,
        small=(confidence >= 0.7).astype(float),
        large=np.ones(4000),
    )
    found = suggest(given)
    assert found.threshold == pytest.approx(0.7, abs=0.02)
    assert found.deferred == pytest.approx(0.7, abs=0.03)
    assert found.accuracy == pytest.approx(1.0, abs=0.02)
    assert found.over_large <= 0


def test_of_one_document_no_errors_are_known() -> None:
    alone = items(documents=1)
    (point,) = at(alone, [0.5])
    assert (point.accuracy_stderr, point.over_chance_stderr) == (None, None)
    assert suggest(alone).deferred is None
