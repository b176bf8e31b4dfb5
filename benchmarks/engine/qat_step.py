"""What quantisation-aware training adds to a step: ratios within alternating rounds, for a student of a teacher.

    python -m benchmarks.engine.qat_step [--teacher smollm2] [--threads 1] [--rounds 5] [--batch 256 1024] [--bf16]
        [--scales absmax learned] [--eager | --before quantization.py]

The plain step is a cross-entropy step with the embedding frozen, the cheapest there is. In a step of several sequences,
each sequence has its own pass. So no share is larger than that of a step of one sequence. CPU time is compared, so
other work on the machine has little effect. `--eager` also takes each step operation by operation, as without numba.
`--before` names an earlier version of the module (`git show` of `autodistill/distillation/training/fake_quantize.py`).
Its steps alternate with those of the current one. Its imports are the current ones.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from autodistill.data.dataset import TokenSet
from autodistill.distillation.student.build import build_student
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.distillation.teacher.teaching import Teaching
from autodistill.distillation.training import fake_quantize as quantization
from autodistill.distillation.training import straight_through
from autodistill.distillation.training import trainer as training
from autodistill.distillation.training.trainer import Trainer
from autodistill.hardware.machine import detect
from autodistill.inference.torch_memory import keep_freed_memory
from autodistill.models.config import spec_from_config
from autodistill.options import cache_folder
from autodistill.quantization import rounding as grid_values
from autodistill.quantization.grids import Grid
from autodistill.strategy.recipe import Distillation
from autodistill.strategy.strategy import Finishing, Init, Strategy
from benchmarks.common import report
from benchmarks.common.plans import straight_plan
from benchmarks.common.program import parse, parser_of, tiny_teacher, token_count

LENGTH = 256
BEFORE, EAGER = ", before", ", operation by operation"
SCALES = ("absmax", "learned")
INIT = Init(depth=0.8)
INTEGERS = {"format": "compressed-tensors"}
FINISHINGS: dict[str, dict[str, Any]] = {
    "Q8_0": {"format": "gguf-q8_0", "bits": 8, "group_size": 32},
    "Q4_0": {"format": "gguf-q4_0", "bits": 4, "group_size": 32},
    "Q4_1 (minima)": {"format": "gguf-q4_1", "bits": 4, "group_size": 32, "symmetric": False},
    "IQ4_NL (searched)": {"format": "gguf-iq4_nl", "bits": 4, "group_size": 32},
    "Q3_K (searched)": {"format": "gguf-q3_k", "bits": 3, "group_size": 16},
    "int4, groups of 64": INTEGERS | {"bits": 4, "group_size": 64},
    "int4, groups of 64, zero points": INTEGERS | {"bits": 4, "group_size": 64, "symmetric": False},
    "int3, rows": INTEGERS | {"bits": 3, "group_size": 0},
}


def load_module(path: Path) -> ModuleType:
    """Load a module from its file."""
    spec = importlib.util.spec_from_file_location("quantization_before", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _none(*_: object) -> None:
    """Replaces the compiled loops, as on a machine without numba."""


def measure(
    folder: Path,
    batch: int,
    rounds: int,
    threads: int,
    bf16: bool,
    modules: dict[str, ModuleType],
    scales: Sequence[str],
    finishings: Mapping[str, Mapping[str, Any]] = FINISHINGS,
) -> dict[str, list[float]]:
    """Return CPU seconds of a step by variant, one figure for each round; "plain" is without a grid.

    Args:
        folder: The teacher's folder.
        batch: Tokens of a step.
        rounds: Number of rounds. In each, every variant takes a step that does not count, and then as many steps as
            searched scales are kept. Their mean counts.
        threads: Threads of torch.
        bf16: Whether the forward and backward pass compute in bfloat16.
        modules: Modules that quantise, by the text added to a variant's name. That of `EAGER` has no compiled loops.
        scales: "absmax", which follow from the weights, "learned", or both.
        finishings: The grids, by name.
    """
    model, kept = build_student(folder, INIT)
    spec = spec_from_config(model.config.to_dict())
    tokens = np.random.default_rng(0).integers(0, spec.vocabulary, (batch // LENGTH, LENGTH)).astype(np.int32)
    trainer = Trainer(
        model,
        teaching=Teaching(kept_layers=kept, layers=spec.layers, width=spec.width),
        strategy=Strategy(init=INIT, distillation=Distillation(divergence_weight=0.0, learning_rate=1e-5)),
        plan=straight_plan(10**9, sequence_length=LENGTH, batch_tokens=batch, threads=threads, bf16=bf16),
        data=TokenSet(tokens=tokens, documents=np.zeros_like(tokens)),
        # type: ignore[arg-type]  # cross-entropy needs no teacher
        seed=0,
    )
    variants: dict[str, tuple[Callable[[str], Grid | None] | None, bool, ModuleType]] = {
        "plain": (None, False, quantization)
    }
    for name, fields in finishings.items():
        grids = Finishing(**fields).grids_of(spec.tensors)
        # The scales of a codebook are not learned.
        for kind in [one for one in scales if one != "learned" or not any(grid.codebook for grid in grids.values())]:
            variants |= {f"{name}, {kind}{said}": (grids.get, kind == "learned", it) for said, it in modules.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    compiled = grid_values.loops
    list(trainer.train_stable(batch))
    for number in range(rounds):
        for name in sorted(variants, reverse=number % 2 == 1):
            storage_of, learned, module = variants[name]
            loops = _none if name.endswith(EAGER) else compiled
            grid_values.loops = straight_through.loops = loops  # type: ignore[assignment]
            training.quantized_training = module.quantized_training
            # Modules from before weights were kept between passes lack `one_step`.
            training.one_step = getattr(module, "one_step", lambda weights: nullcontext())
            counted = quantization.REFITTED
            records = trainer.train_decay(trainer.tokens + (1 + counted) * batch, storage_of, learned=learned)
            next(records)
            began = time.process_time()
            for _ in range(counted):
                next(records)
            seconds[name].append((time.process_time() - began) / counted)
            records.close()
    return seconds


def main() -> None:
    """Time steps with and without quantisation in turn, and write the report of the ratios."""
    parser = parser_of(__doc__)
    parser.add_argument("--teacher", default="smollm2", help="a reference, as `search` takes it")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=5, help="in which each variant takes a step")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--scales", nargs="+", choices=SCALES, default=SCALES, help="which of them are measured")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--eager", action="store_true", help="compare with steps without compiled loops")
    other.add_argument("--before", type=Path, help="the module as it was, to be compared with")
    parser.add_argument("--batch", type=token_count, nargs="+", default=[LENGTH, 4 * LENGTH], help="tokens of a step")
    arguments = parse(parser, rounds=1, scales=["learned"], batch=[LENGTH])
    if arguments.smoke:
        arguments.teacher = tiny_teacher()
    if arguments.bf16 and not detect().bf16:
        parser.error("this machine computes in bfloat16 more slowly than in float32: leave --bf16 out")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    teacher = materialize(resolve_teacher(arguments.teacher), cache_folder())
    modules, said = {"": quantization}, ""
    if arguments.eager:
        said, modules[EAGER] = EAGER, quantization
    if arguments.before:
        said, modules[BEFORE] = BEFORE, load_module(arguments.before)
    sections = []
    for batch in arguments.batch:
        seconds = measure(
            teacher.folder, batch, arguments.rounds, arguments.threads, arguments.bf16, modules, arguments.scales
        )
        report.note(f"CPU seconds, {batch} tokens a step", seconds)
        plain = seconds.pop("plain")
        lines = []
        for name, values in seconds.items():
            if said and name.endswith(said):
                continue
            row = [name]
            for taken in (values, seconds.get(name + said) if said else None):
                shares = [one / other - 1 for one, other in zip(taken or [], plain, strict=bool(taken))]
                if shares:
                    row += [f"{statistics.median(shares):+.1%}", f"{min(shares):+.1%} to {max(shares):+.1%}"]
            lines.append(row)
        sections += [
            f"## {batch} tokens a step\n\nThe plain step takes {statistics.median(plain):.3f} CPU seconds (median).",
            report.table(
                ["grid", "added, median", "range", *([f"{said[2:]}, median", "range"] if said else [])], lines
            ),
        ]
    precision = "bfloat16" if arguments.bf16 else "float32"
    head = (
        f"A student of 80% of the layers of {teacher.name}, {precision}, {arguments.threads} threads, "
        f"{arguments.rounds} rounds. Each round takes {1 + quantization.REFITTED} steps of every variant in turn, of "
        f"which the first does not count; each sequence of {LENGTH} tokens has a pass of its own."
    )
    print(report.write("qat-step", "What quantisation-aware training adds to a step", [head, *sections]))


if __name__ == "__main__":
    main()
