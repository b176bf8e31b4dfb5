"""Conversations, and readers of records with messages, or with a prompt and an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError

ANSWERING = "assistant"
MESSAGES = "messages"
TOLD = "signal"  # the field that says whether the record has log-probabilities in addition to the text
PROMPTS = ("prompt", "question", "instruction")
ANSWERS = ("answer", "response", "completion", "output")
# Fields in which some records have the text that an instruction is about.
_CONTEXTS = ("context", "input")
READ_FIELDS = (*PROMPTS, *ANSWERS, *_CONTEXTS, MESSAGES, TOLD, "vocabulary", "tokens", "top")
"""All fields that are read from a record of a conversation."""

_THOUGHTS = ("<think>", "</think>")  # the marks of Qwen3, DeepSeek-R1 and models distilled from them
# A token with a lower log-probability counts as one of the rest. Servers write -9999 for tokens that were ruled out.
_LEAST = -80.0

Record = Mapping[str, Any]


class Turn(NamedTuple):
    """One message: `role` is "system", "user", "assistant", or another role that the chat template knows."""

    role: str
    content: str


class Likeliest(NamedTuple):
    """The likeliest tokens at each of n positions, as the writer of the text reported them.

    Attributes:
        ids: int32 [..., n, k], distinct at each position. If fewer than k were reported, the rest is -1.
        log_p: float32 [..., n, k], their log-probabilities at temperature 1. If fewer were reported, the rest is 0.
    """

    ids: npt.NDArray[np.int32]
    log_p: npt.NDArray[np.float32]

    def first(self, count: int) -> Likeliest:
        """Return the values of the first positions, along the first dimension."""
        return Likeliest(self.ids[:count], self.log_p[:count])


@dataclass(frozen=True, kw_only=True, eq=False)
class WriterLogprobs:
    """The log-probabilities that a writer reported for the tokens of an answer, in addition to its text.

    Attributes:
        vocabulary: Identifies the numbering of the tokens; see `chat_template.Renderer.vocabulary`.
        tokens: int32 [n], the tokens of the answer, without the one that ends it.
        likeliest: The likeliest tokens at the position of each.
    """

    vocabulary: str
    tokens: npt.NDArray[np.int32]
    likeliest: Likeliest


def without_thoughts(answer: str) -> str:
    """Return an answer without the thoughts before it, or "" if the thoughts do not end."""
    _, ended, said = answer.rpartition(_THOUGHTS[1])
    return said if ended or not answer.lstrip().startswith(_THOUGHTS[0]) else ""


@dataclass(frozen=True)
class Conversation:
    """The turns of a conversation. The assistant's turns are the answers to learn, and the last turn is an answer.

    Attributes:
        turns: The turns in their order.
        item: Number of the item in the task that made it, or None if no task did.
        writer_logprobs: Log-probabilities that the writer of the last answer reported, or None.
    """

    turns: tuple[Turn, ...]
    item: int | None = None
    writer_logprobs: WriterLogprobs | None = field(default=None, compare=False)

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The turns before the last answer."""
        return self.turns[:-1]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.turns[-1].content

    @property
    def opening(self) -> str:
        """The text of the turns before the first answer. Conversations with the same text belong to the same split."""
        first = next(place for place, turn in enumerate(self.turns) if place and turn.role == ANSWERING)
        return "\n".join(turn.content for turn in self.turns[:first]).strip()


def single_turn(prompt: str, answer: str, item: int | None = None) -> Conversation:
    """Return the conversation of a user's prompt and its answer."""
    return Conversation((Turn("user", prompt), Turn(ANSWERING, answer)), item)


Reader = Callable[[Record, str], Conversation | None]


def readers(fields: Sequence[str]) -> Iterator[Reader]:
    """Yield functions that read records with these fields, the preferred one first.

    A reader takes a record and its place in the data, for error messages. It returns None if prompt or answer is null
    or blank, and raises `InputError` if the record has another form.
    """
    for prompt in PROMPTS:
        for answer in ANSWERS:
            if {prompt, answer} <= set(fields):
                yield _pair_reader(prompt, answer)
    if MESSAGES in fields:
        yield _answered


def read_prompt(record: Record, where: str) -> tuple[Turn, ...]:
    """Return the turns of a record that ask for an answer, without answers at their end.

    Raises:
        InputError: There is no prompt, or it is not text.
    """
    prompt = next((name for name in PROMPTS if name in record), None)
    if prompt is not None:
        turns: tuple[Turn, ...] = (Turn("user", _with_context(prompt, record, where)),)
    elif MESSAGES in record:
        turns = _turns(record, where)
        while turns and turns[-1].role == ANSWERING:
            turns = turns[:-1]
    else:
        raise InputError(
            f"{where} has no prompt ({', '.join(PROMPTS)} or {MESSAGES}); the fields found are {', '.join(record)}"
        )
    if not turns or not turns[-1].content.strip():
        raise InputError(f"{where} has a blank prompt: write one or remove the record")
    return turns


def _pair_reader(prompt: str, answer: str) -> Reader:
    def read(record: Record, where: str) -> Conversation | None:
        """Return a record as one question and its answer, or None if either is blank."""
        for name in (prompt, answer):
            text_of(name, record, where)
        question, reply = _with_context(prompt, record, where), text_of(answer, record, where)
        return single_turn(question, reply) if question.strip() and reply.strip() else None

    return read


def _with_context(prompt: str, record: Record, where: str) -> str:
    context = next((name for name in _CONTEXTS if record.get(name)), None)
    text = text_of(prompt, record, where)
    return f"{text}\n{text_of(context, record, where)}" if context and text else text


def _lacking(name: str, record: Record, where: str) -> InputError:
    """Return the error for a record without a field that other records have."""
    own = f"it has {', '.join(record)}" if record else "it has none"
    return InputError(
        f"{where} lacks the field {name}, which other records have ({own}): give all records the same fields, or "
        "remove this one"
    )


def text_of(name: str, record: Record, where: str) -> str:
    """Return the text in a record's field, or "" if it is null.

    Raises:
        InputError: The record lacks the field, or its value is not text.
    """
    if name not in record:
        raise _lacking(name, record, where)
    value = record[name]
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where} has a field {name} that is not text: write it as text")
    return value or ""


def _answered(record: Record, where: str) -> Conversation | None:
    turns = _turns(record, where)
    if not turns:
        return None
    last = max((place for place, turn in enumerate(turns) if turn.role == ANSWERING), default=0)
    if last == 0:
        raise InputError(
            f"{where} has no {ANSWERING} message after another message, so there is nothing to learn: add "
            "one, or remove the record"
        )
    answered = turns[: last + 1]
    if not answered[-1].content.strip():
        return None
    # The log-probabilities are of the record's last message, so they only apply if that is the last answer.
    return Conversation(answered, writer_logprobs=_writer_logprobs(record, where) if last == len(turns) - 1 else None)


def logprobs_record(writer_logprobs: WriterLogprobs) -> dict[str, Any]:
    """Return the fields of a record for reported log-probabilities, in the form that `readers` read."""
    top = [
        [(int(token), float(log_p)) for token, log_p in zip(*place, strict=True) if token >= 0]
        for place in zip(*writer_logprobs.likeliest, strict=True)
    ]
    return {
        TOLD: "top-k",
        "vocabulary": writer_logprobs.vocabulary,
        "tokens": writer_logprobs.tokens.tolist(),
        "top": top,
    }


def logprobs_of(vocabulary: str, tokens: Sequence[int], top: Sequence[Sequence[tuple[int, float]]]) -> WriterLogprobs:
    """Return the reported log-probabilities of an answer's tokens.

    A token with a probability of 0, or almost 0, is left to the rest, since servers write arbitrary values for it.

    Args:
        vocabulary: See `WriterLogprobs`.
        tokens: The n tokens of the answer.
        top: For each of the n positions, ids and log-probabilities.

    Raises:
        TypeError, ValueError: A value has another shape, or is not a number.
    """
    places = [
        {int(token): min(float(log_p), 0.0) for token, log_p in place if float(log_p) > _LEAST and int(token) >= 0}
        for place in top
    ]
    if len(places) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens and {len(places)} places")
    shape = (len(tokens), max(map(len, places), default=0))
    ids, log_p = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    for row, place in enumerate(places):
        ids[row, : len(place)], log_p[row, : len(place)] = list(place), list(place.values())
    return WriterLogprobs(vocabulary=vocabulary, tokens=np.array(tokens, np.int32), likeliest=Likeliest(ids, log_p))


def _writer_logprobs(record: Record, where: str) -> WriterLogprobs | None:
    if record.get(TOLD) != "top-k" or not isinstance(record.get("vocabulary"), str):
        return None
    try:
        return logprobs_of(record["vocabulary"], record["tokens"], record["top"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"{where} has log-probabilities that cannot be read ({error}): write it again, or take out its {TOLD}"
        ) from None


def _turns(record: Record, where: str) -> tuple[Turn, ...]:
    messages = record.get(MESSAGES)
    if messages is None:
        return ()
    if not isinstance(messages, list):
        raise InputError(f"{where} has messages that are not a list of roles with content")
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise InputError(f"{where} has a message without a role and a content that are text")
    return tuple(Turn(message["role"], message["content"]) for message in messages)
