"""Reading students, and writing folders as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autodistill.errors import InputError
from autodistill.export.student_reader import StudentFiles, replacing
from autodistill.quantization.packing import deployed
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.testing import save_tiny_teacher

F16 = QuantizationScheme(format="gguf-f16", bits=16, group_size=0)


def test_specs_are_the_stored_tensors(tmp_path: Path) -> None:
    student = save_tiny_teacher(tmp_path, architecture="qwen2", tied=False, layers=2)
    stored = load_file(student / "model.safetensors")
    with StudentFiles(student, F16) as files:
        assert {name: spec.shape for name, spec in files.specs.items()} == {
            name: tuple(values.shape) for name, values in stored.items()
        }
        for name, values in stored.items():
            storage = "f16" if values.ndim == 2 else "f32"
            assert torch.equal(
                torch.from_numpy(files.deployed(name)), values.half().float() if values.ndim == 2 else values
            )
            np.testing.assert_array_equal(
                files.pack(name)["data"].astype(np.float32), deployed(values.numpy(), storage)
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("model.norm.weight"), r"lacks model\.norm\.weight"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight of \[3\] in place of \[64\]",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path, change: object, message: str) -> None:
    student = save_tiny_teacher(tmp_path, layers=1)
    weights = load_file(student / "model.safetensors")
    change(weights)  # type: ignore[operator]
    save_file(weights, student / "model.safetensors")
    with pytest.raises(InputError, match=message):
        StudentFiles(student, F16)


def test_unreadable_students_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        StudentFiles(tmp_path, F16)
    student = save_tiny_teacher(tmp_path / "student", layers=1)
    (student / "model.safetensors").write_bytes(b"\x07torn")
    with pytest.raises(InputError, match=r"model\.safetensors is truncated or damaged"):
        StudentFiles(student, F16)
    (student / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no model\.safetensors"):
        StudentFiles(student, F16)
    (student / "config.json").write_text(json.dumps([1]))
    with pytest.raises(InputError, match="JSON object"):
        StudentFiles(student, F16)


def replace(folder: Path, text: str, error: BaseException | None = None) -> None:
    with replacing(folder) as partial:
        (partial / "kept").write_text(text)
        if error is not None:
            raise error


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("old")
    with pytest.raises(RuntimeError):
        replace(tmp_path, "new", RuntimeError())
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"
    replace(tmp_path, "new")
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "new"


def test_an_error_names_the_output_and_not_the_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(InputError) as told, replacing(tmp_path) as partial:
        raise InputError(f"{partial / 'model.onnx'} is not read by the runtime")
    assert str(told.value) == f"{tmp_path / 'model.onnx'} is not read by the runtime"


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="choose another output folder"), replacing(tmp_path / "file"):
        pass


def test_what_two_interrupts_left_is_removed_by_the_next_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second Ctrl-C interrupts the removal that the first one has started."""

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as twice:
        twice.setattr("autodistill.export.student_reader.shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            replace(tmp_path, "half", KeyboardInterrupt())
    (partial,) = tmp_path.iterdir()
    assert partial.is_dir()
    with replacing(tmp_path) as other:
        assert not partial.exists()
        # Nobody touches a folder that is still being written.
        with replacing(tmp_path) as third:
            assert other.is_dir()
            (third / "b").write_text("3")
        (other / "a").write_text("2")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "2", "b": "3"}
