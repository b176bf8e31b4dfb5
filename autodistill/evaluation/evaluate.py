"""Evaluate a model under one deployment: pack it, score it once, and let every evaluator measure it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodistill.data.dataset import TokenSet
from autodistill.distillation.student.build import save_student
from autodistill.errors import InputError, TrialFailedError
from autodistill.evaluation.base import Evaluator, Measurement, Scoring, Subject, load_evaluator
from autodistill.evaluation.precision import scored_in
from autodistill.evaluation.statistics import per_document
from autodistill.inference.generation import answer
from autodistill.inference.half_precision import held_as_deployed, is_held
from autodistill.inference.outputs import TeacherReference, TokenScores
from autodistill.inference.packed_student import PackedStudent
from autodistill.inference.quantized_cache import quantized_cache
from autodistill.inference.scoring import score, scores_against_itself
from autodistill.inference.tensor_parallel import deployed_in_all
from autodistill.models.loading import held, stock_model
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Scales
from autodistill.quantization.rounding import deploy_tensor
from autodistill.strategy.deployment import Deployment

ASKING_DATA = "give --data with a prompt and an answer in each record, or reasoning-gym:TASK"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation of a student under one deployment.

    Attributes:
        deployment: How it is packed.
        measurements: The measurements by name.
        documents: Ids, counts and sums by document, for paired comparisons. They are those of the metric that ranks, or
            of accuracy if the metric is not a mean; "metric" has the name. "others" has those of the other measurements
            that are means, by name. If documents are blocks of sequences of one long text, "in_a_row" is the number of
            sequences in a block.
        teacher_accuracy: Accuracy of the unquantised teacher on the same tokens, or None if it is unknown.
        scoring: Precision of the matrix products.
    """

    deployment: Deployment
    measurements: dict[str, Measurement]
    documents: dict[str, Any]
    teacher_accuracy: float | None = None
    scoring: Scoring = "float32"


@contextmanager
def deployed_weights(
    model: Any, spec: ModelSpec, deployment: Deployment, scales: Mapping[str, Scales] | None = None
) -> Iterator[bool]:
    """Put the weights that the runtime will compute with into the model, and restore the master weights at the end.

    Within the context, keys and values are stored as in the deployment's cache. For a model on an accelerator the
    master weights wait in the machine's memory, since the accelerator would otherwise hold all weights twice.

    Args:
        model: The model, in float32 or held in 16 bits.
        spec: Shape of the model.
        deployment: How it is packed.
        scales: Scales that were learned for this packing, or the teacher's own scales, by name of the weight.

    Yields:
        Whether packing is known to change nothing, since the weights are already on the deployment's grids.
    """
    if is_held(model):
        storages = {tensor.name: deployment.storage(tensor) for tensor in spec.tensors}
        with (
            deployed_in_all(model, deployment, scales) as own,
            held_as_deployed(model, storages, own),
            quantized_cache(model, deployment.cache_types),
        ):
            # The teacher in a file as it was given is the teacher that is held here.
            yield deployment.file is not None and deployment.cache_types == ("f16", "f16")
        return
    parameters = held(model)
    masters, same = {}, deployment.cache_types == ("f16", "f16")
    try:
        for tensor in spec.tensors:
            parameter = parameters[tensor.name]
            learned = (scales or {}).get(tensor.name)
            packed = deploy_tensor(parameter.data, deployment.storage(tensor), learned)
            masters[tensor.name] = parameter.data.cpu()
            same = same and torch.equal(parameter.data, packed)
            parameter.data = packed
        with quantized_cache(model, deployment.cache_types):
            yield same
    finally:
        for name, master in masters.items():
            parameters[name].data = master.to(parameters[name].device)


def evaluate(
    model: Any,
    subject: Subject,
    data: TokenSet,
    reference: TeacherReference | None,
    *,
    evaluators: Sequence[str | Evaluator],
    metric: str = "accuracy",
    device: str = "cpu",
    scales: Mapping[str, Scales] | None = None,
    share: float = 1.0,
    tokenizer: Path | None = None,
    unpacked: TokenScores | None = None,
    scoring: Scoring = "float32",
) -> tuple[Evaluation, TokenScores]:
    """Compute once what the evaluators need of the packed model, and let each of them measure it.

    Args:
        model: The model, in float32 on `device`. It is unchanged afterwards.
        subject: The model's shape, how it is packed, the split of `data` and the shape of the teacher of `reference`.
            Prompts and answers must fit its budget's context, as in the deployment, so evaluators' own prompts that are
            longer lose their beginning.
        data: Held-out sequences, as the model reads them.
        reference: The teacher's reference for these sequences, or None for the teacher itself.
        evaluators: Names of evaluators, or evaluators.
        metric: The metric that ranks; its figures by document are kept for comparisons.
        device: Device of the model.
        scales: As for `deployed_weights`.
        share: Share of the evaluators' own examples to read.
        tokenizer: Folder whose files describe the model's text: the teacher's, or `dataset.rendering_folder` for a
            student that learned another template. None if no evaluator asks in text.
        unpacked: The teacher's own scores for the data, if the model is the teacher and they are known. If packing
            changes nothing, they are used, and no token is read again.
        scoring: Precision of the matrix products. `reference` must have the same.

    Raises:
        InputError: An evaluator needs answers, and the data have no questions.
        TrialFailedError: The student's likelihoods are not finite.
    """
    spec, deployment, context = subject.spec, subject.deployment, subject.budget.context
    chosen = _reading(evaluators, deployment)
    asking = _asking(chosen, data, tokenizer)
    with deployed_weights(model, spec, deployment, scales) as same, scored_in(model, scoring, device):
        scores = _scores(model, data, reference, unpacked if same else None, device)
        answers = student = None
        if "answers" in asking and data.questions is not None:
            answers = answer(model, data.questions, context=context, device=device)
        if "student" in asking and tokenizer is not None:
            student = PackedStudent(
                model=model,
                device=device,
                tokenizer=tokenizer,
                split=subject.split,
                share=share,
                context=min(context, spec.max_context),
                data=data,
                saver=partial(_save_packed, model, tokenizer),
            )
        subject = replace(subject, scores=scores, answers=answers, student=student)
        measurements = {item.name: item for evaluator in chosen for item in evaluator.evaluate(subject)}
    found = Evaluation(
        deployment=deployment,
        measurements=measurements,
        documents=_documents(measurements, scores, metric, subject.split, data.in_a_row),
        teacher_accuracy=None if scores.teacher_correct is None else float(scores.teacher_correct.mean()),
        scoring=scoring,
    )
    return found, scores


def _scores(
    model: Any, data: TokenSet, reference: TeacherReference | None, unpacked: TokenScores | None, device: str
) -> TokenScores:
    """Return the scores of the packed model. `unpacked` are those of the teacher itself, if packing changes nothing.

    Raises:
        TrialFailedError: Likelihoods are not finite.
    """
    if unpacked is not None and reference is not None:
        scores = scores_against_itself(unpacked, model, reference)
    else:
        scores = score(model, data, reference, device=device)[0]
    if not np.isfinite(scores.nll).all():
        raise TrialFailedError("nan", "the student's likelihoods are not finite")
    return scores


def _reading(evaluators: Sequence[str | Evaluator], deployment: Deployment) -> list[Evaluator]:
    loaded = (load_evaluator(item) if isinstance(item, str) else item for item in evaluators)
    return [item for item in loaded if item.needs != "artifact" and item.supports(deployment)]


def _asking(chosen: Sequence[Evaluator], data: TokenSet, tokenizer: Path | None) -> set[str]:
    """Return what the evaluators need, after checking that it is available."""
    asking = {item.needs: item.name for item in reversed(chosen)}
    if "answers" in asking and data.questions is None:
        raise InputError(f"{asking['answers']} needs questions with answers: {ASKING_DATA}")
    if "student" in asking and tokenizer is None:
        raise ValueError(f"{asking['student']} asks the student in text, and no tokenizer was given")
    return {*asking}


def _documents(
    measurements: Mapping[str, Measurement], scores: TokenScores, metric: str, split: str, in_a_row: int
) -> dict[str, Any]:
    """Return the figures by document for paired comparisons, as in `Evaluation.documents`."""
    paired = {name: dict(item.documents) for name, item in measurements.items() if item.documents}
    summed = metric if metric in paired else "accuracy"
    if split == "test":
        # Bins are kept for the test split only, since its differences are reported. In every row of a search they would
        # make up most of the log.
        paired |= {name: dict(item.bins) for name, item in measurements.items() if item.bins}
    own = paired.pop(summed, None) or per_document(scores.correct, scores.documents)
    # An evaluator's own questions are documents too, but they are not blocks of the text.
    of_text = in_a_row > 0 and own["ids"] == np.unique(scores.documents).tolist()
    return {**own, "metric": summed, "others": paired, **({"in_a_row": in_a_row} if of_text else {})}


def _save_packed(model: Any, text: Path, folder: Path) -> None:
    if is_held(model):
        raise InputError(
            "a teacher that memory does not hold in float32 cannot be written out for a command: use a smaller one"
        )
    save_student(stock_model(model), text, folder)
