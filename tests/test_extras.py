"""Each extra works in an environment of its own, with the lowest and with the newest versions that its bounds admit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from autodistill.testing import save_tiny_teacher, tiny_text
from tests.test_packaging import PROJECT, ROOT

pytestmark = pytest.mark.system

EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
# Only resolved: gigabytes of CUDA code that a machine without a GPU cannot run, and a torch of its own.
RESOLVED = {"vllm"}
# What an extra is for, where the command line can show it; `ARTIFACTS` of the others is GGUF.
FORMATS = {name: name for name in ("onnx", "executorch", "litert")}
ADDED = {
    **{name: ["--log", name] for name in ("mlflow", "tensorboard", "wandb")},
    "dashboard": ["--runner", "ray", "--dashboard"],
    "monitor": ["--metrics-port", "0"],
}
# Imports the packages that are named, and shows the help of every command.
USED = """
import importlib, sys, typer
from importlib.metadata import packages_distributions
from autodistill.cli.app import app, main
for package, owners in packages_distributions().items():
    if {name.lower().replace("_", "-") for name in owners} & set(sys.argv[1:]) and package.isidentifier():
        importlib.import_module(package)
for command in typer.main.get_command(app).commands:
    assert main([command, "--help"]) == 0, command
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment in a folder, whose pip keeps to the constraints in a file."""

    folder: Path
    constraints: Path

    @property
    def site(self) -> Path:
        """The folder of its packages."""
        return self.folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def run(self, *words: str) -> str:
        """Run its Python, away from the checkout, and return what it printed."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        # What one environment has compiled, another one with the same bounds reads.
        own |= {"NUMBA_CACHE_DIR": str(self.constraints.parent / "compiled"), "WANDB_MODE": "offline"}
        words = (str(self.folder / "bin" / "python"), *words)
        done = subprocess.run(words, cwd=self.folder, env=own, capture_output=True, text=True, timeout=3600)
        assert done.returncode == 0, f"{words[1:]}: {(done.stdout + done.stderr)[-3000:]}"
        return done.stdout

    def pip(self, *words: str) -> str:
        """Install packages, within the constraints."""
        return self.run("-m", "pip", "install", "--quiet", "--no-input", "--constraint", str(self.constraints), *words)


def made(folder: Path, constraints: Path) -> Environment:
    """Return a new environment without packages."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return Environment(folder, constraints)


def lowest(requirements: list[str]) -> list[str]:
    """Return the requirements, each with the version alone that its lower bound names."""
    found = []
    for one in map(Requirement, requirements):
        if one.name not in ("torch", PROJECT["project"]["name"]):
            (bound,) = (part.version for part in one.specifier if part.operator == ">=")
            found.append(f"{one.name}=={bound}")
    return found


@dataclass(frozen=True)
class Base:
    """What environments with the same bounds share.

    Attributes:
        bound: "lowest" or "newest".
        wheel: This checkout, built.
        environment: It without an extra. The environment of an extra sees its packages, and pip installs there what
            the extra adds, or wants in another version than is here: every bound is checked all the same.
    """

    bound: str
    wheel: Path
    environment: Environment


def bounded(folder: Path, bound: str, *extras: str) -> Path:
    """Write the constraints of a bound for some extras.

    torch is the one that is installed here, because lower versions are gigabytes of CUDA code.
    """
    asked = [*PROJECT["project"]["dependencies"], *(text for extra in extras for text in EXTRAS[extra])]
    lines = lowest(asked) if bound == "lowest" else []
    if not RESOLVED & set(extras):
        lines.append(f"torch=={Version(distribution('torch').version).public}")
    path = folder / "-".join(["constraints", *extras])
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["lowest", "newest"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tmp_path_factory.mktemp(request.param)
    environment = made(folder / "base", bounded(folder, request.param))
    try:
        environment.pip("--dry-run", "--no-deps", "--retries", "0", "--timeout", "10", "packaging")
    except AssertionError:
        pytest.skip("the package index cannot be reached")
    files = distribution("torch").files or []
    for name in {file.parts[0] for file in files} - {"..", "__pycache__"}:
        (environment.site / name).symlink_to(Path(str(distribution("torch").locate_file(name))))
    environment.run("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    environment.pip(str(wheel))
    return Base(request.param, wheel, environment)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny teacher and data."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny_teacher(folder / "teacher")
    tiny_text(folder / "data")
    return folder


@pytest.mark.parametrize("extra", ["", *sorted(EXTRAS)])
def test_an_extra_works_in_an_environment_of_its_own(extra: str, base: Base, inputs: Path, tmp_path: Path) -> None:
    own = made(tmp_path / "own", bounded(base.wheel.parent, base.bound, *filter(None, [extra])))
    wheel = f"{base.wheel}[{extra}]"
    if extra in RESOLVED:
        own.pip("--dry-run", wheel)
        return
    (own.site / "base.pth").write_text(str(base.environment.site), encoding="utf-8")
    own.pip(wheel)
    own.run("-m", "pip", "check")
    packages = [Requirement(text).name.lower() for text in EXTRAS.get(extra, PROJECT["project"]["dependencies"])]
    own.run("-c", USED, *packages)
    given = ["--budget", "1GB", "--teacher", str(inputs / "teacher"), "--data", str(inputs / "data")]
    small = ["--trials", "2", "--tokens", "768", "--name", "tiny", "--runner", "inline"]
    own.run("-m", "autodistill", "search", *given, *small, *ADDED.get(extra, []))
    own.run("-m", "autodistill", "export", "tiny", "--to", FORMATS.get(extra, "gguf"), "--out", "exported")
