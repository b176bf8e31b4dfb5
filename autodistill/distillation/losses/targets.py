"""The teacher's outputs for n predicted tokens, and their comparison with a student's logits, some rows at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from autodistill.distillation.losses.divergence import DivergenceAndSlope

# Least rows of a product with the head. With fewer, reading the head takes longer than multiplying by it.
_HEAD_ROWS = 128


class Outputs(Protocol):
    """The teacher's outputs for a few rows."""

    @property
    def heard(self) -> Tensor | None:
        """bool [rows], the rows with outputs. None if all have them. Other rows learn from the true tokens alone."""

    def compare(self, scaled: Tensor, divergence: DivergenceAndSlope) -> tuple[Tensor, Tensor]:
        """Return the divergence summed over rows with outputs, and its gradient by `scaled`, [rows, vocab], or 0.

        Args:
            scaled: [rows, vocab], the student's logits divided by the temperature, shifted to be at most 0. They may be
                overwritten.
            divergence: The divergence between teacher and student.
        """


class Target(Protocol):
    """The teacher's outputs for n predicted tokens at one temperature."""

    @property
    def temperature(self) -> float:
        """The temperature that divides the logits."""

    @property
    def standardized(self) -> bool:
        """Whether logits of teacher and student are first divided by the standard deviation of their row."""

    def parts(self, step: int) -> Iterator[tuple[slice, Outputs]]:
        """Yield the outputs of the rows in order, `step` rows at a time."""

    def take(self, rows: Tensor | slice) -> Self:
        """Return the target of some rows, by their indices."""

    def renamed(self, first: int, second: int) -> Self:
        """Return the target with two token ids exchanged."""

    def to(self, device: str) -> Self:
        """Return the target on a device."""


class Spread(NamedTuple):
    """A divergence computed from a few of a row's tokens. Elsewhere, its gradient follows the student's distribution.

    The student's exponentials e have overwritten its logits. They are 0 at tokens whose probabilities are in
    `left_out`. The derivative by logit j is factor * e_j, plus `added` at `ids`.

    Attributes:
        value: Divergence, summed over the rows.
        total: [rows, 1], the sum of all exponentials, including those left out.
        factor: [rows, 1], factor of the exponentials in the derivative.
        ids: int64 [rows, k], the tokens.
        added: [rows, k], what the derivative has in addition at `ids`.
        left_out: [rows, k], the student's probabilities at `ids`, or None if no exponentials were set to 0.
    """

    value: Tensor
    total: Tensor
    factor: Tensor
    ids: Tensor
    added: Tensor
    left_out: Tensor | None


def parts_of(rows: int, step: int) -> Iterator[slice]:
    """Yield slices of `step` rows, in order, that cover `rows` rows."""
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _gathered(exponential: Tensor, found: Spread) -> tuple[Tensor, Tensor]:
    """Return the value and the whole gradient, which overwrites the exponentials."""
    return found.value, exponential.mul_(found.factor).scatter_add_(1, found.ids, found.added)


@dataclass(frozen=True, kw_only=True)
class _TokenRows(ABC):
    """Some tokens of each row and their data, in tensors whose first dimension is the rows."""

    ids: Tensor
    log_p: Tensor

    @abstractmethod
    def compare(self, scaled: Tensor, divergence: DivergenceAndSlope) -> tuple[Tensor, Tensor]:
        """See `Outputs.compare`."""

    @property
    def heard(self) -> Tensor | None:
        return None

    def parts(self, step: int) -> Iterator[tuple[slice, Outputs]]:
        for part in parts_of(len(self.ids), step):
            yield part, self.take(part)

    def take(self, rows: Tensor | slice) -> Self:
        return replace(self, **{name: tensor[rows] for name, tensor in self._tensors()})

    def renamed(self, first: int, second: int) -> Self:
        ids = self.ids
        return replace(self, ids=torch.where(ids == first, second, torch.where(ids == second, first, ids)))

    def to(self, device: str) -> Self:
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors()})

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                yield one.name, value


@dataclass(frozen=True, kw_only=True)
class _SpreadRows(_TokenRows):
    """Tokens whose divergence is computed as a `Spread`."""

    @abstractmethod
    def spread(self, scaled: Tensor, divergence: DivergenceAndSlope) -> Spread:
        """Return the divergence and its slope by the outcomes. `scaled`, as for `compare`, may be overwritten."""

    def compare(self, scaled: Tensor, divergence: DivergenceAndSlope) -> tuple[Tensor, Tensor]:
        return _gathered(scaled, self.spread(scaled, divergence))


@dataclass(frozen=True, kw_only=True)
class TopTarget(_SpreadRows):
    """The teacher's likeliest tokens, and all other tokens as one more outcome.

    The k tokens keep their exact probabilities. All others share one bucket with the rest of the teacher's probability.
    A divergence over these k + 1 outcomes is a lower bound of the divergence over all tokens.

    Attributes:
        ids: int64 [n, k], the tokens, distinct in a row.
        log_p: float [n, k], their exact log-probabilities at the temperature.
        temperature: See `Target`.
    """

    temperature: float
    standardized: bool = field(default=False, init=False)

    def spread(self, scaled: Tensor, divergence: DivergenceAndSlope) -> Spread:
        """Return the divergence of the k + 1 outcomes. `scaled`, as for `compare`, is overwritten by its exponentials.

        Let S be the k tokens, g the slopes by the outcomes' log-probabilities, G their sum, and q_t the student's
        probability outside S. The derivative by logit j is g_j - q_j G inside S, and q_j (g_t / q_t - G) outside.
        """
        ids, log_p = self.ids, self.log_p.to(scaled.dtype)
        k, precision = ids.shape[1], torch.finfo(scaled.dtype)
        log_inside = scaled.gather(1, ids)
        exponential = scaled.exp_()
        inside = exponential.gather(1, ids)
        # The bucket is summed directly. As a difference of sums, a small bucket would be mostly rounding error.
        exponential.scatter_(1, ids, 0.0)
        outside = exponential.sum(dim=1, keepdim=True)
        total = outside + inside.sum(dim=1, keepdim=True)
        q, log_q = inside / total, log_inside - total.log()
        q_rest = (outside / total).clamp_(min=precision.tiny)
        if k < scaled.shape[1]:
            # The rest to 1 is only as exact as the rounding of the sum, so it is at least eps.
            p_rest = (1 - log_p.exp().sum(dim=1, keepdim=True)).clamp_(min=precision.eps)
            log_p, log_q = torch.cat([log_p, p_rest.log_()], dim=1), torch.cat([log_q, q_rest.log()], dim=1)
        value, slope = divergence(log_p, log_q)
        total_slope = slope.sum(dim=1, keepdim=True)
        factor = (slope[:, k:].sum(dim=1, keepdim=True) / q_rest - total_slope) / total
        return Spread(value.sum(), total, factor, ids, slope[:, :k] - q * total_slope, q)


@dataclass(frozen=True, kw_only=True)
class SampledTarget(_SpreadRows):
    """Tokens drawn from the teacher's distribution, with weights that make sums over them unbiased.

    The weighted sum over drawn tokens estimates the sum over all tokens, and so does its gradient. On average over many
    draws, both equal those of the whole distribution. This needs terms that are small for tokens the teacher finds
    unlikely, as in forward KL.

    Attributes:
        ids: int64 [n, m], the tokens, distinct in a row except for padding.
        log_p: float [n, m], their log-probabilities at the temperature.
        weights: float [n, m], 1 / the probability that the token was drawn; 0 for padding.
        temperature: See `Target`.
    """

    weights: Tensor
    temperature: float
    standardized: bool = field(default=False, init=False)

    def spread(self, scaled: Tensor, divergence: DivergenceAndSlope) -> Spread:
        """Return the estimate. `scaled`, as for `compare`, is overwritten by its exponentials."""
        ids, log_p, weights = self.ids, self.log_p.to(scaled.dtype), self.weights.to(scaled.dtype)
        log_inside = scaled.gather(1, ids)
        exponential = scaled.exp_()
        total = exponential.sum(dim=1, keepdim=True)
        value, slope = divergence(log_p, log_inside - total.log())
        slope *= weights
        factor = -slope.sum(dim=1, keepdim=True) / total
        return Spread(value.mul_(weights).sum(), total, factor, ids, slope, None)


@dataclass(frozen=True, kw_only=True)
class WrittenTarget(_TokenRows):
    """The likeliest tokens that the writer of the text reported. Their number differs by place, and can be 0.

    A row with m tokens is compared as m + 1 outcomes, as in `TopTarget`.

    Attributes:
        ids: int64 [n, k], the reported tokens, distinct in a row, then -1 if fewer than k were reported.
        log_p: float [n, k], their log-probabilities at temperature 1.
    """

    temperature: float = field(default=1.0, init=False)
    standardized: bool = field(default=False, init=False)

    @property
    def heard(self) -> Tensor:
        """The rows for which the writer reported at least one token."""
        return self.ids[:, 0] >= 0

    def compare(self, scaled: Tensor, divergence: DivergenceAndSlope) -> tuple[Tensor, Tensor]:
        """See `Outputs.compare`. Rows with the same number of tokens are compared together."""
        gradient = torch.zeros_like(scaled)
        counts = (self.ids >= 0).sum(dim=1)
        value = scaled.new_zeros(())
        for count in counts.unique().tolist():
            if count == 0:
                continue
            rows = (counts == count).nonzero()[:, 0]
            told = TopTarget(ids=self.ids[rows, :count], log_p=self.log_p[rows, :count], temperature=1.0)
            part, gradient[rows] = told.compare(scaled[rows], divergence)
            value += part
        return value, gradient


@dataclass(frozen=True, kw_only=True)
class FullTarget:
    """The teacher's whole rows of logits, computed on demand from its last states and its head.

    Attributes:
        states: [n, width], the teacher's last hidden states after its final norm.
        head: [vocab, width], in the type of the product.
        temperature, standardized: See `Target`. `standardized` is logit standardisation (arXiv 2403.01427).
        exchanged: Two token ids to exchange, or None.
        cap: The number that the teacher's logits never reach, or None if they are not capped.
    """

    states: Tensor
    head: Tensor
    temperature: float
    standardized: bool = False
    exchanged: tuple[int, int] | None = None
    cap: float | None = None

    def parts(self, step: int) -> Iterator[tuple[slice, Outputs]]:
        """See `Target.parts`. The logits of a block of rows are computed together."""
        rows = max(1, min(len(self.states), max(step, _HEAD_ROWS // step * step)))
        # Each block of logits overwrites the one before, because the parts are read in order.
        room = self.head.new_empty(rows, len(self.head))
        for block in parts_of(len(self.states), rows):
            states = self.states[block].to(self.head.dtype)
            logits = torch.mm(states, self.head.T, out=room[: len(states)])
            if self.cap is not None:
                logits.div_(self.cap).tanh_().mul_(self.cap)
            if self.exchanged:
                logits[:, list(self.exchanged)] = logits[:, list(reversed(self.exchanged))]
            for part in parts_of(len(logits), step):
                outputs = FullOutputs(logits[part], self.temperature, self.standardized)
                yield slice(block.start + part.start, block.start + part.stop), outputs

    def take(self, rows: Tensor | slice) -> FullTarget:
        """See `Target.take`."""
        return replace(self, states=self.states[rows])

    def renamed(self, first: int, second: int) -> FullTarget:
        """See `Target.renamed`."""
        return replace(self, exchanged=(first, second))

    def to(self, device: str) -> FullTarget:
        """See `Target.to`."""
        return replace(self, states=self.states.to(device), head=self.head.to(device))


class FullOutputs(NamedTuple):
    """The teacher's logits [rows, vocab]. The other fields are as in `Target`."""

    logits: Tensor
    temperature: float
    standardized: bool

    @property
    def heard(self) -> None:
        """None, because all rows have outputs."""
        return None

    def compare(self, scaled: Tensor, divergence: DivergenceAndSlope) -> tuple[Tensor, Tensor]:
        """See `Outputs.compare`."""
        logits = self.logits.to(scaled.dtype)
        divisor: Tensor | float = self.temperature
        if self.standardized:
            divisor = divisor * logits.std(dim=1, keepdim=True)
        log_p = torch.log_softmax(logits / divisor, dim=1)
        log_q = scaled.sub_(scaled.exp().sum(dim=1, keepdim=True).log_())
        value, slope = divergence(log_p, log_q)
        return value.sum(), slope.addcmul_(log_q.exp_(), slope.sum(dim=1, keepdim=True), value=-1)
