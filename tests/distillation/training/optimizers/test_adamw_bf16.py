"""AdamW with bfloat16 moments: its rounding is unbiased, its bytes, and its descent compared with AdamW in float32."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autodistill.distillation.training.optimizers.adamw_bf16 import RoundedAdamW, rounded

BETAS = (0.9, 0.95)


def _neighbors(value):
    """Return the two bfloat16 values around a float32 value that bfloat16 does not hold, by torch's own rounding."""
    nearest = torch.tensor(value).bfloat16()
    other = torch.nextafter(nearest, torch.tensor(np.copysign(np.inf, value - nearest.item())).bfloat16())
    return sorted((float(nearest), float(other)))


@given(st.floats(2.0**-100, 2.0**100, width=32), st.sampled_from([-1.0, 1.0]))
def test_of_two_neighbors_each_is_met_as_often_as_the_value_lies_near_it(size, sign):
    value = float(np.float32(sign * size))
    # The test uses all possible draws, each once, so the mean is exact.
    draws = torch.arange(2**16, dtype=torch.int32)
    found = rounded(torch.full((2**16,), value), draws)
    assert torch.equal(found.bfloat16().float(), found)
    if float(torch.tensor(value).bfloat16()) == value:
        assert (found == value).all()
    else:
        assert sorted(set(found.tolist())) == _neighbors(value)
    assert float(found.double().mean()) == pytest.approx(value, rel=1e-12)


def test_draws_are_even():
    """Over many equal values, after one step from zero, the moments have float32's mean."""
    weight = torch.nn.Parameter(torch.zeros(2**18))
    optimizer = RoundedAdamW([{"params": [weight]}], lr=1e-3, betas=BETAS)
    weight.grad = torch.full_like(weight, 1.003)
    optimizer.step()
    for name, exact in (("exp_avg", 0.1 * 1.003), ("exp_avg_sq", 0.05 * 1.003**2)):
        moments = optimizer.state[weight][name]
        assert moments.dtype == torch.bfloat16
        low, high = _neighbors(float(np.float32(exact)))
        assert set(moments.double().tolist()) == {low, high}
        share = (exact - low) / (high - low)
        error = (share * (1 - share) / len(weight)) ** 0.5
        assert float((moments.double() == high).double().mean()) == pytest.approx(share, abs=5 * error)
    # The direction in which one moment is rounded tells nothing about the other moment or its neighbour.
    first, second = (optimizer.state[weight][name].double() for name in ("exp_avg", "exp_avg_sq"))
    for pair in ((first, second), (first[1:], first[:-1])):
        assert abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) < 5 / len(weight) ** 0.5


def test_a_first_step_is_adamws_and_the_state_takes_half():
    start, gradient = torch.randn(3, 5), torch.randn(3, 5)
    gradient[0] *= 1e-8  # so small that what is added to the root counts
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    groups = ([{"params": [weight]}] for weight in weights)
    exact = torch.optim.AdamW(next(groups), lr=0.1, betas=BETAS, weight_decay=0.0)
    half = RoundedAdamW(next(groups), lr=0.1, betas=BETAS)
    for weight, optimizer in zip(weights, (exact, half), strict=True):
        weight.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-6, atol=1e-7)
    for name in ("exp_avg", "exp_avg_sq"):
        expected, found = exact.state[weights[0]][name], half.state[weights[1]][name]
        assert found.shape == expected.shape
        assert 2 * found.nbytes == expected.nbytes
        torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=0)


def test_parts_of_a_large_weight_are_its_whole(monkeypatch):
    from autodistill.distillation.training.optimizers import adamw_bf16 as rounded_states

    def stepped():
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(7, 11, generator=generator))
        optimizer = RoundedAdamW([{"params": [weight]}], lr=0.1, betas=BETAS)
        for _ in range(3):
            weight.grad = torch.randn(7, 11, generator=generator)
            optimizer.step()
        return [weight.detach(), *map(optimizer.state[weight].get, ("exp_avg", "exp_avg_sq"))]

    whole = stepped()
    monkeypatch.setattr(rounded_states, "_VALUES_PER_THREAD", 8)
    assert all(map(torch.equal, stepped(), whole))


@pytest.mark.parametrize("wrong", [torch.zeros(5, 3).T, torch.zeros(6)[::2], torch.zeros(3, dtype=torch.bfloat16)])
def test_what_it_cannot_move_in_place_is_refused(wrong):
    with pytest.raises(ValueError, match="for contiguous float32 parameters"):
        RoundedAdamW([{"params": [torch.nn.Parameter(wrong)]}], lr=0.1, betas=BETAS)
    optimizer = RoundedAdamW([{"params": [torch.nn.Parameter(torch.zeros(2))]}], lr=0.1, betas=BETAS)
    with pytest.raises(ValueError, match="for contiguous float32 parameters"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(wrong)]})


def test_a_gradient_may_lie_as_it_likes():
    gradient = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    weights = [torch.nn.Parameter(torch.zeros(3, 5)) for _ in range(2)]
    for weight, own in zip(weights, (gradient.T, gradient.T.contiguous()), strict=True):
        optimizer = RoundedAdamW([{"params": [weight]}], lr=0.1, betas=BETAS)
        weight.grad = own
        assert weight.grad.is_contiguous() == own.is_contiguous()
        optimizer.step()
    assert torch.equal(weights[0], weights[1])
    assert weights[0].count_nonzero() == 15


def test_its_state_dict_goes_on_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(64, generator=generator), torch.randn(6, 64, generator=generator)

    def begun(values):
        weight = torch.nn.Parameter(values.clone())
        return weight, RoundedAdamW([{"params": [weight]}], lr=0.1, betas=BETAS)

    def stepped(weight, optimizer, some):
        for gradient in some:
            weight.grad = gradient.clone()
            optimizer.step()

    weight, optimizer = begun(start)
    stepped(weight, optimizer, gradients[:3])
    other, continued = begun(weight.detach())
    continued.load_state_dict(optimizer.state_dict())
    assert all(continued.state[other][name].dtype == torch.bfloat16 for name in ("exp_avg", "exp_avg_sq"))
    for one, its in ((weight, optimizer), (other, continued)):
        stepped(one, its, gradients[3:])
    assert torch.equal(other, weight)
    assert torch.equal(continued.state[other]["exp_avg_sq"], optimizer.state[weight]["exp_avg_sq"])


def test_a_moment_follows_changes_that_the_nearest_value_would_lose():
    """Squared gradients 3% above the second moment change it by 0.15% a step. bfloat16's values lie 0.4% apart."""
    weight = torch.nn.Parameter(torch.zeros(2**14))
    optimizer = RoundedAdamW([{"params": [weight]}], lr=0.0, betas=BETAS)
    for gradient, steps in ((1.0, 300), (1.03**0.5, 300)):
        for _ in range(steps):
            weight.grad = torch.full_like(weight, gradient)
            optimizer.step()
    held = torch.tensor(1.0).bfloat16()
    for _ in range(300):
        held = (0.95 * held.float() + 0.05 * 1.03).bfloat16()
    assert float(held) == 1.0
    assert float(optimizer.state[weight]["exp_avg_sq"].double().mean()) == pytest.approx(1.03, rel=1e-3)
    assert float(optimizer.state[weight]["exp_avg"].double().mean()) == pytest.approx(1.03**0.5, rel=1e-3)


def test_a_quadratic_is_descended_as_by_adamw_in_float32():
    """The rounding makes steps differ by 1.1% without a bias, and paths of hundreds of steps by less.

    One rounding has a standard deviation of at most 2^-8 of a moment, and a moment remembers earlier roundings. That
    makes 2^-8 / sqrt(1 - 0.9^2) = 0.9% of the first moment. For the root of the second, it is half of 2^-8 / sqrt(1 -
    0.95^2), 0.6%.
    """
    generator = torch.Generator().manual_seed(1)
    size = 4096
    curvature = torch.logspace(-2, 2, size)
    start, aim = torch.randn(size, generator=generator), torch.randn(size, generator=generator)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = (
        torch.optim.AdamW([weights[0]], lr=0.01, betas=BETAS, weight_decay=0.0),
        RoundedAdamW([{"params": [weights[1]]}], lr=0.01, betas=BETAS),
    )
    steps = 400
    for step in range(steps):
        noise = 0.5 * torch.randn(size, generator=generator)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
            weight.grad = curvature * (weight.detach() - aim) + noise
            optimizer.step()
    exact, found = (weight.detach() for weight in weights)
    losses = [float((curvature * (weight - aim).square()).sum() / 2) for weight in (start, exact, found)]
    assert losses[1] < 0.05 * losses[0]
    assert losses[2] == pytest.approx(losses[1], rel=0.02)
    moved, apart = float((exact - start).square().sum().sqrt()), float((found - exact).square().sum().sqrt())
    assert apart < 0.011 * moved
