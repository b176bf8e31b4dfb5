"""The few protocols between rooms, and the plain records that cross them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from autodistill.durable import put
from autodistill.strategy import Deployment
from autodistill.tensors import Role, Tensors, TensorSpec, is_expert
from autodistill.units import Budget

Source = Literal["measured", "simulated", "predicted"]
Direction = Literal["max", "min"]
OptimizerState = Literal["float32", "bfloat16", "int8"]
# What a teacher's matrices are held in; it computes in float32 whatever that is.
HeldType = Literal["float32", "bfloat16", "float16"]
# What an evaluator reads of a subject, beside its shape, deployment and budget: a field of it, but for "spec".
Needs = Literal["spec", "scores", "answers", "student", "artefact"]

# Tokens of a training or evaluation sequence.
SEQUENCE_LENGTH = 256


class Status(StrEnum):
    """What became of a trial."""

    COMPLETED = "completed"  # trained to the plan's tokens and evaluated
    STOPPED = "stopped"  # judged at a rung and not taken further
    REJECTED = "rejected"  # no deployment can fit: never trained
    FAILED = "failed"


class Decision(StrEnum):
    """A scheduler's answer to a report."""

    PAUSE = "pause"
    STOP = "stop"


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
        bound: What no single one of these values can be better than, such as 1 of right or wrong; None for no such.
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
    bound: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The measurement as plain data."""
        return asdict(self)


MOST_LAYERS = 10_000
"""Beyond it a config is a slip or an attack, and not a model."""
MOST_OF_A_SIZE = 2**31 - 1
"""The same of any other size."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The shape of a decoder-only transformer, as far as memory and speed depend on it; no weights.

    Attributes:
        architecture: transformers' `model_type`, like "llama".
        layers, width, heads, kv_heads, head_dim, ffn_width, vocabulary, max_context: Sizes.
        tied: Whether the head is the embedding table.
        tensors: Every stored tensor once, under transformers' name; a tied head is not among them. The experts' share
            of a mixture is one matrix each of gates, ups and downs in a layer.
        window, windowed: Tokens that a sliding window sees, 0 where there is none, and the layers that have one.
        experts, active_experts: Of a mixture of experts, each of `ffn_width`, and those that a token takes; 0 where
            there is one FFN.
        shared_experts: Those beside them that every token takes.
        latent: Values of a token and layer that latent attention caches for all heads; 0 where keys and values are.
        not_in_gguf: What the config asks for that llama.cpp's graph of the architecture does not compute, in words.
        text_not_in_gguf: Why llama.cpp would not cut text as the model's tokenizer does, where that is known, in words.
    """

    architecture: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    vocabulary: int
    max_context: int
    tied: bool
    tensors: Sequence[TensorSpec]
    window: int = 0
    windowed: tuple[int, ...] = ()
    experts: int = 0
    active_experts: int = 0
    shared_experts: int = 0
    latent: int = 0
    not_in_gguf: str = ""
    text_not_in_gguf: str = ""

    @property
    def windowed_layers(self) -> int:
        """How many layers have a sliding window."""
        return len(self.windowed)

    @cached_property
    def parameters(self) -> int:
        """Number of weights, a tied embedding counted once."""
        return sum(count * math.prod(tensor.shape) for tensor, count in self.kinds)

    @cached_property
    def kinds(self) -> tuple[tuple[TensorSpec, int], ...]:
        """One tensor of those that differ in nothing but the name, and how many: what packings see that keep no parts.

        Experts' are apart from others.
        """
        counts: Counter[tuple[Role, tuple[int, ...], bool, bool]] = Counter()
        first: dict[tuple[Role, tuple[int, ...], bool, bool], TensorSpec] = {}
        tensors = self.tensors
        for tensor, count in tensors.kinds if isinstance(tensors, Tensors) else ((one, 1) for one in tensors):
            key = (tensor.role, tensor.shape, tensor.more_bits, is_expert(tensor.name))
            counts[key] += count
            first.setdefault(key, tensor)
        return tuple((first[key], count) for key, count in counts.items())


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """What one forward pass over a split says of every predicted token.

    Attributes:
        nll: float64 [n], negative log-likelihood of the true token in nats.
        correct: bool [n], whether the most likely token is the true one.
        agrees: bool [n], whether it is the teacher's most likely one.
        documents: int32 [n], the document each predicted token belongs to.
        confidence: float64 [n], probability of the most likely token; None where nobody kept it.
        divergence: float64 [n], KL(teacher || student) in nats over the outcomes of the reference; None without one.
        window: Tokens of the sequences that were read, each on its own: context and stride of a window are its length.
        outcomes: Over how many outcomes the divergence goes: the teacher's likeliest tokens, and the rest as one.
        teacher_correct: bool [n], whether the teacher's most likely token is the true one; None without a reference.
    """

    nll: npt.NDArray[np.float64]
    correct: npt.NDArray[np.bool_]
    agrees: npt.NDArray[np.bool_]
    documents: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float64] | None = None
    divergence: npt.NDArray[np.float64] | None = None
    window: int | None = None
    outcomes: int | None = None
    teacher_correct: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherReference:
    """What a validation pass keeps of the teacher, for each predicted token.

    Attributes:
        top1: int32 [n], its most likely token.
        tokens: int32 [n, k], its k most likely ones, in any order.
        log_probs: float32 [n, k], their log-probabilities over the whole vocabulary, in nats.
    """

    top1: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]

    def head(self, count: int) -> TeacherReference:
        """That of the first `count` predicted tokens."""
        return self.part(0, count)

    def part(self, start: int, stop: int) -> TeacherReference:
        """That of some predicted tokens."""
        return TeacherReference(
            top1=self.top1[start:stop], tokens=self.tokens[start:stop], log_probs=self.log_probs[start:stop]
        )

    def renamed(self, first: int, second: int) -> TeacherReference:
        """With two tokens in each other's place."""
        top1, tokens = (
            np.where(ids == first, second, np.where(ids == second, first, ids)).astype(np.int32)
            for ids in (self.top1, self.tokens)
        )
        return TeacherReference(top1=top1, tokens=tokens, log_probs=self.log_probs)

    def save(self, path: Path) -> None:
        """Writes plain arrays, whole or not at all."""
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, top1=self.top1, tokens=self.tokens, log_probs=self.log_probs)
            put(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> TeacherReference:
        """Reads what `save` wrote; no pickle."""
        with np.load(path, allow_pickle=False) as found:
            return cls(top1=found["top1"], tokens=found["tokens"], log_probs=found["log_probs"])


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model wrote, greedily, to the questions of a split.

    Attributes:
        texts: The answers, in the order of the questions, without special tokens.
        marks: float64 [n], 1 for a right answer; a task may give a part to a wrong one.
        documents: int32 [n], the document of each question.
        unasked: How many of them do not fit the context with the answer expected: their text is "", their mark 0.
    """

    texts: tuple[str, ...]
    marks: npt.NDArray[np.float64]
    documents: npt.NDArray[np.int32]
    unasked: int = 0


class Likelihood(NamedTuple):
    """How likely a continuation is: its log-likelihood in nats, its tokens, and whether greedy decoding writes it."""

    log_likelihood: float
    tokens: int
    greedy: bool


class SimulatedStudent(Protocol):
    """A student whose packed weights lie in torch, and what an evaluator may ask of it, in text."""

    @property
    def model(self) -> Any:
        """A causal language model of transformers, in float32, whose weights are the packed ones for the time being."""
        ...

    @property
    def device(self) -> str:
        """Where the model lies."""
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
        """Of an evaluator's own examples, how much is to be read: 1 is all of them; less at a rung."""
        ...

    @property
    def context(self) -> int:
        """Tokens that a prompt and what follows it may have in all: the budget's, or the model's where that is less."""
        ...

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Of each (prompt, continuation); pairs with the same prompt share its pass through the model."""
        ...

    def rolling(self, texts: Sequence[str], window: int, stride: int) -> list[npt.NDArray[np.float64]]:
        """Negative log-likelihood in nats of each text's tokens in strided windows; of the first only after one that
        the tokenizer begins all texts with.
        """
        ...

    def chats(self, prompts: Sequence[str]) -> list[str]:
        """Each prompt as a user's turn in the tokenizer's chat template, up to where the answer begins."""
        ...

    def write(self, prompts: Sequence[str], *, max_tokens: int, stops: Sequence[str] = ()) -> list[str]:
        """What it writes, greedily, after each prompt, up to the first of the texts in `stops`."""
        ...

    def save(self, folder: Path) -> None:
        """Writes the packed weights, dequantised, as a folder that transformers loads."""
        ...

    def examples(self) -> list[dict[str, Any]]:
        """The split that is read, as plain records: `id`, and `prompt` and `answer`, or `text` and `tokens`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What an evaluator is given; it reads what it needs and no more.

    Attributes:
        spec: Shape of the student.
        deployment: How it is packed.
        budget: Gives context and batch.
        scores: Of the packed weights simulated in torch, or None where only the artefact is measured.
        answers: Written by the packed weights simulated in torch; None where no evaluator asks for them.
        student: The packed weights simulated in torch, to be asked; None after export.
        artefact: The exported file or folder, or None before export.
        split: That scores and answers are of.
        threads: CPU threads a runtime may use.
    """

    spec: ModelSpec
    deployment: Deployment
    budget: Budget
    scores: TokenScores | None = None
    answers: Answers | None = None
    student: SimulatedStudent | None = None
    artefact: Path | None = None
    split: str = "validation"
    threads: int = 1


class Evaluator(Protocol):
    """One measurement, or several that fall out of the same work. A plug-in: constructed without arguments.

    What reads scores or answers is given part of them where a rung's decision is certain by these. What asks the
    student itself is then asked for all, unless it is `Parted` too.
    """

    @property
    def name(self) -> str:
        """As it is declared."""
        ...

    @property
    def needs(self) -> Needs:
        """What it reads of a subject."""
        ...

    @property
    def measures(self) -> Mapping[str, Quantity]:
        """The measurements it gives, by name; of what needs scores, answers or the student, each may rank a search."""
        ...

    def evaluate(self, subject: Subject) -> tuple[Measurement, ...]:
        """Measures; called only where what `needs` names is there and `supports` holds."""
        ...

    def supports(self, deployment: Deployment) -> bool:
        """Whether this evaluator can measure a student packed so."""
        ...


@runtime_checkable
class Parted(Evaluator, Protocol):
    """An evaluator that asks the student, and can be read in parts: what it is not asked for further is saved."""

    def in_parts(self, subject: Subject) -> Iterator[tuple[Measurement, ...]]:
        """What `evaluate` gives, over as many questions as are read after each part of `certainty.ends`.

        Each question is asked once, and none before it is due.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """An exported student on disk.

    Attributes:
        path: The file a runtime is given (GGUF), or the folder.
        size_bytes: Bytes of the files that hold weights.
    """

    path: Path
    size_bytes: int


class Exporter(Protocol):
    """Writes a student in one container format, and reads back what was written. Constructed without arguments."""

    name: str
    formats: tuple[str, ...]

    def export(
        self,
        student: Path,
        deployment: Deployment,
        out: Path,
        *,
        teacher: str | None = None,
        licence: str | None = None,
        name: str | None = None,
    ) -> Artefact:
        """Packs `student`, a folder of transformers, into the folder `out`: a student's, or the teacher's own.

        What the model is called, what it is of, and the licence that it inherits, are written down where the container
        has a place for them and they are known. Without a name it is called the student of its teacher.
        """
        ...

    def unpack(self, artefact: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        """Yields each stored tensor by transformers' name, dequantised from the bytes on disk."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a search will spend, fixed before the first trial.

    Attributes:
        trials: Strategies proposed, baselines not counted.
        tokens: Training tokens of a trial at full fidelity.
        rungs: Tokens after which a trial is judged, ascending; the last is `tokens`.
        keep: How many of the trials go past each rung but the last.
        sequence_length: Tokens of a training sequence.
        batch_tokens: Tokens of an optimiser step, a multiple of `sequence_length`.
        warmup_tokens: Tokens over which the learning rate rises.
        micro_batch: Sequences of one forward and backward pass; their gradients add up to the step's.
        checkpointing: Whether the backward pass computes each layer's activations again instead of keeping them.
        optimizer_state: What AdamW's two moments are held in.
        lengths: Multiples of `tokens` that trials may be trained on to, 1 first.
        longest: Multiple that the best are trained on to at most, in what the time box has left for it; 1 for none.
        alone: CPU threads of a worker that trains with nothing beside it; 0 where that is never done.
        data_tokens: Of the text that all trials draw from, in passes; 0 for as many as the longest of `lengths` has.
        decay: Share of a rung's tokens that the final decay takes; finishing happens in it.
        rung_eval_tokens, eval_tokens, test_tokens: Tokens an evaluation reads: at a rung, at full fidelity, on test.
        workers: Trials that train at once.
        threads: CPU threads of each process of a worker.
        processes: That train one trial together.
        gpus: Of each process: a fraction where several share one.
        bf16: Whether training computes in bfloat16 where that is safe.
        seed: Of data order, projections and proposals.
        box_seconds: The time box, or None.
        seconds: Expected seconds by phase.
        notes: What the box could not hold, in sentences.
        example_share: Of the examples of tasks, how much an evaluation reads at full fidelity; less at a rung, as of
            the tokens.
    """

    trials: int
    tokens: int
    rungs: tuple[int, ...]
    keep: tuple[int, ...]
    sequence_length: int
    batch_tokens: int
    warmup_tokens: int
    decay: float
    rung_eval_tokens: int
    eval_tokens: int
    test_tokens: int
    workers: int
    threads: int
    bf16: bool
    seed: int
    box_seconds: float | None
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()
    micro_batch: int = 1
    checkpointing: bool = False
    optimizer_state: OptimizerState = "float32"
    processes: int = 1
    gpus: float = 1.0
    example_share: float = 1.0
    lengths: tuple[float, ...] = (1.0,)
    longest: float = 1.0
    alone: int = 0
    data_tokens: int = 0

    def tokens_of(self, length: float) -> int:
        """Training tokens of a trial of so many times the plan's, in whole steps."""
        return round(self.tokens * length / self.batch_tokens) * self.batch_tokens if length > 1 else self.tokens

    @property
    def most_tokens(self) -> int:
        """Training tokens of the text that every trial draws from."""
        return self.data_tokens or self.tokens_of(max(self.lengths))

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return asdict(self) | {name: list(getattr(self, name)) for name in ("rungs", "keep", "notes", "lengths")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Reads what `to_json` wrote."""
        lists = ("rungs", "keep", "notes", *(("lengths",) if "lengths" in data else ()))
        return cls(**(dict(data) | {name: tuple(data[name]) for name in lists}))
