"""Which runtime reads and writes fastest: llama.cpp, ONNX Runtime, AOTInductor, compiled and eager torch, as ratios?

    python -m benchmarks.hardware.runtime_speed [--layers 4] [--only eager,compiled] [--families llama] [--render]

Each variant of each family is a line of `reports/runtime-speed.jsonl`. Existing lines are not timed again.

Models have random weights, in the shape of a small Llama, and of a GPT-NeoX with LayerNorm and GELU. A guide to
deployment says that fusion gains 23% on these parts. Times are CPU time on one thread, so that other work on the
machine matters as little as possible. Timed are a prompt of 128 tokens, and a later token after them. Variants of torch
compute in float32 with the cache of the exports for phones: eager, compiled by Inductor, and a library of AOTInductor.
ONNX Runtime and llama.cpp read the same codes, Q4_0 with a table in Q8_0. They are compared with each other, because
the gain of fewer bytes is not the gain of a better runtime. ONNX Runtime runs with all of its graph optimisations, and
with none: the difference is fusion alone. For torch, compiled is compared with eager, where less dispatch is gained
too.

Targets, written before the first run: compiled and AOTInductor take less time than eager for prompt and decode; fusion
in ONNX Runtime gains less than the guide's 23%, on both shapes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autodistill.advisor.describe import deployment_named
from autodistill.export.base import load_exporter
from autodistill.export.graphs.onnx import rotary_of
from autodistill.export.phones.cached_decoder import CachedDecoder
from autodistill.export.student_reader import StudentFiles
from autodistill.runtimes.timing import serve
from autodistill.strategy.deployment import GRAPH, Deployment
from autodistill.testing import save_tiny_teacher
from benchmarks.common import program, report

STORE = "runtime-speed.jsonl"
FAMILIES = ("llama", "gpt_neox")
SIZES: Mapping[str, Any] = {"width": 512, "heads": 8, "ffn": 1536, "tied": False, "seed": 1}
KV_HEADS = {"llama": 4, "gpt_neox": 8}
CODES = "gguf-q4_0"
PROMPT, CONTEXT = 128, 256
BASE = {"eager": "eager", "compiled": "eager", "aoti": "eager", "onnx": "llama.cpp", "onnx, nothing fused": "onnx"}
VARIANTS = ("eager", "compiled", "aoti", "onnx", "onnx, nothing fused", "llama.cpp")
ROUNDS, STEPS = 5, 100
Step = Callable[[Any, Any, Any], Any]


def put(cache: torch.Tensor, new: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Write new keys or values into a cache."""
    return cache.index_copy(2, start + torch.arange(new.shape[2]), new)


def decoder_of(student: Path, deployment: Deployment) -> CachedDecoder:
    """Return a student as a module with a cache."""
    with StudentFiles(student, deployment) as files:
        weights = {name: np.array(files.deployed(name)) for name in files.specs}
        return CachedDecoder(weights, files.spec, files.config, rotary_of(files.config), CONTEXT, put).eval()


def cpu_ms(call: Callable[[], Any]) -> float:
    """Return the median CPU milliseconds of a call, after one call that is not counted."""
    call()
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        call()
        times.append(1e3 * (time.process_time() - began))
    return statistics.median(times)


def compiled(decoder: CachedDecoder, tokens: int, folder: Path) -> Step:
    """Return a library of AOTInductor that reads this many tokens."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    example = (torch.zeros(1, tokens, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), decoder.empty)
    path = str(folder / f"{tokens}.pt2")
    aoti_compile_and_package(torch.export.export(decoder, example, strict=False), package_path=path)
    loaded: Step = aoti_load_package(path)
    return loaded


def in_torch(variant: str, student: Path, deployment: Deployment, folder: Path) -> tuple[float, float]:
    """Return the milliseconds of a prompt and of a later token in torch."""
    decoder = decoder_of(student, deployment)
    found = []
    with torch.no_grad():
        for count, start in ((PROMPT, 0), (1, PROMPT)):
            if variant == "aoti":
                step: Step = compiled(decoder, count, folder)
            else:
                step = torch.compile(decoder, dynamic=False) if variant == "compiled" else decoder
            given = (torch.ones(1, count, dtype=torch.int64), torch.tensor([start]), decoder.empty)
            found.append(cpu_ms(lambda step=step, given=given: step(*given)))
    return found[0], found[1]


def in_onnx(folder: Path, *, fused: bool) -> tuple[float, float]:
    """Return the milliseconds of a prompt and of a later token in ONNX Runtime, with all optimisations or with none."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fused else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    pasts = [one for one in session.get_inputs() if one.name.startswith("past_key_values.")]
    found = []
    for count, before in ((PROMPT, 0), (1, PROMPT)):
        given = {one.name: np.zeros((1, one.shape[1], before, one.shape[3]), np.float32) for one in pasts}
        given["input_ids"] = np.ones((1, count), np.int64)
        given["attention_mask"] = np.ones((1, before + count), np.int64)
        given["position_ids"] = np.arange(before, before + count)[None]
        found.append(cpu_ms(lambda given=given: session.run(None, given)))
    return found[0], found[1]


def in_llama(path: Path) -> tuple[float, float]:
    """Return the milliseconds of a prompt and of a later token in llama.cpp's server.

    The system counts the server's CPU time in hundredths of a second.
    """
    ids = [3 + place % 200 for place in range(PROMPT)]
    with serve(path, "llama.cpp", context=CONTEXT, threads=1, parallel=1) as server:
        server.begin([ids])
        used = [server.used_seconds()]
        for _ in range(ROUNDS):
            server.begin([ids])
        used.append(server.used_seconds())
        for _ in range(STEPS):
            server.step()
        used.append(server.used_seconds())
    return 1e3 * (used[1] - used[0]) / ROUNDS, 1e3 * (used[2] - used[1]) / STEPS


def times(variant: str, student: Path, folder: Path) -> tuple[float, float]:
    """Return the CPU milliseconds of a prompt and of a later token."""
    deployment = deployment_named(CODES)
    if variant not in ("llama.cpp", "onnx", "onnx, nothing fused"):
        return in_torch(variant, student, deployment, folder)
    exporter = load_exporter("gguf" if variant == "llama.cpp" else "onnx")
    artifact = exporter.export(student, deployment, folder / exporter.name)
    if variant != "llama.cpp":
        return in_onnx(artifact.path, fused=variant == "onnx")
    return in_llama(artifact.path)


def time_all(given: argparse.Namespace) -> None:
    """Time the variants that are not in the store."""
    store = program.REPORTS / STORE
    for family in given.families.split(","):
        for variant in given.only.split(";"):
            key = {"family": family, "variant": variant, "layers": given.layers}
            if any(key.items() <= one.items() for one in report.lines_of(store)):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                sizes = {**SIZES, "layers": given.layers, "kv_heads": KV_HEADS[family]}
                student = save_tiny_teacher(folder / "student", architecture=family, **sizes)
                prompt, step = times(variant, student, folder)
            one = key | {"prompt_ms": prompt, "step_ms": step}
            print(one, flush=True)
            report.add_line(store, one)


def rows(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield a table line for each variant, with its ratios to the variant that it is compared with."""
    for (family, variant), one in found.items():
        base = found.get((family, BASE.get(variant, variant)))
        ratios = [""] * 2 if base is None else [f"{one[key] / base[key]:.2f}" for key in ("prompt_ms", "step_ms")]
        yield [family, variant, BASE.get(variant, variant), *ratios]


def findings(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[str]:
    """Yield the verdict on each target."""
    for family in FAMILIES:
        own = {variant: one for (name, variant), one in found.items() if name == family}
        for variant in ("compiled", "aoti"):
            if {variant, "eager"} <= own.keys():
                less = [own[variant][key] / own["eager"][key] for key in ("prompt_ms", "step_ms")]
                kept = "kept" if max(less) < 1 else "missed"
                yield f"- {family}: {variant} takes {less[0]:.2f} of eager's prompt, {less[1]:.2f} of a token: {kept}"
        if {"onnx", "onnx, nothing fused"} <= own.keys():
            gains = [1 - own["onnx"][key] / own["onnx, nothing fused"][key] for key in ("prompt_ms", "step_ms")]
            kept = "kept" if max(gains) < 0.23 else "missed"
            saved = f"{gains[0]:.0%} of the prompt and {gains[1]:.0%} of a token"
            yield f"- {family}: fusion saves ONNX Runtime {saved}: {kept}"


def main() -> None:
    """Time every variant, and write the report."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of the models")
    parser.add_argument("--families", default=",".join(FAMILIES), help="that are timed, separated by commas")
    parser.add_argument("--only", default=";".join(VARIANTS), help="variants, separated by semicolons")
    parser.add_argument("--render", action="store_true", help="write the report of what was timed, and time nothing")
    given = program.parse(parser, layers=1, only="eager;onnx;onnx, nothing fused;llama.cpp", families="llama")
    torch.set_num_threads(1)
    if not given.render:
        time_all(given)
    lines = [one for one in report.lines_of(program.REPORTS / STORE) if one["layers"] == given.layers]
    found = {(one["family"], one["variant"]): one for one in lines}
    told = (
        f"Models of {given.layers} layers of width {SIZES['width']} with random weights and 300 entries. Ratios "
        f"of CPU time on one thread, of a prompt of {PROMPT} tokens and of a later token; below 1 is faster than what "
        "it is compared with. The machine was shared: ratios hold within this run, and are indications."
    )
    table = report.table(["family", "variant", "compared with", "prompt", "later token"], rows(found))
    sections = [told, table, "\n".join(findings(found))]
    store = program.REPORTS / STORE
    print(report.write("runtime-speed", "Runtimes beside each other, as ratios", sections, store))


if __name__ == "__main__":
    main()
