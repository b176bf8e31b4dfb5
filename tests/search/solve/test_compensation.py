"""Rounding that compensates for its errors in whole models: what it gains, and that files hold what was measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autodistill.data.dataset import load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.families import get_family
from autodistill.models.gguf_reader import read_gguf
from autodistill.models.loading import load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.quantization.grids import Grid
from autodistill.quantization.packing import deployed
from autodistill.search.solve import SolveRequest, solve
from autodistill.search.solve import bench as benches
from autodistill.search.solve.bench import Bench
from autodistill.search.solve.compensation import compensate, gains
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import read_json

LENGTH = 64
Q4_0 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
Q3_K = Deployment(runtime="llama.cpp", format="gguf-q3_k", bits=3, group_size=16)
INT4 = Deployment(runtime="vllm", format="compressed-tensors", bits=4, group_size=64, symmetric=False)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text(tmp_path_factory.mktemp("text"), documents=48)


def bench_of(folder: Path, text: Path, cache: Path) -> tuple[Bench, Any]:
    data = prepare(resolve_data(str(text)), folder, tokenizer_fingerprint(folder), LENGTH, cache)
    tokens = load_split(data.folder, "train").head(1024)
    bench = Bench(load_model(folder, torch.float32), spec_from_config(read_json(folder / "config.json")), {})
    bench.weigh(tokens)
    return bench, tokens


# Each family is tested on one grid. Each kind of grid is tested in a plain family and in another.
@pytest.mark.parametrize(
    ("family", "deployment"),
    [
        *(pytest.param("llama", deployment, marks=pytest.mark.slow) for deployment in (Q4_0, INT4, Q3_K)),
        ("gemma3_text", Q4_0),
        ("gpt_neox", INT4),
        ("qwen2", Q3_K),
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_the_model_is_nearer_to_the_teacher_and_lies_on_the_grid(
    family: str, deployment: Deployment, text: Path, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"layers": 3, "width": 256, "heads": 4, "kv_heads": 2, "ffn": 256, "seed": 5}
    folder = save_tiny_teacher(tmp_path / "teacher", architecture=family, tied=family != "gpt_neox", **sizes)
    bench, tokens = bench_of(folder, text, tmp_path / "cache")
    sample = bench.sample("calibration", tokens)
    nearest = bench.measure(deployment, sample)
    made = compensate(bench, deployment, tokens)
    (found,) = bench.measure_weights(made.weights(bench), deployment.cache_types, (sample,))
    assert found.kl < 0.9 * nearest.kl
    assert set(made.values) == {
        tensor.name
        for tensor in bench.spec.tensors
        if ".layers." in tensor.name and (isinstance(deployment.storage(tensor), Grid))
    }
    for name, values in made.values.items():
        grid = deployment.storage(next(one for one in bench.spec.tensors if one.name == name))
        np.testing.assert_array_equal(deployed(values.numpy(), grid, made.scales[name]), values.numpy())
    # The teacher is unchanged.
    own = dict(load_model(folder, torch.float32).named_parameters())
    assert all(torch.equal(own[name], bench.master(name)) for name in made.values)


def test_scales_are_searched_for_once_for_each_type_of_a_matrix(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, tokens = bench_of(save_tiny_teacher(tmp_path / "teacher", layers=2), text, tmp_path / "cache")
    search, searched = benches.weighted_scales, []
    monkeypatch.setattr(benches, "weighted_scales", lambda *given: searched.append(given) or search(*given))
    matrix = next(one for one in bench.spec.tensors if one.name.endswith("up_proj.weight"))
    storages = [one.storage(matrix) for one in (Q4_0, INT4)]
    values = [bench.stored(matrix.name, storage) for storage in storages]
    assert all(bench.stored(matrix.name, one).equal(found) for one, found in zip(storages, values, strict=True))
    assert len(searched) == 2
    bench.weigh(tokens.head(LENGTH))  # with other text, columns have other weights
    assert not bench.stored(matrix.name, storages[0]).equal(values[0])


def test_what_lies_on_the_grid_is_left_alone(text: Path, tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "teacher", layers=2)
    bench, _ = bench_of(folder, text, tmp_path / "cache")
    wide = Deployment(runtime="transformers", format="huggingface", bits=16, group_size=0)
    assert gains(bench, wide) == []
    with torch.no_grad():
        for tensor in bench.spec.tensors:
            if isinstance(Q4_0.storage(tensor), Grid) and ".0." in tensor.name:
                bench.master(tensor.name).copy_(bench.stored(tensor.name, Q4_0.storage(tensor)))
    assert all(".1." in name for name in gains(bench, Q4_0))


@pytest.mark.slow
def test_the_file_of_a_solution_is_what_was_measured(text: Path, tmp_path: Path) -> None:
    folder = save_tiny_teacher(tmp_path / "teacher", seed=3, layers=3, width=128, heads=2, kv_heads=1, ffn=256)
    spec = spec_from_config(read_json(folder / "config.json"))
    request = SolveRequest(
        budgets=(Budget(memory_bytes=45 * 10**6, context=256),),
        cache=tmp_path / "cache",
        teacher=str(folder),
        data=str(text),
        tokens=512,
        sequence_length=LENGTH,
        file_bytes=sum(math.prod(tensor.shape) for tensor in spec.tensors) * 5 // 8,
        out=tmp_path / "out",
        export=True,
    )
    found = solve(request)
    solution = found["solutions"][0]["solution"]
    assert solution["compensated"]
    assert solution["compensated_calibration_kl"] < solution["calibration_kl"]
    # The test puts the file's own values into a model of transformers, and uses text on which nothing was chosen.
    data = prepare(resolve_data(str(text)), folder, tokenizer_fingerprint(folder), LENGTH, tmp_path / "cache")
    held_out = load_split(data.folder, "validation").head(1024)
    tokens = torch.from_numpy(held_out.tokens.astype(np.int64))
    model, family = load_model(folder, torch.float32), get_family("llama")
    if Deployment.from_json(solution["deployment"]).cache_types != ("f16", "f16"):
        pytest.skip("the solution's cache is not in 16 bits")
    with torch.inference_mode():
        before = model(tokens).logits[:, :-1].log_softmax(-1)
        file = read_gguf(Path(found["exported"]["path"]))
        parameters = dict(model.named_parameters())
        for tensor in file.tensors:
            name = family.from_gguf_name(tensor.name)
            if name is not None and name in parameters:
                parameters[name].data = torch.from_numpy(np.array(file.values(tensor)))
        after = model(tokens).logits[:, :-1].log_softmax(-1)
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    assert kl == pytest.approx(solution["kl"], rel=0.05)
    assert solution["kl"] < solution["nearest_kl"]
