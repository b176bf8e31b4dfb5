"""What an evaluator is: what it needs of a student, and the measurement that it gives."""

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
"""Whether what is exported must keep what it knew of general text, or the metric alone counts."""

Scoring = Literal["float32", "tf32", "bf16"]
"""What a model's products are computed in where it is scored; scores of one are never compared with another's."""

# What an evaluator reads of a subject, beside its shape, deployment and budget: a field of it, but for "spec".
Needs = Literal["spec", "scores", "answers", "student", "artifact"]


class Quantity(NamedTuple):
    """What a measurement's value is in, and whether more ("max") or less ("min") of it is better."""

    unit: str
    direction: Direction


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measured quantity.

    Attributes:
        name: The row's field it fills, like "accuracy" or "memory_bytes".
        value: In `unit`.
        unit: "fraction", "bytes", "ms", "tokens/s", "perplexity", ...
        direction: Whether more or less is better.
        source: `measured` in the serving runtime, `simulated` in torch on the packed weights, or `predicted`.
        stderr: Standard error in `unit`, or None where there is none.
        detail: Plain data on how it was obtained: threads, context, parts of a sum.
        documents: What the value is the mean of, by document, for paired comparisons: as `statistics.per_document`
            gives it. Empty where it is no mean.
        bins: The same of a figure that is the sum of sizes of binned sums over all tokens, like "ece": `ids`, `count`
            and `bins`, the sums of each document by bin. Empty for any other.
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
        """The measurement as plain data."""
        return asdict(self)


class SimulatedStudent(Protocol):
    """A student whose packed weights lie in torch, and what an evaluator may ask of it, in text."""

    @property
    def model(self) -> Any:
        """A causal language model of transformers, in float32, whose weights are the packed ones for the time being."""
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
        """The split that is read: "validation" or "test"."""
        ...

    @property
    def share(self) -> float:
        """The share of an evaluator's own examples that is to be read: 1 for all of them, less at a rung."""
        ...

    @property
    def context(self) -> int:
        """Tokens that a prompt and what follows it may have in all: the budget's, or the model's where that is less."""
        ...

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Return the likelihood of each continuation after its prompt; pairs with the same prompt share a pass."""
        ...

    def rolling(self, texts: Sequence[str], window: int, stride: int) -> list[npt.NDArray[np.float64]]:
        """Negative log-likelihood in nats of each text's tokens in strided windows; of the first only after one that
        the tokenizer begins all texts with.
        """
        ...

    def chats(self, prompts: Sequence[str]) -> list[str]:
        """Return each prompt as a user's turn in the tokenizer's chat template, up to where the answer begins."""
        ...

    def write(self, prompts: Sequence[str], *, max_tokens: int, stops: Sequence[str] = ()) -> list[str]:
        """Return what it writes, greedily, after each prompt, up to the first of the texts in `stops`."""
        ...

    def save(self, folder: Path) -> None:
        """Write the packed weights, dequantised, as a folder that transformers loads."""
        ...

    def examples(self) -> list[dict[str, Any]]:
        """The split that is read, as plain records: `id`, and `prompt` and `answer`, or `text` and `tokens`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The student that an evaluator measures, with what was computed of it.

    Attributes:
        spec: Shape of the student.
        deployment: How it is packed.
        budget: Gives context and batch.
        scores: Of the packed weights simulated in torch, or None where only the artifact is measured.
        answers: Written by the packed weights simulated in torch; None where no evaluator asks for them.
        student: The packed weights simulated in torch, to be asked; None after export.
        artifact: The exported file or folder, or None before export.
        artifact_bytes: Of its files that hold weights, as its exporter counts them; None before export.
        split: That scores and answers are of.
        teacher: Shape of the teacher; None where there is none.
        threads: CPU threads a runtime may use.
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
    """Measures one figure of a student, or several that need the same work. A plug-in, made without arguments."""

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
        """The measurements it gives, by name; of what needs scores, answers or the student, each may rank a search."""
        ...

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Measure a subject that has what `needs` names, under a deployment that `supports` holds for."""
        ...

    def supports(self, deployment: Deployment) -> bool:
        """Return whether this evaluator can measure a student packed so; a subclass that does not say can measure
        any.
        """
        return True


def register_evaluator(evaluator: Evaluator) -> str:
    """Make an object an evaluator of this Python session, under the name that it has, and return that name.

    Workers get the object by Ray's own serialiser. It is never written to disk: rows record its name and a hash of its
    source, and a run is resumed where the same one is registered.

    Raises:
        InputError: It is no evaluator, or an installed one has its name.
    """
    lacking = [name for name in ("name", "needs", "measures", "evaluate", "supports") if not hasattr(evaluator, name)]
    if lacking or isinstance(evaluator, type):
        problem = "it is a class: give an object of it" if isinstance(evaluator, type) else f"it lacks {lacking[0]}"
        raise InputError(f"{evaluator!r} is no evaluator: {problem}")
    plugins.register("evaluators", evaluator.name, evaluator)
    return evaluator.name


def load_evaluator(name: str) -> Evaluator:
    """Make the installed evaluator of a name.

    Raises:
        InputError: As `plugins.load`.
    """
    made: Evaluator = plugins.load("evaluators", name)
    return made
