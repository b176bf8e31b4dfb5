"""Data, prompts and questions in files: text, JSON lines and Parquet, damaged in every way, and of odd kinds."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.cases import Case, Kit

_TEXTS: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n\t\n",
    "nul": b"\x00" * 1000,
    "nul-within": b"The miller\x00carries the boat. " * 50,
    "not-utf8": b"\xff\xfe\x80 text",
    "utf16": "The miller carries.".encode("utf-16"),
    "bom": b"\xef\xbb\xbf",
    "cut-character": "The end é".encode()[:-1],
    "surrogate": b"\xed\xa0\x80",
    "overlong": b"\xc0\xaf",
    "control": b"\x1b[2J\x07\x08" * 100,
    "one-word": b"word",
    "one-line-of-20MB": b"x" * 20_000_000,
    "one-word-of-1MB": b"word " * 200_000,
    "marks": "a\u0300\u0301\u0302".encode() * 3_000,
    "zero-width": "\u200b\u200d\ufeff".encode() * 2_000,
    "returns": b"a\rb\rc\r" * 500,
    "odd-ends": "a\u2028b\u2029c\x0bd\x0ce\x1cf\x85".encode() * 50,
}
_TOLD = b'{"prompt": "a", "answer": "b", "signal": "top-k", "vocabulary": "x", '
_LINES: dict[str, bytes] = {
    "not-json": b"word\n",
    "open": b'{"text": "a\n',
    "list": b"[1]\n",
    "number": b"7\n",
    "null": b"null\n",
    "nan": b'{"text": NaN}\n',
    "text-number": b'{"text": 7}\n',
    "text-null": b'{"text": null}\n',
    "text-list": b'{"text": ["a"]}\n',
    "text-mapping": b'{"text": {"a": 1}}\n',
    "text-blank": b'{"text": "  "}\n' * 20,
    "no-field": b'{"other": "a"}\n',
    "no-fields": b"{}\n",
    "empty-name": b'{"": "a"}\n',
    "half": b'{"text": "\\ud800"}\n',
    "half-name": b'{"\\ud800": "a"}\n',
    "half-pair": b'{"text": "\\ude00\\ud83d"}\n',
    "nul": b'{"text": "\\u0000"}\n' * 30,
    "nul-raw": b'{"text": "\x00"}\n',
    "deep": b'{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\n",
    "deep-open": b"[" * 100_000 + b"\n",
    "digits": b'{"text": ' + b"9" * 5_000 + b"}\n",
    "twice": b'{"text": "a", "text": 7}\n',
    "one-object-many-lines": b'{\n"text": "a"\n}\n',
    "two-in-a-line": b'{"text": "a"}{"text": "b"}\n',
    "some-text": b'{"text": "a b c"}\n{"content": "d e f"}\n',
    "some-odd": b'{"text": "a b c"}\n' * 30 + b'{"text": 7}\n',
    "prompt-alone": b'{"prompt": "a"}\n',
    "answer-alone": b'{"answer": "a"}\n',
    "answer-number": b'{"prompt": "a", "answer": 7}\n',
    "prompt-list": b'{"prompt": ["a"], "answer": "b"}\n',
    "answer-blank": b'{"prompt": "a", "answer": " "}\n' * 20,
    "messages-text": b'{"messages": "a"}\n',
    "messages-empty": b'{"messages": []}\n' * 20,
    "messages-numbers": b'{"messages": [7]}\n',
    "messages-no-role": b'{"messages": [{"content": "a"}]}\n',
    "messages-no-content": b'{"messages": [{"role": "user"}]}\n',
    "messages-parts": b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}\n',
    "messages-no-answer": b'{"messages": [{"role": "user", "content": "a"}]}\n' * 20,
    "messages-answer-first": b'{"messages": [{"role": "assistant", "content": "a"}]}\n' * 20,
    "messages-odd-role": b'{"messages": [{"role": "\\u001b[31m", "content": "a"},'
    b' {"role": "assistant", "content": "b"}]}\n',
    "messages-many": json.dumps(
        {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")] * 2_000}
    ).encode()
    + b"\n",
    "told-odd": _TOLD + b'"tokens": ["a"], "top": 7}\n',
    "told-huge": _TOLD + b'"tokens": [1], "top": [[[1e400, -1]]]}\n',
    "told-beyond": _TOLD + b'"tokens": [99999999999], "top": [[[1, -1]]]}\n',
    "line-of-20MB": b'{"text": "' + b"word " * 4_000_000 + b'"}\n',
    "number-of-20MB": b'{"text": ' + b"9" * 20_000_000 + b"}\n",
}  # fmt: skip


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    # Data are read before the budget is checked, so data that can be read are then refused because of the budget.
    def data(name: str, file: str, content: bytes, codes: tuple[int, ...] = (2, 3)) -> Iterator[Case]:
        argv = ("search", "--plan", "--teacher", str(kit.teacher), "--budget", "1kB", *kit.small, "--data", file)
        yield Case(
            area="data_files",
            name=f"data-{name}",
            argv=argv,
            make=partial(_write, file=file, content=content),
            codes=codes,
        )

    def loaded(name: str, file: str, content: bytes) -> Iterator[Case]:
        argv = kit.plan(data=file)
        yield Case(
            area="data_files",
            name=f"load-{name}",
            argv=argv,
            make=partial(_write, file=file, content=content),
            codes=(0, 2),
        )

    def prompts(name: str, file: str, content: bytes) -> Iterator[Case]:
        argv = (
            "write",
            "--teacher",
            str(kit.teacher),
            "--prompts",
            file,
            "--out",
            "o.jsonl",
            "--max-tokens",
            "1",
            "--cache",
            "cache",
        )
        yield Case(
            area="data_files",
            name=f"prompts-{name}",
            argv=argv,
            make=partial(_write, file=file, content=content),
            codes=(0, 2),
        )

    def task(name: str, file: str, content: bytes) -> Iterator[Case]:
        def make(folder: Path) -> None:
            _write(folder, file, content)
            entry = {
                "name": "mine",
                "files": [file],
                "metric": "exact_match",
                "template": {"prompt": "{prompt}", "answer": "{answer}"},
            }
            (folder / "t.yaml").write_text(json.dumps({"tasks": [entry]}))

        argv = kit.plan("--task", "t.yaml", budget="1kB")
        yield Case(area="data_files", name=f"task-{name}", argv=argv, make=make, codes=(2, 3))

    for name, content in _TEXTS.items():
        yield from data(f"txt-{name}", "d.txt", content)
        yield from data(f"folder-{name}", "d/a.txt", content, codes=(2, 3))
        if len(content) < 10**6:
            yield from prompts(f"txt-{name}", "p.txt", content)
            if dice.random() < 0.35:
                yield from loaded(f"txt-{name}", "d.txt", content)
        yield from data(f"jsonl-{name}", "d.jsonl", content)
        yield from data(f"parquet-{name}", "d.parquet", content)
    for name, content in _LINES.items():
        yield from data(f"lines-{name}", "d.jsonl", content)
        if len(content) < 10**6:
            yield from prompts(f"lines-{name}", "p.jsonl", content)
            yield from task(f"lines-{name}", "q.jsonl", content)
            if dice.random() < 0.2:
                yield from loaded(f"lines-{name}", "d.jsonl", content * 40)
            # An older file of answers, which is continued.
            yield from _kept(name, content, kit)
    whole = _parquet({"text": ["The miller carries the boat."] * 50, "n": list(range(50))})
    for number in range(25):
        place = random.Random(dice.random())
        yield from data(f"parquet-flip-{number}", "d.parquet", _flipped(whole, place))
        yield from data(f"parquet-cut-{number}", "d.parquet", whole[: place.randrange(len(whole))])
    for name, make in _PARQUETS.items():
        yield from data(f"parquet-{name}", "d.parquet", make())
        yield from task(f"parquet-{name}", "q.parquet", make())


def _kept(name: str, content: bytes, kit: Kit) -> Iterator[Case]:
    argv = kit.write(str(kit.teacher))
    make = partial(_write, file="written.jsonl", content=content)
    yield Case(area="data_files", name=f"kept-{name}", argv=argv, make=make, codes=(0, 2))


def _write(folder: Path, file: str, content: bytes) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(content)


def _flipped(data: bytes, dice: random.Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(dice.choice((1, 3, 30))):
        spoilt[dice.randrange(len(spoilt))] ^= 1 << dice.randrange(8)
    return bytes(spoilt)


def _parquet(columns: dict[str, Any]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


def _arrays(**columns: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        import pyarrow

        return _parquet(
            {name: pyarrow.array(values, type=kind() if kind else None) for name, (values, kind) in columns.items()}
        )

    return make


def _of(name: str, *args: str) -> Callable[[], Any]:
    def kind() -> Any:
        import pyarrow

        return getattr(pyarrow, name)(*(getattr(pyarrow, one)() for one in args))

    return kind


_PARQUETS: dict[str, Callable[[], bytes]] = {
    "no-rows": _arrays(text=([], _of("string"))),
    "no-columns": lambda: _parquet({}),
    "numbers": _arrays(text=([1, 2], None)),
    "nulls": _arrays(text=([None, None], _of("string"))),
    "null-column": _arrays(text=([None, None], _of("null"))),
    "bytes": _arrays(text=([b"a", b"\xff"], _of("binary"))),
    "large": _arrays(text=(["a word"] * 40, _of("large_string"))),
    "lists": _arrays(text=([["a"], ["b", "c"]], None)),
    "structs": _arrays(text=([{"a": 1}, {"a": 2}], None)),
    "maps": _arrays(text=([[("a", 1)], []], _of("map_", "string", "int64"))),
    "dates": _arrays(text=([0, 2**30], _of("date32"))),
    "dates-beyond": _arrays(text=([2**31 - 1], _of("date32"))),
    "durations": _arrays(prompt=(["a"] * 30, None), answer=(list(range(30)), _of("date64"))),
    "floats": _arrays(text=([float("nan")], None)),
    "booleans": _arrays(prompt=(["a"] * 9, None), answer=([True] * 9, None)),
    "answers-lists": _arrays(prompt=([str(n) for n in range(30)], None), answer=([["a", "b"]] * 30, None)),
    "answers-null": _arrays(prompt=([str(n) for n in range(30)], None), answer=([None] * 30, _of("string"))),
    "messages": _arrays(messages=([[{"role": "user", "content": "a"}]] * 9, None)),
    "messages-numbers": _arrays(messages=([[1]] * 9, None)),
    "empty-name": lambda: _parquet({"": ["a"]}),
    "long-name": lambda: _parquet({"x" * 100_000: ["a"]}),
    "many-columns": lambda: _parquet({f"c{n}": ["a"] for n in range(3_000)}),
}
