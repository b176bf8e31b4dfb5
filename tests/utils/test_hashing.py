"""Hashes against the published ones of SHA-256, and hashes of data in another order."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from autodistill.utils.hashing import content_hash, file_hash


def test_plain_data_is_known_by_its_json_without_blanks_in_order_of_keys() -> None:
    data = {"b": [1, 0.1, None], "a": "\u00e9"}
    assert content_hash(data, digits=64) == hashlib.sha256(b'{"a":"\\u00e9","b":[1,0.1,null]}').hexdigest()
    assert content_hash(dict(reversed(data.items()))) == content_hash(data)
    assert len(content_hash(data)) == 12


def test_hashes_refuse_what_json_cannot_hold() -> None:
    with pytest.raises(ValueError):
        content_hash({"loss": float("nan")})


def test_a_file_is_known_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert file_hash(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
