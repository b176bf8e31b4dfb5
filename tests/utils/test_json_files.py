"""JSON files are replaced as a whole or not at all, and the message about a damaged one names it."""

import contextlib
import os
import socket
from pathlib import Path

import pytest

from autodistill.errors import InputError
from autodistill.utils.json_files import read_json, replacing, write_json


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "search.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with contextlib.suppress(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["search.json"]


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_broken_json_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "search.json").write_text(text)
    with pytest.raises(InputError, match=r"search\.json"):
        read_json(tmp_path / "search.json")


@pytest.mark.parametrize("path", ["/", "."])
def test_a_folder_is_no_place_of_a_file(path: str) -> None:
    with pytest.raises(InputError, match="is a folder: name a file in it"), replacing(Path(path)):
        pass


@pytest.mark.parametrize("place", ["pipe", "link", "socket"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, place: str) -> None:
    """A superuser's rename would replace a device, such as /dev/full."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.path.relpath(tmp_path / "socket"))
    path = tmp_path / place
    before = path.lstat()
    with pytest.raises(InputError, match="is not replaced: name a file"):
        write_json(path, {})
    assert path.lstat() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["link", "pipe", "socket"]
