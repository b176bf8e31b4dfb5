"""Temperature schedules against their formulas, and snapping to the nearest stored temperature."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autodistill.distillation.losses.schedules import GRID, snap, temperature_at
from autodistill.strategy.recipe import Temperature

temperatures = st.floats(0.5, 8)


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        (0.5, 0.5),
        (0.59, 0.5),  # 0.59^2 < 0.5 * 0.7
        (0.6, 0.7),
        (1.22, 1.0),  # 1.22^2 < 1 * 1.5
        (1.23, 1.5),
        (1.74, 2.0),
        (2.44, 2.0),
        (2.46, 3.0),
        (7.0, 8.0),
        (6.9, 6.0),  # 6.9^2 < 6 * 8
        (8.0, 8.0),
    ],
)
def test_snaps_by_ratio(temperature, expected):
    assert snap(temperature) == expected


@given(temperatures)
def test_no_stored_temperature_is_nearer(temperature):
    distances = np.abs(np.log(np.array(GRID) / temperature))
    assert abs(math.log(snap(temperature) / temperature)) == pytest.approx(distances.min(), abs=1e-9)


def test_the_lower_of_two_equally_near():
    assert snap(math.sqrt(2.0 * 3.0)) == 2.0
    assert snap(math.sqrt(4.0 * 5.0)) == 4.0


def test_stored_temperatures_stay():
    assert [snap(temperature) for temperature in GRID] == list(GRID)


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        ("linear", 3.25, 2.5),
        ("cosine", 2.5 + 1.5 * math.cos(math.pi / 4), 2.5),
        ("exponential", 4 * 0.25**0.25, 2.0),
    ],
)
def test_shapes(shape, quarter, half):
    schedule = Temperature(shape=shape, start=4.0, end=1.0)
    at = [temperature_at(schedule, tokens, 1000) for tokens in (0, 250, 500, 1000)]
    np.testing.assert_allclose(at, [4, quarter, half, 1], rtol=1e-12)


def test_constant():
    schedule = Temperature(shape="constant", start=3.0, end=3.0)
    assert {temperature_at(schedule, tokens, 100) for tokens in (0, 1, 99, 100, 500)} == {3.0}


@given(st.sampled_from(["linear", "cosine", "exponential"]), temperatures, temperatures, st.integers(0, 2000))
def test_stays_between_its_ends_and_beyond_the_horizon(shape, start, end, tokens):
    value = temperature_at(Temperature(shape=shape, start=start, end=end), tokens, 1000)
    assert min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9
    if tokens >= 1000:
        assert value == pytest.approx(end)
