"""Exporter to a compressed-tensors folder of packed integers, which vLLM and transformers serve."""

from __future__ import annotations

import importlib.metadata
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy.typing as npt
import torch
from packaging.version import Version

from autodistill.errors import MissingDependencyError, VerificationError
from autodistill.export.base import Artifact, Label, Ran, TokenIds
from autodistill.export.huggingface import as_bf16, run_in_transformers, run_model
from autodistill.export.student_reader import WEIGHTS, StudentFiles, bf16_config, read_arrays, read_json, write_folder
from autodistill.hardware.runtime import Runtime
from autodistill.models.tensors import Role
from autodistill.quantization.formats import formats_of, get_format
from autodistill.quantization.grids import Floats, Grid, Storage
from autodistill.quantization.packing import Arrays, unpack
from autodistill.strategy.deployment import Deployment

_PACKAGE = "compressed-tensors"
_DENSE_SINCE = "0.18"
_PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class CompressedTensorsExporter:
    """Writes `pack-quantized` safetensors: integers for linear layers, bfloat16 for the rest."""

    name = "compressed-tensors"
    formats = formats_of("compressed-tensors")
    runtimes: tuple[Runtime, ...] = ()

    def export(self, student: Path, deployment: Deployment, out: Path, **label: Unpack[Label]) -> Artifact:
        """Write the quantised student into the folder `out`; only the model card names its teacher and licence.

        Raises:
            InputError: The student cannot be read or cannot be cut into groups, or `out` cannot be written.
            MissingDependencyError: As by `check_package`.
        """
        check_package(deployment)
        tensors: dict[str, torch.Tensor] = {}
        with StudentFiles(student, deployment) as files:
            for name in files.specs:
                tensors |= _tensors(name, files.pack(name))
            linears = [spec for spec in files.specs.values() if spec.role is Role.LINEAR]
            quantization = quantization_config(
                {spec.name.removesuffix(".weight"): deployment.storage(spec) for spec in linears}, deployment
            )
            config = bf16_config(files.config) | {"quantization_config": quantization}
            return write_folder(out, student, config, tensors)

    def unpack(self, artifact: Path) -> Iterator[tuple[str, Floats]]:
        """Yield each stored tensor, dequantised from the grid that the folder's config declares.

        Raises:
            VerificationError: A packed tensor lacks one of its parts, or no group of the config names it.
        """
        stated = _stated_grids(artifact)
        parts: dict[str, Arrays] = defaultdict(dict)
        for name, tensor in read_arrays(artifact / WEIGHTS):
            prefix, _, part = name.rpartition(".")
            if part not in _PARTS:
                yield name, unpack({"data": _bits(tensor)}, "bf16", tuple(tensor.shape))
                continue
            grid = _grid_of(prefix, stated)
            parts[prefix][part] = _bits(tensor)
            if len(parts[prefix]) == len(_PARTS[:3] if grid.symmetric else _PARTS):
                arrays = parts.pop(prefix)
                rows, columns = (int(size) for size in arrays["weight_shape"])
                yield f"{prefix}.weight", unpack(arrays, grid, (rows, columns))
        if parts:
            raise VerificationError(f"{min(parts)} lacks a part of its packed weights: export the student again")

    def run(self, artifact: Path, sequences: TokenIds, threads: int, student: Path, deployment: Deployment) -> Ran:
        """Run the folder in transformers, even if vLLM will serve it; see `Exporter.run`.

        If there are several grids and some have zero points, the compressed-tensors package unpacks them first, because
        transformers 5.24 does not load them.
        """
        if len(deployment.grids) > 1 and not all(grid.symmetric for grid in deployment.grids):
            return run_model(_unpacked(artifact), artifact, sequences, threads)
        return run_in_transformers(artifact, sequences, threads)


def check_package(deployment: Deployment) -> None:
    """Refuse bit widths that the installed compressed-tensors package would unpack to other weights.

    Codes of 2, 4 and 8 bits fill 32 bits exactly, and all versions pack them alike. Since 0.18, other widths are packed
    without gaps, across word boundaries. Earlier versions left gaps.

    Raises:
        MissingDependencyError: The package is too old.
    """
    if deployment.container != _PACKAGE:
        return
    installed = importlib.metadata.version(_PACKAGE)
    odd = sorted({grid.bits for grid in deployment.grids if 32 % grid.bits})
    if odd and Version(installed) < Version(_DENSE_SINCE):
        raise MissingDependencyError(
            f"{deployment.name} is packed as {_PACKAGE} {_DENSE_SINCE} and later do, and {installed} is installed: pip "
            f"install '{_PACKAGE}>={_DENSE_SINCE}', or leave out {' and '.join(map(str, odd))} bits"
        )


def quantization_config(linears: Mapping[str, Storage], deployment: Deployment) -> dict[str, Any]:
    """Return the entry for config.json that describes the grids, in the terms of the compressed-tensors package.

    A single grid is declared for all `Linear` modules. If there are several, each names its layers. vLLM checks the
    class of a layer that it fused before it looks at the names of the fused layers.

    Args:
        linears: How each linear layer except the head is stored, by its module's name.
        deployment: How the student is packed.
    """
    by_grid: dict[Grid, list[str]] = defaultdict(list)
    for name, storage in linears.items():
        if isinstance(storage, Grid):
            by_grid[storage].append(name)
    groups = {}
    for index, (grid, names) in enumerate(sorted(by_grid.items(), key=lambda one: -len(one[1]))):
        groups[f"group_{index}"] = {
            "targets": _targets(names) if deployment.types else ["Linear"],
            "weights": _weights(grid),
            "input_activations": None,
            "output_activations": None,
        }
    # transformers 5.24 reserves no memory for packed zero points if it keeps weights packed until they are used. It
    # would dequantise all of several grids by one of them.
    unpacked = {} if len(by_grid) > 1 or all(grid.symmetric for grid in by_grid) else {"dequantize": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head", *(name for name, storage in linears.items() if not isinstance(storage, Grid))],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        **unpacked,
    }


def _weights(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "group" if grid.group_size else "channel",
        "group_size": grid.group_size or None,
        "dynamic": False,
        "observer": "minmax",
    }


_IN_A_LAYER = re.compile(r"(.*\.)(\d+)(\..*)")


def _targets(names: Iterable[str]) -> list[str]:
    """Return regular expressions that match exactly these modules; modules that differ only in layer share one."""
    alike: dict[tuple[str, str], list[int]] = defaultdict(list)
    found = []
    for name in names:
        parts = _IN_A_LAYER.fullmatch(name)
        if parts is None:
            found.append(f"re:{re.escape(name)}$")
        else:
            alike[parts[1], parts[3]].append(int(parts[2]))
    for (before, after), layers in alike.items():
        found.append(f"re:{re.escape(before)}({'|'.join(map(str, sorted(layers)))}){re.escape(after)}$")
    return found


def _tensors(name: str, arrays: Arrays) -> dict[str, torch.Tensor]:
    if "data" in arrays:
        return {name: as_bf16(arrays)}
    prefix = name.removesuffix("weight")
    scale = torch.from_numpy(arrays["weight_scale"]).view(torch.bfloat16)
    plain = {prefix + part: torch.from_numpy(values) for part, values in arrays.items() if part != "weight_scale"}
    return plain | {f"{prefix}weight_scale": scale}


def _unpacked(artifact: Path) -> Any:
    """Return a float32 transformers model with the weights that the compressed-tensors package unpacks."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_name
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(artifact, local_files_only=True)
    stated = QuantizationConfig.model_validate(config.quantization_config)
    del config.quantization_config
    compressor = BaseCompressor.get_value_from_registry(str(stated.format))
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    weights = {}
    for name, tensor in read_arrays(artifact / WEIGHTS):
        prefix, _, part = name.rpartition(".")
        if part in _PARTS:
            parts[prefix][part] = tensor
        else:
            weights[name] = tensor
    for module, held in parts.items():
        (scheme,) = (
            one for one in stated.config_groups.values() if any(match_name(module, target) for target in one.targets)
        )
        weights[f"{module}.weight"] = compressor.decompress(held, scheme)["weight"]
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lacking = model.load_state_dict(weights, strict=False)
    missing = set(lacking.missing_keys) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    if missing or lacking.unexpected_keys:
        raise VerificationError(f"{artifact} has other weights than its model: {sorted(missing)[:3]}")
    return model.float().eval()


def _bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _stated_grids(artifact: Path) -> list[tuple[str, Grid]]:
    """Return the targets of a folder's config, each with its grid."""
    held, found = get_format("compressed-tensors"), []
    for group in read_json(artifact / "config.json")["quantization_config"]["config_groups"].values():
        weights = group["weights"]
        storage = held.linear(weights["num_bits"], weights["group_size"] or 0, weights["symmetric"])
        assert isinstance(storage, Grid)
        found += [(str(target), storage) for target in group["targets"]]
    return found


def _grid_of(module: str, stated: Sequence[tuple[str, Grid]]) -> Grid:
    """Return the grid of a linear layer, by the targets of its folder's config.

    Raises:
        VerificationError: No target matches it.
    """
    for target, grid in stated:
        if target == "Linear" or (target.startswith("re:") and re.match(target.removeprefix("re:"), module)):
            return grid
    raise VerificationError(f"{module} is packed, and no group of the folder's config names it: export it again")
