"""A conversation with a served student in the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from autodistill.service.client import Client

# Control characters but line ends and tabs: what a model writes must not steer a terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
ENDS = ("/quit", "/exit")
FORGETS = "/new"


@dataclass
class Conversation:
    """A conversation with a served student: what was said so far.

    Attributes:
        client: Of the server.
        system: What the student is told before anything else; empty for nothing.
        options: Further fields of each request.
        messages: Of the conversation.
    """

    client: Client
    system: str = ""
    options: dict[str, float | int] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def forget(self) -> None:
        """Begin anew."""
        self.messages.clear()

    def ask(self, text: str, write: Callable[[str], None]) -> str:
        """Say something, write the answer as it comes, and return how long it took, in words.

        What was asked and answered is kept only where the answer came whole.

        Raises:
            ServiceError: The server is not reached, or refuses, as a conversation that is too long for it.
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
    """Answer line by line until there are no more, or one of `ENDS`; yield how long each answer took, in words.

    Args:
        lines: What a person says; empty ones are passed over, and `FORGETS` begins anew.
        conversation: With the student.
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
