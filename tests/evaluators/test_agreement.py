from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autodistill.evaluation.base import Subject
from autodistill.evaluators.agreement import Agreement


def test_is_the_share_of_tokens_on_which_both_agree(subject: Subject) -> None:
    assert subject.scores is not None
    (measurement,) = Agreement().evaluate(subject)
    assert measurement.value == pytest.approx(np.count_nonzero(subject.scores.agrees) / subject.scores.agrees.size)
    assert measurement.stderr is not None


def test_the_teacher_agrees_with_itself_beyond_doubt(subject: Subject) -> None:
    assert subject.scores is not None
    scores = replace(subject.scores, agrees=np.ones_like(subject.scores.agrees))
    (measurement,) = Agreement().evaluate(replace(subject, scores=scores))
    assert (measurement.value, measurement.stderr) == (1.0, 0.0)
