"""ARCHITECTURE.md is a map: short, with files that exist, and with the packages in the order that tests enforce."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_imports import PACKAGES

ROOT = Path(__file__).parents[2]
MAP = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
MOST_BYTES, MOST_LINES = 12 * 1024, 9


def section(title: str) -> str:
    """Return the text below a heading, up to the next one."""
    return MAP.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_it_is_short():
    assert len(MAP.encode()) <= MOST_BYTES


@pytest.mark.parametrize("way", ["A strategy", "A budget", "A result"])
def test_a_way_through_the_code_is_told_in_few_lines(way: str):
    (told,) = (
        one for one in section("Three ways through the code").split("\n\n") if one.strip().startswith(f"**{way}")
    )
    assert len(told.strip().splitlines()) <= MOST_LINES


def test_every_file_and_folder_that_it_names_is_there():
    named = {name for name in re.findall(r"`([\w./]+)`", MAP) if "/" in name}
    named |= {f"search/{name}" for name in re.findall(r"^ *search/(\w+) ", section("The picture"), re.MULTILINE)}
    inside = ("", "autodistill", "autodistill/distillation", "autodistill/export", "evaluators")
    assert len(named) > 40
    assert {name for name in named if not any((ROOT / place / name).exists() for place in inside)} == set()


def test_the_packages_are_those_of_the_tests_and_in_their_order():
    listed = [
        name.removesuffix(".py").removesuffix("/")
        for line in section("The packages").splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([\w/]+(?:\.py)?)`", line.split("|")[1])
    ]
    assert listed == [name for name in PACKAGES if name not in ("", "__main__")]
