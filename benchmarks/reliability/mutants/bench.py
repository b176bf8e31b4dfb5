"""The place where mutants are run: it knows what each test reaches, and tries those that reach a mutant."""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.reliability.mutants.drawing import CORE, ROOT, hash_of, id_of, near
from benchmarks.reliability.mutants.jobs import Job, copy_tree, forked, in_parallel
from benchmarks.reliability.mutants.mutations import Mutation, marked
from benchmarks.reliability.mutants.tracing import REACHED, Sources, Tracer

# Modules of AutoDistill that are imported once for all traced test files, by a process that has them with their marks.
_OURS = ("autodistill.cli.app", "autodistill.search.search", "autodistill.testing")
# A run hangs if it takes more than this many seconds plus this many times the seconds of its tests without a mutant.
_SLACK, _TIMES = 60, 5
# Processor seconds of the module's own tests, and of others, that are tried first.
_FIRST_OWN, _FIRST_OTHERS = 30.0, 10.0


@dataclass(kw_only=True)
class TracedTest:
    """One test: its processor seconds without a mutant, and the lines of the core that it reaches."""

    name: str
    seconds: float
    reached: frozenset[tuple[str, int]]

    @property
    def file(self) -> str:
        """The test's file."""
        return self.name.partition("::")[0]

    @cached_property
    def modules(self) -> frozenset[str]:
        """The modules with lines that the test reaches."""
        return frozenset(module for module, _ in self.reached)


class Chosen:
    """Runs only some tests, in the order of their files, and records the first that fails."""

    fails = True

    def __init__(self, names: Sequence[str], result: Path) -> None:
        self._names, self._result = set(names), result
        self._result.unlink(missing_ok=True)

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keep only the chosen tests."""
        items[:] = [item for item in items if item.nodeid in self._names]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write down the first test that fails."""
        if report.failed and not self._result.exists():
            self._result.write_text(report.nodeid)

    def pytest_collectreport(self, report: Any) -> None:
        """Write down a file that cannot be imported."""
        if report.failed and not self._result.exists():
            self._result.write_text(f"{report.nodeid} (when it was imported)")


@dataclass(kw_only=True)
class Bench:
    """The place where mutants are run, and what is known about the tests."""

    work: Path
    jobs: int
    files: Sequence[Path] | None = None
    tests: list[TracedTest] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    imported: frozenset[tuple[str, int]] = frozenset()

    def trace(self, until: float) -> bool:
        """Find out what each test reaches, unless it is known. Return False if the time was up first."""
        own = {f"test_{Path(name).stem}.py" for name in CORE}
        # Test files of the core's own modules come first, because they find most.
        found = self.files and [path.resolve() for path in self.files]
        files = sorted(found or (ROOT / "tests").rglob("test_*.py"), key=lambda path: (path.name not in own, path))
        shared = hash_of(*sorted((ROOT / "tests").rglob("conftest.py")), more="\n".join(CORE))
        (self.work / "reached").mkdir(parents=True, exist_ok=True)
        sources = Sources(self.work / "sources")
        results = {path: self.work / "reached" / f"{hash_of(path, more=shared)}.json" for path in files}
        imported = self.work / "imported.json"
        missing = [path for path in files if not results[path].exists()]
        if missing:
            print(f"{len(missing)} of {len(files)} test files run with marks in the core", flush=True)
            tree = self.work / "marked"
            copy_tree(tree)
            (tree / "autodistill_reached.py").write_text(REACHED)
            for name in CORE:
                (tree / name).write_text(marked(name, (ROOT / name).read_text()))
            # Each place has a folder of its own for temporary files.
            for place in range(self.jobs):
                (self.work / f"marked-{place}").unlink(missing_ok=True)
                (self.work / f"marked-{place}").symlink_to("marked")

            def traced(path: Path) -> Callable[[int], Iterator[Job]]:
                """Return the work of running one test file in the marked tree."""

                def steps(place: int) -> Iterator[Job]:
                    """Run it at a place, and keep what its tests reached."""
                    name = str(path.relative_to(ROOT))
                    log = self.work / "logs" / f"{name.replace('/', '.')}.txt"
                    log.parent.mkdir(exist_ok=True)
                    job = Job(self.work / f"marked-{place}", [name], Tracer(results[path], sources.hashes), log, 1200)
                    yield job
                    said = "" if results[path].exists() else f", nothing found: see {log}"
                    print(f"{name}: {job.seconds:.0f} s{said}", flush=True)

                return steps

            def run() -> None:
                sys.path.insert(0, str(tree))
                for name in _OURS:
                    importlib.import_module(name)
                lines = sorted(sys.modules["autodistill_reached"].seen)
                imported.write_text(json.dumps({"lines": lines, "sources": sources.hashes}))
                in_parallel(self.jobs, [traced(path) for path in missing], until)

            forked(run)
            if left := sum(not path.exists() for path in results.values()):
                print(f"{left} test files are left, or could not be run: see {self.work / 'logs'}")
                return False
        if imported.exists():
            found = json.loads(imported.read_text())
            self.imported = frozenset(sources.today(found["lines"], found["sources"]))
        for path in files:
            if results[path].exists():
                found = json.loads(results[path].read_text())
                sets = [frozenset(sources.today(lines, found["sources"])) for lines in found["sets"]]
                self.tests += [TracedTest(name=n, seconds=s, reached=sets[index]) for n, s, index in found["tests"]]
                self.left_out += found["left out"]
        return True

    def tests_of(self, mutant: Mutation) -> list[TracedTest]:
        """Return the tests that reach a mutant: the module's own first, then file by file, the cheapest first."""
        own = f"test_{Path(mutant.module).stem}.py"
        place = (mutant.module, mutant.reached)
        # Any test that uses the module can see what runs once, at its import.
        once = mutant.reached is None or place in self.imported
        found = [t for t in self.tests if place in t.reached or (once and mutant.module in t.modules)]
        if not found:
            close = {str(path.relative_to(ROOT)) for path in near([mutant.module])}
            found = [t for t in self.tests if t.file in close]
        costs: Counter[str] = Counter()
        for test in found:
            costs[test.file] += test.seconds  # type: ignore[assignment]
        return sorted(found, key=lambda t: (Path(t.file).name != own, costs[t.file], t.file, t.seconds))

    def try_out(self, mutant: Mutation, limit: float, tell: Callable[[dict[str, Any]], None]) -> Any:
        """Return work that runs the tests that reach a mutant until one fails, and reports the verdict."""
        tests, began = self.tests_of(mutant), time.monotonic()
        own = f"test_{Path(mutant.module).stem}.py"
        stages: list[list[TracedTest]] = [[], []]
        spent = [0.0, 0.0, 0.0]
        for test in tests:
            is_own = Path(test.file).name == own
            if spent[0 if is_own else 1] + test.seconds < (_FIRST_OWN if is_own else _FIRST_OTHERS):
                spent[0 if is_own else 1] += test.seconds
                stages[0].append(test)
            elif sum(spent) + test.seconds < limit:
                spent[2] += test.seconds
                stages[1].append(test)

        def steps(place: int) -> Iterator[Job]:
            """Put the change into the tree of a place, and run stage after stage until a test fails."""
            folder = self.work / f"tree-{place}"
            target, result = folder / mutant.module, self.work / f"failed-{place}.txt"
            whole, stamp, seconds, verdict, by = target.read_bytes(), target.stat(), 0.0, "survived", ""
            copied = folder.with_suffix(".copied")
            state = copied.read_text()
            try:
                copied.unlink()
                target.write_text(mutant.source())
                os.utime(target, (stamp.st_atime, stamp.st_mtime + random.Random(id_of(mutant)).randrange(1, 10**6)))
                for number, stage in enumerate(stages):
                    if not stage:
                        continue
                    files = list(dict.fromkeys(test.file for test in stage))
                    allowed = _SLACK + _TIMES * sum(test.seconds for test in stage)
                    log = self.work / "logs" / f"mutant-{id_of(mutant)}-{number}.txt"
                    log.parent.mkdir(exist_ok=True)
                    job = Job(folder, files, Chosen([test.name for test in stage], result), log, allowed)
                    yield job
                    seconds += job.seconds
                    if job.code < 0:
                        verdict, by = "found", "it does not end"
                    elif job.code not in (0, 5):
                        verdict, by = (
                            "found",
                            result.read_text() if result.exists() else "that the tests cannot be loaded",
                        )
                    if verdict == "found":
                        break
            finally:
                target.write_bytes(whole)
                os.utime(target, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
                copied.write_text(state)
            tell(
                {
                    "verdict": verdict if tests else "not reached",
                    "by": by,
                    "tests": sum(map(len, stages)),
                    "of": len(tests),
                    "cpu_seconds": round(seconds, 1),
                    "seconds": round(time.monotonic() - began, 1),
                }
            )

        return steps
