"""Tasks of lm-eval, run in this process on the packed student."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.errors import InputError, MissingDependencyError
from autodistill.evaluation.base import Direction, Measurement, Needs, Quantity, SimulatedStudent, Subject
from autodistill.evaluation.statistics import clustered_mean, per_document
from autodistill.evaluators.tasks.scoring import asked
from autodistill.strategy.deployment import Deployment

PREFIX = "lm-eval:"
_INSTALL = "pip install 'autodistill-search[lm-eval]'"
# The first of these metrics that a task gives for each example ranks.
_PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "em", "bleu")
_MAX_TOKENS = 256
_ROLLING = "reads whole texts, for a perplexity: use a task file with the metric perplexity"


def find_task(reference: str, folder: str = "") -> Harness:
    """Return the evaluator of "lm-eval:TASK" or "lm-eval:TASK:METRIC". TASK is a task of lm-eval or its YAML file.

    Args:
        reference: The name of the evaluator.
        folder: The folder that a relative path is relative to. By default the working folder.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        InputError: lm-eval has no such task, the task is a group, or it gives no such metric.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(f"--metric {reference} needs lm-eval: {_INSTALL}")
    task, _, metric = reference.removeprefix(PREFIX).partition(":")
    if not task:
        raise InputError(f"{reference!r} names no task: write one like {PREFIX}hellaswag, or a task's YAML file")
    if _is_file(task):
        task = str(Path(folder, task).absolute())  # a worker may run in another folder
    directions = _metrics(task, reference)
    chosen = metric or next((name for name in _PREFERRED if name in directions), next(iter(directions), ""))
    if chosen not in directions:
        raise InputError(f"{reference} gives no metric {chosen!r}; its metrics are {', '.join(directions) or 'none'}")
    return Harness(task=task, metric=chosen, direction=directions[chosen], name=reference)


@dataclass(frozen=True, kw_only=True)
class Harness:
    """Measures "lm-eval:TASK", the mean of one of the task's metrics over its examples.

    lm-eval builds prompts and marks answers. Likelihoods and answers come from the packed student. Both splits of a
    search read the documents that the task evaluates: validation reads the even ones, and test the odd ones.

    Attributes:
        task: Name of the task, or the path of its YAML file.
        metric: Name of the task's metric.
        direction: Direction of the metric.
        name: The name as it was asked for.
    """

    task: str
    metric: str
    direction: Direction
    name: str
    needs: Needs = "student"
    measures: Mapping[str, Quantity] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "measures", {self.name: Quantity("score", self.direction)})

    @property
    def files(self) -> tuple[Path, ...]:
        """The YAML file, if there is one. Each evaluating machine must have it there, with the files that it names."""
        return (Path(self.task),) if _is_file(self.task) else ()

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Run the task on its documents of the split.

        Raises:
            InputError: The task cannot be loaded, or does not give the metric for single examples.
        """
        student = asked(subject, self.name)
        import lm_eval

        with _quiet():
            (task,) = _load(self.task, self.name).values()
            count = len(task.eval_docs)
            places = list(range(student.split == "test", count, 2))
            places = places[: max(8, math.ceil(len(places) * student.share))]
            results = lm_eval.simple_evaluate(
                model=_adapter(student),
                tasks=[task],
                samples={task.config.task: places},
                bootstrap_iters=0,
                # lm-eval would seed all random generators. Greedy answers and likelihoods need no seed.
                random_seed=None,  # type: ignore[arg-type, unused-ignore]
                numpy_random_seed=None,  # type: ignore[arg-type, unused-ignore]
                torch_random_seed=None,  # type: ignore[arg-type, unused-ignore]
            )
        (samples,) = results["samples"].values()
        marks = [(sample["doc_id"], sample.get(self.metric)) for sample in samples]
        wrong = next((mark for _, mark in marks if not isinstance(mark, int | float | np.number)), None)
        if not marks or wrong is not None:
            raise InputError(f"{self.name} gives {self.metric} for no single example: choose another metric of it")
        scores = np.array([float(mark) for _, mark in marks])
        documents = np.array([place for place, _ in marks], dtype=np.int32)
        value, stderr = clustered_mean(scores, documents)
        return (
            Measurement(
                name=self.name,
                value=value,
                unit="score",
                direction=self.direction,
                source="simulated",
                stderr=stderr,
                detail={
                    "metric": self.metric,
                    "split": student.split,
                    "examples": scores.size,
                    "of": len(range(student.split == "test", count, 2)),
                    "context": student.context,
                    "lm-eval": lm_eval.__version__,
                },
                documents=per_document(scores, documents),
            ),
        )

    def supports(self, deployment: Deployment) -> bool:
        """Return True: every deployment can be simulated."""
        return True


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _metrics(task: str, reference: str) -> dict[str, Direction]:
    found = _load(task, reference)
    if len(found) != 1:
        one = next(iter(found), "")
        raise InputError(f"{reference} is a group of {len(found)} tasks: name one of them, like {one}")
    (made,) = found.values()
    if made.OUTPUT_TYPE == "loglikelihood_rolling":
        raise InputError(f"{reference} {_ROLLING}")
    return {str(name): "max" if higher else "min" for name, higher in made.higher_is_better().items()}


@lru_cache(maxsize=4)
def _load(task: str, reference: str) -> dict[str, Any]:
    """Load the tasks of a name or a YAML file, with their documents."""
    with _quiet():
        from lm_eval.tasks import TaskManager

        own = _is_file(task)
        if own and not Path(task).is_file():
            raise InputError(f"{reference}: there is no file {task}")
        manager = TaskManager(include_defaults=not own)
        if not own and task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, 3)
            similar = f"similar ones are {', '.join(near)}" if near else "none has a similar name"
            raise InputError(f"lm-eval knows no task {task!r}; {similar}")
        try:
            found: dict[str, Any] = manager.load(task)["tasks"]
        except Exception as error:  # a task's own file, its data set and the hub's client may raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"lm-eval cannot make the task {task}: {reason[:300]}") from error
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress lm-eval's log, progress bars and tables."""
    logger, level = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _adapter(student: SimulatedStudent) -> Any:
    """Return the student as a model of lm-eval. The class is defined here because its base class is lm-eval's."""
    from lm_eval.api.model import LM

    class Adapter(LM):
        """Passes lm-eval's requests to the student."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            found = student.likelihoods([request.args for request in requests])
            return [(one.log_likelihood, one.greedy) for one in found]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise InputError(f"the task {_ROLLING}")

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Return greedy answers in the order of the requests, or raise `InputError` if the task samples answers."""
            answers: dict[int, str] = {}
            groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
            for place, request in enumerate(requests):
                options = request.args[1]
                until = options.get("until") or []
                stops = (until,) if isinstance(until, str) else tuple(until)
                if options.get("do_sample") or options.get("temperature"):
                    raise InputError("the task draws its answers: only greedy ones can be compared")
                groups.setdefault((int(options.get("max_gen_toks", _MAX_TOKENS)), stops), []).append(place)
            for (most, stops), places in groups.items():
                prompts = [requests[place].args[0] for place in places]
                answers.update(zip(places, student.write(prompts, max_tokens=most, stops=stops), strict=True))
            return [answers[place] for place in range(len(requests))]

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            raise InputError("prompts are put to the student as the task writes them, without a chat template")

    return Adapter()
