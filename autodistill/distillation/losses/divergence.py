"""How far the student's distribution is from the teacher's: pure functions of log-probabilities, with their slopes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From log-probabilities of the teacher and of the student, [rows, outcomes] each, to two tensors of this shape: the
outcomes' shares of the row's divergence, and the derivative of their sum by each log-probability of the student."""


def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), which asks the student to cover all that the teacher may say."""
    p = log_p.exp()
    return p * (log_p - log_q), p.neg_()


def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher), which asks the student to say only what the teacher may say."""
    q = log_q.exp()
    value = q * (log_q - log_p)
    return value, q.add_(value)


def jensen_shannon(beta: float) -> Divergence:
    """beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student.

    The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 1), for 0 < beta < 1.
    """

    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p, q = log_p.exp(), log_q.exp()
        log_m = _log_mixture(p, q, beta)
        # The mixture's own derivative cancels between the two terms.
        slope = q.mul_(1 - beta).mul_(log_q - log_m)
        return p.mul_(beta).mul_(log_p - log_m).add_(slope), slope

    return divergence


def skew_forward_kl(alpha: float) -> Divergence:
    """KL(teacher || alpha teacher + (1 - alpha) student), for 0 < alpha < 1 (DistiLLM, arXiv 2402.03898)."""

    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p, q = log_p.exp(), log_q.exp()
        log_m = _log_mixture(p, q, alpha)
        return (log_p - log_m).mul_(p), q.mul_(p.mul_(alpha - 1)).mul_(log_m.neg_().exp_())

    return divergence


def skew_reverse_kl(alpha: float) -> Divergence:
    """KL(student || alpha student + (1 - alpha) teacher), for 0 < alpha < 1 (DistiLLM, arXiv 2402.03898)."""

    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p, q = log_p.exp(), log_q.exp()
        log_m = _log_mixture(p, q, 1 - alpha)
        value = (log_q - log_m).mul_(q)
        return value, value + q - log_m.neg_().exp_().mul_(q).mul_(q).mul_(alpha)

    return divergence


def interpolated_kl(share: float) -> Divergence:
    """KL(m || student) with log m = share log teacher + (1 - share) log student, normalised, and held fixed.

    The objective of TAID (arXiv 2501.16937): at a share of 1 it is forward KL.
    """

    def divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        return forward_kl(torch.log_softmax(torch.lerp(log_q, log_p, share), dim=1), log_q)

    return divergence


def _log_mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q); where both are below the smallest normal number, of no consequence, its log."""
    return torch.lerp(q, p, share).clamp_(min=torch.finfo(p.dtype).tiny).log_()


_PLAIN: dict[str, Divergence] = {"forward_kl": forward_kl, "reverse_kl": reverse_kl}
_MIXED: dict[str, Callable[[float], Divergence]] = {
    "jsd": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "taid": interpolated_kl,
}


def divergence_of(name: str, mixture: float) -> Divergence:
    """The divergence of a strategy's name, with the share that it mixes by where it mixes."""
    return _PLAIN[name] if name in _PLAIN else _MIXED[name](mixture)
