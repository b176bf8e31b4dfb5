"""Choice of how to hold a running teacher: in float32, in 16 bits, or divided over several GPUs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from autodistill.errors import InputError
from autodistill.estimates.divided import indivisible, part_bytes
from autodistill.estimates.training_fit import pass_bytes
from autodistill.hardware.machine import Machine
from autodistill.models.model_folder import HeldType
from autodistill.models.spec import ModelSpec
from autodistill.units import format_bytes

# Bytes of float32 values to which a matrix is cast at once for a product, for each thread.
_SHOWN_BYTES = 4 * 2**25


@dataclass(frozen=True, kw_only=True)
class TeacherFit:
    """The type in which a running teacher's matrices are held. It computes in float32, or in a trial possibly bfloat16.

    Attributes:
        held_type: The type of the matrices in memory.
        stored: The type of the weights on disk.
        weights_bytes: Memory of one process's part of the weights. In float32 it includes their copy as a deployment
            packs them.
        pass_bytes: Memory for the passes on all threads, in addition to the weights.
        held_bytes: Memory of the weights alone, undivided.
        limit_bytes: Free memory of the device; of the first GPU if there are several.
        processes: Number of processes over which the weights are divided, one for each GPU.
    """

    held_type: HeldType
    stored: HeldType
    weights_bytes: int
    pass_bytes: int
    held_bytes: int
    limit_bytes: int
    processes: int = 1

    @property
    def total_bytes(self) -> int:
        """The memory that each process needs."""
        return self.weights_bytes + self.pass_bytes

    @property
    def in_float32(self) -> bool:
        """Whether one device holds the whole teacher in float32."""
        return self.held_type == "float32" and self.processes == 1

    @property
    def rounded(self) -> bool:
        """Whether weights were rounded, so that the outputs differ from those of the weights on disk."""
        return self.held_type not in ("float32", self.stored)

    def of(self, fingerprint: str) -> str:
        """Return the name under which the outputs of this teacher are stored; rounded weights give another name."""
        return f"{fingerprint}-{self.held_type}" if self.rounded else fingerprint

    @property
    def note(self) -> str | None:
        """Return a note for the user, or None for float32."""
        if self.held_type == "float32":
            return None
        exact = "which rounds them: its outputs differ a little" if self.rounded else "the type of its files"
        note = (
            f"the teacher's matrices are held in {self.held_type}, {exact}, and computed with in float32: "
            f"{format_bytes(self.total_bytes)} of memory"
        )
        if self.processes == 1:
            return note
        return f"{note} on each of {self.processes} GPUs, over which it is divided as no one of them holds it"


def fit_teacher(spec: ModelSpec, *, stored: HeldType, sequence_length: int, machine: Machine) -> TeacherFit:
    """Return how to store a teacher: in float32 if memory holds it (fastest on a CPU), else in 16 bits, else divided.

    Float32 needs twice the memory of the weights: while the teacher is scored under a deployment, its packed values lie
    next to them. On a GPU the weights wait in the machine's memory during that time, and the second half is room for
    what runs at the same time. In 16 bits, matrices are held once, in the type in which they are stored. They are cast
    to float32, or packed, part by part when they are read. Weights stored in float32 are rounded to bfloat16 for this.
    A teacher is divided in 16 bits, over the fewest GPUs that hold it together.

    Args:
        spec: The teacher.
        stored: Type of the weights on disk.
        sequence_length: Tokens of a sequence.
        machine: The machine. The limit is the free memory of its first GPU. It is the machine's own free memory if that
            is less, because weights are read through it, or if there is no GPU. On a CPU each core runs a pass of its
            own. Several GPUs may share a teacher that one of them cannot hold.

    Raises:
        InputError: The teacher does not fit even in 16 bits, on as many GPUs as its heads divide over.
    """
    limit_bytes = min([machine.usable_bytes, *(gpu.usable_bytes for gpu in machine.gpus[:1])])
    threads = 1 if machine.gpus else machine.cpus
    matrices = sum(math.prod(tensor.shape) for tensor in spec.tensors if len(tensor.shape) == 2)
    whole = TeacherFit(
        held_type="float32",
        stored=stored,
        weights_bytes=2 * 4 * spec.parameters,
        pass_bytes=pass_bytes(spec, sequence_length, threads),
        held_bytes=4 * spec.parameters,
        limit_bytes=limit_bytes,
    )
    if whole.total_bytes <= limit_bytes:
        return whole
    half_bytes = 2 * matrices + 4 * (spec.parameters - matrices)
    half = TeacherFit(
        held_type="bfloat16" if stored == "float32" else stored,
        stored=stored,
        weights_bytes=half_bytes,
        pass_bytes=whole.pass_bytes + threads * _SHOWN_BYTES,
        held_bytes=half_bytes,
        limit_bytes=limit_bytes,
    )
    if half.total_bytes <= limit_bytes:
        return half
    # Students are made from all of the teacher's weights, in main memory.
    gpus = len(machine.gpus) if half_bytes <= machine.usable_bytes else 0
    divided = list(_divided(spec, half, gpus))
    for fit in divided:
        if fit.total_bytes <= min(gpu.usable_bytes for gpu in machine.gpus[: fit.processes]):
            return fit
    raise InputError(
        f"running a teacher of {spec.layers} layers takes {format_bytes(half.total_bytes)} even in 16 bits, and "
        f"{_holder(spec, gpus, divided)} has {format_bytes(limit_bytes)} free: choose a smaller teacher, or let it "
        "write the text to learn from where it is served (autodistill write --endpoint)"
    )


def _divided(spec: ModelSpec, half: TeacherFit, gpus: int) -> Iterator[TeacherFit]:
    """Yield the ways to divide a teacher that is held in 16 bits, starting with the fewest GPUs."""
    for processes in range(2, gpus + 1):
        if not indivisible(spec, processes):
            part = part_bytes(spec, processes, lambda tensor: 2 if len(tensor.shape) == 2 else 4)
            yield replace(half, weights_bytes=part, processes=processes)


def _holder(spec: ModelSpec, gpus: int, divided: list[TeacherFit]) -> str:
    """Return in words what would have to hold the whole teacher, and why several GPUs do not help."""
    if gpus < 2:
        return "this machine"
    if divided:
        last = divided[-1]
        return f"{format_bytes(last.total_bytes)} on each of {last.processes} GPUs, of which the first"
    return f"one GPU of this machine's {gpus} ({indivisible(spec, gpus)})"
