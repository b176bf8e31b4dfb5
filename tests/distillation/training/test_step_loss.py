"""Which positions the loss of one step reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autodistill.distillation.training.step_loss import Sizes, StepLoss


@pytest.mark.parametrize(("positions", "rows"), [("all", 3), ("uncertain", 0)])
def test_nothing_is_chosen_where_every_position_counts_or_none_is_there(positions: str, rows: int) -> None:
    asked: Any = SimpleNamespace(_recipe=SimpleNamespace(positions=positions), _frozen_head=None)
    states = torch.arange(4.0 * rows).reshape(rows, 4)
    learnt: Any = None  # it is not used
    chosen, logits = StepLoss._logits(asked, states, lambda one: 2 * one, learnt)
    assert chosen is None
    assert torch.equal(logits, 2 * states)


@pytest.mark.parametrize(
    ("logits", "own", "part"), [(30, 10, 0.25), (0, 5, 1.0), (7, 0, 0.0), (0, 0, 0.0), (1, 1, 0.5)]
)
def test_a_token_of_the_student_s_own_counts_as_much_as_one_of_the_text(logits: int, own: int, part: float) -> None:
    assert Sizes(logits=logits, learnt=99, attended=99, own=own).own_part == part
