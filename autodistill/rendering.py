"""Conversations become tokens by the tokenizer's own chat template, with a mask of those that belong to answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autodistill.conversations import ANSWERING, Conversation, Turn, asked
from autodistill.errors import InputError

# Where the chat template alone decides it, an answer ends where that of any conversation does.
_PROBE = asked("a", "b")


@dataclass(frozen=True, eq=False)
class Rendered:
    """The tokens of a conversation.

    Attributes:
        tokens: int32 [n].
        answers: bool [n], True for the tokens of answers and for the one that ends each of them.
    """

    tokens: npt.NDArray[np.int32]
    answers: npt.NDArray[np.bool_]

    @property
    def last_answer(self) -> int:
        """Number of tokens of the last answer."""
        begins = np.flatnonzero(np.diff(self.answers, prepend=False) & self.answers)
        return int(self.answers[begins[-1] :].sum())


class Renderer:
    """Renders by the chat template of a tokenizer.

    Where there is none, each turn stands on its own line, without its role, and each answer is ended by EOS.
    Answers that the template drops or rewrites once others follow (as Qwen3 does with thoughts) are not learnt.

    Args:
        folder: A folder that transformers' AutoTokenizer can load.

    Raises:
        InputError: A tokenizer without EOS, or one that does not know where its tokens stand in the text.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if self.tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer in {folder} has no EOS token to end an answer with: name one in its files")
        if not self.tokenizer.is_fast:
            raise InputError(f"the tokenizer in {folder} cannot tell answers from prompts: save it as tokenizer.json")
        self._template = self.tokenizer.get_chat_template() if self.tokenizer.chat_template else None
        added = self.tokenizer.added_tokens_decoder
        self._special = {token for token, entry in added.items() if entry.special} | {self.tokenizer.eos_token_id}

    @property
    def rule(self) -> str:
        """Identifies how conversations are rendered."""
        if self._template is None:
            return "plain lines"
        return f"chat template {hashlib.sha256(self._template.encode()).hexdigest()[:16]}"

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        (probe,) = self.render([_PROBE])
        return tuple(dict.fromkeys((int(probe.tokens[probe.answers][-1]), int(self.tokenizer.eos_token_id))))

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        """The tokens of each conversation.

        Raises:
            InputError: The chat template refuses one of them.
        """
        texts, spans = zip(*(self._spans(one.turns) for one in conversations), strict=True)
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        rows = zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
        return [self._masked(ids, np.array(offsets).reshape(-1, 2), found) for ids, offsets, found in rows]

    def asking(self, turns: Sequence[Turn]) -> str:
        """The text after which a model is to write its answer."""
        return self._lines(turns)[0] if self._template is None else self._apply(turns, asking=True)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens after which a model is to write its answer."""
        ids: list[int] = self.tokenizer(self.asking(turns), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _masked(self, ids: list[int], offsets: npt.NDArray[np.int64], spans: list[tuple[int, int]]) -> Rendered:
        answers = np.zeros(len(ids), dtype=bool)
        for start, end in spans:
            answers |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        last = np.flatnonzero(answers)[-1]
        if ids[last] not in self._special:
            # The template leaves the end of the answer open; without an end nothing would stop the student.
            ids, answers = [*ids[: last + 1], self.tokenizer.eos_token_id], np.append(answers[: last + 1], True)
        return Rendered(np.array(ids, dtype=np.int32), answers)

    def _spans(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and where in it answers begin and end."""
        if self._template is None:
            return self._lines(turns)
        whole = self._apply(turns)
        spans = []
        for place, turn in enumerate(turns):
            if turn.role != ANSWERING or place == 0:
                continue
            last = place == len(turns) - 1
            before = self._apply(turns[:place], asking=True)
            after = whole if last else self._apply(turns[: place + 1])
            if last:
                same = takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
                spans.append((len(list(same)), len(whole.rstrip())))
            elif whole.startswith(before) and whole.startswith(after):
                spans.append((len(before), len(after.rstrip())))
        return whole, spans

    def _lines(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        text, spans = "", []
        for place, turn in enumerate(turns):
            if turn.role == ANSWERING and place:
                spans.append((len(text), len(text) + len(turn.content + self.tokenizer.eos_token)))
                text += turn.content + self.tokenizer.eos_token
            else:
                text += turn.content + "\n"
        return text, spans

    def _apply(self, turns: Sequence[Turn], asking: bool = False) -> str:
        from jinja2 import TemplateError

        messages = [turn._asdict() for turn in turns]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking)
        except TemplateError as error:
            roles = ", ".join(turn.role for turn in turns)
            raise InputError(f"the tokenizer's chat template refuses a conversation of {roles}: {error}") from error
        return str(text)
