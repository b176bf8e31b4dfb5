"""Scores a model at every predicted token of held-out sequences, in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autodistill.data.dataset import TokenSet
from autodistill.errors import InputError
from autodistill.inference.batching import by_length, logit_rows, map_batches, pass_tokens
from autodistill.inference.outputs import TeacherReference, TokenScores

# Teacher tokens kept for each predicted token: 2 KB, from which a divergence is computed in a student's scoring pass.
REFERENCE_TOKENS = 256
_LEAST_REST = 1e-7
# Rows of logits held at once on a CPU. A vocabulary of 150,000 then costs 75 MB, whatever the sequence length.
_CHUNK_ROWS = 128


def score(
    model: Any,
    data: TokenSet,
    reference: TeacherReference | None = None,
    *,
    device: str = "cpu",
    begun: Sequence[Tensor] | None = None,
) -> tuple[TokenScores, npt.NDArray[np.int32]]:
    """Score a model in float32.

    Args:
        model: Causal language model in float32 on `device`.
        data: Sequences [sequences, length]; position i predicts token i + 1. If they mark which tokens are answers, or
            which tokens all renderings share, only the marked ones count.
        reference: The teacher's reference for each of the `data.predicted` tokens, in the teacher's own rendering and
            with its own end of answers. None scores the teacher itself, which agrees with itself everywhere and
            diverges nowhere.
        device: Where the model lies.
        begun: Inputs of the first block, used instead of embedded tokens: [1, length, width] for each sequence.

    Returns:
        The scores, and the model's own most likely tokens, int32 [data.predicted].
    """
    scores, columns = _score(model, data, reference, device, lambda logits, total, rows: [], begun)
    return scores, columns[0]


def score_teacher(
    model: Any, data: TokenSet, *, device: str = "cpu", begun: Sequence[Tensor] | None = None
) -> tuple[TokenScores, TeacherReference]:
    """Score a teacher, and keep the reference with which students are compared.

    Args:
        model, data, device, begun: As for `score`.

    Raises:
        InputError: The likelihood of a token is not finite, because weights are damaged or too large for float32.
    """

    def likeliest(logits: Tensor, total: Tensor, rows: slice) -> list[Tensor]:
        values, tokens = logits.topk(min(REFERENCE_TOKENS, logits.shape[1]), dim=1, sorted=False)
        return [tokens.int(), values - total[:, None]]

    scores, (top1, tokens, log_probs) = _score(model, data, None, device, likeliest, begun)
    if broken := int((~np.isfinite(scores.nll)).sum()):
        raise InputError(
            f"the teacher's likelihoods of {broken:,} of {len(scores.nll):,} tokens are no finite numbers: its weights "
            "are damaged, or too large for float32; get the model again, or give another --teacher"
        )
    return scores, TeacherReference(top1=top1, tokens=tokens, log_probs=log_probs)


def _score(
    model: Any,
    data: TokenSet,
    reference: TeacherReference | None,
    device: str,
    keep: Callable[[Tensor, Tensor, slice], list[Tensor]],
    begun: Sequence[Tensor] | None = None,
) -> tuple[TokenScores, list[npt.NDArray[Any]]]:
    """Return scores, likeliest tokens, and what `keep` returns for logits [rows, vocab] and their logsumexp [rows]."""

    def work(logits: Tensor, labels: Tensor, rows: slice) -> list[Tensor]:
        """Return, per row: nats of its label, likeliest token, its probability, divergence in nats, what is kept."""
        total = torch.logsumexp(logits, dim=1)
        chosen = logits.gather(1, labels[:, None])[:, 0]
        largest, token = logits.max(dim=1)
        found = [(total - chosen).double(), token.int(), (largest - total).double().exp()]
        found.append(
            torch.zeros_like(total, dtype=torch.float64)
            if reference is None
            else _divergence(reference, rows, logits, total)
        )
        return [*found, *keep(logits, total, rows)]

    if reference is not None and data.ends is not None:
        reference = reference.renamed(*data.ends)
    counted = np.ones(data.tokens.shape, dtype=bool) if data.scored is None else data.scored
    nll, predicted, confidence, divergence, *kept = _over_rows(model, data, counted, device, work, begun)
    labels_all = data.tokens[:, 1:][counted[:, 1:]]
    scores = TokenScores(
        nll=nll,
        correct=predicted == labels_all,
        agrees=np.ones(len(predicted), dtype=bool) if reference is None else predicted == reference.top1,
        documents=np.ascontiguousarray(data.documents[:, 1:][counted[:, 1:]], dtype=np.int32),
        confidence=confidence,
        divergence=divergence,
        window=data.tokens.shape[1],
        outcomes=None if reference is None else _outcomes(reference, model),
        teacher_correct=None if reference is None else reference.top1 == labels_all,
    )
    return scores, [predicted, *kept]


def scores_against_itself(scores: TokenScores, teacher: Any, reference: TeacherReference) -> TokenScores:
    """Return a teacher's scores as those of a student equal to it, which agrees everywhere and diverges nowhere.

    Args:
        scores, reference: Results of `score_teacher`.
        teacher: The model.
    """
    return replace(scores, outcomes=_outcomes(reference, teacher), teacher_correct=scores.correct)


def _outcomes(reference: TeacherReference, model: Any) -> int:
    tokens = reference.tokens.shape[1]
    return tokens + (tokens < model.get_output_embeddings().out_features)


def _divergence(reference: TeacherReference, rows: slice, logits: Tensor, total: Tensor) -> Tensor:
    """Return KL(teacher || student) in nats, float64 [rows], over the teacher's stored tokens and all others as one."""
    tokens = torch.from_numpy(reference.tokens[rows].astype(np.int64)).to(logits.device)
    teacher = torch.from_numpy(reference.log_probs[rows]).to(logits.device).double()
    student = (logits.gather(1, tokens) - total[:, None]).double()
    found = (teacher.exp() * (teacher - student)).sum(dim=1)
    if tokens.shape[1] == logits.shape[1]:
        return found
    # Rounded float32 sums may reach 1. The rest is then set to the smallest rest that float32 can resolve.
    rest, others = ((1 - part.exp().sum(dim=1)).clamp_min(_LEAST_REST) for part in (teacher, student))
    return found + rest * (rest.log() - others.log())


def choices(
    model: Any, data: TokenSet, *, device: str = "cpu", begun: Sequence[Tensor] | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the likeliest token at each place but the first, the nats of the token there, and the likeliest's lead.

    A lead is the difference between the largest and the second largest logit.

    Args:
        model: Causal language model in float32 on `device`.
        data: Sequences [sequences, length]; all tokens count.
        device, begun: As for `score`.

    Returns:
        int32, float32 and float32, each [sequences, length - 1].
    """
    shape = (len(data.tokens), -1)

    def work(logits: Tensor, labels: Tensor, rows: slice) -> list[Tensor]:
        first, second = logits.topk(2, dim=1).values.unbind(1)
        nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return [logits.argmax(dim=1).int(), nll, first - second]

    found = _over_rows(model, data, np.ones(data.tokens.shape, dtype=bool), device, work, begun)
    tokens, nll, leads = (one.reshape(shape) for one in found)
    return tokens, nll, leads


def _over_rows(
    model: Any,
    data: TokenSet,
    counted: npt.NDArray[np.bool_],
    device: str,
    work: Callable[[Tensor, Tensor, slice], list[Tensor]],
    begun: Sequence[Tensor] | None = None,
) -> list[npt.NDArray[Any]]:
    """Apply `work` to float32 logits [rows, vocab] and true int64 tokens [rows], and join its results in order.

    `work` also receives the position of its rows among all counted tokens.

    Args:
        counted: [sequences, length], which tokens are predicted; logits are computed for no others.
        begun: As for `score`.
    """
    model.eval()
    head = model.get_output_embeddings()
    starts = np.cumsum([0, *counted[:, 1:].sum(axis=1)])
    at_once = _CHUNK_ROWS if device == "cpu" else logit_rows(head.out_features)
    sequences, length = data.tokens.shape

    def pass_over(batch: range) -> list[Tensor]:
        """Return the results of `work` for the counted tokens of some sequences."""
        part = slice(batch.start, batch.stop)
        ids = torch.from_numpy(np.array(data.tokens[part], dtype=np.int64)).to(device)
        row, column = np.nonzero(counted[part, 1:])
        chosen = torch.from_numpy(row * length + column).to(device)
        with torch.no_grad():
            given = {"input_ids": ids} if begun is None else {"inputs_embeds": torch.cat(list(begun[part]))}
            hidden = model.base_model(**given, use_cache=False).last_hidden_state.flatten(0, 1)[chosen]
            parts = zip(hidden.split(at_once), ids.flatten()[chosen + 1].split(at_once), strict=True)
            found, start = [], int(starts[batch.start])
            for rows, labels in parts:
                places = slice(start, start + len(labels))
                found.append(work(head(rows), labels, places))
                start = places.stop
            return [torch.cat(columns).cpu() for columns in zip(*found, strict=True)]

    tokens = pass_tokens(model, device)
    results = map_batches(pass_over, sequences, by_length([length] * sequences), tokens, device)
    return [torch.cat(columns).numpy() for columns in zip(*results, strict=True)]
