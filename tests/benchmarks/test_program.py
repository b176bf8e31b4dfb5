"""Counts of tokens on the command line of a benchmark."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.common.program import token_count


@pytest.mark.parametrize(
    ("text", "count"), [("6144", 6144), ("6k", 6000), ("69M", 69_000_000), ("1.5M", 1_500_000), ("0.128k", 128)]
)
def test_a_count_of_tokens_is_read(text: str, count: int) -> None:
    assert token_count(text) == count


@pytest.mark.parametrize("text", ["", "69m", "6K", "1.5", "0.0001k", "-6", "6 k", "6kM", "٦", "69MB", "nan"])
def test_what_is_no_count_of_tokens_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write one like 6144, 6k or 69M"):
        token_count(text)
