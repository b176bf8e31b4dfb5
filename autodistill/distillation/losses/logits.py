"""The logit loss: a divergence from the teacher mixed with cross-entropy, with its gradient in one pass over rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autodistill.distillation.losses.divergence import DivergenceAndSlope, forward_kl
from autodistill.distillation.losses.targets import Outputs, SampledTarget, Target, TopTarget, parts_of

# Logits per chunk. On a CPU they are 6 MB of float32, which stay in a core's share of the cache. Elsewhere they are 128
# MB, because each chunk has a fixed cost there.
_CPU_CHUNK, _CHUNK = 3 * 2**19, 2**25


class LogitLoss(NamedTuple):
    """Means over the predicted tokens. Only `total` has a gradient.

    A token without teacher outputs has no divergence and counts as 0. `heard` is the share of the other tokens.
    """

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    heard: Tensor


def logit_loss(
    logits: Tensor,
    labels: Tensor,
    target: Target | None,
    divergence_weight: float,
    divergence: DivergenceAndSlope = forward_kl,
    *,
    heard: int | None = None,
) -> LogitLoss:
    """Return weight * T^2 * divergence + (1 - weight) * cross-entropy, averaged over rows, or 0 without rows.

    For rows without outputs of the target, it is cross-entropy alone.

    T^2 keeps the gradient's size independent of T (Hinton et al., arXiv 1503.02531). With standardised logits (arXiv
    2403.01427), a row's temperature is T times the standard deviation of its logits, which also gets a gradient.

    The gradient is computed with the value, and overwrites the logits, in their type. So the only further memory is for
    a few rows.

    Args:
        logits: [n, vocab], the student's logits, which are overwritten.
        labels: int64 [n], the true next tokens.
        target: The teacher's outputs, or None if `divergence_weight` is 0.
        divergence_weight: Weight of the divergence, 0 to 1.
        divergence: The divergence from the teacher's distribution to the student's.
        heard: Number of rows, counted from the first, that the target covers. None for all.
    """
    if divergence_weight > 0 and target is None:
        raise ValueError("a divergence needs the teacher's outputs")
    heard = len(labels) if heard is None else heard
    return LogitLoss(*_LogitLoss.apply(logits, labels, target, heard, divergence_weight, divergence))


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        target: Target | None,
        heard: int,
        weight: float,
        divergence: DivergenceAndSlope,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return loss, divergence, cross-entropy and the share of rows with teacher outputs. Compute the gradient
        too."""
        rows = logits.shape[0]
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32
        # Each part of the logits is read before its gradient is written there, and nothing needs them afterwards.
        gradient = logits.detach()
        distance = torch.zeros((), dtype=work, device=logits.device)
        cross_entropy = torch.zeros((), dtype=work, device=logits.device)
        learnt = torch.zeros((), dtype=work, device=logits.device)
        told = torch.zeros((), dtype=work, device=logits.device)
        step = max(1, (_CPU_CHUNK if logits.device.type == "cpu" else _CHUNK) // logits.shape[1])
        used = target if weight > 0 and heard else None
        for part, outputs in _parts(used, heard if used else 0, rows, step):
            # A copy, shifted by the maximum, so that no exponential overflows at any temperature.
            shifted = logits[part] - logits[part].amax(dim=1, keepdim=True).to(work)
            label = labels[part, None]
            label_logit = shifted.gather(1, label)
            chunk_gradient: Tensor | None = None
            # Weight of cross-entropy: a number, or [rows, 1] if the target has no outputs for some of these rows.
            share: float | Tensor = 1 - weight if outputs else 1.0
            if outputs:
                told += len(label) if outputs.heard is None else outputs.heard.sum()
            if used and isinstance(outputs, TopTarget | SampledTarget) and used.temperature == 1:
                terms = _at_one(shifted, label, label_logit, outputs, divergence, weight, rows)
                value, gradient[part], surprise = terms
                distance += value
                cross_entropy += surprise
                learnt += (1 - weight) * surprise
                continue
            if used and outputs:
                value, chunk_gradient = _distance(shifted, used, outputs, divergence, weight / rows)
                distance += value
                if outputs.heard is not None:
                    share = 1 - weight * outputs.heard[:, None].to(work)
            # This is the last use of the copy, so its exponential overwrites it.
            exponential = shifted.exp_()
            total = exponential.sum(dim=1, keepdim=True)
            surprise = total.log() - label_logit
            cross_entropy += surprise.sum()
            learnt += (share * surprise).sum()
            if isinstance(share, Tensor) or share > 0:
                exponential *= share / rows / total
                exponential.scatter_add_(1, label, torch.zeros_like(label_logit).sub_(share / rows))
                chunk_gradient = exponential if chunk_gradient is None else chunk_gradient.add_(exponential)
            assert chunk_gradient is not None
            gradient[part] = chunk_gradient
        ctx.save_for_backward(gradient)
        distance /= max(rows, 1)
        cross_entropy /= max(rows, 1)
        told /= max(rows, 1)
        loss = weight * distance + learnt / max(rows, 1)
        ctx.mark_non_differentiable(distance, cross_entropy, told)
        return loss, distance, cross_entropy, told

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream[0].to(gradient.dtype)), None, None, None, None, None


def _parts(target: Target | None, heard: int, rows: int, step: int) -> Iterator[tuple[slice, Outputs | None]]:
    """Yield the rows in order, a few at a time: first those that the target covers, with outputs, then the others."""
    if target:
        yield from target.parts(step)
    for part in parts_of(rows - heard, step):
        yield slice(heard + part.start, heard + part.stop), None


def _at_one(
    shifted: Tensor,
    label: Tensor,
    label_logit: Tensor,
    outputs: TopTarget | SampledTarget,
    divergence: DivergenceAndSlope,
    weight: float,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence, the gradient of both terms, and the cross-entropy at temperature 1, summed over some rows.

    At this temperature both terms share exponentials and sums, so the divergence needs no pass over the vocabulary.
    """
    found = outputs.spread(shifted, divergence)
    share = (1 - weight) / rows
    gradient = shifted.mul_(found.factor * (weight / rows) + share / found.total)
    added = found.added * (weight / rows)
    if found.left_out is not None:
        added.add_(found.left_out, alpha=share)
    gradient.scatter_add_(1, found.ids, added)
    gradient.scatter_add_(1, label, torch.full_like(label_logit, -share))
    return found.value, gradient, (found.total.log() - label_logit).sum()


def _distance(
    shifted: Tensor, target: Target, outputs: Outputs, divergence: DivergenceAndSlope, factor: float
) -> tuple[Tensor, Tensor]:
    """Return T^2 * divergence summed over some rows, and `factor` times its gradient by their logits, [rows, vocab].

    With standardised logits, the divisor of a row is T s with s = std(row), and ds / dx_i = (x_i - mean) / ((V - 1) s).
    """
    t = target.temperature
    if not target.standardized:
        value, gradient = outputs.compare(shifted / t, divergence)
        return value * t * t, gradient.mul_(t * factor)
    deviation, mean = torch.std_mean(shifted, dim=1, keepdim=True)
    value, gradient = outputs.compare(shifted / (deviation * t), divergence)
    by_deviation = -(gradient * shifted).sum(dim=1, keepdim=True) / (deviation.square() * t)
    gradient /= deviation * t
    gradient += (shifted - mean).mul_(by_deviation / ((shifted.shape[1] - 1) * deviation))
    return value * t * t, gradient.mul_(t * t * factor)
