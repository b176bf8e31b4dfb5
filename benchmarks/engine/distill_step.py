"""One step of distillation: tokens a second by what the teacher supplies, its floor, and the memory of the loss.

    python -m benchmarks.engine.distill_step [--teacher smollm2] [--rounds 3] [--steps 4x256 1x1024] [--arms top-64]

Every arm trains the same 15-layer student by turns, so that what else the machine does falls on all of them alike; a
figure is the median of the arm's steps, and its ratio is taken within the round. Steps of several sizes follow each
other; the memory of the loss and the floor are those of the first. Ratios of processor time stand beside
those of wall-clock time: where other processes share the cores, they are the steadier ones. "Cross-entropy" is this
project's own; the plain one is what transformers computes where a model is given labels. TRL has two losses for
generalised JSD with the teacher run in each step, and both are timed: that of its experimental GKD, on all logits at
once, and that of its stable DistillationTrainer, which makes a chunk of logits at a time.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from autodistill.data.dataset import TokenSet, load_split
from autodistill.data.documents import resolve_data
from autodistill.data.prepare import prepare
from autodistill.distillation.losses.divergence import divergence_of
from autodistill.distillation.losses.logits import logit_loss
from autodistill.distillation.losses.targets import FullTarget, TopTarget
from autodistill.distillation.student.build import build_student
from autodistill.distillation.teacher.build_cache import ensure_cache
from autodistill.distillation.teacher.output_cache import CacheSettings, TeacherCache
from autodistill.distillation.teacher.resolve import Teacher, materialize, resolve_teacher
from autodistill.distillation.teacher.target_sources import LiveTeacher
from autodistill.distillation.training.trainer import Trainer
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.loading import decoder_layers, load_model
from autodistill.models.model_folder import tokenizer_fingerprint
from autodistill.options import cache_folder
from autodistill.quantization.formats import get_format
from autodistill.strategy.recipe import Alignment, Distillation
from autodistill.strategy.strategy import Init, Strategy
from benchmarks.common import report
from benchmarks.common.plans import straight_plan
from benchmarks.common.program import parse, parser_of, tiny_teacher

DRAWS = 50
# Of SmolLM2 and of Qwen2.5, whose losses' memory is measured.
VOCABULARIES: tuple[int, ...] = (49152, 151936)
BASE, QAT = "cross-entropy", "top-64, on the grid of Q8_0"
PLAIN = "transformers' cross-entropy"
EXPERIMENTAL = "TRL's experimental GKD, JSD of all logits, teacher live"
STABLE = "TRL's DistillationTrainer, JSD by chunks, teacher live"
COMPARED = {BASE: "cross-entropy", PLAIN: "transformers' own", EXPERIMENTAL: "TRL's GKD", STABLE: "TRL's chunked"}
FULL = {"signal": "states", "signal_tokens": 0}
ARMS = {
    BASE: Distillation(divergence_weight=0.0),
    "top-64": Distillation(),
    f"sampled, {DRAWS} draws": Distillation(signal="sampled", signal_tokens=DRAWS),
    "states": Distillation(**FULL),
    "states, JSD": Distillation(divergence="jsd", mixture=0.5, **FULL),
    "online": Distillation(signal="online", signal_tokens=0),
    "top-64, the uncertain fifth": Distillation(positions="uncertain", uncertain_share=0.2),
    "top-64, 4 layers aligned": Distillation(alignment=Alignment(layers="even", count=4, projection="linear")),
    QAT: Distillation(),
}


def plain_step(student: Any, optimizer: Any, ids: Tensor) -> None:
    """Do one step of plain fine-tuning."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = student(input_ids=ids, labels=ids, use_cache=False).loss
    descend(student, optimizer, loss)


def experimental_step(student: Any, teacher: Any, optimizer: Any, ids: Tensor, beta: float = 0.5) -> None:
    """A training step on the generalised JSD of arXiv 2306.13649 as TRL's experimental GKD computes it."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = student(input_ids=ids, use_cache=False).logits[:, :-1]
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
    descend(student, optimizer, experimental_loss(logits, wanted, beta))


def stable_step(student: Any, teacher: Any, optimizer: Any, ids: Tensor, beta: float = 0.5) -> None:
    """A training step on the same divergence as TRL's DistillationTrainer computes it: no logits are ever whole."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = student.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        with torch.no_grad():
            wanted = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        loss = stable_loss(states, student.lm_head.weight, wanted, teacher.lm_head.weight, beta)
    descend(student, optimizer, loss)


def descend(student: Any, optimizer: Any, loss: Tensor) -> None:
    """The rest of a step, as anybody's trainer has it."""
    loss.backward()
    nn.utils.clip_grad_norm_([p for p in student.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def experimental_loss(logits: Tensor, wanted: Tensor, beta: float) -> Tensor:
    """The experimental GKD's function on float32 logits, as that trainer has them: a mean over tokens."""
    from trl.experimental.gkd import GKDTrainer

    tokens = logits[..., 0].numel()
    loss: Tensor = GKDTrainer.generalized_jsd_loss(logits.float(), wanted.float(), beta=beta, num_items_in_batch=tokens)
    return loss


def stable_loss(states: Tensor, head: Tensor, wanted: Tensor, wanted_head: Tensor, beta: float) -> Tensor:
    """The DistillationTrainer's function on last states and heads: a mean over tokens.

    Its kernel computes in the states' type, to which the trainer's heads are cast.
    """
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    everywhere = torch.ones(states.shape[:-1], dtype=torch.int64)
    loss: Tensor = _chunked_divergence_loss(
        states, wanted.to(states.dtype), head.to(states.dtype), wanted_head.to(states.dtype), everywhere, beta
    )[0]
    return loss


class Taken(NamedTuple):
    """Seconds of one step: on the wall's clock, and of the processor."""

    wall: float
    processor: float


def seconds(work: Callable[[], Any]) -> Taken:
    """Return the wall-clock and processor seconds of some work."""
    began = Taken(time.perf_counter(), time.process_time())
    work()
    return Taken(time.perf_counter() - began.wall, time.process_time() - began.processor)


def ratio(others: list[Taken], own: list[Taken], clock: str) -> float:
    """How many times faster, the median over the rounds."""
    pairs = zip(others, own, strict=True)
    return statistics.median(getattr(other, clock) / getattr(mine, clock) for other, mine in pairs)


def q8_0(model: Any) -> Callable[[str], Any]:
    """The grid of each linear layer and of the embedding table."""
    packing = get_format("gguf-q8_0")
    grids = {name: packing.linears[0] for name, p in model.named_parameters() if name.endswith("proj.weight")}
    return (grids | {"model.embed_tokens.weight": packing.tables}).get


def quantized_seconds(trainer: Trainer, grids: Callable[[str], Any], tokens: int) -> Taken:
    """Of one step on a grid; one before it prepares the head, once a stretch as in a search."""
    steps = trainer.train_decay(trainer.tokens + 2 * tokens, grids)
    next(steps)
    taken = seconds(lambda: next(steps))
    steps.close()
    return taken


def peak_bytes(work: Callable[[], Any]) -> int:
    """Memory that a call takes at its peak beyond what the process holds (Linux)."""
    gc.collect()
    # What was freed and is still held would be taken again without being seen.
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
    """Peak memory of loss and gradient, beyond the student's logits in bfloat16, by vocabulary."""
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
    """Floating-point operations a second of a bfloat16 product the size of a layer's."""
    a, b = torch.randn(1024, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    functional.linear(a, b)
    times = [seconds(lambda: [functional.linear(a, b) for _ in range(50)]) for _ in range(5)]
    return 50 * 2 * 1024 * 576 * 1536 / min(taken.processor for taken in times)


def cache_lines(cache: TeacherCache, folder: Path, length: int) -> Iterator[list[str]]:
    """Bytes a token as they lie on disk, and tokens a second that are read."""
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


@dataclass(frozen=True)
class Workshop:
    """Teacher, student, data and cache that all arms share.

    Attributes:
        teacher: On disk.
        layers, kept: Of the teacher, and those of them that the student has.
        model: The student; all arms train this one.
        data, cache, folder: Sequences, the teacher's outputs for them and where these lie.
    """

    teacher: Teacher
    layers: int
    kept: tuple[int, ...]
    model: Any
    data: TokenSet
    cache: TeacherCache
    folder: Path


def workshop(reference: str, root: Path, length: int, tokens: int, folder: Path) -> Workshop:
    """Builds the student and caches everything that any arm reads."""
    teacher = materialize(resolve_teacher(reference), root)
    source, fingerprint = resolve_data("pydoc"), tokenizer_fingerprint(teacher.folder)
    prepared = prepare(source, teacher.folder, fingerprint, length, root)
    data = load_split(prepared.folder, "train").head(2 * tokens)
    model, kept = build_student(teacher.folder, Init(depth=0.5))
    layers = len(decoder_layers(load_model(teacher.folder, torch.float32)))
    cached = ensure_cache(
        lambda: load_model(teacher.folder, torch.float32),
        teacher_fingerprint=teacher.fingerprint,
        data_fingerprint="distill-step",
        data=data,
        vocabulary=model.config.vocab_size,
        width=model.config.hidden_size,
        settings=CacheSettings(draws=(DRAWS,), temperatures=(1.0,), final=True, states=tuple(range(layers)), bf16=True),
        root=folder,
        limit_bytes=10**9,
    )
    return Workshop(teacher, layers, kept, model, data, TeacherCache(cached), cached)


def arms(
    shop: Workshop, length: int, tokens: int, threads: int, wanted: Sequence[str]
) -> dict[str, Callable[[], Taken]]:
    """Return the steps that are compared, by name; each does one and says what it took."""
    plan = straight_plan(10**9, sequence_length=length, batch_tokens=tokens, decay=0.25, threads=threads, bf16=True)
    live = LiveTeacher(shop.teacher.folder, bf16=True)
    trainers = {
        name: Trainer(
            shop.model, kept=shop.kept, teacher_layers=shop.layers, teacher_width=shop.model.config.hidden_size,
            strategy=Strategy(init=Init(depth=0.5), distillation=recipe), plan=plan, data=shop.data,
            cache=shop.cache, seed=0, teacher=live,
        )
        for name, recipe in ARMS.items()
        if name == BASE or name in wanted
    }  # fmt: skip
    # One state of AdamW is enough for all that train the same parameters, and keeps the memory of ten arms small.
    optimizer = trainers[BASE].optimizer
    for name, trainer in trainers.items():
        if ARMS[name].alignment is None:
            trainer.optimizer = optimizer
    steps = {name: trainer.train_stable(10**9) for name, trainer in trainers.items()}
    grids = q8_0(shop.model)
    wanted = load_model(shop.teacher.folder, torch.bfloat16)
    ids = torch.from_numpy(np.array(shop.data.tokens[: tokens // length], dtype=np.int64))
    runs: dict[str, Callable[[], Taken]] = {
        name: lambda own=own: seconds(lambda: next(own)) for name, own in steps.items() if name != QAT
    }
    if QAT in trainers:
        runs[QAT] = lambda: quantized_seconds(trainers[QAT], grids, tokens)
    runs[PLAIN] = lambda: seconds(lambda: plain_step(shop.model, optimizer, ids))
    runs[EXPERIMENTAL] = lambda: seconds(lambda: experimental_step(shop.model, wanted, optimizer, ids))
    runs[STABLE] = lambda: seconds(lambda: stable_step(shop.model, wanted, optimizer, ids))
    return runs


def timed(runs: Mapping[str, Callable[[], Taken]], rounds: int) -> dict[str, list[Taken]]:
    """Every arm by turns, after one round that is not counted."""
    taken: dict[str, list[Taken]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            found = run()
            print(f"round {turn}: {name} {found.wall:.2f} s", file=sys.stderr, flush=True)
            if turn:
                taken[name].append(found)
    return taken


# Of torch's operations, by what a reader would call them; the first that a name begins with counts.
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
    """Where the processor time of a step goes, by kinds of torch's operations, the largest share first."""
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
    """ "4x256" to sequences and their length."""
    sequences, length = text.split("x")
    return int(sequences), int(length)


def main() -> None:
    """Time every arm by turns, measure the memory of the losses, and write the report."""
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
    # The first time takes what stays with the process.
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
