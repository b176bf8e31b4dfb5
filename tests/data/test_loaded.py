"""Data sets in memory are saved once, and are read like the same records in a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from autodistill.data.documents import resolve_data
from autodistill.data.loaded import data_reference
from autodistill.errors import InputError

TEXTS = [{"text": f"Text {number}: Grüße.", "id": number, "image": b"\x00"} for number in range(4)]
CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}], "score": 0.5}
    for n in range(4)
]
PAIRS = [{"question": f"{n}?", "answer": f"{n}!", "input": "About it."} for n in range(4)]


@pytest.mark.parametrize("records", [TEXTS, CHATS, PAIRS])
def test_it_reads_as_the_same_records_in_a_file(records: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    kept = [{name: value for name, value in record.items() if name != "image"} for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    expected = resolve_data(str(path))
    found = resolve_data(data_reference(datasets.Dataset.from_list(records), tmp_path / "cache"))
    assert (found.documents, found.fingerprint) == (expected.documents, expected.fingerprint)
    assert found.name == "dataset"


def test_the_same_content_is_saved_once_whatever_its_tables(tmp_path: Path) -> None:
    whole = datasets.Dataset.from_list(TEXTS)
    first = data_reference(whole, tmp_path)
    written = Path(first).stat().st_mtime_ns
    again = datasets.concatenate_datasets([whole.select([0, 1]), whole.select([2, 3])]).with_format("numpy")
    assert data_reference(again, tmp_path) == first
    assert data_reference(whole.remove_columns("image"), tmp_path) == first
    assert Path(first).stat().st_mtime_ns == written
    assert data_reference(whole.select([1, 0, 2, 3]), tmp_path) != first


def test_what_was_changed_on_disk_is_saved_anew(tmp_path: Path) -> None:
    path = Path(data_reference(datasets.Dataset.from_list(TEXTS), tmp_path))
    before = path.read_bytes()
    path.write_bytes(before.replace(b"Text 1", b"Text 9"))
    assert data_reference(datasets.Dataset.from_list(TEXTS), tmp_path) == str(path)
    assert path.read_bytes() == before


def test_a_reference_stays_as_it_is(tmp_path: Path) -> None:
    assert data_reference("pydoc", tmp_path) == "pydoc"
    assert data_reference(tmp_path / "text", tmp_path) == str(tmp_path / "text")
    assert not (tmp_path / "objects").exists()


FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "splits": (lambda: datasets.DatasetDict(train=datasets.Dataset.from_list(TEXTS)), "of the splits train: give one"),
    "streaming": (lambda: datasets.Dataset.from_list(TEXTS).to_iterable_dataset(), "streaming data set"),
    "list": (lambda: TEXTS, "data is of type list: give a reference, or a datasets.Dataset"),
    "columns": (lambda: datasets.Dataset.from_list([{"body": "a", "id": 1}]), "its columns are body, id; rename one"),
    "half a pair": (lambda: datasets.Dataset.from_list([{"question": "a?"}]), "its columns are question"),
    "rows": (lambda: datasets.Dataset.from_dict({"text": []}), "the data set has no row"),
    "bytes": (lambda: datasets.Dataset.from_list([{"text": b"a"}]), "row 1 of the data set is no plain text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_refused(fault: str, tmp_path: Path) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(InputError, match=message):
        data_reference(make(), tmp_path)
    assert list(tmp_path.rglob("*.jsonl")) == []
