"""YAML files with plain data or something else, compared with what Python's own reader makes of the same values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.utils.yaml_files import read_yaml


def _read(text: str | bytes, folder: Path) -> Any:
    path = folder / "a.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_yaml(path)


def test_plain_data_is_read_as_json_has_it(tmp_path: Path) -> None:
    data = {"a": [1, -2.5, 3e-4, True, None, "x"], "b": {"c": {"d": []}}, "2001-01-01": str(2**62)}
    assert _read(json.dumps(data), tmp_path) == data


def test_a_date_is_text_and_aliases_and_merged_keys_mean_what_they_name(tmp_path: Path) -> None:
    text = "day: 2001-99-99\nbase: &b {x: 1, y: 2}\nown: {<<: *b, x: 3}\nlisted: [*b, *b]\n"
    base = {"x": 1, "y": 2}
    assert _read(text, tmp_path) == {
        "day": "2001-99-99",
        "base": base,
        "own": {"x": 3, "y": 2},
        "listed": [base, base],
    }


_LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: {c: 1, d: 2, c: 3}\n", "line 2: not plain data: the key c is given twice"),
        ("".join(f"k{n}: 1\n" for n in range(60_000)) + "k7: 2\n", "the key k7 is given twice"),
        (_LAUGHS, "more than 200,000 values"),
        ("a: &a [1, *a]\n", "a value holds itself"),
        ("[" * 500 + "]" * 500, "nested deeper than 100 levels"),
        ("{a: " * 90_000, "too deep|nest|depth|max"),
        ("a: 0x_\n", "'0x_' is no int"),
        ("a: !!int abc\n", "'abc' is no int"),
        ("a: !!int ''\n", "'' is no int"),
        ("a: !!float abc\n", "'abc' is no float"),
        ("a: !!bool perhaps\n", "'perhaps' is no bool"),
        ("a: !!timestamp abc\n", "not plain data"),
        ("a: !!binary abc\n", "not plain data"),
        ("a: !!set {b, c}\n", "not plain data"),
        (f"a: {10**400}\n", "more than 63 bits"),
        ("a: " + "9" * 5000 + "\n", "is no int"),
        ("? [a, b]\n: c\n", "unhashable key"),
        (b"a: \x00\n", "not valid YAML"),
        ("a: b\n" * 1_000_001, "larger than 4.00 MB"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_what_is_no_plain_data_is_refused_in_a_line(text: str | bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        _read(text, tmp_path)
    assert re.search(said, str(raised.value)), str(raised.value)
    assert len(str(raised.value)) < 1_000
