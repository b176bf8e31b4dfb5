"""How likely a model holds continuations of prompts, and the tokens of long texts in strided windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autodistill.contracts import Likelihood
from autodistill.distillation.parallel import map_sequences

# Tokens of a pass, padding included.
BATCH_TOKENS = 1024

Tokens = Sequence[int]


def continuations(
    model: Any, pairs: Sequence[tuple[Tokens, Tokens]], *, batch_tokens: int = BATCH_TOKENS, device: str = "cpu"
) -> list[Likelihood]:
    """The log-likelihood of each continuation after its prompt, in float32.

    A prompt runs once, however many continuations it has, which then see its keys and values. Prompts of equal length
    run together, so that none is padded; continuations are padded behind their ends, which nothing sees.

    Args:
        model: Causal language model in float32 on `device`.
        pairs: Token ids of prompt and continuation, neither empty.
        batch_tokens: Of the prompts of a pass, and of their continuations.
        device: Where the model lies.
    """
    model.eval()
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for place, (prompt, _) in enumerate(pairs):
        by_prompt.setdefault(tuple(prompt), []).append(place)
    batches = list(_batches(by_prompt, [len(rest) for _, rest in pairs], batch_tokens))

    def work(index: int) -> list[tuple[int, Likelihood]]:
        prompts = batches[index]
        places = [place for prompt in prompts for place in by_prompt[prompt]]
        owners = [row for row, prompt in enumerate(prompts) for _ in by_prompt[prompt]]
        found = _likelihoods(model, prompts, owners, [pairs[place][1] for place in places], device)
        return list(zip(places, found, strict=True))

    found = dict(item for batch in map_sequences(work, len(batches), device) for item in batch)
    return [found[place] for place in range(len(pairs))]


def _batches(
    by_prompt: dict[tuple[int, ...], list[int]], sizes: Sequence[int], limit: int
) -> Iterator[list[tuple[int, ...]]]:
    """Prompts of equal length, so many that neither they nor their padded continuations have more tokens."""
    batch: list[tuple[int, ...]] = []
    rows = longest = 0
    # The longest first: what takes most memory is known at once.
    for prompt in sorted(by_prompt, key=lambda prompt: (-len(prompt), by_prompt[prompt][0])):
        more = len(by_prompt[prompt])
        widest = max(longest, *(sizes[place] for place in by_prompt[prompt]))
        over = (len(batch) + 1) * len(prompt) > limit or (rows + more) * widest > limit
        if batch and (over or len(prompt) != len(batch[0])):
            yield batch
            batch, rows = [], 0
            widest = max(sizes[place] for place in by_prompt[prompt])
        batch.append(prompt)
        rows, longest = rows + more, widest
    if batch:
        yield batch


def _likelihoods(
    model: Any, prompts: Sequence[Tokens], owners: Sequence[int], rest: Sequence[Tokens], device: str
) -> list[Likelihood]:
    head = model.get_output_embeddings()
    owner = torch.tensor(owners, device=device)
    lengths = torch.tensor([len(tokens) for tokens in rest], device=device)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens in rest], batch_first=True).to(device)
    with torch.no_grad():
        first = model.base_model(input_ids=torch.tensor(prompts, device=device), use_cache=True)
        hidden = first.last_hidden_state[:, -1:][owner]
        if ids.shape[1] > 1:
            cache = first.past_key_values
            cache.batch_select_indices(owner)
            later = model.base_model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True).last_hidden_state
            hidden = torch.cat([hidden, later], dim=1)
        counted = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        logits = head(hidden[counted]).float()
        labels = ids[counted]
        chosen = (logits.gather(1, labels[:, None])[:, 0] - torch.logsumexp(logits, dim=1)).double()
        right = logits.argmax(dim=1) == labels
    row = counted.nonzero()[:, 0]
    sums = torch.zeros(len(rest), dtype=torch.float64, device=device).index_add_(0, row, chosen)
    wrong = torch.zeros(len(rest), dtype=torch.float64, device=device).index_add_(0, row, (~right).double())
    return [
        Likelihood(log_likelihood=float(total), tokens=len(tokens), greedy=not missed)
        for total, tokens, missed in zip(sums.tolist(), rest, wrong.tolist(), strict=True)
    ]


def rolling(
    model: Any, texts: Sequence[Tokens], *, window: int, stride: int, device: str = "cpu"
) -> list[npt.NDArray[np.float64]]:
    """The negative log-likelihood in nats of every token of each text but its first.

    Windows of `window` tokens begin every `stride` tokens; each predicts the tokens that no window before it did, so
    that all but the first have at least `window - stride` tokens of context (Hugging Face's "Perplexity of fixed-length
    models"). With a stride as large as the window, the first token of a window has no context and is not predicted.

    Args:
        model: Causal language model in float32 on `device`.
        texts: Token ids.
        window: At least 2.
        stride: 1 to `window`.
        device: Where the model lies.

    Returns:
        For each text float64 [tokens predicted].
    """
    model.eval()
    head = model.get_output_embeddings()
    pieces = [(place, *span) for place, tokens in enumerate(texts) for span in windows(len(tokens), window, stride)]

    def work(index: int) -> Tensor:
        """Negative log-likelihoods in nats, float64 [counted], of the tokens that one window counts."""
        place, start, end, count = pieces[index]
        ids = torch.tensor(texts[place][start:end], device=device)
        count = min(count, len(ids) - 1)  # nothing predicts a window's first token
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, -count - 1 : -1]
            logits = head(hidden).float()
            labels = ids[len(ids) - count :]
            return (torch.logsumexp(logits, dim=1) - logits.gather(1, labels[:, None])[:, 0]).double().cpu()

    parts: list[list[Tensor]] = [[] for _ in texts]
    for (place, *_), nll in zip(pieces, map_sequences(work, len(pieces), device), strict=True):
        parts[place].append(nll)
    return [torch.cat(found).numpy() if found else np.zeros(0) for found in parts]


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Start, end and number of new tokens of each window over a text of `length` tokens."""
    reached = 0
    for start in range(0, length, stride):
        end = min(start + window, length)
        if end - start > 1 and end > reached:
            yield start, end, end - reached
        reached = end
        if end == length:
            return
