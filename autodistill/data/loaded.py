"""Support for a `datasets.Dataset` as data: it is saved once, and then read like any file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodistill.data.conversations import READ_FIELDS
from autodistill.data.documents import TEXTS, USABLE, usable
from autodistill.errors import InputError
from autodistill.utils.checksums import saved_once

if TYPE_CHECKING:
    from datasets import Dataset

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


def data_reference(data: str | Path | Dataset, cache: Path) -> str:
    """Return a reference to data; a data set in memory is saved in the cache, once for the same content.

    Args:
        data: A reference, which is returned as it is, or a `datasets.Dataset`. Its columns are those of a record: text
            or content; a prompt with an answer; or messages. Other columns are left out.
        cache: Folder with everything that later searches may reuse.

    Raises:
        InputError: `data` is another object, has several splits, is streamed, or has no such columns or no rows.
    """
    if isinstance(data, str | Path):
        return str(data)
    dataset = _checked(data)
    columns = sorted(set(dataset.column_names) & {*TEXTS, *READ_FIELDS})
    plain = dataset.select_columns(columns).with_format(None)
    digest = hashlib.sha256()
    for line in _lines(plain):
        digest.update(line)
    name = str(dataset.info.dataset_name or "")
    name = name if _NAME.fullmatch(name) else "dataset"

    def save(path: Path) -> None:
        with path.open("wb") as file:
            file.writelines(_lines(plain))

    return str(saved_once(cache, digest.hexdigest()[:16], f"{name}.jsonl", save))


def _checked(data: Any) -> Dataset:
    import datasets

    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise InputError(f"data is a data set of the splits {', '.join(map(str, data))}: give one of them")
    if isinstance(data, datasets.IterableDataset):
        raise InputError(
            "data is a streaming data set, which has no end to be split: load it without streaming=True, or take a "
            "part with datasets.Dataset.from_list(list(data.take(10000)))"
        )
    if not isinstance(data, datasets.Dataset):
        raise InputError(f"data is of type {type(data).__name__}: give a reference, or a datasets.Dataset")
    if not usable(data.column_names):
        raise InputError(
            f"the data set has no column with usable text ({USABLE}): its columns are {', '.join(data.column_names)}; "
            "rename one with rename_column"
        )
    if not len(data):
        raise InputError("the data set has no row: give data with some")
    return data


def _lines(dataset: Dataset) -> Iterator[bytes]:
    for number, row in enumerate(dataset, start=1):
        try:
            yield json.dumps(row, allow_nan=False).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise InputError(
                f"row {number} of the data set is no plain text ({error}): write its columns as text"
            ) from None
