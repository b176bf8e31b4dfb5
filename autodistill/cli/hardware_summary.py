"""Text for a person about devices, estimates, picks and measurements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from autodistill.cli.summary import table
from autodistill.cli.tables import memory_part, wrapped
from autodistill.estimates.block_times import PARTS
from autodistill.hardware.budget import CONTEXT
from autodistill.hardware.device import PRECISIONS, Device
from autodistill.quantization.formats import TYPES
from autodistill.units import count_of, format_bytes, format_duration, format_rate, with_error

_WAYS = {"sixteen_bit_states": "16-bit states", "eight_bit_states": "8-bit states"}
_REASONS = 2  # most reasons that are printed in full; further ones are only counted
# Titles of columns that are left out on a narrow terminal, the least important first.
_OF_DEVICES = ("class", "fp32", "fp8", "bf16", "int8", "fp16")
_OF_SPEEDS = ("waits for", "band", "usable", "first token")
_OF_PICKS = ("size", "metric")
_OF_TIERS = ("size", "usable", "least on", "metric", "solved, accuracy")


def devices_table(known: Sequence[Device], width: int | None = None) -> str:
    """Return a table of devices: memory, usable memory, bandwidth, dense rates. For a single device, add the sources.

    Args:
        known: The devices.
        width: Characters of a line. With None there is no limit, and every column is shown.
    """
    head = ("device", "class", "memory", "usable", "bandwidth", *PRECISIONS)
    lines = [
        (
            device.name + (" (measured)" if device.measured else ""),
            device.kind.name,
            format_bytes(device.memory_bytes),
            format_bytes(device.usable_bytes),
            f"{format_bytes(device.bandwidth)}/s",
            *(f"{device.rates[name] / 1e12:,.4g}" if name in device.rates else "-" for name in PRECISIONS),
        )
        for device in known
    ]
    where = "" if len(known) == 1 else "; autodistill devices NAME tells where a device's figures are from"
    said = [f"Rates are dense, in tera operations a second{where}."]
    if len(known) == 1:
        (device,) = known
        told = {"serves with": ", ".join(device.runtimes), "also called": ", ".join(device.aliases), **device.sources}
        said += [f"{name}: {text}" for name, text in told.items() if text]
    said = said if width is None else [line for text in said for line in wrapped(text, width)]
    return "\n".join([table([head, *lines], left=2, optional=_OF_DEVICES, width=width), *said])


def appraisal_text(document: Mapping[str, Any], width: int | None = None) -> str:
    """Return an estimate as lines: memory by part, devices, training and GPUs. All figures are predicted.

    Args:
        document: The result of `appraise`.
        width: Characters of a line of a table, or None for no limit.
    """
    parts = ("weights", "kv_cache", "compute", "overhead")
    lines = [(name.replace("_", " "), format_bytes(document[f"{name}_bytes"])) for name in parts]
    change = document["memory_overhead"]
    if learnt := change["correction_bytes"] + change["margin_bytes"]:
        lines.append(("by measured students", format_bytes(learnt)))
    lines.append(("total", format_bytes(document["total_bytes"])))
    if document["main_memory_bytes"]:
        lines.append(("in addition, in main memory", format_bytes(document["main_memory_bytes"])))
    size = f"{document['parameters']:,} parameters, {document['deployment']} in {document['runtime']}"
    title = f"{document['model']}: {size}, context {document['context']}, batch {document['batch']}, KV cache "
    not_held = f"\nIt fits nowhere: {document['cannot_hold']}." if document["cannot_hold"] else ""
    rests = f"Rests on: {document['basis']}.{_overhead(change)}{not_held}"
    sections = [f"{title}{document['kv_type']}\n{table(lines, left=1)}\n{rests}"]
    if document["devices"]:
        head = ("device", "fits", "usable", "tokens/s", "band", "first token", "waits for")
        rows = [
            (one["device"], "yes" if one["fits"] else "no", format_bytes(one["usable_bytes"]), *_speed(one))
            for one in document["devices"]
        ]
        shown = table([head, *rows], left=2, optional=_OF_SPEEDS, width=width)
        sections.append(f"{shown}\n{_speeds_note(document)}")
    if document["training"]:
        sections.append(_training(document["training"]))
    if document["gpus"]:
        sections.append(_gpus(document["gpus"]))
    if document.get("stress"):
        sections.append(_stress(document["stress"]))
    return "\n\n".join(sections)


def _stress(found: Mapping[str, Any]) -> str:
    """Return text about what a pressure test found, and which estimates fit."""
    rows = [(name, format_bytes(size), "yes" if found["fit"][name] else "no") for name, size in found["plans"].items()]
    parts = [str(found["text"]), table([("estimate of", "bytes", "fits here"), *rows], left=1)]
    return "\n".join([*parts, *([str(found["summary"]).rstrip()] if found["summary"] else [])])


def _speeds_note(document: Mapping[str, Any]) -> str:
    """Return notes on how the speeds were predicted, or why there are none."""
    prompts = [one["prompt"] for one in document["devices"] if one["prompt"] is not None]
    assumed = dict.fromkeys(one["assumed"] for one in document["devices"] if one["assumed"])
    told = (None, document["cannot_hold"])
    reasons = list(dict.fromkeys(one["reason"] for one in document["devices"] if one["reason"] not in told))
    notes = [f"{reason}." for reason in reasons[:_REASONS]]
    if len(reasons) > _REASONS:
        notes.append(f"{len(reasons) - _REASONS} more devices do not serve students with it.")
    if prompts:
        at = f"Speeds are predicted by a roofline at a full context; the first token follows a prompt of {prompts[0]}."
        notes = [at, *(f"* Assumed, with a wide range: {why}." for why in assumed), *notes]
    notes = notes or [f"No speed is predicted for {document['runtime']}."]
    # With several devices, the printed parts are a process's memory. Memory on a GPU is a different sum.
    sums = dict.fromkeys(one["memory_basis"] for one in document["devices"] if one["memory_basis"] != document["basis"])
    return "\n".join([*notes, *(f"What fits a GPU is {basis}." for basis in sums)])


def _speed(one: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a device's speed as cells: tokens a second (* if assumed), their range, first token, and bottleneck."""
    if one["tokens_per_second"] is None:
        return ("-",) * 4
    return (
        format_rate(one["tokens_per_second"], 3) + ("*" if one["assumed"] else ""),
        f"{format_rate(one['tokens_per_second_low'], 3)}-{format_rate(one['tokens_per_second_high'], 3)}",
        format_duration(one["time_to_first_token_ms"] / 1e3),
        one["bound"],
    )


def _training(found: Mapping[str, Any]) -> str:
    """Return the memory of training as a table: a line for each part, a column for each way to save memory."""
    ways = {name: parts for name, parts in found.items() if isinstance(parts, Mapping)}
    told = next(iter(ways.values()))
    # Alignment, the student's own writing and the teacher are shown only if they add something. The total comes last.
    more = ("alignment_bytes", "writing_bytes", "teacher_bytes")
    added = [name for name in more if told.get(name)]
    own = [name for name in told if name not in (*more, "total_bytes")]
    parts = [*own, *added, "total_bytes"]
    lines = [(memory_part(name), *(format_bytes(way[name]) for way in ways.values())) for name in parts]
    together = f" on each of {found['gpus']} GPUs" if found["gpus"] > 1 else ""
    head = (f"training{together}", *(_WAYS.get(way, way.replace("_", " ")) for way in ways))
    trained = found.get("trained", "all weights")
    note = (
        f"{trained[0].upper()}{trained[1:]}, by AdamW in float32, products in bfloat16, "
        f"{count_of(found['tokens'], 'token')} a step of one pass{together}.\nActivations are freed as gradients "
        "appear: the total has the larger of the two sums. 16-bit and 8-bit states come with checkpointing."
    )
    if together:
        note += (
            "\nWeights, gradients and states are divided (FSDP2, not tensor parallelism). With any number of GPUs, "
            f"{format_bytes(found['undivided_bytes'])} stay on each, in the way of training that needs least."
        )
    return f"{table([head, *lines], left=1)}\n{note}"


def _gpus(found: Mapping[str, Any]) -> str:
    """Return a table of what each of several GPUs holds of a model, next to what one GPU alone would hold."""
    if found["not_divided"]:
        return f"Running it is not divided over {found['count']} GPUs: {found['not_divided']}."
    names = [name for name in found["each"] if name != "total_bytes"]
    rows = [
        (name.removesuffix("_bytes").replace("_", " "), *(format_bytes(found[who][name]) for who in ("alone", "each")))
        for name in (*names, "total_bytes")
    ]
    note = "Run in 16 bits by transformers, with tensor parallelism, as a search divides its teacher."
    head = ("running", "one GPU", f"each of {found['count']}")
    return f"{table([head, *rows], left=1)}\n{note}"


def _overhead(change: Mapping[str, Any]) -> str:
    """Return a line on how measured students changed the predicted memory, or "" if they changed nothing."""
    if not change["pairs"]:
        return ""
    more = change["correction_bytes"]
    if not more and not change["margin_bytes"]:
        return ""
    return (
        f"\nPredicted memory has {format_bytes(abs(more))} {'less' if more < 0 else 'more'} overhead than estimated, "
        f"and a margin of {format_bytes(change['margin_bytes'])}, by {count_of(change['pairs'], 'measured student')}."
    )


def pick_text(document: Mapping[str, Any], width: int | None = None) -> str:
    """Return a pick as lines: the picked row and its runner-up, or the rows for each tier and load.

    Args:
        document: The result of `pick` or `pick_tiers`.
        width: Characters of a line of a table, or None for no limit.
    """
    head = ("", "run", "row", "metric", "value", "memory", "size")
    if "loads" in document:
        return "\n\n".join(_tiers_text(load, head, width) for load in document["loads"])
    if "tiers" in document:
        return _tiers_text(document, head, width)
    named = (("pick", "pick"), ("runner-up", "runner_up"), ("left out", "better_left_out"))
    lines = [(title, *_picked(document[key])) for title, key in named if document[key]]
    margins = document["pick"]["margins"]
    on_gpu = f"\nMemory is {document['memory_basis']}." if document["memory_basis"] else ""
    told = ", ".join(f"{name} {margin:.0%} below the limit" for name, margin in margins.items() if name != "accuracy")
    if "accuracy" in margins:
        told += f", {_score_above(document['pick'])}"
    binds = (
        f"The limit that excludes better rows is {document['binds']}."
        if document["binds"]
        else "No limit excludes a better row."
    )
    kept = _overhead(document["memory_overhead"])
    sources = document["pick"]["sources"]
    times = [name for name in sources if name not in ("memory", "accuracy")]
    source = "".join(f"\n{name} is {sources[name]}." for name in times)
    tied = document["tied"]
    tie = f"\n{tied} rows are tied with the best; this is the smallest of them." if tied > 1 else ""
    others = "".join(
        f"\n{count_of(count, 'row')} of {name} {'is' if count == 1 else 'are'} left out: it does not run on "
        f"{document['device']}."
        for name, count in document["other_runtimes"].items()
    )
    if document["better_unknown"]:
        others += (
            f"\nFor {count_of(document['better_unknown'], 'better row')} the memory or time under this load is unknown."
        )
    others += _last_text(document["last"], document["not_held"])
    then = _solved_text(document.get("solved"), document.get("solve"))
    then += f"\n{document['next']}" if document.get("next") else ""
    shown = table([head, *lines], left=4, optional=_OF_PICKS, width=width)
    return f"{shown}\nMargin: {told}. {binds}{tie}{others}{source}{on_gpu}{kept}{then}"


def _last_text(runs: Sequence[str], not_held: bool) -> str:
    """Return text that says which runs' students are ranked last, and why, or that one of them was picked anyway."""
    why = "AutoDistill did not yet measure what a student forgets"
    said = (
        f"\nStudents of {', '.join(runs)} come last: when they were trained, {why}. Name runs to pick from these alone."
        if runs
        else ""
    )
    if not_held:
        said += f"\nThe student was trained when {why}: no student for which it was measured fits."
    return said


def _solved_text(solved: Mapping[str, Any] | None, command: str | None) -> str:
    """Return text about what solving gave for the same memory, or else the command that solves for it."""
    if solved is None:
        return f"\nWhat solving would give for this memory, without training: {command}" if command else ""
    return (
        f"\nSolved before for {format_bytes(solved['budget_bytes'])}, without training: {solved['teacher']} as "
        f"{solved['name']} takes {format_bytes(solved['bytes'])}, with an accuracy of {solved['accuracy']:.4f} and a "
        f"KL to the teacher of {solved['kl']:.4f} on {solved['tokens']:,} tokens of {solved['data']}. It is written by "
        "autodistill solve --export."
    )


def _tiers_text(document: Mapping[str, Any], head: Sequence[str], width: int | None) -> str:
    """Return the rows for tiers of memory, with the usable memory of each tier."""
    lines = [
        (
            format_bytes(one["memory_bytes"]),
            format_bytes(one["usable_bytes"]),
            (one["least_device"] or "-") if one["gpu"] else "a process",
            *_picked(one["pick"]),
            "-" if one.get("solved") is None else f"{one['solved']['name']}, {one['solved']['accuracy']:.4f}",
        )
        for one in document["tiers"]
    ]
    titles = ("tier", "usable", "least on", *head[1:], "solved, accuracy")
    context = document["context"] or f"{CONTEXT}, or what a student reads if that is less"
    rests = "".join(f"\nMemory in {runtime} is {basis}." for runtime, basis in document["memory_basis"].items())
    return (
        f"At context {context}; {count_of(document['streams'], 'stream')}:\n"
        f"{table([titles, *lines], left=6, optional=_OF_TIERS, width=width)}"
        f"{_binding(document['tiers'])}\n"
        "A tier up to 2 GB is a limit on a process's memory, like that of a container. For GPUs, usable is what every "
        f"listed GPU of this class can use; if none is listed, 10^9 bytes for each GB, less what GPUs reserve.{rests}"
        f"{_last_text(document['last'], any(one['not_held'] for one in document['tiers']))}"
    )


def _binding(tiers: Sequence[Mapping[str, Any]]) -> str:
    """Return text that says which tiers share a student, and which limit excludes a better one."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for one in tiers:
        if one["pick"]:
            groups.setdefault(one["same_as"] or one["memory_bytes"], []).append(one)
    none = [one for one in tiers if not one["pick"]]
    said = ""
    if none:
        sizes = [format_bytes(one["memory_bytes"]) for one in none]
        said = f"\n{', '.join(sizes)}: nothing fits; of {sizes[-1]}, {none[-1]['nothing']}."
    for group in groups.values():
        names = ", ".join(format_bytes(one["memory_bytes"]) for one in group)
        binds = group[-1]["binds"]
        what = "the same student" if len(group) > 1 else "a student of its own"
        why = "the budget does not bind" if binds is None else f"a better one is excluded by {binds}"
        said += f"\n{names}: {what}; {why}."
    return said


def _score_above(picked: Mapping[str, Any]) -> str:
    """Return by how much the score of a pick is above --min-accuracy, in points of that score."""
    above = picked["needs"]["accuracy"] - picked["limits"]["accuracy"]
    return f"{picked['score']} {above:.4f} above the limit"


def measured_text(document: Mapping[str, Any]) -> str:
    """Return the measured figures next to the predicted ones, or how to use the script that was written.

    Args:
        document: The result of `measure`.
    """
    if "script" in document:
        return (
            f"{document['script']}: copy it and the student to the board, run there\n"
            f"  sh {PurePath(document['script']).name} student.gguf [llama-bench] > result.txt\n"
            "and read what it printed with autodistill measure STUDENT --result result.txt"
        )
    if "blocks" in document:
        return _blocks_text(document)
    found, predicted = document["measured"], document["predicted"]
    board = found["board"]

    def predicted_text(name: str, shown: Callable[[float], str]) -> str:
        return f"predicted {shown(predicted[name])}" if name in predicted else ""

    def milliseconds(value: float) -> str:
        return format_duration(value / 1e3)

    lines = [
        ("tokens/s", format_rate(found["tokens_per_second"]), ""),
        ("time per token, median", milliseconds(found["tpot_ms"]), predicted_text("tpot_ms", milliseconds)),
        ("time per token, p95", milliseconds(found["tpot_p95_ms"]), ""),
        ("prompt, tokens/s", format_rate(found["prompt_tokens_per_second"]), ""),
        (
            f"first token after {found['prompt']}",
            milliseconds(found["ttft_ms"]),
            predicted_text("ttft_ms", milliseconds),
        ),
    ]
    if found["peak_bytes"]:
        lines.append(("peak memory", format_bytes(found["peak_bytes"]), predicted_text("memory_bytes", format_bytes)))
    lines += [
        (
            f"{load['streams']} streams, tokens/s",
            format_rate(load["tokens_per_second"]),
            f"p99 {load['tpot_p99_ms']:.1f}ms",
        )
        for load in found["loads"][1:]
    ]
    told = (("temperature", "{:.0f} C"), ("watts", "{:.1f} W"), ("joules_per_token", "{:.3g} J"), ("power_mode", "{}"))
    lines += [(name.replace("_", " "), text.format(board[name]), "") for name, text in told if board.get(name)]
    lines += [("throttled", "yes" if board["throttled"] else "no", "")] if board.get("throttled") is not None else []
    title = f"{found['name']} on {found['machine']}, {count_of(found['threads'], 'thread')}, by {found['how']}"
    if "slots" in board:
        cache = " and ".join(dict.fromkeys(found["deployment"].get(f"cache_type_{one}", "f16") for one in "kv"))
        flash = f"flash attention {board['flash_attention']}"
        title += f"\n{board['slots']} x {board['context']} tokens, cache in {cache}, {flash}"
    doubts = "".join(f"\nDoubtful: {doubt}." for doubt in found["doubts"])
    left = f"\n{document['left']}." if document["left"] else ""
    unknown = ""
    if document["device"] is None:
        remedy = "" if found["how"] == "autodistill" else ": say which of autodistill devices it is with --device"
        unknown = f"\nNo known device is called {found['machine']}, so pick does not use this{remedy}."
    return f"{title}\n{table(lines, left=1)}\nStored in {document['kept_in']}.{doubts}{unknown}{left}"


def _blocks_text(document: Mapping[str, Any]) -> str:
    """Return the times of blocks in each type, for a token and for a prompt.

    The text also says which widths of an FFN cost more than their share.
    """
    times = document["blocks"]
    key, count = times["key"], times["layers"]
    lines = [
        f"Blocks on {key['device']}, {count_of(key['threads'], 'thread')}, by xllamacpp {key['version']}, from "
        f"small models of {count} layers: of one layer, and the head whole."
    ]
    for phase, what, unit in (
        ("decode", f"A token after {times['decode']['tokens']} others, in microseconds", 1e6),
        ("prompt", f"A prompt of {times['prompt']['tokens']} tokens, in milliseconds", 1e3),
    ):
        one = times[phase]
        kinds = dict.fromkeys(kind for part in PARTS for kind in one[part])
        rows: list[tuple[str, ...]] = [("type", *PARTS)]
        rows += [
            (kind, *(_with_spread(one[part][kind], unit) if kind in one[part] else "" for part in PARTS))
            for kind in sorted(kinds, key=list(TYPES).index)
        ]
        cache = ", ".join(
            f"{kind} {_with_spread(one['cache'][kind], unit)} a layer"
            + (
                f" and {unit * 1e3 * one['each'][kind]['seconds']:.3g} for each 1,000 tokens more"
                if one["each"]
                else ""
            )
            for kind in one["cache"]
        )
        said = f"What is constant takes {_with_spread(one['constant'], unit)}; a cache in {cache}."
        lines += ["", f"{what}:", table(rows, left=1), said]
    for width in times["widths"]:
        shares = ", ".join(
            f"{width[phase]:+.1%} ± {width[f'{phase}_spread']:.1%} of a {what}"
            for phase, what in (("decode", "token"), ("prompt", "prompt"))
        )
        lines.append(f"An FFN of {width['neurons']} neurons in {width['kind']} takes {shares} beyond its share.")
    if document["liked_multiple"]:
        lines.append(f"Widths in multiples of {document['liked_multiple']} are not slower than others.")
    doubts = "".join(f"\nDoubtful: {doubt}." for doubt in times["doubts"])
    return "\n".join(lines) + f"\nStored in {document['kept_in']}, for solve --latency on this machine.{doubts}"


def _with_spread(one: Mapping[str, float], unit: float) -> str:
    return f"{unit * one['seconds']:.4g} ± {unit * one['spread']:.2g}"


def _picked(one: Mapping[str, Any] | None) -> tuple[str, ...]:
    if one is None:
        return ("-", "nothing fits", "-", "-", "-", "-")
    mark = "~" if one["memory_source"] == "predicted" else ""
    size = "-" if one["size_bytes"] is None else format_bytes(one["size_bytes"])
    value = with_error(one["value"], one["stderr"])
    return (one["run"], one["row_id"], one["metric"], value, mark + format_bytes(one["memory_bytes"]), size)
