"""Which predicted tokens the logit loss is taken over, and which of them the teacher predicts too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from autodistill.token_sets import TokenSet

# Rows of logits made and left again at once: on a CPU 128, which of 50,000 in float32 are 25 MB.
_CPU_CHUNK_ROWS, _CHUNK_ROWS = 128, 512
# Rows of them whose entropies are taken at once on a CPU: 3 MB, which stay in the cache of a core from one pass to the
# next.
_ENTROPY_ROWS = 16


class Learnt(NamedTuple):
    """The predicted tokens of some sequences that losses are averaged over.

    Where a student reads another rendering than its teacher, the teacher predicts those alone that both have; of the
    others the student's own text is learnt.

    Attributes:
        size: How many they are.
        heard: How many of them the teacher predicts too; they are the first.
        rows: Their places among the student's predicted tokens, sequence by sequence; of plain text all of them.
        teachers: The places of those heard among the teacher's predicted tokens.
    """

    size: int
    heard: int
    rows: Tensor | slice
    teachers: Tensor | slice

    @property
    def shared(self) -> Tensor | slice:
        """Places of those heard among the student's predicted tokens."""
        return self.rows if isinstance(self.rows, slice) else self.rows[: self.heard]


def learnt_tokens(data: TokenSet, indices: list[int], everywhere: bool, device: str) -> Learnt:
    """What is learnt of the sequences `indices`: answers, or where `everywhere` says so all but padding."""
    if data.answers is None:
        count = len(indices) * (data.tokens.shape[1] - 1)
        return Learnt(count, count, slice(None), slice(None))
    # What belongs to no document is padding.
    counted = (data.documents >= 0 if everywhere else data.answers)[indices, 1:].ravel()
    if data.teacher is None:
        rows = torch.from_numpy(np.flatnonzero(counted)).to(device)
        return Learnt(len(rows), len(rows), rows, rows)
    assert data.shared is not None
    assert data.teacher.shared is not None
    shared = data.shared[indices, 1:].ravel()
    both, theirs = np.flatnonzero(shared), np.flatnonzero(data.teacher.shared[indices, 1:])
    rows = torch.from_numpy(np.concatenate([both, np.flatnonzero(counted & ~shared)])).to(device)
    return Learnt(len(rows), len(both), rows, torch.from_numpy(theirs).to(device))


def uncertain_rows(states: Tensor, head: Callable[[Tensor], Tensor], share: float) -> Tensor:
    """Indices, ascending, of the share of rows whose predictions have the highest entropy; one of them at least.

    The selection of SE-KD (arXiv 2602.01395). The entropies cost a product with the whole head for every row, which
    no gradient follows; loss and gradient then cost those of the chosen rows alone.

    Args:
        states: [rows, width], of the student after its final norm; they take no gradient here.
        head: From states [n, width] to logits [n, vocab].
        share: Above 0 and at most 1, rounded up to whole rows.
    """
    on_cpu = states.device.type == "cpu"
    chunk, entropies = (_CPU_CHUNK_ROWS, _ENTROPY_ROWS) if on_cpu else (_CHUNK_ROWS, _CHUNK_ROWS)
    with torch.no_grad():
        found = [_entropy(few) for rows in states.detach().split(chunk) for few in head(rows).split(entropies)]
        return torch.cat(found).topk(math.ceil(share * len(states))).indices.sort().values


def _entropy(logits: Tensor) -> Tensor:
    """In nats, of logits [rows, vocab]: log Z - sum of p times logit."""
    shifted = logits.float()
    shifted -= shifted.amax(dim=1, keepdim=True)
    exponential = shifted.exp()
    total = exponential.sum(dim=1)
    return total.log() - exponential.mul_(shifted).sum(dim=1) / total
