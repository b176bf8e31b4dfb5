"""Runs hostile inputs, and prints how many there were for each area and command, and what was wrong."""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.hostile.cases import Case, Kit, all_cases
from tests.hostile.server import Ending, Server

FRESH = 50
"""One case in this many also runs in a separate process, as a user's command does, and must end in the same way."""


def runs_fresh(case: Case) -> bool:
    """Return whether a case also runs in a separate process.

    Its name decides this, so that every part or sample has its share of such cases.
    """
    return zlib.crc32(str(case).encode()) % FRESH == 0 and not any("\0" in word for word in case.argv)


def endings(
    cases: Iterable[Case], servers: Sequence[Server], folder: Path, keep: bool = False
) -> Iterator[tuple[Case, Ending, str | None]]:
    """Yield each case in order, with how it ended and what is wrong with that. The folder of a case is removed."""
    free: queue.SimpleQueue[Server] = queue.SimpleQueue()
    for server in servers:
        free.put(server)

    def ended(numbered: tuple[int, Case]) -> tuple[Case, Ending, str | None]:
        number, case = numbered
        server, place = free.get(), folder / f"{number:05d}"
        try:
            ending = server.run(case, place)
            fault = ending.fault(case)
            if fault is None and runs_fresh(case):
                fault = _differs(case, ending, server.run(case, Path(f"{place}-fresh"), fresh=True))
        finally:
            free.put(server)
            if not keep:
                for path in folder.glob(f"{place.name}*"):
                    shutil.rmtree(path, ignore_errors=True)
        return case, ending, fault

    with ThreadPoolExecutor(len(servers)) as pool:
        try:
            yield from pool.map(ended, enumerate(cases))
        finally:
            pool.shutdown(cancel_futures=True)


def _differs(case: Case, forked: Ending, fresh: Ending) -> str | None:
    """Return what is wrong with a case in a separate process, or how it differs from the same case in a fork."""
    fault = fresh.fault(case)
    if fault is None and fresh.code != forked.code:
        fault = f"exit code {fresh.code}, where a fork ends with {forked.code}"
    return fault and f"in a fresh process: {fault}"


def faults(cases: Iterable[Case], server: Server, folder: Path) -> dict[Case, str]:
    """Return what is wrong, by case."""
    return {case: fault for case, _, fault in endings(cases, [server], folder) if fault is not None}


def counts(cases: Sequence[Case]) -> str:
    """Return how many cases there are, by area and by command, in a few lines."""
    lines = [f"{len(cases)} hostile inputs"]
    for what, names in (("by area", [case.area for case in cases]), ("by command", [case.verb for case in cases])):
        lines.append(f"{what}: " + ", ".join(f"{name} {count}" for name, count in sorted(Counter(names).items())))
    return "\n".join(lines)


def part_of(cases: Sequence[Case], part: str) -> list[Case]:
    """Return every n-th case, starting with the i-th, for a text "i/n".

    Raises:
        argparse.ArgumentTypeError: The text has another form.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    first, step = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= step:
        raise argparse.ArgumentTypeError(f"--part is I/N with I in 1 to N, not {part!r}")
    return list(cases[first - 1 :: step])


def known(record: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the lines of a record, by case, in the order of time."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in record.read_text(encoding="utf-8").splitlines() if record.exists() else ():
        found.setdefault(json.loads(line)["case"], []).append(json.loads(line))
    return found


def report(cases: Sequence[Case], record: Path, of: int | None = None) -> Path:
    """Write `benchmarks/reports/<date>-hostile.md` from a record that has all cases, and return its path.

    Args:
        cases: The cases that are reported.
        record: Says how each case ended.
        of: Number of all cases, if these are only a part. The report of a part is `<date>-hostile-part.md`.

    Raises:
        SystemExit: The record lacks some cases.
    """
    from benchmarks.common import report as reports

    found = known(record)
    missing = [case for case in cases if str(case) not in found]
    if missing:
        sys.exit(f"{record} lacks {len(missing)} of {len(cases)} cases, {missing[0]} for one: run the rest first")
    last = {case: found[str(case)][-1] for case in cases}
    wrong = {case: line["fault"] for case, line in last.items() if line["fault"]}
    mended = sum(found[str(case)][0]["fault"] is not None and not last[case]["fault"] for case in cases)
    seconds = sum(line["seconds"] for line in last.values())
    fresh = sum(line["fresh"] for line in last.values())
    lines = []
    for area in dict.fromkeys(case.area for case in cases):
        mine = [case for case in cases if case.area == area]
        codes = Counter(last[case]["code"] for case in mine)
        said = ", ".join(f"{count} with {code}" for code, count in sorted(codes.items(), key=str))
        lines.append([area, len(mine), said, sum(case in wrong for case in mine)])
    commands = [[verb, count] for verb, count in sorted(Counter(case.verb for case in cases).items())]
    reports.note("endings", {str(case): [line["code"], line["fault"]] for case, line in last.items()})
    text = (
        f"**{len(cases) - len(wrong):,} of {len(cases):,} hostile inputs end as documented**: with an exit code that "
        "is right for them, in one line, without a traceback, in 20 seconds of a processor and 1.5 GB. "
        f"{mended} of them did not when they were first tried. Together they took {seconds / 60:.0f} minutes: each "
        f"runs in a child of a process that has imported everything, and {fresh} of them, which their names choose, "
        "once more in a process that begins with nothing, where they end the same way. An area is a file of "
        "`tests/hostile` that makes such inputs, from a seed (0 here)."
    )
    if part := of is not None and of > len(cases):
        text += f" They are a part of the {of:,} inputs of these areas; the others were not run for this report."
    sections = [
        text,
        reports.table(["area", "inputs", "exit codes", "wrong"], lines),
        reports.table(["command", "inputs"], commands),
    ]
    if wrong:
        sections.append("## What was wrong\n\n" + "\n".join(f"- {case}: {fault}" for case, fault in wrong.items()))
    made_by = f"-m tests.hostile --record FILE --report{' --ran' if part else ''}"
    return reports.write("hostile-part" if part else "hostile", "Hostile inputs", sections, made_by=made_by)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--area", action="append", default=[], help="only this one; repeatable")
    parser.add_argument("--case", help="only those with this pattern in their name")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: 0, those of the tests)")
    parser.add_argument("--sample", type=int, help="so many of them")
    parser.add_argument("--part", default="1/1", help="every N-th of them, from the I-th on: I/N")
    parser.add_argument("--record", type=Path, help="file that keeps how each ended; what ended well is not run again")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--report", action="store_true", help="write the report of a record that has them")
    parser.add_argument("--ran", action="store_true", help="only those that the record has")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="at once (default: one a core)")
    parser.add_argument("--keep", type=Path, help="folder to keep all files in")
    parser.add_argument("--talk", action="store_true", help="say how each case ended")
    given = parser.parse_args()
    if (given.report or given.ran) and given.record is None:
        parser.error("--report and --ran read a --record: give one")
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        cases = all_cases(Kit(Path(scratch) / "kit"), given.seed, given.area)
        everything = len(cases)
        cases = [case for case in cases if re.search(given.case or "", case.name)]
        if given.sample is not None:
            cases = random.Random(given.seed).sample(cases, min(given.sample, len(cases)))
        cases = part_of(cases, given.part)
        if given.ran:
            ran = known(given.record)
            cases = [case for case in cases if str(case) in ran]
        if given.report:
            print(report(cases, given.record, everything))
            return 0
        if given.record:
            done = {name for name, lines in known(given.record).items() if not lines[-1]["fault"]}
            cases = [case for case in cases if str(case) not in done]
        began, tried, found = time.monotonic(), [], {}
        folder = given.keep or Path(scratch) / "cases"
        servers = [running.enter_context(Server()) for _ in range(given.jobs)]
        for case, ending, fault in endings(cases, servers, folder, keep=given.keep is not None):
            tried.append(case)
            if fault is not None:
                found[case] = fault
            if given.talk:
                said = fault or ending.stderr.strip()
                print(f"{'BAD' if fault else 'ok '} {ending.seconds:5.2f}s {ending.code} {case}: {said}", flush=True)
            if given.record:
                line = {"case": str(case), "code": ending.code, "seconds": round(ending.seconds, 3), "fault": fault}
                line["fresh"] = runs_fresh(case)
                with given.record.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            if time.monotonic() - began > given.stop_after:
                break
    print(counts(tried))
    for case, fault in found.items():
        print(f"{case}: autodistill {' '.join(case.argv)[:200]}\n    {fault}")
    print(f"{len(found)} faults in {time.monotonic() - began:.0f}s; {len(cases) - len(tried)} are left")
    return min(1, len(found) + len(cases) - len(tried))


if __name__ == "__main__":
    sys.exit(_main())
