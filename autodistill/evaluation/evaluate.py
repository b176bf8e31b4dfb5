"""A model packed under one deployment, scored once, and measured by every evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import numpy as np

from autodistill.data.dataset import Questions, TokenSet
from autodistill.distillation.student.build import save_student
from autodistill.errors import InputError, TrialFailedError
from autodistill.evaluation.base import Evaluator, Measurement, Needs, Parted, Subject, load_evaluator
from autodistill.evaluation.early_stopping import PARTS, Bar, Reading, counted, ends, expected, order
from autodistill.evaluation.statistics import per_document
from autodistill.hardware.budget import Budget
from autodistill.inference.batching import sequences_at_once
from autodistill.inference.generation import answer, at_once
from autodistill.inference.half_precision import held_as_deployed, is_held
from autodistill.inference.outputs import Answers, TeacherReference, TokenScores
from autodistill.inference.packed_student import PackedStudent
from autodistill.inference.quantized_cache import quantized_cache
from autodistill.inference.scoring import joined, score
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Scales
from autodistill.quantization.rounding import deploy_tensor
from autodistill.strategy.deployment import Deployment

ASKING_DATA = "give --data with a prompt and an answer in each record, or reasoning-gym:TASK"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One deployment of a student, evaluated.

    Attributes:
        deployment: How it is packed.
        measurements: By name.
        documents: Ids, counts and sums of each document, for paired comparisons: of the metric that ranks, or of
            accuracy where that is no mean, whose name is under "metric", and under "others" those of the other
            measurements that are means, by name. Where documents are sequences of one long text, "in_a_row" says how
            many.
        teacher_accuracy: Of the unquantised teacher on the same tokens; None where there was nothing of it.
        reading: What was read, where that is done in parts; else None.
    """

    deployment: Deployment
    measurements: dict[str, Measurement]
    documents: dict[str, Any]
    teacher_accuracy: float | None = None
    reading: Reading | None = None


@contextmanager
def deployed_weights(
    model: Any, spec: ModelSpec, deployment: Deployment, scales: Mapping[str, Scales] | None = None
) -> Iterator[None]:
    """Puts the values that the runtime will see into the model, and the master weights back at the end.

    Keys and values are those of the deployment's cache meanwhile.

    Of a model on an accelerator the masters wait in this machine's memory: beside them it would hold the weights twice.

    Args:
        model: In float32, or held in 16 bits.
        spec: Its shape.
        deployment: How it is packed.
        scales: Those that were learned for this packing, or are the teacher's own, by name of the weight.
    """
    if is_held(model):
        storages = {tensor.name: deployment.storage(tensor) for tensor in spec.tensors}
        with held_as_deployed(model, storages, scales), quantized_cache(model, deployment.cache_types):
            yield
        return
    parameters = dict(model.named_parameters())
    masters = {}
    try:
        for tensor in spec.tensors:
            parameter = parameters[tensor.name]
            learned = (scales or {}).get(tensor.name)
            packed = deploy_tensor(parameter.data, deployment.storage(tensor), learned)
            masters[tensor.name] = parameter.data.cpu()
            parameter.data = packed
        with quantized_cache(model, deployment.cache_types):
            yield
    finally:
        for name, master in masters.items():
            parameters[name].data = master.to(parameters[name].device)


@dataclass(frozen=True, kw_only=True)
class _Simulation:
    """A packed model and what it is read on: all that a part of a subject is made from."""

    model: Any
    data: TokenSet
    reference: TeacherReference | None
    device: str
    context: int
    student: PackedStudent | None

    def scores(self, asking: str) -> TokenScores:
        return score(self.model, self.data, self.reference, device=self.device)[0]

    def answers(self, asking: str) -> Answers:
        return answer(self.model, self._questions(asking), context=self.context, device=self.device)

    def _questions(self, asking: str) -> Questions:
        if self.data.questions is None:
            raise InputError(f"{asking} needs questions with answers: {ASKING_DATA}")
        return self.data.questions

    def scores_in_parts(self, asking: str) -> Iterator[TokenScores]:
        """The scores of the first sequences, of more of them after each part, and at last of all."""
        sequences, length = self.data.tokens.shape
        found: list[TokenScores] = []
        read = tokens = 0
        for stop in ends(sequences, sequences_at_once(length, self.device)):
            if stop > read:
                part = self.data.part(read, stop)
                reference = self.reference and self.reference.part(tokens, tokens + part.predicted)
                found.append(score(self.model, part, reference, device=self.device)[0])
                read, tokens = stop, tokens + part.predicted
            yield joined(found)

    def answers_in_parts(self, asking: str) -> Iterator[Answers]:
        """The same of the answers to questions."""
        questions = self._questions(asking)
        drawn = order(len(questions.entries))
        texts: dict[int, str] = {}
        marks: dict[int, float] = {}
        read = unasked = 0
        for stop in ends(len(drawn), at_once(self.device)):
            if stop > read:
                places = sorted(drawn[read:stop].tolist())
                part = answer(self.model, questions, context=self.context, device=self.device, places=places)
                texts |= dict(zip(places, part.texts, strict=True))
                marks |= dict(zip(places, part.marks.tolist(), strict=True))
                read, unasked = stop, unasked + part.unasked
            yield Answers(
                texts=tuple(texts[place] for place in sorted(texts)),
                marks=np.array([marks[place] for place in sorted(marks)]),
                documents=np.array([questions.entries[place].document for place in sorted(marks)], dtype=np.int32),
                unasked=unasked,
            )

    def asked(self, asking: str) -> PackedStudent:
        if self.student is None:
            raise ValueError(f"{asking} asks the student in text, and no tokenizer was given")
        return self.student


# What makes the part of a subject that an evaluator needs, given the name of the evaluator for error messages.
_PROVIDERS: Mapping[Needs, Callable[[_Simulation, str], Any]] = {
    "scores": _Simulation.scores,
    "answers": _Simulation.answers,
    "student": _Simulation.asked,
}
# What makes the same of those that can be read in parts: more of it each time, until it is whole.
_IN_PARTS: Mapping[Needs, Callable[[_Simulation, str], Iterator[Any]]] = {
    "scores": _Simulation.scores_in_parts,
    "answers": _Simulation.answers_in_parts,
}


def evaluate(
    model: Any,
    spec: ModelSpec,
    deployment: Deployment,
    data: TokenSet,
    reference: TeacherReference | None,
    *,
    budget: Budget,
    evaluators: Sequence[str | Evaluator],
    metric: str = "accuracy",
    device: str = "cpu",
    scales: Mapping[str, Scales] | None = None,
    split: str = "validation",
    share: float = 1.0,
    tokenizer: Path | None = None,
    in_parts: bool = False,
    bar: Bar | None = None,
) -> tuple[Evaluation, TokenScores]:
    """Makes once what the evaluators need of the packed model, and lets every one of them read it.

    Args:
        model: In float32 on `device`; unchanged afterwards.
        spec: Its shape.
        deployment: How it is packed.
        data: Held-out sequences, as the model reads them.
        reference: The teacher's for them, or None for the teacher itself.
        budget: Context and batch for the memory estimate. What is asked, and answered, fits its context, as it must
            where the student is deployed: longer prompts of the evaluators' own lose their beginning.
        evaluators: Names, or evaluators themselves.
        metric: That ranks, whose documents are compared.
        device: Where the model lies.
        scales: As for `deployed_weights`.
        split: That the data are of.
        share: Of the evaluators' own examples, how much is read.
        tokenizer: Folder whose files describe the model's text: the teacher's, or `dataset.rendering_folder` of
            a student that learnt another template; None where no evaluator asks in text.
        in_parts: Whether the data are read part by part, where the evaluator of the metric can be.
        bar: What the metric is held to after each part: once it is certain to fall short, no more is read.

    Raises:
        InputError: An evaluator needs answers, and the data have no questions.
    """
    loaded = (load_evaluator(item) if isinstance(item, str) else item for item in evaluators)
    chosen = [item for item in loaded if item.needs != "artifact" and item.supports(deployment)]
    with deployed_weights(model, spec, deployment, scales):
        student = tokenizer and PackedStudent(
            model=model,
            device=device,
            tokenizer=tokenizer,
            split=split,
            share=share,
            context=min(budget.context, spec.max_context),
            data=data,
            saver=partial(_save_packed, model, tokenizer),
        )
        simulation = _Simulation(
            model=model,
            data=data,
            reference=reference,
            device=device,
            context=budget.context,
            student=student or None,
        )
        base = Subject(spec=spec, deployment=deployment, budget=budget, split=split)
        ranking = next((item for item in chosen if metric in item.measures), None) if in_parts else None
        if ranking is not None and (ranking.needs in _IN_PARTS or _asks_in_parts(ranking)):
            subject, measurements, reading = _read(simulation, chosen, base, ranking, metric, bar)
        else:
            parts = {need: _PROVIDERS[need](simulation, name) for need, name in _asking(chosen).items()}
            subject = _scored(base, parts)
            measurements, reading = _measured(chosen, subject), None
    scores = subject.scores
    assert scores is not None
    found = Evaluation(
        deployment=deployment,
        measurements=measurements,
        documents=_documents(measurements, scores, metric, split, data.in_a_row),
        teacher_accuracy=None if scores.teacher_correct is None else float(scores.teacher_correct.mean()),
        reading=reading,
    )
    return found, scores


def _documents(
    measurements: Mapping[str, Measurement], scores: TokenScores, metric: str, split: str, in_a_row: int
) -> dict[str, Any]:
    """What is kept of each document for paired comparisons, as `Evaluation` has it."""
    paired = {name: dict(item.documents) for name, item in measurements.items() if item.documents}
    summed = metric if metric in paired else "accuracy"
    if split == "test":
        # Where differences are told: a log of searches would be made up of all documents' bins for the most part.
        paired |= {name: dict(item.bins) for name, item in measurements.items() if item.bins}
    own = paired.pop(summed, None) or per_document(scores.correct, scores.documents)
    # Of an evaluator's own questions each is a document, whatever the text is.
    of_text = in_a_row > 0 and own["ids"] == np.unique(scores.documents).tolist()
    return {**own, "metric": summed, "others": paired, **({"in_a_row": in_a_row} if of_text else {})}


def _asking(chosen: Sequence[Evaluator]) -> dict[Needs, str]:
    """What is needed of the model, scores always, and who needs it."""
    needs: dict[Needs, str] = {"scores": "accuracy"}
    return needs | {item.needs: item.name for item in reversed(chosen) if item.needs in _PROVIDERS}


def _asks_in_parts(evaluator: Evaluator) -> TypeGuard[Parted]:
    """Whether an evaluator asks the student itself, and can do so part by part."""
    return evaluator.needs == "student" and isinstance(evaluator, Parted)


def _scored(base: Subject, parts: Mapping[Needs, Any]) -> Subject:
    """A subject with what was made of the model.

    Raises:
        TrialFailedError: Its likelihoods are no numbers.
    """
    subject = replace(base, **parts)  # type: ignore[arg-type]
    assert subject.scores is not None
    if not np.isfinite(subject.scores.nll).all():
        raise TrialFailedError("nan", "the student's likelihoods are not finite")
    return subject


def _measured(
    chosen: Sequence[Evaluator], subject: Subject, known: Mapping[str, tuple[Measurement, ...]] = MappingProxyType({})
) -> dict[str, Measurement]:
    """Measurements by name; of some evaluators, by name, what they gave is known."""
    found = (known.get(evaluator.name) or evaluator.evaluate(subject) for evaluator in chosen)
    return {item.name: item for items in found for item in items}


def _read(
    simulation: _Simulation,
    chosen: Sequence[Evaluator],
    base: Subject,
    ranking: Evaluator,
    metric: str,
    bar: Bar | None,
) -> tuple[Subject, dict[str, Measurement], Reading | None]:
    """Reads part by part all that can be, up to where the metric is certain to fall short of a bar.

    Args:
        simulation, chosen, base: The packed model, its evaluators, and a subject without anything of the model.
        ranking: The evaluator of the metric, which can be read in parts.
        metric: That ranks.
        bar: What it is held to.

    Returns:
        What was read of the model, the measurements of it by name, and how much that is: None where the metric is no
        mean.
    """
    needs = _asking(chosen)
    whole = {need: _PROVIDERS[need](simulation, name) for need, name in needs.items() if need not in _IN_PARTS}
    growing = {need: _IN_PARTS[need](simulation, name) for need, name in needs.items() if need in _IN_PARTS}
    own = {item.name: item.in_parts(replace(base, **whole)) for item in chosen if _asks_in_parts(item)}
    looks: list[Mapping[str, Any]] = []
    estimate = None
    for look in range(PARTS):
        subject = _scored(base, whole | {need: next(parts) for need, parts in growing.items()})
        known = {name: next(parts) for name, parts in own.items()}
        assert subject.scores is not None
        if len(subject.scores.nll) == 0 and look < PARTS - 1:
            # Nothing that counts has been read yet.
            looks.append({})
            continue
        if ranking.name not in known:
            known[ranking.name] = ranking.evaluate(subject)
        judged = next(item for item in known[ranking.name] if item.name == metric)
        looks.append(judged.documents)
        estimate = None if bar is None else expected(judged, bar, look)
        if estimate is not None:
            break
    measurements = _measured(chosen, subject, known)
    if not judged.documents:
        return subject, measurements, None
    unit, read = "tokens" if ranking.needs == "scores" else "questions", counted(judged.documents)
    if bar is None or estimate is None:
        return subject, measurements, Reading(unit=unit, read=read, of=read, looks=tuple(looks))
    of = counted(bar.looks[-1])
    return subject, measurements, Reading(unit=unit, read=read, of=of, bar=bar.trial, estimate=estimate)


def _save_packed(model: Any, text: Path, folder: Path) -> None:
    if is_held(model):
        raise InputError(
            "a teacher that memory does not hold in float32 cannot be written out for a command: use a smaller one"
        )
    save_student(model, text, folder)
