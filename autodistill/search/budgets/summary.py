"""Summary of a search for several budgets, read from its runs: a line for each budget, and a table of all rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autodistill.hardware.budget import Budget
from autodistill.runs.markdown import fenced, paragraph, plain
from autodistill.runs.results.differences import paired, paired_difference
from autodistill.runs.results.gains import Gains
from autodistill.runs.results.row import Row
from autodistill.runs.results.table import table_of, write_table
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.schema import about
from autodistill.runs.sessions import lasted
from autodistill.search.budgets.record import BudgetsFolder, Part, Record
from autodistill.units import format_bytes, with_error
from autodistill.utils.json_files import replacing

REPORT, TABLE = "report.md", "leaderboard.parquet"
HEAD = ("budget", "run", "exported", "value", "memory", "gain on test")


def document(out: Path, record: Record) -> dict[str, Any]:
    """Return what was found for each budget, as plain data.

    Args:
        out: Folder that holds the runs.
        record: The record of the search.

    Returns:
        "name", "metric", "direction", "budgets", "seconds" (used so far), "box_seconds" and "paths". Each of the
        budgets has "label", "budget" (its limits), "run", "same_as" (the label of the budget whose student it shares),
        "nothing_fits", "state" (of the run), "exported" and the gains as in a run's document, "best" (the exported
        row), "path" (of the exported student) and "better" (a smaller budget whose student is better, with its label,
        its run, the difference and its standard error).
    """
    runs = {one.label: RunFolder(out, str(one.run)) for one in record.own}
    found = {label: _of_run(run) for label, run in runs.items()}
    budgets = []
    for part in record.parts:
        serving = None if part.nothing_fits else record.serving(part)
        one = found[serving.label] if serving else _NOTHING
        budgets.append(
            {
                "label": part.label,
                "budget": part.budget,
                "run": part.run,
                "same_as": serving.label if serving and serving.label != part.label else None,
                "nothing_fits": part.nothing_fits or one.get("nothing_fits"),
                **{name: one[name] for name in ("state", "exported", *_GAINS, "best", "path")},
                "better": _better(part, serving, record, found) if serving else None,
            }
        )
    spent = record.prepared_seconds + math.fsum(lasted(run.events.all()) for run in runs.values())
    paths = {"report": str(out / record.name / REPORT), "rows": str(out / record.name / TABLE)}
    asked = next(iter(record.own)).search or {}
    return {
        "name": record.name,
        "metric": asked["metric"],
        "direction": asked["direction"],
        "budgets": budgets,
        "seconds": spent,
        "box_seconds": record.box_seconds,
        "paths": paths,
    }


_GAINS = ("gain_over_untrained", "gain_over_baseline", "gain_unit")
_NOTHING: Mapping[str, Any] = dict.fromkeys(("state", "exported", *_GAINS, "best", "path", "nothing_fits"))


def _of_run(run: RunFolder) -> dict[str, Any]:
    """Return what one run found. Values that are not known yet are None."""
    if not run.search_file.exists():
        return {**_NOTHING, "state": "not begun"}
    asked = run.read_settings()
    gains = {name: asked.get(name) for name in ("exported", *_GAINS)}
    if asked.get("exported") is None or "seconds" not in asked:
        # A run that finished without an export is one in which nothing fits.
        none = "nothing that was measured in its runtime fits" if run.state == "finished" else None
        return {**_NOTHING, "state": run.state, "nothing_fits": none}
    rows = run.events.rows(split="validation")
    best = next(row for row in rows if row.row_id == asked["exported"]["row_id"])
    return {
        **_NOTHING,
        **gains,
        "state": run.state,
        "best": best.to_json(),
        "path": str(run.student(best.deployment.container)),
    }


def _better(part: Part, serving: Part, record: Record, found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the smaller budget whose student is best on the validation split, if it beats this budget's student."""
    mine = found[serving.label]["best"]
    # A device counts memory differently and may limit latency, so a smaller budget's student may not fit it.
    if mine is None or type(part.limits) is not Budget:
        return None
    asked = serving.search or {}
    metric, sign = asked["metric"], 1.0 if asked["direction"] == "max" else -1.0
    row = Row.from_json(mine)
    best: dict[str, Any] | None = None
    most = 0.0
    for other in record.own:
        theirs = found[other.label]["best"]
        if theirs is None or other.limits.memory_bytes >= serving.limits.memory_bytes:
            continue
        difference = paired_difference(paired(Row.from_json(theirs), metric), paired(row, metric))
        if difference is not None and sign * difference[0] > most:
            most = sign * difference[0]
            best = {"label": other.label, "run": other.run, "value": difference[0], "stderr": difference[1]}
    return best


def cells(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the budgets as rows of a table with the columns of `HEAD`.

    Args:
        summary: The result of `document`.
    """
    return [_cells(one, summary["metric"]) for one in summary["budgets"]]


def _cells(one: Mapping[str, Any], metric: str) -> tuple[str, ...]:
    if one["best"] is None:
        return (one["label"], one["run"] or "-", "nothing fits" if one["nothing_fits"] else one["state"], "-", "-", "-")
    row, gains = Row.from_json(one["best"]), Gains.from_json(one)
    mark = "~" if row.memory_source == "predicted" else ""
    memory = "-" if row.memory_bytes is None else mark + format_bytes(row.memory_bytes)
    return (one["label"], one["run"], row.row_id, row.shown(metric), memory, _gain(gains))


def _gain(gains: Gains | None) -> str:
    if gains is None:
        return "-"
    if not gains.trained:
        return "no training is best"
    return gains.untrained.shown() if gains.untrained is not None else "-"


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """Return sentences about the budgets that complement their table.

    Args:
        summary: The result of `document`.
    """
    said = []
    for one in summary["budgets"]:
        label = one["label"]
        if one["nothing_fits"]:
            said.append(f"{label}: {one['nothing_fits']}.")
        elif one["same_as"]:
            said.append(f"{label}: the same student as {one['same_as']}; the budget does not bind.")
        if one["better"]:
            better = one["better"]
            gain = with_error(better["value"], better["stderr"], "+.4f")
            said.append(
                f"{label}: the student of {better['label']}, in {better['run']}, fits as well and is better on the "
                f"validation split ({gain} of {summary['metric']}): take that one."
            )
    said.append(
        "The gain is over the best that fits the budget of the run and needs no training, on the test split, paired "
        "by document. A value is of the validation split."
    )
    return said


def write_summary(folder: BudgetsFolder, record: Record, summary: Mapping[str, Any]) -> None:
    """Write the report, and all rows of all runs as one table, into the folder of the search.

    Args:
        folder: The folder of the search.
        record: The record of the search.
        summary: The result of `document`.
    """
    head = tuple(summary["metric"] if name == "value" else name for name in HEAD)
    lines = [f"| {' | '.join(map(plain, line))} |" for line in (head, *cells(summary))]
    lines.insert(1, "| --- " * len(head) + "|")
    each = [str(one.run) for one in record.own]
    text = "\n\n".join(
        (
            f"# {plain(record.name)}",
            "\n".join(lines),
            *map(paragraph, sentences(summary)),
            "Each run has its own report, and is resumed, extended, exported and compared like any other: "
            + ", ".join(f"[{plain(name)}](../{name}/report.md)" for name in each)
            + ".",
            fenced(record.command, "sh"),
        )
    )
    with replacing(folder.path / REPORT) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    import pyarrow as pa

    runs = [RunFolder(folder.path.parent, name) for name in each]
    tables = [table_of(run.events.rows(split="validation"), run.name) for run in runs if run.search_file.exists()]
    told = {run.name: about(run.read_settings()) for run in runs if run.search_file.exists()}
    write_table(pa.concat_tables(tables), folder.path / TABLE, told)
