"""Packs a model in another container with the codes that it has now, as far as the container can hold them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from autodistill.export.student_reader import StudentFiles
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import read_config
from autodistill.quantization.grids import Grid, Scales
from autodistill.quantization.learned_scales import SCALES_FILE, read_scales, write_scales
from autodistill.quantization.packing import quantize, round_to
from autodistill.quantization.scheme import QuantizationScheme


@contextmanager
def with_codes_of(folder: Path, own: QuantizationScheme, other: QuantizationScheme) -> Iterator[Path]:
    """Yield a folder with a model's files, and scales under which another scheme stores the codes of its own.

    Without such scales the other container would follow its own rule for them, and round weights that lie on a grid
    once more. They are given for matrices whose codes the other grid has too; otherwise `folder` itself is yielded.

    Args:
        folder: The model in float32.
        own: How it is stored now.
        other: How it is to be stored.
    """
    scales: dict[str, Scales] = {}
    uneven = spec_from_config(read_config(folder)).ffn_widths  # a container may pad narrower layers
    with StudentFiles(folder, own) as files:
        if not uneven and not read_scales(folder, other):
            for name, grid in own.grids_of(files.spec.tensors).items():
                columns, held = files.specs[name].shape[1], other.storage(files.specs[name])
                if isinstance(held, Grid) and _holds(held, grid, columns):
                    found = quantize(files.read(name), grid, files.scales(name))[1].scales
                    repeated = found.repeat(grid.group(columns) // held.group(columns), axis=1)
                    assert held.scale_dtype != "e8m0"
                    scales[name] = Scales(round_to(np.asarray(repeated, np.float32), held.scale_dtype))
    if not scales:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="autodistill-") as place:
        for file in folder.iterdir():
            if file.name != SCALES_FILE:
                (Path(place) / file.name).symlink_to(file.resolve())
        write_scales(Path(place), other, scales)
        yield Path(place)


def _holds(grid: Grid, other: Grid, columns: int) -> bool:
    """Return whether a grid has all codes of another one, in groups that lie within the other's."""
    even = not (grid.codebook or grid.block_size or other.codebook) and grid.symmetric and other.symmetric
    codes = grid.qmin <= other.qmin and other.qmax <= grid.qmax
    return even and codes and other.group(columns) % grid.group(columns) == 0
