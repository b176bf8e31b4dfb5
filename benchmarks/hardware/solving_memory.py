"""Does solving take the memory and time that its plan says, with the teacher whole and one layer at a time?

    python -m benchmarks.hardware.solving_memory [--cases "SmolLM2, whole"] [--tokens 512]

Each case solves one budget for a teacher about which nothing is known yet, in a process of its own. The teachers are
the 135M teacher, whole and by layer, and a small mixture of experts and a small Gemma, both with random weights. Then
an 8B is planned for on GPUs that are not here.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from autodistill.estimates import solving as estimates
from autodistill.hardware.budget import Budget
from autodistill.hardware.catalog import listed
from autodistill.hardware.lookup import find_device
from autodistill.models.loading import save_model
from autodistill.search.solve import SolveRequest, plan_solve, solve
from autodistill.testing import save_tiny_teacher, tiny_text, tiny_tokenizer
from autodistill.units import format_bytes
from autodistill.utils.hashing import content_hash, file_hash
from benchmarks.common import program, report

LIMIT, LIMIT_SECONDS = 16 * 10**9, 15 * 60
GPUS = ("rtx 4090", "rtx 3090")
LARGE = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
"""The part of Llama 3.1 8B's config on which memory and time depend."""
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""With these settings of glibc, every larger block goes back to the system when it is freed."""


def experts(folder: Path, layers: int) -> str:
    """Write a mixture of experts with random weights: eight in each layer, two of which each token uses."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    config = Qwen3MoeConfig(
        **sizes,
        vocab_size=300,
        num_hidden_layers=layers,
        moe_intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    save_model(model, folder)
    tiny_tokenizer(300).save_pretrained(folder)
    return str(folder)


def gemma(folder: Path, layers: int) -> str:
    """Write a Gemma with random weights: sliding windows, one key head, a wide table."""
    sizes = {"width": 256, "heads": 4, "kv_heads": 1, "head_dim": 64, "ffn": 1024, "vocabulary": 300}
    return str(save_tiny_teacher(folder, architecture="gemma3_text", layers=layers, **sizes))


CASES: Mapping[str, tuple[Callable[[Path, int], str] | None, bool]] = {
    "SmolLM2, whole": (None, False),
    "SmolLM2, one layer at a time": (None, True),
    "Qwen3-MoE of random weights": (experts, False),
    "Gemma 3 of random weights": (gemma, False),
    "Gemma 3 of random weights, one layer at a time": (gemma, True),
}
"""The function that makes the teacher (None for SmolLM2), and whether one layer at a time is in memory."""


def request_of(name: str, tokens: int, layers: int, folder: Path) -> SolveRequest:
    """Return a case's request: a budget between the smallest storage and that of 8 bits."""
    make, streamed = CASES[name]
    small = make is not None or layers < _LAYERS
    make = make or (_tiny if small else None)
    given: dict[str, Any] = {
        "cache": folder / "cache",
        "teacher": "smollm2" if make is None else make(folder / "teacher", layers),
        "tokens": tokens,
        "sequence_length": 64 if small else 256,
        "data": str(tiny_text(folder / "text", documents=48)) if small else "pydoc",
    }
    context = 256 if small else 2048

    def asked(limit: int, memory: int | None = None) -> SolveRequest:
        return SolveRequest(budgets=(Budget(memory_bytes=limit, context=context),), memory_bytes=memory, **given)

    memory = plan_solve(asked(10**12))["plan"]["memory_bytes_whole"] - 1 if streamed else None
    # Without the whole teacher in memory nothing is cut, so the smallest is another one.
    least = plan_solve(asked(10**12, memory))["smallest"]["bytes"]
    return asked(round(1.15 * least) if small else 175 * 10**6, memory)


def _tiny(folder: Path, layers: int) -> str:
    return str(save_tiny_teacher(folder, layers=layers, width=128, heads=2, kv_heads=1, ffn=256))


_LAYERS = 12  # of the teachers with random weights


def measure(name: str, tokens: int, layers: int) -> dict[str, Any]:
    """Solve a case. Return its plan, the growth of the process's peak, and its time."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        request = request_of(name, tokens, layers, Path(folder))
        planned = plan_solve(request)["plan"]
        before, began, cpu = peak_bytes(), time.perf_counter(), time.process_time()
        found = solve(request, lambda line: print(line, file=sys.stderr, flush=True))
        (one,) = found["solutions"]
        return {
            "plan": planned,
            "threads": torch.get_num_threads(),
            "grown": peak_bytes() - before,
            "seconds": time.perf_counter() - began,
            "core_seconds": time.process_time() - cpu,
            "streamed": found["streamed"],
            "solution": {key: one["solution"][key] for key in ("name", "bytes", "kl", "kl_stderr")},
            "budget": one["budget"]["memory_bytes"],
        }


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def lines(names: Sequence[str], tokens: int, layers: int) -> Iterator[list[str]]:
    """Yield the rows of the table, one for each teacher."""
    kept = report.Kept("solving-memory", content_hash([tokens, layers, file_hash(Path(estimates.__file__))], 16))
    for name in names:
        found = kept.get(name, partial(in_its_process, name, tokens, layers))
        plan, kl = found["plan"], found["solution"]
        yield [
            name,
            format_bytes(plan["memory_bytes"]),
            format_bytes(found["grown"]),
            f"{plan['memory_bytes'] / found['grown']:.2f}",
            f"{plan['seconds']:.0f} s",
            f"{found['seconds']:.0f} s",
            f"{found['core_seconds']:.0f} s",
            f"{format_bytes(found['budget'])}: {kl['name']}, {kl['kl']:.4f}",
        ]


def in_its_process(name: str, tokens: int, layers: int) -> dict[str, Any]:
    """Solve for a teacher in a separate process, and return what that took."""
    command = [sys.executable, "-m", "benchmarks.hardware.solving_memory", "--measure", name]
    command += ["--tokens", str(tokens), "--layers", str(layers)]
    environment = os.environ | GIVING_BACK
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=program.ROOT, env=environment)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def large(tokens: int) -> str:
    """Return a table of what an 8B would take on GPUs of 24 GB. All of it is predicted, nothing measured."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "llama-8b"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LARGE), encoding="utf-8")
        request = SolveRequest(
            budgets=(Budget(memory_bytes=8 * 10**9, context=2048),),
            cache=folder / "cache",
            teacher=str(folder),
            tokens=tokens,
        )
        rows = []
        for gpu in GPUS:
            device = find_device(gpu, listed())
            for way, coarse in (("whole", False), ("--coarse", True)):
                plan = plan_solve(replace(request, coarse=coarse), device)["plan"]
                report.note(f"8B on {device.name}, {way}", plan)
                parts = plan["elsewhere"]["seconds_by_part"]
                memory = plan["memory_bytes"]
                minutes = [plan["seconds"], *parts.values(), plan["elsewhere"]["slow_seconds"]]
                within = "yes" if memory <= LIMIT and plan["seconds"] <= LIMIT_SECONDS else "no"
                rows.append([device.name, way, format_bytes(memory), *(f"{one / 60:.1f}" for one in minutes), within])
    titles = ["GPU", "way", "memory", "minutes", "of products", "rounding", "reading", "slow end", "within both limits"]
    return (
        f"An 8B like Llama 3.1 with {tokens:,} tokens of calibration text, one layer at a time in memory, predicted "
        f"from the data sheets of GPUs of 24 GB by `solve --plan --solve-on`. The limits are {format_bytes(LIMIT)} and "
        f"{LIMIT_SECONDS // 60} minutes. No GPU was there to measure it on.\n\n{report.table(titles, rows)}"
    )


def main() -> None:
    """Solve in processes of their own, and write the report of memory and time against the plan."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--measure", choices=list(CASES), help="one measurement, for a process of its own")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--tokens", type=program.token_count, default=512)
    parser.add_argument("--layers", type=int, default=_LAYERS, help="of teachers of random weights")
    given = program.parse(parser, cases=["SmolLM2, one layer at a time"], tokens=128, layers=2)
    if given.measure:
        print(json.dumps(measure(given.measure, given.tokens, given.layers)))
        return
    titles = ["teacher", "memory, predicted", "measured", "ratio", "time, predicted", "measured", "of cores"]
    sections = [
        f"One budget, {given.tokens:,} tokens of calibration text, nothing known before. Memory is beside the "
        "process's own: the growth of its peak of resident memory, with every freed block given back "
        "(MALLOC_MMAP_THRESHOLD_=65536). A ratio above 1 is a prediction on the safe side. Times are of whatever the "
        "machine had free; those of cores are what the process got.",
        report.table([*titles, "solution, KL"], lines(given.cases, given.tokens, given.layers)),
        large(2048),
    ]
    print(report.write("solving-memory", "Memory and time of solving", sections))


if __name__ == "__main__":
    main()
