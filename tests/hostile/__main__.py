"""Runs hostile inputs, and prints how many of each area and command there were, and what was wrong."""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.hostile.cases import Case, Kit, all_cases
from tests.hostile.server import Server


def faults(
    cases: Iterable[Case], server: Server, folder: Path, keep: bool = False, talk: bool = False
) -> dict[Case, str]:
    """What is wrong, by case; the folder of a case that is right is removed."""
    found = {}
    for number, case in enumerate(cases):
        place = folder / f"{number:05d}"
        ending = server.run(case, place)
        fault = ending.fault(case)
        if fault is not None:
            found[case] = fault
        if talk:
            print(
                f"{'BAD' if fault else 'ok '} {ending.seconds:5.2f}s {ending.code} {case}:",
                fault or ending.stderr.strip(),
                flush=True,
            )
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
    return found


def counts(cases: Sequence[Case]) -> str:
    """How many cases there are, by area and by command, in a few lines."""
    lines = [f"{len(cases)} hostile inputs"]
    for what, names in (("by area", [case.area for case in cases]), ("by command", [case.command for case in cases])):
        lines.append(f"{what}: " + ", ".join(f"{name} {count}" for name, count in sorted(Counter(names).items())))
    return "\n".join(lines)


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile", description=__doc__)
    parser.add_argument("--area", action="append", default=[], help="only this one; repeatable")
    parser.add_argument("--case", help="only those with this pattern in their name")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: 0, those of the tests)")
    parser.add_argument("--sample", type=int, help="so many of them")
    parser.add_argument("--keep", type=Path, help="folder to keep all files in")
    parser.add_argument("--talk", action="store_true", help="say how each case ended")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, Server() as server:
        cases = all_cases(Kit(Path(scratch) / "kit"), given.seed, given.area)
        cases = [case for case in cases if re.search(given.case or "", case.name)]
        if given.sample is not None:
            cases = random.Random(given.seed).sample(cases, min(given.sample, len(cases)))
        began = time.monotonic()
        found = faults(
            cases, server, given.keep or Path(scratch) / "cases", keep=given.keep is not None, talk=given.talk
        )
    print(counts(cases))
    for case, fault in found.items():
        print(f"{case}: autodistill {' '.join(case.argv)[:200]}\n    {fault}")
    print(f"{len(found)} faults in {time.monotonic() - began:.0f}s")
    return min(1, len(found))


if __name__ == "__main__":
    sys.exit(_main())
