"""`autodistill solve`: what fits a budget and what it costs, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from autodistill.cli import completion
from autodistill.cli.printing import line_width, show
from autodistill.cli.streams import quiet_libraries
from autodistill.cli.summary import table
from autodistill.cli.tables import open_view, wrapped
from autodistill.errors import InputError
from autodistill.hardware.budget import CONTEXT, Budget, DeviceBudget, memory_on
from autodistill.runs.run_folder import default_cache
from autodistill.units import format_bytes, parse_bytes

_STEPS = 7  # budgets of a sweep


def option(name: str, text: str, metavar: str, **more: Any) -> Any:
    """One option: its flag, its help and what stands for its value."""
    return typer.Option(name, help=text, metavar=metavar, **more)


def solve(
    ctx: typer.Context,
    teacher: Annotated[
        str | None,
        typer.Argument(help="A transformers folder, a .gguf file, a hub id, or smollm2 (default).", metavar="TEACHER"),
    ] = None,
    budget: Annotated[
        str | None, option("--budget", "Memory limit for the deployed model, like 16GB or 900MiB.", "SIZE")
    ] = None,
    sweep: Annotated[
        str | None, option("--sweep", f"Solve for {_STEPS} budgets instead, like 100MB..400MB.", "SIZE..SIZE")
    ] = None,
    device: Annotated[
        str | None,
        option(
            "--device",
            'Device that it will run on, like "pi 5" or local; sets the budget.',
            "NAME",
            autocompletion=completion.devices,
        ),
    ] = None,
    data: Annotated[
        str | None,
        option("--data", "Text to score on: a folder, a .txt, .jsonl or .parquet file, or pydoc (default).", "REF"),
    ] = None,
    context: Annotated[
        int | None,
        option("--context", "Context length the memory must cover (default: 2048, or the model's limit).", "TOKENS"),
    ] = None,
    batch: Annotated[int | None, option("--batch", "Number of sequences decoded at once (default: 1).", "N")] = None,
    tokens: Annotated[
        int, option("--tokens", "Tokens of text to score on; twice as many are held out.", "TOKENS")
    ] = 2048,
    sequence_length: Annotated[
        int, option("--sequence-length", "Length of the sequences that are read.", "TOKENS")
    ] = 256,
    out: Annotated[
        Path | None, option("--out", "Folder for the result, and for the solution with --export.", "DIR")
    ] = None,
    export: Annotated[
        bool, typer.Option("--export", help="Write the solution as a GGUF file and verify it in llama.cpp.")
    ] = False,
    own: Annotated[
        list[Path] | None, option("--devices", "YAML file that describes your own devices. Repeatable.", "FILE")
    ] = None,
    cache: Annotated[
        Path | None,
        option("--cache", "Folder for what later runs can reuse (default: ~/.cache/autodistill).", "DIR"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Choose the storage type of every matrix, table and cache that costs least within a budget. Nothing is trained."""
    show(as_json, lambda: solved(ctx.params), dict, lambda document: solve_text(document, line_width()))


def solved(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a command line asks to be solved, solved under a live view."""
    budgets = _budgets(given)
    quiet_libraries(given["teacher"], given["data"])
    from autodistill.search.solve import SolveRequest
    from autodistill.search.solve import solve as find

    request = SolveRequest(
        budgets=budgets,
        cache=given["cache"] or default_cache(),
        **{name: given[name] for name in ("teacher", "data") if given[name] is not None},
        **{name: given[name] for name in ("tokens", "sequence_length", "out", "export")},
        context_by_default=given["context"] is None,
    )
    with open_view() as view:
        return find(request, view.log)


def _budgets(given: Mapping[str, Any]) -> tuple[Budget, ...]:
    """The limits that are typed: one, or those of a sweep, on a device where one is named."""
    if given["budget"] is not None and given["sweep"] is not None:
        raise InputError("--budget is one limit and --sweep several: give one of the two")
    if given["budget"] is None and given["sweep"] is None and given["device"] is None:
        raise InputError("solve takes --budget like 200MB, --sweep like 100MB..400MB, or --device like local")
    if given["own"] and given["device"] is None:
        raise InputError("--devices only describes devices: choose one with --device")
    limits: Sequence[int | None] = [None if given["budget"] is None else parse_bytes(given["budget"])]
    if given["sweep"] is not None:
        limits = _sweep(given["sweep"])
    defaults = {"context": CONTEXT, "batch": 1}
    load: dict[str, Any] = {name: default if given[name] is None else given[name] for name, default in defaults.items()}
    if given["device"] is None:
        return tuple(Budget(memory_bytes=limit or 0, **load) for limit in limits)
    from autodistill.hardware.local import choose_device

    found = choose_device(given["device"], given["cache"] or default_cache(), given["own"] or ())
    return tuple(DeviceBudget(memory_bytes=memory_on(found, limit), device=found, **load) for limit in limits)


def _sweep(text: str) -> list[int]:
    """Limits that are evenly spread between two sizes."""
    first, dots, last = text.partition("..")
    if not dots:
        raise InputError(f"--sweep {text!r} is no range: write two sizes, like 100MB..400MB")
    low, high = parse_bytes(first), parse_bytes(last)
    if low >= high:
        raise InputError(f"--sweep {text!r} must go from a smaller size to a larger one")
    return [low + (high - low) * step // (_STEPS - 1) for step in range(_STEPS)]


def solve_text(document: Mapping[str, Any], width: int) -> str:
    """Solutions and rivals as lines for a person.

    Args:
        document: As `search.solve.solve` gives it.
        width: Characters of a line.
    """
    teacher = document["teacher"]
    head = (
        f"{teacher['name']} on {document['data']['name']}: KL to the teacher and NLL in nats a token, on "
        f"{document['held_out_tokens']:,} held-out tokens; the teacher's own NLL is {document['teacher_nll']:.4f}."
    )
    sections = ["\n".join(wrapped(head, width))]
    if teacher["stored"]:
        sections[0] += "\n" + "\n".join(wrapped(f"{teacher['stored'][:1].upper()}{teacher['stored'][1:]}.", width))
    if len(document["solutions"]) > 1:
        sections.append(_curve(document["solutions"]))
    else:
        sections += [_one(one, width) for one in document["solutions"]]
    for miss in document["nothing_fits"]:
        smallest = document["smallest"]
        need = f"the smallest, {smallest['name']}, needs {format_bytes(smallest['bytes'])}"
        sections.append("\n".join(wrapped(f"Nothing fits {format_bytes(miss['memory_bytes'])}: {need}.", width)))
    if document["exported"]:
        sections.append("\n".join(wrapped(_exported(document["exported"]), width)))
    return "\n\n".join(sections)


def _one(found: Mapping[str, Any], width: int) -> str:
    solution = found["solution"]
    budget = found["budget"]
    title = f"{format_bytes(budget['memory_bytes'])} at context {budget['context']}, batch {budget['batch']}: "
    lines = wrapped(f"{title}{solution['name']}, with {_types(solution['types'])}.", width)
    parts = [
        (name.replace("_", " "), format_bytes(solution[f"{name}_bytes"]))
        for name in ("weights", "kv_cache", "compute", "overhead")
    ]
    parts += [("total", format_bytes(solution["bytes"])), ("left", format_bytes(solution["left_bytes"]))]
    rows = [("storage", "", "memory", "fits", "predicted KL", "KL", "NLL", "KL above the solution")]
    rows.append(("solved", "", format_bytes(solution["bytes"]), "yes", *_figures(solution), ""))
    too_large = []
    for rival in found["rivals"]:
        if not rival["fits"] and rival["kl"] is None:
            too_large.append(f"{rival['name']} {format_bytes(rival['bytes'])}")
            continue
        above = _with_error(rival["kl_above_solution"], rival["kl_above_solution_stderr"])
        fits = "yes" if rival["fits"] else "no"
        memory = format_bytes(rival["bytes"])
        rows.append((rival["name"], rival["what"], memory, fits, *_figures(rival), above))
    more = found["next"]
    said = (
        f"Predicted on calibration text {solution['predicted_kl']:.4f}, measured there "
        f"{solution['calibration_kl']:.4f}. {format_bytes(more['more_bytes'])} more would take "
        f"{more['predicted_gain']:.4f} off the KL, as predicted."
    )
    if too_large:
        said += f" Plain formats that are too large: {', '.join(too_large)}."
    if found["as_good"]:
        said += f" {found['as_good']} is as good, within the error, and plainer: take that."
    return "\n".join([*lines, table(parts, left=1), "", table(rows, left=2), *wrapped(said, width)])


def _types(types: Mapping[str, Any]) -> str:
    tables = ", ".join(f"{name} in {kind}" for name, kind in types["tables"].items())
    matrices = ", ".join(f"{count} matrices in {kind}" for kind, count in sorted(types["matrices"].items()))
    return f"{tables}, {matrices}, cache keys in {types['cache_keys']} and values in {types['cache_values']}"


def _curve(solutions: Sequence[Mapping[str, Any]]) -> str:
    """A line for each budget."""
    rows = [("budget", "storage", "takes", "predicted KL", "KL", "NLL", "as good")]
    for found in solutions:
        one = found["solution"]
        takes = format_bytes(one["bytes"])
        limit = format_bytes(found["budget"]["memory_bytes"])
        rows.append((limit, one["name"], takes, *_figures(one), found["as_good"] or ""))
    return table(rows, left=2)


def _figures(one: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        f"{one['predicted_kl']:.4f}",
        _with_error(one["kl"], one["kl_stderr"]),
        _with_error(one["nll"], one["nll_stderr"]),
    )


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def _exported(exported: Mapping[str, Any]) -> str:
    low, high = exported["agreement_interval"]
    over = exported["over_budget_bytes"]
    beyond = f", {format_bytes(over)} over the budget: lower --budget by as much" if over > 0 else ""
    return (
        f"Written to {exported['path']} ({format_bytes(exported['size_bytes'])}): its {exported['tensors']} tensors "
        f"are those that were measured, llama.cpp chooses the simulation's token at {exported['agreement']:.1%} "
        f"({low:.1%} to {high:.1%}) of {exported['positions']} clear positions, and takes "
        f"{format_bytes(exported['memory_bytes'])} ({exported['memory_source']}){beyond}. Serve it with: "
        f"{exported['serve']}"
    )
