"""SmolLM2-135M in every format of `autodistill export`: size, agreement with the evaluated model, speed and memory.

    python -m benchmarks.hardware.export_formats [--tokens 500] [--only onnx,gguf]

Each format is a line of `reports/export-formats.jsonl`. Existing lines are not exported again.

The teacher is exported unchanged, with its own codes (matrices in Q4_1, table in Q8_0) if a format can hold these. It
is proven in the runtime that serves the format, as in an export of a search. Times are CPU time on one thread, so other
work on the machine does not count: of the export, of the first token after a prompt of 64, and of a later token.
Formats without a cache (pt2, torchscript, aoti) read the whole text for each token, and are not timed. The formats for
phones are timed during the proof: a later token that is written, and the peak memory of the process.

Targets, written before the first run: every format is proven; the codes of onnx take no more bytes than those of gguf
(alignment and graph within 2%); a later token of onnx takes at most three times that of llama.cpp.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.advisor.describe import deployment_named
from autodistill.data.tokenization import load_tokenizer
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.errors import MissingDependencyError, VerificationError
from autodistill.export.base import Expected, TakesAny, load_exporter
from autodistill.export.proof import simulate
from autodistill.export.verify import prove, verify
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import read_config
from autodistill.options import cache_folder
from autodistill.runtimes.timing import serve
from autodistill.strategy.deployment import Deployment
from benchmarks.common import program, report
from benchmarks.common.model_files import timed

OWN = "gguf-q4_1"
FORMATS = {
    "gguf": OWN,
    "onnx": OWN,
    "onnx-f16": OWN,
    "compressed-tensors": "compressed-tensors-int4-g32-asym",
    "huggingface": "huggingface",
    "pt2": OWN,
    "torchscript": OWN,
    "aoti": OWN,
    "litert": OWN,
    "litert-codes": OWN,
    "litertlm": OWN,
    "executorch": OWN,
}
SERVED_BY = {
    "gguf": "llama.cpp",
    "onnx": "onnxruntime",
    "compressed-tensors": "transformers",
    "huggingface": "transformers",
}
PHONES = ("litert", "litert-codes", "litertlm", "executorch")
STORE = "export-formats.jsonl"
LENGTH = 100  # in tokens of a sequence
PROMPT = 64


def text(folder: Path, tokens: int) -> Any:
    """Return tokens of Python's language reference, int [sequences, tokens]."""
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[name] for name in sorted(topics))
    rows = -(-tokens // LENGTH)
    found = load_tokenizer(folder)(whole[: 8 * rows * LENGTH])["input_ids"][: rows * LENGTH]
    return np.array(found, np.int32).reshape(rows, LENGTH)


def exported(name: str, student: Path, deployment: Deployment, expected: Expected, out: Path) -> dict[str, Any]:
    """Write one format, read it back, run it, and time it if a runtime serves it."""
    exporter = load_exporter(name)
    if isinstance(exporter, TakesAny) and (reason := exporter.refuses(student, deployment)):
        raise VerificationError(reason)
    began = time.process_time()
    artifact = exporter.export(student, deployment, out / name)
    seconds = time.process_time() - began
    verify(exporter, artifact, student, deployment)
    found: dict[str, Any] = {"format": name, "stored": deployment.name, "export_seconds": seconds}
    found |= {"bytes": artifact.size_bytes}
    check = asdict(prove(exporter, artifact.path, deployment, expected, 1, student))
    found |= {key: check[key] for key in ("agreement", "loss", "excess", "same_written", "positions")}
    if runtime := SERVED_BY.get(name):
        vocabulary = spec_from_config(read_config(student)).vocabulary
        with serve(artifact.path, runtime, context=512, threads=1, parallel=1) as server:
            step, first = timed(server, vocabulary, PROMPT)
            found |= {"runtime": runtime, "step_ms": step, "first_ms": first, "peak_bytes": server.peak_bytes()}
    elif name in PHONES:
        found |= {"runtime": exporter.runs_in, "step_ms": check["cpu_ms"], "peak_bytes": check["peak_bytes"]}
    return found


def lines(found: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Yield the rows of the table, one for each format."""
    for one in found:
        if "failed" in one:
            yield [one["format"], one["failed"], *[""] * 7]
            continue
        more = "" if one["excess"] is None else f"{one['excess']:+.4f}"
        timing = ["", "", ""]
        if "runtime" in one:
            first = f"{one['first_ms']:.0f}" if "first_ms" in one else ""
            timing = [first, f"{one['step_ms']:.1f}", f"{one['peak_bytes'] / 1e6:.0f}"]
        yield [
            one["format"],
            one["stored"],
            f"{one['bytes'] / 1e6:.1f}",
            f"{one['agreement']:.2%}",
            more,
            str(one["same_written"]),
            *timing,
            f"{one['export_seconds']:.0f}",
        ]


def findings(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield what was found, in sentences."""
    known = {one["format"]: one for one in found if "failed" not in one}
    failed = [f"{one['format']} ({one['failed']})" for one in found if "failed" in one]
    yield f"- proven: {', '.join(known)}" + (f"; not: {'; '.join(failed)}" if failed else "")
    if {"gguf", "onnx"} <= known.keys():
        size = known["onnx"]["bytes"] / known["gguf"]["bytes"]
        speed = known["onnx"]["step_ms"] / known["gguf"]["step_ms"]
        yield f"- onnx takes {size:.3f} of gguf's bytes: {'kept' if size <= 1.02 else 'missed'}"
        yield f"- a later token of onnx takes {speed:.2f} times llama.cpp's CPU: {'kept' if speed <= 3 else 'missed'}"
    if {"litert", "litert-codes"} <= known.keys():
        slower = known["litert-codes"]["step_ms"] / known["litert"]["step_ms"]
        yield f"- a later token of litert-codes takes {slower:.2f} times litert's CPU"


def main() -> None:
    """Export the teacher to each format, run it, and write the report of sizes, agreement and speed."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--tokens", type=program.token_count, default=500, help="of the proof")
    parser.add_argument("--only", default=",".join(FORMATS), help="formats, separated by commas")
    parser.add_argument("--teacher", default="smollm2", help="what is exported")
    given = program.parse(parser, tokens=100, only="onnx,gguf")
    teacher = program.tiny_teacher() if given.smoke else given.teacher
    student = materialize(resolve_teacher(teacher), cache_folder()).folder
    vocabulary = spec_from_config(read_config(student)).vocabulary
    tokens = text(student, given.tokens) % vocabulary
    expected: dict[Deployment, Expected] = {}
    store = program.REPORTS / STORE
    for name in given.only.split(","):
        if any((one["format"], one["tokens"]) == (name, tokens.size) for one in report.lines_of(store)):
            continue
        deployment = deployment_named(FORMATS[name])
        if deployment not in expected:
            expected[deployment] = simulate(student, deployment, tokens, 1)
        with tempfile.TemporaryDirectory() as folder:
            try:
                one = exported(name, student, deployment, expected[deployment], Path(folder))
            except (VerificationError, MissingDependencyError) as error:
                one = {"format": name, "failed": str(error)}
        print(one, flush=True)
        report.add_line(store, one | {"tokens": int(tokens.size)})
    found = [one for one in report.lines_of(store) if one["tokens"] == tokens.size]
    found.sort(key=lambda one: [*FORMATS].index(one["format"]))
    titles = ["format", "stored as", "MB", "same token", "loss, nats more", "written alike"]
    titles += ["first token, ms", "later token, ms", "memory, MB", "export, s"]
    told = (
        f"{tokens.size} tokens of Python's language reference. Agreement with the evaluated student at the 80% of "
        "positions where its choice is clearest (97% is asked), and at all; KL over the 64 likeliest tokens and the "
        "rest; tokens written alike of 64. Milliseconds and seconds are of CPU, on one thread; memory is "
        "the peak of the runtime's process at 512 tokens of context, or for the four formats for phones of the "
        "process that ran the proof."
    )
    sections = [told, report.table(titles, lines(found)), "\n".join(findings(found))]
    print(report.write("export-formats", "SmolLM2-135M in every format of export", sections, store))


if __name__ == "__main__":
    main()
