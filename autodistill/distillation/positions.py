"""Which predicted tokens the logit loss is taken over."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Rows of logits made and left again at once: 128 of 50,000 in float32 are 25 MB.
_CHUNK_ROWS = 128
# Rows of them whose entropies are taken at once: 3 MB, which stay in the cache of a core from one pass to the next.
_ENTROPY_ROWS = 16


def uncertain_rows(states: Tensor, head: Callable[[Tensor], Tensor], share: float) -> Tensor:
    """Indices, ascending, of the share of rows whose predictions have the highest entropy; one of them at least.

    The selection of SE-KD (arXiv 2602.01395). The entropies cost a product with the whole head for every row, which
    no gradient follows; loss and gradient then cost those of the chosen rows alone.

    Args:
        states: [rows, width], of the student after its final norm; they take no gradient here.
        head: From states [n, width] to logits [n, vocab].
        share: Above 0 and at most 1, rounded up to whole rows.
    """
    with torch.no_grad():
        chunks = states.detach().split(_CHUNK_ROWS)
        found = [_entropy(few) for rows in chunks for few in head(rows).split(_ENTROPY_ROWS)]
        return torch.cat(found).topk(math.ceil(share * len(states))).indices.sort().values


def _entropy(logits: Tensor) -> Tensor:
    """In nats, of logits [rows, vocab]: log Z - sum of p times logit."""
    shifted = logits.float()
    shifted -= shifted.amax(dim=1, keepdim=True)
    exponential = shifted.exp()
    total = exponential.sum(dim=1)
    return total.log() - exponential.mul_(shifted).sum(dim=1) / total
