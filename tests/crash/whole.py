"""What must hold in every state that a crash leaves, checked without a search: files are whole, none is missing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from tests.crash.disk import MODELS, Disk, Kept
from tests.crash.kernel import Call

# Files that are appended to line by line. The last line may be incomplete.
_LOGS = ("runs/run/trials.jsonl", "runs/test_openings.jsonl")
# Files with a checksum, which is compared at every read. A damaged one is made again.
_CHECKED = "cache/teacher-outputs/"
# Pages for a reader next to an export, and the holder of a run. Both are written in place, and again after a resume.
_IN_PLACE = ("README.md", "lock")


def faults_of(calls: Sequence[Call]) -> Iterator[str]:
    """Yield what is wrong in any state after any prefix of calls, under any model of a crash; each fault once.

    A file with its final name must have content that was once written completely. A log must end with a line that was
    written, or a part of one. If the log says that a trial is completed, its student must exist.
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
    """Return the contents that each file had, the logs at the end, and the files of each trial's student.

    The contents are those when a file got its name, or when the next call was for another file.
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
