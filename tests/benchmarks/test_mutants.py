"""Tests of the program that changes the core's lines and runs the tests."""

import subprocess
import sys

import pytest

from benchmarks.reliability.mutants.bench import Bench, TracedTest
from benchmarks.reliability.mutants.drawing import CORE, ROOT, near, still_there, without_effect
from benchmarks.reliability.mutants.mutations import Mutation, mutations
from benchmarks.reliability.mutants.tracing import Tracer, moved


def test_the_core_that_mutants_change_is_of_files_that_are_there():
    assert [name for name in CORE if not (ROOT / name).is_file()] == []


def test_lines_of_the_core_are_followed_through_a_change():
    before = "def f(a):\n    b = a + 1\n    c = b * 2\n    return c\n"
    after = "X = 1\n\ndef f(a):\n    b = a + 2\n    print(b)\n    c = b * 2\n    d = c\n    return c\n"
    found = moved(before, after)
    # Line 2 became two lines, one was added after line 3, and the unchanged lines have moved.
    assert (found[1], found[2], found[3], found[4]) == ([3], [4, 5], [6, 7], [8])


def test_a_test_file_that_could_not_be_run_is_not_taken_for_one_that_reaches_nothing(tmp_path):
    result = tmp_path / "reached.json"
    traced = Tracer(result, {})
    traced.pytest_sessionfinish(pytest.ExitCode.INTERNAL_ERROR)
    assert not result.exists()
    traced.pytest_sessionfinish(pytest.ExitCode.OK)
    assert result.exists()


def test_what_is_done_at_an_import_is_tested_by_whoever_comes_to_the_module(tmp_path):
    module = CORE[0]
    tests = [TracedTest(name=f"tests/test_a.py::{n}", seconds=1, reached=frozenset({(module, n)})) for n in (3, 7)]
    bench = Bench(work=tmp_path, jobs=1, tests=tests, imported=frozenset({(module, 2)}))

    def asked(reached):
        lines = {"line": 2, "reached": reached, "kind": "", "before": "", "after": ""}
        return [test.seconds for test in bench.tests_of(Mutation(module=module, source=str, **lines))]

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
    found = {number: (one.module, one.line, one.before) for number, one in still_there(recorded).items()}
    assert found == {0: (row, here.line, here.before), 1: (table, there.line, there.before)}


def test_what_survives_the_tests_that_name_a_module_is_tried_by_all_of_its_folder():
    module = "autodistill/strategy/strategy.py"
    named, wide = near([module]), near([module], [module])
    assert set(named) < set(wide)
    assert {*(ROOT / "tests" / "strategy").glob("test_*.py")} <= set(wide)
    assert ROOT / "tests" / "test_contributing.py" not in named


def test_a_mutant_without_effect_is_named_by_what_it_becomes_or_by_its_statement():
    same = {("a.py", "x = 2 + y  [2]", "3"): "one", ("a.py", "z = 5 * 4", None): "all"}
    found = [one for one in mutations("a.py", "x = 2 + y\nz = 5 * 4\n") if without_effect(one, same)]
    told = [(one.before, one.after) for one in found]
    assert told[0] == ("x = 2 + y  [2]", "3")
    assert told[1:] == [
        ("z = 5 * 4  [5]", "6"),
        ("z = 5 * 4  [5]", "4"),
        ("z = 5 * 4  [Mult]", "Div"),
        ("z = 5 * 4  [4]", "5"),
        ("z = 5 * 4  [4]", "3"),
    ]
    assert not [one for one in mutations("b.py", "z = 5 * 4\n") if without_effect(one, same)]


@pytest.mark.slow
def test_a_run_of_mutants_imports_nothing_of_ours_before_it_forks():
    """Otherwise the forks would test what was imported before, instead of the copy with a mutant."""
    program = (
        "import sys; from benchmarks.reliability.mutants import __main__ as mutants; mutants._stamp(); "
        "print([n for n in sys.modules if n.startswith('autodistill')])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
