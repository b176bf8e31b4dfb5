"""Crashes and failing disks, one after another: a resumed search finds the same as an undisturbed one."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tests.crash.disk import MODELS, State, replay, states
from tests.crash.kernel import Call
from tests.crash.searches import Found, Slot, Spoken

# Calls that may fail because the disk is full or broken. Files can still be removed from a full disk.
FAILING = ("create", "write", "truncate", "sync", "rename", "link", "mkdir")
ERRORS = {
    "EIO": "one call fails with EIO",
    "ENOSPC": "one call fails with ENOSPC",
    "full": "this call and all that would take room after it fail with ENOSPC",
    "read-only": "this call and all that would change a file or a folder after it fail with EROFS",
}
_NUMBERS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "full": errno.ENOSPC, "read-only": errno.EROFS}
# Calls that fail after the first failure: those that take space on a full disk, and all on a read-only one.
_LATER = {"full": ("create", "write", "mkdir"), "read-only": (*FAILING, "unlink", "rmdir")}


Job = Callable[[Slot], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """The disk fails at the n-th call that may fail, counted from 1. `error` is a name in `ERRORS`."""

    error: str
    call: int


def faults(calls: Sequence[Call]) -> list[Fault]:
    """Return every error at every call that may fail."""
    count = sum(call.name in FAILING for call in calls)
    return [Fault(error=error, call=number) for error in ERRORS for number in range(1, count + 1)]


def after_crash(slot: Slot, calls: Sequence[Call], state: State, whole: Found) -> dict[str, Any]:
    """Resume from a state, and return the outcome."""
    slot.clear()
    replay(calls, state, slot.disk)
    last = calls[state.calls - 1] if state.calls else None
    at = f"{last.name} {last.path}" if last else "nothing"
    return {"kind": state.model, "calls": state.calls, "prefixes": state.prefixes, "at": at, **_gone_on(slot, whole)}


def _gone_on(slot: Slot, whole: Found) -> dict[str, Any]:
    """Resume the run of a slot, or start one if there is none. Return the outcome and what was wrong with it."""
    there = (slot.run / "search.json").exists()
    spoken = slot.search("--resume")
    outcome = "resumed"
    if not there:
        said = " ".join(spoken.errors)
        if spoken.ended.code != 2 or spoken.complaint or "there is no run" not in said:
            return _judged("not begun", [f"--resume without a run: {spoken.complaint or said}"], spoken)
        spoken = slot.search()
        outcome = "begun anew"
    if spoken.ended.code != 0 or spoken.complaint:
        wrong = [spoken.complaint or f"exit code {spoken.ended.code}: {' '.join(spoken.errors)}"]
        return _judged(f"not {outcome}", wrong, spoken)
    return _judged(outcome, slot.found().unlike(whole), spoken)


def _judged(outcome: str, wrong: list[str], spoken: Spoken) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "wrong": wrong[:8],
        "seconds": spoken.ended.seconds,
        "cpu_seconds": spoken.ended.cpu_seconds,
    }


def on_failing_disk(slot: Slot, fault: Fault, whole: Found) -> dict[str, Any]:
    """Search on a disk that fails once or from then on, resume when the disk works again, and return the outcome."""
    slot.clear()
    count, struck = 0, ""

    def decide(call: Call) -> int:
        nonlocal count, struck
        count += call.name in FAILING
        now = not struck and count == fault.call
        if now:
            struck = f"{call.name} {call.path}"
        return _NUMBERS[fault.error] if now or (struck and call.name in _LATER.get(fault.error, ())) else 0

    spoken = slot.search(decide=decide)
    kept = slot.found().rows
    facts = {"kind": fault.error, "call": fault.call, "at": struck, "code": spoken.ended.code}
    wrong = [spoken.complaint] if spoken.complaint else []
    if not struck:
        return {**facts, "outcome": "not struck", "wrong": wrong, "said": "", "seconds": spoken.ended.seconds}
    unlike = slot.found().unlike(whole)
    said = spoken.errors[0] if spoken.errors else ""
    if spoken.ended.code == 0 and not unlike:
        outcome = {"outcome": "went on", "wrong": wrong, "seconds": spoken.ended.seconds}
        return {**facts, "said": said, **outcome}
    after = _gone_on(slot, whole)
    lost = [f"{name} was kept, and is gone" for name in kept if name not in slot.found().rows]
    return {**facts, "said": said, **after, "wrong": [*wrong, *after["wrong"], *lost]}


def many(jobs: Mapping[int, Job], work: Path, results: Path, *, until: float, processes: int = 2) -> None:
    """Run jobs in separate processes, each on a core, until all are done or `time.monotonic()` reaches `until`.

    Each result is a line of a file. Jobs whose numbers are already in the file are not repeated. The processes are
    forks of this one, so `settle` must have been called.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    done = {json.loads(line)["job"] for line in results.read_text().splitlines()} if results.exists() else set()
    waiting = [number for number in jobs if number not in done]
    children = []
    for number in range(processes):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(writing)
                os.sched_setaffinity(0, [number % (os.cpu_count() or 1)])
                _work(reading, jobs, Slot(work / f"slot-{number}"), results, until)
                code = 0
            except BaseException:  # a fork must never continue as its parent
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    os.close(reading)
    os.set_blocking(writing, True)
    try:
        for job in waiting:
            os.write(writing, struct.pack("=I", job))
    except BrokenPipeError:
        pass  # the time is over for all of them
    os.close(writing)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise AssertionError("a process that does jobs has failed")


def _work(reading: int, jobs: Mapping[int, Job], slot: Slot, results: Path, until: float) -> None:
    while time.monotonic() < until and (said := os.read(reading, 4)):
        (number,) = struct.unpack("=I", said)
        line = json.dumps({"job": number, **jobs[number](slot)}) + "\n"
        with results.open("a") as file:
            file.write(line)


def sample(seed: int, kinds: Sequence[Sequence[Any]]) -> list[Any]:
    """Return all items of several kinds in turns, in an order that a seed decides; a prefix has as many of each kind.

    Args:
        seed: Seed of the order.
        kinds: The items of each kind.
    """
    dice = random.Random(seed)
    shuffled = [dice.sample(kind, len(kind)) for kind in kinds]
    return [item for turn in zip_longest(*shuffled) for item in turn if item is not None]


def jobs_of(calls: Sequence[Call], whole: Found, seed: int, only: Collection[str] = ()) -> dict[int, Job]:
    """Return every crash and fault that a record of calls allows, by its number in the order of `sample`.

    Args:
        calls: The calls of an undisturbed search.
        whole: What that search found.
        seed: Seed of the order.
        only: The wanted kinds, names in `MODELS` and `ERRORS`. All by default.
    """
    kinds: dict[str, list[Any]] = {name: [] for name in (*MODELS, *ERRORS)}
    for state in states(calls):
        kinds[state.model].append(state)
    for fault in faults(calls):
        kinds[fault.error].append(fault)

    def job(item: State | Fault) -> Job:
        if isinstance(item, Fault):
            return lambda slot: on_failing_disk(slot, item, whole)
        return lambda slot: after_crash(slot, calls, item, whole)

    def wanted(item: State | Fault) -> bool:
        return not only or (item.error if isinstance(item, Fault) else item.model) in only

    order = sample(seed, [*kinds.values()])
    return {number: job(item) for number, item in enumerate(order) if wanted(item)}
