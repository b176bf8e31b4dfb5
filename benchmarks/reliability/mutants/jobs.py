"""Runs of pytest in forked processes, in copies of the tree, several at a time."""

from __future__ import annotations

import compileall
import contextlib
import math
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability.mutants.drawing import ROOT, hash_of

# Files that are not copied. Only the tree's own text is.
_LEFT_OUT = shutil.ignore_patterns(
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


def left_out(folder: str, names: list[str]) -> set[str]:
    """Return the names in a folder that are not copied.

    The runs of `results/` are not, but the package of that name is.
    """
    return {*_LEFT_OUT(folder, names), *({"runs"} if Path(folder) == ROOT / "results" else ())}


def copy_tree(folder: Path) -> None:
    """Copy the repository so that its own package is found before the installed one.

    An existing copy stays unless files have changed or a mutant was left in it.
    """
    files = [path for name in ("autodistill", "evaluators", "tests") for path in sorted((ROOT / name).rglob("*.py"))]
    stamp, state = folder.with_suffix(".copied"), hash_of(*files)
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
