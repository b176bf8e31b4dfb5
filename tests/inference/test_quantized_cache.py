"""Keys and values as llama.cpp's cache holds them, against gguf's quantisation, scipy's matrices and llama.cpp."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import scipy.linalg
import torch

from autodistill.evaluation.evaluate import deployed_weights
from autodistill.export.gguf import GgufExporter
from autodistill.inference.quantized_cache import as_cached, quantized_cache
from autodistill.models.config import spec_from_config
from autodistill.models.loading import load_model
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher
from autodistill.utils.json_files import read_json

KINDS = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}


def reference(rows: np.ndarray, kind: str) -> np.ndarray:
    return gguf.dequantize(gguf.quantize(rows.astype(np.float32), KINDS[kind]), KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("head", "turned"), [(64, 64), (128, 128), (128, 64), (96, 64)])
def test_rows_are_turned_rounded_and_turned_back(kind: str, head: int, turned: int) -> None:
    rows = np.random.default_rng(head).standard_normal((2, 3, 5, head)).astype(np.float32)
    found = as_cached(torch.from_numpy(rows), kind, turned).numpy()
    if head % turned:
        np.testing.assert_array_equal(found, reference(rows.reshape(-1, head), kind).reshape(rows.shape))
        return
    matrix = scipy.linalg.hadamard(turned) / np.sqrt(turned)
    blocks = rows.astype(np.float64).reshape(-1, turned) @ matrix
    expected = (reference(blocks.reshape(-1, head), kind).reshape(-1, turned) @ matrix).reshape(rows.shape)
    # The two are rounded from sums in different orders. A value between two codes sometimes gets the other code.
    assert np.quantile(np.abs(found - expected), 0.98) < 1e-5


def test_a_cache_of_16_bits_changes_nothing_and_another_is_put_back(tmp_path: Path) -> None:
    model = load_model(save_tiny_teacher(tmp_path, width=128, heads=2, kv_heads=1), torch.float32)
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        before = model(tokens).logits
        with quantized_cache(model, ("f16", "f16")):
            assert torch.equal(model(tokens).logits, before)
        with quantized_cache(model, ("q8_0", "f16")):
            keys = model(tokens).logits
        with quantized_cache(model, ("f16", "q4_0")):
            values = model(tokens).logits
            # Reading one token at a time attends to the same rounded rows.
            cache, parts = None, []
            for token in tokens[0]:
                step = model(token[None, None], cache=cache, use_cache=True)
                cache = step.past_key_values
                parts.append(step.logits)
        assert torch.allclose(torch.cat(parts, dim=1), values, atol=1e-3)
        assert torch.equal(model(tokens).logits, before)
    assert 0 < (keys - before).abs().mean() < (values - before).abs().mean()


# llama.cpp's graph has the rows of a head in another order for the first model, and in transformers' order for the
# second.
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_llama_cpp_with_such_a_cache_chooses_as_it_is_simulated(architecture: str, tmp_path: Path) -> None:
    sizes: dict[str, int] = {"layers": 3, "width": 128, "heads": 2, "kv_heads": 1, "seed": 5}
    folder = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, **sizes)
    spec = spec_from_config(read_json(folder / "config.json"))
    plain = {"runtime": "llama.cpp", "format": "gguf-f16", "bits": 16, "group_size": 0}
    artifact = GgufExporter().export(folder, Deployment(**plain), tmp_path / "out")
    sequences = np.random.default_rng(1).integers(3, 300, (4, 96))
    with LlamaServer(artifact.path, 128, 1, cache_type_k="q4_0", cache_type_v="q4_0", whole_cache=True) as server:
        served = np.array([[server.next_token(row[: end + 1]) for end in range(96)] for row in sequences.tolist()])
    model = load_model(folder, torch.float32)
    agreement = {}
    for kind in ("f16", "q8_0", "q4_0"):
        with deployed_weights(model, spec, Deployment(**plain, cache_type_k=kind, cache_type_v=kind)), torch.no_grad():
            agreement[kind] = (model(torch.from_numpy(sequences)).logits.argmax(-1).numpy() == served).mean()
    # Random weights give many near-ties, and llama.cpp rounds queries and products too.
    assert agreement["q4_0"] > 0.9
    assert agreement["q4_0"] > max(agreement["f16"], agreement["q8_0"]) + 0.1
