"""The bytes of a student's weights: its blocks by storage type, and what was cut from the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autodistill.errors import InputError
from autodistill.models.config import spec_from_config
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import block_of
from autodistill.quantization.formats import tensor_bytes
from autodistill.quantization.grids import Grid
from autodistill.report.charts import HEIGHT, WIDTH, altair_module
from autodistill.runs.results.row import Row

if TYPE_CHECKING:
    import altair


def bytes_by_block(row: Row) -> list[dict[str, Any]]:
    """Return the stored bytes of each block and type of a row's student: `block`, `type`, `bytes` and `tensors`.

    Raises:
        InputError: The row does not record its shape, or its format cannot hold that shape.
    """
    if (file := row.deployment.file) is not None:
        return [{"block": "the file", "type": kind, "bytes": size, "tensors": None} for kind, size in file.types]
    if row.shape is None:
        raise InputError(f"the row {row.row_id} does not say the shape of its student")
    found: dict[tuple[str, str], list[int]] = {}
    for tensor in spec_from_config(row.shape).tensors:
        storage = row.deployment.storage(tensor)
        kind = storage.name if isinstance(storage, Grid) else str(storage).partition("_plus")[0]
        sums = found.setdefault((block_of(tensor), kind), [0, 0])
        sums[0] += tensor_bytes(tensor, storage)
        sums[1] += 1
    return [{"block": block, "type": kind, "bytes": n, "tensors": k} for (block, kind), (n, k) in found.items()]


def in_order(blocks: Iterable[str]) -> list[str]:
    """Return each block once, layers first, in the order of their numbers."""
    return sorted(dict.fromkeys(blocks), key=lambda block: (not block.isdigit(), int(block) if block.isdigit() else 0))


def storage(row: Row) -> altair.Chart:
    """Draw the bytes of each block of a row's student, stacked by the type that stores them.

    Raises:
        MissingDependencyError: Altair is not installed.
        InputError: For the same reasons as `bytes_by_block`.
    """
    alt = altair_module()
    bars = [{**bar, "megabytes": bar["bytes"] / 1e6} for bar in bytes_by_block(row)]
    blocks = in_order(bar["block"] for bar in bars)
    chart: altair.Chart = (
        alt.Chart(alt.Data(values=bars))
        .mark_bar()
        .encode(
            x=alt.X("block:N", title="layer", sort=blocks, axis=alt.Axis(labelOverlap="greedy")),
            y=alt.Y("megabytes:Q", title="stored bytes (MB)"),
            color=alt.Color("type:N", title=None, scale=alt.Scale(scheme="tableau10")),
            tooltip=[
                alt.Tooltip("block:N"),
                alt.Tooltip("type:N"),
                alt.Tooltip("megabytes:Q", format=",.3f", title="MB"),
                alt.Tooltip("tensors:Q"),
            ],
        )
        .properties(title="stored bytes by block and type", width=WIDTH, height=HEIGHT)
    )
    return chart


def cut(row: Row, teacher: Mapping[str, Any] | None) -> str:
    """Say in a sentence what a row's student keeps of its teacher, or return "" if a shape is not known.

    Args:
        row: The student's row.
        teacher: The config that describes the teacher: the shape of a teacher's row.
    """
    if row.shape is None or teacher is None:
        return ""
    student, whole = spec_from_config(row.shape), spec_from_config(teacher)
    lines = [f"{ours:,} of {theirs:,} {what}" for what, ours, theirs in _sizes(student, whole) if ours != theirs]
    if not lines:
        return "Nothing was cut: the student has all of the teacher's layers, heads and neurons."
    return f"It keeps {', '.join(lines)}."


def _sizes(student: ModelSpec, teacher: ModelSpec) -> Sequence[tuple[str, int, int]]:
    return (
        ("layers", student.layers, teacher.layers),
        ("of the width", student.width, teacher.width),
        ("attention heads", student.heads, teacher.heads),
        ("feed-forward neurons", sum(student.ffn_by_layer), sum(teacher.ffn_by_layer)),
        ("weights", student.parameters, teacher.parameters),
    )
