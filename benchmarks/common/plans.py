"""Plans with one trial that is trained straight to its end, for programs that train without a search."""

from __future__ import annotations

from typing import Any

from autodistill.distillation.training.plan import Plan


def straight_plan(tokens: int, *, sequence_length: int, batch_tokens: int, **fields: Any) -> Plan:
    """Return a plan of this many training tokens on one thread. The decay takes the last fifth.

    Args:
        tokens: Training tokens of the trial.
        sequence_length: Tokens of a sequence, and of each evaluation.
        batch_tokens: Tokens of an optimiser step.
        fields: Other fields of the plan.
    """
    given: dict[str, Any] = {"trials": 1, "rungs": (tokens,), "keep": (), "warmup_tokens": 0, "decay": 0.2}
    given |= {"rung_eval_tokens": sequence_length, "eval_tokens": sequence_length, "test_tokens": sequence_length}
    given |= {"workers": 1, "threads": 1, "bf16": False, "seed": 0, "box_seconds": None, "seconds": {}}
    given |= {"tokens": tokens, "sequence_length": sequence_length, "batch_tokens": batch_tokens}
    return Plan(**(given | fields))
