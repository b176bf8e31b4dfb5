"""Repairs FFNs and attention that were cut: fits their last matrix so that they return what the whole part returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from autodistill.inference.blocks import embedded, second_moments, through_block
from autodistill.models.config import spec_from_config
from autodistill.models.families import Axis, get_family
from autodistill.models.spec import ModelSpec

RIDGE = 0.3
"""Cost of changing a weight, as a share of the mean square of an activation. From 0.001 to 0.3, this value lost least
of SmolLM2 on held-out text, at 75% and at 50% of its neurons. With less, the fit follows its few thousand tokens."""


REPAIRED = (Axis.FFN, Axis.QUERIES)
"""What is cut and then repaired in a block: the neurons of the FFN, and the outputs of attention's heads."""

Moments: TypeAlias = Mapping[Axis, Tensor]
"""Second moments of what the last matrices of a block read, float32 [in, in], for each axis of `REPAIRED`."""


def last_matrix(architecture: str, axis: Axis) -> str:
    """Return the name, within a block, of the linear layer that reads the FFN's neurons or the heads' outputs."""
    return get_family(architecture).reading(axis)


def part_moments(model: Any, text: Tensor, device: str = "cpu") -> Iterator[Moments]:
    """Yield the second moments of each layer's parts over a text.

    Only the states of one layer are in memory at a time.

    Args:
        model: The model, in float32 on `device`.
        text: int32 [sequences, length].
        device: The model's device.
    """
    if not len(text):
        raise ValueError("a repair is fitted to some text, and this calibration has none")
    spec = spec_from_config(model.config.to_dict())
    watched = {axis: last_matrix(spec.architecture, axis) for axis in REPAIRED}
    states = embedded(model, text.numpy(), device)
    for index in range(spec.layers):
        passed = list(through_block(model, index, states, tuple(watched.values()), device))
        states = [one.after for one in passed]
        yield {axis: second_moments([one.seen[name] for one in passed]).float() for axis, name in watched.items()}


class HeldMoments:
    """Keeps the second moments of one teacher's parts, so that several cuts need only one pass."""

    def __init__(self) -> None:
        self._held: tuple[bytes, list[Moments]] | None = None

    def of(self, load: Callable[[], Any], spec: ModelSpec, text: Tensor, device: str = "cpu") -> list[Moments] | None:
        """Return what `part_moments` yields, or None if all of it would take too much memory.

        Args:
            load: Returns the teacher, in float32 on `device`. Called only if the teacher must run.
            spec: The teacher's shape.
            text, device: As for `part_moments`.
        """
        heads = spec.layers * (spec.heads * spec.head_dim) ** 2
        if 4 * (sum(width**2 for width in spec.ffn_by_layer) + heads) > _HELD_BYTES:
            return None
        key = text.cpu().numpy().tobytes()
        if self._held is None or self._held[0] != key:
            self._held = key, list(part_moments(load(), text, device))
        return self._held[1]

    def release(self) -> None:
        """Free the memory."""
        self._held = None


_HELD_BYTES = 2**31


def strongest(moments: Tensor, weight: Tensor, count: int, parts: int) -> Tensor:
    """Return the parts that add most to an output, by mean square, in ascending order: int64 [count].

    Args:
        moments: [in, in], second moments of what the last matrix reads.
        weight: The last matrix, [width, in].
        count: Number of parts to keep.
        parts: Number of parts in which the inputs are divided: neurons, or groups of heads that share keys and values.
    """
    own = weight.shape[1] // parts
    blocks = moments.view(parts, own, parts, own).diagonal(dim1=0, dim2=2).double()
    read = weight.view(-1, parts, own).double()
    added = (torch.einsum("wpi,ijp->wpj", read, blocks) * read).sum((0, 2))
    # A stable sort, so that equal parts are kept in the teacher's order on every machine.
    return added.sort(descending=True, stable=True).indices[:count].sort().values


def refitted(moments: Tensor, weight: Tensor, columns: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return the last matrix for some of its inputs, fitted to the output of all inputs: float32 [width, kept].

    Let A be the inputs over the text, K the kept columns and R the others. The result is W_K + D. D minimises the
    mean square of A_K D - A_R W_R, plus `ridge` times the mean square of an input times the square of D.

    Args:
        moments, weight: As for `strongest`.
        columns: The kept columns, int64 [kept].
        ridge: See above.
    """
    moments, weight = moments.double(), weight.double()
    lost = torch.ones(len(moments), dtype=torch.bool, device=moments.device)
    lost[columns] = False
    kept = moments[columns]
    own = kept[:, columns].clone()
    # The smallest positive number keeps the matrix invertible if no input is ever active. Nothing changes then.
    own.diagonal().add_(max(ridge * float(moments.diagonal().mean()), torch.finfo(torch.float64).tiny))
    change = torch.cholesky_solve(kept[:, lost] @ weight[:, lost].T, torch.linalg.cholesky(own))
    return (weight[:, columns] + change.T).float()


class Refit(NamedTuple):
    """An FFN or attention that was cut.

    Attributes:
        kept: The kept neurons, or groups of heads, ascending, int64 [kept].
        matrix: The last matrix, float32 [width, columns of the kept parts].
    """

    kept: Tensor
    matrix: Tensor

    @property
    def columns(self) -> Tensor:
        """The columns of the whole matrix that belong to the kept parts, int64."""
        return columns_of(self.kept, self.matrix.shape[1] // len(self.kept))


def columns_of(parts: Tensor, own: int) -> Tensor:
    """Return the indices that belong to some parts if each part has `own` of them, int64 [parts x own]."""
    return (parts[:, None] * own + torch.arange(own, device=parts.device)).flatten()


def repaired(
    model: Any, student: ModelSpec, layers: Sequence[int], moments: Iterable[Moments]
) -> list[Mapping[Axis, Refit]]:
    """Return the cut parts of each kept layer; parts that stay whole are missing.

    Args:
        model: The teacher, in float32.
        student: Shape of the student.
        layers: The teacher's layer for each of the student's, ascending.
        moments: Moments of all the teacher's layers, as from `part_moments`.
    """
    spec, parameters = spec_from_config(model.config.to_dict()), dict(model.named_parameters())
    names = {axis: last_matrices(spec, axis) for axis in REPAIRED}
    found: list[Mapping[Axis, Refit]] = []
    for layer, seen in enumerate(moments):
        if layer not in layers:
            continue
        counts = {Axis.FFN: student.ffn_by_layer[len(found)], Axis.QUERIES: student.kv_heads}
        parts = {Axis.FFN: spec.ffn_by_layer[layer], Axis.QUERIES: spec.kv_heads}
        refits = {
            axis: refit(seen[axis], parameters[names[axis][layer]].detach(), counts[axis], parts[axis])
            for axis in REPAIRED
        }
        found.append({axis: one for axis, one in refits.items() if one is not None})
    return found


def last_matrices(spec: ModelSpec, axis: Axis) -> list[str]:
    """Return the name of the matrix that reads the FFN's neurons or the heads' outputs, for each layer."""
    body, name = get_family(spec.architecture).body, last_matrix(spec.architecture, axis)
    return [f"{body}.layers.{layer}.{name}.weight" for layer in range(spec.layers)]


def refit(moments: Tensor, weight: Tensor, count: int, parts: int) -> Refit | None:
    """Return an FFN or attention with its strongest parts, or None if all are kept.

    Args:
        moments, weight, count, parts: As for `strongest`.
    """
    if count == parts:
        return None
    kept = strongest(moments, weight, count, parts)
    return Refit(kept, refitted(moments, weight, columns_of(kept, weight.shape[1] // parts)))
