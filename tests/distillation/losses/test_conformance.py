"""Our own divergences pass the suite that the author of a plug-in subclasses.

A function that breaks a rule fails it.
"""

from __future__ import annotations

import pytest

from autodistill import plugins
from autodistill.plugins import names
from autodistill.strategy.divergence import register_divergence
from autodistill.testing import DivergenceConformance

for _name in names("divergences"):
    _title = "Test" + _name.title().replace("_", "")
    globals()[_title] = type(_title, (DivergenceConformance,), {"__module__": __name__, "divergence": _name})


def wrong_slope(log_p, log_q):
    p = log_p.exp()
    return p * (log_p - log_q), p


def of_the_batch(log_p, log_q):
    value = (log_p.exp() * (log_p - log_q)).sum(1)
    return value / value.detach().mean()


def writes_over(log_p, log_q):
    value = (log_p.exp() * (log_p - log_q)).sum(1)
    log_p.zero_()
    return value


@pytest.mark.parametrize(
    ("test", "function", "facts"),
    [
        ("its_slope_is_its_derivative", wrong_slope, {"gives_slope": True}),
        ("it_is_zero_between_equals", lambda log_p, log_q: (log_q**2).sum(1), {}),
        ("it_is_not_negative_where_it_says_so", lambda log_p, log_q: (log_p - log_q).sum(1), {"nonnegative": True}),
        ("each_row_is_by_itself", of_the_batch, {}),
        ("what_it_is_given_stays_as_it_was", writes_over, {}),
    ],
)
def test_the_suite_finds_a_fault(test, function, facts):
    class Suite(DivergenceConformance):
        divergence = "faulty"

    register_divergence("faulty", **facts)(function)
    try:
        with pytest.raises(AssertionError):
            getattr(Suite(), f"test_{test}")()
    finally:
        plugins.forget("divergences", "faulty")
