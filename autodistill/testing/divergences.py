"""The conformance suite of divergences, which the author of a divergence subclasses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autodistill.distillation.losses.divergence import check_divergence, divergence_of
from autodistill.strategy.divergence import Divergence, get_divergence

if TYPE_CHECKING:
    from torch import Tensor


class DivergenceConformance:
    """The checks that every divergence must pass. Subclass it in a test file as `TestMine`, and name the divergence:

        class TestMine(DivergenceConformance):
            divergence = "mine"

    Attributes:
        divergence: Its name, from an entry point or `register_divergence`.
        mixture: The share that it is tested with, if it mixes.
    """

    divergence = ""
    mixture = 0.3

    def found(self) -> Divergence:
        """Return the divergence under test."""
        return get_divergence(self.divergence)

    def test_it_works_on_plain_distributions(self) -> None:
        """It gives a finite number for each row that depends on the student."""
        check_divergence(self.found())

    def test_its_slope_is_its_derivative(self) -> None:
        """The slope by each log-probability is that of differences in float64. A moving target is held fixed."""
        import torch

        found, log_p = self.found(), _distributions(0)
        log_q = _distributions(1)
        _, slope = self._compare(log_p, log_q)
        assert slope.shape == log_q.shape, f"its slope is {list(slope.shape)} for {list(log_q.shape)}"
        if found.moving_target:
            return
        for place in range(log_q.shape[1]):
            nudge = torch.zeros_like(log_q)
            nudge[:, place] = 1e-5
            above, below = (self._compare(log_p, moved)[0] for moved in (log_q + nudge, log_q - nudge))
            torch.testing.assert_close(slope[:, place], (above - below) / 2e-5, rtol=1e-5, atol=1e-8)

    def test_it_is_zero_between_equals(self) -> None:
        """A student that has the teacher's distribution has nothing to learn."""
        import torch

        log_p = _distributions(0)
        value, _ = self._compare(log_p, log_p.clone())
        torch.testing.assert_close(value, torch.zeros(len(log_p), dtype=log_p.dtype), rtol=0, atol=1e-12)

    def test_it_is_not_negative_where_it_says_so(self) -> None:
        """The value is not negative for any two distributions."""
        if self.found().nonnegative:
            for seed in range(8):
                value, _ = self._compare(_distributions(2 * seed), _distributions(2 * seed + 1))
                assert bool((value >= -1e-12).all()), f"it is {float(value.min())}"

    def test_each_row_is_by_itself(self) -> None:
        """A row's divergence does not depend on the other rows, which are different ones on another machine."""
        import torch

        log_p, log_q = _distributions(0), _distributions(1)
        together, slopes = self._compare(log_p, log_q)
        alone, slope = self._compare(log_p[3:4], log_q[3:4])
        torch.testing.assert_close(alone, together[3:4], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slope, slopes[3:4], rtol=1e-12, atol=1e-12)

    def test_what_it_is_given_stays_as_it_was(self) -> None:
        """Neither input is changed, since the engine reads both again."""
        log_p, log_q = _distributions(0), _distributions(1)
        divergence_of(self.divergence, self.mixture)(log_p, log_q)
        assert bool((log_p == _distributions(0)).all())
        assert bool((log_q == _distributions(1)).all())

    def _compare(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = divergence_of(self.divergence, self.mixture)(log_p, log_q)
        return (value.sum(dim=1) if value.ndim == 2 else value), slope


def _distributions(seed: int) -> Tensor:
    """Return log-probabilities, float64 [40, 7], which depend only on the seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(2 * torch.randn(40, 7, generator=generator, dtype=torch.float64), dim=1)
