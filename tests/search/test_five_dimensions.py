"""A search of exactly the five dimensions that the founding guide names: each of them varies."""

from __future__ import annotations

import pytest

from autodistill.quantization.formats import TYPES
from autodistill.quantization.grids import Grid
from autodistill.runs.run_folder import RunFolder
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.testing import save_tiny_teacher, tiny_text
from tests.search.small_search import middle_budget

SPACE = """
name: five
solved: true
dimensions:
  distillation.temperature.shape: {choices: [constant, linear, cosine, exponential]}
  distillation.alignment: {choices: {none: null, last: {layers: last, count: 1}, even-2: {layers: even, count: 2}}}
  distillation.alignment.projection: {choices: [none, linear], when: {distillation.alignment: [last, even-2]}}
  finishing.bits: {choices: [3, 4, 5, 6]}
  finishing.group_size: {choices: [16, 32]}
deployments:
  - solved
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
"""
TRIALS = 10
# Each of the dimensions has its own tests, and so has the solver in a search.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("five")
    save_tiny_teacher(folder / "teacher", layers=3, width=256, ffn=512)
    tiny_text(folder / "text", documents=20, sentences=24)
    (folder / "five.yaml").write_text(SPACE)
    search(
        SearchRequest(
            budget=middle_budget(folder / "teacher", 64),
            space=str(folder / "five.yaml"),
            teacher=str(folder / "teacher"),
            data=str(folder / "text"),
            trials=TRIALS,
            tokens=1024,
            sequence_length=64,
            runner="inline",
            runs=folder / "runs",
            name="run",
            cache=folder / "cache",
        )
    )
    return RunFolder.open(folder / "runs", "run")


def test_the_race_draws_temperature_alignment_and_projection(run: RunFolder) -> None:
    rows = [row for row in run.events.rows(split="validation") if row.kind == "student" and row.strategy]
    recipes = [row.strategy.distillation for row in rows]
    assert len({recipe.temperature.shape for recipe in recipes}) > 1
    assert len({recipe.alignment and recipe.alignment.layers for recipe in recipes}) > 1
    assert len({recipe.alignment.projection for recipe in recipes if recipe.alignment}) > 1


def test_the_solver_answers_bits_and_groups(run: RunFolder) -> None:
    deployments = [row.deployment for row in run.events.rows(split="validation") if row.deployment]
    kinds = {kind for one in deployments for tensor, kind in one.types if tensor != "embeddings"}
    grids = {(one.bits, one.group_size) for one in deployments if one.bits < 16}
    grids |= {(grid.bits, grid.group_size) for kind in kinds if isinstance(grid := TYPES[kind], Grid)}
    bits, sizes = ({grid[place] for grid in grids} for place in (0, 1))
    assert len(bits) > 1
    assert bits <= {3, 4, 5, 6}
    assert sizes == {16, 32}
