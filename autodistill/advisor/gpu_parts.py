"""Memory of each of several GPUs over which a model is divided, by part, compared with one GPU alone."""

from __future__ import annotations

from typing import Any

from autodistill.errors import InputError
from autodistill.estimates.divided import indivisible, part_bytes
from autodistill.estimates.serving_memory import TRAINING_PROCESS_BYTES
from autodistill.estimates.training_fit import pass_bytes
from autodistill.models.spec import ModelSpec


def running_parts(spec: ModelSpec, gpus: int, *, context: int, batch: int) -> dict[str, Any]:
    """Return the memory of each GPU when a model runs in 16 bits, with one process a GPU, as a search runs its teacher.

    Args:
        spec: The model.
        gpus: Number of GPUs over which heads, neurons and tokens of the table are divided.
        context: Tokens of each sequence.
        batch: Sequences at once.

    Returns:
        `count`, and the parts in bytes and their sum: under `alone` for one GPU, under `each` for each of them. If the
        model cannot be divided over so many, `each` is None and `not_divided` says why; else that is None.

    Raises:
        InputError: The number is less than 1.
    """
    if gpus < 1:
        raise InputError(f"--gpus must be at least 1, not {gpus}")
    reason = indivisible(spec, gpus) if gpus > 1 else ""

    def parts(count: int) -> dict[str, int]:
        """Return what one of `count` GPUs holds, by part, in bytes."""
        cached = 2 * 2 * spec.layers * spec.kv_heads * spec.head_dim * context * batch
        found = {
            "weights_bytes": part_bytes(spec, count, lambda tensor: 2 if len(tensor.shape) == 2 else 4),
            "kv_cache_bytes": cached // count,
            "pass_bytes": batch * (pass_bytes(spec, context, 1) - TRAINING_PROCESS_BYTES),
            "overhead_bytes": TRAINING_PROCESS_BYTES,
        }
        return found | {"total_bytes": sum(found.values())}

    each = None if reason else parts(gpus)
    return {"count": gpus, "alone": parts(1), "each": each, "not_divided": reason or None}
