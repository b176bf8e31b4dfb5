"""A teacher or a candidate that is a GGUF file is a row as it is, whatever its types, and its export is a copy."""

from __future__ import annotations

import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from autodistill.distillation.teacher.given_file import as_given, codes_of
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.errors import DamagedError, InputError, VerificationError
from autodistill.estimates.serving_memory import memory
from autodistill.estimates.speed import work
from autodistill.export.base import Artifact
from autodistill.export.gguf import GgufExporter
from autodistill.export.verify import verify
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.gguf_reader import read_gguf
from autodistill.models.gguf_to_transformers import ORIGINAL
from autodistill.models.spec import ModelSpec
from autodistill.quantization.formats import FORMATS, all_formats, weights_bytes
from autodistill.quantization.grids import Grid
from autodistill.report.storage_chart import bytes_by_block
from autodistill.runs.results.gains import named
from autodistill.runs.results.leaderboard import rank
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder
from autodistill.search.finish.export_run import export_run
from autodistill.search.remake import remake
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import Outcome, search
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Finishing
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.json_files import read_json

SIZES: dict[str, Any] = {"layers": 2, "width": 256, "heads": 4, "kv_heads": 2, "ffn": 256}


def packed(name: str) -> Deployment:
    (grid,) = FORMATS[name].linears
    bits, group, symmetric = (grid.bits, grid.group_size, grid.symmetric) if isinstance(grid, Grid) else (16, 0, True)
    return Deployment(runtime="llama.cpp", format=name, bits=bits, group_size=group, symmetric=symmetric)


def with_i_quants(path: Path) -> Path:
    """Turn the MXFP4 matrices of a file into IQ4_XS, a type that is not written here. Both have 4.25 bits a weight."""
    data, dice = bytearray(path.read_bytes()), np.random.default_rng(0)
    for tensor in read_gguf(path).tensors:
        if tensor.type != gguf.GGMLQuantizationType.MXFP4:
            continue
        name = tensor.name.encode()
        place = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 8 * len(tensor.shape)
        data[place : place + 4] = struct.pack("<I", int(gguf.GGMLQuantizationType.IQ4_XS))
        blocks = dice.integers(0, 256, (tensor.size // 136, 136)).astype(np.uint8)
        blocks[:, :2] = np.full((len(blocks), 1), 5e-5, np.float16).view(np.uint8)  # the scale of the block
        data[tensor.offset : tensor.offset + tensor.size] = blocks.tobytes()
    path.write_bytes(data)
    return path


def made(folder: Path, name: str, **teacher: Any) -> Path:
    """Write a tiny model to a GGUF file, in a format or ("iq4_xs") in a type that is not written here."""
    source = save_tiny_teacher(folder / "source", **SIZES | teacher)
    form = "gguf-mxfp4" if name == "iq4_xs" else name
    path = GgufExporter().export(source, packed(form), folder / "made").path
    return (with_i_quants(path) if name == "iq4_xs" else path).rename(folder / "own.gguf")


def opened(path: Path, cache: Path) -> tuple[Any, ModelSpec]:
    model = materialize(resolve_teacher(str(path)), cache)
    return model, spec_from_config(read_json(model.folder / "config.json"))


def request(folder: Path, **changes: Any) -> SearchRequest:
    ruinous = Space({"distillation.learning_rate": {"choices": [0.5]}}, solved=True)
    (folder / "ruinous.yaml").write_text(ruinous.to_yaml())
    fields: dict[str, Any] = {
        "budget": Budget(memory_bytes=10**9, context=64),
        "teacher": str(folder / "own.gguf"),
        "data": str(folder / "text"),
        "space": str(folder / "ruinous.yaml"),
        "metric": "kl",
        "trials": 1,
        "tokens": 1024,
        "sequence_length": 64,
        "runner": "inline",
        "runs": folder / "runs",
        "name": "run",
        "cache": folder / "cache",
    }
    return SearchRequest(**(fields | changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """Run a search whose teacher is a file of I-quants, with the same model in 16 bits as candidate.

    Every training does harm.
    """
    folder = tmp_path_factory.mktemp("own-file")
    own = made(folder, "iq4_xs")
    tiny_text(folder / "text", documents=20, sentences=24)
    model, _ = opened(own, folder / "cache")
    wide = GgufExporter().export(model.folder, packed("gguf-f16"), folder / "wide").path.rename(folder / "wide.gguf")
    return search(request(folder, candidate=[wide])), folder


def row_of(outcome: Outcome, trial: str) -> Row:
    (row,) = [one for one in outcome.rows if one.trial == trial and one.deployment.file]
    return row


@pytest.mark.parametrize(
    ("name", "teacher"),
    [
        ("gguf-q4_k_m", {}),
        ("iq4_xs", {}),
        ("gguf-q4_0", {"architecture": "gemma3_text"}),
        ("gguf-bf16", {"tied": False}),
    ],
)
def test_the_deployment_has_the_bytes_of_the_file_and_its_export_is_a_copy(
    tmp_path: Path, name: str, teacher: dict[str, Any]
) -> None:
    path = made(tmp_path, name, **teacher)
    model, spec = opened(path, tmp_path / "cache")
    given = path.read_bytes()
    path.unlink()  # its user may move it
    budget = Budget(memory_bytes=10**9, context=256)
    found = as_given(model, spec, budget)
    assert found is not None
    assert found.file is not None
    assert (found.name, found.cache_types) == ("gguf-file", ("f16", "f16"))
    assert Deployment.from_json(found.to_json()) == found
    tensors = read_gguf(model.folder / ORIGINAL).tensors
    assert weights_bytes(spec.tensors, found) == found.file.bytes == sum(tensor.size for tensor in tensors)
    if name != "iq4_xs":
        own = packed(name)
        assert found.file.bytes == weights_bytes(spec.tensors, own)
        for on_gpu in (False, True):
            load: dict[str, Any] = {"context": 256, "batch": 1, "on_gpu": on_gpu}
            assert memory(spec, found, **load) == memory(spec, own, **load)
        passed: dict[str, Any] = {"tokens": 1, "sequences": 1, "behind": 64}
        assert work(spec, found, **passed).bytes == pytest.approx(work(spec, own, **passed).bytes, rel=0.15)
    assert codes_of(model.folder, spec) == (packed(name) if "gguf-q4" in name else None)
    artifact = GgufExporter().export(model.folder, found, tmp_path / "out")
    assert artifact.path.read_bytes() == given
    proven = verify(GgufExporter(), artifact, model.folder, found)
    assert proven.tensors == len(tensors)
    assert proven.weights == spec.parameters
    artifact.path.write_bytes(given[:-1] + bytes([given[-1] ^ 1]))
    with pytest.raises(VerificationError, match="is not a copy of the file that was evaluated"):
        verify(GgufExporter(), Artifact(path=artifact.path, size_bytes=0), model.folder, found)


def test_an_8_bit_cache_is_taken_only_where_the_file_fits_with_it_alone(tmp_path: Path) -> None:
    model, spec = opened(made(tmp_path, "gguf-q4_0"), tmp_path / "cache")
    wide = as_given(model, spec, Budget(memory_bytes=10**9, context=256))
    assert wide is not None
    need = memory(spec, wide, context=256, batch=1).total_bytes

    def name(memory_bytes: int, cache_type: str | None = None) -> str:
        found = as_given(model, spec, Budget(memory_bytes=memory_bytes, context=256), cache_type)
        assert found is not None
        return found.name

    assert name(need) == "gguf-file"
    assert name(need - 1) == "gguf-file+kv-q8_0"
    assert name(need // 2) == "gguf-file"
    assert name(10**9, "q4_0") == "gguf-file+kv-q4_0"
    assert as_given(replace(model, original=None), spec, Budget(memory_bytes=10**9)) is None


def test_a_copy_that_was_altered_is_refused_in_a_line_and_mended_by_the_file(tmp_path: Path) -> None:
    path = made(tmp_path, "gguf-q4_0")
    model, spec = opened(path, tmp_path / "cache")
    found = as_given(model, spec, Budget(memory_bytes=10**9))
    assert found is not None
    original, given = model.folder / ORIGINAL, path.read_bytes()
    original.unlink()
    with pytest.raises(DamagedError, match=r"original\.gguf is missing"):
        GgufExporter().export(model.folder, found, tmp_path / "out")
    original.write_bytes(given[:-1] + b"x")
    with pytest.raises(DamagedError, match=r"original\.gguf was changed since it was evaluated") as failure:
        GgufExporter().export(model.folder, found, tmp_path / "out")
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "out").exists()
    opened(path, tmp_path / "cache")
    assert original.read_bytes() == given


def test_nobody_can_name_it(tmp_path: Path) -> None:
    assert "gguf-file" not in all_formats()
    with pytest.raises(InputError, match="cannot be chosen"):
        Deployment(runtime="llama.cpp", format="gguf-file", bits=4, group_size=0)
    with pytest.raises(InputError, match="finishing trains on a quantised grid"):
        Finishing(format="gguf-file", bits=4, group_size=0)
    model, spec = opened(made(tmp_path, "gguf-q4_0"), tmp_path / "cache")
    found = as_given(model, spec, Budget(memory_bytes=10**9))
    assert found is not None
    with pytest.raises(InputError, match="a space cannot name a file"):
        Space({"distillation.learning_rate": {"choices": [0.5]}}, deployments=[found.to_json()])


def test_the_teachers_file_is_a_row_and_what_is_exported_if_nothing_is_better(run: tuple[Outcome, Path]) -> None:
    outcome, folder = run
    row, given = row_of(outcome, "teacher"), (folder / "own.gguf").read_bytes()
    assert (row.row_id, row.kind, row.feasible, row.figure("agreement")) == ("teacher-gguf-file", "teacher", True, 1.0)
    assert row.figure("kl") == 0.0
    assert outcome.finish.best.row_id == row.row_id
    assert outcome.finish.paths["gguf"].read_bytes() == given
    assert outcome.finish.checks["gguf"].agreement > 0.9
    assert outcome.finish.gains.describe().startswith(
        "No trained student is better than the teacher's own file, which is exported as it is."
    )
    plan = read_json(folder / "runs" / "run" / "search.json")
    assert any("are ranked beside the students, as teacher-gguf-file" in note for note in plan["plan"]["notes"])
    card = (folder / "runs" / "run" / "student" / "gguf" / "README.md").read_text()
    assert "as it was given, byte for byte" in card
    assert {bar["type"] for bar in bytes_by_block(row)} == {"iq4_xs", "q8_0", "f32"}
    assert (folder / "runs" / "run" / "report.md").is_file()


def test_a_candidate_in_types_that_are_not_written_is_a_row_and_is_not_trained(run: tuple[Outcome, Path]) -> None:
    outcome, folder = run
    row = row_of(outcome, "candidate")
    assert (row.row_id, row.kind, row.name) == ("candidate-gguf-file", "initial", "wide.gguf, untrained")
    assert row.feasible
    assert named(row) == "the file wide.gguf"
    assert not any(one.strategy and one.strategy.init == row.strategy.init for one in outcome.rows if one != row)
    assert not any(
        one["init"]["source"] == "pretrained" for one in read_json(folder / "runs/run/search.json")["constructions"]
    )


def test_its_row_is_made_again_and_a_run_goes_on_with_it(run: tuple[Outcome, Path], tmp_path: Path) -> None:
    outcome, folder = run
    for trial in ("teacher", "candidate"):
        made_again = remake(RunFolder(folder / "runs", "run"), row_of(outcome, trial), folder / "cache")
        assert made_again.verdict == "identical"
    shutil.copytree(folder / "runs", tmp_path / "runs")
    again = request(folder, runs=tmp_path / "runs", resume=True, budget=None)
    assert {row.row_id for row in search(again).rows} == {row.row_id for row in outcome.rows}


def test_both_files_are_exported_after_their_users_moved_them(
    run: tuple[Outcome, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run[1]
    monkeypatch.setattr("autodistill.search.finish.export_run.cache_folder", lambda: folder / "cache")
    stored = RunFolder(folder / "runs", "run")
    for name, row in (("own.gguf", "teacher-gguf-file"), ("wide.gguf", "candidate-gguf-file")):
        given = (folder / name).read_bytes()
        (folder / name).rename(folder / "moved")
        try:
            paths = export_run(stored, row, ["gguf"], tmp_path / row)
            with pytest.raises(InputError, match="it is a file as it was given"):
                export_run(stored, row, ["onnx"], tmp_path / row)
        finally:
            (folder / "moved").rename(folder / name)
        assert paths["gguf"].read_bytes() == given


def test_a_file_that_does_not_fit_is_a_row_that_says_so(run: tuple[Outcome, Path]) -> None:
    outcome, folder = run
    row = row_of(outcome, "candidate")
    tight = Budget(memory_bytes=int(row.other.get("memory_bytes_predicted", row.memory_bytes)) - 1, context=64)
    again = search(request(folder, name="tight", budget=tight, kv_type="f16", candidate=[folder / "wide.gguf"]))
    left_out = row_of(again, "candidate")
    assert not left_out.feasible
    assert "over the budget" in (left_out.reason or "")
    assert again.finish.best.row_id == "teacher-gguf-file"


def test_a_candidate_of_i_quants_is_exported_as_it_is_if_nothing_is_better(
    run: tuple[Outcome, Path], tmp_path: Path
) -> None:
    folder = run[1]
    model, _ = opened(folder / "own.gguf", folder / "cache")
    shutil.copytree(model.folder, tmp_path / "teacher", ignore=lambda *_: {ORIGINAL, "teacher.json"})
    found = search(request(folder, name="named", teacher=str(tmp_path / "teacher"), candidate=[folder / "own.gguf"]))
    assert found.finish.best.row_id == "candidate-gguf-file"
    assert found.finish.paths["gguf"].read_bytes() == (folder / "own.gguf").read_bytes()
    assert found.finish.gains.describe().startswith(
        "No trained student is better than the file own.gguf, which is exported as it is."
    )


def test_of_equal_rows_the_file_comes_first(run: tuple[Outcome, Path]) -> None:
    row = row_of(run[0], "teacher")
    packed_alike = replace(row, row_id="a", deployment=packed("gguf-q4_0"))
    assert [one.row.row_id for one in rank([packed_alike, row], "kl", "min")] == [row.row_id, "a"]


def test_a_file_of_a_family_that_is_trained_whole_is_still_no_teacher(tmp_path: Path) -> None:
    source = save_tiny_teacher(tmp_path / "whole", architecture="qwen3_5_text", layers=4)
    path = GgufExporter().export(source, packed("gguf-q8_0"), tmp_path / "made").path
    with pytest.raises(InputError, match="holds the architecture qwen35"):
        resolve_teacher(os.fspath(path))
