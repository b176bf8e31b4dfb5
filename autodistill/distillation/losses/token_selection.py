"""Selects the predicted tokens that the logit loss averages over, and those that the teacher predicts too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autodistill.data.dataset import TokenSet

# Rows of logits per chunk. 128 rows on a CPU are 25 MB for 50,000 logits in float32.
_CPU_CHUNK_ROWS, _CHUNK_ROWS = 128, 512
# Rows per chunk whose entropies are computed on a CPU: 3 MB, which stay in a core's cache between passes.
_ENTROPY_ROWS = 16
# Most bytes of logits that are kept for the loss after the choice. Above that, the logits of chosen rows are computed
# again.
_KEPT_BYTES = 2**27


class Learnt(NamedTuple):
    """The predicted tokens of some sequences that losses are averaged over.

    If the student reads another rendering than its teacher, the teacher predicts only the tokens that both have. At the
    other tokens, the student learns from its text alone.

    Attributes:
        size: Number of these tokens.
        heard: Number of them that the teacher predicts too. They come first.
        rows: Their places among the student's predicted tokens, sequence by sequence. All places for plain text.
        teachers: Places of the first `heard` tokens among the teacher's predicted tokens.
        sequences: int64 [size], index of the sequence that each token belongs to.
    """

    size: int
    heard: int
    rows: Tensor | slice
    teachers: Tensor | slice
    sequences: npt.NDArray[np.int64]

    @property
    def shared(self) -> Tensor | slice:
        """Places, among the student's predicted tokens, of the tokens that the teacher predicts too."""
        return self.rows if isinstance(self.rows, slice) else self.rows[: self.heard]

    def chosen(self, share: float) -> int:
        """Return how many of the tokens `uncertain_rows` takes."""
        return int(_quotas(self.sequences, share).sum())


def learnt_tokens(data: TokenSet, indices: list[int], everywhere: bool, device: str) -> Learnt:
    """Return the learned tokens of the sequences `indices`: the answers, or all except padding with `everywhere`."""
    length = data.tokens.shape[1] - 1
    if data.answers is None:
        count = len(indices) * length
        return Learnt(count, count, slice(None), slice(None), np.arange(count) // length)
    # Tokens that belong to no document are padding.
    counted = (data.documents >= 0 if everywhere else data.answers)[indices, 1:].ravel()
    if data.teacher is None:
        places = np.flatnonzero(counted)
        rows = torch.from_numpy(places).to(device)
        return Learnt(len(rows), len(rows), rows, rows, places // length)
    assert data.shared is not None
    assert data.teacher.shared is not None
    shared = data.shared[indices, 1:].ravel()
    both, theirs = np.flatnonzero(shared), np.flatnonzero(data.teacher.shared[indices, 1:])
    places = np.concatenate([both, np.flatnonzero(counted & ~shared)])
    rows, heard = torch.from_numpy(places).to(device), torch.from_numpy(theirs).to(device)
    return Learnt(len(rows), len(both), rows, heard, places // length)


def _quotas(sequences: npt.NDArray[np.int64], share: float) -> npt.NDArray[np.int64]:
    """Return the number of rows in a share of each sequence's rows, rounded up."""
    return np.ceil(share * np.bincount(sequences)).astype(np.int64)


def uncertain_rows(
    states: Tensor, head: Callable[[Tensor], Tensor], share: float, sequences: npt.NDArray[np.int64]
) -> Tensor:
    """Return the indices, ascending, of the share of each sequence's rows whose predictions have the highest entropy.

    This is the selection of SE-KD (arXiv 2602.01395), but within each sequence. So it does not depend on the
    micro-batch, which memory and the number of processes decide. The entropies need a product with the whole head for
    every row, without a gradient. Loss and gradient are then computed only for the chosen rows.

    Args:
        states: [rows, width], at least one of the student's states after its final norm. They get no gradient here.
        head: Maps states [n, width] to logits [n, vocab].
        share: Above 0 and at most 1. The number of rows is rounded up for each sequence.
        sequences: int64 [rows], index of the sequence that each row belongs to.
    """
    chunk = _CPU_CHUNK_ROWS if states.device.type == "cpu" else _CHUNK_ROWS
    with torch.no_grad():
        found = [_entropies(head(rows)) for rows in states.detach().split(chunk)]
    return _highest(torch.cat(found), share, sequences)


def uncertain_logits(
    states: Tensor,
    head: Callable[[Tensor], Tensor],
    frozen: Tensor | None,
    share: float,
    sequences: npt.NDArray[np.int64],
) -> tuple[Tensor, Tensor]:
    """Return the rows of `uncertain_rows` and their logits, [chosen, vocab], with a gradient to the states.

    With a frozen head, the logits computed for the entropies are used again, so nothing is multiplied twice.

    Args:
        states, head, share, sequences: As for `uncertain_rows`, except that the states get a gradient.
        frozen: The head's weight, [vocab, width], if the head only multiplies by it and it is not trained. None
            otherwise.
    """
    if frozen is None or len(states) * len(frozen) * frozen.element_size() > _KEPT_BYTES:
        chosen = uncertain_rows(states, head, share, sequences)
        return chosen, head(states[chosen])
    with torch.no_grad():
        logits = head(states.detach())
        chosen = _highest(_entropies(logits), share, sequences)
    return chosen, _KnownLogits.apply(states[chosen], frozen, logits[chosen])


class _KnownLogits(torch.autograd.Function):
    """Returns logits that are already known, with the gradient of the product of states and weight that made them."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = states.dtype
        return logits.view_as(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return (gradient @ weight).to(ctx.dtype), None, None


def _highest(entropies: Tensor, share: float, sequences: npt.NDArray[np.int64]) -> Tensor:
    """Return the indices, ascending, of the share of each sequence's rows with the highest entropies."""
    falling = entropies.argsort(descending=True)
    # Order rows by sequence, and by falling entropy in each. A sequence's length then gives the number to take from its
    # start.
    of = torch.from_numpy(sequences).to(entropies.device)
    ordered = falling[of[falling].argsort(stable=True)]
    counts, quotas = np.bincount(sequences), _quotas(sequences, share)
    starts = counts.cumsum() - counts
    places = np.concatenate([start + np.arange(quota) for start, quota in zip(starts, quotas, strict=True)])
    return ordered[torch.from_numpy(places).to(entropies.device)].sort().values


def _entropies(logits: Tensor) -> Tensor:
    """Return the entropy in nats of each row of logits [rows, vocab], computed for a few rows at a time."""
    few = _ENTROPY_ROWS if logits.device.type == "cpu" else _CHUNK_ROWS
    return torch.cat([_entropy(rows) for rows in logits.split(few)])


def _entropy(logits: Tensor) -> Tensor:
    """Return the entropy in nats of each row of logits [rows, vocab]: log Z - sum of p times logit."""
    shifted = logits.float()
    shifted -= shifted.amax(dim=1, keepdim=True)
    exponential = shifted.exp()
    total = exponential.sum(dim=1)
    return total.log() - exponential.mul_(shifted).sum(dim=1) / total
