"""Rows of the teacher's outputs: which of them are taken, on which tokens, and what rows without tokens give."""

import numpy as np
import pytest
import torch

from autodistill.distillation.losses.divergence import divergence_of
from autodistill.distillation.losses.targets import FullTarget, SampledTarget, TopTarget, WrittenTarget, parts_of

IDS = torch.tensor([[3, 5], [1, 3], [5, 0]])
LOG_P = torch.log(torch.tensor([[0.5, 0.25], [0.75, 0.125], [0.25, 0.5]], dtype=torch.float64))


def _kl_of_outcomes(ids, log_p, logits):
    """Return KL(p || q) over some tokens and the rest, row by row, in numpy."""
    q = np.exp(logits) / np.exp(logits).sum()
    p, q = np.exp(log_p), q[ids]
    p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
    return float((p * np.log(p / q)).sum())


def test_slices_cover_the_rows_in_order():
    assert [(part.start, part.stop) for part in parts_of(7, 3)] == [(0, 3), (3, 6), (6, 7)]
    assert [(part.start, part.stop) for part in parts_of(6, 3)] == [(0, 3), (3, 6)]
    assert list(parts_of(0, 3)) == []


def test_rows_are_taken_with_all_that_belongs_to_them_and_tokens_change_their_names():
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    target = SampledTarget(ids=IDS, log_p=LOG_P, weights=weights, temperature=2.0)
    assert target.heard is None
    taken = target.take(torch.tensor([2, 0])).renamed(5, 1)
    assert taken.ids.tolist() == [[1, 0], [3, 1]]
    assert target.take(slice(1, 2)).renamed(3, 1).ids.tolist() == [[3, 1]]
    assert taken.weights.tolist() == [[5.0, 6.0], [1.0, 2.0]]
    assert torch.equal(taken.log_p, LOG_P[[2, 0]])
    assert (taken.temperature, taken.standardized) == (2.0, False)
    parts = [(part.start, part.stop, outputs.ids.tolist()) for part, outputs in target.parts(2)]
    assert parts == [(0, 2, [[3, 5], [1, 3]]), (2, 3, [[5, 0]])]
    whole = FullTarget(states=torch.eye(3), head=torch.ones(6, 3), temperature=2.0)
    assert whole.take(slice(1, 3)).states.shape == (2, 3)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_rows_without_reported_tokens_give_no_divergence_and_no_gradient(name):
    ids = torch.tensor([[3, 5], [-1, -1], [1, -1], [0, 2]])
    target = WrittenTarget(ids=ids, log_p=LOG_P[[0, 1, 1, 2]])
    assert target.heard.tolist() == [True, False, True, True]
    assert (target.temperature, target.standardized) == (1.0, False)
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifted = logits - logits.amax(1, keepdim=True)
    value, gradient = target.compare(shifted.clone(), divergence_of(name, 0.5))
    assert gradient[1].abs().max() == 0
    alone = [
        TopTarget(ids=ids[row : row + 1, :count], log_p=target.log_p[row : row + 1, :count], temperature=1.0).compare(
            shifted[row : row + 1].clone(), divergence_of(name, 0.5)
        )
        for row, count in ((0, 2), (2, 1), (3, 2))
    ]
    assert float(value) == pytest.approx(sum(float(one) for one, _ in alone))
    for row, (_, slope) in zip((0, 2, 3), alone, strict=True):
        np.testing.assert_allclose(gradient[row], slope[0], rtol=1e-12)
    if name == "forward_kl":
        rows = ((0, [3, 5]), (2, [1]), (3, [0, 2]))
        expected = [_kl_of_outcomes(of, target.log_p[row, : len(of)].numpy(), logits[row].numpy()) for row, of in rows]
        assert float(value) == pytest.approx(sum(expected), rel=1e-9)


def test_standardized_logits_have_their_row_s_deviation_as_the_divisor():
    target = FullTarget(
        states=torch.tensor([[1.0, 2.0]], dtype=torch.float64),
        head=torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]], dtype=torch.float64),
        temperature=2.0,
        standardized=True,
    )
    ((part, outputs),) = target.parts(4)
    assert (part.start, part.stop, outputs.heard) == (0, 1, None)
    teacher = np.array([1.0, 2.0, 0.0]) / (2.0 * 1.0)  # the deviation of 1, 2 and 0 is 1
    student = np.array([0.0, -1.0, -0.5])
    p, q = (np.exp(row) / np.exp(row).sum() for row in (teacher, student))
    value, gradient = outputs.compare(torch.tensor(student)[None], divergence_of("forward_kl", 0.5))
    assert float(value) == pytest.approx((p * np.log(p / q)).sum())
    np.testing.assert_allclose(gradient[0], q - p, rtol=1e-9)
