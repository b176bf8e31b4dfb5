"""A model packed under one deployment, scored once, and measured by every evaluator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.contracts import (
    Answers,
    Evaluator,
    Measurement,
    ModelSpec,
    Needs,
    Subject,
    TeacherReference,
    TokenScores,
)
from autodistill.distillation.generation import answer
from autodistill.distillation.grid_values import deploy_tensor
from autodistill.distillation.held import held_as_deployed, is_held
from autodistill.distillation.scoring import score
from autodistill.distillation.simulated import PackedStudent
from autodistill.errors import InputError, TrialFailedError
from autodistill.formats import Scales
from autodistill.plugins import load
from autodistill.statistics import per_document
from autodistill.strategy import Deployment
from autodistill.students import save_student
from autodistill.token_sets import TokenSet
from autodistill.units import Budget

ASKING_DATA = "give --data with a prompt and an answer in each record, or reasoning-gym:TASK"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One deployment of a student, evaluated.

    Attributes:
        deployment: How it is packed.
        measurements: By name.
        documents: Ids, counts and sums of each document, for paired comparisons: of the metric that ranks, or of
            accuracy where that is no mean, whose name is under "metric", and under "others" those of the other
            measurements that are means, by name.
        teacher_accuracy: Of the unquantised teacher on the same tokens; None where there was nothing of it.
    """

    deployment: Deployment
    measurements: dict[str, Measurement]
    documents: dict[str, Any]
    teacher_accuracy: float | None = None


@contextmanager
def deployed_weights(
    model: Any, spec: ModelSpec, deployment: Deployment, scales: Mapping[str, Scales] | None = None
) -> Iterator[None]:
    """Puts the values that the runtime will see into the model, and the master weights back at the end.

    Of a model on an accelerator the masters wait in this machine's memory: beside them it would hold the weights twice.

    Args:
        model: In float32, or held in 16 bits, where scales are not for it.
        spec: Its shape.
        deployment: How it is packed.
        scales: Those that were learned for this packing, by name of the weight.
    """
    if is_held(model):
        with held_as_deployed(model, {tensor.name: deployment.storage(tensor) for tensor in spec.tensors}):
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
        if self.data.questions is None:
            raise InputError(f"{asking} needs questions with answers: {ASKING_DATA}")
        return answer(self.model, self.data.questions, context=self.context, device=self.device)

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
        tokenizer: Folder whose files describe the model's text: the teacher's, or `data.rendering_folder` of a student
            that learnt another template; None where no evaluator asks in text.

    Raises:
        InputError: An evaluator needs answers, and the data have no questions.
    """
    loaded = (load("evaluators", item) if isinstance(item, str) else item for item in evaluators)
    chosen = [item for item in loaded if item.needs != "artefact" and item.supports(deployment)]
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
        asking = {item.needs: item.name for item in reversed(chosen) if item.needs in _PROVIDERS}
        parts = {need: _PROVIDERS[need](simulation, name) for need, name in asking.items()}
        scores = parts.get("scores") or simulation.scores("accuracy")
        if not np.isfinite(scores.nll).all():
            raise TrialFailedError("nan", "the student's likelihoods are not finite")
        subject = Subject(spec=spec, deployment=deployment, budget=budget, split=split, **{**parts, "scores": scores})
        measurements = {item.name: item for evaluator in chosen for item in evaluator.evaluate(subject)}
    paired = {name: dict(item.documents) for name, item in measurements.items() if item.documents}
    summed = metric if metric in paired else "accuracy"
    own = paired.pop(summed, None) or per_document(scores.correct, scores.documents)
    documents = {**own, "metric": summed, "others": paired}
    theirs = None if scores.teacher_correct is None else float(scores.teacher_correct.mean())
    found = Evaluation(deployment=deployment, measurements=measurements, documents=documents, teacher_accuracy=theirs)
    return found, scores


def _save_packed(model: Any, text: Path, folder: Path) -> None:
    if is_held(model):
        raise InputError(
            "a teacher that memory does not hold in float32 cannot be written out for a command: use a smaller one"
        )
    save_student(model, text, folder)
