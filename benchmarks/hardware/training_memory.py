"""The memory of training a 1.5B student of a 7.6B teacher in 24 GB, by parts, and such parts against measured peaks.

    python -m benchmarks.hardware.training_memory [--modes "4, on a grid"]

The arithmetic is that of a search's plan (`autodistill.estimates.training_fit`). Its parts are compared with the peak
of resident memory in real training steps of a smaller student. Each is measured in a process of its own, on the CPU.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from autodistill.estimates.teacher_fit import fit_teacher
from autodistill.estimates.training_fit import Training, training_fits
from autodistill.estimates.training_memory import TrainingEstimate, training_memory
from autodistill.hardware.machine import Gpu, Machine
from autodistill.models.config import spec_from_config
from autodistill.models.model_folder import HeldType
from autodistill.models.spec import ModelSpec
from autodistill.strategy.recipe import Distillation, Lora
from autodistill.strategy.strategy import Finishing, Init, Strategy
from autodistill.units import format_bytes
from benchmarks.common import program, report
from benchmarks.common.plans import straight_plan

LIMIT = 24 * 10**9
LENGTH = 256
STUDENT = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
"""The part of Qwen2.5-1.5B's config on which memory depends."""
TEACHER = STUDENT | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
"""The same part of Qwen2.5-7B's config."""
MEASURED = STUDENT | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
}
SMALL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 2000}
LORA = Lora(rank=16)
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""With these settings of glibc, every larger block goes back to the system when it is freed."""
PARTS = tuple(field.name for field in fields(TrainingEstimate) if field.name.endswith("_bytes"))


@dataclass(frozen=True)
class Mode:
    """One way to compute a step, with the arguments of `training_memory`."""

    micro_batch: int = 4
    checkpointing: bool = False
    optimizer_state: Any = "float32"
    lora: Lora | None = None
    train_embeddings: bool = False
    bf16: bool = False
    on_grid: bool = False

    def estimate(self, spec: ModelSpec) -> TrainingEstimate:
        """Return the predicted memory."""
        return training_memory(
            spec,
            tokens=self.micro_batch * LENGTH,
            checkpointing=self.checkpointing,
            optimizer_state=self.optimizer_state,
            lora=self.lora,
            train_embeddings=self.train_embeddings,
            bf16=self.bf16,
            on_grid=self.on_grid,
            passes=4 // self.micro_batch,
        )


MODES = {
    "4 sequences at once": Mode(),
    "embeddings trained": Mode(train_embeddings=True),
    "1 sequence at once": Mode(micro_batch=1),
    "4, checkpointing": Mode(checkpointing=True),
    "4, 16-bit states": Mode(optimizer_state="bfloat16"),
    "4, 8-bit states": Mode(optimizer_state="int8"),
    "4, low-rank changes": Mode(lora=LORA),
    "4, on a grid": Mode(on_grid=True),
    "1, on a grid": Mode(micro_batch=1, on_grid=True),
    "4, bfloat16": Mode(bf16=True),
    "1, bfloat16": Mode(micro_batch=1, bf16=True),
    "4, bfloat16, embeddings trained": Mode(bf16=True, train_embeddings=True),
    "4, bfloat16, checkpointing": Mode(bf16=True, checkpointing=True),
    "4, bfloat16, low-rank changes": Mode(bf16=True, lora=LORA),
    "4, bfloat16, on a grid": Mode(bf16=True, on_grid=True),
    "1, bfloat16, on a grid": Mode(micro_batch=1, bf16=True, on_grid=True),
}


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(mode: Mode, device: str = "cpu") -> dict[str, int]:
    """Train a new model of `MEASURED`, and return the memory before it was made, the peak, and the prediction.

    A tiny model is trained first. It loads what libraries load at their first use, which belongs to the process and not
    to the training. On a GPU, the peak is the memory that torch's allocator had given out.
    """
    tiny = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 1000}
    train(mode, MEASURED | tiny, device)
    if device == "cpu":
        before = peak_bytes()
        train(mode, MEASURED)
        peak = peak_bytes()
    else:
        import torch

        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(mode, MEASURED, device)
        peak = torch.cuda.max_memory_allocated()
    estimate = mode.estimate(spec_from_config(MEASURED))
    predicted = estimate.total_bytes - estimate.overhead_bytes
    return {"before": before, "peak": peak, "grown": peak - before, "predicted": predicted}


def train(mode: Mode, config: dict[str, Any], device: str = "cpu") -> None:
    """Train a few steps of a model of this config."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from autodistill.data.dataset import TokenSet
    from autodistill.distillation.teacher.teaching import Teaching
    from autodistill.distillation.training.trainer import Trainer

    torch.set_num_threads(1)
    plan = straight_plan(
        12 * LENGTH,
        sequence_length=LENGTH,
        batch_tokens=4 * LENGTH,
        bf16=mode.bf16,
        micro_batch=mode.micro_batch,
        checkpointing=mode.checkpointing,
        optimizer_state=mode.optimizer_state,
    )
    tokens = np.random.default_rng(0).integers(0, config["vocab_size"], (12, LENGTH)).astype(np.int32)
    data = TokenSet(tokens=tokens, documents=np.zeros_like(tokens))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    recipe = Distillation(divergence_weight=0.0, train_embeddings=mode.train_embeddings, lora=mode.lora)
    trainer = Trainer(
        model.to(device),
        device=device,
        teaching=Teaching(
            kept_layers=tuple(range(model.config.num_hidden_layers)),
            layers=model.config.num_hidden_layers,
            width=model.config.hidden_size,
        ),
        strategy=Strategy(init=Init(depth=1.0), distillation=recipe),
        plan=plan,
        data=data,
        seed=0,
    )
    if not mode.on_grid:
        list(trainer.train_stable(plan.tokens))
        return
    finishing = Finishing(format="gguf-q4_0", bits=4, group_size=32)
    grids = finishing.grids_of(spec_from_config(model.config.to_dict()).tensors)
    list(trainer.train_decay(plan.tokens, grids.get, learned=True))


def parts(estimate: TrainingEstimate, held: Sequence[str] = PARTS) -> list[str]:
    """Return the parts of an estimate as cells."""
    return [format_bytes(getattr(estimate, name)) for name in held]


def ladder(sequences: int) -> Iterator[list[str]]:
    """Yield the ways to train the 1.5B student on a GPU in steps of this many sequences, and mark the one taken."""
    spec = spec_from_config(STUDENT)
    for title, lora, table in (
        ("all weights", None, True),
        ("table frozen", None, False),
        ("LoRA, rank 16", LORA, False),
    ):
        taken = False
        training = Training(
            spec=spec,
            sequence_length=LENGTH,
            sequences=sequences,
            lora=lora,
            train_embeddings=table,
            bf16=True,
            on_grid=True,
            device="cuda",
        )
        for way in training_fits(training):
            safe, fits = way.safe_bytes("cuda") <= LIMIT, way.total_bytes <= LIMIT
            means = f"{way.micro_batch}" + (", checkpointing" if way.checkpointing else "")
            means += {"float32": "", "bfloat16": ", 16-bit states", "int8": ", 8-bit states"}[way.optimizer_state]
            verdict = "fits" if safe else "barely" if fits else "no"
            if safe and not taken:
                verdict, taken = "taken", True
            total, judged = format_bytes(way.estimate.total_bytes), format_bytes(way.evaluation_bytes)
            yield [title, means, *parts(way.estimate), total, judged, verdict]


def teacher_lines() -> Iterator[list[str]]:
    """Yield how some machines hold the 7.6B teacher, by the type of its files."""
    spec = spec_from_config(TEACHER)
    gpu = (Gpu(name="", memory_bytes=LIMIT),)
    machines = {
        "24 GB, no GPU, 2 cores": Machine(cpus=2, memory_bytes=LIMIT),
        "64 GB with a GPU of 24 GB": Machine(cpus=16, memory_bytes=64 * 10**9, gpus=gpu),
        "96 GB, no GPU, 16 cores": Machine(cpus=16, memory_bytes=96 * 10**9),
    }
    stored_types: tuple[HeldType, ...] = ("bfloat16", "float32")
    for title, machine in machines.items():
        for stored in stored_types:
            fit = fit_teacher(spec, stored=stored, sequence_length=LENGTH, machine=machine)
            numbers = [format_bytes(count) for count in (fit.weights_bytes, fit.pass_bytes, fit.total_bytes)]
            yield [title, stored, fit.held_type, "yes" if fit.rounded else "no", *numbers]


def growth(name: str, environment: dict[str, str], more: Sequence[str]) -> int:
    """Return the growth of the peak of a process that trains in one of the `MODES`."""
    command = [sys.executable, "-m", "benchmarks.hardware.training_memory", "--measure", name, *more]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=program.ROOT, env=os.environ | environment
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return int(found["peak"] - found["before"])


def measured_lines(modes: Sequence[str], more: Sequence[str]) -> Iterator[list[str]]:
    """Yield the rows of measured modes."""
    spec = spec_from_config(MEASURED)
    own = [name for name in PARTS if name not in ("overhead_bytes", "alignment_bytes")]
    for name, mode in ((name, MODES[name]) for name in modes):
        estimate = mode.estimate(spec)
        predicted = estimate.total_bytes - estimate.overhead_bytes
        line = [name, *parts(estimate, own), format_bytes(predicted)]
        for setting in (GIVING_BACK, {}):
            grown = growth(name, setting, more)
            report.note(name, {"predicted": predicted, "grown": grown, "environment": setting})
            line += [format_bytes(grown), f"{predicted / grown:.2f}"]
        print(*line, sep=" | ", flush=True)
        yield line


def main() -> None:
    """Measure the peaks of training steps, and write the report with the parts of the large one."""
    parser = program.parser_of(__doc__)
    parser.add_argument("--measure", choices=list(MODES), help="one measurement, for a process of its own")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of that one measurement")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=list(MODES), help="ways to train that are measured"
    )
    given = program.parse(parser, modes=["4 sequences at once"])
    if given.smoke:
        MEASURED.update(SMALL)
    if given.measure:
        print(json.dumps(measure(MODES[given.measure], given.device)))
        return
    names = [name.removesuffix("_bytes") for name in PARTS]
    student, teacher, small = (spec_from_config(config) for config in (STUDENT, TEACHER, MEASURED))
    sections = [
        f"## The teacher\n\n{teacher.parameters:,} weights, beside no student: its outputs are cached first.\n\n"
        + report.table(
            ["machine", "files", "held", "rounded", "weights", "passes and process", "total"], teacher_lines()
        ),
        f"## The student\n\n{student.parameters:,} weights, steps of 4 sequences of {LENGTH} tokens, products in "
        "bfloat16, as on a GPU, the last of them on a grid; from the fastest way to the smallest, and the first that "
        f"fits {format_bytes(LIMIT)} with 10% of the training to spare, as more than was predicted was held at the "
        "most below, is taken; what fits without is told as barely. Of a step of one pass the larger counts of "
        "gradients and what is kept for them. The evaluation comes after the training, in its place.\n\n"
        + report.table(["trained", "sequences at once", *names, "total", "evaluation", "verdict"], ladder(4)),
        "A teacher that is run in the trial (`online`) lies beside the student in bfloat16: "
        f"{format_bytes(2 * teacher.parameters)}, which leaves {format_bytes(LIMIT - 2 * teacher.parameters)}.",
        f"## Measured\n\nA student of {small.parameters:,} weights ({small.layers} layers, width {small.width}, "
        f"vocabulary {small.vocabulary:,}), three steps on one core by cross-entropy, in float32 where nothing else is "
        "said; the grid is that of Q4_0, with learned scales. Growth is the peak of resident memory less that before "
        "the model was made: with every freed block given back (MALLOC_MMAP_THRESHOLD_=65536), which is what tensors "
        "hold, and as glibc keeps freed blocks. A ratio above 1 is a prediction on the safe side.\n\n"
        + report.table(
            [
                "step",
                *(name for name in names if name not in ("overhead", "alignment")),
                "predicted",
                "held",
                "ratio",
                "with what glibc keeps",
                "ratio",
            ],
            measured_lines(given.modes, ["--smoke"] if given.smoke else []),
        ),
    ]
    print(report.write("training-memory", "Memory of training, by parts", sections))


if __name__ == "__main__":
    main()
