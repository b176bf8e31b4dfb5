"""Render conversations to tokens with a chat template, with a mask of the answer tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from autodistill.data.conversations import ANSWERING, Conversation, Likeliest, Turn, WriterLogprobs, single_turn
from autodistill.data.tokenization import beginning, chat_template_of, groups, load_tokenizer, tokenized
from autodistill.errors import InputError

# Two conversations that differ only in the answer. The text that both have in common comes from the template, so they
# show where it lets an answer begin and end.
_PROBE, _OTHER = single_turn("a", "b"), single_turn("a", "c")


@dataclass(frozen=True, eq=False)
class Rendered:
    """The tokens of a conversation.

    Attributes:
        tokens: int32 [n].
        answers: bool [n], True for the tokens of answers and for the one that ends each of them.
        writer_logprobs: The likeliest tokens at each position, [n, k], as reported by the answer's writer, or None if
            none were reported.
        spots: int32 [n, 3], for each answer token: its turn, and its start and end in the turn's stripped content, in
            characters. The turn is -1 for other tokens, and if the template rewrites the content. None if unknown.
        shared: bool [n], the answer tokens that all renderings of the conversation have. None if there is only one
            rendering.
        dropped: Number of the conversation's answers that are not learned, since the template writes them differently
            when other messages follow.
    """

    tokens: npt.NDArray[np.int32]
    answers: npt.NDArray[np.bool_]
    writer_logprobs: Likeliest | None = None
    spots: npt.NDArray[np.int32] | None = None
    shared: npt.NDArray[np.bool_] | None = None
    dropped: int = 0

    @property
    def last_answer(self) -> int:
        """Number of tokens of the last answer."""
        return int(self.answers[self.last_start :].sum())

    @property
    def last_start(self) -> int:
        """Position of the first token of the last answer."""
        return int(np.flatnonzero(np.diff(self.answers, prepend=False) & self.answers)[-1])

    def with_logprobs(self, writer_logprobs: WriterLogprobs) -> Rendered:
        """Return the tokens with the reported log-probabilities of the last answer, up to the first differing token.

        After that, the reported values would belong to another text.
        """
        start = self.last_start
        count = min(len(writer_logprobs.tokens), len(self.tokens) - start)
        differing = np.flatnonzero(self.tokens[start : start + count] != writer_logprobs.tokens[:count])
        count = int(differing[0]) if len(differing) else count
        ids, log_p = (part[:count] for part in writer_logprobs.likeliest)
        if not (ids >= 0).any():
            return self
        room = ((start, len(self.tokens) - start - count), (0, 0))
        return replace(self, writer_logprobs=Likeliest(np.pad(ids, room, constant_values=-1), np.pad(log_p, room)))


@dataclass(frozen=True)
class Template:
    """A chat template, with its model's names of the tokens that begin and end a text.

    Attributes:
        text: The template in Jinja.
        bos: The token that begins a text, or None if the model has none.
        eos: The token that ends a text.
    """

    text: str
    bos: str | None
    eos: str

    @property
    def name(self) -> str:
        """Hash that identifies the template and its two tokens."""
        return hashlib.sha256(json.dumps([self.text, self.bos, self.eos]).encode()).hexdigest()[:16]

    def put_on(self, tokenizer: Any) -> None:
        """Make a tokenizer use this template; it must know the two tokens."""
        tokenizer.chat_template = self.text
        tokenizer.bos_token, tokenizer.eos_token = self.bos, self.eos


class _Span(NamedTuple):
    """The start and end of a turn's answer in a text, and the start of its content, which is -1 if it is absent."""

    start: int
    end: int
    turn: int
    content: int


class _Frame(NamedTuple):
    """The text that a template writes around the last answer.

    Attributes:
        taken: Text at the end of a prompt for a new answer that is not there before an answer that exists already.
        lead: Text between prompt and content, such as Qwen3's empty thoughts.
        end: Text after the content, without whitespace at its end.

    `taken` and `lead` are both "" if they are only whitespace.
    """

    taken: str
    lead: str
    end: str


class Renderer:
    """Renders conversations with a tokenizer's own chat template, or with another template and the same tokenizer.

    Without any template, each turn is on a line of its own, without its role, and each answer ends with EOS. The text
    then begins with the token that the tokenizer puts before every text, if there is one; a template writes such a
    token itself.

    A template may write an earlier answer without the text that it puts before the content of the last one, as Qwen3
    does with empty thoughts. Such an answer is learned. An earlier answer whose content the template changes, for
    example by removing thoughts, is not learned.

    Args:
        folder: A folder that transformers' AutoTokenizer can load.
        template: A template to use instead of the tokenizer's own.

    Raises:
        InputError: The tokenizer has no EOS, cannot give the positions of its tokens in the text, or has several chat
            templates without a default.
    """

    def __init__(self, folder: Path, template: Template | None = None) -> None:
        self.tokenizer = load_tokenizer(folder)
        if template is not None:
            template.put_on(self.tokenizer)
        if self.tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer in {folder} has no EOS token to end an answer with: name one in its files")
        if not self.tokenizer.is_fast:
            raise InputError(f"the tokenizer in {folder} cannot tell answers from prompts: save it as tokenizer.json")
        self._template = chat_template_of(self.tokenizer)
        if self.tokenizer.chat_template and self._template is None:
            raise InputError(
                f"the tokenizer in {folder} has no chat template that is a text, or several by name and none is the "
                "default: name the one to use default in its files"
            )
        self._names = self.tokenizer.special_tokens_map
        added = self.tokenizer.added_tokens_decoder
        begun = self._template is None and beginning(self.tokenizer) is not None
        self._beginning = str(self.tokenizer.bos_token) if begun else ""
        self._special = {token for token, entry in added.items() if entry.special} | {self.tokenizer.eos_token_id}

    @property
    def rule(self) -> str:
        """Text that identifies how conversations are rendered."""
        if self._template is None:
            return f"plain lines after {self._beginning}" if self._beginning else "plain lines"
        return f"chat template {hashlib.sha256(self._template.encode()).hexdigest()[:16]}{self.further_rule}"

    @cached_property
    def further_rule(self) -> str:
        """The part of `rule` about special handling that only some templates need; "" for all others."""
        if self._template is None:
            return ""
        return (", asked as learnt" if self._frame.taken + self._frame.lead else "") + (
            ", with earlier answers" if self._learns_more else ""
        )

    @property
    def vocabulary(self) -> str:
        """Hash of the numbering of tokens. Tokenizers that differ only in their template have the same."""
        tokens = sorted(self.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]

    @property
    def template(self) -> Template | None:
        """The chat template, or None."""
        if self._template is None:
            return None
        return Template(self._template, self.tokenizer.bos_token, self.tokenizer.eos_token)

    @property
    def end(self) -> int:
        """Id of the token with which the template ends an answer."""
        (probe,) = self.render([_PROBE])
        return int(probe.tokens[probe.answers][-1])

    @property
    def stops(self) -> tuple[int, ...]:
        """Ids of the tokens that end an answer."""
        return tuple(dict.fromkeys((self.end, int(self.tokenizer.eos_token_id))))

    def render(self, conversations: Sequence[Conversation]) -> list[Rendered]:
        """Return the tokens of each conversation.

        Raises:
            InputError: The chat template refuses one of them.
        """
        texts, spans = zip(*(self._spans(one.turns) for one in conversations), strict=True)
        lost = [_answers(one.turns) - len(found) for one, found in zip(conversations, spans, strict=True)]
        rendered: list[Rendered] = []
        for group in groups([len(text) for text in texts]):
            encoded = tokenized(
                self.tokenizer, list(texts[group]), return_attention_mask=False, return_offsets_mapping=True
            )
            rows = zip(encoded["input_ids"], encoded["offset_mapping"], spans[group], strict=True)
            rendered += (self._masked(ids, np.array(offsets).reshape(-1, 2), found) for ids, offsets, found in rows)
        rendered = [replace(one, dropped=count) if count else one for one, count in zip(rendered, lost, strict=True)]
        if all(one.writer_logprobs is None for one in conversations):
            return rendered
        own, count = self.vocabulary, len(self.tokenizer)
        writer_logprobs = [
            one.writer_logprobs if one.writer_logprobs and one.writer_logprobs.vocabulary == own else None
            for one in conversations
        ]
        if any((one.likeliest.ids >= count).any() for one in writer_logprobs if one):
            raise InputError(
                f"the data have log-probabilities of tokens beyond the tokenizer's {count}: run autodistill write again"
            )
        return [
            record.with_logprobs(one) if one else record for record, one in zip(rendered, writer_logprobs, strict=True)
        ]

    def text(self, turns: Sequence[Turn]) -> str:
        """Return the text of a conversation, before tokenization."""
        return self._lines(turns)[0] if self._template is None else self._apply(turns)

    def asking(self, turns: Sequence[Turn]) -> str:
        """Return the text after which a model is to write its answer."""
        return self._lines(turns)[0] if self._template is None else self._apply(turns, asking=True)

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """Return the tokens after which a model is to write its answer."""
        return self._ids(self.asking(turns))

    def question(self, turns: Sequence[Turn], answer: str | None = None) -> str:
        """Return the text after which a model that was trained on such data writes its answer.

        The text ends where the content of an answer begins in training. If the template puts empty thoughts before an
        answer without thoughts, they are part of the text. With `asking`, in contrast, the model decides whether to
        think.

        Args:
            turns: The turns before the answer.
            answer: The expected answer. If it has thoughts of its own, the text ends as with `asking`. None stands for
                an answer without thoughts.
        """
        prompt = self.asking(turns)
        if self._template is None:
            return prompt
        question = prompt.removesuffix(self._frame.taken) + self._frame.lead
        if answer is None or question == prompt:
            return question
        return question if self._apply([*turns, Turn(ANSWERING, answer)]).startswith(question) else prompt

    def question_tokens(self, turns: Sequence[Turn], answer: str | None = None) -> list[int]:
        """Return the tokens of `question`."""
        return self._ids(self.question(turns, answer))

    @cached_property
    def _frame(self) -> _Frame:
        one, other = (self._apply(probe.turns).rstrip() for probe in (_PROBE, _OTHER))
        prompt = self._apply(_PROBE.prompt, asking=True)
        begun, end = one[: _alike(one, other)], one[len(one) - _alike(one[::-1], other[::-1]) :]
        same = _alike(prompt, begun)
        taken, lead = prompt[same:], begun[same:]
        return _Frame(taken, lead, end) if (taken + lead).strip() else _Frame("", "", end)

    @cached_property
    def _learns_more(self) -> bool:
        """Whether answers that are followed by other messages can only be found by their content."""
        turns = _PROBE.turns * 2
        try:
            whole, after = self._apply(turns), self._apply(turns[:2]).rstrip()
        except InputError:
            return False  # the template refuses all conversations of this length
        return not whole.startswith(after) and self._earlier(whole, turns, 1) is not None

    def _masked(self, ids: list[int], offsets: npt.NDArray[np.int64], spans: list[_Span]) -> Rendered:
        answers = np.zeros(len(ids), dtype=bool)
        spots = np.full((len(ids), 3), -1, dtype=np.int32)
        for span in spans:
            inside = (offsets[:, 1] > span.start) & (offsets[:, 0] < span.end)
            answers |= inside
            if span.content >= 0:
                spots[inside, 0] = span.turn
                spots[inside, 1:] = offsets[inside] - span.content
        if not answers.any():
            raise InputError(
                "the tokenizer and its chat template remove the whole answer, so there would be nothing to learn from: "
                "check chat_template.jinja and tokenizer.json"
            )
        last = np.flatnonzero(answers)[-1]
        if ids[last] not in self._special:
            # The template does not end the answer. Add EOS, since the student would otherwise never learn to stop.
            ids, answers = [*ids[: last + 1], self.tokenizer.eos_token_id], np.append(answers[: last + 1], True)
            spots = np.append(spots[: last + 1], spots[last : last + 1, [0, 2, 2]], axis=0)
        return Rendered(np.array(ids, dtype=np.int32), answers, spots=spots)

    def _spans(self, turns: Sequence[Turn]) -> tuple[str, list[_Span]]:
        """Return the text of a conversation, and the places of the answers in it."""
        if self._template is None:
            return self._lines(turns)
        whole = self._apply(turns)
        spans = []
        for place, turn in enumerate(turns):
            if turn.role != ANSWERING or place == 0:
                continue
            if place < len(turns) - 1:
                bounds = self._earlier(whole, turns, place)
            else:
                before = self._apply(turns[:place], asking=True)
                bounds = _alike(before, whole), len(whole.rstrip())
            if bounds is None:
                continue
            start, end = bounds
            lead = len(self._frame.lead) if whole.startswith(self._frame.lead, start) else 0
            spans.append(_Span(start, end, place, whole.find(turn.content.strip(), start + lead, end)))
        return whole, spans

    def _earlier(self, whole: str, turns: Sequence[Turn], place: int) -> tuple[int, int] | None:
        """Return the start and end of an answer that other messages follow, or None if the template rewrites it."""
        before, after = self._apply(turns[:place], asking=True), self._apply(turns[: place + 1])
        if whole.startswith(before) and whole.startswith(after):
            return len(before), len(after.rstrip())
        content, end = turns[place].content.strip(), self._frame.end.lstrip()
        for start in (before, before.removesuffix(self._frame.taken)):
            rest = whole.removeprefix(start).lstrip()
            following = rest.removeprefix(content).lstrip()
            if whole.startswith(start) and rest.startswith(content) and following.startswith(end):
                return len(start), len(whole) - len(following) + len(end)
        return None

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = tokenized(self.tokenizer, text)["input_ids"]
        return ids

    def _lines(self, turns: Sequence[Turn]) -> tuple[str, list[_Span]]:
        text, spans = self._beginning, []
        for place, turn in enumerate(turns):
            if turn.role == ANSWERING and place:
                blank = len(turn.content) - len(turn.content.lstrip())
                end = len(text) + len(turn.content + self.tokenizer.eos_token)
                spans.append(_Span(len(text), end, place, len(text) + blank))
                text += turn.content + self.tokenizer.eos_token
            else:
                text += turn.content + "\n"
        return text, spans

    def _apply(self, turns: Sequence[Turn], asking: bool = False) -> str:
        from autodistill.data.template_limits import chat_template

        assert self._template is not None
        try:
            template = chat_template(self._template)
            return template.render([turn._asdict() for turn in turns], asking, self._names)
        except Exception as error:  # a template is a program and can raise anything
            roles = ", ".join(dict.fromkeys(turn.role for turn in turns))
            why = " ".join(f"{error}".split()) or type(error).__name__
            raise InputError(f"the tokenizer's chat template refuses a conversation of {roles}: {why}") from error


def _alike(one: str, other: str) -> int:
    """Return the number of characters that two texts share at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _answers(turns: Sequence[Turn]) -> int:
    """Return the number of answers to learn. An answer in the first turn has no question, so it does not count."""
    return sum(turn.role == ANSWERING and place > 0 for place, turn in enumerate(turns))
