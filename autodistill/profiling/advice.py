"""Advice, in plain words, about the part of a step that takes longest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autodistill.profiling.trace import (
    ATTENTION,
    COPIES,
    ELEMENTWISE,
    INDEXING,
    LAUNCHING,
    LOSS,
    OPTIMIZER,
    PRODUCTS,
)

_NEAR = 2.0  # times the floor up to which a part counts as being as fast as it can be


def training_advice(document: Mapping[str, Any], *, step_tokens: int, sequence_length: int, bf16: bool) -> list[str]:
    """Return sentences about the largest part of a training step, and about waits for a GPU.

    Args:
        document: A profile: its parts by time, the largest first, with their floors.
        step_tokens, sequence_length: Tokens of a step, and of a sequence.
        bf16: Whether products are computed in bfloat16.
    """
    largest = document["parts"][0]
    part, share, floor = largest["part"], largest["share"], largest["floor_ms"]
    times = largest["ms"] / floor if floor else None
    more = f"a larger step (--step-tokens above {step_tokens:,}), if memory holds it"
    said = f"{part[0].upper()}{part[1:]} take" + ("s" if part in (ATTENTION, INDEXING, OPTIMIZER) else "")
    said += f" most: {share:.0%} of a step" + (f", {times:.1f} times their floor. " if times else ". ")
    if part == PRODUCTS and times is not None and times <= _NEAR:
        said += "They run nearly as fast as this machine multiplies, so only fewer operations are faster: a smaller "
        said += "student, or fewer tokens" + ("." if bf16 else ", or products in bfloat16 where the machine has them.")
    else:
        said += {
            PRODUCTS: f"They are far from what this machine multiplies: try {more}, and end what else uses its cores.",
            ATTENTION: f"It grows with the square of the length: try a --sequence-length below {sequence_length:,}.",
            OPTIMIZER: (
                f"This time is spent once a step, for any size of the step: try {more}, or low-rank changes "
                "(distillation.lora), which move fewer weights."
            ),
            LOSS: "It grows with the vocabulary: keep fewer of the teacher's tokens (distillation.signal_tokens), or "
            "train on the uncertain positions alone (distillation.positions).",
            COPIES: "They convert between types or layouts, and compute nothing: a strategy without low-rank changes "
            "has fewer.",
            INDEXING: "It looks up rows: freeze the table (distillation.train_embeddings: false), or keep fewer of the "
            "teacher's tokens.",
            ELEMENTWISE: f"They read and write memory, and compute little. Their time grows with the tokens of a pass: "
            f"a narrower student, or a --sequence-length below {sequence_length:,}, has less of them.",
            LAUNCHING: f"The device waits for this program: try {more}, so that each operation has more to do.",
        }[part]
    lines = [said]
    each = document["each_step"]
    waits = each["synchronizations"] if document["computes_on"].startswith("cuda") else each["read_back"]
    if document["computes_on"] != "cpu" and waits >= 1:
        lines.append(
            f"This program waits for the device {waits:.0f} times a step. The trace shows where: each is a gap in its "
            "row of kernels."
        )
    return lines


def serving_advice(parts: list[dict[str, Any]], *, on_cpu: bool) -> list[str]:
    """Return sentences about reading a prompt and about writing tokens, each compared with its floor.

    Args:
        parts: The parts of a profile: `part`, `ms` and `floor_ms` of both.
        on_cpu: Whether a CPU serves the model.
    """
    read, token = parts
    lines = []
    for one, near, far in (
        (
            token,
            "Each token reads all weights, and memory gives no more: store them in fewer bits (autodistill solve), or "
            "answer several streams at once, which share a reading.",
            "Memory would allow more, so the time goes into starting operations or unpacking: "
            + ("give it one thread for each free core, " if on_cpu else "serve several streams at once, ")
            + "or choose a type with faster kernels, such as Q4_0 or Q8_0.",
        ),
        (
            read,
            "The prompt is read nearly as fast as this machine multiplies: a shorter prompt, a cached beginning, or a "
            "smaller student is all that helps.",
            "The machine multiplies faster than that: longer prompts, or several at once, fill it better.",
        ),
    ):
        times = one["ms"] / one["floor_ms"]
        lines.append(f"{one['part']}: {times:.1f} times the floor. {near if times <= _NEAR else far}")
    return lines
