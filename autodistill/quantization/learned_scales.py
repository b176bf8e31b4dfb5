"""File of the scales that a finishing stage learned, or of a teacher's own scales, beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from autodistill.quantization.formats import QuantizationScheme
from autodistill.quantization.grids import Scales

SCALES_FILE = "grid_scales.safetensors"


def write_scales(folder: Path, scheme: QuantizationScheme, scales: Mapping[str, Scales]) -> None:
    """Write the learned scales of a quantisation scheme by weight name; writes nothing if there are none."""
    if not scales:
        return
    arrays = {
        f"{name}.{part}": np.ascontiguousarray(values)  # else the file would have them in another order
        for name, pair in scales.items()
        for part, values in pair._asdict().items()
        if values is not None
    }
    save_file(arrays, folder / SCALES_FILE, metadata={"packing": _text(scheme)})


def read_scales(folder: Path, scheme: QuantizationScheme) -> dict[str, Scales]:
    """Read the learned scales of a quantisation scheme; empty if its scales follow from the weights."""
    if not (folder / SCALES_FILE).is_file():
        return {}
    with safe_open(folder / SCALES_FILE, framework="numpy") as file:
        if file.metadata()["packing"] != _text(scheme):
            return {}
        names = set(file.keys())
        return {
            name: Scales(
                file.get_tensor(f"{name}.scales"),
                file.get_tensor(f"{name}.offsets") if f"{name}.offsets" in names else None,
            )
            for name in sorted(key.removesuffix(".scales") for key in names if key.endswith(".scales"))
        }


def _text(scheme: QuantizationScheme) -> str:
    return json.dumps(asdict(scheme.scheme), sort_keys=True)
