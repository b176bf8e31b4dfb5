"""The speed that the roofline predicts: against llama.cpp on this machine, and what it says of often-quoted rates."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import report
import torch
from memory_estimate import SIZES, Case, write

from autodistill.described import deployment_named, shape, spec_of
from autodistill.devices import devices, find_device
from autodistill.hardware import detect
from autodistill.llama_cpp import LlamaServer
from autodistill.local_device import local_device
from autodistill.roofline import speed
from autodistill.serving_memory import memory
from autodistill.units import format_bytes

THREADS = 1
_SHAPES: dict[str, dict[str, int]] = {
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
"""Models that the class's shares were set by; the others test them."""
FORMS = ("gguf-f16", "gguf-q8_0", "gguf-q4_0")
CALIBRATED_FORMS = (*FORMS, "gguf-q5_0")
PROMPTS = (32, 512)
_EMPTY = {"layers": 1, "width": 32, "heads": 1, "kv_heads": 1, "head_dim": 32, "ffn": 32, "vocabulary": 256}
_SECONDS = 0.3  # of CPU that a step is timed over: the system counts it in hundredths


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model, format and prompt: milliseconds of CPU of a step and of the prompt, and the core as it was then."""

    model: str
    form: str
    prompt: int
    step_ms: float
    first_ms: float
    bandwidth: float
    rate: float


def _cpu(server: LlamaServer) -> float:
    """CPU seconds of the runtime's process."""
    return server.used_seconds() - time.process_time()


def milliseconds(case: Case, folder: Path, prompt: int) -> tuple[float, float]:
    """Milliseconds of CPU of a decoding step, and of reading the prompt."""
    spec, path = spec_of(case.config()), folder / "model.gguf"
    write(case, spec, deployment_named(case.form), path)
    ids = [2 + index % (case.vocabulary - 2) for index in range(prompt)]
    with LlamaServer(path, 2048, THREADS) as server:
        server.begin([ids[:32]])
        server.step()
        times, began = max(1, 256 // prompt), _cpu(server)
        for _ in range(times):
            server.begin([ids])
        read = _cpu(server)
        steps = 0
        while steps < 16 or _cpu(server) - read < _SECONDS:
            server.step()
            steps += 1
        return 1e3 * (_cpu(server) - read) / steps, 1e3 * (read - began) / times


def points(folder: Path) -> list[Point]:
    """Times every model, format and prompt; the cost of a request, that of nearly no model, is taken off."""
    found = []
    empty = {prompt: milliseconds(Case(family="llama", **_EMPTY), folder, prompt) for prompt in PROMPTS}
    for name, sizes in _SHAPES.items():
        for form in CALIBRATED_FORMS if name in CALIBRATED else FORMS:
            # The other core's work changes from minute to minute, and with it what this one gets of the memory.
            bandwidth, rate = _core()
            for prompt in PROMPTS:
                step, first = milliseconds(Case(family="llama", tied=True, form=form, **sizes), folder, prompt)
                less = empty[prompt]
                found.append(
                    Point(
                        model=name,
                        form=form,
                        prompt=prompt,
                        step_ms=step - less[0],
                        first_ms=first - less[1],
                        bandwidth=bandwidth,
                        rate=rate,
                    )
                )
                print(found[-1], flush=True)
    return found


def _core() -> tuple[float, float]:
    """Bandwidth and float32 rate of one core by its CPU time, as `local_device` measures both by the clock."""
    torch.set_num_threads(THREADS)
    matrix, vector, square = torch.ones(2**14, 4096), torch.ones(4096), torch.ones(1024, 1024)

    def best(work: Callable[[], Any]) -> float:
        """The least CPU seconds of eight runs, after one that is not counted."""
        work()
        times = []
        for _ in range(8):
            began = time.thread_time()
            work()
            times.append(time.thread_time() - began)
        return min(times)

    size = 4 * matrix.numel()
    reading = min(best(lambda: torch.mv(matrix, vector)), best(matrix.sum))
    return size / reading, 2 * 1024**3 / best(lambda: torch.mm(square, square))


def local() -> str:
    """The prediction against every point."""
    with tempfile.TemporaryDirectory() as folder:
        known = local_device(Path(folder), replace(detect(), cpus=THREADS, gpus=()))
        found = points(Path(folder))
    lines = []
    ratios: dict[tuple[bool, str], list[float]] = defaultdict(list)
    for point in found:
        case = Case(family="llama", tied=True, form=point.form, **_SHAPES[point.model])
        device = replace(known, bandwidth=point.bandwidth, rates={"fp32": point.rate})
        guess = speed(
            spec_of(case.config()),
            deployment_named(point.form),
            device,
            context=point.prompt + 8,
            prompt=point.prompt,
        )
        held_out = point.model not in CALIBRATED
        decode, first = guess.decode_ms / point.step_ms, guess.time_to_first_token_ms / point.first_ms
        ratios[held_out, "token"].append(decode)
        ratios[held_out, "first"].append(first)
        within = 1e3 / guess.tokens_per_second_high <= point.step_ms <= guess.decode_ms_high
        lines.append(
            [
                point.model,
                point.form.removeprefix("gguf-"),
                point.prompt,
                "tests" if held_out else "calibrates",
                f"{guess.decode_ms:.1f} / {point.step_ms:.1f}",
                f"{decode - 1:+.0%}",
                "yes" if within else "no",
                f"{guess.time_to_first_token_ms:.0f} / {point.first_ms:.0f}",
                f"{first - 1:+.0%}",
            ]
        )
    titles = ["model", "format", "prompt", "use", "a token, ms", "error", "in band", "first token, ms", "error"]
    bandwidths, rates = [point.bandwidth for point in found], [point.rate for point in found]
    told = (
        "One thread of llama.cpp, predicted / measured in milliseconds of CPU time, as other work shared the machine "
        f"(load average {psutil.getloadavg()[0]:.1f}); the cost of a request, that of a model of nearly nothing, is "
        f"taken off. Beside each model this core was measured the same way: {format_bytes(min(bandwidths))} to "
        f"{format_bytes(max(bandwidths))}/s, {min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GFLOP/s in float32. The "
        "class's shares were set by the models that calibrate, in an earlier run; the others test them."
    )
    told_errors = [
        f"{'Held out' if held_out else 'Calibrating'}, {what}: median error {_error(values):.0%} over {len(values)}."
        for (held_out, what), values in sorted(ratios.items(), reverse=True)
    ]
    return "\n\n".join([told, report.table(titles, lines), " ".join(told_errors) + " Target: 15%."])


def _error(ratios: Sequence[float]) -> float:
    return statistics.median(abs(ratio - 1) for ratio in ratios)


def quoted_7b() -> str:
    """7B on an A100 80GB: single-stream rates, and the batch that often-quoted rates imply."""
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
        need = memory(model.spec, deployment, context=2048, batch=implied[1] or 1).total_bytes
        lines.append(
            [
                name,
                told,
                f"{alone.tokens_per_second:.0f} ({band})",
                f"{implied[1]} ({implied[0]}-{implied[2]})",
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
    """1B at 4 bits on a Raspberry Pi 4B."""
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


def main() -> None:
    """Writes the report."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sections = [
        "## llama.cpp on this machine",
        local(),
        "## 7B on an A100 80GB",
        "Predicted for vLLM at a context of 2048 tokens a stream; 320 tokens/s in FP16 and 580 in INT8 are often "
        "quoted, without a batch. In brackets the band, from the lowest and highest share of the bandwidth that the "
        "class has.",
        quoted_7b(),
        "## 1B in 4 bits on a Raspberry Pi 4B",
        "Often quoted: from 2.1 GB to 530 MB, and 8 tokens/s. Predicted at a context of 512; no board was at hand.",
        quoted_1b(),
    ]
    print(report.write("latency-roofline", "How fast a device would serve a student, predicted and measured", sections))


if __name__ == "__main__":
    main()
