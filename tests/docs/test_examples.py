"""The examples of docs/examples run unchanged, with a tiny teacher in place of a real one."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import autodistill as ad
from autodistill import plugins
from autodistill.testing import save_tiny_teacher, tiny_text
from tests.search.conftest import untimed

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SPACE = """
dimensions:
  init.depth: {choices: [0.5, 0.75]}
deployments:
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
"""
SMALL = {"budget": "8GB", "teacher": "model", "data": "text", "space": "space.yaml"}
SMALL |= {"trials": 1, "tokens": 768, "runner": "inline", "cache": "cache"}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder with a teacher, a text and a space."""
    made, before = tmp_path_factory.mktemp("examples"), Path.cwd()
    save_tiny_teacher(made / "model", layers=4)
    tiny_text(made / "text", documents=30, sentences=24)
    (made / "space.yaml").write_text(SPACE)
    os.chdir(made)
    with untimed():
        yield made
    os.chdir(before)


def example(name: str) -> Any:
    """Return an example, imported from its file."""
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_example_is_listed_and_tested():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert files == {
        *("smallest_search.py", "pick_for_tiers.py", "solve_without_training.py", "evaluator.ipynb"),
        "route.py",  # tests/docs/test_route_example.py
        "federate.py",  # tests/federated/test_federated.py
    }
    assert all(f"]({name})" in listed for name in files)


@pytest.mark.slow
def test_the_smallest_search(capsys: pytest.CaptureFixture[str]):
    result = example("smallest_search").main(**SMALL, name="smallest")
    assert result.best.path.read_bytes()[:4] == b"GGUF"
    assert f"{result.best.id}: " in capsys.readouterr().out


def test_a_pick_for_each_of_three_gpus(capsys: pytest.CaptureFixture[str]):
    module = example("pick_for_tiers")
    found = module.main()
    assert set(found) == set(module.GPUS)
    assert all(pick.student.feasible for pick in found.values())
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_what_is_solved_within_two_budgets():
    solutions = example("solve_without_training").main(
        "model", ("23.7MB", "24MB"), data="text", tokens=256, sequence_length=64, cache="cache"
    )
    assert [solution.memory_bytes <= limit for solution, limit in zip(solutions, (23.7e6, 24e6), strict=True)] == [
        True,
        True,
    ]
    assert solutions[1].kl.value <= solutions[0].kl.value + solutions[0].kl.stderr


@pytest.mark.slow  # docs/python.md registers an evaluator too
def test_the_cells_of_the_notebook():
    pytest.importorskip("altair")
    book = json.loads((EXAMPLES / "evaluator.ipynb").read_text(encoding="utf-8"))
    assert all(cell.get("outputs", []) == [] for cell in book["cells"]), "it is kept without its outputs"
    names: dict[str, Any] = {}
    for number, cell in enumerate(one for one in book["cells"] if one["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), f"evaluator.ipynb, cell {number}", "exec"), names)
        if "OPTIONS" in names:
            names["OPTIONS"] = {**SMALL, "name": "notebook"}
    plugins.forget("evaluators", "worst_document")
    best = names["result"].best
    assert isinstance(names["result"], ad.SearchResult)
    assert best.metrics["worst_document"].value > 0
    assert "worst_document" in names["result"].to_dataframe()
