"""One forward pass of a model over held-out sequences: what it says of every predicted token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autodistill.contracts import TokenScores
from autodistill.data import TokenSet
from autodistill.distillation.parallel import map_sequences

# Rows of logits held at once, so that a vocabulary of 150,000 costs 75 MB and not a multiple of the batch.
_CHUNK_ROWS = 128


def score(
    model: Any, data: TokenSet, teacher_top1: npt.NDArray[np.int32] | None = None, *, device: str = "cpu"
) -> tuple[TokenScores, npt.NDArray[np.int32]]:
    """Scores a model in float32, sequence by sequence.

    Args:
        model: Causal language model in float32 on `device`.
        data: Sequences [sequences, length]; position i predicts token i + 1. Where they say which tokens are answers,
            only those count.
        teacher_top1: int32 [data.predicted], the teacher's most likely tokens; None scores the teacher itself, which
            agrees with itself everywhere.
        device: Where the model lies.

    Returns:
        The scores, and the model's own most likely tokens, int32 [data.predicted].
    """

    def work(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        chosen = logits.gather(1, labels[:, None])[:, 0]
        return (torch.logsumexp(logits, dim=1) - chosen).double(), logits.argmax(dim=1).int()

    counted = np.ones(data.tokens.shape, dtype=bool) if data.answers is None else data.answers
    nll, predicted = _over_rows(model, data, counted, device, work)
    labels_all = data.tokens[:, 1:][counted[:, 1:]]
    scores = TokenScores(
        nll=nll,
        correct=predicted == labels_all,
        agrees=np.ones(len(predicted), dtype=bool) if teacher_top1 is None else predicted == teacher_top1,
        documents=np.ascontiguousarray(data.documents[:, 1:][counted[:, 1:]], dtype=np.int32),
    )
    return scores, predicted


def choices(
    model: Any, data: TokenSet, *, device: str = "cpu"
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """A model's most likely tokens, and by how much each leads, in float32.

    Args:
        model: Causal language model in float32 on `device`.
        data: Sequences [sequences, length], every token of which counts.
        device: Where the model lies.

    Returns:
        int32 and float32, each [sequences, length - 1]: the tokens, and their logit less the second largest.
    """
    shape = (len(data.tokens), -1)

    def work(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        (first, second), tokens = logits.topk(2, dim=1).values.unbind(1), logits.argmax(dim=1)
        return tokens.int(), first - second

    tokens, leads = _over_rows(model, data, np.ones(data.tokens.shape, dtype=bool), device, work)
    return tokens.reshape(shape), leads.reshape(shape)


def _over_rows(
    model: Any,
    data: TokenSet,
    counted: npt.NDArray[np.bool_],
    device: str,
    work: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Applies `work` to logits, float32 [rows, vocab], and true tokens, int64 [rows]; joins what it gives, in order.

    Args:
        counted: [sequences, length], the tokens that are predicted; no logits are computed for others.
    """
    model.eval()
    head = model.get_output_embeddings()

    def sequence(index: int) -> list[tuple[Tensor, ...]]:
        ids = torch.from_numpy(np.array(data.tokens[index], dtype=np.int64)).to(device)
        chosen = torch.from_numpy(np.flatnonzero(counted[index, 1:])).to(device)
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, chosen]
            parts = zip(hidden.split(_CHUNK_ROWS), ids[chosen + 1].split(_CHUNK_ROWS), strict=True)
            return [tuple(part.cpu() for part in work(head(rows), labels)) for rows, labels in parts]

    results = [part for parts in map_sequences(sequence, len(data.tokens), device) for part in parts]
    first, second = (torch.cat(columns).numpy() for columns in zip(*results, strict=True))
    return first, second
