"""The most uncertain positions: which ones they are, and that a frozen head multiplies only once for them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from autodistill.distillation.losses import token_selection as positions
from autodistill.distillation.losses.token_selection import learnt_tokens, uncertain_logits, uncertain_rows

SEQUENCES = np.repeat([0, 1, 2], [7, 1, 12])


def _case(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(len(SEQUENCES), 16, generator=generator, dtype=dtype)
    weight = torch.randn(50, 16, generator=generator, dtype=dtype)
    return states, weight


def _expected(states, weight, share):
    log_p = functional.log_softmax(states.float() @ weight.float().T, dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    chosen = []
    for sequence in range(SEQUENCES.max() + 1):
        places = np.flatnonzero(sequence == SEQUENCES)
        best = entropy[places].topk(math.ceil(share * len(places))).indices
        chosen += places[best.numpy()].tolist()
    return sorted(chosen)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_they_are_those_of_the_highest_entropy_in_each_sequence(share, monkeypatch):
    monkeypatch.setattr(positions, "_CPU_CHUNK_ROWS", 3)
    monkeypatch.setattr(positions, "_ENTROPY_ROWS", 2)
    states, weight = _case()
    found = uncertain_rows(states, lambda rows: rows @ weight.T, share, SEQUENCES)
    assert found.tolist() == _expected(states, weight, share)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "made again"])
def test_a_frozen_heads_logits_and_gradients_are_those_of_the_product(dtype, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(positions, "_KEPT_BYTES", 0)
    states, weight = _case(dtype)
    products = []

    def head(rows):
        products.append(len(rows))
        return functional.linear(rows, weight)

    leaf, other = states.clone().requires_grad_(), states.clone().requires_grad_()
    chosen, logits = uncertain_logits(leaf, head, weight, 0.3, SEQUENCES)
    assert chosen.tolist() == _expected(states, weight, 0.3)
    assert products == ([len(states)] if kept else [len(states), len(chosen)])
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = functional.linear(other[chosen], weight)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0 if dtype == torch.float64 else 0.05)
    (logits * factors).sum().backward()
    (expected * factors).sum().backward()
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad, other.grad)


def test_under_autocast_the_gradient_has_the_type_of_the_states():
    states, weight = _case(torch.float32)
    leaf, half = states.requires_grad_(), weight.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chosen, logits = uncertain_logits(leaf, lambda rows: functional.linear(rows, half), half, 0.3, SEQUENCES)
    assert logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    expected = torch.zeros_like(states)
    expected[chosen] = half.float().sum(dim=0)
    torch.testing.assert_close(leaf.grad, expected, rtol=0.02, atol=0.05)


def test_a_trained_head_has_its_gradient_from_the_chosen_rows():
    states, weight = _case()
    weight.requires_grad_()
    chosen, logits = uncertain_logits(states, lambda rows: functional.linear(rows, weight), None, 0.3, SEQUENCES)
    logits.sum().backward()
    torch.testing.assert_close(weight.grad, states[chosen].sum(dim=0).expand(50, 16))


def test_tokens_of_the_teacher_and_the_text_are_told_apart_by_hand():
    """Two sequences of five tokens, of which four are predicted. The teacher reads another rendering of them."""
    yes, no = True, False
    tokens = np.zeros((3, 5), np.int32)
    documents = np.array([[0] * 5, [1, 1, 1, -1, -1], [2] * 5])
    answers = np.array([[no, no, yes, yes, no], [no, yes, yes, no, no], [yes] * 5])
    shared = np.array([[no, no, yes, no, no], [no, yes, yes, no, no], [yes] * 5])
    theirs = np.array([[no, no, no, no, yes], [no, no, yes, yes, no], [yes] * 5])
    plain = SimpleNamespace(tokens=tokens, documents=documents, answers=answers, teacher=None, shared=None)

    text = learnt_tokens(SimpleNamespace(tokens=tokens, answers=None), [0, 2], False, "cpu")
    assert (text.size, text.heard, text.rows, text.shared) == (8, 8, slice(None), slice(None))
    assert text.sequences.tolist() == [0] * 4 + [1] * 4
    answered = learnt_tokens(plain, [0, 1], False, "cpu")
    assert (answered.size, answered.heard, answered.rows.tolist()) == (4, 4, [1, 2, 4, 5])
    assert answered.sequences.tolist() == [0, 0, 1, 1]
    every = learnt_tokens(plain, [0, 1], True, "cpu")
    assert (every.rows.tolist(), every.sequences.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 1])
    assert (every.chosen(0.5), every.chosen(0.51), every.chosen(1.0)) == (3, 5, 6)

    both = SimpleNamespace(**vars(plain) | {"shared": shared, "teacher": SimpleNamespace(shared=theirs)})
    apart = learnt_tokens(both, [0, 1], False, "cpu")
    # First the tokens that both predict, at places of each model's own, and then the rest of the student's answers.
    assert (apart.size, apart.heard) == (4, 3)
    assert (apart.rows.tolist(), apart.shared.tolist(), apart.teachers.tolist()) == ([1, 4, 5, 2], [1, 4, 5], [3, 5, 6])
    assert apart.sequences.tolist() == [0, 1, 1, 0]
