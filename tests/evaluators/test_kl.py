from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autodistill.evaluation.base import Subject
from autodistill.evaluators.kl import Divergence


def test_is_the_mean_in_nats_with_an_error_by_document(subject: Subject) -> None:
    assert subject.scores is not None
    divergence, documents = subject.scores.divergence, subject.scores.documents
    assert divergence is not None
    (measurement,) = Divergence().evaluate(subject)
    assert measurement.value == pytest.approx(divergence.mean())
    dice = np.random.default_rng(1)
    sums, counts = np.bincount(documents, weights=divergence), np.bincount(documents)
    draws = dice.integers(0, 40, size=(4000, 40))
    bootstrapped = np.std(sums[draws].sum(axis=1) / counts[draws].sum(axis=1))
    assert measurement.stderr == pytest.approx(bootstrapped, rel=0.1)
    assert measurement.detail["outcomes"] == 257


def test_scores_without_a_reference_are_an_error(subject: Subject) -> None:
    assert subject.scores is not None
    with pytest.raises(ValueError, match="reference"):
        Divergence().evaluate(replace(subject, scores=replace(subject.scores, divergence=None)))
