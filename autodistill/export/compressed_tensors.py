"""Exporter to a compressed-tensors folder of packed integers, which vLLM and transformers serve."""

from __future__ import annotations

import importlib.metadata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from packaging.version import Version

from autodistill.errors import MissingDependencyError, VerificationError
from autodistill.export.base import Artifact, Ran
from autodistill.export.huggingface import as_bf16, run_in_transformers
from autodistill.export.student_reader import WEIGHTS, StudentFiles, bf16_config, read_arrays, read_json, write_folder
from autodistill.hardware.runtime import Runtime
from autodistill.models.tensors import Role
from autodistill.quantization.formats import formats_of, get_format
from autodistill.quantization.grids import Floats, Grid
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

    def export(
        self,
        student: Path,
        deployment: Deployment,
        out: Path,
        *,
        teacher: str | None = None,
        license: str | None = None,
        name: str | None = None,
    ) -> Artifact:
        """Write the quantised student into the folder `out`; only the model card names its teacher and licence.

        Raises:
            InputError: The student cannot be read or not be cut into groups, or `out` not be written.
            MissingDependencyError: As `check_package`.
        """
        check_package(deployment)
        tensors: dict[str, torch.Tensor] = {}
        with StudentFiles(student, deployment) as files:
            for name in files.specs:
                tensors |= _tensors(name, files.pack(name))
            linears = (spec for spec in files.specs.values() if spec.role is Role.LINEAR)
            kept = [spec.name for spec in linears if not isinstance(deployment.storage(spec), Grid)]
            quantization = quantization_config(deployment, [name.removesuffix(".weight") for name in kept])
            config = bf16_config(files.config) | {"quantization_config": quantization}
            return write_folder(out, student, config, tensors)

    def unpack(self, artifact: Path) -> Iterator[tuple[str, Floats]]:
        """Yield each stored tensor, dequantised from the grid that the folder's config states.

        Raises:
            VerificationError: A packed tensor lacks one of its parts.
        """
        grid = _stated_grid(artifact)
        names = _PARTS[:3] if grid.symmetric else _PARTS
        parts: dict[str, Arrays] = defaultdict(dict)
        for name, tensor in read_arrays(artifact / WEIGHTS):
            prefix, _, part = name.rpartition(".")
            if part not in names:
                yield name, unpack({"data": _bits(tensor)}, "bf16", tuple(tensor.shape))
                continue
            parts[prefix][part] = _bits(tensor)
            if len(parts[prefix]) == len(names):
                arrays = parts.pop(prefix)
                rows, columns = (int(size) for size in arrays["weight_shape"])
                yield f"{prefix}.weight", unpack(arrays, grid, (rows, columns))
        if parts:
            raise VerificationError(f"{min(parts)} lacks a part of its packed weights: export the student again")

    def run(
        self,
        artifact: Path,
        sequences: npt.NDArray[np.integer[Any]],
        threads: int,
        student: Path,
        deployment: Deployment,
    ) -> Ran:
        """Runs the folder in transformers, also where vLLM will serve it; see `Exporter.run`."""
        return run_in_transformers(artifact, sequences, threads)


def check_package(deployment: Deployment) -> None:
    """Refuse bit widths that the installed compressed-tensors package would unpack to other weights.

    Of 2, 4 and 8 bits a whole number fills 32, and all versions pack them alike. Others are packed without a gap since
    0.18, over the words' ends; before they were not.

    Raises:
        MissingDependencyError: The package is older.
    """
    installed = importlib.metadata.version(_PACKAGE)
    if deployment.container == _PACKAGE and 32 % deployment.bits and Version(installed) < Version(_DENSE_SINCE):
        raise MissingDependencyError(
            f"{deployment.name} is packed as {_PACKAGE} {_DENSE_SINCE} and later do, and {installed} is installed: pip "
            f"install '{_PACKAGE}>={_DENSE_SINCE}', or leave out {deployment.bits} bits"
        )


def quantization_config(deployment: Deployment, kept: Sequence[str] = ()) -> dict[str, Any]:
    """Return the grid's entry for config.json, in the terms of the compressed-tensors package.

    Args:
        deployment: How the student is packed.
        kept: Linear layers that stay in 16 bits, the head apart.
    """
    weights = {
        "num_bits": deployment.bits,
        "type": "int",
        "symmetric": deployment.symmetric,
        "strategy": "group" if deployment.group_size else "channel",
        "group_size": deployment.group_size or None,
        "dynamic": False,
        "observer": "minmax",
    }
    # transformers 5.24 makes no room for packed zero points where it keeps weights packed until they are used.
    unpacked = {} if deployment.symmetric else {"dequantize": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", *kept],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        **unpacked,
    }


def _tensors(name: str, arrays: Arrays) -> dict[str, torch.Tensor]:
    if "data" in arrays:
        return {name: as_bf16(arrays)}
    prefix = name.removesuffix("weight")
    scale = torch.from_numpy(arrays["weight_scale"]).view(torch.bfloat16)
    plain = {prefix + part: torch.from_numpy(values) for part, values in arrays.items() if part != "weight_scale"}
    return plain | {f"{prefix}weight_scale": scale}


def _bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _stated_grid(artifact: Path) -> Grid:
    weights = read_json(artifact / "config.json")["quantization_config"]["config_groups"]["group_0"]["weights"]
    held = get_format("compressed-tensors")
    storage = held.linear(weights["num_bits"], weights["group_size"] or 0, weights["symmetric"])
    assert isinstance(storage, Grid)
    return storage
