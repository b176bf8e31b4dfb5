"""Turns of a conversation, and how a record with messages, or with a prompt and its answer, becomes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from autodistill.errors import InputError

ANSWERING = "assistant"
MESSAGES = "messages"
PROMPTS = ("prompt", "question", "instruction")
ANSWERS = ("answer", "response", "completion", "output")
# What some records put beside an instruction: the text it is about.
_CONTEXTS = ("context", "input")

Record = Mapping[str, Any]


class Turn(NamedTuple):
    """What one side says: `role` is "system", "user", "assistant", or another that the chat template knows."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns, of which the assistant's are the answers to be learnt; the last turn is one of them.

    Attributes:
        turns: In their order.
        item: Number of the item in the task that it was made by; None elsewhere.
    """

    turns: tuple[Turn, ...]
    item: int | None = None

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """What stands before the last answer."""
        return self.turns[:-1]

    @property
    def answer(self) -> str:
        """The last answer."""
        return self.turns[-1].content

    @property
    def opening(self) -> str:
        """What stands before the first answer: conversations that share it belong in the same split."""
        first = next(place for place, turn in enumerate(self.turns) if place and turn.role == ANSWERING)
        return "\n".join(turn.content for turn in self.turns[:first]).strip()


def asked(prompt: str, answer: str, item: int | None = None) -> Conversation:
    """The conversation of a user's prompt and its answer."""
    return Conversation((Turn("user", prompt), Turn(ANSWERING, answer)), item)


Reader = Callable[[Record, str], Conversation | None]


def readers(fields: Sequence[str]) -> Iterator[Reader]:
    """Ways to read records that have these fields, the preferred one first.

    A reader takes a record and the place it was found at, for error messages. It gives None where prompt or answer is
    null or blank, and raises `InputError` where the record has another shape.
    """
    for prompt in PROMPTS:
        for answer in ANSWERS:
            if {prompt, answer} <= set(fields):
                yield _pair_reader(prompt, answer)
    if MESSAGES in fields:
        yield _answered


def read_prompt(record: Record, where: str) -> tuple[Turn, ...]:
    """The turns that a record asks to be answered; answers that it has at their end are left out.

    Raises:
        InputError: No prompt, or one that is not text.
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
        for name in (prompt, answer):
            _text(name, record, where)
        question, reply = _with_context(prompt, record, where), _text(answer, record, where)
        return asked(question, reply) if question.strip() and reply.strip() else None

    return read


def _with_context(prompt: str, record: Record, where: str) -> str:
    context = next((name for name in _CONTEXTS if record.get(name)), None)
    text = _text(prompt, record, where)
    return f"{text}\n{_text(context, record, where)}" if context and text else text


def _text(name: str, record: Record, where: str) -> str:
    if name not in record:
        raise InputError(f"{where} lacks the field {name}: add it or remove the record")
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
        raise InputError(f"{where} has no message of the {ANSWERING} after another: its words are what is learnt")
    answered = turns[: last + 1]
    return Conversation(answered) if answered[-1].content.strip() else None


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
