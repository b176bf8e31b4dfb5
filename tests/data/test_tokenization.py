"""Texts tokenised in parts, against tokenizers that get a whole text at once."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from autodistill.data import tokenization as tokenizing
from autodistill.data.tokenization import beginning, encode, groups, load_tokenizer, save_tokenizer
from autodistill.errors import InputError
from autodistill.testing import tiny_tokenizer

LLAMA3 = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SENTENCES = ["The miller carries two apples.\nA fox, 42 of them!\n\nNear the river  \n and the rain\n"] * 3


def _bpe(normalizer: Any, pre_tokenizer: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


def _llama3() -> PreTrainedTokenizerFast:
    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
    return _bpe(None, pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))


# Gemma's kind joins characters across whole texts; Llama 2's kind puts a space before each text.
TOKENIZERS = {
    "gpt-2": tiny_tokenizer(),
    "llama 3": _llama3(),
    "gemma": _bpe(normalizers.Replace(" ", "\u2581"), None),
    "llama 2": _bpe(normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]), None),
}


class _Counting:
    """A tokenizer that records the most characters that it was given at once, and in one text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.most, self.longest = tokenizer, 0, 0

    def __call__(self, texts: list[str], **options: Any) -> Any:
        self.most, self.longest = max(self.most, sum(map(len, texts))), max(self.longest, *map(len, texts))
        return self._tokenizer(texts, **options)


def _whole(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


@pytest.mark.parametrize("name", TOKENIZERS)
@given(
    texts=st.lists(st.text(st.sampled_from("ab.1 \n\r\t'é狐"), max_size=60), min_size=1, max_size=4),
    at_once=st.integers(1, 40),
)
def test_in_parts_every_text_has_the_tokens_of_the_whole(name: str, texts: list[str], at_once: int) -> None:
    tokenizer = TOKENIZERS[name]
    found = encode(tokenizer, texts, at_once)
    assert [ids.tolist() for ids in found] == _whole(tokenizer, texts)
    assert all(ids.dtype == "int32" for ids in found)


@pytest.mark.parametrize("name", ["gpt-2", "llama 3", "gemma"])
def test_a_long_text_is_never_tokenized_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "_AROUND", 100)
    text = "".join(f"The miller carries {place} apples.\nA fox runs\n\n  near the river:\n" for place in range(400))
    counting = _Counting(TOKENIZERS[name])
    texts = [text, "short", text[:5000]]
    assert [ids.tolist() for ids in encode(counting, texts, 2000)] == _whole(TOKENIZERS[name], texts)
    assert len(text) > 10 * counting.most
    assert counting.most <= 2000 + 80


def test_a_text_that_cannot_be_cut_is_read_whole_where_memory_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = TOKENIZERS["llama 2"], "The miller\nA fox\n" * 100
    counting = _Counting(tokenizer)
    assert [ids.tolist() for ids in encode(counting, [text], 200)] == _whole(tokenizer, [text])
    assert counting.longest == len(text)
    monkeypatch.setattr(tokenizing, "memory_bytes", lambda: 100_000)
    with pytest.raises(InputError, match=r"1,700 characters takes 170 kB of memory .*, of 100 kB,.*several documents"):
        encode(tokenizer, [text], 200)
    encode(tokenizer, [text], 1700)  # like any text that is not too long
    encode(TOKENIZERS["gpt-2"], [text], 200)


@given(sizes=st.lists(st.integers(0, 30)), at_once=st.integers(1, 40))
def test_groups_hold_all_in_order_and_no_more_than_they_may(sizes: list[int], at_once: int) -> None:
    found = [sizes[group] for group in groups(sizes, at_once)]
    assert [size for group in found for size in group] == sizes
    assert all(group and (len(group) == 1 or sum(group) <= at_once) for group in found)
    assert all(sum(one) + other[0] > at_once for one, other in pairwise(found))


def test_what_begins_texts_is_bos_where_the_tokenizer_adds_it() -> None:
    begins = tiny_tokenizer(begins=True)
    assert beginning(begins) == begins("any text")["input_ids"][0] == begins.bos_token_id == 0
    assert beginning(tiny_tokenizer()) is None
    assert beginning(TOKENIZERS["gemma"]) is None  # without BOS


@pytest.mark.parametrize("legacy", [False, True])
def test_a_saved_tokenizer_cuts_texts_as_it_did(tmp_path: Path, legacy: bool) -> None:
    vocab = {name: index for index, name in enumerate(["<unk>", "<s>", "</s>", "\u2581", "a", "b"])}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=[], legacy=legacy)
    save_tokenizer(tokenizer, tmp_path)
    tokens = tokenizer("a</s>b")["input_ids"]
    assert load_tokenizer(tmp_path)("a</s>b")["input_ids"] == tokens
    # If it is legacy, text after a special token begins with a space too.
    assert tokens.count(vocab["\u2581"]) == 1 + legacy


def test_a_tokenizer_that_ends_texts_with_a_token_it_lacks_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    """The library would panic, which is not an Exception, and only when it begins and ends a text."""
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    unknown = [{"SpecialToken": {"id": "<none>", "type_id": 0}}]
    ending = {"type": "TemplateProcessing", "single": unknown, "pair": [], "special_tokens": {}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": ending}))
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)


def test_a_pattern_that_tries_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each position costs some million steps, which is below the library's own limit for one position."""
    monkeypatch.setattr(tokenizing, "_SECONDS", 0.1)
    slow = pre_tokenizers.Split(Regex(r"[\s\S]{0,1500}[\s\S]{0,1500}(?!\w|\W)"), behavior="isolated")
    tokenizer = _bpe(None, slow)
    with pytest.raises(InputError, match=r"takes more than \d+ s for 3,060 characters; perhaps its pattern"):
        encode(tokenizer, ["a miller " * 340])  # would end by itself after some seconds
    assert len(encode(tokenizer, ["a"])[0]) > 0
