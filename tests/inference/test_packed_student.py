"""Text questions to the packed student, against transformers and lm-eval's own model class."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from autodistill.data.dataset import Question, Questions
from autodistill.errors import InputError, TrialFailedError
from autodistill.evaluation.base import Subject
from autodistill.inference import packed_student as simulated
from autodistill.inference.packed_student import PackedStudent
from autodistill.testing import tiny_subject, tiny_tokenizer

PAIRS = [
    ("The miller carries", " the wooden boat"),
    ("The miller carries", " two apples in the market."),
    ("The miller carries ", "a silver lamp"),
    ("", "The fox"),
    ("A sailor", "ship"),
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> PackedStudent:
    subject: Subject = tiny_subject(tmp_path_factory.mktemp("student"))
    assert isinstance(subject.student, PackedStudent)
    return subject.student


def test_likelihoods_are_lm_evals(student: PackedStudent) -> None:
    """Compare with an independent implementation, which reads each pair alone and in full."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(student.tokenizer)
    theirs = HFLM(pretrained=student.model, tokenizer=tokenizer, device="cpu", batch_size=1)
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(PAIRS)]
    for mine, (expected, greedy) in zip(
        student.likelihoods(PAIRS), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert mine.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert mine.greedy == greedy


@pytest.fixture(scope="module")
def begun(student: PackedStudent, tmp_path_factory: pytest.TempPathFactory) -> PackedStudent:
    """The student with a tokenizer that begins every text with BOS."""
    folder = tmp_path_factory.mktemp("begun")
    tiny_tokenizer(begins=True).save_pretrained(folder)
    return replace(student, tokenizer=folder)


def test_what_begins_texts_begins_prompts_as_lm_eval_has_it(begun: PackedStudent) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(begun.tokenizer)
    theirs = HFLM(pretrained=begun.model, tokenizer=tokenizer, device="cpu", batch_size=1, add_bos_token=True)
    requests = [Instance("loglikelihood", {}, pair, place) for place, pair in enumerate(PAIRS)]
    found = begun.likelihoods(PAIRS)
    for mine, (expected, greedy) in zip(found, theirs.loglikelihood(requests, disable_tqdm=True), strict=True):
        assert mine.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert mine.greedy == greedy
    text = "The miller carries the wooden boat near the river."
    (nll,) = begun.rolling([text], window=512, stride=256)
    # lm-eval's class begins whole texts with BOS in any case, and would add it twice if it began all other texts too.
    theirs.add_bos_token = False
    (total,) = theirs.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    assert -nll.sum() == pytest.approx(total, abs=1e-4)
    with pytest.raises(InputError, match="has 0 tokens"):
        begun.likelihoods([("", "")])


def test_what_begins_texts_is_kept_where_the_context_is_short_and_not_put_twice(begun: PackedStudent) -> None:
    tokenizer, short = AutoTokenizer.from_pretrained(begun.tokenizer), replace(begun, context=8)
    prompt, rest = "The miller carries the wooden boat near the river", " in"
    (found,) = short.likelihoods([(prompt, rest)])
    last = tokenizer(prompt + rest, add_special_tokens=False)["input_ids"][-7:]
    ids = torch.tensor([[tokenizer.bos_token_id, *last]])
    with torch.no_grad():
        logits = begun.model(ids).logits[0, :-1].log_softmax(-1)
    chosen = logits.gather(1, ids[0, 1:, None])[:, 0]
    assert found.log_likelihood == pytest.approx(float(chosen[-found.tokens :].sum()), abs=1e-4)
    for asking in (prompt, f"<s>{prompt}"):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"][-4:]]])
        output = begun.model.generate(ids, max_new_tokens=3, do_sample=False)[0, 5:]
        assert short.write([asking], max_tokens=3) == [tokenizer.decode(output, skip_special_tokens=True)]
    ids = torch.tensor([[tokenizer.bos_token_id]])
    output = begun.model.generate(ids, max_new_tokens=7, do_sample=False)[0, 1:]
    assert short.write([prompt], max_tokens=7) == [tokenizer.decode(output, skip_special_tokens=True)]


def test_a_command_is_given_the_text_without_what_begins_it(begun: PackedStudent) -> None:
    tokenizer = AutoTokenizer.from_pretrained(begun.tokenizer)
    tokens = np.array([tokenizer("The miller carries two apples")["input_ids"]], dtype=np.int32)
    (one,) = replace(begun, data=replace(begun.data, tokens=tokens)).examples()
    assert one["text"] == "The miller carries two apples"
    assert one["tokens"] == tokens[0].tolist() == tokenizer(one["text"])["input_ids"]


@pytest.mark.parametrize("batch", [1, 7, 4096])
def test_nothing_depends_on_the_batch(student: PackedStudent, batch: int) -> None:
    expected = [one.log_likelihood for one in student.likelihoods(PAIRS)]
    found = [one.log_likelihood for one in replace(student, batch_tokens=batch).likelihoods(PAIRS)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_prompt_longer_than_the_context_loses_its_beginning(student: PackedStudent) -> None:
    short = replace(student, context=8)
    (found,) = short.likelihoods([("The miller carries the wooden boat near the river", " in")])
    tokenizer = AutoTokenizer.from_pretrained(student.tokenizer)
    ids = tokenizer("The miller carries the wooden boat near the river in", add_special_tokens=False)["input_ids"][-8:]
    with torch.no_grad():
        logits = student.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    count = found.tokens
    expected = sum(float(logits[len(ids) - count + i - 1, ids[len(ids) - count + i]]) for i in range(count))
    assert found.log_likelihood == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InputError, match="context of 8"):
        short.likelihoods([("x", " the wooden boat near the river in the market")])
    with pytest.raises(InputError, match="fit a context of 8"):
        short.write(["x"], max_tokens=8)


def test_writes_what_transformers_does_up_to_a_stop(student: PackedStudent) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student.tokenizer)
    prompts = ["The miller", "A fox forgets the north", ""]
    for prompt, text in zip(prompts, student.write(prompts, max_tokens=12), strict=True):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.bos_token_id]
        output = student.model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        assert text == tokenizer.decode(output, skip_special_tokens=True)
        for stop in filter(None, {text[3:4], text[2:5]}):
            assert student.write([prompt], max_tokens=12, stops=[stop]) == [text[: text.find(stop)]]


def _written(student: PackedStudent, prompts: list[str], stops: list[str]) -> tuple[list[str], int]:
    """Return answers of up to 60 tokens, and how often the model was called for them."""
    calls: list[None] = []
    hook = student.model.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        return student.write(prompts, max_tokens=60, stops=stops), len(calls)
    finally:
        hook.remove()


@pytest.mark.slow
def test_a_stop_of_several_tokens_ends_an_answer_where_it_would_be_cut(student: PackedStudent) -> None:
    prompts = ["The miller", "A fox forgets the north", "", "The river runs"]
    free, calls = _written(student, prompts, [])
    assert calls == 60
    for prompt, text in zip(prompts, free, strict=True):
        for stop in (text[4:11], text[20:26]):
            alone, fewer = _written(student, [prompt], [stop])
            assert alone == [text.partition(stop)[0]]
            assert fewer < 30
            assert _written(student, prompts, [stop])[0] == [one.partition(stop)[0] for one in free]
    # A stop that begins before another one counts first, even if it ends long after it.
    short, long = free[0][12:15], free[0][10:40]
    assert _written(student, prompts[:1], [short, long])[0] == [free[0][: min(map(free[0].find, (short, long)))]]


@pytest.mark.parametrize(
    ("text", "stops", "settled"),
    [
        ("one two", ["three"], False),
        ("one two", ["one", "x"], True),
        ("one two", ["two", "one two three"], False),
        ("one two!", ["two", "one two three"], True),
        ("one two\ufffd", ["two", "one two é"], False),
        ("", ["a"], False),
    ],
)
def test_a_stop_counts_once_none_can_come_before_it(text: str, stops: list[str], settled: bool) -> None:
    assert simulated._settled(text, stops) is settled


def test_long_texts_are_read_in_windows(student: PackedStudent) -> None:
    text = "The miller carries the wooden boat near the river. " * 5
    (found,) = student.rolling([text], window=512, stride=256)
    tokenizer = AutoTokenizer.from_pretrained(student.tokenizer)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert found.mean() == pytest.approx(float(student.model(ids, labels=ids).loss), rel=1e-5)


def test_what_is_saved_is_what_was_asked(student: PackedStudent, tmp_path) -> None:
    student.save(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    again = replace(student, model=model, tokenizer=tmp_path / "saved")
    assert [one.log_likelihood for one in again.likelihoods(PAIRS)] == [
        one.log_likelihood for one in student.likelihoods(PAIRS)
    ]


def test_examples_are_the_splits_own(student: PackedStudent) -> None:
    examples = student.examples()
    assert len(examples) == len(student.data.tokens)
    assert examples[2]["tokens"] == student.data.tokens[2].tolist()
    tokenizer = AutoTokenizer.from_pretrained(student.tokenizer)
    entry = Question(4, tuple(tokenizer("2 + 2 =", add_special_tokens=False)["input_ids"]), "4", 2, None)
    questions = Questions(task=None, stops=(1,), tokenizer=student.tokenizer, entries=(entry,))
    (question,) = replace(student, data=replace(student.data, questions=questions)).examples()
    assert question == {"id": 0, "document": 4, "prompt": "2 + 2 =", "answer": "4"}


def test_likelihoods_that_are_not_numbers_fail_the_trial(tmp_path) -> None:
    broken = tiny_subject(tmp_path).student
    assert broken is not None
    broken.model.get_input_embeddings().weight.data[:] = math.nan
    for ask in (lambda: broken.likelihoods(PAIRS), lambda: broken.rolling(["The fox runs"], 16, 8)):
        with pytest.raises(TrialFailedError, match="not finite") as caught:
            ask()
        assert caught.value.cause == "nan"
