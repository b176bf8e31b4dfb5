"""The page about a run: one file that shows what was asked, what was found, and how it was found."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from autodistill.report.cascade_chart import cascade_charts
from autodistill.report.charts import construction_of
from autodistill.report.contents import AGAINST, BUDGET, MOST_ROWS, Contents, chart_file, chart_of_importance, charts_of
from autodistill.report.document import document, specifications
from autodistill.report.html import Cell, items, pairs, paragraph, table, text
from autodistill.report.predictions import predictions
from autodistill.report.storage_chart import bytes_by_block, cut, in_order
from autodistill.report.training_charts import MOST_CURVES
from autodistill.runs.events import RungReached, TrialAdded, TrialEnded, of_kind
from autodistill.runs.report import asked_facts, notes_of
from autodistill.runs.results import finalists
from autodistill.runs.results.differences import differences, shown
from autodistill.runs.results.gains import named
from autodistill.runs.results.leaderboard import DISTILLED, Ranked, rests_on
from autodistill.runs.results.row import Row
from autodistill.units import format_bytes, format_duration, with_error

_NAMES = (
    'A name says what was tried: "80% even" is the share of layers that are kept, evenly spaced; "KD 0.4" is the share '
    "of the teacher's outputs in the loss, and T its temperature; lr is the learning rate; QAT trains weights on the "
    'grid of a format, and of these "scales alone" trains nothing but the grid\'s scales.'
)
_TITLES = {"nll": "loss (nats a token)", "kl": "KL of the teacher (nats a token)"}


def page(contents: Contents) -> str:
    """Return the page about a run as HTML. It is self-contained, and makes no request.

    Without Vega-Altair or vl-convert, the page has no charts, and says what to install for them.
    """
    drawn = specifications(lambda: charts_of(contents))
    head = sentence(contents) + _state(contents)
    return document(contents.name, head, list(_sections(contents, drawn or {})), drawn)


def sentence(contents: Contents) -> str:
    """Return what was asked and found in one sentence, with the gain over the best that needs no training."""
    asked, gains, best = contents.settings, contents.gains, contents.best
    of = " on ".join(str(asked[part].get("name", "?")) for part in ("teacher", "data") if part in asked)
    question = f"The best student{f' of {of}' if of else ''} within {contents.budget.describe()}"
    if best is None:
        return f"<p class=found>{text(question)}: nothing fits yet.</p>"
    metric = contents.metric
    facts = [f"{metric} {best.shown(metric)} on validation"]
    if best.memory_bytes is not None:
        facts.append(f"{format_bytes(best.memory_bytes)} of memory ({best.memory_source or 'source not recorded'})")
    answer = f"<strong>{text(named(best))}</strong>, {text(', '.join(facts))}"
    if gains is None:
        return f"<p class=found>{text(question)}, so far: {answer}.</p>"
    return f"<p class=found>{text(question)}: {answer}.</p>{paragraph(gains.describe())}{_better(contents, best)}"


def _better(contents: Contents, best: Row) -> str:
    """Return why the best row by the metric was not chosen, or "" if it was chosen."""
    metric, sign = contents.metric, 1 if contents.direction == "max" else -1
    rows = [row for row in contents.rows if row.kind in DISTILLED and row.full and row.figure(metric) is not None]
    first = max(rows, key=lambda row: sign * (row.figure(metric) or 0.0), default=best)
    if first.feasible or sign * ((first.figure(metric) or 0.0) - (best.figure(metric) or 0.0)) <= 0:
        return ""
    why = first.reason or "it is over the budget"
    return paragraph(f"{first.row_id} has a better {metric}, {first.shown(metric)}, and was passed over: {why}.")


def _state(contents: Contents) -> str:
    said = f"The run is {contents.state}."
    if contents.state != "under way":
        return f"<p class=state>{text(said)}</p>"
    choice = '<label class=check><input type=checkbox id="reload" checked> reload every 30 seconds</label>'
    return f"<div class=controls><span class=state>{text(said)}</span>{choice}</div>"


def _sections(contents: Contents, drawn: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the id, the title and the content of each section. A section without content is left out later."""
    asked, explanation = contents.settings, contents.explanation
    yield "budget", "The budget curve", _curve(contents, drawn)
    yield "bytes", "Where the bytes went", _bytes(contents, drawn)
    yield "learning", "Learning curves", _learning(contents, drawn)
    yield "race", explanation.race_title if explanation else "What the race decided", _race(contents)
    if explanation is not None:
        yield "importance", "What mattered", _importance(contents, drawn)
        yield "rejected", "How trials ended, and why", _ended(contents)
    yield "predicted", "Predicted and measured", _predicted(contents)
    yield "finalists", "Finalists in their runtimes", _finalists(contents)
    yield "leaderboard", "All rows", _rows(contents)
    yield "test", "Test split", _test(contents)
    yield "cascades", "Two models together", _cascades(contents, drawn)
    yield "seconds", "Seconds by phase", _seconds(contents, drawn)
    yield "request", "What was asked", pairs("What was asked", asked_facts(asked)) + items(notes_of(asked))
    yield (
        "repeat",
        "How to repeat this run",
        f"<pre tabindex=0>{text(asked['command'])}</pre>" if "command" in asked else "",
    )
    yield "versions", "Versions", pairs("Versions", asked.get("versions", {}))
    yield "licences", "Licences", pairs("Licences", asked.get("licences", {}))


def _finalists(contents: Contents) -> str:
    lines = finalists.table(contents.rows)
    what = (
        "The runtime that serves each file has read held-out text. The least loss chooses what is exported, and of "
        "equal ones the smallest file."
    )
    return paragraph(what) + table("Finalists", list(finalists.TITLES), lines) if lines else ""


def _chart(name: str, drawn: Mapping[str, Any], caption: str, place: str = "") -> str:
    """Return a chart's place and its caption, or "" if the chart is not drawn."""
    if name not in drawn:
        return ""
    own = f' id="{place}"' if place else ""
    said = f"<figcaption>{text(caption)}</figcaption>"
    return f'<figure><div class=chart{own} data-chart="{text(name)}"></div>{said}</figure>'


def _curve(contents: Contents, drawn: Mapping[str, Any]) -> str:
    curves = [name for name in drawn if name.startswith(f"{BUDGET}-")]
    what = (
        "Each point is a student or the teacher. The dashed line joins the points that no other point beats within the "
        "budget. Bars are one standard error. The red line is the budget. What is gray was passed over: it is over the "
        "budget, or forgot other text, as the text over the point and the table of all rows say."
    )
    if contents.solved:
        what += " Green bars are what was solved before training, and the green line joins the best of them."
    if not curves:
        return paragraph("No row has both a figure and a cost yet.") if drawn else ""
    metrics = list(dict.fromkeys(name.split("-", 1)[1].rpartition("-")[0] for name in curves))
    against = [cost for cost in AGAINST if any(name.endswith(f"-{cost}") for name in curves)]
    controls = _select("metric", "Figure", {name: _TITLES.get(name, name) for name in metrics})
    controls += _select("against", "Against", {cost: cost for cost in against})
    none = "<p id=no-curve role=status hidden>No row has both of these figures.</p>"
    solved = [(_figure_cell(one.kl), one) for one in contents.solved]
    told = [[one.deployment.name, one.how, Cell(format_bytes(one.bytes), one.bytes), kl] for kl, one in solved]
    return (
        f"<div class=controls>{controls}</div>{none}"
        + _chart(curves[0], drawn, what, "curve")
        + (
            "<h3>What was solved before training</h3>"
            + table("What was solved", ["stored as", "how", "memory", "KL of the teacher, untrained (nats)"], told)
            if told
            else ""
        )
    )


def _select(name: str, label: str, choices: Mapping[str, str]) -> str:
    options = "".join(f'<option value="{text(value)}">{text(said)}</option>' for value, said in choices.items())
    return f'<label>{text(label)} <select id="{name}">{options}</select></label>'


def _bytes(contents: Contents, drawn: Mapping[str, Any]) -> str:
    best = contents.best
    if best is None:
        return ""
    teacher = next((row.shape for row in contents.rows if row.kind == "teacher" and row.shape), None)
    parts: Mapping[str, Any] = best.other.get("memory_parts") or {}
    memory = {
        name.removesuffix("_bytes").replace("_", " "): format_bytes(value)
        for name, value in parts.items()
        if name in ("weights_bytes", "kv_cache_bytes", "compute_bytes", "overhead_bytes")
    }
    return (
        paragraph(f"Of {named(best)}. {cut(best, teacher)}")
        + _chart("storage", drawn, "The stored bytes of each layer by the type that holds them.")
        + _costs(contents, best)
        + (f"<h3>Memory in its runtime</h3>{pairs('Memory by part', memory)}" if memory else "")
    )


def _costs(contents: Contents, best: Row) -> str:
    """Return what each block's storage and cut cost before training, if the best student's construction was scored."""
    one = construction_of(best, contents.solved)
    if one is None or one.kl is None:
        return ""
    said = (
        f"Stored and cut so, without training, it is {with_error(one.kl, one.kl_stderr)} nats a token from the teacher."
    )
    stored, cuts = dict(one.stored_kl), dict(one.cut_kl)
    if not stored:
        return paragraph(said)
    held: dict[str, list[tuple[str, int]]] = {}
    for bar in bytes_by_block(best):
        held.setdefault(bar["block"], []).append((bar["type"], bar["bytes"]))
    lines = []
    for block in in_order([*stored, *cuts]):
        kinds = held.get(block, [])
        size = sum(count for _, count in kinds)
        both = [value for value in (stored.get(block), cuts.get(block)) if value is not None]
        lines.append(
            [
                Cell(block, int(block) if block.isdigit() else None),
                ", ".join(kind for kind, _ in kinds),
                Cell(format_bytes(size), size) if kinds else Cell("-"),
                *(_figure_cell(cost, "{:.5f}") for cost in (stored.get(block), cuts.get(block), sum(both))),
            ]
        )
    titles = ["layer", "stored as", "bytes", "storage costs", "cut costs", "both cost (nats)"]
    total = sum([*stored.values(), *cuts.values()])
    told = f" The scores of its parts, from which the solver chose, add up to {total:.4f}."
    return "<h3>What each block cost</h3>" + paragraph(said + told) + table("What each block cost", titles, lines)


def _learning(contents: Contents, drawn: Mapping[str, Any]) -> str:
    trials = len({event.trial for event in of_kind(contents.events, RungReached)})
    more = f" The {MOST_CURVES} that went furthest of {trials} are drawn." if trials > MOST_CURVES else ""
    metric = contents.metric
    return _chart(
        "learning", drawn, f"Training loss by tokens; the mark at a curve's end says how the trial ended.{more}"
    ) + _chart("rungs", drawn, f"By trial, {metric} on held-out text at each rung.{more}")


def _race(contents: Contents) -> str:
    names = {trial.trial: trial for trial in of_kind(contents.events, TrialAdded)}
    ends = {end.trial: end for end in of_kind(contents.events, TrialEnded)}
    lines = []
    for rung in of_kind(contents.events, RungReached)[-MOST_ROWS:]:
        trial, end = names.get(rung.trial), ends.get(rung.trial)
        decided = "goes on" if rung.decision is None else {"pause": "paused", "stop": "ended"}[rung.decision.value]
        lines.append(
            [
                rung.trial,
                trial.name if trial else "-",
                Cell(f"{rung.tokens:,}", rung.tokens),
                _figure_cell(rung.value),
                _figure_cell(rung.judged),
                decided,
                "under way" if end is None else end.status.value + (f": {end.reason}" if end.reason else ""),
            ]
        )
    judge = "perplexity (compared by it)" if _raced(contents) else "compared by"
    titles = ["trial", "name", "tokens", contents.metric, judge, "at this rung", "in the end"]
    told = contents.explanation.race if contents.explanation else ()
    return items(told) + table("Decisions at rungs", titles, lines)


def _raced(contents: Contents) -> bool:
    """Return whether trials were compared by likelihood, as those of solved constructions are."""
    return bool(contents.explanation and contents.explanation.race)


def _importance(contents: Contents, drawn: Mapping[str, Any]) -> str:
    assert contents.explanation is not None
    said = ""
    for objective, found in contents.explanation.importance.items():
        if found.shares:
            caption = f"Shares of what sets the better trials apart in {objective}, by PED-ANOVA."
            said += _chart(chart_of_importance(objective), drawn, caption)
            shares = {path: f"{item.share:.1%} of {item.trials} trials" for path, item in found.shares.items()}
            said += pairs(f"What mattered for {objective}", shares)
        else:
            said += paragraph(found.lack(objective))
    return said


def _ended(contents: Contents) -> str:
    told = contents.explanation
    assert told is not None
    lines = [["ended", f"at {tokens:,} tokens", Cell(str(count), count)] for tokens, count in told.stopped.items()]
    lines += [["rejected without training", one.describe(), Cell(str(one.count), one.count)] for one in told.rejected]
    lines += [["failed", one.describe(), Cell(str(one.count), one.count)] for one in told.failed]
    lines += [["failed once, tried again", cause, Cell(str(n), n)] for cause, n in told.retried.items()]
    over = [
        [named(row), row.reason or "over the budget", Cell("1", 1)]
        for row in contents.rows
        if not row.feasible and row.kind != "teacher"
    ][:MOST_ROWS]
    said = [f"{sentence}." for sentence in told.saved.describe()]
    return (
        table("What became of trials", ["what", "why", "trials"], lines)
        + (
            "<h3>Trained, and not within the limits</h3>" + table("Rows beyond limits", ["row", "why", "rows"], over)
            if over
            else ""
        )
        + items([*said, told.binding, *told.next])
    )


def _predicted(contents: Contents) -> str:
    lines = [
        [one.what, one.of, one.shown(one.predicted), one.shown(one.measured), Cell(f"{one.ratio:.2f}", one.ratio)]
        for one in predictions(contents)
    ]
    return table("Predicted and measured", ["what", "of", "predicted", "measured", "measured / predicted"], lines)


def _rows(contents: Contents) -> str:
    ranked = contents.ranked[:MOST_ROWS]
    if not ranked:
        return ""
    metric = contents.metric
    titles = [
        "#",
        "row",
        "name",
        "kind",
        metric,
        "retention",
        "loss (nats)",
        "agreement",
        "KL (nats)",
        "memory",
        "size",
    ]
    titles += ["latency", "trained", "limits", "to make it again"]
    controls = (
        '<div class=controls><label>Show rows with these words <input type=search id="filter" autocomplete=off></label>'
        '<label class=check><input type=checkbox id="fits"> only what fits</label>'
        '<span id="shown" role=status class=state></span></div>'
    )
    lines = [_line(contents, one) for one in ranked]
    notes = [_NAMES, rests_on([one.row for one in ranked]), "= tied with the best: within one standard error, paired."]
    if len(contents.ranked) > len(ranked):
        notes.append(f"The best {MOST_ROWS:,} of {len(contents.ranked):,} rows are shown.")
    said = f"<p class=note>{text(' '.join(filter(None, notes)))}</p>"
    return controls + table("All rows", titles, lines, "rows", [one.row.feasible for one in ranked]) + said


def _line(contents: Contents, one: Ranked) -> list[Any]:
    row, metric = one.row, contents.metric
    trained = 1.0 if row.fidelity is None and row.full else row.fidelity
    loss = math.log(row.perplexity) if row.perplexity and row.perplexity > 0 else None
    return [
        Cell(f"{one.place}{' =' if one.tied else ''}", one.place),
        row.row_id,
        row.name,
        row.kind,
        Cell(row.shown(metric), row.figure(metric)),
        Cell("-" if row.retention is None else f"{row.retention:.1%}", row.figure("retention")),
        _figure_cell(loss),
        _figure_cell(row.agreement, "{:.3f}"),
        _figure_cell(row.figure("kl")),
        _cost(row.memory_bytes, row.memory_source, format_bytes),
        _cost(row.size_bytes, None, format_bytes),
        _cost(row.latency_ms, row.latency_source, lambda ms: format_duration(ms / 1e3)),
        Cell("-" if row.kind in ("teacher", "initial") or trained is None else f"{trained:.3g}x", trained),
        "" if row.feasible else row.reason or "over the budget",
        Cell(remaking(contents.name, row), command=True),
    ]


def remaking(run: str, row: Row) -> str:
    """Return the command line that makes a row again and compares."""
    return f"autodistill reproduce {row.row_id} --on {run}"


def _test(contents: Contents) -> str:
    metric, exported = contents.metric, contents.gains.exported if contents.gains else None
    lines = [
        [
            row.row_id,
            row.name,
            row.kind + (", exported" if row.row_id == f"{exported}-test" else ""),
            Cell(row.shown(metric), row.figure(metric)),
            Cell("-" if row.retention is None else f"{row.retention:.1%}", row.figure("retention")),
            _figure_cell(row.perplexity, "{:.2f}"),
        ]
        for row in contents.tested
    ]
    compared = shown(differences(contents.tested, exported))
    return (
        table("Test split", ["row", "name", "kind", metric, "retention", "perplexity"], lines)
        + (
            "<h3>Differences, paired by document</h3>"
            + table("Differences on the test split", compared[0], compared[1:])
            if compared
            else ""
        )
        + paragraph(rests_on(contents.tested))
    )


def _cascades(contents: Contents, drawn: Mapping[str, Any]) -> str:
    said = ""
    for cascade in contents.cascades:
        said += f"<h3>{text(cascade['small']['row_id'])}, then {text(cascade['large']['row_id'])}</h3>"
        for name, unit in cascade_charts(cascade):
            found = cascade["units"][unit]
            what = f"{found['items']:,} items of {found['documents']:,} documents of the {cascade['split']} split"
            caption = f"By {unit}, {what}. The band is one standard error; the dashed line defers as many at random."
            said += _chart(chart_file(name), drawn, caption)
        said += items(cascade["notes"])
    return said


def _seconds(contents: Contents, drawn: Mapping[str, Any]) -> str:
    seconds: Mapping[str, float] = contents.settings.get("seconds", {})
    told = {name: f"{value:,.1f}" for name, value in seconds.items()}
    return _chart("phases", drawn, "Seconds that each phase took.") + pairs("Seconds by phase", told)


def _figure_cell(value: float | None, form: str = "{:.4f}") -> Cell:
    known = value is not None and math.isfinite(value)
    return Cell(form.format(value) if known else "-", value if known else None)


def _cost(value: float | None, source: str | None, write: Any) -> Cell:
    if value is None:
        return Cell("-")
    return Cell(f"{write(value)}{f' ({source})' if source else ''}", float(value))
