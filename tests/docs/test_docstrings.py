"""Docstrings name the parameters that functions have."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"Args:\n((?: {4}.*\n?|\n)*)")
NAMES = re.compile(r"^ {4}(\*{0,2}\w[\w, *]*?):", re.MULTILINE)


def documented(path: Path) -> Iterator[tuple[ast.FunctionDef, str]]:
    """Yield each function of a file with the docstring of its parameters. That of `__init__` belongs to the class."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield node, ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    yield method, ast.get_docstring(node) or ""


@pytest.mark.parametrize("folder", ["autodistill", "evaluators", "benchmarks"])
def test_a_docstring_names_parameters_of_its_function(folder: str) -> None:
    wrong: list[str] = []
    read = 0
    for path in (ROOT / folder).rglob("*.py"):
        for function, text in documented(path):
            given = function.args
            every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            names = {one.arg for one in every if one is not None}
            told = re.split(r", *", ", ".join(NAMES.findall("".join(SECTION.findall(text)))))
            read += len(told)
            wrong += [f"{path}:{function.lineno}: {name}" for name in told if name and name.strip("*") not in names]
    assert wrong == []
    assert read > 50
