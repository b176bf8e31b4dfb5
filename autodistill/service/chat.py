"""A conversation with a served student in the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from autodistill.service.client import Client

# Control characters except line ends and tabs: the text of a model must not steer a terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
ENDS = ("/quit", "/exit")
FORGETS = "/new"


@dataclass
class Conversation:
    """A conversation with a served student, and what was said so far.

    Attributes:
        client: Client of the server.
        system: The system prompt; empty for none.
        options: Further fields of each request.
        messages: The messages so far.
    """

    client: Client
    system: str = ""
    options: dict[str, float | int] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def forget(self) -> None:
        """Forget all messages and begin again."""
        self.messages.clear()

    def ask(self, text: str, write: Callable[[str], None]) -> str:
        """Send a message, write the answer as it arrives, and return how fast it was, in words.

        Question and answer are kept only if the answer arrived completely.

        Raises:
            ServiceError: The server cannot be reached or refuses, for example because the conversation is too long.
        """
        said = [*self.messages, {"role": "user", "content": text}]
        before = [{"role": "system", "content": self.system}] if self.system else []
        written, told = "", ""
        for piece in self.client.chat([*before, *said], **self.options):
            if piece.text:
                written += piece.text
                write(_CONTROL.sub("", piece.text))
            elif piece.tokens is not None and piece.seconds:
                told = f"{piece.tokens} tokens, {piece.tokens / piece.seconds:.3g} a second"
        self.messages = [*said, {"role": "assistant", "content": written}]
        return told


def turns(lines: Iterable[str], conversation: Conversation, write: Callable[[str], None]) -> Iterator[str]:
    """Answer line by line until there are no more or one of `ENDS` comes; yield how fast each answer was, in words.

    Args:
        lines: What the user types. Empty lines are skipped, and `FORGETS` starts a new conversation.
        conversation: The conversation with the student.
        write: Writes the answers, piece by piece.
    """
    for line in lines:
        text = line.strip()
        if text in ENDS:
            return
        if text == FORGETS:
            conversation.forget()
        elif text:
            yield conversation.ask(text, write)
