"""TAID's share: its lower bound, which rises linearly, and the pace that the loss sets."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodistill.distillation.losses.schedules import Interpolation


@given(st.lists(st.floats(0, 100), max_size=30), st.floats(0, 1, exclude_max=True))
def test_it_never_falls_never_lags_and_ends_at_the_teacher(losses, start):
    state = Interpolation(share=start)
    for step, loss in enumerate(losses, start=1):
        progress = step / len(losses)
        following = state.after(loss, start, progress)
        assert state.share <= following.share <= 1
        assert following.share >= start + (1 - start) * progress - 1e-12
        state = following
    assert state.share == (pytest.approx(1) if losses else start)


def test_a_falling_loss_moves_it_faster():
    def share(losses):
        state = Interpolation(share=0.4)
        for loss in losses:
            state = state.after(loss, 0.4, 0.0)
        return state.share

    falling, level, rising = (share([8 * factor**step for step in range(500)]) for factor in (0.99, 1.0, 1.01))
    assert falling > level > rising > 0.4
    # With a constant loss, each step covers half of 5e-4 of what is left. The first step only records the loss.
    assert level == pytest.approx(1 - 0.6 * (1 - 2.5e-4) ** 499, rel=1e-9)


def test_a_step_that_nothing_was_heard_in_leaves_the_pace():
    state = Interpolation(share=0.5, momentum=0.1, loss=2.0)
    assert state.after(None, 0.4, 0.0) == state
    assert state.after(None, 0.4, 0.9) == Interpolation(share=pytest.approx(0.94), momentum=0.1, loss=2.0)


def test_a_loss_that_is_not_finite_changes_nothing():
    state = Interpolation(share=0.5, momentum=0.1, loss=2.0)
    assert state.after(math.nan, 0.4, 0.9) == state


def test_it_remembers_ninety_nine_parts_in_a_hundred_of_earlier_falls():
    """The paper's recurrence, computed by hand: the loss falls by three quarters, rises by a half, and then stays."""
    state, shares = Interpolation(share=0.4), []
    for loss in (8.0, 2.0, 3.0, 3.0):
        state = state.after(loss, 0.4, 0.0)
        shares.append(state.share)
    momenta = [0.01 * 0.75, 0.99 * 0.0075 - 0.01 * 0.5, 0.99 * 0.002425]
    assert momenta[1] == pytest.approx(0.002425, rel=1e-12)
    left, expected = 0.6, [0.4]
    for momentum in momenta:
        left *= 1 - 5e-4 / (1 + math.exp(-momentum))
        expected.append(1 - left)
    assert shares == pytest.approx(expected, rel=1e-13)
    assert state.momentum == pytest.approx(momenta[-1], rel=1e-9)
