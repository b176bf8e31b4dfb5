"""What must be so in every state that a crash leaves, found out without a search: files are whole, none is missing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from tests.crash.disk import MODELS, Disk, Kept
from tests.crash.kernel import Call

# Appended to, a line at a time; of the last line a part may be there.
_LOGS = ("runs/run/trials.jsonl", "runs/test_openings.jsonl")
# Has a checksum, which is compared whenever it is read, and is made again where it is not right.
_CHECKED = "cache/teacher-outputs/"
# Pages for a person beside an export, and who holds the run: written in place, and again by whoever goes on.
_IN_PLACE = ("README.md", "lock")


def faults_of(calls: Sequence[Call]) -> Iterator[str]:
    """What is wrong in any state that is left after any prefix of calls, under any model of a crash; each once.

    A file that has its name, and not that of one in the making, is one that was once written whole. A log ends with a
    line that was written, or a part of one. Of a trial that the log says has been completed, the student is there.
    """
    versions, logs, students = _written(calls)
    disk, known = Disk(), set()
    for done, call in enumerate(calls, start=1):
        disk.apply(call)
        for model in MODELS:
            left = disk.after(model) if disk.changed(model) else {}
            for said in _of_one(left, versions, logs, students):
                if said not in known:
                    known.add(said)
                    yield f"{model}, after call {done} ({call.name} {call.path}): {said}"


def _of_one(
    left: dict[str, Kept | None],
    versions: dict[str, set[bytes]],
    logs: dict[str, bytes],
    students: dict[str, set[str]],
) -> Iterator[str]:
    for path, kept in left.items():
        parts = PurePosixPath(path).parts
        if kept is None or path.startswith(_CHECKED) or parts[-1] in _IN_PLACE or any(one[0] == "." for one in parts):
            continue
        if path in logs:
            if not logs[path].startswith(kept.data.rstrip(b"\0")):
                yield f"{path} is no beginning of what was written"
        elif kept.data not in versions[path]:
            yield f"{path} is torn: {len(kept.data)} bytes"
    log = left.get(_LOGS[0])
    for line in log.data.split(b"\n")[:-1] if log else ():
        event = json.loads(line)
        if event["event"] == "status" and event["status"] == "completed":
            for missing in sorted(students[event["trial"]] - left.keys()):
                yield f"{missing} is missing, of a trial that has been completed"


def _written(calls: Sequence[Call]) -> tuple[dict[str, set[bytes]], dict[str, bytes], dict[str, set[str]]]:
    """The contents that each file had when it got its name, or when the next call was of another file; the logs at
    the end; and the files of each trial's student.
    """
    disk, versions = Disk(), defaultdict(set)
    for call, following in zip(calls, [*calls[1:], None], strict=True):
        disk.apply(call)
        if call.name in ("write", "truncate", "create", "rename", "link"):
            if following and following.path == call.path and following.name in ("write", "truncate", "create"):
                continue
            for path, kept in disk.after("killed").items():
                if kept is not None:
                    versions[path].add(kept.data)
    last = disk.after("killed")
    students = defaultdict(set)
    for path in last:
        parts = PurePosixPath(path).parts
        if parts[:3] == ("runs", "run", "checkpoints") and "student" in parts:
            students[parts[3]].add(path)
    logs = {path: kept.data for path in _LOGS if (kept := last.get(path))}
    return versions, logs, students
