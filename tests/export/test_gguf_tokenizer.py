"""The tokenizer that a GGUF file describes to llama.cpp."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from autodistill.data.chat_template import Renderer
from autodistill.distillation.teacher.resolve import materialize, resolve_teacher
from autodistill.errors import InputError
from autodistill.export.gguf import GgufExporter
from autodistill.export.gguf_tokenizer import add_tokenizer, is_certain, refusal, spaces
from autodistill.export.tokenizer_check import agreement, cannot_cut, comparable
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment
from autodistill.testing import save_tiny_teacher, tiny_tokenizer

F16 = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "\u2581\u2581", "<turn>"]
TEXTS = [
    *("The miller carries two apples, 42 of them.", "  two spaces,   three", "\n\nlines\n\n\nof\n text", "", " "),
    *(
        "Zürich, naïve caf\u00e9",
        "你好 🤖 end",
        "<bos>x<turn>y<eos>",
        "a\u2581b \u2581\u2581c",
        "\ttabs\t\t",
        "\x00\x01 \r\n",
    ),
    *("don't we'll I'M 3.14", "the river" + " " * 40 + "end", "near the river near the river"),
]


def written(folder: Path, path: Path, vocabulary: int = 300) -> dict[str, object]:
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, folder, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_tokens_types_and_merges(folder: Path, tmp_path: Path) -> None:
    keys = written(folder, tmp_path / "t.gguf", vocabulary=304)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert tokens[:300] == tokenizer.convert_ids_to_tokens(list(range(300)))
    assert tokens[300:] == ["[PAD300]", "[PAD301]", "[PAD302]", "[PAD303]"]
    assert kinds == [3] * 3 + [1] * 297 + [5] * 4  # control, normal, unused
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="300 tokens"):
        written(folder, tmp_path / "t.gguf", vocabulary=299)


def test_what_a_gguf_teacher_said_holds(folder: Path, tmp_path: Path) -> None:
    inherited = {"pre": "smollm", "model": "gpt2", "add_bos_token": True, "eos_token_id": 2, "unknown_token_id": 0}
    (folder / "gguf_tokenizer.json").write_text(json.dumps(inherited))
    keys = written(folder, tmp_path / "t.gguf")
    for key, value in inherited.items():
        assert keys[f"tokenizer.ggml.{key}"] == value
    assert keys["tokenizer.ggml.bos_token_id"] == 0


def test_the_chat_template_is_taken_along(folder: Path, tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    assert written(folder, tmp_path / "t.gguf")["tokenizer.chat_template"] == template


def test_of_several_chat_templates_the_one_that_training_uses_is_taken(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"tool_use": "{{ 'tools' }}", "default": "{{ messages[0]['content'] }}"}
    tokenizer.save_pretrained(folder)
    assert written(folder, tmp_path / "t.gguf")["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    tokenizer.chat_template = {"tool_use": "{{ 'tools' }}"}
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    assert "tokenizer.chat_template" not in written(folder, tmp_path / "u.gguf")
    # Texts need no template, but conversations do.
    with pytest.raises(InputError, match="several by name and none is the default"):
        Renderer(folder)


def chained(folder: Path, ends: object) -> Path:
    """Save a model that follows one token by another: "a" by "A" and an end token of three, "x" by a cycle of two."""
    save_tiny_teacher(folder, layers=1, tied=False)
    weights = load_file(folder / "model.safetensors")
    table = torch.randn(weights["lm_head.weight"].shape, generator=torch.Generator().manual_seed(0))
    table /= table.norm(dim=1, keepdim=True)
    ids = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids
    head = torch.zeros_like(table)
    chains = [(*"aA", "</s>"), (*"bB", "<s>"), (*"cC", "<pad>"), ("<s>", "x"), ("<pad>", "x"), (*"xyx",)]
    for chain in chains:
        for before, after in pairwise(ids(list(chain))):
            head[after] += table[before]
    adds_nothing = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    weights |= {name: torch.zeros_like(value) for name, value in weights.items() if name.endswith(adds_nothing)}
    weights |= {"model.embed_tokens.weight": table, "lm_head.weight": 9 * head}
    weights["model.norm.weight"] = torch.ones_like(weights["model.norm.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ends}))
    return folder


def ends_of(path: Path) -> dict[str, object]:
    fields = gguf.GGUFReader(path).fields
    named = {key: fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")}
    return {key: field.contents() for key, field in named.items() if field is not None}


@pytest.mark.parametrize(
    ("ends", "keys", "written"),
    [
        ([1, 2, 0], {"eos": 1, "eot": 2, "eom": 0}, ["A</s>", "B<s>", "C<pad>"]),
        # Chat templates are given the text of "eos", so it is the tokenizer's own.
        ([0, 1, 0], {"eos": 1, "eot": 0}, ["A</s>", "B<s>", "C<pad>xyxyxyxy"]),
        (1, {"eos": 1}, ["A</s>", "B<s>xyxyxyxy", "C<pad>xyxyxyxy"]),
    ],
)
def test_llama_cpp_stops_at_every_end_token(
    tmp_path: Path, ends: object, keys: dict[str, int], written: list[str]
) -> None:
    path = GgufExporter().export(chained(tmp_path / "student", ends), F16, tmp_path / "out").path
    assert ends_of(path) == keys
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    with LlamaServer(path, 64, 1) as server:
        found = [server.complete(tokenizer(letter)["input_ids"], 10).tokens for letter in "abc"]
    assert [tokenizer.decode(tokens) for tokens in found] == written
    # A file that is a teacher gives the list back, and a student's file has it again.
    folder = materialize(resolve_teacher(str(path)), tmp_path / "cache").folder
    read = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert read == (list(keys.values()) if len(keys) > 1 else 1)
    assert ends_of(GgufExporter().export(folder, F16, tmp_path / "again").path) == keys


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([1, 300], "the end token 300, which is none of the model's 300 tokens"),
        ([1, "</s>"], "the end token '</s>', which is none of"),
        ([1, 70], "the end token 70, but this token is text: "),
        ([1, 0, 2, 3], "4 end tokens, and a GGUF file holds 3"),
    ],
)
def test_end_tokens_that_no_file_can_hold_are_refused(folder: Path, ends: list[object], said: str) -> None:
    changed(
        folder,
        lambda description: description["added_tokens"].append(
            {**description["added_tokens"][0], "id": 3, "content": "!"}
        ),
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert said in cannot_cut(folder, 300)


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change tokenizer.json of a folder, and return the folder."""
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))
    return folder


def test_an_unknown_way_to_cut_text_is_refused(folder: Path) -> None:
    for unknown in (
        {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        {"type": "Digits", "individual_digits": False},
        None,
    ):
        changed(folder, lambda description, step=unknown: description.update(pre_tokenizer=step))
        assert "its pre_tokenizer is none of those that are known there (gpt-2, smollm, " in refusal(folder)
        assert cannot_cut(folder, 400).endswith("export to huggingface or compressed-tensors instead")


def test_a_tokenizer_that_a_file_cannot_hold_is_known_without_an_export(folder: Path) -> None:
    assert cannot_cut(folder, 300) == ""
    assert "the tokenizer has 300 tokens, but the model's vocabulary is 299" in cannot_cut(folder, 299)
    (folder / "gguf_tokenizer.json").write_text(json.dumps({"bos_token_id": -1}))
    assert f"GGUF cannot hold the tokenizer in {folder}" in cannot_cut(folder, 300)
    (folder / "gguf_tokenizer.json").unlink()
    changed(folder, without_merges)
    assert "it has no merges, which llama.cpp needs" in cannot_cut(folder, 300)


def without_merges(description: dict[str, Any]) -> None:
    description["model"]["merges"] = []


def test_words_that_the_merges_do_not_make_are_known_by_name(folder: Path) -> None:
    """Under some names llama.cpp takes words that are tokens as they are. Under others it merges them."""
    changed(folder, lambda description: description["model"].update(ignore_merges=True))
    assert refusal(folder) == ""  # the merges make every token of its word, so there is no difference
    changed(folder, lambda description: description["model"]["merges"].pop())
    assert "its merges do not make the token" in refusal(folder)
    changed(folder, lambda description: description["model"].update(ignore_merges=False))
    assert refusal(folder) == ""


def test_what_a_gguf_teacher_calls_its_cut_is_asked_of_llama_cpp(folder: Path) -> None:
    """tiny_tokenizer splits text as GPT-2 does, which has other names too. Llama 3 splits numbers into threes."""

    def merge_digits(description: dict[str, Any]) -> None:
        description["model"]["vocab"]["34"] = 300
        description["model"]["merges"].append(["3", "4"])

    changed(folder, merge_digits)
    for name, certain, right in (("gpt-2", True, True), ("olmo", True, True), ("exaone4", False, True)):
        (folder / "gguf_tokenizer.json").write_text(json.dumps({"pre": name}))
        assert (is_certain(folder), cannot_cut(folder, 400) == "") == (certain, right)
    (folder / "gguf_tokenizer.json").write_text(json.dumps({"pre": "llama-bpe"}))
    assert "would cut text into other tokens" in cannot_cut(folder, 400)
    (folder / "gguf_tokenizer.json").write_text(json.dumps({"pre": "unheard-of"}))
    assert "unknown pre-tokenizer type: 'unheard-of'" in cannot_cut(folder, 400)


def test_what_transformers_makes_of_the_files_counts(folder: Path) -> None:
    """It rebuilds tokenizers of some classes, whichever way to split text their tokenizer.json has."""
    changed(folder, lambda description: description.update(pre_tokenizer={"type": "Whitespace"}))
    assert "none of those that are known" in refusal(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    assert refusal(folder) == ""


def test_other_kinds_of_tokenizer_are_refused(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=1)
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}
    changed(teacher, lambda description: description.update(decoder=decoder))
    with pytest.raises(InputError, match="byte-level BPE tokenizers and SentencePiece's kind"):
        GgufExporter().export(teacher, F16, tmp_path / "out")
    (teacher / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        GgufExporter().export(teacher, F16, tmp_path / "out")
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        written(teacher, tmp_path / "t.gguf")


def gemma_like(folder: Path) -> Path:
    """Save a tokenizer like Gemma's: characters and bytes, and a merge for every pair of tokens that makes a token."""
    space = "\u2581"
    learning = Tokenizer(models.BPE())
    learning.normalizer = normalizers.Replace(" ", space)
    trainer = trainers.BpeTrainer(vocab_size=90, show_progress=False, max_token_length=6)
    learning.train_from_iterator(
        ["the river near the miller, the apples of the river and the rain", *TEXTS[:1]], trainer
    )
    learnt = json.loads(learning.to_str())["model"]
    pieces = ["".join(pair) for pair in learnt["merges"]]
    characters = [name for name in learnt["vocab"] if len(name) == 1]
    names = dict.fromkeys([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *characters, space])
    vocab = {name: index for index, name in enumerate(names)}
    merges = []
    for piece in ["\u2581\u2581", *pieces]:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    whole = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    whole.normalizer = normalizers.Replace(" ", space)
    whole.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    whole.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])
    whole.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.add_tokens(["\n\n", "\u2581\u2581"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    assert len(tokenizer) == len(vocab)
    tokenizer.save_pretrained(folder)
    return folder


def neox_like(folder: Path) -> Path:
    """Save a tokenizer like GPT-NeoX's: GPT-2's, with a normalizer, and with runs of spaces as separate tokens."""
    tokenizer = tiny_tokenizer(296)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(["  ", "    "])
    tokenizer.save_pretrained(folder)
    return folder


def make_the_twice(model: dict[str, Any]) -> None:
    """Give "the", which is "t" and "he", another merge after all others."""
    model["vocab"]["th"] = 390
    model["merges"] += [["t", "h"], ["th", "e"]]


def llama2_like(folder: Path) -> Path:
    """Save a tokenizer like Llama 2's: Gemma's, in which each piece of a text begins with a space."""

    def begin_with_space(description: dict[str, Any]) -> None:
        description["normalizer"] = {"type": "Sequence", "normalizers": [PREPEND, description["normalizer"]]}
        description["pre_tokenizer"] = None
        # Llama 2 has no plain tokens that are looked up in texts, and no tokens that can only be found in that way.
        description["added_tokens"] = [token for token in description["added_tokens"] if token["special"]]
        del description["model"]["vocab"]["\n\n"]

    return changed(gemma_like(folder), begin_with_space)


PREPEND = {"type": "Prepend", "prepend": "\u2581"}


@pytest.mark.parametrize(
    ("architecture", "made"),
    [("gemma3_text", gemma_like), ("gpt_neox", neox_like), ("llama", llama2_like)],
    ids=["gemma", "neox", "llama2"],
)
def test_llama_cpp_cuts_texts_as_transformers_does(tmp_path: Path, architecture: str, made: object) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", architecture=architecture, layers=1, tied=False, vocabulary=390)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (teacher / name).unlink()
    made(teacher)  # type: ignore[operator]
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    artifact = GgufExporter().export(teacher, F16, tmp_path / "out")
    with LlamaServer(artifact.path, 64, 1) as server:
        for text in TEXTS:
            assert list(server.tokenize(text)) == tokenizer(text)["input_ids"], text
    # The tokenizer that is read back from the file gives the same.
    again = AutoTokenizer.from_pretrained(materialize(resolve_teacher(str(artifact.path)), tmp_path / "cache").folder)
    plain = [text for text in TEXTS if "\u2581" not in text]
    assert [again(text)["input_ids"] for text in plain] == [tokenizer(text)["input_ids"] for text in plain]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda model: model["merges"].pop(), "merges lack"),
        (make_the_twice, "do not follow each other"),
        (lambda model: model["vocab"].pop("<0x41>"), "lacks <0x41>"),
        (lambda model: model["vocab"].update({"#%": 390}), "merges lack '#' and '%'"),
        (lambda model: model.update(ignore_merges=True), "words, prefixes or suffixes"),
    ],
)
def test_what_llama_cpp_would_merge_otherwise_is_refused(tmp_path: Path, harm: object, said: str) -> None:
    path = gemma_like(tmp_path) / "tokenizer.json"
    description = json.loads(path.read_text())
    harm(description["model"])  # type: ignore[operator]
    path.write_text(json.dumps(description))
    assert re.search(f"would cut text into other tokens.*{said}", refusal(tmp_path))


def test_a_normalizer_that_llama_cpp_lacks_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}
    path.write_text(json.dumps(description))
    assert "its normalizer Lowercase is not known there" in refusal(folder)


def metaspace(scheme: str, *, split: bool = False) -> dict[str, object]:
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}


def test_metaspace_passes_where_it_puts_no_space_before_texts(tmp_path: Path) -> None:
    folder = changed(
        gemma_like(tmp_path), lambda description: description.update(normalizer=None, pre_tokenizer=metaspace("never"))
    )
    assert (is_certain(folder), refusal(folder)) == (True, "")
    changed(folder, lambda description: description.update(pre_tokenizer=metaspace("never", split=True)))
    assert "cuts text into words" in refusal(folder)


def llama_like(folder: Path, *, legacy: bool, template: str | None) -> Path:
    """Save a folder of transformers' own `LlamaTokenizer`, like those of Llama 2, TinyLlama and Mistral 7B."""
    gemma_like(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    del model["vocab"]["\n\n"]  # no merge makes it, and Llama 2 does not have it
    merges = [tuple(pair) for pair in model["merges"]]
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tokenizer = LlamaTokenizer(
        vocab=model["vocab"], merges=merges, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", legacy=legacy
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"legacy": legacy}))
    return folder


CHAT = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("legacy", "template", "alike", "unlike", "caveat"),
    [
        (
            False,
            CHAT,
            ("<bos>the rain<eos>the river<eos> apples",),
            ("the rain",),
            "begins with a word instead of a special token",
        ),
        (False, None, ("the rain", "rain and\n the river"), ("the<eos>rain", " rain"), "behind special tokens"),
        (True, None, ("the rain", "the<eos>rain"), (" rain", "the<eos> rain"), "before text that begins with one"),
    ],
    ids=["chat", "text", "legacy"],
)
def test_where_llama_cpp_knows_no_such_space_the_most_usual_texts_are_right_and_the_others_told(
    tmp_path: Path, legacy: bool, template: str | None, alike: tuple[str, ...], unlike: tuple[str, ...], caveat: str
) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=1, tied=False, vocabulary=390)
    for file in teacher.glob("tokenizer*"):
        file.unlink()
    llama_like(teacher, legacy=legacy, template=template)
    assert (is_certain(teacher), cannot_cut(teacher, 400)) == (False, "")
    assert caveat in spaces(teacher).caveat
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    artifact = GgufExporter().export(teacher, F16, tmp_path / "out")
    with LlamaServer(artifact.path, 64, 1) as server:

        def same(text: str) -> bool:
            mine = tokenizer(text, add_special_tokens=text.startswith("<bos>") is False)["input_ids"]
            return list(server.tokenize(text)) == list(mine)

        assert [text for text in alike if not same(text)] == []
        assert [text for text in unlike if same(text)] == []
        for text in alike + unlike:
            assert agreement(tokenizer, server, [comparable(text, tokenizer, spaces(teacher))]).share == 1


def test_a_space_before_texts_is_only_believed_when_llama_cpp_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = llama2_like(tmp_path)
    assert (refusal(folder), is_certain(folder), cannot_cut(folder, 400)) == ("", False, "")
    (folder / "gguf_tokenizer.json").write_text(json.dumps({"add_space_prefix": False}))
    assert re.search(r"would cut text into other tokens .*: behind \[\] it has", cannot_cut(folder, 400))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install xllamacpp" in cannot_cut(folder, 400)
