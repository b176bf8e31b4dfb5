"""The search for several budgets: shared preparation, then one run after the other, each from its own `search.json`."""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from autodistill.errors import AutoDistillError, InputError, InterruptedSearchError, LostClusterError, NothingFitsError
from autodistill.hardware.budget import Price
from autodistill.runs.events import SessionBegan, TeacherScored
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.sessions import lasted
from autodistill.search.budgets.prepare import prepare
from autodistill.search.budgets.record import BudgetsFolder, Part, Record
from autodistill.search.budgets.request import BudgetsRequest
from autodistill.search.budgets.summary import document, write_summary
from autodistill.search.campaign.observer import Observer
from autodistill.search.preview import check_shows_nothing
from autodistill.search.request.request import SearchRequest
from autodistill.search.search import search
from autodistill.units import count_of, format_duration
from autodistill.utils.json_files import write_json

_REFERENCE = "teacher_reference.npz"


def plan_budgets(
    request: BudgetsRequest, observer: Observer | None = None, price: Price | None = None
) -> dict[str, Any]:
    """Return what a search for several budgets would do, as plain data. Only the shared cache is written.

    Raises:
        InputError: Bad input, or a resumed search, which already has its plan.
    """
    if request.resume:
        raise InputError("--plan shows what a new search would do: leave out --plan or --resume")
    check_shows_nothing(request)
    prepared = prepare(request, request.name or _stamp(), observer or Observer())
    return {"box_seconds": prepared.box_seconds, "budgets": prepared.documents(price)}


def search_budgets(
    request: BudgetsRequest,
    observer: Observer | None = None,
    run: Callable[[SearchRequest, Observer], Any] = search,
) -> dict[str, Any]:
    """Find, export and verify the best student for each of several budgets.

    Args:
        request: What is asked, or a request to resume a search that has a record.
        observer: Shows the search to the user.
        run: Function that continues the run of one budget.

    Returns:
        What was found for each budget, as plain data (see `summary.document`).

    Raises:
        InputError: Bad input, found before any work is spent.
        NothingFitsError: Nothing fits any of the budgets.
        InterruptedSearchError, LostClusterError: See `search`. The message says how to resume all budgets.
    """
    told, out = observer or Observer(), Path(request.runs)
    with _folder(request) as folder:
        try:
            if request.resume:
                record = folder.read()
                _check_same(request, record)
            else:
                record = _begun(request, folder, told)
        except KeyboardInterrupt:
            raise InterruptedSearchError("stopped before the first trial: nothing to resume") from None
        finally:
            if not request.resume:
                folder.discard()
        drive = _Drive(request, folder, record, told, run)
        try:
            drive.run()
        except (InterruptedSearchError, LostClusterError) as error:
            raise type(error)(f"{error}; all budgets go on with: {_resuming(request, record)}") from None
        except KeyboardInterrupt:
            raise InterruptedSearchError(f"stopped; to go on: {_resuming(request, record)}") from None
        except AutoDistillError:
            told.line(f"the other budgets go on with: {_resuming(request, record)}")
            raise
        found = document(out, drive.record)
        write_summary(folder, drive.record, found)
    if all(one["nothing_fits"] for one in found["budgets"]):
        raise NothingFitsError("; ".join(f"{one['label']}: {one['nothing_fits']}" for one in found["budgets"]))
    return found


def _stamp() -> str:
    return datetime.now().strftime("search-%Y%m%d-%H%M%S")


def _folder(request: BudgetsRequest) -> BudgetsFolder:
    """Return the folder of the search, locked: the resumed one or a new one."""
    out = Path(request.runs)
    if request.resume:
        if request.name is None:
            raise InputError("--resume goes on with a search: name it with --name")
        return BudgetsFolder.open(out, request.name, lock=True)
    if request.name is not None:
        return BudgetsFolder.create(out, request.name)
    return BudgetsFolder.create_free(out, _stamp())


def _begun(request: BudgetsRequest, folder: BudgetsFolder, observer: Observer) -> Record:
    """Prepare a new search and write its record. From here on it can be resumed."""
    prepared = prepare(request, folder.name, observer)
    record = Record(
        name=folder.name,
        command=request.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        parts=prepared.parts,
        box_seconds=prepared.box_seconds,
        prepared_seconds=time.monotonic() - request.started,
    )
    folder.write(record)
    for part in record.parts:
        if part.nothing_fits:
            observer.line(f"{part.label}: {part.nothing_fits}")
        elif not part.search:
            observer.line(
                f"{part.label}: the student of {record.serving(part).label} loses nothing beside the best that fits "
                "here: the budget does not bind, and no other is trained for it"
            )
    if record.box_seconds is not None:
        left = max(0.0, record.box_seconds - record.prepared_seconds)
        each = format_duration(left / len(record.own))
        students = count_of(len(record.own), "budget")
        observer.line(f"a student for each of {students} in {format_duration(left)}, about {each} for each")
    return record


def _check_same(request: BudgetsRequest, record: Record) -> None:
    """Refuse to resume a search with other budgets than it began with."""
    if request.budgets is None and request.tiers is None:
        return
    asked, before = list(request.limits()), [one.label for one in record.parts]
    if asked != before:
        raise InputError(
            f"the search {record.name!r} was begun for {', '.join(before)}, not for {', '.join(asked)}: resume it "
            "without --budgets and --tiers, or start a new one under another --name"
        )


def _resuming(request: BudgetsRequest, record: Record) -> str:
    """Return the command line that resumes all budgets."""
    resume = request.command if request.resume else f"{request.command} --resume"
    return resume if request.name is not None else f"{resume} --name {record.name}"


class _Drive:
    """Completes the runs of all budgets, one after the other, the smallest budget first."""

    def __init__(
        self,
        request: BudgetsRequest,
        folder: BudgetsFolder,
        record: Record,
        observer: Observer,
        run: Callable[[SearchRequest, Observer], Any],
    ) -> None:
        self.record = record
        self._request, self._folder, self._observer, self._run = request, folder, observer, run
        self._out = Path(request.runs)

    def run(self) -> None:
        """Continue every unfinished run. If all have finished and get more time or trials, continue all of them."""
        own = self.record.own
        open_ = [part for part in own if not self._finished(part)]
        more = not open_ and (self._request.time is not None or self._more_trials(own))
        wanted = [*own] if more else open_
        if self._request.resume and isinstance(self._request.time, float | int):
            before = self._spent() if more else 0.0
            self._write(replace(self.record, box_seconds=before + self._request.time))
        for place, part in enumerate(wanted):
            self._observer.line(f"{part.label}: {part.limits.describe()}, run {part.run}")
            seconds = self._given(part, len(wanted) - place, more=more)
            try:
                self._run(self._going_on(part, seconds), self._observer)
            except NothingFitsError as error:
                # All rows that were predicted to fit turned out too large in the runtime. Other budgets go on.
                self._observer.line(f"{part.label}: {error}")

    def _given(self, part: Part, left: int, *, more: bool) -> float | None:
        """Return the time budget of a run in seconds, after writing it to disk. None if the run keeps what it has.

        Args:
            part: The budget of the run.
            left: Number of runs that share the remaining time, including this one.
            more: Whether the run has finished and is extended.
        """
        self._make(part)
        box = self.record.box_seconds
        if box is None or (self._begun(part) and self._request.time is None):
            return None
        seconds = max(1.0, (box - self._spent()) / left)
        if not more:
            # An unfinished run's time budget covers all of its sessions, including earlier ones.
            seconds += self._lasted(part)
        self._write(self.record.giving(part, seconds))
        return seconds

    def _going_on(self, part: Part, seconds: float | None) -> SearchRequest:
        assert part.run is not None
        words = ["autodistill", "search", "--resume", "--name", part.run, "--runs", str(self._out)]
        command, started = shlex.join(words), time.monotonic()
        first = not self._request.resume
        return self._request.going_on(part.run, command, seconds=seconds, started=started, first=first)

    def _make(self, part: Part) -> None:
        """Create the run's folder with its plan, and with the teacher's scores from an earlier run if there are any."""
        assert part.run is not None
        assert part.search is not None
        if RunFolder(self._out, part.run).search_file.exists():
            return
        with RunFolder.create(self._out, part.run) as run:
            write_json(run.search_file, part.search)
            self._hand_on(part, run)

    def _hand_on(self, part: Part, run: RunFolder) -> None:
        """Copy the teacher's scores from another run if it read the same number of tokens."""
        assert part.search is not None
        for other in self.record.own:
            known = RunFolder(self._out, str(other.run))
            if other.search is None or not known.search_file.exists() or not (known.path / _REFERENCE).exists():
                continue
            scored = known.events.of(TeacherScored)
            if scored and _read(other.search) == _read(part.search) == known.read_settings()["plan"]["eval_tokens"]:
                shutil.copyfile(known.path / _REFERENCE, run.path / _REFERENCE)
                run.events.add(replace(scored[0], time=None))
                return

    def _finished(self, part: Part) -> bool:
        return "seconds" in self._asked(part)

    def _more_trials(self, own: tuple[Part, ...]) -> bool:
        return any((self._request.trials or 0) > self._asked(part)["plan"]["trials"] for part in own)

    def _asked(self, part: Part) -> Mapping[str, Any]:
        run = RunFolder(self._out, str(part.run))
        return run.read_settings() if run.search_file.exists() else part.search or {}

    def _begun(self, part: Part) -> bool:
        return bool(RunFolder(self._out, str(part.run)).events.of(SessionBegan))

    def _lasted(self, part: Part) -> float:
        return lasted(RunFolder(self._out, str(part.run)).events.all())

    def _spent(self) -> float:
        """Return the seconds of the time budget used so far, by the preparation and all sessions of all runs."""
        return self.record.prepared_seconds + math.fsum(map(self._lasted, self.record.own))

    def _write(self, record: Record) -> None:
        self.record = record
        self._folder.write(record)


def _read(search: Mapping[str, Any]) -> int:
    return int(search["plan"]["eval_tokens"])
