"""The interface of an evaluator: what it needs of a student, and the measurements that it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from autodistill import plugins
from autodistill.errors import InputError
from autodistill.hardware.budget import Budget
from autodistill.inference.outputs import Answers, Likelihood, TokenScores
from autodistill.models.spec import ModelSpec
from autodistill.strategy.deployment import Deployment

Source = Literal["measured", "simulated", "predicted"]

Direction = Literal["max", "min"]

Goal = Literal["general", "task"]
"""The goal of a search. With "general", an exported student must not have forgotten general text. With "task", only
the metric counts."""

Scoring = Literal["float32", "tf32", "bf16"]
"""The precision of a model's matrix products in scoring. Scores of different precisions are never compared."""

# What an evaluator reads of a subject in addition to shape, deployment and budget. Except "spec", it is a field.
Needs = Literal["spec", "scores", "answers", "student", "artifact"]


class Quantity(NamedTuple):
    """The unit of a measurement's value, and whether more ("max") or less ("min") of it is better."""

    unit: str
    direction: Direction


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured quantity.

    Attributes:
        name: The row's field that it fills, like "accuracy" or "memory_bytes".
        value: The value in `unit`.
        unit: "fraction", "bytes", "ms", "tokens/s", "perplexity", ...
        direction: Whether more or less is better.
        source: `measured` in the serving runtime, `simulated` in torch on the packed weights, or `predicted`.
        stderr: Standard error in `unit`, or None if there is none.
        detail: Plain data on how it was obtained: threads, context, parts of a sum.
        documents: If the value is a mean, its terms by document for paired comparisons, as returned by
            `statistics.per_document`. Otherwise empty.
        bins: If the value is computed from sums by bin over all tokens, like "ece", the sums of each document: `ids`,
            `count` and `bins`. Otherwise empty. See `statistics.binned_error`.
    """

    name: str
    value: float
    unit: str
    direction: Direction
    source: Source
    stderr: float | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)
    documents: Mapping[str, Any] = field(default_factory=dict)
    bins: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as plain data."""
        return asdict(self)


class SimulatedStudent(Protocol):
    """A student with its packed weights in torch, which an evaluator can ask in text."""

    @property
    def model(self) -> Any:
        """A causal language model of transformers in float32 that has the packed weights during the evaluation."""
        ...

    @property
    def device(self) -> str:
        """The torch device that holds the model."""
        ...

    @property
    def tokenizer(self) -> Path:
        """Folder of its tokenizer."""
        ...

    @property
    def split(self) -> str:
        """The split that is evaluated: "validation" or "test"."""
        ...

    @property
    def share(self) -> float:
        """The share of an evaluator's own examples to read: 1 for all of them, less at a rung."""
        ...

    @property
    def context(self) -> int:
        """The most tokens of a prompt and its continuation: the smaller one of the budget's and the model's context."""
        ...

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Return the likelihood of each continuation after its prompt; pairs with the same prompt share a pass."""
        ...

    def rolling(self, texts: Sequence[str], window: int, stride: int) -> list[npt.NDArray[np.float64]]:
        """Return the negative log-likelihood in nats of each text's tokens, in strided windows.

        The first token has one only if the tokenizer puts a token of its own at the start of all texts.
        """
        ...

    def chats(self, prompts: Sequence[str]) -> list[str]:
        """Return each prompt as a user's turn in the tokenizer's chat template, up to the start of the answer."""
        ...

    def write(self, prompts: Sequence[str], *, max_tokens: int, stops: Sequence[str] = ()) -> list[str]:
        """Return the student's greedy continuation of each prompt, up to the first of the texts in `stops`."""
        ...

    def save(self, folder: Path) -> None:
        """Write the packed weights, dequantised, as a folder that transformers loads."""
        ...

    def examples(self) -> list[dict[str, Any]]:
        """Return the evaluated split as plain records: `id`, and `prompt` and `answer`, or `text` and `tokens`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The student that an evaluator measures, with what was computed for it.

    Attributes:
        spec: Shape of the student.
        deployment: How it is packed.
        budget: Gives context and batch.
        scores: Scores of the packed weights, simulated in torch, or None if only the artifact is measured.
        answers: Answers written by the packed weights, simulated in torch, or None if no evaluator needs them.
        student: The packed weights, simulated in torch, for questions in text; None after export.
        artifact: The exported file or folder, or None before export.
        artifact_bytes: Size of its files with weights, as counted by its exporter; None before export.
        split: The split of scores and answers.
        teacher: Shape of the teacher, or None if there is none.
        threads: Number of CPU threads that a runtime may use.
    """

    spec: ModelSpec
    deployment: Deployment
    budget: Budget
    scores: TokenScores | None = None
    answers: Answers | None = None
    student: SimulatedStudent | None = None
    artifact: Path | None = None
    artifact_bytes: int | None = None
    split: str = "validation"
    teacher: ModelSpec | None = None
    threads: int = 1


class Evaluator(Protocol):
    """Measures one figure of a student, or several that need the same work.

    An evaluator is a plug-in. It is made without arguments.
    """

    @property
    def name(self) -> str:
        """The evaluator's name, as its entry point declares it."""
        ...

    @property
    def needs(self) -> Needs:
        """The parts of a subject that the evaluator reads."""
        ...

    @property
    def measures(self) -> Mapping[str, Quantity]:
        """The quantities that it measures, by name.

        If it needs scores, answers or the student, each of them can be the metric that ranks a search.
        """
        ...

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Measure a subject. It has what `needs` names, and `supports` is true for its deployment."""
        ...

    def supports(self, deployment: Deployment) -> bool:
        """Return whether this evaluator can measure students under a deployment; by default it can measure all."""
        return True


def register_evaluator(evaluator: Evaluator) -> str:
    """Register an object as an evaluator of this Python session under its own name, and return that name.

    Ray's own serialiser takes it to the workers. It is never written to disk: rows record its name and a hash of its
    source. A run can be resumed only if the same evaluator is registered.

    Raises:
        InputError: The object is no evaluator, or an installed one has its name.
    """
    lacking = [name for name in ("name", "needs", "measures", "evaluate", "supports") if not hasattr(evaluator, name)]
    if lacking or isinstance(evaluator, type):
        problem = "it is a class: give an object of it" if isinstance(evaluator, type) else f"it lacks {lacking[0]}"
        raise InputError(f"{evaluator!r} is no evaluator: {problem}")
    plugins.register("evaluators", evaluator.name, evaluator)
    return evaluator.name


def load_evaluator(name: str) -> Evaluator:
    """Make the evaluator of a name.

    Raises:
        InputError: As `plugins.load`.
    """
    made: Evaluator = plugins.load("evaluators", name)
    return made
