"""Rounds the weights of each block so that rounding errors compensate each other, one block after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from autodistill.data.dataset import TokenSet
from autodistill.inference.batching import map_sequences
from autodistill.inference.blocks import embedded, second_moments, through_block, up_to_block
from autodistill.models.families import names_of
from autodistill.models.tensors import is_expert
from autodistill.quantization.error_compensation import compensated
from autodistill.quantization.grids import Grid, Scales
from autodistill.quantization.rounding import deploy_tensor
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.search.solve.bench import Bench
from autodistill.strategy.deployment import Deployment


@dataclass(frozen=True, kw_only=True, eq=False)
class Compensated:
    """A deployment with weights and scales that were rounded with error compensation.

    Attributes:
        deployment: The deployment.
        values: The matrices that were rounded in this way, as a runtime reads them. All other matrices are rounded
            without compensation.
        scales: The scales of those matrices.
    """

    deployment: Deployment
    values: Mapping[str, Tensor]
    scales: Mapping[str, Scales]

    @property
    def name(self) -> str:
        """Name of the deployment."""
        return self.deployment.name

    def weights(self, bench: Bench) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor as a runtime reads it."""
        for tensor in bench.spec.tensors:
            name = tensor.name
            found = self.values.get(name)
            yield name, bench.stored(name, self.deployment.storage(tensor)) if found is None else found


def gains(bench: Bench, scheme: QuantizationScheme) -> list[str]:
    """Return the linear layers in blocks that a scheme changes, so that there are errors to compensate."""
    found = []
    for tensor in bench.spec.tensors:
        storage, name = scheme.storage(tensor), tensor.name
        inside = names_of(bench.spec.architecture).layer_part(name) is not None
        if inside and not is_expert(name) and isinstance(storage, Grid) and not bench.keeps(name, storage):
            found.append(name)
    return found


def compensate(bench: Bench, deployment: Deployment, data: TokenSet) -> Compensated:
    """Round the matrices of a model with error compensation, as `made_up` does.

    Args:
        bench: The model, whole in memory.
        deployment: How it is stored.
        data: The text.
    """
    values, scales = made_up(bench, deployment, data)
    return Compensated(deployment=deployment, values=values, scales=scales)


def made_up(
    bench: Bench,
    scheme: QuantizationScheme,
    data: TokenSet,
    *,
    bf16: bool = False,
    in_time: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], dict[str, Scales]]:
    """Round the matrices of a model so that the outputs of each change little on some text.

    Experts, and what lies outside the blocks, are rounded first, without compensation: few tokens go through an expert.
    Each block reads the outputs of the rounded blocks before it, for which all of these run again if no block runs
    alone. The second moments of the inputs of all its matrices
    are computed together. Then each matrix is rounded with its errors compensated (`error_compensation`), under the
    scales that a bench finds by the importance of columns. This is GPTQ's order of blocks (arXiv:2210.17323).

    Args:
        bench: The model, whole in memory.
        scheme: How it is stored.
        data: The text.
        bf16: Whether the model reads the text in bfloat16, for which this machine needs instructions.
        in_time: Called before each block; may raise.

    Returns:
        The values of each matrix that was rounded in this way, and the scales of these matrices.
    """
    family = names_of(bench.spec.architecture)
    storages = {one.name: scheme.storage(one) for one in bench.spec.tensors}
    values: dict[str, Tensor] = {}
    scales: dict[str, Scales] = {}
    blocks: dict[int, dict[str, Grid]] = {}
    rest = []
    for name, storage in storages.items():
        part = family.layer_part(name)
        if part is None or is_expert(name) or not isinstance(storage, Grid):
            rest.append(name)
        else:
            blocks.setdefault(part[0], {})[name] = storage
    given = _scales_of_changed(bench, {name: grid for grids in blocks.values() for name, grid in grids.items()})
    if not given:
        return values, scales
    with ExitStack() as shown:
        shown.enter_context(bench.replaced([(name, bench.stored(name, storages[name])) for name in rest]))
        states = embedded(bench.model, data.tokens, bench.device) if family.blocks_alone else None
        for index in range(bench.spec.layers):
            in_time()
            grids = {name: grid for name, grid in blocks.get(index, {}).items() if name in given}
            moments = _moments(bench, index, list(grids), data, states, bf16)

            def rounded(place: int, grids: dict[str, Grid] = grids, moments: dict[str, Tensor] = moments) -> _Rounded:
                """Round one of the block's matrices."""
                name, grid = list(grids.items())[place]
                return compensated(bench.master(name), moments[name], grid, scales=given[name])

            for name, found in zip(grids, map_sequences(rounded, len(grids), bench.device), strict=True):
                values[name], scales[name] = found
            shown.enter_context(bench.replaced([(name, values[name]) for name in grids]))
            if states is not None and index < max(blocks):
                passed = through_block(bench.model, index, states, device=bench.device, bf16=bf16)
                states = [one.after for one in passed]
    return values, scales


_Rounded: TypeAlias = tuple[Tensor, Scales]


def _scales_of_changed(bench: Bench, grids: Mapping[str, Grid]) -> dict[str, Scales | None]:
    """Return the scales of the matrices that rounding changes. None means that the weights determine the scales."""

    def looked_up(place: int) -> tuple[bool, Scales | None]:
        """Return whether rounding changes a matrix, and its scales."""
        name, grid = list(grids.items())[place]
        scales, weight = bench.scales(name, grid), bench.master(name)
        return not deploy_tensor(weight, grid, scales).equal(weight), scales

    found = zip(grids, map_sequences(looked_up, len(grids), bench.device), strict=True)
    return {name: scales for name, (moved, scales) in found if moved}


def _moments(
    bench: Bench, index: int, names: list[str], data: TokenSet, states: list[Tensor] | None, bf16: bool
) -> dict[str, Tensor]:
    """Return the mean product of each pair of inputs, [in, in], of some matrices of a block.

    The block reads its states. Without them, the model reads the text up to this block.
    """
    inside = names_of(bench.spec.architecture).layer_part
    modules = {name: part[1].removesuffix(".weight") for name in names if (part := inside(name)) is not None}
    if not names:
        return {}
    model, device, watched = bench.model, bench.device, tuple(modules.values())
    if states is None:
        passed = list(up_to_block(model, index, data.tokens, watched, device, bf16=bf16))
    else:
        passed = list(through_block(model, index, states, watched, device, bf16=bf16))
    found: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}  # by memory address of the inputs, since several matrices share theirs
    for name, module in modules.items():
        rows = [one.seen[module] for one in passed]
        place = rows[0].data_ptr()
        if place not in known:
            known[place] = second_moments(rows)
        found[name] = known[place]
    return found
