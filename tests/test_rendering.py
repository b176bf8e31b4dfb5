"""Rendered conversations against transformers' own rendering, and masks against its generation tags."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from autodistill import rendering
from autodistill.conversations import Conversation, Told, Turn, asked, told_of
from autodistill.errors import InputError
from autodistill.rendering import Rendered, Renderer
from autodistill.testing import tiny_tokenizer
from autodistill.tokenising import groups

HEAD = "{% for message in messages %}<s>{{ message.role }}\n"
TAIL = "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
TEMPLATE = HEAD + "{{ message.content }}</s>" + TAIL
# The same text; the tags tell transformers which part is the assistant's.
TAGGED = (
    HEAD
    + "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}</s>{% endgeneration %}"
    + "{% else %}{{ message.content }}</s>{% endif %}"
    + TAIL
)
LONG = Conversation(
    tuple(
        Turn(*turn)
        for turn in [
            ("system", "Be kind."),
            ("user", "Who carries the boat?"),
            ("assistant", " The miller.\n\nNear the river "),
            ("user", "And then?"),
            ("assistant", "Two apples."),
        ]
    )
)


def _renderer(folder: Path, template: str | None, **changes: str) -> Renderer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return Renderer(folder)


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    return [turn._asdict() for turn in conversation.turns]


@pytest.mark.parametrize("conversation", [LONG, asked("hi", "ho")])
def test_tokens_and_mask_are_those_of_transformers(tmp_path: Path, conversation: Conversation) -> None:
    (rendered,) = _renderer(tmp_path, TEMPLATE).render([conversation])
    expected = tiny_tokenizer().apply_chat_template(
        _messages(conversation), chat_template=TAGGED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert rendered.tokens.tolist() == expected["input_ids"]
    assert rendered.answers.astype(int).tolist() == expected["assistant_masks"]
    assert rendered.tokens.dtype == np.int32


def test_the_prompt_is_what_training_sees_before_the_answer(tmp_path: Path) -> None:
    for folder, template in (("chat", TEMPLATE), ("plain", None)):
        renderer = _renderer(tmp_path / folder, template)
        (rendered,) = renderer.render([LONG])
        prompt = renderer.prompt(LONG.prompt)
        begin = len(prompt)
        assert rendered.tokens[:begin].tolist() == prompt
        assert rendered.answers[begin : begin + rendered.last_answer].all()
        assert rendered.answers[begin:].sum() == rendered.last_answer
        assert not rendered.answers[begin - 1]
    expected = tiny_tokenizer().apply_chat_template(
        _messages(LONG)[:-1], chat_template=TEMPLATE, add_generation_prompt=True, return_dict=False
    )
    assert _renderer(tmp_path / "chat", TEMPLATE).prompt(LONG.prompt) == expected


def test_without_a_template_turns_are_lines_and_answers_end_with_eos(tmp_path: Path) -> None:
    renderer, tokenizer = _renderer(tmp_path, None), tiny_tokenizer()
    (rendered,) = renderer.render([asked("question", "answer")])
    assert tokenizer.decode(rendered.tokens) == "question\nanswer</s>"
    assert tokenizer.decode(rendered.tokens[rendered.answers]) == "answer</s>"
    (rendered,) = renderer.render([LONG])
    assert tokenizer.decode(rendered.tokens[rendered.answers]) == " The miller.\n\nNear the river </s>Two apples.</s>"


def test_lines_begin_as_the_tokenizer_begins_texts_and_templates_by_themselves(tmp_path: Path) -> None:
    def saved(name: str, template: str | None) -> Renderer:
        tokenizer = tiny_tokenizer(begins=True)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        return Renderer(tmp_path / name)

    encode, one = tiny_tokenizer(begins=True), asked("question", "answer")
    plain = saved("plain", None)
    (rendered,) = plain.render([one])
    assert rendered.tokens.tolist() == encode("question\nanswer</s>")["input_ids"]
    assert encode.decode(rendered.tokens[rendered.answers]) == "answer</s>"
    assert plain.prompt(one.prompt) == encode("question\n")["input_ids"]
    bare = _renderer(tmp_path / "bare", None)
    assert plain.rule != bare.rule == "plain lines"
    assert rendered.last_answer == bare.render([one])[0].last_answer
    for name, template in (("with", "{{ bos_token }}" + TEMPLATE), ("without", TEMPLATE)):
        expected = encode.apply_chat_template(_messages(one), chat_template=template, return_dict=False)
        (rendered,) = saved(name, template).render([one])
        assert rendered.tokens.tolist() == expected
        # Its turns begin with the same token.
        assert expected.count(encode.bos_token_id) == len(one.turns) + (name == "with")


def test_conversations_are_tokenised_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, many = _renderer(tmp_path, TEMPLATE), [asked(f"question {n}", "answer " * n) for n in range(1, 30)]
    expected, given, genuine = renderer.render(many), [], renderer.tokenizer

    def counting(texts: list[str], **options: Any) -> Any:
        given.append(sum(map(len, texts)))
        return genuine(texts, **options)

    counting.apply_chat_template, counting.eos_token_id = genuine.apply_chat_template, genuine.eos_token_id
    renderer.tokenizer = counting
    monkeypatch.setattr(rendering, "groups", partial(groups, at_once=400))
    found = renderer.render(many)
    assert max(given) <= 400 < sum(given)
    for one, other in zip(found, expected, strict=True):
        for name in ("tokens", "answers", "spots"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_an_answer_without_an_end_is_given_one(tmp_path: Path) -> None:
    open_ended = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    (rendered,) = _renderer(tmp_path, open_ended + "{% if add_generation_prompt %}assistant: {% endif %}").render(
        [asked("hi", "ho")]
    )
    assert tiny_tokenizer().decode(rendered.tokens[rendered.answers]).lstrip() == "ho</s>"
    assert rendered.answers[-1]


def test_an_answer_that_the_template_rewrites_later_is_not_learnt(tmp_path: Path) -> None:
    # As Qwen3 does: what was thought before the last answer is left out of the text.
    template = HEAD.replace("\n", "\n{% if loop.last and message.role == 'assistant' %}<think> {% endif %}")
    (rendered,) = _renderer(tmp_path, template + "{{ message.content }}</s>" + TAIL).render([LONG])
    assert tiny_tokenizer().decode(rendered.tokens[rendered.answers]) == "<think> Two apples.</s>"


def test_an_answer_is_ended_by_what_the_template_says_and_by_eos(tmp_path: Path) -> None:
    assert _renderer(tmp_path / "a", TEMPLATE).stops == (tiny_tokenizer().eos_token_id,)
    other = _renderer(tmp_path / "b", TEMPLATE.replace("</s>", "<pad>"))
    assert other.stops == (tiny_tokenizer().pad_token_id, tiny_tokenizer().eos_token_id)


def test_the_rule_is_another_for_another_template(tmp_path: Path) -> None:
    rules = [_renderer(tmp_path / str(i), text).rule for i, text in enumerate((None, TEMPLATE, TEMPLATE + " "))]
    assert len(set(rules)) == 3
    assert _renderer(tmp_path / "1", TEMPLATE).rule == rules[1]


def test_what_a_template_refuses_is_said(tmp_path: Path) -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    renderer = _renderer(tmp_path, refusing)
    with pytest.raises(InputError, match=r"refuses a conversation of system, user.*no system role"):
        renderer.render([LONG])
    assert len(renderer.render([asked("hi", "ho")])) == 1


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id is None
    with pytest.raises(InputError, match="no EOS token to end an answer with"):
        Renderer(tmp_path)


def _told(renderer: Renderer, tokens: list[int], vocabulary: str | None = None) -> Told:
    """Of each token itself, and of the one after it in the vocabulary."""
    top = [[(token, -0.5), (token + 1, -1.5)] for token in tokens]
    return told_of(vocabulary or renderer.vocabulary, tokens, top)


def _answer_ids(rendered: Rendered) -> list[int]:
    return rendered.tokens[rendered.last_start :][: rendered.last_answer].tolist()


def test_what_was_told_stands_at_the_last_answers_tokens(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, TEMPLATE)
    (plain,) = renderer.render([LONG])
    ids = _answer_ids(plain)[:-1]  # nothing is told of the token that ends it
    (rendered,) = renderer.render([replace(LONG, told=_told(renderer, ids))])
    assert np.array_equal(rendered.tokens, plain.tokens)
    assert rendered.told is not None
    places = range(plain.last_start, plain.last_start + len(ids))
    assert np.flatnonzero(rendered.told.ids[:, 0] >= 0).tolist() == list(places)
    assert rendered.told.ids[places].tolist() == [[token, token + 1] for token in ids]
    assert rendered.told.log_p[places].tolist() == [[-0.5, -1.5]] * len(ids)


def test_what_was_told_counts_up_to_the_first_other_token(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, TEMPLATE)
    (plain,) = renderer.render([LONG])
    ids = _answer_ids(plain)[:-1]
    other = [*ids[:3], ids[3] + 1, *ids[4:]]
    heard = []
    for tokens in (other, [ids[0] + 1, *ids[1:]], ids + ids):
        (rendered,) = renderer.render([replace(LONG, told=_told(renderer, tokens))])
        heard.append(0 if rendered.told is None else int((rendered.told.ids[:, 0] >= 0).sum()))
    # Of the last, told for longer than the answer, the token that ends it differs.
    assert heard == [3, 0, len(ids)]


def test_tokens_told_under_another_numbering_say_nothing(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path / "one", TEMPLATE)
    ids = _answer_ids(renderer.render([LONG])[0])
    (rendered,) = renderer.render([replace(LONG, told=_told(renderer, ids, "another"))])
    assert rendered.told is None
    # The template has no part in the numbering, and a further token has.
    assert _renderer(tmp_path / "two", None).vocabulary == renderer.vocabulary
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path / "three")
    assert Renderer(tmp_path / "three").vocabulary != renderer.vocabulary


def test_tokens_told_beyond_the_tokenizer_are_refused(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, TEMPLATE)
    with pytest.raises(InputError, match="tokens beyond the tokenizer's 300"):
        renderer.render([replace(LONG, told=_told(renderer, [299]))])
