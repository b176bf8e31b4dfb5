"""Generation: answers prompts in batches, greedily or by seeded sampling, with a KV cache."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autodistill.data.dataset import Questions
from autodistill.data.reasoning_gym import marker
from autodistill.data.tokenization import load_tokenizer
from autodistill.errors import NotFiniteError
from autodistill.inference.batching import map_batches, pass_tokens
from autodistill.inference.likelihood import continuations
from autodistill.inference.outputs import Answers
from autodistill.inference.tensor_parallel import is_divided

_BATCH = 16  # prompts answered at once on a CPU
BATCH_ON_ACCELERATOR = 64
"""Prompts answered at once on an accelerator. There, a token for many prompts takes hardly longer than for few."""
LOOKED = 8
"""Number of tokens between two checks whether an answer needs no more."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Only the most likely tokens that together have this probability may be drawn (nucleus sampling, arXiv
            1904.09751).
        seed: Seed of the draws.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def write(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stops: Sequence[int],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    batch: int | None = None,
    device: str = "cpu",
    enough: Callable[[list[int]], bool] | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yield the index of each prompt and the tokens written after it; prompts of similar length are batched.

    The tokens drawn for a prompt depend only on the prompt and the seed, not on the other prompts of its batch.

    Args:
        model: Causal language model on `device`.
        prompts: Token ids; no prompt is empty.
        stops: Tokens that end an answer; the answer includes its stop. Without stops, all answers have `max_tokens`.
        max_tokens: Tokens after which an answer ends unfinished.
        sampling: How tokens are chosen.
        batch: Prompts answered at once, fewer if an accelerator's memory runs out; None for what suits the device.
        device: Where the model lies.
        enough: Returns whether an answer that begins with these tokens needs no more. It is called every `LOOKED`
            tokens, and the answer ends there if it does.

    Raises:
        NotFiniteError: The logits behind an answer are not finite, so that its tokens mean nothing. The other answers
            of its batch are yielded first.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    padding = stops[0] if stops else 0

    def work(part: range) -> list[tuple[int, list[int] | None]]:
        """Return indices and answers of some prompts, left-padded in one batch; None if logits are not finite."""
        places = order[part.start : part.stop]
        rows = [torch.tensor(prompts[place]) for place in places]
        # The mask hides the padding, and positions do not count it.
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")
        mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
        look = None if enough is None else _StopWhenEnough(enough, ids.shape[1])
        finite = _Finite()
        with torch.inference_mode():
            output = model.generate(
                ids.to(device),
                attention_mask=mask.long().to(device),
                logits_processor=[finite, *([_Draw(sampling, rows)] if sampling.temperature > 0 else [])],
                stopping_criteria=[] if look is None else [look],
            )
        found = output[:, ids.shape[1] :].tolist()
        ends = [next((i + 1 for i, token in enumerate(row) if token in stops), len(row)) for row in found]
        if look is not None:
            # Behind this point, rows are filled up until the last answer of the batch ends.
            ends = [min(end, look.ends.get(row, end)) for row, end in enumerate(ends)]
        whole = finite.up_to(ends)
        return [
            (place, row[:end] if right else None)
            for place, row, end, right in zip(places, found, ends, whole, strict=True)
        ]

    with _settings(model, stops, max_tokens):
        if device == "cpu":
            size = batch or batch_size(device)
            parts = (range(start, min(start + size, len(order))) for start in range(0, len(order), size))
            for part in parts:
                yield from _finite_first(work(part))
        else:
            rows, lengths = batch or batch_size(device), [len(prompts[place]) + max_tokens for place in order]
            # This limits tokens only by the memory that they need; the most efficient size of a pass does not matter
            # here.
            tokens = pass_tokens(model, device, most=rows * max(lengths, default=1))
            for found in map_batches(work, len(order), _at_most(lengths, tokens), rows, device):
                yield from _finite_first(found)


@contextmanager
def _settings(model: Any, stops: Sequence[int], max_tokens: int) -> Iterator[None]:
    """Let a model generate with only these settings.

    Its folder may bring others, such as a repetition penalty, and transformers would merge them with these.
    """
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=stops[0] if stops else 0,
        use_cache=not is_divided(model),
    )
    try:
        yield
    finally:
        model.generation_config = before


def _finite_first(found: Sequence[tuple[int, list[int] | None]]) -> Iterator[tuple[int, list[int]]]:
    """Yield the answers of a batch, then raise an error if one of them is None."""
    yield from ((place, tokens) for place, tokens in found if tokens is not None)
    broken = [place for place, tokens in found if tokens is None]
    if broken:
        raise NotFiniteError(min(broken))


def _at_most(lengths: Sequence[int], tokens: int) -> Callable[[int, int], int]:
    """Return the `take` function of `map_batches` that limits rows (shortest first) and padded tokens."""

    def take(start: int, rows: int) -> int:
        """Return the end of the batch that begins at `start`, with at most `rows` prompts."""
        stop = start + 1
        while stop < len(lengths) and stop - start < rows and (stop + 1 - start) * lengths[stop] <= tokens:
            stop += 1
        return stop

    return take


class _StopWhenEnough:
    """Stopping criterion of transformers that ends rows which need no more tokens.

    Attributes:
        ends: Number of tokens written in each such row.
    """

    def __init__(self, enough: Callable[[list[int]], bool], start: int) -> None:
        self._enough, self._start = enough, start
        self.ends: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        written = input_ids.shape[1] - self._start
        if written % LOOKED == 0:
            rows = enumerate(input_ids[:, self._start :].tolist())
            self.ends |= {row: written for row, ids in rows if row not in self.ends and self._enough(ids)}
        return torch.tensor([row in self.ends for row in range(len(input_ids))], device=input_ids.device)


class _Finite:
    """Logits processor of transformers that records whether every chosen token had a finite logit.

    The check happens once, after the last token. A check at each token would wait for the accelerator.
    """

    def __init__(self) -> None:
        self._tokens: list[Tensor] = []  # one for each token, [rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The largest entry of a row with a NaN is NaN.
        self._tokens.append(scores.amax(dim=-1).isfinite())
        return scores

    def up_to(self, ends: Sequence[int]) -> list[bool]:
        """Return, for each row, whether its tokens up to a length were finite; later ones are only padding."""
        finite = torch.stack(self._tokens).cpu()
        return [bool(finite[:end, row].all()) for row, end in enumerate(ends)]


class _Draw:
    """Logits processor that turns the largest score into a sample from softmax(logits / temperature), by Gumbel noise.

    The argmax of logits plus such noise is distributed as their softmax (Gumbel-max; Maddison et al., arXiv 1411.0030).
    Each row draws from a generator of its own.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Tensor]) -> None:
        from transformers import TopPLogitsWarper

        self._temperature = sampling.temperature
        self._nucleus = TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self._generators = [torch.Generator().manual_seed(_seed(prompt, sampling.seed)) for prompt in prompts]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores / self._temperature
        if self._nucleus is not None:
            scores = self._nucleus(input_ids, scores)
        draws = [torch.empty(scores.shape[1]).exponential_(generator=generator) for generator in self._generators]
        return scores - torch.stack(draws).log_().to(scores.device)


def _seed(prompt: Tensor, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{prompt.tolist()}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def batch_size(device: str) -> int:
    """Return the number of prompts that are answered together on this device."""
    return _BATCH if device == "cpu" else BATCH_ON_ACCELERATOR


def answer(model: Any, questions: Questions, *, context: int, device: str = "cpu", confident: bool = False) -> Answers:
    """Return a model's greedy answers to questions, with their scores.

    An answer may be 1.5 times as long as the longest expected answer, if the context has room. A question that does not
    fit the context together with its expected answer is not asked, and counts as not answered.

    Args:
        model: Causal language model on `device`.
        questions: At least one question.
        context: Tokens that a prompt and its answer may have together.
        device: Where the model lies.
        confident: Whether to report the length of each answer and the model's confidence in it. This reads the answers
            once more.
    """
    entries, asked = questions.entries, questions.within(context)
    limit = max((entries[place].answer_tokens for place in asked), default=0) * 3 // 2
    texts, marks = [""] * len(entries), np.zeros(len(entries))
    decoder, mark = load_tokenizer(questions.tokenizer), marker(questions.task)
    prompts = [entries[place].prompt for place in asked]
    written = write(model, prompts, stops=questions.stops, max_tokens=limit, device=device) if asked else ()
    kept: dict[int, list[int]] = {}
    for number, tokens in written:
        place, room = asked[number], context - len(prompts[number])
        kept[place] = tokens[:room]
        texts[place] = str(decoder.decode(kept[place], skip_special_tokens=True))
        marks[place] = mark(texts[place], entries[place].answer, entries[place].item)
    lengths = confidence = None
    if confident:
        lengths, confidence = np.zeros(len(entries), np.int32), np.zeros(len(entries))
        sure = continuations(model, [(entries[place].prompt, tokens) for place, tokens in kept.items()], device=device)
        for place, one in zip(kept, sure, strict=True):
            lengths[place], confidence[place] = one.tokens, math.exp(one.log_likelihood / one.tokens)
    return Answers(
        texts=tuple(texts),
        marks=marks,
        documents=np.array([entry.document for entry in entries], dtype=np.int32),
        unasked=len(entries) - len(asked),
        tokens=lengths,
        confidence=confidence,
    )
