"""Likelihoods of continuations and strided windows, against transformers' own logits and loss, for any batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from autodistill.inference import likelihood
from autodistill.inference.likelihood import _of_equal_length, continuations, rolling, windows
from autodistill.testing import save_tiny_teacher


@pytest.fixture(scope="module")
def model(workshop):
    return AutoModelForCausalLM.from_pretrained(workshop.teacher, dtype=torch.float32).eval()


def pairs(count=24, seed=0):
    """Return prompts, some shared and some of equal length, each with continuations of several lengths."""
    dice = np.random.default_rng(seed)
    prompts = [dice.integers(3, 300, size).tolist() for size in (1, 5, 5, 17, 40)]
    return [
        (prompts[int(dice.integers(5))], dice.integers(3, 300, int(dice.integers(1, 9))).tolist()) for _ in range(count)
    ]


def alone(model, prompt, rest):
    ids = torch.tensor([prompt + rest])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1].double()
    labels = torch.tensor(rest)
    chosen = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return float(chosen.sum()), bool((logits.argmax(-1) == labels).all())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "gpt_neox"])
def test_each_is_that_of_the_whole_sequence_alone(tmp_path, architecture):
    folder = save_tiny_teacher(tmp_path, architecture=architecture, layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    given = pairs()
    for (prompt, rest), found in zip(given, continuations(model, given), strict=True):
        expected, greedy = alone(model, prompt, rest)
        assert found.log_likelihood == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert (found.tokens, found.greedy) == (len(rest), greedy)


@pytest.mark.parametrize("threads", [1, 2])
def test_does_not_depend_on_the_batch(model, threads):
    given = pairs(40, seed=1)
    torch.set_num_threads(threads)
    try:
        found = [continuations(model, given, batch_tokens=size) for size in (1, 64, 100_000)]
        turned = continuations(model, given[::-1])[::-1]
    finally:
        torch.set_num_threads(1)
    for other in (*found[1:], turned):
        np.testing.assert_allclose(
            [one.log_likelihood for one in other], [one.log_likelihood for one in found[0]], rtol=0, atol=1e-4
        )
        assert [one.greedy for one in other] == [one.greedy for one in found[0]]


def test_what_greedy_decoding_writes_is_greedy(model):
    prompt = [5, 9, 11]
    written = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=None)
    rest = written[0, 3:].tolist()
    (right, wrong) = continuations(model, [(prompt, rest), (prompt, [*rest[:-1], rest[-1] ^ 1])])
    assert (right.greedy, wrong.greedy) == (True, False)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 8), (16, 1), (16, 5), (200, 200), (64, 63)])
def test_windows_are_those_of_hugging_faces_guide(model, window, stride):
    """As in Hugging Face's guide, all but a window's new tokens are masked, and transformers computes the loss."""
    tokens = np.random.default_rng(2).integers(3, 300, 100).tolist()
    total, counted, before = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        ids = torch.tensor([tokens[begin:end]])
        labels = ids.clone()
        labels[:, : -(end - before)] = -100
        valid = int((labels[0, 1:] != -100).sum())
        if valid:
            with torch.no_grad():
                total += float(model(ids, labels=labels).loss) * valid
            counted += valid
        before = end
        if end == len(tokens):
            break
    (found,) = rolling(model, [tokens], window=window, stride=stride)
    assert len(found) == counted
    assert found.mean() == pytest.approx(total / counted, rel=1e-5)
    if stride < window:
        assert counted == len(tokens) - 1  # every token except the first, once


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 15), (16, 8), (16, 1), (200, 200), (2, 1), (34, 33)])
def test_what_begins_texts_begins_every_window(model, window, stride):
    """Score each token of the text once, after BOS and the earlier tokens of its window, with transformers' loss."""
    tokens, nll = np.random.default_rng(2).integers(3, 300, 100).tolist(), []
    for begin in range(0, len(tokens), min(stride, window - 1)):
        end = min(begin + window - 1, len(tokens))
        ids = torch.tensor([[0, *tokens[begin:end]]])
        with torch.no_grad():
            losses = -model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        nll += losses[len(nll) - begin :].tolist()
        if end == len(tokens):
            break
    found, single = rolling(model, [tokens, tokens[:1]], window=window, stride=stride, begin=0)
    assert len(found) == len(tokens)
    np.testing.assert_allclose(found, nll, rtol=0, atol=1e-4)
    assert single == pytest.approx(nll[:1], abs=1e-4)


def test_more_context_of_a_window_is_the_whole_texts(model):
    texts = [np.random.default_rng(seed).integers(3, 300, size).tolist() for seed, size in ((0, 50), (1, 2), (2, 1))]
    whole, pair, single = rolling(model, texts, window=64, stride=32)
    ids = torch.tensor([texts[0]])
    with torch.no_grad():
        assert whole.mean() == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-5)
    assert (len(pair), len(single)) == (1, 0)


def test_windows_cover_a_text_once():
    for length, window, stride in itertools.product(range(40), (2, 7, 40), (1, 3, 7)):
        if stride > window:
            continue
        found = list(windows(length, window, stride))
        assert [start for start, _, _ in found] == [stride * index for index in range(len(found))]
        assert all(end == min(start + window, length) for start, end, _ in found)
        new = [place for _, end, count in found for place in range(end - count, end)]
        assert new == list(range(length))
        # The first window that reaches the end of the text is the last one.
        assert all(end < length for _, end, _ in found[:-1])


def test_a_batch_ends_before_its_prompts_or_its_continuations_have_too_many_tokens():
    prompts = [[1] * 10] * 4 + [[1] * 9]
    few = [[1]] * 5
    # Two prompts of 10 have 20 tokens, and three have 30.
    assert [_of_equal_length(prompts, few)(0, tokens) for tokens in (5, 19, 20, 29, 30, 1000)] == [1, 1, 2, 2, 3, 4]
    assert [_of_equal_length(prompts, few)(start, 1000) for start in range(5)] == [4, 4, 4, 4, 5]
    assert [_of_equal_length(prompts, few)(start, 20) for start in range(5)] == [2, 3, 4, 4, 5]
    # Continuations are padded: after two prompts these are 3 rows of 7, and after three 4 rows of 30.
    many = [[5, 7], [3], [30], [1], [1]]
    assert [_of_equal_length(prompts, many)(0, tokens) for tokens in (20, 21, 119, 120)] == [1, 2, 2, 3]


def test_a_model_that_was_in_training_answers_without_dropout(tmp_path):
    folder = save_tiny_teacher(tmp_path, architecture="llama", layers=2)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attention_dropout=0.5)
    given = pairs()
    expected = [alone(model.eval(), *pair)[0] for pair in given]
    found = continuations(model.train(), given)
    np.testing.assert_allclose([one.log_likelihood for one in found], expected, rtol=1e-5, atol=1e-4)


def test_longest_prompts_are_read_first_and_each_of_them_once(model, monkeypatch):
    given = [([5, 6], [7, 8]), ([9] * 30, [3]), ([4] * 11, [5, 6]), ([9] * 30, [7, 8, 9]), ([4, 4], [3])]
    read, forward = [], type(model.base_model).forward

    def noted(self, input_ids, **more):
        # What follows a prompt comes with the prompt's cache.
        if more.get("cache") is None:
            read.extend(input_ids.tolist())
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(model.base_model), "forward", noted)
    continuations(model, given, batch_tokens=1)
    assert sorted(read, key=len, reverse=True) == read
    assert sorted(map(len, read)) == [2, 2, 11, 30]


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("longest", [1, 2, 5])
def test_a_model_without_a_cache_reads_prompts_and_continuations_together(model, monkeypatch, divided, longest):
    """A model that several devices share keeps no cache. Its likelihoods are the same."""
    monkeypatch.setattr(likelihood, "is_divided", lambda model: divided)
    dice = np.random.default_rng(3)
    prompts = [dice.integers(3, 300, size).tolist() for size in (1, 4, 4, 9)]
    given = [(prompt, dice.integers(3, 300, size).tolist()) for prompt in prompts for size in (longest, 1)]
    for (prompt, rest), found in zip(given, continuations(model, given), strict=True):
        expected, greedy = alone(model, prompt, rest)
        assert found.log_likelihood == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert (found.tokens, found.greedy) == (len(rest), greedy)
