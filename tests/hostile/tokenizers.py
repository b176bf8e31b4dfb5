"""A teacher's tokenizer files: cut off, of wrong kinds, with ids beyond the table, with patterns that blow up."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.cases import Case, Kit

_ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 10**400, 2**70, "", "word", "x" * 100_000),
    *([], {}, [None], {"word": 1}, ["a"] * 500, float("nan")),
)
_FILES = ("tokenizer.json", "tokenizer_config.json")


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    whole = {name: json.loads((kit.teacher / name).read_text()) for name in _FILES}

    def case(name: str, spoil: Callable[[Path], object], codes: tuple[int, ...] = (0, 2)) -> Iterator[Case]:
        def make(folder: Path) -> None:
            spoil(kit.teacher_copy(folder / "teacher"))

        chats = ("search", "--plan", "--teacher", "teacher", "--data", str(kit.chats), "--budget", "1GB", *kit.small)
        ways = {"write": kit.write("teacher")}
        if dice.random() < 0.08:
            ways["plan"] = kit.plan(teacher="teacher")
        if dice.random() < 0.04:
            ways["chats"] = chats
        for way, argv in ways.items():
            yield Case(area="tokenizers", name=f"{name}-{way}", argv=argv, make=make, codes=codes)

    for name in _FILES:
        text = (kit.teacher / name).read_text()
        for number in range(14):
            cut = text[: dice.randrange(len(text))]
            yield from case(f"{name}-cut-{number}", partial(_write, name=name, text=cut), codes=(2,))
        for number in range(25):
            spoilt = _spoilt(whole[name], random.Random(dice.random()))
            yield from case(f"{name}-field-{number}", partial(_write, name=name, text=json.dumps(spoilt)))
        for number, content in enumerate(_TEXTS):
            yield from case(f"{name}-text-{number}", partial(_write, name=name, text=content), codes=(0, 2))
    for name, change in _CHANGES.items():
        spoilt = copy.deepcopy(whole["tokenizer.json"])
        change(spoilt)
        yield from case(name, partial(_write, name="tokenizer.json", text=json.dumps(spoilt)))
    endless = copy.deepcopy(whole["tokenizer.json"])
    _split(_SLOW)(endless)
    yield Case(
        area="tokenizers",
        name="pattern-slow-text",
        argv=kit.plan(teacher="teacher", data="long.txt"),
        make=lambda folder: (
            _write(kit.teacher_copy(folder / "teacher"), "tokenizer.json", json.dumps(endless)),
            _write(folder, "long.txt", "The miller carries two apples. " * 1_000),
        ),
    )
    for name, change in _SETTINGS.items():
        yield from case(
            f"setting-{name}",
            partial(_write, name="tokenizer_config.json", text=json.dumps(whole["tokenizer_config.json"] | change)),
        )
    for name in _FILES:
        yield from case(f"{name}-left-out", partial(_remove, name=name))
        yield from case(f"{name}-folder", partial(_folder, name=name), codes=(2,))
    for name in ("special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        for number, content in enumerate(dice.sample(_TEXTS, 3)):
            yield from case(f"{name}-text-{number}", partial(_write, name=name, text=content))
        yield from case(
            f"{name}-odd",
            partial(_write, name=name, text=json.dumps({"eos_token": 7, "eos_token_id": [2**70], "<odd>": 10**9})),
        )


_TEXTS: tuple[str | bytes, ...] = (
    "",
    " ",
    "null",
    "7",
    "[]",
    "{}",
    '"word"',
    "{" * 5_000,
    '{"a":' * 5_000 + "1" + "}" * 5_000,
    b"\xff\xfe",
    b"\x00" * 100,
    "NaN",
    '{"model": ' + "9" * 5_000 + "}",
)


def _model(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data["model"].update(changes)


def _split(pattern: str) -> Callable[[dict[str, Any]], None]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return lambda data: data.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [step, bytes_]})


def _renumbered(data: dict[str, Any], by: Callable[[int], int]) -> None:
    data["model"]["vocab"] = {token: by(number) for token, number in data["model"]["vocab"].items()}


# Below the library's limit of steps at each position of a text, but endless over all positions.
_SLOW = r"[\s\S]{0,1500}[\s\S]{0,1500}(?!\w|\W)"

_CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no-merges": _model(merges=[]),
    "no-vocab": _model(vocab={}),
    "no-vocab-no-merges": _model(vocab={}, merges=[]),
    "merge-of-nothing": _model(merges=[["", ""]]),
    "merge-unknown": _model(merges=[["zzz", "qqq"]]),
    "merge-of-three": _model(merges=[["a", "b", "c"]]),
    "merges-as-words": _model(merges=["a b c", "d"]),
    "type-unknown": _model(type="Wild"),
    "type-wordpiece": _model(
        type="WordPiece", unk_token="<s>", continuing_subword_prefix="##", max_input_chars_per_word=9
    ),
    "type-unigram": _model(type="Unigram", unk_id=0, vocab=[["a", float(-1)]]),
    "type-unigram-odd": _model(type="Unigram", unk_id=9, vocab=[["a", -1.0]]),
    "type-wordlevel": _model(type="WordLevel", unk_token="nothing"),
    "ids-negative": partial(_renumbered, by=lambda n: -n),
    "ids-beyond": partial(_renumbered, by=lambda n: n + 5),
    "ids-far-beyond": partial(_renumbered, by=lambda n: n + 10**6),
    "ids-2^32": partial(_renumbered, by=lambda n: n + 2**32 - 10),
    "ids-2^40": partial(_renumbered, by=lambda n: n + 2**40),
    "ids-same": partial(_renumbered, by=lambda n: 7),
    "ids-sparse": partial(_renumbered, by=lambda n: n * 1000),
    "pattern-nested": _split("(a+)+$"),
    "pattern-nested-long": _split("((.*)*)*z"),
    "pattern-words": _split(r"(\w+\s?)+\."),
    "pattern-empty": _split(""),
    "pattern-open": _split("("),
    "pattern-back": _split(r"(.+)\1+$"),
    "pattern-huge": _split("a{1,60000}" * 20),
    "pattern-look": _split("(?<=a+)b"),
    "pattern-property": _split(r"\p{Nothing}"),
    "normalizer-grows": lambda data: data.update(
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 8}] * 4,
        }
    ),
    "normalizer-empties": lambda data: data.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": ""}
    ),
    "normalizer-deep": lambda data: data.update(normalizer=_nested(900)),
    "pre-tokenizer-null": lambda data: data.update(pre_tokenizer=None),
    "pre-tokenizer-unknown": lambda data: data.update(pre_tokenizer={"type": "Wild"}),
    "decoder-null": lambda data: data.update(decoder=None),
    "post-processor-unknown-token": lambda data: data.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<none>", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "truncation": lambda data: data.update(
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    ),
    "truncation-stride": lambda data: data.update(
        truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 9}
    ),
    "padding": lambda data: data.update(
        padding={
            "strategy": {"Fixed": 10**7},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }
    ),
    "added-none": lambda data: data.update(added_tokens=[]),
    "added-empty": lambda data: data["added_tokens"].append(dict(data["added_tokens"][0], id=299, content="")),
    "added-space": lambda data: data["added_tokens"].append(dict(data["added_tokens"][0], id=299, content=" ")),
    "added-beyond": lambda data: data["added_tokens"].append(dict(data["added_tokens"][0], id=10**6, content="Who")),
    "added-2^40": lambda data: data["added_tokens"].append(dict(data["added_tokens"][0], id=2**40, content="Who")),
    "added-many": lambda data: data["added_tokens"].extend(
        dict(data["added_tokens"][0], id=300 + n, content=f"<t{n}>") for n in range(3_000)
    ),
    "version": lambda data: data.update(version="9.9"),
    "dropout": _model(dropout=1.0),
    "dropout-odd": _model(dropout=7.0),
    "unknown-token": _model(unk_token="<none>"),
    "ignore-merges": _model(ignore_merges="yes"),
    "byte-fallback": _model(byte_fallback=True),
}  # fmt: skip
_SETTINGS: dict[str, dict[str, Any]] = {
    "class-unknown": {"tokenizer_class": "WildTokenizer"},
    "class-slow": {"tokenizer_class": "LlamaTokenizer"},
    "class-of-another": {"tokenizer_class": "WhisperTokenizer"},
    "class-number": {"tokenizer_class": 7},
    "auto-map": {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    "no-eos": {"eos_token": None},
    "eos-unknown": {"eos_token": "<never>"},
    "eos-number": {"eos_token": 7},
    "eos-empty": {"eos_token": ""},
    "eos-mapping": {"eos_token": {"content": 7, "__type": "AddedToken"}},
    "bos-unknown": {"bos_token": "<never>"},
    "bos-list": {"bos_token": ["<s>"]},
    "length-negative": {"model_max_length": -1},
    "length-word": {"model_max_length": "long"},
    "length-huge": {"model_max_length": 10**400},
    "added-odd": {"added_tokens_decoder": {"x": {"content": 7}}},
    "added-beyond": {"added_tokens_decoder": {"999999": {"content": "the", "special": True}}},
    "added-negative": {"added_tokens_decoder": {"-5": {"content": "the"}}},
    "template-number": {"chat_template": 7},
    "template-mapping": {"chat_template": {"other": "x"}},
    "template-list": {"chat_template": [{"name": "other", "template": "x"}]},
    "template-list-odd": {"chat_template": [7]},
    "padding-side": {"padding_side": "up"},
    "extra": {"extra_special_tokens": 7},
    "extra-list": {"extra_special_tokens": [7, None]},
    "legacy": {"legacy": "perhaps"},
    "backend": {"backend": "wild"},
}


def _nested(depth: int) -> dict[str, Any]:
    step: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth // 10):
        step = {"type": "Sequence", "normalizers": [step]}
    return step


def _spoilt(data: Any, dice: random.Random) -> Any:
    data = copy.deepcopy(data)
    holder, key = data, dice.choice(list(data))
    while isinstance(holder[key], dict | list) and holder[key] and dice.random() < 0.75:
        holder = holder[key]
        key = dice.choice(list(holder) if isinstance(holder, dict) else list(range(len(holder))))
    if dice.random() < 0.2:
        del holder[key]
    else:
        holder[key] = dice.choice(_ODD)
    return data


def _write(folder: Path, name: str, text: str | bytes) -> None:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def _remove(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _folder(folder: Path, name: str) -> None:
    _remove(folder, name)
    (folder / name).mkdir()
