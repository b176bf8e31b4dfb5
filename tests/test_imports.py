"""Imports run in one direction: a package imports only those above it in one list, and no files import in a circle."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the lowest package up. Only this list defines the order. "" is `autodistill/__init__.py`, the public names.
PACKAGES = (
    *("errors", "units", "plugins"),
    *("utils", "models", "quantization", "strategy", "hardware", "options", "estimates"),
    *("data", "runtimes", "inference"),
    *("distillation", "evaluation", "evaluators", "runs", "export", "advisor", "profiling", "service", "search"),
    *("report", "trackers", "dashboards", "bundle", "federated"),
    *("objects", "api"),
    *("testing", "cli", "__main__", ""),
)
MOST_MODULES, MOST_AT_THE_TOP = 14, 8

# The modules that plan, describe and estimate start quickly.
WITHOUT_TORCH = (
    *("errors", "units", "plugins", "utils.hashing", "utils.plain_dataclass"),
    *("models.tensors", "models.families", "models.spec", "models.config", "models.llama_cpp_graphs"),
    *("quantization.grids", "quantization.formats", "quantization.k_quants", "quantization.k_quant_bytes"),
    *("quantization.packing", "strategy.strategy", "strategy.deployment", "strategy.space", "strategy.named"),
    *("hardware.budget", "hardware.device", "hardware.lookup", "estimates.fit", "estimates.serving_memory"),
    *("evaluation.base", "distillation.student.shapes", "export.base", "runs.standing"),
    *("search.request.early_checks", "search.solve_request"),
    *("advisor.describe", "advisor.estimate", "advisor.candidates", "search.explain", "cli.app", "cli.commands"),
)


def sources() -> dict[str, Path]:
    """Return module names without "autodistill.", and their files."""
    found = {}
    for folder, prefix in ((ROOT / "autodistill", ""), (ROOT / "evaluators", "evaluators.")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = prefix + ".".join(part for part in parts if part != "__init__")
            found[name.rstrip(".")] = path
    return found


SOURCES = sources()


@cache
def parsed(path: Path) -> ast.Module:
    """Return a file's syntax tree, which many tests need."""
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> set[str]:
    """Return full names of everything that a file imports, also inside functions.

    If an imported name is a module, the set has the name of this module.
    """
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            base = node.module or ""
            modules = {f"{base}.{alias.name}" for alias in node.names} & {f"autodistill.{name}" for name in SOURCES}
            found.update(modules or {base})
    return found


def own(path: Path) -> set[str]:
    """Return names of the project's modules that a file imports, without "autodistill."."""
    names = {name for name in imports(path) if name == "autodistill" or name.startswith("autodistill.")}
    return {name.removeprefix("autodistill").removeprefix(".") for name in names}


def package(module: str) -> str:
    return module.split(".")[0]


def test_every_file_is_in_a_package_of_the_list():
    assert {package(name) for name in SOURCES} == set(PACKAGES)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_imports_only_what_stands_above_it(name):
    above = set(PACKAGES[: PACKAGES.index(name)])
    below = [
        (module, other)
        for module, path in SOURCES.items()
        if package(module) == name
        for other in own(path)
        if package(other) != name and package(other) not in above
    ]
    assert below == []


def test_nothing_imports_in_a_circle():
    graph = {module: own(path) for module, path in SOURCES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("name", ["distillation", "runs", "search", "evaluators"])
def test_the_folders_of_a_package_import_in_no_circle(name):
    """Each file next to the folders counts as a folder."""

    def inner(module: str) -> str:
        return module.split(".")[1] if "." in module else ""

    graph: dict[str, set[str]] = {}
    for module, path in SOURCES.items():
        if package(module) == name and inner(module):
            others = {inner(other) for other in own(path) if package(other) == name}
            graph.setdefault(inner(module), set()).update(others - {inner(module), ""})
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_a_folder_holds_few_files():
    counts = Counter(path.parent for path in SOURCES.values() if path.name != "__init__.py")
    assert counts.pop(ROOT / "autodistill") <= MOST_AT_THE_TOP
    assert {str(folder): count for folder, count in counts.items() if count > MOST_MODULES} == {}


def test_a_file_begins_with_one_sentence():
    firsts = {module: (ast.get_docstring(parsed(path)) or "").partition("\n")[0] for module, path in SOURCES.items()}
    assert len(firsts) > 500
    fine = [module for module, first in firsts.items() if first[:1].isupper() or first[:1] == "`"]
    assert {module: first for module, first in firsts.items() if module not in fine or first[-1:] != "."} == {}


@pytest.mark.parametrize(
    ("engine", "files"),
    [
        ("ray", ("search.runners.", "federated.on_ray")),
        ("optuna", ("search.algorithms.optuna_study",)),
        ("typer", ("cli.app", "cli.help", "cli.options")),
        ("xllamacpp", ("runtimes.llama_cpp_",)),
    ],
)
def test_an_engine_is_imported_by_few_files(engine, files):
    users = {module for module, path in SOURCES.items() if any(package(name) == engine for name in imports(path))}
    assert {module for module in users if not module.startswith(files)} == set()


def test_what_plans_and_describes_loads_no_torch():
    names = [f"autodistill.{name}" for name in WITHOUT_TORCH]
    program = (
        f"import sys, {', '.join(names)}; print([n for n in ('torch', 'transformers', 'ray') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
