"""The imports run one way: a file imports only what stands above it in the list of rooms."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A folder is one room, whose files may import each other, though never in a circle.
ROOMS = (
    "errors",
    "units",
    "files",
    "licences",
    "markdown",
    "durable",
    "reply",
    "termination",
    "process_memory",
    "bench_output",
    "remote",
    "json_child",
    "llama_cpp_child",
    "llama_cpp",
    "python_server_child",
    "python_server",
    "in_time",
    "moments",
    "whole_request",
    "endpoint",
    "statistics",
    "hardware",
    "quiet",
    "timing",
    "tensors",
    "grids",
    "formats",
    "super_blocks",
    "k_blocks",
    "codes",
    "families",
    "hashes",
    "checksums",
    "parts",
    "kinds",
    "strategy",
    "effects",
    "plain_yaml",
    "device_names",
    "devices",
    "device_files",
    "device_lookup",
    "budget",
    "domains",
    "space",
    "contracts",
    "certainty",
    "plugins",
    "storage",
    "gguf_graphs",
    "gguf_cuts",
    "config_fields",
    "latent",
    "serving_memory",
    "roofline",
    "estimate",
    "training_memory",
    "shapes",
    "training_fit",
    "teacher_fit",
    "records",
    "local_device",
    "conversations",
    "tasks",
    "documents",
    "task_files",
    "tokenising",
    "chat_templates",
    "rendering",
    "templates",
    "packing",
    "token_sets",
    "splitting",
    "data",
    "distillation",
    "described",
    "appraisal",
    "measure",
    "needs",
    "pick",
    "writing",
    "stages",
    "students",
    "evaluation",
    "trial_data",
    "applied",
    "training_appraisal",
    "workbench",
    "trial",
    "export",
    "evaluators",
    "search",
    "testing",
    "completion",
    "options",
    "help_pages",
    "console",
    "live",
    "summary",
    "hardware_summary",
    "streams",
    "doctor",
    "calls",
    "printing",
    "cli",
    "__main__",
    "",  # autodistill/__init__.py: public names
)
WITHOUT_TORCH = (
    "errors",
    "units",
    "tensors",
    "grids",
    "formats",
    "super_blocks",
    "k_blocks",
    "codes",
    "families",
    "hashes",
    "parts",
    "strategy",
    "devices",
    "device_lookup",
    "space",
    "contracts",
    "certainty",
    "plugins",
    "gguf_graphs",
    "serving_memory",
    "estimate",
    "shapes",
)


def sources() -> dict[str, Path]:
    """Module names without "autodistill.", and their files."""
    found = {}
    for folder, prefix in ((ROOT / "autodistill", ""), (ROOT / "evaluators", "evaluators.")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = prefix + ".".join(part for part in parts if part != "__init__")
            found[name.rstrip(".")] = path
    return found


SOURCES = sources()


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, inside of functions too; where a name is a module, the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            base = node.module or ""
            modules = {f"{base}.{alias.name}" for alias in node.names} & {f"autodistill.{name}" for name in SOURCES}
            found.update(modules or {base})
    return found


def own(path: Path) -> set[str]:
    """Names of the project's modules that a file imports, without "autodistill."."""
    names = {name for name in imports(path) if name == "autodistill" or name.startswith("autodistill.")}
    return {name.removeprefix("autodistill").removeprefix(".") for name in names}


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_file_has_a_room():
    assert {room(name) for name in SOURCES} <= set(ROOMS)


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_a_file_imports_only_what_stands_above_it(module):
    place = ROOMS.index(room(module))
    for other in own(SOURCES[module]):
        inside = room(other) == room(module) and module != ""
        above = room(other) in ROOMS and ROOMS.index(room(other)) < place
        assert inside or above, f"autodistill.{module} imports autodistill.{other}, which stands below it"


def listed():
    """Modules by the row of ARCHITECTURE's table that names them, from the top; a folder's row names its files."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text.partition("| room | its one sentence |")[2].partition("\n\n")[0]
    found = {}
    for place, line in enumerate(table.splitlines()):
        names, _, sentence = line.strip("|").partition(" | ")
        for name in re.findall(r"`([^`]+)`", names):
            if name.endswith("/"):
                # Beside files, sentences name what is no file: classes, say.
                for file in re.findall(r"`([a-z_0-9]+)`", sentence):
                    found.setdefault(f"{name[:-1]}.{file}", []).append(place)
                found.setdefault(name[:-1], []).append(place)
            elif name.endswith(".py"):
                found.setdefault(name[:-3].removeprefix("__init__"), []).append(place)
    return found


def test_the_architecture_names_every_file_once_and_none_that_is_not_there():
    rows = listed()
    assert rows.keys() - SOURCES.keys() == set(), "no such file"
    assert SOURCES.keys() - rows.keys() == set(), "in no row"
    assert [name for name, places in rows.items() if len(places) > 1] == []


def test_a_file_imports_only_what_stands_above_it_in_the_architecture():
    place = {name: places[0] for name, places in listed().items()}
    below = [(module, other) for module in SOURCES for other in own(SOURCES[module]) if place[other] > place[module]]
    # The version, which stands beside the public names.
    assert [pair for pair in below if pair[1] != ""] == []


def test_nothing_imports_in_a_circle():
    graph = {module: own(path) for module, path in SOURCES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_evaluators_import_the_contracts_the_estimate_and_what_stands_above_them():
    # The rooms below the contracts that they may use: `memory` reports what it predicts; what is read in
    # parts is so by `certainty`; tasks, turns are plain data.
    allowed = {*ROOMS[: ROOMS.index("certainty") + 1], "serving_memory", "conversations", "task_files", "evaluators"}
    for module, path in SOURCES.items():
        if room(module) == "evaluators":
            assert {room(other) for other in own(path)} <= allowed, module


@pytest.mark.parametrize(
    ("package", "files"),
    [
        ("ray", {"search.bell", "search.cluster", "search.group", "search.kills", "search.ray_runner"}),
        ("optuna", {"search.study"}),
        ("typer", {"cli", "help_pages", "options"}),
        ("xllamacpp", None),
    ],
)
def test_an_engine_is_imported_by_few_files(package, files):
    users = {module for module, path in SOURCES.items() if any(room(name) == package for name in imports(path))}
    assert users <= files if files is not None else len(users) <= 1


def test_what_plans_and_describes_loads_no_torch():
    names = [f"autodistill.{name}" for name in WITHOUT_TORCH]
    program = (
        f"import sys, {', '.join(names)}; print([n for n in ('torch', 'transformers', 'ray') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
