from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from autodistill.evaluation.base import Subject
from autodistill.evaluators.calibration import BINS, Calibration
from autodistill.inference.outputs import TokenScores


def scores(confidence: np.ndarray, correct: np.ndarray, documents: np.ndarray) -> TokenScores:
    none = np.zeros(len(confidence))
    return TokenScores(
        nll=none, correct=correct, agrees=correct, documents=documents.astype(np.int32), confidence=confidence
    )


def test_is_guo_and_others_sum_over_bins(subject: Subject) -> None:
    assert subject.scores is not None
    assert subject.scores.confidence is not None
    (measurement,) = Calibration().evaluate(subject)
    expected, confidence, correct = 0.0, subject.scores.confidence, subject.scores.correct
    edges = np.linspace(0, 1, BINS + 1)
    for low, high in pairwise(edges):
        inside = (confidence > low) & (confidence <= high)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert measurement.value == pytest.approx(expected)
    assert measurement.detail["bins"] == 15


def test_a_calibrated_student_has_nearly_none_and_a_boaster_its_boast(subject: Subject) -> None:
    dice = np.random.default_rng(3)
    confidence, documents = dice.uniform(0, 1, 40_000), np.arange(40_000) // 100
    honest = scores(confidence, dice.random(40_000) < confidence, documents)
    (measurement,) = Calibration().evaluate(replace(subject, scores=honest))
    assert measurement.value < 0.015
    boaster = scores(np.full(40_000, 0.9), dice.random(40_000) < 0.6, documents)
    (measurement,) = Calibration().evaluate(replace(subject, scores=boaster))
    assert measurement.value == pytest.approx(0.3, abs=0.01)
    # One bin has all tokens, so the error is that of a share over independent tokens.
    assert measurement.stderr == pytest.approx((0.6 * 0.4 / 40_000) ** 0.5, rel=0.15)


def test_edges_belong_to_the_bin_below(subject: Subject) -> None:
    at = scores(np.array([0.0, 1.0, 3 / 15]), np.array([False, True, True]), np.arange(3))
    (measurement,) = Calibration().evaluate(replace(subject, scores=at))
    assert measurement.value == pytest.approx((1 - 0.2) / 3)
