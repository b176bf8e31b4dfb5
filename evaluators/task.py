"""A task of a task file becomes the evaluator of its metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autodistill.evaluators.multiple_choice import MultipleChoice
from autodistill.evaluators.strided_perplexity import StridedPerplexity
from autodistill.evaluators.written_match import WrittenMatch

from autodistill.contracts import Evaluator
from autodistill.task_files import TaskFile

_EVALUATORS: Mapping[str, Callable[..., Evaluator]] = {
    "multiple_choice": MultipleChoice,
    "exact_match": WrittenMatch,
    "perplexity": StridedPerplexity,
}


def evaluator_of(task: TaskFile) -> Evaluator:
    """The evaluator that measures "task:NAME"."""
    return _EVALUATORS[task.metric](task=task)
