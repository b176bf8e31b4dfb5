"""What the teacher supplied for n predicted tokens, and how a student's logits are compared with it, rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from autodistill.distillation.losses.divergence import DivergenceAndSlope

# Rows of a head product done at once: with fewer, reading the head would cost more than multiplying by it.
_HEAD_ROWS = 128


class Outputs(Protocol):
    """The teacher's outputs for a few rows."""

    @property
    def heard(self) -> Tensor | None:
        """bool [rows], those that there are outputs for; None for all. The others learn from true tokens alone."""

    def compare(self, scaled: Tensor, divergence: DivergenceAndSlope) -> tuple[Tensor, Tensor]:
        """The divergence summed over the rows heard, and its gradient by `scaled`, [rows, vocab], 0 for the others.

        Args:
            scaled: [rows, vocab], the student's logits over the temperature, 0 at the most; they may be overwritten.
            divergence: How the two are compared.
        """


class Target(Protocol):
    """The teacher's outputs for n predicted tokens at one temperature."""

    @property
    def temperature(self) -> float:
        """The temperature, by which logits are divided."""

    @property
    def standardized(self) -> bool:
        """Whether logits of teacher and student are divided by the standard deviation of their row first."""

    def parts(self, step: int) -> Iterator[tuple[slice, Outputs]]:
        """The rows in order, `step` of them at a time."""

    def take(self, rows: Tensor | slice) -> Self:
        """The target of some rows, by their indices."""

    def renamed(self, first: int, second: int) -> Self:
        """The target with two tokens in each other's place."""

    def to(self, device: str) -> Self:
        """The target on a device."""


class Spread(NamedTuple):
    """A divergence from a few of a row's tokens, whose gradient elsewhere follows the student's own distribution.

    The student's exponentials e stand in the place of its logits, 0 at tokens of which `left_out` has the
    probabilities. The derivative by logit j is factor * e_j, plus what is `added` at `ids`.

    Attributes:
        value: Summed over the rows.
        total: [rows, 1], the sum of the exponentials, those left out included.
        factor: [rows, 1].
        ids: int64 [rows, k].
        added: [rows, k].
        left_out: [rows, k], of the student at `ids`; None where no exponential is 0 for it.
    """

    value: Tensor
    total: Tensor
    factor: Tensor
    ids: Tensor
    added: Tensor
    left_out: Tensor | None


def parts_of(rows: int, step: int) -> Iterator[slice]:
    """Slices of `step` rows, in order, that cover `rows` of them."""
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _gathered(exponential: Tensor, found: Spread) -> tuple[Tensor, Tensor]:
    """Value and whole gradient, in the place of the exponentials."""
    return found.value, exponential.mul_(found.factor).scatter_add_(1, found.ids, found.added)


@dataclass(frozen=True, kw_only=True)
class _TokenRows:
    """Some of the tokens of each row and what is known of them, in tensors whose first dimension is the rows."""

    ids: Tensor
    log_p: Tensor

    def spread(self, scaled: Tensor, divergence: DivergenceAndSlope) -> Spread:
        raise NotImplementedError

    def compare(self, scaled: Tensor, divergence: DivergenceAndSlope) -> tuple[Tensor, Tensor]:
        return _gathered(scaled, self.spread(scaled, divergence))

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
class TopTarget(_TokenRows):
    """The teacher's likeliest tokens, and the rest as one more outcome.

    The k tokens keep their exact probabilities; all others share one bucket with the rest of the teacher's mass. A
    divergence of these k + 1 outcomes is a lower bound of that of all tokens.

    Attributes:
        ids: int64 [n, k], distinct in a row.
        log_p: float [n, k], their exact log-probabilities at the temperature.
        temperature: See `Target`.
    """

    temperature: float
    standardized: bool = field(default=False, init=False)

    def spread(self, scaled: Tensor, divergence: DivergenceAndSlope) -> Spread:
        """The divergence of the k + 1 outcomes; `scaled`, as for `compare`, is overwritten by its exponentials.

        With g the slopes by the outcomes' log-probabilities, G their sum and q_t the student's mass outside of the k
        tokens S, the derivative by logit j is g_j - q_j G inside S and q_j (g_t / q_t - G) outside.
        """
        ids, log_p = self.ids, self.log_p.to(scaled.dtype)
        k, precision = ids.shape[1], torch.finfo(scaled.dtype)
        log_inside = scaled.gather(1, ids)
        exponential = scaled.exp_()
        inside = exponential.gather(1, ids)
        # The bucket is summed by itself: as a difference of sums, a small one would be rounding.
        exponential.scatter_(1, ids, 0.0)
        outside = exponential.sum(dim=1, keepdim=True)
        total = outside + inside.sum(dim=1, keepdim=True)
        q, log_q = inside / total, log_inside - total.log()
        q_rest = (outside / total).clamp_(min=precision.tiny)
        if k < scaled.shape[1]:
            # What is left of 1 is known to the rounding of the sum and no better.
            p_rest = (1 - log_p.exp().sum(dim=1, keepdim=True)).clamp_(min=precision.eps)
            log_p, log_q = torch.cat([log_p, p_rest.log_()], dim=1), torch.cat([log_q, q_rest.log()], dim=1)
        value, slope = divergence(log_p, log_q)
        total_slope = slope.sum(dim=1, keepdim=True)
        factor = (slope[:, k:].sum(dim=1, keepdim=True) / q_rest - total_slope) / total
        return Spread(value.sum(), total, factor, ids, slope[:, :k] - q * total_slope, q)


@dataclass(frozen=True, kw_only=True)
class SampledTarget(_TokenRows):
    """Tokens drawn from the teacher's distribution, each with the weight that makes sums over them unbiased.

    A sum of terms over all tokens is estimated by the weighted sum over the drawn ones, its gradient likewise: over
    many draws both are those of the whole distribution. This holds where a term of a token that the teacher finds
    unlikely is small, as in forward KL.

    Attributes:
        ids: int64 [n, m], distinct in a row but for padding.
        log_p: float [n, m], their log-probabilities at the temperature.
        weights: float [n, m], one over the probability that the token was drawn; 0 for padding.
        temperature: See `Target`.
    """

    weights: Tensor
    temperature: float
    standardized: bool = field(default=False, init=False)

    def spread(self, scaled: Tensor, divergence: DivergenceAndSlope) -> Spread:
        """The estimate; `scaled`, as for `compare`, is overwritten by its exponentials."""
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
    """What the writer of the text told of its likeliest tokens: in each place as many as it did, in some places none.

    A row with m tokens is compared as `TopTarget` compares it, as m + 1 outcomes.

    Attributes:
        ids: int64 [n, k], distinct in a row, those told first; -1 where fewer were told.
        log_p: float [n, k], their log-probabilities at temperature 1.
    """

    temperature: float = field(default=1.0, init=False)
    standardized: bool = field(default=False, init=False)

    @property
    def heard(self) -> Tensor:
        """Rows of which the writer told any token."""
        return self.ids[:, 0] >= 0

    def compare(self, scaled: Tensor, divergence: DivergenceAndSlope) -> tuple[Tensor, Tensor]:
        """See `Outputs.compare`; rows of as many tokens are compared together."""
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
    """The teacher's whole rows, made of its last states and its head when they are asked for.

    Attributes:
        states: [n, width], the teacher's last hidden states after its final norm.
        head: [vocab, width], in the type that the product is computed in.
        temperature, standardized: See `Target`. The latter is logit standardisation (arXiv 2403.01427).
        exchanged: Two tokens that stand in each other's place; None where all keep theirs.
    """

    states: Tensor
    head: Tensor
    temperature: float
    standardized: bool = False
    exchanged: tuple[int, int] | None = None

    def parts(self, step: int) -> Iterator[tuple[slice, Outputs]]:
        """See `Target.parts`; the logits of a block of rows are made at once."""
        rows = max(1, min(len(self.states), max(step, _HEAD_ROWS // step * step)))
        # One block of logits, written over by the next: the parts are read in order.
        room = self.head.new_empty(rows, len(self.head))
        for block in parts_of(len(self.states), rows):
            states = self.states[block].to(self.head.dtype)
            logits = torch.mm(states, self.head.T, out=room[: len(states)])
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
    """The teacher's logits [rows, vocab]; the other fields are those of `Target`."""

    logits: Tensor
    temperature: float
    standardized: bool

    @property
    def heard(self) -> None:
        """None: there are outputs for all rows."""
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
