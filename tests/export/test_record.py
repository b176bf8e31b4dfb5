"""The record of an export notices changes, and its proof is repeated from the folder alone."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autodistill.errors import DamagedError, InputError, VerificationError
from autodistill.export import proof
from autodistill.export.base import Expected, Ran
from autodistill.export.gguf import GgufExporter
from autodistill.export.graphs.onnx import OnnxExporter
from autodistill.export.graphs.torchscript import TorchScriptExporter
from autodistill.export.proof import load, simulate
from autodistill.export.record import FILE, Exported, forget, read_back, repeat, write
from autodistill.export.verify import prove, verify
from autodistill.runtimes.launch_files import SERVE_FILE, write_launch_files
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher

Q4_0 = Deployment(runtime="llama.cpp", format="gguf-q4_0", bits=4, group_size=32)
SEQUENCES = np.random.default_rng(0).integers(3, 300, (4, 40))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX folder with its record."""
    folder = tmp_path_factory.mktemp("exported")
    student, exporter = save_tiny_teacher(folder / "student", layers=2, seed=1), OnnxExporter()
    artifact = exporter.export(student, Q4_0, folder / "onnx")
    expected = simulate(student, Q4_0, SEQUENCES, 1)
    check = prove(exporter, artifact.path, Q4_0, expected, 1, student)
    weights = verify(exporter, artifact, student, Q4_0)
    known = Exported(
        row="t001-gguf-q4_0", deployment=Q4_0, weights=weights, expected=expected, check=check, text="some"
    )
    write(artifact.path, exporter, known)
    return artifact.path


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def test_it_has_row_hashes_versions_and_proof(exported: Path) -> None:
    record = json.loads((exported / FILE).read_text())
    assert (record["format"], record["row"], record["runtime"]) == ("onnx", "t001-gguf-q4_0", "ONNX Runtime")
    assert (record["accuracy_level of 4-bit codes"], record["accuracy_level of 8-bit codes"]) == (1, 4)
    assert set(record["files"]) == {one.name for one in exported.iterdir()} - {FILE}
    for name, entry in record["files"].items():
        data = (exported / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert {"python", "autodistill-search", "torch", "onnx", "onnxruntime"} <= set(record["versions"])
    proof = record["proof"]
    assert (proof["agreement"], proof["same_written"], proof["text_read"]) == (1.0, 64, "some")
    assert abs(proof["excess"]) < 1e-3  # the table has 8 bits, and its products round activations
    assert record["weights"]["tensors"] == 20


def test_types_by_tensor_and_of_the_cache_are_those_that_were_exported(tmp_path: Path) -> None:
    types = {"types": {"embeddings": "q5_1", "layers.1.mlp": "q8_0"}, "cache_type_k": "q8_0", "cache_type_v": "q4_0"}
    typed = Deployment.from_json(Q4_0.to_json() | types)
    (tmp_path / "student.gguf").write_text("weights")
    write(tmp_path, GgufExporter(), Exported(row="t001", deployment=typed, artifact="student.gguf"))
    record = repeat(tmp_path, 1).record
    assert record["deployment"] == typed.to_json()
    assert Deployment.from_json(record["deployment"]) == typed != Q4_0


def test_the_proof_is_repeated_from_the_folder_alone(folder: Path) -> None:
    found = repeat(folder, 1)
    assert found.check is not None
    assert (found.check.agreement, found.check.same_written) == (1.0, 64)


def test_it_is_read_back_where_the_same_would_be_written_again_and_nothing_has_changed(folder: Path) -> None:
    exporter, written = OnnxExporter(), json.loads((folder / FILE).read_text())
    known = read_back(folder, exporter, Q4_0)
    assert known is not None
    assert (known.row, known.text, known.artifact) == ("t001-gguf-q4_0", "some", "")
    assert known.check is not None
    assert (known.check.agreement, known.check.same_written) == (1.0, 64)
    assert known.expected is not None
    assert np.array_equal(known.expected.top1, load(folder).top1)
    assert read_back(folder, TorchScriptExporter(), Q4_0) is None
    assert read_back(folder, exporter, dataclasses.replace(Q4_0, cache_type_k="q8_0")) is None
    changes: list[dict[str, Any]] = [
        {"version": 1},
        {"versions": written["versions"] | {"torch": "1.0"}},
        {"artifact": "../elsewhere"},
        {"proof": written["proof"] | {"agreement": "all"}},
        {"proof": {"agreement": 1.0}},
        {"files": {name: entry for name, entry in written["files"].items() if name != "model.onnx"}},
        {"files": None},
    ]
    for change in changes:
        (folder / FILE).write_text(json.dumps(written | change))
        assert read_back(folder, exporter, Q4_0) is None, change
    (folder / FILE).write_text(json.dumps(written))
    (folder / "model.onnx").write_bytes(b"another one")
    assert read_back(folder, exporter, Q4_0) is None
    forget(folder)
    assert not (folder / FILE).exists()
    assert not (folder / proof.FILE).exists()
    assert read_back(folder, exporter, Q4_0) is None


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json", "proof.npz"])
def test_an_altered_byte_of_any_file_is_noticed(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DamagedError, match=rf"{name} has changed since it was written"):
        repeat(folder, 1)


def test_a_missing_file_and_a_new_one_are_named(folder: Path) -> None:
    (folder / "more.bin").write_text("more")
    with pytest.raises(DamagedError, match=r"more\.bin is none of the files written"):
        repeat(folder, 1)
    (folder / "more.bin").unlink()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DamagedError, match=r"tokenizer\.json is missing"):
        repeat(folder, 1)


def test_weights_that_were_altered_with_their_hash_fail_the_proof(folder: Path) -> None:
    data = np.fromfile(folder / "model.onnx.data", np.uint8)
    data[:4096] = data[:4096][::-1]  # part of the embedding table
    data.tofile(folder / "model.onnx.data")
    record = json.loads((folder / FILE).read_text())
    record["files"]["model.onnx.data"]["sha256"] = hashlib.sha256(data.tobytes()).hexdigest()
    (folder / FILE).write_text(json.dumps(record))
    with pytest.raises(VerificationError, match=r"places in ONNX Runtime"):
        repeat(folder, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 1}, "is of version 1"),
        ({"format": "onion"}, "there is no exporter 'onion'"),
        ({"files": ["README.md"]}, r"export\.json\.files must be a mapping"),
        ({"row": 7}, r"export\.json\.row must be"),
        ({"deployment": {}}, "deployment"),
        ({"artifact": "../other"}, "not one of its files"),
    ],
)
def test_a_record_that_is_none_is_refused(folder: Path, change: dict[str, object], said: str) -> None:
    (folder / FILE).write_text(json.dumps(json.loads((folder / FILE).read_text()) | change))
    with pytest.raises(InputError, match=said):
        repeat(folder, 1)


def test_a_record_without_a_row_is_refused(folder: Path) -> None:
    record = json.loads((folder / FILE).read_text())
    del record["row"]
    (folder / FILE).write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"export\.json lacks row"):
        repeat(folder, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sequences": SEQUENCES[:, :1].astype(np.int32)}, "sequences of the shape"),
        ({"top1": SEQUENCES[:1].astype(np.int32)}, "top1 is int32 of the shape"),
        ({"nll": np.full((4, 39), np.nan, np.float32)}, "nll has values that are not valid"),
        ({"sequences": -1 - SEQUENCES.astype(np.int32)}, "sequences has values that are not valid"),
        ({"written": np.array(["a"])}, "written is <U1"),
        ({"nll": np.zeros(3, np.float32)}, "nll is float32 of the shape"),
    ],
)
def test_a_proof_that_is_none_is_refused(exported: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with np.load(exported / "proof.npz") as file:
        np.savez_compressed(tmp_path / "proof.npz", **(dict(file) | change))
    with pytest.raises(VerificationError, match=rf"proof\.npz cannot be read: .*{said}"):
        load(tmp_path)


def test_a_proof_with_flipped_bits_is_refused(exported: Path, tmp_path: Path) -> None:
    data = bytearray((exported / "proof.npz").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "proof.npz").write_bytes(data)
    with pytest.raises(VerificationError, match=r"proof\.npz cannot be read"):
        load(tmp_path)


def test_a_proof_that_unpacks_to_very_much_is_refused(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proof, "_MOST_BYTES", 1_000)
    with pytest.raises(VerificationError, match=r"proof\.npz cannot be read: it holds more than 1"):
        load(exported)


def test_a_library_for_another_machine_is_not_run(folder: Path) -> None:
    record = json.loads((folder / FILE).read_text())
    other = {"format": "aoti", "compiled_for": "Linux on riscv64 CPUs with DEFAULT, by torch 2.9"}
    (folder / FILE).write_text(json.dumps(record | other))
    found = repeat(folder, 1, run_code=True)
    assert found.check is None
    assert found.why_not.startswith("it is for Linux on riscv64 CPUs with DEFAULT, by torch 2.9; here is ")
    assert "--run-code" in repeat(folder, 1).why_not


def test_a_folder_without_a_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no export\.json: name a folder that autodistill export wrote"):
        repeat(tmp_path, 1)
    for inner in ("student/gguf", "onnx"):
        (tmp_path / inner).mkdir(parents=True)
        (tmp_path / inner / FILE).write_text("{}")
    with pytest.raises(InputError, match=r"name one of the exports in it, .*/onnx, .*/student/gguf"):
        repeat(tmp_path, 1)
    with pytest.raises(InputError, match=r"there is no folder .*/gone: name one"):
        repeat(tmp_path / "gone", 1)


def test_files_that_are_code_are_not_run_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "student.pt").write_bytes(b"anything")
    expected = Expected(SEQUENCES, SEQUENCES[:, 1:], *[SEQUENCES[:, 1:].astype(np.float32)] * 2)
    exporter = TorchScriptExporter()
    monkeypatch.setattr(TorchScriptExporter, "run", lambda self, *given: Ran(SEQUENCES[:, 1:], None, "text"))
    check = prove(exporter, tmp_path, Q4_0, expected, 1, tmp_path)
    write(tmp_path, exporter, Exported(row="r", deployment=Q4_0, expected=expected, check=check))
    found = repeat(tmp_path, 1)
    assert found.check is None
    assert "files are code: if you trust where it comes from, give --run-code" in found.why_not
    assert repeat(tmp_path, 1, run_code=True).check is not None


def test_what_was_never_proven_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"anything")
    write(tmp_path, OnnxExporter(), Exported(row="r", deployment=Q4_0))
    assert repeat(tmp_path, 1).why_not == "it was exported without a proof"


def test_what_is_expected_is_read_as_it_was_written(exported: Path, tmp_path: Path) -> None:
    expected = load(exported)
    np.testing.assert_array_equal(expected.sequences, SEQUENCES)
    assert expected.nll.shape == (4, 39)
    assert len(expected.written) == 64
    with pytest.raises(VerificationError, match=r"proof\.npz cannot be read"):
        load(tmp_path)


def test_what_lies_beside_an_export_is_there_whole_or_not_at_all(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.write_text

    def half(path: Path, *given: Any, **more: Any) -> int:
        if SERVE_FILE.partition(".")[0] in path.name:
            return whole(path, *given, **more)
        path.write_bytes(b"PK")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = load(exported)
    monkeypatch.setattr(np, "savez_compressed", half)
    with pytest.raises(OSError, match="No space"):
        proof.save(expected, tmp_path)
    monkeypatch.setattr(Path, "write_text", half)
    deployment = Deployment(runtime="llama.cpp", format="gguf-q8_0", bits=8, group_size=32)
    with pytest.raises(OSError, match="No space"):
        write_launch_files(tmp_path / "student.gguf", deployment, 64, 1)
    assert [path.name for path in tmp_path.iterdir()] == [SERVE_FILE]
