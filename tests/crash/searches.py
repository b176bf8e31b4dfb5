"""Tiny searches in forks of this process, each on one core in a folder of its own: run, resumed, and compared."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autodistill.cli.app import main as main_of_autodistill
from autodistill.runs.events import RowTested
from autodistill.runs.results.row import Row
from autodistill.runs.run_log import RunLog
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.event_log import EventLog
from autodistill.utils.hashing import file_hash
from benchmarks.reliability.kill import differences
from tests.crash.kernel import Call, Ended, watched

_SPACE = """
name: crash
description: Few of everything, for a search that is over in seconds.
dimensions:
  init: {choices: {shallow: {ffn: 1.0}}}
  init.depth: {low: 0.6, high: 0.8, step: 0.2}
  distillation.learning_rate: {low: 5e-5, high: 1e-3, log: true}
  finishing: {choices: {none: null, gguf-q8_0: {format: gguf-q8_0, bits: 8, group_size: 32}}}
deployments:
  - {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}
  - {runtime: transformers, format: huggingface, bits: 16, group_size: 0}
baselines: [hand_designed]
"""
_INPUTS = ("--teacher", "../../inputs/teacher", "--data", "../../inputs/text", "--space", "../../inputs/space.yaml")
_PLAN = ("--budget", "16GB", "--context", "256", "--trials", "2", "--tokens", "2304", "--runner", "inline")
_WORDS = ("search", *_INPUTS, *_PLAN, "--name", "run", "--runs", "runs", "--cache", "cache", "--json")
_SECONDS = 900.0
_EXPORTED = ("student/gguf/student.gguf", "student/huggingface/model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """A search that has ended.

    Attributes:
        ended: How it ended.
        errors: Lines on standard error, from the first one that says "error" or begins a traceback.
    """

    ended: Ended
    errors: tuple[str, ...]

    @property
    def complaint(self) -> str:
        """How it broke the promise of a documented exit code and one line, or "" if it kept the promise."""
        code = self.ended.code
        if code is None:
            return "it did not come to an end"
        if code not in (0, 1, 2, 3):
            return f"exit code {code}: {' | '.join(self.errors)}"
        if code and len(self.errors) != 1:
            return f"{len(self.errors)} lines of error: {' | '.join(self.errors)[-600:]}"
        return f"said at exit code 0: {' | '.join(self.errors)[-600:]}" if not code and self.errors else ""


@dataclass(frozen=True)
class Slot:
    """A folder for one search at a time. Only its `disk` is watched."""

    folder: Path

    @property
    def disk(self) -> Path:
        """The folder that crashes."""
        return self.folder / "disk"

    @property
    def run(self) -> Path:
        """The folder of the search."""
        return self.disk / "runs" / "run"

    def clear(self) -> None:
        """Leave an empty disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.disk.mkdir(parents=True)

    def search(self, *more: str, decide: Callable[[Call], int] = lambda call: 0) -> Spoken:
        """Run the search until it ends. `decide` is passed to `watched`."""
        said = self.folder / "said.txt"

        def work() -> int:
            os.chdir(self.disk)
            os.environ["HOME"] = str(self.folder.parent / "home")
            for number in (1, 2):
                descriptor = os.open(said.with_name(f"said-{number}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                os.dup2(descriptor, number)
                os.close(descriptor)
            code = main_of_autodistill([*_WORDS, *more])
            said.with_name("modules.json").write_text(json.dumps(sorted(sys.modules)))
            return code

        ended = watched(work, self.disk.resolve(), decide, _SECONDS)
        lines = (self.folder / "said-2.txt").read_text(errors="replace").splitlines()
        starts = [index for index, line in enumerate(lines) if line.startswith(("error", "Traceback", "Exception"))]
        return Spoken(ended=ended, errors=tuple(lines[starts[0] :]) if starts else ())

    def events(self) -> list[dict[str, Any]]:
        """Return the log, empty if there is none."""
        return EventLog(self.run / "trials.jsonl").read()

    def found(self) -> Found:
        """Return what the search has found so far."""
        log = RunLog(self.run / "trials.jsonl")
        rows = {f"{row.row_id} validation": row for row in log.rows()}
        rows |= {f"{row.row_id} test": row for row in log.rows(RowTested)}
        files = {name: file_hash(self.run / name) for name in _EXPORTED if (self.run / name).is_file()}
        return Found(rows=rows, files=files)


@dataclass(frozen=True, kw_only=True)
class Found:
    """Rows of validation and test, and hashes of the exported weights."""

    rows: dict[str, Row]
    files: dict[str, str]

    def unlike(self, whole: Found) -> list[str]:
        """Return the differences from another, except for times."""
        lines = [*differences(self.rows, whole.rows)]
        names = sorted(self.files.keys() | whole.files.keys())
        return lines + [f"{name} has other bytes" for name in names if self.files.get(name) != whole.files.get(name)]


def make_inputs(work: Path) -> None:
    """Make a tiny teacher, a tiny text and a small space for all searches below a folder."""
    if not (work / "inputs" / "space.yaml").exists():
        save_tiny_teacher(work / "inputs" / "teacher", layers=5)
        tiny_text(work / "inputs" / "text", documents=30, sentences=24)
        (work / "inputs" / "space.yaml").write_text(_SPACE)
        (work / "home").mkdir(exist_ok=True)


def settle(work: Path) -> None:
    """Prepare this process for forking searches: everything is imported, with one thread, on one core.

    What a search imports while it runs is known from a search that has ended.
    """
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    for name in json.loads((work / "modules.json").read_text()):
        if not name.startswith(("__", "tests", "_pytest")):
            with contextlib.suppress(Exception):  # some modules can only be made by their packages
                importlib.import_module(name)
    # A fork need not look at the imported objects whenever it collects garbage.
    gc.collect()
    gc.freeze()


def record(work: Path) -> tuple[list[Call], Found, Ended]:
    """Run a search from start to end. Return the calls by which it changed files, and what it found."""
    make_inputs(work)
    slot = Slot(work / "whole")
    slot.clear()
    torch.set_num_threads(1)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[:1])
    calls: list[Call] = []

    def see(call: Call) -> int:
        calls.append(call)
        return 0

    spoken = slot.search(decide=see)
    os.sched_setaffinity(0, cores)
    if spoken.ended.code != 0:
        raise AssertionError(f"the search itself ended with {spoken.ended.code}: {spoken.errors}")
    shutil.copyfile(slot.folder / "modules.json", work / "modules.json")
    return calls, slot.found(), spoken.ended
