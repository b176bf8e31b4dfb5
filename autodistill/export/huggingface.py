"""Exports a student as the 16-bit folder of transformers, and writes its model card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from autodistill.codes import unpack
from autodistill.contracts import Artefact
from autodistill.export.student_files import WEIGHTS, StudentFiles, bf16_config, read_arrays, write_folder
from autodistill.formats import Floats
from autodistill.strategy import Deployment, content_hash
from autodistill.units import format_bytes


class HuggingFaceExporter:
    """Writes bfloat16 safetensors, config, tokenizer and generation config."""

    name = "huggingface"
    formats = ("huggingface",)

    def export(self, student: Path, deployment: Deployment, out: Path) -> Artefact:
        """Packs the student into the folder `out`.

        Raises:
            InputError: The student cannot be read, or `out` not be written.
        """
        with StudentFiles(student, deployment) as files:
            tensors = {name: as_bf16(files.pack(name)) for name in files.specs}
            return write_folder(out, student, bf16_config(files.config), tensors)

    def unpack(self, artefact: Path) -> Iterator[tuple[str, Floats]]:
        """Yields each stored tensor, widened to float32."""
        for name, tensor in read_arrays(artefact / WEIGHTS):
            yield name, unpack({"data": tensor.view(torch.uint16).numpy()}, "bf16", tuple(tensor.shape))


def as_bf16(arrays: Mapping[str, Any]) -> torch.Tensor:
    """The torch tensor of bfloat16 bits that `codes.pack` gave."""
    return torch.from_numpy(arrays["data"]).view(torch.bfloat16)


def model_card(
    rows: Sequence[Mapping[str, Any]], strategy: Mapping[str, Any], teacher: str, data_name: str, licence: str | None
) -> str:
    """The README.md of an exported student.

    Args:
        rows: Rows of the leaderboard, as plain data, best first.
        strategy: How the student was made, as plain data; empty where it is the unmodified teacher.
        teacher: Name of the teacher.
        data_name: Name of the data.
        licence: Of the teacher's weights, as an SPDX identifier, or None where it is unknown.
    """
    header = [f"license: {licence.lower()}"] if licence else []
    made = f"Distilled from {teacher} on {data_name} by AutoDistill, under strategy `{content_hash(strategy)}`."
    if not strategy:
        made = f"{teacher} itself, packed by AutoDistill without training; measured on {data_name}."
    elif (fidelity := rows[0].get("fidelity")) is not None and fidelity < 1 - 1e-9:
        made += f" It was trained for {fidelity:.0%} of the tokens that were planned."
    recipe = ["", "## Strategy", "", "```json", json.dumps(strategy, indent=2), "```"] if strategy else []
    return "\n".join(
        [
            "---",
            *header,
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags: [distillation, quantization, autodistill]",
            "---",
            "",
            f"# Student of {teacher}",
            "",
            made,
            f"Licence of the teacher: {licence or 'unknown; ask its makers before you pass this student on'}.",
            "",
            "## Measurements",
            "",
            "Retention is the accuracy over the teacher's on the same tokens. Each row is one way to pack the student.",
            "",
            "| packed as | split | accuracy | retention | perplexity | memory | latency | size |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *(_card_row(row) for row in rows),
            *recipe,
            "",
        ]
    )


def _card_row(row: Mapping[str, Any]) -> str:
    accuracy = _number(row, "accuracy", ".4f")
    if row.get("accuracy_stderr") is not None:
        accuracy += f" ± {row['accuracy_stderr']:.4f}"
    cells = [
        Deployment.from_json(row["deployment"]).name,
        row.get("split") or "-",
        accuracy,
        _number(row, "retention", ".3f"),
        _number(row, "perplexity", ".2f"),
        _sourced(_bytes(row, "memory_bytes"), row.get("memory_source")),
        _sourced(_number(row, "latency_ms", ".1f", " ms"), row.get("latency_source")),
        _bytes(row, "size_bytes"),
    ]
    return f"| {' | '.join(cells)} |"


def _number(row: Mapping[str, Any], key: str, pattern: str, unit: str = "") -> str:
    value = row.get(key)
    return "-" if value is None else f"{value:{pattern}}{unit}"


def _bytes(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "-" if value is None else format_bytes(value)


def _sourced(text: str, source: str | None) -> str:
    return text if text == "-" or source is None else f"{text} ({source})"
