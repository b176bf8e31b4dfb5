"""Divergences of the student's distribution from the teacher's: functions of log-probabilities, and their slopes.

Any code that names a divergence loads this file, so torch is imported only inside the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from autodistill.errors import InputError
from autodistill.strategy.divergence import Divergence, about, get_divergence

if TYPE_CHECKING:
    from torch import Tensor

DivergenceAndSlope = Callable[["Tensor", "Tensor"], tuple["Tensor", "Tensor"]]
"""Maps log-probabilities of the teacher and of the student, [rows, outcomes] each, to a divergence and a slope. The sum
of the divergence's elements is the divergence of all rows. The slope, [rows, outcomes], is the derivative of this sum
by
each log-probability of the student. Divergences in this file return a value for each outcome, [rows, outcomes]; those
that use autograd return one for each row."""


@about(gives_slope=True, unbiased_when_sampled=True, nonnegative=True)
def forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student), which makes the student cover everything that the teacher may say."""
    p = log_p.exp()
    return p * (log_p - log_q), p.neg_()


@about(gives_slope=True, nonnegative=True)
def reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student || teacher), which makes the student say only what the teacher may say."""
    q = log_q.exp()
    value = q * (log_q - log_p)
    return value, q.add_(value)


@about(gives_slope=True, nonnegative=True)
def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student.

    The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, eq. 1), for 0 < beta < 1.
    """
    p, q = log_p.exp(), log_q.exp()
    log_m = _log_mixture(p, q, beta)
    # The mixture's own derivative cancels between the two terms.
    slope = q.mul_(1 - beta).mul_(log_q - log_m)
    return p.mul_(beta).mul_(log_p - log_m).add_(slope), slope


@about(gives_slope=True, nonnegative=True)
def skew_forward_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(teacher || alpha teacher + (1 - alpha) student), for 0 < alpha < 1 (DistiLLM, arXiv 2402.03898)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = _log_mixture(p, q, alpha)
    return (log_p - log_m).mul_(p), q.mul_(p.mul_(alpha - 1)).mul_(log_m.neg_().exp_())


@about(gives_slope=True, nonnegative=True)
def skew_reverse_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(student || alpha student + (1 - alpha) teacher), for 0 < alpha < 1 (DistiLLM, arXiv 2402.03898)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = _log_mixture(p, q, 1 - alpha)
    value = (log_q - log_m).mul_(q)
    return value, value + q - log_m.neg_().exp_().mul_(q).mul_(q).mul_(alpha)


@about(gives_slope=True, moving_target=True, nonnegative=True)
def taid(log_p: Tensor, log_q: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """KL(m || student) with log m = share log teacher + (1 - share) log student, normalised, and without a gradient.

    This is the objective of TAID (arXiv 2501.16937). At a share of 1 it is forward KL.
    """
    import torch

    return forward_kl(torch.log_softmax(torch.lerp(log_q, log_p, share), dim=1), log_q)


def _log_mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    """Return log(share p + (1 - share) q). The mixture is at least the smallest normal number, so logs stay finite."""
    import torch

    return torch.lerp(q, p, share).clamp_(min=torch.finfo(p.dtype).tiny).log_()


def divergence_of(name: str, mixture: float) -> DivergenceAndSlope:
    """Return the divergence that a strategy names, with its mixture if it has one.

    Raises:
        InputError: As for `get_divergence`. The returned function raises it as for `check_divergence`.
    """
    found = get_divergence(name)
    given = (mixture,) if found.mixes else ()
    if found.gives_slope:
        return lambda log_p, log_q: found.function(log_p, log_q, *given)
    return lambda log_p, log_q: _by_autograd(found, log_p, log_q, given)


def check_divergence(divergence: Divergence) -> None:
    """Try a divergence on two rows of three outcomes.

    Raises:
        InputError: The divergence raises an error, does not return a number for each row, or returns a value or slope
            that is not finite.
    """
    import torch

    log_p, log_q = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]).log(), torch.full((2, 3), 1 / 3).log()
    try:
        value, slope = divergence_of(divergence.name, 0.5)(log_p, log_q)
    except InputError:
        raise
    except Exception as error:  # a user's own code may raise anything
        raise InputError(f"the divergence {divergence.name!r} fails: {type(error).__name__}: {error}") from error
    if not (bool(value.isfinite().all()) and bool(slope.isfinite().all())):
        raise InputError(f"the divergence {divergence.name!r}, or its slope, is not finite for two plain distributions")


def _by_autograd(found: Divergence, log_p: Tensor, log_q: Tensor, given: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return one divergence per row, [rows], and its slope, [rows, outcomes]."""
    import torch

    with torch.enable_grad():
        student = log_q.detach().requires_grad_()
        value = found.function(log_p.detach(), student, *given)
        if not isinstance(value, torch.Tensor) or value.shape != log_q.shape[:1] or not value.requires_grad:
            given_back = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(
                f"the divergence {found.name!r} gives {given_back} for {list(log_q.shape)} log-probabilities: it must "
                f"give a tensor [{len(log_q)}], one number a position, that depends on the student's"
            )
        (slope,) = torch.autograd.grad(value.sum(), student)
    # The engine overwrites the slope, which autograd may return as one expanded number.
    return value.detach(), slope.clone(memory_format=torch.contiguous_format)
