"""Which predicted tokens the logit loss is taken over, and which of them the teacher predicts too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from autodistill.data.dataset import TokenSet

# Rows of logits made and left again at once: on a CPU 128, which of 50,000 in float32 are 25 MB.
_CPU_CHUNK_ROWS, _CHUNK_ROWS = 128, 512
# Rows of them whose entropies are taken at once on a CPU: 3 MB, which stay in the cache of a core from one pass to the
# next.
_ENTROPY_ROWS = 16
# Logits that the choice leaves to the loss: more than these, at once, are made again of the chosen rows.
_KEPT_BYTES = 2**27


class Learnt(NamedTuple):
    """The predicted tokens of some sequences that losses are averaged over.

    Where a student reads another rendering than its teacher, the teacher predicts those alone that both have; of the
    others the student's own text is learnt.

    Attributes:
        size: How many they are.
        heard: How many of them the teacher predicts too; they are the first.
        rows: Their places among the student's predicted tokens, sequence by sequence; of plain text all of them.
        teachers: The places of those heard among the teacher's predicted tokens.
        sequences: int64 [size], which of the sequences each is of.
    """

    size: int
    heard: int
    rows: Tensor | slice
    teachers: Tensor | slice
    sequences: npt.NDArray[np.int64]

    @property
    def shared(self) -> Tensor | slice:
        """Places of those heard among the student's predicted tokens."""
        return self.rows if isinstance(self.rows, slice) else self.rows[: self.heard]

    def chosen(self, share: float) -> int:
        """Return how many of them `uncertain_rows` takes."""
        return int(_quotas(self.sequences, share).sum())


def learnt_tokens(data: TokenSet, indices: list[int], everywhere: bool, device: str) -> Learnt:
    """Return what is learnt of the sequences `indices`: answers, or where `everywhere` says so all but padding."""
    length = data.tokens.shape[1] - 1
    if data.answers is None:
        count = len(indices) * length
        return Learnt(count, count, slice(None), slice(None), np.arange(count) // length)
    # What belongs to no document is padding.
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
    """The share of each sequence's rows, rounded up to whole ones."""
    return np.ceil(share * np.bincount(sequences)).astype(np.int64)


def uncertain_rows(
    states: Tensor, head: Callable[[Tensor], Tensor], share: float, sequences: npt.NDArray[np.int64]
) -> Tensor:
    """Indices, ascending, of the share of each sequence's rows whose predictions have the highest entropy.

    The selection of SE-KD (arXiv 2602.01395), within each sequence, so that it does not depend on which sequences are
    read at once, which memory and the number of processes decide. The entropies cost a product with the whole head for
    every row, which no gradient follows; loss and gradient then cost those of the chosen rows alone.

    Args:
        states: [rows, width], of the student after its final norm; one at the least. They take no gradient here.
        head: From states [n, width] to logits [n, vocab].
        share: Above 0 and at most 1, rounded up to whole rows of a sequence.
        sequences: int64 [rows], which sequence each is of.
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
    """The rows of `uncertain_rows` and the logits of these, [chosen, vocab], which a gradient follows.

    Those of a frozen head are what their entropies were taken of: nothing is multiplied twice.

    Args:
        states, head, share, sequences: As of `uncertain_rows`, but that the states' gradient follows.
        frozen: The weight that the head multiplies by, [vocab, width], where it is that alone and is not trained.
    """
    if frozen is None or len(states) * len(frozen) * frozen.element_size() > _KEPT_BYTES:
        chosen = uncertain_rows(states, head, share, sequences)
        return chosen, head(states[chosen])
    with torch.no_grad():
        logits = head(states.detach())
        chosen = _highest(_entropies(logits), share, sequences)
    return chosen, _Known.apply(states[chosen], frozen, logits[chosen])


class _Known(torch.autograd.Function):
    """Logits that are known already, as the product of the states and the weight that they are."""

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
    """Indices, ascending, of the share of each sequence's rows that has the highest."""
    falling = entropies.argsort(descending=True)
    # Sequence by sequence, each from its highest entropy on: how many of each stand first follows from its length.
    of = torch.from_numpy(sequences).to(entropies.device)
    ordered = falling[of[falling].argsort(stable=True)]
    counts, quotas = np.bincount(sequences), _quotas(sequences, share)
    starts = counts.cumsum() - counts
    places = np.concatenate([start + np.arange(quota) for start, quota in zip(starts, quotas, strict=True)])
    return ordered[torch.from_numpy(places).to(entropies.device)].sort().values


def _entropies(logits: Tensor) -> Tensor:
    """The entropy in nats of each row of logits [rows, vocab], computed for a few rows at a time."""
    few = _ENTROPY_ROWS if logits.device.type == "cpu" else _CHUNK_ROWS
    return torch.cat([_entropy(rows) for rows in logits.split(few)])


def _entropy(logits: Tensor) -> Tensor:
    """In nats, of logits [rows, vocab]: log Z - sum of p times logit."""
    shifted = logits.float()
    shifted -= shifted.amax(dim=1, keepdim=True)
    exponential = shifted.exp()
    total = exponential.sum(dim=1)
    return total.log() - exponential.mul_(shifted).sum(dim=1) / total
