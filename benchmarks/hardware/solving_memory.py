"""Does solving take the memory and time that its plan says, with the teacher whole and one layer at a time?

    python -m benchmarks.hardware.solving_memory [--cases "SmolLM2, whole"] [--tokens 512]

Each case solves one budget for a teacher about which nothing is known yet, in a process of its own. The teachers are
the 135M teacher, whole and by layer, and a small mixture of experts and a small Gemma, both with random weights. Then
the plan of an 8B is computed.
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
from functools import partial
from pathlib import Path
from typing import Any

from autodistill.estimates import solving as estimates
from autodistill.hardware.budget import Budget
from autodistill.models.config import spec_from_config
from autodistill.models.loading import save_model
from autodistill.options import cache_folder
from autodistill.search.solve import SolveRequest, plan_solve, solve
from autodistill.search.solve.call.request import work_of
from autodistill.search.solve.options import Options
from autodistill.testing import save_tiny_teacher, tiny_text, tiny_tokenizer
from autodistill.units import format_bytes
from autodistill.utils.hashing import content_hash, file_hash
from benchmarks.common import program, report

LIMIT = 16 * 10**9
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
_FILE_BYTES = 2  # of a weight in the large model's files


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
    """Describe what an 8B would take on a GPU, computed and not measured."""
    spec = spec_from_config(LARGE)
    options = Options(spec=spec, budget=Budget(memory_bytes=8 * 10**9, context=2048))
    request = SolveRequest(budgets=(options.budget,), cache=cache_folder(), tokens=tokens)
    whole, apart = (work_of(options, request, streamed=streamed) for streamed in (False, True))
    read = spec.parameters * _FILE_BYTES
    exact = apart.operations["scores of tables and cache"] + apart.operations["whole storages"]
    forward = apart.operations["the teacher itself"] / (3 * tokens)
    readings = 2 + 2 + round(exact / forward / tokens)
    products = (sum(apart.operations.values()) - apart.operations["scores of cuts, where types are not enough"]) / 1e15
    figures = {"whole": whole.memory_bytes, "apart": apart.memory_bytes, "readings": readings, "products": products}
    report.note("8B", figures)
    return (
        f"Predicted, of an 8B like Llama 3.1 ({spec.parameters:,} weights) and {tokens:,} tokens: "
        f"{format_bytes(whole.memory_bytes)} whole, {format_bytes(apart.memory_bytes)} one layer at a time, "
        f"{'within' if apart.memory_bytes <= LIMIT else 'above'} {format_bytes(LIMIT)}. That is {products:.1f} PFLOP "
        f"in float32, of which a GPU of 30 TFLOP/s takes {products * 1e3 / 30 / 60:.0f} minutes, and about {readings} "
        f"readings of {format_bytes(read)} of files. Rounding, and whatever else is no product, comes on top. No GPU "
        "was there to measure it on."
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
