"""A student that computes in torch with quantised weights: likelihoods, long texts, answers, and a folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autodistill.data.chat_template import Renderer
from autodistill.data.conversations import Turn
from autodistill.data.dataset import TokenSet
from autodistill.data.tokenization import beginning, chat_template_of, load_tokenizer
from autodistill.errors import InputError, TrialFailedError
from autodistill.inference.generation import LOOKED, write
from autodistill.inference.likelihood import continuations, rolling
from autodistill.inference.outputs import Likelihood


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedStudent:
    """Implements `evaluation.base.SimulatedStudent`: a model that holds quantised weights while it is evaluated.

    The token with which the tokenizer begins every text begins every prompt and window, even if the context is too
    short for all of the text. A model that learned such a token writes nonsense without it.

    Attributes:
        model, device, tokenizer, split, share, context: As in `SimulatedStudent`.
        data: The sequences of the split.
        saver: Writes the packed weights into a folder.
        batch_tokens: Tokens of a pass; None for what suits the device.
    """

    model: Any
    device: str
    tokenizer: Path
    split: str
    share: float
    context: int
    data: TokenSet
    saver: Callable[[Path], None]
    batch_tokens: int | None = None

    @property
    def _tokenizer(self) -> Any:
        return _tokenizer_of(self.tokenizer)

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """Return the likelihood of each (prompt, continuation).

        Each pair is tokenised as one text that begins with the prompt's own tokens. Spaces at the end of the prompt
        move to the continuation. If a pair is longer than the context, the beginning of its prompt is dropped. An empty
        prompt becomes the token that begins a text, or the end token if there is none.
        """
        moved = [(prompt.rstrip(" "), prompt[len(prompt.rstrip(" ")) :] + rest) for prompt, rest in pairs]
        whole = self._encode([prompt + rest for prompt, rest in moved])
        firsts = list(dict.fromkeys(prompt for prompt, _ in moved))
        begun = dict(zip(firsts, self._encode(firsts), strict=True))
        tokens = []
        for (prompt, rest), ids in zip(moved, whole, strict=True):
            count = min(len(begun[prompt]), len(ids) - 1)
            # The token that begins the text is never part of the continuation, even if the continuation is empty.
            count = max(count, len(self._begun))
            before, after = ids[:count] or [self._beginning], ids[count:]
            if not after or len(after) >= self.context:
                raise InputError(
                    f"the continuation {rest[:40]!r} has {len(after)} tokens, with a context of {self.context}: give "
                    "a larger --context, or shorter ones"
                )
            tokens.append((self._shortened(before, self.context - len(after)), after))
        found = continuations(self.model, tokens, batch_tokens=self.batch_tokens, device=self.device)
        if not all(math.isfinite(one.log_likelihood) for one in found):
            raise TrialFailedError("nan", "the student's likelihoods are not finite")
        return found

    def rolling(self, texts: Sequence[str], window: int, stride: int) -> list[npt.NDArray[np.float64]]:
        """Return negative log-likelihoods in strided windows, as `likelihood.rolling` does."""
        begun = self._begun
        tokens = [ids[len(begun) :] for ids in self._encode(texts)]
        begin = begun[0] if begun else None
        found = rolling(self.model, tokens, window=window, stride=stride, begin=begin, device=self.device)
        if not all(np.isfinite(part).all() for part in found):
            raise TrialFailedError("nan", "the student's likelihoods are not finite")
        return found

    def chats(self, prompts: Sequence[str]) -> list[str]:
        """Return each prompt as a user's turn in the chat template, or without a template as a line of its own.

        The turn extends to where the content of an answer begins in training.
        """
        return [self._renderer.question([Turn("user", prompt)]) for prompt in prompts]

    def write(self, prompts: Sequence[str], *, max_tokens: int, stops: Sequence[str] = ()) -> list[str]:
        """Return the model's greedy text after each prompt, up to the first stop.

        Writing ends at the first token whose text contains a stop, or a few tokens after a stop that spans several
        tokens.
        """
        tokens = [ids or [self._beginning] for ids in self._encode(prompts)]
        ends = (self._end,) if chat_template_of(self._tokenizer) is None else self._renderer.stops
        room = self.context - max_tokens
        if room < 1:
            raise InputError(
                f"an answer of {max_tokens} tokens does not fit a context of {self.context}: give a "
                "larger --context, or ask for less"
            )
        answers: dict[int, str] = {}
        stopping = dict.fromkeys((*ends, *_holding(self.tokenizer, tuple(stops))))
        cut = [self._shortened(ids, room) for ids in tokens]
        written = write(
            self.model,
            cut,
            stops=list(stopping),
            max_tokens=max_tokens,
            device=self.device,
            enough=self._enough(stops) if stops else None,
        )
        for place, ids in written:
            text = str(self._tokenizer.decode(ids, skip_special_tokens=True))
            answers[place] = text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
        return [answers[place] for place in range(len(prompts))]

    def save(self, folder: Path) -> None:
        """Write the quantised weights, dequantised, into a folder that transformers loads."""
        self.saver(folder)

    def examples(self) -> list[dict[str, Any]]:
        """Return questions with `prompt` and `answer`, or sequences with `text` and `tokens` if there are none."""
        questions = self.data.questions
        if questions is not None:
            return [
                {"id": place, "document": one.document, "prompt": self._text(one.prompt), "answer": one.answer}
                for place, one in enumerate(questions.entries)
            ]
        # Tokenising the text adds its first token again.
        return [
            {"id": place, "text": self._text(tokens[len(self._begun) :]), "tokens": tokens}
            for place, tokens in enumerate(self.data.tokens.tolist())
        ]

    def _enough(self, stops: Sequence[str]) -> Callable[[list[int]], bool]:
        """Return a function that tells whether tokens contain a stop that will cut the answer, whatever follows."""
        # Each token with text holds at least one byte of it. One more, because a decoder may strip the first token's
        # text.
        reach = max(len(stop.encode()) for stop in stops) + LOOKED + 1

        def enough(ids: list[int]) -> bool:
            """Return whether an answer has reached one of its stops."""
            tail = self._tokenizer.decode(ids[-reach:], skip_special_tokens=True)
            return any(stop in tail for stop in stops) and _settled(
                str(self._tokenizer.decode(ids, skip_special_tokens=True)), stops
            )

        return enough

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return token ids that begin as the tokenizer begins texts, unless a chat template already did that."""
        if not texts:
            return []
        rows: list[list[int]] = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        begun = self._begun
        return [row if row[: len(begun)] == begun else [*begun, *row] for row in rows]

    def _shortened(self, tokens: list[int], room: int) -> list[int]:
        """Return the tokens that begin a text, followed by as many of its last tokens as fit."""
        begun, kept = self._begun, room - len(self._begun)
        return [*begun, *tokens[len(begun) :][-kept:]] if kept else begun

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens)))

    @cached_property
    def _begun(self) -> list[int]:
        """Return the token with which the tokenizer begins every text, in a list, or an empty list."""
        begin = beginning(self._tokenizer)
        return [] if begin is None else [begin]

    @property
    def _end(self) -> int:
        end = self._tokenizer.eos_token_id
        return int(self._tokenizer.bos_token_id if end is None else end)

    @property
    def _beginning(self) -> int:
        begin = self._tokenizer.bos_token_id
        return int(self._end if begin is None else begin)


# A worker evaluates one student after another, and all have the teacher's tokenizer.
@lru_cache(maxsize=4)
def _tokenizer_of(folder: Path) -> Any:
    return load_tokenizer(folder)


def _settled(text: str, stops: Sequence[str]) -> bool:
    """Return whether a text contains a stop, and no other stop that began earlier can still be completed."""
    cut = min((text.find(stop) for stop in stops if stop in text), default=-1)
    whole = text.rstrip("\ufffd")  # the last character's bytes may be incomplete
    begun = (whole[start:] for start in range(max(0, len(whole) - max(map(len, stops))), min(cut, len(whole))))
    return cut >= 0 and not any(stop.startswith(rest) for rest in begun for stop in stops)


@lru_cache(maxsize=16)
def _holding(folder: Path, stops: tuple[str, ...]) -> tuple[int, ...]:
    """Return the tokens whose text contains one of the stops."""
    if not stops:
        return ()
    tokenizer = _tokenizer_of(folder)
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return tuple(token for token, text in enumerate(texts) if any(stop in text for stop in stops))
