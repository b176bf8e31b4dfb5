"""A search with a file of another tool: the file is measured and wins as it is, and training begins with its codes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autodistill.errors import InputError
from autodistill.export.gguf import GgufExporter
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.tensors import Role
from autodistill.quantization.grids import Scales
from autodistill.quantization.learned_scales import write_scales
from autodistill.runs.events import RowTested
from autodistill.runs.run_folder import RunFolder
from autodistill.search.construction.construction import Construction
from autodistill.search.preview import plan_search
from autodistill.search.remake import remake
from autodistill.search.request.request import SearchRequest
from autodistill.search.request.validate import check_request
from autodistill.search.search import Outcome, search
from autodistill.search.solve.options import Options
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import Space
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import read_json

Q4_0 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
SIZES: dict[str, Any] = {"layers": 2, "width": 128, "heads": 2, "kv_heads": 1, "ffn": 256}


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    spec = spec_from_config(read_json(folder / "config.json"))
    weights = load_file(folder / "model.safetensors")
    return {tensor.name: weights[tensor.name] for tensor in spec.tensors if tensor.role is Role.LINEAR}


def made(folder: Path) -> None:
    """Write a teacher and a file. Its weights lie near the file's codes, which only use the middle of their range.

    No rule of the format finds such scales, because the rules assign the largest weight of a group to the last code.
    """
    teacher, other = save_tiny_teacher(folder / "teacher", seed=3, **SIZES), folder / "other"
    weights, scales = load_file(teacher / "model.safetensors"), {}
    dice = np.random.default_rng(0)
    for name, values in matrices(teacher).items():
        groups = values.numpy().reshape(len(values), -1, 32)
        step = (np.abs(groups).max(axis=-1) / 5).astype(np.float16).astype(np.float32)
        moved = step[..., None] * (np.rint(groups / step[..., None]) + dice.uniform(-0.03, 0.03, groups.shape))
        weights[name] = torch.from_numpy(moved.reshape(values.shape).astype(np.float32))
        scales[name] = Scales(step, None)
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(teacher, other)
    write_scales(other, Q4_0, scales)
    GgufExporter().export(other, Q4_0, folder / "made")


def request(folder: Path, **changes: Any) -> SearchRequest:
    options = Options(
        spec=spec_from_config(read_json(folder / "teacher" / "config.json")),
        budget=Budget(memory_bytes=10**9, context=64),
    )
    fields: dict[str, Any] = {
        "budget": Budget(memory_bytes=options.memory(Q4_0).total_bytes + 4096, context=64),
        "teacher": str(folder / "teacher"),
        "data": str(folder / "text"),
        "metric": "kl",
        "trials": 3,
        "tokens": 1024,
        "sequence_length": 64,
        "runner": "inline",
        "runs": folder / "runs",
        "name": "run",
        "cache": folder / "cache",
        "candidate": [folder / "made" / "student.gguf"],
    }
    return SearchRequest(**(fields | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """Run a search in which every training does harm."""
    folder = tmp_path_factory.mktemp("candidates")
    made(folder)
    tiny_text(folder / "text", documents=20, sentences=24)
    ruinous = Space({"distillation.learning_rate": {"choices": [0.5]}}, solved=True)
    (folder / "ruinous.yaml").write_text(ruinous.to_yaml())
    return search(request(folder, space=str(folder / "ruinous.yaml"))), folder


def test_a_better_file_wins_and_is_exported_as_it_is(
    run: tuple[Outcome, Path],
) -> None:
    outcome, folder = run
    best = outcome.finish.best
    assert (best.row_id, best.kind, best.name) == ("candidate-gguf-file", "initial", "student.gguf, untrained")
    assert best.feasible
    assert outcome.finish.checks["gguf"].agreement > 0.9
    assert outcome.finish.paths["gguf"].read_bytes() == (folder / "made" / "student.gguf").read_bytes()
    card = (folder / "runs" / "run" / "student" / "gguf" / "README.md").read_text()
    assert "as it was given, byte for byte" in card
    scored = [row.row_id for row in RunFolder(folder / "runs", "run").events.rows(RowTested)]
    assert scored == [row.row_id for row in outcome.finish.test]
    assert scored.count("candidate-gguf-file-test") == 1


def test_it_is_measured_like_what_is_solved_and_is_an_arm(
    run: tuple[Outcome, Path],
) -> None:
    outcome, folder = run
    asked = read_json(folder / "runs" / "run" / "search.json")
    path = str(folder / "made" / "student.gguf")
    assert asked["candidates"] == [path]
    (one,) = [one for one in map(Construction.from_json, asked["constructions"]) if one.candidate]
    assert (one.init.model, one.deployment, one.solved, one.own_codes) == (path, Q4_0, False, True)
    row = next(row for row in outcome.rows if row.trial == "candidate")
    assert row.strategy is not None
    assert (row.strategy.init, row.strategy.finishing) == (one.init, None)
    assert one.bytes == row.other.get("memory_bytes_predicted", row.memory_bytes)
    assert one.kl is not None
    assert one.kl == pytest.approx(row.figure("kl"), rel=0.5)
    rivals = [other for other in map(Construction.from_json, asked["constructions"]) if not other.candidate]
    assert all(other.kl is not None and one.kl < other.kl for other in rivals)
    assert next(iter(asked["space_definition"]["starts"])) == "candidate student.gguf"
    trained = [other for other in outcome.rows if other.kind == "student" and other.strategy]
    assert any(other.strategy and other.strategy.init == one.init for other in trained)


def test_a_run_goes_on_with_its_files_and_takes_no_others(run: tuple[Outcome, Path], tmp_path: Path) -> None:
    outcome, folder = run
    shutil.copytree(folder / "runs", tmp_path / "runs")
    again = request(
        folder, runs=tmp_path / "runs", resume=True, budget=None, candidate=None, space=str(folder / "ruinous.yaml")
    )
    assert {row.row_id for row in search(again).rows} == {row.row_id for row in outcome.rows}
    with pytest.raises(InputError, match="began with other candidates: leave --candidate out"):
        check_request(replace(again, candidate=[folder / "other.gguf"]))


def test_its_row_is_made_again_to_the_same_bits(run: tuple[Outcome, Path]) -> None:
    outcome, folder = run
    row = next(row for row in outcome.rows if row.trial == "candidate")
    made = remake(RunFolder(folder / "runs", "run"), row, folder / "cache")
    assert made.verdict == "identical"


def test_what_cannot_be_a_candidate_is_refused_in_a_line(run: tuple[Outcome, Path], tmp_path: Path) -> None:
    folder = run[1]
    file = folder / "made" / "student.gguf"

    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(InputError, match=words) as failure:
            plan_search(request(folder, name="other", **changes))
        assert "\n" not in str(failure.value)

    refused("none.gguf", candidate=[tmp_path / "none.gguf"])
    (tmp_path / "again").mkdir()
    shutil.copy(file, tmp_path / "again" / file.name)
    refused("two candidates are called student.gguf", candidate=[file, tmp_path / "again" / file.name])
    refused("nothing is solved in the space declared", candidate=[file], space="declared")
    (tmp_path / "half.gguf").write_bytes(file.read_bytes()[:-1000])
    refused("truncated or damaged", candidate=[tmp_path / "half.gguf"])
    other = save_tiny_teacher(tmp_path / "unlike", seed=4, **SIZES)
    refused("other weights", candidate=[GgufExporter().export(other, Q4_0, tmp_path / "unlike-made").path])
    narrow = save_tiny_teacher(tmp_path / "narrow", **SIZES | {"ffn": 192})
    refused("where the teacher has", candidate=[GgufExporter().export(narrow, Q4_0, tmp_path / "narrow-made").path])
    whole = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
    wide = GgufExporter().export(other, whole, tmp_path / "wide").path
    refused("other weights", candidate=[wide])


def test_a_file_that_the_space_does_not_have_is_not_trained(run: tuple[Outcome, Path], tmp_path: Path) -> None:
    five = Space({"finishing.bits": {"choices": [5]}}, solved=True)
    (tmp_path / "five.yaml").write_text(five.to_yaml())
    budget = Budget(memory_bytes=10**9, context=64)
    planned = plan_search(request(run[1], name="five", space=str(tmp_path / "five.yaml"), budget=budget))
    assert not any(Construction.from_json(one).candidate for one in planned["constructions"])


def test_a_file_that_does_not_fit_is_not_trained(run: tuple[Outcome, Path], tmp_path: Path) -> None:
    folder = run[1]
    eight = replace(Q4_0, format="gguf-q8_0", bits=8)
    large = GgufExporter().export(folder / "teacher", eight, tmp_path / "large").path
    planned = plan_search(request(folder, name="planned", candidate=[large]))
    found = [Construction.from_json(one) for one in planned["constructions"]]
    assert found
    assert not any(one.candidate for one in found)
