"""Stores a large teacher's weights in 16 bits, while all computation stays in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from autodistill.models.loading import load_model
from autodistill.models.model_folder import HeldType
from autodistill.models.whole.experts import MATRICES
from autodistill.quantization.grids import Grid, Scales, Storage
from autodistill.quantization.group_scales import given_steps, stored_steps
from autodistill.quantization.k_quants import held_on_block_grid
from autodistill.quantization.rounding import deploy_tensor, fitted_scales, given_values

# Weights expanded to float32 at once. A whole table of 150,000 tokens would take gigabytes, for each thread.
_WEIGHTS_EXPANDED_AT_ONCE = 2**25
TYPES: Mapping[HeldType, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Types in which matrices may be held."""


def load_held(folder: Path, held_type: HeldType, device: str = "cpu") -> Any:
    """Load a model for inference in float32, with its matrices stored in the type `held_type`.

    A matrix is cast to float32, some rows at a time, whenever a product reads it. This is exact. If the folder stores
    its weights in that type, logits equal those of the float32 model. Only sums may differ in order, in products that
    are computed in parts. Biases and norms are always float32, and so is a table that its module scales.

    Args:
        folder: transformers' folder.
        held_type: Type of the matrices; "float32" gives the model of `load_model`.
        device: Where the model goes.
    """
    model = load_model(folder, TYPES[held_type])
    if held_type != "float32":
        hold(model)
    return model.to(device)  # type: ignore[arg-type]


def hold(model: Any) -> None:
    """Let a model compute in float32 while its matrices stay as they are stored."""
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            module.__class__ = _HalfPrecisionLinear
        elif type(module) is nn.Embedding:
            module.__class__ = _HalfPrecisionEmbedding
        elif all(hasattr(module, name) for name in MATRICES):
            module.matrix_of = _HeldExperts(module)
    for module in model.modules():
        _widen(module)


class _BlockScales(NamedTuple):
    """Scales, or minima without their sign, in the form and memory that they take in a file.

    Attributes:
        units: float16 [out, blocks, 1].
        multipliers: int8 [out, blocks, groups of a block].
    """

    units: Tensor
    multipliers: Tensor

    @classmethod
    def of(cls, values: Tensor, grid: Grid) -> _BlockScales:
        units, multipliers = held_on_block_grid(values, grid, torch)
        rows = len(values)
        return cls(units.half().view(rows, -1, 1), multipliers.to(torch.int8).view(rows, -1, grid.groups_per_block))

    def read(self, rows: slice | Tensor) -> Tensor:
        """Return the values of some rows, float32 [rows, groups]."""
        return (self.units[rows].float() * self.multipliers[rows] + 0.0).flatten(1)


class _PlainScales(NamedTuple):
    """Scales that are stored one by one.

    Attributes:
        values: [out, groups], in 16 bits if the format stores them so.
    """

    values: Tensor

    @classmethod
    def of(cls, values: Tensor, grid: Grid) -> _PlainScales:
        return cls(values.half() if grid.scale_dtype == "f16" else values)

    def read(self, rows: slice | Tensor) -> Tensor:
        """Return the values of some rows, float32 [rows, groups]."""
        return self.values[rows].float()


_Own: TypeAlias = tuple[Tensor, Tensor | None]
"""Given scales and offsets, float32 [out, groups] each."""


class _Deployed:
    """How a matrix is stored in the simulated deployment, for all modules that are tied to it.

    Searching for scales takes several times as long as a product with a few tokens. It is therefore done once, when a
    product first reads the matrix.
    """

    def __init__(self, storage: Storage, own: _Own | None = None) -> None:
        self._storage = storage
        self._own = own
        self._found: tuple[_BlockScales | _PlainScales, _BlockScales | None] | None = None
        # On a CPU, each sequence has its own thread, and threads reach a matrix at the same time.
        self._searching = Lock()

    def search(self, weight: Tensor) -> None:
        """Search for the scales of the matrix, [out, in], if the format needs it and they are not known yet."""
        grid = self._storage
        if not isinstance(grid, Grid) or not grid.searched or self._own is not None:
            return
        with self._searching:
            if self._found is None:
                parts = [fitted_scales(weight[rows].float(), grid) for rows in _parts(weight)]
                scales, minima = zip(*parts, strict=True)
                self._found = (
                    (_BlockScales if grid.block_size else _PlainScales).of(torch.cat(scales), grid),
                    None if grid.symmetric else _BlockScales.of(-torch.cat(minima), grid),
                )

    def values(self, rows: Tensor, which: slice | Tensor) -> Tensor:
        """Return rows of the matrix, given with their range, in float32 as the runtime will use them."""
        if self._own is not None:
            assert isinstance(self._storage, Grid)
            given, offsets = (None if part is None else part[which] for part in self._own)
            assert given is not None
            return given_values(rows.detach().float(), given_steps(given, offsets, self._storage), self._storage)
        if self._found is None:
            return deploy_tensor(rows, self._storage)
        assert isinstance(self._storage, Grid)
        scales, minima = self._found
        # Subtract from 0.0, which gives zero minima without a sign, as the search does.
        steps = stored_steps(scales.read(which), None if minima is None else 0.0 - minima.read(which), self._storage)
        return given_values(rows.detach().float(), steps, self._storage)


def _parts(weight: Tensor) -> Iterator[slice]:
    """Yield ranges of rows that are expanded at once."""
    rows = max(1, _WEIGHTS_EXPANDED_AT_ONCE // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


class _HalfPrecisionWeight:
    """A module's weight in 16 bits, with the simulated deployment or None."""

    weight: Tensor
    deployed_as: _Deployed | None = None

    def shown(self, rows: Tensor, which: slice | Tensor) -> Tensor:
        """Return rows of the weight, given with their range, in float32 as the runtime will use them."""
        return rows.float() if self.deployed_as is None else self.deployed_as.values(rows, which)


class _HalfPrecisionLinear(nn.Linear, _HalfPrecisionWeight):
    def forward(self, input: Tensor) -> Tensor:
        """Compute `nn.Linear` in float32, or under autocast in its own type."""
        weight, kind = self.weight, input.device.type
        if (
            self.deployed_as is None
            and torch.is_autocast_enabled(kind)
            and weight.dtype == torch.get_autocast_dtype(kind)
        ):
            # Autocast would round the float32 weight to this.
            return functional.linear(input, weight, self.bias)
        if self.deployed_as is not None:
            self.deployed_as.search(weight)
        parts = [
            functional.linear(input, self.shown(weight[rows], rows), None if self.bias is None else self.bias[rows])
            for rows in _parts(weight)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class _HalfPrecisionEmbedding(nn.Embedding, _HalfPrecisionWeight):
    def forward(self, input: Tensor) -> Tensor:
        """Compute `nn.Embedding` in float32; only the needed rows are expanded, since groups never cross a row."""
        rows = super().forward(input)
        # A table is large, so its scales are searched only for the rows read, unless a tied head has found them all.
        return self.shown(rows.flatten(0, -2), input.flatten()).view_as(rows)


class _HeldExperts:
    """The matrices of a module of experts in 16 bits. Each is expanded when a product reads it.

    Args:
        module: The module.

    Attributes:
        deployed_as: How the simulated deployment stores each of the module's parameters, by name.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.deployed_as: dict[str, _Deployed] = {}

    def __call__(self, name: str, expert: int) -> Tensor:
        """Return the matrix of one expert in float32 as the runtime will use it, [out, in]."""
        matrices: Tensor = getattr(self._module, name)
        deployed, rows = self.deployed_as.get(name), matrices.shape[1]
        if deployed is None:
            return matrices[expert].float()
        deployed.search(matrices.flatten(0, 1))
        return deployed.values(matrices[expert], slice(expert * rows, (expert + 1) * rows))


def _expanded(module: nn.Module, name: str) -> bool:
    """Return whether a parameter of a module stays in 16 bits, and is expanded when it is read."""
    if isinstance(module, _HalfPrecisionWeight):
        return name == "weight"
    return isinstance(getattr(module, "matrix_of", None), _HeldExperts) and name in MATRICES


def _widen(module: nn.Module) -> None:
    """Convert everything that a module holds to float32, except matrices that are expanded when they are read."""
    for name, parameter in module.named_parameters(recurse=False):
        if not _expanded(module, name):
            parameter.data = parameter.data.float()
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point() and name == "embed_scale":
            # Gemma's table scale was rounded with the weights; the module also has the exact value.
            module.register_buffer(name, torch.tensor(float(module.scalar_embed_scale)), persistent=False)  # type: ignore[arg-type]


def is_held(model: Any) -> bool:
    """Return whether a model's matrices are stored in 16 bits."""
    return any(isinstance(module, _HalfPrecisionWeight) for module in model.modules())


def _own_of(scales: Scales | None, weight: Tensor) -> _Own | None:
    if scales is None:
        return None
    first, offsets = (None if part is None else torch.from_numpy(part).to(weight.device) for part in scales)
    assert first is not None
    return first, offsets


@contextmanager
def held_as_deployed(
    model: Any, storages: Mapping[str, Storage], scales: Mapping[str, Scales] | None = None
) -> Iterator[None]:
    """Let a 16-bit model compute with the values that a runtime will use, within the context; its weights stay.

    Args:
        model: A model of `load_held`.
        storages: How each tensor is stored, by name; a tied head is stored as its table.
        scales: Scales of matrices by name, if a teacher's own are used instead of those that follow from the weights.
    """
    given = scales or {}
    parameters = {id(parameter): (name, parameter) for name, parameter in model.named_parameters()}
    by_id = {key: storages[name] for key, (name, _) in parameters.items()}
    deployed = {key: _Deployed(by_id[key], _own_of(given.get(name), one)) for key, (name, one) in parameters.items()}
    holding = [module for module in model.modules() if isinstance(module, _HalfPrecisionWeight)]
    mixing = [module for module in model.modules() if _expanded(module, MATRICES[0])]
    # Compare by identity, since tensors are compared value by value.
    masters: dict[int, tuple[nn.Parameter, Tensor]] = {}
    try:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                storage = by_id[id(parameter)]
                if storage != "f32" and not _expanded(module, name) and id(parameter) not in masters:
                    masters[id(parameter)] = parameter, parameter.data
                    parameter.data = deploy_tensor(parameter.data, storage, given.get(parameters[id(parameter)][0]))
        for module in holding:
            # A head that is tied to a scaled table reads what was packed above. Packing it again could change it.
            if id(module.weight) not in masters:
                module.deployed_as = deployed[id(module.weight)]
        for module in mixing:
            module.matrix_of.deployed_as = {name: deployed[id(getattr(module, name))] for name in MATRICES}
        yield
    finally:
        for parameter, master in masters.values():
            parameter.data = master
        for module in holding:
            module.deployed_as = None
        for module in mixing:
            module.matrix_of.deployed_as = {}
