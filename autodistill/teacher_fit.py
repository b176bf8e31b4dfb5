"""How a teacher is made to fit a machine's memory: what its matrices are held in."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autodistill.contracts import HeldType, ModelSpec
from autodistill.errors import InputError
from autodistill.hardware import Machine
from autodistill.training_fit import pass_bytes
from autodistill.units import format_bytes

# float32 values of a matrix that are shown to a product at once, for each thread.
_SHOWN_BYTES = 4 * 2**25


@dataclass(frozen=True, kw_only=True)
class TeacherFit:
    """What a teacher's matrices are held in while it runs; it computes in float32 (or where a trial says so bfloat16).

    Attributes:
        held: Their type.
        stored: The type of the weights on disk.
        weights_bytes: Of the weights, and in float32 of their copy as a deployment packs them.
        pass_bytes: What a pass on each thread takes beside them.
    """

    held: HeldType
    stored: HeldType
    weights_bytes: int
    pass_bytes: int

    @property
    def total_bytes(self) -> int:
        """What the memory must hold."""
        return self.weights_bytes + self.pass_bytes

    @property
    def held_bytes(self) -> int:
        """Of the weights alone."""
        return self.weights_bytes // (2 if self.held == "float32" else 1)

    @property
    def rounded(self) -> bool:
        """Whether weights were rounded, so that outputs are not those of the weights on disk."""
        return self.held not in ("float32", self.stored)

    def of(self, fingerprint: str) -> str:
        """What a teacher of this fingerprint puts out is known by: another name where weights were rounded."""
        return f"{fingerprint}-{self.held}" if self.rounded else fingerprint

    @property
    def note(self) -> str | None:
        """What a person is told, in a sentence; None for float32."""
        if self.held == "float32":
            return None
        exact = "which rounds them: its outputs differ a little" if self.rounded else "the type of its files"
        return (
            f"the teacher's matrices are held in {self.held}, {exact}, and computed with in float32: "
            f"{format_bytes(self.total_bytes)} of memory"
        )


def fit_teacher(spec: ModelSpec, *, stored: HeldType, sequence_length: int, machine: Machine) -> TeacherFit:
    """How a teacher is held: in float32 where memory takes that, which is fastest on a CPU, else in 16 bits.

    Float32 needs the weights twice: while the teacher is scored under a deployment, its packed values lie beside them.
    On a GPU, where the weights wait in the machine's memory meanwhile, that half is room for what runs beside it.
    In 16 bits matrices are held once, in the type that they are stored in, and cast to float32, or packed, part by
    part when they are read. Weights stored in float32 are then rounded to bfloat16.

    Args:
        spec: The teacher.
        stored: Type of the weights on disk.
        sequence_length: Tokens of a sequence.
        machine: What is free of its first GPU's memory is the limit, or of its own where that is less (through it
            weights are read) or there is no GPU; on a CPU each core runs a pass of its own.

    Raises:
        InputError: Not even 16 bits fit.
    """
    limit_bytes = min([machine.usable_bytes, *(gpu.usable_bytes for gpu in machine.gpus[:1])])
    threads = 1 if machine.gpus else machine.cpus
    matrices = sum(math.prod(tensor.shape) for tensor in spec.tensors if len(tensor.shape) == 2)
    whole = TeacherFit(
        held="float32",
        stored=stored,
        weights_bytes=2 * 4 * spec.parameters,
        pass_bytes=pass_bytes(spec, sequence_length, threads),
    )
    if whole.total_bytes <= limit_bytes:
        return whole
    half = TeacherFit(
        held="bfloat16" if stored == "float32" else stored,
        stored=stored,
        weights_bytes=2 * matrices + 4 * (spec.parameters - matrices),
        pass_bytes=whole.pass_bytes + threads * _SHOWN_BYTES,
    )
    if half.total_bytes <= limit_bytes:
        return half
    raise InputError(
        f"running a teacher of {spec.layers} layers takes {format_bytes(half.total_bytes)} even in 16 bits, and "
        f"{_holder(machine)} has {format_bytes(limit_bytes)} free: choose a smaller teacher, or let it write the text "
        "to learn from where it is served (autodistill write --endpoint)"
    )


def _holder(machine: Machine) -> str:
    """What must hold a teacher as a whole."""
    count = len(machine.gpus)
    if count > 1 and machine.gpus[0].memory_bytes <= machine.memory_bytes:
        return f"one GPU of this machine's {count}, over which a teacher is not divided,"
    return "this machine"
