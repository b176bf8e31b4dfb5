"""Model folders: headers of safetensors, indices, configs, links and pipes, and weights of another model."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.cases import Case, Kit

Spoil = Callable[[Path], object]
Header = dict[str, Any]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_NORM, _TABLE, _UP = "model.norm.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"
_DEEP = "[" * 100_000 + "]" * 100_000
_LONG = "9" * 5_000


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One way to spoil a model's folder.

    Attributes:
        name: A unique name.
        spoil: Spoils a folder that has files of its own.
        described: Whether the fault is seen without loading anything, as when `estimate` reads a folder.
    """

    name: str
    spoil: Spoil
    described: bool = True


def read_weights(folder: Path) -> tuple[Header, bytes]:
    """Return the header and the data of a folder's safetensors."""
    content = (folder / _WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_weights(path: Path, header: Header | bytes, data: bytes, length: int | None = None) -> None:
    """Write safetensors, right or wrong. If the path is a link, the linked file is not changed."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.unlink(missing_ok=True)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def change_json(path: Path, **changes: Any) -> None:
    """Set fields of a JSON file."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(before | changes), encoding="utf-8")


def faults() -> Iterator[Fault]:
    """Yield every fault that is refused, whatever reads the folder."""
    for name, spoil in _headers().items():
        yield Fault(name=f"header-{name}", spoil=spoil)
    for name, spoil in _layouts().items():
        yield Fault(name=f"weights-{name}", spoil=spoil)
    for name, spoil in _indices().items():
        yield Fault(name=f"index-{name}", spoil=spoil, described=name != "none")
    for name, spoil in _files().items():
        yield Fault(name=f"files-{name}", spoil=spoil, described=name != f"folder-{_WEIGHTS}")
    for field, values in _FIELDS.items():
        for number, value in enumerate(values):
            yield Fault(name=f"config-{field}-{number}", spoil=_field(field, value))
    for name, text in _TEXTS.items():
        yield Fault(name=f"config-{name}", spoil=_text("config.json", text))
    for name, changes in _MADE.items():
        yield Fault(
            name=f"made-{name}",
            spoil=lambda folder, c=changes: change_json(folder / "config.json", **c),
            described=False,
        )
    for file, settings in _SETTINGS.items():
        for number, values in enumerate(settings):
            yield Fault(
                name=f"{file}-{number}",
                spoil=lambda folder, f=file, v=values: change_json(folder / f, **v),
                described=False,
            )
        for name, text in _TEXTS.items():
            yield Fault(name=f"{file}-{name}", spoil=_text(file, text), described=False)


def _headers() -> dict[str, Spoil]:
    """Return headers and lengths that no program writes."""

    def entry(**changes: Any) -> Spoil:
        def spoil(folder: Path) -> None:
            header, data = read_weights(folder)
            header[_NORM] |= changes
            write_weights(folder / _WEIGHTS, header, data)

        return spoil

    def without(key: str) -> Spoil:
        def spoil(folder: Path) -> None:
            header, data = read_weights(folder)
            del header[_NORM][key]
            write_weights(folder / _WEIGHTS, header, data)

        return spoil

    def raw(
        text: bytes | None = None, data: bytes | None = None, length: int | None = None, more: bytes = b""
    ) -> Spoil:
        def spoil(folder: Path) -> None:
            header, before = read_weights(folder)
            written = header if text is None else text
            write_weights(folder / _WEIGHTS, written, (before if data is None else data) + more, length)

        return spoil

    def whole(content: bytes) -> Spoil:
        def spoil(folder: Path) -> None:
            (folder / _WEIGHTS).unlink()
            (folder / _WEIGHTS).write_bytes(content)

        return spoil

    def moved(by: Callable[[list[int]], list[int]]) -> Spoil:
        def spoil(folder: Path) -> None:
            header, data = read_weights(folder)
            header[_NORM]["data_offsets"] = by(header[_NORM]["data_offsets"])
            write_weights(folder / _WEIGHTS, header, data)

        return spoil

    def hole(folder: Path) -> None:
        header, data = read_weights(folder)
        end = header[_NORM]["data_offsets"][1]
        for part in header.values():
            if "data_offsets" in part and part["data_offsets"][0] >= end:
                part["data_offsets"] = [place + 64 for place in part["data_offsets"]]
        write_weights(folder / _WEIGHTS, header, data[:end] + bytes(64) + data[end:])

    def twice(folder: Path) -> None:
        header, data = read_weights(folder)
        text = json.dumps(header)
        again = json.dumps({_NORM: header[_NORM]})
        write_weights(folder / _WEIGHTS, (text[:-1] + ", " + again[1:]).encode(), data)

    def meta(value: Any) -> Spoil:
        def spoil(folder: Path) -> None:
            header, data = read_weights(folder)
            write_weights(folder / _WEIGHTS, header | {"__metadata__": value}, data)

        return spoil

    found: dict[str, Spoil] = {
        "overlap": lambda folder: moved(lambda _: read_weights(folder)[0][_TABLE]["data_offsets"])(folder),
        "negative": moved(lambda at: [at[0] - 10**9, at[1] - 10**9]),
        "reversed": moved(lambda at: at[::-1]),
        "beyond": moved(lambda at: [at[0] + 10**12, at[1] + 10**12]),
        "huge-offsets": moved(lambda at: [2**64, 2**64 + 256]),
        "three-offsets": moved(lambda at: [*at, at[1]]),
        "text-offsets": moved(lambda at: list(map(str, at))),  # type: ignore[arg-type]
        "hole": hole,
        "twice": twice,
        **{f"dtype-{kind}": entry(dtype=kind) for kind in ("F37", "", 5, None, "I32", "U32", "float32", ["F32"])},
        **{
            f"shape-{number}": entry(shape=shape)
            for number, shape in enumerate(
                ([-64], [64.0], ["64"], [[64]], 64, None, [63], [0], [2**62, 2**62], [10**400], [32, 2], [], {"0": 64})
            )
        },
        **{f"no-{key}": without(key) for key in ("dtype", "shape", "data_offsets")},
        **{f"metadata-{n}": meta(value) for n, value in enumerate(([1], {"a": 3}, {"a": {"b": 1}}, 7, "pt"))},
        "deep": raw(text=b'{"a":' + _DEEP.encode() + b"}"),
        "deep-metadata": raw(text=b'{"__metadata__":' + b'{"a":' * 10**5 + b"1" + b"}" * 10**5 + b"}"),
        "list": raw(text=b"[1, 2]"),
        "nan": raw(text=b'{"a": NaN}'),
        "null": raw(text=b'{"a": null}'),
        "no-json": raw(text=b"{"),
        "no-utf8": raw(text=b'{"\xff": 1}'),
        "nothing": raw(text=b"{}", data=b""),
        "nothing-of-data": raw(text=b"{}"),
        "digits": raw(text=b'{"a": ' + _LONG.encode() + b"}"),
        **{f"length-{n}": raw(length=n) for n in (0, 1, 7, 2**31, 200_000_000, 2**63, 2**64 - 1)},
        "more": raw(more=b"\0"),
        "much-more": raw(more=bytes(10**5)),
        "less": lambda folder: raw(data=read_weights(folder)[1][:-1])(folder),
        "no-data": raw(data=b""),
        **{
            f"file-{n}": whole(content)
            for n, content in enumerate(
                (
                    b"",
                    b"\0" * 7,
                    b"\0" * 8,
                    b"\xff" * 100,
                    b"PK\x03\x04" + bytes(1000),
                    b"<!DOCTYPE html><html><body>Entry not found</body></html>",
                    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n",
                    b"GGUF\x03\0\0\0" + bytes(64),
                )
            )
        },
    }
    return found


def _layouts() -> dict[str, Spoil]:
    """Return valid files with the weights of another model."""

    def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Spoil:
        def spoil(folder: Path) -> None:
            from safetensors.torch import load, save

            changed = save(change(load((folder / _WEIGHTS).read_bytes())), metadata={"format": "pt"})
            (folder / _WEIGHTS).unlink()
            (folder / _WEIGHTS).write_bytes(changed)

        return spoil

    def renamed(old: str, new: str) -> Spoil:
        return tensors(lambda found: {name.replace(old, new): part for name, part in found.items()})

    def without(part: str) -> Spoil:
        return tensors(lambda found: {name: values for name, values in found.items() if part not in name})

    def config(**changes: Any) -> Spoil:
        return lambda folder: change_json(folder / "config.json", **changes)

    def cast(kind: str, part: str = "") -> Spoil:
        import torch

        dtype = getattr(torch, kind)
        return tensors(lambda found: {n: v.to(dtype) if part in n else v for n, v in found.items()})

    def head(scale: float, rows: int = 0) -> Spoil:
        def change(found: dict[str, Any]) -> dict[str, Any]:
            table = found[_TABLE] * scale
            return found | {"lm_head.weight": table[rows:].clone()}

        return tensors(change)

    return {
        "renamed-mlp": renamed(".mlp.", ".feed_forward."),
        "renamed-body": renamed("model.", "transformer."),
        "without-body": renamed("model.", ""),
        "renamed-norm": renamed("input_layernorm", "attention_norm"),
        "upper-case": renamed("q_proj", "Q_PROJ"),
        "renamed-layers": renamed("layers.1.", "layers.9."),
        **{
            f"lacks-{part}": without(part)
            for part in ("layers.1.", "layers.0.mlp.up_proj", "q_proj", "embed_tokens", "model.norm", "weight")
        },
        "extra": tensors(lambda found: found | {"model.extra.weight": found[_NORM].clone()}),
        "extra-bias": tensors(lambda found: found | {"model.layers.0.self_attn.q_proj.bias": found[_NORM].clone()}),
        "extra-layer": config(num_hidden_layers=1),
        "fewer-layers": config(num_hidden_layers=3),
        "other-vocabulary": config(vocab_size=301),
        "other-ffn": config(intermediate_size=256),
        "other-width": config(hidden_size=128),
        "other-heads": config(num_key_value_heads=1),
        "other-family": config(model_type="qwen2"),
        "other-norms": config(model_type="qwen3"),
        "untied": config(tie_word_embeddings=False),
        "biased": config(attention_bias=True),
        "turned": tensors(lambda found: found | {_UP: found[_UP].T.contiguous()}),
        "flat": tensors(lambda found: found | {_UP: found[_UP].flatten()}),
        "int8": cast("int8"),
        "int8-matrix": cast("int8", "up_proj"),
        "float8": cast("float8_e4m3fn", "proj"),
        "int32": cast("int32"),
        "bool": cast("bool", "norm"),
        "complex": cast("complex64", "up_proj"),
        "another-head": head(2.0),
        "shorter-head": head(1.0, rows=1),
        "constants-alone": tensors(lambda found: {"model.rotary_emb.inv_freq": found[_NORM].clone()}),
    }


def _indices() -> dict[str, Spoil]:
    """Return indices of weights in two files."""

    def index(change: Callable[[dict[str, Any]], Any]) -> Spoil:
        def spoil(folder: Path) -> None:
            places = _shard(folder)
            content = change(places)
            (folder / _INDEX).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

        return spoil

    def of(**places: Any) -> Spoil:
        return index(lambda found: {"weight_map": found | {_NORM: places["place"]}})

    def in_both(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        places = _shard(folder)
        other = folder / next(name for name in places.values() if name != places[_NORM])
        save_file(load_file(other) | {_NORM: load_file(folder / places[_NORM])[_NORM]}, other)
        (folder / _INDEX).write_text(json.dumps({"weight_map": places}), encoding="utf-8")

    def as_folder(folder: Path) -> None:
        index(lambda found: {"weight_map": found | {_NORM: "folder.safetensors"}})(folder)
        (folder / "folder.safetensors").mkdir()

    def as_pipe(folder: Path) -> None:
        index(lambda found: {"weight_map": found | {_NORM: "pipe.safetensors"}})(folder)
        os.mkfifo(folder / "pipe.safetensors")

    def outside(folder: Path) -> None:
        places = _shard(folder)
        shutil.move(folder / places[_NORM], folder.parent / "outside.safetensors")
        moved = {n: "../outside.safetensors" if p == places[_NORM] else p for n, p in places.items()}
        (folder / _INDEX).write_text(json.dumps({"weight_map": moved}), encoding="utf-8")

    places: tuple[Any, ...] = (
        *("../model-1.safetensors", "/etc/passwd", "/tmp/x.safetensors", "sub/model-1.safetensors", "", ".", ".."),
        *("model-9.safetensors", "x" * 300 + ".safetensors", "model\0.safetensors", "..\\model-1.safetensors"),
        *(
            "config.json",
            "weights.bin",
            7,
            None,
            True,
            ["model-1.safetensors"],
            {"a": 1},
            1e400,
            "http://x/y.safetensors",
        ),
    )
    return {
        **{f"place-{number}": of(place=place) for number, place in enumerate(places)},
        **{
            f"map-{number}": index(lambda _, value=value: {"weight_map": value})
            for number, value in enumerate(([], ["model-1.safetensors"], {}, None, "model-1.safetensors", 5))
        },
        **{
            f"all-{number}": index(lambda _, value=value: value)
            for number, value in enumerate(({}, [], None, 1, "{", ""))
        },
        "deep": index(lambda _: _DEEP),
        "digits": index(lambda _: '{"weight_map": ' + _LONG + "}"),
        "lacks-shards": index(
            lambda found: {"weight_map": {n: f"model-{i}-of-9.safetensors" for i, n in enumerate(found)}}
        ),
        "wrong-shard": index(lambda found: {"weight_map": found | {_NORM: found[_TABLE], _TABLE: found[_NORM]}}),
        "extra": index(lambda found: {"weight_map": found | {"model.extra.weight": found[_NORM]}}),
        "one-shard": index(lambda found: {"weight_map": {n: p for n, p in found.items() if p == found[_NORM]}}),
        "in-both": in_both,
        "folder": as_folder,
        "pipe": as_pipe,
        "outside": outside,
        "none": lambda folder: _shard(folder),
    }


def _shard(folder: Path) -> dict[str, str]:
    """Divide a folder's weights among two files, and return the file of each weight. No index is written."""
    from safetensors.torch import load, save_file

    stored = load((folder / _WEIGHTS).read_bytes())
    (folder / _WEIGHTS).unlink()
    places = {name: f"model-{1 + number % 2}.safetensors" for number, name in enumerate(sorted(stored))}
    for file in set(places.values()):
        save_file({name: stored[name] for name, place in places.items() if place == file}, folder / file)
    return places


def _files() -> dict[str, Spoil]:
    """Return links that leave the folder, and pipes, devices and folders in place of files."""
    secret = "this is no part of a model\n"

    def linked(name: str, target: str | None = None) -> Spoil:
        def spoil(folder: Path) -> None:
            outside = folder.parent / f"outside-{name.replace('/', '-')}"
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            if path.is_file():
                shutil.move(path, outside)
            else:
                outside.write_text(secret, encoding="utf-8")
            path.symlink_to(target or outside)

        return spoil

    def piped(name: str) -> Spoil:
        def spoil(folder: Path) -> None:
            (folder / name).unlink(missing_ok=True)
            os.mkfifo(folder / name)

        return spoil

    def as_folder(name: str) -> Spoil:
        def spoil(folder: Path) -> None:
            (folder / name).unlink(missing_ok=True)
            (folder / name).mkdir()

        return spoil

    def templates(folder: Path) -> None:
        outside = folder.parent / "outside"
        outside.mkdir()
        (outside / "secret.jinja").write_text(secret, encoding="utf-8")
        (folder / "additional_chat_templates").symlink_to(outside)

    def nested(folder: Path) -> None:
        inner = folder / "additional_chat_templates" / "inner"
        inner.mkdir(parents=True)
        (folder.parent / "outside").write_text(secret, encoding="utf-8")
        (inner / "template.jinja").symlink_to(folder.parent / "outside")

    names = (
        *("LICENSE", "NOTICE.txt", "COPYING", "config.json", _WEIGHTS, "tokenizer.json", "tokenizer_config.json"),
        *(
            "generation_config.json",
            "chat_template.jinja",
            "README.md",
            "additional_chat_templates/x.jinja",
            "vocab.json",
        ),
    )
    return {
        **{f"link-{name.replace('/', '-')}": linked(name) for name in names},
        **{f"device-{name}": linked(name, "/dev/zero") for name in ("LICENSE", "config.json", _WEIGHTS, "README.md")},
        "environment": linked("NOTICE", "/proc/self/environ"),
        "chain": lambda folder: (linked("one.json")(folder), (folder / "LICENSE").symlink_to("one.json")),
        "circle": lambda folder: (
            (folder / "LICENSE").symlink_to("NOTICE"),
            (folder / "NOTICE").symlink_to("LICENSE"),
        ),
        **{f"pipe-{name}": piped(name) for name in names[:10]},
        **{f"folder-{name}": as_folder(name) for name in ("config.json", _WEIGHTS)},
        "templates": templates,
        "nested": nested,
        "adapter": _text("adapter_config.json", '{"base_model_name_or_path": "../other", "peft_type": "LORA"}'),
        "distributed": lambda folder: shutil.copyfile(
            folder / _WEIGHTS, folder / "shard-00001-model-00001-of-00001.safetensors"
        ),
    }


def _text(file: str, text: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / file).write_text(text, encoding="utf-8")

    return spoil


def _field(field: str, value: Any) -> Spoil:
    """Set a field of the config, or a field inside another ("rope_scaling.factor")."""
    names = field.split(".")
    for name in reversed(names[1:]):
        value = {"rope_type": "llama3", name: value} if names[0].startswith("rope") else {name: value}
    return lambda folder: change_json(folder / "config.json", **{names[0]: value})


_NAN, _ENDLESS = float("nan"), float("inf")
_NO_SIZE = (0, -1, 2.5, "64", [64], {"a": 1}, True, 10**18, 10**400, _NAN, _ENDLESS, "")
_NO_NUMBER = (0, -1.0, "x", [1], {"a": 1}, True, _NAN, _ENDLESS, -_ENDLESS, 10**400)
_NO_SHARE = ("x", [0.1], {"a": 1}, True, _NAN, _ENDLESS, -0.1, 1.5)
_NO_TOKEN = ("</s>", 1.5, {"a": 1}, True, _NAN, 10**400)
_NO_SWITCH = ("no", 2, -1, 0.5, [], {"a": 1}, _NAN)
_NO_MAPPING = (5, "x", [1], True, _NAN)
_FIELDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"), (*_NO_SIZE, None)
    ),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), (*_NO_SIZE, None)),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), _NO_SIZE),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), _NO_NUMBER),
    **dict.fromkeys(("attention_dropout", "initializer_range"), _NO_SHARE),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (*_NO_TOKEN, [1])),
    "eos_token_id": (*_NO_TOKEN, ["</s>"], [[1]], [None]),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache"), _NO_SWITCH),
    "hidden_act": (5, [], {"a": 1}, True),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "quantization_config"), _NO_MAPPING),
    "rope_scaling.factor": (0, -2, "8", [8], _NAN, True),
    "rope_scaling.rope_type": (5, ["linear"], True),
    "rope_scaling.original_max_position_embeddings": (0, "x", _NAN, [1]),
    "rope_parameters.rope_theta": _NO_NUMBER,
    "model_type": (5, None, "", "gpt2", "bert", "llama\n", [], {"a": 1}, "x" * 10_000, True, _NAN),
    "layer_types": (5, "full_attention", [1], {"a": 1}, [None], [["full_attention"]]),
    "num_labels": (10**9, -1, "x", 2.5),
    "transformers_weights": ("other.safetensors", "../other.safetensors", 5),
    "per_layer_config": (
        *([{"hidden_size": 32}], {"0": {}}, {"0": {"skip": ["mlp"]}}, {"0": {"hidden_size": 32}}, {"x": {}}, 5),
        *({"0": {"intermediate_size": size}} for size in (0, -1, "64", 64.0, True, None, 10**18)),
        *({layer: {"intermediate_size": 64}} for layer in ("99", "-1", "1.0", "", "9" * 5000)),
    ),
    "fusion_config": ({"a": True}, 5),
    "return_dict": (False, 0, "no"),
    "is_encoder_decoder": (True, 1),
    "output_attentions": (True, "yes"),
}
"""Values of config fields that no model has."""

_TEXTS: dict[str, str] = {
    "no-json": "{",
    "list": "[1, 2]",
    "null": "null",
    "number": "1",
    "empty": "",
    "deep": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "digits": '{"vocab_size": ' + _LONG + "}",
}
"""Texts that are not a model's JSON object."""

_MADE: dict[str, dict[str, Any]] = {
    "hidden_act": {"hidden_act": "no_such_function"},
    "dtype": {"dtype": "float33"},
    "dtype-number": {"dtype": 5},
    "pad-beyond": {"pad_token_id": 10**6},
    "rope-type": {"rope_parameters": {"rope_type": "no_such_type", "rope_theta": 10_000.0}},
    "rope-llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10_000.0}},
    "layer-types": {"layer_types": ["no_such_attention", "full_attention"]},
    "layer-types-count": {"layer_types": ["full_attention"] * 7},
    "id2label": {"id2label": {"a": "b"}},
    "method": {"to_dict": 5},
    "method-2": {"get_text_config": "x"},
    "text-config": {"text_config": {"vocab_size": 5}},
    "decoder": {"decoder": {"a": 1}},
    "quantised": {"quantization_config": {}},
    "quantised-bits": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
}
"""Changes of a config whose fault only transformers can find, or that matter only to those who run the model."""

_SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "generation_config.json": (
        *({"eos_token_id": value} for value in ("</s>", 1.5, {"a": 1}, ["</s>"], _NAN, True)),
        *({"bos_token_id": value} for value in ("<s>", [1], _NAN)),
        {"cache_implementation": "no_such_cache"},
        {"watermarking_config": 5},
        {"compile_config": 3},
        {"suppress_tokens": 5},
        {"early_stopping": "x"},
    ),
    "tokenizer_config.json": (
        {"tokenizer_class": 5},
        {"tokenizer_class": ["LlamaTokenizer"]},
        {"bos_token": 5},
        {"eos_token": ["</s>"]},
        {"eos_token": _NAN},
        {"pad_token": {"content": 5}},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "y"}}},
        {"added_tokens_decoder": {"5": 7}},
        {"extra_special_tokens": 5},
    ),
}
"""Fields, in the files next to the config, that no model has."""

# Some of these values are accepted. With those, a command succeeds.
_ANY: tuple[Any, ...] = (
    None,
    0,
    -1,
    1,
    7,
    2**31,
    10**18,
    0.5,
    _NAN,
    _ENDLESS,
    "",
    "x",
    True,
    False,
    [],
    [1],
    {},
    {"a": 1},
)


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    def case(name: str, spoil: Spoil, *, described: bool, codes: tuple[int, ...] = (2,)) -> Iterator[Case]:
        def make(folder: Path) -> None:
            spoil(kit.teacher_copy(folder / "model"))

        build = partial(Case, area="folders", make=make)
        yield build(name=f"{name}-estimate", argv=("estimate", "model"), codes=codes if described else (0, *codes))
        solve = ("solve", "model", "--data", str(kit.text), "--budget", "1GB", "--cache", "cache")
        short = ("--tokens", "64", "--sequence-length", "16")
        asked = dice.choice([kit.plan(teacher="model"), kit.write("model"), (*solve, *short)])
        yield build(name=f"{name}-{asked[0]}", argv=asked, codes=codes)

    for fault in faults():
        yield from case(fault.name, fault.spoil, described=fault.described)
    config = json.loads((kit.teacher / "config.json").read_text(encoding="utf-8"))
    for field in sorted(config):
        for number in dice.sample(range(len(_ANY)), 3):
            spoil = _field(field, _ANY[number])
            yield from case(f"any-{field}-{number}", spoil, described=True, codes=(0, 2))
