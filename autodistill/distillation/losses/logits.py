"""The logit loss: a divergence from the teacher, mixed with cross-entropy, value and gradient in one pass over rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autodistill.distillation.losses.divergence import DivergenceAndSlope, forward_kl
from autodistill.distillation.losses.targets import Outputs, SampledTarget, Target, TopTarget, parts_of

# Logits worked on at once: on a CPU 6 MB of float32, which stays in a core's share of the cache; elsewhere 128 MB, as
# there it is the number of steps that costs.
_CPU_CHUNK, _CHUNK = 3 * 2**19, 2**25


class LogitLoss(NamedTuple):
    """Means over the predicted tokens; only `total` carries a gradient.

    A token that nothing of the teacher is heard of has no divergence: it counts as 0, and `heard` is the share of the
    others.
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
    """weight * T^2 * divergence + (1 - weight) * cross-entropy, averaged over rows; 0 where there are none.

    Of rows that the target has no outputs for, it is cross-entropy alone.

    T^2 keeps the gradient's size independent of T (Hinton et al., arXiv 1503.02531). With standardised logits
    (arXiv 2403.01427) a row's temperature is T times the standard deviation of its logits, which is differentiated
    as well.

    The gradient is computed with the value, and takes the place of the logits, in their type: beside them there is
    working memory for a few rows and nothing of their size.

    Args:
        logits: [n, vocab], of the student; written over.
        labels: int64 [n], the true next tokens.
        target: Of the teacher, or None where `divergence_weight` is 0.
        divergence_weight: 0 to 1.
        divergence: From the teacher's distribution to the student's.
        heard: How many of the rows, from the first on, the target is of; None for all.
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
        """Loss, divergence, cross-entropy and share heard, and the gradient at once, rows at a time."""
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
            # Of cross-entropy: a number, or [rows, 1] where the target knows of some of these rows nothing.
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
            # At its last use the copy is overwritten by its own exponential.
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
    """The rows in order, a few at a time: those that the target is of with its outputs, and then the others."""
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
    """Divergence and gradient of both terms, and cross-entropy, summed over some rows, at temperature 1.

    There the two share their exponentials and sums, so that no pass over the vocabulary is made for the divergence.
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
    """T^2 * divergence summed over some rows, and `factor` times its gradient by their logits, [rows, vocab].

    With standardised logits the divisor of a row is T s with s = std(row), and ds / dx_i = (x_i - mean) / ((V - 1) s).
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
