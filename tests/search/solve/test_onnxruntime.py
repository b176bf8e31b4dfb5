"""Mixtures for ONNX Runtime: solved within its memory, and written in the predicted number of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autodistill.cli.solve import solve_text
from autodistill.errors import InputError
from autodistill.export.base import load_exporter
from autodistill.export.graphs.onnx_graph import DATA, Blocks, data_bytes
from autodistill.export.verify import verify
from autodistill.hardware.budget import Budget
from autodistill.quantization.formats import TYPES, weights_bytes
from autodistill.quantization.grids import Grid
from autodistill.search.solve import SolveRequest
from autodistill.strategy.deployment import GRAPH, Deployment
from autodistill.testing import save_tiny_teacher
from tests.search.solve.for_runtime import CONTEXT, limit_between, options_for, solved_for
from tests.thinned import thinned

pytest.importorskip("onnxruntime")
_ALIGNED = 64  # bytes to which each tensor of a file is padded


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {"layers": 3, "width": 256, "heads": 4, "kv_heads": 2, "ffn": 512}
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher"), seed=3, **sizes)


@pytest.fixture(scope="module")
def limit(teacher: Path) -> int:
    return limit_between(teacher, Deployment(runtime="onnxruntime", format="gguf-q8_0", bits=8, group_size=32))


@pytest.fixture(scope="module")
def found(teacher: Path, limit: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    # The limit only counts the weights, because a Python process takes more memory than this model.
    return solved_for("onnxruntime", teacher, limit, tmp_path_factory.mktemp("solved"))


def test_the_solution_is_a_mixture_within_what_onnx_runtime_holds(
    found: dict[str, Any], teacher: Path, limit: int
) -> None:
    solution = found["solutions"][0]["solution"]
    deployment = Deployment.from_json(solution["deployment"])
    assert (deployment.runtime, deployment.container) == ("onnxruntime", "onnx")
    assert deployment.cache_types == ("f16", "f16")
    options = options_for("onnxruntime", teacher)
    assert solution["bytes"] == options.memory(deployment).total_bytes <= limit
    plain = [one for one in found["solutions"][0]["rivals"] if one["fits"] and one["kl"] is not None]
    assert plain
    assert all(one["kl"] >= solution["kl"] for one in plain)
    # This runtime stores codes of 5 and 6 bits in 8 bits. Q8_0 takes as much and loses less.
    assert not {"q5_0", "q6_k"} & {options.types(deployment)[name] for name in options.matrices}


def test_the_sizes_of_matrices_add_up_to_what_is_held(teacher: Path) -> None:
    """The knapsack adds up the sizes of matrices. The prediction uses the memory of the whole model."""
    options = options_for("onnxruntime", teacher)
    types = options.smallest_types()
    before = options.memory(options.deployment(types, ("f16", "f16"))).weights_bytes
    name = next(name for name in options.matrices if name.endswith("down_proj.weight"))
    for kind in options.kinds(options.matrices[name]):
        after = options.memory(options.deployment(types | {name: kind}, ("f16", "f16"))).weights_bytes
        tensor = options.matrices[name]
        assert after - before == options.size(tensor, kind) - options.size(tensor, types[name])


@pytest.mark.parametrize("kind", thinned(kind for kind in TYPES if kind != "mxfp4"))
def test_the_file_has_as_many_bytes_as_are_foretold(teacher: Path, tmp_path: Path, kind: str) -> None:
    """Each type of GGUF is exported. Codes of 3, 5 and 6 bits take more bytes than in GGUF."""
    options = options_for("onnxruntime", teacher)
    deployment = options.deployment(dict.fromkeys(options.matrices | options.tables, kind), ("f16", "f16"))
    foretold, usual = options.file_sizes(deployment)
    exporter = load_exporter("onnx")
    artifact = exporter.export(teacher, deployment, tmp_path / "out")
    assert verify(exporter, artifact, teacher, deployment).tensors == len(options.spec.tensors)
    found = (artifact.path / DATA).stat().st_size
    small = 4 * sum(tensor.shape[0] for tensor in options.spec.tensors if len(tensor.shape) == 1)  # may be in the graph
    assert foretold - small <= found <= foretold + 3 * _ALIGNED * len(options.spec.tensors)
    assert artifact.size_bytes == found + (artifact.path / GRAPH).stat().st_size
    grid = TYPES[kind]
    same = not isinstance(grid, Grid) or (Blocks.of(grid).bits == grid.bits and not grid.block_size)
    assert (foretold == usual) == same
    assert foretold >= usual
    tensors = options.spec.tensors
    assert (foretold, usual) == (data_bytes(tensors, deployment), weights_bytes(tensors, deployment))


def test_bytes_beyond_those_of_gguf_are_shown(found: dict[str, Any]) -> None:
    one = found["solutions"][0]["solution"]
    document = {**found, "solutions": [found["solutions"][0] | {"solution": one | {"wider_bytes": 5 * 10**6}}]}
    assert "5.00 MB more than in a GGUF file" in " ".join(solve_text(document, 100).split())


@pytest.mark.slow
@pytest.mark.timed
def test_it_is_exported_run_and_its_memory_measured(teacher: Path, tmp_path: Path) -> None:
    found = solved_for("onnxruntime", teacher, 10**9, tmp_path, export=True, out=tmp_path / "out")
    exported = found["exported"]
    assert (exported["ran_in"], exported["memory_source"]) == ("ONNX Runtime", "measured")
    assert exported["agreement"] > 0.9
    assert exported["memory_bytes"] < 10**9


def test_what_is_not_solved_for_is_refused(tmp_path: Path) -> None:
    given: dict[str, Any] = {"cache": tmp_path, "budgets": (Budget(memory_bytes=10**12, context=CONTEXT),)}
    with pytest.raises(InputError, match="leave --file-size out, a --budget"):
        SolveRequest(runtime="onnxruntime", file_bytes=10**6, **given)
    with pytest.raises(InputError, match="candidates are GGUF files, which onnxruntime does not serve"):
        SolveRequest(runtime="onnxruntime", candidates=(tmp_path / "one.gguf",), **given)
