"""Conversations with a real server, and with one whose answers a test sets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from autodistill.errors import ServiceError
from autodistill.service.chat import Conversation, turns
from autodistill.service.client import Client, Piece
from autodistill.service.launch import Service


class Echo(Client):
    """Answers with the last message that it got, in two pieces, and records everything that it was sent."""

    def __init__(self) -> None:
        self.sent: list[list[Mapping[str, str]]] = []

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Iterator[Piece]:
        self.sent.append(list(messages))
        text = messages[-1]["content"]
        if text == "fail":
            raise ServiceError("it broke off")
        yield Piece(text=text[:2])
        yield Piece(text=text[2:])
        yield Piece(text="", tokens=4, seconds=2.0)


def test_a_turn_has_all_turns_before_it_and_a_new_one_has_none() -> None:
    client, written = Echo(), []
    conversation = Conversation(client, "be brief")
    said = list(turns(["one\n", "\n", "two\n", "/new\n", "three\n", "/quit\n", "four\n"], conversation, written.append))
    assert said == ["4 tokens, 2 a second"] * 3
    assert "".join(written) == "onetwothree"
    assert [[one["content"] for one in sent] for sent in client.sent] == [
        ["be brief", "one"],
        ["be brief", "one", "one", "two"],
        ["be brief", "three"],
    ]
    assert [one["role"] for one in client.sent[1]] == ["system", "user", "assistant", "user"]


def test_what_was_not_answered_whole_is_not_kept() -> None:
    conversation = Conversation(Echo())
    with pytest.raises(ServiceError):
        conversation.ask("fail", lambda text: None)
    assert conversation.messages == []


def test_what_a_model_writes_does_not_steer_the_terminal() -> None:
    written: list[str] = []
    Conversation(Echo()).ask("a\x1b[2J\nb\tc\x07", written.append)
    assert "".join(written) == "a[2J\nb\tc"


def test_a_real_server_answers_in_pieces(service: Service) -> None:
    written: list[str] = []
    with service.client() as client:
        conversation = Conversation(client, options={"max_tokens": 8, "temperature": 0})
        assert conversation.ask("hello", written.append).startswith(("8 tokens, ", "7 tokens, "))
    assert conversation.messages[-1]["role"] == "assistant"
    assert conversation.messages[-1]["content"] == "".join(written)
