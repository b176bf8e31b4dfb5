"""The precision in which models are scored: float32, or on devices that multiply them faster TF32 or bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from autodistill.errors import InputError
from autodistill.evaluation.base import Scoring
from autodistill.hardware.machine import Machine, computes_bf16, computes_tf32


def check_scoring(scoring: Scoring, machines: Sequence[Machine]) -> None:
    """Refuse a precision that a machine does not multiply in.

    Args:
        scoring: What is asked for.
        machines: On which models are scored.

    Raises:
        InputError: One of them only emulates it, or does not know it.
    """
    if scoring != "float32" and not all(getattr(one, scoring) for one in machines):
        raise _refused(scoring)


def check_scoring_on(scoring: Scoring, device: str) -> None:
    """The same of a device of this machine, "cpu" or "cuda"."""
    if scoring != "float32" and not {"tf32": computes_tf32, "bf16": computes_bf16}[scoring](device):
        raise _refused(scoring)


def _refused(scoring: Scoring) -> InputError:
    lacks = {
        "tf32": "TF32 is of NVIDIA's GPUs from Ampere on, and what scores here is none",
        "bf16": "what scores here only emulates bfloat16, which takes longer than float32",
    }
    return InputError(f"--scoring {scoring}: {lacks[scoring]}; leave it out")


@contextmanager
def scored_in(model: Any, scoring: Scoring, device: str) -> Iterator[None]:
    """Within the context a model's body multiplies in a precision; its last states, its head and sums are float32.

    The weights stay as they are held, and are rounded in each pass: what is put into the model between two of them
    counts. In bfloat16 gradients are multiplied in it too, in TF32 only what goes forward.

    Args:
        model: A causal language model of transformers, in float32 on `device`.
        scoring: The precision; "float32" changes nothing.
        device: Where the model lies.
    """
    if scoring == "float32":
        yield
        return
    body = model.base_model
    own, replaced = body.forward, "forward" in vars(body)

    @wraps(own)
    def forward(*arguments: Any, **named: Any) -> Any:
        with multiplying_in(scoring, device):
            found = own(*arguments, **named)
        found.last_hidden_state = found.last_hidden_state.float()
        return found

    body.forward = forward
    try:
        yield
    finally:
        if replaced:
            body.forward = own
        else:
            del body.forward


@contextmanager
def multiplying_in(scoring: Scoring, device: str) -> Iterator[None]:
    """Within the context a device multiplies float32 tensors in a precision."""
    if scoring == "float32":
        yield
        return
    if scoring == "bf16":
        # Entered anew in each pass, since autocast keeps the rounded weights as long as it lasts.
        with torch.autocast(device, dtype=torch.bfloat16):
            yield
        return
    products = torch.backends.cuda.matmul
    before = products.allow_tf32
    products.allow_tf32 = True
    try:
        yield
    finally:
        products.allow_tf32 = before
