"""Repairs FFNs that were cut: fits their last matrix so that they return what the whole FFN returned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autodistill.inference.blocks import embedded, second_moments, through_block
from autodistill.models.config import spec_from_config
from autodistill.models.families import Axis, get_family
from autodistill.models.spec import ModelSpec

RIDGE = 0.3
"""Cost of changing a weight, as a share of the mean square of an activation. From 0.001 to 0.3, this value lost least
of SmolLM2 on held-out text, at 75% and at 50% of its neurons. With less, the fit follows its few thousand tokens."""


def last_matrix(architecture: str) -> str:
    """Return the name, within a block, of the linear layer that reads the FFN's neurons."""
    return get_family(architecture).reading(Axis.FFN)


def ffn_moments(model: Any, text: Tensor, device: str = "cpu") -> Iterator[Tensor]:
    """Yield, for each layer, the second moments of its neurons' activations over a text, float32 [neurons, neurons].

    Only the states of one layer are in memory at a time.

    Args:
        model: The model, in float32 on `device`.
        text: int32 [sequences, length].
        device: The model's device.
    """
    if not len(text):
        raise ValueError("a repair is fitted to some text, and this calibration has none")
    spec = spec_from_config(model.config.to_dict())
    watched = last_matrix(spec.architecture)
    states = embedded(model, text.numpy(), device)
    for index in range(spec.layers):
        passed = list(through_block(model, index, states, (watched,), device))
        states = [one.after for one in passed]
        yield second_moments([one.seen[watched] for one in passed]).float()


class HeldMoments:
    """Keeps the second moments of one teacher's FFN activations, so that several cuts need only one pass."""

    def __init__(self) -> None:
        self._held: tuple[bytes, list[Tensor]] | None = None

    def of(self, load: Callable[[], Any], spec: ModelSpec, text: Tensor, device: str = "cpu") -> list[Tensor] | None:
        """Return what `ffn_moments` yields, or None if all of it would take too much memory.

        Args:
            load: Returns the teacher, in float32 on `device`. Called only if the teacher must run.
            spec: The teacher's shape.
            text, device: As for `ffn_moments`.
        """
        if 4 * sum(width**2 for width in spec.ffn_by_layer) > _HELD_BYTES:
            return None
        key = text.cpu().numpy().tobytes()
        if self._held is None or self._held[0] != key:
            self._held = key, list(ffn_moments(load(), text, device))
        return self._held[1]

    def release(self) -> None:
        """Free the memory."""
        self._held = None


_HELD_BYTES = 2**31


def strongest(moments: Tensor, weight: Tensor, count: int) -> Tensor:
    """Return the neurons that add most to an FFN's output, by mean square, in ascending order: int64 [count].

    Args:
        moments: [neurons, neurons], second moments of the activations.
        weight: The last matrix, [width, neurons].
        count: Number of neurons to keep.
    """
    added = moments.diagonal().double().sqrt() * weight.double().norm(dim=0)
    # A stable sort, so that equal neurons are kept in the teacher's order on every machine.
    return added.sort(descending=True, stable=True).indices[:count].sort().values


def refitted(moments: Tensor, weight: Tensor, neurons: Tensor, ridge: float = RIDGE) -> Tensor:
    """Return the last matrix for some of the neurons, fitted to the output of all neurons: float32 [width, kept].

    Let A be the activations over the text, K the kept neurons and R the others. The result is W_K + D. D minimises the
    mean square of A_K D - A_R W_R, plus `ridge` times the mean square of an activation times the square of D.

    Args:
        moments, weight: As for `strongest`.
        neurons: The kept neurons, int64 [kept].
        ridge: See above.
    """
    moments, weight = moments.double(), weight.double()
    lost = torch.ones(len(moments), dtype=torch.bool, device=moments.device)
    lost[neurons] = False
    kept = moments[neurons]
    own = kept[:, neurons].clone()
    # The smallest positive number keeps the matrix invertible if no neuron is ever active. Nothing changes then.
    own.diagonal().add_(max(ridge * float(moments.diagonal().mean()), torch.finfo(torch.float64).tiny))
    change = torch.cholesky_solve(kept[:, lost] @ weight[:, lost].T, torch.linalg.cholesky(own))
    return (weight[:, neurons] + change.T).float()


class Refit(NamedTuple):
    """An FFN that was cut.

    Attributes:
        neurons: The kept neurons, ascending, int64 [kept].
        matrix: The last matrix, float32 [width, kept].
    """

    neurons: Tensor
    matrix: Tensor


def repaired(model: Any, widths: Mapping[int, int], moments: Iterable[Tensor]) -> list[Refit | None]:
    """Return the cut FFNs of some layers, with None for a layer that keeps all its neurons.

    Args:
        model: The teacher, in float32.
        widths: Number of neurons to keep, by layer, with ascending layers.
        moments: Second moments of all its layers, as from `ffn_moments`.
    """
    names, parameters = last_matrices(spec_from_config(model.config.to_dict())), dict(model.named_parameters())
    return [
        refit(found, parameters[names[layer]].detach(), widths[layer])
        for layer, found in enumerate(moments)
        if layer in widths
    ]


def last_matrices(spec: ModelSpec) -> list[str]:
    """Return the name of the matrix that reads the FFN's neurons, for each layer."""
    body, name = get_family(spec.architecture).body, last_matrix(spec.architecture)
    return [f"{body}.layers.{layer}.{name}.weight" for layer in range(spec.layers)]


def refit(moments: Tensor, weight: Tensor, count: int) -> Refit | None:
    """Return an FFN with its strongest neurons, or None if all are kept.

    Args:
        moments, weight, count: As for `strongest`.
    """
    if count == weight.shape[1]:
        return None
    neurons = strongest(moments, weight, count)
    return Refit(neurons, refitted(moments, weight, neurons))
