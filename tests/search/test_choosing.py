"""What is exported where training does harm, or where nothing need be trained: the best row, whatever its kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from gguf import GGUFReader

from autodistill.errors import InputError
from autodistill.records.choice import chosen
from autodistill.records.json_files import read_json
from autodistill.records.row import Row, rows_of
from autodistill.records.store import RunFolder
from autodistill.search.checked import check_request
from autodistill.search.explain import explain
from autodistill.search.export_run import export_run
from autodistill.search.request import SearchRequest
from autodistill.search.search import Outcome, search
from autodistill.summary import leaderboard_of, search_summary
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.units import Budget

GGUF = {"runtime": "llama.cpp", "format": "gguf-q8_0", "bits": 8, "group_size": 32}
FOLDER = {"runtime": "transformers", "format": "huggingface", "bits": 16, "group_size": 0}
VLLM = {"runtime": "vllm", "format": "compressed-tensors", "bits": 8, "group_size": 32}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_teacher(folder / "teacher", layers=4, width=64)
    tiny_text(folder / "text", documents=30, sentences=24)
    return folder


def space(folder: Path, depth: float, rate: float, deployments: list[dict[str, Any]], name: str = "space") -> str:
    """A space of one dimension, all of whose students train at one rate."""
    path = folder / f"{name}.yaml"
    strategy = {"init": {"depth": depth}, "distillation": {"learning_rate": rate}}
    (folder / f"{name}-baseline.yaml").write_text(yaml.safe_dump(strategy))
    dimensions = {"init.depth": {"choices": [depth]}, "distillation.learning_rate": {"choices": [rate, 0.9 * rate]}}
    path.write_text(yaml.safe_dump({"name": name, "dimensions": dimensions, "deployments": deployments}))
    return str(path)


def request(inputs: Path, out: Path, **changes: object) -> SearchRequest:
    fields: dict[str, object] = {
        "budget": Budget(memory_bytes=16 * 10**9, context=256),
        "teacher": str(inputs / "teacher"),
        "data": str(inputs / "text"),
        "trials": 2,
        "tokens": 2304,
        "runner": "inline",
        "out": out,
        "name": "run",
        "cache": inputs / "cache",
    }
    return SearchRequest(**(fields | changes))  # type: ignore[arg-type]


def harmful(inputs: Path, folder: Path, **changes: object) -> SearchRequest:
    """Of whole teachers and of cut ones, trained at a rate that ruins them."""
    whole = space(folder, 1.0, 0.9, [GGUF, FOLDER])
    return request(inputs, folder / "runs", space=whole, **changes)


@pytest.fixture(scope="module")
def ruined(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, RunFolder]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ruined")
    return search(harmful(inputs, folder)), RunFolder(folder / "runs", "run")


def text_of(outcome: Outcome, run: RunFolder) -> str:
    ranked, metric = leaderboard_of(run)
    return search_summary(outcome.document, ranked, metric)


def test_p(ruined):
    outcome, run = ruined
    print(text_of(outcome, run))
    print((run.path / "report.md").read_text())
    print((run.student("gguf") / "README.md").read_text())
    print(explain(run).describe())
    assert 0
