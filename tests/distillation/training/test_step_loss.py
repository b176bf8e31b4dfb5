"""Which positions the loss of one step reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from autodistill.distillation.training.step_loss import Sizes, StepLoss
from autodistill.strategy.recipe import Attention


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


@pytest.mark.parametrize(
    ("positions", "attention", "marked", "sizes"),
    [
        ("answers", False, True, Sizes(logits=4, learnt=4, attended=0, own=3)),
        ("answers", True, True, Sizes(logits=4, learnt=4, attended=7, own=3)),
        ("uncertain", True, True, Sizes(logits=2, learnt=4, attended=7, own=3)),
        ("all", True, True, Sizes(logits=6, learnt=6, attended=7, own=3)),
        ("answers", True, False, Sizes(logits=8, learnt=8, attended=8, own=3)),
        ("uncertain", False, False, Sizes(logits=4, learnt=8, attended=0, own=3)),
    ],
)
def test_means_are_over_the_tokens_that_are_counted_by_hand(
    positions: str, attention: bool, marked: bool, sizes: Sizes
) -> None:
    """Two of three sequences of five tokens. The second one ends in two tokens of padding.

    Each token except the first is predicted. The attention of each token except the last is compared.
    """
    yes, no = True, False
    answers = np.array([[no, no, yes, yes, no], [no, yes, yes, no, no], [yes] * 5])
    data: Any = SimpleNamespace(
        tokens=np.zeros((3, 5), np.int32),
        documents=np.array([[0] * 5, [1, 1, 1, -1, -1], [2] * 5]),
        answers=answers if marked else None,
        teacher=None,
    )
    asked: Any = SimpleNamespace(
        _data=data,
        _recipe=SimpleNamespace(positions=positions, uncertain_share=0.5, attention=Attention() if attention else None),
        _own=np.array([[no, no, no, no, yes], [no, no, no, yes, yes], [yes] * 5]),
    )
    asked._learnt = lambda indices, device: StepLoss._learnt(asked, indices, device)
    assert StepLoss.sizes(asked, [0, 1]) == sizes
    asked._own = None
    assert StepLoss.sizes(asked, [0, 1]) == sizes._replace(own=0)
    assert StepLoss._own_rows(asked, [0, 1]) is None


def test_own_tokens_are_found_among_the_predicted_ones() -> None:
    own = np.array([[False] * 5, [True, True, False, False, True], [False, False, False, True, False]])
    asked: Any = SimpleNamespace(_own=own, _device="cpu")
    # Four tokens of each sequence are predicted: the second to the fifth.
    assert StepLoss._own_rows(asked, [1, 2]).tolist() == [0, 3, 6]
    assert StepLoss._own_rows(asked, [2, 1]).tolist() == [2, 4, 7]
