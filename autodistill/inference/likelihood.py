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

# Tokens of a pass on a CPU, including padding.
_CPU_TOKENS = 1024

Tokens = Sequence[int]


def continuations(
    model: Any, pairs: Sequence[tuple[Tokens, Tokens]], *, batch_tokens: int | None = None, device: str = "cpu"
) -> list[Likelihood]:
    """Return the log-likelihood of each continuation after its prompt, in float32.

    A prompt runs only once, and all its continuations use its keys and values. Prompts of equal length run together, so
    that no prompt is padded. Continuations are padded behind their ends, where no token sees the padding.

    Args:
        model: Causal language model in float32 on `device`.
        pairs: Token ids of prompt and continuation; neither is empty.
        batch_tokens: Limit on a pass's prompt tokens, and on its continuation tokens including padding; None for what
            suits the device.
        device: Where the model lies.
    """
    model.eval()
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for place, (prompt, _) in enumerate(pairs):
        by_prompt.setdefault(tuple(prompt), []).append(place)
    # Longest prompts first, so that a lack of memory shows at once.
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
    """Return the `take` function of `map_batches` for prompts of equal length.

    It limits the tokens of the prompts, and those of the padded continuations; a batch has at least one prompt.
    """

    def take(start: int, tokens: int) -> int:
        """Return the end of the batch that begins at `start`; a prompt of another length always ends it."""
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
    """Yield float32 logits [rows, vocab] of states [rows, width], with their true tokens; in parts on a GPU."""
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

    Windows of `window` tokens begin every `stride` tokens. Each predicts the tokens that no earlier window predicted.
    All windows except the first thus have at least `window - stride` tokens of context (Hugging Face's "Perplexity of
    fixed-length models"). If the stride equals the window, the first token of a window has no context and is not
    predicted.

    If the model's texts all begin with a special token, that token begins every window and also predicts the first
    token of the text. The stride is then at most `window - 1`.

    Args:
        model: Causal language model in float32 on `device`.
        texts: Token ids, without the special first token.
        window: At least 2.
        stride: 1 to `window`.
        begin: The token that begins every text, or None if there is no such token.
        device: Where the model lies.

    Returns:
        For each text, float64 [predicted tokens].
    """
    model.eval()
    begun = [] if begin is None else [begin]
    own = window - len(begun)
    spans = ((place, *span) for place, text in enumerate(texts) for span in windows(len(text), own, min(stride, own)))
    # No token predicts one that stands alone.
    pieces = [(place, start, end, count) for place, start, end, count in spans if len(begun) + end - start > 1]
    # Windows that are padded to the same length run together; no token sees the padding behind its window.
    order = sorted(range(len(pieces)), key=lambda piece: pieces[piece][1] - pieces[piece][2])
    lengths = [len(begun) + pieces[piece][2] - pieces[piece][1] for piece in order]

    def work(batch: range) -> list[Tensor]:
        """Return the nats of each predicted token of some windows, float64 [tokens] for each window."""
        chosen = [pieces[order[index]] for index in batch]
        rows = [torch.tensor([*begun, *texts[place][start:end]]) for place, start, end, _ in chosen]
        # No token predicts the first token of a window.
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
    """Yield start, end and number of newly predicted tokens of each window over a text of `length` tokens."""
    reached = 0
    for start in range(0, length, stride):
        end = min(start + window, length)
        if end > reached:
            yield start, end, end - reached
        reached = end
        if end == length:
            return
