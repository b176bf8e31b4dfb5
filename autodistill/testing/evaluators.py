"""The conformance suite of evaluators, which the author of an evaluator subclasses, and its tiny student."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from autodistill.evaluation.base import Evaluator, Needs, Subject
from autodistill.inference.outputs import Answers, TokenScores
from autodistill.testing.models import save_tiny_teacher


def tiny_subject(folder: Path, *, artifact: bool = False) -> Subject:
    """Return a tiny student in every form that an evaluator may need, with invented scores and answers.

    Args:
        folder: Folder for the student, as a transformers folder, and for the artifact.
        artifact: Whether it is also exported, as GGUF Q4_0.
    """
    import numpy as np
    import torch

    from autodistill.data.dataset import TokenSet
    from autodistill.export.gguf import GgufExporter
    from autodistill.hardware.budget import Budget
    from autodistill.inference.packed_student import PackedStudent
    from autodistill.models.config import spec_from_config
    from autodistill.models.loading import load_model
    from autodistill.strategy.deployment import Deployment

    student = save_tiny_teacher(folder / "student", ffn=192)
    model = load_model(student, torch.float32)
    dice = np.random.default_rng(0)
    documents = np.repeat(np.arange(40, dtype=np.int32), dice.integers(10, 50, size=40))
    difficulty = dice.uniform(0.5, 4.0, size=40)[documents]
    count = documents.size
    tokens = dice.integers(3, 300, (6, 32)).astype(np.int32)
    deployment = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
    spec = spec_from_config(json.loads((student / "config.json").read_text()))
    return Subject(
        spec=spec,
        teacher=spec,
        deployment=deployment,
        budget=Budget(memory_bytes=10**9, context=512, batch=2),
        scores=TokenScores(
            nll=dice.exponential(difficulty),
            correct=dice.random(count) < np.exp(-difficulty),
            agrees=dice.random(count) < 0.7,
            documents=documents,
            confidence=np.exp(-difficulty * dice.uniform(0.3, 1.0, size=count)),
            divergence=dice.exponential(0.3 * difficulty),
            window=256,
            outcomes=257,
        ),
        answers=Answers(
            texts=tuple(map(str, range(60))),
            marks=np.random.default_rng(1).choice([0.0, 0.01, 0.5, 1.0], size=60),
            documents=np.arange(60, dtype=np.int32) // 2,
        ),
        student=PackedStudent(
            model=model,
            device="cpu",
            tokenizer=student,
            split="validation",
            share=1.0,
            context=512,
            data=TokenSet(tokens=tokens, documents=np.repeat(np.arange(6, dtype=np.int32), 32).reshape(6, 32)),
            saver=partial(_saved, model, student),
        ),
        artifact=GgufExporter().export(student, deployment, folder / "gguf").path if artifact else None,
    )


def _saved(model: Any, teacher: Path, folder: Path) -> None:
    from autodistill.distillation.student.build import save_student

    save_student(model, teacher, folder)


class EvaluatorConformance:
    """The checks that every evaluator must pass. Subclass it in a test file as `TestMine`, and name the evaluator:

        class TestMine(EvaluatorConformance):
            def evaluator(self):
                return Mine()

    Attributes:
        timed: Set it if figures differ from run to run because they are times.
    """

    timed = False

    def evaluator(self) -> Evaluator:
        """Return a new instance of the evaluator under test."""
        raise NotImplementedError

    def subject(self, folder: Path) -> Subject:
        """Return the input of the evaluator: by default a tiny student in every form, exported only if needed."""
        return tiny_subject(folder, artifact=self.evaluator().needs == "artifact")

    def test_it_says_what_it_measures_and_needs(self) -> None:
        """It has a name and needs, and for each figure a unit and a direction."""
        evaluator = self.evaluator()
        assert evaluator.name.strip() == evaluator.name != ""
        assert evaluator.needs in get_args(Needs)
        assert evaluator.measures, "an evaluator names its measurements in `measures`"
        for name, (unit, direction) in evaluator.measures.items():
            assert name.strip() == name != ""
            assert unit.strip(), f"{name} has no unit"
            assert direction in ("max", "min"), f"{name} has the direction {direction!r}"

    def test_it_crosses_to_a_worker_and_stays_the_same(self) -> None:
        """It consists of plain data, since it is sent to workers."""
        evaluator = self.evaluator()
        again = pickle.loads(pickle.dumps(evaluator))
        assert (again.name, again.needs, dict(again.measures)) == (
            evaluator.name,
            evaluator.needs,
            dict(evaluator.measures),
        )

    def test_measurements_are_what_was_declared(self, tmp_path: Path) -> None:
        """Each declared figure appears once, finite and plain, with its unit, direction and source."""
        evaluator, subject = self.evaluator(), self.subject(tmp_path)
        assert evaluator.supports(subject.deployment)
        found = evaluator.evaluate(subject)
        assert sorted(one.name for one in found) == sorted(evaluator.measures)
        for one in found:
            assert (one.unit, one.direction) == tuple(evaluator.measures[one.name])
            assert one.source in _SOURCES[evaluator.needs], f"{one.name} is {one.source}, made from {evaluator.needs}"
            assert math.isfinite(one.value), f"{one.name} is {one.value}"
            assert one.stderr is None or (math.isfinite(one.stderr) and one.stderr >= 0)
            plain = one.to_json()
            assert json.loads(json.dumps(plain, allow_nan=False)) == plain, f"{one.name} is not plain data"

    def test_a_mean_is_that_of_its_documents(self, tmp_path: Path) -> None:
        """A figure that is compared by document adds up to its value, and has a standard error."""
        for one in self.evaluator().evaluate(self.subject(tmp_path)):
            if one.documents:
                ids, count, total = (one.documents[key] for key in ("ids", "count", "sum"))
                assert len(ids) == len(count) == len(total) == len(set(ids))
                assert one.stderr is not None or len(ids) < 2, f"{one.name} has documents and no standard error"
                mean = sum(total) / sum(count)
                expected = math.log(one.value) if one.unit == "perplexity" else one.value
                same = math.isclose(mean, expected, rel_tol=1e-4, abs_tol=1e-6)
                assert same, f"{one.name} is {one.value}, and its documents have {mean}"

    def test_a_binned_figure_is_that_of_its_documents(self, tmp_path: Path) -> None:
        """A figure that is not a mean but is compared by document follows from the bins of all documents."""
        for one in self.evaluator().evaluate(self.subject(tmp_path)):
            if one.bins:
                ids, count, bins = (one.bins[key] for key in ("ids", "count", "bins"))
                assert len(ids) == len(count) == len(bins) == len(set(ids))
                assert not one.documents, f"{one.name} is a mean of documents, or made of bins, and not both"
                made = sum(abs(math.fsum(sums)) for sums in zip(*bins, strict=True)) / sum(count)
                same = math.isclose(made, one.value, rel_tol=1e-4, abs_tol=1e-6)
                assert same, f"{one.name} is {one.value}, and its documents' bins have {made}"

    def test_it_gives_the_same_each_time(self, tmp_path: Path) -> None:
        """Another instance gives the same figures on the same subject."""
        subject = self.subject(tmp_path)
        first, second = self.evaluator().evaluate(subject), self.evaluator().evaluate(subject)
        if self.timed:
            assert [one.name for one in first] == [one.name for one in second]
        else:
            assert first == second

    def test_one_document_has_no_standard_error(self, tmp_path: Path) -> None:
        """Nothing says how much a figure of a single document may vary."""
        subject, needs = self.subject(tmp_path), self.evaluator().needs
        if needs in ("scores", "answers"):
            part = getattr(subject, needs)
            same: dict[str, Any] = {needs: replace(part, documents=part.documents * 0)}
            single = replace(subject, **same)
            assert all(one.stderr is None for one in self.evaluator().evaluate(single))

    def test_what_is_missing_is_an_error(self, tmp_path: Path) -> None:
        """An evaluator never invents what its subject lacks."""
        subject, needs = self.subject(tmp_path), self.evaluator().needs
        if needs != "spec":
            missing: dict[str, Any] = {needs: None}
            _refused(self.evaluator(), replace(subject, **missing), f"a subject without {needs}")

    def test_a_bad_model_is_an_error(self, tmp_path: Path) -> None:
        """No figure comes from zero tokens, from weights that are not numbers, or from a file without a model."""
        import torch

        subject, needs = self.subject(tmp_path), self.evaluator().needs
        if needs == "scores":
            assert subject.scores is not None
            columns = {name: value[:0] for name, value in vars(subject.scores).items() if hasattr(value, "dtype")}
            _refused(self.evaluator(), replace(subject, scores=replace(subject.scores, **columns)), "no tokens")
        elif needs == "answers":
            assert subject.answers is not None
            none = replace(
                subject.answers, texts=(), marks=subject.answers.marks[:0], documents=subject.answers.documents[:0]
            )
            _refused(self.evaluator(), replace(subject, answers=none), "no answers")
        elif needs == "student":
            assert subject.student is not None
            for parameter in subject.student.model.parameters():
                parameter.data.fill_(torch.nan)
            _refused(self.evaluator(), subject, "weights that are not numbers")
        elif needs == "artifact":
            broken = tmp_path / "broken.gguf"
            broken.write_bytes(b"GGUF\x03\x00\x00\x00")
            _refused(self.evaluator(), replace(subject, artifact=broken), "a file without a model")


_SOURCES = {
    "spec": ("predicted", "measured"),
    "scores": ("simulated",),
    "answers": ("simulated",),
    "student": ("simulated",),
    "artifact": ("measured",),
}


def _refused(evaluator: Evaluator, subject: Subject, what: str) -> None:
    from autodistill.errors import AutoDistillError

    try:
        found = evaluator.evaluate(subject)
    except (ValueError, AutoDistillError):
        return
    raise AssertionError(f"{evaluator.name} made {[one.value for one in found]} of {what}; it must raise ValueError")
