"""Write the codes and scales that torchao gives some weights, as a reference for the tests of integer grids.

    pip install --no-deps --target FOLDER torchao && PYTHONPATH=FOLDER python -m benchmarks.engine.torchao_reference

The file is torchao.safetensors next to the tests. torchao is in no environment of the project: if it is installed,
transformers imports it with every model. This takes seconds, and prints which of its parts could not be loaded.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from autodistill.quantization.formats import get_format
from benchmarks.common import program

FILE = Path(__file__).parents[2] / "tests" / "distillation" / "training" / "torchao.safetensors"
SHAPE = (16, 256)


def main() -> None:
    """Write torchao's codes and scales of fixed weights into the folder of the tests."""
    smoke = program.parse(program.parser_of(__doc__)).smoke
    try:
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine
    except ImportError:
        raise SystemExit("torchao is not installed: see --help") from None
    weights = torch.from_numpy(np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    found = {}
    for grid in get_format("compressed-tensors").linears:
        if grid.bits not in (4, 8) or not grid.group_size:
            continue
        mapping = MappingType.SYMMETRIC if grid.symmetric else MappingType.ASYMMETRIC
        block, bounds = (1, grid.group_size), (grid.qmin, grid.qmax)
        scales, zero_points = choose_qparams_affine(
            weights, mapping, block, torch.int8, *bounds, eps=1e-9, scale_dtype=torch.float32
        )
        # The container holds scales in bfloat16.
        stored = scales.bfloat16().float()
        codes = quantize_affine(weights, block, stored, zero_points, torch.int8, *bounds)
        parts = {"scales": stored, "zero_points": zero_points, "codes": codes}
        found |= {f"{grid.name}.{name}": part.contiguous() for name, part in parts.items()}
    file = program.REPORTS / FILE.name if smoke else FILE
    save_file(found, file, metadata={"torchao": version("torchao"), "weights": "numpy default_rng(0), standard normal"})
    print(file)


if __name__ == "__main__":
    main()
