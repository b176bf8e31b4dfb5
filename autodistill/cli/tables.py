"""The live view of a running search, and the leaderboard as a table of plain text."""

from __future__ import annotations

import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TextIO

from autodistill.runs.results.leaderboard import UNTRAINED, Ranked, rests_on
from autodistill.runs.results.objectives import PREDICTED_LATENCY
from autodistill.runs.results.row import WITHIN_LIMITS, Row
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.units import format_bytes, format_duration

if TYPE_CHECKING:
    from rich.table import Table

# rich is imported where something is drawn: most commands print plain text, and end sooner than it is imported.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a search has done so far.

    Attributes:
        phase: What it does now, like "teacher cache" or "trials".
        planned: Trials in the plan.
        done, running, paused, stopped, rejected, failed: Trials by what became of them; `done` reached full fidelity,
            and `paused` stand at a rung, from which they may yet be taken further.
        metric: Name of the figure that ranks.
        best, baseline, teacher: That figure of the best row so far, the baseline and the teacher; None until known.
        tokens_per_second: Training speed of all workers together, or None.
        seconds_left: Until the plan's end, below 0 once it has passed, or None.
    """

    phase: str
    planned: int = 0
    done: int = 0
    running: int = 0
    paused: int = 0
    stopped: int = 0
    rejected: int = 0
    failed: int = 0
    metric: str = "accuracy"
    best: float | None = None
    baseline: float | None = None
    teacher: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None

    def trials(self) -> str:
        """The trials in words; empty before any is planned."""
        if not self.planned:
            return ""
        counts = f"{self.done} of {self.planned} done, {self.running} running, {self.paused} paused"
        return f"{counts}, {self.stopped} stopped, {self.rejected} rejected, {self.failed} failed"

    def quality(self) -> str:
        """The best so far against baseline and teacher in words; empty before any is known."""
        known = [("best", self.best), ("baseline", self.baseline), ("teacher", self.teacher)]
        parts = [f"{name} {value:.4f}" for name, value in known if value is not None]
        return f"{self.metric}: {', '.join(parts)}" if parts else ""

    def speed(self) -> str:
        """Return the tokens per second and time left in words; empty where neither is known."""
        rate = "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s"
        return ", ".join(part for part in (rate, self._time()) if part)

    def _time(self) -> str:
        if self.seconds_left is None:
            return ""
        said = format_duration(max(1, round(abs(self.seconds_left))))
        return f"{said} left" if self.seconds_left > 0 else f"{said} over the planned time"


def memory_part(name: str) -> str:
    """Return what a part of the memory of training is called, by its field."""
    return {"shown_bytes": "rounded copies"}.get(name, name.removesuffix("_bytes"))


class View:
    """Where a search shows its progress: a context manager that prints one line for each change.

    Args:
        stream: Usually stderr.
        interval: Seconds that pass at least between two lines that say nothing but speed and time left.
        clock: Seconds from any beginning.
    """

    def __init__(
        self, stream: TextIO, interval: float = _SECONDS_BETWEEN_LINES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream
        self._interval = interval
        self._clock = clock
        self._shown: tuple[Any, ...] | None = None
        self._said: tuple[str, ...] = ()
        self._when = 0.0

    def update(self, progress: Progress) -> None:
        """Show new figures."""
        # Trials begin as others end, so the number of running ones alone is not worth a line.
        counts = (progress.done, progress.paused, progress.stopped, progress.rejected, progress.failed)
        key = (progress.phase, *counts, progress.quality())
        now = self._clock()
        if key == self._shown and now - self._when < self._interval:
            return
        self._shown, self._when = key, now
        # What the lines before have said already is not said again.
        parts = [part for part in (progress.trials(), progress.quality()) if part not in self._said]
        self._said = (progress.trials(), progress.quality())
        self.log(f"{progress.phase}: {'; '.join(filter(None, [*parts, progress.speed()]))}".removesuffix(": "))

    def log(self, line: str) -> None:
        """Print one line, without any control codes in it."""
        print(printable(line), file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class LiveView(View):
    """A few lines on a terminal that are drawn anew, with the log scrolling above them."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._progress: Progress | None = None
        # stdout is left alone: it may carry the one JSON document of the search.
        from rich.console import Console
        from rich.live import Live

        self._live = Live(
            console=Console(file=stream), refresh_per_second=4, redirect_stdout=False, get_renderable=self._draw
        )

    def update(self, progress: Progress) -> None:
        """Show new figures."""
        self._progress, self._when = progress, self._clock()
        self._live.refresh()

    def _draw(self) -> Table | str:
        """The figures, with the time left running down between two updates."""
        progress = self._progress
        if progress is None:
            return ""
        if progress.seconds_left is not None:
            progress = replace(progress, seconds_left=progress.seconds_left - (self._clock() - self._when))
        return panel(progress)

    def log(self, line: str) -> None:
        """Print one line above the figures."""
        from rich.text import Text

        self._live.console.print(Text(printable(line)))

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()


def open_view(stream: TextIO | None = None, environ: Mapping[str, str] = os.environ) -> View:
    """A live view on a terminal; plain lines where the stream is none, TERM is dumb or missing, or NO_COLOR is set.

    Args:
        stream: Where to, by default stderr.
        environ: The environment's variables.
    """
    stream = sys.stderr if stream is None else stream
    plain = not stream.isatty() or environ.get("TERM", "dumb") in ("", "dumb", "unknown") or environ.get("NO_COLOR")
    return View(stream) if plain else LiveView(stream)


def printable(text: str) -> str:
    """The text in one line, its control characters (escape sequences among them) made harmless spaces."""
    return _CONTROL.sub(" ", text)


def panel(progress: Progress) -> Table:
    """The figures as the lines of the live view."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    lines = [
        ("phase", progress.phase),
        ("trials", progress.trials()),
        ("quality", progress.quality()),
        ("speed", progress.speed()),
    ]
    for title, words in lines:
        if words:
            grid.add_row(Text(title, style="bold cyan"), Text(printable(words)))
    return grid


def leaderboard_table(
    ranked: Sequence[Ranked], metric: str = "accuracy", width: int = 100, legend: int | None = None
) -> str:
    """The leaderboard in aligned columns of plain text, and below it what the strategies of its trials are.

    Columns without a figure are left out, and on a narrow terminal those that matter least.

    Args:
        ranked: The rows in their order.
        metric: The figure that ranks.
        width: Characters of a line.
        legend: How many strategies are told, the best first; of all by default.
    """
    kept = "retention" if metric == "accuracy" else "accuracy retention"
    titles = ["#", "row", metric, kept, "memory", "size", "latency", "trained"]
    lines = [[printable(cell) for cell in _cells(one, metric)] for one in ranked]
    shown = _columns(titles, lines, width)
    cells = [[line[index] for index in shown] for line in (titles, *lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    body = ["  ".join(map(_aligned, line, widths, shown)).rstrip() for line in cells]
    notes = {
        "= tied with the best: within one standard error": any(one.tied for one in ranked),
        "* on the front: no row beats it in one objective without losing in another": any(one.front for one in ranked),
        "~ predicted": any(cell.startswith("~") for line in lines for cell in line),
        "! over the budget": any(not one.row.feasible and one.row.reason not in WITHIN_LIMITS for one in ranked),
        **{f"! {gone}": any(one.row.reason == gone for one in ranked) for gone in WITHIN_LIMITS},
        f"{kept}: share of the teacher's accuracy": bool(ranked) and _KEPT in shown,
        "trained: 1x is as many tokens as the plan gives a trial": bool(ranked) and _TRAINED in shown,
        "rows with less training than that stand last": any(one.row.feasible and not one.row.full for one in ranked),
    }
    note = "; ".join(text for text, needed in notes.items() if needed)
    told = _strategies([one.row for one in ranked])
    strategies = [line for text in told[:legend] for line in wrapped(text, width)]
    said = [line for text in (note, rests_on([one.row for one in ranked])) if text for line in wrapped(text, width)]
    return "\n".join([*body, *said, *([""] if strategies else []), *strategies])


def fitting(
    rows: Sequence[Sequence[str]], columns: Iterable[int], least: Iterable[int], width: int | None
) -> list[int]:
    """Return which columns of a table are shown: all, but for those that matter least where a line has no room for
    them.

    Args:
        rows: Cells, the titles first.
        columns: Places of the columns.
        least: Places of those that may be left out, the one that matters least first.
        width: Characters of a line, with two between columns; None where nothing limits it.
    """
    shown = list(columns)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for one in least:
        if width is None or sum(widths[index] + 2 for index in shown) - 2 <= width:
            break
        shown.remove(one)
    return shown


def wrapped(text: str, width: int, indent: int = 2) -> list[str]:
    """A text as lines of a width, those after the first indented by so many characters."""
    return textwrap.wrap(
        printable(text), width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


_KEPT, _SIZE, _LATENCY, _TRAINED = 3, 5, 6, 7


def _columns(titles: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return which columns are shown: those with figures, and of them what fits the width, by how much they matter."""
    shown = [index for index in range(len(titles)) if index != _LATENCY or any(line[_LATENCY] != "-" for line in lines)]
    return fitting([titles, *lines], shown, (_SIZE, _KEPT, _TRAINED), width)


def _aligned(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column < 3 else cell.rjust(width)


def _cells(one: Ranked, metric: str) -> list[str]:
    row = one.row
    marks = {"=": one.tied, "*": one.front, "!": not row.feasible}
    return [
        f"{one.place}{''.join(mark for mark, holds in marks.items() if holds)}",
        row.short_id,
        row.shown(metric),
        "-" if row.retention is None else f"{row.retention:.1%}",
        memory_cell(row),
        _estimated(row.size_bytes, None, format_bytes),
        _estimated(*_latency(row), lambda ms: format_duration(ms / 1e3)),
        _trained(row),
    ]


def _trained(row: Row) -> str:
    """Training in times the plan's tokens; a student as it begins has a strategy, but none."""
    if row.strategy is None or row.kind in UNTRAINED:
        return "-"
    return f"{1.0 if row.fidelity is None and row.full else row.fidelity or 0.0:.3g}x"


def memory_cell(row: Row) -> str:
    """The memory of a row for a table, marked where it is predicted."""
    return _estimated(row.memory_bytes, row.memory_source, format_bytes)


def _latency(row: Row) -> tuple[float | None, str | None]:
    """Measured in the runtime, or else predicted where that was asked for, and which of the two."""
    if row.latency_ms is not None:
        return row.latency_ms, row.latency_source
    return row.figure(PREDICTED_LATENCY), "predicted"


def _estimated(value: float | None, source: str | None, write: Callable[[float], str]) -> str:
    return "-" if value is None else ("~" if source == "predicted" else "") + write(value)


def _strategies(rows: Sequence[Row]) -> list[str]:
    """Return what the students are, the best first; those of one strategy, like one that was trained further,
    together.
    """
    told: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.strategy is None:
            continue
        untrained = row.kind in UNTRAINED
        described = f"{row.strategy.init.describe()}, untrained" if untrained else row.strategy.describe()
        # A proposed strategy is named by a description of itself, which is what follows.
        name = "" if untrained or row.kind in ("student", CONFIRMATION) else f" {row.name}"
        trials = told.setdefault((described, name), [])
        trials += [] if row.trial in trials else [row.trial]
    return [f"{', '.join(trials)}{name}: {described}" for (described, name), trials in told.items()]
