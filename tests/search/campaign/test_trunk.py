"""Which decays branch off a trunk, against values computed by hand."""

from __future__ import annotations

import json

from autodistill.search.campaign.trunk import BRANCH_DECAY, Trunk, plan_trunk


def _trunk(beside: float, start: int = 0, least: float = 0.0, pace: float = 10.0) -> Trunk:
    """Plan a trunk of 100,000 tokens in steps of 100.

    1,000 tokens take `pace` s, and an evaluation `beside` times that.
    """
    return plan_trunk(
        "t003",
        start=start,
        end=100_000,
        fewest_tokens=least,
        batch_tokens=100,
        seconds=lambda tokens: pace * (tokens / 1000 + beside),
    )


def test_a_long_trunk_has_both_and_a_short_one_the_later() -> None:
    both, later, none = _trunk(0.2), _trunk(2.0), _trunk(9.0)
    # 50,000 / 0.92 and 25,000 / 0.92, rounded to whole steps.
    assert both.lengths == (27_200, 54_300)
    assert later.lengths == (54_300,)
    assert [(one.share, one.kept) for one in later.branches] == [(0.25, False), (0.5, True)]
    assert none.lengths == ()
    assert abs(later.branches[1].cost - (4.3 + 2.0) / 102.0) < 1e-9
    for trunk in (both, later, none):
        assert sum(one.cost for one in trunk.branches if one.kept) <= 0.07
        assert Trunk.from_json(json.loads(json.dumps(trunk.to_json()))) == trunk


def test_nothing_branches_off_before_its_start_or_below_what_is_worth_it() -> None:
    assert _trunk(0.2, start=30_000).lengths == (54_300,)
    assert _trunk(0.2, least=30_000).lengths == (54_300,)
    assert _trunk(0.2, least=60_000).branches == ()


def test_a_trunk_of_a_few_minutes_has_no_early_student() -> None:
    assert _trunk(0.2, pace=5.9).lengths == ()
    assert _trunk(0.2, pace=6.0).lengths == (27_200, 54_300)


def test_the_decision_is_told_with_its_cost() -> None:
    said = _trunk(2.0).describe()
    assert said.startswith(
        "t003 is trained further, to about 100,000 tokens, and students are kept at 50% (54,300 tokens,"
    )
    assert "no student is kept at 25% (27,200 tokens, 4.1% of the time): that takes too much of its time" in said
    assert BRANCH_DECAY < 0.2
