"""Text for a person: the plan before a search; at its end leaderboard, test split, notes, seconds and paths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from autodistill.cli.tables import fitting, leaderboard_table, memory_cell, memory_part, wrapped
from autodistill.hardware.budget import Price, read_budget
from autodistill.runs.results import finalists
from autodistill.runs.results.gains import Gains
from autodistill.runs.results.leaderboard import DISTILLED, Ranked, rests_on
from autodistill.runs.results.row import SOLVED_TRIAL, Row, task_figures
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.savings import Saved
from autodistill.strategy.deployment import Deployment
from autodistill.units import count_of, format_bytes, format_duration, with_error

_SHOWN_ROWS = 15
_SHOWN_STRATEGIES = 3


def headline(run: RunFolder) -> str:
    """Return a run in one line: its name, teacher, data and budget, and whether it is finished.

    Raises:
        InputError: Its records cannot be read.
    """
    asked = run.read_settings()
    parts = [run.name]
    for name in ("teacher", "data"):
        known = asked.get(name, {})
        parts += [f"{name} {known.get('name') or known.get('reference')}"] if known else []
    parts += [read_budget(asked["budget"]).describe()] if "budget" in asked else []
    return " · ".join([*parts, *_read(asked), run.state])


def _read(asked: Mapping[str, Any]) -> list[str]:
    """Return how much of the validation split was read, as a list of one text, or [] if unknown.

    The time budget decides how much is read. Runs that read different amounts are not comparable.
    """
    held = (asked.get("data") or {}).get("tokens", {}).get("validation")
    read = (asked.get("plan") or {}).get("eval_tokens")
    return [f"{read:,} of {held:,} validation tokens read"] if held and read else []


def search_summary(document: Mapping[str, Any], ranked: Sequence[Ranked], metric: str, width: int = 120) -> str:
    """Return the result of a search in about forty lines. The last one says what the search gained.

    Args:
        document: The search's JSON document.
        ranked: Its leaderboard.
        metric: The figure that ranks.
        width: Characters of a line of the leaderboard.
    """
    more = len(ranked) - _SHOWN_ROWS
    board = leaderboard_table(ranked[:_SHOWN_ROWS], metric, width, legend=_SHOWN_STRATEGIES)
    sections = [
        board
        + (f"\n{more} more row{'s' * (more > 1)}: autodistill leaderboard {document['name']}" if more > 0 else ""),
        _confirmed(document, width),
        _finalists([one.row for one in ranked], width),
        _test(document, metric, width),
        "\n".join(map(_as_sentence, document["notes"])),
        "\n".join(f"{sentence}." for sentence in Saved(**document["saved"]).describe()),
        _seconds(document["seconds"]),
        _paths(document),
        gains.describe() if (gains := Gains.from_json(document)) is not None else "",
    ]
    return "\n\n".join(section for section in sections if section)


def _as_sentence(note: str) -> str:
    """Return a note as a sentence. A name at its beginning, like gguf-q4_0 or that of a tensor, keeps its spelling."""
    is_word = note.split(" ", 1)[0].rstrip(",:;").replace("-", "").replace("'", "").isalpha()
    return f"{note[:1].upper()}{note[1:]}." if is_word else f"{note}."


def plan_summary(document: Mapping[str, Any], width: int = 120) -> str:
    """Return a plan as lines: trials, rungs, tokens, cache and time.

    Args:
        document: The result of `plan_search`.
        width: Characters of a line.
    """
    plan = document["plan"]
    rungs = [f"{rung:,}" for rung in plan["rungs"]]
    survivors = [plan["trials"], *plan["keep"]]
    box = "none" if plan["box_seconds"] is None else format_duration(plan["box_seconds"])
    memory = dict(document["training_bytes"])
    total = memory.pop("total_bytes")
    parts = ", ".join(f"{memory_part(name)} {format_bytes(count)}" for name, count in memory.items() if count)
    means = f"{plan['micro_batch']} sequence{'s' if plan['micro_batch'] > 1 else ''} at a time"
    means += ", checkpointing" if plan["checkpointing"] else ""
    means += {"float32": "", "bfloat16": ", 16-bit optimiser states", "int8": ", 8-bit optimiser states"}[
        plan["optimizer_state"]
    ]
    phases = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in plan["seconds"].items() if seconds)
    lines = {
        "budget": read_budget(document["budget"]).describe(),
        "trials": f"{plan['trials']} proposed, {_baselines_text(document['baselines'])}",
        "rungs": f"{', '.join(rungs)} tokens, reached by {', '.join(map(str, survivors))} of them",
        "tokens": f"{plan['tokens']:,} a trial at full fidelity, {plan['batch_tokens']:,} an optimiser step",
        **_trained_on(plan),
        "workers": f"{plan['workers']} with {count_of(plan['threads'], 'thread')} each, "
        f"{'bf16' if plan['bf16'] else 'float32'}",
        "memory": f"{format_bytes(total)} to train the largest student, {means}: {parts}; "
        f"{format_bytes(document['evaluation_bytes'])} to evaluate it",
        "evaluation": f"{plan['rung_eval_tokens']:,} tokens at a rung, {plan['eval_tokens']:,} at the end, "
        f"{plan['test_tokens']:,} on the test split",
        "cache": f"{format_bytes(document['cache_bytes'])} of disk for the teacher's outputs",
        "students": (
            f"{format_bytes(document['students_bytes'])} of disk at most for {document['students']} of them, kept in "
            "float32, and checkpoints in addition; --checkpoint-limit covers both"
        ),
        "time": f"{format_duration(document['expected_seconds'])} expected, time budget {box}",
        "phases": phases,
        "hours": _hours(document),
    }
    column = max(map(len, lines)) + 2
    told = [f"{name.ljust(column)}{words}" for name, words in lines.items()]
    said = [_as_sentence(note) for note in (*document["notes"], *plan["notes"])]
    fits = [f"  {one}" for one in document.get("fits", ())]
    told = [*told, *(["What fits:"] if fits else []), *fits]
    indented = [line for one in told for line in wrapped(one, width, indent=column)]
    return "\n".join([*indented, *(line for note in said for line in wrapped(note, width))])


def _baselines_text(baselines: Sequence[str]) -> str:
    if not baselines:
        return "and no baseline to beat: neither the space nor --baseline names one"
    return f"and the baseline{'s' if len(baselines) > 1 else ''} {', '.join(baselines)}"


def _trained_on(plan: Mapping[str, Any]) -> dict[str, str]:
    """Return a line about extended training of the best trials, if the plan has any."""
    if plan["longest"] <= 1:
        return {}
    threads = f", alone on {plan['alone']} threads" if plan["alone"] else ""
    time = format_duration(plan["seconds"]["longer"])
    expected, labels = (f"{plan[name]:.3g}" for name in ("expected", "by_labels"))
    more = f", or {labels} times if the labels alone teach best" if plan["by_labels"] else ""
    return {"the best": f"trained for another {time}{threads}, to about {expected} times those tokens{more}"}


def _hours(document: Mapping[str, Any]) -> str:
    """Return the hours of GPUs or of the machine, the hours of workers, and what they cost."""
    gpus, machine = document["gpu_hours"], document["machine_hours"]
    held = f"{gpus:.2f} GPU-hours" if gpus else f"{machine:.2f} machine-hours"
    words = f"{held}, {document['worker_hours']:.2f} worker-hours of trials"
    if "cost" not in document:
        return words
    rate = Price(amount=document["price_per_hour"], currency=document["currency"]).of(1)
    return f"{words}; {document['cost_shown']} at {rate} an hour of a {document['price_of']}"


def table(rows: Sequence[Sequence[str]], left: int, optional: Sequence[str] = (), width: int | None = None) -> str:
    """Return cells in aligned columns: the first `left` columns flush left, the others flush right.

    Args:
        rows: Rows of cells. If there are titles, they are the first row.
        left: Number of columns that are flush left.
        optional: Titles of columns that may be left out on a narrow terminal, the least important first. A line says
            which are left out.
        width: Characters of a line, or None for no limit.
    """
    titles = list(rows[0]) if rows else []
    shown = fitting(rows, range(len(titles)), [titles.index(title) for title in optional], width)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[one].ljust(widths[one]) if one < left else row[one].rjust(widths[one]) for one in shown]
        lines.append("  ".join(cells).rstrip())
    if gone := [title for place, title in enumerate(titles) if place not in shown]:
        lines += wrapped(f"Left out: {', '.join(filter(None, gone))}; a wider terminal shows them.", width or 80)
    return "\n".join(lines)


def written_summary(counts: Mapping[str, Any]) -> str:
    """Return text about what `write` did: answers, tokens, and which of them can be used for training."""
    lines = [
        f"{counts['written']} answers written, {counts['kept']} from before, of {counts['prompts']} prompts: "
        f"{counts['out']}",
        f"Tokens: {counts['prompt_tokens']:,} of prompts, {counts['answer_tokens']:,} of answers.",
    ]
    if counts["others"]:
        lines.append(
            f"{counts['others']} more answers are in the file, from other prompts or settings: a search trains on all "
            "of them; to separate them, give another --out."
        )
    if counts["unfinished"]:
        lines.append(
            f"{counts['unfinished']} answers reached --max-tokens and are not trained on: raise it to use them."
        )
    if counts["too_long"]:
        lines.append(
            f"{counts['too_long']} prompts are not answered: with --max-tokens they exceed the teacher's context."
        )
    if counts["blank"]:
        lines.append(f"{counts['blank']} answers are blank and are not trained on.")
    if counts["refused"]:
        first = counts["refused"][0]
        lines.append(
            f"{len(counts['refused'])} prompts were refused; the same command asks them again. The first, "
            f'"{first["prompt"]}": {first["said"]}'
        )
    if counts["top-k"]:
        lines.append(f"{counts['top-k']} answers have the teacher's log-probabilities, {counts['text']} text alone.")
    return "\n".join(lines)


def _confirmed(document: Mapping[str, Any], width: int) -> str:
    """Return a table of means over seeds, the chosen strategy first, with descriptions of the trials below."""
    found = document["confirmation"]
    if not found:
        return ""
    lines = [(f"on {len(found[0]['seeds'])} seeds", "mean", "minus best")]
    for item in found:
        difference = with_error(item["difference"], item["difference_stderr"])
        lines.append((item["row_id"], with_error(item["mean"], item["stderr"]), difference))
    named = [line for item in found for line in wrapped(f"{item['trial']}: {item['name']}", width)]
    return "\n".join([table(lines, left=1), *named])


def _finalists(rows: Sequence[Row], width: int) -> str:
    """Return the table of the rows that were read by their runtimes, or ""."""
    lines = finalists.table(rows)
    return table([finalists.TITLES, *lines], left=1, optional=finalists.TITLES[3:5], width=width) if lines else ""


def _test(document: Mapping[str, Any], metric: str, width: int) -> str:
    """Return the table of the test split, the exported row first, and tables of the tasks that do not rank.

    The rows are the found student (also before extended training), the baseline, the untrained student, the teacher and
    the quantised teacher.
    """
    rows = [Row.from_json(data) for data in document["test"]]
    if not rows:
        return ""
    best = document["best"]
    if best.get("memory_source") == "measured":
        # Test scoring does not run the student in its runtime. Use the memory that was measured there at export.
        known = {"memory_bytes": best["memory_bytes"], "memory_source": "measured"}
        rows = [replace(row, **known) if _is_exported(row, best) else row for row in rows]
    ordered = sorted(rows, key=lambda row: (not _is_exported(row, best), _ORDER.index(_title(row, best))))
    titled = [(_title(row, best) + (", exported" * _untrained(row, best)), row) for row in ordered]
    header = ("test split", "deployment", "accuracy", "perplexity", "agreement", "memory")
    cells = [header, *(_cells(title, row) for title, row in titled)]
    if metric != "accuracy":
        shown = (row.shown(metric) for _, row in titled)
        cells = [(*line, figure) for line, figure in zip(cells, (metric, *shown), strict=True)]
    lines = [table(cells, left=3)]
    lines += filter(None, [rests_on(rows)])
    return "\n\n".join(["\n".join(lines), *_tasks(titled, metric, width)])


def _tasks(titled: Sequence[tuple[str, Row]], metric: str, width: int) -> list[str]:
    """Return tables of the tasks other than the metric, each with as many tasks as fit a line. [] if there are none."""
    names = task_figures([row for _, row in titled], metric)
    first = [("tasks", "deployment"), *((title, _packed(row)) for title, row in titled)]
    columns = [[name, *(row.shown(name) for _, row in titled)] for name in names]
    tables: list[str] = []
    while columns:
        for count in range(len(columns), 0, -1):
            shown = table([(*start, *cells) for start, *cells in zip(first, *columns[:count], strict=True)], left=2)
            if count == 1 or len(shown.partition("\n")[0]) <= width:
                break
        tables.append(shown)
        columns = columns[count:]
    return tables


def _packed(row: Row) -> str:
    return row.deployment_name.replace("compressed-tensors", "ct")


_FOUND, _BASELINE, _INITIAL = "found student", "baseline", "untrained student"
_SOLVED = "solved, untrained"
_BEFORE = "found, at 100%"
_TEACHER, _QUANTIZED = "teacher", "quantised teacher"
_ORDER = (_FOUND, _BEFORE, _BASELINE, _SOLVED, _INITIAL, _TEACHER, _QUANTIZED)


def _is_exported(row: Row, best: Mapping[str, Any]) -> bool:
    return (row.kind, row.trial, row.deployment.to_json()) == (best["kind"], best["trial"], best["deployment"])


def _untrained(row: Row, best: Mapping[str, Any]) -> bool:
    """Return whether the row is exported and is not a trained student. Its title then says that it is exported."""
    return _is_exported(row, best) and row.kind not in DISTILLED


def _title(row: Row, best: Mapping[str, Any]) -> str:
    if row.kind in DISTILLED and row.trial == best["trial"]:
        return _FOUND
    if row.kind in DISTILLED:
        return _BASELINE if row.kind == "baseline" else _BEFORE
    if row.kind == "teacher":
        return _TEACHER if row.deployment.bits == 16 else _QUANTIZED
    return _SOLVED if row.trial == SOLVED_TRIAL else _INITIAL


def _cells(title: str, row: Row) -> tuple[str, ...]:
    return (
        title,
        _packed(row),
        row.shown("accuracy"),
        "-" if row.perplexity is None else f"{row.perplexity:.2f}",
        "-" if row.agreement is None else f"{row.agreement:.4f}",
        memory_cell(row),
    )


def _seconds(seconds: Mapping[str, float]) -> str:
    total = seconds["total"]
    phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total")
    return f"Seconds: {phases}; {format_duration(total)} in all."


def _paths(document: Mapping[str, Any]) -> str:
    paths = document["paths"]
    lines = [table([(name, str(path)) for name, path in paths.items()], left=2)]
    best = document["best"]
    container = Deployment.from_json(best["deployment"]).container
    if "gguf" in paths:
        # If the found student is not in GGUF format, the exported GGUF may be another student.
        what = best["row_id"] if container == "gguf" else "the GGUF (not the row whose test figures are above)"
        lines.append(f"Serve {what}, with the context and the cache that its memory was counted with:")
        lines.append(f"  autodistill serve {paths['gguf']}")
    elif "compressed-tensors" in paths:
        lines.append(f"Serve {best['row_id']} with vLLM (pip install vllm):")
        lines.append(f"  vllm serve {paths['compressed-tensors']}")
    return "\n".join(lines)


def budgets_text(document: Mapping[str, Any], width: int) -> str:
    """Return what was found for each budget, as lines for a person.

    Args:
        document: The result of `search.budgets.summary.document`.
        width: Characters of a line.
    """
    from autodistill.search.budgets.summary import HEAD, cells, sentences

    head = tuple(document["metric"] if name == "value" else name for name in HEAD)
    said = [line for sentence in sentences(document) for line in wrapped(sentence, width)]
    box = "" if document["box_seconds"] is None else f" of {format_duration(document['box_seconds'])}"
    exports = [(one["label"], one["path"]) for one in document["budgets"] if one["path"]]
    paths = [*exports, *document["paths"].items()]
    spent = f"{format_duration(document['seconds'])}{box} were spent on all of them."
    return "\n\n".join(
        (table([head, *cells(document)], left=3), "\n".join([*said, *wrapped(spent, width)]), table(paths, left=2))
    )


def planned_text(document: Mapping[str, Any], width: int) -> str:
    """Return what a search would do, for one budget or for each of several, as lines for a person.

    Args:
        document: The result of `plan_search` or `plan_budgets`.
        width: Characters of a line.
    """
    if "budgets" not in document:
        return plan_summary(document, width)
    sections = []
    for one in document["budgets"]:
        if one["plan"] is not None:
            sections.append(f"{one['label']}, run {one['run']}\n{plan_summary(one['plan'], width)}")
        elif one["nothing_fits"]:
            sections.append("\n".join(wrapped(f"{one['label']}: {one['nothing_fits']}.", width)))
        else:
            said = f"{one['label']}: the student of {one['run']} loses nothing here; the budget does not bind."
            sections.append("\n".join(wrapped(said, width)))
    return "\n\n".join(sections)
