"""Every benchmark states its question and runs at a tiny size; the parts of some of them are tested too."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.common.program import ROOT
from benchmarks.engine import distill_arms
from tests.thinned import thinned

MODULES = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").rglob("*.py")}
MAINS = {".".join(path.with_suffix("").parts) for path, text in MODULES.items() if "\ndef main()" in text}
# A program of several files is run by the name of its folder.
PROGRAMS = sorted(name.removesuffix(".__main__") for name in MAINS)
# Packages that only one program needs and that no extra installs.
NEEDED = {"benchmarks.engine.torchao_reference": "torchao"}
# Programs whose command line must name something that no test has.
NAMED = {"benchmarks.engine.mixture_types": "a library of llama.cpp"}
OURS = ("autodistill", "benchmarks")
# Those whose smoke runs take about two seconds.
QUICK = ("benchmarks.reliability.figures",)


@functools.cache
def nodes_of() -> dict[Path, tuple[ast.AST, ...]]:
    """Return the nodes of each module's syntax tree. Every test process collects this file, and one needs them."""
    return {path: tuple(ast.walk(ast.parse(text))) for path, text in MODULES.items()}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_what_a_program_answers(name, monkeypatch, capsys):
    program = importlib.import_module(name if name in MAINS else f"{name}.__main__")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert not ended.value.code
    told = capsys.readouterr().out
    first = program.__doc__.splitlines()[0]
    assert first.endswith((".", "?"))
    assert first in told
    assert f"python -m {name}" in told
    assert "--smoke" in told


def test_the_list_names_every_program():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert [name for name in PROGRAMS if f"`{name.removeprefix('benchmarks.')}`" not in text] == []


def test_every_public_function_and_class_says_what_it_does():
    for path, nodes in nodes_of().items():
        inner = {
            id(one) for node in nodes if isinstance(node, ast.FunctionDef) for one in ast.walk(node) if one is not node
        }
        named = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef) and id(node) not in inner]
        public = [node for node in named if not node.name.startswith("_")]
        assert [node.name for node in public if not ast.get_docstring(node)] == [], path


# `make gpu` measures on a GPU what programs of other folders measure here, with their own arms.
GATHERED = {"gpu_parts.py": {"engine", "search"}}


def test_a_program_reads_its_own_folder_and_what_all_share():
    for path, nodes in nodes_of().items():
        own = {"common", path.parts[1]} | GATHERED.get(path.name, set())
        read = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        folders = {part.split(".")[1] for part in read if part.startswith("benchmarks.")}
        assert folders <= own, path


def test_no_program_asks_for_a_private_name_of_ours():
    """A private name may change at any time, and only a slow run of the program would show that."""
    for path, nodes in nodes_of().items():
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
                asked = [alias.name for alias in node.names]
            elif (
                isinstance(node, ast.Attribute)
                and node.attr.startswith("_")
                and ast.unparse(node.value) not in ("self", "super()")
            ):
                asked = [node.attr]
            else:
                continue
            # Python's own `os._exit` and the `_fields` of its named tuples are public.
            private = [name for name in asked if re.match("_[^_]", name) and name not in ("_exit", "_fields")]
            assert private == [], f"{path}:{node.lineno}"


def test_what_a_program_calls_is_there_and_takes_what_it_is_given():
    """Importing the program would not show an error in an import inside a function, or in the name of a parameter."""
    for path, nodes in nodes_of().items():
        known = _imported(nodes)
        for node in nodes:
            if isinstance(node, ast.Attribute) and inspect.ismodule(module := _of(node.value, known)):
                assert hasattr(module, node.attr), f"{path}:{node.lineno}: {ast.unparse(node)}"
            if isinstance(node, ast.Call) and callable(called := _of(node.func, known)):
                given = [one for one in node.args if not isinstance(one, ast.Starred)]
                named = {one.arg: one for one in node.keywords if one.arg}
                whole = len(given) + len(named) == len(node.args) + len(node.keywords)
                signature = inspect.signature(called)
                try:
                    (signature.bind if whole else signature.bind_partial)(*given, **named)
                except TypeError as error:
                    pytest.fail(f"{path}:{node.lineno}: {ast.unparse(node.func)}: {error}")


def _imported(nodes: Sequence[ast.AST]) -> dict[str, Any]:
    """Return what a file imports from us, anywhere in it, by name.

    Names that any function assigns to something else are left out.
    """
    found = {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = getattr(module, alias.name)
    other = {node.arg for node in nodes if isinstance(node, ast.arg)}
    other |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {name: one for name, one in found.items() if name not in other}


def _of(node: ast.expr, known: dict[str, Any]) -> Any:
    """Return what an expression like `name` or `module.name` refers to if it was imported, else None."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute) and inspect.ismodule(module := _of(node.value, known)):
        return getattr(module, node.attr, None)
    return None


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PROGRAMS]
)
def test_a_program_runs_at_a_tiny_size_and_leaves_nothing(name, tmp_path):
    if named := NAMED.get(name):
        pytest.skip(f"{named} is not named")
    if (needed := NEEDED.get(name)) and importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    before = _reports()
    environment = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-m", name, "--smoke"]
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert _reports() == before
    assert [*tmp_path.glob("benchmark-smoke-*")] == []


def _reports() -> dict[Path, tuple[int, int]]:
    files = (ROOT / "benchmarks" / "reports").iterdir()
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


@pytest.mark.parametrize("beta", thinned([0.0, 0.5, 1.0]))
def test_both_losses_of_trl_are_the_same_divergence(beta):
    """Both timed losses must give the mean over tokens of the generalised JSD, and its gradient."""
    source = torch.Generator().manual_seed(0)
    states, wanted = (torch.randn(2, 5, 16, generator=source) for _ in range(2))
    head, wanted_head = (torch.randn(50, 16, generator=source) for _ in range(2))
    own = head.clone().requires_grad_()
    experimental = distill_arms.experimental_loss(states @ own.T, wanted @ wanted_head.T, beta)
    (expected,) = torch.autograd.grad(experimental, own)
    stable = distill_arms.stable_loss(states, own, wanted, wanted_head, beta)
    (found,) = torch.autograd.grad(stable, own)
    assert float(stable.detach()) == pytest.approx(float(experimental.detach()), rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
