"""Which codes stay as they are when a model goes to another container."""

from pathlib import Path

import numpy as np
import pytest

from autodistill.export.student_reader import StudentFiles
from autodistill.quantization.formats import get_format
from autodistill.quantization.grids import Grid
from autodistill.quantization.packing import quantize
from autodistill.search.finish.same_codes import with_codes_of
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher

NAME = "model.layers.0.mlp.up_proj.weight"


def packing(name: str, bits: int, group_size: int = 32, symmetric: bool = True) -> Deployment:
    runtime = get_format(name).runtimes[0]
    return Deployment(runtime=runtime, format=name, bits=bits, group_size=group_size, symmetric=symmetric)


@pytest.mark.parametrize(
    ("own", "other", "kept"),
    [
        (packing("gguf-q4_0", 4), packing("compressed-tensors", 4), True),
        (packing("gguf-q5_0", 5), packing("compressed-tensors", 8), True),
        (packing("compressed-tensors", 4, 64), packing("gguf-q4_0", 4), True),
        (packing("compressed-tensors", 8), packing("gguf-q8_0", 8), False),  # Q8_0 has no code -128
        (packing("gguf-q4_1", 4, symmetric=False), packing("compressed-tensors", 4, symmetric=False), False),
        (packing("gguf-iq4_nl", 4), packing("compressed-tensors", 4), False),
        (packing("gguf-q4_0", 4), packing("compressed-tensors", 4, 64), False),
        (packing("gguf-q4_0", 4), packing("gguf-f16", 16, 0), False),
    ],
)
def test_codes_stay_if_the_other_grid_has_them_all(
    own: Deployment, other: Deployment, kept: bool, tmp_path: Path
) -> None:
    student = save_tiny_teacher(tmp_path / "student", layers=1)
    with with_codes_of(student, own, other) as folder:
        assert (folder != student) == kept
        if not kept:
            return
        with StudentFiles(student, own) as before, StudentFiles(folder, other) as after:
            weights, grids = before.read(NAME), (own.linear, other.linear)
            assert all(isinstance(grid, Grid) for grid in grids)
            codes = [
                quantize(weights, grid, files.scales(NAME))[0]
                for grid, files in zip(grids, (before, after), strict=True)
            ]
            assert np.mean(codes[0] != codes[1]) < 0.02, "those next to a half, since scales are rounded"
            values = before.deployed(NAME), after.deployed(NAME)
            assert np.linalg.norm(values[1] - values[0]) < 0.02 * np.linalg.norm(values[0])
    assert not folder.exists()
