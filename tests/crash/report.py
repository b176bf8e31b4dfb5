"""Crashes and failing disks at every call of a tiny search, or at a seeded sample that fits a time limit.

    python -m tests.crash.report --work DIR [--minutes 25] [--most N] [--only KIND ...] [--processes 2] [--seed 0]
        [--no-report]

Writes `benchmarks/reports/<date>-crash.md`, and next to it its data, one line for each crash or fault. The same command
with the same folder continues from there. With `--minutes 0` it makes the report of what the folder has.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import report
from tests.crash.disk import MODELS, Disk, states
from tests.crash.kernel import why_not
from tests.crash.replaying import ERRORS, FAILING, faults, jobs_of, many
from tests.crash.searches import record, settle
from tests.crash.whole import faults_of


def main() -> None:
    """Record a search, crash it, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--most", type=int, default=None, help="crashes and faults in all")
    parser.add_argument("--only", nargs="+", choices=(*MODELS, *ERRORS), default=(), help="kinds of crashes and faults")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-report", action="store_true", help="print the counts, and write no file")
    arguments = parser.parse_args()
    if arguments.minutes and (why := why_not()):
        sys.exit(why)
    work = arguments.work.resolve()
    kept, results = work / "record.pickle", work / "results.jsonl"
    if arguments.minutes:
        began = time.monotonic()
        work.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            # Only this program reads it, from the folder that it wrote it to.
            kept.write_bytes(pickle.dumps(record(work)))
        calls, whole, _ = pickle.loads(kept.read_bytes())
        settle(work)
        until = began + 60 * arguments.minutes
        jobs = jobs_of(calls, whole, arguments.seed, arguments.only)
        many(dict(islice(jobs.items(), arguments.most)), work, results, until=until, processes=arguments.processes)
        with (work / "spent.jsonl").open("a") as file:
            file.write(json.dumps({"seconds": time.monotonic() - began, "time": time.time()}) + "\n")
    calls, _, ended = pickle.loads(kept.read_bytes())
    found, spells = lines_of(results), lines_of(work / "spent.jsonl")
    facts = {
        "date": datetime.fromtimestamp(spells[-1]["time"], UTC).isoformat(timespec="seconds"),
        "machine": report.machine(),
        "seed": arguments.seed,
        "minutes": sum(one["seconds"] for one in spells) / 60,
        **_of_whole(calls),
        "undisturbed_cpu_seconds": ended.cpu_seconds,
    }
    if arguments.no_report:
        print("\n\n".join(sections(facts, found)))
    else:
        title = "A search on a disk that crashes or fails"
        made = {"date": facts["date"][:10], "machine": facts["machine"]}
        report.note("facts", facts, made)
        report.note("crashes and faults", found, made)
        print(report.write("crash", title, sections(facts, found), made_by="-m tests.crash.report"))
    if facts["torn"] or any(one["wrong"] for one in found):
        sys.exit("not every one went on as if nothing had been")


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the JSON value of each line of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _of_whole(calls: list[Any]) -> dict[str, Any]:
    """Return figures of the undisturbed search."""
    disk = Disk()
    for call in calls:
        disk.apply(call)
    return {
        "calls": len(calls),
        "syncs": sum(call.name == "sync" for call in calls),
        "written_bytes": sum(len(call.data) for call in calls),
        "failing": sum(call.name in FAILING for call in calls),
        "states": dict(Counter(state.model for state in states(calls))),
        "faults": len(faults(calls)),
        "torn": [*faults_of(calls)],
        "files": sum(kept is not None for kept in disk.after("killed").values()),
    }


def sections(facts: dict[str, Any], found: list[dict[str, Any]]) -> list[str]:
    """Return the parts of the report."""
    wrong = [one for one in found if one["wrong"]]
    crashes = [one for one in found if one["kind"] in MODELS]
    failed = [one for one in found if one["kind"] in ERRORS and one["outcome"] != "not struck"]
    every = sum(facts["states"].values())
    verdict = "Not held" if wrong or facts["torn"] else "Held"
    head = (
        f"**{verdict}**. A tiny search of three trials changes files by {facts['calls']:,} calls, {facts['syncs']} of "
        f"which sync, and writes {facts['written_bytes'] / 1e6:.1f} MB; the kernel announces each before it is done. "
        "Every prefix of them, under each of four models of what a crash leaves, comes to "
        f"{every:,} different states of the disk. In all of these every file under its name was held to what was once "
        "written whole (but the teacher's outputs, which have a checksum), the log to its beginning, and each trial "
        f"that the log calls completed to a student that is there: {len(facts['torn'])} are not so."
    )
    tried = (
        f"From a sample a search went on, of {len(crashes)} states, and after {len(failed)} faults of the disk, of the "
        f"{facts['faults']:,} that {len(ERRORS)} kinds at each of {facts['failing']} calls come to: as many as "
        f"{facts['minutes']:.0f} minutes allowed, on two cores shared with much other work, of each kind in turn (seed "
        f"{facts['seed']}). {len(wrong)} of them did not come to what is found undisturbed, or did not say in one line "
        "what was wrong. Compared are all fields of all rows of validation and test, but times and memory that was "
        "measured, and the bytes of the exported weights."
    )
    lines = []
    for model, what in MODELS.items():
        mine = [one for one in crashes if one["kind"] == model]
        lines.append([model, what, facts["states"].get(model, 0), len(mine), *_outcomes(mine)])
    titles = ["model", "what is left", "states", "tried", "resumed", "begun anew", "wrong"]
    failures = []
    for error, what in ERRORS.items():
        mine = [one for one in failed if one["kind"] == error]
        codes = Counter(one["code"] for one in mine)
        said = ", ".join(f"{count} with {code}" for code, count in sorted(codes.items()))
        went = sum(one["outcome"] == "went on" for one in mine)
        failures.append([error, what, facts["failing"], len(mine), said, went, *_outcomes(mine)])
    tops = ["error", "what fails", "calls", "tried", "exit codes", "went on", "resumed", "begun anew", "wrong"]
    parts = [
        head,
        tried,
        "## Crashes\n\nA state that several prefixes or models have is counted once, under the first of them.",
        report.table(titles, lines),
        "## Failing disks\n\nA search must end with a documented exit code and one line, and goes on once the disk "
        "works; or it went on by itself.",
        report.table(tops, failures),
    ]
    if wrong or facts["torn"]:
        listed = [
            *(f"- {said}" for said in facts["torn"]),
            *(
                f"- {one['kind']} at call {one.get('calls', one.get('call'))} ({one['at']}): {one['wrong'][0][:300]}"
                for one in wrong
            ),
        ]
        parts.append("## What went wrong\n\n" + "\n".join(listed[:40]))
    return parts


def _outcomes(some: list[dict[str, Any]]) -> list[int]:
    counts = Counter(one["outcome"] for one in some)
    return [counts["resumed"], counts["begun anew"], sum(bool(one["wrong"]) for one in some)]


if __name__ == "__main__":
    main()
