"""Each pre-tokenizer in the table splits text like llama.cpp's of that name: llama.cpp's tokenizers are asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from autodistill.export.gguf import GgufExporter
from autodistill.export.gguf_tokenizer import is_certain, refusal
from autodistill.models.pretokenizers import PRETOKENIZERS, Pretokenizer, pretokenizer_named, pretokenizers_like
from autodistill.runtimes.llama_cpp import LlamaServer
from autodistill.strategy.deployment import Deployment
from autodistill.testing import tiny_config

TEXTS = (
    "don't HelloWorld 12345  \n\n x",
    "I'll WE'RE they'd 'sup 'tis O'Neil's XMLHttpRequest snake_case",
    "Zürich naïve Привет 日本語。한국어 你好",
    "1\u00bd\u00b2 \u0663\u0664 \u2167 3.14 1,000,000 x=1;y=22;zzz=333333",
    "a\u00a0b\u2003c\u200bd \U0001f916\U0001f44d end",
    "...!!!\n\n\n foo/bar//\n /\n // comment",
    "\ttabs\t\t x   42 A  B   C    D     ",
    "\r\n\r\nx\r y",
)
MARKS = "cafe\u0301 na\u0308i\u0308f \u0928\u092e\u0938\u094d\u0924\u0947 a\u0327\u0301!"
WITHOUT_MARKS = ("tekken", "gpt-4o")  # llama.cpp's versions of these know no marks
VOCABULARY = 600
IDS = [cut.names[0] for cut in PRETOKENIZERS]


def tokenizer_of(cut: Pretokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """Save a tokenizer with so many merges that every difference in splitting shows."""
    learning = Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    apart = [pre_tokenizers.Digits(individual_digits=True)] if cut.joins_digits else []
    learning.pre_tokenizer = pre_tokenizers.Sequence([*apart, whole])
    learning.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Train on whole lines, so that merges cross every border that a split might have.
    learning.train_from_iterator([*TEXTS, MARKS] * 2, trainer)
    description = json.loads(learning.to_str())
    description["pre_tokenizer"] = cut.pre_tokenizer
    description["model"]["ignore_merges"] = cut.whole_words
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("cut", PRETOKENIZERS, ids=IDS)
def test_llama_cpp_cuts_text_so_under_that_name(cut: Pretokenizer, tmp_path: Path) -> None:
    config = LlamaConfig(**tiny_config(vocab_size=VOCABULARY, num_hidden_layers=1))
    teacher = tmp_path / "teacher"
    LlamaForCausalLM(config).save_pretrained(teacher)
    tokenizer = tokenizer_of(cut, teacher)
    assert (refusal(teacher), is_certain(teacher)) == ("", True)
    deployment = Deployment(runtime="llama.cpp", format="gguf-f16", bits=16, group_size=0)
    artifact = GgufExporter().export(teacher, deployment, tmp_path / "out")
    with LlamaServer(artifact.path, 64, 1) as server:
        for text in TEXTS if cut.names[0] in WITHOUT_MARKS else (*TEXTS, MARKS):
            assert list(server.tokenize(text)) == tokenizer(text)["input_ids"], text


def test_the_texts_tell_the_cuts_apart(tmp_path: Path) -> None:
    """Except for what the merges do to whole words, which these texts need not show."""
    cut_so = {}
    for cut in PRETOKENIZERS:
        tokenizer = tokenizer_of(cut, tmp_path / cut.names[0])
        cut_so[cut.names[0]] = tuple(tuple(tokenizer(text)["input_ids"]) for text in (*TEXTS, MARKS))
    assert len(set(cut_so.values())) >= len(PRETOKENIZERS) - 1


def test_a_name_is_one_cuts() -> None:
    names = [name for cut in PRETOKENIZERS for name in cut.names]
    assert len(set(names)) == len(names)
    assert pretokenizer_named("starcoder") is pretokenizer_named("smollm") is not None
    assert pretokenizer_named("default") is pretokenizer_named(None) is None


def test_ways_to_write_a_cut_are_one() -> None:
    (gpt2,) = pretokenizers_like([{"type": "ByteLevel", "add_prefix_space": False}])
    assert gpt2.names[0] == "gpt-2"
    (qwen2,) = (cut for cut in PRETOKENIZERS if cut.names[0] == "qwen2")
    split, level = (dict(step) for step in qwen2.steps)
    assert pretokenizers_like([split, level | {"trim_offsets": False}]) == (qwen2,)
    assert pretokenizers_like([split | {"behavior": "Removed", "invert": True}, level]) == (qwen2,)
    assert pretokenizers_like([split | {"behavior": "Removed"}, level]) == ()
    assert pretokenizers_like([split, level | {"use_regex": True}]) == ()
    assert pretokenizers_like([split]) == ()
    pattern = split["pattern"]["Regex"]
    assert (
        pretokenizers_like([split | {"pattern": {"Regex": pattern.replace(r"\p{N}", r"\p{N}{1,2}", 1)}}, level]) == ()
    )


def test_llama_3s_pattern_has_a_name_for_either_way_to_take_words() -> None:
    (llama3,) = (cut for cut in PRETOKENIZERS if cut.names[0] == "llama-bpe")
    assert {cut.names[0]: cut.whole_words for cut in pretokenizers_like(llama3.steps)} == {
        "llama-bpe": True,
        "dbrx": False,
    }


def test_digits_that_llama_cpp_would_join_are_refused(tmp_path: Path) -> None:
    """DeepSeek's tokenizer.json separates digits, and llama.cpp keeps them together under its name."""
    cut = pretokenizer_named("deepseek-llm")
    assert cut is not None
    tokenizer_of(cut, tmp_path)
    assert refusal(tmp_path) == ""
    tokenizer_of(replace(cut, joins_digits=False), tmp_path)  # learned with merges of digits
    assert "the digits of the token" in refusal(tmp_path)
