"""A search that is killed at 20 random moments and resumed each time has the rows of an undisturbed one.

    python -m benchmarks.reliability.kill [--runner inline] [--kills 20] [--trials 4] [--time 15m] [--work DIR]

It has a tiny random teacher, a tiny text, fixed trials and tokens. One process after another is killed with SIGKILL. A
kill comes after a random number of further events in the log, and a random part of a second or two. So the places do
not depend on the machine's speed. Or it comes after some seconds, while the process loads. When a search's trials are
over, there are few events. So it is killed once in each part of its end. The next process resumes. The processes are
forks of this one, which has imported the libraries. This saves most of the start. If a search ends before all kills are
used, one of the next seed follows. Each is then compared with an undisturbed search of the same seed. With `--work`,
the folder is kept, and the same command continues there.

With `--runner ray`, all processes of a search are killed with it: its workers and those of Ray. This is always done
while trials run. Everything runs on one core, on which Ray has one worker. With several workers, what a sampler knows
depends on which is faster.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from autodistill.cli.app import main as main_of_autodistill
from autodistill.runs.events import RowTested
from autodistill.runs.results.row import Row
from autodistill.runs.run_log import RunLog
from autodistill.testing import save_tiny_teacher, tiny_text
from autodistill.utils.event_log import EventLog
from benchmarks.common import report
from benchmarks.common.program import parse, parser_of
from benchmarks.reliability.same_rows import alike

TOKENS = 9216
# The most further events after which a process is killed. With 0, it is killed while it starts.
EVENTS = 4
# What a search prints when each part of its end begins, and the name of that part.
ENDS = (
    ("exporting the 16-bit folder", "exporting the 16-bit folder"),
    ("exporting ", "exporting and verifying"),
    ("memory of the ", "measuring the exported student's memory"),
    ("latency of the ", "timing the exported student"),
    ("test split", "scoring on test"),
)
# The order in which the parts run, so that none is over when its turn comes. Finished parts are not repeated.
PARTS = (*(part for _, part in ENDS[1:4]), ENDS[0][1], ENDS[4][1])
# The most seconds after these events, after a part of the end has begun, and while it starts.
DELAY, ENDING, STARTING = 1.5, 0.5, 4.0
# Fields with durations. The memory of a runtime's process also differs each time.
TIMES = ("train_seconds", "latency_ms", "tokens_per_second")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One killed process.

    Attributes:
        seed: Seed of its search.
        after: Seconds that it lived.
        events: Events in the log when it died.
        stage: The last of these events, or the part of the end that had begun.
    """

    seed: int
    after: float
    events: int
    stage: str


class Search:
    """One search of the tiny teacher in a folder of its own, with the command line of a user."""

    def __init__(self, inputs: Path, folder: Path, seed: int, trials: int, runner: str = "inline") -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.run = folder / "runs" / "run"
        options = [
            "--teacher",
            str(inputs / "teacher"),
            "--data",
            str(inputs / "text"),
            "--cache",
            str(inputs / "cache"),
        ]
        fixed = ["--trials", str(trials), "--tokens", str(TOKENS), "--seed", str(seed), "--runner", runner]
        self._words = ["search", "--budget", "16GB", "--context", "256", *options, *fixed, "--name", "run"]
        self._words += ["--runs", str(folder / "runs"), "--json"]
        self._finished = folder / "finished.json"
        self._said = folder / "said.txt"

    @property
    def events(self) -> list[dict[str, Any]]:
        """The complete events of the log."""
        return EventLog(self.run / "trials.jsonl").read()

    @property
    def finished(self) -> bool:
        """Whether the search has ended."""
        return self._finished.exists()

    @property
    def rows(self) -> dict[str, Row]:
        """Rows of validation and test, by name and split."""
        log = RunLog(self.run / "trials.jsonl")
        found = {f"{row.row_id} validation": row for row in log.rows()}
        return found | {f"{row.row_id} test": row for row in log.rows(RowTested)}

    @property
    def said(self) -> str:
        """The output of the process."""
        return self._said.read_text() if self._said.exists() else ""

    def live(self, events: int | None, seconds: float = 0.0, end: str = "") -> bool:
        """Run a process to its end, or kill it after some events and seconds. Return whether it was killed.

        Args:
            events: Further events in its log, or None to let it finish.
            seconds: Seconds after these events.
            end: A part of the end that must have begun too.

        Raises:
            SystemExit: The process failed by itself, which no kill may cause.
        """
        resume = ["--resume"] if (self.run / "search.json").exists() else []
        wanted = None if events is None else self._lines() + events
        self._said.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            self._become([*self._words, *resume])
        state = None

        def reached(count: int) -> bool:
            return self._lines() >= count and (not end or part_of_end(self.said) == end)

        while wanted is not None and (state := _ended(child)) is None and not reached(wanted):
            time.sleep(0.01)
        ends = time.monotonic() + seconds
        while wanted is not None and state is None and time.monotonic() < ends:
            state = _ended(child)
            time.sleep(0.01)
        if wanted is not None and state is None:
            # Processes that the search has started: Ray's and its workers, or a runtime that serves a student.
            family = psutil.Process(child).children(recursive=True)
            os.kill(child, signal.SIGKILL)
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            os.waitpid(child, 0)
            psutil.wait_procs(family, timeout=60)
            return True
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1] if state is None else state)
        if code:
            sys.exit(f"a search ended with {code}: {self._said.read_text()}")
        self._finished.write_text("{}")
        return False

    def _become(self, words: list[str]) -> NoReturn:
        """Turn this forked process into the command line, with its output in a file."""
        said = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = 1
        try:
            code = main_of_autodistill(words)
        except BaseException:  # a fork must never go on as its parent
            traceback.print_exc()
        finally:
            os._exit(code)

    def _lines(self) -> int:
        log = self.run / "trials.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0


def _ended(child: int) -> int | None:
    """Return the state with which a process ended, or None while it runs."""
    found, state = os.waitpid(child, os.WNOHANG)
    return state if found else None


def part_of_end(said: str) -> str:
    """Return the part of a search's end that has begun, by its output, or "" before the end."""
    for line in reversed(said.splitlines()):
        for beginning, part in ENDS:
            if line.startswith(beginning):
                return part
    return ""


def over(events: list[dict[str, Any]], trials: int) -> bool:
    """Return whether all trials have ended, by the log. Rejected ones do not count."""
    ends = {event["trial"]: event["status"] for event in events if event["event"] == "status"}
    begun = {event["trial"]: event["number"] for event in events if event["event"] == "trial"}
    counted = sum(number is not None and ends.get(trial) != "rejected" for trial, number in begun.items())
    return counted >= trials and begun.keys() <= ends.keys()


def stage_of(events: list[dict[str, Any]], said: str = "") -> str:
    """Describe the last event of a log, or the part of the end that a process had begun."""
    if part := part_of_end(said):
        return part
    if not events:
        return "before the first event"
    last = events[-1]
    if last["event"] == "row":
        kind = last["row"]["kind"]
        return "the teacher's rows" if kind == "teacher" else "a row"
    return {"session": "loading", "teacher": "the teacher's score", "test": "the test split"}.get(
        last["event"], last["event"]
    )


def differences(found: dict[str, Row], expected: dict[str, Row]) -> Iterator[str]:
    """Yield the differences of two searches, except durations and measured memory of llama.cpp's process."""
    for name in sorted(found.keys() ^ expected.keys()):
        yield f"{name} is {'too many' if name in found else 'missing'}"
    for name in sorted(found.keys() & expected.keys()):
        mine, theirs = comparable(found[name]), comparable(expected[name])
        for field in mine:
            if field == "memory_bytes" and alike(mine[field], theirs[field]):
                continue
            if mine[field] != theirs[field]:
                yield f"{name}: {field} is {mine[field]}, not {theirs[field]}"


def comparable(row: Row) -> dict[str, Any]:
    """Return everything in a row except durations and measured memory."""
    data = {field: value for field, value in row.to_json().items() if field not in TIMES}
    if row.memory_source == "measured":
        data["memory_bytes"] = "measured"
    data["other"] = {
        field: value
        for field, value in row.other.items()
        if not field.startswith(("answer_ms", "latency", "memory", "ttft"))
    }
    return data


def twice(events: list[dict[str, Any]]) -> int:
    """Return how many segments were finished more than once."""
    segments = [(event["trial"], event["rung"]) for event in events if event["event"] == "rung"]
    return len(segments) - len(set(segments))


def kept_kills(path: Path) -> list[Kill]:
    """Return the kills that a results file has."""
    return [Kill(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """Kill and resume a search, compare its rows with those of an undisturbed one, and write the report."""
    parser = parser_of(__doc__, time=True)
    parser.add_argument("--runner", choices=("inline", "ray"), default="inline", help="of the searches")
    parser.add_argument("--kills", type=int, default=20, help="in all")
    parser.add_argument("--trials", type=int, default=4, help="of a search")
    parser.add_argument("--work", type=Path, default=None, help="folder that is kept, to go on from")
    arguments = parse(parser, kills=1, trials=2)
    # One thread suffices. A fork has none of its parent's threads, and waiting for a busy core would slow it down.
    torch.set_num_threads(1)
    on_ray = arguments.runner == "ray"
    if on_ray:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    work = arguments.work or Path(tempfile.mkdtemp(prefix="kill-"))
    inputs = work / "inputs"
    if not (inputs / "text").exists():
        save_tiny_teacher(inputs / "teacher", layers=5)
        tiny_text(inputs / "text", documents=30, sentences=80)
    log = work / "kills.jsonl"
    kills = kept_kills(log)
    began, deadline = time.monotonic(), time.monotonic() + arguments.time
    dice = random.Random(len(kills))
    lines, faults = [], []
    seed = 0
    while True:
        cut = Search(inputs, work / f"cut-{seed}", seed, arguments.trials, arguments.runner)
        died = [kill.stage for kill in kills if kill.seed == seed]
        ends = [] if on_ray else [part for part in PARTS if part not in died]
        while not cut.finished:
            if time.monotonic() > deadline:
                sys.exit(f"the time is over after {len(kills)} kills: call again with --work {work} for the rest")
            spent = len(kills) >= arguments.kills or (on_ray and over(cut.events, arguments.trials))
            # These events are beyond those that a session writes before its trials continue.
            count = None if spent else 2 + dice.randrange(EVENTS) if on_ray else dice.randrange(EVENTS + 1)
            end = ends.pop(0) if ends and not spent and over(cut.events, arguments.trials) else ""
            most = ENDING if end else DELAY if count else STARTING
            started = time.monotonic()
            if cut.live(0 if end else count, dice.uniform(0, most), end):
                events, stage = cut.events, stage_of(cut.events, cut.said)
                kill = Kill(seed=seed, after=time.monotonic() - started, events=len(events), stage=stage)
                kills.append(kill)
                with log.open("a") as file:
                    file.write(json.dumps(vars(kill)) + "\n")
                print(
                    f"kill {len(kills)}: seed {seed}, {kill.after:.1f} s, after {kill.stage}",
                    file=sys.stderr,
                    flush=True,
                )
        whole = Search(inputs, work / f"whole-{seed}", seed, arguments.trials, arguments.runner)
        if not whole.finished:
            whole.live(None)
        differing = [*differences(cut.rows, whole.rows)]
        faults += differing
        again = twice(cut.events)
        mine = sum(kill.seed == seed for kill in kills)
        trials = sum(event["event"] == "trial" for event in whole.events)
        lines.append([seed, mine, trials, len(whole.rows), len(differing), again])
        print(f"seed {seed}: {mine} kills, {len(differing)} differences", file=sys.stderr, flush=True)
        if len(kills) >= arguments.kills:
            break
        seed += 1
    for kill in kills:
        report.note("kills", kill)
    for counts in lines:
        report.note("seed, kills, trials, rows, fields that differ, segments finished twice", counts)
    report.note("faults", faults)
    name, made_by = ("kill-ray", "-m benchmarks.reliability.kill --runner ray") if on_ray else ("kill", "")
    seconds = time.monotonic() - began
    parts = sections(lines, kills, faults, seconds, arguments.runner)
    print(report.write(name, "A search killed again and again", parts, made_by=made_by))
    if faults:
        sys.exit("\n".join(faults))


def sections(lines: list[list[Any]], kills: list[Kill], faults: list[str], seconds: float, runner: str) -> list[str]:
    """Return the parts of the report."""
    verdict = "Held" if not faults and not any(line[-1] for line in lines) else "Not held"
    stages: dict[str, int] = {}
    for kill in kills:
        stages[kill.stage] = stages.get(kill.stage, 0) + 1
    drawn = f"further events, evenly drawn, and up to {DELAY:g} s more"
    when = (
        f"each after 2 to {EVENTS + 1} {drawn}, while trials ran, with all its processes"
        if runner == "ray"
        else f"each after 0 to {EVENTS} {drawn} ({STARTING:g} s from its start where there was none), or once its "
        "trials were over in each part of its end"
    )
    head = (
        f"**{verdict}**: {len(kills)} searches were killed with SIGKILL, {when}, and the next resumed. Compared with a "
        f"search of the same seed that was left alone, {len(faults)} fields of rows differ; compared are all fields of "
        "all rows of validation and test, but for seconds, latency and what a runtime's process took of memory. A tiny "
        f"random teacher (5 layers of 64), {TOKENS:,} tokens a trial, {'Ray' if runner == 'ray' else 'inline runner'}; "
        f"{seconds:.0f} s."
    )
    titles = ["seed", "kills", "trials", "rows", "fields that differ", "segments finished twice"]
    where = [[stage, count] for stage, count in sorted(stages.items(), key=lambda item: -item[1])]
    parts = [
        head,
        report.table(titles, lines),
        "## Where they died\n\nBy the last event in the log, or by the part of the end that had begun.",
    ]
    parts.append(report.table(["after", "kills"], where))
    if faults:
        parts.append("## What differed\n\n" + "\n".join(f"- {fault}" for fault in faults[:40]))
    return parts


if __name__ == "__main__":
    main()
