from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autodistill.evaluation.base import Subject
from autodistill.evaluators.accuracy import Accuracy


def test_is_the_share_of_correct_tokens_with_an_error_by_document(subject: Subject) -> None:
    assert subject.scores is not None
    correct, documents = subject.scores.correct, subject.scores.documents
    (measurement,) = Accuracy().evaluate(subject)
    assert measurement.value == pytest.approx(correct.sum() / correct.size)
    dice = np.random.default_rng(1)
    sums, counts = np.bincount(documents, weights=correct), np.bincount(documents)
    draws = dice.integers(0, 40, size=(4000, 40))
    bootstrapped = np.std(sums[draws].sum(axis=1) / counts[draws].sum(axis=1))
    assert measurement.stderr == pytest.approx(bootstrapped, rel=0.1)
    assert measurement.detail == {"split": "validation", "tokens": correct.size, "documents": 40}


def test_one_document_has_no_error(subject: Subject) -> None:
    assert subject.scores is not None
    scores = replace(subject.scores, documents=np.zeros_like(subject.scores.documents))
    (measurement,) = Accuracy().evaluate(replace(subject, scores=scores))
    assert measurement.stderr is None
