"""Generation: prompts are answered in batches, greedily or by seeded sampling, with a KV cache."""

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
"""Prompts answered at once there, where a token of many takes hardly longer than one of few."""
LOOKED = 8
"""Tokens that are written between two looks at whether an answer needs no more."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_p: Only the most likely tokens that together have this probability may be drawn (nucleus sampling,
            arXiv 1904.09751).
        seed: Of the draws.
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
    """Yield the place of each prompt and the tokens written after it; prompts of similar length are batched.

    What is drawn for a prompt depends on it and on the seed alone, not on the prompts that it is answered with.

    Args:
        model: Causal language model on `device`.
        prompts: Token ids, none of them empty.
        stops: Tokens that end an answer; the one that did is the last of it. Without any all have `max_tokens`.
        max_tokens: Tokens after which an answer ends unfinished.
        sampling: How tokens are chosen.
        batch: Prompts answered at once, fewer where an accelerator's memory runs out; None for what suits the device.
        device: Where the model lies.
        enough: Whether an answer that begins with these tokens needs no more of them; asked every `LOOKED` tokens, so
            that the answer ends there.

    Raises:
        NotFiniteError: Logits that an answer is written by are not finite; of these some token would be the largest all
            the same. The other answers of its batch come before.
    """
    model.eval()
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    padding = stops[0] if stops else 0

    def work(part: range) -> list[tuple[int, list[int] | None]]:
        """Return places and answers of some prompts, left-padded and written together; None for logits not finite."""
        places = order[part.start : part.stop]
        rows = [torch.tensor(prompts[place]) for place in places]
        # Where the mask hides the padding, and positions do not count it.
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding, padding_side="left")
        mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
        look = None if enough is None else _Look(enough, ids.shape[1])
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
            # Behind them the row is filled up, until the last of the batch ends.
            ends = [min(end, look.ends.get(row, end)) for row, end in enumerate(ends)]
        whole = finite.up_to(ends)
        return [
            (place, row[:end] if right else None)
            for place, row, end, right in zip(places, found, ends, whole, strict=True)
        ]

    with _settings(model, stops, max_tokens):
        if device == "cpu":
            size = batch or at_once(device)
            parts = (range(start, min(start + size, len(order))) for start in range(0, len(order), size))
            for part in parts:
                yield from _finite_first(work(part))
        else:
            rows, lengths = batch or at_once(device), [len(prompts[place]) + max_tokens for place in order]
            # All that is held of them bounds how many there are, and not what a pass is best made of.
            tokens = pass_tokens(model, device, most=rows * max(lengths, default=1))
            for found in map_batches(work, len(order), _at_most(lengths, tokens), rows, device):
                yield from _finite_first(found)


@contextmanager
def _settings(model: Any, stops: Sequence[int], max_tokens: int) -> Iterator[None]:
    """Let a model generate by these settings alone.

    Its folder may bring others, such as a penalty on repetition, which would be merged with them.
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
    """Yield the answers of a batch; after them, raise an error if one is None."""
    yield from ((place, tokens) for place, tokens in found if tokens is not None)
    broken = [place for place, tokens in found if tokens is None]
    if broken:
        raise NotFiniteError(min(broken))


def _at_most(lengths: Sequence[int], tokens: int) -> Callable[[int, int], int]:
    """Return the `take` function of `map_batches` with limits of rows (shortest first) and of padded tokens."""

    def take(start: int, rows: int) -> int:
        """Return where the batch ends that begins at `start`, of at most `rows` prompts."""
        stop = start + 1
        while stop < len(lengths) and stop - start < rows and (stop + 1 - start) * lengths[stop] <= tokens:
            stop += 1
        return stop

    return take


class _Look:
    """Stopping criterion of transformers that ends rows which need no more tokens.

    Attributes:
        ends: Tokens that were written of each such row.
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

    Looked at once, behind the last token, since an accelerator would be waited for at each.
    """

    def __init__(self) -> None:
        self._tokens: list[Tensor] = []  # of each token, [rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The largest of a row with a NaN is NaN.
        self._tokens.append(scores.amax(dim=-1).isfinite())
        return scores

    def up_to(self, ends: Sequence[int]) -> list[bool]:
        """Return, for each row, whether its tokens up to a length were finite; later ones are only padding."""
        finite = torch.stack(self._tokens).cpu()
        return [bool(finite[:end, row].all()) for row, end in enumerate(ends)]


class _Draw:
    """Logits processor that turns the largest score into a sample from softmax(logits / temperature), by Gumbel noise.

    The maximum of logits and such noise is distributed as their softmax (Gumbel-max; Maddison et al., arXiv
    1411.0030). Each row draws from a generator of its own.
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


def at_once(device: str) -> int:
    """Return the number of prompts that are answered together on this device."""
    return _BATCH if device == "cpu" else BATCH_ON_ACCELERATOR


def answer(model: Any, questions: Questions, *, context: int, device: str = "cpu", confident: bool = False) -> Answers:
    """Return what a model writes to questions, greedily, with the scores of its answers.

    An answer may be half as long again as the longest one expected, as far as the context has room for it. A question
    that does not fit the context with the answer expected is not asked, and counts as not answered.

    Args:
        model: Causal language model on `device`.
        questions: At least one.
        context: Tokens that a prompt and its answer may have together.
        device: Where the model lies.
        confident: Whether to say how long each answer is, and how sure of it the model was, for which answers are read
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
