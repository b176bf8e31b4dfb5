"""All types and caches that the solver may offer run in llama.cpp, which computes what was simulated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autodistill.data.dataset import TokenSet
from autodistill.distillation.teacher.resolve import Teacher
from autodistill.export.base import Expected, load_exporter
from autodistill.export.verify import prove
from autodistill.hardware.budget import Budget
from autodistill.inference.quantized_cache import quantized_cache
from autodistill.inference.scoring import choices
from autodistill.models.config import spec_from_config
from autodistill.quantization.formats import TYPES
from autodistill.search.solve.bench import Bench, load_bench
from autodistill.search.solve.call.export import write_solution
from autodistill.search.solve.options import Options
from autodistill.testing import save_tiny_teacher
from autodistill.utils.json_files import read_json


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    # The rows have 256 weights, which the blocks of all types divide.
    folder = save_tiny_teacher(
        tmp_path_factory.mktemp("offers"), layers=1, width=256, heads=4, kv_heads=2, ffn=256, tied=False, seed=5
    )
    return Teacher(folder=folder, fingerprint="", name="tiny", license=None)


@pytest.fixture(scope="module")
def bench(teacher: Teacher) -> Bench:
    return load_bench(teacher, spec_from_config(read_json(teacher.folder / "config.json")), None)


def offered() -> list[Any]:
    """Return every type, each with another pair of cache types. Those similar to a type with one more bit are slow."""
    alike = ("q5_0", "q5_1", "q5_k", "q4_k", "q3_k")
    return [
        pytest.param(kind, index, marks=[pytest.mark.slow] if kind in alike else []) for index, kind in enumerate(TYPES)
    ]


@pytest.mark.parametrize(("kind", "index"), offered())
def test_a_type_of_all_matrices_and_tables_runs_as_it_was_simulated(
    kind: str, index: int, teacher: Teacher, bench: Bench, tmp_path: Path
) -> None:
    options = Options(spec=bench.spec, budget=Budget(memory_bytes=10**9, context=64))
    assert all(kind in options.kinds(one) for one in (options.matrices | options.tables).values())
    assert len(options.caches) == 9
    pair = options.caches[index % 9]
    chosen = options.deployment(dict.fromkeys(options.matrices | options.tables, kind), pair)
    artifact, tensors = write_solution(bench, teacher, chosen, tmp_path)
    assert tensors == len(bench.spec.tensors)
    tokens = np.random.default_rng(index).integers(3, 300, (4, 32)).astype(np.int32)
    data = TokenSet(tokens=tokens, documents=np.zeros_like(tokens))
    shown = {one.name: chosen.storage(one) for one in bench.spec.tensors}
    with bench.shown(shown), quantized_cache(bench.model, pair):
        expected = Expected(tokens, *choices(bench.model, data))
    run = prove(load_exporter("gguf"), artifact.path, chosen, expected, 1, teacher.folder)
    assert run.agreement > 0.7
    assert run.excess == pytest.approx(0, abs=0.05)
