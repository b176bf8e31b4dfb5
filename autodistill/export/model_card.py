"""The model card of an exported student: its origin, results under each quantisation scheme, and comparisons."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from autodistill.export.base import Label
from autodistill.models.config import spec_from_config
from autodistill.models.llama_cpp_graphs import graph_of
from autodistill.models.model_folder import stated_license
from autodistill.quantization.formats import as_held, get_format
from autodistill.runs.markdown import fenced, plain
from autodistill.runs.results.leaderboard import DISTILLED
from autodistill.runs.results.row import Row
from autodistill.runs.students import kept_after
from autodistill.strategy.deployment import Deployment
from autodistill.units import format_bytes

NOT_STATED = "not stated: ask its author"
_UNTRAINED = {"teacher": "teacher", "initial": "untrained student"}
_FIGURES = ("split", "accuracy", "retention", "perplexity", "memory", "latency", "size")
_NO_ROW = "It was not measured under this quantisation scheme."


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a student was made from.

    Attributes:
        teacher, data: Names of the teacher and the data.
        teacher_license, data_license: SPDX identifiers if there are any; None if unknown.
        quantized: The format in which the teacher's file was quantised, like "Q4_1", or None.
    """

    teacher: str
    data: str
    teacher_license: str | None
    data_license: str | None
    quantized: str | None

    @classmethod
    def of(cls, search: Mapping[str, Any]) -> Origin:
        """Return the origin of a run's students, from its `search.json`."""
        teacher, data = search["teacher"]["name"], search["data"]["name"]
        known = {name: text for name, text in search["licences"].items() if text != NOT_STATED}
        return cls(
            teacher=teacher,
            data=data,
            teacher_license=stated_license(known.get(teacher)),
            data_license=stated_license(known.get(data)),
            quantized=search["teacher"].get("quantised"),
        )

    def name_of(self, row: Row) -> str:
        """Return the name of a row's model, for programs that list models."""
        return self.teacher if row.kind == "teacher" else f"Student of {self.teacher}"

    def label(self, row: Row) -> Label:
        """Return the label with which a file of a row's model describes itself."""
        return Label(teacher=self.teacher, license=self.teacher_license, name=self.name_of(row))


def model_card(row: Row, deployment: Deployment, rows: Iterable[Row], origin: Origin) -> str:
    """Return the README.md of an exported model: a student, or the teacher itself.

    Args:
        row: A row of the model.
        deployment: How it is packed here.
        rows: The run's rows of both splits. Rows of the same model show its packings. For other models, the card
            uses rows of the test split, and the teacher's row in the same packing.
        origin: What the model was made from.
    """
    here = deployment.name
    own, others = [], []
    for one in rows:
        if (one.trial, kept_after(one)) == (row.trial, kept_after(row)):
            own.append(one)
        elif one.split == "test" or (one.kind == "teacher" and one.deployment_name == here):
            others.append(one)
    own = _as_measured(own)
    own.sort(key=lambda one: one.deployment_name != here)
    measured = any(one.deployment_name == here for one in own)
    held = get_format(deployment.format)
    license = origin.teacher_license
    read = "learnt from" if row.kind in DISTILLED else "was measured on"
    model = "the teacher" if row.kind == "teacher" else "this student"
    head = {
        **({"license": " ".join(license.lower().split())} if license else {}),
        "library_name": "transformers" if "transformers" in held.runtimes else held.container,
        "pipeline_tag": "text-generation",
        "tags": [*(["distillation"] if _is_distilled(row) else []), "quantization", "autodistill", held.container],
    }
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=math.inf).rstrip(),
            "---",
            "",
            f"# {plain(origin.name_of(row))}",
            "",
            _made(row, deployment, origin),
            f"It is stored here as {here}.{'' if measured else ' ' + _NO_ROW}{_cache(deployment)}",
            *_widths(row, deployment),
            "",
            f"- Licence of the teacher, which its students inherit: {plain(license or NOT_STATED)}",
            f"- Licence of the text it {read} ({plain(origin.data)}): {plain(origin.data_license or NOT_STATED)}",
            "",
            "## Measurements",
            "",
            f"Each row is {model} under one quantisation scheme. Retention is its accuracy over the teacher's on the "
            "same tokens.",
            "",
            *_table(("packed as",), own, lambda one: (f"**{here}**" if one.deployment_name == here else None,)),
            *_compared(others),
            "",
            *(
                ["## Strategy", "", fenced(json.dumps(row.strategy.to_json(), indent=2), "json"), ""]
                if row.strategy
                else []
            ),
        ]
    )


def _cache(deployment: Deployment) -> str:
    """Return how the KV cache must be set up; empty for the runtime's default."""
    arguments = shlex.join(deployment.server_arguments)
    if not arguments:
        return ""
    return f" Serve it with `{arguments}`: the figures are of this KV cache, and the file does not set it."


def _widths(row: Row, deployment: Deployment) -> list[str]:
    """Return how programs handle layers that differ in width; empty for a model whose layers are alike."""
    spec = None if row.shape is None else spec_from_config(row.shape)
    if spec is None or not spec.ffn_widths:
        return []
    differ = f"Its layers differ in FFN width, from {min(spec.ffn_widths)} to {max(spec.ffn_widths)} neurons"
    held = as_held(spec, deployment)
    if held.ffn_widths:
        return [
            f'{differ}: llama.cpp computes such a model as its architecture "{graph_of(spec)}". Stock transformers and '
            "vLLM refuse it, and a folder for them is padded with zeros."
        ]
    return [
        f"{differ}, which stock transformers and vLLM refuse. In this folder narrower layers are padded with zeros to "
        f"the widest: it computes the same, and holds {held.parameters:,} weights for the {spec.parameters:,} of the "
        "student."
    ]


def _as_measured(rows: Sequence[Row]) -> list[Row]:
    """Return a student's rows; test rows get the measured memory of their deployment, because scoring measures none."""
    measured = {row.deployment_name: row for row in rows if row.split != "test" and row.memory_source == "measured"}
    known = ("memory_bytes", "memory_source", "size_bytes")
    return [
        replace(row, **{name: getattr(measured[row.deployment_name], name) for name in known})
        if row.split == "test" and row.deployment_name in measured
        else row
        for row in rows
    ]


def _made(row: Row, deployment: Deployment, origin: Origin) -> str:
    teacher = plain(origin.teacher)
    if deployment.file is not None:
        made = [f"This is a file of {teacher} as it was given, byte for byte: AutoDistill measured it, no more."]
    elif row.kind == "teacher":
        made = [f"This is {teacher} itself: AutoDistill quantised it, and nothing was distilled or trained."]
    elif row.kind == "initial" and row.strategy is not None and row.strategy.init.source == "pretrained":
        file = Path(row.strategy.init.model).name
        made = [f"This is {plain(file)}, as AutoDistill packed it: it was not trained, and is compared with {teacher}."]
    elif row.kind == "initial":
        made = [
            f"Made from {teacher} by AutoDistill: the initial student of strategy `{row.strategy_id}`, not trained."
        ]
    elif _is_distilled(row):
        made = [f"Distilled from {teacher} on {plain(origin.data)} by AutoDistill, under strategy `{row.strategy_id}`."]
    else:
        made = [
            f"A student of {teacher} that AutoDistill trained on {plain(origin.data)}, under strategy "
            f"`{row.strategy_id}`: on the labels alone, so nothing was distilled."
        ]
    if row.kind in DISTILLED and row.strategy is not None and row.strategy.scales_alone:
        made.append("Only the scales of its codes were trained.")
    if row.interpolation is not None:
        made.append(
            f"Its weights lie {row.interpolation:.0%} of the way from where its training began to where it ended, so "
            "that it forgets less of other text."
        )
    if row.fidelity is not None and not row.full:
        made.append(f"It was trained for {row.fidelity:.0%} of the tokens that were planned.")
    if origin.quantized:
        made.append(f"The teacher was read from a file in {plain(origin.quantized)} and dequantised.")
    return " ".join(made)


def _is_distilled(row: Row) -> bool:
    """Return whether a row's model was trained and learned from the teacher, which is assumed without a strategy."""
    recipe = None if row.strategy is None else row.strategy.distillation
    return row.kind in DISTILLED and (recipe is None or recipe.reads_teacher)


def _compared(rows: Sequence[Row]) -> list[str]:
    """Return the other models of the run as a table, or nothing."""
    if not rows:
        return []
    table = _table(("model", "packed as"), rows, lambda one: (_named(one), None))
    return ["", "## Compared with", "", "Each row is another model of the same run.", "", *table]


def _named(row: Row) -> str:
    if row.kind in _UNTRAINED:
        return _UNTRAINED[row.kind]
    trained = "" if row.fidelity is None else f", after {row.fidelity:.0%} of the plan's tokens"
    return f"{row.kind} {plain(row.name)}{trained}"


def _table(titles: Sequence[str], rows: Sequence[Row], first: Callable[[Row], Sequence[str | None]]) -> list[str]:
    """Return a table of rows' figures; None in `first` stands for the name of the quantisation scheme."""
    lines = [(*titles, *_FIGURES), ["---"] * (len(titles) + len(_FIGURES))]
    lines += [(*(cell or row.deployment_name for cell in first(row)), *_figures(row)) for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _figures(row: Row) -> tuple[str, ...]:
    return (
        row.split or "-",
        row.shown("accuracy"),
        _number(row.figure("retention"), "{:.3f}"),
        _number(row.figure("perplexity"), "{:.2f}"),
        _sourced(_bytes(row.memory_bytes), row.memory_source),
        _sourced(_number(row.figure("latency_ms"), "{:.1f} ms"), row.latency_source),
        _bytes(row.size_bytes),
    )


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def _bytes(value: int | None) -> str:
    return "-" if value is None else format_bytes(value)


def _sourced(text: str, source: str | None) -> str:
    return text if text == "-" or source is None else f"{text} ({source})"
