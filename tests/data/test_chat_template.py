"""Rendered conversations against transformers' own rendering, and masks against its generation tags."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from autodistill.data import chat_template as rendering
from autodistill.data.chat_template import Rendered, Renderer
from autodistill.data.conversations import Conversation, Turn, WriterLogprobs, logprobs_of, single_turn
from autodistill.data.tokenization import groups
from autodistill.errors import InputError
from autodistill.testing import tiny_tokenizer

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
# Treats thoughts as Qwen3's template does: only the last answer has them, empty if there were none.
THINKING = (
    "{% set last = namespace(asked=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set last.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set parts = message.content.split('</think>') %}<s>{{ message.role }}\n"
    "{% if message.role == 'assistant' and loop.index0 > last.asked %}"
    "<think>\n{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') if parts | length > 1 else message.content }}</s>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
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


@pytest.mark.parametrize("conversation", [LONG, single_turn("hi", "ho")])
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
    (rendered,) = renderer.render([single_turn("question", "answer")])
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

    encode, one = tiny_tokenizer(begins=True), single_turn("question", "answer")
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
        # Each turn begins with the same token.
        assert expected.count(encode.bos_token_id) == len(one.turns) + (name == "with")


def test_conversations_are_tokenized_some_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer, many = _renderer(tmp_path, TEMPLATE), [single_turn(f"question {n}", "answer " * n) for n in range(1, 30)]
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
        [single_turn("hi", "ho")]
    )
    assert tiny_tokenizer().decode(rendered.tokens[rendered.answers]).lstrip() == "ho</s>"
    assert rendered.answers[-1]


def _learnt(rendered: Rendered) -> str:
    return str(tiny_tokenizer().decode(rendered.tokens[rendered.answers]))


def test_what_a_template_puts_before_the_last_answer_alone_parts_no_other_from_its_prompt(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, THINKING)
    (rendered,) = renderer.render([LONG])
    assert _learnt(rendered) == " The miller.\n\nNear the river </s><think>\n\n</think>\n\nTwo apples.</s>"
    assert rendered.dropped == 0
    assert rendered.tokens.tolist() == tiny_tokenizer().apply_chat_template(
        _messages(LONG), chat_template=THINKING, return_dict=False
    )
    # Each answer follows the prompt that its model would get there.
    for place in (2, 4):
        start = len(renderer.prompt(LONG.turns[:place]))
        assert rendered.answers[start]
        assert not rendered.answers[start - 1]
    assert renderer.rule != _renderer(tmp_path / "plain", TEMPLATE).rule


def test_an_answer_whose_thoughts_the_template_drops_later_is_not_learnt_and_counted(tmp_path: Path) -> None:
    turns = [
        *(Turn("user", "Who?"), Turn("assistant", "<think>\nHm.\n</think>\n\nThe fox.")),
        *(Turn("user", "Sure?"), Turn("assistant", "Yes.")),
        *(Turn("user", "So?"), Turn("assistant", "<think>\nWell.\n</think>\n\nGo.")),
    ]
    (rendered,) = _renderer(tmp_path, THINKING).render([Conversation(tuple(turns))])
    assert _learnt(rendered) == "Yes.</s><think>\nWell.\n</think>\n\nGo.</s>"
    assert rendered.dropped == 1


@pytest.mark.parametrize("answer", ["Two apples.", "think", "<think>\n\n</think>\n\nGo."])
def test_a_question_is_asked_where_the_content_of_its_answer_begins(tmp_path: Path, answer: str) -> None:
    renderer, turns = _renderer(tmp_path, THINKING), [Turn("user", "What?")]
    # The way in which transformers asks a model that should not think.
    options = {"chat_template": THINKING, "add_generation_prompt": True, "return_dict": False}
    expected = tiny_tokenizer().apply_chat_template(
        [turn._asdict() for turn in turns], enable_thinking=False, **options
    )
    assert renderer.question_tokens(turns) == renderer.question_tokens(turns, answer) == expected
    (rendered,) = renderer.render([single_turn("What?", answer)])
    assert rendered.tokens[: len(expected)].tolist() == expected
    spots = rendered.spots
    assert spots is not None
    if "<think>" not in answer:
        assert (spots[len(expected), 1], spots[len(expected) - 1, 2]) == (0, 0)
    # An answer with thoughts begins with them, and `prompt` leaves them to the model.
    thinking = tiny_tokenizer().apply_chat_template([turn._asdict() for turn in turns], **options)
    assert renderer.prompt(turns) == thinking == renderer.question_tokens(turns, "<think>\nHm.\n</think>\n\nGo.")


def test_a_template_that_asks_for_thoughts_and_then_drops_them_asks_as_it_is_learnt(tmp_path: Path) -> None:
    """As in DeepSeek-R1's template, the prompt for a new answer ends in something that existing answers lack."""
    template = TEMPLATE.replace("<s>assistant\n{% endif %}", "<s>assistant\n<think>\n{% endif %}")
    renderer = _renderer(tmp_path, template)
    (rendered,) = renderer.render([LONG])
    assert _learnt(rendered) == " The miller.\n\nNear the river </s>Two apples.</s>"
    question = renderer.question_tokens(LONG.prompt, LONG.answer)
    assert rendered.tokens[: rendered.last_start].tolist() == question != renderer.prompt(LONG.prompt)


@pytest.mark.parametrize("template", [None, TEMPLATE, TEMPLATE.replace("{{ message.content", " {{ message.content")])
def test_of_all_other_templates_questions_and_rule_stay(tmp_path: Path, template: str | None) -> None:
    renderer = _renderer(tmp_path, template)
    assert renderer.question_tokens(LONG.prompt, LONG.answer) == renderer.prompt(LONG.prompt)
    assert renderer.further_rule == ""


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
    assert len(renderer.render([single_turn("hi", "ho")])) == 1


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id is None
    with pytest.raises(InputError, match="no EOS token to end an answer with"):
        Renderer(tmp_path)


def _told(renderer: Renderer, tokens: list[int], vocabulary: str | None = None) -> WriterLogprobs:
    """Return log probabilities of each token and of the token after it in the vocabulary."""
    top = [[(token, -0.5), (token + 1, -1.5)] for token in tokens]
    return logprobs_of(vocabulary or renderer.vocabulary, tokens, top)


def _answer_ids(rendered: Rendered) -> list[int]:
    return rendered.tokens[rendered.last_start :][: rendered.last_answer].tolist()


def test_what_was_told_stands_at_the_last_answers_tokens(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, TEMPLATE)
    (plain,) = renderer.render([LONG])
    ids = _answer_ids(plain)[:-1]  # without the token that ends it, which has no log probabilities
    (rendered,) = renderer.render([replace(LONG, writer_logprobs=_told(renderer, ids))])
    assert np.array_equal(rendered.tokens, plain.tokens)
    assert rendered.writer_logprobs is not None
    places = range(plain.last_start, plain.last_start + len(ids))
    assert np.flatnonzero(rendered.writer_logprobs.ids[:, 0] >= 0).tolist() == list(places)
    assert rendered.writer_logprobs.ids[places].tolist() == [[token, token + 1] for token in ids]
    assert rendered.writer_logprobs.log_p[places].tolist() == [[-0.5, -1.5]] * len(ids)


def test_what_was_told_counts_up_to_the_first_other_token(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, TEMPLATE)
    (plain,) = renderer.render([LONG])
    ids = _answer_ids(plain)[:-1]
    other = [*ids[:3], ids[3] + 1, *ids[4:]]
    heard = []
    for tokens in (other, [ids[0] + 1, *ids[1:]], ids + ids):
        (rendered,) = renderer.render([replace(LONG, writer_logprobs=_told(renderer, tokens))])
        heard.append(0 if rendered.writer_logprobs is None else int((rendered.writer_logprobs.ids[:, 0] >= 0).sum()))
    # The last list is longer than the answer, so it differs at the token that ends the answer.
    assert heard == [3, 0, len(ids)]


def test_tokens_told_under_another_numbering_say_nothing(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path / "one", TEMPLATE)
    ids = _answer_ids(renderer.render([LONG])[0])
    (rendered,) = renderer.render([replace(LONG, writer_logprobs=_told(renderer, ids, "another"))])
    assert rendered.writer_logprobs is None
    # The template does not change the numbering of tokens, but a further token does.
    assert _renderer(tmp_path / "two", None).vocabulary == renderer.vocabulary
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(tmp_path / "three")
    assert Renderer(tmp_path / "three").vocabulary != renderer.vocabulary


def test_tokens_told_beyond_the_tokenizer_are_refused(tmp_path: Path) -> None:
    renderer = _renderer(tmp_path, TEMPLATE)
    with pytest.raises(InputError, match="tokens beyond the tokenizer's 300"):
        renderer.render([replace(LONG, writer_logprobs=_told(renderer, [299]))])
