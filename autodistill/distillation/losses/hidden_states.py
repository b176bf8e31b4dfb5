"""Hidden-state alignment: pairs student layers with teacher states, and compares them through projections."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from autodistill.errors import InputError
from autodistill.strategy.recipe import Alignment


class Pair(NamedTuple):
    """A student layer and the teacher state that it imitates.

    Attributes:
        student_layer: Index of the layer whose output is aligned.
        teacher_state: Index of the teacher layer whose output is the target.
    """

    student_layer: int
    teacher_state: int


def aligned_layers(alignment: Alignment, layers: int) -> tuple[int, ...]:
    """Return the aligned student layers, ascending. The last layer is always included."""
    if alignment.count > layers:
        raise InputError(f"alignment.count is {alignment.count}, but the student has {layers} layers: lower it")
    if alignment.layers == "all":
        return tuple(range(layers))
    if alignment.layers == "last":
        return tuple(range(layers - alignment.count, layers))
    return tuple(-(-(i + 1) * layers // alignment.count) - 1 for i in range(alignment.count))


def layer_map(alignment: Alignment, kept_layers: tuple[int, ...], teacher_layers: int) -> tuple[Pair, ...]:
    """Return the pairs of student layers and teacher states that follow from the copied layers.

    Student layer j is a copy of teacher layer kept[j], and feeds the copy of teacher layer kept[j + 1]. So its target
    is the input of that layer in the teacher: the output of teacher layer kept[j + 1] - 1. The last student layer's
    target is the teacher's last output.

    Args:
        alignment: What is aligned.
        kept_layers: Teacher layer that each student layer was copied from.
        teacher_layers: Number of the teacher's layers.
    """
    inputs = [following - 1 for following in kept_layers[1:]] + [teacher_layers - 1]
    return tuple(Pair(layer, inputs[layer]) for layer in aligned_layers(alignment, len(kept_layers)))


def projection(alignment: Alignment, student_width: int, teacher_width: int, seed: int) -> nn.Module:
    """Return a map from the student's states [..., student_width] to [..., teacher_width], float32, without biases.

    A linear map starts as the identity if the widths agree, and as an orthogonal map otherwise. A low-rank map starts
    as a projection onto a random subspace of `rank` channels. An MLP starts as the linear map A: since gelu(x) -
    gelu(-x) = x, its layers start as [A; -A], with 2 * teacher_width channels, and [I, -I].

    Raises:
        InputError: Widths differ without a projection, or a rank is above one of the widths.
    """
    check_projection(alignment, student_width, teacher_width)
    if alignment.projection == "none":
        return nn.Identity()
    generator = torch.Generator().manual_seed(seed)
    if alignment.projection == "low-rank":
        down, up = _linear(student_width, alignment.rank), _linear(alignment.rank, teacher_width)
        nn.init.orthogonal_(down.weight, generator=generator)
        if student_width == teacher_width:
            with torch.no_grad():
                up.weight.copy_(down.weight.T)
        else:
            nn.init.orthogonal_(up.weight, generator=generator)
        return nn.Sequential(down, up)
    linear = _linear(student_width, teacher_width)
    if student_width == teacher_width:
        nn.init.eye_(linear.weight)
    else:
        nn.init.orthogonal_(linear.weight, generator=generator)
    if alignment.projection == "linear":
        return linear
    first, second = _linear(student_width, 2 * teacher_width), _linear(2 * teacher_width, teacher_width)
    unit = torch.eye(teacher_width)
    with torch.no_grad():
        first.weight.copy_(torch.cat([linear.weight, -linear.weight]))
        second.weight.copy_(torch.cat([unit, -unit], dim=1))
    return nn.Sequential(first, nn.GELU(), second)


def check_projection(alignment: Alignment, student_width: int, teacher_width: int) -> None:
    """Check that these widths allow the projection.

    Raises:
        InputError: Widths differ without a projection, or a rank is above one of the widths and so reduces nothing.
    """
    if alignment.projection == "none" and student_width != teacher_width:
        raise InputError(
            f"alignment.projection is none, but the student is {student_width} wide and the teacher "
            f"{teacher_width}: use a linear projection"
        )
    if alignment.rank > min(student_width, teacher_width):
        raise InputError(
            f"alignment.rank is {alignment.rank}, but the states are {student_width} and {teacher_width} wide: lower it"
        )


def _linear(inputs: int, outputs: int) -> nn.Linear:
    # The default initialisation would use the global random generator. The caller sets every weight instead.
    with torch.device("meta"):
        linear = nn.Linear(inputs, outputs, bias=False, dtype=torch.float32)
    return linear.to_empty(device="cpu")


def rms_normalize(states: Tensor) -> Tensor:
    """Scale states to a root mean square of 1 over the width, so that massive activations do not dominate the loss."""
    work = states if states.dtype == torch.float64 else states.float()
    return work * torch.rsqrt(work.square().mean(dim=-1, keepdim=True) + 1e-12)


def alignment_loss(states: Tensor, target: Tensor, target_size: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of states.

    Without `target_size`, both sides have a root mean square of 1, and the result is 2 - 2 cos of their angle. With
    `target_size`, both are divided by the teacher's root mean square, so that the student must match the teacher's size
    too.

    Args:
        states: [tokens, teacher_width], the student's states after its projection.
        target: [tokens, teacher_width], the teacher's states, already RMS-normalised.
        target_size: [tokens, 1], root mean squares of the teacher's states before normalisation, or None.
    """
    scaled = rms_normalize(states) if target_size is None else states / target_size
    return (scaled - target.to(torch.promote_types(states.dtype, torch.float32))).square().mean()


# About the value that rounding to bfloat16 leaves in a loss whose target is met.
_MET = 1e-3


def balance_factor(loss: float, logit_loss: float) -> float:
    """Return the factor that scales a loss to the size of the logit loss: |logit_loss| / max(loss, 0.001).

    The product's gradient is that of logit_loss * log(loss), which asks for the same relative progress even if the loss
    is small. Below the floor of 0.001, the factor would scale the rounding error of a met target up to the size of the
    logit loss.

    Args:
        loss: The loss, at least 0.
        logit_loss: The logit loss of the same tokens.
    """
    return abs(logit_loss) / max(loss, _MET)
