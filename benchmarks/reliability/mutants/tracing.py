"""What each test reaches of the core: marks at every statement, and the lines that they name now."""

from __future__ import annotations

import ast
import difflib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability.mutants.drawing import CORE, ROOT, hash_of

REACHED = '''"""Notes which statements are reached: in the tests' own process in `seen`, in others in a file."""
import os

seen = set()


def reached(module, line):
    key = (module, line)
    if key not in seen:
        seen.add(key)
        if os.environ.get("REACHED_IN") != str(os.getpid()) and os.environ.get("REACHED"):
            file = os.open(os.environ["REACHED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, f"{module}:{line}\\n".encode())
            os.close(file)
'''
"""The module that the marks call, as a file of the marked tree."""


class Sources:
    """The core's files now and as they were traced. So a change of them needs no new run of the tests.

    Args:
        folder: Keeps each traced state of a file, by its hash.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._texts = {name: (ROOT / name).read_text() for name in CORE}
        self.hashes = {name: hash_of(ROOT / name) for name in CORE}
        for name, text in self._texts.items():
            (folder / self.hashes[name]).write_text(text)
        self._moved: dict[tuple[str, str], dict[int, list[int]]] = {}

    def today(self, lines: Iterable[tuple[str, int]], traced: Mapping[str, str]) -> Iterator[tuple[str, int]]:
        """Yield where lines that were reached are now. A changed or added line belongs to the statement above it.

        Args:
            lines: Modules and lines when they were traced.
            traced: Hashes of the modules when they were traced.
        """
        for module, line in lines:
            if traced[module] == self.hashes[module]:
                yield module, line
                continue
            known = (module, traced[module])
            if known not in self._moved:
                self._moved[known] = moved((self._folder / traced[module]).read_text(), self._texts[module])
            yield from ((module, new) for new in self._moved[known].get(line, ()))


def moved(before: str, after: str) -> dict[int, list[int]]:
    """Return new lines by the old line of the statement that they belong to."""
    statements = sorted({node.lineno for node in ast.walk(ast.parse(before)) if isinstance(node, ast.stmt)})
    found: dict[int, list[int]] = {}
    old, new = before.splitlines(), after.splitlines()
    for kind, first, last, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            for offset in range(last - first):
                found.setdefault(first + offset + 1, []).append(start + offset + 1)
            continue
        # The statements that are replaced, or the one above an addition.
        among = [line for line in statements if first < line <= last] or [
            max((line for line in statements if line <= first), default=0)
        ]
        for line in among:
            found.setdefault(line, []).extend(range(start + 1, end + 1))
    return found


class Tracer:
    """Records what each test reaches: in its own process, in its child processes, and in its fixtures before it."""

    fails = False

    def __init__(self, result: Path, sources: Mapping[str, str]) -> None:
        self._result, self._sources = result, sources
        self._tests, self._failed = {}, set()  # type: ignore[var-annotated]
        self._fixtures: dict[str, set[tuple[str, int]]] = {}
        self._log, self._read = result.with_suffix(".log"), 0
        self._log.unlink(missing_ok=True)
        os.environ["REACHED"] = str(self._log)

    def _drain(self) -> set[tuple[str, int]]:
        seen: set[tuple[str, int]] = sys.modules["autodistill_reached"].seen
        found = set(seen)
        seen.clear()
        if self._log.exists():
            with self._log.open() as file:
                file.seek(self._read)
                for line in file:
                    module, _, number = line.strip().rpartition(":")
                    found.add((module, int(number)))
                self._read = file.tell()
        return found

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        """Record what a shared fixture reaches, separately from the test that happens to come first."""
        if fixturedef.scope == "function":
            return (yield)
        before = self._drain()
        try:
            return (yield)
        finally:
            self._fixtures.setdefault(fixturedef.argname, set()).update(self._drain())
            sys.modules["autodistill_reached"].seen.update(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        """Record which lines a test runs."""
        self._drain()
        began = sum(os.times()[:4])
        result = yield
        found = self._drain().union(*(self._fixtures.get(name, ()) for name in item.fixturenames))
        self._tests[item.nodeid] = (sum(os.times()[:4]) - began, sorted(found))
        return result

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Record which tests did not pass."""
        if report.outcome != "passed":
            self._failed.add(report.nodeid)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the results, each set of lines once. Write nothing if pytest could not run the file."""
        if exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR):
            return
        sets: dict[str, int] = {}
        tests = [
            [name, round(seconds, 3), sets.setdefault(json.dumps(lines), len(sets))]
            for name, (seconds, lines) in self._tests.items()
            if name not in self._failed
        ]
        whole = {"tests": tests, "left out": sorted(self._failed), "sets": [json.loads(text) for text in sets]}
        whole["sources"] = dict(self._sources)
        self._result.with_suffix(".part").write_text(json.dumps(whole))
        self._result.with_suffix(".part").rename(self._result)
