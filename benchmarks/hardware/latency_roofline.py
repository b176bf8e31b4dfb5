"""The speed that the roofline predicts, against llama.cpp and transformers here, and against often-quoted rates.

python -m benchmarks.hardware.latency_roofline [--models 0.13B 0.04B] [--runtime llama.cpp | --predicted]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from autodistill.advisor.describe import deployment_named, shape, spec_of
from autodistill.estimates.serving_memory import memory
from autodistill.estimates.speed import speed
from autodistill.hardware.catalog import devices
from autodistill.hardware.device import Device
from autodistill.hardware.local import local_device
from autodistill.hardware.lookup import find_device
from autodistill.hardware.machine import computes_bf16, detect
from autodistill.runtimes.python_server import PythonServer
from autodistill.units import format_bytes
from benchmarks.common import program, report
from benchmarks.common.model_files import THREADS, Case, milliseconds, timed, write_folder
from benchmarks.hardware.memory_estimate import SIZES

SHAPES: dict[str, dict[str, int]] = {
    "0.13B": {"layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "ffn": 1536, "vocabulary": 49152},
    "0.27B": {"layers": 20, "width": 1024, "heads": 16, "kv_heads": 4, "ffn": 2816, "vocabulary": 32000},
    "0.04B": {"layers": 8, "width": 512, "heads": 8, "kv_heads": 4, "ffn": 1536, "vocabulary": 32000},
    "0.09B": {"layers": 6, "width": 1024, "heads": 16, "kv_heads": 16, "ffn": 2816, "vocabulary": 16384},
    "0.18B": {
        "layers": 4,
        "width": 1024,
        "heads": 8,
        "head_dim": 128,
        "kv_heads": 8,
        "ffn": 2816,
        "vocabulary": 128256,
    },
    "0.45B": {"layers": 24, "width": 1280, "heads": 20, "kv_heads": 4, "ffn": 3456, "vocabulary": 32000},
}
CALIBRATED = ("0.13B", "0.27B")
"""The class's shares were set with these models. The others test them."""
FORMS = ("gguf-f16", "gguf-q8_0", "gguf-q4_0")
CALIBRATED_FORMS = (*FORMS, "gguf-q5_0")
PROMPTS = (32, 512)
LONGER = 1024
"""No runtime's shares were set with a prompt of this length."""
_EMPTY = {"layers": 1, "width": 32, "heads": 1, "kv_heads": 1, "head_dim": 32, "ffn": 32, "vocabulary": 256}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model, format and prompt: CPU milliseconds of a step and of the prompt, and the core's speed at that time."""

    model: str
    form: str
    prompt: int
    held_out: bool
    step_ms: float
    first_ms: float
    bandwidth: float
    rates: dict[str, float]


def _case(model: str, form: str) -> Case:
    return Case(family="llama", tied=True, form=form, **SHAPES[model])


def llama_points(folder: Path, models: Sequence[str]) -> Iterator[Point]:
    """Time every model, format and prompt. The cost of a request, measured with a nearly empty model, is subtracted."""
    empty = {prompt: milliseconds(Case(family="llama", **_EMPTY), folder, prompt) for prompt in PROMPTS}
    for name in models:
        for form in CALIBRATED_FORMS if name in CALIBRATED else FORMS:
            core = one_core()
            for prompt in PROMPTS:
                step, first = milliseconds(_case(name, form), folder, prompt)
                less = empty[prompt]
                times = {"step_ms": step - less[0], "first_ms": first - less[1]}
                yield Point(model=name, form=form, prompt=prompt, held_out=name not in CALIBRATED, **times, **core)


def transformers_points(folder: Path, models: Sequence[str]) -> Iterator[Point]:
    """Time every model and prompt in bfloat16. One prompt is longer than any that calibrated the shares."""
    for name in models:
        case = _case(name, "huggingface")
        write_folder(case, folder)
        core = one_core()
        with PythonServer(folder, "transformers", 2048, THREADS) as server:
            for prompt in (*PROMPTS, LONGER):
                step, first = timed(server, case.vocabulary, prompt)
                held_out = name not in CALIBRATED or prompt not in PROMPTS
                times = {"step_ms": step, "first_ms": first}
                yield Point(model=name, form=case.form, prompt=prompt, held_out=held_out, **times, **core)


def one_core() -> dict[str, Any]:
    """Measure bandwidth and rates of one core by its CPU time. `local_device` measures both by the clock.

    This is done before each model, because the other core's work changes from minute to minute, and so does this core's
    share of the memory bandwidth.
    """
    torch.set_num_threads(THREADS)
    matrix, vector = torch.ones(2**14, 4096), torch.ones(4096)

    def best(work: Callable[[], Any]) -> float:
        """Return the least CPU seconds of eight runs, after one that is not counted."""
        work()
        times = []
        for _ in range(8):
            began = time.thread_time()
            work()
            times.append(time.thread_time() - began)
        return min(times)

    kinds = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if computes_bf16("cpu") else {})
    squares = {name: torch.ones(1024, 1024, dtype=dtype) for name, dtype in kinds.items()}
    rates = {name: 2 * 1024**3 / best(partial(torch.mm, square, square)) for name, square in squares.items()}
    reading = min(best(lambda: torch.mv(matrix, vector)), best(matrix.sum))
    return {"bandwidth": 4 * matrix.numel() / reading, "rates": rates}


def local(found: Sequence[Point], known: Device, told: str) -> str:
    """Return the section about this machine."""
    lines = []
    ratios: dict[tuple[bool, str], list[float]] = defaultdict(list)
    for point in found:
        case = _case(point.model, point.form)
        device = replace(known, bandwidth=point.bandwidth, rates=point.rates)
        guess = speed(
            spec_of(case.config()),
            deployment_named(point.form),
            device,
            context=point.prompt + 8,
            prompt=point.prompt,
        )
        decode, first = guess.decode_ms / point.step_ms, guess.time_to_first_token_ms / point.first_ms
        ratios[point.held_out, "token"].append(decode)
        ratios[point.held_out, "first"].append(first)
        within = 1e3 / guess.tokens_per_second_high <= point.step_ms <= guess.decode_ms_high
        lines.append(
            [
                point.model,
                point.form.removeprefix("gguf-"),
                point.prompt,
                "tests" if point.held_out else "calibrates",
                f"{guess.decode_ms:.1f} / {point.step_ms:.1f}",
                f"{decode - 1:+.0%}",
                "yes" if within else "no",
                f"{guess.time_to_first_token_ms:.0f} / {point.first_ms:.0f}",
                f"{first - 1:+.0%}",
            ]
        )
    titles = ["model", "format", "prompt", "use", "a token, ms", "error", "in band", "first token, ms", "error"]
    bandwidths = [point.bandwidth for point in found]
    rates = [
        f"{min(values) / 1e9:.0f} to {max(values) / 1e9:.0f} GFLOP/s in {name}"
        for name in found[0].rates
        if (values := [point.rates[name] for point in found])
    ]
    core = (
        f"Beside each model this core was measured the same way: {format_bytes(min(bandwidths))} to "
        f"{format_bytes(max(bandwidths))}/s, {', '.join(rates)}. The shares were set by the rows that calibrate, in an "
        f"earlier run; the others test them. Load average {psutil.getloadavg()[0]:.1f}."
    )
    told_errors = [
        f"{'Held out' if held_out else 'Calibrating'}, {what}: median error {_error(values):.0%} over {len(values)}."
        for (held_out, what), values in sorted(ratios.items(), reverse=True)
    ]
    return "\n\n".join([f"{told} {core}", report.table(titles, lines), " ".join(told_errors) + " Target: 15%."])


_MADE = "Predicted / measured in milliseconds of CPU time, as other work shares the machine, of one thread"
_RUNTIMES: dict[str, tuple[str, Callable[[Path, Sequence[str]], Iterator[Point]], str]] = {
    "llama.cpp": (
        "## llama.cpp on this machine",
        llama_points,
        f"{_MADE} of llama.cpp; the cost of a request, that of a model of nearly nothing, is taken off.",
    ),
    "transformers": (
        "## transformers on this machine",
        transformers_points,
        f"{_MADE} of transformers in bfloat16.",
    ),
}


def runtime_section(runtime: str, models: Sequence[str]) -> str:
    """Return the section about a runtime."""
    _, points, told = _RUNTIMES[runtime]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        known = local_device(Path(folder), replace(detect(), cpus=THREADS, gpus=()))
        for point in points(Path(folder), models):
            found.append(point)
            report.note(runtime, point)
            print(point, flush=True)
    return local(found, known, told)


def _error(ratios: Sequence[float]) -> float:
    return statistics.median(abs(ratio - 1) for ratio in ratios)


def quoted_7b() -> str:
    """Return the table for 7B on an A100 80GB: single-stream rates, and the batch that often-quoted rates imply."""
    model, device = shape(SIZES["7B"]), find_device("A100-80GB", devices())
    lines = []
    for name, form, told in (("FP16", "huggingface", 320), ("INT8", "compressed-tensors-int8-g128", 580)):
        deployment = deployment_named(form, "vllm")
        alone = speed(model.spec, deployment, device, context=2048)
        implied = []
        for end in ("tokens_per_second_high", "tokens_per_second", "tokens_per_second_low"):
            batches = range(1, 257)
            rates = (
                getattr(speed(model.spec, deployment, device, context=2048, batch=batch), end) for batch in batches
            )
            implied.append(next((batch for batch, rate in zip(batches, rates, strict=True) if rate >= told), None))
        band = f"{alone.tokens_per_second_low:.0f}-{alone.tokens_per_second_high:.0f}"
        need = memory(model.spec, deployment, context=2048, batch=implied[1] or 1, on_gpu=True).total_bytes
        lines.append(
            [
                name,
                told,
                f"{alone.tokens_per_second:.0f} ({band})",
                f"{implied[1]} ({implied[0]}-{implied[2] or 'over 256'})",
                format_bytes(need),
            ]
        )
    titles = [
        "weights",
        "often quoted, tokens/s",
        "one stream, tokens/s",
        "streams for that rate",
        "memory at those",
    ]
    return report.table(titles, lines)


def quoted_1b() -> str:
    """Return the table of published speeds of models of about 1B weights."""
    model, device = shape(SIZES["1B"]), find_device("Raspberry Pi 4B", devices())
    lines = []
    for form in ("gguf-f16", "gguf-q4_0"):
        deployment = deployment_named(form)
        need = memory(model.spec, deployment, context=512, batch=1)
        guess = speed(model.spec, deployment, device, context=512, prompt=32)
        band = f"{guess.tokens_per_second_low:.1f}-{guess.tokens_per_second_high:.1f}"
        lines.append(
            [
                form.removeprefix("gguf-"),
                format_bytes(need.weights_bytes),
                format_bytes(need.total_bytes),
                f"{guess.tokens_per_second:.1f} ({band})",
                guess.bound,
            ]
        )
    return report.table(["format", "weights", "memory", "tokens/s", "waits for"], lines)


def _quoted() -> list[str]:
    return [
        "## 7B on an A100 80GB",
        "Predicted for vLLM at a context of 2048 tokens a stream; 320 tokens/s in FP16 and 580 in INT8 are often "
        "quoted, without a batch. In brackets the band, from the lowest and highest share of the bandwidth; of vLLM "
        "nothing was measured, so that it is llama.cpp's, made wider.",
        quoted_7b(),
        "## 1B in 4 bits on a Raspberry Pi 4B",
        "Often quoted: from 2.1 GB to 530 MB, and 8 tokens/s. Predicted at a context of 512; no board was at hand.",
        quoted_1b(),
    ]


def measure_again(runtime: str | None, models: Sequence[str]) -> Path:
    """Update the predictions in the newest report, and one runtime's section with new measurements."""
    found = runtime and runtime_section(runtime, models)
    path = max(program.REPORTS.glob("*-latency-roofline.md"))
    head, *parts = path.read_text(encoding="utf-8").split("\n## ")
    kept = {f"## {part.splitlines()[0]}": f"## {part}".strip() for part in parts}
    if runtime:
        title = _RUNTIMES[runtime][0]
        kept[title] = f"{title}\n\n{datetime.now(UTC):%Y-%m-%d}, {report.machine()}. {found}"
    sections = [kept[title] for title, _, _ in _RUNTIMES.values() if title in kept]
    path.write_text("\n\n".join([head.strip(), *sections, *_quoted()]) + "\n", encoding="utf-8")
    if runtime:
        report.amend(path)
    return path


def main() -> None:
    """Measure each runtime and write the report, or write a part of the newest one again."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--runtime", choices=list(_RUNTIMES), help="measure it alone anew, in the newest report")
    parser.add_argument("--predicted", action="store_true", help="what is predicted alone anew, in the newest report")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), help="sizes that are measured")
    given = program.parse(parser, models=["0.04B"])
    if given.runtime or given.predicted:
        print(measure_again(given.runtime, given.models))
        return
    sections = [
        part for runtime, (title, _, _) in _RUNTIMES.items() for part in (title, runtime_section(runtime, given.models))
    ]
    title = "How fast a device would serve a student, predicted and measured"
    print(report.write("latency-roofline", title, [*sections, *_quoted()]))


if __name__ == "__main__":
    main()
