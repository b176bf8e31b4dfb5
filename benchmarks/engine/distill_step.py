"""One step of distillation: tokens a second by the kind of teacher signal, the lower bound, and the memory of the loss.

    python -m benchmarks.engine.distill_step [--teacher smollm2] [--rounds 3] [--steps 4x256 1x1024] [--arms top-64]

Every arm trains the same 15-layer student in turn, so that other work on the machine affects all of them alike. A
figure is the median of the arm's steps, and ratios are taken within the round. Steps of several sizes follow each
other. The memory of the loss and the lower bound are those of the first size. Ratios of processor time are shown next
to those of wall-clock time. If other processes share the cores, ratios of processor time vary less.

"Cross-entropy" is this project's own; the plain one is what transformers computes if a model is given labels. TRL has
two losses for generalised JSD with the teacher run in each step, and both are timed. Its experimental GKD computes all
logits at once. Its stable DistillationTrainer computes a chunk of logits at a time.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from autodistill.distillation.losses.divergence import divergence_of
from autodistill.distillation.losses.logits import logit_loss
from autodistill.distillation.losses.targets import FullTarget, TopTarget
from autodistill.distillation.teacher.output_cache import TeacherCache
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.options import cache_folder
from benchmarks.common import report
from benchmarks.common.program import parse, parser_of, tiny_teacher
from benchmarks.engine.distill_arms import (
    ARMS,
    BASE,
    COMPARED,
    DRAWS,
    Taken,
    arms,
    experimental_loss,
    seconds,
    stable_loss,
    workshop,
)

# The vocabularies of SmolLM2 and of Qwen2.5, for which the memory of the losses is measured.
VOCABULARIES: tuple[int, ...] = (49152, 151936)


def ratio(others: list[Taken], own: list[Taken], clock: str) -> float:
    """Return how many times faster the second is: the median over the rounds."""
    pairs = zip(others, own, strict=True)
    return statistics.median(getattr(other, clock) / getattr(mine, clock) for other, mine in pairs)


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the memory that a call takes at its peak beyond what the process holds (Linux)."""
    gc.collect()
    # Memory that was freed but is still held would be reused, and not be counted.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, _ = _resident()
    work()
    return _resident()[1] - before


def _resident() -> tuple[int, int]:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def memory_lines(rows: int, vocabularies: Sequence[int], width: int = 576) -> Iterator[list[str]]:
    """Yield the peak memory of loss and gradient by vocabulary, beyond the student's logits in bfloat16."""
    for vocabulary in vocabularies:
        states, head = torch.randn(rows, width), torch.randn(vocabulary, width).bfloat16() / 24
        logits = functional.linear(states.bfloat16(), head)
        labels = torch.zeros(rows, dtype=torch.int64)
        top = TopTarget(ids=torch.arange(64).repeat(rows, 1), log_p=torch.full((rows, 64), -5.0), temperature=1.0)
        full = FullTarget(states=states, head=head, temperature=1.0)
        jsd = divergence_of("jsd", 0.5)

        def ours(target: Any, weight: float, *divergence: Any, logits: Tensor = logits, labels: Tensor = labels) -> int:
            leaf = logits.clone().requires_grad_()
            return peak_bytes(lambda: logit_loss(leaf, labels, target, weight, *divergence).total.backward())

        def experimental(logits: Tensor = logits, states: Tensor = states, head: Tensor = head) -> int:
            leaf = logits.detach().requires_grad_()
            wanted = states.bfloat16()
            return peak_bytes(lambda: experimental_loss(leaf, functional.linear(wanted, head), 0.5).backward())

        def stable(states: Tensor = states, head: Tensor = head) -> int:
            leaf, own = states.bfloat16().requires_grad_(), head.clone().requires_grad_()
            return peak_bytes(lambda: stable_loss(leaf, own, states.bfloat16(), head, 0.5).backward())

        found = [ours(None, 0.0), ours(top, 0.5), ours(full, 0.5, jsd), experimental(), stable()]
        size = logits.numel() * 2
        yield [f"{vocabulary:,}", f"{size / 1e6:.0f} MB", *(f"{value / 1e6:.0f} MB" for value in found)]


def matrix_rate() -> float:
    """Return the floating-point operations per second of a bfloat16 product of a layer's size."""
    a, b = torch.randn(1024, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    functional.linear(a, b)
    times = [seconds(lambda: [functional.linear(a, b) for _ in range(50)]) for _ in range(5)]
    return 50 * 2 * 1024 * 576 * 1536 / min(taken.processor for taken in times)


def cache_lines(cache: TeacherCache, folder: Path, length: int) -> Iterator[list[str]]:
    """Yield the bytes per token on disk, and the tokens per second that are read."""
    import pyarrow as pa

    batch = pa.ipc.open_file(pa.memory_map(str(folder / "outputs.arrow"))).get_batch(0)
    held = {name: batch.column(name).nbytes / len(batch) for name in batch.schema.names}
    one = held["log_sum"] / len(cache.settings.temperatures)
    everything = range(cache.sequences)
    reads = {
        "top-64": (held["ids"] + held["below_maximum"] + one, lambda: cache.top(everything, 1.0, 64)),
        f"sampled, {DRAWS} draws": (held[f"drawn_{DRAWS}"] + one, lambda: cache.sampled(everything, 1.0, DRAWS)),
        "states": (held["final"], lambda: cache.final(everything)),
    }
    for name, (size, read) in reads.items():
        read()
        rate = cache.sequences * (length - 1) / min(seconds(read).wall for _ in range(5))
        yield [name, f"{size:.0f}", f"{rate:,.0f}", f"{rate * size / 1e6:,.0f} MB/s"]


def timed(runs: Mapping[str, Callable[[], Taken]], rounds: int) -> dict[str, list[Taken]]:
    """Time every arm in turn, after one round that is not counted."""
    taken: dict[str, list[Taken]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            found = run()
            print(f"round {turn}: {name} {found.wall:.2f} s", file=sys.stderr, flush=True)
            if turn:
                taken[name].append(found)
    return taken


# Kinds of torch's operations in a reader's terms. The first kind that matches the beginning of a name counts.
_KINDS = {
    "products of matrices": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn", "aten::mkldnn"),
    "attention": ("aten::_scaled_dot_product", "aten::_flash_attention"),
    "copies and changes of type": ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::cat"),
    "softmax and its gradient": ("aten::_log_softmax", "aten::_softmax", "aten::logsumexp", "aten::exp", "aten::nll"),
    "AdamW and the norm of gradients": ("aten::_fused_adamw", "aten::_foreach", "Optimizer", "aten::linalg_vector"),
    "norms, activations and sums": ("aten::mul", "aten::add", "aten::sum", "aten::mean", "aten::silu", "aten::pow",
                                    "aten::rsqrt", "aten::neg", "aten::sub", "aten::div", "aten::fill", "aten::zero"),
}  # fmt: skip


def spent_on(run: Callable[[], Any]) -> list[list[str]]:
    """Return the shares of a step's processor time by kinds of torch's operations, the largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    times: dict[str, float] = {}
    for event in found.key_averages():
        kind = next((kind for kind, names in _KINDS.items() if event.key.startswith(names)), "all else")
        times[kind] = times.get(kind, 0.0) + event.self_cpu_time_total
    whole = sum(times.values())
    return [[kind, f"{time / whole:.0%}"] for kind, time in sorted(times.items(), key=lambda item: -item[1])]


def step_lines(taken: Mapping[str, list[Taken]], tokens: int) -> Iterator[list[str]]:
    """Yield the rows of a table of steps."""
    for name, times in taken.items():
        middle = statistics.median(step.wall for step in times)
        used = statistics.median(step.processor for step in times)
        ratios = [f"{ratio(taken[other], times, clock):.2f}" for other in COMPARED for clock in Taken._fields]
        yield [name, f"{middle:.2f}", f"{used:.2f}", f"{tokens / middle:.0f}", *ratios]


def sized(taken: Mapping[tuple[int, int], Mapping[str, list[Taken]]]) -> Iterator[str]:
    """Yield a section for each size of a step."""
    clocks = [cell for other in COMPARED.values() for cell in (f"over {other}", "by processor")]
    for (sequences, length), times in taken.items():
        yield f"## Steps of {sequences} x {length} tokens"
        lines = list(step_lines(times, sequences * length))
        yield report.table(["step", "seconds", "processor seconds", "tokens/s", *clocks], lines)


def size_of(text: str) -> tuple[int, int]:
    """Return the number of sequences and their length, from a text like "4x256"."""
    sequences, length = text.split("x")
    return int(sequences), int(length)


def main() -> None:
    """Time every arm in turn, measure the memory of the losses, and write the report."""
    parser = parser_of(__doc__)
    parser.add_argument("--teacher", default="smollm2", help="a reference, as `search` takes it")
    parser.add_argument("--rounds", type=int, default=3, help="in which each arm takes a step")
    parser.add_argument(
        "--steps",
        type=size_of,
        nargs="+",
        default=[(4, 256), (1, 256), (1, 1024)],
        metavar="NxLENGTH",
        help="sequences of a step, and their tokens",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="beside those compared with")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder of prepared teachers")
    arguments = parse(parser, rounds=1, steps=[(1, 256)], arms=["top-64"])
    vocabularies = VOCABULARIES
    if arguments.smoke:
        arguments.teacher, arguments.cache, vocabularies = tiny_teacher(), cache_folder(), (4096,)
    torch.set_num_threads(arguments.threads)
    sizes = arguments.steps
    first = f"{sizes[0][0]} x {sizes[0][1]}"
    rows = sizes[0][0] * (sizes[0][1] - 1)
    # The first run allocates the memory that stays with the process.
    list(memory_lines(rows, vocabularies))
    memory = list(memory_lines(rows, vocabularies))
    print(report.table(["vocabulary", "logits", "ours..."], memory), file=sys.stderr)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        shops = {
            length: workshop(
                arguments.teacher,
                arguments.cache,
                length,
                max(count for count, of in sizes if of == length) * length,
                Path(folder) / str(length),
            )
            for _, length in sizes
        }
        shop = shops[sizes[0][1]]
        reading = list(cache_lines(shop.cache, shop.folder, sizes[0][1]))
        taken: dict[tuple[int, int], dict[str, list[Taken]]] = {}
        for count, length in sizes:
            runs = arms(shops[length], length, count * length, arguments.threads, arguments.arms)
            taken[count, length] = timed(runs, arguments.rounds)
            if (count, length) == sizes[0]:
                with FlopCounterMode(display=False) as counter:
                    runs[BASE]()
                spent = spent_on(runs[BASE])
            del runs
            gc.collect()
    report.note("seconds", taken)
    report.note("shares of a step", spent)
    rate, flops = matrix_rate(), counter.get_total_flops()
    report.note("operations, and matrix rate", [flops, rate])
    floor, base = flops / rate, statistics.median(step.processor for step in taken[sizes[0]][BASE])
    sections = [
        f"Teacher {shop.teacher.name} of {shop.layers} layers, student of {len(shop.kept)}, embedding table frozen, "
        f"bfloat16 autocast, {arguments.threads} thread(s), {arguments.rounds} "
        "rounds by turns after one that is not counted; load average of the last five minutes "
        f"{os.getloadavg()[1]:.1f} on {os.cpu_count()} cores.",
        *sized(taken),
        "## The floor",
        f"{flops / 1e9:.0f} GFLOP in a cross-entropy step of {first} over {rate / 1e9:.0f} GFLOP/s in "
        f"bfloat16 products of a layer's size is {floor:.2f} s, {floor / base:.0%} of the processor time measured. By "
        "torch's profiler the time of such a step goes to:",
        report.table(["operations", "share"], spent),
        "## Peak memory of loss and gradient",
        f"Beyond the student's logits, {rows} rows in bfloat16; that of TRL's experimental GKD includes the teacher's "
        "logits; that of its DistillationTrainer, to which no logits are given, their chunks and the head's gradient.",
        report.table(
            ["vocabulary", "logits", "cross-entropy", "top-64", "states, JSD", "TRL's GKD", "TRL's chunked"], memory
        ),
        "## Cache",
        "Bytes a token at one temperature, and tokens a second read from the page cache into tensors.",
        report.table(["signal", "bytes/token", "tokens/s", "rate"], reading),
    ]
    print(report.write("distill-step", "One step of distillation", sections))


if __name__ == "__main__":
    main()
