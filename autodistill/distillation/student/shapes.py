"""Computes a student's shape from the teacher's. Fractions are rounded to sizes that formats and families allow."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache

from autodistill.errors import InputError
from autodistill.models.config import resized
from autodistill.models.families import WHOLE_FAMILIES, get_family
from autodistill.models.llama_cpp_graphs import cannot_run
from autodistill.models.spec import ModelSpec
from autodistill.strategy.strategy import WHOLE, Init

MULTIPLE = 64
"""Channels and FFN neurons are kept in multiples of this number. Every group size of the formats divides it.

The sizes of super-blocks do not divide it. Rows that are not multiples of a super-block have another grid
(`Grid.fallback`).
"""


def student_depth(init: Init, teacher_layers: int) -> int:
    """Return the number of kept layers: the fraction rounded down, at least one, or all except the dropped ones."""
    if init.dropped:
        return teacher_layers - init.dropped[1]
    # 0.7 * 30 is 20.999... in binary. The small term makes such products round down to 21.
    return max(1, int(init.depth * teacher_layers + 1e-9))


def layer_choices(init: Init, teacher_layers: int) -> tuple[tuple[int, ...], ...]:
    """Return the possible choices of teacher layers for a student, as far as they are known without data.

    Kept layers are ascending and include the first and the last layer, or only the last if one layer is kept.
    "even" spreads them evenly.
    "contiguous" leaves out one block of late layers, just before the last.
    "influence" leaves out a block of neighbouring layers, which a calibration chooses. There is one choice for each
    layer after which the block may begin, in that order.
    "block-influence" leaves out any layers. The choices are examples: they drop some layers after the first one, and
    the others before the last one.

    Raises:
        InputError: The layers to drop include the teacher's last layer, or layers that it does not have.
    """
    if init.dropped:
        first, stop = init.dropped[0], sum(init.dropped)
        if stop >= teacher_layers:
            raise InputError(
                f"init.dropped leaves out layers {first} to {stop - 1}, and the last layer that can be left out of the "
                f"teacher's {teacher_layers} is {teacher_layers - 2}"
            )
        return ((*range(first), *range(stop, teacher_layers)),)
    depth = student_depth(init, teacher_layers)
    if depth == 1 or init.layers == "even":
        return (spread(depth, teacher_layers),)
    dropped = teacher_layers - depth
    if init.layers == "block-influence":
        middle = range(1, teacher_layers - 1)
        parts = (middle[late : late + depth - 2] for late in range(dropped + 1))
        return tuple((0, *part, teacher_layers - 1) for part in parts)
    starts = range(1, depth) if init.layers == "influence" else (depth - 1,)
    return tuple((*range(start), *range(start + dropped, teacher_layers)) for start in starts)


def spread(depth: int, teacher_layers: int) -> tuple[int, ...]:
    """Return `depth` layers of a teacher, evenly spaced."""
    if depth == 1:
        return (teacher_layers - 1,)
    return tuple(round(i * (teacher_layers - 1) / (depth - 1)) for i in range(depth))


@lru_cache(128)  # a search asks for the same few shapes again and again
def cut_spec(init: Init, teacher: ModelSpec) -> ModelSpec:
    """Return the shape of a student that keeps fractions of a teacher, or is new with these proportions.

    The number of layers is rounded down. Attention heads are rounded to whole groups that share keys and values, at
    least one group. Channels and neurons are rounded to multiples of 64, but neurons given by layer stay as given. If
    data decide which layers are kept, the sliding windows are those of a choice that llama.cpp cannot run, if there is
    one. New layers have the windows of the teacher's first layers.

    Raises:
        InputError: A fraction leaves nothing, or transformers' model of this family cannot have the sizes. Or something
            would be cut of a family that is trained whole.
    """
    if teacher.architecture in WHOLE_FAMILIES:
        _check_whole(init, teacher.architecture)
        return teacher
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
    sizes = {"width": width, "heads": heads, "kv_heads": groups}
    if init.source == "scratch":
        kept = tuple(range(student_depth(init, teacher.layers)))
        return resized(teacher, kept, **sizes, ffn_widths=_ffn_widths(init, teacher, kept))
    if teacher.ffn_widths and init.by_influence:
        raise InputError(
            f"the teacher's layers differ in width, and init.layers {init.layers} would choose among them by data, so "
            "its size cannot be known before: choose even or contiguous"
        )
    choices = {tuple(layer in teacher.windowed for layer in kept): kept for kept in layer_choices(init, teacher.layers)}
    students = [
        resized(teacher, kept, **sizes, ffn_widths=_ffn_widths(init, teacher, kept)) for kept in choices.values()
    ]
    return next((student for student in students if cannot_run(student)), students[0])


def _check_whole(init: Init, architecture: str) -> None:
    """Refuse an init that cuts anything.

    Raises:
        InputError: It does; the message names the first field.
    """
    wanted = replace(WHOLE, source=init.source, model=init.model)
    for field in fields(init):
        if (value := getattr(init, field.name)) != getattr(wanted, field.name):
            kept = getattr(wanted, field.name)
            only = f"give {kept:g}" if isinstance(kept, float) else "leave it out"
            raise InputError(
                f"init.{field.name} is {value}, and a {architecture} is trained whole, because "
                f"{WHOLE_FAMILIES[architecture].why}: {only}"
            )


def _ffn_widths(init: Init, teacher: ModelSpec, kept: tuple[int, ...]) -> tuple[int, ...]:
    """Return the FFN neurons of each kept layer."""
    whole = [teacher.ffn_by_layer[layer] for layer in kept]
    if not init.ffn_widths:
        return tuple(_rounded("ffn", "neurons", init.ffn, width) for width in whole)
    if len(init.ffn_widths) != len(kept):
        raise InputError(
            f"init.ffn_widths has {len(init.ffn_widths)} numbers, and {len(kept)} of the teacher's {teacher.layers} "
            "layers are kept: give one for each of these"
        )
    for layer, own, most in zip(kept, init.ffn_widths, whole, strict=True):
        if own > most:
            raise InputError(
                f"init.ffn_widths keeps {own} FFN neurons of the teacher's layer {layer} (counted from 0), which has "
                f"{most}: give no more than that"
            )
    return init.ffn_widths


def _rounded(field: str, what: str, fraction: float, count: int) -> int:
    if fraction == 1:
        return count
    rounded = round(fraction * count / MULTIPLE) * MULTIPLE
    if rounded == 0:
        raise InputError(
            f"init.{field} {fraction:g} of {count} {what} rounds to none: they are kept in multiples of {MULTIPLE}"
        )
    return min(rounded, count)
