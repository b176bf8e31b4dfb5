"""The report of a run on one page: the request, the results, their cost, and how to repeat the run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autodistill.evaluation.base import Direction
from autodistill.hardware.budget import read_budget
from autodistill.runs.events import RowAdded, RowTested, RunEvent, TrialEnded, of_kind, rows_of
from autodistill.runs.markdown import fenced, paragraph, plain
from autodistill.runs.results import finalists
from autodistill.runs.results.differences import differences, shown
from autodistill.runs.results.gains import Gains, named
from autodistill.runs.results.leaderboard import UNTRAINED, Ranked, limits_of, nearest, rank, rests_on
from autodistill.runs.results.objectives import Objective, front, objectives_of
from autodistill.runs.results.row import FORGOT, Row, Status, task_figures
from autodistill.runs.results.selection import KIND, Confirmation, chosen, confirmations, contenders, students_only
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.savings import Saved
from autodistill.runs.test_split_ledger import opened, openings_of
from autodistill.units import format_bytes, format_duration, with_error
from autodistill.utils.json_files import replacing

_TITLES = {"student": "found student", "baseline": "baseline to beat", "initial": "untrained student"}


def report_markdown(
    search: Mapping[str, Any],
    ranked: Sequence[Ranked],
    events: Iterable[RunEvent],
    *,
    openings: Mapping[str, int] | None = None,
) -> str:
    """Return the page as Markdown; sections without recorded data are left out.

    Args:
        search: `search.json`: `name`, `command`, `budget` (as `Budget.to_json`), `metric`, `direction`, and, if they
            are known, `teacher`, `data`, `space`, `plan`, `seconds` (by phase), `saved`, `runtime`, `licenses` (name to
            licence), `versions`, `notes`. A mapping under `teacher` or `data` is written as its fields.
        ranked: The leaderboard.
        events: The log. The page uses the ends of trials, and the rows of the test split and of further seeds.
        openings: How often each run in the same folder opened the test split of the same data; none by default.
    """
    events = list(events)
    metric, direction = str(search.get("metric", "accuracy")), search.get("direction", "max")
    further = [row for row in rows_of(events) if row.kind == KIND and row.split != "test"]
    rows = [*(one.row for one in ranked), *further]
    confirmed = confirmations(rows, metric, direction)
    gains = Gains.from_json(search)
    sections = [
        f"# {plain(search.get('name', 'A search'))}",
        plain(gains.describe()) if gains is not None else "",
        _asked(search),
        _answer(search, rows, ranked, confirmed),
        "## Leaderboard\n\n" + _leaderboard(ranked, metric),
        "Charts are in `report.html`, next to this page.",
        _confirmed(confirmed, ranked),
        _front(search, ranked),
        _failed_trials(events),
        _compute_saved(search),
        _finalists([one.row for one in ranked]),
        _verified(search.get("runtime", {})),
        _test(_tested(events, search.get("test")), metric, openings or {}, gains.exported if gains else None),
        _pairs("Seconds by phase", {k: f"{v:.1f}" for k, v in search.get("seconds", {}).items()}),
        _command(search),
        _pairs("Versions", search.get("versions", {})),
        _pairs("Licences", search.get("licences", {})),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_report(run: RunFolder) -> None:
    """Write `report.md` into the run's folder.

    Raises:
        InputError: `search.json` or the log cannot be read.
    """
    search = run.read_settings()
    events = run.events.all()
    metric, direction = search.get("metric", "accuracy"), search.get("direction", "max")
    ranked = rank(contenders(rows_of(events)), metric, direction)
    text = report_markdown(search, ranked, events, openings=openings_of(run.path.parent, search))
    with replacing(run.path / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")


def asked_facts(search: Mapping[str, Any]) -> dict[str, str]:
    """Return what was requested and planned, in words, by name.

    Args:
        search: `search.json`.
    """
    facts = {name: search[name] for name in ("teacher", "data", "space") if name in search}
    if search.get("warm_start", {}).get("runs"):
        facts["warm start from"] = search["warm_start"]["runs"]
    if "budget" in search:
        facts["budget"] = read_budget(search["budget"]).describe()
    plan = search.get("plan") or {}
    facts |= {name: plan[name] for name in ("trials", "tokens", "rungs", "workers", "threads", "seed") if name in plan}
    facts |= _training(plan) | _evaluation(plan, search)
    if search.get("scoring", "float32") != "float32":
        facts["scored in"] = search["scoring"]
    if plan.get("box_seconds"):
        facts["time budget"] = format_duration(plan["box_seconds"])
    return {name: _value(value) for name, value in facts.items()}


def notes_of(search: Mapping[str, Any]) -> list[str]:
    """Return the notes that a person must read about a run: those of its plan and its own, each once."""
    return list(dict.fromkeys([*(search.get("plan") or {}).get("notes", ()), *search.get("notes", ())]))


def _asked(search: Mapping[str, Any]) -> str:
    notes = (f"- {paragraph(note)}" for note in notes_of(search))
    return "\n\n".join([_pairs("Request", asked_facts(search)), *notes])


def _training(plan: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of training that are not part of the strategy, as far as the plan has them."""
    if "batch_tokens" not in plan:
        return {}
    return {
        "optimiser step": f"{plan['batch_tokens']:,} tokens in sequences of {plan['sequence_length']:,}",
        "schedule": f"{plan['warmup_tokens']:,} tokens of warm-up, the last {plan['decay']:.0%} of decay",
        "precision": "bf16" if plan["bf16"] else "float32",
    }


def _evaluation(plan: Mapping[str, Any], search: Mapping[str, Any]) -> dict[str, str]:
    """Return how many tokens are evaluated. Two runs on the same data are comparable only if this is the same."""
    if "eval_tokens" not in plan:
        return {}
    held = (search.get("data") or {}).get("tokens") or {}
    read = {"validation": plan["eval_tokens"], "test": plan["test_tokens"]}
    shares = [
        f"{count:,}{f' of {held[name]:,}' if name in held else ''} tokens of {name}" for name, count in read.items()
    ]
    return {"evaluated on": f"{', '.join(shares)}; at a rung {plan['rung_eval_tokens']:,} of validation"}


def _answer(
    search: Mapping[str, Any], rows: Sequence[Row], ranked: Sequence[Ranked], confirmed: Sequence[Confirmation]
) -> str:
    """Return the section about the chosen row, or about the nearest candidate if nothing fits the budget.

    Args:
        search: `search.json`.
        rows: Rows of the validation split, including those of further seeds.
        ranked: The leaderboard.
        confirmed: Means over seeds.
    """
    metric, direction, only = search.get("metric", "accuracy"), search.get("direction", "max"), students_only(search)
    best = chosen(rows, metric, direction, students_only=only)
    if best is None:
        limits = limits_of(read_budget(search["budget"])) if "budget" in search else {}
        needs = {f"{row.name} as {row.deployment_name}": {n: row.figure(n) for n in limits} for row in contenders(rows)}
        closest = nearest(needs, limits)
        reason = f" The nearest candidate, {plain(closest.candidate)}, {closest.describe()}." if closest else ""
        whatever = chosen(rows, metric, direction, students_only=False)
        what = "No trained student fits the budget." if whatever is not None else "Nothing fits the budget."
        return f"## Answer\n\n{what}{reason}"
    parts = [f"**{plain(best.name)}** ({best.kind}) as {best.deployment_name}: {plain(metric)} {best.shown(metric)}"]
    if best.retention is not None:
        parts.append(f"{best.retention:.1%} of the teacher's")
    if best.memory_bytes is not None:
        parts.append(f"{format_bytes(best.memory_bytes)} of memory ({best.memory_source or 'source not recorded'})")
    if short := _short(best):
        parts.append(short)
    tied = sum(one.tied for one in ranked) if ranked[0].row == best else 0
    why = f" It is the smallest of {tied} rows that {plain(metric)} cannot tell apart." if tied else ""
    if confirmed and best.trial == confirmed[0].trial:
        why = f" It was chosen by its mean on {len(confirmed[0].seeds)} seeds."
    return "## Answer\n\n" + ", ".join(parts) + "." + why + _compared_with_untrained(best, rows, metric, direction)


def _compared_with_untrained(best: Row, rows: Sequence[Row], metric: str, direction: Direction) -> str:
    """Name the best trained student if the best row is untrained; otherwise, an untrained row that is better."""
    student = chosen(rows, metric, direction, students_only=True)
    if best.kind in UNTRAINED and any(row.reason == FORGOT for row in rows):
        return f" It is {plain(named(best))}: what was trained forgot general text, and was passed over."
    if best.kind in UNTRAINED:
        said = f" It is {plain(named(best))}: no trained student is better"
        if student is None:
            return f"{said}, and no trained student fits."
        return f"{said}. The first trained student is {_told(student, metric)}."
    whatever = chosen(rows, metric, direction, students_only=False)
    if whatever is None or whatever.kind not in UNTRAINED:
        return ""
    return f" Only trained students could be chosen. Better is {_told(whatever, metric)}, which needs no training."


def _told(row: Row, metric: str) -> str:
    parts = [plain(named(row)), f"{plain(metric)} {row.shown(metric)}", _short(row)]
    return ", ".join(filter(None, parts))


def _confirmed(confirmed: Sequence[Confirmation], ranked: Sequence[Ranked]) -> str:
    """Return the section with the means over seeds, the chosen strategy first."""
    if not confirmed:
        return ""
    packed = {one.row.row_id: one.row.deployment_name for one in ranked}
    lines = [
        [
            item.trial,
            item.name,
            packed.get(item.row_id, "-"),
            with_error(item.mean, item.stderr),
            with_error(item.difference, item.difference_stderr, "+.4f"),
        ]
        for item in confirmed
    ]
    note = (
        f"Means over the seeds {', '.join(map(str, confirmed[0].seeds))}; the first row was chosen: the best, or the "
        "smallest of those within one standard error of it, paired by seed."
    )
    return "## Further seeds\n\n" + _table(["trial", "name", "deployment", "mean", "minus best"], lines) + "\n\n" + note


def _short(row: Row) -> str:
    return "" if row.full else f"after {row.figure('fidelity') or 0:.0%} of the plan's tokens only"


def _leaderboard(ranked: Sequence[Ranked], metric: str) -> str:
    titles = ["#", "row", "name", metric, "retention", "perplexity", "agreement", "memory", "size", "latency"]
    lines = [
        [
            f"{one.place}{' =' if one.tied else ''}",
            one.row.row_id,
            one.row.name,
            one.row.shown(metric),
            _shown(one.row.retention, "{:.1%}"),
            _shown(one.row.perplexity, "{:.2f}"),
            _shown(one.row.agreement, "{:.3f}"),
            _sourced(one.row.memory_bytes, one.row.memory_source, format_bytes),
            _sourced(one.row.size_bytes, None, format_bytes),
            _sourced(one.row.latency_ms, one.row.latency_source, lambda ms: format_duration(ms / 1e3)),
            _shown(1.0 if one.row.fidelity is None and one.row.full else one.row.fidelity, "{:.0%}"),
            "" if one.row.feasible else one.row.reason or "over the budget",
        ]
        for one in ranked
    ]
    note = "`=`: tied with the best by the metric, within one standard error of the difference paired by document."
    rest = rests_on([one.row for one in ranked])
    return _table([*titles, "fidelity", "limits"], lines) + "\n\n" + " ".join(filter(None, [note, rest]))


def _front(search: Mapping[str, Any], ranked: Sequence[Ranked]) -> str:
    """Return the section with the Pareto front, if there are several objectives."""
    objectives = objectives_of(search)
    if len(objectives) < 2:
        return ""
    lines = [
        [row.row_id, row.name, *(_objective(row, objective) for objective in objectives)]
        for row in front([one.row for one in ranked], objectives)
    ]
    titles = [f"{one.name} ({'more' if one.direction == 'max' else 'less'} is better)" for one in objectives]
    device = f" Latencies are predicted for {plain(search['device']['name'])}." if search.get("device") else ""
    note = "No other row beats one of these in one objective without losing in another." + device
    return "## Pareto front\n\n" + _table(["row", "name", *titles], lines) + "\n\n" + note


def _objective(row: Row, objective: Objective) -> str:
    value = row.figure(objective.figure) or 0.0
    if objective.trained:
        return row.shown(objective.figure)
    return format_bytes(value) if objective.figure.endswith("_bytes") else format_duration(value / 1e3)


def _failed_trials(events: Iterable[RunEvent]) -> str:
    last = {event.trial: event for event in of_kind(events, TrialEnded)}
    lines = [
        [trial, event.status.value, event.reason or event.cause or "not recorded"]
        for trial, event in last.items()
        if event.status in (Status.REJECTED, Status.FAILED)
    ]
    return "## Rejected and failed trials\n\n" + _table(["trial", "status", "reason"], lines) if lines else ""


def _compute_saved(search: Mapping[str, Any]) -> str:
    said = Saved(**search["saved"]).describe() if "saved" in search else ()
    return "## Compute saved\n\n" + "\n".join(f"- {sentence}." for sentence in said) if said else ""


def _finalists(rows: Sequence[Row]) -> str:
    """Return the table of the rows that were read by their runtimes."""
    lines = finalists.table(rows)
    return "## Finalists in their runtimes\n\n" + _table(list(finalists.TITLES), lines) if lines else ""


def _verified(checks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the section on how the exported files compare with the evaluated students in their runtimes."""
    if not checks:
        return ""
    lines = [
        [
            container,
            _shown(check.get("loss"), "{:.4f}"),
            with_error(check.get("excess"), check.get("excess_stderr"), "+.4f"),
            f"{check['agreement']:.1%} of {check['positions']:,}",
            f"{check['same_cut']:.1%}",
        ]
        for container, check in checks.items()
    ]
    titles = ["file", "nats a token in its runtime", "more than evaluated", "same token", "text tokenised alike"]
    return "## The files in their runtimes\n\n" + _table(titles, lines)


def _tested(events: Iterable[RunEvent], ids: Sequence[str] | None) -> list[Row]:
    """Return the rows of the test split with which a search ended, in its order.

    If a search was resumed after its end, the log also has older rows, which are left out.
    """
    rows = {row.row_id: row for row in rows_of(events, (RowAdded, RowTested)) if row.split == "test"}
    return list(rows.values()) if ids is None else [rows[name] for name in ids if name in rows]


def _test(rows: Sequence[Row], metric: str, openings: Mapping[str, int], exported: str | None) -> str:
    tasks = task_figures(rows, metric)
    lines = [
        [
            _TITLES.get(row.kind, row.kind) + (", exported" if row.row_id == f"{exported}-test" else ""),
            row.row_id,
            row.name,
            _shown(row.fidelity, "{:.0%}"),
            row.shown(metric),
            _shown(row.retention, "{:.1%}"),
            _shown(row.perplexity, "{:.2f}"),
            *(row.shown(name) for name in tasks),
        ]
        for row in rows
    ]
    titles = ["what", "row", "name", "fidelity", metric, "retention", "perplexity", *tasks]
    if not lines:
        return ""
    compared = shown(differences(rows, exported))
    note = (
        "\n\nPaired by document, each with its bootstrapped standard error; of a perplexity, that of its logarithm:\n\n"
    )
    more = note + _table(compared[0], compared[1:]) if compared else ""
    more = "\n\n".join(filter(None, [more, rests_on(rows)]))
    ledger = f"\n\n{plain(opened(openings))}" if openings else ""
    return "## Test split\n\n" + _table(titles, lines) + more + ledger


def _command(search: Mapping[str, Any]) -> str:
    if "command" not in search:
        return ""
    return f"## How to repeat this run\n\n{fenced(search['command'])}"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _sourced(value: float | None, source: str | None, write: Any) -> str:
    return "-" if value is None else f"{write(value)}{f' ({source})' if source else ''}"


def _pairs(title: str, pairs: Mapping[str, Any]) -> str:
    if not pairs:
        return ""
    return f"## {title}\n\n" + _table(["", ""], [[name, _value(value)] for name, value in pairs.items()])


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        # Fields that are zero, false or unknown are left out: they say nothing to a reader.
        shown = ((name.replace("_", " "), _value(item)) for name, item in value.items() if item)
        return ", ".join(f"{name} {text}" for name, text in shown if text)
    if isinstance(value, list | tuple):
        return ", ".join(_value(item) for item in value)
    return str(value)


def _table(titles: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    rows = [titles, ["---"] * len(titles), *lines]
    return "\n".join("| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows)
