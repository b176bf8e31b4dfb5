"""Memory of each of several GPUs over which a model is divided, by parts, beside that of one alone."""

from __future__ import annotations

from typing import Any

from autodistill.errors import InputError
from autodistill.estimates.divided import indivisible, part_bytes
from autodistill.estimates.serving_memory import TRAINING_PROCESS_BYTES
from autodistill.estimates.training_fit import pass_bytes
from autodistill.models.spec import ModelSpec


def running_parts(spec: ModelSpec, gpus: int, *, context: int, batch: int) -> dict[str, Any]:
    """Return what running a model in 16 bits takes of each GPU: one process each, as a teacher is divided.

    Args:
        spec: The model.
        gpus: Over how many it is divided: heads, neurons and tokens of its table.
        context: Tokens of each sequence.
        batch: Sequences at once.

    Returns:
        `count`, and under `alone` and `each` the parts in bytes and their sum, for one GPU and for each of them.

    Raises:
        InputError: No such number, or heads that it does not divide.
    """
    if gpus < 1:
        raise InputError(f"--gpus must be at least 1, not {gpus}")
    if gpus > 1 and (reason := indivisible(spec, gpus)):
        raise InputError(f"--gpus {gpus}: {reason}: give another number")

    def parts(count: int) -> dict[str, int]:
        """Return what one of `count` cards holds, by what it is, in bytes."""
        cached = 2 * 2 * spec.layers * spec.kv_heads * spec.head_dim * context * batch
        found = {
            "weights_bytes": part_bytes(spec, count, lambda tensor: 2 if len(tensor.shape) == 2 else 4),
            "kv_cache_bytes": cached // count,
            "pass_bytes": batch * (pass_bytes(spec, context, 1) - TRAINING_PROCESS_BYTES),
            "overhead_bytes": TRAINING_PROCESS_BYTES,
        }
        return found | {"total_bytes": sum(found.values())}

    return {"count": gpus, "alone": parts(1), "each": parts(gpus)}
