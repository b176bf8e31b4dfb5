"""The precision in which models are scored: float32, or TF32 or bfloat16 on devices that are faster with them."""

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
    """Refuse a precision that a machine does not compute in hardware.

    Args:
        scoring: The requested precision.
        machines: The machines that score models.

    Raises:
        InputError: A machine only emulates the precision, or does not know it.
    """
    if scoring != "float32" and not all(getattr(one, scoring) for one in machines):
        raise _refused(scoring)


def check_scoring_on(scoring: Scoring, device: str) -> None:
    """Refuse a precision that a device of this machine, "cpu" or "cuda", does not compute in hardware."""
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
    """Within the context, compute the matrix products of a model's body in a precision.

    Its last states, its head and sums stay in float32. The weights are not changed but rounded in each pass, so that
    weights may be replaced between two passes. With bfloat16 the products of the backward pass use it too, with TF32
    only those of the forward pass.

    Args:
        model: A causal language model of transformers, in float32 on `device`.
        scoring: The precision; "float32" changes nothing.
        device: Device of the model.
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
    """Within the context, multiply float32 tensors on a device in a precision."""
    if scoring == "float32":
        yield
        return
    if scoring == "bf16":
        # This is entered anew in each pass, since autocast keeps the rounded weights until its end.
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
