"""Log-likelihoods of continuations of prompts, and of the tokens of long texts in strided windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from autodistill.inference.batching import by_length, logit_rows, map_batches, pass_tokens
from autodistill.inference.outputs import Likelihood
from autodistill.inference.tensor_parallel import is_divided

# Tokens of a pass on a CPU, padding included.
_CPU_TOKENS = 1024

Tokens = Sequence[int]


def continuations(
    model: Any, pairs: Sequence[tuple[Tokens, Tokens]], *, batch_tokens: int | None = None, device: str = "cpu"
) -> list[Likelihood]:
    """Return the log-likelihood of each continuation after its prompt, in float32.

    A prompt runs once, however many continuations it has, which then see its keys and values. Prompts of equal length
    run together, so that none is padded; continuations are padded behind their ends, which nothing sees.

    Args:
        model: Causal language model in float32 on `device`.
        pairs: Token ids of prompt and continuation, neither empty.
        batch_tokens: Of the prompts of a pass, and of their continuations, padding included; None for what suits the
            device.
        device: Where the model lies.
    """
    model.eval()
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for place, (prompt, _) in enumerate(pairs):
        by_prompt.setdefault(tuple(prompt), []).append(place)
    # The longest first: what takes most memory is known at once.
    prompts = sorted(by_prompt, key=lambda prompt: (-len(prompt), by_prompt[prompt][0]))
    sizes = [[len(pairs[place][1]) for place in by_prompt[prompt]] for prompt in prompts]

    def work(batch: range) -> list[tuple[int, Likelihood]]:
        asked = prompts[batch.start : batch.stop]
        places = [place for prompt in asked for place in by_prompt[prompt]]
        owners = [row for row, prompt in enumerate(asked) for _ in by_prompt[prompt]]
        found = _likelihoods(model, asked, owners, [pairs[place][1] for place in places], device)
        return list(zip(places, found, strict=True))

    tokens = batch_tokens or (_CPU_TOKENS if device == "cpu" else pass_tokens(model, device))
    results = map_batches(work, len(prompts), _of_equal_length(prompts, sizes), tokens, device)
    found = dict(item for batch in results for item in batch)
    return [found[place] for place in range(len(pairs))]


def _of_equal_length(prompts: Sequence[Tokens], sizes: Sequence[Sequence[int]]) -> Callable[[int, int], int]:
    """Return the `take` function of `map_batches` for prompts of equal length, with limits on their tokens and on those
    of the padded continuations; at least one prompt.
    """

    def take(start: int, tokens: int) -> int:
        """Return where the batch that begins with a prompt ends: at the latest before a prompt of another length."""
        rows = widest = 0
        for place in range(start, len(prompts)):
            rows, widest = rows + len(sizes[place]), max(widest, *sizes[place])
            over = (place + 1 - start) * len(prompts[place]) > tokens or rows * widest > tokens
            if place > start and (over or len(prompts[place]) != len(prompts[start])):
                return place
        return len(prompts)

    return take


def _likelihoods(
    model: Any, prompts: Sequence[Tokens], owners: Sequence[int], rest: Sequence[Tokens], device: str
) -> list[Likelihood]:
    owner = torch.tensor(owners, device=device)
    lengths = torch.tensor([len(tokens) for tokens in rest], device=device)
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens in rest], batch_first=True).to(device)
    with torch.no_grad():
        begun = torch.tensor(prompts, device=device)
        if is_divided(model):
            whole = torch.cat([begun[owner], ids[:, :-1]], dim=1)
            hidden = model.base_model(input_ids=whole, use_cache=False).last_hidden_state[:, begun.shape[1] - 1 :]
        else:
            first = model.base_model(input_ids=begun, use_cache=True)
            hidden = first.last_hidden_state[:, -1:][owner]
            if ids.shape[1] > 1:
                cache = first.past_key_values
                cache.batch_select_indices(owner)
                later = model.base_model(input_ids=ids[:, :-1], cache=cache, use_cache=True).last_hidden_state
                hidden = torch.cat([hidden, later], dim=1)
        counted = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        parts = [
            (
                (logits.gather(1, labels[:, None])[:, 0] - torch.logsumexp(logits, dim=1)).double(),
                logits.argmax(dim=1) == labels,
            )
            for logits, labels in _by_rows(model, hidden[counted], ids[counted])
        ]
        chosen, right = (torch.cat(found) for found in zip(*parts, strict=True))
    row = counted.nonzero()[:, 0]
    sums = torch.zeros(len(rest), dtype=torch.float64, device=device).index_add_(0, row, chosen)
    wrong = torch.zeros(len(rest), dtype=torch.float64, device=device).index_add_(0, row, (~right).double())
    return [
        Likelihood(log_likelihood=float(total), tokens=len(tokens), greedy=not missed)
        for total, tokens, missed in zip(sums.tolist(), rest, wrong.tolist(), strict=True)
    ]


def _by_rows(model: Any, hidden: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits, float32 [rows, vocab], of states [rows, width] with their true tokens; in parts on an
    accelerator.
    """
    head = model.get_output_embeddings()
    at_once = max(1, len(hidden)) if hidden.device.type == "cpu" else logit_rows(head.out_features)
    for rows, true in zip(hidden.split(at_once), labels.split(at_once), strict=True):
        yield head(rows).float(), true


def rolling(
    model: Any,
    texts: Sequence[Tokens],
    *,
    window: int,
    stride: int,
    begin: int | None = None,
    device: str = "cpu",
) -> list[npt.NDArray[np.float64]]:
    """Return the negative log-likelihood in nats of every token of each text except its first.

    Windows of `window` tokens begin every `stride` tokens; each predicts the tokens that no window before it did, so
    that all but the first have at least `window - stride` tokens of context (Hugging Face's "Perplexity of fixed-length
    models"). With a stride as large as the window, the first token of a window has no context and is not predicted.

    Where something begins all texts of a model, it is the first token of every window, and predicts the text's first
    one too; the stride is then `window - 1` at the most.

    Args:
        model: Causal language model in float32 on `device`.
        texts: Token ids, without what begins them.
        window: At least 2.
        stride: 1 to `window`.
        begin: The token that begins every text; None where nothing does.
        device: Where the model lies.

    Returns:
        For each text float64 [tokens predicted].
    """
    model.eval()
    begun = [] if begin is None else [begin]
    own = window - len(begun)
    spans = ((place, *span) for place, text in enumerate(texts) for span in windows(len(text), own, min(stride, own)))
    # Nothing predicts a token that stands alone.
    pieces = [(place, start, end, count) for place, start, end, count in spans if len(begun) + end - start > 1]
    # What is padded to one length runs together: nothing sees what stands behind its end.
    order = sorted(range(len(pieces)), key=lambda piece: pieces[piece][1] - pieces[piece][2])
    lengths = [len(begun) + pieces[piece][2] - pieces[piece][1] for piece in order]

    def work(batch: range) -> list[Tensor]:
        """Return the nats that each predicted token of some pieces costs, float64 [tokens] of each piece."""
        chosen = [pieces[order[index]] for index in batch]
        rows = [torch.tensor([*begun, *texts[place][start:end]]) for place, start, end, _ in chosen]
        # Nothing predicts a window's first token.
        counts = [min(count, len(row) - 1) for (*_, count), row in zip(chosen, rows, strict=True)]
        longest = lengths[batch.start]
        ends = [index * longest + len(row) for index, row in enumerate(rows)]
        predicted = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]).to(
            device
        )
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
            found = [
                (torch.logsumexp(logits, dim=1) - logits.gather(1, labels[:, None])[:, 0]).double()
                for logits, labels in _by_rows(model, hidden[predicted - 1], ids.flatten()[predicted])
            ]
        return list(torch.cat(found).cpu().split(counts))

    results = map_batches(work, len(order), by_length(lengths), pass_tokens(model, device), device)
    nll = dict(zip(order, (part for batch in results for part in batch), strict=True))
    parts: list[list[Tensor]] = [[] for _ in texts]
    for piece, (place, *_) in enumerate(pieces):
        parts[place].append(nll[piece])
    return [torch.cat(found).numpy() if found else np.zeros(0) for found in parts]


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield start, end and number of new tokens of each window over a text of `length` tokens."""
    reached = 0
    for start in range(0, length, stride):
        end = min(start + window, length)
        if end > reached:
            yield start, end, end - reached
        reached = end
        if end == length:
            return
