"""Random wrong changes of the core's lines, drawn by a seed, and how many of them the tests find.

    python -m benchmarks.reliability.mutants [--mutants 100] [--seed 0] [--jobs 2] [--limit 120] [--stop-after S]

First, test files run once over a copy of the tree whose core marks every statement that is reached. This shows which
tests reach which lines, and the cost of each test. The files are those in the folder of the mutated module (`tests/`
has the folders of `autodistill/`) that name it. `--wide` tries survivors once more, with all files of that folder, and
with those of other folders that name the module. `--all-tests` takes every file, whole searches included, and
takes an hour of a processor more. A mutant is then run against the tests that reach its line, the module's own and the
cheapest files first, until one fails. A mutant whose tests take far longer than without it counts as found too.
`--limit` is the processor time that the tests of one mutant may take, as measured without the mutant.

`--again` tries the survivors in the record of a seed, and keeps the other verdicts. After a change of the core, the
same seed would draw other mutants.

Results are kept in `--work`, and the same command continues there. A test file that has changed is run again, and so
are mutants that survived before tests changed. After a change of the core, no test is run again to see what it reaches.
Lines that moved are followed, and a new line belongs to the statement that it replaces or follows. To begin anew,
remove the folder. Mutants whose change no test could see are named in `mutants_equivalent.yaml`, with the reason for
each.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import difflib
import fcntl
import hashlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.common import program
from benchmarks.reliability.mutations import Mutation, marked, mutations

ROOT = program.ROOT
EQUIVALENT = Path(__file__).with_name("mutants_equivalent.yaml")
GOAL = 0.95

# The files that must be correct: the mathematics of training, storage and estimates, and what is chosen and reported.
CORE = tuple(Path(__file__).with_name("mutants_core.txt").read_text().split())
# These are imported once, before a process is forked for each run. None of them is part of AutoDistill.
LIBRARIES = (
    "compressed_tensors",
    "gguf",
    "hypothesis.extra.numpy",
    "numba",
    "optuna",
    "pyarrow.parquet",
    "ray",
    "torch.distributed.tensor",
    "transformers.models.llama.modeling_llama",
    "typer.testing",
)
# Modules of AutoDistill that are imported once for all traced test files, by a process that has them with their marks.
OURS = ("autodistill.cli.app", "autodistill.search.search", "autodistill.testing")
# Files that are not copied. Only the tree's own text is.
LEFT_OUT = shutil.ignore_patterns(
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    "*.egg-info",
)
# A run hangs if it takes more than this many seconds plus this many times the seconds of its tests without a mutant.
SLACK, TIMES = 60, 5
# Processor seconds of the module's own tests, and of others, that are tried first.
FIRST_OWN, FIRST_OTHERS = 30.0, 10.0

_REACHED = '''"""Notes which statements are reached: in the tests' own process in `seen`, in others in a file."""
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


@dataclass(kw_only=True)
class Test:
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


def left_out(folder: str, names: list[str]) -> set[str]:
    """Return the names in a folder that are not copied.

    The runs of `results/` are not, but the package of that name is.
    """
    return {*LEFT_OUT(folder, names), *({"runs"} if Path(folder) == ROOT / "results" else ())}


def copy_tree(folder: Path) -> None:
    """Copy the repository so that its own package is found before the installed one.

    An existing copy stays unless files have changed or a mutant was left in it.
    """
    files = [path for name in ("autodistill", "evaluators", "tests") for path in sorted((ROOT / name).rglob("*.py"))]
    stamp, state = folder.with_suffix(".copied"), _hash(*files)
    if stamp.exists() and stamp.read_text() == state:
        return
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT, folder, ignore=left_out, symlinks=True)
    for name in ("evaluators", "search_spaces"):
        (folder / "autodistill" / name).symlink_to(f"../{name}")
    compileall.compile_dir(folder / "autodistill", quiet=2)
    stamp.write_text(state)


class Job:
    """One run of pytest in a process of its own, forked from this one.

    Attributes:
        code: pytest's exit status, or the negative signal that ended it.
        seconds: Processor seconds, including those of processes that it waited for.
    """

    def __init__(self, folder: Path, arguments: Sequence[str], plugin: Any, log: Path, allowed: float) -> None:
        self.code, self.seconds, self._ends = 0, 0.0, time.monotonic() + 20 * allowed
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                code = self._run(folder, arguments, plugin, log, allowed)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    @staticmethod
    def _run(folder: Path, arguments: Sequence[str], plugin: Any, log: Path, allowed: float) -> int:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        seconds = int(allowed)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
        os.chdir(folder)
        sys.path[:] = [str(folder), *(part for part in sys.path if Path(part or ".").resolve() != ROOT)]
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "REACHED_IN": str(os.getpid())}
        sys.dont_write_bytecode = True
        options = ["-q", "-p", "no:cacheprovider", f"--basetemp={folder}.tmp", "--hypothesis-seed=0", "-x"]
        return int(pytest.main([*(options if plugin.fails else options[:-1]), *arguments], plugins=[plugin]))

    def ended(self) -> bool:
        """Return whether the process has ended. A process that takes too long is killed."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if pid:
            self.code, self.seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if pid or time.monotonic() > self._ends:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        return bool(pid)


def forked(work: Callable[[], None]) -> None:
    """Do some work in a forked process, which may import what this one must not import."""
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        code = 70
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.waitpid(child, 0)


def in_parallel(jobs: int, work: Sequence[Callable[[int], Iterator[Job]]], until: float = math.inf) -> None:
    """Run pieces of work. Each yields jobs one after another, in the place that it is given.

    After `until`, by `time.monotonic`, no further one is begun.
    """
    waiting, free = list(reversed(work)), list(range(jobs))
    running: list[tuple[int, Iterator[Job], Job]] = []
    while waiting or running:
        if time.monotonic() > until:
            waiting.clear()
        while waiting and free:
            place = free.pop()
            steps = waiting.pop()(place)
            if (job := next(steps, None)) is not None:
                running.append((place, steps, job))
            else:
                free.append(place)
        for one in list(running):
            place, steps, job = one
            if job.ended():
                running.remove(one)
                if (following := next(steps, None)) is not None:
                    running.append((place, steps, following))
                else:
                    free.append(place)
        time.sleep(0.05)


class Sources:
    """The core's files now and as they were traced. So a change of them needs no new run of the tests.

    Args:
        folder: Keeps each traced state of a file, by its hash.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._texts = {name: (ROOT / name).read_text() for name in CORE}
        self.hashes = {name: _hash(ROOT / name) for name in CORE}
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
    tests: list[Test] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    imported: frozenset[tuple[str, int]] = frozenset()

    def trace(self, until: float) -> bool:
        """Find out what each test reaches, unless it is known. Return False if the time was up first."""
        own = {f"test_{Path(name).stem}.py" for name in CORE}
        # Test files of the core's own modules come first, because they find most.
        found = self.files and [path.resolve() for path in self.files]
        files = sorted(found or (ROOT / "tests").rglob("test_*.py"), key=lambda path: (path.name not in own, path))
        shared = _hash(*sorted((ROOT / "tests").rglob("conftest.py")), more="\n".join(CORE))
        (self.work / "reached").mkdir(parents=True, exist_ok=True)
        sources = Sources(self.work / "sources")
        results = {path: self.work / "reached" / f"{_hash(path, more=shared)}.json" for path in files}
        imported = self.work / "imported.json"
        missing = [path for path in files if not results[path].exists()]
        if missing:
            print(f"{len(missing)} of {len(files)} test files run with marks in the core", flush=True)
            tree = self.work / "marked"
            copy_tree(tree)
            (tree / "autodistill_reached.py").write_text(_REACHED)
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
                for name in OURS:
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
                self.tests += [Test(name=n, seconds=s, reached=sets[index]) for n, s, index in found["tests"]]
                self.left_out += found["left out"]
        return True

    def tests_of(self, mutant: Mutation) -> list[Test]:
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
        stages: list[list[Test]] = [[], []]
        spent = [0.0, 0.0, 0.0]
        for test in tests:
            is_own = Path(test.file).name == own
            if spent[0 if is_own else 1] + test.seconds < (FIRST_OWN if is_own else FIRST_OTHERS):
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
                os.utime(target, (stamp.st_atime, stamp.st_mtime + random.Random(_id(mutant)).randrange(1, 10**6)))
                for number, stage in enumerate(stages):
                    if not stage:
                        continue
                    files = list(dict.fromkeys(test.file for test in stage))
                    allowed = SLACK + TIMES * sum(test.seconds for test in stage)
                    log = self.work / "logs" / f"mutant-{_id(mutant)}-{number}.txt"
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


def _hash(*paths: Path, more: str = "") -> str:
    found = hashlib.sha256(more.encode())
    for path in paths:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _id(mutant: Mutation) -> str:
    said = (mutant.module, str(mutant.line), mutant.kind, mutant.before, mutant.after)
    return hashlib.sha256("\0".join(said).encode()).hexdigest()[:12]


def near(modules: Iterable[str], wide: Iterable[str] = ()) -> list[Path]:
    """Return the test files that are named after files of the core, or are in the folder of one and import it.

    Args:
        modules: Modules of the core.
        wide: Modules for which the other files of the folder count too, and files of other folders that import it.
    """
    found = set()
    for module in wide:
        path = Path(module)
        found.update((ROOT / "tests" / path.parent.relative_to(path.parts[0])).glob("test_*.py"))
        dotted = ".".join((*path.parent.parts, path.stem))
        found.update(test for test in (ROOT / "tests").rglob("test_*.py") if dotted in test.read_text(encoding="utf-8"))
    for module in modules:
        path = Path(module)
        folder = ROOT / "tests" / path.parent.relative_to(path.parts[0])
        dotted = f"{'.'.join(path.parent.parts)}.{path.stem}"
        apart = f"from {'.'.join(path.parent.parts)} import {path.stem}"
        for test in folder.glob("test_*.py"):
            text = test.read_text(encoding="utf-8")
            if test.stem == f"test_{path.stem}" or dotted in text or apart in text:
                found.add(test)
        found.update((ROOT / "tests").rglob(f"test_{path.name}"))
    return sorted(found)


def core_of(files: Sequence[Path] | None) -> list[str]:
    """Return the core's files that test files are named after, or all of them without test files."""
    return [name for name in CORE if not files or f"test_{Path(name).name}" in {path.name for path in files}]


def drawn(count: int, seed: int, core: Sequence[str]) -> list[Mutation]:
    """Return `count` mutations of some of the core's files. All are equally likely."""
    every = [one for name in core for one in mutations(name, (ROOT / name).read_text())]
    return random.Random(seed).sample(every, min(count, len(every)))


def _whole_id(mutant: Mutation) -> str:
    """Return an id of a mutant and of its whole file."""
    return _id(mutant) + _hash(ROOT / mutant.module)


def record_of(seed: int) -> Path:
    """Return the file that keeps the verdicts of a seed's mutants."""
    return program.REPORTS / (f"mutants-{seed}.jsonl" if seed else "mutants.jsonl")


def still_there(survivors: Iterable[Mapping[str, Any]]) -> dict[int, Mutation]:
    """Return the mutants of a record by number, in the current core. Those whose statement is gone are left out.

    A mutant that is not in its file is searched in the folder's other files, because a file may have been divided.
    """
    found = {}
    for one in survivors:
        folder = [name for name in CORE if Path(name).parent == Path(one["module"]).parent]
        for name in sorted(folder, key=lambda name: name != one["module"]):
            made = mutations(name, (ROOT / name).read_text())
            alike = [m for m in made if (m.kind, m.before, m.after) == (one["kind"], one["before"], one["after"])]
            if alike:
                found[one["number"]] = min(alike, key=lambda mutant: abs(mutant.line - one["line"]))
                break
    return found


def equivalents() -> dict[tuple[str, str, str | None], str]:
    """Return the reason for each known mutant without effect, by module, before and after.

    Where nothing is named that a statement becomes, none of its mutants has an effect.
    """
    listed = yaml.safe_load(EQUIVALENT.read_text()) or []
    return {(one["module"], one["before"], one.get("after")): one["why"] for one in listed}


def without_effect(mutant: Mutation, same: Mapping[tuple[str, str, str | None], str]) -> str | None:
    """Return why no test could see a mutant, or None if one could."""
    statement = mutant.before.partition("  [")[0]
    return same.get((mutant.module, mutant.before, mutant.after)) or same.get((mutant.module, statement, None))


def main() -> int:
    """Try wrong changes of the core's lines, write the report, and return the exit code."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--mutants", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="that draws them")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="at once")
    parser.add_argument("--limit", type=float, default=120.0, help="processor seconds of tests for one mutant")
    parser.add_argument("--work", type=Path, default=ROOT / "results" / "runs" / "mutants", help="folder that is kept")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="seconds after which nothing more is begun")
    parser.add_argument("--trace-only", action="store_true", help="end once it is known what each test reaches")
    parser.add_argument("--again", action="store_true", help="try what survived in the record; the rest stays as it is")
    parser.add_argument("--wide", action="store_true", help="try what survived once more, by tests farther away")
    parser.add_argument("--all-tests", action="store_true", help="trace every test file, not those near a mutant alone")
    parser.add_argument(
        "--files", nargs="+", type=Path, help="test files, whose modules alone are changed; all by default"
    )
    small = {"mutants": 3, "files": [Path("tests/distillation/losses/test_schedules.py")], "work": None}
    options = program.parse(parser, **small)
    began = time.monotonic()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in LIBRARIES:
        importlib.import_module(name)
    options.work = (options.work or Path(tempfile.mkdtemp())).resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    with (options.work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            parser.error(f"{options.work} is in use by another run: wait for it, or give another --work")
        return measure(options, began)


def measure(options: argparse.Namespace, began: float) -> int:
    """Trace the tests, run the drawn mutants, and report them. Return 3 if the time was up first."""
    same, made = equivalents(), _stamp()
    log = options.work / "verdicts.jsonl"
    earlier = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    record: list[dict[str, Any]] = []
    if options.again:
        kept = {one["number"]: one for one in map(json.loads, record_of(options.seed).read_text().splitlines())}
        mutants = still_there(one for one in kept.values() if one["verdict"] not in ("found", "equivalent"))
        record = [one for number, one in kept.items() if number not in mutants]
        earlier = [kept[number] | {"id": _whole_id(one), "with": ""} for number, one in mutants.items()] + earlier
    else:
        mutants = dict(enumerate(drawn(options.mutants, options.seed, core_of(options.files))))
    count = len(record) + len(mutants)
    known: dict[str, dict[str, Any]] = {}
    survived: dict[tuple[str, bool], str] = {}  # by the mutant and whether wide: a hash of the tests
    for one in earlier:
        known[one["id"]] = one
        if one["verdict"] != "found":
            survived[one["id"], one.get("wide", False)] = one["with"]
    wide = {one["module"] for one in known.values() if options.wide and one["verdict"] != "found"}
    close = None if options.all_tests else near({one.module for one in mutants.values()}, wide)
    bench = Bench(work=options.work, jobs=options.jobs, files=options.files or close)
    if mutants and not bench.trace(began + options.stop_after):
        return 3
    traced = time.monotonic() - began
    if options.trace_only:
        return 0

    tests = _hash(*sorted((ROOT / "tests").rglob("*.py")))
    work, again = [], []
    for number, mutant in mutants.items():
        said = {
            "id": _whole_id(mutant),
            "number": number,
            "seed": options.seed,
            "module": mutant.module,
            "line": mutant.line,
            "kind": mutant.kind,
            "before": mutant.before,
            "after": mutant.after,
        }
        if why := without_effect(mutant, same):
            record.append(said | {"verdict": "equivalent", "by": why})
            continue
        before = known.get(_whole_id(mutant))
        if before and (
            before["verdict"] == "found" or (before["with"] == tests and before.get("wide", False) >= options.wide)
        ):
            record.append(before | said)
            continue

        def tell(found: dict[str, Any], said: dict[str, Any] = said) -> None:
            one = said | found | {"with": tests, "made": made, "wide": options.wide}
            record.append(one)
            with log.open("a") as file:
                file.write(json.dumps(one) + "\n")
            print(f"{len(record)}/{count} {_told(one)}", flush=True)

        # Mutants that survived earlier tests come after all unknown ones.
        (again if before else work).append(bench.try_out(mutant, options.limit, tell))
    if work := work + again:
        for place in range(options.jobs):
            copy_tree(options.work / f"tree-{place}")
        in_parallel(options.jobs, work, began + options.stop_after)
    if left := count - len(record):
        print(f"{left} mutants are left: the same command goes on with them")
        return 3
    record.sort(key=lambda one: one["number"])
    for one in (one for one in record if one["number"] in mutants):
        wide, found = one.get("wide", False), one["verdict"] == "found"
        nearest = survived.get((one["id"], False))
        # If tests changed since the nearest missed it, nobody knows whether a test farther away or a new one finds it.
        one["once_survived"] = found and ((one["id"], wide) in survived or nearest not in (None, tests))
        one["found_wide"] = found and wide and not one["once_survived"] and nearest is not None
    return tell_all(record, traced, bench, options)


def _stamp() -> dict[str, str]:
    """Return date and machine from another process, because this one may not import our modules before it forks."""
    program = "import json; from benchmarks.common import report; print(json.dumps(report.stamp()))"
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(said))


def _told(one: dict[str, Any]) -> str:
    by = f" by {one['by']}" if one["by"] else ""
    place = f"{one['module']}:{one['line']}"
    change = f"{one['kind']}: {one['before'][:160]} -> {one['after'][:80]}"
    return f"{one['verdict']}{by}, {place}, {change} ({one.get('cpu_seconds', 0)} s, {one.get('tests', 0)} tests)"


def tell_all(record: list[dict[str, Any]], traced: float, bench: Bench, options: argparse.Namespace) -> int:
    """Print the score and the survivors, and write the record and the report. Return 1 if the goal is missed."""
    from benchmarks.common import report

    kept = record_of(options.seed)
    counts = Counter(one["verdict"] for one in record)
    counted = len(record) - counts["equivalent"]
    score = counts["found"] / counted
    alive = [one for one in record if one["verdict"] in ("survived", "not reached")]
    for one in alive:
        print(_told(one))
    spent = sum(one.get("cpu_seconds", 0) for one in record)
    summary = (
        f"{counts['found']} of {counted} mutants are found ({score:.1%}); {counts['equivalent']} more of the "
        f"{len(record)} drawn change nothing"
    )
    print(summary)
    kept.write_text("".join(json.dumps({k: v for k, v in one.items() if k != "with"}) + "\n" for one in record))
    modules = Counter(one["module"] for one in record)
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in CORE)
    core = f"{len(CORE)} files of {lines:,} lines"
    if options.again:
        core = f"the core as it was on {min(one['made']['date'] for one in record if 'made' in one)}"
    late = sum(one["once_survived"] for one in record)
    before = counts["found"] - late
    wider = sum(one.get("found_wide", False) for one in record)
    by_others = f"{wider} are found by tests farther away, of the same folder or of another. " if wider else ""
    cut = sum(one.get("of", 0) > one.get("tests", 0) for one in alive)

    def shown(text: str) -> str:
        return "`" + text[:100].replace("|", "\\|").replace("`", "'") + "`"

    report.write(
        kept.stem,
        "What of wrong changes the tests find",
        [
            f"**{summary}.** Seed {options.seed}, out of all mutations of {core}: "
            f"`benchmarks/reliability/mutations.py` says which kinds. `{kept.name}` beside this names each with the "
            f"test that finds it. The tests of one mutant may take {options.limit:.0f} s of a processor; of {cut} "
            f"survivors some were left out for that. {late} of those found survived an earlier run: tests farther away "
            f"find them, or were written for them since: before, {before} of {counted} were found "
            f"({before / counted:.1%}), and {before} of all {len(record)} ({before / len(record):.1%}) if those that "
            f"change nothing count as not found. {by_others}"
            f"{options.jobs} at a time; the mutants took {spent / 60:.0f} minutes of a processor.",
            "## Survivors",
            report.table(
                ("place", "change", "before", "after"),
                [(f"{o['module']}:{o['line']}", o["kind"], shown(o["before"]), shown(o["after"])) for o in alive],
            )
            if alive
            else "None.",
            "## Those that change nothing",
            "\n".join(
                f"- {o['module']}:{o['line']}, {shown(o['before'])} becomes {shown(o['after'])}: {o['by']}"
                for o in record
                if o["verdict"] == "equivalent"
            )
            or "None of those drawn.",
            "## By file",
            report.table(
                ("file", "mutants", "found"),
                [
                    (name, count, sum(o["module"] == name and o["verdict"] == "found" for o in record))
                    for name, count in sorted(modules.items())
                ],
            ),
        ],
        kept,
    )
    return int(score < GOAL and not options.smoke)


if __name__ == "__main__":
    raise SystemExit(main())
