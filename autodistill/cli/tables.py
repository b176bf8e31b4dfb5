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

# rich is only imported when something is drawn. Most commands print plain text, and end sooner than the import would.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a search has done so far.

    Attributes:
        phase: The current phase, like "teacher cache" or "trials".
        planned: Number of trials in the plan.
        done, running, paused, stopped, rejected, failed: Number of trials by state. `done` trials reached full
            fidelity. `paused` trials wait at a rung and may still be promoted.
        metric: Name of the figure that ranks.
        best, baseline, teacher: That figure of the best row so far, the baseline and the teacher. None until known.
        tokens_per_second: Training speed of all workers together, or None.
        seconds_left: Seconds until the plan's end, negative after it, or None.
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
        """Return the trials in words, or "" before any is planned."""
        if not self.planned:
            return ""
        counts = f"{self.done} of {self.planned} done, {self.running} running, {self.paused} paused"
        return f"{counts}, {self.stopped} stopped, {self.rejected} rejected, {self.failed} failed"

    def quality(self) -> str:
        """Return the best so far, the baseline and the teacher in words, or "" before any is known."""
        known = [("best", self.best), ("baseline", self.baseline), ("teacher", self.teacher)]
        parts = [f"{name} {value:.4f}" for name, value in known if value is not None]
        return f"{self.metric}: {', '.join(parts)}" if parts else ""

    def rate(self) -> str:
        """Return the tokens per second in words, or "" before any are known."""
        return "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s"

    def speed(self) -> str:
        """Return the tokens per second and the time left in words, or "" if neither is known."""
        return ", ".join(part for part in (self.rate(), self.time()) if part)

    def time(self) -> str:
        """Return the time left in words, or "" if there is no limit."""
        if self.seconds_left is None:
            return ""
        said = format_duration(max(1, round(abs(self.seconds_left))))
        return f"{said} left" if self.seconds_left > 0 else f"{said} over the planned time"


def memory_part(name: str) -> str:
    """Return the name that is printed for a part of training memory, from its field."""
    return {"shown_bytes": "rounded copies"}.get(name, name.removesuffix("_bytes"))


class View:
    """A context manager that shows a search's progress as one printed line for each change.

    Args:
        stream: Where to print, usually stderr.
        interval: Least seconds between two lines that only report speed and time left.
        clock: Returns seconds from any starting point.
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
        # The number of running trials is left out of the key: a trial starts when another ends, which is no news.
        counts = (progress.done, progress.paused, progress.stopped, progress.rejected, progress.failed)
        key = (progress.phase, *counts, progress.quality())
        now = self._clock()
        if key == self._shown and now - self._when < self._interval:
            return
        self._shown, self._when = key, now
        # Do not repeat what the line before said. A speed is measured when a segment of a trial ends: while a long one
        # runs, an old speed would look like that of this trial.
        said = (progress.trials(), progress.quality(), progress.rate())
        trials, quality, rate = ("" if part in self._said else part for part in said)
        self._said = said
        speed = ", ".join(filter(None, (rate, progress.time())))
        self.log(f"{progress.phase}: {'; '.join(filter(None, (trials, quality, speed)))}".removesuffix(": "))

    def log(self, line: str) -> None:
        """Print one line, without any control codes in it."""
        print(printable(line), file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class LiveView(View):
    """A view that redraws a few lines on a terminal, with the log scrolling above them."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._progress: Progress | None = None
        # stdout is not used, because it may carry the JSON document of the search.
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
        """Return the figures. The time left also counts down between two updates."""
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
    """Return a live view, or a plain one if there is no terminal, TERM is dumb or missing, or NO_COLOR is set.

    Args:
        stream: Where to print; by default stderr.
        environ: The environment variables.
    """
    stream = sys.stderr if stream is None else stream
    plain = not stream.isatty() or environ.get("TERM", "dumb") in ("", "dumb", "unknown") or environ.get("NO_COLOR")
    return View(stream) if plain else LiveView(stream)


def printable(text: str) -> str:
    """Return the text in one line, with control characters and escape sequences replaced by spaces."""
    return _CONTROL.sub(" ", text)


def panel(progress: Progress) -> Table:
    """Return the figures as the lines of the live view."""
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
    """Return the leaderboard in aligned columns of plain text, with its trials' strategies below.

    Columns without a figure are left out. On a narrow terminal, the least important columns are left out too.

    Args:
        ranked: The rows in their order.
        metric: The figure that ranks.
        width: Characters of a line.
        legend: How many strategies are described, the best first. All by default.
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
        "rows with less training than that are listed last": any(
            one.row.feasible and not one.row.full for one in ranked
        ),
    }
    note = "; ".join(text for text, needed in notes.items() if needed)
    told = _strategies([one.row for one in ranked])
    strategies = [line for text in told[:legend] for line in wrapped(text, width)]
    said = [line for text in (note, rests_on([one.row for one in ranked])) if text for line in wrapped(text, width)]
    return "\n".join([*body, *said, *([""] if strategies else []), *strategies])


def fitting(
    rows: Sequence[Sequence[str]], columns: Iterable[int], optional: Iterable[int], width: int | None
) -> list[int]:
    """Return which columns of a table are shown. If a line is too short, the least important ones are left out.

    Args:
        rows: Rows of cells, the titles first.
        columns: Indices of the columns.
        optional: Indices of columns that may be left out, the least important first.
        width: Characters of a line, with two between columns, or None for no limit.
    """
    shown = list(columns)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for one in optional:
        if width is None or sum(widths[index] + 2 for index in shown) - 2 <= width:
            break
        shown.remove(one)
    return shown


def wrapped(text: str, width: int, indent: int = 2) -> list[str]:
    """Wrap a text to lines of a width. Lines after the first are indented by `indent` characters."""
    return textwrap.wrap(
        printable(text), width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


_KEPT, _SIZE, _LATENCY, _TRAINED = 3, 5, 6, 7


def _columns(titles: Sequence[str], lines: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return which columns are shown: those with figures that fit the width, by importance."""
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
    """Return how many times the plan's tokens a row was trained for, or "-" if it is untrained."""
    if row.strategy is None or row.kind in UNTRAINED:
        return "-"
    return f"{1.0 if row.fidelity is None and row.full else row.fidelity or 0.0:.3g}x"


def memory_cell(row: Row) -> str:
    """Return the memory of a row for a table, with a mark if it is predicted."""
    return _estimated(row.memory_bytes, row.memory_source, format_bytes)


def _latency(row: Row) -> tuple[float | None, str | None]:
    """Return the latency and its source: measured in the runtime, or else predicted if that was asked for."""
    if row.latency_ms is not None:
        return row.latency_ms, row.latency_source
    return row.figure(PREDICTED_LATENCY), "predicted"


def _estimated(value: float | None, source: str | None, write: Callable[[float], str]) -> str:
    return "-" if value is None else ("~" if source == "predicted" else "") + write(value)


def _strategies(rows: Sequence[Row]) -> list[str]:
    """Return descriptions of the students, the best first.

    Trials of one strategy, such as a student and its extended training, share a line.
    """
    told: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.strategy is None:
            continue
        untrained = row.kind in UNTRAINED
        described = f"{row.strategy.init.describe()}, untrained" if untrained else row.strategy.describe()
        # The name of a proposed strategy is its description, which follows anyway.
        name = "" if untrained or row.kind in ("student", CONFIRMATION) else f" {row.name}"
        trials = told.setdefault((described, name), [])
        trials += [] if row.trial in trials else [row.trial]
    return [f"{', '.join(trials)}{name}: {described}" for (described, name), trials in told.items()]
