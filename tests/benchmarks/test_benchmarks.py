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
from benchmarks.reliability import mutants
from benchmarks.reliability.mutations import mutations
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


def test_the_core_that_mutants_change_is_of_files_that_are_there():
    assert [name for name in mutants.CORE if not (ROOT / name).is_file()] == []


def test_lines_of_the_core_are_followed_through_a_change():
    before = "def f(a):\n    b = a + 1\n    c = b * 2\n    return c\n"
    after = "X = 1\n\ndef f(a):\n    b = a + 2\n    print(b)\n    c = b * 2\n    d = c\n    return c\n"
    found = mutants.moved(before, after)
    # Line 2 became two lines, one was added after line 3, and the unchanged lines have moved.
    assert (found[1], found[2], found[3], found[4]) == ([3], [4, 5], [6, 7], [8])


def test_a_test_file_that_could_not_be_run_is_not_taken_for_one_that_reaches_nothing(tmp_path):
    result = tmp_path / "reached.json"
    traced = mutants.Tracer(result, {})
    traced.pytest_sessionfinish(pytest.ExitCode.INTERNAL_ERROR)
    assert not result.exists()
    traced.pytest_sessionfinish(pytest.ExitCode.OK)
    assert result.exists()


def test_what_is_done_at_an_import_is_tested_by_whoever_comes_to_the_module(tmp_path):
    module = mutants.CORE[0]
    tests = [mutants.Test(name=f"tests/test_a.py::{n}", seconds=1, reached=frozenset({(module, n)})) for n in (3, 7)]
    bench = mutants.Bench(work=tmp_path, jobs=1, tests=tests, imported=frozenset({(module, 2)}))

    def asked(reached):
        lines = {"line": 2, "reached": reached, "kind": "", "before": "", "after": ""}
        return [test.seconds for test in bench.tests_of(mutants.Mutation(module=module, source=str, **lines))]

    assert (len(asked(7)), len(asked(2)), len(asked(None))) == (1, 2, 2)


def test_expressions_that_are_alike_in_a_statement_are_told_apart():
    said = [one.before for one in mutations("a.py", "x = (0, 0, 1)\n") if one.kind == "one more"]
    assert said == ["x = (0, 0, 1)  [0]", "x = (0, 0, 1)  [0, no. 2]", "x = (0, 0, 1)  [1]"]


def test_survivors_of_a_record_are_found_again_where_their_lines_have_moved_even_to_another_file():
    row, table = (f"autodistill/runs/results/{name}.py" for name in ("row", "table"))
    here, there = (mutations(name, (ROOT / name).read_text(encoding="utf-8"))[0] for name in (row, table))
    recorded = [
        {"number": number, "module": row, "line": one.line + 3, "kind": one.kind, "before": before, "after": one.after}
        for number, (one, before) in enumerate([(here, here.before), (there, there.before), (here, "nothing = 7")])
    ]
    found = {number: (one.module, one.line, one.before) for number, one in mutants.still_there(recorded).items()}
    assert found == {0: (row, here.line, here.before), 1: (table, there.line, there.before)}


def test_what_survives_the_tests_that_name_a_module_is_tried_by_all_of_its_folder():
    module = "autodistill/strategy/strategy.py"
    named, wide = mutants.near([module]), mutants.near([module], [module])
    assert set(named) < set(wide)
    assert {*(mutants.ROOT / "tests" / "strategy").glob("test_*.py")} <= set(wide)
    assert mutants.ROOT / "tests" / "test_contributing.py" not in named


def test_a_mutant_without_effect_is_named_by_what_it_becomes_or_by_its_statement():
    same = {("a.py", "x = 2 + y  [2]", "3"): "one", ("a.py", "z = 5 * 4", None): "all"}
    found = [one for one in mutations("a.py", "x = 2 + y\nz = 5 * 4\n") if mutants.without_effect(one, same)]
    told = [(one.before, one.after) for one in found]
    assert told[0] == ("x = 2 + y  [2]", "3")
    assert told[1:] == [
        ("z = 5 * 4  [5]", "6"),
        ("z = 5 * 4  [5]", "4"),
        ("z = 5 * 4  [Mult]", "Div"),
        ("z = 5 * 4  [4]", "5"),
        ("z = 5 * 4  [4]", "3"),
    ]
    assert not [one for one in mutations("b.py", "z = 5 * 4\n") if mutants.without_effect(one, same)]


@pytest.mark.slow
def test_a_run_of_mutants_imports_nothing_of_ours_before_it_forks():
    """Otherwise the forks would test what was imported before, instead of the copy with a mutant."""
    program = (
        "import sys; from benchmarks.reliability import mutants; mutants._stamp(); "
        "print([n for n in sys.modules if n.startswith('autodistill')])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
