"""The least time that a training step, or a pass of a served model, can take on a device: its bytes and operations."""

from __future__ import annotations

from dataclasses import dataclass

from autodistill.estimates.speed import work
from autodistill.hardware.device import Device
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role
from autodistill.strategy.deployment import Deployment


@dataclass(frozen=True, kw_only=True)
class StepFloor:
    """The least seconds of a training step, by what they are for.

    Attributes:
        products: Of the student's matrix products and its head, forward and backward.
        attention: Of its attention.
        teacher: Of the teacher's forward pass, where it runs in the step.
        optimizer: Of moving weights, gradients and moments through memory.
        operations, bytes: That those are made of.
    """

    products: float
    attention: float
    teacher: float
    optimizer: float
    operations: float
    bytes: float

    @property
    def total(self) -> float:
        """The sum: the optimiser begins when the backward pass has ended."""
        return self.products + self.attention + self.teacher + self.optimizer


def step_floor(
    spec: ModelSpec,
    device: Device,
    *,
    sequences: int,
    length: int,
    bf16: bool,
    trained: int,
    teacher: ModelSpec | None = None,
    checkpointing: bool = False,
    moment_bytes: int = 4,
) -> StepFloor:
    """Return the floor of one optimiser step.

    A product costs two operations for a weight and token in the forward pass, and twice as many in the backward one;
    of attention, which is causal, half of the pairs count. AdamW reads weight, gradient and two moments, and writes
    weight and moments.

    Args:
        spec: The student.
        device: What computes.
        sequences, length: Of the step.
        bf16: Whether products are computed in bfloat16.
        trained: Weights that the optimiser moves.
        teacher: Its shape, where it runs in the step.
        checkpointing: Whether the forward pass is computed twice.
        moment_bytes: Of a moment.
    """
    rate = device.rate("bf16", "fp16") if bf16 else device.rate("fp32")
    passes = 4 if checkpointing else 3
    forward, attended = _forward(spec, sequences, length)
    beside = sum(_forward(teacher, sequences, length)) if teacher is not None else 0.0
    moved = float(trained * (4 * 3 + 4 * moment_bytes))
    return StepFloor(
        products=passes * forward / rate,
        attention=passes * attended / rate,
        teacher=beside / rate,
        optimizer=moved / device.bandwidth,
        operations=passes * (forward + attended) + beside,
        bytes=moved,
    )


def _forward(spec: ModelSpec, sequences: int, length: int) -> tuple[float, float]:
    """Operations of a forward pass with logits of every token: of products, and of attention."""
    weights = sum(
        tensor.shape[0] * tensor.shape[1]
        for tensor in spec.tensors
        if len(tensor.shape) == 2 and tensor.role is not Role.EMBEDDING
    )
    if spec.tied:
        weights += spec.vocabulary * spec.width
    tokens = sequences * length
    attended = 4 * tokens * (length / 2) * spec.heads * spec.head_dim * spec.layers
    return 2.0 * tokens * weights, attended


def pass_floor(spec: ModelSpec, deployment: Deployment, device: Device, *, tokens: int, behind: float) -> float:
    """Return the least seconds of a pass of one stream: the longer of reading its bytes and computing.

    Args:
        spec, deployment: The model and its packing.
        device: What serves it, of whose rates the fastest counts, since a runtime may compute in fewer bits.
        tokens: Of the pass: a prompt's, or 1.
        behind: Tokens before each on average.
    """
    found = work(spec, deployment, tokens=tokens, sequences=1, behind=behind)
    return max(found.bytes / device.bandwidth, found.operations / max(device.rates.values()))
