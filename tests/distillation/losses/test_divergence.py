"""Each divergence as a function of log-probabilities: its slope against differences, its bounds and its limits."""

import pytest
import torch
from torch.nn import functional

from autodistill import plugins
from autodistill.distillation.losses.divergence import check_divergence, divergence_of
from autodistill.errors import InputError
from autodistill.strategy.divergence import get_divergence, register_divergence

ALL = [
    ("forward_kl", 0.0),
    ("reverse_kl", 0.0),
    *((name, 0.3) for name in ("jsd", "skew_forward_kl", "skew_reverse_kl")),
]


def _pair(rows=50, outcomes=7):
    generator = torch.Generator().manual_seed(0)
    rows = 2 * torch.randn(2, rows, outcomes, generator=generator, dtype=torch.float64)
    return functional.log_softmax(rows, dim=2)


@pytest.mark.parametrize(("name", "mixture"), ALL)
def test_slopes_are_the_derivatives_by_each_log_probability(name, mixture):
    divergence = divergence_of(name, mixture)
    log_p, log_q = _pair()
    _, slope = divergence(log_p, log_q.clone())
    for place in range(log_q.shape[1]):
        nudge = torch.zeros_like(log_q)
        nudge[:, place] = 1e-5
        above, below = (divergence(log_p, moved)[0].sum(dim=1) for moved in (log_q + nudge, log_q - nudge))
        torch.testing.assert_close(slope[:, place], (above - below) / 2e-5, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "mixture"), [*ALL, ("taid", 0.4)])
def test_it_is_zero_between_equals_and_above_zero_elsewhere(name, mixture):
    log_p, log_q = _pair()
    divergence = divergence_of(name, mixture)
    assert (divergence(log_p, log_q)[0].sum(dim=1) > 0).all()
    same, _ = divergence(log_p, log_p.clone())
    torch.testing.assert_close(same.sum(dim=1), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-14)


def test_where_they_meet():
    log_p, log_q = _pair()

    def value(name, mixture=0.0, first=log_p, second=log_q):
        return divergence_of(name, mixture)(first, second)[0].sum(dim=1)

    torch.testing.assert_close(value("jsd", 0.3), value("jsd", 0.7, log_q, log_p))
    torch.testing.assert_close(value("skew_forward_kl", 0.3), value("skew_reverse_kl", 0.3, log_q, log_p))
    torch.testing.assert_close(value("skew_forward_kl", 1e-9), value("forward_kl"), rtol=1e-6, atol=0)
    torch.testing.assert_close(value("skew_reverse_kl", 1e-9), value("reverse_kl"), rtol=1e-6, atol=0)
    torch.testing.assert_close(value("jsd", 1e-6) / 1e-6, value("forward_kl"), rtol=1e-3, atol=0)
    torch.testing.assert_close(value("taid", 1.0), value("forward_kl"))


@pytest.mark.parametrize(("name", "mixture"), [*ALL, ("taid", 0.4)])
def test_impossible_outcomes_stay_finite_in_float32(name, mixture):
    far = torch.tensor([[0.0, -1e5, -200.0], [-1e5, 0.0, -90.0], [-1e5, -1e5, 0.0]])
    log_p, log_q = far, far.flip(0)
    value, slope = divergence_of(name, mixture)(log_p, log_q)
    assert value.isfinite().all()
    assert slope.isfinite().all()


def test_autograd_gives_the_slope_of_a_function_that_has_none():
    """For each of our divergences, written as in its definition, autograd gives the slope that is written by hand."""
    written = {
        ("forward_kl", 0.0): lambda log_p, log_q: (log_p.exp() * (log_p - log_q)).sum(1),
        ("reverse_kl", 0.0): lambda log_p, log_q: (log_q.exp() * (log_q - log_p)).sum(1),
        ("jsd", 0.3): lambda log_p, log_q, beta: _jensen_shannon(log_p, log_q, beta),
    }
    log_p, log_q = _pair()
    for (name, mixture), function in written.items():
        register_divergence("mine")(function)
        mine, slope = divergence_of("mine", mixture)(log_p, log_q)
        ours, expected = divergence_of(name, mixture)(log_p, log_q.clone())
        torch.testing.assert_close(mine, ours.sum(dim=1))
        torch.testing.assert_close(slope, expected)
        plugins.forget("divergences", "mine")


def _jensen_shannon(log_p, log_q, beta):
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p + (1 - beta) * q).log()
    return (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(1)


def test_it_is_tried_on_distributions():
    """A divergence may require that probabilities sum to 1."""

    def careful(log_p, log_q):
        for log in (log_p, log_q):
            torch.testing.assert_close(log.exp().sum(1), torch.ones(len(log)))
        return (log_p.exp() * (log_p - log_q)).sum(1)

    register_divergence("mine")(careful)
    try:
        check_divergence(get_divergence("mine"))
    finally:
        plugins.forget("divergences", "mine")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda log_p, log_q: (log_p - log_q).mean(), r"gives \[\] for \[2, 3\] log-probabilities"),
        (lambda log_p, log_q: log_p.sum(1), r"gives \[2\] for .*, that depends on the student's"),
        (lambda log_p, log_q: 1.0, "gives float for"),
        (lambda log_p, log_q: (log_q * float("inf")).sum(1), "is not finite"),
        (lambda log_p, log_q: log_q @ log_p, "fails: RuntimeError"),
    ],
)
def test_what_does_not_work_is_refused_before_any_work(function, said):
    register_divergence("mine")(function)
    try:
        with pytest.raises(InputError, match=said):
            check_divergence(get_divergence("mine"))
    finally:
        plugins.forget("divergences", "mine")
