"""The speed that the roofline predicts: against llama.cpp on this machine, and what it says of the guide's claims."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import report
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
MODELS = {
    "0.03B": {"layers": 8, "width": 512, "heads": 8, "kv_heads": 4, "ffn": 1536, "vocabulary": 32000},
    "0.13B": {"layers": 30, "width": 576, "heads": 9, "kv_heads": 3, "ffn": 1536, "vocabulary": 49152},
    "0.27B": {"layers": 20, "width": 1024, "heads": 16, "kv_heads": 4, "ffn": 2816, "vocabulary": 32000},
    "0.5B": {"layers": 24, "width": 1280, "heads": 20, "kv_heads": 4, "ffn": 3456, "vocabulary": 32000},
}
FORMS = ("gguf-f16", "gguf-q8_0", "gguf-q4_0")
PROMPTS = (128, 768)
DECODED = 16


def local() -> str:
    """Measures every model, format and prompt, and holds the prediction against it."""
    with tempfile.TemporaryDirectory() as folder:
        device = local_device(Path(folder), replace(detect(), cpus=THREADS, gpus=()))
        lines, decodes, firsts = [], [], []
        for (name, sizes), form in ((model, form) for model in MODELS.items() for form in FORMS):
            case = Case(family="llama", tied=True, form=form, **sizes)
            spec, deployment, path = spec_of(case.config()), deployment_named(form), Path(folder, "model.gguf")
            write(case, spec, deployment, path)
            with LlamaServer(path, 1024, THREADS) as server:
                server.time_tokens(range(2, 66), 4)
                for prompt in PROMPTS:
                    timing = server.time_tokens([2 + index % 1000 for index in range(prompt)], DECODED)
                    real, first = statistics.median(timing.step_ms), timing.prompt_ms
                    guess = speed(spec, deployment, device, context=prompt, prompt=prompt)
                    decodes.append(guess.decode_ms / real)
                    firsts.append(guess.time_to_first_token_ms / first)
                    within = 1e3 / guess.tokens_per_second_high <= real <= guess.decode_ms_high
                    cells = [f"{guess.decode_ms:.1f} / {real:.1f}", f"{guess.decode_ms / real - 1:+.0%}"]
                    cells += ["yes" if within else "no", f"{guess.time_to_first_token_ms:.0f} / {first:.0f}"]
                    lines.append([name, form.removeprefix("gguf-"), prompt, *cells, f"{firsts[-1] - 1:+.0%}"])
                    print(*lines[-1], flush=True)
    titles = ["model", "format", "prompt", "a token, ms", "error", "in band", "first token, ms", "error"]
    told = (
        f"One thread beside other work (load average {psutil.getloadavg()[0]:.1f}); {format_bytes(device.bandwidth)}/s "
        f"and {device.rates['fp32'] / 1e9:.0f} GFLOP/s in float32 were measured for this core at the start. "
        "Predicted / measured. The class's shares of the rate for a prompt were set after an earlier run of this "
        "program, "
        "its shares of the bandwidth and the cost of a layer come from elsewhere (`autodistill/hardware.yaml`)."
    )
    return f"{told}\n\n{report.table(titles, lines)}\n\n{_errors('A token', decodes)} {_errors('First token', firsts)}"


def _errors(what: str, ratios: Sequence[float]) -> str:
    """The median error as predicted, and with the class's share scaled by the other rows' median ratio."""
    plain = statistics.median(abs(ratio - 1) for ratio in ratios)
    left_out = []
    for index, ratio in enumerate(ratios):
        scale = statistics.median([*ratios[:index], *ratios[index + 1 :]])
        left_out.append(abs(ratio / scale - 1))
    return (
        f"{what}: median error {plain:.0%}; {statistics.median(left_out):.0%} with the share scaled by the other rows'."
    )


def claim_six() -> str:
    """7B on an A100 80GB: single-stream rates, and the batch that the guide's rates imply."""
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
        "the guide, tokens/s",
        "one stream, tokens/s",
        "streams for the guide's rate",
        "memory at those",
    ]
    return report.table(titles, lines)


def claim_twelve() -> str:
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
    sections = [
        "## llama.cpp on this machine",
        local(),
        "## 7B on an A100 80GB (claim 6)",
        "Predicted for vLLM at a context of 2048 tokens a stream; the guide says 320 tokens/s in FP16 and 580 in INT8, "
        "without a batch. In brackets the band, from the lowest and highest share of the bandwidth that the class has.",
        claim_six(),
        "## 1B in 4 bits on a Raspberry Pi 4B (claim 12)",
        "The guide says from 2.1 GB to 530 MB, and 8 tokens/s. Predicted at a context of 512; no board was at hand.",
        claim_twelve(),
    ]
    print(report.write("latency-roofline", "How fast a device would serve a student, predicted and measured", sections))


if __name__ == "__main__":
    main()
