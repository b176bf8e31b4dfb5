"""The logit loss: a divergence from the teacher's sparse outputs, mixed with cross-entropy, in one pass over rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Logits worked on at once: on a CPU 6 MB of float32, which stays in a core's share of the cache; elsewhere 128 MB, as
# there it is the number of steps that costs.
_CPU_CHUNK, _CHUNK = 3 * 2**19, 2**25


class SparseTarget(NamedTuple):
    """The teacher's outputs for n predicted tokens.

    Attributes:
        ids: int64 [n, k], the k most likely tokens.
        logits: float [n, k], their raw logits.
        logsumexp: float [n], of the teacher's whole row divided by the temperature.
        temperature: The temperature that `logsumexp` was taken at.
    """

    ids: Tensor
    logits: Tensor
    logsumexp: Tensor
    temperature: float

    def log_probabilities(self) -> Tensor:
        """Exact log-probabilities of the k tokens at the temperature, [n, k]."""
        return self.logits / self.temperature - self.logsumexp[:, None]


class LogitLoss(NamedTuple):
    """Means over the predicted tokens; only `total` carries a gradient."""

    total: Tensor
    divergence: Tensor
    cross_entropy: Tensor


def logit_loss(logits: Tensor, labels: Tensor, target: SparseTarget | None, divergence_weight: float) -> LogitLoss:
    """weight * T^2 * KL(teacher || student) + (1 - weight) * cross-entropy, averaged over rows.

    The k tokens of the target keep their exact probabilities at temperature T. All others share one bucket with the
    rest of the teacher's mass, so the divergence is the exact KL of these k + 1 outcomes, a lower bound of the full
    one. T^2 keeps the gradient's size independent of T (Hinton et al., arXiv 1503.02531).

    The gradient is computed with the value and kept in the logits' type: beside the logits there is one tensor of
    their size, and working memory for a few rows.

    Args:
        logits: [n, vocab], of the student; they stay as they are.
        labels: int64 [n], the true next tokens.
        target: Of the teacher, or None where `divergence_weight` is 0.
        divergence_weight: 0 to 1.
    """
    if divergence_weight > 0 and target is None:
        raise ValueError("a divergence needs the teacher's outputs")
    return LogitLoss(*_LogitLoss.apply(logits, labels, target, divergence_weight))


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, target: SparseTarget | None, weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = logits.shape[0]
        work = torch.float64 if logits.dtype == torch.float64 else torch.float32
        gradient = torch.empty_like(logits)
        divergence = torch.zeros((), dtype=work, device=logits.device)
        cross_entropy = torch.zeros((), dtype=work, device=logits.device)
        step = max(1, (_CPU_CHUNK if logits.device.type == "cpu" else _CHUNK) // logits.shape[1])
        for start in range(0, rows, step):
            part = slice(start, start + step)
            # A copy, shifted by the maximum, so that no exponential overflows at any temperature.
            shifted = logits[part] - logits[part].amax(dim=1, keepdim=True).to(work)
            label = labels[part, None]
            label_logit = shifted.gather(1, label)
            chunk_gradient: Tensor | None = None
            if weight > 0:
                assert target is not None
                chunk = SparseTarget(
                    target.ids[part], target.logits[part].to(work), target.logsumexp[part].to(work), target.temperature
                )
                value, chunk_gradient = _divergence(shifted, chunk)
                divergence += value
                chunk_gradient *= weight
            # At its last use the copy is overwritten by its own exponential.
            exponential = shifted.exp_()
            total = exponential.sum(dim=1, keepdim=True)
            cross_entropy += (total.log() - label_logit).sum()
            if weight < 1:
                exponential *= (1 - weight) / total
                exponential.scatter_add_(1, label, torch.full_like(label_logit, weight - 1))
                chunk_gradient = exponential if chunk_gradient is None else chunk_gradient.add_(exponential)
            assert chunk_gradient is not None
            gradient[part] = chunk_gradient.div_(rows)
        ctx.save_for_backward(gradient)
        divergence /= rows
        cross_entropy /= rows
        loss = weight * divergence + (1 - weight) * cross_entropy
        ctx.mark_non_differentiable(divergence, cross_entropy)
        return loss, divergence, cross_entropy

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(upstream[0].to(gradient.dtype)), None, None, None


def _divergence(shifted: Tensor, target: SparseTarget) -> tuple[Tensor, Tensor]:
    """T^2 * KL summed over the rows, and its gradient by the logits, [rows, vocab].

    With q the student's and p the teacher's distribution at temperature T, S the k stored tokens and p_t, q_t the mass
    outside S, the derivative by logit j is T * (q_j - p_j) inside S and T * q_j * (1 - p_t / q_t) outside.
    """
    t = target.temperature
    log_inside = shifted.gather(1, target.ids) / t
    exponential = (shifted / t).exp_() if t != 1 else shifted.exp()
    inside = exponential.gather(1, target.ids)
    # The bucket is summed by itself: as a difference of sums, a small one would be rounding.
    exponential.scatter_(1, target.ids, 0.0)
    outside = exponential.sum(dim=1, keepdim=True)
    total = outside + inside.sum(dim=1, keepdim=True)
    log_p, log_q = target.log_probabilities(), log_inside - total.log()
    p, q = log_p.exp(), inside / total
    p_rest = (1 - p.sum(dim=1, keepdim=True)).clamp_(min=0)
    if target.ids.shape[1] == shifted.shape[1]:
        # Every token is stored: the bucket is empty, and the teacher's rest is rounding.
        p_rest.zero_()
    q_rest = (outside / total).clamp_(min=torch.finfo(outside.dtype).tiny)
    value = (p * (log_p - log_q)).sum() + torch.xlogy(p_rest, p_rest / q_rest).sum()
    gradient = exponential.mul_((1 - p_rest / q_rest) * (t / total))
    gradient.scatter_(1, target.ids, (q - p) * t)
    return value * t * t, gradient
