"""Which runtime reads and writes fastest: llama.cpp, ONNX Runtime, AOTInductor, compiled and eager torch, as ratios?

    python -m benchmarks.hardware.runtime_speed [--layers 4] [--only eager,compiled] [--families llama] [--render]

Each variant of each family is a line of `reports/runtime-speed.jsonl`. Existing lines are not timed again.

Models have random weights, in the shape of a small Llama, and of a GPT-NeoX with LayerNorm and GELU. A guide to
deployment says that fusion gains 23% on these parts. Times are CPU time on one thread, so that other work on the
machine matters as little as possible. Timed are a prompt of 128 tokens, and a later token after them.

All variants have the same model in one of two storages, and all are compared with eager torch and with llama.cpp,
both in 16 bits.

- 16 bits: torch and ONNX Runtime expand the weights to float32 when they load them, and compute in float32. llama.cpp
  keeps F16, and so reads half of the bytes for a token. Torch has the cache of the exports for phones: eager, compiled
  by Inductor, and a library of AOTInductor.
- Q4_0 with a table in Q8_0: ONNX Runtime and llama.cpp read the same codes. ONNX Runtime computes in float32, llama.cpp
  rounds activations to 8 bits. Torch has no such codes. These rows gain from fewer bytes too.

ONNX Runtime runs the codes with all of its graph optimisations, and with none: the difference is fusion alone. For
torch, compiled is compared with eager, where less dispatch is gained too.

The variants that the targets compare also run in turn with each other, call by call, in ten blocks. Each block has a
ratio of medians, and the error is that of the mean of the ten. Each call finds the cache of the processor as the other
left it. The targets are judged by these ratios.

Targets, written before the first run: compiled and AOTInductor take less time than eager for prompt and decode; fusion
in ONNX Runtime gains less than the guide's 23%, on both shapes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
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
STORED = {"16 bits": "gguf-f16", "Q4_0": "gguf-q4_0"}
PROMPT, CONTEXT = 128, 256
VARIANTS: Mapping[str, tuple[str, str]] = {
    "eager": ("eager", "16 bits"),
    "compiled": ("compiled", "16 bits"),
    "aoti": ("aoti", "16 bits"),
    "onnx": ("onnx", "16 bits"),
    "llama.cpp": ("llama.cpp", "16 bits"),
    "onnx-q4_0": ("onnx", "Q4_0"),
    "onnx-q4_0-unfused": ("onnx", "Q4_0"),
    "llama.cpp-q4_0": ("llama.cpp", "Q4_0"),
}
"""What runs each variant, and how it has the weights."""
IN_TURN = {"compiled": "eager", "aoti": "eager", "onnx-q4_0": "onnx-q4_0-unfused"}
"""With which variant another runs in turn."""
BASES = ("eager", "llama.cpp")
TIMES = ("prompt_ms", "step_ms")
ROUNDS, STEPS, BLOCKS = 20, 100, 10
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


def in_torch(variant: str, student: Path, deployment: Deployment, folder: Path) -> list[Callable[[], Any]]:
    """Return what reads a prompt, and a later token, in torch."""
    decoder = decoder_of(student, deployment)
    calls: list[Callable[[], Any]] = []
    for count, start in ((PROMPT, 0), (1, PROMPT)):
        if variant == "aoti":
            step: Step = compiled(decoder, count, folder)
        else:
            step = torch.compile(decoder, dynamic=False) if variant == "compiled" else decoder
        calls.append(partial(step, torch.ones(1, count, dtype=torch.int64), torch.tensor([start]), decoder.empty))
    return calls


def in_onnx(folder: Path, *, fused: bool) -> list[Callable[[], Any]]:
    """Return what reads a prompt, and a later token, in ONNX Runtime, with all optimisations or with none."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if fused else levels.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])
    pasts = [one for one in session.get_inputs() if one.name.startswith("past_key_values.")]
    calls = []
    for count, before in ((PROMPT, 0), (1, PROMPT)):
        given = {one.name: np.zeros((1, one.shape[1], before, one.shape[3]), np.float32) for one in pasts}
        given["input_ids"] = np.ones((1, count), np.int64)
        given["attention_mask"] = np.ones((1, before + count), np.int64)
        given["position_ids"] = np.arange(before, before + count)[None]
        calls.append(partial(session.run, None, given))
    return calls


def in_turn(call: Callable[[], Any], other: Callable[[], Any]) -> dict[str, float]:
    """Return the CPU time of one call as a share of another's, with its standard error. Both run in turn."""
    for one in (call, other):
        one()
    found = []
    for _ in range(BLOCKS):
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for one, times in zip((call, other), taken, strict=True):
                began = time.process_time()
                one()
                times.append(time.process_time() - began)
        found.append(statistics.median(taken[0]) / statistics.median(taken[1]))
    return {"mean": statistics.mean(found), "error": statistics.stdev(found) / BLOCKS**0.5}


def in_llama(path: Path) -> tuple[float, float]:
    """Return the milliseconds of a prompt and of a later token in llama.cpp's server.

    The system counts the server's CPU time in hundredths of a second.
    """
    ids = [3 + place % 200 for place in range(PROMPT)]
    with serve(path, "llama.cpp", context=CONTEXT, threads=1, parallel=1) as server:
        server.begin([ids])
        prompts = steps = 0.0
        for _ in range(ROUNDS):
            began = server.used_seconds()
            server.begin([ids])
            read = server.used_seconds()
            for _ in range(STEPS // ROUNDS):
                server.step()
            prompts, steps = prompts + read - began, steps + server.used_seconds() - read
    return 1e3 * prompts / ROUNDS, 1e3 * steps / STEPS


def calls_of(variant: str, student: Path, folder: Path) -> list[Callable[[], Any]]:
    """Return what reads a prompt, and a later token, in this process."""
    runtime, weights = VARIANTS[variant]
    deployment = deployment_named(STORED[weights])
    if runtime == "onnx":
        path = load_exporter("onnx").export(student, deployment, folder / variant).path
        return in_onnx(path, fused=not variant.endswith("unfused"))
    return in_torch(variant, student, deployment, folder)


def timed(variant: str, student: Path, folder: Path) -> dict[str, Any]:
    """Return the CPU milliseconds of a prompt and of a later token, and how they compare in turn with another's."""
    runtime, weights = VARIANTS[variant]
    if runtime == "llama.cpp":
        path = load_exporter("gguf").export(student, deployment_named(STORED[weights]), folder / "gguf").path
        return dict(zip(TIMES, in_llama(path), strict=True))
    with torch.no_grad():
        calls = calls_of(variant, student, folder)
        found: dict[str, Any] = dict(zip(TIMES, map(cpu_ms, calls), strict=True))
        if other := IN_TURN.get(variant):
            found["in_turn"] = [in_turn(*both) for both in zip(calls, calls_of(other, student, folder), strict=True)]
    return found


def time_all(given: argparse.Namespace) -> None:
    """Time the variants that are not in the store."""
    store = program.REPORTS / STORE
    for family in given.families.split(","):
        for variant in given.only.split(","):
            key = {"family": family, "variant": variant, "weights": VARIANTS[variant][1], "layers": given.layers}
            if any(key.items() <= one.items() for one in report.lines_of(store)):
                continue
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch)
                sizes = {**SIZES, "layers": given.layers, "kv_heads": KV_HEADS[family]}
                student = save_tiny_teacher(folder / "student", architecture=family, **sizes)
                one = key | timed(variant, student, folder)
            print(one, flush=True)
            report.add_line(store, one)


def rows(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield a table line for each variant, with its ratios to the variants that all are compared with."""
    for family in FAMILIES:
        bases = [found.get((family, base)) for base in BASES]
        for variant, (_, weights) in VARIANTS.items():
            if one := found.get((family, variant)):
                ratios = [f"{one[key] / base[key]:.2f}" if base else "" for key in TIMES for base in bases]
                yield [family, variant, weights, *ratios]


def findings(found: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[str]:
    """Yield the verdict on each target."""
    for family in FAMILIES:
        own = {variant: one for (name, variant), one in found.items() if name == family}
        for variant in ("compiled", "aoti"):
            if variant in own:
                parts = own[variant]["in_turn"]
                less = [f"{one['mean']:.3f} ± {one['error']:.3f}" for one in parts]
                kept = "kept" if max(one["mean"] for one in parts) < 1 else "missed"
                yield f"- {family}, in turn: {variant} takes {less[0]} of eager's prompt, {less[1]} of a token: {kept}"
        if {"onnx-q4_0", "llama.cpp-q4_0"} <= own.keys():
            less = [own["onnx-q4_0"][key] / own["llama.cpp-q4_0"][key] for key in TIMES]
            yield (
                f"- {family}: of the same codes, ONNX Runtime takes {less[0]:.2f} of llama.cpp's prompt, {less[1]:.2f} "
                "of a token"
            )
        if "onnx-q4_0" in own:
            parts = own["onnx-q4_0"]["in_turn"]
            less = [f"{1 - one['mean']:.1%} ± {one['error']:.1%}" for one in parts]
            kept = "kept" if max(1 - one["mean"] for one in parts) < 0.23 else "missed"
            yield f"- {family}, in turn: fusion saves ONNX {less[0]} of the prompt and {less[1]} of a token: {kept}"


def main() -> None:
    """Time every variant, and write the report."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=4, help="of the models")
    parser.add_argument("--families", default=",".join(FAMILIES), help="that are timed, separated by commas")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, separated by commas")
    parser.add_argument("--render", action="store_true", help="write the report of what was timed, and time nothing")
    quick = [name for name in VARIANTS if name not in ("compiled", "aoti")]
    given = program.parse(parser, layers=1, only=",".join(quick), families="llama")
    torch.set_num_threads(1)
    if not given.render:
        time_all(given)
    lines = [one for one in report.lines_of(program.REPORTS / STORE) if one["layers"] == given.layers]
    found = {(one["family"], one["variant"]): one for one in lines}
    told = (
        f"Models of {given.layers} layers of width {SIZES['width']} with random weights and 300 entries. Ratios "
        f"of CPU time on one thread, of a prompt of {PROMPT} tokens and of a later token, to eager torch and to "
        "llama.cpp, both with weights in 16 bits; below 1 is faster. Torch and ONNX Runtime compute in float32, "
        "llama.cpp with F16 weights. Rows of Q4_0 read fewer bytes too. The machine was shared, so the ratios of "
        "the table are indications. What is compared in turn below is steadier: call by call, in ten blocks, ± the "
        "standard error over them. There each call finds the processor's cache as the other left it."
    )
    titles = [f"{what}, to {base}" for what in ("prompt", "token") for base in BASES]
    table = report.table(["family", "variant", "weights", *titles], rows(found))
    sections = [told, table, "\n".join(findings(found))]
    store = program.REPORTS / STORE
    print(report.write("runtime-speed", "Runtimes beside each other, as ratios", sections, store))


if __name__ == "__main__":
    main()
