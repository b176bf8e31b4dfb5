"""How a trial's training is made to fit a machine's memory: fewer sequences at once, checkpointing, 8-bit states."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from autodistill.contracts import ModelSpec, OptimizerState
from autodistill.errors import InputError, MissingDependencyError
from autodistill.estimate import TrainingEstimate, training_memory
from autodistill.strategy import Alignment, Attention
from autodistill.units import format_bytes

Aligned = tuple[Alignment | None, Attention | None]
INSTALL_8BIT = "pip install 'autodistill-search[8bit]'"


@dataclass(frozen=True, kw_only=True)
class TrainingFit:
    """How a step is computed, none of which changes what it means but for the rounding of 8-bit states.

    Attributes:
        micro_batch: Sequences of one forward and backward pass; their gradients add up to the step's.
        checkpointing: Whether the backward pass computes each layer's activations again instead of keeping them.
        optimizer_state: What AdamW's two moments are held in.
        estimate: Memory that this takes.
    """

    micro_batch: int
    checkpointing: bool
    optimizer_state: OptimizerState
    estimate: TrainingEstimate = field(repr=False)


def training_fits(
    spec: ModelSpec,
    *,
    sequence_length: int,
    sequences: int,
    teacher: ModelSpec | None = None,
    alignments: Collection[Aligned] = (),
) -> Iterator[TrainingFit]:
    """Ways to compute a step of so many sequences, from the fastest to the smallest.

    Halving the micro-batch costs nearly nothing, checkpointing a third more operations; 8-bit states come last because
    they alone change the figures.

    Args:
        spec: The student.
        sequence_length: Tokens of a sequence.
        sequences: Of an optimiser step.
        teacher: The teacher, where there are alignments.
        alignments: What trials may align to it; the one that takes most counts.
    """
    ways: list[tuple[int, bool, OptimizerState]] = []
    micro_batch = sequences
    while micro_batch > 1:
        ways.append((micro_batch, False, "float32"))
        micro_batch = -(-micro_batch // 2)
    ways += [(1, False, "float32"), (1, True, "float32"), (1, True, "int8")]
    for micro_batch, checkpointing, state in ways:
        estimates = (
            training_memory(
                spec,
                tokens=micro_batch * sequence_length,
                checkpointing=checkpointing,
                optimizer_state=state,
                teacher=teacher,
                alignment=alignment,
                attention=attention,
            )
            for alignment, attention in alignments or [(None, None)]
        )
        yield TrainingFit(
            micro_batch=micro_batch,
            checkpointing=checkpointing,
            optimizer_state=state,
            estimate=max(estimates, key=lambda estimate: estimate.total_bytes),
        )


def fit_training(
    spec: ModelSpec,
    *,
    sequence_length: int,
    sequences: int,
    limit_bytes: int,
    teacher: ModelSpec | None = None,
    alignments: Collection[Aligned] = (),
) -> TrainingFit:
    """The fastest way to train a student that a memory holds.

    Args:
        spec: The largest student of a space.
        sequence_length: Tokens of a sequence.
        sequences: Of an optimiser step.
        limit_bytes: Memory of the device that trains.
        teacher: The teacher, where there are alignments.
        alignments: What trials may align to it; the one that takes most counts.

    Raises:
        InputError: None does; says what the smallest takes.
        MissingDependencyError: Only 8-bit optimiser states fit, and their package is not installed.
    """
    smallest = None
    for way in training_fits(
        spec, sequence_length=sequence_length, sequences=sequences, teacher=teacher, alignments=alignments
    ):
        smallest = way
        if way.estimate.total_bytes > limit_bytes:
            continue
        if way.optimizer_state == "int8" and importlib.util.find_spec("bitsandbytes") is None:
            raise MissingDependencyError(
                f"training a student of {spec.layers} layers fits {format_bytes(limit_bytes)} only with 8-bit "
                f"optimiser states, which need bitsandbytes: {INSTALL_8BIT}"
            )
        return way
    assert smallest is not None
    raise InputError(
        f"training a student of {spec.layers} layers takes {format_bytes(smallest.estimate.total_bytes)} even one "
        f"sequence at a time, with checkpointing and 8-bit optimiser states, and this machine has "
        f"{format_bytes(limit_bytes)}: choose a smaller teacher, or a space with smaller students"
    )
