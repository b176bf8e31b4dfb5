"""Chat templates against transformers' own rendering, and programs that would never end or would fill memory."""

from __future__ import annotations

import pytest
from jinja2 import TemplateError

from autodistill.data import template_limits
from autodistill.data.template_limits import ChatTemplate
from autodistill.testing import tiny_tokenizer

_MESSAGES = [
    {"role": "user", "content": "  Who carries the boat? "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nThe miller, 50%."},
]
_LOOP = "{% for message in messages %}{{ BODY }}{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
_FEATURES = [
    "message['role'] + '\n' + message['content'] + eos_token",
    "message.content | trim | replace('\n', ' ') | upper ~ loop.index ~ bos_token",
    "message | tojson(indent=2)",
    "'%s says %5d' | format(message.role, 3)",
    "'{:>10}|{}'.format(message.role, message.content.split('</think>')[-1].strip())",
    "[message.role, 1, none, {'a': [true]}]",
    "', '.join(messages | map(attribute='role')) ~ (messages | map(attribute='content') | join('-', ))",
    "'ab'.center(9) * 2 + 'x' * loop.index + ('%03d' % 7) ~ 2 ** 10 ~ ([1] * 2 + [3])",
    "range(3) | list ~ (message.content | length) ~ messages[::-1] | map(attribute='role') | join",
    "messages | selectattr('role', 'equalto', 'user') | list | length",
    "message.content.startswith('<think>') and message.content.replace('m', 'mm').expandtabs(4)",
]


@pytest.mark.parametrize("body", _FEATURES)
@pytest.mark.parametrize("asking", [False, True])
def test_a_template_renders_what_transformers_renders(body: str, asking: bool) -> None:
    tokenizer = tiny_tokenizer()
    text = _LOOP.replace("BODY", body)
    expected = tokenizer.apply_chat_template(
        _MESSAGES, chat_template=text, tokenize=False, add_generation_prompt=asking
    )
    assert ChatTemplate(text).render(_MESSAGES, asking, tokenizer.special_tokens_map) == expected


def test_its_tags_macros_and_variables_are_transformers_too() -> None:
    tokenizer = tiny_tokenizer()
    text = (
        "{% macro said(one, mark='!') %}{{ one.role }}{{ mark }}{{ one.content }}{% endmacro %}"
        "{% set found = namespace(count=0, text='') %}{% set head %}<{{ messages | length }}>{% endset %}{{ head }}"
        "{% for one in messages recursive %}{% if loop.first %}{% continue %}{% endif %}"
        "{% set found.count = loop.index %}"
        "{% generation %}{{ said(one, mark='?') }}{% endgeneration %}{% set found.text = found.text ~ one.role %}"
        "{% endfor %}{{ found.count }}{{ found.text }}{{ strftime_now('%%') }}"
        "{% if tools is none and documents is none %}-{% endif %}{% if nothing is defined %}+{% endif %}"
    )
    expected = tokenizer.apply_chat_template(_MESSAGES, chat_template=text, tokenize=False)
    assert ChatTemplate(text).render(_MESSAGES, False, tokenizer.special_tokens_map) == expected


def test_what_writes_far_more_than_it_is_given_is_refused() -> None:
    """With a book around each conversation, a few hundred of them would take minutes to tokenise."""
    characters = sum(len(text) for message in _MESSAGES for text in message.values())
    said = f"it writes 400,000 characters for a conversation of {characters}"
    for text in ("{{ strftime_now('%Y' * 100000) }}", "{{ 'wide' * 100000 }}"):
        with pytest.raises(TemplateError, match=said):
            ChatTemplate(text).render(_MESSAGES, False, {})
    assert len(ChatTemplate("{{ 'wide' * 10000 }}").render(_MESSAGES, False, {})) == 40_000


def test_a_long_conversation_has_the_room_that_it_needs() -> None:
    messages = [{"role": "user", "content": "word " * 40_000}, {"role": "assistant", "content": "yes"}] * 40
    text = _LOOP.replace("BODY", "'<s>' + message.role + '\n' + message.content | trim + '</s>'")
    assert len(ChatTemplate(text).render(messages, False, {})) > 40 * 200_000


_GROWING = "{% set n = namespace(a=START) %}{% for i in range(99) %}{% set n.a = STEP %}{% endfor %}{{ n.a WAY }}"
_ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = 1 %}{% endfor %}{% endfor %}",
    "loops that write": "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    "a loop within itself": "{% for a in [messages] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "a macro within itself": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "two macros within each": "{% macro f(n) %}"
    "{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "text that doubles": _GROWING.replace("START", "'a'").replace("STEP", "n.a + n.a").replace("WAY", ""),
    "text that doubles by ~": _GROWING.replace("START", "'a'").replace("STEP", "n.a ~ n.a").replace("WAY", ""),
    "text that doubles by replace": _GROWING.replace("START", "'a'")
    .replace("STEP", "n.a.replace('a', 'aa')")
    .replace("WAY", ""),
    "text that doubles by a filter": _GROWING.replace("START", "'a'")
    .replace("STEP", "n.a | replace('a', 'aa')")
    .replace("WAY", ""),
    "text that doubles by join": _GROWING.replace("START", "'aa'").replace("STEP", "n.a.join(n.a)").replace("WAY", ""),
    "lists that double": _GROWING.replace("START", "[1]").replace("STEP", "n.a + n.a").replace("WAY", ""),
    "lists within lists": _GROWING.replace("START", "[1]").replace("STEP", "[n.a, n.a]").replace("WAY", ""),
    "lists within lists as json": _GROWING.replace("START", "[1]")
    .replace("STEP", "[n.a, n.a]")
    .replace("WAY", "| tojson"),
    "numbers that square": _GROWING.replace("START", "7").replace("STEP", "n.a * n.a").replace("WAY", "> 1"),
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a power of a power": "{{ (10 ** 1000) ** 1000 }}",
    "many of a text": "{{ 'a' * 10 ** 9 }}",
    "many of a list": "{{ [1] * 10 ** 9 }}",
    "a width": "{{ '%999999999d' % 1 }}",
    "a width given": "{{ '%*d' % (999999999, 1) }}",
    "a width by a filter": "{{ '%999999999d' | format(1) }}",
    "a width by a method": "{{ '{:>999999999}'.format(1) }}",
    "a width given to a method": "{{ '{:>{w}}'.format(1, w=999999999) }}",
    "blanks": "{{ 'a'.center(10 ** 9) }}",
    "blanks by a filter": "{{ 'a' | center(10 ** 9) }}",
    "tabs": "{{ ('\t' * 9999).expandtabs(99999) }}",
    "an indent": "{{ ('\n' * 9999) | indent(99999) }}",
    "an indent of json": "{{ messages | tojson(indent=10 ** 7) }}",
    "batches": "{{ [1] | batch(10 ** 9, 0) | list }}",
    "slices": "{{ [1] | slice(10 ** 9) | list }}",
    "joined copies": "{{ range(99999) | map('center', 99999) | join }}",
    "many words": "{{ lipsum(n=10 ** 9) }}",
}


@pytest.mark.parametrize("text", _ENDLESS.values(), ids=list(_ENDLESS))
def test_what_would_never_end_or_fill_memory_is_ended(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "_LEAST_WORK", 10**6)
    with pytest.raises((TemplateError, RecursionError, OverflowError)):
        ChatTemplate(text).render(_MESSAGES, False, {})


def test_a_template_ended_does_not_end_the_next() -> None:
    template = ChatTemplate(
        "{% for a in range(messages[0].content | int) %}{% for b in range(9999) %}{% endfor %}{% endfor %}x"
    )
    with pytest.raises(TemplateError):
        template.render([{"role": "user", "content": "99999"}], False, {})
    assert template.render([{"role": "user", "content": "1"}], False, {}) == "x"
