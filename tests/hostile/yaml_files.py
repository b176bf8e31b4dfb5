"""YAML from users: spaces, strategies, devices and tasks, spoilt as text and in their fields."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.hostile.cases import Case, Kit

_TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "blank": " \n\n",
    "nothing": "null\n",
    "number": "7\n",
    "list": "[1, 2]\n",
    "word": "word\n",
    "nul": b"a: \x00\n",
    "not-utf8": b"\xff\xfe\xfa\x80",
    "utf16-cut": b"\xff\xfea\x00:",
    "surrogate": b"a: \xed\xa0\x80\n",
    "control": b"a: \x1b[31m\x07\n",
    "tabs": "a:\n\t- b\n",
    "open": "a: [1, 2\nb: {",
    "quote": 'a: "b\n',
    "two-documents": "a: 1\n---\nb: 2\n",
    "tag-python": "a: !!python/object/apply:os.system ['touch hacked']\n",
    "tag-python-name": "a: !!python/name:os.system\n",
    "tag-unknown": "a: !wild 1\n",
    "tag-binary": "a: !!binary '***'\n",
    "tag-set": "a: !!set {b}\n",
    "tag-omap": "a: !!omap [b: c]\n",
    "tag-timestamp": "a: !!timestamp when\n",
    "date": "a: 2001-99-99\n",
    "moment": "a: 2001-12-14t21:59:43.10-99:99\n",
    "int-0x": "a: 0x_\n",
    "int-0b": "a: 0b_\n",
    "int-octal": "a: 0_\n",
    "int-word": "a: !!int abc\n",
    "int-empty": "a: !!int ''\n",
    "int-minutes": "a: " + "59:" * 2000 + "1\n",
    "float-word": "a: !!float abc\n",
    "float-dots": "a: !!float ...\n",
    "bool-word": "a: !!bool 7\n",
    "null-word": "!!null a\n",
    "int-400": "a: " + "9" * 400 + "\n",
    "int-5000": "a: " + "9" * 5_000 + "\n",
    "int-hex-5000": "a: 0x" + "f" * 5_000 + "\n",
    "deep-list": "[" * 3_000,
    "deep-list-closed": "[" * 900 + "]" * 900,
    "deep-map": "{a: " * 2_000,
    "deep-block": "".join("  " * n + "a:\n" for n in range(400)),
    "deep-dashes": "- " * 5_000 + "a\n",
    "laughs": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)),
    "laughs-merged": "a0: &a0 {k: v}\n"
    + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)),
    "itself": "a: &a [*a]\n",
    "itself-merged": "a: &a {<<: *a}\n",
    "alias-of-nothing": "a: *b\n",
    "merge-of-number": "a: {<<: 7}\n",
    "keys-many": "".join(f"k{n}: {n}\n" for n in range(40_000)),
    "keys-many-one-line": "{" + ", ".join(f"k{n}: {n}" for n in range(40_000)) + "}\n",
    "key-twice": "a: 1\na: 2\n",
    "key-list": "? [a, b]\n: c\n",
    "key-map": "? {a: b}\n: c\n",
    "key-number": "1: 2\n",
    "key-null": "~: 2\n",
    "key-huge": "k" * 200_000 + ": 1\n",
    "anchor-huge": "a: &" + "b" * 100_000 + " 1\n",
    "text-huge": "name: " + "long " * 200_000 + "\n",
    "directive": "%YAML 9.9\n---\na: 1\n",
    "value": "a: =\n",
    "too-large": "a: b\n" * 900_000,
}


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    makers = {"space": _space(kit), "strategy": _strategy(kit), "devices": _devices(), "task": _task(kit)}
    for number, (name, text) in enumerate(_TEXTS.items()):
        data = text if isinstance(text, bytes) else text.encode()
        # Each text goes to two of the four places that read YAML.
        for what in (list(makers)[number % 4], list(makers)[(number + 1) % 4]):
            argv, _, _ = makers[what]
            yield _case(f"{what}-{name}", argv, partial(_write, data=data))
        argv, valid, _ = makers["space"]
        if number % 3 == 0:
            yield _case(
                f"space-with-{name}", argv, partial(_write, data=yaml.safe_dump(valid).encode() + b"more:\n  " + data)
            )
    for what, (argv, valid, beside) in makers.items():
        for number in range(45):
            spoilt = _spoilt(valid, random.Random(dice.random()))
            yield _case(f"{what}-field-{number}", argv, partial(_dump, data=spoilt, beside=beside), codes=(0, 2, 3))


def _case(name: str, argv: tuple[str, ...], make: Callable[[Path], object], codes: tuple[int, ...] = (2,)) -> Case:
    return Case(area="yaml_files", name=name, argv=argv, make=make, codes=codes)


_Maker = tuple[tuple[str, ...], Any, Callable[[Path], object]]


def _space(kit: Kit) -> _Maker:
    deployment = {"runtime": "llama.cpp", "format": "gguf-q4_0", "bits": 4, "group_size": 32}
    space = {
        "name": "mine",
        "description": "Mine.",
        "dimensions": {
            "init.layers": {"low": 0.5, "high": 1.0},
            "init.ffn": {"choices": [0.5, 1.0]},
            "distillation.temperature.start": {"low": 1.0, "high": 4.0, "step": 0.5},
        },
        "deployments": [deployment],
        "baselines": ["fine-tune"],
        "lengths": [1, 2],
    }
    # Nothing is planned: a valid space is refused because nothing fits the budget.
    argv = kit.plan("--space", "a.yaml", budget="1kB")
    return argv, space, lambda folder: None


def _strategy(kit: Kit) -> _Maker:
    from autodistill.strategy.strategy import Strategy

    argv = ("estimate", str(kit.teacher), "--strategy", "./a.yaml")
    return argv, Strategy().to_json(), lambda folder: None


def _devices() -> _Maker:
    device = {
        "class": "cpu",
        "memory": "16GB",
        "bandwidth": "40GB",
        "rates": {"fp32": 1.0},
        "aliases": ["mine"],
        "source": "its label",
    }
    argv = ("devices", "box", "--devices", "a.yaml")
    return argv, {"devices": {"box": device}, "sources": {"label": "The label."}}, lambda folder: None


def _task(kit: Kit) -> _Maker:
    template = {"prompt": "{question}", "choices": "{options}", "answer": "{answer}"}
    task = {
        "name": "mine",
        "files": ["q.jsonl"],
        "metric": "multiple_choice",
        "template": template,
        "limit": 9,
        "labels": False,
    }

    def beside(folder: Path) -> None:
        records = [{"question": f"{n}?", "options": ["yes", "no"], "answer": n % 2} for n in range(40)]
        (folder / "q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))

    return kit.plan("--task", "a.yaml", budget="1kB"), {"tasks": [task]}, beside


def _write(folder: Path, data: bytes) -> None:
    (folder / "a.yaml").write_bytes(data)


def _dump(folder: Path, data: Any, beside: Callable[[Path], object]) -> None:
    beside(folder)
    (folder / "a.yaml").write_text(yaml.safe_dump(data, allow_unicode=True, sort_keys=False), encoding="utf-8")


_ODD: tuple[Any, ...] = (
    None,
    True,
    "",
    "word",
    "\x1b[2J\n",
    "x" * 100_000,
    "../../../etc/passwd",
    "x/" * 200,
    0,
    -1,
    1.5,
    2**62,
    -(2**62),
    10**400,
    float("nan"),
    float("inf"),
    1e308,
    1e-308,
    [],
    [None],
    [[]],
    ["word"] * 1_000,
    list(range(3_000)),
    {},
    {"word": "word"},
    {7: 8},
    {"low": 1, "high": 2**62},
    {"low": -1e308, "high": 1e308},
    {"low": 0.0, "high": 1.0, "step": 1e-12},
    {"low": 1, "high": 2, "step": 0},
    {"low": 1.0, "high": 1e308, "log": True},
    {"choices": []},
    {"choices": [1, 1]},
    {"choices": list(range(2_000))},
    {"choices": {"a": {"b": {"c": 1}}}},
    {"choices": ["a"], "when": {"init.layers": [1]}},
)


def _spoilt(data: Any, dice: random.Random) -> Any:
    """Return the data with one or two parts odd, missing or misplaced."""
    data = copy.deepcopy(data)
    for _ in range(dice.choice((1, 1, 2))):
        holder: Any = data
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = dice.choice(keys)
            if isinstance(holder[key], dict | list) and holder[key] and dice.random() < 0.8:
                holder = holder[key]
                continue
            way = dice.random()
            if way < 0.75:
                holder[key] = copy.deepcopy(dice.choice(_ODD))
            elif way < 0.85:
                del holder[key]
            elif isinstance(holder, dict):
                holder[dice.choice(("odd", "", 7, None, key, "dimensions"))] = holder.pop(key)
            break
    return data
