"""Hidden-state alignment: which student layer follows which state of the teacher, through which projection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from autodistill.errors import InputError
from autodistill.strategy import Alignment


class Pair(NamedTuple):
    """A student layer and the teacher state it follows.

    Attributes:
        student_layer: Index of the layer whose output is aligned.
        teacher_state: Index of the teacher layer whose output is the target.
    """

    student_layer: int
    teacher_state: int


def aligned_layers(alignment: Alignment, layers: int) -> tuple[int, ...]:
    """Student layers that are aligned, ascending, the last one always among them."""
    if alignment.count > layers:
        raise InputError(f"alignment.count is {alignment.count}, but the student has {layers} layers: lower it")
    return tuple(-(-(i + 1) * layers // alignment.count) - 1 for i in range(alignment.count))


def layer_map(alignment: Alignment, kept: tuple[int, ...], teacher_layers: int) -> tuple[Pair, ...]:
    """Pairs by inheritance.

    Student layer j is teacher layer kept[j] and feeds the copy of teacher layer kept[j + 1], so its target is what
    that layer is fed in the teacher: the output of teacher layer kept[j + 1] - 1. The last one's is the last output.

    Args:
        alignment: What is aligned.
        kept: Teacher layer that each student layer was copied from.
        teacher_layers: Number of the teacher's layers.
    """
    inputs = [following - 1 for following in kept[1:]] + [teacher_layers - 1]
    return tuple(Pair(layer, inputs[layer]) for layer in aligned_layers(alignment, len(kept)))


def projection(alignment: Alignment, student_width: int, teacher_width: int, seed: int) -> nn.Module:
    """Map from the student's states [..., student_width] to [..., teacher_width], float32.

    A linear map starts as the identity where widths agree and as an orthogonal map elsewhere; a low-rank one starts as
    a projection onto a random subspace of `rank` channels. Neither has a bias.

    Raises:
        InputError: Widths that differ without a projection, or a rank that is no reduction.
    """
    generator = torch.Generator().manual_seed(seed)
    if alignment.projection == "none":
        check_widths(alignment, student_width, teacher_width)
        return nn.Identity()
    if alignment.projection == "linear":
        linear = _linear(student_width, teacher_width)
        if student_width == teacher_width:
            nn.init.eye_(linear.weight)
        else:
            nn.init.orthogonal_(linear.weight, generator=generator)
        return linear
    check_rank(alignment, student_width, teacher_width)
    down, up = _linear(student_width, alignment.rank), _linear(alignment.rank, teacher_width)
    nn.init.orthogonal_(down.weight, generator=generator)
    if student_width == teacher_width:
        with torch.no_grad():
            up.weight.copy_(down.weight.T)
    else:
        nn.init.orthogonal_(up.weight, generator=generator)
    return nn.Sequential(down, up)


def check_widths(alignment: Alignment, student_width: int, teacher_width: int) -> None:
    """Refuses states of different widths without a projection.

    Raises:
        InputError: The widths differ, and there is none.
    """
    if alignment.projection == "none" and student_width != teacher_width:
        raise InputError(
            f"alignment.projection is none, but the student is {student_width} wide and the teacher {teacher_width}: "
            "use a linear projection"
        )


def check_rank(alignment: Alignment, student_width: int, teacher_width: int) -> None:
    """Refuses a low-rank projection that is no reduction.

    Raises:
        InputError: The rank is above one of the widths.
    """
    if alignment.rank > min(student_width, teacher_width):
        raise InputError(
            f"alignment.rank is {alignment.rank}, but the states are {student_width} and {teacher_width} wide: lower it"
        )


def _linear(inputs: int, outputs: int) -> nn.Linear:
    # The default initialisation would draw from the global generator; every weight is set by the caller.
    with torch.device("meta"):
        linear = nn.Linear(inputs, outputs, bias=False, dtype=torch.float32)
    return linear.to_empty(device="cpu")


def rms_normalise(states: Tensor) -> Tensor:
    """States scaled to a root mean square of 1 over the width, so that massive activations do not rule the loss."""
    work = states if states.dtype == torch.float64 else states.float()
    return work * torch.rsqrt(work.square().mean(dim=-1, keepdim=True) + 1e-12)


def alignment_loss(states: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference of RMS-normalised states, 2 - 2 cos of the angle between them, over all tokens.

    Args:
        states: [tokens, teacher_width], of the student after its projection.
        target: [tokens, teacher_width], of the teacher, already RMS-normalised.
    """
    return (rms_normalise(states) - target.to(torch.promote_types(states.dtype, torch.float32))).square().mean()
