"""A model's graph in ONNX Runtime: exported, put on a grid, and the memory that a process takes which runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from autodistill.advisor.describe import deployment_named
from autodistill.strategy.deployment import Deployment
from benchmarks.common.model_files import STRIDE, Case

_ONNX_CHILD = """
import json, sys
import numpy as np, onnxruntime as ort
from pathlib import Path
path, vocabulary, stride, cells, row, patterns = sys.argv[1], *map(int, sys.argv[2:])
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.enable_mem_pattern = bool(patterns)
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
Path("/proc/self/clear_refs").write_text("5")
tokens, *caches = session.get_inputs()
def run(number, cells):
    count = tokens.shape[0] * tokens.shape[1]
    ids = (np.arange(number * count, (number + 1) * count) * stride % vocabulary).reshape(tokens.shape)
    given = {cache.name: np.ones([cells if isinstance(n, str) else n for n in cache.shape], np.float32)
             for cache in caches}
    given[tokens.name] = ids
    # `run` would copy the outputs to numpy.
    session.run_with_ort_values(None, {name: ort.OrtValue.ortvalue_from_numpy(found) for name, found in given.items()})
if caches:
    # A step looks one row up: a page's worth of the mapped table at a time, it is all read first.
    stride = max(1, 2**16 // row)
    for number in range(-(-vocabulary // (stride * tokens.shape[0]))):
        run(number, 2)
for number in range(4):
    run(number, cells)
lines = Path("/proc/self/status").read_text().splitlines()
print(next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
"""


class Prefill(torch.nn.Module):
    """A graph that reads a prompt: its logits, and the keys and values of every layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[batch, tokens] to [batch, tokens, vocabulary], and [batch, heads, all tokens, head dim] twice a layer.

        Args:
            tokens: What is read.
            past: Keys and values of what lies before, in the same order; none in a prompt.
        """
        cache = transformers.DynamicCache() if past else None
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        found = self.model(input_ids=tokens, cache=cache, use_cache=True)
        return (found.logits, *(part for layer in found.past_key_values.layers for part in (layer.keys, layer.values)))


def export_onnx(case: Case, path: Path, dtype: torch.dtype, step: bool) -> None:
    """Writes the graph of a prompt that fills the context, or of a step after any number of tokens."""
    config = transformers.AutoConfig.for_model(**case.config())
    model = Prefill(transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    options: dict[str, Any] = {"dynamo": True, "external_data": True, "verbose": False}
    with torch.no_grad():
        if not step:
            torch.onnx.export(model, (torch.zeros(case.batch, case.context, dtype=torch.int64),), str(path), **options)
        else:
            token = torch.zeros(case.batch, 1, dtype=torch.int64)
            past = [torch.zeros(case.batch, case.kv_heads, 7, case.head_dim) for _ in range(2 * case.layers)]
            cells = torch.export.Dim("cells", min=2, max=2**20)
            shapes = {"tokens": {}, "past": tuple({2: cells} for _ in past)}
            torch.onnx.export(model, (token, *past), str(path), dynamic_shapes=shapes, **options)
    deployment = onnx_deployment(case)
    if deployment.bits < 16:
        _quantize(path, deployment)


def onnx_deployment(case: Case) -> Deployment:
    """What a graph's weights are in: floats, unless the case names a grid of ONNX Runtime's."""
    return deployment_named("huggingface" if case.form == Case.form else case.form)


def _quantize(path: Path, deployment: Deployment) -> None:
    """Puts the products' weights on a grid, in place."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    grid = DefaultWeightOnlyQuantConfig(block_size=deployment.group_size, is_symmetric=True, bits=deployment.bits)
    quantizer = MatMulNBitsQuantizer(onnx.load(path), algo_config=grid)
    quantizer.process()
    for file in path.parent.iterdir():
        file.unlink()
    onnx.save_model(quantizer.model.model, path, save_as_external_data=True, location="model.onnx.data")


def onnx_peak(
    case: Case, folder: Path, *, dtype: Any = torch.float32, step: bool = False, patterns: bool = False
) -> int:
    """Bytes of the most memory that a process takes which runs a model's graph in ONNX Runtime, once it is loaded."""
    path = folder / "model.onnx"
    export_onnx(case, path, dtype, step)
    numbers = (case.vocabulary, STRIDE, case.context - 1, 4 * case.width, int(patterns))
    command = [sys.executable, "-c", _ONNX_CHILD, str(path), *map(str, numbers)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
