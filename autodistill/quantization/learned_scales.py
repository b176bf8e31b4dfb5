"""File next to the weights with the scales that a finishing stage learned, or with a teacher's own scales."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from autodistill.models.config import spec_from_config
from autodistill.models.spec import ModelSpec
from autodistill.quantization.grids import Scales
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.utils.plain_dataclass import plain

SCALES_FILE = "grid_scales.safetensors"


def write_scales(folder: Path, scheme: QuantizationScheme, scales: Mapping[str, Scales]) -> None:
    """Write the learned scales of a quantisation scheme by weight name, or no file if there are none."""
    if not scales:
        return
    arrays = {
        f"{name}.{part}": np.ascontiguousarray(values)  # otherwise the file would hold them in another order
        for name, pair in scales.items()
        for part, values in pair._asdict().items()
        if values is not None
    }
    save_file(arrays, folder / SCALES_FILE, metadata={"packing": _text(scheme)})


def read_scales(folder: Path, scheme: QuantizationScheme) -> dict[str, Scales]:
    """Return the scales learned for `scheme`, or an empty dictionary if scales follow from the weights.

    Scales that were learned under another scheme do not apply, with one exception. If either scheme gives matrices
    types of their own, the scales apply to the matrices that both schemes store alike.

    Args:
        folder: Folder of a model, with its config.json.
        scheme: The scheme in which its weights are packed.
    """
    if not (folder / SCALES_FILE).is_file():
        return {}
    with safe_open(folder / SCALES_FILE, framework="numpy") as file:
        learned = file.metadata()["packing"]
        names = set(file.keys())
        found = sorted(key.removesuffix(".scales") for key in names if key.endswith(".scales"))
        if learned != _text(scheme):
            other = _scheme(learned)
            if not (other.types or scheme.types):
                return {}
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            found = stored_alike(found, spec_from_config(config), other, scheme)
        return {
            name: Scales(
                file.get_tensor(f"{name}.scales"),
                file.get_tensor(f"{name}.offsets") if f"{name}.offsets" in names else None,
            )
            for name in found
        }


def stored_alike(
    names: Iterable[str], spec: ModelSpec, learned: QuantizationScheme, scheme: QuantizationScheme
) -> list[str]:
    """Return the matrices that two schemes store alike; none if the schemes differ and neither has `types`."""
    if learned.scheme == scheme.scheme:
        return list(names)
    if not (learned.types or scheme.types):
        return []
    tensors = {tensor.name: tensor for tensor in spec.tensors}
    return [name for name in names if learned.storage(tensors[name]) == scheme.storage(tensors[name])]


def _scheme(text: str) -> QuantizationScheme:
    """Read a scheme from the text that `_text` wrote."""
    fields = json.loads(text)
    keep, types = tuple(fields.pop("keep")), tuple(fields.pop("types", {}).items())
    return QuantizationScheme(**fields, keep=keep, types=types)


def _text(scheme: QuantizationScheme) -> str:
    return json.dumps(plain(scheme.scheme), sort_keys=True)
