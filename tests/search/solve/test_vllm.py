"""Mixtures for vLLM: they fit its memory, use one type for fused matrices, and compressed-tensors itself reads them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from autodistill.cli.app import main
from autodistill.errors import InputError
from autodistill.hardware.budget import Budget
from autodistill.models.loading import load_model
from autodistill.quantization.formats import INTEGER_TYPES, tensor_bytes
from autodistill.quantization.grids import Grid
from autodistill.search.solve import SolveRequest
from autodistill.search.solve.options import Options
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher
from autodistill.utils.json_files import read_json
from tests.search.solve.for_runtime import CONTEXT, limit_between, options_for, solved_for

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"layers": 3, "width": 128, "heads": 2, "kv_heads": 1, "ffn": 256}
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"), seed=3, **sizes)


@pytest.fixture(scope="module")
def limit(teacher: Path) -> int:
    return limit_between(teacher, Deployment(runtime="vllm", format="compressed-tensors", bits=8, group_size=32))


@pytest.fixture(scope="module")
def found(teacher: Path, limit: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = tmp_path_factory.mktemp("solved")
    return solved_for("vllm", teacher, limit, made, export=True, out=made / "out")


@pytest.mark.slow
def test_the_solution_is_a_mixture_that_vllm_holds(found: dict[str, Any], teacher: Path, limit: int) -> None:
    solution = found["solutions"][0]["solution"]
    deployment = Deployment.from_json(solution["deployment"])
    assert (deployment.runtime, deployment.container) == ("vllm", "compressed-tensors")
    assert len(deployment.grids) > 1
    spec = options_for("vllm", teacher).spec
    deployment.check_model(spec.tensors)
    storages = {tensor.name: deployment.storage(tensor) for tensor in spec.tensors}
    for layer in range(spec.layers):
        for fused in FUSED:
            names = [name for name in storages if f".{layer}." in name and name.split(".")[-2] in fused]
            assert len({storages[name] for name in names}) == 1
    assert all(one.bits in (4, 8) for one in deployment.grids)
    assert solution["bytes"] <= limit
    assert sum(tensor_bytes(tensor, storages[tensor.name]) for tensor in spec.tensors) == solution["weights_bytes"]
    # No plain type that fits loses less.
    plain = [one for one in found["solutions"][0]["rivals"] if one["fits"] and one["kl"] is not None]
    assert plain
    assert all(one["kl"] > solution["kl"] for one in plain)


def test_what_was_written_is_what_compressed_tensors_reads(found: dict[str, Any], teacher: Path) -> None:
    exported = found["exported"]
    folder = Path(exported["path"])
    assert exported["agreement"] > 0.9
    assert exported["serve"].startswith(f"vllm serve {folder} --max-model-len {CONTEXT}")
    groups = read_json(folder / "config.json")["quantization_config"]["config_groups"].values()
    assert len(groups) > 1
    assert all("Linear" not in group["targets"] for group in groups)
    # Its own reader loads the file. Each matrix is as near to the teacher's as its bits allow.
    served = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = torch.arange(3, 43)[None]
    with torch.inference_mode():
        theirs = served(tokens).logits.float()
        ours = load_model(teacher, torch.float32)(tokens).logits
    gap = float((theirs.log_softmax(-1) - ours.log_softmax(-1)).abs().mean())
    assert gap < 0.2
    assert np.isfinite(gap)


def test_layers_that_are_fused_are_one_item_and_others_their_own(teacher: Path) -> None:
    tied = options_for("vllm", teacher).tied
    assert sorted(map(len, tied)) == [1] * 6 + [2] * 3 + [3] * 3
    assert {len(one) for one in replace(options_for("vllm", teacher), runtime="llama.cpp").tied} == {1}


def test_what_vllm_has_no_kernels_for_is_no_option(teacher: Path) -> None:
    options = options_for("vllm", teacher)
    kinds = {kind for tensor in options.matrices.values() for kind in options.kinds(tensor)}
    grids = [grid for kind in kinds if isinstance(grid := INTEGER_TYPES[kind], Grid)]
    assert {(grid.bits, grid.symmetric) for grid in grids} == {(4, True), (8, True)}
    assert {options.kinds(tensor) for tensor in options.tables.values()} == {("bf16",)}
    assert options.caches == (("f16", "f16"),)
    both = Options(spec=options.spec, budget=options.budget, runtime="vllm")
    assert both.deployment(dict.fromkeys(both.matrices | both.tables, "bf16"), ("f16", "f16")).bits == 16


def test_what_is_not_solved_for_is_refused(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given: dict[str, Any] = {"cache": tmp_path, "budgets": (Budget(memory_bytes=10**12, context=CONTEXT),)}
    with pytest.raises(InputError, match=r"types are solved for llama\.cpp, onnxruntime, vllm, not for 'ollama'"):
        SolveRequest(runtime="ollama", **given)
    with pytest.raises(InputError, match="candidates are GGUF files, which vllm does not serve"):
        SolveRequest(runtime="vllm", candidates=(tmp_path / "one.gguf",), **given)
    words = [
        "solve",
        str(teacher),
        "--budget",
        "1MB",
        "--context",
        "256",
        "--runtime",
        "vllm",
        "--cache",
        str(tmp_path),
    ]
    assert main(words) == 3
    assert (
        "nothing fits 1.00 MB: the smallest model that solve can choose, compressed-tensors-int4"
        in capsys.readouterr().err
    )
