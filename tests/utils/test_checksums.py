"""Checksums of folders and safetensors files: every changed bit is found, and files without one are recognised."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autodistill.errors import DamagedError
from autodistill.utils.checksums import LIST, check_list, check_seal, seal, unsealed, write_list

# Distance between changed bits. It reaches every byte, and within eight bytes every bit position.
STEP = 7


def _flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ (1 << bit % 8)]) + data[bit // 8 + 1 :]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "student"
    (made / "sub").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "sub" / "weights").write_bytes(bytes(range(40)))
    return made


def test_a_list_has_the_hash_of_each_file_as_others_compute_it(folder: Path) -> None:
    write_list(folder)
    found = json.loads((folder / LIST).read_text())["files"]
    expected = hashlib.sha256(bytes(range(40))).hexdigest()
    assert found["sub/weights"] == {"bytes": 40, "sha256": expected}
    assert sorted(found) == ["config.json", "sub/weights"]


def test_a_bit_that_changes_anywhere_in_a_folder_is_seen(folder: Path) -> None:
    known = write_list(folder)
    assert check_list(folder)
    assert check_list(folder, known)
    for file in (folder / "config.json", folder / "sub" / "weights", folder / LIST):
        before = file.read_bytes()
        for bit in range(0, 8 * len(before), STEP):
            file.write_bytes(_flipped(before, bit))
            # Spaces and newlines in the list may change, because its meaning stays the same.
            try:
                check_list(folder, known)
            except DamagedError:
                continue
            assert file.name == LIST
            assert json.loads(file.read_bytes()) == json.loads(before)
        file.write_bytes(before)
    assert check_list(folder, known)


def test_a_file_that_is_missing_or_beside_those_written_is_named(folder: Path) -> None:
    write_list(folder)
    (folder / ".whole").write_text("which copy it is")
    assert check_list(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(DamagedError, match=r"adapter_config\.json is none of the files written"):
        check_list(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "config.json").unlink()
    with pytest.raises(DamagedError, match=r"config\.json is missing"):
        check_list(folder)


def test_a_folder_without_a_list_is_one_of_an_earlier_version_unless_a_list_is_known(folder: Path) -> None:
    assert not check_list(folder)
    with pytest.raises(DamagedError, match=LIST):
        check_list(folder, "0" * 64)


def test_another_folder_that_is_whole_is_not_the_one_that_is_known(folder: Path) -> None:
    known = write_list(folder)
    (folder / "config.json").write_text('{"other": 1}')
    write_list(folder)
    assert check_list(folder)
    with pytest.raises(DamagedError, match="is not what the run's log names"):
        check_list(folder, known)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.arange(4.0)}, path, metadata=unsealed({"tokens": "64"}))
    seal(path)
    return path


def test_a_bit_that_changes_anywhere_in_a_sealed_file_is_seen(sealed: Path) -> None:
    before = sealed.read_bytes()
    assert check_seal(sealed)
    assert torch.equal(load_file(sealed)["a"], torch.arange(4.0))
    for bit in range(0, 8 * len(before), STEP):
        sealed.write_bytes(_flipped(before, bit))
        with pytest.raises(DamagedError):
            check_seal(sealed)
    for size in range(len(before)):
        sealed.write_bytes(before[:size])
        with pytest.raises(DamagedError):
            check_seal(sealed)


def test_a_file_of_an_earlier_version_has_no_seal(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.arange(4.0)}, path, metadata={"tokens": "64"})
    assert not check_seal(path)
