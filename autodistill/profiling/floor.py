"""The least time that a training step, or a pass of a served model, can take on a device, by bytes and operations."""

from __future__ import annotations

from dataclasses import dataclass

from autodistill.estimates.speed import work
from autodistill.hardware.device import Device
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role
from autodistill.strategy.deployment import Deployment


@dataclass(frozen=True, kw_only=True)
class StepFloor:
    """The least seconds of a training step, by part.

    Attributes:
        products: Seconds of the student's matrix products and its head, forward and backward.
        attention: Seconds of its attention.
        teacher: Seconds of the teacher's forward pass, if it runs in the step.
        optimizer: Seconds of moving weights, gradients and moments through memory.
        operations, bytes: Operations and bytes from which these times are computed.
    """

    products: float
    attention: float
    teacher: float
    optimizer: float
    operations: float
    bytes: float

    @property
    def total(self) -> float:
        """The sum of all parts. They do not overlap, since the optimiser begins after the backward pass."""
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
) -> StepFloor:
    """Return the floor of one optimiser step.

    A product costs two operations per weight and token in the forward pass, and twice as many in the backward pass.
    Attention is causal, so half of the pairs count. AdamW reads weight, gradient and two moments, and writes weight and
    moments: seven numbers of four bytes.

    Args:
        spec: The student.
        device: The device that computes.
        sequences, length: Number of sequences in the step, and their length.
        bf16: Whether products are computed in bfloat16.
        trained: Number of weights that the optimiser changes.
        teacher: The teacher's shape, if it runs in the step.
    """
    rate = device.rate("bf16", "fp16") if bf16 else device.rate("fp32")
    forward, attended = _forward(spec, sequences, length)
    teacher_operations = sum(_forward(teacher, sequences, length)) if teacher is not None else 0.0
    moved = float(trained * 7 * 4)
    return StepFloor(
        products=3 * forward / rate,
        attention=3 * attended / rate,
        teacher=teacher_operations / rate,
        optimizer=moved / device.bandwidth,
        operations=3 * (forward + attended) + teacher_operations,
        bytes=moved,
    )


def _forward(spec: ModelSpec, sequences: int, length: int) -> tuple[float, float]:
    """Return the operations of a forward pass with logits of every token: those of products, and those of attention."""
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
        spec, deployment: The model and its deployment.
        device: The device that serves it. Its fastest rate counts, since a runtime may compute in fewer bits.
        tokens: Tokens of the pass: those of a prompt, or 1.
        behind: Average number of tokens before each.
    """
    found = work(spec, deployment, tokens=tokens, sequences=1, behind=behind)
    return max(found.bytes / device.bandwidth, found.operations / max(device.rates.values()))
