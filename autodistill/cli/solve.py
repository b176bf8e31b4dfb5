"""Text for a person about the solutions of `autodistill solve` and their rivals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autodistill.cli.summary import table
from autodistill.cli.tables import wrapped
from autodistill.units import format_bytes, format_duration, with_error

# Titles of columns that are left out on a narrow terminal, the least important first.
_OF_ONE = ("predicted KL", "", "NLL", "accuracy", "KL above the solution")
_OF_SEVERAL = ("predicted KL", "NLL", "accuracy", "takes", "binds", "as good")


def solve_text(document: Mapping[str, Any], width: int, room: int | None = None) -> str:
    """Return solutions and rivals as lines for a person.

    Args:
        document: The result of `search.solve.solve`.
        width: Characters of a line.
        room: Characters of a line of a table. With None there is no limit, and every column is shown.
    """
    teacher = document["teacher"]
    if "plan" in document:
        return "\n".join(wrapped(_planned(document), width))
    head = (
        f"{teacher['name']} on {document['data']['name']}: KL to the teacher and NLL in nats a token, on "
        f"{document['held_out_tokens']:,} held-out tokens, and accuracy, the share of them that the model finds most "
        f"likely. The teacher's own NLL is {document['teacher_nll']:.4f}, and its accuracy "
        f"{document['teacher_accuracy']:.4f}."
    )
    sections = ["\n".join(wrapped(head, width))]
    if teacher["stored"]:
        sections[0] += "\n" + "\n".join(wrapped(f"{teacher['stored'][:1].upper()}{teacher['stored'][1:]}.", width))
    if document.get("scoring", "float32") != "float32":
        sections[0] += "\n" + "\n".join(wrapped(f"All of it was scored in {document['scoring']}.", width))
    if document.get("coarse"):
        said = "This is a first answer; without --coarse more is read and tried."
        sections[0] += "\n" + "\n".join(wrapped(said, width))
    if document["streamed"]:
        said = "One layer of the teacher was in memory at a time: types were solved, and no cuts were tried."
        sections[0] += "\n" + "\n".join(wrapped(said, width))
    if len(document["solutions"]) > 1:
        sections.append(_curve(document["solutions"], room))
    else:
        sections += [_one(one, width, room) for one in document["solutions"]]
    for miss in document["nothing_fits"]:
        smallest = document["smallest"]
        said = f"the smallest, {smallest['name']}, needs {format_bytes(smallest['bytes'])}"
        if smallest["bytes"] <= miss["memory_bytes"]:
            said = "whatever fits is too slow for --latency"
        sections.append("\n".join(wrapped(f"Nothing fits {format_bytes(miss['memory_bytes'])}: {said}.", width)))
    if document["not_exported"]:
        sections.append("\n".join(wrapped(f"It cannot be exported: {document['not_exported']}.", width)))
    if document["exported"]:
        sections.append("\n".join(wrapped(_exported(document["exported"]), width)))
    return "\n\n".join(sections)


def _planned(document: Mapping[str, Any]) -> str:
    teacher, plan, elsewhere = document["teacher"], document["plan"], document["plan"]["elsewhere"]
    here = "here" if elsewhere is None else f"on the {elsewhere['device']}"
    said = (
        f"Solving {teacher['name']}, {teacher['parameters']:,} parameters, would take about "
        f"{format_duration(plan['seconds'])} {here} for the types"
    )
    if plan["seconds_with_cuts"] is not None:
        said += f", and {format_duration(plan['cuts_seconds'])} more if cuts have to be scored"
    machine = "this machine has" if elsewhere is None else "the GPU leaves a model"
    said += (
        f", and {format_bytes(plan['memory_bytes'])} of memory in addition to the process's own; {machine} "
        f"{format_bytes(plan['machine_bytes'])}. All of this is predicted"
    )
    said += "." if elsewhere is None else f" from its data sheet: {_parts(plan)}"
    if plan["streamed"]:
        said += (
            f" The whole teacher would take {format_bytes(plan['memory_bytes_whole'])}: only one of its layers is in "
            "memory at a time, and no cuts are tried."
        )
    if plan["memory_bytes"] > plan["machine_bytes"]:
        named = "this machine has" if elsewhere is None else "it leaves"
        said += f" That is more than {named}: solve it on a machine with more memory."
    smallest = document["smallest"]
    said += f" The smallest model that it can choose, {smallest['name']}, needs {format_bytes(smallest['bytes'])}."
    if document["not_exported"]:
        said += f" It cannot be exported: {document['not_exported']}."
    return said


def _parts(plan: Mapping[str, Any]) -> str:
    """Say what the time on a GPU elsewhere consists of, and what was assumed."""
    elsewhere, parts = plan["elsewhere"], plan["elsewhere"]["seconds_by_part"]
    said = (
        f"{format_duration(parts['products'])} of products, {format_duration(parts['rounding'])} of rounding, and "
        f"{format_duration(parts['reading'])} of reading {format_bytes(elsewhere['file_bytes'])} of files"
    )
    times = elsewhere["readings"]
    said += "" if times == 1 else f" {times} times"
    return (
        f"{said} at an assumed {format_bytes(elsewhere['file_bytes_per_second'])} per second. At the slow end of what "
        f"is assumed, the types take {format_duration(elsewhere['slow_seconds'])}."
    )


def _one(found: Mapping[str, Any], width: int, room: int | None) -> str:
    solution = found["solution"]
    budget = found["budget"]
    title = f"{format_bytes(budget['memory_bytes'])} at context {budget['context']}, batch {budget['batch']}: "
    lines = wrapped(f"{title}{solution['name']}, with {_types(solution['types'])}.", width)
    parts = [
        (name.replace("_", " "), format_bytes(solution[f"{name}_bytes"]))
        for name in ("weights", "kv_cache", "compute", "overhead")
    ]
    parts += [("total", format_bytes(solution["bytes"])), ("left", format_bytes(solution["left_bytes"]))]
    rows: list[tuple[str, ...]] = [
        ("storage", "", "memory", "fits", "predicted KL", "KL", "NLL", "accuracy", "KL above the solution")
    ]
    rows.append(("solved", "", format_bytes(solution["bytes"]), "yes", *_figures(solution), ""))
    too_large = []
    for rival in found["rivals"]:
        if not rival["fits"] and rival["kl"] is None:
            too_large.append(f"{rival['name']} {format_bytes(rival['bytes'])}")
            continue
        above = with_error(rival["kl_above_solution"], rival["kl_above_solution_stderr"])
        fits = "yes" if rival["fits"] else "no"
        memory = format_bytes(rival["bytes"])
        rows.append((rival["name"], rival["what"], memory, fits, *_figures(rival), above))
    more = found["next"]
    said = (
        f"Predicted on calibration text {solution['predicted_kl']:.4f}, by {solution['scores']} scores, "
        f"{solution['scores_measured']} of them measured and the others from gradients; measured there as a whole "
        f"{solution['calibration_kl']:.4f}. {format_bytes(more['more_bytes'])} more would lower the predicted KL by "
        f"{more['predicted_gain']:.4f}."
    )
    for one in solution["latency"]:
        said += (
            f" {one['name']} is predicted at {format_duration(one['seconds'])}, within "
            f"{format_duration(one['limit_seconds'])}, by {one['by']}"
        )
        roofline_text = f"; the roofline has {format_duration(one['roofline_seconds'])}."
        said += "." if one["by"] == "the roofline" else roofline_text
    if solution["compensated"]:
        said += (
            " The rounding compensates for its errors: with each weight rounded by itself, the KL would be "
            f"{with_error(solution['nearest_kl'], solution['nearest_kl_stderr'])}."
        )
    if solution["wider_bytes"]:
        said += (
            f" ONNX Runtime's codes and scales are wider: the weights are {format_bytes(solution['file_bytes'])} "
            f"in the file, {format_bytes(solution['wider_bytes'])} more than in a GGUF file."
        )
    if solution["teacher_copied"] > solution["copied"]:
        said += (
            f" In a text that repeats itself it copies {solution['copied']:.1%}, and the teacher "
            f"{solution['teacher_copied']:.1%}."
        )
    if too_large:
        said += f" Plain formats that are too large: {', '.join(too_large)}."
    if found["winner"]:
        said += (
            f" {found['winner']['name']} has a lower KL on the calibration text than everything that was solved: use "
            "that one."
        )
    elif found["plain"]:
        said += f" The solution is itself plain: {solution['name']} ({found['plain']})."
        if found["as_good"] not in (None, solution["name"]):
            said += f" {found['as_good']} is as good, within the error."
    elif found["as_good"]:
        said += f" {found['as_good']} is as good, within the error, and simpler: use that one."
    shown = table(rows, left=2, optional=_OF_ONE, width=room)
    binds = wrapped(_binds(found["limits"]), width)
    return "\n".join([*lines, table(parts, left=1), *binds, "", shown, *wrapped(said, width)])


def _binds(limits: Sequence[Mapping[str, Any]]) -> str:
    """Say which limits exclude a better solution, and how much room each limit leaves."""
    binding, others = [], []
    for one in limits:
        left = (format_bytes if one["unit"] == "bytes" else format_duration)(one["left"])
        if not one["binds"]:
            others.append(f"{one['name']} {left}")
        elif one["predicted_gain"]:
            gain = f"{one['predicted_gain']:.4f} lower predicted KL without it"
            binding.append(f"{one['name']} ({left} left; {gain})")
        else:
            binding.append(f"{one['name']} ({left} left; nothing without it alone)")
    said = f"What binds: {', '.join(binding) or 'nothing'}."
    return f"{said} Room: {', '.join(others)}." if others else said


def _types(types: Mapping[str, Any]) -> str:
    tables = ", ".join(f"{name} in {kind}" for name, kind in types["tables"].items())
    counts = sorted(types["matrices"].items())
    matrices = ", ".join(f"{count} {'matrix' if count == 1 else 'matrices'} in {kind}" for kind, count in counts)
    return f"{tables}, {matrices}, cache keys in {types['cache_keys']} and values in {types['cache_values']}"


def _curve(solutions: Sequence[Mapping[str, Any]], room: int | None) -> str:
    """Return a table with a line for each budget."""
    titles = ("budget", "storage", "takes", "predicted KL", "KL", "NLL", "accuracy", "binds", "as good")
    rows: list[tuple[str, ...]] = [titles]
    for found in solutions:
        one = found["solution"]
        takes = format_bytes(one["bytes"])
        budget = found["budget"]
        tier = f"GPU of {format_bytes(budget['tier_bytes'])}: " if "tier_bytes" in budget else ""
        size = f"{tier}{format_bytes(budget['memory_bytes'])}"
        binds = ", ".join(limit["name"] for limit in found["limits"] if limit["binds"]) or "nothing"
        better = found["winner"]["name"] if found["winner"] else found["as_good"] or ""
        better = "itself, plain" if found["plain"] and better in ("", one["name"]) else better
        rows.append((size, one["name"], takes, *_figures(one), binds, better))
    return table(rows, left=2, optional=_OF_SEVERAL, width=room)


def _figures(one: Mapping[str, Any]) -> tuple[str, ...]:
    measured = (with_error(one[name], one[f"{name}_stderr"]) for name in ("kl", "nll", "accuracy"))
    return (with_error(one["predicted_kl"], None), *measured)


def _exported(exported: Mapping[str, Any]) -> str:
    how = "onnxruntime-genai reads it; time it" if exported["ran_in"] == "ONNX Runtime" else "Serve it"
    return (
        f"{exported['name']} is in {exported['path']} ({format_bytes(exported['size_bytes'])}): its "
        f"{exported['tensors']} tensors are those that were measured, {exported['ran_in']} has "
        f"{exported['proof']}, and takes {format_bytes(exported['memory_bytes'])} ({exported['memory_source']}). "
        f"{how} with: {exported['serve']}"
    )
