"""The shape of a student from the teacher's, its fractions rounded to what formats and families can hold."""

from __future__ import annotations

from autodistill.contracts import ModelSpec
from autodistill.errors import InputError
from autodistill.estimate import resized
from autodistill.families import get_family
from autodistill.strategy import Init

MULTIPLE = 64
"""Channels and FFN neurons are kept in multiples of this, which every group size that formats have divides."""


def student_depth(init: Init, teacher_layers: int) -> int:
    """Number of layers kept: the fraction rounded down, at least one."""
    # 0.7 * 30 is 20.999... in binary; the nudge keeps such products on the side that was meant.
    return max(1, int(init.depth * teacher_layers + 1e-9))


def cut_spec(init: Init, teacher: ModelSpec) -> ModelSpec:
    """Shape of a student that keeps fractions of a teacher, or is made new in these proportions.

    Layers are rounded down; attention heads to whole groups of those that share keys and values, at least one group;
    channels and neurons to multiples of 64.

    Raises:
        InputError: A fraction that leaves nothing, or sizes that transformers' model of this family cannot have.
    """
    groups = max(1, round(init.heads * teacher.kv_heads))
    heads = groups * (teacher.heads // teacher.kv_heads)
    width = _rounded("width", "channels", init.width, teacher.width)
    family = get_family(teacher.architecture)
    if family.heads_fill_width and heads * teacher.head_dim != width:
        raise InputError(
            f"init.heads {init.heads:g} leaves {heads} heads of {teacher.head_dim} and init.width {init.width:g} "
            f"{width} channels: in {teacher.architecture} the heads fill the width, so give both the same fraction"
        )
    if family.heads_divide_width and width % heads:
        raise InputError(
            f"init.heads {init.heads:g} leaves {heads} heads, which do not divide the width of {width}: transformers' "
            f"{teacher.architecture} needs that"
        )
    return resized(
        teacher,
        layers=student_depth(init, teacher.layers),
        width=width,
        heads=heads,
        kv_heads=groups,
        ffn_width=_rounded("ffn", "neurons", init.ffn, teacher.ffn_width),
    )


def _rounded(field: str, what: str, fraction: float, count: int) -> int:
    if fraction == 1:
        return count
    rounded = round(fraction * count / MULTIPLE) * MULTIPLE
    if rounded == 0:
        raise InputError(
            f"init.{field} {fraction:g} of {count} {what} rounds to none: they are kept in multiples of {MULTIPLE}"
        )
    return min(rounded, count)
