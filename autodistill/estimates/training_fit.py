"""Ways to fit a trial's training into a machine's memory."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from autodistill.errors import InputError, MissingDependencyError
from autodistill.estimates.serving_memory import TRAINING_PROCESS_BYTES
from autodistill.estimates.training_memory import OptimizerState, TrainingEstimate, training_memory
from autodistill.models.spec import ModelSpec
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.strategy.recipe import Alignment, Attention, Lora
from autodistill.units import format_bytes

Aligned = tuple[Alignment | None, Attention | None]

TrainingSetup = tuple[bool, OptimizerState]
"""Whether activations are computed again, and the type of AdamW's moments."""

TRAINING_SETUPS: tuple[TrainingSetup, ...] = ((False, "float32"), (True, "float32"), (True, "bfloat16"), (True, "int8"))
"""All combinations that are used, from the fastest to the smallest."""

INSTALL_8BIT = "pip install 'autodistill-search[8bit]'"

# The largest measured excess over the prediction, from benchmarks/reports/2026-11-26-training-memory.md. 10% more is
# held. On a CPU, memory that a step frees is kept for the next step, so 30% more is taken from the system. The system
# kills a process that takes too much; it raises no error after which a step could be halved.
_SPARE, _CPU_SPARE = 1.10, 1.30

CPU_PASS_TOKENS = 256
"""Tokens of a pass on a CPU that only reads. In it, a sequence of 40 tokens takes a third to 40% of its time alone.

Longer sequences are read alone. Twice as many tokens would be an eighth faster, but leave threads without a pass.
"""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training whose memory is estimated: student, steps and place.

    Attributes:
        spec: The largest student that is to be trained.
        sequence_length: Tokens of a sequence.
        sequences: Sequences of an optimiser step.
        teacher: The teacher, if there are alignments.
        alignments: What trials may align to the teacher; the alignment that takes the most counts.
        lora: The largest low-rank changes, if every trial trains such changes.
        train_embeddings: Whether a trial may train the embedding table.
        processes: Processes that train the student together, each with its share of the sequences and of the weights.
        bf16: Whether products are computed in bfloat16.
        on_grid: Whether a trial may be trained on a grid.
        scales_of: The storage of weights if every trial trains only their scales; each process then holds all weights.
        writes: Whether a trial's student writes tokens itself. It writes as many sequences at once as it trains on.
        device: Where trials run: "cpu", or an accelerator.
        threads: Threads of a process; on a CPU each thread has a pass of its own.
    """

    spec: ModelSpec
    sequence_length: int
    sequences: int
    teacher: ModelSpec | None = None
    alignments: Collection[Aligned] = ()
    lora: Lora | None = None
    train_embeddings: bool = True
    processes: int = 1
    bf16: bool = False
    on_grid: bool = False
    scales_of: QuantizationScheme | None = None
    writes: bool = False
    device: str = "cpu"
    threads: int = 1

    def estimate(self, micro_batch: int, setup: TrainingSetup) -> TrainingEstimate:
        """Estimate the memory of one process, for the number of sequences in a pass and the other settings."""
        checkpointing, state = setup
        estimates = (
            training_memory(
                self.spec,
                tokens=micro_batch * self.sequence_length,
                checkpointing=checkpointing,
                optimizer_state=state,
                teacher=self.teacher,
                alignment=alignment,
                attention=attention,
                lora=self.lora,
                train_embeddings=self.train_embeddings,
                bf16=self.bf16,
                on_grid=self.on_grid,
                scales_of=self.scales_of,
                passes=-(-self.sequences // (self.processes * micro_batch)),
                written=micro_batch if self.writes else 0,
            )
            for alignment, attention in self.alignments or [(None, None)]
        )
        shards = 1 if self.scales_of else self.processes
        return sharded(max(estimates, key=lambda estimate: estimate.total_bytes), self.spec, shards)

    @property
    def evaluation_bytes(self) -> int:
        """Return the memory of scoring the student under a deployment.

        On a CPU the packed values lie next to the float32 weights. On an accelerator the weights wait in the machine's
        memory, and one tensor at a time lies there with its packed values.
        """
        cpu, spec = self.device == "cpu", self.spec
        beside = spec.parameters if cpu else max(math.prod(tensor.shape) for tensor in spec.tensors)
        return 4 * (spec.parameters + beside) + pass_bytes(spec, self.sequence_length, self.threads if cpu else 1)


@dataclass(frozen=True, kw_only=True)
class TrainingFit:
    """A way to compute a step. The result is the same for all ways, except for the rounding of 16-bit and 8-bit states.

    Attributes:
        micro_batch: Sequences of one forward and backward pass. Gradients of all passes add up to the step's gradient.
        checkpointing: Whether the backward pass computes each layer's activations again instead of keeping them.
        optimizer_state: Type of AdamW's two moments.
        estimate: The memory that this way takes.
        evaluation_bytes: The memory to score the trained student afterwards, whole and in one process.
    """

    micro_batch: int
    checkpointing: bool
    optimizer_state: OptimizerState
    estimate: TrainingEstimate = field(repr=False)
    evaluation_bytes: int = field(repr=False)

    @property
    def total_bytes(self) -> int:
        """The memory needed: the larger of training and evaluation, which follow each other."""
        return max(self.estimate.total_bytes, self.evaluation_bytes)

    def safe_bytes(self, device: str) -> int:
        """The memory needed, with the largest excess over the prediction that was measured."""
        spare = _CPU_SPARE if device == "cpu" else _SPARE
        return max(int(spare * self.estimate.total_bytes), self.evaluation_bytes)


def training_fits(
    training: Training, *, setups: Sequence[TrainingSetup] = TRAINING_SETUPS, at_once: int | None = None
) -> Iterator[TrainingFit]:
    """Yield the ways to compute a step, from the fastest to the smallest. Each takes less memory than those before.

    Halving the micro-batch costs nearly nothing, and checkpointing costs a third more operations. States of 16 bits and
    then of 8 come last, because only they change the results. A second pass finds the first pass's gradients in memory,
    which may be more than half of what a pass keeps. Ways that need no less memory are left out.

    Args:
        training: The training.
        setups: The settings that may be used.
        at_once: Most sequences of a pass; by default all sequences of a process.
    """
    sizes = [max(1, min(training.sequences // training.processes, at_once or training.sequences))]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    evaluation_bytes = training.evaluation_bytes
    least = math.inf
    for (checkpointing, state), micro_batch in itertools.product(setups, sizes):
        estimate = training.estimate(micro_batch, (checkpointing, state))
        if estimate.total_bytes < least:
            least = estimate.total_bytes
            yield TrainingFit(
                micro_batch=micro_batch,
                checkpointing=checkpointing,
                optimizer_state=state,
                estimate=estimate,
                evaluation_bytes=evaluation_bytes,
            )


def has_eight_bit() -> bool:
    """Return whether the package for 8-bit optimiser states is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def pass_bytes(spec: ModelSpec, sequence_length: int, threads: int) -> int:
    """Return the memory for running a model, without weights: a pass over one or a few sequences on each thread."""
    tokens = max(sequence_length, CPU_PASS_TOKENS)
    logits = 3 * 4 * tokens * spec.vocabulary
    activations = 4 * tokens * (4 * spec.width + 3 * spec.ffn_width)
    return threads * (activations + logits) + TRAINING_PROCESS_BYTES


def sharded(estimate: TrainingEstimate, spec: ModelSpec, processes: int) -> TrainingEstimate:
    """Return the memory of one of several processes: its shards, and weights and gradients that are briefly whole.

    These are whole: the tables, the layer at work and the layer fetched ahead (FSDP2), and low-rank changes with their
    gradients and states.
    """
    if processes == 1:
        return estimate
    tables = sum(math.prod(tensor.shape) for tensor in spec.tensors if spec.vocabulary in tensor.shape)
    layer = (spec.parameters - tables) // spec.layers
    changes = estimate.weights_bytes - 4 * spec.parameters
    states = estimate.optimizer_bytes * changes // max(1, estimate.gradients_bytes)
    shards = {
        name: whole + (getattr(estimate, name) - whole) // processes
        for name, whole in (("weights_bytes", changes), ("gradients_bytes", changes), ("optimizer_bytes", states))
    }
    shards["weights_bytes"] += 4 * (2 * tables + 3 * layer)
    return replace(estimate, **shards)


def fit_training(training: Training, limit_bytes: int) -> TrainingFit:
    """Return the fastest way to train a student that fits the memory with a reserve, evaluation included.

    If no way fits with the reserve, return the smallest way that fits by the prediction alone.

    Args:
        training: The training.
        limit_bytes: Memory of the training device, or of each of them.

    Raises:
        InputError: No way fits; the message says what the smallest way, or the evaluation, takes.
        MissingDependencyError: Only 8-bit optimiser states fit, and their package is not installed.
    """
    ways = list(training_fits(training))
    usable = [way for way in ways if way.optimizer_state != "int8" or has_eight_bit()]
    safe = (way for way in usable if way.safe_bytes(training.device) <= limit_bytes)
    tight = (way for way in reversed(usable) if way.total_bytes <= limit_bytes)
    found = next(safe, None) or next(tight, None)
    if found is not None:
        return found
    smallest = ways[-1]
    if smallest.total_bytes <= limit_bytes:
        raise MissingDependencyError(
            f"training a student of {training.spec.layers} layers fits {format_bytes(limit_bytes)} only with 8-bit "
            f"optimiser states, which need bitsandbytes: {INSTALL_8BIT}"
        )
    if smallest.evaluation_bytes > smallest.estimate.total_bytes:
        what, means = "evaluating", "in one process, as a trained student is"
    else:
        what, means = "training", "even one sequence at a time, with checkpointing and 8-bit optimiser states"
        means += f" over {training.processes} processes" if training.processes > 1 else ""
    raise InputError(
        f"{what} a student of {training.spec.layers} layers takes {format_bytes(smallest.total_bytes)} {means}, and "
        f"this machine has {format_bytes(limit_bytes)} free: choose a smaller teacher, or a space with smaller students"
    )
