"""Metrics of Hugging Face's `evaluate` give what the evaluators measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from autodistill.evaluation.base import Subject
from autodistill.evaluators.accuracy import Accuracy
from autodistill.evaluators.exact_match import ExactMatch
from autodistill.evaluators.hf_metrics import FullMarks, TokenPerplexity, TokenShare
from autodistill.evaluators.perplexity import Perplexity
from autodistill.inference.outputs import Answers


def test_shares_and_perplexity_are_those_of_the_evaluators(subject: Subject, tmp_path: Path) -> None:
    scores = subject.scores
    assert scores is not None
    share = TokenShare(cache_dir=str(tmp_path), keep_in_memory=True)
    (accuracy,) = Accuracy().evaluate(subject)
    found = share.compute(hits=scores.correct, documents=scores.documents)
    assert found == {"share": accuracy.value, "stderr": accuracy.stderr}
    (perplexity,) = Perplexity().evaluate(subject)
    found = TokenPerplexity(cache_dir=str(tmp_path), keep_in_memory=True).compute(
        nll=scores.nll, documents=scores.documents
    )
    assert found == {"perplexity": perplexity.value, "stderr": perplexity.stderr}


def test_full_marks_are_those_of_exact_match(subject: Subject, tmp_path: Path) -> None:
    marks = np.array([1.0, 0.5, 0.0, 1.0])
    answers = Answers(texts=("",) * 4, marks=marks, documents=np.arange(4, dtype=np.int32))
    (measured,) = ExactMatch().evaluate(replace(subject, answers=answers))
    found = FullMarks(cache_dir=str(tmp_path), keep_in_memory=True).compute(marks=marks, documents=answers.documents)
    assert found["exact_match"] == measured.value == pytest.approx(0.5)
    assert (found["stderr"], found["mean_mark"]) == (measured.stderr, measured.detail["mean_mark"])
