"""The memory that `estimate` predicts, against llama.cpp's log and the processes of transformers and ONNX Runtime.

    pip install onnx onnxruntime && python -m benchmarks.hardware.memory_estimate

Memory does not depend on the values of the weights, so GGUF files have zeros (`model_files`). Only the `gguf` package
writes them, so neither our exporter nor our packing is its own reference. ONNX Runtime runs files of our exporter.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from autodistill.advisor.describe import deployment_named, shape, spec_of
from autodistill.estimates.serving_memory import memory
from autodistill.export.graphs.onnx import OnnxExporter
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.runtimes.python_server import PythonServer
from autodistill.strategy.deployment import Deployment
from autodistill.units import format_bytes
from benchmarks.common import program, report
from benchmarks.common.model_files import LATENT, STRIDE, Case, write_folder, write_gguf

SMOL = Case(family="llama", layers=30, width=576, heads=9, kv_heads=3, ffn=1536, vocabulary=49152)
LLAMA = Case(family="llama", layers=16)
QWEN2 = Case(family="qwen2", layers=24, width=896, heads=14, kv_heads=2, ffn=4864, vocabulary=151936)
QWEN3 = Case(family="qwen3", layers=12, head_dim=128)
GEMMA = Case(family="gemma3_text", layers=12, width=640, heads=4, kv_heads=1, head_dim=256, ffn=2048)
NEOX = Case(family="gpt_neox", layers=6, kv_heads=8, ffn=2048, vocabulary=50304, tied=False)
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
LARGER = MOE | {"num_experts": 16, "num_experts_per_tok": 4}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 512}
DEEPSEEK = Case(family="deepseek_v2", layers=6, kv_heads=8, vocabulary=8000, tied=False, more=LATENT)


def windowed(size: int) -> dict[str, Any]:
    """Return Gemma 3's sliding window in five of six layers."""
    return {"sliding_window": size, "sliding_window_pattern": 6}


CASES = (
    SMOL,
    replace(SMOL, form="gguf-q4_0"),
    replace(LLAMA, layers=12, width=768, heads=12, kv_heads=12, ffn=2048, tied=False, form="gguf-f16"),
    replace(LLAMA, layers=22, width=1024, heads=16, ffn=2816, tied=False, form="gguf-q4_0", context=4096),
    replace(LLAMA, batch=4, context=1024),
    replace(LLAMA, context=8192, kv_type="q8_0"),
    replace(LLAMA, context=8192, kv_type="q4_0", form="gguf-q4_0"),
    replace(LLAMA, layers=8, vocabulary=128256, width=1024, heads=16, ffn=4096, form="gguf-q4_0", context=512),
    replace(LLAMA, layers=8, form="gguf-q5_1", context=300),
    QWEN2,
    replace(QWEN2, form="gguf-q4_0", context=4096),
    Case(family="qwen2", layers=12, vocabulary=16384, form="gguf-q5_0", batch=8, context=512),
    replace(QWEN3, layers=28, width=1024, heads=16, kv_heads=8, ffn=3072, vocabulary=151936),
    replace(QWEN3, form="gguf-q4_0", context=8192),
    replace(QWEN3, form="gguf-f16", context=1024, batch=2, kv_type="q8_0"),
    replace(GEMMA, layers=18, vocabulary=65536, context=4096, more=windowed(512)),
    replace(GEMMA, form="gguf-q4_0", context=8192, more=windowed(1024)),
    replace(NEOX, layers=12, width=768, heads=12, kv_heads=12, ffn=3072),
    replace(NEOX, form="gguf-f16", context=512),
    Case(family="qwen3_moe", more=MOE),
    Case(family="qwen3_moe", form="gguf-q4_0", context=4096, more=LARGER),
    replace(DEEPSEEK, form="gguf-f16", context=512),
    replace(DEEPSEEK, context=8192, heads=16),
    replace(DEEPSEEK, context=4096, more=LATENT | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}),
    replace(DEEPSEEK, context=4096, batch=2, more=LATENT | ROUTED | {"first_k_dense_replace": 1}),
    replace(DEEPSEEK, family="deepseek_v3", more=LATENT | ROUTED | {"first_k_dense_replace": 2}),
)


def measure(case: Case, folder: Path) -> tuple[list[str], float]:
    """Measure llama.cpp's memory of a case, and return its row and the error."""
    spec = spec_of(case.config())
    deployment = deployment_named(case.form)
    path = folder / "model.gguf"
    write_gguf(case, spec, deployment, path)
    with LlamaServer(path, case.context, 1, case.batch, cache_type_k=case.kv_type, cache_type_v=case.kv_type) as server:
        found = server.buffers()
    path.unlink()
    guess = memory(spec, deployment, context=case.context, batch=case.batch, kv_type=case.kv_type)
    predicted = (guess.weights_bytes, guess.kv_cache_bytes, guess.compute_bytes)
    real = (found.model_bytes, found.kv_bytes, found.compute_bytes + found.output_bytes)
    error = sum(predicted) / sum(real) - 1
    report.note("llama.cpp", {"case": case, "predicted": predicted, "stated": real})
    setting = (
        f"{case.layers} x {case.width}, {case.heads}/{case.kv_heads} x {case.head_dim}, {case.ffn}, {case.vocabulary}"
    )
    parts = [f"{one / 1e6:.2f} / {other / 1e6:.2f}" for one, other in zip(predicted, real, strict=True)]
    load = f"{case.context} x {case.batch}, {case.kv_type}"
    return [case.family, setting, case.form.removeprefix("gguf-"), load, *parts, f"{error:+.2%}"], error


FOLDERS = (
    replace(LLAMA, context=16),
    SMOL,
    replace(SMOL, batch=4),
    replace(LLAMA, layers=8, width=1024, heads=16, ffn=4096, context=1024),
    replace(LLAMA, layers=4, vocabulary=128256, context=512),
    QWEN3,
    replace(QWEN2, context=1024),
    replace(NEOX, context=1024),
    replace(LLAMA, layers=12, width=768, heads=12, kv_heads=12, ffn=2048, batch=2),
    replace(GEMMA, more=windowed(512)),
    replace(GEMMA, context=512, batch=4, vocabulary=65536, more=windowed(1024)),
    replace(LLAMA, layers=8, width=768, heads=12, ffn=2048, tied=False, context=512, batch=4),
    replace(QWEN3, context=256, batch=8),
    replace(NEOX, layers=12, width=768, heads=12, kv_heads=12, ffn=3072),
    replace(LLAMA, layers=20, width=320, heads=5, kv_heads=5, ffn=960, context=4096),
    replace(QWEN2, layers=12, vocabulary=32000, context=64, tied=False),
    replace(
        LLAMA,
        family="mistral",
        layers=10,
        width=1024,
        heads=16,
        kv_heads=8,
        ffn=2816,
        context=1024,
        batch=2,
        more={"sliding_window": 256},
    ),
)
CALIBRATED_FOLDERS = 6
"""The first of `FOLDERS` were used to set transformers' overhead and holes. The others test them."""
_REQUESTS = 4
"""Prompts are read one after another, because a heap is fuller at the second prompt than at the first."""
_PROCESSES = 3
"""Each folder is served in several processes. The places of blocks in the heap differ, and so does its peak."""


def process_peak(case: Case, folder: Path, runtime: str) -> int:
    """Return the most bytes that a process takes while it serves the folder."""
    # The tokens are from the whole table, because only the parts of a mapped file that were read are resident.
    tokens = np.arange(_REQUESTS * case.batch * (case.context - 1)) * STRIDE % case.vocabulary
    with PythonServer(folder, runtime, case.context, 1, case.batch) as server:
        for prompts in tokens.reshape(_REQUESTS, case.batch, -1).tolist():
            server.begin(prompts)
            server.step()
        return server.peak_bytes()


def measure_folder(case: Case, folder: Path, calibrates: bool) -> tuple[list[str], float]:
    """Measure the memory of a folder in a process, and return its row and the error."""
    write_folder(case, folder)
    spec, deployment = spec_of(case.config()), deployment_named("huggingface")
    peaks = sorted(process_peak(case, folder, "transformers") for _ in range(_PROCESSES))
    peak = statistics.median(peaks)
    guess = memory(spec, deployment, context=case.context, batch=case.batch)
    parts = (guess.weights_bytes, guess.kv_cache_bytes, guess.compute_bytes, guess.overhead_bytes)
    setting = f"{case.layers} x {case.width}, {case.heads}/{case.kv_heads}, {case.ffn}, {case.vocabulary}"
    error = guess.total_bytes / peak - 1
    use = "calibrates" if calibrates else "tests"
    cells = [*(f"{part / 1e6:.0f}" for part in parts), f"{guess.total_bytes / 1e6:.0f} / {peak / 1e6:.0f}"]
    cells += [f"{peaks[0] / 1e6:.0f} to {peaks[-1] / 1e6:.0f}", f"{error:+.1%}"]
    report.note("transformers", {"case": case, "predicted": parts, "peaks": peaks})
    return [case.family, setting, f"{case.context} x {case.batch}", use, *cells], error


def transformers_table(most: int) -> str:
    """Return the table of the last `most` folders in transformers on this CPU."""
    lines, errors = [], []
    for index, case in [*enumerate(FOLDERS)][-most:]:
        with tempfile.TemporaryDirectory() as folder:
            line, error = measure_folder(case, Path(folder), index < CALIBRATED_FOLDERS)
        print(*line, flush=True)
        lines.append(line)
        errors.append(abs(error))
    titles = ["family", "layers x width, heads, FFN, vocabulary", "context x streams", "use"]
    titles += ["weights", "KV cache", "compute", "overhead", "sum / peak", "peaks", "error"]
    tests = [error for line, error in zip(lines, errors, strict=True) if line[3] == "tests"]
    told = (
        f"{len(errors)} folders in bfloat16, {sum(error <= 0.05 for error in errors)} within 5%, median error "
        f"{statistics.median(errors):.1%}, largest {max(errors):.1%}; of the {len(tests)} that test alone, median "
        f"{statistics.median(tests):.1%}, largest {max(tests):.1%}. MB of 10^6 bytes; the peak is that of the "
        f"process's resident memory once loaded, over {_REQUESTS} prompts that fill the context, each and a token "
        f"more; the median of {_PROCESSES} processes, whose peaks differ by where blocks come to lie in the heap."
    )
    return f"{told}\n\n{report.table(titles, lines)}"


ONNX = (
    replace(LLAMA, layers=2, width=256, head_dim=32, ffn=512, vocabulary=1000, context=64),
    replace(LLAMA, layers=8, context=256, form="gguf-f16"),
    replace(LLAMA, layers=8, context=256, form="gguf-q4_0"),
    replace(LLAMA, layers=8, context=256, form="gguf-q8_0"),
    replace(LLAMA, layers=4, vocabulary=4000, context=1024, form="gguf-q4_0"),
    replace(LLAMA, layers=8, context=256, form="huggingface"),
    replace(LLAMA, layers=6, context=256, tied=False, form="gguf-q4_1"),
    replace(QWEN3, layers=4, context=256, batch=2, vocabulary=8000, form="gguf-q5_0"),
    replace(NEOX, layers=3, context=128, form="gguf-q4_k"),
    replace(SMOL, context=128, form="gguf-q4_0"),
    replace(SMOL, context=128, form="gguf-q4_1", table="q4_1"),
    replace(SMOL, context=32, form="gguf-q5_1", table="q5_1"),
    replace(LLAMA, layers=12, width=768, heads=12, ffn=2048, context=32, form="gguf-q4_k", table="q4_k"),
)


def _graph_storage(case: Case) -> Deployment:
    found = deployment_named(case.form, "onnxruntime")
    return replace(found, types=(("embeddings", case.table),)) if case.table else found


def write_graph(case: Case, folder: Path) -> Path:
    """Write the folder that ONNX Runtime serves, with random weights."""
    write_folder(case, folder)
    # The exporter copies a tokenizer without reading it, so an empty one suffices.
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return OnnxExporter().export(folder, _graph_storage(case), folder / "onnx").path


def onnx_table(most: int) -> str:
    """Return the table of the last `most` models in ONNX Runtime on this CPU."""
    lines, errors = [], []
    for case in ONNX[-most:]:
        with tempfile.TemporaryDirectory() as name:
            peak = process_peak(case, write_graph(case, Path(name)), "onnxruntime")
        guess = memory(
            spec_of(case.config()),
            _graph_storage(case),
            context=case.context,
            batch=case.batch,
        )
        parts = (guess.weights_bytes, guess.kv_cache_bytes, guess.compute_bytes, guess.overhead_bytes)
        setting = f"{case.layers} x {case.width}, {case.heads}/{case.kv_heads}, {case.ffn}, {case.vocabulary}"
        errors.append(abs(guess.total_bytes / peak - 1))
        cells = [*(f"{part / 1e6:.0f}" for part in parts), f"{guess.total_bytes / 1e6:.0f} / {peak / 1e6:.0f}"]
        tied = "tied" if case.tied else "untied"
        form = f"{case.form}, table {case.table}" if case.table else case.form
        line = [case.family, f"{setting}, {tied}", form, f"{case.context} x {case.batch}", *cells]
        lines.append([*line, f"{guess.total_bytes / peak - 1:+.1%}"])
        print(*lines[-1], flush=True)
        report.note("onnxruntime", {"case": case, "predicted": parts, "peak": peak})
    titles = ["family", "layers x width, heads, FFN, vocabulary", "format", "context x streams"]
    titles += ["weights", "KV cache", "compute", "overhead", "sum / peak", "error"]
    told = (
        f"ONNX Runtime {version('onnxruntime')}, folders of our own exporter: {_REQUESTS} prompts that fill the "
        "context, each and a token more. The peak is that of the process's resident memory once loaded. "
        f"{len(errors)} graphs, {sum(error <= 0.05 for error in errors)} within 5%, median error "
        f"{statistics.median(errors):.1%}, largest {max(errors):.1%}. Weights are random, since ONNX Runtime holds "
        "tensors that are equal once. What a process, a layer and a group of weights take was set by others of the "
        "shape with 30 layers, at 16 tokens, and by the last one here."
    )
    return f"{told}\n\n{report.table(titles, lines)}"


SIZES = {
    "1B": {"layers": 22, "width": 2048, "heads": 32, "kv_heads": 4, "ffn": 5632, "vocab": 32000},
    "3B": {"layers": 26, "width": 3200, "heads": 32, "ffn": 8640, "vocab": 32000},
    "7B": {"layers": 32, "width": 4096, "heads": 32, "ffn": 11008, "vocab": 32000},
}
QUOTED = {"1B": "4 GB (8)", "3B": "8 GB (16)", "7B": "12 GB (24)"}


def quoted_sizes() -> str:
    """Return the table of 1B, 3B and 7B with figures that are often quoted."""
    forms = {"FP16": "gguf-f16", "INT8": "gguf-q8_0", "INT4": "gguf-q4_0"}
    lines = []
    for name, sizes in SIZES.items():
        model = shape(sizes)
        cells = [
            format_bytes(memory(model.spec, deployment_named(form), context=context, batch=1).total_bytes)
            for form in forms.values()
            for context in (2048, 8192)
        ]
        lines.append([name, f"{model.spec.parameters / 1e9:.2f} B", *cells, QUOTED[name]])
    titles = [
        "model",
        "parameters",
        *(f"{name}, {context}" for name in forms for context in ("2k", "8k")),
        "often quoted",
    ]
    return report.table(titles, lines)


_VLLM = "vLLM needs a GPU: what is predicted for it stays unmeasured."
_RUNTIMES = {
    "transformers": ("## transformers on a CPU", transformers_table, "## ONNX Runtime"),
    "onnxruntime": ("## ONNX Runtime on a CPU", onnx_table, _VLLM),
}


def llama_table(most: int) -> str:
    """Return the table of llama.cpp's memory."""
    lines, errors = [], []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES[-most:]:
            line, error = measure(case, Path(folder))
            print(*line, flush=True)
            lines.append(line)
            errors.append(abs(error))
    within = sum(error <= 0.05 for error in errors)
    summary = (
        f"{len(errors)} models, {within} within 5%, median error {statistics.median(errors):.2%}, "
        f"largest {max(errors):.2%}. Target: every row within 5%, median within 2%."
    )
    titles = [
        "family",
        "layers x width, heads, FFN, vocabulary",
        "format",
        "context x streams, KV",
        "weights",
        "KV cache",
        "compute",
        "sum",
    ]
    told = (
        "Predicted / stated by llama.cpp's log, in MB of 10^6 bytes. The process's overhead is left out: the log does "
        "not state it (`tests/estimates/test_fit.py` holds it to the resident memory of the real teacher). DeepSeek's "
        "attention caches one vector a token and layer, of which no values are stored apart."
    )
    return "\n\n".join([summary, told, report.table(titles, lines)])


def measure_again(runtime: str, most: int) -> Path:
    """Measure one runtime again, and replace its section in the newest report."""
    title, table, following = {"llama.cpp": _LLAMA_CPP, **_RUNTIMES}[runtime]
    told = table(most)
    path = max(program.REPORTS.glob("*-memory-estimate.md"))
    before, _, after = path.read_text(encoding="utf-8").partition(f"{title}\n\n")
    _, end, rest = after.partition(following)
    path.write_text(f"{before}{title}\n\n{told}\n\n{end}{rest}", encoding="utf-8")
    report.amend(path)
    return path


_LLAMA_CPP = ("## llama.cpp", llama_table, next(iter(_RUNTIMES.values()))[0])


def main() -> None:
    """Measure the memory of each runtime's models and write the report, or write one part of it again."""
    parser = program.parser_of(__doc__)
    known = ["llama.cpp", *_RUNTIMES]
    parser.add_argument("--runtime", choices=known, help="measure it alone anew, in the newest report")
    parser.add_argument("--most", type=int, default=1000, help="of the models of each runtime, the last of them")
    given = program.parse(parser, most=1)
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    runtimes = {name: one for name, one in _RUNTIMES.items() if not (name == "onnxruntime" and missing)}
    if missing and not given.smoke and given.runtime in (None, "onnxruntime"):
        parser.error(f"{', '.join(missing)} are not installed: see above, or name another --runtime")
    if given.runtime:
        print(measure_again(given.runtime, given.most))
        return
    sections = [
        _LLAMA_CPP[0],
        llama_table(given.most),
        *(part for title, table, _ in runtimes.values() for part in (title, table(given.most))),
        _VLLM,
        "## 1B, 3B and 7B beside often-quoted figures",
        "Predicted for llama.cpp with an F16 cache at one stream, of the shapes of TinyLlama-1.1B, OpenLLaMA-3B and "
        "Llama-2-7B. The quoted figures name neither precision nor context.",
        quoted_sizes(),
    ]
    print(report.write("memory-estimate", "What a student takes, predicted and allocated", sections))


if __name__ == "__main__":
    main()
