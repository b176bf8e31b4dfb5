"""A teacher's chat template: programs that never end, fill memory, fail or write nothing, and invalid templates."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.hostile.cases import Case, Kit

_PLAIN = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>{% endif %}"
)
_BAD: dict[str, str | bytes] = {
    "range": "{% for a in range(10**9) %}x{% endfor %}",
    "range-negative": "{{ range(0, -10**9, -1) | list }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops-written": "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    "zero": "{{ 1 // 0 }}",
    "zero-of-floats": "{{ 1 / 0.0 }}",
    "zero-remainder": "{{ 1 % 0 }}",
    "macro": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "macro-twice": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "macro-tree": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "doubling": "{% set n = namespace(a='x') %}{% for i in range(99) %}{% set n.a = n.a ~ n.a %}{% endfor %}{{ n.a }}",
    "doubling-list": "{% set n = namespace(a=[1]) %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "nesting-list": "{% set n = namespace(a=[1]) %}{% for i in range(99) %}{% set n.a = [n.a, n.a] %}{% endfor %}"
    "{{ n.a }}",
    "times": "{{ 'a' * 10**10 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "width": "{{ '%9999999999d' % 1 }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "center": "{{ 'a'.center(10**10) }}",
    "digits": "{{ ('9' * 5000) | int }}",
    "float": "{{ (10 ** 400) | float }}",
    "index": "{{ messages[99].content }}",
    "slice": "{{ messages['x':] }}",
    "attribute": "{{ messages.__class__.__mro__ }}",
    "attribute-format": "{{ '{0.__class__}'.format(messages) }}",
    "call-number": "{{ 7(1) }}",
    "call-nothing": "{{ nothing() }}",
    "undefined": "{{ nothing.more }}",
    "filter-unknown": "{{ messages | wild }}",
    "test-unknown": "{{ messages is wild }}",
    "sort-mixed": "{{ [1, 'a'] | sort }}",
    "raise": "{{ raise_exception('no\nsuch\x1b[31m role') }}",
    "raise-long": "{{ raise_exception('x' * 100000) }}",
    "raise-nothing": "{{ raise_exception() }}",
    "time": "{{ strftime_now('%Y' * 100000) }}",
    "time-odd": "{{ strftime_now(7) }}",
    "json-odd": "{{ namespace(a=1) | tojson }}",
    "json-indent": "{{ messages | tojson(indent=10**9) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends 'x' %}",
    "block-within": "{% block a %}{{ self.a() }}{% endblock %}",
    "nothing": "",
    "blank": "\n \n",
    "comment": "{# nothing #}",
    "constant": "always the same",
    "no-answers": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "no-prompts": "{% for m in messages if m.role != 'user' %}{{ m.content }}{% endfor %}",
    "prompt-alone": "{% if add_generation_prompt %}x{% endif %}",
    "reversed": "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    "characters-reversed": "{% for m in messages %}{{ m.content | reverse }}{% endfor %}",
    "first-letters": "{% for m in messages %}{{ m.content[0] }}{% endfor %}",
    "blanks-out": "{% for m in messages %}{{ ' ' * 1000 }}{% endfor %}",
    "nul": b"{% for m in messages %}\x00{{ m.content }}{% endfor %}",
    "not-utf8": b"\xff\xfe{{ messages }}",
    "open": "{% for m in messages %}",
    "open-expression": "{{ ",
    "open-comment": "{# ",
    "wrong-end": "{% endfor %}",
    "word": "{% wild %}",
    "deep": "{% if 1 %}" * 2_000,
    "deep-closed": "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "deep-expression": "{{ " + "(" * 5_000 + ")" * 5_000 + " }}",
    "deep-list": "{{ " + "[" * 2_000 + "]" * 2_000 + " }}",
    "long": "x" * 3_000_000,
    "many-tags": "{{ 1 }}" * 20_000,
    "many-minus": "{{ " + "-" * 5_000 + "1 }}",
    "number-long": "{{ " + "9" * 5_000 + " }}",
    "generation-open": "{% generation %}",
    "break-outside": "{% break %}",
    "set-dunder": "{% set n = namespace(__class__=1) %}",
    "append": "{{ messages.append(7) }}",
    "clear": "{% set _ = messages.clear() %}{{ messages[0].content }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "cycler": "{{ cycler() }}",
    "replace": "{{ ('a' * 9999).replace('', 'b' * 9999).replace('', 'b' * 9999) }}",
    "map-center": "{{ range(99999) | map('center', 99999) | join }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
}


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    chats = ("search", "--plan", "--teacher", "teacher", "--data", str(kit.chats), "--budget", "1GB", *kit.small)
    for name, text in _BAD.items():
        for where in ("chat_template.jinja", "within"):
            make = partial(_make, kit=kit, text=text, first=where == "within")
            # Some of them are usable templates.
            yield Case(
                area="templates", name=f"{name}-{where}-write", argv=kit.write("teacher"), make=make, codes=(0, 2)
            )
        # In a working template, the bad part is only reached when answers are rendered.
        late = b"{% if messages | length > 1 %}" + (text if isinstance(text, bytes) else text.encode()) + b"{% endif %}"
        for number, data in enumerate((text, late + _PLAIN.encode())):
            make = partial(_make, kit=kit, text=data, first=False)
            yield Case(area="templates", name=f"{name}-chats-{number}", argv=chats, make=make, codes=(0, 2))


def _make(folder: Path, kit: Kit, text: str | bytes, first: bool) -> None:
    teacher = kit.teacher_copy(folder / "teacher")
    data = text if isinstance(text, bytes) else text.encode()
    (teacher / "chat_template.jinja").write_bytes(data + _PLAIN.encode() if first else data)
