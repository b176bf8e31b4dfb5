"""The command line accepts every autodistill command that a page shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from autodistill.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "README.zh-CN.md", "results/README.md", "CONTRIBUTING.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
# This is the base class of Typer's usage errors, which it does not export by name.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
SPAN = re.compile(r"`(autodistill\s+[a-z][^`]*)`")


def commands(page: Path) -> Iterator[tuple[list[str], bool]]:
    """Yield the words of each command of a page, without the program's name, and whether prose names it."""
    text = page.read_text(encoding="utf-8")
    lines = [(line, False) for block in BLOCK.findall(text) for line in block.splitlines()]
    lines += [(" ".join(found.split()), True) for found in SPAN.findall(re.sub(BLOCK, "", text))]
    for line, told in lines:
        if "..." in line or "[" in line or page.parts[-2] == "decisions":
            continue  # a pattern, not a command
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", "|", ";"):
                words.append(word)
            else:
                if words and words[0].rpartition("/")[2] == "autodistill" and len(words) > 1:
                    yield words[1:], told
                words = []


CASES = [
    pytest.param(words, told, id=f"{page.name}-{' '.join(words)[:60]}")
    for page in PAGES
    for words, told in commands(page)
]


def test_pages_show_commands():
    assert len(CASES) > 80


@pytest.mark.parametrize(("words", "told"), CASES)
def test_a_command_of_a_page_is_taken(words: list[str], told: bool):
    group = typer.main.get_command(app)
    context = group.make_context("autodistill", [*words])
    if words[0].startswith("-"):
        return
    name, command, rest = group.resolve_command(context, words)
    assert command is not None
    try:
        command.make_context(name, rest, parent=context)
    except USAGE_ERROR as error:
        # Prose may leave out required words. A misspelt option is found before that.
        if not (told and type(error).__name__ == "MissingParameter"):
            raise


def test_an_option_that_is_none_is_found_in_prose_too():
    with pytest.raises(USAGE_ERROR, match="--nope"):
        test_a_command_of_a_page_is_taken(["log", "--nope"], True)
