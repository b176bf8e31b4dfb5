from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autodistill.evaluation.base import Subject
from autodistill.evaluators.perplexity import Perplexity


def test_is_the_exponential_of_the_mean_with_an_error_by_document(subject: Subject) -> None:
    assert subject.scores is not None
    nll, documents = subject.scores.nll, subject.scores.documents
    (measurement,) = Perplexity().evaluate(subject)
    assert measurement.value == pytest.approx(np.exp(nll.mean()))
    dice = np.random.default_rng(2)
    sums, counts = np.bincount(documents, weights=nll), np.bincount(documents)
    draws = dice.integers(0, 40, size=(4000, 40))
    bootstrapped = np.std(np.exp(sums[draws].sum(axis=1) / counts[draws].sum(axis=1)))
    # The delta method is only a first-order approximation.
    assert measurement.stderr == pytest.approx(bootstrapped, rel=0.15)


def test_a_uniform_guess_has_the_vocabulary_s_size(subject: Subject) -> None:
    assert subject.scores is not None
    scores = replace(subject.scores, nll=np.full_like(subject.scores.nll, np.log(300)))
    (measurement,) = Perplexity().evaluate(replace(subject, scores=scores))
    assert measurement.value == pytest.approx(300)
    assert measurement.stderr == pytest.approx(0, abs=1e-9)
