"""Layer maps against values by hand, projections against their algebra, and the loss against cosines in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from autodistill.distillation.losses.hidden_states import (
    Pair,
    aligned_layers,
    alignment_loss,
    balance_factor,
    check_projection,
    layer_map,
    projection,
    rms_normalize,
)
from autodistill.errors import InputError
from autodistill.strategy.recipe import Alignment

LINEAR = Alignment(projection="linear")


def _even(count):
    return Alignment(layers="even", count=count)


@pytest.mark.parametrize(
    ("alignment", "layers", "expected"),
    [
        (Alignment(), 24, (23,)),
        (Alignment(), 1, (0,)),
        (_even(2), 24, (11, 23)),
        (_even(4), 24, (5, 11, 17, 23)),
        (_even(4), 15, (3, 7, 11, 14)),
        (_even(4), 4, (0, 1, 2, 3)),
        (_even(3), 7, (2, 4, 6)),
        (Alignment(count=3), 7, (4, 5, 6)),
        (Alignment(count=7), 7, (0, 1, 2, 3, 4, 5, 6)),
        (Alignment(layers="all"), 3, (0, 1, 2)),
    ],
)
def test_aligned_layers(alignment, layers, expected):
    assert aligned_layers(alignment, layers) == expected


@pytest.mark.parametrize("alignment", [_even(4), Alignment(count=4)])
def test_more_aligned_layers_than_layers(alignment):
    with pytest.raises(InputError, match=r"alignment.count is 4, but the student has 3 layers"):
        aligned_layers(alignment, 3)


@pytest.mark.parametrize(
    ("alignment", "kept", "teacher_layers", "expected"),
    [
        # Student layer 1 is teacher layer 2. It feeds the copy of teacher layer 5, which layer 4 feeds in the teacher.
        (_even(2), (0, 2, 5, 9), 10, ((1, 4), (3, 9))),
        (_even(3), (0, 1, 2), 3, ((0, 0), (1, 1), (2, 2))),
        # The last student layer stands for all later layers of the teacher.
        (Alignment(), (0, 1, 2, 7), 8, ((3, 7),)),
        (Alignment(), (7,), 8, ((0, 7),)),
        (_even(4), (0, 1, 2, 7), 8, ((0, 0), (1, 1), (2, 6), (3, 7))),
        (Alignment(count=2), (0, 2, 5, 9), 10, ((2, 8), (3, 9))),
        (Alignment(layers="all"), (0, 2, 5, 9), 10, ((0, 1), (1, 4), (2, 8), (3, 9))),
    ],
)
def test_layer_map(alignment, kept, teacher_layers, expected):
    assert layer_map(alignment, kept, teacher_layers) == tuple(Pair(*pair) for pair in expected)


def test_no_projection():
    assert isinstance(projection(Alignment(), 8, 8, 0), nn.Identity)
    with pytest.raises(InputError, match="8 wide and the teacher 16: use a linear projection"):
        projection(Alignment(), 8, 16, 0)


def test_linear_projection_starts_as_the_identity():
    states = torch.randn(5, 8)
    project = projection(LINEAR, 8, 8, 0)
    assert torch.equal(project(states), states)
    assert [name for name, _ in project.named_parameters()] == ["weight"]


@pytest.mark.parametrize(("student", "teacher"), [(8, 16), (16, 8)])
def test_linear_projection_between_widths_starts_orthogonal(student, teacher):
    weight = projection(LINEAR, student, teacher, 0).weight.detach().double()
    assert weight.shape == (teacher, student)
    gram = weight @ weight.T if teacher < student else weight.T @ weight
    torch.testing.assert_close(gram, torch.eye(8, dtype=torch.float64), atol=1e-6, rtol=0)


def test_low_rank_projection_starts_as_a_projection_of_its_rank():
    project = projection(Alignment(projection="low-rank", rank=3), 8, 8, 0)
    matrix = project(torch.eye(8)).detach().double().numpy()
    np.testing.assert_allclose(matrix @ matrix, matrix, atol=1e-6)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)
    assert np.linalg.matrix_rank(matrix, tol=1e-5) == 3
    assert sorted(p.shape for p in project.parameters()) == [(3, 8), (8, 3)]


def test_low_rank_projection_between_widths():
    project = projection(Alignment(projection="low-rank", rank=3), 8, 16, 0)
    matrix = project(torch.eye(8)).detach().double().numpy()
    np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False)[:4], [1, 1, 1, 0], atol=1e-6)


@pytest.mark.parametrize(("student", "teacher"), [(8, 8), (8, 16), (16, 8)])
def test_two_layers_start_as_the_linear_projection(student, teacher):
    states = torch.randn(5, student, generator=torch.Generator().manual_seed(0))
    project = projection(Alignment(projection="mlp"), student, teacher, 3)
    linear = projection(LINEAR, student, teacher, 3)
    torch.testing.assert_close(project(states), linear(states), atol=1e-5, rtol=1e-5)
    assert [p.shape for p in project.parameters()] == [(2 * teacher, student), (teacher, 2 * teacher)]
    # Both layers learn from the first step on, and what they learn is not a linear map.
    project(states).square().sum().backward()
    assert all(p.grad.abs().max() > 0.1 for p in project.parameters())
    with torch.no_grad():
        project[0].weight[:teacher] *= 2
    assert (project(2 * states) - 2 * project(states)).abs().max() > 0.1


def test_a_rank_that_reduces_nothing():
    low_rank = Alignment(projection="low-rank", rank=9)
    for check in (lambda: check_projection(low_rank, 8, 16), lambda: projection(low_rank, 16, 8, 0)):
        with pytest.raises(InputError, match=r"alignment.rank is 9, but the states are .* wide: lower it"):
            check()
    check_projection(Alignment(projection="low-rank", rank=8), 8, 16)


@pytest.mark.parametrize("alignment", [LINEAR, Alignment(projection="low-rank", rank=3), Alignment(projection="mlp")])
def test_projections_are_a_function_of_the_seed_alone(alignment):
    def weights(seed):
        return [p.detach().clone() for p in projection(alignment, 8, 16, seed).parameters()]

    torch.manual_seed(1)
    before, first = torch.get_rng_state(), weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, weights(0), strict=True))
    assert not torch.equal(first[0], weights(1)[0])


def test_normalized_states_have_a_root_mean_square_of_one():
    states = np.random.default_rng(0).standard_normal((7, 64)) * np.logspace(-3, 4, 7)[:, None]
    states[0, 5] = 1e4  # a massive activation
    expected = states / np.sqrt((states**2).mean(axis=1, keepdims=True))
    actual = rms_normalize(torch.from_numpy(states.astype(np.float32)))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert rms_normalize(torch.zeros(2, 8)).abs().max() == 0
    # Of states as small as what keeps zeros from being divided by zero, both count as much.
    torch.testing.assert_close(rms_normalize(torch.full((2, 8), 1e-6)), torch.full((2, 8), 0.5**0.5), rtol=1e-4, atol=0)
    assert rms_normalize(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_loss_is_two_less_two_cosines():
    random = np.random.default_rng(0)
    student, teacher = random.standard_normal((9, 32)), random.standard_normal((9, 32))
    norms = np.linalg.norm(student, axis=1) * np.linalg.norm(teacher, axis=1)
    cosines = (student * teacher).sum(axis=1) / norms
    states = torch.from_numpy(student).requires_grad_()
    loss = alignment_loss(states, rms_normalize(torch.from_numpy(teacher)))
    loss.backward()
    assert float(loss.detach()) == pytest.approx((2 - 2 * cosines).mean(), rel=1e-10)
    # d cos / d s = (t / |t| - cos s / |s|) / |s|
    unit = student / np.linalg.norm(student, axis=1, keepdims=True)
    towards = teacher / np.linalg.norm(teacher, axis=1, keepdims=True)
    slope = (towards - cosines[:, None] * unit) / np.linalg.norm(student, axis=1, keepdims=True)
    np.testing.assert_allclose(states.grad.numpy(), -2 * slope / 9, rtol=1e-9, atol=1e-12)


def test_loss_does_not_depend_on_the_scale_of_the_student():
    states, target = torch.randn(4, 16), rms_normalize(torch.randn(4, 16)).half()
    first, second = alignment_loss(states, target), alignment_loss(states * 100, target)
    torch.testing.assert_close(first, second)
    assert first.dtype == torch.float32


def test_loss_over_the_teachers_size():
    random = np.random.default_rng(0)
    student, teacher = (random.standard_normal((9, 32)) * np.logspace(-2, 3, 9)[:, None] for _ in range(2))
    size = np.sqrt((teacher**2).mean(axis=1, keepdims=True))
    states = torch.from_numpy(student).requires_grad_()
    loss = alignment_loss(states, torch.from_numpy(teacher / size), torch.from_numpy(size))
    loss.backward()
    # For each token, |s - t|^2 / |t|^2.
    errors = ((student - teacher) ** 2).sum(axis=1) / (teacher**2).sum(axis=1)
    assert float(loss.detach()) == pytest.approx(errors.mean(), rel=1e-10)
    slope = 2 * (student - teacher) / (teacher**2).sum(axis=1, keepdims=True) / 9
    np.testing.assert_allclose(states.grad.numpy(), slope, rtol=1e-9, atol=1e-14)


def test_a_balanced_loss_has_the_size_of_the_logit_loss():
    # The gradient of the product is d (3 log loss) / d loss.
    assert balance_factor(0.25, 3.0) == 12
    assert balance_factor(0.25, -3.0) == 12


def test_a_met_target_is_not_blown_up():
    factors = [balance_factor(loss, 3.0) for loss in (1e-3, 1e-6, 0.0)]
    assert factors == pytest.approx([3000, 3000, 3000])
