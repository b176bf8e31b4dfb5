"""A storage whose rounding makes up for its errors: the weights of each block, one block after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from threading import Lock, local
from typing import Any

from torch import Tensor, nn

from autodistill.data.dataset import TokenSet
from autodistill.inference.blocks import embedded, through_block
from autodistill.models.families import get_family
from autodistill.quantization.error_compensation import compensated
from autodistill.quantization.formats import QuantizationScheme
from autodistill.quantization.grids import Grid, Scales
from autodistill.quantization.rounding import deploy_tensor
from autodistill.search.solve.bench import Bench
from autodistill.strategy.deployment import Deployment


@dataclass(frozen=True, kw_only=True, eq=False)
class Compensated:
    """A deployment with the weights and scales that stand for a model's in it.

    Attributes:
        deployment: The deployment.
        values: The matrices that were rounded so, as a runtime reads them; all others are rounded each by itself.
        scales: What those matrices are packed with.
    """

    deployment: Deployment
    values: Mapping[str, Tensor]
    scales: Mapping[str, Scales]

    @property
    def name(self) -> str:
        """That of the deployment."""
        return self.deployment.name

    def weights(self, bench: Bench) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor as a runtime reads it."""
        for tensor in bench.spec.tensors:
            name = tensor.name
            found = self.values.get(name)
            yield name, bench.stored(name, self.deployment.storage(tensor)) if found is None else found


def gains(bench: Bench, scheme: QuantizationScheme) -> list[str]:
    """The matrices of layers that lie on no grid of a scheme, whose errors can be made up for."""
    found = []
    for tensor in bench.spec.tensors:
        storage, name = scheme.storage(tensor), tensor.name
        inside = get_family(bench.spec.architecture).layer_part(name) is not None
        if inside and isinstance(storage, Grid) and not bench.keeps(name, storage):
            found.append(name)
    return found


def compensate(bench: Bench, deployment: Deployment, data: TokenSet) -> Compensated:
    """Round the matrices of a model as `made_up` does.

    Args:
        bench: The model, whole in memory.
        deployment: How it is stored.
        data: The text.
    """
    values, scales = made_up(bench, deployment, data)
    return Compensated(deployment=deployment, values=values, scales=scales)


def made_up(bench: Bench, scheme: QuantizationScheme, data: TokenSet) -> tuple[dict[str, Tensor], dict[str, Scales]]:
    """Round the matrices of a model so that what comes out of each changes little on some text.

    Each block reads what the rounded blocks before it pass on; of all its matrices the second moments of what goes into
    them are taken at once, and each is rounded with its errors made up for (`error_compensation`), under the scales
    that a bench finds by the importance of columns. GPTQ's order of blocks (arXiv:2210.17323).

    Args:
        bench: The model, whole in memory.
        scheme: How it is stored.
        data: The text.

    Returns:
        Of each matrix that is rounded so its values, and the scales that these are packed with.
    """
    family = get_family(bench.spec.architecture)
    storages = {one.name: scheme.storage(one) for one in bench.spec.tensors}
    values: dict[str, Tensor] = {}
    scales: dict[str, Scales] = {}
    blocks: dict[int, dict[str, Grid]] = {}
    rest = []
    for name, storage in storages.items():
        part = family.layer_part(name)
        if part is None or not isinstance(storage, Grid):
            rest.append(name)
        else:
            blocks.setdefault(part[0], {})[name] = storage
    with ExitStack() as shown:
        shown.enter_context(bench.replaced([(name, bench.stored(name, storages[name])) for name in rest]))
        states = embedded(bench.model, data.tokens, bench.device)
        for index in range(bench.spec.layers):
            grids, given = blocks.get(index, {}), dict[str, Scales | None]()
            for name, grid in grids.items():
                weight, found = bench.master(name), bench.scales(name, grid)
                if not deploy_tensor(weight, grid, found).equal(weight):
                    given[name] = found
            moments = _moments(bench, index, list(given), states)
            for name, found in given.items():
                values[name], scales[name] = compensated(bench.master(name), moments[name], grids[name], scales=found)
            shown.enter_context(bench.replaced([(name, values[name]) for name in given]))
            states = [one.after for one in through_block(bench.model, index, states, device=bench.device)]
    return values, scales


def _moments(bench: Bench, index: int, names: list[str], states: list[Tensor]) -> dict[str, Tensor]:
    """The mean product of each pair of inputs of some matrices of a block, [in, in] each."""
    sums: dict[str, Tensor] = {}
    lock, here = Lock(), local()

    def add(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Queries, keys and values have one input, and so have gate and up: its products are made once.
        if inputs[0] is not getattr(here, "given", None):
            rows = inputs[0].detach().float().flatten(0, -2)
            here.given, here.found = inputs[0], (rows.T @ rows).double()  # whose sums hardly round, in whatever order
        with lock:
            sums[name] = sums[name] + here.found if name in sums else here.found

    with ExitStack() as hooks:
        for name in names:
            module: Any = bench.model.get_submodule(name.removesuffix(".weight"))
            hooks.callback(module.register_forward_pre_hook(partial(add, name)).remove)
        for _ in through_block(bench.model, index, states, device=bench.device) if names else ():
            pass
    count = sum(one.shape[1] for one in states)
    return {name: one / count for name, one in sums.items()}
