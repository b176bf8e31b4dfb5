"""Everything that made a row of a leaderboard, from the records of its run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.runs.events import RowAdded, RowTested, RungReached, TrialAdded
from autodistill.runs.report import asked_facts
from autodistill.runs.results.beginnings import trained_trial
from autodistill.runs.results.leaderboard import rests_on
from autodistill.runs.results.row import Row
from autodistill.runs.run_folder import RunFolder, no_runs, read_each

_NEAR = 4  # most ids that are suggested instead of an unknown one
_NOT_RECORDED = "not recorded: the run is of an earlier version"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A row, and its run.

    Attributes:
        run: The run.
        row: The row.
    """

    run: RunFolder
    row: Row

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return everything that made the row, by heading and name."""
        asked, row = self.run.read_settings(), self.row
        teacher, data = dict(asked.get("teacher", {})), dict(asked.get("data", {}))
        plan: Mapping[str, Any] = asked.get("plan") or {}
        trial = next((one for one in self.run.events.of(TrialAdded) if one.trial == trained_trial(row)), None)
        rungs = [rung for rung in self.run.events.of(RungReached) if rung.trial == trained_trial(row)]
        last = max(rungs, key=lambda rung: rung.tokens, default=None)
        alone = last is not None and last.workers > 1
        training = {
            "strategy": row.strategy.describe() if row.strategy else None,
            "strategy id": row.strategy_id,
            "tokens": row.train_tokens,
            "fidelity": row.fidelity,
            "share of the way to the end": row.interpolation,
            "fidelity at most": trial.length if trial else None,
            "seed": row.seed,
            "threads": plan.get("alone") if alone else plan.get("threads"),
            "precision": None if "bf16" not in plan else "bf16" if plan["bf16"] else "float32",
            "student's files": last.student if last else None,
            "registered": row.other.get("registered"),
        }
        read = asked_facts(asked).get("evaluated on")
        return {
            "row": {
                "id": row.row_id,
                "run": self.run.name,
                "kind": row.kind,
                "stored and served as": row.deployment.name,
                "split": row.split,
                "command": asked.get("command"),
                "created": asked.get("created"),
            },
            "teacher": {
                "name": teacher.get("name"),
                "reference": teacher.get("reference"),
                "commit": teacher.get("revision"),
                "hash": teacher.get("fingerprint"),
                "codes of its own": teacher.get("stored_as"),
            },
            "data": {
                "name": data.get("name"),
                "reference": data.get("reference"),
                "commit": data.get("revision"),
                "hash": data.get("fingerprint"),
                "read": read,
                "errors": rests_on([row]) or None,
            },
            "space": {"name": asked.get("space"), "hash": asked.get("space_hash"), "seed": asked.get("seed")},
            "training": training if row.kind != "teacher" else {},
            "code": dict(asked.get("code") or {"version": _NOT_RECORDED}),
            "packages": dict(asked.get("versions") or {"versions": _NOT_RECORDED}),
            "machine": dict(asked.get("machine") or {"name": row.machine or _NOT_RECORDED}),
            "figures": _figures(row),
        }


def origin(row_id: str, out: Path, on: str | None = None) -> Origin:
    """Find a row by its id.

    Args:
        row_id: The id as tables show it. The name of its run and a "/" may precede it.
        out: Folder that holds the runs.
        on: The run. By default, all runs are searched.

    Raises:
        InputError: No row has that id, and the message suggests similar ones; or rows of several runs have it.
    """
    if on is None and "/" in row_id:
        on, _, row_id = row_id.partition("/")
    runs = read_each(out, _rows_of, [] if on is None else [on])
    if not runs:
        raise no_runs(out)
    found = [
        Origin(run=run, row=row)
        for run, rows in runs.values()
        for row in rows.values()
        if row_id in (row.row_id, row.short_id)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        told = ", ".join(one.run.name for one in found)
        raise InputError(f"several runs have a row {row_id!r} ({told}): name one of them with --on")
    known = list(dict.fromkeys(name for _, rows in runs.values() for name in rows))
    if row_id in runs:
        offered = f"that is a run: name one of its rows, which autodistill leaderboard {row_id} shows"
    elif near := difflib.get_close_matches(row_id, known, _NEAR, 0.5):
        offered = f"near it are {', '.join(near)}"
    else:
        offered = "autodistill leaderboard shows the existing ones" if known else "there are no rows yet"
    where = f"the run {on!r} has" if on is not None else f"the runs in {out} have"
    raise InputError(f"{where} no row {row_id!r}: {offered}")


def _rows_of(run: RunFolder) -> tuple[RunFolder, dict[str, Row]]:
    """Return a run with its rows by id."""
    return run, {row.row_id: row for row in run.events.rows(RowAdded, RowTested)}


def said(document: Mapping[str, Mapping[str, Any]]) -> str:
    """Return what made a row as text. Unknown values are left out."""
    lines = []
    for heading, facts in document.items():
        known = {name: value for name, value in facts.items() if value is not None}
        if known:
            wide = max(map(len, known))
            lines += [f"{heading}:", *(f"  {name:<{wide}}  {value}" for name, value in known.items())]
    return "\n".join(lines)


def _figures(row: Row) -> dict[str, Any]:
    names = ("accuracy", "perplexity", "agreement", "retention", "memory_bytes", "size_bytes", "latency_ms")
    others = [name for name in row.other if not name.endswith("_stderr") and row.figure(name) is not None]
    found: dict[str, Any] = {}
    for name in (*names, *others):
        value, error = row.figure(name), row.figure(f"{name}_stderr")
        if value is not None:
            source = {"memory_bytes": row.memory_source, "latency_ms": row.latency_source}.get(name)
            found[name] = f"{value:.10g}{'' if error is None else f' ± {error:.4g}'}{f' ({source})' if source else ''}"
    return found
