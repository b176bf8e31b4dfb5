"""What does a megabyte buy: `solve`, llama.cpp's quantiser with an importance matrix, AutoRound, and training?

    python -m benchmarks.engine.memory_curve --library .../libllama.so [--data DIR] [--only Q4_0] [--render]

Two tools write GGUF files of SmolLM2, as their users call them, and each file is measured as a solution of `solve` is:
the same calibration text, the same held-out text, and the memory of the process at the same context. The cache has 16
bits, which is llama.cpp's default, or 8 bits, as in most solutions. What was solved is read from the tracked record of
`solve_smollm2`, and what was trained from that of `search.versus`. A run on another text than theirs is refused.

- llama.cpp: `llama_model_quantize` of the library that --library names (`common.llama_quantizer`), from a file in 16
  bits. The importance matrix has the mean squares of the inputs over the calibration text, as llama-imatrix computes
  them. Without --library these files are left out.
- AutoRound: its export to GGUF without tuning steps, which it recommends itself for GGUF. It needs its own package.
  Without it these files are left out. On two busy cores, its tuning would take hours for them.

The data is the documentation of PostgreSQL, which is downloaded once (`common.debian_texts`). Each file and cache is a
line of `reports/memory-curve.jsonl`. Existing lines are not measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from autodistill.advisor.describe import deployment_named
from autodistill.export.base import load_exporter
from autodistill.hardware.budget import Budget
from autodistill.models.families import get_family
from autodistill.models.loading import load_model
from autodistill.options import cache_folder
from autodistill.report.solved import write_chart
from autodistill.search.solve.call.candidates import Candidate, open_candidate
from autodistill.search.solve.call.opened import Opened, open_request
from autodistill.search.solve_request import SolveRequest
from autodistill.units import format_bytes
from benchmarks.common import debian_texts, program, report
from benchmarks.common.llama_quantizer import FILE_TYPES, load_quantizer, quantize
from benchmarks.engine.export_quality import moments_of
from benchmarks.engine.export_rivals import ARMS, by_autoround, missing
from benchmarks.engine.memory_curve_chart import AUTOROUND, LLAMA, OWN_FILES, picture

STORE = "memory-curve.jsonl"
SOLVED = program.TRACKED / "2026-12-01-solve-smollm2.json"
VERSUS = program.TRACKED / "2026-11-29-versus.json"
PACKAGE = "postgresql-doc-17"
OF_LLAMA = ("Q4_1", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K")
OF_AUTOROUND = ("q4_0", "q4_k_m", "q3_k_m", "q2_k_s")
CACHES = ("f16", "q8_0")
ROOM = 10**9
"""Bytes of a budget that every file fits, at which memory is counted."""


class Maker:
    """Writes the files of other tools for one teacher, each when it is asked for.

    Args:
        opened: The teacher and the texts, as `solve` opens them.
        library: The library of llama.cpp, or None.
        out: A folder for the files.
    """

    def __init__(self, opened: Opened, library: Path | None, out: Path) -> None:
        self._opened, self._library, self._out = opened, library, out
        self._tokens = torch.from_numpy(np.array(opened.calibration.data.tokens, np.int64))

    def files(self) -> Iterator[tuple[str, str, Callable[[], Path]]]:
        """Yield each file's tool and form, and a function that writes it and returns its path."""
        for form in OF_LLAMA if self._library else ():
            yield LLAMA, form, lambda form=form: self._by_llama(form)
        said = missing(ARMS["AutoRound: gguf-q4_0"])
        for form in () if said else OF_AUTOROUND:
            yield AUTOROUND, form.upper(), lambda form=form: self._by_autoround(form)

    def own(self) -> Path:
        """Write a file of this project in Q4_0: a smoke run has no other tool."""
        return self._exported("gguf-q4_0")

    def _exported(self, name: str) -> Path:
        folder = self._opened.teacher.folder
        return load_exporter("gguf").export(folder, deployment_named(name), self._out / name).path

    @cache  # noqa: B019  # it lives as long as its files
    def _source(self) -> tuple[Path, dict[str, Any]]:
        """Return the teacher in 16 bits, and its importance matrix."""
        model: Any = load_model(self._opened.teacher.folder, torch.float32).eval()
        with torch.no_grad():
            moments = moments_of(model, self._tokens)
        family = get_family(self._opened.bench.spec.architecture)
        importance = {str(family.gguf_name(name)): one.diagonal().numpy() for name, one in moments.items()}
        return self._exported("gguf-f16"), importance

    def _by_llama(self, form: str) -> Path:
        assert self._library is not None
        source, importance = self._source()
        path = self._out / f"{form}.gguf"
        quantize(load_quantizer(self._library), source, path, FILE_TYPES[form], importance)
        return path

    def _by_autoround(self, form: str) -> Path:
        folder = self._out / f"autoround-{form}"
        folder.mkdir()
        by_autoround(self._opened.teacher.folder, folder, self._tokens, form=form, steps=0)
        (path,) = folder.rglob("*.gguf")
        return path


def measured(opened: Opened, candidate: Candidate) -> dict[str, Any]:
    """Return a file's memory as `solve` counts it, and its figures on the held-out text."""
    (found,) = opened.bench.measure_weights(candidate.weights(opened.bench), candidate.cache_types, [opened.held_out])
    need, tensors = candidate.memory(opened.options[0]), candidate.file.tensors
    return {
        "bytes": need.total_bytes,
        "weights_bytes": need.weights_bytes,
        "types": dict(sorted(Counter(gguf.GGMLQuantizationType(one.type).name for one in tensors).items())),
        **found.to_json(),
    }


def opened_by(given: argparse.Namespace, overhead: int) -> Opened:
    """Open the teacher and the texts as `solve_smollm2` does.

    Args:
        given: The command line.
        overhead: Bytes of an empty process, as the record of what was solved has them. Each machine measures its own.
    """
    opened = open_request(
        SolveRequest(
            budgets=(Budget(memory_bytes=ROOM, context=given.context),),
            cache=cache_folder(),
            teacher=given.teacher,
            data=given.data,
            tokens=given.tokens,
            sequence_length=given.sequence_length,
        )
    )
    options = [replace(one, spec=replace(one.spec, process_bytes=overhead)) for one in opened.options]
    return replace(opened, options=options)


def measure_all(given: argparse.Namespace, solved: Mapping[str, Any]) -> None:
    """Write and measure all files that are asked for and are not in the store."""
    known = {(one["tool"], one["form"], one["cache"]) for one in report.lines_of(program.REPORTS / STORE)}
    opened = opened_by(given, solved["solutions"][0]["solution"]["overhead_bytes"])
    if not given.smoke and opened.data.fingerprint != solved["data"]["fingerprint"]:
        raise SystemExit(f"{given.data} is not the text that {SOLVED.name} was solved on")
    with tempfile.TemporaryDirectory() as out:
        maker = Maker(opened, given.library, Path(out))
        files = [(OWN_FILES, "Q4_0", maker.own)] if given.smoke else [*maker.files()]
        for tool, form, make in files:
            kinds = [kind for kind in CACHES if (tool, form, kind) not in known]
            if not kinds or not re.search(given.only, f"{tool} {form}"):
                continue
            path = make()
            for kind in kinds:
                candidate = open_candidate(path, opened.bench.spec).with_cache((kind, kind))
                line = {"tool": tool, "form": form, "cache": kind, "file_bytes": path.stat().st_size}
                line |= {"calibration_tokens": solved["calibration_tokens"]} | measured(opened, candidate)
                print(tool, form, kind, format_bytes(line["bytes"]), line["kl"], line["nll"], flush=True)
                report.add_line(program.REPORTS / STORE, line)
            path.unlink()


def rows(found: list[dict[str, Any]], solved: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the rows of the table: each file beside the best solution that takes no more memory."""
    solutions = [one["solution"] for one in solved["solutions"]]
    for one in sorted(found, key=lambda one: (one["tool"], one["cache"] != "f16", -one["bytes"])):
        smaller = [other for other in solutions if other["bytes"] <= one["bytes"]]
        best = min(smaller, key=lambda other: float(other["kl"]), default=None)
        beside = "-" if best is None else f"{best['kl']:.4f} in {format_bytes(best['bytes'])}"
        bits = "16 bits" if one["cache"] == "f16" else "8 bits"
        figures = [f"{one[name]:.4f} ± {one[f'{name}_stderr']:.4f}" for name in ("kl", "nll")]
        sizes = [format_bytes(one["weights_bytes"]), format_bytes(one["bytes"])]
        yield [one["tool"], one["form"], bits, *sizes, *figures, beside]


def main() -> None:
    """Measure the files that are missing, and write the report and its picture."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--library", type=Path, default=None, help="libllama, beside the libraries that it loads")
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--data", default=None, help="PostgreSQL's documentation by default")
    parser.add_argument("--only", default="", help="a regular expression of tools and forms that are measured")
    parser.add_argument("--context", type=program.token_count, default=2048)
    parser.add_argument("--tokens", type=program.token_count, default=2048)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument(
        "--render", action="store_true", help="write the report of what was measured, and measure nothing"
    )
    given = program.parse(parser, context=256, tokens=256, sequence_length=64)
    if given.smoke:
        given.teacher, given.data = program.tiny_teacher(layers=2, width=128, heads=2, kv_heads=1), program.tiny_data()
    solved = json.loads(SOLVED.read_text(encoding="utf-8"))["record"]["solved"][0]
    trained = json.loads(VERSUS.read_text(encoding="utf-8"))["record"]
    if not given.render:
        given.data = given.data or str(debian_texts.debian_texts((PACKAGE,)).folder / "postgresql")
        measure_all(given, solved)
    found = report.lines_of(program.REPORTS / STORE)
    tools = {one["tool"] for one in found}
    absent = [tool for tool in (LLAMA, AUTOROUND) if tool not in tools]
    titles = ["tool", "form", "cache", "weights", "memory", "KL", "NLL", "solved, KL in no more memory"]
    sections = [
        f"{solved['teacher']['name']}, context {given.context}, text {solved['data']['name']}: importance matrix and "
        f"AutoRound read the {solved['calibration_tokens']:,} tokens that `solve` calibrates on. KL to the teacher and "
        f"NLL in nats a token on its {solved['held_out_tokens']:,} held-out tokens (± standard error over documents). "
        f"The teacher's own NLL is {solved['teacher_nll']:.4f}. Nothing is trained. What was solved is from "
        f"[{SOLVED.name}]({SOLVED.name})." + (f" Not measured: {', '.join(absent)}." if absent else ""),
        report.table(titles, rows(found, solved)),
        "The model's matrices lie on the grid of Q4_1 and its table on that of Q8_0. So Q4_1 keeps them, and every "
        "other type of 4 bits rounds them again. Rows of 576 weights are no multiple of 256, so both tools store them "
        "in other types than a K-quant's name says, with more bits: AutoRound mostly in Q5_0. The record "
        "has the types of each file.",
        "The picture beside this report, of the same name, has these files beside what was solved, and what was "
        f"trained by [{VERSUS.name}]({VERSUS.name}), whose loss is on other documents of the same text.",
    ]
    store = program.REPORTS / STORE
    path = report.write("memory-curve", "Loss by memory: solved, trained, and files of other tools", sections, store)
    write_chart(picture(solved, found, trained), path.with_suffix(".svg"))
    print(path)


if __name__ == "__main__":
    main()
