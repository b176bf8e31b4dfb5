"""Choice of the evaluator for a task of a task file, by its metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autodistill.data.task_files import TaskFile
from autodistill.evaluation.base import Evaluator
from autodistill.evaluators.tasks.generated_answer import WrittenMatch
from autodistill.evaluators.tasks.multiple_choice import MultipleChoice
from autodistill.evaluators.tasks.strided_perplexity import StridedPerplexity

_EVALUATORS: Mapping[str, Callable[..., Evaluator]] = {
    "multiple_choice": MultipleChoice,
    "exact_match": WrittenMatch,
    "perplexity": StridedPerplexity,
}


def evaluator_of(task: TaskFile) -> Evaluator:
    """Return the evaluator that measures "task:NAME"."""
    return _EVALUATORS[task.metric](task=task)
